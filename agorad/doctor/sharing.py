"""What two nodes of one machine must not share: a key, a state folder, a port; and who holds this one's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from agorad.doctor.patient import Patient
from agorad.join.findings import Finding
from p2p.errors import P2PError
from p2p.multiaddr import Multiaddr


def look(patient: Patient, others: Sequence[Patient]) -> Iterator[Finding]:
    """``others``: the machine's, as far as they are known."""
    settings = patient.settings
    if settings is None:
        return
    if patient.status is None:
        yield from _held(settings.identity, settings.node.state)
    for other in others:
        if other.settings is None or other.path == patient.path:
            continue
        name = f"{other.name} ({other.path})"
        keys = [one.identity.peer_id for one in (patient, other) if one.identity is not None]
        if len(keys) == 2 and keys[0] == keys[1]:
            yield Finding(
                name="key twice", verdict="fail", found=f"{name} has the same key as this node",
                remedy=f"give one its own: move {settings.identity} away, the next start makes a new key",
            )  # fmt: skip
        if settings.node.state == other.settings.node.state:
            yield Finding(
                name="state twice", verdict="fail", found=f"{name} has the same node.state as this node",
                remedy="give each its own folder",
            )  # fmt: skip
        for setting, ports in _ports(patient).items():
            both = ports & _ports(other)[setting]
            if both:
                yield Finding(
                    name="port twice", verdict="fail",
                    found=f"{name} has the same port in {setting}: {', '.join(map(str, sorted(both)))}",
                    remedy=f"count them up: {setting} of the next node is one higher",
                )  # fmt: skip


def _ports(patient: Patient) -> dict[str, set[int]]:
    assert patient.settings is not None
    found: dict[str, set[int]] = {"node.listen": set(), "metrics.listen": set()}
    for text in patient.settings.node.listen:
        try:
            found["node.listen"].add(Multiaddr.parse(text).port or 0)
        except P2PError:
            continue
    found["metrics.listen"].add(int(patient.settings.metrics.listen.rpartition(":")[2] or 0))
    return {setting: ports - {0} for setting, ports in found.items()}


def _held(identity: Path, state: Path) -> Iterator[Finding]:
    """A daemon that this node's socket does not lead to, and that keeps it from starting."""
    for what, path in (("key", identity), ("state folder", state)):
        holder = lock_holder(path)
        if holder is not None:
            yield Finding(
                name=f"{what} in use", verdict="fail",
                found=f"process {holder} runs with this node's {what}, {path}",
                remedy=f"agoractl status --config of that node (ps -fp {holder}), or stop it: kill {holder}",
            )  # fmt: skip
            return


def lock_holder(path: Path, table: Path = Path("/proc/locks")) -> int | None:
    """Who has locked a file or folder (``state_dirs.claim``): a process, or None. Locks nothing."""
    try:
        found = path.stat()
        rows = table.read_text().splitlines()
    except OSError:
        return None
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for row in rows:
        cells = row.split()
        if len(cells) > 5 and cells[1] == "FLOCK" and cells[5] == place:
            return int(cells[4])
    return None
