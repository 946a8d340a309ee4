"""A whole run that ends with nobody left, goes on from its checkpoint store, and is taken back to a step."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from agorad import run
from agorad.demo.layout import Layout, Plan, prepare
from agorad.demo.swarm import Swarm
from agorad.run import Checkpoint
from agorad.settings import unstructure
from p2p.identity import Identity
from stage.checkpoints import CheckpointStore, Line
from tests.hub_store import DATASET, hub

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ROLES = ("seed", "authority", "worker", "trainer")
STAGES = 2
PLAN = Plan(
    stages=STAGES, workers=2, trainers=1, steps=100_000, seconds=None, data=None,
    assignments=("training.target_batch=8", "training.eval_every=0", "model.seq=64"),
)  # fmt: skip


@pytest.fixture(params=["folder", "hf"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder, or a dataset at a server that answers as the hub does."""
    if request.param == "folder":
        yield str(tmp_path / "store")
    else:
        with hub(monkeypatch):
            yield f"hf://datasets/{DATASET}/store"


def laid_out(folder: Path, url: str) -> Layout:
    """A demo of two stages with two workers each; the first of each writes checkpoints."""
    layout = prepare(PLAN, folder)
    writers = tuple(node.identity.peer_id for node in layout.nodes if node.name.endswith("-0"))[:-1]
    changed = attrs.evolve(
        layout.manifest,
        checkpoint=Checkpoint(store=url, writers=writers, every=5, keep=50),
    )
    manifest = run.from_table(unstructure(changed)).signed(Identity.load(folder / "operator.key"))
    run.save(manifest, layout.manifest_path)
    return attrs.evolve(layout, manifest=manifest)


def events(swarm: Swarm, kind: str, since: float = 0.0) -> dict[str, list[dict[str, Any]]]:
    """Of the workers, by name."""
    found = {}
    for running in swarm.of_role("worker"):
        path = running.node.events
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        found[running.node.name] = [e for e in entries if e["event"] == kind and e["at"] > since]
    return found


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.5)


def agoractl(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def active_again(swarm: Swarm, since: float) -> Callable[[], bool]:
    return lambda: all(
        any(e["to"] == "active" for e in entries) for entries in events(swarm, "phase", since).values()
    )


def test_everybody_is_gone_the_run_goes_on_and_is_rolled_back(tmp_path: Path, url: str) -> None:
    layout = laid_out(tmp_path, url)
    stores = [CheckpointStore(url, layout.manifest.run.id, stage) for stage in range(STAGES)]
    swarm = Swarm(layout)
    swarm.start(*ROLES)
    try:
        until(lambda: all(len(store.entries(Line())) >= 3 for store in stores), 150, "no checkpoints")
        for running in swarm.nodes:
            running.process.send_signal(signal.SIGKILL)
            running.process.wait()
        kept = [store.entries(Line())[-1].step for store in stores]
        for node in layout.nodes:
            shutil.rmtree(node.folder / "snapshots", ignore_errors=True)
        swarm, since = Swarm(layout), time.time()
        swarm.start(*ROLES)
        until(active_again(swarm, since), 150, "not all workers are active again")
        restored = [entry for entries in events(swarm, "restored", since).values() for entry in entries]
        assert {entry["step"] for entry in restored} == set(kept)
        assert not any(events(swarm, "checkpoint_failed", since).values())
        first = min(kept)
        until(
            lambda: all(store.entries(Line())[-1].step >= first + 10 for store in stores), 150, "no training"
        )

        listed = json.loads(agoractl("run", "checkpoints", str(layout.manifest_path), "--json"))
        back_to = max(stage["checkpoints"][0]["step"] for stage in listed["stages"])
        since = time.time()
        done = json.loads(
            agoractl(
                "run", "rollback", str(layout.manifest_path), "--step", str(back_to),
                "--key", str(tmp_path / "operator.key"), "--json",
            )
        )  # fmt: skip
        agoractl(
            "authority", "publish", str(layout.manifest_path),
            "--config", str(tmp_path / "authority" / "agorad.toml"),
        )  # fmt: skip
        until(active_again(swarm, since), 200, "not all workers are active after the roll-back")
        for stage, step in enumerate(done["steps"]):
            of_stage = events(swarm, "restored", since)
            entries = [
                e for name, found in of_stage.items() if name.startswith(f"worker-{stage}-") for e in found
            ]
            assert entries, stage
            assert {e["step"] for e in entries} == {step}
        line = Line(1, back_to)
        until(
            lambda: all(any(e.generation == 1 for e in store.entries(line)) for store in stores),
            150,
            "no checkpoint of the new generation",
        )
        assert all(
            store.entries(Line()) == [e for e in store.entries(line) if e.generation == 0] for store in stores
        )
        for running in swarm.of_role("worker"):
            assert not (running.node.folder / "snapshots").exists()
    finally:
        exits = swarm.stop()
    assert swarm.unclean(exits) == [], exits
