"""sd_notify without a dependency: tells systemd READY, STATUS, STOPPING, RELOADING and WATCHDOG.

A datagram of ``KEY=value`` lines to the socket in ``NOTIFY_SOCKET``; without that variable every call
does nothing. Source: sd_notify(3). The watchdog beats from the main loop, not from a thread, so that a
frozen loop is noticed. Before READY systemd keeps no watchdog; until then the loop extends the time for
the start instead, beat by beat: a node may wait in a queue for hours, a frozen one may not.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import trio

STARTING_BEAT_S: Final = 20.0
STARTING_S: Final = 90.0
"""How long a start may hang: a few beats."""
STATUS_S: Final = 2.0
_PATIENT: Final = "AGORA_WATCHDOG_PATIENT"
"""Set in the environment of a process that began anew."""


class Notifier:
    """One per process; does nothing where no manager listens."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._beat_s = int(watchdog_us) / 2e6 if watchdog_us.isdigit() and ours else 0.0
        self._ready = False
        self._patient = _PATIENT in environment

    def ready(self) -> None:
        """The node serves."""
        self._ready = True
        self._send("READY=1")
        if self._patient and self._beat_s > 0:
            self._patient = False
            self._send(f"WATCHDOG_USEC={self._beat_s * 2e6:.0f}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send("STATUS=" + text.replace("\n", " "))

    def reloading(self) -> None:
        """A reload began; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def again(self) -> None:
        """The process is about to begin anew: the watchdog has patience until its next life is ready."""
        if self._beat_s > 0:
            os.environ[_PATIENT] = "1"
            self._send(f"WATCHDOG_USEC={max(STARTING_S, 2 * self._beat_s) * 1e6:.0f}\nWATCHDOG=1")

    def stopping(self) -> None:
        """The node leaves."""
        self._send("STOPPING=1")

    async def watchdog(self) -> None:
        """Beat at half the interval that systemd asked for; returns at once if it asked for none."""
        while self._beat_s > 0:
            self._send("WATCHDOG=1")
            await trio.sleep(self._beat_s)

    async def starting(self) -> None:
        """Extend the time for the start until the node is ready."""
        while self._address and not self._ready:
            await trio.sleep(STARTING_BEAT_S)
            if not self._ready:
                self._send(f"EXTEND_TIMEOUT_USEC={STARTING_S * 1e6:.0f}")

    async def tell(self, document: Callable[[], Mapping[str, Any]]) -> None:
        """Keep the manager's status line true; ``document`` is the node's status."""
        told = ""
        while self._address:
            await trio.sleep(STATUS_S)
            if (line := summary(document())) != told:
                told = line
                self.status(line)

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
                end.setblocking(False)
                end.sendto(message.encode(), self._address)
        except OSError:
            return  # a manager that is away must not stop the node


def summary(status: Mapping[str, Any]) -> str:
    """``active, stage 2, step 812, loss 2.713, 7 peers`` and the first warning."""
    parts = [str(status["phase"])]
    queue = status.get("queue")
    if queue:
        parts.append(f"place {queue['position']}")
    if status.get("stage") is not None:
        parts.append(f"stage {status['stage']}")
    if status.get("step"):
        parts.append(f"step {status['step']}")
    if status.get("loss") is not None:
        parts.append(f"loss {status['loss']:.3f}")
    parts.append(f"{status['peers']} peer{'' if status['peers'] == 1 else 's'}")
    line = ", ".join(parts)
    warnings = status.get("warnings")
    return f"{line}; {warnings[0]}" if warnings else line
