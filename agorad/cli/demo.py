"""``agoractl demo``: a whole swarm on this machine, each node its own process, training on real text."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import click

from agorad import trainer_data
from agorad.config import TrainerSection
from agorad.demo import layout, report
from agorad.demo.layout import Layout, Plan
from agorad.demo.swarm import STALL_S, TICK_S, DemoFailed, Swarm, ended_cleanly
from agorad.demo.view import View
from agorad.run import Manifest
from agorad.usage import NamedPath
from p2p.errors import LocalError

DEFAULT_STEPS = 60


@click.command()
@click.option("--stages", default=3, show_default=True, help="Pipeline stages.")
@click.option("--workers", default=2, show_default=True, help="Replicas of each stage.")
@click.option("--trainers", default=1, show_default=True, help="Trainers, each with its share of the data.")
@click.option("--steps", type=int, help=f"Steps of the run's clock.  [default: {DEFAULT_STEPS}]")
@click.option("--seconds", type=float, help="Train for this long instead.")
@click.option(
    "--data", type=NamedPath(), help="Text, JSONL or parquet, or a folder; else Python's own source."
)
@click.option("--dir", "folder", type=NamedPath(), help="Folder for everything; else temporary.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Override one setting.")
@click.option("--keep", is_flag=True, help="Keep a temporary folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def demo(
    stages: int,
    workers: int,
    trainers: int,
    steps: int | None,
    seconds: float | None,
    data: Path | None,
    folder: Path | None,
    assignments: tuple[str, ...],
    keep: bool,
    as_json: bool,
) -> None:
    """Train a small model with a whole swarm of processes on this machine.

    Example: agoractl demo --stages 3 --workers 2 --steps 60
    """
    if steps is None and seconds is None:
        steps = DEFAULT_STEPS
    plan = Plan(
        stages=stages, workers=workers, trainers=trainers, steps=steps,
        seconds=seconds, data=data, assignments=assignments,
    )  # fmt: skip
    manifest = layout.check(plan)
    settings = attrs.evolve(layout.trainer_settings(plan), data=data)  # as it was typed, for errors
    described = _described(settings, manifest, trainers)
    temporary = folder is None
    folder, created = _folder(folder)
    outcome = None
    try:
        outcome = _run(layout.prepare(plan, folder), described, steps)
    finally:
        failed = outcome is None or outcome[1] is not None
        if temporary and not keep and not failed:
            shutil.rmtree(folder)
        elif created and not any(folder.iterdir()):
            folder.rmdir()
    document, fault = outcome
    if as_json:
        click.echo(json.dumps(document))
    else:
        click.echo(summary(document), err=True)
    if not temporary or keep or fault:
        click.echo(f"everything is in {folder}", err=True)
    if fault is not None:
        raise click.ClickException(fault)


def _described(settings: TrainerSection, manifest: Manifest, shards: int) -> str:
    """What is trained on, in one line; LocalError if it cannot be."""
    trainer_data.check(settings, manifest)
    if settings.dataset:
        return f"the data set {settings.dataset}"  # the trainers ask the hub for it
    return trainer_data.source(settings, manifest, shards=shards, kept=Path()).describe()


def _folder(folder: Path | None) -> tuple[Path, bool]:
    """The folder to work in, and whether it was made here."""
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="agora-demo-")), True
    folder = folder.absolute()
    created = not folder.exists()
    if not created and not folder.is_dir():
        raise LocalError(f"--dir {folder}: is not a folder; name a new or an empty one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise LocalError(f"--dir {folder}: is not empty; name a new or an empty folder")
    except OSError as error:
        raise LocalError(f"--dir {folder}: {error.strerror}; name another folder") from error
    return folder, created


class _Interrupted(Exception):  # noqa: N818
    """SIGINT or SIGTERM: stop the swarm in order and report what there is."""


def _run(laid: Layout, source: str, steps: int | None) -> tuple[dict[str, Any], str | None]:
    """Run the swarm to its end; the report, and what went wrong if something did."""

    def interrupt(_number: int, _frame: object) -> None:
        raise _Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    swarm = Swarm(laid)
    fault: str | None = None
    try:
        with View(swarm, f"/{steps}" if steps else "") as view:
            view.say(f"run {laid.manifest.run.id}: {len(laid.nodes)} processes in {laid.folder}")
            view.say(f"data: {source}")
            try:
                swarm.start("seed", "authority", "worker")
                swarm.wait_up(view.show)
                if swarm.page:
                    view.say(f"watch it in a browser: {swarm.page}")
                swarm.start("trainer")  # last, so that a worker that starts slowly has missed nothing
                swarm.wait_up(view.show)
                (laid.folder / "swarm.json").write_text(json.dumps(swarm.describe(), indent=1) + "\n")
                fault = _watch(swarm, view, steps)
            except DemoFailed as error:
                fault = str(error)
            except _Interrupted:
                fault = "interrupted"
            for number in before:
                signal.signal(number, signal.SIG_IGN)  # stopping is bounded; a second Ctrl-C must not orphan
            view.say("stopping")
            states = {r.node.name: r.status for r in swarm.of_role("worker") if r.answers}
            last_step = swarm.final_step()
            exits = swarm.stop()
    finally:
        for running in swarm.nodes:
            if running.process.poll() is None:
                running.process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    document = _report(laid, states, last_step, exits)
    (laid.folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    if fault is None:
        unclean = swarm.unclean(exits)
        if unclean:
            fault = f"{', '.join(unclean)} did not end cleanly; see the logs in {laid.folder}"
    return document, fault


def _watch(swarm: Swarm, view: View, steps: int | None) -> str | None:
    """Until the trainers have ended; what is wrong with the end, if anything."""
    completed, since = 0, time.monotonic()
    while not swarm.trainers_ended():
        swarm.poll()
        view.show()
        if swarm.completed > completed or swarm.paused():
            completed, since = swarm.completed, time.monotonic()
        elif time.monotonic() - since > STALL_S:
            raise DemoFailed(f"no microbatch was completed for {STALL_S:.0f} s; see the logs")
        time.sleep(TICK_S)
    codes = {
        r.node.name: r.process.returncode
        for r in swarm.of_role("trainer")
        if r.process.returncode and not swarm.was_killed(r) and not ended_cleanly(r.node)
    }
    if codes:
        return f"a trainer did not end cleanly: {codes}"
    step = swarm.final_step()
    if steps is not None and step < steps:
        return f"the run ended at step {step} of {steps}"
    swarm.settle(step)
    view.show()
    return None


def _report(
    laid: Layout, states: dict[str, dict[str, Any]], last_step: int, exits: dict[str, int]
) -> dict[str, Any]:
    logs = [
        report.NodeLog.read(node.name, node.role, node.stage, node.identity.peer_id, node.events)
        for node in laid.nodes
    ]
    model, training = laid.manifest.model, laid.manifest.training
    return report.build(
        logs,
        tokens_a_sample=model.seq,
        target_batch=training.target_batch,
        vocab=model.vocab,
        steps=last_step,
        disagreement=_disagreement(laid, states),
        exits=exits,
        states=states,
    )


def _disagreement(laid: Layout, states: dict[str, dict[str, Any]]) -> float | None:
    """Mean relative distance of ACTIVE replicas' last weights to their stage's mean; None with no pairs."""
    from agorad.demo.disagreement import mean_distance  # the only part of a demo that needs torch

    stages: dict[int, list[Path]] = {}
    for node in laid.of_role("worker"):
        if node.stage is not None and states.get(node.name, {}).get("phase") == "active":
            stages.setdefault(node.stage, []).append(node.folder / "snapshots")
    return mean_distance([folders for folders in stages.values() if len(folders) > 1])


def summary(document: dict[str, Any]) -> str:
    """The report for people, in lines of at most 80 columns."""
    loss, work, rounds = document["loss"], document["microbatches"], document["rounds"]
    if loss["last"] is None:
        return "no microbatch was completed"
    lines = [
        f"{document['steps']} steps, {document['tokens']} tokens in {document['seconds']:.0f} s "
        f"({document['tokens_per_second']:.0f} tokens/s)",
        f"loss {loss['first']:.3f} -> {loss['last']:.3f} nats a token (guessing: {loss['uniform']:.3f})",
        f"microbatches: {work['completed']} of {work['issued']} completed, {work['failed']} failed, "
        f"{work['lost']} lost",
        f"faults: {work['rerouted']} rerouted, {work['twice']} counted twice, "
        f"{work['reused_stale']} reused, {work['gone_with_replica']} gone with a replica",
        f"rounds: {rounds['completed']} completed, {rounds['partial']} partial, {rounds['failed']} failed",
    ]
    if document["eval_loss"]:
        ends = document["eval_loss"][:: max(1, len(document["eval_loss"]) - 1)]
        lines.append("evaluation loss: " + " -> ".join(f"{loss:.3f} at step {step}" for step, loss in ends))
    if document["disagreement"] is not None:
        lines.append(f"replicas are {document['disagreement']:.2%} from their stage's mean")
    return "\n".join(lines)
