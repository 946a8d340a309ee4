"""Credits against a pipeline in virtual time: stages of queues, with lines between them."""

from __future__ import annotations

import heapq
import random

import pytest

from stage.credits import FIRST, Credits

SLOTS = 8


def flow(
    stages: list[list[float]],
    line_s: float,
    seconds: float,
    *,
    fixed: int | None = None,
    slots: int = SLOTS,
    seed: int = 1,
) -> tuple[float, float]:
    """Microbatches a second in the second half, and the mean in flight, of a pipeline of replicas.

    ``stages``: seconds that each replica of a stage takes; ``line_s``: one way between two stages.
    """
    rng = random.Random(seed)
    replicas = sum(map(len, stages))
    credits = Credits()
    free = [[0.0] * len(stage) for stage in stages]
    answers: list[tuple[float, float]] = []
    now, done, weight, since = 0.0, 0, 0.0, 0.0
    while now < seconds:
        most = fixed or credits.count(replicas, slots * min(map(len, stages)), 1)
        while len(answers) < most:
            at = now
            for stage, times in zip(free, stages, strict=True):
                at += line_s
                chosen = min(range(len(stage)), key=lambda i: max(stage[i], at) + times[i])
                at = max(stage[chosen], at) + times[chosen] * rng.uniform(0.9, 1.1)
                stage[chosen] = at
            heapq.heappush(answers, (at + line_s * len(stages), now))
        in_flight = len(answers)
        then, sent = heapq.heappop(answers)
        if now > seconds / 2:
            done += 1
            weight += in_flight * (then - now)
            since = since or now
        now = then
        credits.answered(now, now - sent)
    return done / (now - since), weight / (now - since)


@pytest.mark.parametrize("line_s", [0.0, 0.04])
@pytest.mark.parametrize("stages", [[[0.05] * 2] * 3, [[0.02, 0.02], [0.1, 0.1, 0.02], [0.03, 0.05]]])
def test_the_bottleneck_is_busy_and_little_waits(stages: list[list[float]], line_s: float) -> None:
    bound = min(sum(1 / seconds for seconds in stage) for stage in stages)
    throughput, in_flight = flow(stages, line_s, 40.0)
    assert throughput > 0.9 * min(bound, flow(stages, line_s, 40.0, fixed=SLOTS * 2)[0])
    alone = sum(min(stage) for stage in stages) + 2 * line_s * len(stages)
    assert in_flight < 1.5 * bound * alone + 2 * sum(map(len, stages)) + 2


@pytest.mark.parametrize("line_s", [0.0, 0.04])
def test_what_waits_is_not_taken_for_what_travels_however_long_it_goes_on(line_s: float) -> None:
    stages = [[0.05] * 2] * 3
    throughput, in_flight = flow(stages, line_s, 400.0, slots=64)
    assert throughput > 0.97 * 40.0
    assert in_flight < 1.5 * 40.0 * (0.15 + 6 * line_s) + 2 * 6 + 2


def test_over_long_lines_two_a_replica_are_not_enough() -> None:
    stages = [[0.02] * 2] * 3
    few, _ = flow(stages, 0.04, 40.0, fixed=2 * 6)
    ours, _ = flow(stages, 0.04, 40.0)
    assert ours > 1.2 * few


def test_bounds() -> None:
    credits = Credits()
    assert credits.count(0, 0, 1) == FIRST
    assert credits.count(6, 16, 1) == 12
    assert credits.count(6, 16, 3) == FIRST
    assert credits.count(60, 16, 1) == 16, "never more than there are places"
    for number in range(1000):
        credits.answered(number * 0.01, 3.0)
    assert credits.count(6, 1 << 20, 1) > 300
    assert credits.count(6, 48, 1) == 48


def test_what_is_long_ago_is_forgotten() -> None:
    credits = Credits()
    for number in range(1000):
        credits.answered(number * 0.01, 1.0)
    many = credits.count(4, 1 << 20, 1)
    for number in range(100):
        credits.answered(100.0 + number, 1.0)
    assert credits.count(4, 1 << 20, 1) < many / 5
