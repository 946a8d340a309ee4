"""Figures are sent where the settings say, and nowhere else; a gateway that fails costs nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from agorad.config import from_table
from agorad.events import Bus
from agorad.metrics import push
from agorad.metrics.book import Book
from agorad.metrics.push import PushError, read_token, send
from p2p.errors import LocalError

TOKEN = "hunter2-is-the-token"


class Gateway(HTTPServer):
    """Remembers what it was told, answers ``code``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.code = 200
        self.seen: list[tuple[str, str, str | None, bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization"), body))
        self.send_response(self.server.code)
        if self.server.code in (301, 307):
            self.send_header("Location", self.server.url + "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_DELETE = do_PUT  # noqa: N815 (the standard library's way)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def node(url: str) -> Any:
    bus = Bus()
    return SimpleNamespace(
        config=SimpleNamespace(metrics=SimpleNamespace(push=url)),
        identity=SimpleNamespace(peer_id="12D3KooWme"),
        book=Book(),
        bus=bus,
        emit=bus.emit,
        warnings={},
        rng=Random(1),
    )


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (a server in a thread tells nobody)
        await trio.sleep(0.01)


def test_the_page_is_put_and_taken_back(gateway: Gateway) -> None:
    sender = node(gateway.url + "/")

    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(push.run, sender, TOKEN, lambda: None, 0.02)
                await until(lambda: not (len(gateway.seen) < 3))
                nursery.cancel_scope.cancel()

    trio.run(main)
    *puts, last = gateway.seen
    path = "/metrics/job/agorad/instance/12D3KooWme"
    assert {(verb, where, token) for verb, where, token, _body in puts} == {("PUT", path, f"Bearer {TOKEN}")}
    assert b"agora_events_unwritten_total 0.0" in puts[0][3]
    assert (last[0], last[1]) == ("DELETE", path)
    assert sender.warnings == {}


def test_a_gateway_that_fails_is_asked_seldom_and_told_once(gateway: Gateway) -> None:
    gateway.code = 500
    sender = node(gateway.url)

    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(push.run, sender, TOKEN, lambda: None, 0.01)
                await until(lambda: not (len(gateway.seen) < 4))
                failing = sender.warnings["metrics_push"]
                gateway.code = 200
                await until(lambda: not (sender.warnings))
                nursery.cancel_scope.cancel()
                assert failing == "figures are not sent to metrics.push: the gateway answered 500"

    trio.run(main)
    events = sender.bus.since()
    assert [(event["event"], event["failures"]) for event in events] == [("push_failed", 1)]
    assert TOKEN not in str(events)


def test_the_token_goes_to_one_host_only(gateway: Gateway) -> None:
    gateway.code = 307
    with pytest.raises(PushError, match="the gateway answered 307"):
        send(gateway.url + "/x", b"page", TOKEN)
    assert [seen[1] for seen in gateway.seen] == ["/x"]


def test_a_gateway_that_is_not_there() -> None:
    with pytest.raises(PushError, match=r"the gateway could not be reached: .*refused"):
        send("http://127.0.0.1:1/x", b"page", None, 5.0)


def test_tokens_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for text in (b"", b"two\nlines", "ünlesbar".encode(), b"\xff\xfe", b"x" * 5000):
        path.write_bytes(text)
        with pytest.raises(LocalError, match="does not hold one line of ASCII") as error:
            read_token(path)
        assert "two" not in str(error.value)
    path.write_text(TOKEN + "\n")
    assert read_token(path) == TOKEN
    with pytest.raises(LocalError, match=r"cannot read metrics\.push_token_file"):
        read_token(tmp_path / "none")


BAD = (
    "gateway.example",
    "ftp://x",
    "http://",
    "https://user:word@x",
    "http://x:port",
    "file:///etc/passwd",
)


def test_urls() -> None:
    def settings(**metrics: str) -> None:
        from_table({"node": {"role": "seed", "run": "r", "state": "s"}, "metrics": metrics}, Path("/"))

    settings(push="https://gateway.example/x")
    settings(push="http://gateway.example:9091")
    settings(push="http://127.0.0.1:9091", push_token_file="token")
    for bad in BAD:
        with pytest.raises(LocalError, match=r"metrics\.push = .* is not an http or https URL"):
            settings(push=bad)
    with pytest.raises(LocalError, match="a token is sent over https only"):
        settings(push="http://gateway.example", push_token_file="token")
