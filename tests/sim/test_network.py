"""The simulated network behaves like TCP seen from above, and hosts on it replay by seed."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2p.errors import DialError, PeerGone
from p2p.event import Event
from p2p.host import Host
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from p2p.sim import Link, SimNetwork, SimStream, run

LISTEN = [Multiaddr.parse("/ip4/0.0.0.0/tcp/4001")]


def addr(ip: str) -> list[Multiaddr]:
    return [Multiaddr.parse(f"/ip4/{ip}/tcp/4001")]


async def echo(call: Call) -> None:
    message = await call.receive(max_payload=1 << 24)
    await call.send({"t": "echo"}, message.payload)


def test_stream_passes_trios_conformance_suite() -> None:
    async def maker() -> tuple[SimStream, SimStream]:
        return SimNetwork().connect("10.0.0.1", "10.0.0.2")

    async def main() -> None:
        await trio.testing.check_half_closeable_stream(maker, None)

    run(0, main)


def exchange(seed: int) -> tuple[list[str], float]:
    """A short life of three hosts; its events and its end."""
    events: list[str] = []

    async def main() -> float:
        network = SimNetwork(seed, Link(latency_s=0.02, jitter_s=0.01, loss=0.05))

        def emit(event: Event) -> None:
            events.append(f"{trio.current_time():.9f} {event}")

        hosts = [network.host(f"10.0.0.{number}", emit=emit) for number in (1, 2, 3)]
        for host in hosts:
            host.handle("/agora/echo/1", echo)
        one, two, three = hosts
        async with (
            one.run(LISTEN),
            two.run(LISTEN),
            three.run(LISTEN),
            trio.open_nursery() as nursery,
        ):
            for caller in hosts:
                for callee in hosts:
                    if caller is not callee:
                        caller.learn(callee.peer_id, callee.addrs)
                        nursery.start_soon(ask, caller, callee)
        return trio.current_time()

    async def ask(caller: Host, callee: Host) -> None:
        async with await caller.call(callee.peer_id, "/agora/echo/1", deadline=10) as call:
            await call.send({"t": "hi"}, bytes(300_000))
            assert len((await call.receive(max_payload=300_000)).payload) == 300_000

    return events, run(seed, main)


def test_same_seed_same_trace() -> None:
    first = exchange(7)
    assert first == exchange(7)
    assert first != exchange(8)


def test_crashed_machine_is_noticed_by_silence_and_partition_heals() -> None:
    async def main() -> None:
        network = SimNetwork(1)
        one, two = network.host("10.0.0.1"), network.host("10.0.0.2")
        two.handle("/agora/echo/1", echo)
        async with one.run(LISTEN), two.run(LISTEN):
            connection = await one.connect(two.peer_id, addrs=addr("10.0.0.2"), deadline=5)
            network.partition(["10.0.0.1"])
            began = trio.current_time()
            with trio.move_on_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(heal_later, network, 3.0)
                    await connection.ping(10)
            assert 3.0 <= trio.current_time() - began < 3.5
            network.crash("10.0.0.2")
            began = trio.current_time()
            async with await one.call(two.peer_id, "/agora/echo/1", deadline=1) as call, connection.watched():
                await call.send({})
                with pytest.raises(PeerGone):
                    await call.receive()
            assert trio.current_time() - began < 3.0
            with pytest.raises(DialError):
                await one.connect(two.peer_id, addrs=addr("10.0.0.2"), deadline=2)

    async def heal_later(network: SimNetwork, seconds: float) -> None:
        await trio.sleep(seconds)
        network.heal()

    run(1, main)


def test_bandwidth_is_shared_and_respected() -> None:
    async def main() -> None:
        network = SimNetwork(1, Link(latency_s=0.01, bytes_per_s=1e6))
        one, two = network.host("10.0.0.1"), network.host("10.0.0.2")
        two.handle("/agora/echo/1", echo)
        async with one.run(), two.run(LISTEN):
            await one.connect(two.peer_id, addrs=addr("10.0.0.2"), deadline=5)
            began = trio.current_time()
            async with await one.call(two.peer_id, "/agora/echo/1", deadline=1) as call:
                await call.send({}, bytes(2_000_000))
                await call.receive(max_payload=2_000_000)
            assert 4.0 < trio.current_time() - began < 4.6

    run(1, main)


def test_caller_that_says_nothing_is_dropped() -> None:
    async def main() -> None:
        network = SimNetwork(1)
        one, two = network.host("10.0.0.1"), network.host("10.0.0.2")
        two.handle("/agora/echo/1", echo)
        async with (
            one.run(),
            two.run(LISTEN),
            await one.call(two.peer_id, "/agora/echo/1", addrs=addr("10.0.0.2"), deadline=5) as call,
        ):
            began = trio.current_time()
            await call._flush()
            with pytest.raises(PeerGone):
                await call.receive()
            assert 29 < trio.current_time() - began < 31

    run(1, main)


def test_idle_connection_lives_and_a_vanished_peer_is_noticed_in_time() -> None:
    async def main() -> None:
        network = SimNetwork(1)
        one, two = network.host("10.0.0.1"), network.host("10.0.0.2")
        async with one.run(), two.run(LISTEN):
            connection = await one.connect(two.peer_id, addrs=addr("10.0.0.2"), deadline=5)
            await trio.sleep(3600)
            assert one.connections[two.peer_id] is connection
            network.crash("10.0.0.2")
            began = trio.current_time()
            await connection.closed.wait()
            assert 10 < trio.current_time() - began <= 40

    run(1, main)


def test_lease_ends_soon_after_the_peer_fell_silent() -> None:
    async def main() -> None:
        network = SimNetwork(1)
        one, two = network.host("10.0.0.1"), network.host("10.0.0.2")
        async with one.run(), two.run(LISTEN):
            connection = await one.connect(two.peer_id, addrs=addr("10.0.0.2"), deadline=5)
            async with connection.watched():
                await trio.sleep(10)
                assert connection.lease.fresh()
                network.crash("10.0.0.2")
                silent_since = connection.last_answer
                await trio.sleep_until(trio.current_time() + 1.6)
                assert not connection.lease.fresh()
                assert not connection.closed.is_set()
                await connection.closed.wait()
                assert network.clock() - silent_since < 3.0

    run(1, main)


@pytest.mark.parametrize("seed", range(12))
def test_dialling_each_other_at_once_leaves_one_connection(seed: int) -> None:
    async def main() -> None:
        network = SimNetwork(seed, Link(latency_s=0.03, jitter_s=0.02))
        one, two = network.host("10.0.0.1"), network.host("10.0.0.2")
        for host in (one, two):
            host.handle("/agora/echo/1", echo)

        async def ask(caller: Host, callee: Host) -> None:
            for _ in range(20):
                async with await caller.call(callee.peer_id, "/agora/echo/1", deadline=5) as call:
                    await call.send({}, bytes(1000))
                    await call.receive(max_payload=1000)

        async with one.run(LISTEN), two.run(LISTEN):
            one.learn(two.peer_id, two.addrs)
            two.learn(one.peer_id, one.addrs)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, one, two)
                nursery.start_soon(ask, two, one)
            await trio.sleep(12)
            assert len(one._all) == len(two._all) == 1
            assert one.connections[two.peer_id].dialer == (one.peer_id < two.peer_id)

    run(seed, main)
