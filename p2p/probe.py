"""/agora/probe/1: looking at a peer from outside: can it be reached, how far and how fast is it.

Theory of operation. A ``Prober`` dials a *fresh* connection aside (``Host.aside``) to addresses that a peer
announced (``p2p.reach`` says which may be dialled), whose handshake proves the peer's id; asks it who it is
and pings it five times (``p2p.selfreport``); and, where asked to, measures bytes both ways. Seeds, trainers
and authorities serve this to authorities, so that an authority sees a peer as several places do:

    → {t: "probe", peer, addrs, bytes}
    ← {t: "probed", reached, why, addr, rtt_ms, up_mbps, down_mbps, session}

Limits: 10 s a probe, one probe of a peer at a time, 32 MB a peer and minute, 8 probes for others at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self, final

import attrs
import trio

from p2p import selfreport
from p2p.errors import DialError, LocalError, P2PError, PeerGone, Refused, RemoteError
from p2p.host import Host
from p2p.identity import PeerId, public_key_of
from p2p.multiaddr import Multiaddr
from p2p.reach import MOST_ADDRS, dialable
from p2p.rpc import Call
from p2p.selfreport import MOST_BYTES, SESSION_BYTES, Budget

PROTOCOL: Final = "/agora/probe/1"
PROBE_S: Final = 10.0
DIAL_S: Final = 4.0
TALK_S: Final = 3.0
"""For asking who it is and five pings."""
MEASURE_S: Final = 2.0
"""One way, at most; a slow line is measured by what it managed in that time."""
ASK_S: Final = 5.0
PINGS: Final = 5
LEAST_PINGS: Final = 3
PARALLEL: Final = 8
"""Probes for others at once."""
ADDR_LIMIT: Final = 256
WHY_LIMIT: Final = 400
MOST_FIGURE: Final = 1e7


@attrs.define(kw_only=True)
class Probed:
    """What one prober saw, filled in as it looks. Figures are None where they were not measured."""

    reached: bool = False
    """Somebody with the peer's key answers at one of the addresses."""
    why: str = ""
    """What went wrong, for people; may be there although the peer was reached."""
    addr: str = ""
    """Where it was reached."""
    rtt_ms: float | None = None
    up_mbps: float | None = None
    """From the peer to the prober."""
    down_mbps: float | None = None
    session: bytes | None = None

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": "probed", **attrs.asdict(self)}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Self:
        """``RemoteError`` unless every field is there and within its bounds."""
        reached, why, addr, session = (header.get(name) for name in ("reached", "why", "addr", "session"))
        if header.get("t") != "probed" or type(reached) is not bool:
            raise RemoteError("an answer to a probe that is none")
        if (
            not isinstance(why, str)
            or len(why) > WHY_LIMIT
            or not isinstance(addr, str)
            or len(addr) > ADDR_LIMIT
        ):
            raise RemoteError("an answer to a probe with a text that is none or too long")
        if session is not None and not (isinstance(session, bytes) and len(session) == SESSION_BYTES):
            raise RemoteError("an answer to a probe with a session that is none")
        rtt_ms, up_mbps, down_mbps = (
            _figure(header.get(name)) for name in ("rtt_ms", "up_mbps", "down_mbps")
        )
        return cls(
            reached=reached,
            why=why,
            addr=addr,
            rtt_ms=rtt_ms,
            up_mbps=up_mbps,
            down_mbps=down_mbps,
            session=session,
        )


@final
class Prober:
    """Probes of one host, for itself (``probe``, ``who``) and for others (``serve``)."""

    def __init__(self, host: Host, may_ask: Callable[[PeerId], bool]) -> None:
        self.budget = Budget()
        """What may be spent on measuring each peer, by this host's word."""
        self._host = host
        self._may_ask = may_ask
        self._looking: set[PeerId] = set()
        self._serving = 0

    async def who(self, peer: PeerId, addrs: Sequence[str], *, deadline: float = DIAL_S + 1) -> bytes:
        """The session of the process with the peer's key at these addresses; DialError if none answers."""
        with trio.move_on_after(deadline):
            usable = await self._usable(peer, addrs)
            async with (
                self._host.aside(peer, usable, deadline=DIAL_S) as connection,
                self._host.call_on(connection, selfreport.PROTOCOL) as call,
            ):
                return await selfreport.who(call)
        raise DialError(f"no answer within {deadline:g} s")

    async def probe(self, peer: PeerId, addrs: Sequence[str], *, size: int = 0) -> Probed:
        """Look at a peer; ``size`` bytes are measured each way. Refused ("busy") if that is too much now."""
        if not 0 <= size <= MOST_BYTES:
            raise LocalError(f"a measurement takes 0 to {MOST_BYTES} bytes, not {size}")
        with self._alone(peer):
            if size:
                self.budget.spend(peer, 2 * size)
            seen = Probed(why=f"no answer within {PROBE_S:g} s")
            with trio.move_on_after(PROBE_S) as scope:
                try:
                    await self._look(seen, peer, addrs, size)
                except P2PError as error:
                    seen.why = str(error)[:WHY_LIMIT]
            if scope.cancelled_caught and not seen.why:
                seen.why = f"it took longer than {PROBE_S:g} s"
            return seen

    async def serve(self, call: Call) -> None:
        """The handler of ``PROTOCOL``."""
        if not self._may_ask(call.peer):
            raise Refused("not_authority", "only the authorities of the run may ask for a probe")
        if self._serving >= PARALLEL:
            raise Refused("busy", f"{PARALLEL} probes are running already", 2.0)
        self._serving += 1
        try:
            with trio.fail_after(ASK_S):
                header = (await call.receive()).header
            peer, addrs, size = _request(header)
            if peer == self._host.peer_id:
                raise RemoteError("a prober does not look at itself")
            await call.send((await self.probe(peer, addrs, size=size)).to_header())
        finally:
            self._serving -= 1

    async def _look(self, seen: Probed, peer: PeerId, addrs: Sequence[str], size: int) -> None:
        usable = await self._usable(peer, addrs)
        host = self._host
        async with host.aside(peer, usable, deadline=DIAL_S) as connection:
            seen.reached, seen.addr, seen.why = True, connection.addr[:ADDR_LIMIT], ""
            rtts: list[float] = []
            with trio.move_on_after(TALK_S):
                async with host.call_on(connection, selfreport.PROTOCOL) as call:
                    seen.session = await selfreport.who(call)
                    while len(rtts) < PINGS:
                        rtts.append(await selfreport.ping(call))
            if len(rtts) < LEAST_PINGS:
                seen.why = f"it can be reached but did not answer {LEAST_PINGS} pings within {TALK_S:g} s"
                return
            seen.rtt_ms = statistics.median(rtts) * 1000
            if size:
                async with host.call_on(connection, selfreport.PROTOCOL) as call:
                    seen.down_mbps = await selfreport.push(call, size, MEASURE_S)
                async with host.call_on(connection, selfreport.PROTOCOL) as call:
                    seen.up_mbps = await selfreport.pull(call, size, MEASURE_S)

    async def _usable(self, peer: PeerId, addrs: Sequence[str]) -> list[Multiaddr]:
        if peer == self._host.peer_id:
            raise LocalError("a prober does not look at itself")
        usable, left_out = await dialable(addrs, peer, self._host.addrs)
        if not usable:
            raise DialError("; ".join(left_out) or "no address was announced")
        return usable

    @contextmanager
    def _alone(self, peer: PeerId) -> Iterator[None]:
        if peer in self._looking:
            raise Refused("busy", "this node is being looked at already", 2.0)
        self._looking.add(peer)
        try:
            yield
        finally:
            self._looking.discard(peer)


async def ask(host: Host, prober: PeerId, peer: PeerId, addrs: Sequence[str], *, size: int = 0) -> Probed:
    """What another prober sees. P2PError when it does not say."""
    with trio.move_on_after(DIAL_S + PROBE_S + 1):
        async with await host.call(prober, PROTOCOL, deadline=DIAL_S) as call:
            await call.send({"t": "probe", "peer": peer, "addrs": list(addrs)[:MOST_ADDRS], "bytes": size})
            return Probed.from_header((await call.receive()).header)
    raise PeerGone(f"{prober} did not say what it saw")


def _request(header: Mapping[str, Any]) -> tuple[PeerId, list[str], int]:
    peer, addrs, size = header.get("peer"), header.get("addrs"), header.get("bytes")
    if header.get("t") != "probe" or not isinstance(peer, str):
        raise RemoteError(f"{PROTOCOL}: no probe")
    public_key_of(PeerId(peer))
    if (
        not isinstance(addrs, list)
        or len(addrs) > MOST_ADDRS
        or not all(isinstance(addr, str) and len(addr) <= ADDR_LIMIT for addr in addrs)
    ):
        raise RemoteError(f"{PROTOCOL}: addrs is not a list of at most {MOST_ADDRS} short texts")
    if type(size) is not int or not 0 <= size <= MOST_BYTES:
        raise RemoteError(f"{PROTOCOL}: bytes is not 0 to {MOST_BYTES}")
    return PeerId(peer), addrs, size


def _figure(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_FIGURE:
        raise RemoteError("an answer to a probe with a figure that is none")
    return float(value)
