"""Training data as rows of bytes, named by (shard, position): what a trainer makes microbatches of.

A source is one text file, a folder (recursively, in sorted order), or by default the standard library of
the interpreter that runs us. Documents are joined with a NUL byte behind each; a row is T+1 consecutive
bytes, its last one being the first of the next row, so that every byte is a target once. One keyed
permutation of all rows decides everything: its first 1/64 (at least 8, at most half) are held out for
evaluation and never trained on, the rest is cut into ``shards`` ranges, one a trainer. A position past
the end of its shard begins another epoch. The same arguments give the same rows on every machine.

Limits: reads at most MAX_BYTES (sorted order decides what is left out, ``describe()`` says so), all kept
in memory, so a trainer stays under its 100 MB. Links are not followed inside a folder; hidden, binary
and unreadable files are passed over. No torch, no numpy: trainers import this.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sysconfig
from array import array
from bisect import bisect_left, bisect_right
from pathlib import Path

import attrs

from p2p.errors import LocalError

MAX_BYTES = 32 << 20
VOCAB = 256
HELD_OUT = 64
"""One row in so many is for evaluation."""
MIN_HELD_OUT = 8
BOUNDARY = b"\0"
"""Follows every document; text has no NUL."""
_REMEDY = "name a text file, or a folder of them, in trainer.data"
_SNIFF = 8192
_PIECE = 1 << 16
_SKIP_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
_SKIP_STDLIB = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"})


@attrs.frozen
class Row:
    """One training sequence."""

    shard: int
    position: int
    text: bytes
    """T+1 bytes; each is a token id."""
    starts: tuple[int, ...]
    """Places in the row, other than 0, where a new document begins."""

    @property
    def ids(self) -> bytes:
        """T+1 token ids as little-endian uint32: what travels and what the ticket hashes."""
        return struct.pack(f"<{len(self.text)}I", *self.text)


class ByteSource:
    """See the head of this file."""

    def __init__(self, path: Path | None, seq: int, seed: int, *, shards: int = 1) -> None:
        if not 1 <= shards <= 1 << 20:
            raise LocalError(f"data: {shards} shards; between 1 and {1 << 20} are possible")
        self.seq = seq
        self.shards = shards
        self._where = str(path) if path is not None else "the Python standard library"
        self._files, self._left_out = 0, 0
        self._data = bytearray()
        self._begins = array("q")
        self._read(path)
        self.rows = max(0, (len(self._data) - 1) // seq)
        needed = 1 + shards
        if self.rows < needed:
            raise LocalError(
                f"data: {self._where} holds {len(self._data)} bytes of text, too few for {needed} sequences "
                f"of {seq + 1} bytes; give a larger file or folder"
            )
        held_out = max(MIN_HELD_OUT, self.rows // HELD_OUT)
        self.eval_rows = max(1, min(held_out, self.rows // 2, self.rows - shards))
        """Rows held out for evaluation."""
        self._order = _Permutation(self.rows, seed)

    def describe(self) -> str:
        """One line for people: how much text from where."""
        left = f", {self._left_out} left out" if self._left_out else ""
        return f"{len(self._data) / 1e6:.1f} MB of text from {self._where}: {self._files} files{left}"

    def shard_rows(self, shard: int) -> int:
        """Rows of one epoch of a shard."""
        begin, end = self._range(shard)
        return end - begin

    def row(self, shard: int, position: int) -> Row:
        """The training row of that name; positions go on for ever, epoch after epoch."""
        if position < 0:
            raise LocalError(f"data: position {position} is negative")
        begin, end = self._range(shard)
        return self._row(shard, position, begin + position % (end - begin))

    def eval_row(self, position: int) -> Row:
        """A held-out row; positions wrap around."""
        return self._row(0, position, position % self.eval_rows)

    def _range(self, shard: int) -> tuple[int, int]:
        if not 0 <= shard < self.shards:
            raise LocalError(f"data: shard {shard} does not exist; there are {self.shards}")
        train = self.rows - self.eval_rows
        return (
            self.eval_rows + train * shard // self.shards,
            self.eval_rows + train * (shard + 1) // self.shards,
        )

    def _row(self, shard: int, position: int, place: int) -> Row:
        offset = self._order(place) * self.seq
        text = bytes(memoryview(self._data)[offset : offset + self.seq + 1])
        first = bisect_right(self._begins, offset)
        last = bisect_left(self._begins, offset + self.seq, lo=first)
        return Row(shard, position, text, tuple(at - offset for at in self._begins[first:last]))

    def _read(self, path: Path | None) -> None:
        if path is None:
            root = Path(sysconfig.get_paths()["stdlib"])
            self._read_folder(root, skip=_SKIP_FOLDERS | _SKIP_STDLIB, only=".py")
        elif path.is_dir():
            self._read_folder(path, skip=_SKIP_FOLDERS, only="")
        else:
            try:
                added = self._add(path)
            except OSError as error:
                raise _unreadable(path, error) from None
            if not added:
                raise _no_text(path)

    def _read_folder(self, root: Path, *, skip: frozenset[str], only: str) -> None:
        problems: list[OSError] = []
        for folder, folders, files in os.walk(root, onerror=problems.append):
            folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
            for name in sorted(files):
                file = Path(folder) / name
                if name.startswith(".") or not name.endswith(only) or file.is_symlink():
                    continue
                if len(self._data) >= MAX_BYTES:
                    self._left_out += 1
                    continue
                try:
                    self._left_out += not self._add(file)
                except OSError:
                    self._left_out += 1
            if problems and Path(problems[0].filename or "") == root:
                break
        if not self._files:
            reason = f": {problems[0].strerror}" if problems else ""
            raise LocalError(f"data: {self._where} has no readable text file{reason}; {_REMEDY}")

    def _add(self, file: Path) -> bool:
        """Append a document; False if it is empty or does not look like text."""
        if not file.is_file() and file.exists():
            return False  # a pipe or device could block for ever
        with file.open("rb") as stream:
            head = stream.read(_SNIFF)
            if not head or b"\0" in head:
                return False
            begin = len(self._data)
            # In pieces: read(n) allocates n bytes first, and the heap would keep that.
            while head and len(self._data) < MAX_BYTES:
                self._data += head
                head = stream.read(_PIECE)
        if self._data.find(0, begin) >= 0:
            del self._data[begin:]
            return False
        self._begins.append(begin)
        self._data += BOUNDARY
        self._files += 1
        return True


def require_text(path: Path) -> None:
    """``LocalError`` unless ``path`` is a text file or a folder; cheap, unlike reading all of it."""
    if path.is_dir():
        return
    head = b""
    try:
        if path.is_file() or not path.exists():  # a pipe or device could block for ever
            with path.open("rb") as stream:
                head = stream.read(_SNIFF)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not head or b"\0" in head:
        raise _no_text(path)


def _unreadable(path: Path, error: OSError) -> LocalError:
    return LocalError(f"data: cannot read {path}: {error.strerror or error}; {_REMEDY}")


def _no_text(path: Path) -> LocalError:
    return LocalError(f"data: {path} is empty or not text; {_REMEDY}")


class _Permutation:
    """A keyed bijection of range(n): four Feistel rounds on the next even power of two, walked into range."""

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._keys = [hashlib.blake2b(b"rows:%d:%d" % (seed, i), digest_size=16).digest() for i in range(4)]

    def __call__(self, index: int) -> int:
        mask = (1 << self._half) - 1
        while True:
            left, right = index >> self._half, index & mask
            for key in self._keys:
                mixed = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key).digest()
                left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
            index = left << self._half | right
            if index < self._n:
                return index
