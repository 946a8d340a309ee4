"""The run from here, and this node from there: every listed node is tried, one of them looks back.

With a key made for this look where the daemon runs (its own would take over the daemon's connections), with
the node's own where it does not. What is asked is what everybody may ask: identify, ping, hello, the time,
and how this node looks from outside (``agorad.outside``); the running daemon asks the last one itself.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
import trio

from agorad import outside
from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.doctor.patient import Patient
from agorad.join.findings import Finding
from agorad.join.reach import skew
from agorad.run import Manifest, NodeRef
from p2p import selfreport
from p2p.errors import LocalError, P2PError
from p2p.groups import plain
from p2p.host import Host
from p2p.identify import identify, ping
from p2p.identity import Identity
from p2p.membership import Membership
from p2p.multiaddr import Multiaddr
from p2p.probe import Probed
from p2p.selfreport import SelfReport

ONE_S: Final = 5.0
ALL_S: Final = 20.0
PINGS: Final = 5
MEASURE_BYTES: Final = 2_000_000
DEFAULT_SKEW_S: Final = 30.0
_NOT_LISTENING: Final = "nothing could listen at the node's port"


@attrs.define(kw_only=True)
class Seen:
    """One listed node, as it answered."""

    role: str
    ref: NodeRef
    why: str = ""
    """Of no answer."""
    rtt_ms: float | None = None
    skew_s: float | None = None
    refused: str = ""
    """What it has against us, or we against it: a refusal's code."""
    manifest: bytes | None = None
    observed: str = ""


@attrs.define(kw_only=True)
class Look:
    """All that was seen."""

    nodes: list[Seen] = attrs.field(factory=list)
    back: Probed | None = None
    by: str = ""
    back_fault: str = ""


def look(patient: Patient, *, measure: bool = True) -> Iterator[Finding]:
    """All of it; nothing without a manifest."""
    manifest = patient.manifest
    if manifest is None or patient.settings is None:
        return
    found = trio.run(_look, patient, manifest, measure)
    for seen in found.nodes:
        yield _node(seen)
    if not found.nodes and patient.role == "worker":
        yield Finding(
            name="run", verdict="fail",
            found="the manifest names no address of an authority, seed or trainer",
            remedy="get run.toml again from the run's operator: nobody could be found with this one",
        )  # fmt: skip
    yield from _clock(manifest, found.nodes)
    yield from _agreement(manifest, patient, found.nodes)
    yield from _distance(manifest, found)
    yield from _back(patient, manifest, found)


async def _look(patient: Patient, manifest: Manifest, measure: bool) -> Look:
    own = patient.identity.peer_id if patient.identity is not None else None
    found = Look()
    for role, refs in (
        ("authority", manifest.authorities), ("seed", manifest.seeds), ("trainer", manifest.trainers),
    ):  # fmt: skip
        found.nodes += [Seen(role=role, ref=ref) for ref in refs if ref.addrs and ref.peer_id != own]
    down = patient.status is None
    identity = patient.identity if down and patient.identity is not None else Identity.generate()
    host = Host(identity)
    trust = manifest.trust()
    host.membership = Membership(trust, lambda: None, time.time)
    report = SelfReport(os.urandom(selfreport.SESSION_BYTES), lambda peer: peer in trust.standing)
    host.handle(selfreport.PROTOCOL, report.serve, open_to_all=True, aside=True)
    try:
        async with host.run(await _listenable(patient) if down else ()):
            with trio.move_on_after(ALL_S):
                async with trio.open_nursery() as nursery:
                    for seen in found.nodes:
                        nursery.start_soon(_visit, host, seen)
                    if down:
                        await _look_back(host, patient, manifest, found, measure)
    except BaseExceptionGroup as group:
        raise plain(group) from None
    for seen in found.nodes:
        if seen.rtt_ms is None and not seen.why:
            seen.why = "no answer in time"
    if not down:
        await trio.to_thread.run_sync(_ask_daemon, patient, found, measure)
    return found


async def _listenable(patient: Patient) -> list[Multiaddr]:
    """The node's own addresses, as far as they can be had."""
    assert patient.settings is not None
    usable = []
    for text in patient.settings.node.listen:
        try:
            addr = Multiaddr.parse(text)
            if addr.host is None or addr.port is None:
                continue
            with socket.socket(socket.AF_INET6 if ":" in addr.host else socket.AF_INET) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind((addr.host, addr.port))
            usable.append(addr)
        except (P2PError, OSError):
            continue
    return usable


async def _visit(host: Host, seen: Seen) -> None:
    try:
        with trio.fail_after(ONE_S):
            connection = await host.connect(seen.ref.peer_id, addrs=seen.ref.multiaddrs(), deadline=ONE_S)
            told = await identify(connection, deadline=ONE_S)
            echoes = [await ping(connection, block=os.urandom(32), deadline=ONE_S) for _ in range(PINGS)]
            seen.rtt_ms = statistics.median(echoes) * 1000
            if told.observed is not None and told.observed.host is not None:
                seen.observed = told.observed.host
            if connection.hello is not None:
                seen.manifest = connection.hello.manifest
            if connection.refusal is not None:
                seen.refused = connection.refusal.code
            seen.skew_s = await skew(host, seen.ref)
    except trio.TooSlowError:
        seen.why = seen.why or f"no answer within {ONE_S:g} s at {seen.ref.addrs[0]}"
    except P2PError as error:
        seen.why = str(error)


async def _look_back(host: Host, patient: Patient, manifest: Manifest, found: Look, measure: bool) -> None:
    assert patient.settings is not None
    announced = list(patient.settings.node.announce)
    ports = [addr.port for addr in (bound.bare() for bound in host.addrs) if addr.port]
    if not ports and not announced:
        found.back_fault = _NOT_LISTENING
        return
    refs = [*manifest.authorities, *manifest.seeds, *manifest.trainers]
    refs = [ref for ref in refs if ref.addrs and ref.peer_id != host.peer_id]
    try:
        first = await _observed(host, refs)
        addrs = announced or [str(Multiaddr.tcp(first, port)) for port in ports if port]
        peer, found.back = await outside.ask(host, refs, addrs, size=MEASURE_BYTES if measure else 0)
        found.by = peer
    except (P2PError, trio.TooSlowError) as error:
        found.back_fault = str(error) or "no answer in time"


async def _observed(host: Host, refs: Sequence[NodeRef]) -> str:
    """Where this machine is seen from outside."""
    trouble: P2PError = LocalError("the manifest lists no node with an address")
    for ref in refs:
        try:
            connection = await host.connect(ref.peer_id, addrs=ref.multiaddrs(), deadline=ONE_S)
            seen = (await identify(connection, deadline=ONE_S)).observed
        except P2PError as error:
            trouble = error
            continue
        if seen is not None and seen.host is not None:
            return seen.host
    raise trouble


def _ask_daemon(patient: Patient, found: Look, measure: bool) -> None:
    try:
        told: dict[str, Any] = ask(
            patient.socket, "outside", timeout=ALL_S + 10, bytes=MEASURE_BYTES if measure else 0
        )
    except (Unreachable, NoAnswer, CommandFailed) as error:
        found.back_fault = str(error)
        return
    found.by = str(told.pop("by"))
    found.back = Probed(**told)


# What it means


def _node(seen: Seen) -> Finding:
    name = f"{seen.role} …{seen.ref.peer_id[-6:]}"
    if seen.rtt_ms is not None:
        return Finding(name=name, verdict="ok", found=f"answers in {seen.rtt_ms:.1f} ms")
    impostor = "was dialled but" in seen.why
    return Finding(
        name=name, verdict="fail" if seen.role == "authority" or impostor else "warn",
        found=f"{', '.join(seen.ref.addrs)}: {seen.why}", remedy=_remedy(seen.why),
    )  # fmt: skip


def _remedy(why: str) -> str:
    """Of a node that does not answer, by what the attempt came to."""
    if "was dialled but" in why:
        return "somebody else answers at its address: get the newest manifest from the operator"
    if "multistream-select" in why or "noise" in why.lower():
        return (
            "what answers there is no agorad: a proxy or login page of this line, or another program; try "
            "another line, and get the newest manifest from the operator"
        )
    if "not known" in why or "name resolution" in why or "associated with hostname" in why:
        return (
            "look at this machine's DNS (resolvectl query, /etc/resolv.conf); if others cannot resolve the "
            "name either, tell the run's operator"
        )
    if "unreachable" in why or "No route" in why:
        return (
            "this machine has no way there, perhaps no IPv6: look at ip route and ip -6 route; the operator "
            "can list an IPv4 address beside it"
        )
    return (
        "look at this line and its firewall (agoractl ping, ip route); if others answer, that node is down: "
        "tell the run's operator"
    )


def _clock(manifest: Manifest, nodes: Sequence[Seen]) -> Iterator[Finding]:
    skews = [seen.skew_s for seen in nodes if seen.skew_s is not None]
    if not skews:
        return
    most = manifest.admission.max_clock_skew_s or DEFAULT_SKEW_S
    off = statistics.median(skews)
    wrong = abs(off) > most
    way = "ahead of" if off > 0 else "behind"
    yield Finding(
        name="clock", verdict="fail" if wrong else "ok",
        found=f"{abs(off):.1f} s {way} that of the run's nodes; {most:g} s are allowed"
        if wrong
        else f"within {max(0.1, abs(off)):.1f} s of the run's nodes",
        remedy="set the clock: timedatectl set-ntp true; in WSL2 after sleep: sudo hwclock -s"
        if wrong
        else "",
    )  # fmt: skip


def _agreement(manifest: Manifest, patient: Patient, nodes: Sequence[Seen]) -> Iterator[Finding]:
    ours = {manifest.hash.hex()}
    if patient.status is not None:
        ours.add(str((patient.status.get("manifest") or {}).get("hash", "")))
    others = [seen for seen in nodes if seen.manifest is not None and seen.manifest.hex() not in ours]
    wrong_run = [seen for seen in nodes if seen.refused == "wrong_run"]
    if wrong_run:
        yield Finding(
            name="run", verdict="fail",
            found=f"{_who(wrong_run)} belong to another run than {manifest.run.id}",
            remedy="get this run's manifest again from its operator",
        )  # fmt: skip
    elif others:
        every = len(others) == len([seen for seen in nodes if seen.manifest is not None])
        yield Finding(
            name="newest manifest", verdict="fail" if every and patient.status is None else "warn",
            found=f"{_who(others)} have another manifest of {manifest.run.id} than version "
            f"{manifest.run.version} here",
            remedy="get the newest run.toml from the operator; a running node takes newer ones by itself",
        )  # fmt: skip
    versions = [seen for seen in nodes if seen.refused == "version_mismatch"]
    if versions:
        yield Finding(
            name="protocol", verdict="fail", found=f"{_who(versions)} speak other protocol versions",
            remedy="update agorad, then agoractl restart",
        )  # fmt: skip


def _who(nodes: Sequence[Seen]) -> str:
    return ", ".join(f"{seen.role} …{seen.ref.peer_id[-6:]}" for seen in nodes)


def _distance(manifest: Manifest, found: Look) -> Iterator[Finding]:
    limit = manifest.admission.max_rtt_ms
    rtts = [seen.rtt_ms for seen in found.nodes if seen.rtt_ms is not None]
    if not rtts or not limit:
        return
    middle = statistics.median(rtts)
    if middle > limit:
        yield Finding(
            name="distance", verdict="fail",
            found=f"{middle:.1f} ms to the run's nodes; {limit:g} are allowed (admission.max_rtt_ms)",
            remedy="use a wired line, stop what fills it, or use a machine nearer to the others",
        )  # fmt: skip


def _back(patient: Patient, manifest: Manifest, found: Look) -> Iterator[Finding]:
    if found.back is None:
        if found.back_fault and any(seen.rtt_ms is not None for seen in found.nodes):
            yield Finding(
                name="from outside", verdict="warn", found=f"nobody looked back: {found.back_fault}",
                remedy="correct what is said of the port first"
                if found.back_fault == _NOT_LISTENING
                else "try again in a minute; seeds and authorities of newer versions can look",
            )  # fmt: skip
        return
    back, by = found.back, f"…{found.by[-6:]}"
    if not back.reached:
        yield Finding(
            name="from outside", verdict="fail" if manifest.admission.port_test else "warn",
            found=f"{by} cannot reach this node: {back.why}",
            remedy="forward the port to this machine in the router and allow it in the firewall (ufw allow "
            "PORT/tcp); at a provider expose it, and set node.announce where its number is another outside",
        )  # fmt: skip
        return
    yield Finding(name="from outside", verdict="ok", found=f"{by} reached this node at {back.addr}")
    least = manifest.admission.min_mbps
    if back.up_mbps is None or back.down_mbps is None:
        return
    slow = patient.role == "worker" and min(back.up_mbps, back.down_mbps) < least
    asked = f"; the run asks for {least:g} each way (admission.min_mbps)" if least else ""
    yield Finding(
        name="line", verdict="fail" if slow else "ok",
        found=f"{back.up_mbps:.0f} Mbit/s up, {back.down_mbps:.0f} down, to {by}{asked}",
        remedy="use a wired line, stop what fills it (uploads, streaming), or ask for a faster one"
        if slow
        else "",
    )  # fmt: skip
