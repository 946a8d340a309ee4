"""Several callers, each with a router of its own, before replicas of every speed: in virtual time.

A replica works on one microbatch at a time, in the order in which they came, and has slots; a line lies
between it and each caller. Nobody tells anybody anything but what calls carry.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable

import attrs
import pytest

from p2p.identity import PeerId
from stage.messages import Load
from stage.router import NEIGHBOURS, Choice, Router

SLOTS = 8


@attrs.define
class Worker:
    """One replica."""

    service_s: float
    slots: int = SLOTS
    later_s: float = 0.0
    """What later stages take, in which it works on other microbatches."""
    working: int = 0
    free_at: float = 0.0
    done: int = 0

    @property
    def load(self) -> Load:
        return Load(self.slots - self.working, self.working, self.service_s)


class Swarm:
    """Callers and replicas, and what happens next."""

    def __init__(self, seed: int, workers: dict[PeerId, Worker], callers: int, credits: int) -> None:
        self.rng = random.Random(seed)
        self.workers = workers
        self.rtt_s: Callable[[int, PeerId], float] = lambda _caller, _peer: 0.01
        self.spread = 0.1
        self.now = 0.0
        self.order: list[PeerId] = []
        """Of the first caller's choices."""
        self.busy: Counter[PeerId] = Counter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.routers = [Router(random.Random(f"{seed} {caller}")) for caller in range(callers)]
        self.show()
        for caller in range(callers):
            for _ in range(credits):
                self.at(self.rng.random() * 0.01, lambda caller=caller: self.send(caller))

    def show(self) -> None:
        """Everybody hears of the replicas that there are."""
        roster = dict.fromkeys(self.workers, self.now)
        for router in self.routers:
            router.update(roster)

    def at(self, moment: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._number), what))

    def run(self, seconds: float) -> None:
        ends = self.now + seconds
        while self._events and self._events[0][0] <= ends:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = ends

    def send(self, caller: int) -> None:
        router = self.routers[caller]
        choice = router.choose(self.now)
        if choice is None:
            wait = router.wait_s(self.now)
            assert wait is not None
            self.at(self.now + max(0.005, wait), lambda: self.send(caller))
            return
        if caller == 0:
            self.order.append(choice.peer)
        began, way = self.now, self.rtt_s(caller, choice.peer) / 2
        self.at(began + way, lambda: self._arrive(caller, choice, began, way))

    def _arrive(self, caller: int, choice: Choice, began: float, way: float) -> None:
        worker = self.workers[choice.peer]
        if worker.working >= worker.slots:
            self.busy[choice.peer] += 1
            self.at(self.now + way, lambda: self._busy(caller, choice))
            return
        worker.working += 1
        service = worker.service_s * self.rng.uniform(1 - self.spread, 1 + self.spread)
        worker.free_at = max(self.now, worker.free_at) + service
        self.at(worker.free_at + worker.later_s, lambda: self._done(caller, choice, began, way))

    def _busy(self, caller: int, choice: Choice) -> None:
        service_s = self.workers[choice.peer].service_s
        self.routers[caller].busy(choice, self.now, min(2.0, max(0.02, service_s)))
        self.send(caller)

    def _done(self, caller: int, choice: Choice, began: float, way: float) -> None:
        worker = self.workers[choice.peer]
        worker.working -= 1
        worker.done += 1
        load = worker.load
        self.at(self.now + way, lambda: self._answered(caller, choice, began, load, 2 * way))

    def _answered(self, caller: int, choice: Choice, began: float, load: Load, rtt_s: float) -> None:
        self.routers[caller].answered(choice, self.now, self.now - began, load, rtt_s)
        self.send(caller)

    def rates(self, warm_s: float, seconds: float) -> dict[PeerId, float]:
        """How much of what it can do each replica does, after a while."""
        self.run(warm_s)
        before = {peer: worker.done for peer, worker in self.workers.items()}
        self.run(seconds)
        return {
            peer: (worker.done - before[peer]) / seconds * worker.service_s
            for peer, worker in self.workers.items()
        }

    def throughput(self, rates: dict[PeerId, float]) -> float:
        """Share of the sum of the replicas' rates."""
        able = {peer: 1 / worker.service_s for peer, worker in self.workers.items()}
        return sum(rates[peer] * able[peer] for peer in able) / sum(able.values())


def workers_of(*seconds: float, slots: int = SLOTS, later_s: float = 0.0) -> dict[PeerId, Worker]:
    return {PeerId(f"r{i}"): Worker(s, slots, later_s) for i, s in enumerate(seconds)}


MIXES = {
    "one of each": (0.1, 1.0),
    "a slow one among fast": (0.1, 0.1, 0.1, 1.0),
    "a fast one among slow": (0.1, 1.0, 1.0, 1.0, 1.0, 1.0),
    "every speed": (0.1, 0.15, 0.25, 0.4, 0.6, 1.0),
}


@pytest.mark.parametrize("callers", [1, 3, 8])
@pytest.mark.parametrize("mix", sorted(MIXES))
@pytest.mark.parametrize("later_s", [0.0, 1.0])
def test_ten_to_one_in_speed_loses_little(mix: str, callers: int, later_s: float) -> None:
    """With no more in flight than it takes, plus one for each replica and caller."""
    speeds = MIXES[mix]
    needed = sum(1 + (later_s + 0.01) / s for s in speeds) + len(speeds)
    credits = max(2, -(-int(needed + 1) // callers))
    swarm = Swarm(1, workers_of(*speeds, later_s=later_s, slots=64), callers, credits)
    rates = swarm.rates(30.0, 100.0)
    assert swarm.throughput(rates) >= 0.9, rates
    assert min(rates.values()) >= 0.5, "none starves while it could help"


@pytest.mark.parametrize("callers", [1, 4])
def test_with_far_too_much_in_flight_room_is_what_bounds(callers: int) -> None:
    swarm = Swarm(2, workers_of(*MIXES["every speed"]), callers, 80 // callers)
    rates = swarm.rates(20.0, 30.0)
    assert swarm.throughput(rates) >= 0.9, rates


def test_shares_follow_rates_where_there_is_too_little_to_do() -> None:
    """One in flight: each is asked in proportion to its speed, in turns and not in blocks."""
    swarm = Swarm(3, workers_of(0.1, 0.2, 0.4), 1, 1)
    swarm.run(60.0)
    asked = Counter(swarm.order[50:])
    assert asked["r0"] / asked["r1"] == pytest.approx(2.0, rel=0.15)
    assert asked["r1"] / asked["r2"] == pytest.approx(2.0, rel=0.15)
    assert max(len(list(same)) for _, same in itertools.groupby(swarm.order[50:])) <= 3


def test_a_replica_that_becomes_slow_loses_its_share_and_one_that_recovers_gets_it_back() -> None:
    workers = workers_of(0.1, 0.1, 0.1)
    swarm = Swarm(4, workers, 2, 6)
    first = PeerId("r0")
    swarm.run(30.0)
    workers[first].service_s = 1.0
    rates = swarm.rates(20.0, 60.0)
    assert swarm.throughput(rates) >= 0.9
    workers[first].service_s = 0.1
    rates = swarm.rates(20.0, 60.0)
    assert min(rates.values()) >= 0.85


def test_a_newcomer_gets_one_probe_and_then_its_share() -> None:
    workers = workers_of(0.2, 0.2, 0.2, later_s=2.0, slots=64)
    swarm = Swarm(5, workers, 1, 30)
    swarm.run(60.0)
    workers[PeerId("new")] = Worker(0.2, 64, 2.0)
    swarm.show()
    most = 0
    for _ in range(20):
        swarm.run(0.1)
        most = max(most, workers[PeerId("new")].working)
    assert most == 1, "until it has answered"
    rates = swarm.rates(20.0, 60.0)
    assert rates[PeerId("new")] >= 0.6


def test_the_nearer_of_equals_is_preferred() -> None:
    swarm = Swarm(6, workers_of(0.05, 0.05), 1, 1)
    swarm.rtt_s = lambda _caller, peer: 0.2 if peer == "r0" else 0.01
    swarm.run(60.0)
    asked = Counter(swarm.order[20:])
    assert asked["r1"] > 2 * asked["r0"] > 0


def test_one_that_boasts_of_its_speed_gets_no_more_than_it_does() -> None:
    """It says a hundredth of what it takes. Its backlog shows: the others lose little of their work."""
    workers = workers_of(0.1, 0.1, 0.1, 1.0)
    boaster = workers[PeerId("r3")]
    swarm = Swarm(7, workers, 2, 12)

    @property
    def boast(self: Worker) -> Load:
        return Load(self.slots - self.working, self.working, 0.01 if self is boaster else self.service_s)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Worker, "load", boast)
        rates = swarm.rates(30.0, 120.0)
    assert swarm.throughput(rates) >= 0.9, rates


def test_a_choice_among_thousands_looks_at_a_few_and_keeps_to_few() -> None:
    workers = {PeerId(f"r{number}"): Worker(0.5) for number in range(3000)}
    swarm = Swarm(8, workers, 1, 8)
    swarm.run(100.0)
    assert 16 <= len(set(swarm.order)) <= NEIGHBOURS


def test_who_has_much_in_flight_reaches_all_of_a_large_stage() -> None:
    workers = {PeerId(f"r{number}"): Worker(0.5) for number in range(100)}
    swarm = Swarm(9, workers, 1, 200)
    rates = swarm.rates(10.0, 20.0)
    assert swarm.throughput(rates) >= 0.9
    assert min(rates.values()) >= 0.5
