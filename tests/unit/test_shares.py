"""Shares: every part has one reducer, the split is fair, and nobody's weight runs away."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.averaging import shares
from p2p.averaging.deadline import FLOOR_S, exchange_seconds
from p2p.averaging.reducer import PlainReducer
from p2p.averaging.roster import Candidate, Roster, RoundKey, draft
from p2p.errors import RemoteError

KEY = RoundKey(run="r", stage=1, number=7)


def candidate(name: str, weight: float = 1.0, addrs: tuple[str, ...] = ("/ip4/1.2.3.4/tcp/1",)) -> Candidate:
    return Candidate(peer=name, addrs=addrs, bandwidth=100.0, weight=weight)  # type: ignore[arg-type]


def roster(*members: Candidate, floats: int = 10_000) -> Roster:
    return draft(
        KEY,
        members[0].peer,
        list(members),
        slice_index=3,
        floats=floats,
        part_bytes=1 << 18,
        seconds=20.0,
    )


@given(st.integers(1, 1 << 24), st.integers(1, 64))
def test_parts_cover_the_vector_once_within_the_limits(floats: int, reducers: int) -> None:
    size = shares.part_size(floats, reducers, 1 << 18)
    spans = shares.spans(floats, size)
    assert len(spans) <= shares.MAX_PARTS
    assert size <= shares.MAX_PART_BYTES
    assert spans[0][0] == 0
    assert spans[-1][1] == floats * 4
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


@given(
    st.integers(1, 300), st.lists(st.sampled_from([0.0, 1.0, 2.5, 10.0]), min_size=1, max_size=9).filter(any)
)
def test_owners_follow_shares_within_one_part(parts: int, portions: list[float]) -> None:
    owners = shares.owners(parts, portions)
    assert owners == sorted(owners)
    for member, portion in enumerate(portions):
        exact = parts * portion / sum(portions)
        assert abs(owners.count(member) - exact) <= 1 + 1e-6
        assert portion or member not in owners


def test_nobody_can_reduce() -> None:
    with pytest.raises(ValueError, match="zero"):
        shares.owners(3, [0.0, 0.0])


def test_weights_are_clamped_to_four_medians_and_zero_stays_zero() -> None:
    assert shares.clamp([1.0, 2.0, 3.0, 1000.0, 0.0]) == [1.0, 2.0, 3.0, 10.0, 0.0]
    assert shares.clamp([0.0, 0.0]) == [0.0, 0.0]


@given(st.integers(2, 500), st.integers(3, 64))
def test_groups_are_never_alone_and_never_too_large(count: int, limit: int) -> None:
    sizes = shares.groups(count, limit)
    assert sum(sizes) == count
    assert min(sizes) >= 2
    assert max(sizes) <= limit


def test_a_roster_survives_the_wire_and_keeps_its_group() -> None:
    mine = roster(candidate("a"), candidate("b", 3.0), candidate("c", addrs=()))
    theirs = Roster.decode(mine.encoded)
    assert theirs == mine
    assert theirs.group == mine.group
    assert theirs.peers[0] == "c"  # cannot be dialled, so it dials
    assert theirs.shares[0] == 0.0
    assert [theirs.deputy(i) for i in range(3)] == [1, 2, 0]


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_roster_is_refused_or_another_group(position: int, byte: int) -> None:
    mine = roster(candidate("a"), candidate("b"))
    data = bytearray(mine.encoded)
    data[position % len(data)] = byte
    try:
        theirs = Roster.decode(bytes(data))
    except RemoteError:
        return
    assert theirs.group != mine.group or theirs == mine
    assert len(theirs.spans) <= shares.MAX_PARTS


def test_the_plain_reducer_means_and_refuses() -> None:
    reducer = PlainReducer(8)
    reducer.add(struct.pack("<2f", 1.0, 2.0), 1.0)
    for bad in (struct.pack("<2f", float("nan"), 1.0), struct.pack("<2f", 1.0, float("inf")), b"1234"):
        with pytest.raises(RemoteError):
            reducer.add(bad, 1.0)
    reducer.add(memoryview(struct.pack("<2f", 4.0, 8.0)), 2.0)
    assert struct.unpack("<2f", reducer.finish()) == (3.0, 6.0)


def test_an_exchange_is_given_three_medians_bounded_by_the_slowest_link() -> None:
    assert exchange_seconds([], 10**9, 4, [0, 0]) == float("inf")
    assert exchange_seconds([0.1, 0.1, 9.0], 10**6, 4, []) == FLOOR_S
    assert exchange_seconds([4.0, 4.0, 60.0], 10**6, 4, []) == 12.0
    # 40 MB of four members at 200 Mbit/s: 60 MB each way take 2.4 s.
    assert exchange_seconds([], 40_000_000, 4, [0, 1000, 200]) == pytest.approx(2 * 2.4 + 2)
    assert exchange_seconds([100.0], 40_000_000, 4, [200]) == pytest.approx(2 * 2.4 + 2)
