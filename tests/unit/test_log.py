"""Logs: every line parses, none is too long or obeyed by a terminal, nothing grows without bound."""

from __future__ import annotations

import ast
import importlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import attrs
import pytest

from agorad import journal, logfile
from agorad.cli import logs
from agorad.console import CHARACTERS, WIDTH, columns, fit, friendly
from agorad.events import Bus, Stopped, Stopping, encode_entry
from agorad.log import Log
from agorad.logfile import KEEP, LogFile, rotated
from agorad.metrics.book import Book
from agorad.repeats import MOST, WINDOW_S, Repeats
from p2p.errors import LocalError
from p2p.event import Event
from p2p.host_events import PeerRefused
from stage.events import Evaluated

ROOT = Path(__file__).parents[2]
NASTY = "a\x1b[2Jb\nc\rd\x00e\u202ef\udc80g\u2028h🙂漢字" + "e\u0301"
"""What a peer might call itself: terminal codes, line ends, half a character, wide ones."""


class Now:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def refusal(why: str = "full") -> PeerRefused:
    return PeerRefused(peer="12D3KooWabcdef", protocol="/agora/x/1", why=why)


def test_every_line_parses_whatever_is_in_it(tmp_path: Path) -> None:
    now, stream = Now(), io.StringIO()
    bus = Bus(tmp_path / "events.jsonl", clock=now)
    bus.subscribe(Log(stream, tmp_path / "log"))
    bus.emit(refusal(NASTY))
    bus.emit(Evaluated(step=1, loss=math.nan, rows=2))
    bus.emit(Stopping(why=NASTY))
    assert bus.counts["subscriber_failed"] == bus.unwritten == 0

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    for text in ((tmp_path / "log").read_bytes(), (tmp_path / "events.jsonl").read_bytes()):
        lines = text.decode().split("\n")
        assert lines.pop() == ""
        entries = [json.loads(line, parse_constant=refuse) for line in lines]
        assert [entry["event"] for entry in entries] == ["peer_refused", "evaluated", "stopping"]
        assert entries[0]["why"] == NASTY
        assert entries[1]["loss"] is None
    assert stream.getvalue() == (tmp_path / "log").read_text()
    assert journal.encode("info", "line", {"why": NASTY})


def test_friendly_lines_fit_whatever_is_in_them() -> None:
    for text in (NASTY, NASTY * 30, "漢" * 200, "x" * 500, "e\u0301" * 300):
        line = friendly({"event": "stopping", "at": 0.0, "why": text})
        assert line is not None
        assert line.isprintable()
        assert sum(map(columns, line)) <= WIDTH
    assert fit("x" * WIDTH) == "x" * WIDTH
    assert fit("x" * (WIDTH + 1)) == "x" * (WIDTH - 1) + "…"
    assert fit("漢" * 50) == "漢" * 50
    assert fit("e" + "\u0301" * 10**6) == "e" + "\u0301" * CHARACTERS + "…"
    assert fit("e\u0301" * 100) == "e\u0301" * 100


def event_classes() -> Iterator[type[Event]]:
    """Every event that the code defines."""
    for file in (*ROOT.glob("p2p/**/*.py"), *ROOT.glob("stage/*.py"), *ROOT.glob("agorad/**/*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and "Event" in map(ast.unparse, node.bases):
                module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                yield getattr(importlib.import_module(module), node.name)


WORST: dict[type, tuple[Any, ...]] = {
    str: ("", NASTY * 30, "x" * 999, "{0} {} %s %d"),
    bool: (False, True, False, True),
    bytes: (b"", b"\xff" * 200, b"\0", b"\n"),
    int: (0, 1 << 62, 1, 10**18),
    float: (0.0, math.nan, math.inf, 1e300),
}
"""By type: nothing, hostile, very long, tricky."""


def worst(kind: Any, at: int) -> Any:
    """The value of a field of that type in the ``at``-th of four events."""
    if get_origin(kind) in (list, tuple):
        return get_origin(kind)([] if at == 0 else [worst(get_args(kind)[0], at)] * 9)
    if isinstance(kind, UnionType):
        return None if at == 0 else worst(get_args(kind)[0], at)
    return WORST[kind][at]


def test_every_event_with_the_worst_in_it_is_told_in_every_form() -> None:
    """On a terminal, as JSON, in the journal, counted; and read back from JSON, as the demo's view does."""
    book, classes = Book(), list(event_classes())
    for cls in classes:
        attrs.resolve_types(cls)
        terminal, stream, bus = io.StringIO(), io.StringIO(), Bus()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        for subscriber in (Log(terminal, None), Log(stream, None), book.observe):
            bus.subscribe(subscriber)
        for at in range(4):
            bus.emit(cls(**{field.alias: worst(field.type, at) for field in attrs.fields(cls)}))
        assert len(bus.since()) == 4, bus.since()[-1]  # nobody raised
        for line in terminal.getvalue().splitlines():
            assert line.isprintable()
            assert sum(map(columns, line)) <= WIDTH
        for text in stream.getvalue().split("\n")[:-1]:
            json.loads(text)
        for entry in bus.since():
            read = json.loads(encode_entry(entry))
            assert (friendly(read) is None) == (friendly(entry) is None)
            assert journal.encode("info", friendly(read) or "", entry)
    assert len(classes) > 60


def test_an_event_of_another_version_is_still_a_line() -> None:
    line = friendly({"id": 1, "at": 0.0, "event": "phase", "was": "a", "is": "b"}, with_time=False)
    assert line == "[PHASE] was a, is b"


def test_a_terminal_of_another_alphabet_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    bus = Bus()
    bus.subscribe(Log(stream, None))
    bus.emit(Stopping(why="漢字"))
    assert b"leaving: \\u6f22\\u5b57" in raw.getvalue()
    assert bus.counts["subscriber_failed"] == 0


def test_repeats_are_counted_not_told(tmp_path: Path) -> None:
    now = Now()
    bus = Bus(clock=now)
    bus.subscribe(Log(io.StringIO(), tmp_path / "log"))
    for _ in range(10 * MOST):
        bus.emit(refusal())
    bus.emit(Stopping(why="other kinds are told"))
    now.at += WINDOW_S
    bus.emit(refusal())
    for _ in range(2 * MOST):
        bus.emit(refusal())
    bus.emit(Stopped(code=0, why="done"))
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    kinds = [entry["event"] for entry in entries]
    assert kinds.count("peer_refused") == 2 * MOST
    assert kinds[MOST] == "stopping"
    held = [(entry["of"], entry["count"]) for entry in entries if entry["event"] == "held_back"]
    assert held == [("peer_refused", 9 * MOST), ("peer_refused", MOST + 1)]
    line = friendly(entries[MOST + 1])
    assert line is not None
    assert line.endswith(f"[LOG] {9 * MOST} more of peer_refused within a minute: agoractl events has them")


def test_a_clock_set_back_ends_a_window_too() -> None:
    repeats = Repeats()
    for _ in range(2 * MOST):
        repeats.admits("x", 1000.0)
    assert list(repeats.over(1010.0)) == []
    assert list(repeats.over(10.0)) == [("x", MOST)]
    assert repeats.admits("x", 10.0)


@pytest.mark.parametrize("size", [10, logs.CHUNK - 1, logs.CHUNK + 9, 2 * logs.CHUNK + 77])
def test_the_last_lines_of_a_log_are_read_whole_and_once(tmp_path: Path, size: int) -> None:
    lines = [b"%07d" % number for number in range(size // 8 + 1)]
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with path.open("rb") as file:
        assert logs._last(file, 10**6) == lines
        assert logs._last(file, 1) == lines[-1:]
        assert logs._last(file, 0) == []


def test_the_file_is_bounded_and_its_past_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "LIMIT", 1000)
    path = tmp_path / "log"
    file = LogFile(path)
    for number in range(1000):
        file.write(b"%04d" % number + b"x" * 95 + b"\n")
    assert sorted(tmp_path.iterdir()) == sorted([path, *rotated(path)])
    assert len(rotated(path)) == KEEP
    assert all(one.stat().st_size <= 1000 for one in tmp_path.iterdir())
    told = b"".join(one.read_bytes() for one in [*reversed(rotated(path)), path])
    numbers = [int(line[:4]) for line in told.splitlines()]
    assert numbers == list(range(1000 - len(numbers), 1000))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_somebody_moved_is_opened_anew(tmp_path: Path) -> None:
    now = Now()
    path = tmp_path / "log"
    file = LogFile(path, now)
    file.write(b"one\n")
    path.rename(tmp_path / "log.old")
    file.write(b"two\n")
    now.at += logfile.LOOK_S
    file.write(b"three\n")
    assert (tmp_path / "log.old").read_text() == "one\ntwo\n"
    assert path.read_text() == "three\n"
    path.unlink()
    now.at += logfile.LOOK_S
    file.write(b"four\n")
    assert path.read_text() == "four\n"


def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    file = LogFile(Path("/dev/full"))
    file.write(b"lost\n")
    file.write(b"lost\n")
    with pytest.raises(LocalError, match="cannot write the log file /dev/none/log: "):
        LogFile(Path("/dev/none/log"))


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bytes of a disk hold half a line; the lines before and after it parse."""
    write, room = os.write, 0

    def short(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:room] if room else data)

    monkeypatch.setattr(os, "write", short)
    bus = Bus(tmp_path / "events.jsonl")
    bus.subscribe(Log(io.StringIO(), tmp_path / "log"))
    for room in (0, 20, 0):
        bus.emit(Stopping(why=str(room)))
    assert bus.unwritten == 1
    for name in ("events.jsonl", "log"):
        entries = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [entry["id"] for entry in entries] == [1, 3]
