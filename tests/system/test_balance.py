"""Replicas go where they are missed: a real swarm with 4/1/1 replicas comes to 2/2/2 by itself."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agorad.authority.store import Grant, Store
from agorad.demo.layout import DemoNode, Layout, Plan, prepare
from p2p.membership import issue

SETTINGS = ("model.seq=64", "training.target_batch=8", "admission.moves_per_hour=60")
DAY_S = 86400.0


def place(layout: Layout, node: DemoNode, stage: int) -> None:
    """The node's earlier life, in which it served ``stage``: what it kept, and what the authority knows."""
    authority = layout.of_role("authority")[0]
    now = time.time()
    certificate = issue(
        authority.identity, run=layout.manifest.run.id, account="demo", peer_id=node.identity.peer_id,
        role="worker", stage=stage, issued=now, expires=now + DAY_S, grace_until=now + DAY_S,
    )  # fmt: skip
    (node.folder / "certificate").write_bytes(certificate.encode())
    store = Store(authority.folder / "authority.sqlite")
    try:
        peer = node.identity.peer_id
        grant = Grant(peer_id=peer, account="demo", stage=stage, issued=now, expires=now + DAY_S)
        store.grant(grant, max_nodes=100, max_per_account=100, now=now)
    finally:
        store.close()
    text = re.sub(r"(?m)^stage = .*\n", "", node.config.read_text())
    assert text != node.config.read_text()
    node.config.write_text(text)


def events(node: DemoNode) -> list[dict[str, Any]]:
    """So far; the last line may be half written."""
    lines = node.events.read_text().splitlines(keepends=True) if node.events.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def stages(workers: list[DemoNode]) -> list[int]:
    """Replicas that are ACTIVE at each stage, by what they said last."""
    where: Counter[int] = Counter()
    for node in workers:
        stage, phase = None, ""
        for event in events(node):
            if event["event"] == "computing":
                stage, phase = event["stage"], ""
            elif event["event"] == "phase":
                phase = event["to"]
        if stage is not None and phase == "active":
            where[stage] += 1
    return [where[stage] for stage in range(3)]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_four_one_one_becomes_two_two_two(tmp_path: Path) -> None:
    plan = Plan(
        stages=3, workers=2, trainers=1, steps=None, seconds=500.0, data=None, assignments=SETTINGS
    )  # fmt: skip
    layout = prepare(plan, tmp_path)
    workers = layout.of_role("worker")
    for node, stage in zip(workers, (0, 0, 0, 1, 0, 2), strict=True):
        place(layout, node, stage)
    for node in layout.nodes:
        node.reserved.close()
    trainer = layout.of_role("trainer")[0]
    processes = {}
    try:
        for node in layout.nodes:
            command = [sys.executable, "-m", "agorad.main", "--config", str(node.config)]
            with (node.folder / "err").open("wb") as errors:
                processes[node.name] = subprocess.Popen(command, stderr=errors)
        wait_for(lambda: stages(workers) == [4, 1, 1], 180, "the swarm stands")
        wait_for(lambda: stages(workers) == [2, 2, 2], 300, f"balance: {stages(workers)}")
        moved = [event for node in workers for event in events(node) if event["event"] == "moving"]
        before = sum(event["event"] == "microbatch_completed" for event in events(trainer))
        # Nobody goes on moving, and training does.
        time.sleep(45)
        assert stages(workers) == [2, 2, 2]
        after = [event["event"] for event in events(trainer)]
        assert after.count("microbatch_completed") > before
        assert "microbatch_failed" not in after
        again = [event for node in workers for event in events(node) if event["event"] == "moving"]
        assert len(again) == len(moved) == 2
        assert [(event["origin"], event["target"]) for event in moved] in ([(0, 1), (0, 2)], [(0, 2), (0, 1)])
        # In order: the trainer first, which waits for what it has in flight.
        for name in (trainer.name, *(node.name for node in workers), "authority", "seed"):
            processes[name].send_signal(signal.SIGTERM)
            assert processes[name].wait(60) == 0, (layout.folder / name / "err").read_text()
        issued = {e["ticket"] for e in events(trainer) if e["event"] == "microbatch_issued"}
        done = {e["ticket"] for e in events(trainer) if e["event"] == "microbatch_completed"}
        assert issued == done
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
