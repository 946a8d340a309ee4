"""What is known of the node that is looked at, gathered once; anything of it may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from agorad import run
from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.cli.last_seen import LastSeen, last_seen
from agorad.cli.targets import Target
from agorad.config import Config
from agorad.run import Manifest
from p2p.errors import LocalError
from p2p.identity import Identity

ANSWER_S = 3.0


@attrs.frozen(kw_only=True)
class Patient:
    """A node."""

    name: str
    socket: Path
    path: Path | None
    """Of its settings."""
    settings: Config | None = None
    settings_fault: str = ""
    manifest: Manifest | None = None
    manifest_fault: str = ""
    identity: Identity | None = None
    identity_fault: str = ""
    status: dict[str, Any] | None = None
    """What the running daemon says; None if none answers."""
    silence: Unreachable | NoAnswer | None = None
    seen: LastSeen = attrs.field(factory=LastSeen)

    @property
    def role(self) -> str:
        """Of the settings; a worker where they are unknown."""
        return self.settings.node.role if self.settings is not None else "worker"


def examine(target: Target) -> Patient:
    """Gather what there is."""
    found: dict[str, Any] = {"name": target.name, "socket": target.socket, "path": target.config}
    if target.config is not None:
        try:
            settings = found["settings"] = target.settings()
        except LocalError as error:
            found["settings_fault"] = str(error)
        else:
            found["seen"] = last_seen(settings.events)
            try:
                found["manifest"] = run.load(settings.node.run)
            except LocalError as error:
                found["manifest_fault"] = str(error)
            try:
                if settings.identity.exists():
                    found["identity"] = Identity.load(settings.identity)
            except (LocalError, OSError) as error:
                found["identity_fault"] = str(error)
    try:
        found["status"] = ask(target.socket, "status", timeout=ANSWER_S)
    except (Unreachable, NoAnswer) as error:
        found["silence"] = error
    except CommandFailed as error:
        found["silence"] = Unreachable(str(error))
    return Patient(**found)
