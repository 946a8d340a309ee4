"""Who is handed what: newcomers what they are near to, heirs what somebody leaves behind."""

from __future__ import annotations

from random import Random

import pytest

from p2p.identity import peer_id_of
from p2p.kad.handover import HANDERS, gained, inherited
from p2p.kad.ids import key_id
from p2p.kad.table import Contact

KEYS = [f"key/{number}" for number in range(40)]
REPLICAS = 8


def swarm(count: int) -> list[Contact]:
    rng = Random(count)
    return [Contact(peer_id_of(rng.randbytes(32))) for _ in range(count)]


def nearest(nodes: list[Contact], key: str) -> list[Contact]:
    return sorted(nodes, key=lambda node: node.id ^ key_id(key))[:REPLICAS]


@pytest.mark.parametrize("count", [1, 5])
def test_newcomers_are_handed_each_key_they_are_near_to_by_the_elders_nearest(count: int) -> None:
    nodes = swarm(60)
    elders, newcomers = nodes[count:], nodes[:count]
    fresh = {node.peer for node in newcomers}
    handed = set[tuple[str, str, str]]()
    for node in elders:
        nearby = [other for other in nodes if other != node]
        for newcomer in newcomers:
            for key in gained(newcomer, node.id, nearby, KEYS, REPLICAS, fresh):
                handed.add((node.peer, newcomer.peer, key))
    assert handed == {
        (hander.peer, newcomer.peer, key)
        for key in KEYS
        for newcomer in newcomers
        if newcomer in nearest(nodes, key)
        for hander in nearest(elders, key)[:HANDERS]
    }
    assert handed


def test_in_a_small_swarm_a_newcomer_is_handed_everything() -> None:
    first, second, third = swarm(3)
    assert list(gained(third, first.id, [second, third], KEYS, REPLICAS, {third.peer})) == KEYS
    assert list(gained(second, first.id, [second], KEYS, REPLICAS, {second.peer})) == KEYS


def test_an_heir_is_who_becomes_one_of_the_nearest() -> None:
    nodes = swarm(60)
    leaver, others = nodes[0], nodes[1:]
    heirs = inherited(leaver.id, others, KEYS, REPLICAS)
    inheritance = {key: heir for heir, keys in heirs.items() for key in keys}
    for key in KEYS:
        if leaver in nearest(nodes, key):
            assert inheritance[key] == nearest(others, key)[-1].peer
        else:
            assert key not in inheritance
    assert inheritance
    assert inherited(leaver.id, others[: REPLICAS - 1], KEYS, REPLICAS) == {}
