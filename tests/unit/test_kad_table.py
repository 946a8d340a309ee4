"""Ids and the routing table: places, order, replacement, what is stale."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import RemoteError
from p2p.identity import PeerId, peer_id_of
from p2p.kad.ids import BITS, bucket_index, key_id, node_id, random_in_bucket
from p2p.kad.table import MAX_LOST, Contact, Table


def peers(count: int, seed: int = 0) -> list[PeerId]:
    rng = Random(seed)
    return [peer_id_of(rng.randbytes(32)) for _ in range(count)]


def contact(peer: PeerId, port: int = 1) -> Contact:
    return Contact(peer, (f"/ip4/10.0.0.1/tcp/{port}",))


def test_node_id_is_the_hash_of_the_key_and_keys_have_the_hash_of_their_text() -> None:
    peer = peer_id_of(bytes(32))  # SHA-256 of 32 zeros, as any other tool prints it
    assert node_id(peer) == 0x66687AADF862BD776C8FC18B8E9F8E20089714856EE233B3902A591D0D5F2925
    assert key_id("") == 0xE3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855


def test_what_is_no_peer_id_has_no_place() -> None:
    for text in ("", "12D3Koo", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "0OIl", "é"):
        with pytest.raises(RemoteError):
            Contact(PeerId(text))


@given(st.integers(0, (1 << BITS) - 1), st.integers(0, BITS - 1), st.integers(0, 2**32))
def test_random_in_bucket_lands_in_that_bucket(own: int, index: int, seed: int) -> None:
    assert bucket_index(own, random_in_bucket(own, index, Random(seed))) == index


def test_nearest_is_ordered_by_distance() -> None:
    own, *others = peers(60)
    table = Table(own, k=20)
    known = [peer for peer in others if table.heard(contact(peer), 0.0)]
    target = key_id("somewhere")
    expected = sorted(known, key=lambda peer: node_id(peer) ^ target)
    assert [found.peer for found in table.nearest(target, 7)] == expected[:7]
    assert len(table) == len(known)
    assert set(expected) == {found.peer for found in table}


def test_a_full_bucket_keeps_its_elders_and_the_freshest_newcomer_replaces_who_fails() -> None:
    own, *others = peers(200)
    table = Table(own, k=3)
    far = [peer for peer in others if bucket_index(node_id(own), node_id(peer)) == 0]
    elders, newcomers = far[:3], far[3:9]
    assert all(table.heard(contact(peer), 0.0) for peer in elders)
    assert not any(table.heard(contact(peer), 1.0) for peer in newcomers)
    assert {found.peer for found in table} == set(elders)
    table.failed(elders[1])
    assert {found.peer for found in table} == {elders[0], elders[2], newcomers[-1]}
    assert table.lost[0].peer == elders[1]
    table.failed(newcomers[0])  # unknown by now: only k replacements are remembered
    assert len(table) == 3


def test_own_id_never_enters_and_addresses_are_replaced_by_newer_ones() -> None:
    own, other = peers(2)
    table = Table(own)
    assert not table.heard(contact(own), 0.0)
    table.heard(contact(other, 1), 0.0)
    table.heard(contact(other, 2), 1.0)
    table.heard(Contact(other), 2.0)
    assert table.find(other) == contact(other, 2)
    assert len(table) == 1


def test_lost_contacts_are_bounded_and_forgotten_once_heard() -> None:
    own, *others = peers(MAX_LOST + 10)
    table = Table(own, k=1000)
    for peer in others:
        table.heard(contact(peer), 0.0)
        table.failed(peer)
    assert len(table) == 0
    assert [lost.peer for lost in table.lost] == others[::-1][:MAX_LOST]
    table.heard(contact(others[-1]), 0.0)
    assert others[-1] not in {lost.peer for lost in table.lost}


def test_stale_buckets_are_those_not_heard_or_asked_for() -> None:
    own, *others = peers(40)
    table = Table(own)
    assert table.stale(100.0) == []
    for peer in others:
        table.heard(contact(peer), 50.0)
    deepest = max(bucket_index(node_id(own), node_id(peer)) for peer in others)
    assert table.stale(100.0) == list(range(deepest + 1))
    table.refreshed(0, 120.0)
    assert table.stale(100.0) == list(range(1, deepest + 1))
