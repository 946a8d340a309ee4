"""What a simulation moves about: replicas, trainers, microbatches and their attempts; and its report."""

from __future__ import annotations

import random
import sys
from collections import deque
from typing import Final, final

import attrs

from p2p.identity import PeerId
from stage.appointments import Appointments
from stage.credits import Credits
from stage.router import Choice, Router
from stage.scenario import Cost, Worker

VIEW: Final = 32
"""Replicas of the next stage that a worker knows in a large swarm."""


@attrs.frozen(kw_only=True)
class StageReport:
    """One stage's share."""

    replicas: int
    """Serving at the end."""
    utilisation: float
    """Share of serving replicas' time in which they computed."""
    idle_most: float
    """The same of the least used replica that served throughout; 1 if none did."""
    added: int
    """Microbatches whose gradient was added, repetitions included."""


@attrs.frozen(kw_only=True)
class Report:
    """What came of a simulated run. Rates are those after the first tenth."""

    issued: int
    completed: int
    in_flight: int
    lost: int
    """Issued, not completed, and nothing will happen with them any more: 0."""
    microbatches_per_second: float
    tokens_per_second: float
    seconds_p50: float
    seconds_p95: float
    """From end to end."""
    rerouted: int
    busy: int
    wasted: float
    """Share of the compute that came to nothing: done for microbatches whose replica left, or twice."""
    departures: int
    moves: int
    stages: tuple[StageReport, ...]
    grain: int
    events: int


@final
class SimReplica:
    """A node that serves a stage, or is away."""

    __slots__ = (
        "added",
        "appointments",
        "back",
        "busy_s",
        "computing",
        "cost",
        "down_free",
        "forward",
        "hops",
        "known_by",
        "most",
        "number",
        "peer",
        "router",
        "scale",
        "served_s",
        "serving",
        "since",
        "slots",
        "stage",
        "up_free",
        "view",
        "worker",
    )

    def __init__(self, number: int, worker: Worker, cost: Cost, slots: int, rng: random.Random) -> None:
        self.number = number
        self.peer = PeerId(f"node-{number:06}")
        self.worker = worker
        self.stage = worker.stage
        self.cost = cost
        self.scale = 1.0 / worker.speed
        self.appointments = Appointments()
        self.router = Router(random.Random(rng.random()))
        self.view: dict[PeerId, float] = {}
        self.most = VIEW
        self.known_by: dict[int, Sender] = {}
        self.serving = False
        self.since = 0.0
        self.served_s = 0.0
        self.busy_s = 0.0
        self.added = 0
        self.reset(slots, 0.0)

    def reset(self, slots: int, now: float) -> None:
        """Nothing in progress, lines free."""
        self.slots = slots
        self.up_free = self.down_free = now
        self.back: deque[Hop] = deque()
        self.forward: deque[Hop] = deque()
        self.computing = False
        self.hops: dict[int, Hop] = {}


@final
class SimTrainer:
    """A sender without a line to wait for."""

    __slots__ = ("credits", "in_flight", "most", "number", "router", "view")

    def __init__(self, number: int, rng: random.Random) -> None:
        self.number = -1 - number
        self.credits = Credits()
        self.in_flight = 0
        self.router = Router(random.Random(rng.random()))
        self.view: dict[PeerId, float] = {}
        self.most = sys.maxsize


Sender = SimReplica | SimTrainer


@final
class SimMicrobatch:
    __slots__ = ("at", "began", "trainer")

    def __init__(self, trainer: SimTrainer, began: float) -> None:
        self.trainer = trainer
        self.began = began
        self.at: dict[int, Hop] = {}
        """The living hop of each stage."""


@final
class Hop:
    """One attempt of a microbatch at one replica."""

    __slots__ = ("asked_at", "caller", "choice", "dead", "done", "microbatch", "replica", "spent_s", "stage")

    def __init__(
        self,
        microbatch: SimMicrobatch,
        replica: SimReplica,
        stage: int,
        caller: Hop | None,
        choice: Choice,
        now: float,
    ) -> None:
        self.microbatch = microbatch
        self.replica = replica
        self.stage = stage
        self.caller = caller
        self.choice: Choice | None = choice
        """None once a caller joined that did not choose it."""
        self.asked_at = now
        self.dead = False
        self.done = False
        self.spent_s = 0.0
