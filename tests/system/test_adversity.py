"""What a machine does to a node: its disk full or read-only, its socket gone, no descriptors, its clock set,
time stood still. It survives, or ends with the right code and a sentence; no snapshot is ever damaged.

One swarm for most of it, one trouble after the other, to a worker while it trains and to the nodes around it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.demo import layout
from agorad.demo.layout import Plan
from agorad.supervision.clock import STOOD_S
from stage.snapshot import SnapshotStore, State
from tests.system.swarms import Demo, demo

SMALL = (
    "--stages", "1", "--workers", "2", "--seconds", "600", "--set", "model.seq=32",
    "--set", "training.target_batch=8", "--set", "worker.snapshot_every=1",
)  # fmt: skip
HOUR = 3600.0


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with demo(tmp_path_factory.mktemp("adversity") / "swarm", *SMALL) as running:
        running.wait_for(lambda: running.count("worker-0-0", "saved") > 1, 200, "training")
        yield running


def status(swarm: Demo, name: str) -> dict[str, Any]:
    return ask(Path(swarm.node(name)["control"]), "status", timeout=20.0)


def trains_on(swarm: Demo, name: str = "worker-0-0", steps: int = 2) -> None:
    """This node follows that many more steps."""
    before = swarm.count(name, "step")
    swarm.wait_for(lambda: swarm.count(name, "step") >= before + steps, 60, f"step of {name}")


def sound(swarm: Demo, name: str) -> None:
    """Its newest snapshot is whole."""
    folder = swarm.folder / name / "snapshots"
    for _ in range(20):
        store = SnapshotStore(folder)
        if store.load_newest() is not None and not store.problems:
            return
        time.sleep(0.1)  # the node removed the one that was just looked at
    raise AssertionError(store.problems)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_control_socket_that_is_gone_is_made_again(swarm: Demo) -> None:
    node = swarm.node("worker-0-0")
    path = Path(node["control"])
    path.unlink()
    swarm.wait_for(path.exists, 60, "socket")
    assert status(swarm, "worker-0-0")["pid"] == node["pid"]
    path.unlink()
    path.write_text("in the way")  # of somebody else: it is left alone
    time.sleep(0.5)
    path.unlink()
    swarm.wait_for(path.is_socket, 60, "socket")
    assert status(swarm, "worker-0-0")["pid"] == node["pid"]
    trains_on(swarm)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no prlimit on this system")
def test_no_descriptors_for_a_while(swarm: Demo) -> None:
    """Nothing new can be opened: connections, snapshots. What is open goes on."""
    pid = swarm.node("worker-0-0")["pid"]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    saved = swarm.count("worker-0-0", "saved")
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, before[1]))
        swarm.wait_for(lambda: swarm.count("worker-0-0", "save_failed") > 0, 60, "failed snapshot")
        trains_on(swarm)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    swarm.wait_for(lambda: swarm.count("worker-0-0", "saved") > saved + 1, 60, "snapshot")
    swarm.wait_for(lambda: not status(swarm, "worker-0-0")["warnings"], 60, "end of warnings")
    sound(swarm, "worker-0-0")


CLOCK = """
import mmap, os, struct, time
with open(os.environ["AGORA_TEST_CLOCK"], "r+b") as file:
    _offset = mmap.mmap(file.fileno(), 8)
_true = time.time
time.time = lambda: _true() + struct.unpack("d", _offset)[0]
"""
"""A system clock that a test can set, for one process."""


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_clock_that_is_set_by_hours_costs_nothing(swarm: Demo, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    dial = tmp_path / "clock"
    dial.write_bytes(struct.pack("d", 0.0))
    name = "worker-0-1"
    swarm.kill(name)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "agorad.main", "--config", swarm.node(name)["config"]],
        env={**os.environ, "PYTHONPATH": paths, "AGORA_TEST_CLOCK": str(dial)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    swarm.pids[name] = process.pid
    try:
        control = Path(swarm.node(name)["control"])
        swarm.wait_for(lambda: answers(control, process.pid), 60, "restarted worker")
        swarm.wait_for(lambda: status(swarm, name)["phase"] == "active", 90, "active worker")
        refused = swarm.count("worker-0-0", "peer_refused")
        for hours in (1, -2, 0):
            kind = "trouble" if hours else "trouble_over"
            before = swarm.count(name, kind)
            with dial.open("r+b") as file:
                file.write(struct.pack("d", hours * HOUR))
            swarm.wait_for(lambda: swarm.count(name, kind) > before, 60, f"word about {hours} h")  # noqa: B023
            if hours:
                assert any("clock was set" in text for text in status(swarm, name)["warnings"])
            assert 0 < status(swarm, name)["uptime_s"] < 600
            trains_on(swarm, name)
        assert swarm.count("worker-0-0", "peer_refused") == refused
        assert status(swarm, name)["phase"] == "active"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        swarm.restart(name)
        swarm.wait_for(lambda: answers(Path(swarm.node(name)["control"]), swarm.pids[name]), 60, "worker")


def answers(control: Path, pid: int) -> bool:
    try:
        return ask(control, "status", timeout=5.0)["pid"] == pid
    except (Unreachable, NoAnswer, CommandFailed):
        return False


@contextmanager
def mounted(*words: str) -> Iterator[None]:
    """A mount until the block ends; skips where that is not allowed."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", words[-1]], timeout=30, check=True)


def read_only(folder: Path) -> AbstractContextManager[None]:
    return mounted("-o", "bind,ro", str(folder), str(folder))


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@needs_root
@pytest.mark.long
def test_a_state_that_becomes_read_only(swarm: Demo) -> None:
    failed = swarm.count("worker-0-0", "save_failed")
    with read_only(swarm.folder / "worker-0-0" / "snapshots"):
        swarm.wait_for(lambda: swarm.count("worker-0-0", "save_failed") > failed, 60, "failed snapshot")
        trains_on(swarm)
        warnings = status(swarm, "worker-0-0")["warnings"]
        assert any("snapshot not saved" in text and "Read-only" in text for text in warnings)
    saved = swarm.count("worker-0-0", "saved")
    swarm.wait_for(lambda: swarm.count("worker-0-0", "saved") > saved, 60, "snapshot")
    sound(swarm, "worker-0-0")


def fill(path: Path) -> None:
    """All the room that is left."""
    with path.open("ab", buffering=0) as ballast:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while ballast.write(bytes(size)):
                    pass


@needs_root
@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_full_disk(tmp_path: Path) -> None:
    """All of a demo on a small disk that fills up: it trains on, and saves again once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    small = mounted("-t", "tmpfs", "-o", "size=300m", "tmpfs", str(disk))
    with small, demo(disk / "swarm", *SMALL) as running:
        running.wait_for(lambda: running.count("worker-0-0", "saved") > 1, 100, "training")
        pid = running.node("worker-0-0")["pid"]
        step = status(running, "worker-0-0")["step"]

        def told() -> bool:
            fill(disk / "ballast")  # what nodes remove to make room is taken as well
            text = " ".join(status(running, "worker-0-0")["warnings"])
            return "events could not be written" in text and "snapshot not saved" in text

        running.wait_for(told, 60, "warnings")
        running.wait_for(lambda: status(running, "worker-0-0")["step"] > step + 3, 60, "step")
        assert status(running, "worker-0-0")["pid"] == pid
        sound(running, "worker-0-0")
        (disk / "ballast").unlink()
        saved = running.count("worker-0-0", "saved")
        running.wait_for(lambda: running.count("worker-0-0", "saved") > saved + 1, 60, "snapshot")
        sound(running, "worker-0-0")
        running.process.send_signal(signal.SIGINT)
        out, err = running.process.communicate(timeout=120)
        assert set(json.loads(out)["exit"].values()) == {0}, err


@needs_root
def test_a_state_that_is_read_only_from_the_start(tmp_path: Path) -> None:
    """No state, no node: one sentence and the code that no manager restarts on."""
    plan = Plan(stages=1, workers=1, trainers=1, steps=9, seconds=None, data=None, assignments=())
    (node,) = layout.prepare(plan, tmp_path).of_role("seed")
    node.reserved.close()
    with read_only(node.folder):
        done = subprocess.run(
            [sys.executable, "-m", "agorad.main", "--config", str(node.config)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert f"the state folder {node.folder} is not writable" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_minute_of_standing_still(swarm: Demo) -> None:
    stand_still(swarm, 60.0)


def stand_still(swarm: Demo, seconds: float) -> None:
    pid = swarm.pids.get("worker-0-1", swarm.node("worker-0-1")["pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)

    def told() -> bool:
        events = swarm.events("worker-0-1")
        return any(event["event"] == "trouble" and event["kind"] == "standstill" for event in events)

    swarm.wait_for(told, 60, "word about it")
    swarm.wait_for(lambda: status(swarm, "worker-0-1")["phase"] == "active", 90, "active worker")
    trains_on(swarm, "worker-0-1")
    trains_on(swarm, "worker-0-0")


def troubles(swarm: Demo, name: str) -> set[str]:
    return {event["kind"] for event in swarm.events(name) if event["event"] == "trouble"}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_seed_authority_and_trainer_bear_it_as_well(swarm: Demo) -> None:
    """No descriptors, no control socket, a state that is read-only, and a standstill: one after the other."""
    nodes = [node for node in swarm.nodes if node["role"] != "worker"]
    names = [node["name"] for node in nodes]
    assert len(names) == 3
    for node in nodes:
        before = resource.prlimit(node["pid"], resource.RLIMIT_NOFILE)
        resource.prlimit(node["pid"], resource.RLIMIT_NOFILE, (1, before[1]))
        try:
            time.sleep(1.0)
        finally:
            resource.prlimit(node["pid"], resource.RLIMIT_NOFILE, before)
        Path(node["control"]).unlink()
        os.kill(node["pid"], signal.SIGSTOP)
    time.sleep(STOOD_S + 8.0)
    for node in nodes:
        os.kill(node["pid"], signal.SIGCONT)
    for node in nodes:
        swarm.wait_for(Path(node["control"]).is_socket, 60, f"socket of {node['name']}")
        both = {"control", "standstill"}
        swarm.wait_for(lambda: both <= troubles(swarm, node["name"]), 60, "word of it")  # noqa: B023
    if os.geteuid() == 0:
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(read_only(swarm.folder / name))
            trains_on(swarm)
    trains_on(swarm)
    for name in names:
        assert status(swarm, name)["pid"] == swarm.node(name)["pid"]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_swarm_of_all_this_ends_cleanly(swarm: Demo) -> None:
    """The last one to use the swarm."""
    swarm.process.send_signal(signal.SIGINT)
    out, err = swarm.process.communicate(timeout=120)
    report = json.loads(out)
    assert report["exit"].pop("worker-0-1") in (
        0,
        -signal.SIGKILL,
    )  # a test may have killed its first process
    assert set(report["exit"].values()) == {0}, err
    assert report["microbatches"]["lost"] == 0
    for name in ("worker-0-0", "worker-0-1"):
        sound(swarm, name)


class Spoilt:
    """A snapshot's state with absurd weights: every number is finite, what they compute is not."""

    def __init__(self, state: State) -> None:
        self.step, self.updates, self.fingerprint = state.step, state.updates, state.fingerprint
        self.floats = len(state.vectors[0])
        self._state = state

    def read(self, vector: int, start: int, stop: int) -> Tensor:
        part = self._state.vectors[vector][start:stop].clone()
        if vector == 0:
            part[::256] = 1e30
        return part


@pytest.mark.long
@pytest.mark.timeout(600)
def test_weights_that_are_no_numbers_end_a_node_and_its_next_life_is_sound(tmp_path: Path) -> None:
    """What a broken memory left in both snapshots: 15, on which managers restart, and then it trains."""
    with demo(tmp_path / "swarm", *SMALL) as running:
        name = "worker-0-0"
        running.wait_for(lambda: running.count(name, "saved") > 2, 100, "training")
        running.kill(name)
        store = SnapshotStore(running.folder / name / "snapshots")
        state = store.load_newest()
        assert state is not None
        for _ in range(2):
            store.save(Spoilt(state))
        process = running.restart(name)
        assert process.wait(250) == 15
        told = [event for event in running.events(name) if event["event"] in ("trouble", "stopped")]
        assert [event["event"] for event in told[-3:]] == ["trouble", "trouble", "stopped"]
        assert "none of 2 snapshots holds weights to go on with" in told[-1]["why"]
        steps = running.count(name, "step")
        running.restart(name)
        running.wait_for(lambda: running.count(name, "step") > steps + 2, 100, "next life")
        assert running.events("worker-0-1")[-1]["event"] != "stopped"
