"""What a node may cost, and the documents that scripts read: interfaces.md, held against real processes.

Memory is exact: it does not depend on what else the machine does. Readiness does, so of three starts
the best one counts, twice the time is allowed, and the processor time is held against the contract as it is.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from agorad.ask import ask
from agorad.demo import layout
from agorad.demo.layout import Layout, Plan
from tests.system.swarms import Demo, demo

MB = 1_000_000
READY_S = {"seed": 1.0, "authority": 2.0, "trainer": 2.0}
MEMORY = {"seed": 60 * MB, "authority": 100 * MB, "trainer": 100 * MB}
PHASES = {"joining", "queued", "downloading", "syncing", "warming", "active", "paused", "leaving"}
OPTIONS = (
    "--stages", "2", "--workers", "2", "--steps", "14",
    "--set", "training.eval_every=4", "--set", "model.seq=64", "--set", "training.target_batch=8",
    "--set", "training.lr=0.004",  # the demo's own is for batches eight times as large
)  # fmt: skip


def peak(pid: int) -> int:
    """Bytes that the process ever had in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def libraries(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


@attrs.frozen
class Started:
    pid: int
    seconds: float
    """From spawn to READY."""
    processor_s: float


@contextmanager
def started(config: Path) -> Iterator[Started]:
    """A daemon until it said READY to its manager; it has to end cleanly afterwards."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(b"\0agora-test-%d-%d" % (os.getpid(), time.monotonic_ns()))
        manager.settimeout(60)
        name = manager.getsockname()[1:].decode()
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "agorad.main", "--config", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": f"@{name}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while b"READY=1" not in manager.recv(4096).split(b"\n"):
                continue
            seconds = time.monotonic() - began
            yield Started(process.pid, seconds, processor_s(process.pid))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def laid(tmp_path: Path) -> Layout:
    """A run and its nodes on disk; nothing runs."""
    plan = Plan(stages=1, workers=1, trainers=1, steps=9, seconds=None, data=None, assignments=())
    made = layout.prepare(plan, tmp_path)
    for node in made.nodes:
        node.reserved.close()
    return made


@pytest.mark.parametrize("role", ["seed", "authority", "trainer"])
def test_readiness_and_memory_of_a_node_alone(laid: Layout, role: str) -> None:
    """All of the others are away: start order is free."""
    (node,) = laid.of_role(role)
    starts = []
    for _ in range(3):
        with started(node.config) as process:
            status = ask(node.control, "status")
            assert (status["role"], status["pid"]) == (role, process.pid)
            assert peak(process.pid) < MEMORY[role]
            assert "torch" not in libraries(process.pid)
            assert "numpy" not in libraries(process.pid)
            assert children(process.pid) == []
            starts.append(process)
    assert min(one.seconds for one in starts) < 2 * READY_S[role]
    assert min(one.processor_s for one in starts) < READY_S[role]


def test_memory_of_a_trainer_with_as_much_text_as_it_reads(laid: Layout, tmp_path: Path) -> None:
    (node,) = laid.of_role("trainer")
    text = tmp_path / "text"
    text.mkdir()
    for part in range(5):
        (text / f"{part}.txt").write_bytes(b"It was a dark and stormy night; the rain fell.\n" * 200_000)
    config = node.config.read_text()
    node.config.write_text(config.replace("[trainer]", f'[trainer]\ndata = "{text}"'))
    with started(node.config) as process:
        assert peak(process.pid) < MEMORY["trainer"]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with demo(tmp_path_factory.mktemp("footprint") / "swarm", *OPTIONS) as running:
        running.swarm()
        running.wait_for(lambda: running.count("worker-0-0", "round_finished") > 0, 100, "round")
        workers = [node["name"] for node in running.nodes if node["role"] == "worker"]
        running.wait_for(
            lambda: all(running.count(name, "step") for name in workers), 30, "step of everybody"
        )
        yield running


def test_memory_and_processes_of_nodes_at_work(swarm: Demo) -> None:
    for path in ("", "leaderboard", "join"):
        with urllib.request.urlopen(swarm.swarm()["page"] + path, timeout=30) as answer:
            assert b"<h1>" in answer.read()
    for node in swarm.swarm()["nodes"]:
        assert children(node["pid"]) == []
        if node["role"] == "worker":
            assert "libtorch" in libraries(node["pid"])
        else:
            assert peak(node["pid"]) < MEMORY[node["role"]], node["name"]
            assert "torch" not in libraries(node["pid"])


# The documents. In a specification a tuple is any of its members, and [x] a list of x.

NUMBER = (int, float)
ROUND = {"number": int, "fraction": NUMBER, "members": int, "at": float}
STATUS_NODE = {
    "name": str, "role": str, "pid": int, "peer_id": str, "uptime_s": float, "run": str, "phase": str,
    "stage": (int, None), "step": int, "loss": (float, None), "microbatches": dict,
    "round": (ROUND, None), "peers": int, "points": (dict, None), "queue": (dict, None), "warnings": [str],
}  # fmt: skip
SWARM = {
    "run": str, "manifest": str, "page": str,
    "nodes": [{
        "name": str, "role": str, "stage": (int, None), "pid": int, "peer_id": str, "addr": str,
        "control": str, "config": str, "log": str,
    }],
}  # fmt: skip
REPORT = {
    "steps": int, "seconds": float, "tokens": int, "tokens_per_second": float,
    "loss": {"first": float, "last": float, "uniform": float}, "eval_loss": [list],
    "microbatches": dict.fromkeys(
        ("issued", "completed", "failed", "lost", "rerouted", "busy", "twice", "reused_stale",
         "gone_with_replica"), int),
    "rounds": {"completed": int, "partial": int, "failed": int, "mean_fraction": (*NUMBER, None)},
    "disagreement": (float, None),
    "bytes": {"boundary": int, "averaging": int, "control": int},
    "stages": [{
        "stage": int,
        "replicas": [{"peer_id": str, "step": int, "phase": str, "microbatches": int}],
    }],
    "exit": dict,
}  # fmt: skip


def fits(value: Any, spec: Any) -> bool:
    """Whether a JSON value has all that the interface promises; more is allowed."""
    match spec:
        case tuple():
            return any(fits(value, one) for one in spec)
        case dict():
            return isinstance(value, dict) and all(
                name in value and fits(value[name], one) for name, one in spec.items()
            )
        case [item]:
            return isinstance(value, list) and all(fits(one, item) for one in value)
        case None:
            return value is None
    return type(value) is spec


def misfits(value: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not as promised, for a readable failure."""
    return {name: value.get(name, "missing") for name, one in spec.items() if not fits(value.get(name), one)}


def test_status_is_as_promised(swarm: Demo) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", "status", "--json", "--dir", str(swarm.folder)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert time.monotonic() - began < 10
    assert done.stderr == ""
    document = json.loads(done.stdout)
    described = swarm.swarm()
    assert [node["name"] for node in document["nodes"]] == [node["name"] for node in described["nodes"]]
    for node, known in zip(document["nodes"], described["nodes"], strict=True):
        assert misfits(node, STATUS_NODE) == {}, node["name"]
        for field in ("name", "role", "pid", "peer_id", "stage"):
            assert node[field] == known[field]
        assert node["run"] == described["run"]
        assert node["phase"] in PHASES
        assert 0 < node["uptime_s"] < 600
        assert node["peers"] > 0
        assert node["warnings"] == []
    working = [node for node in document["nodes"] if node["role"] in ("worker", "trainer")]
    assert all(node["step"] > 0 for node in working)
    assert any(node["round"] and node["round"]["members"] == 2 for node in working)


def test_the_swarm_file_is_as_promised(swarm: Demo) -> None:
    document = json.loads((swarm.folder / "swarm.json").read_text())
    assert misfits(document, SWARM) == {}
    assert Path(document["manifest"]).is_file()
    for node in document["nodes"]:
        assert node["addr"].endswith(f"/p2p/{node['peer_id']}")
        assert Path(node["control"]).is_socket()
        assert Path(node["config"]).is_file()
        assert Path(node["log"]).is_file()
        assert str(node["config"]) in Path(f"/proc/{node['pid']}/cmdline").read_text()
        assert (node["stage"] is not None) == (node["role"] == "worker")


def test_the_report_is_as_promised(swarm: Demo) -> None:
    """The last of this module: it waits for the end."""
    report = swarm.finish()
    assert misfits(report, REPORT) == {}
    assert report["steps"] == 14
    assert report["loss"]["uniform"] == math.log(256)
    assert math.isclose(report["tokens_per_second"], report["tokens"] / report["seconds"], rel_tol=1e-6)
    assert all(fits(step, int) and fits(loss, float) for step, loss in report["eval_loss"])
    steps = [step for step, _loss in report["eval_loss"]]
    assert (steps[0], steps[-1], steps) == (0, 14, sorted(set(steps)))
    assert set(report["exit"]) == {node["name"] for node in swarm.swarm()["nodes"]}
    assert set(report["exit"].values()) == {0}
    assert [stage["stage"] for stage in report["stages"]] == [0, 1]
    assert all(len(stage["replicas"]) == 2 for stage in report["stages"])
    assert report["rounds"]["completed"] > 0
    assert report["disagreement"] is not None
    assert 0 <= report["disagreement"] < 0.1
    assert not any(Path(node["control"]).exists() for node in swarm.swarm()["nodes"])
