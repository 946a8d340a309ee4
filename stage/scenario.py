"""What a simulated run consists of: machines, lines, how they come and go. Torch-free.

``from_plan`` draws a swarm from a plan (``stage.plan``): every replica has the plan's machine and line times
a factor of its own, drawn log-uniformly: the fastest is ``spread`` times the slowest, the mean 1.

Above ``MAX_HOPS`` crossings of a stage, a simulated microbatch stands for several (``grain``): service times
and bytes grow with it, the numbers in flight do not. Rates and shares stay what they are; times from end to
end are then those of such a bundle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Final

import attrs

from p2p.errors import LocalError
from stage.config import SLOTS
from stage.hardware import check
from stage.memory import wire_bytes
from stage.plan import Plan, StagePlan, plan_stage

WORDS_BYTES: Final = 700
"""Beside the payload, each way of a crossing: ticket, path and hint there, progress, receipts and path back
(480 to 590 and 420 to 750 bytes of msgpack in a run of three stages), and a stream's opening and frames."""
FRAMED: Final = 1.05
"""Bytes on a line for one of payload: TCP, IP, and the frames of the encrypted connection."""
MAX_HOPS: Final = 1_000_000
MAX_REPLICAS: Final = 100_000
MAX_SECONDS: Final = 30 * 86400.0

Passes = tuple[float, float]
"""Seconds of the forward and of the backward pass of one microbatch."""


@attrs.frozen(kw_only=True)
class Worker:
    """One replica's machine and line."""

    stage: int
    speed: float = 1.0
    """Times that of ``Scenario.stages``."""
    up: float = math.inf
    """Bytes a second."""
    down: float = math.inf


@attrs.frozen(kw_only=True)
class Cost:
    """What one microbatch costs a replica of speed 1 at one stage."""

    forward_s: float
    backward_s: float
    """At the tail this is both passes, which it makes in one go, unless both are given."""
    forward_bytes: float
    """To the next stage, ids and words included (0 at the tail)."""
    backward_bytes: float
    """To the stage before, or the trainer, words included."""
    averaging_bytes: float
    """Of rounds, each way, this microbatch's share."""
    state_bytes: int
    """What a newcomer downloads."""

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward_s + self.backward_s


@attrs.frozen(kw_only=True)
class Churn:
    """How replicas come and go: exponential lives and absences; infinite: nobody leaves."""

    life_s: float = math.inf
    away_s: float = 300.0
    frozen: float = 0.5
    """Share of departures that close no connection: a cable is pulled, a laptop sleeps."""


@attrs.frozen(kw_only=True)
class Scenario:
    """A run to be simulated."""

    stages: tuple[Cost, ...]
    workers: tuple[Worker, ...]
    seconds: float
    issue_bytes: float = 0.0
    """From the trainer to the head."""
    rtt_s: float = 0.04
    slots: int = SLOTS
    """Microbatches that a replica takes at a time."""
    credits: int = 0
    """Microbatches in flight; 0: as many as trainers decide (``stage.credits``)."""
    trainers: int = 1
    churn: Churn = attrs.Factory(Churn)
    cores: int | None = None
    """All replicas share one machine with that many cores, one for each pass; None: each has its own."""
    balance: bool = False
    grain: int = 1
    tokens: int = 1
    """Of one microbatch."""

    def __attrs_post_init__(self) -> None:
        check("seconds", self.seconds, 1e-3, MAX_SECONDS)
        check("replicas", len(self.workers), 1, MAX_REPLICAS)
        check("rtt-ms", self.rtt_s * 1e3, 0, 1e5)
        check("slots", self.slots, 1, 1024)
        check("trainers", self.trainers, 1, 256)
        check("credits", self.credits, 0, 1_000_000)
        check("frozen", self.churn.frozen, 0, 1)
        if self.cores is not None:
            check("cores", self.cores, 1, 4096)
        present = {worker.stage for worker in self.workers}
        for stage in range(len(self.stages)):
            if stage not in present:
                raise LocalError(f"stage {stage} has no replica: nothing would ever pass it")


def from_plan(
    plan: Plan,
    *,
    replicas: Sequence[int],
    seconds: float,
    seed: int,
    measured: Sequence[Sequence[Passes]] | None = None,
    spread: float = 1.0,
    churn: Churn = Churn(),
    cores: int | None = None,
    slots: int = SLOTS,
    credits: int = 0,
    trainers: int = 1,
    balance: bool = False,
) -> Scenario:
    """The plan's run with so many replicas of each stage. Raises LocalError.

    ``measured``: what a microbatch takes each replica of each stage, in place of the plan's; how a stage's
    time is shared by its passes is taken from the first replica.
    """
    if len(replicas) != len(plan.stages):
        raise LocalError(f"{len(replicas)} counts of replicas for {len(plan.stages)} stages")
    stages = [
        plan_stage(attrs.evolve(plan.setting, replicas=count), stage.stage, stage.in_flight)
        for stage, count in zip(plan.stages, replicas, strict=True)
    ]
    if measured is None:
        measured = [
            [passes(plan, stage.stage, stage.compute_s)] * stage_replicas
            for stage, stage_replicas in zip(stages, replicas, strict=True)
        ]
    check("spread", spread, 1, 1000)
    check("replicas", sum(replicas), 1, MAX_REPLICAS)
    rng = random.Random(seed)
    link = plan.setting.link
    workers = [
        Worker(stage=stage, speed=_drawn(rng, spread) * sum(times[0]) / sum(took),
               up=link.bytes_per_s * _drawn(rng, spread**0.5),
               down=link.bytes_per_s * _drawn(rng, spread**0.5))
        for stage, times in enumerate(measured)
        for took in times
    ]  # fmt: skip
    costs = tuple(_cost(plan, stage, times[0]) for stage, times in zip(stages, measured, strict=True))
    at_most = min(
        sum(worker.speed for worker in workers if worker.stage == index) / cost.seconds
        for index, cost in enumerate(costs)
    )
    if cores is not None:
        at_most = min(at_most, cores / sum(cost.seconds for cost in costs))
    grain = max(1, math.ceil(at_most * seconds * len(costs) / MAX_HOPS))
    return Scenario(
        stages=tuple(_grained(cost, grain) for cost in costs),
        workers=tuple(workers),
        seconds=seconds,
        issue_bytes=_on_line(_ids_bytes(plan)) * grain,
        rtt_s=link.rtt_ms / 1e3,
        slots=slots,
        credits=credits,
        trainers=trainers,
        churn=churn,
        cores=cores,
        balance=balance,
        grain=grain,
        tokens=plan.setting.model.seq,
    )


def passes(plan: Plan, stage: int, seconds: float) -> Passes:
    """How a stage divides so many seconds for both passes: the tail makes them in one go."""
    if stage == len(plan.stages) - 1:
        return 0.0, seconds
    forward_s = seconds / (3 if plan.stages[stage].mode.graph == "retain" else 4)
    return forward_s, seconds - forward_s


def _cost(plan: Plan, stage: StagePlan, took: Passes) -> Cost:
    """Of a replica whose passes take so long."""
    last = len(plan.stages) - 1
    ids = _ids_bytes(plan)
    back = wire_bytes(plan.setting.model, plan.setting.training, backward=True) if stage.stage else 0
    there = 0 if stage.stage == last else stage.boundary_bytes + ids
    return Cost(
        forward_s=took[0],
        backward_s=took[1] + stage.step_s,
        forward_bytes=_on_line(there) if there else 0.0,
        backward_bytes=_on_line(back),
        averaging_bytes=FRAMED * max(0.0, stage.up_bytes - there - back),
        state_bytes=12 * stage.params,
    )


def _ids_bytes(plan: Plan) -> int:
    return 4 * (plan.setting.model.seq + 1)


def _on_line(payload: float) -> float:
    """Bytes that so many of payload are, one way of a crossing."""
    return FRAMED * payload + WORDS_BYTES


def _grained(cost: Cost, grain: int) -> Cost:
    return Cost(
        forward_s=cost.forward_s * grain,
        backward_s=cost.backward_s * grain,
        forward_bytes=cost.forward_bytes * grain,
        backward_bytes=cost.backward_bytes * grain,
        averaging_bytes=cost.averaging_bytes * grain,
        state_bytes=cost.state_bytes,
    )


def _drawn(rng: random.Random, spread: float) -> float:
    """Log-uniform over a range whose ends are ``spread`` apart, with mean 1."""
    if spread <= 1:
        return 1.0
    width = math.log(spread)
    mean = 2 * math.sinh(width / 2) / width
    return math.exp(rng.uniform(-width / 2, width / 2)) / mean
