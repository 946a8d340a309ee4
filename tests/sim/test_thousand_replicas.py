"""Whole stages in virtual time: matchmaking and butterfly of every replica, while a fifth fails every round.

``Stage`` is a ``Town`` whose members go on to the exchange once they hold a roster. A replica that fails does
so without a word: before the round, or at any moment of its first seconds; who shares a line with it notices
after two seconds of silence. Next round it is back, with the numbers it had. Everybody knows nine mates of
ten, each others; what travels on a line keeps its order.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy
import pytest

from p2p.averaging.butterfly import Exchange
from p2p.averaging.cells import GATHER
from p2p.averaging.lobby import RoundConfig
from p2p.averaging.outcome import Outcome
from p2p.averaging.roster import RoundKey
from p2p.averaging.session import LINK_S
from stage.reduce import KernelReducer
from tests.unit.test_matchmaking import Member, Town, sign_as, verify

SILENT = 0.2
KNOWN = 0.9
SLICES = 2
FLOATS = 1024
"""A slice."""
NOTICE_S = 2.0
SECONDS = 20.0


class Replica(Member):
    """A member that averages what it is given."""

    def __init__(self, town: Stage, peer: str, weight: float, expected: Sequence[str]) -> None:
        super().__init__(town, peer, weight, expected)
        self.stage = town
        self.vector = town.vectors[int(peer[1:])]
        self.exchange: Exchange | None = None
        self.early: list[tuple[str, Any]] = []
        """What mates said that got the commit before this one."""
        self.alarm = -1.0

    @property
    def outcome(self) -> Outcome | None:
        return self.exchange.outcome if self.exchange and not self.deaf else None

    def silence(self) -> None:
        self.deaf = True
        for other in self.mates():
            self.stage.at(self.stage.now + NOTICE_S, lambda other=other: other.lose(self.peer))  # type: ignore[misc]

    def mates(self) -> list[Replica]:
        roster = self.maker and self.maker.roster
        return [self.stage.replica(p) for p in roster.peers if p != self.peer] if roster else []

    def drain(self) -> None:
        super().drain()
        if self.maker is None or self.maker.roster is None or self.exchange is not None:
            return
        roster, town = self.maker.roster, self.stage
        self.exchange = Exchange(
            roster, self.peer, memoryview(self.vector.tobytes()), KernelReducer,  # type: ignore[arg-type]
            sign_as(self.peer), verify, town.now, min(roster.seconds, SECONDS - town.now),  # type: ignore[arg-type]
        )  # fmt: skip
        for mate in self.mates():
            if mate.deaf:
                town.at(town.now + NOTICE_S, lambda mate=mate: self.lose(mate.peer))  # type: ignore[misc]
            town.at(town.now + LINK_S, lambda mate=mate: self.look_for(mate))  # type: ignore[misc]
        self.exchange.start()
        early, self.early = self.early, []
        for sender, message in early:
            self.hear(sender, message)
        self.pump()

    def look_for(self, mate: Replica) -> None:
        assert self.maker is not None
        theirs = mate.maker and mate.maker.roster
        if not theirs or theirs.group != self.maker.roster.group:  # type: ignore[union-attr]
            self.lose(mate.peer)

    def lose(self, peer: str) -> None:
        exchange = self.exchange
        if exchange is not None and not self.deaf:
            exchange.lost(exchange.roster.peers.index(peer), "silent")  # type: ignore[arg-type]
            self.pump()

    def receive(self, sender: str, kind: str, value: Any) -> None:
        self.stage.trace.update(f"{self.stage.now:.9f} {sender} {self.peer} {kind}\n".encode())
        if kind != "line":
            super().receive(sender, kind, value)
        elif self.exchange is None:
            self.early.append((sender, value))
        elif not self.deaf:
            self.hear(sender, value)
            self.pump()

    def hear(self, sender: str, message: tuple[bytes, Any, bytes]) -> None:
        exchange = self.exchange
        assert exchange is not None
        group, header, payload = message
        if group == exchange.roster.group:
            exchange.heard(exchange.roster.peers.index(sender), header, memoryview(payload))  # type: ignore[arg-type]

    def pump(self) -> None:
        exchange, town = self.exchange, self.stage
        assert exchange is not None
        out, exchange.out = exchange.out, []
        for send in out:
            message = (exchange.roster.group, send.header, bytes(send.payload))
            town.send(self.peer, exchange.roster.peers[send.to], "line", message)
        if exchange.done:
            self.ended = town.now
        elif exchange.wake_at() != self.alarm:
            self.alarm = exchange.wake_at()
            town.at(max(self.alarm, town.now), self.ring)

    def ring(self) -> None:
        exchange = self.exchange
        assert exchange is not None
        if not self.deaf and not exchange.done and self.stage.now >= exchange.wake_at():
            exchange.tick(self.stage.now)
            self.alarm = -1.0
            self.pump()


class Stage(Town):
    """One round of a whole stage."""

    def __init__(self, vectors: Any, number: int, seed: int, trace: Any) -> None:
        self.vectors = vectors
        self.trace = trace
        super().__init__(
            [1.0] * len(vectors),
            seed,
            config=RoundConfig(),
            key=RoundKey(run="r", stage=2, number=number),
            floats=vectors.shape[1],
        )

    def member(self, name: str, weight: float, expected: Sequence[str]) -> Member:
        return Replica(self, name, weight, [mate for mate in expected if self.rng.random() < KNOWN])

    def replica(self, name: str) -> Replica:
        found = self.members[name]
        assert isinstance(found, Replica)
        return found

    def average(self) -> None:
        """Run the round; what finished is in ``vectors``."""
        for name in self.members:
            replica = self.replica(name)
            if self.rng.random() < SILENT:
                when = 0.0 if self.rng.random() < 0.5 else self.rng.uniform(0.0, 4.0)
                self.at(when, replica.silence)
        self.run([self.rng.uniform(0.0, 1.5) for _ in self.members])
        for i, name in enumerate(self.members):
            replica = self.replica(name)
            outcome = replica.outcome
            if outcome is not None:
                self.trace.update(outcome.checksum.encode())
                self.vectors[i] = numpy.frombuffer(bytes(outcome.vector), "<f4")

    def check(self) -> None:
        """Nobody hangs; who finished in one group holds the same bytes; nobody is in two groups."""
        finished: dict[bytes, set[str]] = {}
        for name in self.members:
            replica = self.replica(name)
            if replica.deaf:
                continue
            assert replica.maker is not None
            assert replica.maker.done
            assert replica.exchange is None or replica.exchange.done
            assert replica.ended is not None
            assert replica.ended <= SECONDS + 2.0
            if replica.outcome is not None and replica.maker.roster is not None:
                finished.setdefault(replica.maker.roster.group, set()).add(replica.outcome.checksum)
        assert all(len(checksums) == 1 for checksums in finished.values())


def disagreement(vectors: Any) -> float:
    """Of the replicas, as the spread around their mean."""
    return float(numpy.sqrt(((vectors - vectors.mean(axis=0)) ** 2).mean()))


def cycles(replicas: int, count: int, seed: int) -> tuple[list[float], list[str]]:
    """The disagreement before and after each of ``count`` cycles, and the trace of what was said by then."""
    state = numpy.random.default_rng(seed).standard_normal((SLICES, replicas, FLOATS)).astype("<f4")
    trace, found, traces = hashlib.sha256(), [disagreement(state.swapaxes(0, 1))], []
    rng = random.Random(seed)
    for number in range(1, count * SLICES + 1):
        stage = Stage(state[number % SLICES], number, rng.randrange(1 << 30), trace)
        stage.average()
        stage.check()
        if number % SLICES == 0:
            found.append(disagreement(state.swapaxes(0, 1)))
            traces.append(trace.hexdigest())
    return found, traces


def contracts(found: Sequence[float]) -> None:
    """A fifth keeps what it has: about that much of the variance is left, and what groups differ by."""
    for before, after in itertools.pairwise(found):
        assert after < 0.75 * before, found


def test_a_stage_of_two_cells_contracts_and_its_trace_repeats() -> None:
    found, traces = cycles(GATHER + 6, 2, seed=4)
    contracts(found)
    assert cycles(GATHER + 6, 1, seed=4)[1] == traces[:1]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_thousand_replicas_of_which_a_fifth_fails_every_round() -> None:
    found, traces = cycles(1000, 2, seed=5)
    contracts(found)
    assert cycles(1000, 1, seed=5)[1] == traces[:1]
