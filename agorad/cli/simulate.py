"""``agoractl run plan --simulate``: the planned run in virtual time, with unlike machines that leave."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

import attrs
import click

from p2p.errors import LocalError
from stage.config import SLOTS
from stage.hardware import check
from stage.plan import Plan
from stage.scenario import Churn, Passes, Scenario, from_plan, passes
from stage.simulated import Report
from stage.simulation import Simulation

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: Final = (
    click.option("--simulate", is_flag=True, help="Run it in virtual time: speeds, departures, queues."),
    click.option("--counts", metavar="4/1/1", help="Simulate so many replicas of each stage."),
    click.option(
        "--measured",
        metavar="50/40,400",
        help="Milliseconds a microbatch takes each replica, or 15+35: forward and backward.",
    ),
    click.option("--minutes", type=float, default=60.0, show_default=True, help="Simulated."),
    click.option("--spread", type=float, default=1.0, show_default=True, help="Fastest machine to slowest."),
    click.option("--life", type=float, metavar="MINUTES", help="Mean time until a replica leaves.  [never]"),
    click.option("--away", type=float, default=5.0, show_default=True, help="Minutes until it is back."),
    click.option("--cores", type=int, help="All replicas on one machine with that many cores."),
    click.option("--slots", type=int, default=SLOTS, show_default=True, help="Microbatches a replica takes."),
    click.option("--credits", "in_flight", type=int, default=0, help="In flight.  [as trainers decide]"),
    click.option("--trainers", type=int, default=1, show_default=True),
    click.option("--balance", is_flag=True, help="Replicas move to the slowest stage."),
    click.option("--seed", type=int, default=1, show_default=True, help="Of the simulation."),
)


def options(command: F) -> F:
    """The simulation's, in this order in the help."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def simulate(
    plan: Plan,
    *,
    counts: str | None,
    measured: str | None,
    minutes: float,
    spread: float,
    life: float | None,
    away: float,
    cores: int | None,
    slots: int,
    in_flight: int,
    trainers: int,
    balance: bool,
    seed: int,
) -> tuple[Scenario, Report]:
    """Simulate a planned run; a line on a terminal's stderr tells how far it is. Raises LocalError."""
    replicas = _counts(counts, plan)
    seconds = None
    if measured is not None:
        seconds = _measured(measured, plan, replicas, named=counts is not None)
        replicas = [len(stage) for stage in seconds]
    scenario = from_plan(
        plan,
        replicas=replicas,
        measured=seconds,
        seconds=60 * minutes,
        seed=seed,
        spread=spread,
        churn=Churn(away_s=60 * away) if life is None else Churn(life_s=60 * life, away_s=60 * away),
        cores=cores,
        slots=slots,
        credits=in_flight,
        trainers=trainers,
        balance=balance,
    )
    report = Simulation(scenario, seed).run(_tell if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    return scenario, report


def _tell(share: float) -> None:
    click.echo(f"\rsimulating: {share:.0%}", nl=False, err=True)


def _counts(text: str | None, plan: Plan) -> list[int]:
    if text is None:
        return [plan.setting.replicas] * len(plan.stages)
    try:
        counts = [int(count) for count in text.split("/")]
    except ValueError:
        raise LocalError(f"--counts {text!r}: write a number for each stage, like 4/1/1") from None
    if len(counts) != len(plan.stages) or min(counts) < 1:
        raise LocalError(f"--counts {text!r}: name at least 1 for each of the {len(plan.stages)} stages")
    return counts


def _measured(text: str, plan: Plan, counts: list[int], *, named: bool) -> list[list[Passes]]:
    """Seconds of each replica. A stage with one number has it for as many replicas as it has."""
    stages = [
        [_passes(word, plan, index) for word in words.split(",")]
        for index, words in enumerate(text.split("/"))
    ]
    if len(stages) != len(counts):
        raise LocalError(f"--measured {text!r}: name every one of the {len(counts)} stages")
    for index, (stage, count) in enumerate(zip(stages, counts, strict=True)):
        if len(stage) == 1:
            stages[index] = stage * count
        elif named and len(stage) != count:
            raise LocalError(f"--measured names {len(stage)} replicas of stage {index}, --counts {count}")
    return stages


def _passes(word: str, plan: Plan, stage: int) -> Passes:
    try:
        times = [float(each) for each in word.split("+")]
    except ValueError:
        times = []
    if len(times) not in (1, 2):
        raise LocalError(
            f"--measured {word!r}: write milliseconds for each stage, like 50/40,400, or 15+35 for passes"
        )
    check("measured", sum(times), 1e-3, 1e8)
    if len(times) == 1:
        return passes(plan, min(stage, len(plan.stages) - 1), times[0] / 1000)
    check("measured", min(times), 0, 1e8)
    return times[0] / 1000, times[1] / 1000


def document(scenario: Scenario, report: Report) -> dict[str, Any]:
    """The report as JSON, with what was simulated."""
    return {
        "seconds": scenario.seconds,
        "replicas": len(scenario.workers),
        **attrs.asdict(report),
    }


def lines(scenario: Scenario, report: Report) -> list[str]:
    """For people."""
    said = [
        "",
        f"simulated: {len(scenario.workers)} replicas, {scenario.seconds / 60:g} minutes: "
        f"{report.tokens_per_second:,.0f} tokens a second",
        f"  {report.completed:,} microbatches completed, {report.lost} lost, {report.in_flight} in flight; "
        f"half within {report.seconds_p50:.1f} s, 95 % within {report.seconds_p95:.1f} s",
        f"  {report.departures} departures, {report.moves} moves, {report.rerouted:,} rerouted, "
        f"{report.wasted:.1%} of the compute came to nothing",
    ]
    for index, stage in enumerate(report.stages):
        said.append(
            f"  stage {index}: {stage.replicas} serving at the end, busy {stage.utilisation:.0%} of the time"
        )
    if report.grain > 1:
        said.append(f"! each simulated microbatch stands for {report.grain}; times are those of a bundle")
    return said
