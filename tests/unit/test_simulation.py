"""Simulated runs: they reach what their slowest part allows, lose nothing, and repeat to the event."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import attrs
import pytest

from p2p.errors import LocalError
from stage import presets
from stage.hardware import Link, Machine
from stage.plan import Setting, plan
from stage.scenario import Churn, Cost, Scenario, Worker, from_plan
from stage.simulated import Report
from stage.simulation import Simulation


def cost(seconds: float, *, size: int = 0, state: int = 0) -> Cost:
    return Cost(
        forward_s=seconds / 3,
        backward_s=seconds * 2 / 3,
        forward_bytes=size,
        backward_bytes=size,
        averaging_bytes=0.0,
        state_bytes=state,
    )


def scenario(
    counts: list[int], *, seconds: float = 300.0, work: float = 1.0, state: int = 0, **changes: Any
) -> Scenario:
    workers = [Worker(stage=stage) for stage, count in enumerate(counts) for _ in range(count)]
    return Scenario(
        stages=tuple(cost(work, state=state) for _ in counts),
        workers=tuple(workers),
        seconds=seconds,
        **changes,
    )


def simulated(given: Scenario, seed: int = 1) -> Report:
    report = Simulation(given, seed).run()
    assert report.lost == 0
    assert report.completed + report.in_flight == report.issued
    return report


def test_the_slowest_stage_decides() -> None:
    report = simulated(scenario([4, 2, 4]))
    assert report.microbatches_per_second == pytest.approx(2.0, rel=0.03)
    busy = [stage.utilisation for stage in report.stages]
    assert busy == pytest.approx([0.5, 1.0, 0.5], abs=0.05)
    assert report.wasted == 0.0


def test_slow_and_fast_replicas_add_up() -> None:
    """10:1 in speed, three callers that do not speak to each other: nine tenths of the sum at least."""
    speeds = [1.0, 0.5, 0.3, 0.2, 0.1]
    given = attrs.evolve(
        scenario([3, 5], seconds=1500.0, work=0.5),
        workers=(
            *(Worker(stage=0, speed=4.0) for _ in range(3)),
            *(Worker(stage=1, speed=s) for s in speeds),
        ),
        credits=40,
    )
    report = simulated(given)
    assert report.microbatches_per_second >= 0.9 * sum(speeds) / 0.5
    assert report.stages[1].idle_most > 0.8


def test_a_slow_line_is_the_limit() -> None:
    given = scenario([2, 2], work=0.1)
    size = 1_000_000
    costs = (attrs.evolve(given.stages[0], forward_bytes=size), given.stages[1])
    workers = tuple(attrs.evolve(worker, up=2e6, down=2e6) for worker in given.workers)
    report = simulated(attrs.evolve(given, stages=costs, workers=workers, rtt_s=0.1, credits=32))
    assert report.microbatches_per_second == pytest.approx(4.0, rel=0.1)


def test_replicas_that_share_a_machine_share_its_cores() -> None:
    report = simulated(scenario([2, 2], cores=2, rtt_s=0.0))
    assert report.microbatches_per_second == pytest.approx(1.0, rel=0.03)
    alone = simulated(scenario([2, 2], cores=1, rtt_s=0.0))
    assert alone.microbatches_per_second == pytest.approx(0.5, rel=0.03)


def test_departures_cost_time_and_no_microbatch() -> None:
    churn = Churn(life_s=120, away_s=20)
    report = simulated(scenario([6, 6, 6], seconds=1200.0, churn=churn))
    assert report.departures > 100
    assert report.rerouted > 100
    assert 0 < report.wasted < 0.1
    assert 3.5 < report.microbatches_per_second < 6
    assert all(stage.replicas > 0 for stage in report.stages)


def test_an_answer_on_its_way_to_one_that_left_is_given_once() -> None:
    """Lines so slow that answers are often on their way while their caller leaves and is replaced."""
    given = scenario([4, 4, 4], churn=Churn(life_s=60, away_s=20), rtt_s=0.1)
    costs = tuple(attrs.evolve(each, forward_bytes=1e6, backward_bytes=1e6) for each in given.stages)
    workers = tuple(attrs.evolve(worker, up=1.2e6, down=1.2e6) for worker in given.workers)
    report = simulated(attrs.evolve(given, stages=costs, workers=workers))
    assert report.rerouted > 50
    assert report.completed > 100


def test_the_same_seed_gives_the_same_events() -> None:
    given = scenario([3, 3], churn=Churn(life_s=60, away_s=10))
    assert simulated(given, 7) == simulated(given, 7)
    assert simulated(given, 7) != simulated(given, 8)


def test_replicas_move_to_where_they_are_missing() -> None:
    still = simulated(scenario([4, 1, 1], seconds=1200.0, credits=24))
    moved = simulated(scenario([4, 1, 1], seconds=1200.0, credits=24, balance=True))
    assert (moved.moves, [stage.replicas for stage in moved.stages]) == (2, [2, 2, 2])
    assert moved.microbatches_per_second > 1.6 * still.microbatches_per_second


def test_a_newcomer_downloads_before_it_serves() -> None:
    churn = Churn(life_s=200, away_s=0.0)
    given = scenario([8, 8], seconds=2000.0, churn=churn, state=10**9, credits=64)
    slow = attrs.evolve(given, workers=tuple(attrs.evolve(w, down=1e7) for w in given.workers))
    assert simulated(slow).microbatches_per_second < 0.85 * simulated(given).microbatches_per_second


def test_a_large_swarm_is_simulated_in_bundles() -> None:
    model, training = presets.preset("8b")
    setting = Setting(
        model=model, training=training, machine=Machine(tflops=66, bandwidth_gb_s=700), link=Link()
    )
    planned = plan(setting)
    given = from_plan(planned, replicas=[2000] * 7, seconds=36000, seed=1)
    assert given.grain > 10
    one = from_plan(planned, replicas=[2] * 7, seconds=60, seed=1)
    assert given.stages[0].forward_s == pytest.approx(given.grain * one.stages[0].forward_s)
    assert simulated(attrs.evolve(one, seconds=1200.0)).tokens_per_second == pytest.approx(
        planned.tokens_per_second, rel=0.03
    )


def test_a_trainer_keeps_as_many_in_flight_as_long_lines_take() -> None:
    report = simulated(scenario([1, 1], work=0.1, rtt_s=0.5, slots=64))
    assert report.microbatches_per_second == pytest.approx(10.0, rel=0.05)
    assert report.in_flight > 15, "half of that for a moment, now and then"


def test_a_trainer_sends_to_every_head_of_a_large_swarm() -> None:
    report = simulated(scenario([80, 80], seconds=60.0))
    assert report.microbatches_per_second > 60


def test_measured_replicas_take_what_was_measured() -> None:
    model, training = presets.preset("demo")
    machine = Machine(tflops=1, bandwidth_gb_s=100)
    planned = plan(Setting(model=model, training=training, machine=machine, device="cpu", dtype="fp32"))
    times = [[(0.05, 0.05)], [(0.1, 0.3), (0.1, 0.3), (1.0, 3.0)], [(0.0, 0.05)]]
    given = from_plan(planned, replicas=[1, 3, 1], seconds=300, seed=1, measured=times)
    assert simulated(given).microbatches_per_second == pytest.approx(5.25, rel=0.05)


def test_wrong_scenarios_are_refused_in_a_sentence() -> None:
    with pytest.raises(LocalError, match="stage 1 has no replica"):
        attrs.evolve(scenario([1, 1]), workers=(Worker(stage=0),))
    with pytest.raises(LocalError, match="slots"):
        scenario([1, 1], slots=0)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agorad.cli", "run", "plan", *arguments],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def test_the_command_simulates_what_it_planned() -> None:
    base = ["--preset", "demo", "--device", "cpu", "--tflops", "0.05", "--replicas", "2"]
    done = command(*base, "--simulate", "--minutes", "2", "--cores", "2", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["simulated"]
    assert answer["lost"] == 0
    assert answer["completed"] > 0
    assert len(answer["stages"]) == len(presets.preset("demo")[0].layers)
    text = command(*base, "--simulate", "--minutes", "2")
    assert "simulated: " in text.stdout
    wrong = command(*base, "--simulate", "--counts", "4/1")
    assert wrong.returncode == 2
    assert "--counts" in wrong.stderr


@pytest.mark.parametrize(
    "words", [["50/50"], ["5/x/5"], ["5/0/5"], ["5/1+1+1/5"], ["1/1,1,1/1", "--counts", "1/2/1"]]
)
def test_what_was_measured_is_named_for_every_stage(words: list[str]) -> None:
    wrong = command("--preset", "demo", "--device", "cpu", "--simulate", "--measured", *words)
    assert wrong.returncode == 2
    assert "measured" in wrong.stderr


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_five_thousand_replicas_and_an_hour_in_under_five_minutes() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(
        "--preset", "8b", "--replicas", "714", "--simulate", "--spread", "10", "--life", "30", "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["simulated"]
    assert answer["replicas"] == 4998
    assert answer["lost"] == 0
    assert answer["departures"] > 1000
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 300
    assert after.ru_maxrss < 1_000_000, "kilobytes of the largest process so far"
