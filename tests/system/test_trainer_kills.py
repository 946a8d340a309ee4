"""A trainer that is killed again and again: it skips no row, and repeats at most what was in flight."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from agorad.ask import ask
from tests.system.ledger import check_ledger
from tests.system.swarms import Demo, demo

KILLS = 10
STEPS = 90
BATCH = 8
SEQ = 32
SMALL = (
    "--set",
    f"training.target_batch={BATCH}",
    "--set",
    f"model.seq={SEQ}",
    "--set",
    "training.eval_every=40",
)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(8)
    text = tmp_path / "text.jsonl"
    text.write_text("".join('{"text": "%s"}\n' % (f"number {i} " * 40) for i in range(400)))
    options = ("--stages", "1", "--workers", "1", "--steps", str(STEPS), "--data", str(text))
    at_work: list[int] = []
    with demo(tmp_path / "swarm", *options, *SMALL) as swarm:
        name = "trainer-0"
        swarm.wait_for(lambda: swarm.count(name, "microbatch_completed") > 5, 60, "first work")
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.0, 1.5))
            before = swarm.count(name, "microbatch_completed")
            swarm.kill(name)
            issued, done = (
                {event["ticket"] for event in swarm.events(name) if event["event"] == f"microbatch_{what}"}
                for what in ("issued", "completed")
            )
            at_work.append(len(issued - done))
            swarm.restart(name)
            wait_for_more(swarm, before)
        report = swarm.finish()
        check_ledger(swarm, 1)
        events = swarm.events(name)
    issued = Counter(event["ticket"] for event in events if event["event"] == "microbatch_issued")
    done = Counter(event["ticket"] for event in events if event["event"] == "microbatch_completed")
    assert set(done) == set(issued) == {f"train:0:{position}" for position in range(STEPS * BATCH)}
    assert sum(issued.values()) - len(issued) <= sum(at_work)
    assert sum(done.values()) - len(done) <= KILLS, "said twice: only one that the kill met between two lines"
    assert sum(at_work) > 0, "no kill met anything in flight"
    assert report["microbatches"]["lost"] == report["microbatches"]["failed"] == 0
    assert report["steps"] == STEPS
    assert report["exit"]["trainer-0"] == -9


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_trainer_that_is_gone_for_good_and_one_that_comes_back(tmp_path: Path) -> None:
    """Its shard passes to another; in the end every position of both shards is done."""
    options = ("--stages", "1", "--workers", "1", "--trainers", "2", "--steps", str(STEPS), *SMALL)
    with demo(tmp_path / "swarm", *options) as swarm:
        for name in ("trainer-0", "trainer-1"):
            swarm.wait_for(lambda: swarm.count(name, "microbatch_completed") > 5, 60, "first work")  # noqa: B023
            ask(Path(swarm.node(name)["control"]), "pause")  # leases go on; the run is not over too soon
        swarm.kill("trainer-1")
        swarm.wait_for(lambda: 1 in shards(swarm, "trainer-0", "shard_taken"), 90, "taking over")
        swarm.restart("trainer-1")
        swarm.wait_for(lambda: 1 in shards(swarm, "trainer-0", "shard_left"), 60, "giving back")
        swarm.wait_for(lambda: shards(swarm, "trainer-1", "shard_taken").count(1) > 1, 60, "going home")
        swarm.kill("trainer-0")
        report = swarm.finish()
        check_ledger(swarm, 1)
        events = [event for name in ("trainer-0", "trainer-1") for event in swarm.events(name)]
    done = {event["ticket"] for event in events if event["event"] == "microbatch_completed"}
    assert done == {f"train:{shard}:{n}" for shard in (0, 1) for n in range(STEPS * BATCH // 2)}
    assert report["microbatches"]["lost"] == report["microbatches"]["failed"] == 0
    assert report["steps"] >= STEPS
    assert report["exit"]["trainer-0"] == report["exit"]["trainer-1"] == -9


def shards(swarm: Demo, name: str, what: str) -> list[int]:
    return [event["shard"] for event in swarm.events(name) if event["event"] == what]


def wait_for_more(swarm: Demo, before: int) -> None:
    swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > before, 90, "work after a kill")
