"""What the run's listed nodes find out about others: who answers, how far and how fast, who is present.

Theory of operation. Every node answers ``/agora/self/1`` to listed nodes; seeds, trainers and authorities
look at peers for authorities (``/agora/probe/1``). ``inspect`` is the authority's: it looks at a peer itself
and through up to four listed nodes in parallel, which gives the median round trip over several places, and
then measures bandwidth from one place after the other (together they would only share the peer's line),
nearest first, until it is enough or three have measured; the best counts, since a prober's own line may be
the narrow one. ``session_of`` asks for nothing but the process that answers. ``watch_presence`` asks the
replicas in the stage rosters, every minute, whether they are there.

Limits: 32 inspections at once (more wait), one of a peer at a time, 32 MB a peer and minute, 15 s without and
25 s with measuring; 16 questions at once in the presence watch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import attrs
import trio

from agorad import outside
from p2p import probe, selfreport
from p2p.errors import P2PError, Refused
from p2p.identity import PeerId
from p2p.probe import Probed, Prober
from p2p.selfreport import SelfReport

if TYPE_CHECKING:
    from agorad.node import Node

HELPERS: Final = 4
HELPERS_WAIT_S: Final = 2.0
"""How long the others are waited for once the authority itself has reached the peer."""
INSPECTIONS: Final = 32
MEASURING: Final = 3
"""Places that measure bandwidth, at most."""
MEASURE_BYTES: Final = 4_000_000
"""A good size for ``inspect``: 0.6 s at 50 Mbit/s each way."""
INSPECT_S: Final = 25.0
"""What was measured by then counts."""
PRESENCE_S: Final = 60.0
PRESENCE_PARALLEL: Final = 16

Rosters = Callable[[], Awaitable[Mapping[PeerId, Sequence[str]]]]
"""Reads who says to be there, and at which addresses."""


@attrs.frozen(kw_only=True)
class Findings:
    """What ``inspect`` found out. Figures are None where they were not measured."""

    reached: bool
    why: str = ""
    """If it was not reached, or not measured: what was seen, for people."""
    addr: str = ""
    rtt_ms: float | None = None
    """Median over ``places``."""
    places: int = 0
    """From how many nodes of the run the round trip was measured."""
    up_mbps: float | None = None
    """Best of those measured: from the peer to others of the run."""
    down_mbps: float | None = None
    session: bytes | None = None

    @property
    def mbps(self) -> float | None:
        """What the peer manages each way."""
        if self.up_mbps is None or self.down_mbps is None:
            return None
        return min(self.up_mbps, self.down_mbps)


@attrs.define(eq=False)
class Inspector:
    """The part of a node that looks at others; made by ``install``."""

    prober: Prober
    slots: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(INSPECTIONS))
    under_way: set[PeerId] = attrs.field(factory=set)


def install(node: Node) -> Inspector:
    """Answer what listed nodes ask; look at others for authorities unless this is a worker."""

    def listed(peer: PeerId) -> bool:
        return node.host.membership is not None and peer in node.host.membership.trust.standing

    def authority(peer: PeerId) -> bool:
        return node.host.membership is not None and peer in node.host.membership.trust.authorities

    report = SelfReport(node.session, listed)
    node.host.handle(selfreport.PROTOCOL, report.serve, open_to_all=True, aside=True)
    prober = Prober(node.host, authority)
    if node.config.node.role != "worker":
        node.host.handle(probe.PROTOCOL, prober.serve)
        node.host.handle(outside.PROTOCOL, outside.Outside(prober).serve, open_to_all=True)
    return Inspector(prober)


async def inspect(
    node: Node, peer: PeerId, addrs: Sequence[str], *, bytes: int = 0, enough_mbps: float = math.inf
) -> Findings:
    """Look at a peer at the addresses that it announced, from several places.

    ``bytes``: to measure each way (``MEASURE_BYTES``), 0 for no bandwidth; measuring stops early once
    ``enough_mbps`` is reached both ways. Refused ("busy", with the time to wait) while the same peer is
    being inspected, or when its line was measured too much lately.
    """
    inspector = node.inspector
    if peer in inspector.under_way:
        raise Refused("busy", "this node is being looked at already", 2.0)
    inspector.under_way.add(peer)
    try:
        async with inspector.slots:
            until = trio.current_time() + INSPECT_S
            seen = await _look_from_all(node, peer, addrs)
            found = _combined(seen)
            if not bytes or found.rtt_ms is None:
                return found
            nearest = sorted(
                (place for place, view in seen.items() if view.rtt_ms is not None),
                key=lambda place: seen[place].rtt_ms or 0.0,
            )
            measured: list[Probed] = []
            with trio.CancelScope(deadline=until):
                await _measure(node, measured, peer, addrs, bytes, enough_mbps, nearest[:MEASURING])
            return attrs.evolve(
                found,
                why=next((view.why for view in measured if view.why), found.why),
                up_mbps=_best(view.up_mbps for view in measured),
                down_mbps=_best(view.down_mbps for view in measured),
            )
    finally:
        inspector.under_way.discard(peer)


async def session_of(node: Node, peer: PeerId, addrs: Sequence[str]) -> bytes | None:
    """The session of the process that answers with the peer's key at one of the addresses, within 5 s.

    None if none answers. It is how a second process with a key is told from a restart of the first.
    """
    try:
        return await node.inspector.prober.who(peer, addrs)
    except P2PError:
        return None


async def watch_presence(
    node: Node,
    rosters: Rosters,
    on_seen: Callable[[PeerId, float], Awaitable[None]],
    *,
    every_s: float = PRESENCE_S,
) -> None:
    """Until cancelled: ask who says to be there whether it is, and call ``on_seen(peer, now)`` if so."""
    slots = trio.CapacityLimiter(PRESENCE_PARALLEL)

    async def look(peer: PeerId, addrs: Sequence[str]) -> None:
        async with slots:
            connection = node.host.connections.get(peer)  # one that cannot be dialled came to us
            here = connection is not None and connection.usable
            if not here and await session_of(node, peer, addrs) is None:
                return
        await on_seen(peer, node.clock())

    while True:
        began = trio.current_time()
        replicas = await rosters()
        async with trio.open_nursery() as nursery:
            for peer, addrs in replicas.items():
                if peer != node.identity.peer_id:
                    nursery.start_soon(look, peer, addrs)
        await trio.sleep_until(began + every_s)


def stage_rosters(node: Node) -> Rosters:
    """Reads the replicas of all stages from the hash table; their certificates are checked."""
    from stage.roster import Roster  # not before there is a host with a membership

    async def read() -> dict[PeerId, list[str]]:
        assert node.host.membership is not None
        roster = Roster(node.dht, node.host.membership.trust, node.clock)
        found: dict[PeerId, list[str]] = {}
        for stage in range(node.manifest.model.stages):
            view = roster.view(stage)
            await roster.refresh(view)
            for peer, entry in view.entries.items():
                if entry.record.phase not in ("leaving", "paused"):
                    found[peer] = [str(addr) for addr in entry.addrs]
        return found

    return read


async def _look_from_all(node: Node, peer: PeerId, addrs: Sequence[str]) -> dict[PeerId, Probed]:
    """By place; this node's own view is there in any case."""
    own = node.identity.peer_id
    seen: dict[PeerId, Probed] = {}

    async def look(place: PeerId) -> None:
        try:
            seen[place] = await _from(node, place, peer, addrs, 0)
        except P2PError as error:
            if place == own:  # that another does not look is its own affair
                seen[place] = Probed(why=str(error))
        if place == own and seen[place].reached:
            nursery.cancel_scope.deadline = trio.current_time() + HELPERS_WAIT_S

    async with trio.open_nursery() as nursery:
        for place in (own, *_helpers(node, peer)):
            nursery.start_soon(look, place)
    return seen


async def _measure(
    node: Node,
    measured: list[Probed],
    peer: PeerId,
    addrs: Sequence[str],
    size: int,
    enough_mbps: float,
    places: Sequence[PeerId],
) -> None:
    """One place after the other, into ``measured``. Refused if nobody may measure now."""
    refusal: Refused | None = None
    for place in places:
        try:
            if place != node.identity.peer_id:
                node.inspector.prober.budget.spend(peer, 2 * size)
            view = await _from(node, place, peer, addrs, size)
        except Refused as error:
            refusal = error
            continue
        except P2PError:
            continue
        measured.append(view)
        ways = _best(view.up_mbps for view in measured), _best(view.down_mbps for view in measured)
        if min(way if way is not None else -1.0 for way in ways) >= enough_mbps:
            return
    if not measured and refusal is not None:
        raise refusal


async def _from(node: Node, place: PeerId, peer: PeerId, addrs: Sequence[str], size: int) -> Probed:
    if place == node.identity.peer_id:
        return await node.inspector.prober.probe(peer, addrs, size=size)
    return await probe.ask(node.host, place, peer, addrs, size=size)


def _helpers(node: Node, peer: PeerId) -> list[PeerId]:
    """Listed nodes to look from: those with a connection first, then at random."""
    nodes = [ref.peer_id for ref in (*node.manifest.seeds, *node.manifest.trainers)]
    others = [other for other in dict.fromkeys(nodes) if other not in (peer, node.identity.peer_id)]
    node.rng.shuffle(others)
    others.sort(key=lambda other: other not in node.host.connections)
    return others[:HELPERS]


def _combined(seen: Mapping[PeerId, Probed]) -> Findings:
    reached = [view for view in seen.values() if view.reached]
    if not reached:
        return Findings(reached=False, why=next(view.why for view in seen.values() if view.why))
    rtts = [view.rtt_ms for view in reached if view.rtt_ms is not None]
    return Findings(
        reached=True,
        why=next((view.why for view in reached if view.why), ""),
        addr=reached[0].addr,
        rtt_ms=statistics.median(rtts) if rtts else None,
        places=len(rtts),
        session=next((view.session for view in reached if view.session is not None), None),
    )


def _best(figures: Iterable[float | None]) -> float | None:
    return max((figure for figure in figures if figure is not None), default=None)
