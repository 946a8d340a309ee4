"""What a demo says of its nodes' ends: killed from outside is no fault, failing, crashing and hanging are."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agorad.demo import swarm
from agorad.demo.layout import DemoNode, Layout
from agorad.demo.swarm import Running, Swarm, ended_cleanly


def node(folder: Path, name: str = "worker-0-0", role: str = "worker") -> DemoNode:
    made = SimpleNamespace(
        name=name, role=role, control=folder / "none.sock", events=folder / f"{name}.jsonl"
    )
    return cast(DemoNode, made)


def child(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_kinds_of_ends(tmp_path: Path) -> None:
    made = Swarm(cast(Layout, None))
    exits = {"good": 0, "killed": -signal.SIGKILL, "failed": 2, "crashed": -signal.SIGSEGV}
    assert made.unclean(exits) == ["failed", "crashed"]


def test_one_that_does_not_leave_is_killed_and_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(swarm, "STOP_S", 0.2)
    made = Swarm(cast(Layout, None))
    stubborn = (
        "import signal,time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    made.nodes.append(Running(node(tmp_path), child(stubborn)))
    exits = made.stop()
    assert exits == {"worker-0-0": -signal.SIGKILL}
    assert made.unclean(exits) == ["worker-0-0"]


def test_a_frozen_one_leaves_in_order(tmp_path: Path) -> None:
    made = Swarm(cast(Layout, None))
    polite = (
        "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(0)); "
        "print('up', flush=True); time.sleep(60)"
    )
    process = child(polite)
    made.nodes.append(Running(node(tmp_path), process))
    process.send_signal(signal.SIGSTOP)
    assert made.unclean(made.stop()) == []
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("last", "clean"),
    [
        ({"event": "stopped", "code": 0}, True),
        ({"event": "stopped", "code": 2}, False),
        ({"event": "step", "step": 3}, False),
    ],
)
def test_the_last_line_tells_how_a_node_ended(tmp_path: Path, last: Any, clean: bool) -> None:
    made = node(tmp_path)
    assert not ended_cleanly(made)
    made.events.write_text(json.dumps({"event": "started"}) + "\n" + json.dumps(last) + "\n")
    assert ended_cleanly(made) is clean
