"""Real swarms for the tests: ``agoractl demo`` as a process, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs


@attrs.define
class Demo:
    """A running demo."""

    process: subprocess.Popen[str]
    folder: Path
    pids: dict[str, int] = attrs.field(factory=dict)
    """Of nodes that were started again."""
    restarted: list[subprocess.Popen[bytes]] = attrs.field(factory=list)

    def swarm(self, timeout: float = 120.0) -> dict[str, Any]:
        """``swarm.json`` once the swarm is up."""
        path = self.folder / "swarm.json"
        if not path.exists():
            self.wait_for(lambda: path.exists() and path.read_text().endswith("}\n"), timeout, "swarm.json")
        return json.loads(path.read_text())

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return self.swarm()["nodes"]

    def node(self, name: str) -> dict[str, Any]:
        return next(node for node in self.swarm()["nodes"] if node["name"] == name)

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "events.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def count(self, name: str, kind: str) -> int:
        return sum(event["event"] == kind for event in self.events(name))

    def wait_for(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            code = self.process.poll()
            assert code is None, f"the demo ended with {code} before {what}: {self.process.stderr.read()}"
            assert time.monotonic() < deadline, f"no {what} after {timeout} s"
            time.sleep(0.05)

    def kill(self, name: str) -> float:
        """SIGKILL the node's present process; returns the unix time."""
        os.kill(self.pids.get(name, self.node(name)["pid"]), signal.SIGKILL)
        return time.time()

    def restart(self, name: str) -> subprocess.Popen[bytes]:
        """Start the node again from its config, as a user would."""
        process = subprocess.Popen(
            [sys.executable, "-m", "agorad.main", "--config", self.node(name)["config"]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pids[name] = process.pid
        self.restarted.append(process)
        return process

    def finish(self, timeout: float = 300.0, code: int = 0) -> dict[str, Any]:
        """Wait for the end; the report. Asserts the exit code."""
        out, err = self.process.communicate(timeout=timeout)
        assert self.process.returncode == code, err
        report = json.loads(out)
        assert report == json.loads((self.folder / "report.json").read_text())
        return report


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[Demo]:
    """Run ``agoractl demo`` in ``folder``; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "agorad.cli", "demo", "--json", "--dir", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running = Demo(process, folder)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        for again in running.restarted:
            again.kill()
            again.wait()


def processes_under(folder: Path) -> list[str]:
    """Command lines of live processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line and "agorad.main" in line:
                found.append(line)
    return found
