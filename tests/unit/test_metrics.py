"""Figures: counted from events, labels bounded, served beside the loop; no event without log or series."""

from __future__ import annotations

import ast
import http.client
import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agorad.config import from_table
from agorad.log import level
from agorad.metrics import machine, page
from agorad.metrics.address import read_address
from agorad.metrics.book import MOST_VALUES, Book, Follow
from agorad.metrics.page import CLIENTS, Page
from p2p.errors import LocalError

ROOT = Path(__file__).parents[2]
SAMPLE: dict[str, Any] = {
    "seconds": 1.5, "samples": 3, "loss": 2.5, "step": 7, "bytes": 100, "at": 12.0, "round": 1,
    "fraction": 0.5, "members": ["a", "b"], "disagreement": 0.1, "dialed": True, "why": "full",
    "code": "full", "outcome": "granted", "expires": 9.0, "new": 1, "known": 2, "refused": 3, "waiting": 4,
    "count": 5, "kind": "disk", "line": 90,
}  # fmt: skip
"""A value for every field that a series is made from."""


def values(book: Book) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(generate_latest(book.registry).decode()):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def event_types() -> Iterator[str]:
    """Wire names of all events that the code defines."""
    for file in (*ROOT.glob("p2p/**/*.py"), *ROOT.glob("stage/*.py"), *ROOT.glob("agorad/**/*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and "Event" in map(ast.unparse, node.bases):
                yield re.sub(r"(?<!^)(?=[A-Z])", "_", node.name).lower()


def test_every_event_is_in_the_log_or_in_a_series_of_its_own() -> None:
    names = sorted(event_types())
    assert len(names) > 40
    told_nowhere = {"traffic"}  # a repetition of totals, which are agora_sent_bytes_total
    for name in names:
        book = Book()
        before = values(book)
        book.observe({**SAMPLE, "event": name})
        moved = {key for key, value in values(book).items() if before.get(key, 0.0) != value}
        assert f"agora_events_total{{{name}}}" in moved
        own = {key for key in moved if not key.startswith("agora_events_total")}
        assert bool(own) == book.counts(name), name
        assert own or level(name) != "debug" or name in told_nowhere, f"{name} is neither logged nor counted"


def test_figures_of_a_round_and_a_snapshot() -> None:
    book = Book()
    book.observe({"event": "roster_committed", "round": 4, "at": 100.0})
    finished = {
        "event": "round_finished",
        "round": 4,
        "at": 103.0,
        "members": ["a", "b"],
        "disagreement": 0.25,
    }
    book.observe({**finished, "fraction": 1.0})
    book.observe({**finished, "fraction": 0.5})
    book.observe({"event": "saved", "at": 110.0, "bytes": 300, "step": 20})
    now = values(book)
    assert (now["agora_rounds_total{complete}"], now["agora_rounds_total{partial}"]) == (1, 1)
    assert now["agora_round_exchange_seconds_sum"] == 3.0
    assert now["agora_round_members"] == 2
    assert (now["agora_snapshot_timestamp_seconds"], now["agora_snapshot_bytes"]) == (110.0, 300)
    assert "agora_evaluation_loss" not in now  # nobody has looked yet


def test_labels_that_peers_choose_are_bounded() -> None:
    book = Book()
    for number in range(10 * MOST_VALUES):
        book.observe({"event": "peer_refused", "why": f"code{number}"})
        book.observe({"event": f"event{number}"})
    refusals = [key for key in values(book) if key.startswith("agora_refusals_total")]
    assert len(refusals) == MOST_VALUES + 1
    assert values(book)["agora_refusals_total{other}"] == 9 * MOST_VALUES


def test_names_follow_the_conventions() -> None:
    book = Book()
    for name in event_types():
        book.observe({**SAMPLE, "event": name})
    text = generate_latest(book.registry).decode()
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("agora_")
        assert family.documentation.endswith(".")
        if family.type == "counter":
            assert f"{family.name}_total" in text
    assert "_created" not in text


def test_a_total_is_followed_and_may_begin_anew() -> None:
    book = Book()
    follow = Follow(book.network)
    for total in (10.0, 25.0, 25.0, 5.0, 7.0):
        follow.to(total, "out")
    assert values(book)["agora_network_bytes_total{out}"] == 27.0  # the fall counts for nothing


def test_memory_is_that_of_the_group_where_it_is_less(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:  4000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\n")
    assert machine.memory(info, tmp_path) == (4000 << 10, 3000 << 10)
    (tmp_path / "memory.max").write_text(f"{1000 << 10}\n")
    (tmp_path / "memory.current").write_text(f"{900 << 10}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {50 << 10}\n")
    assert machine.memory(info, tmp_path) == (1000 << 10, 150 << 10)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(info, tmp_path) == (4000 << 10, 3000 << 10)
    assert machine.memory(tmp_path / "none", tmp_path) == (0, 0)


def test_the_machine_is_looked_at(tmp_path: Path) -> None:
    now = machine.look(tmp_path)
    assert 0 < now.resident < now.memory_total
    assert 0 < now.memory_available <= now.memory_total
    assert 2 < now.descriptors < now.descriptors_most
    assert 0 < now.disk_free < now.disk_total
    assert machine.look(tmp_path / "none").disk_total == 0


# The page


@pytest.fixture
def served() -> Iterator[Page]:
    book = Book()
    book.observe({"event": "stopping", "why": "test"})
    serving = Page(book.registry, "127.0.0.1", 0)
    yield serving
    serving.close()


def status(page: Page, path: str, method: str = "GET", **headers: str) -> int:
    port = int(page.url.rpartition(":")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_page_is_what_prometheus_reads(served: Page) -> None:
    with urllib.request.urlopen(served.url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = answer.read().decode()
    assert 'agora_events_total{event="stopping"} 1.0' in text
    assert list(text_string_to_metric_families(text))


def test_the_page_is_read_only_and_for_this_machine(served: Page) -> None:
    assert status(served, "/") == 200
    assert status(served, "/metrics", "HEAD") == 200
    assert status(served, "/../etc/passwd") == 404
    assert status(served, "/metrics", "POST") == 405
    assert status(served, "/metrics", Host="evil.example:80") == 403
    assert status(served, "/metrics", Host="LOCALHOST:1") == 200
    assert status(served, "/metrics", Host="[::1]:1") == 200


def test_silent_clients_have_their_time_and_their_places(
    served: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page._Handler, "timeout", 0.2)
    port = int(served.url.rpartition(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        assert silent.recv(1) == b""
    places = served._server._places
    for _ in range(CLIENTS):
        assert places.acquire(timeout=30)
    assert status(served, "/metrics") == 503
    for _ in range(CLIENTS):
        places.release()
    assert status(served, "/metrics") == 200


def test_an_address_in_use_is_said(served: Page) -> None:
    port = int(served.url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(LocalError, match=r"metrics are not served.*in use; set metrics\.listen"):
        Page(Book().registry, "127.0.0.1", port)


def test_closing_gives_the_address_back() -> None:
    first = Page(Book().registry, "127.0.0.1", 0)
    port = int(first.url.rpartition(":")[2].partition("/")[0])
    first.close()
    second = Page(Book().registry, "127.0.0.1", port)
    second.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(second.url, timeout=5)


def test_addresses() -> None:
    assert read_address("127.0.0.1:49190") == ("127.0.0.1", 49190)
    assert read_address("localhost:0") == ("127.0.0.1", 0)
    assert read_address("[::1]:80") == ("::1", 80)
    for bad in (
        "49190",
        "::1:80",
        "example.org:80",
        "127.0.0.1:",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "[1.2.3.4]:5",
    ):
        with pytest.raises(LocalError, match=r"metrics\.listen = .* like 127\.0\.0\.1:49190"):
            read_address(bad)
    table = {"node": {"role": "seed", "run": "r", "state": "s"}, "metrics": {"listen": "everywhere"}}
    with pytest.raises(LocalError, match=r"metrics\.listen = 'everywhere'"):
        from_table(table, Path("/"))


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here: apt-get install prometheus"
)
def test_promtool_has_nothing_to_say_against_the_series() -> None:
    book = Book()
    for name in event_types():
        book.observe({**SAMPLE, "event": name})
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=generate_latest(book.registry),
        capture_output=True,
        timeout=60,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_series_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(agora_\w+)` \| (\w+) \|", text, re.MULTILINE))
    source = (ROOT / "agorad" / "metrics" / "book.py").read_text()
    defined = re.findall(r'self\.(counter|gauges?|histogram)\(\s*"(\w+)"', source)
    kinds = {f"agora_{name}" + "_total" * (kind == "counter"): kind.rstrip("s") for kind, name in defined}
    assert len(kinds) > 70
    assert rows == kinds
    assert sorted(set(re.findall(r"`(agora_\w+?)[`{]", text)) - set(rows)) == []


# What watches them

MONITORING = ROOT / "deploy" / "monitoring"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus"
)


def expressions() -> list[str]:
    """Every query of the dashboard, its variables filled in."""
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 40
    return [query.replace("$__rate_interval", "5m").replace("$instance", ".+") for query in queries]


def test_rules_and_dashboard_ask_for_series_that_exist() -> None:
    source = (ROOT / "agorad" / "metrics" / "book.py").read_text()
    defined = re.findall(r'self\.(counter|gauges?|histogram)\(\s*"(\w+)"', source)
    known = {f"agora_{name}" + "_total" * (kind == "counter") for kind, name in defined}
    for kind, name in defined:
        if kind == "histogram":
            known |= {f"agora_{name}_{part}" for part in ("bucket", "sum", "count")}
    rules = re.findall(r"expr: (>\n(?:          .*\n)+|.*\n)", (MONITORING / "agora.rules.yml").read_text())
    assert len(rules) > 20
    asked = {name for text in [*rules, *expressions()] for name in re.findall(r"\bagora_\w+", text)}
    assert len(asked) > 50
    assert sorted(asked - known) == []


@needs_promtool
@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "agora.rules.yml"),
        ("test", "rules", "agora.rules.test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
)
def test_promtool_accepts(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *words], cwd=MONITORING, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"q{number}", "expr": query} for number, query in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=none", "rules.yml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
