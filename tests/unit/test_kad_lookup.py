"""The lookup as a state machine: whom it asks, when it ends, what a liar or a dead peer costs."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import LocalError
from p2p.identity import PeerId, peer_id_of
from p2p.kad.ids import key_id
from p2p.kad.lookup import Lookup
from p2p.kad.table import Contact

OWN = peer_id_of(b"\xff" * 32)
TARGET = key_id("target")
PATIENCE = 0.4


def contacts(count: int, seed: int = 0) -> list[Contact]:
    """Contacts, nearest to the target first."""
    rng = Random(seed)
    made = [Contact(peer_id_of(rng.randbytes(32))) for _ in range(count)]
    return sorted(made, key=lambda contact: contact.id ^ TARGET)


def near(known: list[Contact], to: Contact) -> list[Contact]:
    """What an honest node answers that knows the thirty nearest to itself."""
    knows = sorted(known, key=lambda contact: contact.id ^ to.id)[:30]
    return sorted(knows, key=lambda contact: contact.id ^ TARGET)[:20]


def ground(count: int) -> list[Contact]:
    """Ids that somebody searched for near the target: all share its first ten bits."""
    rng = Random("ground")
    found: list[Contact] = []
    while len(found) < count:
        key = rng.randbytes(32)
        if int.from_bytes(hashlib.sha256(key).digest(), "big") >> 246 == TARGET >> 246:
            found.append(Contact(peer_id_of(key)))
    return sorted(found, key=lambda contact: contact.id ^ TARGET)


def lookup(start: list[Contact], need: int, **more: int) -> Lookup:
    return Lookup(TARGET, start, own=OWN, need=need, patience=PATIENCE, **more)


def test_it_asks_alpha_at_a_time_nearest_first() -> None:
    known = contacts(8)
    search = lookup(known[::-1], need=8)
    assert search.due(0.0) == known[:3]
    assert search.due(0.1) == []
    search.answered(known[1].peer, [])
    assert search.due(0.1) == [known[3]]
    search.failed(known[0].peer)
    assert search.due(0.1) == [known[4]]
    assert not search.done(0.1)


def test_records_are_enough_once_the_quorum_of_the_nearest_answered() -> None:
    known = contacts(8)
    search = lookup(known[4:], need=3)
    assert search.due(0.0) == known[4:7]
    search.answered(known[4].peer, known[:4])
    search.answered(known[5].peer, [])
    assert search.due(0.0) == known[:2]
    for contact in known[:2]:
        search.answered(contact.peer, [])
    assert not search.done(0.0)
    assert search.due(0.0) == [known[2]]
    search.answered(known[2].peer, [])
    assert not search.done(0.0)  # the third path heard nothing yet
    search.answered(known[6].peer, [])
    assert search.done(0.0)
    assert search.result() == known[:3]
    search.widen(5)
    assert not search.done(0.0)
    assert known[3] in search.due(0.0)


def test_a_failed_peer_is_replaced_by_the_next_nearest() -> None:
    known = contacts(4)
    search = lookup(known, need=3)
    search.due(0.0)
    for contact in known[1:3]:
        search.answered(contact.peer, [])
    search.failed(known[0].peer)
    assert search.due(0.0) == [known[3]]
    search.answered(known[3].peer, [])
    assert search.done(0.0)
    assert search.result() == known[1:]


def test_a_silent_peer_holds_nothing_up_beyond_the_patience() -> None:
    known = contacts(5)
    search = lookup(known, need=3)
    search.due(0.0)
    for contact in known[1:3]:
        search.answered(contact.peer, [])
    assert search.due(0.1) == []
    assert search.timer(0.1) == PATIENCE
    assert search.due(PATIENCE) == [known[3]]
    search.answered(known[3].peer, [])
    assert search.done(PATIENCE + 0.1)
    assert search.timer(2 * PATIENCE) is None


def test_the_late_answer_of_a_slow_peer_counts() -> None:
    known = contacts(3)
    search = lookup(known, need=3)
    search.due(0.0)
    for contact in known[:2]:
        search.answered(contact.peer, [])
    assert not search.done(PATIENCE)  # nobody else to ask: wait for the deadline
    search.answered(known[2].peer, [])
    assert search.done(PATIENCE)
    assert search.result() == known


def test_it_ends_when_nobody_is_left() -> None:
    known = contacts(2)
    search = lookup(known, need=3)
    assert not search.done(0.0)
    search.due(0.0)
    search.failed(known[0].peer)
    search.answered(known[1].peer, [Contact(OWN)])
    assert search.done(0.0)
    assert search.result() == known[1:]
    assert lookup([], need=3).done(0.0)
    assert lookup([Contact(OWN)], need=3).done(0.0)


def test_answers_nobody_waits_for_are_ignored() -> None:
    known = contacts(3)
    search = lookup(known[1:2], need=1)
    search.answered(known[1].peer, known[:1])
    search.failed(known[2].peer)
    assert search.due(0.0) == known[1:2]
    assert search.result() == []


def test_liars_run_into_the_limits() -> None:
    search = Lookup(
        TARGET, contacts(3), own=OWN, need=20, patience=PATIENCE, max_candidates=50, max_queries=30
    )
    seed = 1
    now = 0.0
    while not search.done(now):
        for contact in search.due(now):
            seed += 1
            search.answered(contact.peer, contacts(20, seed))
        assert len(search._candidates) <= 50 + search.queries
    assert search.queries == 30


def test_nonsense_arguments() -> None:
    with pytest.raises(LocalError):
        lookup([], need=0)


def test_a_liar_captures_one_path_and_the_others_end_where_they_would_without_it() -> None:
    """It names ids next to the target, and they answer, name each other, and hide everybody else."""
    honest, lies = contacts(60), ground(40)
    liar = honest[30]
    search = lookup([liar, *honest[40:50]], need=3)
    while not search.done(0.0):
        for contact in search.due(0.0):
            crooked = contact == liar or contact in lies
            search.answered(contact.peer, lies[:20] if crooked else near(honest, contact))
    answered = {contact.peer for contact in search.result()}
    assert answered <= {lie.peer for lie in lies}
    heard = [known.contact for known in search._candidates.values() if known.state.name == "ANSWERED"]
    assert len({contact.peer for contact in heard} & {contact.peer for contact in honest[:8]}) >= 2
    assert search.queries < 30


def test_a_place_to_store_at_is_taken_from_one_path_by_half_at_most() -> None:
    honest, lies = contacts(60), ground(40)
    search = lookup([honest[30], *honest[40:50]], need=8)
    while not search.done(0.0):
        for contact in search.due(0.0):
            crooked = contact == honest[30] or contact in lies
            search.answered(contact.peer, lies[:20] if crooked else near(honest, contact))
    spread = search.spread()
    assert len(spread) == 8
    assert spread == sorted(spread, key=lambda contact: contact.id ^ TARGET)
    assert sum(contact in honest[:8] for contact in spread) >= 4


def test_where_nobody_lies_spread_is_the_nearest() -> None:
    known = contacts(30)
    search = lookup(known[10:], need=8)
    while not search.done(0.0):
        for contact in search.due(0.0):
            search.answered(contact.peer, near(known, contact))
    assert search.result() == known[:8]
    assert len(set(search.spread()) & set(known[:8])) >= 7


def test_a_flood_of_near_names_drives_out_nobody_whom_another_path_named() -> None:
    known = contacts(40)
    lies = ground(60)
    search = Lookup(TARGET, known[37:], own=OWN, need=3, patience=PATIENCE, max_candidates=30)
    first, second, _ = search.due(0.0)
    search.answered(first.peer, known[:5])
    search.answered(second.peer, lies)
    assert {contact.peer for contact in known[:5]} <= set(search._candidates)
    assert len(search._candidates) <= 30 + search.queries


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 8), st.floats(0, 0.6))
def test_it_always_ends_and_finds_the_nearest_living(seed: int, count: int, need: int, dead: float) -> None:
    """Every node knows all others, some are silent for ever, time moves on by timers and deadlines."""
    rng = Random(seed)
    known = contacts(count, seed)
    alive = {contact.peer for contact in known if rng.random() >= dead} | {known[0].peer}
    search = lookup([*rng.sample(known, min(count, 5)), known[0]], need=need)
    now, open_since = 0.0, dict[PeerId, float]()
    for _ in range(10_000):
        if search.done(now):
            break
        for contact in search.due(now):
            if contact.peer in alive:
                search.answered(contact.peer, rng.sample(known, min(count, 20)))
            else:
                open_since[contact.peer] = now
        timer = search.timer(now)
        deadlines = [since + 1.0 for since in open_since.values()]
        later = [time for time in [timer, *deadlines] if time is not None and time > now]
        if later:
            now = min(later)
        for peer in [peer for peer, since in open_since.items() if now >= since + 1.0]:
            del open_since[peer]
            search.failed(peer)
    else:
        pytest.fail("the lookup never ended")
    if count <= 20:  # then every answer names everybody
        expected = [contact for contact in known if contact.peer in alive][:need]
        assert search.result() == expected
