"""Which program the units start, and which folders it needs that a service does not see by itself.

The units hide homes and /tmp. A Python environment there is bound back in, read-only, folder by folder:
the environment, the interpreter it was made from and the source it was installed from, and nothing else of
the home. Everything else has to be readable for everybody, since the service has an account of its own.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import attrs

import agorad
from p2p.errors import LocalError

HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What ProtectHome and PrivateTmp take away."""


@attrs.frozen
class Program:
    """``command`` is how ExecStart begins; ``bound`` are the folders to bind."""

    command: str
    bound: tuple[Path, ...] = ()


def find() -> Program:
    """The agorad that belongs to this interpreter; ``LocalError`` if a service could not start it."""
    needed = {
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(os.path.realpath(sys.executable)).parent.parent,
        Path(agorad.__file__).resolve().parents[1],
    }
    folders = outermost(place.absolute() for place in needed)
    for place in folders:
        require_readable(place)
    return Program(command(), tuple(place for place in folders if _is_hidden(place)))


def command() -> str:
    """How ExecStart begins for the agorad that belongs to this interpreter."""
    script = Path(sysconfig.get_path("scripts")) / "agorad"
    return quoted(script) if script.exists() else f"{quoted(Path(sys.executable))} -m agorad.main"


def quoted(path: Path) -> str:
    """For a unit file: % doubled, in quotes where there is a space."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if any(letter.isspace() for letter in text) else text


def outermost(paths: Iterable[Path]) -> list[Path]:
    """Without those that lie in another one."""
    kept: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def require_readable(path: Path) -> None:
    """``LocalError`` if another account could not read the folder; above a bound one nothing is asked."""
    steps = [path] if _is_hidden(path) else [path, *path.parents]
    for step in steps:
        wanted = 0o005 if step == path else 0o001
        try:
            mode = step.stat().st_mode
        except OSError as error:
            raise LocalError(f"agorad needs {step} to start: {error.strerror}") from error
        if mode & wanted != wanted:
            raise LocalError(
                f"a service could not read {path}, where agorad is installed: chmod o+rx {step}, or install "
                "it where everybody may look: python3 -m venv /opt/agorad, then pip install there"
            )


def _is_hidden(path: Path) -> bool:
    return any(path.is_relative_to(root) for root in HIDDEN)
