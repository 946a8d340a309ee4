"""Members that lie, forge, replay and flood are refused with a word at every node; the honest are heard."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgpack
import pytest
import trio

from p2p.errors import Refused, RemoteError
from p2p.identity import Identity, PeerId
from p2p.kad.events import RecordRefused
from p2p.kad.ids import key_id
from p2p.kad.messages import (
    Answer,
    HandOver,
    Question,
    StoreRecords,
    answer_header,
    pack_batch,
    pack_page,
    question_header,
)
from p2p.kad.record import KEY_LIMIT, VALUE_LIMIT, seal
from p2p.kad.table import Contact
from p2p.rpc import Message, pack
from tests.sim.kad_swarms import LIMITS, Swarm, put, simulate, values

KEY = "stage/run/0"
HOUR = 3600.0


def signed(identity: Identity, now: float, **changes: Any) -> bytes:
    """A record whose fields its signer chose."""
    fields = {
        "version": 1,
        "key": KEY,
        "subkey": identity.peer_id,
        "value": b"\xc0",
        "owner": identity.peer_id,
        "seq": int(now * 1e6),
        "issued": now,
        "expires": now + 60.0,
    } | changes
    statement = list(fields.values())
    packed: bytes = msgpack.packb([*statement, identity.sign("record", msgpack.packb(statement))])
    return packed


class Mallory:
    """A member that says what it likes: its questions are written by hand, and so are its answers."""

    def __init__(self, swarm: Swarm, index: int) -> None:
        self.swarm, self.index = swarm, index
        self.identity = swarm.nodes[index]._identity
        self.host = swarm.hosts[index]
        self.asked = 0

    @classmethod
    async def joins(cls, swarm: Swarm) -> Mallory:
        swarm.add()
        await swarm.start(len(swarm.nodes) - 1)
        return cls(swarm, len(swarm.nodes) - 1)

    async def says(self, to: int, question: Question, payload: bytes) -> list[str]:
        """What a node answered to each record, or ``["dropped"]`` where it broke the stream."""
        async with await self.host.call(self.swarm.hosts[to].peer_id, "", deadline=1.0) as call:
            try:
                reply = await call.ask(pack(question_header(question), payload, LIMITS), max_payload=1 << 20)
            except RemoteError:
                return ["dropped"]
        return list(reply.header["results"])

    async def stores(self, to: int, *wires: bytes) -> list[str]:
        return await self.says(to, StoreRecords(now=self.swarm.now(), addrs=()), pack_batch(wires))

    async def hands(self, to: int, *rows: tuple[bytes, float], leaving: bool = False) -> list[str]:
        question = HandOver(leaving=leaving, now=self.swarm.now(), addrs=())
        return await self.says(to, question, pack_page(rows))

    def answers(
        self, rows: Callable[[], Sequence[tuple[bytes, float]]], nodes: Sequence[Contact] = ()
    ) -> None:
        """From now on it answers every question with these, and keeps nothing."""

        def responder(_asker: Any, _asked: Any) -> tuple[dict[str, Any], bytes]:
            self.asked += 1
            answer = Answer(now=self.swarm.now(), addrs=self.addrs(), nodes=tuple(nodes), results=("ok",))
            return answer_header(answer), pack_page(rows())

        self.host.responder = responder

    def addrs(self) -> tuple[str, ...]:
        return (str(self.host.addrs[0].bare()),)


def codes(swarm: Swarm, index: int, by: PeerId) -> list[str]:
    """What a node said of this peer's records."""
    told = [event for event in swarm.events[index] if isinstance(event, RecordRefused)]
    return [event.code for event in told if event.peer == by]


def nearest(swarm: Swarm, key: str) -> PeerId:
    """The node that every reader of this key asks first."""
    return min(swarm.nodes, key=lambda node: node.table.own_id ^ key_id(key)).table.own


def played(seed: int, scenario: Callable[[Swarm, Mallory], Awaitable[None]], honest: int = 5) -> None:
    async def main(swarm: Swarm) -> None:
        await swarm.grow(honest)
        await scenario(swarm, await Mallory.joins(swarm))

    simulate(seed, main)


def test_every_node_refuses_what_is_not_the_senders_to_say() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        victim = Identity.generate(b"v" * 32)
        now = swarm.now()
        me = mallory.identity
        words = {
            "not_owner": seal(victim, KEY, victim.peer_id, 1, seq=1, issued=now, ttl=60).wire,
            "expired": signed(me, now - 61.0),
            "future": signed(me, now + 30.0),
            "too_long": signed(me, now, expires=now + 2 * HOUR),
        }
        dropped = [
            signed(me, now, subkey=victim.peer_id),
            signed(me, now, owner=victim.peer_id, subkey=victim.peer_id),
            signed(me, now, subkey=""),
            signed(me, now, key="k" * (KEY_LIMIT + 1)),
            signed(me, now, value=b"\xc4\xff" + bytes(VALUE_LIMIT)),
            signed(me, now, subkey="s" * 5000),
            signed(me, now, value=b"\xc1"),
            signed(me, now, seq=-1),
            signed(me, now, expires=float("nan")),
            signed(me, now)[:-1] + b"\x00",
            signed(me, now) + b"\x00",
            b"\xdf\xff\xff\xff\xff",
            b"",
        ]
        for index in range(5):
            node = swarm.nodes[index]
            for word, wire in words.items():
                answer = await mallory.stores(index, wire)
                # What lives for longer than any record may is malformed already.
                assert answer == (["dropped"] if word == "too_long" else [word])
            for wire in dropped:
                assert await mallory.stores(index, wire) == ["dropped"]
                assert await mallory.hands(index, (wire, 30.0)) == ["dropped"]
            many = [signed(me, now, key=f"k/{number}") for number in range(17)]
            assert await mallory.stores(index, *many) == ["dropped"]
            for payload in (b"\xc1", b"\x91", b"\x91\x01", b"\x80", b"\xdd\xff\xff\xff\xff"):
                store = StoreRecords(now=now, addrs=())
                assert await mallory.says(index, store, payload) == ["dropped"]
                assert await mallory.says(index, HandOver(leaving=False, now=now, addrs=()), payload) == [
                    "dropped"
                ]
            assert len(node.records) == 0
            told = codes(swarm, index, me.peer_id)
            assert sorted(told) == sorted(
                ["not_owner", "expired", "future", "bad_record", *["bad_record"] * 2 * len(dropped)]
            )

    played(1, scenario)


def test_an_older_record_or_another_of_the_same_seq_replaces_nothing() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        me, now = mallory.identity, swarm.now()
        kept = signed(me, now, seq=7)
        for index in range(5):
            assert await mallory.stores(index, kept) == ["ok"]
            assert await mallory.stores(index, kept) == ["ok"]
            assert await mallory.stores(index, signed(me, now, seq=6)) == ["old"]
            assert await mallory.stores(index, signed(me, now, seq=7, value=b"\x01")) == ["old"]
            assert await mallory.stores(index, signed(me, now, seq=7, expires=now + 90.0)) == ["old"]
            (record,) = swarm.nodes[index].records.get(KEY, now).values()
            assert record.wire == kept
            assert codes(swarm, index, me.peer_id) == ["old"] * 3

    played(2, scenario)


def test_what_others_signed_cannot_be_replayed_nor_stretched_by_handing_it_over() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        victim = swarm.nodes[1]
        await put(victim, KEY, "first", 600.0)
        (first,) = victim.records.get(KEY, swarm.now()).values()
        await put(victim, KEY, "last", 20.0)
        (last,) = victim.records.get(KEY, swarm.now()).values()
        for index in range(5):
            left = first.owner_expires - swarm.now()
            assert await mallory.hands(index, (first.wire, left)) == ["old"]
            assert await mallory.hands(index, (last.wire, 55.0)) in (["future"], ["old"])
            assert await mallory.hands(index, (last.wire, 19.0)) == ["ok"]  # what it is, and known already
            (record,) = swarm.nodes[index].records.get(KEY, swarm.now()).values()
            assert (record.value, record.expires) == ("last", last.expires)
        await trio.sleep(30.0)
        for index in range(5):
            assert await mallory.hands(index, (last.wire, 15.0)) in (["expired"], ["old"])
            left = first.owner_expires - swarm.now()
            assert await mallory.hands(index, (first.wire, left)) == ["old"]
            assert await swarm.nodes[index].get(KEY, deadline=5.0) == {}

    played(3, scenario)


@pytest.mark.long
def test_a_node_takes_only_what_it_is_near_to_and_only_from_members() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        writer = Identity.generate(b"w" * 32)
        far = max(range(30), key=lambda index: swarm.nodes[index].table.own_id ^ key_id(KEY))
        near = min(range(30), key=lambda index: swarm.nodes[index].table.own_id ^ key_id(KEY))
        wire = signed(writer, swarm.now())
        assert await mallory.hands(far, (wire, 60.0)) == ["not_near"]
        assert await mallory.hands(near, (wire, 60.0)) == ["ok"]
        assert len(swarm.nodes[far].records) == 0
        guest = swarm.add(member=False)
        swarm.hosts[-1].alive = True
        stranger = Mallory(swarm, swarm.nodes.index(guest))
        async with await stranger.host.call(swarm.hosts[near].peer_id, "", deadline=1.0) as call:
            question = HandOver(leaving=True, now=swarm.now(), addrs=())
            with pytest.raises(Refused, match="guests"):
                await call.ask(pack(question_header(question), pack_page([(wire, 60.0)]), LIMITS))

    played(4, scenario, honest=30)


def test_one_writer_fills_neither_a_key_nor_a_node() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        me, now = mallory.identity, swarm.now()
        words: list[str] = []
        for first in range(0, 320, 16):
            wires = [signed(me, now, key=f"k/{number}") for number in range(first, first + 16)]
            words += await mallory.stores(0, *wires)
        assert words == ["ok"] * 256 + ["owner_full"] * 64
        assert codes(swarm, 0, me.peer_id) == ["owner_full"] * 64
        assert await put(swarm.nodes[1], KEY, "honest") == 6
        assert set(values(swarm.nodes[0].records.get(KEY, swarm.now())).values()) == {"honest"}

    played(5, scenario)


MORE_LIES = ("nothing", "other key", "twice", "later", "not msgpack")


@pytest.mark.parametrize(
    "lie", ["forged", "ended", *(pytest.param(lie, marks=pytest.mark.long) for lie in MORE_LIES)]
)
def test_readers_find_the_honest_record_behind_three_liars(lie: str) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(12)
        writer = swarm.nodes[1]
        victim = Identity.generate(b"v" * 32)
        ended = signed(victim, swarm.now() - 70.0, expires=swarm.now() - 10.0)
        await put(writer, KEY, "honest", 60.0)
        near = sorted(range(2, 12), key=lambda index: swarm.nodes[index].table.own_id ^ key_id(KEY))
        liars = [Mallory(swarm, index) for index in near[:3]]
        for liar in liars:
            now = swarm.now()
            forged = bytearray(signed(victim, now))
            forged[-1] ^= 1
            rows: dict[str, list[tuple[Any, float]]] = {
                "nothing": [],
                "forged": [(bytes(forged), 60.0)],
                "other key": [(signed(victim, now, key="another"), 60.0)],
                "ended": [(ended, 30.0)],
                "twice": [(ended, 30.0), (ended, 30.0)],
                "later": [(signed(victim, now + 40.0), 60.0)],
                "not msgpack": [(b"\xc1" * 100, 60.0)],
            }
            liar.answers(lambda rows=rows: rows[lie])  # type: ignore[misc]
        told: list[str] = []
        for index in near[3:]:
            found = await swarm.nodes[index].get(KEY, deadline=5.0)
            # Three liars that say the same of when a clock is off are two keepers that agree; else nothing.
            assert {subkey for subkey in found if subkey != victim.peer_id} == {writer.table.own}
            assert found[writer.table.own].value == "honest"
            told += [code for liar in liars for code in codes(swarm, index, liar.identity.peer_id)]
        assert sum(liar.asked for liar in liars) > 0
        expected = {"forged": "bad_record", "other key": "other_key", "not msgpack": "bad_record"}
        if lie in expected:
            assert set(told) == {expected[lie]}

    simulate(6, scenario)


def test_one_liar_brings_nothing_back_that_has_ended() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        victim = Identity.generate(b"v" * 32)
        ended = signed(victim, swarm.now() - 70.0, expires=swarm.now() - 10.0)
        mallory.answers(lambda: [(ended, 30.0)])
        for index in range(5):
            assert await swarm.nodes[index].get(KEY, deadline=5.0) == {}
        assert mallory.asked > 0

    played(7, scenario)


@pytest.mark.long
def test_names_of_nobody_and_of_others_at_wrong_addresses_hide_nobody() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(25)
        await put(swarm.nodes[1], KEY, "honest", 600.0)
        liars = [Mallory(swarm, index) for index in range(2, 7)]
        made_up = [Contact(Identity.generate(bytes([number]) * 32).peer_id) for number in range(10)]
        for liar in liars:
            stolen = [Contact(host.peer_id, liar.addrs()) for host in swarm.hosts[10:20]]
            liar.answers(list, [*stolen, *made_up])
        for index in range(7, 25):
            began = trio.current_time()
            assert len(await swarm.nodes[index].get(KEY, deadline=5.0)) == 1
            assert trio.current_time() - began < 5.0
            assert not {contact.peer for contact in made_up} & {one.peer for one in swarm.nodes[index].table}

    simulate(8, scenario)


@pytest.mark.long
def test_many_ids_do_not_eclipse_a_node_that_knows_honest_ones() -> None:
    """As many hostile members as honest ones, who keep nothing and name nobody but each other."""

    async def scenario(swarm: Swarm) -> None:
        await swarm.grow(20)
        for index in range(1, 11):
            await put(swarm.nodes[index], f"key/{index}", index, 600.0)
        elders = [{contact.peer for contact in node.table} for node in swarm.nodes]
        gang = [await Mallory.joins(swarm) for _ in range(20)]
        named = [Contact(one.host.peer_id, one.addrs()) for one in gang]
        for one in gang:
            one.answers(list, named)
        for index in range(20):
            reader = swarm.nodes[index]
            found = [await reader.get(f"key/{number}", deadline=5.0) for number in range(1, 11)]
            assert sum(map(len, found)) >= 9
            assert len(elders[index] & {contact.peer for contact in reader.table}) >= len(elders[index]) - 2

    simulate(9, scenario)


def test_ids_without_membership_end_no_search() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        await put(swarm.nodes[1], KEY, "honest", 600.0)
        guests = []
        while len(guests) < 12:
            dht = swarm.add(member=False)
            guests.append(Mallory(swarm, swarm.nodes.index(dht)))
        for guest in guests:
            guest.answers(list)
        mallory.answers(list, [Contact(guest.host.peer_id, guest.addrs()) for guest in guests])
        for index in range(5):
            assert set(values(await swarm.nodes[index].get(KEY, deadline=5.0)).values()) == {"honest"}
            assert len(swarm.nodes[index].table) <= 5

    played(10, scenario)


def test_pages_without_end_are_left() -> None:
    async def scenario(swarm: Swarm, mallory: Mallory) -> None:
        me = mallory.identity.peer_id
        key = next(key for key in map(str, itertools.count()) if nearest(swarm, key) == me)
        wires = sorted(
            (identity.peer_id, signed(identity, swarm.now(), key=key))
            for identity in (Identity.generate(number.to_bytes(32, "big")) for number in range(20))
        )

        def responder(_asker: Any, asked: Message) -> tuple[dict[str, Any], bytes]:
            mallory.asked += asked.header["op"] == "find_value"
            answer = Answer(now=swarm.now(), more=True)
            return answer_header(answer), pack_page([(wire, 50.0) for _, wire in wires])

        mallory.host.responder = responder
        await trio.sleep(2.0)  # what it asks while it joins brings it back into the table
        await swarm.nodes[0].get(key, deadline=5.0)
        assert 0 < mallory.asked <= 2
        assert me not in swarm.nodes[0].table

    played(11, scenario)
