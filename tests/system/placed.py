"""The swarm of a demo with every worker behind a line of its own, which can be cut and mended.

The files are a demo's, with other addresses; the processes are started here, each in its namespace. Needs
what a lab needs (``agorad.lab.network``).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.demo import report
from agorad.demo.layout import Layout, Plan
from agorad.lab.network import Place
from tests.net.lab_swarms import LabSwarm


@attrs.define
class Placed:
    """Processes of a swarm whose nodes have places."""

    made: Layout
    places: Mapping[str, Place]
    """None for the nodes of a swarm on loopback."""
    programs: Mapping[str, Sequence[str]] = attrs.field(factory=dict)
    """What runs instead of agorad."""
    processes: dict[str, subprocess.Popen[bytes]] = attrs.field(factory=dict)

    @classmethod
    def laid_out(cls, plan: Plan, folder: Path, places: list[Place]) -> Placed:
        """Workers at a place each, from the second on; all others at the first."""
        folder.mkdir()
        workers = [f"worker-{stage}-{one}" for stage in range(plan.stages) for one in range(plan.workers)]
        where = dict(zip(workers, places[1:], strict=True))
        for name in ("seed", "authority", *(f"trainer-{one}" for one in range(plan.trainers))):
            where[name] = places[0]
        return cls(LabSwarm(folder, where).write(plan), where)

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return [{"name": node.name, "role": node.role, "stage": node.stage} for node in self.made.nodes]

    @property
    def workers(self) -> list[str]:
        return [node.name for node in self.made.of_role("worker")]

    def start(self, name: str) -> None:
        """Start the node's process; again, where it was killed."""
        folder = self.made.folder / name
        program = self.programs.get(name, ("-m", "agorad.main"))
        command = [sys.executable, *program, "--config", str(folder / "agorad.toml")]
        if name in self.places:
            command = self.places[name].command(*command)
        with (folder / "errors").open("ab") as errors:
            self.processes[name] = subprocess.Popen(command, stdout=errors, stderr=errors)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def freeze(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGCONT)

    def cut(self, name: str) -> None:
        """Its line carries nothing any more, and nobody is told."""
        self._ip(name, "link set line down")

    def mend(self, name: str) -> None:
        self._ip(name, "link set line up")
        self._ip(name, "route add 10.77.0.0/24 dev line")  # the kernel dropped it with the line

    def _ip(self, name: str, words: str) -> None:
        command = ["ip", "-n", self.places[name].namespace, *words.split()]
        subprocess.run(command, check=True, capture_output=True, timeout=20)

    def status(self, name: str) -> dict[str, Any] | None:
        """The node's own word; None while it has none."""
        try:
            return ask(self.made.folder / name / "control.sock", "status", timeout=2.0)
        except (Unreachable, NoAnswer, CommandFailed):
            return None

    def phase(self, name: str) -> str | None:
        status = self.status(name)
        return None if status is None else status["phase"]

    def events(self, name: str) -> list[dict[str, Any]]:
        node = next(node for node in self.made.nodes if node.name == name)
        return report.NodeLog.read(name, node.role, node.stage, node.identity.peer_id, node.events).events

    def wait_for(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {timeout} s"
            time.sleep(0.2)

    def stop(self, name: str, timeout: float = 40.0) -> int:
        """Ask the node to leave; its exit code."""
        self.processes[name].terminate()
        return self.processes[name].wait(timeout)

    def report(self) -> dict[str, Any]:
        """What a demo would write at its end."""
        logs = [
            report.NodeLog.read(node.name, node.role, node.stage, node.identity.peer_id, node.events)
            for node in self.made.nodes
        ]
        steps = max((event["step"] for log in logs for event in log.of("step")), default=0)
        model, training = self.made.manifest.model, self.made.manifest.training
        return report.build(
            logs,
            tokens_a_sample=model.seq,
            target_batch=training.target_batch,
            vocab=model.vocab,
            steps=steps,
            disagreement=None,
            exits={name: process.returncode for name, process in self.processes.items()},
            states={},
        )


@contextmanager
def placed(
    plan: Plan, folder: Path, places: list[Place], programs: Mapping[str, Sequence[str]] | None = None
) -> Iterator[Placed]:
    """A swarm at these places, ready for its trainers."""
    swarm = Placed.laid_out(plan, folder, places)
    swarm.programs = programs or {}
    with started(swarm):
        yield swarm


@contextmanager
def started(swarm: Placed) -> Iterator[Placed]:
    """The swarm with all nodes but trainers started and every worker ACTIVE; none is left at the end."""
    try:
        for node in swarm.made.nodes:
            node.reserved.close()
            if node.role != "trainer":
                swarm.start(node.name)
        swarm.wait_for(lambda: all(swarm.phase(name) == "active" for name in swarm.workers), 400, "swarm")
        yield swarm
    finally:
        for process in swarm.processes.values():
            process.kill()
        for process in swarm.processes.values():
            process.wait(20)
