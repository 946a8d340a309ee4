"""Settings, manifest, key, certificate, secret, state folder and snapshots, as they lie on the disk."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agorad import facts, manifests
from agorad.authority import accounts
from agorad.doctor.patient import Patient
from agorad.join import answers
from agorad.join.findings import Finding
from agorad.words import duration, size
from p2p.errors import LocalError, P2PError
from p2p.membership import CERTIFICATE_LIMIT, Certificate
from stage.state import CHUNK, SnapshotManifest

LEAST_FREE: Final = 1 << 30
"""Bytes on the state's disk below which events and snapshots will soon not fit."""
MOST_READ: Final = 4 << 30
"""Bytes of a snapshot that are read to verify it."""
LOG_MOST: Final = 1 << 30


def look(patient: Patient) -> Iterator[Finding]:
    """All of them."""
    if patient.settings is None:
        if patient.path is not None:
            yield Finding(
                name="settings", verdict="fail", found=patient.settings_fault,
                remedy="correct the file; agorad --check-config says whether it is right",
            )  # fmt: skip
        return
    yield Finding(name="settings", verdict="ok", found=f"{patient.path}, {patient.role}")
    yield from _open_to_others(patient)
    yield from _manifest(patient)
    yield from _key(patient)
    yield from _listed(patient)
    yield from _certificate(patient)
    yield from _state(patient)
    yield from _snapshots(patient)
    yield from _log(patient)


def _open_to_others(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    assert settings is not None
    if settings.path is not None and settings.path.stat().st_mode & 0o002:
        yield Finding(
            name="settings mode", verdict="fail",
            found=f"everybody on this machine can write {settings.path}",
            remedy=f"chmod o-w {settings.path}",
        )  # fmt: skip
    secret = settings.worker.secret_file
    if secret is None:
        return
    try:
        secret.read_text()
    except (OSError, UnicodeDecodeError) as error:
        yield Finding(
            name="secret", verdict="fail", found=f"cannot read worker.secret_file {secret}: {error}",
            remedy="put the account's secret there, readable by the node's user, or take the setting out",
        )  # fmt: skip
        return
    if secret.stat().st_mode & 0o077:
        yield Finding(
            name="secret", verdict="warn", found=f"{secret} can be read by other users",
            remedy=f"chmod 600 {secret}",
        )  # fmt: skip


def _manifest(patient: Patient) -> Iterator[Finding]:
    manifest, settings = patient.manifest, patient.settings
    assert settings is not None
    if manifest is None:
        altered = "altered" in patient.manifest_fault or "not signed" in patient.manifest_fault
        yield Finding(
            name="manifest", verdict="fail", found=patient.manifest_fault,
            remedy="get run.toml again from the run's operator, over a channel that you trust"
            if altered
            else f"put the run's manifest at {settings.node.run}, or correct node.run",
        )  # fmt: skip
        return
    info = manifest.run
    yield Finding(
        name="manifest", verdict="ok", found=f"run {info.id}, version {info.version}, signature holds"
    )
    for where, operator in _operators(settings.node.state, info.id):
        if operator != info.operator:
            yield Finding(
                name="operator", verdict="fail",
                found=f"the manifest is signed by {info.operator}, {where} by {operator}",
                remedy="this is another's run under the same name: get the manifest from the operator whom "
                "you joined; if the operator changed keys on purpose, use a new state folder",
            )  # fmt: skip
            return
    kept = _kept_run(settings.node.state)
    if kept not in ("", info.id):
        yield Finding(
            name="state of a run", verdict="fail",
            found=f"{settings.node.state} holds the state of run {kept}, the manifest is of {info.id}",
            remedy="give each run its own node.state",
        )  # fmt: skip


def _operators(state: Path, run: str) -> Iterator[tuple[str, str]]:
    """Who signed the manifests of this run that were taken earlier."""
    try:
        content = json.loads(json.loads((state / manifests.FILE).read_text())["content"])
        if content["run"]["id"] == run:
            yield "the one in force until now was", str(content["run"]["operator"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    remembered = answers.recall().get(run)
    if remembered is not None and remembered.operator:
        yield "the one that was joined was", remembered.operator


def _kept_run(state: Path) -> str:
    try:
        content = json.loads(json.loads((state / manifests.FILE).read_text())["content"])
        return str(content["run"]["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _key(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    assert settings is not None
    path = settings.identity
    if patient.identity_fault:
        yield Finding(
            name="key", verdict="fail", found=patient.identity_fault,
            remedy=f"give the node's user the right to read {path}, or put the key back from a copy; "
            "without it the node is a new one to the run",
        )  # fmt: skip
        return
    if patient.identity is None:
        needed = patient.role in ("trainer", "authority")
        yield Finding(
            name="key", verdict="fail" if needed else "ok", found=f"there is none at {path} yet",
            remedy=f"agoractl identity {path} --create, then have the operator list its peer id"
            if needed
            else "",
        )  # fmt: skip
        return
    mode = path.stat().st_mode & 0o777
    loose = bool(mode & 0o077)
    yield Finding(
        name="key", verdict="fail" if loose else "ok",
        found=f"{path} has mode {mode:04o}: other users can use this node's identity"
        if loose
        else str(patient.identity.peer_id),
        remedy=f"chmod 600 {path}; if others used this machine, make a new key" if loose else "",
    )  # fmt: skip


def _listed(patient: Patient) -> Iterator[Finding]:
    manifest, identity, settings = patient.manifest, patient.identity, patient.settings
    if manifest is None or settings is None:
        return
    listed = {"trainer": manifest.trainers, "authority": manifest.authorities}.get(patient.role)
    if listed is not None and identity is not None and identity.peer_id not in [r.peer_id for r in listed]:
        yield Finding(
            name="listed", verdict="fail",
            found=f"the manifest lists no {patient.role} with this key ({identity.peer_id})",
            remedy="the operator adds it to run.toml and signs again, or the right key is put in its place",
        )  # fmt: skip
    if patient.role == "authority":
        try:
            accounts.load(settings.authority.accounts)
        except LocalError as error:
            yield Finding(
                name="accounts", verdict="fail", found=str(error),
                remedy="make the file with agoractl run account NAME, or correct authority.accounts",
            )  # fmt: skip
    if patient.role == "trainer" and settings.trainer.data is not None and not settings.trainer.data.exists():
        yield Finding(
            name="data", verdict="fail", found=f"there is no {settings.trainer.data}",
            remedy="correct trainer.data, or mount the disk that it is on",
        )  # fmt: skip


def _certificate(patient: Patient) -> Iterator[Finding]:
    settings, manifest = patient.settings, patient.manifest
    assert settings is not None
    path = settings.node.state / "certificate"
    if patient.role != "worker" or not path.exists():
        return
    renews = "the next start asks an authority for a new one; the place may be gone by then"
    try:
        with path.open("rb") as file:
            found = Certificate.decode(file.read(CERTIFICATE_LIMIT + 1))
    except (OSError, P2PError) as error:
        yield Finding(
            name="certificate", verdict="warn", found=f"{path} cannot be read: {error}", remedy=renews
        )
        return
    now = time.time()
    if manifest is not None and found.run != manifest.run.id:
        wrong = f"it is one of run {found.run}, not of {manifest.run.id}"
    elif patient.identity is not None and found.peer_id != patient.identity.peer_id:
        wrong = f"it belongs to another key, {found.peer_id}"
    elif manifest is not None and found.authority not in [ref.peer_id for ref in manifest.authorities]:
        wrong = "its authority is none of this run's any more"
    elif now > found.expires:
        ago, grace = duration(now - found.expires), found.grace_until - now
        wrong = f"it expired {ago} ago" + (
            f"; members believe it for another {duration(grace)}" if grace > 0 else " and its grace is over"
        )
    else:
        left = duration(found.expires - now)
        yield Finding(
            name="certificate",
            verdict="ok",
            found=f"stage {found.stage}, runs for another {left}, renewed at half",
        )
        return
    running = patient.status is not None
    yield Finding(
        name="certificate", verdict="fail" if running else "warn", found=wrong,
        remedy="see whether the authority can be reached and the clock is right; then agoractl restart"
        if running
        else renews,
    )  # fmt: skip


def _state(patient: Patient) -> Iterator[Finding]:
    settings, manifest = patient.settings, patient.manifest
    assert settings is not None
    state = settings.node.state
    if trouble := writable(state):
        yield Finding(
            name="state folder", verdict="fail", found=trouble,
            remedy=f"give {state} to the node's user, mount it for writing, or set node.state",
        )  # fmt: skip
    elif state.exists() and state.stat().st_mode & 0o077:
        yield Finding(
            name="state folder", verdict="warn", found=f"other users can look into {state}",
            remedy=f"chmod 700 {state}",
        )  # fmt: skip
    free = facts.free_bytes(state)
    least = int((manifest.admission.min_disk_gib if manifest is not None else 0.0) * facts.GIB)
    asked = f"; the run asks for {size(least)} (admission.min_disk_gib)" if least else ""
    short = free < least and patient.role == "worker"
    yield Finding(
        name="disk", verdict="fail" if short else "warn" if free < LEAST_FREE else "ok",
        found=f"{size(free)} free where {state} lies{asked}",
        remedy=f"free some space there (events.jsonl.1 and old logs go first), or move {state} elsewhere"
        if short or free < LEAST_FREE
        else "",
    )  # fmt: skip
    inodes = _free_inodes(state)
    if inodes is not None and inodes < 1000:
        yield Finding(
            name="inodes", verdict="warn", found=f"{inodes} files more fit on the disk of {state}",
            remedy="remove small files there; df -i shows how many there are",
        )  # fmt: skip


def writable(folder: Path) -> str:
    """What keeps this user from writing there, or would; empty if nothing does. Leaves nothing behind."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is not a folder"
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"cannot write in {folder}: {error.strerror}"


def _free_inodes(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_favail if found.f_files else None


def _snapshots(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    assert settings is not None
    if patient.role != "worker":
        return
    folder = settings.node.state / "snapshots"
    try:
        kept = sorted(folder.glob("*.manifest"), reverse=True)
    except OSError:
        kept = []
    if not kept:
        return
    troubles = [trouble for path in kept if (trouble := damage(path))]
    newest = kept[0].stem.partition("-step-")[2]
    if not troubles:
        yield Finding(
            name="snapshots", verdict="ok", found=f"{len(kept)}, the newest of step {newest}, all sound"
        )
        return
    yield Finding(
        name="snapshots", verdict="fail" if len(troubles) == len(kept) else "warn", found="; ".join(troubles),
        remedy="look at the disk (dmesg, smartctl); the node passes over damaged ones and fetches the state "
        "from others, so they may be removed while it is stopped",
    )  # fmt: skip


def damage(path: Path) -> str:
    """What is wrong with the snapshot of this manifest; empty if nothing is. Torch-free."""
    state = path.with_suffix(".state")
    try:
        told = SnapshotManifest.decode(path.read_bytes())
        if state.stat().st_size != told.size:
            return f"{state.name} has {size(state.stat().st_size)} instead of {size(told.size)}"
        with state.open("rb") as file:
            for index in range(min(len(told.chunks), MOST_READ // CHUNK)):
                if not told.verify_chunk(index, file.read(told.chunk_size(index))):
                    return f"{state.name} is damaged at byte {index * CHUNK}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except P2PError as error:
        return f"{path.name}: {error}"
    return ""


def _log(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    assert settings is not None
    log = settings.node.log
    if log is None:
        return
    if log.exists():
        if not os.access(log, os.W_OK) or not log.is_file():
            yield Finding(
                name="log", verdict="fail", found=f"cannot write the log {log}",
                remedy="give it to the node's user, or set node.log",
            )  # fmt: skip
        elif log.stat().st_size > LOG_MOST:
            yield Finding(
                name="log", verdict="warn", found=f"{log} has {size(log.stat().st_size)}",
                remedy="agoractl doctor cannot know why; look at its end with agoractl logs, then remove it",
            )  # fmt: skip
    elif trouble := writable(log.parent):
        yield Finding(
            name="log", verdict="fail", found=trouble, remedy="set node.log to a folder of the node's"
        )
