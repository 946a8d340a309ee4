"""What can be known to be wrong before a node makes anything: settings against manifest, keys and files.

``check`` only reads, so that a node that cannot start leaves nothing behind; ``agorad --check-config``
is the same look. Roles check again what they rely on, since files change.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

from agorad import run
from agorad.authority import accounts
from agorad.config import Config
from agorad.run import Manifest
from p2p.errors import LocalError
from p2p.files import read_small
from p2p.identity import Identity

SECRET_LIMIT: Final = 4096


def check(settings: Config) -> Manifest:
    """The manifest; ``LocalError`` with one sentence for the first fault."""
    manifest = run.load(settings.node.run)
    identity = Identity.load(settings.identity) if settings.identity.exists() else None
    state = settings.node.state
    if state.exists() and not state.is_dir():
        raise LocalError(f"node.state = {state} is not a folder; name another")
    for name, path in (
        ("identity", settings.identity),
        ("control", settings.node.control),
        ("log", settings.node.log),
    ):
        if path is not None and path.parent != state and not os.access(path.parent, os.W_OK | os.X_OK):
            raise LocalError(f"node.{name} = {path} cannot be made: {path.parent} is no folder to write in")
    role = settings.node.role
    if role == "trainer":
        _listed(manifest, "trainer", [ref.peer_id for ref in manifest.trainers], identity, settings.identity)
        from agorad import trainer_data

        trainer_data.check(settings.trainer, manifest)
    elif role == "authority":
        known = [ref.peer_id for ref in manifest.authorities]
        _listed(manifest, "authority", known, identity, settings.identity)
        accounts.load(settings.authority.accounts)
    elif role == "worker" and settings.worker.secret_file is not None:
        read_secret(settings.worker.secret_file)
    return manifest


def read_secret(path: Path) -> str:
    """An account's secret, without the space around it."""
    try:
        secret = read_small(path, SECRET_LIMIT + 1).decode().strip()
    except OSError as error:
        raise LocalError(f"cannot read the account's secret from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LocalError(f"the account's secret in {path} is not text; ask the run's operator") from error
    if not 0 < len(secret) <= SECRET_LIMIT:
        raise LocalError(f"the file {path} does not hold the account's secret; ask the run's operator")
    return secret


def _listed(
    manifest: Manifest, role: str, known: Collection[str], identity: Identity | None, path: Path
) -> None:
    if identity is None:
        raise LocalError(
            f"there is no key at {path}; a run's {role} needs one that the manifest lists: "
            f"make it with `agoractl identity {path} --create` and give its peer id to the operator"
        )
    if identity.peer_id not in known:
        raise LocalError(
            f"{identity.peer_id}, the key at {path}, is not listed as {role} of run {manifest.run.id!r}; "
            "its operator has to list it in the manifest"
        )
