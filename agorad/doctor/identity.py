"""Who the node is: its key, its place in the manifest, its certificate, what its role needs beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from agorad import trainer_data
from agorad.authority import accounts
from agorad.doctor.patient import Patient
from agorad.join.findings import Finding
from agorad.words import duration
from p2p.errors import LocalError, P2PError
from p2p.files import read_small
from p2p.membership import CERTIFICATE_LIMIT, CLOCK_SKEW_S, Certificate


def look(patient: Patient) -> Iterator[Finding]:
    """All of it; nothing without settings."""
    if patient.settings is None:
        return
    yield from _key(patient)
    yield from _listed(patient)
    yield from _certificate(patient)


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
    if patient.identity is None and path.is_symlink():
        yield Finding(
            name="key", verdict="fail", found=f"{path} points to {path.readlink()}, and there is nothing",
            remedy="mount or restore what it points to, or remove the link for a new key",
        )  # fmt: skip
        return
    if patient.identity is None:
        needed = patient.role != "worker"
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
    nodes = {"seed": manifest.seeds, "trainer": manifest.trainers, "authority": manifest.authorities}
    if identity is not None:
        own = [role for role, refs in nodes.items() if identity.peer_id in [ref.peer_id for ref in refs]]
        if patient.role in nodes and patient.role not in own:
            yield Finding(
                name="listed", verdict="warn" if patient.role == "seed" else "fail",
                found=f"the manifest lists no {patient.role} with this key ({identity.peer_id})",
                remedy="the operator lists it in run.toml and signs again, or the right key is put there",
            )  # fmt: skip
        elif own and patient.role not in nodes:
            yield Finding(
                name="key of another", verdict="fail",
                found=f"the manifest lists this key as the run's {own[0]}; this node is a {patient.role}",
                remedy=f"move {settings.identity} away: the next start makes a key of this node's own",
            )  # fmt: skip
    if patient.role == "authority":
        try:
            accounts.load(settings.authority.accounts)
        except LocalError as error:
            yield Finding(
                name="accounts", verdict="fail", found=str(error),
                remedy="make the file with agoractl run account NAME, or correct authority.accounts",
            )  # fmt: skip
    if patient.role == "authority" and patient.status is None:
        from agorad.authority import database  # SQLAlchemy is much to import for all the others

        if said := database.trouble(settings.database):
            yield Finding(
                name="database", verdict="fail", found=f"the authority's database cannot be used: {said}",
                remedy="start its server, correct authority.database, or put a copy back; it holds "
                "grants and points",
            )  # fmt: skip
    if patient.role == "trainer" and manifest is not None:
        try:
            trainer_data.check(settings.trainer, manifest)
        except LocalError as error:
            yield Finding(
                name="data", verdict="fail", found=str(error),
                remedy="correct what [trainer] says of it, or mount the disk that it is on",
            )  # fmt: skip


def _certificate(patient: Patient) -> Iterator[Finding]:
    settings, manifest = patient.settings, patient.manifest
    assert settings is not None
    path = settings.node.state / "certificate"
    if patient.role != "worker" or not path.exists():
        return
    renews = "the next start asks an authority for a new one; the place may be gone by then"
    try:
        found = Certificate.decode(read_small(path, CERTIFICATE_LIMIT + 1))
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
    elif not found.signature_holds():
        wrong = "its signature does not hold: it was altered or damaged"
    elif found.role != patient.role:
        wrong = f"it is for a {found.role}, not for a {patient.role}"
    elif manifest is not None and (found.stage is None or found.stage >= manifest.model.stages):
        wrong = f"it is for stage {found.stage}, and the run has {manifest.model.stages} stages"
    elif found.issued > now + CLOCK_SKEW_S:
        wrong = f"it begins in {duration(found.issued - now)}: this machine's clock is behind, or was ahead"
        renews = "set the clock (timedatectl set-ntp true); " + renews
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
