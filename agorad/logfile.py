"""A log file that does not grow without bound: at ``LIMIT`` it is renamed, ``KEEP`` old ones are kept.

Lines are appended with one ``write`` each. A file that somebody else renamed or removed (logrotate) is opened
anew within ``LOOK_S``. A line that the disk does not take is lost, the next one is tried.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from p2p.errors import LocalError

LIMIT: Final = 16 << 20
KEEP: Final = 3
LOOK_S: Final = 10.0


def rotated(path: Path) -> list[Path]:
    """Where the old ones lie, newest first, whether they exist or not."""
    return [path.with_name(f"{path.name}.{number}") for number in range(1, KEEP + 1)]


class LogFile:
    """See the file's opening. Raises LocalError where it cannot be opened at first."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._fd = -1
        self._size = 0
        self._look_at = 0.0
        try:
            self._open()
        except OSError as error:
            raise LocalError(f"cannot write the log file {path}: {error.strerror}") from error

    def fileno(self) -> int:
        """Of the file that is open now."""
        return self._fd

    def write(self, line: bytes) -> None:
        """Append a line, newline included. Never raises."""
        try:
            if self._clock() >= self._look_at:
                self._look()
            if self._size and self._size + len(line) > LIMIT:
                self._rotate()
            written = os.write(self._fd, line)
            if written != len(line):  # the disk's last bytes: half a line would spoil the next one too
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                return
            self._size += written
        except OSError:
            return

    def _open(self) -> None:
        fresh = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fresh
        self._size = os.fstat(fresh).st_size
        self._look_at = self._clock() + LOOK_S

    def _look(self) -> None:
        self._look_at = self._clock() + LOOK_S
        try:
            there = self._path.stat()
        except FileNotFoundError:
            self._open()
            return
        if not os.path.samestat(there, os.fstat(self._fd)):
            self._open()

    def _rotate(self) -> None:
        names = [self._path, *rotated(self._path)]
        for younger, older in reversed(list(itertools.pairwise(names))):
            if younger.exists():
                younger.replace(older)
        self._open()
