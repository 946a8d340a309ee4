"""sd_notify without a dependency: tells systemd READY, STATUS, STOPPING, RELOADING and WATCHDOG.

A datagram of ``KEY=value`` lines to the socket in ``NOTIFY_SOCKET``; without that variable every call
does nothing. Source: sd_notify(3). The watchdog beats from the main loop, not from a thread, so that a
frozen loop is noticed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

import trio


class Notifier:
    """One per process; does nothing where no manager listens."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._beat_s = int(watchdog_us) / 2e6 if watchdog_us.isdigit() and ours else 0.0

    def ready(self) -> None:
        """The node serves."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send("STATUS=" + text.replace("\n", " "))

    def reloading(self) -> None:
        """A reload began; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The node leaves."""
        self._send("STOPPING=1")

    async def watchdog(self) -> None:
        """Beat at half the interval that systemd asked for; returns at once if it asked for none."""
        while self._beat_s > 0:
            self._send("WATCHDOG=1")
            await trio.sleep(self._beat_s)

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
                end.setblocking(False)
                end.sendto(message.encode(), self._address)
        except OSError:
            return  # a manager that is away must not stop the node
