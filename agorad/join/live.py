"""Runs the nodes of a join and says in plain lines what they do, from their events.

Each node is a child process: its standard error goes to its log file, its account's secret comes over a
pipe that only it inherits. Lines are those of ``agorad.console``; once a minute a node that works says how
much it did. The first Ctrl-C (or SIGTERM) lets all nodes leave cleanly, a second one ends them at once. No
log is ever read.
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
from typing import Any, Final

import attrs

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask, follow
from agorad.console import friendly
from agorad.exitcodes import ExitCode, advice
from agorad.join.answers import Secret
from agorad.join.layout import Planned

PULSE_S: Final = 60.0
TICK_S: Final = 0.2
LAST_BYTES: Final = 64 << 10


@attrs.define
class _Child:
    node: Planned
    process: subprocess.Popen[bytes]
    added: int = 0
    said_at: float = 0.0
    began: float = attrs.field(factory=time.time)
    listener: threading.Thread | None = None
    last: dict[str, Any] = attrs.field(factory=dict)
    """The event ``stopped``, once it came."""


class Live:
    """The children and what they say. ``say`` gets one line at a time."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._entries: queue.Queue[tuple[_Child, Mapping[str, Any]]] = queue.Queue(maxsize=4096)
        self._children: list[_Child] = []
        self._asked = 0

    def run(self, nodes: list[Planned], secret: Secret | None) -> int:
        """Until all nodes have ended; the exit code of the first that did not end well, else 0."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for node in nodes:
                self._start(node, secret)
            while any(child.process.poll() is None for child in self._children):
                self._hear(TICK_S)
                self._pulse()
            for child in self._children:
                assert child.listener is not None
                child.listener.join(TICK_S * 20)
            self._hear(0.0)
        finally:
            for child in self._children:
                if child.process.poll() is None:
                    child.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._verdict()

    def _start(self, node: Planned, secret: Secret | None) -> None:
        command = [sys.executable, "-m", "agorad.main", "--config", str(node.config)]
        reading: int | None = None
        if secret is not None:
            reading, writing = os.pipe()
            os.write(writing, secret.split()[1].encode())  # below a pipe's size: never blocks
            os.close(writing)
            command += ["--secret-fd", str(reading)]
        with node.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=() if reading is None else (reading,),
                start_new_session=True,  # Ctrl-C is for us: we stop them in order
            )
        if reading is not None:
            os.close(reading)
        child = _Child(node, process, said_at=time.monotonic())
        self._children.append(child)
        child.listener = threading.Thread(target=self._follow, args=(child,), daemon=True)
        child.listener.start()

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
            if entry.get("event") == "stopped":
                child.last = dict(entry)
            line = friendly(entry)
            if line is not None:
                self._say(f"gpu{child.node.gpu} {line}" if len(self._children) > 1 else line)

    def _pulse(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if now - child.said_at < PULSE_S or child.process.poll() is not None:
                continue
            child.said_at = now
            try:
                status = ask(child.node.control, "status", timeout=2.0)
            except (Unreachable, NoAnswer, CommandFailed):
                continue
            done = (status.get("microbatches") or {}).get("added", 0)
            loss = "" if status.get("loss") is None else f", loss {status['loss']:.3f}"
            name = f"gpu{child.node.gpu} " if len(self._children) > 1 else ""
            self._say(
                f"{name}{time.strftime('%H:%M:%S')} [WORK] {status.get('phase')}: {done - child.added} "
                f"microbatches in the last minute, step {status.get('step')}{loss}"
            )
            child.added = done

    def _stop(self, number: int, _frame: object) -> None:
        self._asked += 1
        for child in self._children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        if self._asked == 1:
            self._say("leaving: finishing what is begun (again to end at once)")

    def _verdict(self) -> int:
        worst = 0
        for child in self._children:
            code = child.process.returncode
            if code == 0 or (self._asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM)):
                continue
            worst = worst or (code if code > 0 else ExitCode.BUG)
            why = child.last.get("why") or (
                f"killed by signal {-code}" if code < 0 else f"see {child.node.log}"
            )
            self._say(f"the node ended with code {code}: {why}")
            if code > 0 and (remedy := advice(code)):
                self._say(f"what to do: {remedy}")
        if not worst and not any(child.last for child in self._children) and not self._asked:
            self._say("all nodes ended")
        return worst


def _events(child: _Child) -> Iterator[Mapping[str, Any]]:
    """All events of the node from its first on; ends with the process."""
    seen = 0
    while True:
        try:
            for batch in follow(child.node.control, "events", since=seen, follow=True):
                for entry in batch if isinstance(batch, list) else [batch]:
                    seen = max(seen, entry.get("id", 0))
                    yield entry
        except (Unreachable, NoAnswer, CommandFailed, OSError):
            pass
        if child.process.poll() is not None:
            yield from _last_words(child, seen)
            return
        time.sleep(TICK_S)


def _last_words(child: _Child, seen: int) -> Iterator[Mapping[str, Any]]:
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
        if entry.get("at", 0.0) >= child.began and entry.get("id", 0) > seen:
            yield entry
