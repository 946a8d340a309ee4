"""Supervision of living nodes: each trouble is made in a real process, and its end or the node's is seen.

A node of these tests has a door: ``sitecustomize`` starts a thread that runs what the test puts into a file
of the node's folder. Through it weights become no numbers, a job hangs or fails, as a broken memory or driver
would do it. Times that are minutes in life are made seconds in the same way.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agorad.ask import ask
from tests.system.swarms import Demo, demo

DOOR = '''
import gc, pathlib, sys, threading, time

def the(name):
    """The object of that class in this process."""
    while True:
        found = [one for one in gc.get_objects() if type(one).__name__ == name]
        if found:
            return found[-1]
        time.sleep(0.1)

def listen(path):
    while True:
        time.sleep(0.2)
        if path.exists():
            text = path.read_text()
            path.unlink()
            exec(compile(text, str(path), "exec"), {"the": the, "time": time})

if "agorad.main" in sys.orig_argv and "--config" in sys.orig_argv:
    config = pathlib.Path(sys.orig_argv[sys.orig_argv.index("--config") + 1])
    threading.Thread(target=listen, args=(config.with_name("door.py"),), daemon=True).start()
'''
SMALL = (
    "--stages", "2", "--workers", "2", "--seconds", "900", "--set", "model.seq=32",
    "--set", "training.target_batch=8", "--set", "worker.snapshot_every=2",
)  # fmt: skip
SPOIL = """
weights = the("StageCompute").weights
weights._masters.flat[:] = float("nan")
"""
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("supervised")
    (folder / "sitecustomize.py").write_text(DOOR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        with demo(folder / "swarm", *SMALL) as running:
            running.wait_for(lambda: running.count("worker-0-0", "saved") > 1, 150, "training")
            yield running


def poke(swarm: Demo, name: str, code: str) -> None:
    """Run this in the node."""
    path = swarm.folder / name / "door.py"
    path.with_suffix(".new").write_text(code)
    path.with_suffix(".new").rename(path)
    swarm.wait_for(lambda: not path.exists(), 30, "open door")


def troubles(swarm: Demo, name: str, since: int = 0) -> list[dict[str, Any]]:
    found = [
        event for event in swarm.events(name) if event["event"] in ("trouble", "trouble_over", "stopped")
    ]
    return found[since:]


def told(swarm: Demo, name: str, kind: str, since: int, reaction: str = "") -> dict[str, Any] | None:
    return next(
        (
            event
            for event in troubles(swarm, name, since)
            if event.get("kind") == kind and event.get("reaction", "") == reaction
        ),
        None,
    )


def status(swarm: Demo, name: str) -> dict[str, Any]:
    return ask(Path(swarm.node(name)["control"]), "status", timeout=20.0)


def ended(swarm: Demo, name: str) -> dict[str, Any]:
    """The last word of the node's present process, once that is gone."""
    pid = swarm.pids.get(name, swarm.node(name)["pid"])
    swarm.wait_for(lambda: not runs(pid), 90, f"end of {name}")
    return swarm.events(name)[-1]


def runs(pid: int) -> bool:
    """A child that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def again(swarm: Demo, name: str) -> None:
    """Start it as a manager would, and wait until it trains."""
    steps = swarm.count(name, "step")
    process = swarm.restart(name)
    try:
        swarm.wait_for(lambda: swarm.count(name, "step") > steps + 1, 120, f"steps of {name}")
    except BaseException:
        process.kill()
        raise


def trains_on(swarm: Demo, name: str, steps: int = 2) -> None:
    before = swarm.count(name, "step")
    swarm.wait_for(lambda: swarm.count(name, "step") >= before + steps, 60, f"step of {name}")


def test_little_memory_sheds_work_until_there_is_more(swarm: Demo) -> None:
    name = "worker-0-0"
    since = len(troubles(swarm, name))
    poke(swarm, name, "import agorad.metrics.machine as m\nm.memory = lambda: (64 << 30, 4 << 30)\n")
    swarm.wait_for(lambda: told(swarm, name, "memory", since, "shed") is not None, 30, "shedding")
    (warning,) = status(swarm, name)["warnings"]
    assert warning == "4.0 of 64.0 GiB of memory are left: no new microbatches until there is more"
    swarm.wait_for(lambda: status(swarm, name)["microbatches"]["in_progress"] == 0, 30, "an idle node")
    added = status(swarm, name)["microbatches"]["added"]
    trains_on(swarm, "worker-0-1", 3)
    assert status(swarm, name)["microbatches"]["added"] == added
    poke(swarm, name, "import agorad.metrics.machine as m\nm.memory = lambda: (64 << 30, 40 << 30)\n")
    swarm.wait_for(lambda: status(swarm, name)["microbatches"]["added"] > added, 60, "work")
    assert status(swarm, name)["warnings"] == []


def test_gradients_of_another_stage_end_nobody(swarm: Demo) -> None:
    name = "worker-0-1"
    since = len(troubles(swarm, name))
    bad = swarm.count(name, "bad_gradient")
    poke(swarm, name, BAD_GRADIENTS)
    swarm.wait_for(lambda: told(swarm, name, "gradients", since, "warn") is not None, 60, "word about it")
    assert swarm.count(name, "bad_gradient") >= bad + 3
    poke(swarm, name, 'the("StageCompute").optimizer.__dict__.pop("_norm")\n')
    swarm.wait_for(lambda: told(swarm, name, "gradients", since) is not None, 60, "end of it")
    assert status(swarm, name)["phase"] == "active"


BAD_GRADIENTS = """
optimizer = the("StageCompute").optimizer
def spoilt(gradient):
    gradient[7] = float("nan")
    return type(optimizer)._norm(optimizer, gradient)
optimizer._norm = spoilt
"""


def test_weights_that_became_no_numbers_are_fetched_and_then_the_node_ends(swarm: Demo) -> None:
    name, mate = "worker-0-0", "worker-0-1"
    since, fetched = len(troubles(swarm, name)), swarm.count(name, "state_fetched")
    poke(swarm, name, SPOIL)
    swarm.wait_for(lambda: told(swarm, name, "weights", since, "resync") is not None, 60, "word about it")
    swarm.wait_for(lambda: swarm.count(name, "state_fetched") > fetched, 60, "state of a mate")
    swarm.wait_for(lambda: status(swarm, name)["phase"] == "active", 90, "active worker")
    trains_on(swarm, name)
    assert "weights" not in " ".join(status(swarm, name)["warnings"])
    poke(swarm, name, SPOIL)
    last = ended(swarm, name)
    assert last["code"] == 15
    assert "again" in last["why"]
    again(swarm, name)
    assert not [event for event in swarm.events(mate) if event["event"] == "bad_output"]


def test_memory_that_is_refused_ends_the_node(swarm: Demo) -> None:
    name = "worker-1-0"
    pid = swarm.node(name)["pid"]
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
    poke(swarm, name, GREEDY)
    last = ended(swarm, name)
    assert last["code"] == 16
    assert last["why"].startswith("out of memory: ")
    assert "give it more, or less to do" in last["why"]
    again(swarm, name)


GREEDY = """
import torch
compute = the("StageCompute")
forward = compute.forward
def greedy(*args, **more):
    torch.empty(1 << 30)
    return forward(*args, **more)
compute.forward = greedy
"""


def test_an_accelerator_that_fails_ends_the_node(swarm: Demo) -> None:
    name = "worker-1-1"
    poke(swarm, name, FAILING)
    last = ended(swarm, name)
    assert last["code"] == 14
    assert last["why"].startswith("the accelerator failed: CUDA error: an illegal memory access")
    again(swarm, name)


FAILING = """
compute = the("StageCompute")
def failing(*args, **more):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
compute.forward = failing
"""


def test_a_job_that_never_ends_is_no_reason_to_stay(swarm: Demo) -> None:
    name = "worker-0-1"
    poke(swarm, name, HANGING)
    process_id = swarm.pids.get(name, swarm.node(name)["pid"])
    swarm.wait_for(lambda: told(swarm, name, "device", 0, "end_now") is not None, 60, "word about it")
    swarm.wait_for(lambda: not runs(process_id), 60, "its end by force")
    again(swarm, name)


HANGING = """
import agorad.supervision.progress as progress
import agorad.supervision.watch as watch
progress.HUNG_S, watch.FORCE_S = 6.0, 3.0
progress.TIMES = 1.0
compute = the("StageCompute")
compute.forward = lambda *args, **more: time.sleep(3600)
"""


def test_a_node_that_nobody_answers_ends(swarm: Demo) -> None:
    """The last one: of the swarm only this node is left."""
    name = "worker-0-0"
    since = len(troubles(swarm, name))
    poke(swarm, name, "import agorad.supervision.progress as progress\nprogress.ALONE_S = 20.0\n")
    swarm.process.send_signal(signal.SIGSTOP)  # a demo without trainers would end the rest
    others = [node["name"] for node in swarm.nodes if node["name"] != name]
    for other in others:
        os.kill(swarm.pids.get(other, swarm.node(other)["pid"]), signal.SIGKILL)
    until = time.monotonic() + 120
    try:
        while swarm.events(name)[-1]["event"] != "stopped":
            assert time.monotonic() < until, troubles(swarm, name, since)
            time.sleep(0.2)
    finally:
        swarm.process.send_signal(signal.SIGCONT)
    assert told(swarm, name, "alone", since, "warn") is not None
    last = swarm.events(name)[-1]
    assert last["code"] == 13
    assert "no node of the run was reached for" in last["why"]
