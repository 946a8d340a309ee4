"""Runs the nodes of a join and says in plain lines what they do, from their events.

Each node is a child process: its standard error goes to its log file, its account's secret comes over a
pipe that only it inherits. Another pipe tells it when this process was killed: it leaves then, since nobody
else would stop it. Its events come over its control socket (``lines`` turns them into sentences); once a
minute a node says how much it did. The first Ctrl-C, SIGTERM or closing of the terminal lets all nodes leave
cleanly, a second one ends them at once. No log is ever read.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import attrs

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask, follow
from agorad.exitcodes import ExitCode, advice
from agorad.join.layout import Planned, open_log
from agorad.join.lines import Line, Narrator
from agorad.join.secret import Secret

PULSE_S: Final = 60.0
TICK_S: Final = 0.2
LAST_WORDS_S: Final = 2.0
LAST_BYTES: Final = 64 << 10
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Process(Protocol):
    """What is asked of a node's process: the part of ``subprocess.Popen`` that is used here."""

    @property
    def returncode(self) -> int | Any: ...
    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


@attrs.define(eq=False)
class _Child:
    node: Planned
    process: Process
    log: str
    """Where its log is, for people."""
    narrator: Narrator
    said_at: float
    began: float = attrs.field(factory=time.time)
    listener: threading.Thread | None = None
    buried: bool = False


class Live:
    """The children and what they say. ``say`` gets a node's label (empty if there is one node) and a line.

    ``launch`` starts a node and says where its log is. ``attached``: the nodes live on by themselves; Ctrl-C
    ends the telling, not them.
    """

    def __init__(
        self,
        say: Callable[[str, Line], None],
        *,
        warm_steps: int,
        pulse_s: float = PULSE_S,
        launch: Callable[[Planned, Secret | None], tuple[Process, str]] | None = None,
        attached: bool = False,
    ) -> None:
        self._launch = launch or spawn
        self._attached = attached
        self._say = say
        self._warm_steps = warm_steps
        self._pulse_s = pulse_s
        self._entries: queue.Queue[tuple[_Child, Mapping[str, Any]]] = queue.Queue(maxsize=4096)
        self._children: list[_Child] = []
        self._many = False
        self._asked = 0
        self._said_leaving = False

    def run(self, nodes: list[Planned], secret: Secret | None) -> int:
        """Until all nodes have ended; the exit code of the first that did not end well, else 0."""
        self._many = len(nodes) > 1
        code = 0
        before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            for node in nodes:
                if not self._asked:
                    self._start(node, secret)
            while any(not child.buried for child in self._children) and not (self._attached and self._asked):
                self._hear(TICK_S)
                if (
                    self._asked and not self._said_leaving and not self._attached
                ):  # not in the handler: it may interrupt a line
                    self._said_leaving = True
                    self._say("", ("NODE", "leaving: what is begun is finished first; again to end at once"))
                self._pulse()
                for child in self._children:
                    if not child.buried and child.process.poll() is not None:
                        code = code or self._bury(child)
        finally:
            for child in self._children:
                if not self._attached and child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        return code

    def _start(self, node: Planned, secret: Secret | None) -> None:
        process, log = self._launch(node, secret)
        child = _Child(node, process, log, Narrator(self._warm_steps), time.monotonic())
        self._children.append(child)
        self._tell(child, ("NODE", f"starting on {node.device}; its log is {log}"))
        child.listener = threading.Thread(target=self._follow, args=(child,), daemon=True)
        child.listener.start()

    def _tell(self, child: _Child, line: Line) -> None:
        self._say(f"gpu{child.node.gpu}" if self._many else "", line)

    def _follow(self, child: _Child) -> None:
        for entry in _events(child):
            self._entries.put((child, entry))

    def _hear(self, wait_s: float) -> None:
        """Say what came, waiting at most that long for the first."""
        while True:
            try:
                child, entry = self._entries.get(timeout=wait_s) if wait_s else self._entries.get_nowait()
            except queue.Empty:
                return
            wait_s = 0.0
            was_active = child.narrator.active
            for line in child.narrator.hear(entry):
                self._tell(child, line)
            if child.narrator.active and not was_active:
                child.said_at = time.monotonic()  # the first minute of work begins here

    def _pulse(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if self._asked or now - child.said_at < self._pulse_s or child.process.poll() is not None:
                continue
            child.said_at = now
            try:
                status = ask(child.node.control, "status", timeout=2.0)
            except (Unreachable, NoAnswer, CommandFailed):
                continue
            if status.get("phase") not in ("joining", "queued"):  # of those the events say it all
                self._tell(child, child.narrator.pulse(status))

    def _stop(self, number: int, _frame: object) -> None:
        self._asked += 1
        if self._attached:
            return
        for child in self._children:
            child.narrator.asked = True
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM if self._asked == 1 else signal.SIGKILL)

    def _bury(self, child: _Child) -> int:
        """Say how it ended; its exit code as ours, 0 for an end that was asked for."""
        assert child.listener is not None
        child.listener.join(LAST_WORDS_S)
        self._hear(0.0)
        child.buried = True
        code, why = child.process.returncode, child.narrator.ended.get("why", "")
        if self._asked > 1 and code != 0:
            self._tell(child, ("NODE", "ended at once, as asked"))
            return 130
        if code == 0 or (self._asked and code == -signal.SIGTERM):
            self._tell(child, ("NODE", "ended; goodbye"))
            return 0
        if code < 0:
            why = f"killed by signal {-code}" + (
                ", which is what happens when the machine runs out of memory" if code == -9 else ""
            )
            remedy = advice(ExitCode.MEMORY) if code == -9 else f"the log is {child.log}"
        else:
            why = why or f"the reason is at the end of {child.log}"
            remedy = advice(code)
        self._tell(child, ("ERROR", f"ended with code {code if code > 0 else 128 - code}: {why}"))
        if remedy:
            self._tell(child, ("ERROR", f"what to do: {remedy}"))
        return int(code if code > 0 else 128 - code)


def spawn(node: Planned, secret: Secret | None) -> tuple[Process, str]:
    """The node as a child of this process; its log file."""
    lifeline, _held = os.pipe()  # the other end stays open for as long as this process lives
    command = [
        sys.executable, "-m", "agorad.main", "--config", str(node.config), "--lifeline-fd", str(lifeline),
    ]  # fmt: skip
    reading: int | None = None
    if secret is not None:
        reading, writing = os.pipe()
        os.write(writing, secret.split()[1].encode())  # below a pipe's size: never blocks
        os.close(writing)
        command += ["--secret-fd", str(reading)]
    log = open_log(node)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lifeline,) if reading is None else (lifeline, reading),
            start_new_session=True,  # Ctrl-C is for us: we stop them in order
        )
    finally:
        os.close(log)
        os.close(lifeline)
        if reading is not None:
            os.close(reading)
    return process, str(node.log)


def _events(child: _Child) -> Iterator[Mapping[str, Any]]:
    """All events of the node from its first on; ends with the process."""
    seen, seen_at = 0, child.began
    while True:
        try:
            # From the first again: a node that was restarted counts anew.
            for batch in follow(child.node.control, "events", since=0, follow=True):
                for entry in batch if isinstance(batch, list) else [batch]:
                    if entry["at"] < seen_at or (entry["at"] == seen_at and entry["id"] <= seen):
                        continue
                    seen, seen_at = entry["id"], entry["at"]
                    yield entry
        except (Unreachable, NoAnswer, CommandFailed, OSError):
            pass
        if child.process.poll() is not None:
            yield from _last_words(child, seen, seen_at)
            return
        time.sleep(TICK_S)


def _last_words(child: _Child, seen: int, seen_at: float) -> Iterator[Mapping[str, Any]]:
    """What the node said after its socket closed, from its event file (events are data, not a log)."""
    try:
        with (child.node.folder / "events.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the first one is cut
        at = entry.get("at", 0.0)
        if at > seen_at or (at == seen_at and entry.get("id", 0) > seen):
            yield entry
