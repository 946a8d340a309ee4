"""The store: newest wins, nothing outlives its end, every limit has its word."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import Refused
from p2p.identity import Identity
from p2p.kad.record import Record, seal
from p2p.kad.store import OVERHEAD, Store

IDENTITIES = [Identity.generate(bytes([number]) * 32) for number in range(1, 7)]
ALICE, BOB = IDENTITIES[:2]


def made(
    key: str = "k", who: Identity = ALICE, *, seq: int = 1, at: float = 0.0, ttl: float = 10.0
) -> Record:
    return seal(who, key, who.peer_id, seq, seq=seq, issued=at, ttl=ttl)


def code_of(store: Store, record: Record, now: float = 0.0) -> str:
    with pytest.raises(Refused) as refusal:
        store.put(record, now)
    return refusal.value.code


def test_newest_wins_and_the_same_again_is_welcome() -> None:
    store = Store()
    assert store.put(made(seq=2), 0.0)
    assert not store.put(made(seq=2), 0.0)
    assert code_of(store, made(seq=1)) == "old"
    assert code_of(store, made(seq=2, ttl=11.0)) == "old"
    assert store.put(made(seq=3), 0.0)
    assert [record.seq for record in store.get("k", 0.0).values()] == [3]
    assert len(store) == 1


def test_subkeys_live_and_end_each_by_itself() -> None:
    store = Store()
    store.put(made(who=ALICE, ttl=5), 0.0)
    store.put(made(who=BOB, ttl=10), 0.0)
    assert set(store.get("k", 4.9)) == {ALICE.peer_id, BOB.peer_id}
    assert set(store.get("k", 5.0)) == {BOB.peer_id}
    assert store.get("k", 10.0) == {}
    assert (len(store), store.bytes) == (0, 0)
    assert code_of(store, made(ttl=10), 10.0) == "expired"


def test_a_shorter_life_replaces_a_longer_one() -> None:
    store = Store()
    store.put(made(seq=1, ttl=100), 0.0)
    store.put(made(seq=2, ttl=1), 0.0)
    assert store.get("k", 1.0) == {}
    store.put(made(seq=3, ttl=10), 1.0)
    store.put(made(seq=4, ttl=200), 1.0)
    assert len(store.get("k", 150.0)) == 1


def test_limits_have_words_and_replacing_never_meets_them() -> None:
    store = Store(max_subkeys=1, max_per_owner=2)
    store.put(made("a"), 0.0)
    assert code_of(store, made("a", BOB)) == "key_full"
    store.put(made("b"), 0.0)
    assert code_of(store, made("c")) == "owner_full"
    assert store.put(made("a", seq=2), 0.0)
    assert store.put(made("c", at=10.0), 10.0)  # the others have ended


def test_bytes_are_counted() -> None:
    record = made()
    cost = len(record.wire) + OVERHEAD
    store = Store(max_bytes=2 * cost + 8)
    store.put(made("a"), 0.0)
    store.put(made("b"), 0.0)
    assert store.bytes == 2 * cost
    assert code_of(store, made("c")) == "store_full"
    store.expire(10.0)
    assert store.bytes == 0


def test_pages_go_through_every_subkey_once() -> None:
    store = Store()
    for who in IDENTITIES:
        store.put(made(who=who), 0.0)
    size = len(made().wire) + 16
    seen: list[str] = []
    after, more = None, True
    while more:
        page, more = store.page("k", after, 2 * size + 20, 0.0)
        assert 1 <= len(page) <= 2
        seen += [record.subkey for record in page]
        after = seen[-1]
    assert seen == sorted(who.peer_id for who in IDENTITIES)
    assert store.page("k", after, 1000, 0.0) == ([], False)
    assert len(store.page("k", None, 1, 0.0)[0]) == 1  # a page always moves on


def test_a_record_stored_a_thousand_times_leaves_no_heap_behind() -> None:
    store = Store()
    for seq in range(1, 1000):
        store.put(made(seq=seq, ttl=1000), 0.0)
    assert len(store._ends) < 100
    assert store.get("k", 1000.0) == {}


def test_what_was_replaced_by_something_shorter_does_not_come_back() -> None:
    store = Store(max_per_owner=1)
    long, short = made(seq=1, ttl=100), made(seq=2, ttl=5)
    store.put(long, 0.0)
    store.put(short, 0.0)
    assert store.get("k", 5.0) == {}
    assert (len(store), store.bytes) == (0, OVERHEAD)
    assert code_of(store, long, 5.0) == "old"
    assert code_of(store, made("other"), 5.0) == "owner_full"
    assert store.put(made(seq=3, at=6.0, ttl=10), 6.0)
    assert [record.seq for record in store.get("k", 6.0).values()] == [3]
    store.expire(100.0)
    assert (len(store), store.bytes) == (0, 0)


def test_an_owner_whose_clock_is_fast_is_not_replayed_until_its_own_clock_says_so_too() -> None:
    store = Store()
    record = attrs.evolve(made(ttl=50), expires=10.0)  # its clock is 40 s ahead of ours
    store.put(record, 0.0)
    assert store.get("k", 10.0) == {}
    assert code_of(store, made(ttl=50), 10.0) == "old"
    store.expire(50.0)
    assert store.bytes == 0


puts = st.lists(
    st.tuples(st.sampled_from("xyz"), st.sampled_from(IDENTITIES), st.integers(1, 9), st.integers(1, 8)),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(puts)
def test_it_is_a_map_of_the_newest_that_has_not_ended(steps: list[tuple[str, Identity, int, int]]) -> None:
    store = Store()
    model: dict[tuple[str, str], Record] = {}
    elders: dict[tuple[str, str], float] = {}
    for now, (key, who, seq, ttl) in enumerate(steps):
        record = made(key, who, seq=seq, at=float(now), ttl=float(ttl))
        place = key, who.peer_id
        model = {place: kept for place, kept in model.items() if elders[place] > now}
        before = model.get(place)
        if before is None or seq > before.seq:
            store.put(record, now)
            elders[place] = max(record.expires, elders[place] if before else 0.0)
            model[place] = record
        else:
            assert code_of(store, record, now) == "old"
        alive = {place for place, kept in model.items() if kept.expires > now}
        assert {(k, s) for k in "xyz" for s in store.get(k, now)} == alive
        assert len(store) == len(alive)
        sizes = [len(kept.wire) if place in alive else 0 for place, kept in model.items()]
        assert store.bytes == sum(size + OVERHEAD for size in sizes)
