"""What every node answers on its control socket; roles add commands of their own.

``status`` is this node, from memory. ``peers`` are its connections. ``swarm`` and ``ping`` ask others: the
stages' rosters and the step clock from the hash table, a peer for an echo. ``leave`` and ``restart`` stop
the node in order; ``reload`` is SIGHUP's, ``stacks`` says where its tasks are; ``pause`` and ``resume`` are
``agorad.pausing``'s.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from agorad import outside as from_outside
from agorad import tasks
from agorad.control import BadRequest, Command
from p2p.errors import LocalError, P2PError
from p2p.identify import identify
from p2p.identify import ping as echo
from p2p.identity import PeerId
from p2p.kad.record import Record
from p2p.multiaddr import Multiaddr
from p2p.records import ClockRecord, clock_key, read_all

if TYPE_CHECKING:
    from agorad.node import Node
    from stage.roster import Roster

SWARM_S: Final = 5.0
REACH_S: Final = 8.0
ECHO_S: Final = 4.0
MOST_PINGS: Final = 50
BETWEEN_PINGS_S: Final = 0.2
PACE_S: Final = 60.0


class Pace:
    """How fast a count grew over the last minute."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def note(self, now: float, count: int) -> None:
        """``count`` at ``now``, a steady clock's seconds. A count that shrinks begins anew."""
        if self._marks and count < self._marks[-1][1]:
            self._marks.clear()
        self._marks.append((now, count))
        while len(self._marks) > 2 and now - self._marks[1][0] >= PACE_S:
            self._marks.popleft()

    def per_minute(self) -> float | None:
        """None before two looks."""
        if len(self._marks) < 2:
            return None
        (since, before), (now, count) = self._marks[0], self._marks[-1]
        return round((count - before) * 60 / max(now - since, 1e-3), 2)


def install(node: Node) -> None:
    """Answer them."""

    async def status(_request: Mapping[str, Any]) -> dict[str, Any]:
        return node.status_document()

    async def counters(_request: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "events": dict(node.bus.counts),
            "protocols": {name: list(pair) for name, pair in node.host.counters.protocols.items()},
            "bytes": [node.host.counters.bytes_out, node.host.counters.bytes_in],
        }

    async def events(request: Mapping[str, Any]) -> Any:
        since = request.get("since", 0)
        if type(since) is not int:
            raise BadRequest("since is the id of an event, a whole number")
        return node.bus.follow(since) if request.get("follow") else node.bus.since(since)

    async def leave(_request: Mapping[str, Any]) -> dict[str, Any]:
        node.stop("asked to leave")
        return {}

    async def reload(_request: Mapping[str, Any]) -> dict[str, Any]:
        node.reload()
        return {}

    async def stacks(_request: Mapping[str, Any]) -> dict[str, Any]:
        return tasks.document()

    async def restart(_request: Mapping[str, Any]) -> dict[str, Any]:
        node.restart()
        return {"pid": os.getpid()}

    async def pause(request: Mapping[str, Any]) -> dict[str, Any]:
        seconds = request.get("seconds")
        if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds <= 366 * 86400):
            raise BadRequest("seconds is a time above 0 and of at most a year")
        node.pausing.hold(math.inf if seconds is None else node.clock() + seconds)
        return {"until": None if seconds is None else node.pausing.until}

    async def resume(_request: Mapping[str, Any]) -> dict[str, Any]:
        node.pausing.release()
        return {}

    async def peers(_request: Mapping[str, Any]) -> dict[str, Any]:
        return {"peers": _peers(node)}

    async def swarm(_request: Mapping[str, Any]) -> dict[str, Any]:
        return await _swarm(node)

    async def ping(request: Mapping[str, Any]) -> dict[str, Any]:
        peer, count = request.get("peer"), request.get("count", 5)
        if not isinstance(peer, str) or type(count) is not int or not 1 <= count <= MOST_PINGS:
            raise BadRequest(f"ping takes a peer and a count of 1 to {MOST_PINGS}")
        return await _ping(node, peer, count)

    async def outside(request: Mapping[str, Any]) -> dict[str, Any]:
        size = request.get("bytes", 0)
        if type(size) is not int or not 0 <= size <= from_outside.MOST_BYTES:
            raise BadRequest(f"bytes is 0 to {from_outside.MOST_BYTES}")
        return await _outside(node, size)

    given: tuple[Command, ...] = (
        status, counters, events, leave, reload, restart, stacks, pause, resume, peers, swarm, ping, outside,
    )  # fmt: skip
    node.commands.update({command.__name__: command for command in given})


def _peers(node: Node) -> list[dict[str, Any]]:
    now = trio.current_time()
    rows = []
    for peer, connection in node.host.connections.items():
        member = connection.member
        listed = node.trust.standing.get(peer)
        rows.append(
            {
                "peer_id": peer,
                "role": listed or (None if member is None else member.role),
                "stage": None if member is None else member.stage,
                "account": None if member is None or not member.account else member.account,
                "addr": connection.addr,
                "dialed": connection.dialer,
                "rtt_ms": None if connection.rtt is None else round(connection.rtt * 1000, 3),
                "age_s": round(now - connection.began, 3),
                "silent_s": round(connection.silence, 3),
                "streams": connection.streams,
                "bytes_out": connection.bytes_out,
                "bytes_in": connection.bytes_in,
                "refused": None if connection.refusal is None else connection.refusal.code,
            }
        )
    return rows


def _roster(node: Node) -> Roster:
    from stage.roster import Roster  # not every node's commands need it

    return Roster(node.dht, node.trust, node.clock)


async def _swarm(node: Node) -> dict[str, Any]:
    """Read anew from the hash table, all stages at once, within ``SWARM_S``."""
    manifest, roster = node.manifest, _roster(node)
    views = [roster.view(stage) for stage in range(manifest.model.stages)]
    clocks: dict[PeerId, ClockRecord] = {}
    node.update_status()

    async def read_clocks() -> None:
        try:
            records: Mapping[str, Record] = await node.dht.get(clock_key(manifest.run.id), deadline=SWARM_S)
        except (P2PError, trio.TooSlowError):
            return
        clocks.update(read_all(ClockRecord, records, emit=node.emit))

    with trio.move_on_after(SWARM_S):
        async with trio.open_nursery() as nursery:
            for view in views:
                nursery.start_soon(roster.refresh, view)
            nursery.start_soon(read_clocks)
    trainers = [ref.peer_id for ref in manifest.trainers]
    samples = sum(record.samples for peer, record in clocks.items() if peer in trainers)
    return {
        "run": manifest.run.id,
        "name": manifest.run.name,
        "at": time.time(),
        "step": samples // manifest.training.target_batch,
        "loss": node.status.get("loss"),
        "stages": [
            {
                "stage": view.stage,
                "replicas": [
                    {
                        "peer_id": peer,
                        "phase": entry.record.phase,
                        "step": entry.record.step,
                        "slots": entry.record.slots,
                        "disagreement": entry.record.disagreement,
                        "addrs": list(entry.record.addrs),
                        "own": peer == node.identity.peer_id,
                    }
                    for peer, entry in sorted(view.entries.items())
                ],
            }
            for view in views
        ],
        "listed": [
            {
                "peer_id": ref.peer_id,
                "role": role,
                "connected": ref.peer_id in node.host.connections or ref.peer_id == node.identity.peer_id,
                "samples": clocks[ref.peer_id].samples if ref.peer_id in clocks else None,
            }
            for role, refs in (
                ("authority", manifest.authorities),
                ("seed", manifest.seeds),
                ("trainer", manifest.trainers),
            )
            for ref in refs
        ],
    }


async def _ping(node: Node, text: str, count: int) -> dict[str, Any]:
    peer, role, addrs = await _find(node, text)
    connection = await node.host.connect(peer, addrs=addrs, deadline=REACH_S)
    told = await identify(connection, deadline=ECHO_S)
    seconds: list[float] = []
    for number in range(count):
        if number:
            await trio.sleep(BETWEEN_PINGS_S)
        seconds.append(await echo(connection, block=os.urandom(32), deadline=ECHO_S))
    return {
        "peer_id": peer,
        "role": role,
        "stage": None if connection.member is None else connection.member.stage,
        "addr": connection.addr,
        "dialed": connection.dialer,
        "software": told.agent,
        "observed": None if told.observed is None else str(told.observed),
        "protocols": list(told.protocols),
        "ms": [round(value * 1000, 3) for value in seconds],
    }


async def _outside(node: Node, size: int) -> dict[str, Any]:
    """How another node of the run sees this one: at what it announces, else at where it is seen."""
    manifest = node.manifest
    refs = [*manifest.authorities, *manifest.seeds, *manifest.trainers]
    refs = [ref for ref in refs if ref.addrs and ref.peer_id != node.identity.peer_id]
    addrs = [str(addr.bare()) for addr in node.host.addrs]
    if not node.config.node.announce:
        for ref in refs:
            try:
                connection = await node.host.connect(ref.peer_id, addrs=ref.multiaddrs(), deadline=ECHO_S)
                seen = (await identify(connection, deadline=ECHO_S)).observed
            except P2PError:
                continue
            if seen is not None and seen.host is not None:
                ports = dict.fromkeys(addr.port for addr in node.host.addrs if addr.port)
                addrs = [str(Multiaddr.tcp(seen.host, port)) for port in ports]
            break
    by, found = await from_outside.ask(node.host, refs, addrs, size=size)
    return {**attrs.asdict(found), "session": None, "by": by}


async def _find(node: Node, text: str) -> tuple[PeerId, str | None, list[Any]]:
    """A peer by its id, by the end of it, or by the role of a listed node that is the first of its kind."""
    known: dict[PeerId, str | None] = dict.fromkeys(node.host.connections, None)
    addrs: dict[PeerId, list[Any]] = {}
    roster = _roster(node)
    for stage in range(node.manifest.model.stages):
        view = roster.view(stage)
        with trio.move_on_after(SWARM_S):
            await roster.refresh(view)
        for peer, entry in view.entries.items():
            known[peer], addrs[peer] = "worker", list(entry.addrs)
    known.update(node.trust.standing)
    known.pop(node.identity.peer_id, None)
    if text in node.trust.standing.values():
        found = [peer for peer, role in known.items() if role == text][:1]
    else:
        found = [peer for peer in known if peer.endswith(text)]
    if len(found) != 1:
        how_many = f"{len(found)} peers end in" if found else "nobody here knows a peer that ends in"
        raise LocalError(f"{how_many} {text!r}; agoractl peers and agoractl swarm show them")
    return found[0], known[found[0]], addrs.get(found[0], [])
