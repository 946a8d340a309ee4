"""Settings, manifest, secrets, state folder and snapshots, as they lie on the disk."""

from __future__ import annotations

import json
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from agorad import facts, manifests, preflight
from agorad.config import SYSTEM_STATE
from agorad.doctor.patient import Patient
from agorad.join import answers
from agorad.join.findings import Finding
from agorad.metrics.push import read_token
from agorad.words import size
from p2p.errors import LocalError, P2PError
from p2p.files import read_small
from stage.state import CHUNK, SnapshotManifest, manifest_bytes

LEAST_FREE: Final = 1 << 30
"""Bytes on the state's disk below which events and snapshots will soon not fit."""
MOST_READ: Final = 4 << 30
"""Bytes of a snapshot that are read to verify it."""
FULL: Final = 64 << 20
"""Bytes below which that is so already."""
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
    yield from _push_token(patient)
    yield from _state(patient)
    yield from _kept(patient)
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
        preflight.read_secret(secret)
    except LocalError as error:
        yield Finding(
            name="secret", verdict="fail", found=f"worker.secret_file: {error}",
            remedy="put the account's secret there, readable by the node's user, or take the setting out",
        )  # fmt: skip
        return
    if secret.stat().st_mode & 0o077:
        yield Finding(
            name="secret", verdict="warn", found=f"{secret} can be read by other users",
            remedy=f"chmod 600 {secret}",
        )  # fmt: skip


def _push_token(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    assert settings is not None
    path = settings.metrics.push_token_file
    if not settings.metrics.push or path is None:
        return
    try:
        read_token(path)
    except LocalError as error:
        yield Finding(
            name="push token", verdict="warn", found=str(error),
            remedy="put the gateway's token there, or take metrics.push_token_file out",
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
    stage = settings.worker.stage
    if patient.role == "worker" and stage is not None and stage >= manifest.model.stages:
        yield Finding(
            name="stage", verdict="fail", found=f"worker.stage = {stage}, and the run has stages 0 to "
            f"{manifest.model.stages - 1}",
            remedy="take worker.stage out: the authority chooses",
        )  # fmt: skip
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
        kept = _kept_content(state)["run"]
        if kept["id"] == run:
            yield "the one in force until now was", str(kept["operator"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    remembered = answers.recall().get(run)
    if remembered is not None and remembered.operator:
        yield "the one that was joined was", remembered.operator


def _kept_run(state: Path) -> str:
    try:
        return str(_kept_content(state)["run"]["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _kept_content(state: Path) -> Any:
    return json.loads(json.loads(read_small(state / manifests.FILE, manifests.FILE_LIMIT))["content"])


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
    short = free < FULL or (free < least and patient.role == "worker")
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


_KEPT: Final = {
    "events.jsonl": stat.S_ISREG,
    manifests.FILE: stat.S_ISREG,
    "certificate": stat.S_ISREG,
    "receipts": stat.S_ISDIR,
    "journal.jsonl": stat.S_ISREG,
    "hub": stat.S_ISDIR,
    "authority.sqlite": stat.S_ISREG,
    "snapshots": stat.S_ISDIR,
}
"""What a node keeps in its state folder, and what it has to be."""


def _kept(patient: Patient) -> Iterator[Finding]:
    """Each of a kind that the node can use, and the folder's owner's, who it runs as."""
    settings = patient.settings
    assert settings is not None
    state = settings.node.state
    try:
        owner = state.stat().st_uid
    except OSError:
        return
    for name, is_kind in _KEPT.items():
        path = state / name
        try:
            found = path.stat()
        except OSError:
            continue
        if not is_kind(found.st_mode):
            yield Finding(
                name="state", verdict="fail",
                found=f"{path} is no {'folder' if is_kind is stat.S_ISDIR else 'file'}, which the node needs",
                remedy=f"move {path} elsewhere; the node makes a new one",
            )  # fmt: skip
        elif found.st_uid != owner and not state.is_relative_to(SYSTEM_STATE):
            yield Finding(
                name="state owner", verdict="warn",
                found=f"{path} is {_user(found.st_uid)}'s, the folder {_user(owner)}'s: one cannot use both",
                remedy=f"chown -R {_user(owner)} {state}, and start the node as that user only",
            )  # fmt: skip


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


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
    try:  # after a roll-back of the run they lie in a folder of its own; parts of downloads are none
        folders = sorted(settings.node.state.glob("snapshots*"), key=lambda path: (len(path.name), path.name))
        kept = sorted(folders[-1].glob("*-step-*.manifest"), reverse=True) if folders else []
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
        told = SnapshotManifest.decode(read_small(path, manifest_bytes(MOST_READ // CHUNK * (CHUNK // 12))))
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
