"""The bus: flushed before emit returns, numbered, bounded, and deaf to its listeners' faults."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from agorad import events
from agorad.console import WIDTH, friendly
from agorad.events import Bus, CertificateGranted, Ready, Stopping
from agorad.log import level
from p2p.event import Event


@attrs.frozen(kw_only=True)
class MicrobatchAdded(Event):
    ticket: str
    from_: str
    raw: bytes


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_on_disk_when_emit_returns(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    bus = Bus(path, clock=lambda: 12.5)
    bus.emit(MicrobatchAdded(ticket="0:1", from_="x", raw=b"\x01\xff"))
    assert lines(path) == [
        {"id": 1, "at": 12.5, "event": "microbatch_added", "ticket": "0:1", "from": "x", "raw": "01ff"}
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_life_appends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _life in range(2):
        bus = Bus(path)
        bus.emit(Stopping(why="test"))
        bus.close()
    assert [line["id"] for line in lines(path)] == [1, 1]


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "FILE_LIMIT", 400)
    path = tmp_path / "events.jsonl"
    bus = Bus(path)
    for _ in range(20):
        bus.emit(Stopping(why="x" * 50))
    assert path.stat().st_size <= 400
    assert (tmp_path / "events.jsonl.1").stat().st_size <= 400
    assert lines(path)[-1]["id"] == 20
    assert bus.unwritten == 0


def test_ring_counts_and_since() -> None:
    bus = Bus()
    for _ in range(events.RING + 10):
        bus.emit(Stopping(why=""))
    assert bus.counts["stopping"] == events.RING + 10
    assert next(entry["id"] for entry in bus.since()) == 11
    assert [entry["id"] for entry in bus.since(events.RING + 8)] == [events.RING + 9, events.RING + 10]


def test_a_listener_that_raises_is_dropped_and_reported() -> None:
    bus = Bus()
    seen: list[str] = []
    bus.subscribe(lambda _entry: 1 / 0)  # type: ignore[arg-type]
    stop = bus.subscribe(lambda entry: seen.append(entry["event"]))
    bus.emit(Stopping(why=""))
    bus.emit(Stopping(why=""))
    assert sorted(seen) == ["stopping", "stopping", "subscriber_failed"]
    stop()
    stop()
    bus.emit(Stopping(why=""))
    assert len(seen) == 3


def test_a_full_disk_is_counted_and_training_goes_on() -> None:
    bus = Bus(Path("/dev/full"))
    bus.emit(Stopping(why=""))
    assert bus.unwritten == 1
    assert len(bus.since()) == 1


def test_follow_wakes_for_each_event() -> None:
    async def main() -> None:
        bus = Bus()
        got: list[int] = []

        async def reader() -> None:
            async for batch in bus.follow():
                got.extend(entry["id"] for entry in batch)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            for expected in (1, 2, 3):
                await trio.testing.wait_all_tasks_blocked()
                bus.emit(Stopping(why=""))
                await trio.testing.wait_all_tasks_blocked()
                assert got[-1] == expected
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_friendly_lines_fit_and_unknown_events_are_silent() -> None:
    bus = Bus(clock=lambda: 0.0)
    bus.emit(Ready(seconds=0.5, addrs=["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWX"] * 5))
    bus.emit(CertificateGranted(account="a", stage=1, expires=1.0, authority="12D3KooWabcdef"))
    first, second = (friendly(entry) for entry in bus.since())
    assert first is not None
    assert len(first) == WIDTH
    assert second is not None
    assert second.endswith("[JOIN] access granted by abcdef")
    assert friendly({"event": "no_such", "at": 0.0}) is None
    assert (level("microbatch_added"), level("round_abandoned"), level("step")) == (
        "debug",
        "warning",
        "info",
    )


def test_every_event_is_documented_with_its_fields() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "events.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*?)\|[^|]*\|$", page, re.MULTILINE))
    for file in (*root.glob("p2p/**/*.py"), *root.glob("stage/*.py"), *root.glob("agorad/**/*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef) or "Event" not in map(ast.unparse, node.bases):
                continue
            name = re.sub(r"(?<!^)(?=[A-Z])", "_", node.name).lower()
            fields = {
                ast.unparse(line.target).rstrip("_") for line in node.body if isinstance(line, ast.AnnAssign)
            }
            assert name in rows, f"{name} ({file}) is not in docs/events.md"
            assert set(re.findall(r"`(\w+)`", rows[name])) == fields, f"fields of {name} in docs/events.md"
