"""What a trainer has behind it: the journal of completed positions, which survives its end at any moment.

A line is written for each completed microbatch as soon as it is known, so a process that is killed repeats
only what was in flight. The file is synced every second: after a power cut, what was completed in the last
second is repeated too. Nothing is ever skipped: of each shard there is a low-water mark, below which
everything is done, and the set of what is done above it; all else is issued again.

The file is JSON lines. The first one is the state when the file was written, the others are what was
completed since: ``[shard, position]``, the number of evaluations so far, or a shard that came from another
trainer. It is written anew, beside the
old one and then in its place, every ``LINES`` lines and whenever the data went on to another window. A last
line that was cut off is no line. What cannot be written, because a disk is full, is kept (``UNWRITTEN``
lines, the oldest first to go) and tried again. Positions mean rows only with the same data, so the file says
which they are.
"""

from __future__ import annotations

import json
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from p2p.errors import LocalError
from stage.data import Cursor

JOURNAL = "journal.jsonl"
"""Its name in a trainer's state folder."""
FORMAT = 2
LINES = 4096
UNWRITTEN = 65_536


@attrs.define
class Shard:
    """How far a shard is."""

    mark: int = 0
    """Everything below it is completed."""
    done: set[int] = attrs.field(factory=set)
    """Completed positions above it."""
    cursor: Cursor = attrs.field(factory=Cursor)
    """Where to go on reading: not beyond the mark."""

    @property
    def completed(self) -> int:
        return self.mark + len(self.done)

    def add(self, position: int) -> bool:
        """Whether it is new."""
        if position < self.mark or position in self.done:
            return False
        self.done.add(position)
        while self.mark in self.done:
            self.done.remove(self.mark)
            self.mark += 1
        return True


@attrs.define
class Journal:
    """See the head of this file. Not for two threads, but for ``Copy.write``."""

    path: Path
    data: str
    """Which data its positions are about."""
    samples: int = 0
    """Completed by this trainer, whatever the shard."""
    evaluations: int = 0
    """Tickets of evaluation so far: their positions grow too."""
    shards: dict[int, Shard] = attrs.field(factory=dict)
    _descriptor: int | None = None
    _lines: int = 0
    _unwritten: deque[bytes] = attrs.field(factory=lambda: deque(maxlen=UNWRITTEN))
    _unsynced: bool = False
    _since: list[bytes] | None = None
    """Lines since a copy was begun."""

    @classmethod
    def load(cls, path: Path, data: str) -> Journal:
        """The state of the file, or a new one; the file is written by ``start``."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return cls(path, data)
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error.strerror or error}") from None
        try:
            journal = _read(path, text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LocalError(
                f"{path} is damaged ({error}); remove it to start the trainer's data from the beginning"
            ) from None
        if journal.data != data:
            raise LocalError(
                f"{path} is about other data than this trainer has now; put the former data and settings "
                "back, or remove it to start from the beginning"
            )
        return journal

    def shard(self, number: int) -> Shard:
        """That shard's, new if it is."""
        return self.shards.setdefault(number, Shard())

    def adopt(self, number: int, progress: Shard) -> None:
        """Go on with a shard from where somebody else was, unless this journal is further."""
        known = self.shard(number)
        if progress.mark < known.mark:
            return
        if progress.mark == known.mark:
            progress.done |= known.done
        self.shards[number] = progress
        while progress.mark in progress.done:
            progress.done.remove(progress.mark)
            progress.mark += 1
        self._append({"shard": number, **_fields(progress)})

    def complete(self, shard: int, position: int) -> None:
        """A microbatch of this trainer is done."""
        if self.shard(shard).add(position):
            self.samples += 1
        self._append([shard, position])

    def evaluate(self, tickets: int) -> int:
        """Numbers for so many tickets of evaluation: the first of them."""
        first = self.evaluations + 1
        self.evaluations += tickets
        self._append({"evaluations": self.evaluations})
        return first

    def start(self) -> None:
        """Write the file and keep it open. LocalError if that is not possible."""
        copy = self.copy()
        copy.write()
        self.replace(copy)

    @property
    def long(self) -> bool:
        """Whether it is time for a copy."""
        return self._lines >= LINES

    def copy(self) -> Copy:
        """A shorter file with the same content; ``write`` it, then ``replace``."""
        self._since = []
        fields = {
            "format": FORMAT,
            "data": self.data,
            "samples": self.samples,
            "evaluations": self.evaluations,
            "shards": {number: _fields(shard) for number, shard in self.shards.items()},
        }  # fmt: skip
        return Copy(self.path.with_suffix(".new"), _line(fields))

    def replace(self, copy: Copy) -> None:
        """Put a written copy in the file's place, with what was completed since it was begun."""
        since, self._since = self._since or [], None
        try:
            descriptor = os.open(copy.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                _write(descriptor, b"".join(since))
                copy.path.replace(self.path)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._lines = descriptor, len(since)
        self._unwritten.clear()
        self._unsynced = True

    def sync(self) -> None:
        """What was written so far is on the disk; may run in a thread. LocalError if it is not."""
        if self._descriptor is None or not self._unsynced:
            return
        self._unsynced = False
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._unsynced = True
            raise _unwritable(self.path, error) from None

    def close(self) -> None:
        """Of the file; what is not written by now is lost."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, fields: Any) -> None:
        line = _line(fields)
        if self._since is not None:
            self._since.append(line)
        self._unwritten.append(line)
        self.flush()

    def flush(self) -> None:
        """Write what could not be written before."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # a disk that is full for a while
            while self._unwritten:
                _write(self._descriptor, self._unwritten[0])
                self._unwritten.popleft()
                self._lines += 1
                self._unsynced = True


@attrs.frozen
class Copy:
    """A journal's content at some moment."""

    path: Path
    text: bytes

    def write(self) -> None:
        """To the disk; may run in a thread. Raises LocalError."""
        try:
            with self.path.open("wb") as stream:
                stream.write(self.text)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from None


def samples_of(path: Path) -> int:
    """Completed samples by a journal that may be in use; 0 if there is none that can be read."""
    try:
        return _read(path, path.read_bytes()).samples
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def _read(path: Path, text: bytes) -> Journal:
    lines = text.split(b"\n")[:-1]  # behind the last line's end there is nothing, or a part of a line
    if not lines:
        raise ValueError("it is empty")
    head = json.loads(lines[0])
    if head["format"] != FORMAT or not isinstance(head["data"], str):
        raise ValueError("another version wrote it")
    journal = Journal(path, head["data"], _count(head["samples"]), _count(head["evaluations"]))
    for number, fields in head["shards"].items():
        journal.shards[_count(int(number))] = _shard(fields)
    for line in lines[1:]:
        match json.loads(line):
            case [number, position]:
                journal.samples += journal.shard(_count(number)).add(_count(position))
            case {"shard": number, **fields}:
                journal.shards[_count(number)] = _shard(fields)
            case {"evaluations": evaluations}:
                journal.evaluations = _count(evaluations)
            case _:
                raise ValueError("a line says nothing that is known")
    return journal


def _fields(shard: Shard) -> dict[str, Any]:
    return {"mark": shard.mark, "done": sorted(shard.done), "cursor": attrs.astuple(shard.cursor)}


def _shard(fields: Any) -> Shard:
    cursor = Cursor(*map(_count, fields["cursor"]))
    shard = Shard(_count(fields["mark"]), set(map(_count, fields["done"])), cursor)
    if min(shard.done, default=shard.mark + 1) <= shard.mark:
        raise ValueError("a position is done that is not above the mark")
    if cursor.begin > shard.mark:
        raise ValueError("its cursor lies beyond its mark")
    return shard


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a count is not a whole number")
    return value


def _line(fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _write(descriptor: int, data: bytes) -> None:
    """All of it, or nothing: half a line would spoil the next one."""
    if not data:
        return
    end = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError("the disk is full")
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _unwritable(path: Path, error: OSError) -> LocalError:
    return LocalError(f"cannot write {path}: {error.strerror or error}")
