"""Starting, watching and stopping the processes of a demo.

Start order is free (the manifest lists who is who), so all nodes start at once. The swarm is up when every
control socket answers. From then on nodes may be killed and started again from outside: the demo
watches the run through the nodes' own control sockets, not only through its children, and at the
end asks whoever answers there to leave.

Stop: the trainers first (they end by themselves when the steps or the time are reached), then, once every
replica has followed the clock to its end and no round is in flight, workers, authority and seed.
Limits: ``UP_S`` until the swarm is up, ``STALL_S`` without a completed microbatch before the demo gives up,
``STOP_S`` for a node to leave before it is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.demo.layout import DemoNode, Layout
from stage.progress import JOURNAL, samples_of

UP_S: Final = 120.0
STALL_S: Final = 120.0
SETTLE_S: Final = 60.0
STOP_S: Final = 35.0
TICK_S: Final = 0.25
AGAIN_POLLS: Final = 120
"""Polls for which a trainer that somebody killed may be away, about 30 s. Not seconds: a machine that sleeps
makes those pass at once."""
_PR_SET_PDEATHSIG: Final = 1
_CRASHES: Final = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""Signals that a process gives itself."""


class DemoFailed(Exception):  # noqa: N818
    """The swarm did not do what was asked; the text says what happened and where to look."""


@attrs.define
class Running:
    """One node and the process that the demo started for it."""

    node: DemoNode
    process: subprocess.Popen[bytes]
    status: dict[str, Any] = attrs.field(factory=dict)
    """Its last word."""
    answers: bool = False
    silent: int = 0
    """Polls since it last answered."""

    @property
    def up(self) -> bool:
        """Whether it can take part: it answers, and a worker is in and knows the run's clock."""
        return self.answers and self.status.get("phase") not in ("joining", "queued", "downloading")


class Swarm:
    """A laid-out swarm as processes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.nodes: list[Running] = []
        self.overdue: list[str] = []
        """Nodes that did not leave when they were asked to and had to be killed."""

    def start(self, *roles: str) -> None:
        """Start the nodes of these roles. Their standard streams go to the log file."""
        for node in self.layout.nodes:
            if node.role not in roles:
                continue
            node.reserved.close()
            with node.log.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "agorad.main", "--config", str(node.config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,  # a failure before or beside the log is kept too
                    start_new_session=True,  # Ctrl-C is for the demo, which stops nodes in order
                    preexec_fn=_die_with_parent,
                )
            self.nodes.append(Running(node, process))

    def wait_up(self, polled: Callable[[], None] = lambda: None) -> None:
        """Until every node that was started can take part; ``polled`` after each look. Raises DemoFailed."""
        deadline = time.monotonic() + UP_S
        while True:
            self.poll()
            polled()
            waiting = [running for running in self.nodes if not running.up]
            for running in waiting:
                code = running.process.poll()
                if code is not None:
                    raise DemoFailed(
                        f"{running.node.name} ended with code {code}: {last_words(running.node)}"
                    )
            if not waiting:
                return
            if time.monotonic() > deadline:
                names = ", ".join(running.node.name for running in waiting)
                raise DemoFailed(f"{names}: not up after {UP_S:.0f} s; see the logs in {self.layout.folder}")
            time.sleep(TICK_S)

    def poll(self) -> None:
        """Ask every node how it is."""
        for running in self.nodes:
            try:
                running.status = ask(running.node.control, "status", timeout=2.0)
                running.answers, running.silent = True, 0
            except (Unreachable, NoAnswer, CommandFailed):
                running.answers = False
                running.silent += 1

    def describe(self) -> dict[str, Any]:
        """``swarm.json``."""
        return {
            "run": self.layout.manifest.run.id,
            "manifest": str(self.layout.manifest_path),
            "page": self.page,
            "nodes": [
                {
                    "name": running.node.name,
                    "role": running.node.role,
                    "stage": running.node.stage,
                    "pid": running.process.pid,
                    "peer_id": running.node.identity.peer_id,
                    "addr": f"{running.node.addr}/p2p/{running.node.identity.peer_id}",
                    "control": str(running.node.control),
                    "config": str(running.node.config),
                    "log": str(running.node.log),
                    "metrics": running.status.get("metrics"),
                }
                for running in self.nodes
            ],
        }

    @property
    def page(self) -> str | None:
        """Where an authority shows the run, once it does."""
        pages = (running.status.get("page") for running in self.of_role("authority"))
        return next((page for page in pages if page), None)

    def of_role(self, role: str) -> list[Running]:
        return [running for running in self.nodes if running.node.role == role]

    def trainers_ended(self) -> bool:
        """Whether every trainer's process is gone, and nobody restarted one that was killed."""
        return all(
            running.process.poll() is not None
            and not running.answers
            and (not self.was_killed(running) or ended_cleanly(running.node) or running.silent > AGAIN_POLLS)
            for running in self.of_role("trainer")
        )

    def was_killed(self, running: Running) -> bool:
        """Whether somebody else ended the process that we started."""
        return running.process.returncode == -signal.SIGKILL

    def paused(self) -> bool:
        """Whether somebody holds all trainers, or all workers of a stage: nothing is completed then."""
        groups: dict[int | None, list[bool]] = {}
        for running in (*self.of_role("trainer"), *self.of_role("worker")):
            held = bool(running.answers and running.status.get("paused"))
            groups.setdefault(running.node.stage, []).append(held)
        return any(all(held) for held in groups.values())

    @property
    def completed(self) -> int:
        return sum(
            running.status.get("microbatches", {}).get("completed", 0) for running in self.of_role("trainer")
        )

    @property
    def step(self) -> int:
        """The furthest that anybody who spoke has followed the clock: trainers end before their last word."""
        return max((running.status.get("step", 0) for running in self.nodes), default=0)

    def final_step(self) -> int:
        """Where the trainers left the clock, from their journals: they may end between two polls."""
        samples = sum(samples_of(running.node.folder / JOURNAL) for running in self.of_role("trainer"))
        return samples // self.layout.manifest.training.target_batch

    def settle(self, step: int) -> None:
        """Wait until every replica that answers has reached the last step and ended its round."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            self.poll()
            behind = [
                running
                for running in self.of_role("worker")
                if running.answers
                and running.status.get("phase") in ("active", "warming")
                and (running.status["step"] < step or running.status.get("rounds_in_flight"))
            ]
            if not behind:
                return
            time.sleep(TICK_S)

    def stop(self) -> dict[str, int]:
        """Stop everything, in order; exit code of each node (negative: the signal that ended it)."""
        for role in ("trainer", "worker", "authority", "seed"):
            group = self.of_role(role)
            for running in group:
                if running.process.poll() is None:
                    running.process.terminate()
                    running.process.send_signal(signal.SIGCONT)  # one that was frozen leaves in order too
                else:
                    self._dismiss(running)
            deadline = time.monotonic() + STOP_S
            for running in group:
                try:
                    running.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self.overdue.append(running.node.name)
                    running.process.kill()
                    running.process.wait()
        return {running.node.name: running.process.returncode for running in self.nodes}

    def _dismiss(self, running: Running) -> None:
        """A node that somebody started again in place of ours: ask it to leave, and wait."""
        try:
            pid = ask(running.node.control, "status", timeout=2.0)["pid"]
            ask(running.node.control, "leave", timeout=2.0)
        except (Unreachable, NoAnswer, CommandFailed):
            return
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and _alive(pid):
            time.sleep(TICK_S)
        if _alive(pid):
            self.overdue.append(running.node.name)
            os.kill(pid, signal.SIGKILL)

    def unclean(self, exits: dict[str, int]) -> list[str]:
        """Nodes that failed, crashed or hung; one that somebody killed did none of these."""
        return [name for name, code in exits.items() if code > 0 or -code in _CRASHES or name in self.overdue]


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended and whose parent has not looked yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def ended_cleanly(node: DemoNode) -> bool:
    """Whether the last process that ran as this node, ours or one started after it, ended with code 0."""
    try:
        last = json.loads(node.events.read_bytes().splitlines()[-1])
        return (last["event"], last["code"]) == ("stopped", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return False


def last_words(node: DemoNode) -> str:
    """Why a node ended, from its event log, or where to read more."""
    try:
        for line in reversed(node.events.read_text().splitlines()):
            event = json.loads(line)
            if event["event"] == "stopped":
                return str(event["why"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        last = node.log.read_text(errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        return f"see {node.log}"
    return last.removeprefix("agorad: ")


def _die_with_parent() -> None:
    """Nodes do not outlive a demo that was killed: the kernel sends them SIGTERM."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
