"""Cells: one place a round for everybody, nested where views differ, mixed anew every round."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import cast

import numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.averaging import cells, shares
from p2p.averaging.roster import RoundKey
from p2p.identity import PeerId

NAMES = [cast(PeerId, f"m{i}") for i in range(1000)]


def key(number: int) -> RoundKey:
    return RoundKey(run="r", stage=1, number=number)


def groups(number: int, peers: list[PeerId], size: int) -> list[list[PeerId]]:
    """Who meets whom where all know all, by the rules of a leader."""
    halved = cells.halvings(len(peers))
    found = []
    for place in range(1 << halved):
        inside = sorted(
            (p for p in peers if cells.cell(key(number), p, halved) == place), key=key(number).rank
        )
        start = 0
        for count in shares.groups(len(inside), size) if inside else []:
            found.append(inside[start : start + count])
            start += count
    return found


@given(st.integers(0, 5000))
def test_cells_hold_what_a_leader_can_take_and_small_stages_are_one(candidates: int) -> None:
    halved = cells.halvings(candidates)
    assert candidates / 2**halved <= cells.GATHER
    assert halved == 0 or candidates / 2**halved > cells.GATHER / 2


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 50), st.integers(2, 400), st.sampled_from([3, 16, 32, 64]))
def test_everybody_is_in_one_group_of_at_most_that_size(number: int, count: int, size: int) -> None:
    peers = NAMES[:count]
    found = groups(number, peers, size)
    assert Counter(peer for group in found for peer in group) == Counter(peers)
    assert all(1 <= len(group) <= size for group in found)
    assert (
        groups(number, peers[::-1], size) == found
    )  # whoever computes it, in whatever order they were heard of


@given(st.integers(0, 1 << 50), st.integers(0, 8), st.sampled_from(NAMES))
def test_views_that_differ_give_cells_inside_each_other(number: int, halved: int, me: PeerId) -> None:
    larger = cells.mates(key(number), me, halved, NAMES[:100])
    smaller = cells.mates(key(number), me, halved + 1, NAMES[:100])
    assert smaller <= larger
    assert me not in larger


def test_a_thousand_replicas_mix_in_a_few_rounds() -> None:
    values = dict(zip(NAMES, numpy.random.default_rng(3).standard_normal(1000), strict=True))
    spreads = []
    met: dict[PeerId, set[PeerId]] = {peer: {peer} for peer in NAMES}
    for number in range(4):
        before = {peer: set(others) for peer, others in met.items()}
        for group in groups(number, NAMES, 32):
            mean = float(numpy.mean([values[peer] for peer in group]))
            heard = set().union(*(before[peer] for peer in group))
            values |= dict.fromkeys(group, mean)
            for peer in group:
                met[peer] = heard
        spreads.append(float(numpy.std(list(values.values()))))
    assert all(len(heard) == 1000 for heard in met.values())
    # Groups of n leave 1/n of the variance: of 16 to 32 members here.
    assert all(after < 0.3 * before for before, after in itertools.pairwise([1.0, *spreads])), spreads
