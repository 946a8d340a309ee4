"""The trio shell of one committed round: a line to every other member around an ``Exchange``.

Each pair of members shares one call, opened by the earlier in the roster (members that cannot be dialled
come first). It opens with ``{t: link, group}``; everything after is the exchange's. Inputs reach the machine
directly, on the one thread; what it says is posted to outboxes, whose writers are the only ones that wait.

A pair whose call is not there ``LINK_S`` after the commit, or ends, or whose connection does, is lost to each
other for this round.
At the end last words (the verdict) are flushed for at most ``FLUSH_S``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from p2p.averaging.butterfly import Exchange
from p2p.averaging.filling import LOOK_S, Filling
from p2p.averaging.line import Outbox, carry, check_mate
from p2p.averaging.meter import Meter
from p2p.averaging.outcome import Outcome, RoundFailed
from p2p.averaging.verdict import DIGEST
from p2p.errors import P2PError, Refused, RemoteError
from p2p.multiaddr import Multiaddr
from p2p.path import Path
from p2p.rpc import Call

if TYPE_CHECKING:
    from p2p.host import Host
    from p2p.identity import PeerId

PROTOCOL: Final = "/agora/round/1"
LINK_S: Final = 4.0
AGAIN_S: Final = 0.5
"""Within which one whose connection ended makes another, if it lives."""
FLUSH_S: Final = 1.0
STOOD_S: Final = 1.0
"""Waking up this much too late means that the process was stopped, not only busy."""


class Session:
    """One member's running exchange."""

    def __init__(
        self, host: Host, exchange: Exchange, clock: Callable[[], float], *, filling: Filling[PeerId] | None
    ) -> None:
        """``filling``: how the member fills its line; None: it leaves the line to others as well."""
        self._host = host
        self._exchange = exchange
        self._clock = clock
        roster = exchange.roster
        self.meter = Meter(clock)
        self._outboxes = {peer: Outbox(self.meter) for i, peer in enumerate(roster.peers) if i != exchange.me}
        self._linked = {peer: trio.Event() for peer in self._outboxes}
        self._filling = filling
        self._carrying = 0
        self.ended_at = 0.0
        """When the exchange was over; last words may follow."""
        self._changed = trio.Event()
        self._max_payload = max(roster.part_bytes, len(roster.spans) * DIGEST)

    async def run(self) -> Outcome:
        """The outcome, or ``RoundFailed``."""
        exchange = self._exchange
        async with trio.open_nursery() as nursery:
            for member, peer in enumerate(exchange.roster.peers):
                if member > exchange.me:
                    nursery.start_soon(self._dial, peer)
                elif member < exchange.me:
                    nursery.start_soon(self._expect, peer)
            if self._filling is not None:
                nursery.start_soon(self._fill_lines, self._filling)
            exchange.start()
            self._pump()
            while not exchange.done:
                due = exchange.wake_at()
                self._changed = trio.Event()
                with trio.move_on_after(max(0.0, due - self._clock())):
                    await self._changed.wait()
                now = self._clock()
                if not exchange.done and now >= due:
                    if now > due + STOOD_S:  # what was said meanwhile is not read yet
                        exchange.stood_still(now)
                    exchange.tick(now)
                    self._pump()
            self.ended_at = self._clock()
            for outbox in self._outboxes.values():
                outbox.forget_payloads()
                outbox.close()
            with trio.move_on_after(FLUSH_S):
                while self._carrying:
                    self._changed = trio.Event()
                    await self._changed.wait()
            nursery.cancel_scope.cancel()
        if exchange.outcome is None:
            raise RoundFailed(exchange.failed or "the round ended without an outcome")
        return attrs.evolve(
            exchange.outcome,
            payload_out=sum(outbox.payload_out for outbox in self._outboxes.values()),
            payload_in=sum(outbox.payload_in for outbox in self._outboxes.values()),
        )

    async def serve(self, call: Call) -> None:
        """A member opened its line to us."""
        peers = self._exchange.roster.peers
        if call.peer not in self._outboxes or self._linked[call.peer].is_set():
            raise RemoteError("a line that was not expected")
        if peers.index(call.peer) > self._exchange.me:
            raise RemoteError("a line from one whom we dial")
        await self._carry(call)

    async def _dial(self, peer: PeerId) -> None:
        roster = self._exchange.roster
        candidate = roster.members[roster.peers.index(peer)]
        try:
            addrs = [Multiaddr.parse(addr).bare() for addr in candidate.addrs]
            async with await self._host.call(peer, PROTOCOL, addrs=addrs, deadline=LINK_S) as call:
                check_mate(call, self._host, roster.key.stage)
                await call.send({"t": "link", "group": roster.group, "number": roster.key.number})
                await self._carry(call)
        except P2PError as error:
            self._lose(peer, str(error))

    async def _expect(self, peer: PeerId) -> None:
        why = "no line from it"
        with trio.move_on_after(LINK_S):
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    """One whose connection ended, and who makes no other, opens no line."""
                    nonlocal why
                    while (connection := self._host.connections.get(peer)) is not None:
                        await connection.closed.wait()
                        await trio.sleep(AGAIN_S)
                        if self._host.connections.get(peer) is None:
                            why = "its connection ended"
                            nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                await self._linked[peer].wait()
                nursery.cancel_scope.cancel()
        if not self._linked[peer].is_set():
            self._lose(peer, why)

    async def _carry(self, call: Call) -> None:
        peer = call.peer
        member = self._exchange.roster.peers.index(peer)
        self._linked[peer].set()

        def heard(header: Mapping[str, Any], payload: memoryview) -> None:
            self._exchange.heard(member, header, payload)
            self._pump()

        self._carrying += 1
        try:
            await carry(
                call,
                self._outboxes[peer],
                heard,
                max_payload=self._max_payload,
                place=lambda header, size: self._exchange.place(member, header, size),
            )
        except (RemoteError, Refused) as error:
            self._lose(peer, str(error))
            raise
        finally:
            self._carrying -= 1
            self._lose(peer, "its line ended")
            self._changed.set()

    async def _fill_lines(self, filling: Filling[PeerId]) -> None:
        """Bound each mate's connection to its part, and have them fill as soon as all windows are open.

        Then all of the host's connections do: what is sent in another way beside these does not come through.
        Mates that are all near share no line that could be divided.
        """
        connections = self._host.connections
        filled = False
        with ExitStack() as lines:
            lines.callback(self._unbound)
            while True:
                paths = self._paths()
                known = len(paths) == len(self._outboxes)
                if known and all(path.near for path in paths.values()):
                    return
                rates = filling.look(self._clock(), paths)
                for peer in paths:
                    connections[peer].pace(rates.get(peer))
                if not filled and known:
                    filled = all(filling.is_open(path, len(paths)) for path in paths.values())
                    for connection in connections.values() if filled else ():
                        lines.enter_context(connection.filling())
                await trio.sleep(LOOK_S)

    def _unbound(self) -> None:
        for peer in self._outboxes.keys() & self._host.connections.keys():
            self._host.connections[peer].pace(None)

    def _paths(self) -> dict[PeerId, Path]:
        """Of the mates whose connection the kernel knows something of."""
        connections = {peer: self._host.connections.get(peer) for peer in self._outboxes}
        paths = {peer: one.path() for peer, one in connections.items() if one is not None}
        return {peer: path for peer, path in paths.items() if path is not None}

    def _lose(self, peer: PeerId, why: str) -> None:
        self._outboxes[peer].close()
        self._exchange.lost(self._exchange.roster.peers.index(peer), why)
        self._pump()

    def _pump(self) -> None:
        """Hand out what the machine said; wake the runner, whose next due time may be another."""
        exchange = self._exchange
        peers = exchange.roster.peers
        while exchange.out:
            out, exchange.out = exchange.out, []
            for send in out:
                # Everybody waits for a part until its deputy's word is there, which depends on nothing else.
                acknowledged = send.header["t"] == "ack"
                self._outboxes[peers[send.to]].post(send.header, send.payload, first=acknowledged)
        if exchange.done:
            self._changed.set()
