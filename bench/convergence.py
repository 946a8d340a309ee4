"""Whether a swarm learns as much a token as one process does: arms side by side, seed by seed.

    python bench/convergence.py --dir FOLDER [--arm NAME ...] [--seed 1 ...] [--steps 32]

The demo's model and settings, with rows of ``SEQ`` tokens and the rate ``LR``. All arms of a seed begin with
the same weights, see the same rows in the same order, and are judged on the same held-out rows by their last
weights, by one piece of code: a swarm by the snapshots that its ACTIVE replicas leave; where a stage has
several replicas, each row on two paths that share none. What FOLDER/results.jsonl has already is not run
again; swarms stay in FOLDER.

Arms: ``process`` (one process, the stages chained), ``swarm-1`` (real processes, one replica a stage),
``replicas`` (two replicas a stage in one process, averaged as in a run: ``convergence_replicas.py``),
``swarm-2`` (real processes, two replicas a stage), ``churn`` (the same; in every stage a worker is killed
with -9 and started again, and once all there have been ACTIVE for ``WHOLE`` steps the next).
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import attrs
import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from convergence_replicas import Replicas

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.demo.report import NodeLog
from stage import presets
from stage.config import ModelConfig, TrainingConfig, split_layers
from stage.data import Source
from stage.snapshot import SnapshotStore

STAGES = 3
REPLICAS = {"process": 1, "swarm-1": 1, "replicas": 2, "swarm-2": 2, "churn": 2}
EVAL_ROWS = 1024
SEQ = 64
"""Tokens a row: half of the demo's, since a run on two cores is to take a minute."""
LR = 4e-3
"""A third of the demo's. With the demo's, ``replicas`` was 2.4 % above ``process`` with the first seed and
2.3 % below with the second: the luck of so short a run, which would hide what is looked for."""
WHOLE = 2
"""Steps that all replicas of a stage have been ACTIVE before one of them is killed."""
AWAY_S = 2.0
QUIET = 0.7
"""Part of the run after which nobody is killed, so that all are back at its end."""
CLAIMS = (
    ("swarm-1", "process", 0.01, True),
    ("swarm-2", "replicas", 0.02, False),
    ("churn", "swarm-2", 0.02, False),
)
"""An arm, what it is compared with, the bound of the relative difference, and whether the difference's
standard error comes on top."""


def settings(seed: int, steps: int) -> tuple[ModelConfig, TrainingConfig]:
    """The demo's, but for rows and rate."""
    model, training = presets.demo(split_layers(presets.DEMO_LAYERS, STAGES), steps)
    return attrs.evolve(model, seq=SEQ), attrs.evolve(training, seed=seed, lr=LR)


def in_process(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train in this process."""
    model, training = settings(seed, steps)
    source = Source(None, model.seq, seed)
    run = Replicas(model, training, REPLICAS[arm])
    held_out, batch = source.held_out(EVAL_ROWS), training.target_batch
    for step in range(1, steps + 1):
        run.step(step, [source.row(0, (step - 1) * batch + number) for number in range(batch)])
    run.finish()
    return {"loss": run.loss(held_out), "rows": len(held_out), "disagreement": run.disagreement()}


def in_swarm(arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train with real processes, and judge what they leave. One that was run already is only judged."""
    if not (folder / "report.json").exists():
        run_swarm(arm, seed, steps, folder)
    report = json.loads((folder / "report.json").read_text())
    model, training = settings(seed, steps)
    logs = [
        NodeLog.read(path.parent.name, "worker", int(path.parent.name.split("-")[1]), "", path)
        for path in sorted(folder.glob("worker-*/events.jsonl"))
    ]
    weights: list[list[Tensor]] = [[] for _ in range(STAGES)]
    for log in logs:
        state = SnapshotStore(folder / log.name / "snapshots").load_newest()
        stage, number = map(int, log.name.split("-")[1:])
        active = report["stages"][stage]["replicas"][number]["phase"] == "active"
        if active and state is not None and state.step == steps:
            weights[stage].append(state.vectors[0])
    if not all(weights):
        raise click.ClickException(f"a stage left no weights of step {steps}: see {folder}")
    held_out = Source(None, model.seq, seed).held_out(EVAL_ROWS)
    judge = Replicas(model, training, REPLICAS[arm])
    judge.load(weights)
    return {
        "loss": judge.loss(held_out),
        "rows": len(held_out),
        "disagreement": judge.disagreement(),
        "judged": [len(known) for known in weights],
        "kills": sum(len(log.sessions()) - 1 for log in logs),
        "seconds": round(report["seconds"], 1),
        "microbatches": report["microbatches"],
        "rounds": report["rounds"],
        "last_tenth": report["loss"]["last"],
        **pace(logs, training),
    }


def run_swarm(arm: str, seed: int, steps: int, folder: Path) -> None:
    """A demo, with or without churn."""
    command = [
        sys.executable, "-m", "agorad.cli", "demo", "--json", "--dir", str(folder),
        "--stages", str(STAGES), "--workers", str(REPLICAS[arm]), "--steps", str(steps),
        "--set", f"training.seed={seed}", "--set", f"model.seq={SEQ}",
        "--set", f"training.lr={LR}",
    ]  # fmt: skip
    with folder.with_suffix(".log").open("wb") as log:
        demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            if arm == "churn":
                churn(demo, folder, steps, random.Random(seed))
            code = demo.wait()
        finally:
            if demo.poll() is None:
                demo.terminate()
                demo.wait()
    if code:
        raise click.ClickException(f"the demo ended with {code}: see {log.name}")


def churn(demo: subprocess.Popen[bytes], folder: Path, steps: int, rng: random.Random) -> None:
    """Kill workers whose stage is whole, and start them again, until the end."""
    again: dict[str, subprocess.Popen[bytes]] = {}
    whole_at: dict[int, int] = {}
    """Step at which a stage was found to have all its replicas ACTIVE."""
    away: list[tuple[float, dict[str, Any]]] = []
    while demo.poll() is None:
        time.sleep(0.5)
        while away and time.monotonic() - away[0][0] > AWAY_S:
            node = away.pop(0)[1]
            with (folder / "again.log").open("ab") as log:
                start = [sys.executable, "-m", "agorad.main", "--config", node["config"]]
                again[node["name"]] = subprocess.Popen(start, stdout=log, stderr=log)
        workers, said = look(folder)
        step = max((status.get("step", 0) for status in said.values()), default=0)
        for stage in sorted({node["stage"] for node in workers}):
            nodes = [node for node in workers if node["stage"] == stage]
            if not all(said.get(node["name"], {}).get("phase") == "active" for node in nodes):
                whole_at.pop(stage, None)
            elif step - whole_at.setdefault(stage, step) >= WHOLE and step <= QUIET * steps:
                victim = rng.choice(nodes)
                os.kill(said[victim["name"]]["pid"], signal.SIGKILL)
                if victim["name"] in again:
                    again[victim["name"]].wait()
                away.append((time.monotonic(), victim))
    for process in again.values():
        process.wait()  # the demo has asked them to leave, and killed who did not


def look(folder: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The workers of a swarm, and what those who answer say of themselves."""
    workers: list[dict[str, Any]] = []
    said: dict[str, dict[str, Any]] = {}
    with suppress(OSError, ValueError):  # the demo has not written it, or is about to
        nodes = json.loads((folder / "swarm.json").read_text())["nodes"]
        workers = [node for node in nodes if node["role"] == "worker"]
    for node in workers:
        with suppress(Unreachable, NoAnswer, CommandFailed):
            said[node["name"]] = ask(Path(node["control"]), "status", timeout=2.0)
    return workers, said


def pace(logs: list[NodeLog], training: TrainingConfig) -> dict[str, Any]:
    """What the update of a stage took in samples, and what passed of the run while a round went on."""
    updates: dict[tuple[int | None, int], int] = {}
    during: list[int] = []
    for log in logs:
        since: dict[int, int] = {}
        added = 0
        for event in log.events:
            if event["event"] == "microbatch_added":
                added += 1
            elif event["event"] == "step":
                step = event["step"]
                updates[log.stage, step] = updates.get((log.stage, step), 0) + event["samples"]
                since.setdefault(step // training.average_every, added)
            elif event["event"] == "round_finished" and event["round"] in since:
                during.append((added - since[event["round"]]) * len(logs) // STAGES)
    used = list(updates.values())
    return {
        "used": sum(used) / STAGES,
        "update": [min(used), median(used), max(used)],
        "round_samples": [min(during), median(during), max(during)] if during else None,
    }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines for people: each arm's mean, then each claim."""
    losses = {
        arm: {row["seed"]: row["loss"] for row in results if row["arm"] == arm}
        for arm in REPLICAS
        if any(row["arm"] == arm for row in results)
    }
    lines = []
    for arm, known in losses.items():
        each = " ".join(f"{known[seed]:.4f}" for seed in sorted(known))
        lines.append(f"{arm:10} {mean(known.values()):.4f} ± {error(list(known.values())):.4f}   {each}")
    for arm, like, bound, with_error in CLAIMS:
        seeds = sorted(losses.get(arm, {}).keys() & losses.get(like, {}).keys())
        if not seeds:
            continue
        ours, theirs = ([losses[name][seed] for seed in seeds] for name in (arm, like))
        apart = mean(ours) / mean(theirs) - 1
        spread = error([a / b - 1 for a, b in zip(ours, theirs, strict=True)])
        holds = abs(apart) <= bound + (spread if with_error and not math.isnan(spread) else 0.0)
        lines.append(
            f"{arm} against {like}: {apart:+.2%} ± {spread:.2%} over {len(seeds)} seeds, "
            f"at most {bound:.0%}{' + its error' if with_error else ''}: {'holds' if holds else 'fails'}"
        )
    return lines


def error(values: list[float]) -> float:
    """Standard error of the mean; NaN of a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@click.command(help=__doc__)
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(REPLICAS)), help="All if not given.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(1, 2, 3))
@click.option("--steps", default=32)
def main(folder: Path, arms: tuple[str, ...], seeds: tuple[int, ...], steps: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a swarm does not outlive this
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in seeds:
        for arm in arms or REPLICAS:
            if any((row["arm"], row["seed"], row["steps"]) == (arm, seed, steps) for row in results):
                continue
            if arm in ("process", "replicas"):
                found = in_process(arm, seed, steps)
            else:
                found = in_swarm(arm, seed, steps, folder / f"{arm}-seed-{seed}")
            results.append({"arm": arm, "seed": seed, "steps": steps, **found})
            line = json.dumps(results[-1])
            with file.open("a") as out:
                out.write(line + "\n")
            click.echo(line)
    click.echo("\n".join(table([row for row in results if row["steps"] == steps])))


if __name__ == "__main__":
    main()
