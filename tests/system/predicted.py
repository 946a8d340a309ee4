"""Swarms whose speed the simulator predicts before they run: ``python -m tests.system.predicted SWARM...``

A swarm is written as the replicas of each stage, and what limits them where that is not this machine:

    2/2/2                           nothing else: all share this machine's processors
    1/3,wait=100/400+400+4000       timed waits, milliseconds a microbatch, in place of compute
    2/2/2,wait=200,link=200+80      lines of 200 Mbit/s, round trips of 80 ms between two of them (needs root)
    4/1/1,model.seq=64              any of a demo's settings

First of all four workers run for a while, at stages of 1, 3 and 2 layers, two of them at the last. From the
processor time of a microbatch there come the milliseconds that it takes anywhere: a part that is the same
everywhere, one that grows with the stage's FLOPs, and one of rounds, where there are mates; less what a node
takes that has nothing to do. ``agoractl run plan --simulate --measured`` is given that, and says what
a swarm will do, on a line of its own, before it is started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import numpy as np

from agorad.cli.plan import LOOPBACK
from agorad.demo import layout
from agorad.demo.layout import Layout, Plan
from agorad.lab.network import Line, lab
from stage.config import ModelConfig
from stage.parameters import forward_flops
from tests.net.lab_swarms import LabSwarm
from tests.system.placed import Placed, started

SETTLED_S, IDLE_S, WARM_S, MEASURED_S = 3.0, 8.0, 12.0, 25.0
SETTINGS = ("training.eval_every=0", "worker.snapshot_every=50")
CALIBRATION = "1/1/2,model.layers=[1,3,2]"
TICKS = os.sysconf("SC_CLK_TCK")
CORES = len(os.sched_getaffinity(0))


@attrs.frozen(kw_only=True)
class Swarm:
    """What is written as said above."""

    words: str
    counts: tuple[int, ...]
    waits: tuple[tuple[float, ...], ...] = ()
    """Milliseconds of each replica of each stage; empty: what this machine takes."""
    link: tuple[float, float] | None = None
    """Mbit/s, and milliseconds there and back."""
    settings: tuple[str, ...] = ()

    @classmethod
    def read(cls, words: str) -> Swarm:
        first, *rest = _split(words)
        counts = tuple(int(count) for count in first.split("/"))
        waits: tuple[tuple[float, ...], ...] = ()
        link, settings = None, []
        for word in rest:
            name, _, value = word.partition("=")
            if name == "wait":
                given = [[float(each) for each in stage.split("+")] for stage in value.split("/")]
                given = given * len(counts) if len(given) == 1 else given
                waits = tuple(
                    tuple(each * count if len(each) == 1 else each)
                    for each, count in zip(given, counts, strict=True)
                )
            elif name == "link":
                mbps, rtt_ms = value.split("+")
                link = float(mbps), float(rtt_ms)
            else:
                settings.append(word)
        return cls(words=words, counts=counts, waits=waits, link=link, settings=tuple(settings))

    @property
    def plan(self) -> Plan:
        return Plan(
            stages=len(self.counts), workers=max(self.counts), trainers=1, steps=None, seconds=None,
            data=None, assignments=(*SETTINGS, *self.settings),
        )  # fmt: skip

    @property
    def names(self) -> list[list[str]]:
        """Of the workers of each stage."""
        return [[f"worker-{stage}-{one}" for one in range(count)] for stage, count in enumerate(self.counts)]


def _split(words: str) -> list[str]:
    """At commas that are in no brackets."""
    parts, depth = [""], 0
    for char in words:
        depth += (char == "[") - (char == "]")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


@attrs.frozen
class Measured:
    """Of a while in which a swarm ran."""

    seconds: float
    completed: int
    tokens: int
    """Of a microbatch."""
    latency_s: float
    """From end to end, the median."""
    busy: int
    """Times that a replica had no room."""
    added: Mapping[str, int]
    """Microbatches by worker."""
    processor_s: Mapping[str, float]
    """By node."""
    elsewhere: float
    """Processors that were busy with anything else."""
    idle: Mapping[str, float]
    """Share of a processor that each node took while there was nothing to do yet."""

    @property
    def tokens_per_second(self) -> float:
        return self.completed * self.tokens / self.seconds

    @property
    def others_s(self) -> float:
        """Processor seconds of a microbatch that are no worker's."""
        others = (took for name, took in self.processor_s.items() if name not in self.added)
        return sum(others) / self.completed

    def words(self) -> dict[str, Any]:
        """For people."""
        return {
            "tokens_per_second": round(self.tokens_per_second),
            "latency_s": round(self.latency_s, 2),
            "busy": self.busy,
            "cores": round(sum(self.processor_s.values()) / self.seconds, 2),
            "elsewhere": round(self.elsewhere, 2),
            "added": dict(self.added),
            "ms": {name: round(1000 * took / self.completed, 1) for name, took in self.processor_s.items()},
            "idle": {name: round(share, 3) for name, share in self.idle.items()},
        }


@contextmanager
def laid_out(swarm: Swarm, folder: Path) -> Iterator[Placed]:
    """Its files, and its lines for as long as this lasts. NoLab where there can be none."""
    folder.mkdir()
    wanted = {name for stage in swarm.names for name in stage} | {"seed", "authority", "trainer-0"}
    with ExitStack() as held:
        if swarm.link is None:
            made, places = layout.prepare(swarm.plan, folder), {}
        else:
            mbps, rtt_ms = swarm.link
            line = Line(up_mbps=mbps, down_mbps=mbps, delay_ms=rtt_ms / 4)
            behind = held.enter_context(lab([line] * (len(wanted) - 2)))
            names = [name for stage in swarm.names for name in stage]
            places = dict(zip(names, behind[1:], strict=True))
            for stage in range(len(swarm.counts)):
                for one in range(max(swarm.counts)):
                    places.setdefault(f"worker-{stage}-{one}", behind[0])
            places |= dict.fromkeys(("seed", "authority", "trainer-0"), behind[0])
            made = LabSwarm(folder, places).write(swarm.plan)
        for node in made.nodes:
            node.reserved.close()
        made = attrs.evolve(made, nodes=tuple(node for node in made.nodes if node.name in wanted))
        script = str(Path(__file__).with_name("slowed.py"))
        programs = {
            name: (script, str(wait / 1000))
            for names, waits in zip(swarm.names, swarm.waits, strict=False)
            for name, wait in zip(names, waits, strict=True)
        }
        yield Placed(made, places, programs)


def measured(placed: Placed, *, idle_s: float = 0.0) -> Measured:
    """The swarm at work, after a while; before that, for so long, with nothing to do."""
    with started(placed) as running:
        idle: dict[str, float] = {}
        if idle_s:
            time.sleep(SETTLED_S)
            before = _processor_s(running)
            time.sleep(idle_s)
            after = _processor_s(running)
            idle = {name: (after[name] - before[name]) / idle_s for name in before}
        running.start("trainer-0")
        running.wait_for(lambda: bool(_at(running, "trainer-0", "microbatch_completed")), 100, "work")
        time.sleep(WARM_S)
        before, since, all_before = _processor_s(running), time.time(), _machine_s()
        time.sleep(MEASURED_S)
        after, until, all_after = _processor_s(running), time.time(), _machine_s()
        spent = {name: after[name] - before[name] for name in before}
        completed = _at(running, "trainer-0", "microbatch_completed")
        return Measured(
            seconds=until - since,
            completed=sum(since <= at < until for at in completed),
            tokens=running.made.manifest.model.seq,
            latency_s=_latency_s(running.events("trainer-0"), since),
            busy=sum(since <= at < until for name in running.processes for at in _at(running, name, "busy")),
            added={
                name: sum(since <= at < until for at in _at(running, name, "microbatch_added"))
                for name in running.workers
            },
            processor_s=spent,
            elsewhere=(all_after - all_before - sum(spent.values())) / (until - since),
            idle=idle,
        )


def _latency_s(events: list[dict[str, Any]], since: float) -> float:
    issued = {event["ticket"]: event["at"] for event in events if event["event"] == "microbatch_issued"}
    return median(
        event["at"] - issued[event["ticket"]]
        for event in events
        if event["event"] == "microbatch_completed" and event["at"] >= since
    )


def _at(swarm: Placed, name: str, kind: str) -> list[float]:
    return [event["at"] for event in swarm.events(name) if event["event"] == kind]


def _processor_s(swarm: Placed) -> dict[str, float]:
    found = {}
    for name, process in swarm.processes.items():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        found[name] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


def _machine_s() -> float:
    """Processor seconds of everything since the start, what a hypervisor gave to others included."""
    user, nice, system, _idle, _wait, *others = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / TICKS


@attrs.frozen
class Calibration:
    """What one worker was measured to take: processor seconds of a microbatch."""

    same_s: float
    """Whatever the stage."""
    flop_s: float
    """For each FLOP of a forward pass."""
    mates_s: float
    """For each replica of the stage, if it is not the only one."""
    others_s: float
    """Of the trainer and all others."""
    idle_worker: float
    idle_others: float
    """Shares of a processor that go without a microbatch: of each worker, of all others together."""
    elsewhere: float
    """Processors that were busy with other things."""

    @classmethod
    def of(cls, model: ModelConfig, run: Measured) -> Calibration:
        """Three stages, three unknowns."""
        spent = {name: took - run.idle.get(name, 0.0) * run.seconds for name, took in run.processor_s.items()}
        sums, rows = [0.0] * model.stages, []
        for name in run.added:
            sums[int(name.split("-")[1])] += spent[name] / run.completed
        for stage in range(model.stages):
            count = sum(name.split("-")[1] == str(stage) for name in run.added)
            rows.append([1.0, forward_flops(model, stage), float(count if count > 1 else 0)])
        same_s, flop_s, mates_s = map(float, np.linalg.solve(rows, sums))
        if mates_s < 0:  # lost in the noise: nothing costs less than nothing
            (same_s, flop_s), mates_s = map(float, np.linalg.lstsq([row[:2] for row in rows], sums)[0]), 0.0
        return cls(
            same_s=same_s,
            flop_s=flop_s,
            mates_s=mates_s,
            others_s=run.others_s,
            idle_worker=sum(run.idle[name] for name in run.added) / len(run.added),
            idle_others=sum(share for name, share in run.idle.items() if name not in run.added),
            elsewhere=run.elsewhere,
        )

    def stage_s(self, model: ModelConfig, stage: int, replicas: int) -> float:
        """With its part of what the nodes take that are no workers."""
        mates_s = self.mates_s * replicas if replicas > 1 else 0.0
        return (
            self.same_s + self.flop_s * forward_flops(model, stage) + mates_s + self.others_s / model.stages
        )

    def pace(self, run: Measured) -> float:
        """How much more the same work took in that run: machines that share their hardware with others have
        slower and faster minutes. Trainer, authority and seed do the same for a microbatch of any swarm."""
        return run.others_s / self.others_s

    def free(self, workers: int) -> float:
        """Share of the processors that is left for microbatches."""
        return 1 - (workers * self.idle_worker + self.idle_others) / CORES


def prediction(swarm: Swarm, made: Layout, known: Calibration, minutes: float = 3.0) -> dict[str, Any]:
    """What ``agoractl run plan --simulate`` says."""
    model = made.manifest.model
    if swarm.waits:
        # half in each pass, as ``slowed`` does it
        times = "/".join(",".join(f"{wait / 2:g}+{wait / 2:g}" for wait in waits) for waits in swarm.waits)
    else:
        ms = 1000 / known.free(sum(swarm.counts))
        each = [ms * known.stage_s(model, stage, count) for stage, count in enumerate(swarm.counts)]
        times = "/".join(f"{took:.4f}" for took in each)
    command = [
        sys.executable, "-m", "agorad.cli", "run", "plan", str(made.manifest_path), "--device", "cpu",
        "--graph", "retain", "--simulate", "--json", "--minutes", str(minutes),
        "--counts", "/".join(map(str, swarm.counts)), "--measured", times,
    ]  # fmt: skip
    if not swarm.waits:
        command += ["--cores", str(CORES)]
    mbps, rtt_ms = swarm.link or (LOOPBACK.mbps, LOOPBACK.rtt_ms)
    command += ["--mbps", str(mbps), "--rtt-ms", str(rtt_ms)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["simulated"]
    return found


def calibrated(folder: Path) -> Calibration:
    """From a swarm that is none of the predicted ones."""
    with laid_out(Swarm.read(CALIBRATION), folder) as placed:
        run = measured(placed, idle_s=IDLE_S)
        say(calibrating=run.words())
        return Calibration.of(placed.made.manifest.model, run)


def main(words: Sequence[str]) -> None:
    swarms = [Swarm.read(each) for each in words]
    with tempfile.TemporaryDirectory() as folder:
        known = calibrated(Path(folder) / "calibration")
        say(calibration=attrs.asdict(known))
        for number, swarm in enumerate(swarms):
            with laid_out(swarm, Path(folder) / str(number)) as placed:
                said = prediction(swarm, placed.made, known)
                predicted = said["tokens_per_second"]
                say(
                    swarm=swarm.words, predicted=round(predicted), latency_s=round(said["seconds_p50"], 2),
                    busy=said["busy"], utilisation=_busy(said),
                )  # fmt: skip
                run = measured(placed)
                off = round(predicted / run.tokens_per_second - 1, 3)
                say(swarm=swarm.words, off=off, pace=round(known.pace(run), 2), measured=run.words())


def _busy(said: dict[str, Any]) -> list[float]:
    return [round(stage["utilisation"], 2) for stage in said["stages"]]


def say(**what: Any) -> None:
    print(json.dumps({"at": time.strftime("%H:%M:%S"), **what}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
