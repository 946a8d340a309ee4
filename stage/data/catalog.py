"""Files as blocks: some files lie behind each other, and the whole is cut in blocks of about the same size.

A *section* is what is opened at once: all files of a folder, or one file of a data set of the hub. Its
files' weights (about how many bytes of text each holds) make one line, which is cut in equal blocks;
whatever block is asked for, only the parts of files that lie in it are read. A ``Catalog`` lists sections.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from stage.data.files import File, Troubles, find, open_file, standard_library
from stage.data.tokens import Document

BLOCK_BYTES = 1 << 20


class Section:
    """Some files as blocks."""

    def __init__(self, files: list[File], block_bytes: int, troubles: Troubles) -> None:
        self._files = files
        self._ends = list(accumulate(file.weight for file in files))
        self._troubles = troubles
        self.weight = self._ends[-1]
        """About how many bytes of text."""
        self.blocks = max(1, round(self.weight / block_bytes))
        self._told = bytearray(self.blocks)
        """Of which blocks it is known what is left out: they are read again in every lap."""

    def documents(self, block: int) -> Iterator[Document]:
        """Of one block, in order. LocalError if a file cannot be read any more."""
        troubles = Troubles() if self._told[block] else self._troubles
        begin = self.weight * block // self.blocks
        end = self.weight * (block + 1) // self.blocks
        for index in range(bisect_right(self._ends, begin), len(self._files)):
            file, first = self._files[index], self._ends[index] - self._files[index].weight
            if first >= end:
                break
            low = max(0, begin - first) * file.units // file.weight
            high = min(file.weight, end - first) * file.units // file.weight
            if low < high:
                yield from file.read(low, high, troubles)
        self._told[block] = 1


def require_readable(path: Path, field: str = "text") -> None:
    """``LocalError`` unless it is a folder, or a file with something to read; cheap."""
    if not path.is_dir():
        open_file(path, field)


class Catalog(Protocol):
    """All data of a trainer."""

    sections: int
    troubles: Troubles
    name: str
    """Differs if the content does."""

    def section(self, index: int, block_bytes: int) -> Section:
        """May take long; LocalError if it cannot be had."""

    def describe(self) -> str:
        """One line for people."""


class LocalFiles:
    """A file or a folder; by default the standard library of the interpreter that runs us."""

    sections = 1

    def __init__(self, path: Path | None, field: str = "text") -> None:
        self.troubles = Troubles()
        self._where = str(path) if path is not None else "the Python standard library"
        self._files = standard_library(self.troubles) if path is None else find(path, field, self.troubles)
        root = path if path is not None and path.is_dir() else None
        names = (
            f"{file.path.relative_to(root) if root else file.path.name}:{file.units}:{file.weight}"
            for file in self._files
        )
        self.name = hashlib.sha256("\n".join(names).encode(errors="replace")).hexdigest()

    def section(self, index: int, block_bytes: int) -> Section:
        """All files at once."""
        return Section(self._files, block_bytes, self.troubles)

    def describe(self) -> str:
        weight, files = sum(file.weight for file in self._files), len(self._files)
        size = f"{weight / 1e6:.1f} MB" if weight >= 100_000 else f"{weight} bytes"
        return f"{size} of text from {self._where}: {files} file{'s' * (files != 1)}"
