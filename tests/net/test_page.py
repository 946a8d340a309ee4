"""The run's page over real HTTP: what it says, how it caches, and readers who mean no good."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs
import h11
import pytest
import trio

from agorad import run
from agorad.authority.leaderboard import Row
from agorad.web import server as http
from agorad.web import site as sites
from agorad.web import static
from agorad.web.facts import Door, Earned, Facts, Replica, Trainer, Waiting
from agorad.web.history import Change, History, Moment, Round, read
from agorad.web.limits import Meter
from agorad.web.server import OWN, Server, reader_of
from agorad.web.site import POLICY, Site
from p2p.identity import Identity
from stage.config import ModelConfig, TrainingConfig

DEADLINE_S = 30.0
GET = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
EVIL = '<script>alert("x")</script>'
PEERS = [Identity.generate(bytes([i]) * 32).peer_id for i in range(4)]
MANIFEST = run.Manifest(
    run=run.RunInfo(name=f"r {EVIL}", id="r-1", operator=PEERS[0]),
    model=ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 2)),
    training=TrainingConfig(seed=1, target_batch=4),
)


def some_facts(version: int = 1) -> Facts:
    history = History()
    for number in range(12):
        history.note(Moment(1e9 + 3 * number, number, 4 * number, 5.0 - number / 10, 2))
    history.note_evaluation(5, 4.5)
    history.note_round(Round(0, 3, 0.5, 2, 1e9 + 20))
    history.note_change(Change(1e9, "joined", PEERS[1], EVIL, 0))
    replica = Replica(
        peer=PEERS[1], account=EVIL, stage=0, phase="active", step=11, slots=6, working=2, rate=1.5,
        disagreement=0.01, snapshot_step=10, round=(3, 0.5, 2, 1e9 + 20),
    )  # fmt: skip
    return Facts(
        version=version, at=1e9 + 40, manifest=MANIFEST, step=11, samples=44, loss=3.9,
        samples_per_second=1.5,
        replicas=(replica,),
        trainers=(Trainer(peer=PEERS[0], samples=44, at=1e9 + 39, loss=3.9),),
        door=Door(free=0, paused=False, waiting=1, eta_s=None),
        queue=(
            Waiting(
                peer=PEERS[2], account="bob", position=1, stage=1, present=True, downloaded=False, eta_s=90.0
            ),
        ),
        rows=(
            Row(
                rank=1, user=EVIL, active_h=2.5, joined=1e9, compute=1.0, presence=2.5, score=3.5,
                status="active",
            ),
        ),
        earned={
            PEERS[1]: Earned(
                account=EVIL, compute=1.0, presence=2.5, active_h=2.5, joined=1e9, seen=1e9 + 40
            )
        },
        history=history,
    )  # fmt: skip


class FakeWatch:
    """Facts that the test changes."""

    def __init__(self) -> None:
        self.facts = some_facts()
        self._news = trio.Event()

    def wanted(self) -> None: ...

    async def news(self) -> None:
        await self._news.wait()

    def publish(self, facts: Facts) -> None:
        self.facts = attrs.evolve(facts, version=self.facts.version + 1)
        news, self._news = self._news, trio.Event()
        news.set()


@attrs.define
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


@attrs.define
class Served:
    watch: FakeWatch
    port: int

    async def get(self, path: str, method: str = "GET", **headers: str) -> Answered:
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            wire = h11.Connection(h11.CLIENT)
            head = h11.Request(
                method=method,
                target=path,
                headers=[("host", "page.example:49180"), ("connection", "close"), *named],
            )
            await stream.send_all((wire.send(head) or b"") + (wire.send(h11.EndOfMessage()) or b""))
            status, found, body = 0, {}, b""
            while True:
                event = wire.next_event()
                if event is h11.NEED_DATA:
                    wire.receive_data(await stream.receive_some(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    found = {name.decode(): value.decode() for name, value in event.headers}
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    return Answered(status, found, body)

    async def raw(self, data: bytes, *, end: bool = False) -> bytes:
        """What comes back until the server closes."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(data)
                if end:
                    await stream.send_eof()
            found = b""
            with contextlib.suppress(trio.BrokenResourceError):
                while piece := await stream.receive_some(65536):
                    found += piece
            return found


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    watch = FakeWatch()
    failures: list[Exception] = []
    server = Server(Site(watch).answer, failures.append)  # type: ignore[arg-type]
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        yield Served(watch, listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()
    assert failures == []


def within(main: Callable[..., Any]) -> Any:
    async def limited() -> None:
        with trio.fail_after(DEADLINE_S):
            async with serving() as served:
                await main(served)

    return lambda: trio.run(limited)


def test_every_page_and_document() -> None:
    @within
    async def main(served: Served) -> None:
        for path in ("/", "/leaderboard", "/join", "/api/v1/", f"/node/{PEERS[1]}", f"/node/{PEERS[2]}"):
            page = await served.get(path)
            assert page.status == 200, path
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert page.headers["content-security-policy"] == POLICY
            assert "<script>" not in page.text
            assert "&lt;script&gt;" in page.text
            assert page.text.count("<h1>") == 1
            assert " style=" not in page.text
            assert "<style" not in page.text
            assert "http://www.pygal" not in page.text
        swarm = (await served.get("/api/v1/swarm")).json
        assert swarm["step"] == 11
        assert swarm["tokens_per_second"] == 48.0
        assert swarm["stages"][0]["replicas"][0]["load"] == 0.25
        assert swarm["stages"][1] == {"stage": 1, "layers": 2, "replicas": []}
        assert swarm["evaluation"] == {"step": 5, "loss": 4.5}
        past = (await served.get("/api/v1/history")).json
        assert len(past["curve"]) == 12
        assert past["rounds"] == [{"stage": 0, "number": 3, "fraction": 0.5, "members": 2, "at": 1e9 + 20}]
        assert past["changes"][0]["peer_id"] == PEERS[1]
        board = (await served.get("/api/v1/leaderboard")).json
        assert board["rows"][0]["user"] == EVIL
        waiting = (await served.get(f"/api/v1/nodes/{PEERS[2]}")).json
        assert waiting["queue"] == {"position": 1, "eta_s": 90.0, "present": True, "downloaded": False}
        joining = (await served.get("/api/v1/join")).json
        assert joining["door"] == {"free": 0, "paused": False, "waiting": 1, "eta_s": None}
        everything = "".join(
            [
                (await served.get(path)).text
                for path in ("/", "/api/v1/swarm", "/api/v1/history", "/api/v1/join")
            ]
        )
        assert "/ip4/" not in everything

    main()


def test_join_names_the_address_that_the_reader_used_and_no_nonsense() -> None:
    @within
    async def main(served: Served) -> None:
        assert "agoractl join http://page.example:49180/run.toml" in (await served.get("/join")).text
        answer = await served.raw(b"GET /join HTTP/1.1\r\nhost: evil;rm -rf /\r\nconnection: close\r\n\r\n")
        assert b"http://localhost/run.toml" in answer
        manifest = await served.get("/run.toml")
        assert manifest.headers["content-type"] == "application/toml; charset=utf-8"
        assert b'id = "r-1"' in manifest.body

    main()


def test_caching_and_compression() -> None:
    @within
    async def main(served: Served) -> None:
        first = await served.get("/")
        assert "max-age=2" in first.headers["cache-control"]
        again = await served.get("/", if_none_match=first.headers["etag"])
        assert (again.status, again.body) == (304, b"")
        packed = await served.get("/", accept_encoding="br, gzip;q=0.5")
        assert packed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(packed.body) == first.body
        assert len(packed.body) < len(first.body) / 2
        assert "content-encoding" not in (await served.get("/", accept_encoding="gzip;q=0")).headers
        head = await served.get("/", "HEAD")
        assert (head.body, head.headers["content-length"]) == (b"", str(len(first.body)))
        served.watch.publish(attrs.evolve(some_facts(), step=12))
        fresh = await served.get("/", if_none_match=first.headers["etag"])
        assert fresh.status == 200
        assert "<b>12</b>" in fresh.text
        for name in static.NAMES:
            asset = await served.get(static.path(name))
            assert asset.body == static.content(name)
            assert "immutable" in asset.headers["cache-control"]

    main()


def test_what_is_not_there() -> None:
    @within
    async def main(served: Served) -> None:
        for path in (
            "/nothing",
            "/static/../pages.py",
            "/static/page.css",
            f"/node/{PEERS[3]}",
            "/node/",
            "//x",
        ):
            answer = await served.get(path)
            assert answer.status == 404, path
            assert "<h1>" in answer.text
        missing = await served.get("/api/v1/nodes/..%2f..")
        assert (missing.status, missing.headers["content-type"]) == (404, "application/json")
        assert (await served.get("/", "DELETE")).status == 405
        found = await served.get(f"/node?peer={PEERS[1]}")
        assert (found.status, found.headers["location"]) == (303, f"/node/{PEERS[1]}")
        evil = await served.get("/node?peer=//evil.example/%0d%0aset-cookie:x")
        assert evil.headers["location"] == "/node/"

    main()


def test_a_reader_has_its_rate_and_a_proxy_speaks_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "Meter", lambda: Meter(rate=0.001, burst=3))

    @within
    async def main(served: Served) -> None:
        async def ask(reader: str) -> Answered:
            return await served.get("/api/v1/join", x_forwarded_for=reader)

        assert [(await ask("198.51.100.7")).status for _ in range(5)] == [200, 200, 200, 429, 429]
        refused = await ask("198.51.100.7")
        assert float(refused.headers["retry-after"]) > 0
        assert (await ask("198.51.100.7, 203.0.113.5")).status == 200
        assert (await ask("203.0.113.9, 198.51.100.7")).status == 429
        assert {(await served.get("/api/v1/join")).status for _ in range(9)} == {200}

    main()


def test_addresses_that_count_as_one_reader() -> None:
    assert reader_of("127.0.0.8") == reader_of("::1") == reader_of("::ffff:127.0.0.1") == OWN
    assert reader_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert reader_of("2001:db8::1") == reader_of("2001:db8::ffff:2") == "2001:db8::/64"
    assert reader_of("no address") == ""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 20_000, b"431"),
        (b"GET /" + b"a" * 20_000, b"431"),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc", b"413"),
        (b"GET http://evil/ HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n", b"4"),
        (b"\x16\x03\x01\x02\x00" + bytes(600), b"400"),
    ],
)
def test_hostile_heads_are_refused(data: bytes, status: bytes) -> None:
    @within
    async def main(served: Served) -> None:
        answer = await served.raw(data)
        assert answer.startswith(b"HTTP/1.1 " + status), answer[:80]
        assert (await served.get("/")).status == 200

    main()


def test_slow_and_many_readers_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.5)
    monkeypatch.setattr(http, "IDLE_S", 0.5)
    monkeypatch.setattr(http, "CONNECTIONS", 8)

    @within
    async def main(served: Served) -> None:
        began = time.monotonic()
        assert await served.raw(b"GET / HTTP/1.1\r\nhost: a\r\nx") == b""  # never finished
        assert time.monotonic() - began < 15
        streams = [await trio.open_tcp_stream("127.0.0.1", served.port) for _ in range(8)]
        await trio.sleep(0.1)
        assert (await served.raw(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
        while (await served.raw(GET))[9:12] != b"200":  # noqa: ASYNC110
            await trio.sleep(0.1)  # the silent ones lose their places
        for stream in streams:
            await stream.aclose()

    main()


def test_news_is_told_and_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "LISTENERS", 2)
    monkeypatch.setattr(sites, "BEAT_S", 0.3)

    @within
    async def main(served: Served) -> None:
        async def listen() -> trio.SocketStream:
            stream = await trio.open_tcp_stream("127.0.0.1", served.port)
            await stream.send_all(b"GET /api/v1/live HTTP/1.1\r\nhost: a\r\n\r\n")
            return stream

        async def until(stream: trio.SocketStream, wanted: bytes) -> bytes:
            found = b""
            while wanted not in found:
                piece = await stream.receive_some(4096)
                assert piece, found
                found += piece
            return found

        first, second = await listen(), await listen()
        assert b"text/event-stream" in await until(first, b"retry: 5000")
        await until(second, b": still here")
        assert (await served.get("/api/v1/live")).status == 503
        facts = some_facts()
        facts.history.note_change(Change(facts.at + 1, "left", PEERS[1], "alice", 0))
        served.watch.publish(attrs.evolve(facts, at=facts.at + 2))
        await until(first, b"left stage 0")
        await first.aclose()
        await second.aclose()
        with trio.fail_after(10):
            listening = b"HEAD /api/v1/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
            while (await served.raw(listening))[9:12] == b"503":  # noqa: ASYNC110
                await trio.sleep(0.1)

    main()


def test_history_is_bounded_covers_everything_and_survives() -> None:
    history = History()
    for number in range(20_000):
        history.note(Moment(1e9 + 2.0 * number, number, 4 * number, 3.0, 6))
        history.note_round(Round(number % 3, number // 3, 1.0, 2, 1e9 + 2.0 * number))
        history.note_change(Change(1e9 + number, "joined", "p", "a", 0))
        history.note_evaluation(number, 2.0)
    assert len(history.moments) <= 400
    assert len(history.evaluations) <= 200
    assert history.moments[0].at == 1e9
    assert history.moments[-1].at > 1e9 + 2.0 * 19_000
    assert history.samples_per_second() == pytest.approx(2.0)
    kept = json.loads(json.dumps(history.to_document("r-1")))
    again = read(kept, "r-1")
    assert again.moments == history.moments
    assert list(again.rounds) == list(history.rounds)
    assert again.to_document("r-1") == history.to_document("r-1")
    assert read(kept, "another").moments == []
    for damage in (None, [], {}, {**kept, "moments": [[1], None, ["x"] * 5]}, {**kept, "gap_s": -1.0}):
        assert read(damage, "r-1").moments == []


def test_a_clock_that_was_set_back_and_a_restarted_count_do_no_harm() -> None:
    history = History()
    for at, samples in ((100.0, 10), (50.0, 12), (60.0, 5), (70.0, 25)):
        history.note(Moment(at, 0, samples, None, 1))
    assert history.samples_per_second() == pytest.approx(2.0)


def test_a_page_that_is_broken_ends_nobody() -> None:
    async def main() -> None:
        heard: list[Exception] = []

        async def broken(_request: http.Request) -> http.Response:
            raise RuntimeError("a bug")

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        with trio.fail_after(DEADLINE_S):
            async with listener, trio.open_nursery() as nursery:
                nursery.start_soon(Server(broken, heard.append).serve, listener)
                served = Served(FakeWatch(), listener.socket.getsockname()[1])
                assert [(await served.get("/")).status for _ in range(2)] == [500, 500]
                nursery.cancel_scope.cancel()
        assert [str(error) for error in heard] == ["a bug", "a bug"]

    trio.run(main)
