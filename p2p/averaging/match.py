"""The trio shell of one matchmaking: streams to leaders, the hash table, probes, and time.

Followers' streams belong to the protocol's server (``averager``); what they say arrives through
``announced``, ``follower_left`` and ``follower_said``, and what they are told leaves through ``tell``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import trio

from p2p.averaging.line import Outbox, carry, check_mate
from p2p.averaging.lobby import Announce, Announcement, Answer, Leave, Probe, RoundConfig, Tell
from p2p.averaging.matchmaking import Matchmaker
from p2p.averaging.outcome import NobodyCame, RoundFailed
from p2p.averaging.roster import Candidate, Roster, Sign
from p2p.averaging.session import PROTOCOL
from p2p.averaging.table import Table, announce_in, candidates_in
from p2p.errors import P2PError
from p2p.identity import verify
from p2p.multiaddr import Multiaddr

if TYPE_CHECKING:
    from p2p.host import Host
    from p2p.identity import PeerId

TABLE_AFTER_S: Final = 0.4
"""Matches among mates who know each other are made by then and cost the hash table nothing."""
TABLE_EVERY_S: Final = 1.0


class Match:
    """One candidate's search for its round."""

    def __init__(
        self,
        host: Host,
        table: Table,
        mine: Announcement,
        expected: Collection[PeerId],
        *,
        given_up_by: Iterable[Candidate],
        tell: Callable[[PeerId, dict[str, Any]], None],
        sign: Sign,
        clock: Callable[[], float],
        rng: random.Random,
        config: RoundConfig,
        nursery: trio.Nursery,
        recent: Sequence[float] = (),
        distrusted: Collection[PeerId] = (),
    ) -> None:
        self._host = host
        self._table = table
        self._mine = mine
        self._expected = frozenset(expected) - {host.peer_id}
        self._tell = tell
        self._clock = clock
        self._rng = rng
        self._config = config
        self._nursery = nursery
        self._began = clock()
        self._leaders: dict[PeerId, tuple[Outbox, trio.CancelScope]] = {}
        self._changed = trio.Event()
        self._maker = Matchmaker(
            mine,
            expected,
            given_up_by=given_up_by,
            config=config,
            sign=sign,
            verify=verify,
            now=clock(),
            recent=recent,
            distrusted=distrusted,
        )

    async def settle(self) -> Roster:
        """The committed roster, or ``RoundFailed``."""
        scope = trio.CancelScope()
        self._nursery.start_soon(self._ask_table, scope)
        self._pump()
        try:
            while not self._maker.done:
                due = self._maker.wake_at()
                self._changed = trio.Event()
                with trio.move_on_after(max(0.0, due - self._clock())):
                    await self._changed.wait()
                if self._clock() >= due:
                    self._maker.tick(self._clock())
                    self._pump()
        finally:
            scope.cancel()
            for outbox, following in self._leaders.values():
                outbox.close()
                following.deadline = trio.current_time() + 1.0  # for last words, not for a dial
        if self._maker.roster is None:
            failure = NobodyCame if self._maker.alone else RoundFailed
            raise failure(self._maker.failed or "no roster")
        return self._maker.roster

    def abandon(self, why: str) -> None:
        """End the search with ``RoundFailed``, unless a roster is committed."""
        self._maker.abandon(why)
        self._pump()

    # -- what followers say

    def announced(self, theirs: Announcement, at: float) -> None:
        self._maker.announced(theirs, at, self._clock())
        self._pump()

    def follower_left(self, peer: PeerId, gave_up: bool) -> None:
        self._maker.follower_left(peer, gave_up, self._clock())
        self._pump()

    def follower_said(self, peer: PeerId, header: Mapping[str, Any]) -> None:
        self._maker.follower_said(peer, header, self._clock())
        self._pump()

    # -- what the machine wants

    def _pump(self) -> None:
        maker = self._maker
        while maker.out:
            out, maker.out = maker.out, []
            for action in out:
                if isinstance(action, Tell):
                    self._tell(action.peer, action.header)
                elif isinstance(action, Announce):
                    outbox, scope = Outbox(), trio.CancelScope()
                    self._leaders[action.peer] = (outbox, scope)
                    self._nursery.start_soon(self._follow, action, outbox, scope)
                elif isinstance(action, Answer):
                    self._leaders[action.peer][0].post(action.header)
                elif isinstance(action, Leave):
                    outbox, scope = self._leaders.pop(action.peer)
                    outbox.post({"t": "leave", "gave_up": action.gave_up})
                    outbox.close()
                    scope.deadline = trio.current_time() + 1.0
                elif isinstance(action, Probe):
                    self._nursery.start_soon(self._probe, action.peer)
        self._changed.set()

    async def _follow(self, action: Announce, outbox: Outbox, scope: trio.CancelScope) -> None:
        peer = action.peer

        def heard(header: Mapping[str, Any], _payload: memoryview) -> None:
            self._maker.leader_said(peer, header, self._clock())
            self._pump()
            if self._maker.done:
                outbox.close()

        with scope:
            try:
                addrs = [Multiaddr.parse(addr).bare() for addr in action.addrs]
                patience = self._config.patience_s
                async with await self._host.call(peer, PROTOCOL, addrs=addrs, deadline=patience) as call:
                    check_mate(call, self._host, self._mine.key.stage)
                    await call.send(self._mine.header() | {"seconds": self._seconds_left()})
                    await carry(call, outbox, heard)
            except P2PError:
                pass  # unreachable or not willing: the machine turns to the next one
        if self._leaders.get(peer, (None,))[0] is outbox:
            self._maker.leader_lost(peer, self._clock())
            self._pump()

    async def _probe(self, peer: PeerId) -> None:
        open_ = False
        try:
            with trio.move_on_after(self._config.patience_s):
                wait = self._config.patience_s
                async with await self._host.call(peer, PROTOCOL, deadline=wait) as call:
                    await call.send({"t": "where", "number": self._mine.key.number})
                    open_ = (await call.receive()).header.get("open") is True
        except P2PError:
            pass  # it cannot come either way
        if not open_:
            self._maker.passed(peer, self._clock())
            self._pump()

    async def _ask_table(self, scope: trio.CancelScope) -> None:
        """Announce in the hash table and learn from it; it may fail, mates are asked directly as well."""
        with scope:
            await trio.sleep(TABLE_AFTER_S * self._rng.uniform(0.5, 1.0) if self._expected else 0.0)
            await announce_in(self._table, self._host, self._mine, self._seconds_left())
            while True:
                for peer, addrs in (await candidates_in(self._table, self._mine.key, TABLE_EVERY_S)).items():
                    self._maker.found(peer, addrs, self._clock())
                self._pump()
                await trio.sleep(TABLE_EVERY_S)

    def _seconds_left(self) -> float:
        return max(0.0, self._mine.seconds - (self._clock() - self._began))
