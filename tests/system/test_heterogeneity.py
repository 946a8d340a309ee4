"""Replicas of one stage, as processes, that differ in speed by ten to one: no part of it is lost."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from agorad.demo import layout
from agorad.demo.layout import Plan
from tests.system.placed import Placed, started

SPEEDS = {"worker-1-0": 0.4, "worker-1-1": 0.4, "worker-1-2": 4.0}
"""Seconds a microbatch: waits, so that this machine is not what bounds them."""
WARM_S, MEASURED_S = 30.0, 60.0
BUSY = 2.0
"""Load a processor; the swarm itself makes less than 1."""
PLAN = Plan(
    stages=2, workers=3, trainers=1, steps=None, seconds=None, data=None,
    assignments=("model.seq=32", "training.target_batch=64", "worker.snapshot_every=50"),
)  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(700)
def test_ten_to_one_in_speed_loses_little(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    script = str(Path(__file__).with_name("slowed.py"))
    programs = {name: (script, str(seconds)) for name, seconds in SPEEDS.items()}
    with started(Placed(layout.prepare(PLAN, tmp_path / "s"), {}, programs)) as swarm:
        swarm.start("trainer-0")
        swarm.wait_for(lambda: bool(done(swarm, 0.0)), 100, "work")
        time.sleep(WARM_S)
        since = time.time()
        time.sleep(MEASURED_S)
        work = done(swarm, since)
        seconds = time.time() - since
    load = os.getloadavg()[0]
    able = {name: seconds / each for name, each in SPEEDS.items()}
    if load > BUSY * len(os.sched_getaffinity(0)):
        pytest.skip(
            f"the machine was busy with other things (load {load:.1f}), which is what would be measured"
        )
    assert sum(work.values()) >= 0.9 * sum(able.values()), (work, able)
    for name, most in able.items():
        assert work[name] >= 0.5 * most, f"{name} starves: {work[name]} of {most:.0f}"


def done(swarm: Placed, since: float) -> Counter[str]:
    """Microbatches that each replica of the last stage added."""
    return Counter(
        name
        for name in SPEEDS
        for event in swarm.events(name)
        if event["event"] == "microbatch_added" and event["at"] >= since
    )
