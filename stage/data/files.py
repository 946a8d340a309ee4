"""Files of documents: a text is one, a line of JSON is one, a row of a parquet file is one.

What a file is follows from its name: ``.jsonl`` and ``.ndjson`` hold an object a line with the text in one
field, ``.parquet`` rows with the text in one column, everything else is one text. Each can be read from any
*unit* on (a byte, or a row of a parquet file) without what is before it: the documents of units [a, b) are
those that begin there; of a text it is exactly those bytes, at whole characters. So a file is cut anywhere,
and every document is read once.

Folders are walked in sorted order; hidden, binary, empty and unreadable files in them are passed over and
counted, links are not followed. A file that is named itself has to be readable. What is left out later (a
line that is no JSON, a document of more than ``DOCUMENT_LIMIT`` bytes) is counted by ``Troubles``. Nothing is
read whole: not a file, not a line.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from p2p.errors import LocalError
from stage.data.tokens import Document

DOCUMENT_LIMIT = 4 << 20
"""Bytes of a document that is read in one piece; one of more is left out."""
REMEDY = "name a text, JSONL or parquet file, or a folder of them, in trainer.data"
_SNIFF = 8192
_SKIPPED = 1 << 16
"""Bytes of a line that are passed over at once."""
_SKIP_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
_SKIP_STDLIB = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"})
_LINES = (".jsonl", ".ndjson")


class Unavailable(Exception):  # noqa: N818
    """Data that cannot be had now, but perhaps later."""


class Troubles:
    """What was left out and why, for people."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def __call__(self, why: str) -> None:
        self.counts[why] = self.counts.get(why, 0) + 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {why}" for why, count in self.counts.items())


Documents = Callable[[int, int, Troubles], Iterator[Document]]


@attrs.frozen
class File:
    """One file, ready to be read in parts."""

    path: Path
    units: int
    """Bytes, or rows of a parquet file."""
    weight: int
    """About how many bytes of text."""
    read: Documents
    """The documents of units [begin, end)."""


def find(root: Path, field: str, troubles: Troubles) -> list[File]:
    """The file, or the files of the folder. LocalError if there is nothing to read."""
    if not root.is_dir():
        return [open_file(root, field)]
    return _walk(root, field, troubles, _SKIP_FOLDERS, "")


def standard_library(troubles: Troubles) -> list[File]:
    """The Python source of the interpreter that runs us."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _walk(root, "", troubles, _SKIP_FOLDERS | _SKIP_STDLIB, ".py")


def open_file(path: Path, field: str) -> File:
    """LocalError with the reason if it holds nothing that can be read."""
    head = b""
    try:
        if path.is_file() or not path.exists():  # a pipe or device could block for ever
            with path.open("rb") as stream:
                head = stream.read(_SNIFF)
                size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise LocalError(f"data: cannot read {path}: {error.strerror or error}; {REMEDY}") from None
    if head and path.suffix.lower() == ".parquet":
        from stage.data.parquet import open_parquet

        return open_parquet(path, field)
    if not head or b"\0" in head:
        raise LocalError(f"data: {path} is empty or not text; {REMEDY}")
    if path.suffix.lower() in _LINES:
        return File(path, size, size, lambda a, b, troubles: _lines(path, size, field, a, b, troubles))
    return File(path, size, size, lambda a, b, troubles: _text(path, size, a, b, troubles))


def _walk(root: Path, field: str, troubles: Troubles, skip: frozenset[str], only: str) -> list[File]:
    problems: list[OSError] = []
    found: list[File] = []
    why = ""
    for folder, folders, names in os.walk(root, onerror=problems.append):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if name.startswith(".") or not name.endswith(only) or path.is_symlink():
                continue
            try:
                found.append(open_file(path, field))
            except LocalError as error:
                why = why or str(error).removeprefix("data: ").partition(";")[0]
                troubles("files left out")
    if not found:
        reason = f": {problems[0].strerror}" if problems else f" ({why})" if why else ""
        raise LocalError(f"data: {root} has no readable text file{reason}; {REMEDY}")
    return found


def _opened(path: Path, size: int) -> int:
    """A descriptor of the file as it was found. LocalError if it is another by now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LocalError(f"data: cannot read {path}: {error.strerror or error}; {REMEDY}") from None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        raise LocalError(
            f"data: {path} has changed since this node began to read it; put it back, or start with new data"
        )
    return descriptor


def _text(path: Path, size: int, begin: int, end: int, troubles: Troubles) -> Iterator[Document]:
    with os.fdopen(_opened(path, size), "rb", buffering=0) as stream:
        text = _range(stream.fileno(), path, begin, min(size, end + 3))
    # A character that is cut belongs to the part where it begins.
    first = 0 if begin == 0 else _continuation(text, 0)
    last = len(text) if end == size else _continuation(text, end - begin)
    text = text[first:last]
    if b"\0" in text:
        troubles("parts left out as not text")
    elif text:
        yield Document(text, begins=begin == 0, ends=end == size)


def _range(descriptor: int, path: Path, begin: int, end: int) -> bytes:
    parts = []
    while begin < end:
        try:
            part = os.pread(descriptor, end - begin, begin)
        except OSError as error:
            raise LocalError(f"data: cannot read {path}: {error.strerror or error}; {REMEDY}") from None
        if not part:
            break
        parts.append(part)
        begin += len(part)
    return b"".join(parts)


def _continuation(text: bytes, at: int) -> int:
    """The first place from ``at`` on, at most three further, that continues no UTF-8 character."""
    for place in range(at, min(at + 3, len(text))):
        if text[place] & 0xC0 != 0x80:
            return place
    return min(at + 3, len(text))


def _lines(path: Path, size: int, field: str, begin: int, end: int, troubles: Troubles) -> Iterator[Document]:
    with os.fdopen(_opened(path, size), "rb") as stream:
        try:
            at = begin
            if begin:
                stream.seek(begin - 1)
                at = begin - 1 + _pass_over(stream.readline, end - begin + 1)
            while at < end:
                line = stream.readline(DOCUMENT_LIMIT + 1)
                at += len(line)
                if len(line) > DOCUMENT_LIMIT and not line.endswith(b"\n"):
                    troubles(f"lines left out with more than {DOCUMENT_LIMIT >> 20} MiB")
                    at += _pass_over(stream.readline, end - at)
                elif line.strip():
                    document = _of_json(line, field, troubles)
                    if document is not None:
                        yield document
                if not line:
                    return
        except OSError as error:
            raise LocalError(f"data: cannot read {path}: {error.strerror or error}; {REMEDY}") from None


def _pass_over(readline: Callable[[int], bytes], most: int) -> int:
    """Bytes until the line is over, or until the ``most`` that matter are behind us."""
    passed = 0
    while passed < most:
        part = readline(_SKIPPED)
        passed += len(part)
        if not part or part.endswith(b"\n"):
            break
    return passed


def _of_json(line: bytes, field: str, troubles: Troubles) -> Document | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        troubles("lines left out that are no JSON")
        return None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        troubles(f"lines left out without a text in {field!r}")
        return None
    return Document(text.encode(errors="replace")) if text else None
