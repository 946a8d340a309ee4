"""Every member's watch of what authorities say to all: whom they took out, and newer manifests.

Each ``WATCH_S`` the lists that the run's authorities publish in the hash table are read. A list counts if a
listed authority signed it, it is whole and newer than the one known; everything else is an event at most:
failing to read harms nobody. Who finds itself on a list ends with code 17 and the authority's reason.

With them a newer version of the run's manifest is looked for (``manifests``). One that the run's operator
signed and that may follow the one in force comes into force at once: whom to believe, whom to let in, where
nodes are; training settings at a replica's next step. A peer that names an unknown manifest in hello is a
reason to look sooner, at most every ``LEAST_S``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from agorad import __version__, manifests
from agorad.authority import revocation
from agorad.authority.admission import check_software
from agorad.events import ListUnreadable, ManifestIgnored, ManifestTaken, UpdateWanted
from agorad.exitcodes import DaemonExit, ExitCode
from agorad.run import Manifest
from p2p.errors import LocalError, P2PError, Refused, RemoteError
from p2p.identity import PeerId
from p2p.kad.record import Record

if TYPE_CHECKING:
    from agorad.node import Node

WATCH_S: Final = 15.0
LEAST_S: Final = 2.0
READ_S: Final = 5.0
OVERLAP: Final = 20
"""So many pauses between two looks the certificates of a dropped authority are honoured: their holders hear
of the manifest, too, and renew at another authority, which may just be starting again."""


async def watch(node: Node) -> None:
    """Until cancelled."""
    bad: set[PeerId] = set()
    ignored: dict[PeerId, str] = {}
    keep(node)
    announce_version(node)
    while True:
        sooner = trio.Event()
        node.trust.heard_other = sooner.set
        with trio.move_on_after(node.watch_s * node.rng.uniform(0.8, 1.0)):
            await trio.sleep(min(LEAST_S, node.watch_s))
            await sooner.wait()
        version = node.manifest.run.version
        try:
            await look_for_manifest(node, ignored)
            if sooner.is_set() and node.manifest.run.version == version:
                node.dht.look_around()  # whoever has another one may be in a part of the table that we miss
            await look(node, bad)
        except (P2PError, trio.TooSlowError):
            pass  # the next time is seconds away
        announce_version(node)


async def look(node: Node, bad: set[PeerId]) -> None:
    """Read all lists once. ``bad``: authorities whose list could not be read last time, said once."""
    run = node.manifest.run.id
    first = await node.dht.get(revocation.key(run, 0), deadline=READ_S)
    for record in first.values():
        authority = record.owner
        if authority not in node.trust.authorities:
            continue
        try:
            at, peers = revocation.read(
                await _pages(node, record, revocation.key, revocation.page_count(record.value))
            )
            if node.trust.revocations.replace(authority, at, peers):
                _look_for_self(node)
        except RemoteError as error:
            if authority not in bad:
                bad.add(authority)
                node.emit(ListUnreadable(authority=authority, why=str(error)))
        else:
            bad.discard(authority)


async def _pages(node: Node, first: Record, key: Callable[[str, int], str], count: int) -> list[object]:
    """The values of a page 0 and of the ``count`` - 1 that belong to it."""
    values: list[object] = [first.value]
    for page in range(1, count):
        found = await node.dht.get(key(node.manifest.run.id, page), deadline=READ_S)
        more = next((record for record in found.values() if record.owner == first.owner), None)
        if more is None:
            raise RemoteError(f"{key(node.manifest.run.id, page)} of {first.owner} is missing")
        values.append(more.value)
    return values


def _look_for_self(node: Node) -> None:
    own = node.identity.peer_id
    if own in node.trust.standing:
        return
    entry = node.trust.revocations.find(own, node.clock())
    if entry is not None:
        said = f"the run's operator removed this node: {entry.why}; write to the operator"
        node.end(DaemonExit(ExitCode.REMOVED, said))


async def look_for_manifest(node: Node, ignored: dict[PeerId, str]) -> None:
    """Read what authorities publish. ``ignored``: what was wrong with an authority's last time, said once."""
    first = await node.dht.get(manifests.key(node.manifest.run.id, 0), deadline=READ_S)
    for record in first.values():
        authority = record.owner
        if authority not in node.trust.authorities:
            continue
        try:
            if manifests.version_of(record.value) <= node.manifest.run.version:
                continue
            newer = manifests.read(
                await _pages(node, record, manifests.key, manifests.page_count(record.value))
            )
            manifests.follow(node.manifest, newer)
        except (RemoteError, LocalError) as error:
            if ignored.get(authority) != str(error):
                ignored[authority] = str(error)
                node.emit(ManifestIgnored(authority=authority, why=str(error)))
        else:
            take(node, newer)


def take(node: Node, newer: Manifest) -> None:
    """Put a manifest into force that may follow (``manifests.follow``)."""
    before, node.manifest = node.manifest, newer
    own = node.identity.peer_id
    listed = own in node.trust.standing
    node.trust.renew(newer.trust(), node.clock(), OVERLAP * node.watch_s)
    keep(node)
    node.learn_listed()
    names = manifests.changed(before, newer)
    node.emit(ManifestTaken(version=newer.run.version, hash=newer.hash, changed=names))
    announce_version(node)
    for taken in node.manifest_taken:
        taken()
    if listed and own not in node.trust.standing:
        said = (
            f"version {newer.run.version} of the run's manifest no longer lists this node; ask the operator"
        )
        node.end(DaemonExit(ExitCode.REMOVED, said))


def keep(node: Node) -> None:
    """Remember the manifest in force for the next start."""
    try:
        manifests.keep(node.config.node.state, node.manifest, node.trust.known)
    except LocalError as error:  # the node works without it; the next start only hears of it later
        node.warnings["manifest"] = str(error)
    else:
        node.warnings.pop("manifest", None)


def announce_version(node: Node) -> None:
    """Warn while this node's software is older than what the run asks for, or will ask for."""
    try:
        why = check_software(node.manifest.admission, None, __version__, node.clock())
    except Refused as refusal:
        why = refusal.why
    if not why:
        node.warnings.pop("version", None)
        return
    if "version" not in node.warnings:
        node.emit(UpdateWanted(why=why))
    node.warnings["version"] = why
