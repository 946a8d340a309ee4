"""Workers killed at random moments, again and again, and started again: what must hold, holds each time."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.system.ledger import check_ledger
from tests.system.swarms import Demo, demo, processes_under

SMALL = ("--set", "model.seq=64", "--set", "training.target_batch=8", "--set", "worker.snapshot_every=4")


def completions_after(swarm: Demo, moment: float) -> list[float]:
    return [
        event["at"]
        for event in swarm.events("trainer-0")
        if event["event"] == "microbatch_completed" and event["at"] > moment
    ]


def is_active(swarm: Demo, name: str, sessions: int) -> bool:
    events = swarm.events(name)
    began = [index for index, event in enumerate(events) if event["event"] == "started"]
    if len(began) < sessions:
        return False
    phases = [event["to"] for event in events[began[-1] :] if event["event"] == "phase"]
    return bool(phases) and phases[-1] == "active"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_and_restarts(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    stages, workers = rng.choice([(3, 2), (2, 3), (2, 2)])
    folder = tmp_path / "swarm"
    again: list[subprocess.Popen[bytes]] = []
    shape = ("--stages", str(stages), "--workers", str(workers))
    with demo(folder, *shape, "--seconds", "150", *SMALL) as swarm:
        swarm.swarm()
        ends = time.monotonic() + 110
        kills = 0
        sessions: dict[str, int] = {}
        while time.monotonic() < ends:
            time.sleep(rng.uniform(1.0, 6.0))
            name = f"worker-{rng.randrange(stages)}-{rng.randrange(workers)}"
            mates = [f"{name[:-1]}{i}" for i in range(workers) if f"{name[:-1]}{i}" != name]
            if not any(is_active(swarm, mate, sessions.get(mate, 1)) for mate in mates):
                continue
            killed_at = swarm.kill(name)
            kills += 1
            swarm.wait_for(lambda at=killed_at: bool(completions_after(swarm, at)), 5.0, f"life after {name}")
            time.sleep(rng.uniform(0.0, 2.0))
            again.append(swarm.restart(name))
            sessions[name] = sessions.get(name, 1) + 1
            swarm.wait_for(lambda n=name: is_active(swarm, n, sessions[n]), 60.0, f"{name} ACTIVE again")
        report = swarm.finish()
        check_ledger(swarm, stages)
    assert kills >= 3
    work = report["microbatches"]
    assert (work["lost"], work["failed"]) == (0, 0)
    assert work["completed"] == work["issued"]
    assert report["loss"]["last"] < 0.7 * report["loss"]["uniform"]
    assert [process.wait(40) for process in again if process.poll() != -9] == [0] * len(
        [process for process in again if process.returncode != -9]
    )
    assert processes_under(folder) == []
