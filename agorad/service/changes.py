"""A set of changes to files, shown before it is made, and made as a whole or not at all.

Each file is written beside its place and renamed into it. If anything fails on the way, and be it the command
that was to follow, what was there before is put back.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

import attrs

from p2p.errors import LocalError


@attrs.frozen
class Change:
    """``before`` and ``after`` are texts; None: no such file."""

    path: Path
    before: str | None
    after: str | None
    mode: int = 0o644

    @property
    def kind(self) -> str:
        """created, changed or removed."""
        if self.before is None:
            return "created"
        return "removed" if self.after is None else "changed"

    def lines(self) -> list[str]:
        """As people read it: one line for a whole file, else the lines that differ."""
        if self.before is None:
            return [f"+ {self.path} ({len((self.after or '').splitlines())} lines)"]
        if self.after is None:
            return [f"- {self.path}"]
        told = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), n=0, lineterm="")
        return [f"~ {self.path}", *(f"    {line}" for line in list(told)[2:] if not line.startswith("@@"))]


def wanted(path: Path, after: str | None, mode: int = 0o644) -> Change | None:
    """The change that makes ``path`` say ``after``; None if it does already."""
    before = current(path)
    return None if before == after else Change(path, before, after, mode)


def current(path: Path) -> str | None:
    """What the file says, line ends as they are; None if there is none."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LocalError(f"{path} is not text in UTF-8: save it as such, or move it") from error


def apply(changes: Iterable[Change]) -> list[Change]:
    """Make them; if one cannot be made, undo those before it and raise ``LocalError``."""
    done: list[Change] = []
    for change in changes:
        try:
            _write(change.path, change.after, change.mode)
        except OSError as error:
            undo(done)
            reason = "; run this as root (sudo)" if isinstance(error, PermissionError) else ""
            raise LocalError(f"cannot write {change.path}: {error.strerror}{reason}") from error
        done.append(change)
    return done


def undo(done: list[Change]) -> None:
    """Put back what was there, the last change first."""
    for change in reversed(done):
        _write(change.path, change.before, change.mode)


def _write(path: Path, text: str | None, mode: int) -> None:
    if text is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
