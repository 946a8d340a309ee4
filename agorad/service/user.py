"""A plain user's service: one unit file in the user's own systemd, which needs no root for anything.

The user's manager starts at the first log-in and ends with the last one, unless the user *lingers*; that is
asked for, and where it is not granted the answer says what the machine's administrator would have to do.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agorad.service import changes, files
from agorad.service.changes import Change
from agorad.service.install import Done
from agorad.service.manager import Manager
from agorad.service.program import quoted
from p2p.errors import LocalError

UNIT: Final = "agorad-user@.service"
ELSE: Final = "log in by itself, not by su, or `sudo agoractl join` makes a service of the system"
LINGERING: Final = Path("/var/lib/systemd/linger")


def place() -> Path:
    """The user's unit file."""
    return Path.home() / ".config" / "systemd" / "user" / "agorad@.service"


def runtime() -> Path | None:
    """The user's folder in memory; None without a session."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(named) if named.startswith("/") else None


def why_not() -> str:
    """Why this user has no systemd to ask, as a sentence; empty if there is one."""
    folder = runtime()
    if folder is None:
        return f"this is no session of systemd's, XDG_RUNTIME_DIR is not set; {ELSE}"
    if not (folder / "systemd" / "private").exists():
        return f"no systemd of yours answers in {folder}; {ELSE}"
    return ""


def wanted(program: str, states: Path, version: int) -> list[Change]:
    """What has to change so that the unit is there; empty if it is."""
    text = files.for_version((files.UNITS / UNIT).read_text(), version)
    text = text.replace("ExecStart=/usr/bin/agorad ", f"ExecStart={program} ")
    text = text.replace(
        "/var/lib/agora/%i/agorad.toml", quoted(states / "\0" / "agorad.toml").replace("\0", "%i")
    )
    change = changes.wanted(place(), text)
    return [] if change is None else [change]


def install(program: str, states: Path, names: list[str], log: Callable[[str], None]) -> Done:
    """Make it so that nodes of these names start with the user's manager; starts none."""
    manager = Manager(user=True)
    done = Done(files=wanted(program, states, manager.version()))
    enable = [name for name in names if not manager.is_enabled(f"agorad@{name}.service")]
    done.steps += [f"enable agorad@{name}.service for {getpass.getuser()}" for name in enable]
    made = changes.apply(done.files)
    try:
        if made:
            manager.do("systemctl", "daemon-reload")
        if enable:
            manager.do("systemctl", "enable", "--quiet", *(f"agorad@{name}.service" for name in enable))
    except (LocalError, KeyboardInterrupt):
        log("that failed; putting everything back")
        changes.undo(made)
        manager.says("systemctl", "daemon-reload")
        raise
    if not _lingers() and manager.succeeds("loginctl", "enable-linger") and _lingers():
        done.steps.append("let your services run while you are not logged in (loginctl enable-linger)")
    if not _lingers():
        done.hints.append(
            "the node ends when you log out; to have it stay, and start with the machine: "
            f"sudo loginctl enable-linger {getpass.getuser()}"
        )
    return done


def uninstall(*, dry_run: bool) -> Done:
    """Stop and disable this user's nodes and remove the unit file; state, keys and lingering stay."""
    manager = Manager(user=True)
    done = Done()
    if place().exists():
        done.files.append(Change(place(), changes.current(place()), None))
    units = manager.units()
    done.steps += units.steps
    if dry_run or done.nothing:
        return done
    manager.end(units, lambda: changes.apply(done.files))
    return done


def _lingers() -> bool:
    return (LINGERING / getpass.getuser()).exists()
