"""Answers made into one: the newest wins, and no keeper alone moves an end."""

from __future__ import annotations

import attrs

from p2p.identity import Identity
from p2p.kad.merge import Merge
from p2p.kad.record import Record, seal

ALICE, BOB, *KEEPERS = [Identity.generate(bytes([number]) * 32) for number in range(1, 7)]


def made(seq: int = 1, *, end: float = 10.0, who: Identity = ALICE, claimed: float | None = None) -> Record:
    record = seal(who, "k", who.peer_id, seq, seq=seq, issued=0.0, ttl=end)
    return attrs.evolve(record, expires=end if claimed is None else claimed)


def merged(*answers: list[Record], own: list[Record] | None = None) -> Merge:
    merge = Merge(own or [])
    for keeper, records in zip(KEEPERS, answers, strict=False):
        merge.heard(keeper.peer_id, records)
    return merge


def test_the_highest_seq_of_each_subkey_wins() -> None:
    found = merged([made(2)], [made(1), made(1, who=BOB)], [made(1)], own=[made(1)]).alive(0.0)
    assert {(subkey, record.seq) for subkey, record in found.items()} == {
        (ALICE.peer_id, 2),
        (BOB.peer_id, 1),
    }


def test_one_keeper_can_neither_stretch_nor_shorten_a_life() -> None:
    assert merged([made(claimed=40.0)], [made()]).alive(9.0)[ALICE.peer_id].expires == 10.0
    assert merged([made(claimed=40.0)], [made()]).alive(10.0) == {}
    assert merged([made(claimed=40.0)]).alive(10.0) == {}
    assert merged([made(claimed=1.0)], [made()], [made()]).alive(9.0)[ALICE.peer_id].expires == 10.0


def test_two_keepers_or_the_owner_are_believed_that_its_clock_is_slow() -> None:
    both = merged([made(claimed=40.0)], [made(claimed=39.0)], [made(claimed=12.0)])
    assert both.alive(20.0)[ALICE.peer_id].expires == 39.0
    merge = merged([made()])
    merge.heard(ALICE.peer_id, [made(claimed=30.0)])
    assert merge.alive(20.0)[ALICE.peer_id].expires == 30.0
    assert merged([], own=[made(claimed=30.0)]).alive(20.0)[ALICE.peer_id].expires == 30.0


def test_a_fast_clock_shortens_as_all_keepers_say() -> None:
    assert merged([made(claimed=4.0)], [made(claimed=4.1)]).alive(4.05)[ALICE.peer_id].expires == 4.1
    assert merged([made(claimed=4.0)], [made(claimed=4.1)]).alive(5.0) == {}


def test_what_is_over_hides_its_elders() -> None:
    assert merged([made(2, end=5.0)], [made(1, end=100.0)]).alive(6.0) == {}
