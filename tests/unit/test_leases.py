"""Leases of shards, between trainers that are simulated: they come, fall silent, come back, and disagree."""

from __future__ import annotations

import random

import attrs
import pytest

from p2p.identity import Identity, PeerId
from p2p.records import LeaseRecord
from stage.data import Cursor
from stage.leases import LEASE_S, SKEW_S, TOLD, TURN_S, Leases, claim_of, progress_of
from stage.progress import Shard

PEERS = [Identity.generate(bytes([number]) * 32).peer_id for number in range(1, 6)]
OVER_S = LEASE_S + SKEW_S + 5 * TURN_S
LOOK_S = 5.0


@attrs.define
class Trainer:
    """One that does some work whenever it looks."""

    leases: Leases
    progress: dict[int, Shard] = attrs.field(factory=dict)
    back: list[int] = attrs.field(factory=list)

    def shard(self, number: int) -> Shard:
        return self.progress.setdefault(number, Shard())


class World:
    """Trainers that see each other's records at once."""

    def __init__(self, count: int) -> None:
        self.peers = PEERS[:count]
        self.now = 1000.0
        self.records: dict[PeerId, LeaseRecord] = {}
        self.trainers: dict[PeerId, Trainer] = {}
        self.journals: dict[PeerId, dict[int, Shard]] = {}

    def start(self, peer: PeerId, data: str = "same") -> Trainer:
        progress = self.journals.setdefault(peer, {})
        self.trainers[peer] = Trainer(Leases(peer, self.peers, data, self.now), progress)
        return self.trainers[peer]

    def look(self, peer: PeerId) -> None:
        trainer = self.trainers[peer]
        look = trainer.leases.look(self.now, self.records)
        for number, told in look.take:
            if told is not None and told.mark >= trainer.shard(number).mark:
                trainer.progress[number] = told
            theirs = [record for owner, record in self.records.items() if owner in self.peers]
            published = [claim.mark for record in theirs for claim in record.claims if claim.shard == number]
            assert trainer.shard(number).mark >= max(published, default=0), "nothing is begun anew"
        for number in look.give_back:
            trainer.leases.free(number)
            trainer.back.append(number)
        for number in trainer.leases.held:
            shard = trainer.shard(number)
            for _ in range(3):
                shard.add(shard.mark)
        self.records[peer] = trainer.leases.record(self.now, trainer.shard)
        assert LeaseRecord.from_value(self.records[peer].to_value()) == self.records[peer]

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            for peer in list(self.trainers):
                self.look(peer)
            self.now += LOOK_S

    def held(self, peer: PeerId) -> list[int]:
        return sorted(self.trainers[peer].leases.held)


def test_everybody_works_on_a_shard_of_its_own() -> None:
    world = World(3)
    for peer in world.peers:
        world.start(peer)
    world.run(200)
    assert [world.held(peer) for peer in world.peers] == [[0], [1], [2]]
    assert all(
        trainer.leases.record(0, trainer.shard).claims[0].term == 0 for trainer in world.trainers.values()
    )


def test_the_shard_of_one_that_is_gone_passes_on_and_goes_home_again() -> None:
    world = World(3)
    for peer in world.peers:
        world.start(peer)
    world.run(60)
    gone = world.peers[1]
    mark = world.trainers[gone].shard(1).mark
    del world.trainers[gone]
    world.run(LEASE_S + SKEW_S)
    assert sum(len(world.held(peer)) for peer in world.trainers) == 2, "its claim still stands"
    world.run(OVER_S)
    assert world.held(world.peers[0]) == [0]
    assert world.held(world.peers[2]) == [1, 2], "the next one in turn"
    assert world.trainers[world.peers[2]].shard(1).mark > mark
    back = world.start(gone)
    world.run(4 * LOOK_S)
    assert [world.held(peer) for peer in world.peers] == [[0], [1], [2]]
    assert world.trainers[world.peers[2]].back == [1]
    assert back.shard(1).mark > mark + 3
    assert back.leases.held == {1: 2}
    world.run(200)
    assert [world.held(peer) for peer in world.peers] == [[0], [1], [2]]


def test_a_quick_restart_changes_no_hands() -> None:
    world = World(2)
    for peer in world.peers:
        world.start(peer)
    world.run(60)
    mark = world.trainers[world.peers[0]].shard(0).mark
    world.start(world.peers[0])
    world.look(world.peers[0])
    assert world.trainers[world.peers[0]].leases.held == {0: 0}
    assert world.trainers[world.peers[0]].shard(0).mark == mark + 3
    world.run(100)
    assert [world.held(peer) for peer in world.peers] == [[0], [1]]


def test_those_who_never_came_are_stood_in_for() -> None:
    world = World(5)
    world.start(world.peers[2])
    world.run(OVER_S + LOOK_S)
    assert world.held(world.peers[2]) == [0, 1, 2, 3, 4]
    late = world.start(world.peers[4])
    world.run(4 * LOOK_S)
    assert world.held(world.peers[4]) == [4]
    assert late.shard(4).mark > 0


def test_one_that_was_silent_lets_go() -> None:
    world = World(2)
    for peer in world.peers:
        world.start(peer)
    world.run(60)
    frozen = world.trainers.pop(world.peers[0])
    world.run(OVER_S)
    assert world.held(world.peers[1]) == [0, 1]
    assert list(frozen.leases.held) == [0], "it does not know yet"
    world.trainers[world.peers[0]] = frozen
    look = frozen.leases.look(world.now, world.records)
    assert look.drop == (0,)
    world.run(6 * LOOK_S)
    assert [world.held(peer) for peer in world.peers] == [[0], [1]]


def test_other_data_are_not_gone_on_with() -> None:
    world = World(2)
    world.start(world.peers[0])
    world.start(world.peers[1], data="other")
    world.run(60)
    del world.trainers[world.peers[1]]
    world.run(OVER_S)
    leases = world.trainers[world.peers[0]].leases
    assert world.held(world.peers[0]) == [0]
    assert leases.hopeless(1)
    assert not leases.hopeless(0)
    assert leases.completed(1) == world.records[world.peers[1]].claims[0].completed > 0


def test_what_strangers_claim_is_nothing() -> None:
    world = World(2)
    for peer in world.peers:
        world.start(peer)
    claim = claim_of(0, 1 << 40, "held", Shard(7))
    world.records[PEERS[4]] = LeaseRecord(until=1e9, data="same", claims=(claim,))
    world.run(60)
    assert [world.held(peer) for peer in world.peers] == [[0], [1]]


def test_a_claim_tells_how_far_a_shard_is() -> None:
    shard = Shard(40, set(range(41, 141, 2)), Cursor(1, 0, 3, 32))
    claim = claim_of(3, 2, "held", shard)
    assert (claim.completed, len(claim.done)) == (90, TOLD)
    told = progress_of(claim)
    assert (told.mark, told.cursor) == (shard.mark, shard.cursor)
    assert told.done < shard.done


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_nothing_is_begun_anew_and_all_comes_to_rest(seed: int) -> None:
    """Random ends, restarts and freezes; afterwards everybody has its own shard again."""
    rng = random.Random(seed)
    world = World(4)
    frozen: dict[PeerId, Trainer] = {}
    for _ in range(60):
        peer = rng.choice(world.peers)
        if peer in frozen:
            world.trainers[peer] = frozen.pop(peer)
        elif peer not in world.trainers:
            world.start(peer)
        elif rng.random() < 0.5:
            frozen[peer] = world.trainers.pop(peer)
        else:
            del world.trainers[peer]
        world.run(rng.choice([5, 20, 60, 120]))
    for peer in world.peers:
        if peer not in world.trainers:
            world.trainers[peer] = frozen.pop(peer) if peer in frozen else world.start(peer)
    world.run(OVER_S)
    assert [world.held(peer) for peer in world.peers] == [[0], [1], [2], [3]]
