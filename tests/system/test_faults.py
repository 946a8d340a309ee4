"""What else can happen to a swarm: no seed, a frozen worker, several trainers, an end by time, Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.system.ledger import check_ledger
from tests.system.swarms import demo, processes_under

SMALL = ("--set", "model.seq=64", "--set", "training.target_batch=8")


@pytest.mark.long
def test_the_seed_is_needed_only_to_come_together(tmp_path: Path) -> None:
    folder = tmp_path / "swarm"
    with demo(folder, "--stages", "2", "--workers", "2", "--steps", "40", *SMALL) as swarm:
        swarm.swarm()
        swarm.kill("seed")
        report = swarm.finish()
        check_ledger(swarm, 2)
    assert report["microbatches"]["lost"] == report["microbatches"]["failed"] == 0
    assert report["rounds"]["completed"] >= 3
    assert report["rounds"]["mean_fraction"] >= 0.99
    assert report["exit"].pop("seed") == -signal.SIGKILL
    assert set(report["exit"].values()) == {0}


def test_a_frozen_worker_is_left_and_taken_back(tmp_path: Path) -> None:
    """SIGSTOP closes no connection: only its silence shows. Woken up, it must not add what others did."""
    folder = tmp_path / "swarm"
    with demo(folder, "--stages", "2", "--workers", "2", "--seconds", "45", *SMALL) as swarm:
        swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > 20, 60, "first work")
        pid = swarm.node("worker-1-1")["pid"]
        before = swarm.count("worker-1-1", "microbatch_added")
        os.kill(pid, signal.SIGSTOP)
        frozen_at = time.time()
        try:
            swarm.wait_for(
                lambda: any(
                    event["event"] == "microbatch_completed" and event["at"] > frozen_at + 0.5
                    for event in swarm.events("trainer-0")
                ),
                5.0,
                "work without it",
            )
            swarm.wait_for(lambda: time.time() > frozen_at + 8.0, 20.0, "end of the frost")
        finally:
            os.kill(pid, signal.SIGCONT)
        swarm.wait_for(
            lambda: swarm.count("worker-1-1", "microbatch_added") > before + 5,
            60.0,
            "worker that works again",
        )
        report = swarm.finish()
        check_ledger(swarm, 2)
    work = report["microbatches"]
    assert work["lost"] == work["failed"] == 0
    assert work["twice"] <= 8, "a fault makes at most what was in its backward pass count twice"
    assert set(report["exit"].values()) == {0}


def test_two_trainers_share_the_steps(tmp_path: Path) -> None:
    folder = tmp_path / "swarm"
    shape = ("--stages", "2", "--workers", "1", "--trainers", "2", "--steps", "9")
    with demo(folder, *shape, *SMALL) as swarm:
        report = swarm.finish()
        check_ledger(swarm, 2)
        each = [swarm.count(f"trainer-{index}", "microbatch_completed") for index in range(2)]
    assert each == [36, 36]
    assert report["steps"] == 9
    assert report["rounds"] == {"completed": 0, "partial": 0, "failed": 0, "mean_fraction": None}
    assert report["disagreement"] is None


def test_ctrl_c_stops_everything_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "swarm"
    with demo(folder, "--stages", "2", "--workers", "1", "--seconds", "300", *SMALL) as swarm:
        swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > 5, 60, "first work")
        swarm.process.send_signal(signal.SIGINT)
        out, err = swarm.process.communicate(timeout=60)
    assert swarm.process.returncode == 1
    assert "interrupted" in err
    assert '"lost": 0' in out
    assert processes_under(folder) == []
    for name in ("seed", "authority", "trainer-0", "worker-0-0", "worker-1-0"):
        last = swarm.events(name)[-1]
        assert (last["event"], last["code"]) == ("stopped", 0)
