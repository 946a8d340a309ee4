"""Hash tables that come, go, are cut off and lie apart in time: what is stored is found, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from p2p.errors import LocalError, P2PError, PeerGone
from p2p.identity import Identity
from p2p.kad.events import ClockSkewed, DhtIsolated, DhtJoined, RecordRefused
from p2p.kad.ids import key_id
from p2p.kad.messages import PROTOCOL, StoreRecords, pack_batch, question_header
from p2p.kad.record import seal
from p2p.rpc import pack
from tests.sim.kad_swarms import LIMITS, Swarm, placed, put, simulate, values


def test_eleven_nodes_know_each_other_and_agree_at_once() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(11)
        assert trio.current_time() < 2.0
        assert {len(node.table) for node in swarm.nodes} == {10}
        assert all(node.joined.is_set() for node in swarm.nodes)
        assert [type(event) for event in swarm.events[1]] == [DhtJoined]
        began = trio.current_time()
        for node in swarm.nodes[1:]:
            assert await put(node, "stage/run/0", {"peer": node.table.own}) in (8, 9)
        for node in swarm.nodes:
            found = await node.get("stage/run/0", deadline=5.0)
            assert values(found) == {other.table.own: {"peer": other.table.own} for other in swarm.nodes[1:]}
        assert trio.current_time() - began < 21 * 0.6
        assert all(not host.learnt.keys() & {host.peer_id} and len(host.learnt) == 10 for host in swarm.hosts)

    simulate(1, scenario)


def test_a_read_sees_the_own_write_even_alone_and_the_others_see_it_after_joining() -> None:
    async def scenario(swarm: Swarm) -> None:
        swarm.add()
        swarm.add()
        late = swarm.nodes[1]
        assert await put(late, "k", "early") == 1
        assert values(await late.get("k", deadline=1.0)) == {late.table.own: "early"}
        await swarm.start(0)
        await swarm.start(1)
        await trio.sleep(1.0)
        assert values(await swarm.nodes[0].get("k", deadline=1.0)) == {late.table.own: "early"}

    simulate(2, scenario)


def test_nothing_is_returned_after_its_end_and_the_newest_wins() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(8)
        writer, reader = swarm.nodes[3], swarm.nodes[5]
        await put(writer, "k", 1, ttl=100.0)
        await put(writer, "k", 2, ttl=10.0)
        assert values(await reader.get("k", deadline=1.0)) == {writer.table.own: 2}
        await trio.sleep(9.0)
        assert len(await reader.get("k", deadline=0.5)) == 1
        await trio.sleep(1.0)
        for node in swarm.nodes:
            assert await node.get("k", deadline=5.0) == {}
        assert all(len(node.records) == 0 for node in swarm.nodes)

    simulate(3, scenario)


def test_it_works_without_the_seed_and_comes_back_to_it() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(6)
        swarm.kill(0)
        assert await put(swarm.nodes[1], "k") == 5
        for node in swarm.nodes[2:]:
            assert len(await node.get("k", deadline=5.0)) == 1
        await trio.sleep(300.0)
        assert {len(node.table) for node in swarm.nodes[1:]} == {4}
        swarm.hosts[0].alive = True
        await trio.sleep(120.0)
        assert {len(node.table) for node in swarm.nodes[1:]} == {5}

    simulate(4, scenario)


def test_a_node_whose_seed_is_down_keeps_trying_and_says_so() -> None:
    async def scenario(swarm: Swarm) -> None:
        swarm.net.silent = False
        swarm.add()
        swarm.add()
        swarm.hosts[0].alive = False
        await swarm.start(1)
        with pytest.raises(PeerGone):
            await swarm.nodes[1].get("k", deadline=1.0)
        await trio.sleep(600.0)
        assert not swarm.nodes[1].joined.is_set()
        retries = [event for event in swarm.events[1] if isinstance(event, DhtIsolated)]
        assert 15 < len(retries) < 60
        swarm.hosts[0].alive = True
        await swarm.start(0)
        await trio.sleep(50.0)
        assert swarm.nodes[1].joined.is_set()

    simulate(5, scenario)


def test_a_network_that_went_away_is_found_again_without_any_seed() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(5)
        swarm.kill(0)
        swarm.hosts[1].alive = False  # the cable is out, the node runs
        for _ in range(5):
            with pytest.raises(PeerGone):
                await swarm.nodes[1].get("k", deadline=2.0)
        assert len(swarm.nodes[1].table) == 0
        await trio.sleep(300.0)
        swarm.hosts[1].alive = True
        await trio.sleep(120.0)
        assert len(swarm.nodes[1].table) == 3

    simulate(6, scenario)


def test_a_dead_peer_costs_a_read_less_than_its_deadline_and_leaves_the_table() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(11)
        await put(swarm.nodes[1], "k")
        for index in (4, 5, 6):
            swarm.kill(index)
        slowest = 0.0
        for _ in range(4):
            for index in swarm.alive():
                began = trio.current_time()
                assert len(await swarm.nodes[index].get("k", deadline=5.0)) == 1
                slowest = max(slowest, trio.current_time() - began)
        assert slowest < 1.0
        for number in range(2, 5):
            kept = await put(swarm.nodes[1], "k", number)
        assert kept == 8
        assert {swarm.hosts[index].peer_id for index in (4, 5, 6)}.isdisjoint(
            contact.peer for contact in swarm.nodes[1].table
        )

    simulate(7, scenario)


def test_guests_may_look_but_not_store_nor_be_listed() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(4)
        await put(swarm.nodes[1], "k", "public")
        guest = swarm.add(member=False)
        await swarm.start(4)
        assert values(await guest.get("k", deadline=5.0)) == {swarm.nodes[1].table.own: "public"}
        assert await put(guest, "k", "spam") == 1
        for node in swarm.nodes[:4]:
            assert guest.table.own not in node.table
            assert set(values(await node.get("k", deadline=5.0))) == {swarm.nodes[1].table.own}
        swarm.hosts[4].member = True  # its certificate came
        assert await put(guest, "k", "welcome") == 5
        assert guest.table.own in swarm.nodes[0].table

    simulate(8, scenario)


def test_nobody_stores_for_others() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(2)
        victim = Identity.generate(b"v" * 32)
        record = seal(victim, "k", victim.peer_id, 1, seq=1, issued=swarm.now(), ttl=60)
        async with await swarm.hosts[1].call(swarm.hosts[0].peer_id, PROTOCOL, deadline=1.0) as call:
            question = question_header(StoreRecords(now=swarm.now(), addrs=()))
            reply = await call.ask(pack(question, pack_batch([record.wire]), LIMITS), max_payload=1 << 20)
        assert reply.header["results"] == ["not_owner"]
        assert RecordRefused(peer=swarm.hosts[1].peer_id, key="k", code="not_owner") in swarm.events[0]
        assert len(swarm.nodes[0].records) == 0

    simulate(9, scenario)


def test_who_comes_is_handed_what_it_is_now_near_to() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(10)
        for index in range(1, 5):
            await put(swarm.nodes[index], f"key/{index}", index)
        await swarm.grow(10)
        await trio.sleep(10.0)  # their owners do not store again
        for index in range(1, 5):
            key = f"key/{index}"
            nearest = sorted(swarm.nodes, key=lambda node: node.table.own_id ^ key_id(key))[:6]
            assert any(node in swarm.nodes[10:] for node in nearest)
            for node in nearest:
                assert set(values(node.records.get(key, swarm.now())).values()) == {index}

    simulate(16, scenario)


def test_who_leaves_hands_on_what_it_kept() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(14)
        writer = swarm.nodes[1]
        await put(writer, "k", 1)
        end = next(iter(writer.records.get("k", swarm.now()).values())).expires
        swarm.net.silent = False
        for _ in range(5):
            keepers = [index for index in swarm.alive() if len(swarm.nodes[index].records) and index > 1]
            await swarm.nodes[keepers[0]].leave()
            swarm.kill(keepers[0])
        alive = [swarm.nodes[index] for index in swarm.alive()]
        for node in sorted(alive, key=lambda node: node.table.own_id ^ key_id("k"))[:8]:
            (kept,) = node.records.get("k", swarm.now()).values()
            assert kept.expires == end

    simulate(17, scenario)


def test_clocks_that_are_off_are_told_and_tolerated() -> None:
    async def scenario(swarm: Swarm) -> None:
        swarm.add()
        swarm.add(ahead=-50.0)
        swarm.add(ahead=40.0)
        swarm.add(ahead=200.0)
        for index in range(4):
            await swarm.start(index)
        seed, slow, fast, wild = swarm.nodes
        assert await put(slow, "k", "slow", ttl=15.0) >= 2
        assert await put(fast, "k", "fast", ttl=15.0) >= 2
        assert await put(wild, "k", "wild", ttl=15.0) == 1
        found = await seed.get("k", deadline=5.0)
        assert set(values(found).values()) == {"slow", "fast"}
        assert all(13.0 < record.expires - swarm.now() < 17.0 for record in found.values())
        told = {event.peer: event.seconds for event in swarm.events[0] if isinstance(event, ClockSkewed)}
        assert told == {
            slow.table.own: pytest.approx(-50, abs=0.5),
            fast.table.own: pytest.approx(40, abs=0.5),
            wild.table.own: pytest.approx(200, abs=0.5),
        }
        await trio.sleep(16.0)
        assert await seed.get("k", deadline=5.0) == {}

    simulate(10, scenario)


def test_a_large_roster_comes_in_pages() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(3)
        keeper = swarm.nodes[0]
        for number in range(300):
            identity = Identity.generate(number.to_bytes(32, "big"))
            record = seal(identity, "k", identity.peer_id, b"x" * 3000, seq=1, issued=swarm.now(), ttl=60)
            keeper.records.put(record, swarm.now())
        assert len(await swarm.nodes[1].get("k", deadline=10.0)) == 300

    simulate(11, scenario)


def test_recent_answers_serve_who_does_not_insist() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(5)
        await put(swarm.nodes[1], "k")
        reader = swarm.nodes[2]
        await reader.get("k", deadline=5.0)
        calls = swarm.hosts[2].calls
        assert len(await reader.get("k", deadline=5.0, fresh=False)) == 1
        assert swarm.hosts[2].calls == calls
        both = await reader.get_many(["k", "none"], deadline=5.0)
        assert {key: len(found) for key, found in both.items()} == {"k": 1, "none": 0}

    simulate(12, scenario)


def test_several_records_are_stored_at_once() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(5)
        writer = swarm.nodes[1]
        pages = {(f"page/{number}", writer.table.own): number for number in range(40)}
        began = trio.current_time()
        kept = await writer.store_many(pages, ttl=60.0, deadline=5.0)
        assert set(kept) == set(pages)
        assert min(kept.values()) >= 5
        assert trio.current_time() - began < 1.0
        await placed(writer)
        with pytest.raises(LocalError, match="limit"):
            await writer.store_many({("k", writer.table.own): bytes(5000)}, ttl=60.0, deadline=5.0)
        found = await swarm.nodes[4].get_many([key for key, _ in pages], deadline=5.0)
        assert [values(found[key]) for key, _ in pages] == [{writer.table.own: n} for n in range(40)]

    simulate(12, scenario)


def test_a_long_lived_record_moves_to_the_nodes_that_are_there_at_half_its_life() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(3)
        writer = swarm.nodes[1]
        await put(writer, "k", 1, ttl=1000.0)
        end = (await writer.get("k", deadline=1.0))[writer.table.own].expires
        await swarm.grow(8)
        await trio.sleep(510.0)
        assert sum(len(node.records) for node in swarm.nodes) in range(8, 12)
        found = await swarm.nodes[-1].get("k", deadline=1.0)
        assert found[writer.table.own].expires == end

    simulate(13, scenario)


@pytest.mark.parametrize("seed", [20, pytest.param(21, marks=pytest.mark.long)])
def test_sixty_nodes_find_everything_and_nearly_everything_with_a_third_of_them_dead(seed: int) -> None:
    async def scenario(swarm: Swarm) -> tuple[float, float, int]:
        await swarm.grow(1)
        for _ in range(6):
            await swarm.grow(10)
        writers = swarm.rng.sample(swarm.nodes, 40)
        for number, node in enumerate(writers):
            assert await put(node, f"key/{number}", number, ttl=600.0) >= 8

        async def success() -> float:
            tried = good = 0
            for number, node in enumerate(writers):
                for index in swarm.rng.sample(swarm.alive(), 3):
                    tried += 1
                    try:
                        found = await swarm.nodes[index].get(f"key/{number}", deadline=5.0)
                    except P2PError:
                        continue
                    good += values(found) == {node.table.own: number}
            return good / tried

        calm = await success()
        for index in swarm.rng.sample(range(len(swarm.nodes)), 18):
            swarm.kill(index)
        return calm, await success(), sum(host.calls for host in swarm.hosts)

    calm, after, calls = simulate(seed, scenario)
    assert calm == 1.0
    assert after >= 0.99
    assert calls < 20_000


def test_a_seed_replays() -> None:
    async def scenario(swarm: Swarm) -> list[Any]:
        await swarm.grow(12)
        swarm.kill(3)
        for node in swarm.nodes[4:8]:
            await put(node, "k", trio.current_time())
        found = await swarm.nodes[1].get("k", deadline=5.0)
        return [trio.current_time(), values(found), swarm.events, [host.calls for host in swarm.hosts]]

    assert simulate(30, scenario) == simulate(30, scenario)
    assert simulate(30, scenario) != simulate(31, scenario)


def test_the_first_node_hears_of_others_when_they_come() -> None:
    async def scenario(swarm: Swarm) -> None:
        swarm.add()
        await swarm.start(0)
        assert await put(swarm.nodes[0], "k", "before anybody") == 1
        await trio.sleep(1000.0)
        await put(swarm.nodes[0], "k", "before anybody", ttl=30.0)
        swarm.add()
        await swarm.start(1)
        await trio.sleep(1.0)
        assert [type(event) for event in swarm.events[0]] == [DhtJoined]
        assert len(swarm.nodes[1].records) == 1  # it was sent as soon as there was somebody

    simulate(14, scenario)


def test_who_lost_everybody_at_once_is_back_with_the_first_question() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(4)
        swarm.kill(0)
        await put(swarm.nodes[2], "k", 1, ttl=600.0)
        await trio.sleep(100.0)
        swarm.net.silent = False
        swarm.hosts[1].alive = False
        with pytest.raises(PeerGone):
            await swarm.nodes[1].get("k", deadline=2.0)
        assert len(swarm.nodes[1].table) == 0
        swarm.hosts[1].alive = True
        assert len(await swarm.nodes[1].get("k", deadline=2.0)) == 1
        await trio.sleep(1.0)
        assert len(swarm.nodes[1].table) == 2
        assert sum(isinstance(event, DhtJoined) for event in swarm.events[1]) == 2

    simulate(15, scenario)
