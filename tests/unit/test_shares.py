"""Shares: every part has one reducer, the split is fair, and nobody's weight runs away."""

from __future__ import annotations

import itertools
import struct

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.averaging import shares
from p2p.averaging.deadline import FLOOR_S, exchange_seconds
from p2p.averaging.meter import Meter
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


@pytest.mark.parametrize("reducers", [2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("floats", [2_500_000, 10_000_000, 16_777_216, 50_000_000, 300_000_000, 500_000_000])
def test_equal_members_reduce_as_many_parts_each(floats: int, reducers: int) -> None:
    spans = shares.spans(floats, shares.part_size(floats, reducers, shares.PART_BYTES))
    parts = len(spans)
    owners = shares.owners(parts, [1 / reducers] * reducers)
    assert {owners.count(member) for member in range(reducers)} == {parts // reducers}
    sizes = [0] * reducers
    for owner, (begin, end) in zip(owners, spans, strict=True):
        sizes[owner] += end - begin
    assert max(sizes) - min(sizes) <= parts * shares.ALIGNMENT


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


SPEEDS = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1, 1e4)), st.booleans()), min_size=2, max_size=20
)


def slowest(mbps: list[float], portions: list[float]) -> float:
    """When the last member is done, in vectors a megabit a second."""
    n = len(mbps)
    return max((1 + (n - 2) * share) / speed for speed, share in zip(mbps, portions, strict=True))


@given(SPEEDS, st.floats(0.001, 1000))
def test_portions_are_whole_and_none_for_who_cannot_be_dialled(
    members: list[tuple[float, bool]], unit: float
) -> None:
    mbps, dialled = [speed for speed, _ in members], [reachable for _, reachable in members]
    portions = shares.portions(mbps, dialled)
    assert sum(portions) == pytest.approx(1)
    assert all(portion >= 0 for portion in portions)
    if any(dialled):
        assert all(reachable or not portion for reachable, portion in zip(dialled, portions, strict=True))
    for i, j in itertools.permutations(range(len(members)), 2):
        if dialled[i] == dialled[j] and 0 < mbps[i] <= mbps[j]:
            assert portions[i] <= portions[j] + 1e-9
    assert shares.portions([speed * unit for speed in mbps], dialled) == pytest.approx(portions)


@settings(max_examples=50)
@given(st.data(), st.integers(1, 8))
def test_no_other_shares_would_be_faster(data: st.DataObject, n: int) -> None:
    # Around a median of 100, within what is believed, and so far apart that it is believed to differ.
    speeds = st.sampled_from([30.0, 60.0, 180.0, 350.0])
    mbps = data.draw(st.lists(speeds, min_size=n, max_size=n)) + [100.0] * (n + 1)
    dialled = [*data.draw(st.lists(st.booleans(), min_size=2 * n, max_size=2 * n)), True]
    others = data.draw(st.lists(st.floats(0.01, 1), min_size=2 * n + 1, max_size=2 * n + 1))
    others = [other if reachable else 0.0 for other, reachable in zip(others, dialled, strict=True)]
    best = slowest(mbps, shares.portions(mbps, dialled))
    assert best <= slowest(mbps, [other / sum(others) for other in others]) + 1e-9


def test_equal_unknown_and_boasted_speeds() -> None:
    assert shares.portions([0, 0, 0, 0], [True] * 4) == [0.25] * 4
    assert shares.portions([90, 100, 110, 0], [True] * 4) == [0.25] * 4  # as exact as measuring is
    assert shares.portions([100, 100, 100, 1e9], [True] * 4) == shares.portions(
        [100, 100, 100, 400], [True] * 4
    )
    assert shares.portions([100, 100, 100, 1], [True] * 4)[3] == 0  # its own numbers are all that it can send
    assert shares.portions([1, 1000], [True, True]) == [0.5, 0.5]
    assert shares.portions([5, 5, 5], [False] * 3) == pytest.approx([1 / 3] * 3)


def test_a_fast_member_reduces_more_and_one_without_weight_too() -> None:
    made = roster(
        candidate("slow"), attrs.evolve(candidate("fast"), bandwidth=300.0), candidate("usual"),
        candidate("worker", weight=0.0), candidate("hidden", addrs=()), floats=1_000_000,
    )  # fmt: skip
    share = dict(zip(made.peers, made.shares, strict=True))
    assert share["fast"] > share["slow"] == share["worker"] > share["hidden"] == 0.0  # type: ignore[index]
    assert set(made.owners) == {i for i, peer in enumerate(made.peers) if peer != "hidden"}


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
    assert exchange_seconds([], 40_000_000, 4, [0, 1000, 200]) == pytest.approx(3 * 2.4 + 2)
    assert exchange_seconds([100.0], 40_000_000, 4, [200]) == pytest.approx(3 * 2.4 + 2)


def test_the_meter_finds_the_busiest_second_and_says_nothing_of_shorter_rounds() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    with meter.sending():
        for _ in range(9):  # a slow start
            meter.sent(100_000)
            now += 0.1
        assert meter.mbps == 0.0
        for _ in range(20):
            meter.sent(500_000)
            now += 0.1
        now = 100.0  # a receiver that takes nothing
        meter.sent(1_000_000)
    assert meter.mbps == pytest.approx(5_000_000 * 8 / 1e6, rel=0.11)  # to one message


def test_the_meter_counts_no_time_in_which_there_is_nothing_to_send() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    for _ in range(10):
        with meter.sending(), meter.sending():  # two lines, one of which has more
            for _ in range(3):
                now += 0.05
                meter.sent(250_000)
        with meter.sending():
            now += 0.05
            meter.sent(250_000)
        now += 2.0
    assert meter.mbps == pytest.approx(5_000_000 * 8 / 1e6, rel=0.06)
