"""A swarm whose replicas take every update together, and one of them that is killed and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.system.swarms import demo

SETTINGS = (
    "--set", "training.averaging=powersgd",
    "--set", "training.powersgd_rank=8",
    "--set", "training.average_every=3",
    "--set", "training.eval_every=10",
    "--set", "model.seq=64",
    "--set", "training.target_batch=8",
    "--set", "worker.snapshot_every=4",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(400)
def test_replicas_step_together_and_one_that_was_away_does_again(tmp_path: Path) -> None:
    with demo(tmp_path / "swarm", "--stages", "1", "--workers", "3", "--seconds", "100", *SETTINGS) as swarm:
        swarm.wait_for(lambda: swarm.count("worker-0-0", "gradients_averaged") > 5, 90, "synchronous steps")
        swarm.kill("worker-0-0")
        before = swarm.count("worker-0-1", "gradients_averaged")
        swarm.wait_for(
            lambda: swarm.count("worker-0-1", "gradients_averaged") > before + 5, 60, "steps without it"
        )
        again = swarm.count("worker-0-0", "gradients_averaged")
        swarm.restart("worker-0-0")
        swarm.wait_for(
            lambda: swarm.count("worker-0-0", "gradients_averaged") > again + 5,
            90,
            "its steps with the others",
        )
        report = swarm.finish()
        taken = {
            name: {
                event["step"]: event for event in swarm.events(name) if event["event"] == "gradients_averaged"
            }
            for name in ("worker-0-0", "worker-0-1", "worker-0-2")
        }
        phases = [e["to"] for e in swarm.events("worker-0-0") if e["event"] == "phase"]
    work = report["microbatches"]
    assert (work["lost"], work["failed"]) == (0, 0)
    assert report["loss"]["last"] < 0.9 * report["loss"]["first"]
    assert phases[-3:] == ["syncing", "warming", "active"]
    assert members(taken["worker-0-1"], 3) > 10
    assert members(taken["worker-0-1"], 2) > 5  # while one was away
    shared = set(taken["worker-0-1"]) & set(taken["worker-0-2"])
    assert len(shared) > 0.8 * max(map(len, taken.values()))
    assert report["disagreement"] < 0.02


def members(taken: dict[int, Any], count: int) -> int:
    """Steps that so many replicas took together."""
    return sum(len(event["members"]) == count for event in taken.values())
