"""Hugging Face accounts against a real HTTP endpoint that answers as the hub does, or does not."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio

from agorad.authority import hub as hub_module
from agorad.authority.hub import Hub
from agorad.exitcodes import DaemonExit, ExitCode, verdict
from agorad.joining import obtain_certificate
from agorad.living import run_node
from agorad.node import Node
from agorad.roles import authority
from p2p.errors import Refused
from tests.net.test_authority import Place, idle, living, until_event, within
from tests.sentences import complete

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
HANGS_S = 20.0


class FakeHub(BaseHTTPRequestHandler):
    """``/api/whoami-v2``: whose a token is; some tokens bring trouble."""

    seen: list[str]
    gone: threading.Event

    def do_GET(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.seen.append(token)
        if self.path != "/api/whoami-v2":
            self._answer(404, b"{}")
        elif token.startswith("hf_status_"):
            self._answer(int(token.removeprefix("hf_status_")), b'{"error": "said no"}')
        elif token == "hf_hangs":
            self.gone.wait(HANGS_S)
        elif token == "hf_garbage":
            self._answer(200, b"<html>")
        elif token == "hf_list":
            self._answer(200, b"[1, 2]")
        elif token == "hf_odd_name":
            self._answer(200, b'{"name": "a/../b"}')
        elif token in TOKENS:
            self._answer(200, json.dumps({"type": "user", "name": TOKENS[token]}).encode())
        else:
            self._answer(401, b'{"error": "Invalid credentials in Authorization header"}')

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(hub_module, "ANSWER_S", 1.5)
    FakeHub.seen, FakeHub.gone = [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    FakeHub.gone.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_token_is_whose_the_hub_says(endpoint: str) -> None:
    async def main() -> None:
        hub = Hub(endpoint)
        assert await hub.whoami("hf_alice") == "alice"
        assert await hub.whoami("hf_bob") == "bob"
        assert FakeHub.seen == ["hf_alice", "hf_bob"]

    within(main)


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("hf_nobody", "bad_token"),
        ("hf_status_403", "bad_token"),
        ("hf_status_429", "hub_unavailable"),
        ("hf_status_500", "hub_unavailable"),
        ("hf_status_503", "hub_unavailable"),
        ("hf_hangs", "hub_unavailable"),
        ("hf_garbage", "hub_unavailable"),
        ("hf_list", "hub_unavailable"),
        ("hf_odd_name", "hub_unavailable"),
        ("", "bad_token"),
        ("hf with blanks", "bad_token"),
        ("hf\r\nX-Evil: 1", "bad_token"),
        ("hf_ünicode", "bad_token"),
    ],
)
def test_trouble_is_typed_and_keeps_no_token(
    endpoint: str, token: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        began = time.monotonic()
        with pytest.raises(Refused) as no:
            await Hub(endpoint).whoami(token)
        assert time.monotonic() - began < 10
        assert no.value.code == code
        assert (no.value.retry_after is not None) == (code == "hub_unavailable")
        assert no.value.__cause__ is None
        assert no.value.__context__ is None
        if token:
            told = "".join(traceback.format_exception(no.value)) + caplog.text
            assert token not in told.replace("test_hub.py", "")

    within(main)


def test_a_hub_that_is_not_there_is_unavailable() -> None:
    async def main() -> None:
        with pytest.raises(Refused) as no:
            await Hub("http://127.0.0.1:1").whoami("hf_alice")
        assert no.value.code == "hub_unavailable"

    within(main)


def test_a_hanging_hub_takes_a_few_threads_and_no_more(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "ANSWER_S", 0.3)

    async def main() -> None:
        hub = Hub(endpoint)
        before = threading.active_count()
        outcomes: list[str] = []

        async def ask() -> None:
            with pytest.raises(Refused) as no:
                await hub.whoami("hf_hangs")
            outcomes.append(no.value.code)

        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(ask)
        assert outcomes == ["hub_unavailable"] * 60
        # A thread of ours and one of the endpoint for each question that hangs.
        assert threading.active_count() - before <= 2 * hub_module.THREADS + 4
        FakeHub.gone.set()

    within(main)


class HubPlace(Place):
    """A run whose accounts are the hub's."""

    def __init__(self, folder: Path, endpoint: str, **admission: Any) -> None:
        super().__init__(folder, accounts="huggingface", **admission)
        self.endpoint = endpoint
        for name in (*TOKENS, "hf_wrong"):
            (folder / name).write_text(name)

    def authority_settings(self) -> Any:
        return self.settings("authority", "authority", authority={"hub_endpoint": self.endpoint})

    def joiner(self, name: str, token: str | None, **worker: Any) -> Any:
        if token is not None:
            worker["secret_file"] = token
        return self.settings(name, "worker", worker=worker)


@pytest.mark.catalogue(16, 17)
def test_a_token_lets_in_once_and_the_key_from_then_on(
    endpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = HubPlace(tmp_path, endpoint)

    async def refused(settings: Any, code: str) -> None:
        async with living(settings, idle) as node:
            with pytest.raises(DaemonExit, match=rf"\({code}\)") as end:
                await obtain_certificate(node)
            assert end.value.code == ExitCode.REFUSED
            complete(end.value.why)

    async def granted(settings: Any) -> str:
        async with living(settings, idle) as node:
            certificate = await obtain_certificate(node)
            assert certificate is not None
            return certificate.account

    async def main() -> None:
        async with living(place.authority_settings(), authority.run):
            await refused(place.joiner("w", None), "secret_needed")
            await refused(place.joiner("w", "hf_wrong"), "bad_token")
            assert await granted(place.joiner("w", "hf_alice")) == "alice"
            asked = len(FakeHub.seen)
            # Without its certificate, and without the token: the key is known.
            (tmp_path / "w" / "certificate").unlink()
            assert await granted(place.joiner("w", None)) == "alice"
            assert len(FakeHub.seen) == asked
            # Somebody else's token with this key, and a token that is not its user's.
            (tmp_path / "w" / "certificate").unlink()
            await refused(place.joiner("w", "hf_bob"), "identity_bound")
            await refused(place.joiner("v", "hf_bob", account="alice"), "bad_token")
            assert await granted(place.joiner("v", "hf_bob", account="bob")) == "bob"

    within(main)
    _nowhere(tmp_path, "hf_alice", "hf_bob", "hf_wrong")
    said = "".join(capfd.readouterr())  # both sides' logs
    assert "certificate_granted" in said
    assert not [token for token in ("hf_alice", "hf_bob", "hf_wrong") if token in said]


def test_an_account_has_as_many_nodes_as_it_may(endpoint: str, tmp_path: Path) -> None:
    place = HubPlace(tmp_path, endpoint, max_nodes_per_account=1)

    async def main() -> None:
        async with (
            living(place.authority_settings(), authority.run),
            living(place.joiner("a", "hf_alice"), idle) as first,
            living(place.joiner("b", "hf_alice"), idle) as second,
        ):
            assert await obtain_certificate(first) is not None
            with pytest.raises(DaemonExit, match="account 'alice' has 1 nodes, and 1 are allowed"):
                await obtain_certificate(second)

    within(main)


def test_joining_outlasts_a_hub_in_trouble(endpoint: str, tmp_path: Path, monkeypatch: Any) -> None:
    place = HubPlace(tmp_path, endpoint)
    (tmp_path / "busy").write_text("hf_status_503")
    monkeypatch.setattr(hub_module, "RETRY_S", 0.2)
    found: list[Node] = []

    async def main() -> None:
        async with (
            living(place.authority_settings(), authority.run) as desk,
            living(place.joiner("w", "busy"), idle) as node,
            trio.open_nursery() as nursery,
        ):
            found.append(node)
            await until_event(desk, "ready")
            nursery.start_soon(obtain_certificate, node)
            while node.bus.counts["join_delayed"] < 2:  # noqa: ASYNC110
                await trio.sleep(0.05)
            delays = [e["why"] for e in node.bus.since() if e["event"] == "join_delayed"]
            assert all("could not be asked: 503" in why for why in delays)
            node.stop("seen enough")

    within(main)


def test_a_bug_on_either_side_tells_no_token(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever fails with the token at hand, tracebacks, events and logs have it not."""
    place = HubPlace(tmp_path, endpoint)

    async def broken(_hub: Hub, token: str) -> str:
        return {}[len(token)]  # type: ignore[no-any-return]

    async def breaks(node: Node) -> None:
        with trio.move_on_after(1.0):
            await obtain_certificate(node)
        {}[node.config.name]

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as desk:
            with pytest.raises(BaseException) as end:
                await run_node(place.joiner("w", None), breaks, started_at=time.time(), secret="hf_alice")
            assert desk.bus.counts["handler_failed"] > 0
            code, _why = verdict(end.value)
            assert code == ExitCode.BUG
            traceback.print_exception(end.value)  # as the daemon does

    monkeypatch.setattr(Hub, "whoami", broken)
    within(main)
    said = "".join(capfd.readouterr())
    assert "KeyError" in said
    assert "handler_failed" in said
    assert "hf_alice" not in said.replace('secret="hf_alice"', "")  # our own line, above
    _nowhere(tmp_path, "hf_alice")


def _nowhere(folder: Path, *tokens: str) -> None:
    """No file but the users' own, and no living text, has a token in it."""
    own = {folder / token for token in tokens}
    for path in folder.rglob("*"):
        if path.is_file() and path not in own:
            content = path.read_bytes()
            assert not [token for token in tokens if token.encode() in content], path
