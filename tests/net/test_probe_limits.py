"""What a prober must not be used for: limits, who may ask, and where it does not dial."""

from __future__ import annotations

import ipaddress
import socket

import pytest
import trio
import trio.testing

from p2p import probe, reach, selfreport
from p2p.errors import DialError, PeerGone, Refused, RemoteError
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.multiaddr import Multiaddr
from p2p.probe import Probed, Prober
from p2p.selfreport import Budget, Meter
from tests.net.probers import (
    LOCAL,
    SESSION,
    everybody,
    exchange,
    listening,
    nobody,
    prober_and_node,
    texts,
    within,
)

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


def test_nobody_answers_a_prober_that_does_not_run() -> None:
    async def main() -> None:
        host = Host(Identity.generate())
        with pytest.raises(DialError):
            await Prober(host, everybody).who(Identity.generate().peer_id, [])

    within(main)
