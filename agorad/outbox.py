"""Records that wait on disk until somebody has taken them: in order, bounded, surviving a restart.

Theory of operation. A folder of numbered segment files; a record is u32 length, u32 CRC-32 and its bytes
(big endian). Records are appended to the last segment. The reader works on the first one, in memory; when
all of it is done the file goes. If the reader catches up with the writer, the writer begins a new segment,
so no file is read and written at a time. After a restart everything in the folder is waiting again, so what
was done of the first segment comes twice: the taker has to bear that. A damaged record ends its segment:
what was written before a crash is read, a torn tail is not.

Writes go to the operating system, not through it to the disk: a killed process loses nothing, a power cut
may lose the last seconds. Limits: ``segments`` files of ``segment_bytes``; beyond them the oldest file is
dropped. Sans-IO it is not, but it never waits for anybody: a few calls of the operating system a record.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final

from p2p.errors import LocalError

SEGMENT_BYTES: Final = 256 << 10
SEGMENTS: Final = 1024
"""256 MiB together."""
_HEAD: Final = struct.Struct(">II")


class Outbox:
    """See the module's docstring. One process at a time; the node's state folder is locked anyway."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES, segments: int = SEGMENTS) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._most = segments
        self._fd = -1
        self._size = 0
        self._first: deque[bytes] = deque()
        """Records of the first segment that are not done; loaded if ``_loaded``."""
        self._loaded = False
        self._lent: int | None = None
        """Segment that the last batch came from."""
        self._counts: dict[int, int] = {}
        """Records that wait, by segment, oldest first."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in sorted(folder.iterdir()):
                if path.name.isdecimal():
                    self._counts[int(path.name)] = len(_records(path.read_bytes()))
        except OSError as error:
            raise LocalError(f"cannot use the folder {folder}: {error.strerror}") from error

    @property
    def waiting(self) -> int:
        """Records that nobody has taken."""
        return sum(self._counts.values())

    def append(self, record: bytes) -> int:
        """Keep a record; returns how many old ones were dropped for it. Raises LocalError."""
        try:
            if self._fd < 0 or self._size >= self._segment_bytes:
                self._begin()
            data = _HEAD.pack(len(record), zlib.crc32(record)) + record
            written = os.write(self._fd, data)
            if written != len(data):
                self.close()  # its tail is torn: the next record must not stand behind it
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise LocalError(f"cannot write to {self._folder}: {error.strerror}") from error
        self._size += written
        self._counts[max(self._counts)] += 1
        dropped = 0
        while len(self._counts) > self._most:
            dropped += self._remove_first()
        return dropped

    def batch(self, most: int, most_bytes: int) -> list[bytes]:
        """The oldest records, up to a number and size (one at least); empty if none waits.

        Raises LocalError if they cannot be read.
        """
        while self._counts:
            self._load()
            if self._first:
                break
            self._remove_first()
        self._lent = next(iter(self._counts), None)
        records: list[bytes] = []
        size = 0
        for record in self._first:
            size += len(record)
            if records and (len(records) >= most or size > most_bytes):
                break
            records.append(record)
        return records

    def done(self, count: int) -> None:
        """The first ``count`` records of the last batch need not be kept any more."""
        first = next(iter(self._counts), None)
        if first is None or first != self._lent:
            return  # it was dropped meanwhile
        for _ in range(min(count, len(self._first))):
            self._first.popleft()
            self._counts[first] -= 1
        if not self._first:
            self._remove_first()

    def close(self) -> None:
        """End writing; records stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin(self) -> None:
        self.close()
        number = max(self._counts, default=0) + 1
        path = self._folder / f"{number:010}"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._counts[number] = 0

    def _load(self) -> None:
        """Read the first segment into memory; nothing is appended to it from now on."""
        if self._loaded:
            return
        number = next(iter(self._counts))
        if number == max(self._counts):
            self.close()
        try:
            records = _records((self._folder / f"{number:010}").read_bytes())
        except FileNotFoundError:
            records = []
        except OSError as error:
            raise LocalError(f"cannot read {self._folder}: {error.strerror}") from error
        self._first = deque(records)
        self._counts[number] = len(records)
        self._loaded = True

    def _remove_first(self) -> int:
        """Forget the oldest segment; returns how many records waited in it."""
        number = next(iter(self._counts))
        if number == max(self._counts):
            self.close()
        with suppress(OSError):  # on a disk that became read-only it stays, and is known when sent again
            (self._folder / f"{number:010}").unlink(missing_ok=True)
        self._first.clear()
        self._loaded = False
        return self._counts.pop(number)


def _records(data: bytes) -> list[bytes]:
    """What stands in a segment, up to the first record that is damaged."""
    found = []
    at = 0
    while at + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, at)
        record = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(record) != length or zlib.crc32(record) != crc:
            break
        found.append(record)
        at += _HEAD.size + length
    return found
