"""Looking at peers over real sockets: what a prober finds, refuses, and must not be used for."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from agorad import config, probing, run
from agorad.node import Node, run_node
from agorad.run import Manifest, NodeRef, RunInfo
from p2p import hello, probe, reach, selfreport
from p2p.errors import DialError, PeerGone, Refused, RemoteError
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from p2p.membership import Membership, Trust
from p2p.multiaddr import Multiaddr
from p2p.probe import Probed, Prober
from p2p.records import StageRecord
from p2p.rpc import Call
from p2p.selfreport import Budget, Meter, SelfReport
from stage.config import ModelConfig, TrainingConfig

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
SESSION = bytes(range(16))
MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1))


def within(main: Callable[[], Awaitable[None]], seconds: float = 40.0) -> None:
    async def limited() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(limited)


def everybody(_peer: PeerId) -> bool:
    return True


def nobody(_peer: PeerId) -> bool:
    return False


@asynccontextmanager
async def prober_and_node(
    may_ask: Callable[[PeerId], bool] = everybody, limits: Limits = Limits()
) -> AsyncIterator[tuple[Prober, Host, Host]]:
    """A prober with its host, and a node that answers ``/agora/self/1``."""
    one, two = Host(Identity.generate()), Host(Identity.generate(), limits=limits)
    report = SelfReport(SESSION, may_ask)
    two.handle(selfreport.PROTOCOL, report.serve, open_to_all=True, aside=True)
    async with one.run([LOCAL]), two.run([LOCAL]):
        yield Prober(one, everybody), one, two


async def exchange(call: Call, *messages: tuple[object, bytes]) -> dict[str, object]:
    """Send all, hear one."""
    async with call:
        for header, payload in messages:
            await call.send(header, payload)  # type: ignore[arg-type]
        return (await call.receive()).header


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 (the host tells nobody)
        await trio.sleep(0.01)


def texts(host: Host) -> list[str]:
    return [str(addr) for addr in host.addrs]


@contextmanager
def listening(backlog: int = 8) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(backlog)
        yield server, f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"


# what is found


def test_a_reachable_peer_is_found_asked_and_measured_both_ways() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, _one, two):
            seen = await prober.probe(two.peer_id, texts(two), size=1_000_000)
            assert (seen.reached, seen.why, seen.session) == (True, "", SESSION)
            assert seen.addr == str(two.addrs[0].bare())
            assert seen.rtt_ms is not None
            assert 0 < seen.rtt_ms < 1000
            assert seen.up_mbps is not None
            assert seen.up_mbps > 10
            assert seen.down_mbps is not None
            assert seen.down_mbps > 10
            assert two.counters.protocols[selfreport.PROTOCOL] == (1_000_000, 1_000_000)

    within(main)


def test_looking_leaves_the_connection_that_calls_use_alone() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, one, two):
            for first, second in ((one, two), (two, one)):
                kept = await first.connect(second.peer_id, addrs=second.addrs, deadline=5)
                other = second.connections[first.peer_id]
                await prober.probe(two.peer_id, texts(two))
                assert first.connections[second.peer_id] is kept
                assert second.connections[first.peer_id] is other
                assert kept.usable
                assert other.usable
                kept.close("next")
                await kept.closed.wait()
                await other.closed.wait()
            await prober.probe(two.peer_id, texts(two))
            assert one.connections == two.connections == {}
            await until(lambda: not one._all and not two._all)  # what was made for looking is closed

    within(main)


def test_a_connection_aside_serves_nothing_else() -> None:
    async def main() -> None:
        async with prober_and_node() as (_prober, one, two):

            async def never(_call: Call) -> None:
                raise AssertionError

            for host in (one, two):
                host.handle("/agora/other/1", never, open_to_all=True)
            async with one.aside(two.peer_id, two.addrs, deadline=5) as connection:
                for protocol in ("/agora/other/1", hello.PROTOCOL):
                    with pytest.raises(RemoteError):
                        await exchange(one.call_on(connection, protocol), ({}, b""))
                back = next(iter(two._all))
                with pytest.raises(RemoteError):  # nor does the side that dialled
                    await exchange(two.call_on(back, "/agora/other/1"), ({}, b""))

    within(main)


def test_connections_aside_are_few_short_and_for_listed_nodes() -> None:
    limits = Limits(asides=1, aside_s=0.5)

    async def main() -> None:
        async with prober_and_node(limits=limits) as (prober, one, two):
            async with one.aside(two.peer_id, two.addrs, deadline=5) as connection:
                assert (await prober.probe(two.peer_id, texts(two))).session is None  # one too many
                await connection.closed.wait()
            assert (await prober.probe(two.peer_id, texts(two))).session == SESSION
            authority = Identity.generate().peer_id
            trust = Trust(
                run="r", manifest_hash=bytes(32), authorities=frozenset(), standing={authority: "authority"}
            )
            two.membership = Membership(trust, lambda: None, time.time)
            assert (await prober.probe(two.peer_id, texts(two))).session is None

    within(main)


# who cannot be reached


def test_a_closed_port_is_told_with_its_address() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, _one, two):
            with listening() as (_server, addr):
                pass
            began = trio.current_time()
            seen = await prober.probe(two.peer_id, [addr])
            assert not seen.reached
            assert addr in seen.why
            assert "refused" in seen.why
            assert trio.current_time() - began < 3
            assert seen.session is seen.rtt_ms is None
            both = await prober.probe(two.peer_id, [addr, *texts(two)])
            assert both.reached  # one open address suffices

    within(main)


def test_another_key_at_the_address_is_not_the_peer() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, _one, two):
            liar = Identity.generate().peer_id
            seen = await prober.probe(liar, [str(two.addrs[0].bare())])
            assert not seen.reached
            assert f"{liar} was dialled but {two.peer_id} answered" in seen.why
            # An address that names the other peer is not even dialled.
            seen = await prober.probe(liar, texts(two))
            assert not seen.reached
            assert "another peer's" in seen.why

    within(main)


@pytest.mark.parametrize("drip", [False, True])
def test_a_listener_that_says_nothing_or_very_little_costs_some_seconds(
    drip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "DIAL_S", 0.7)

    async def main() -> None:
        heard = bytearray()

        async def loris(stream: trio.SocketStream) -> None:
            async with trio.open_nursery() as nursery:
                if drip:
                    nursery.start_soon(drop, stream)
                async for data in stream:
                    heard.extend(data)
                nursery.cancel_scope.cancel()

        async def drop(stream: trio.SocketStream) -> None:
            for byte in b"\x13/multistream/1.0.0\n" * 9:
                try:
                    await stream.send_all(bytes([byte]))
                except trio.BrokenResourceError:
                    return
                await trio.sleep(0.05)

        async with prober_and_node() as (prober, _one, two), trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, loris, 0)
            port = listeners[0].socket.getsockname()[1]
            began = trio.current_time()
            seen = await prober.probe(two.peer_id, [f"/ip4/127.0.0.1/tcp/{port}"], size=1_000_000)
            assert not seen.reached
            assert "0.7 s" in seen.why
            assert trio.current_time() - began < 3
            assert len(heard) < 200  # before a proof of the id: greeting and one key, nothing to amplify
            nursery.cancel_scope.cancel()

    within(main)


def test_a_peer_that_proves_its_key_and_then_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TALK_S", 0.5)

    async def main() -> None:
        one, two = Host(Identity.generate()), Host(Identity.generate())

        async def mute(call: Call) -> None:
            await call.receive()
            await trio.sleep_forever()

        two.handle(selfreport.PROTOCOL, mute, open_to_all=True, aside=True)
        async with one.run([LOCAL]), two.run([LOCAL]):
            seen = await Prober(one, everybody).probe(two.peer_id, texts(two), size=100_000)
            assert seen.reached
            assert "did not answer" in seen.why
            assert seen.session is seen.rtt_ms is seen.up_mbps is None

    within(main)


@pytest.mark.parametrize("lie", ["session", "pong", "early", "digest", "empty", "much"])
def test_lies_about_oneself_are_found_out(lie: str) -> None:
    async def main() -> None:
        one, two = Host(Identity.generate()), Host(Identity.generate())

        async def liar(call: Call) -> None:
            while True:
                header = (await call.receive()).header
                if header["t"] == "who":
                    await call.send({"t": "me", "session": SESSION[:3] if lie == "session" else SESSION})
                elif header["t"] == "ping":
                    nonce = bytes(8) if lie == "pong" else header["nonce"]
                    await call.send({"t": "pong", "nonce": nonce})
                elif header["way"] == "in":
                    if lie == "early":  # acknowledged before it can have come
                        await call.send({"t": "got", "digest": bytes(16)})
                    while lie == "digest":
                        await call.receive(max_payload=selfreport.CHUNK)
                        await call.send({"t": "got", "digest": bytes(16)})
                    await selfreport._take(call, header["bytes"])
                    return
                elif lie == "empty":
                    await call.send({"t": "chunk"})
                else:
                    await call.send({"t": "chunk"}, bytes(1_000_000))

        two.handle(selfreport.PROTOCOL, liar, open_to_all=True, aside=True)
        async with one.run([LOCAL]), two.run([LOCAL]):
            seen = await Prober(one, everybody).probe(two.peer_id, texts(two), size=200_000)
            assert seen.reached
            assert seen.why
            assert seen.up_mbps is None
            assert (seen.session is None) == (lie == "session")
            assert (seen.rtt_ms is None) == (lie in ("session", "pong"))
            assert (seen.down_mbps is None) == (lie not in ("empty", "much"))

    within(main)


# limits


def test_a_peer_is_looked_at_once_at_a_time_and_not_measured_all_the_time() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, _one, two):
            async with trio.open_nursery() as nursery:
                with listening() as (_server, silent):
                    nursery.start_soon(prober.probe, two.peer_id, [silent])
                    await trio.sleep(0.05)
                    with pytest.raises(Refused) as refusal:
                        await prober.probe(two.peer_id, texts(two))
                    assert refusal.value.code == "busy"
                    nursery.cancel_scope.cancel()
            prober.budget = Budget(2_500_000, cooldown_s=0.5)
            await prober.probe(two.peer_id, texts(two), size=1_000_000)
            with pytest.raises(Refused) as refusal:
                await prober.probe(two.peer_id, texts(two), size=1_000_000)
            assert refusal.value.code == "busy"
            assert refusal.value.retry_after is not None
            assert 0 <= refusal.value.retry_after <= 0.5
            assert (await prober.probe(two.peer_id, texts(two))).reached  # looking costs nothing
            await trio.sleep(refusal.value.retry_after)
            assert (await prober.probe(two.peer_id, texts(two), size=1_000_000)).up_mbps

    within(main)


def test_a_node_lets_itself_be_measured_so_much_and_no_more() -> None:
    async def main() -> None:
        async with prober_and_node() as (_prober, one, two):

            async def measure(size: object, way: object = "out") -> object:
                async with (
                    one.aside(two.peer_id, two.addrs, deadline=5) as connection,
                    one.call_on(connection, selfreport.PROTOCOL) as call,
                ):
                    await call.send({"t": "measure", "way": way, "bytes": size})
                    got = 0
                    while not got or got != size:
                        got += len((await call.receive(max_payload=selfreport.CHUNK)).payload)
                    return got

            for size in (0.0, -1, selfreport.MOST_BYTES + 1, "many", None, True, 1.5):
                with pytest.raises(PeerGone):
                    await measure(size)
            with pytest.raises(PeerGone):
                await measure(1, way="up")
            for _ in range(2):
                assert await measure(selfreport.MOST_BYTES) == selfreport.MOST_BYTES
            with pytest.raises(Refused) as refusal:
                await measure(1_000_000)
            assert refusal.value.code == "busy"

    within(main)


def test_more_bytes_than_announced_end_the_measurement() -> None:
    async def main() -> None:
        async with (
            prober_and_node() as (_prober, one, two),
            one.aside(two.peer_id, two.addrs, deadline=5) as connection,
        ):
            announced = {"t": "measure", "way": "in", "bytes": 1000}
            for size in (0, 1001):
                call = one.call_on(connection, selfreport.PROTOCOL)
                with pytest.raises(PeerGone):
                    await exchange(call, (announced, b""), ({"t": "chunk"}, bytes(size)))
            async with one.call_on(connection, selfreport.PROTOCOL) as call:
                for _ in range(selfreport.MOST_REQUESTS):
                    await selfreport.ping(call)
                with pytest.raises(PeerGone):
                    await selfreport.ping(call)

    within(main)


def test_only_one_measures_a_node_at_a_time() -> None:
    async def main() -> None:
        async with (
            prober_and_node() as (prober, one, two),
            one.aside(two.peer_id, two.addrs, deadline=5) as connection,
            one.call_on(connection, selfreport.PROTOCOL) as call,
        ):
            await call.send({"t": "measure", "way": "in", "bytes": 1000})
            await call.send({"t": "chunk"}, bytes(500))
            await call.receive()
            seen = await prober.probe(two.peer_id, texts(two), size=1000)
            assert seen.rtt_ms is not None
            assert seen.down_mbps is None
            assert "somebody else measures" in seen.why
            # On a slow line an asker goes on before the node has heard that it gave up.
            async with one.call_on(connection, selfreport.PROTOCOL) as other:
                assert await selfreport.pull(other, 1000, 5.0) > 0
            call.reset()

    within(main)


def test_the_budget_forgets_after_its_cooldown() -> None:
    async def main() -> None:
        budget, peer = Budget(100, cooldown_s=60.0), PeerId("a")
        budget.spend(peer, 60)
        await trio.sleep(30)
        budget.spend(peer, 40)
        with pytest.raises(Refused) as refusal:
            budget.spend(peer, 1)
        assert refusal.value.retry_after == pytest.approx(30)
        budget.spend(PeerId("b"), 100)
        await trio.sleep(30)
        budget.spend(peer, 100)
        for number in range(5000):
            budget.spend(PeerId(str(number)), 1)
        assert len(budget._spent) == 4096

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_rates_leave_the_start_out_and_count_a_stall() -> None:
    async def main() -> None:
        meter = Meter()
        assert meter.mbps() == 0.0
        meter.count(1_000_000)  # a burst
        for _ in range(3):
            await trio.sleep(1.0)
            meter.count(1_000_000)
        assert meter.mbps() == pytest.approx(8.0)
        assert meter.mbps(trio.current_time() + 3.0) == pytest.approx(4.0)
        single = Meter()
        await trio.sleep(0.5)
        single.count(1_000_000)
        assert single.mbps() == pytest.approx(16.0)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# who may ask


def test_callers_without_the_right_are_refused() -> None:
    async def main() -> None:
        async with prober_and_node(may_ask=nobody) as (_prober, one, two):
            two.handle(probe.PROTOCOL, Prober(two, nobody).serve)
            await one.connect(two.peer_id, addrs=two.addrs, deadline=5)
            with pytest.raises(Refused) as refusal:
                await probe.ask(one, two.peer_id, Identity.generate().peer_id, [])
            assert refusal.value.code == "not_authority"
            async with await one.call(two.peer_id, selfreport.PROTOCOL, deadline=5) as call:
                with pytest.raises(Refused) as refusal:
                    await selfreport.who(call)
                assert refusal.value.code == "not_listed"

    within(main)


def test_one_looks_through_another() -> None:
    async def main() -> None:
        async with prober_and_node() as (_prober, one, two), Host(Identity.generate()).run([LOCAL]) as third:
            prober = Prober(third, everybody)
            third.handle(probe.PROTOCOL, prober.serve)
            one.learn(third.peer_id, third.addrs)
            seen = await probe.ask(one, third.peer_id, two.peer_id, texts(two), size=100_000)
            assert (seen.reached, seen.session) == (True, SESSION)
            assert seen.up_mbps is not None
            assert one.connections.keys() == {third.peer_id}
            for strange in (
                {"t": "probe", "peer": "me", "addrs": [], "bytes": 0},
                {"t": "probe", "peer": two.peer_id, "addrs": ["/ip4/127.0.0.1/tcp/1"] * 9, "bytes": 0},
                {"t": "probe", "peer": two.peer_id, "addrs": ["x" * 257], "bytes": 0},
                {"t": "probe", "peer": two.peer_id, "addrs": [], "bytes": 16_000_001},
                {"t": "probe", "peer": third.peer_id, "addrs": [], "bytes": 0},
                {"t": "look", "peer": two.peer_id, "addrs": [], "bytes": 0},
            ):
                call = await one.call(third.peer_id, probe.PROTOCOL, deadline=5)
                with pytest.raises(PeerGone):
                    await exchange(call, (strange, b""))
            prober._serving = probe.PARALLEL
            with pytest.raises(Refused) as refusal:
                await probe.ask(one, third.peer_id, two.peer_id, texts(two))
            assert refusal.value.code == "busy"

    within(main)


@pytest.mark.parametrize(
    "change",
    [
        {"t": "seen"},
        {"reached": 1},
        {"why": "x" * 401},
        {"addr": None},
        {"session": b"short"},
        {"rtt_ms": -1},
        {"rtt_ms": float("nan")},
        {"up_mbps": True},
        {"down_mbps": "fast"},
    ],
)
def test_answers_of_probers_are_bounded(change: dict[str, object]) -> None:
    good = Probed(reached=True, addr="/ip4/192.0.2.1/tcp/1", rtt_ms=3.0, session=SESSION)
    assert Probed.from_header(good.to_header()) == good
    with pytest.raises(RemoteError):
        Probed.from_header({**good.to_header(), **change})


# where a prober does not dial


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.1.2.3", "private"),
        ("192.168.1.1", "private"),
        ("172.31.0.1", "private"),
        ("100.64.0.1", "private"),
        ("::ffff:10.0.0.1", "private"),
        ("fd00::1", "private"),
        ("fec0::1", "private"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("0.0.0.0", ""),
        ("0.1.2.3", ""),
        ("224.0.0.1", ""),
        ("255.255.255.255", ""),
        ("240.0.0.1", ""),
        ("::", ""),
        ("::7f00:1", ""),
        ("ff02::1", ""),
        ("2002:7f00:1::", ""),
        ("64:ff9b::7f00:1", ""),
        ("2001::1", ""),
    ],
)
def test_kinds_of_addresses(address: str, kind: str) -> None:
    assert reach.kind(ipaddress.ip_address(address)) == kind


def test_a_prober_with_a_public_address_dials_public_ones_only() -> None:
    peer, other = Identity.generate().peer_id, Identity.generate().peer_id
    public = [Multiaddr.parse("/ip4/8.8.8.8/tcp/49200")]
    announced = [
        "/ip4/127.0.0.1/tcp/22",
        "/ip4/10.0.0.1/tcp/80",
        "/ip4/169.254.169.254/tcp/80",
        "/ip6/::1/tcp/80",
        f"/ip4/9.9.9.9/tcp/49200/p2p/{other}",
        "/ip4/9.9.9.9/udp/53",
        "/ip4/9.9.9.9/tcp/0",
        f"/ip4/9.9.9.9/tcp/49200/p2p/{peer}",
        "/ip4/9.9.9.8/tcp/49200",  # the ninth
    ]

    async def main() -> None:
        usable, left_out = await reach.dialable(announced, peer, public)
        assert usable == [Multiaddr.parse("/ip4/9.9.9.9/tcp/49200")]
        assert len(left_out) == 7
        assert "/ip4/10.0.0.1/tcp/80 is a private address, which others cannot reach" in left_out
        usable, _ = await reach.dialable(announced, peer, [*public, Multiaddr.parse("/ip4/10.9.9.9/tcp/1")])
        assert Multiaddr.parse("/ip4/10.0.0.1/tcp/80") in usable
        assert all("127.0.0.1" not in str(addr) for addr in usable)
        usable, left_out = await reach.dialable(["nonsense", "/p2p-circuit"], peer, public)
        assert (usable, len(left_out)) == ([], 2)

    within(main)


def test_names_are_judged_by_what_they_resolve_to(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"home.test": ["127.0.0.1"], "good.test": ["9.9.9.9", "10.0.0.1", "9.9.9.8"]}

    async def lookup(name: str, *_args: object, **_more: object) -> list[tuple[object, ...]]:
        if name not in table:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in table[name]]

    monkeypatch.setattr(trio.socket, "getaddrinfo", lookup)
    peer = Identity.generate().peer_id

    async def main() -> None:
        for name, expected in (("home.test", []), ("gone.test", []), ("good.test", ["9.9.9.9"])):
            usable, left_out = await reach.dialable([f"/dns4/{name}/tcp/5"], peer, [])
            assert [addr.host for addr in usable] == expected
            assert left_out or expected
        usable, left_out = await reach.dialable(["/dns/home.test/tcp/5", "/dns/good.test/tcp/5"], peer, [])
        assert usable == []
        assert "one name too many" in left_out[1]

    within(main)


# whole nodes


class Place:
    """A run on disk: an authority, a seed and a trainer that are listed, and workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        operator = Identity.generate()
        listed: dict[str, tuple[NodeRef, ...]] = {}
        self.ports: dict[str, int] = {}
        for name, kind in (("authority", "authorities"), ("seed", "seeds"), ("trainer", "trainers")):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.ports[name] = free.getsockname()[1]
            identity = Identity.generate()
            (folder / name).mkdir()
            identity.save(folder / name / "identity.key")
            here = f"/ip4/127.0.0.1/tcp/{self.ports[name]}"
            listed[kind] = (NodeRef(peer_id=identity.peer_id, addrs=(here,)),)
        self.manifest = Manifest(
            run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
            model=MODEL,
            training=TrainingConfig(seed=1),
            **listed,  # type: ignore[arg-type]
        ).signed(operator)
        run.save(self.manifest, folder / "run.toml")

    def settings(self, name: str, role: str) -> config.Config:
        listen = [f"/ip4/127.0.0.1/tcp/{self.ports.get(name, 0)}"]
        node = {"role": role, "name": name, "run": "run.toml", "state": name, "listen": listen}
        extra = {"worker": {"account": "a"}} if role == "worker" else {}
        if role == "authority":
            (self.folder / "accounts.toml").touch()
            extra = {"authority": {"accounts": "accounts.toml"}}
        return config.from_table({"node": node, **extra}, self.folder)


@asynccontextmanager
async def living(settings: config.Config) -> AsyncIterator[Node]:
    sender, receiver = trio.open_memory_channel[Node](1)

    async def role(node: Node) -> None:
        sender.send_nowait(node)
        await node.stopping.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_node(settings, role, started_at=time.time()))
        node = await receiver.receive()
        yield node
        node.stop("the test is over")


def test_an_authority_inspects_from_several_places(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with (
            living(place.settings("authority", "authority")) as office,
            living(place.settings("seed", "seed")),
            living(place.settings("w", "worker")) as worker,
        ):
            await office.dht.joined.wait()  # it began before the seed, and does not dial it again at once
            peer, addrs = worker.identity.peer_id, [str(addr) for addr in worker.host.addrs]
            # A guest's stream stays open on the connection that it has, as a join's does.
            kept = await worker.host.connect(office.identity.peer_id, deadline=5)
            found = await probing.inspect(office, peer, addrs)
            assert found.reached
            assert found.session == worker.session
            assert found.places == 2  # the trainer is not there, which is its own affair
            assert found.rtt_ms is not None
            assert found.mbps is None
            measured = await probing.inspect(office, peer, addrs, bytes=1_000_000, enough_mbps=1.0)
            assert measured.mbps is not None
            assert measured.mbps > 10
            assert worker.host.connections[office.identity.peer_id] is kept
            assert kept.usable

            async with living(place.settings("trainer", "trainer")):
                for _ in range(100):
                    if (await probing.inspect(office, peer, addrs)).places == 3:
                        break
                    await trio.sleep(0.1)  # nor the trainer, which it has just missed
                else:
                    raise AssertionError("the trainer never looked")
            best = await probing.inspect(office, peer, addrs, bytes=4_000_000)
            assert best.mbps is not None

            async def again_and_again() -> None:
                for _ in range(4):
                    await probing.inspect(office, peer, addrs, bytes=4_000_000)

            with pytest.raises(Refused) as refusal:
                await again_and_again()
            assert refusal.value.code == "busy"
            assert refusal.value.retry_after is not None

            closed = await probing.inspect(office, peer, ["/ip4/127.0.0.1/tcp/1"])
            assert not closed.reached
            assert "/ip4/127.0.0.1/tcp/1" in closed.why
            assert await probing.session_of(office, peer, addrs) == worker.session
            assert await probing.session_of(office, peer, ["/ip4/127.0.0.1/tcp/1"]) is None
            with pytest.raises(Refused):
                async with await worker.host.call(
                    office.identity.peer_id, selfreport.PROTOCOL, deadline=5
                ) as call:
                    await selfreport.who(call)

    within(main)


def test_one_inspection_of_a_peer_at_a_time(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.settings("authority", "authority")) as office:
            with listening() as (_server, addr):
                peer = Identity.generate().peer_id
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(probing.inspect, office, peer, [addr])
                    await trio.sleep(0.1)
                    with pytest.raises(Refused) as refusal:
                        await probing.inspect(office, peer, [addr])
                    assert refusal.value.code == "busy"
                    nursery.cancel_scope.cancel()
            closed = await probing.inspect(office, peer, [addr])  # it is free again after a cancelled one
            assert not closed.reached

    within(main)


def test_presence_is_what_answers(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with (
            living(place.settings("authority", "authority")) as office,
            living(place.settings("w", "worker")) as worker,
        ):
            ghost = Identity.generate().peer_id
            here = [str(addr) for addr in worker.host.addrs]
            seen: list[tuple[PeerId, float]] = []
            thrice = trio.Event()

            async def rosters() -> dict[PeerId, list[str]]:
                return {
                    worker.identity.peer_id: here,
                    ghost: [str(worker.host.addrs[0].bare())],
                    office.identity.peer_id: [str(addr) for addr in office.host.addrs],
                }

            async def on_seen(peer: PeerId, now: float) -> None:
                seen.append((peer, now))
                if len(seen) == 3:
                    thrice.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: probing.watch_presence(office, rosters, on_seen, every_s=0.1))
                await thrice.wait()
                nursery.cancel_scope.cancel()
            assert {peer for peer, _now in seen} == {worker.identity.peer_id}
            assert abs(seen[-1][1] - time.time()) < 10

    within(main)


def test_rosters_are_read_from_the_hash_table(tmp_path: Path) -> None:
    from p2p.membership import issue
    from p2p.records import stage_key

    place = Place(tmp_path)

    async def main() -> None:
        async with (
            living(place.settings("authority", "authority")) as office,
            living(place.settings("w", "worker")) as worker,
        ):
            now = time.time()
            office_key = Identity.load_or_create(place.folder / "authority" / "identity.key")
            worker.certificate = issue(
                office_key,
                run="t-1",
                account="a",
                peer_id=worker.identity.peer_id,
                stage=1,
                issued=now,
                expires=now + 60,
            )
            here = tuple(str(addr) for addr in worker.host.addrs)
            record = StageRecord(
                addrs=here,
                phase="active",
                step=0,
                slots=1,
                rate=0.0,
                certificate=worker.certificate.encode(),
            )
            read = probing.stage_rosters(office)
            for phase, expected in (("active", {worker.identity.peer_id: list(here)}), ("leaving", {})):
                value = attrs.evolve(record, phase=phase).to_value()
                key, subkey = stage_key("t-1", 1), worker.identity.peer_id
                while await read() != expected:
                    await worker.dht.store(key, subkey, value, ttl=15, deadline=5)
                    await trio.sleep(0.1)

    within(main)


def test_nobody_answers_a_prober_that_does_not_run() -> None:
    async def main() -> None:
        host = Host(Identity.generate())
        with pytest.raises(DialError):
            await Prober(host, everybody).who(Identity.generate().peer_id, [])

    within(main)
