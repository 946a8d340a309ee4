"""A run made by ``agoractl run init``, and its light nodes started as a user would: for tests of commands."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from agorad.ask import NoAnswer, Unreachable, ask


def free_ports(count: int = 3) -> int:
    """The first of so many ports beside each other that nobody listens on, below the kernel's own choice."""
    for _ in range(200):
        first = random.randrange(20_000, 32_000)
        try:
            for port in range(first, first + count):
                with closing(socket.socket()) as tried:
                    tried.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def make(folder: Path, *options: str) -> Path:
    """A run's folder."""
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", "run", "init", "small", "--dir", str(folder), "--stages", "2",
         "--port", str(free_ports()), *options],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def started(folder: Path, *roles: str) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The nodes of these roles, answering; killed at the end."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for role in roles:
            config = folder / role / "agorad.toml"
            with (folder / f"{role}.err").open("wb") as errors:
                processes[role] = subprocess.Popen(
                    [sys.executable, "-m", "agorad.main", "--config", str(config)], stderr=errors
                )
        for role, process in processes.items():
            until = time.monotonic() + 60
            while True:
                assert process.poll() is None, (folder / f"{role}.err").read_text()
                assert time.monotonic() < until, f"{role} is not up"
                try:
                    if ask(folder / role / "control.sock", "status")["phase"] == "active":
                        break
                except (Unreachable, NoAnswer):
                    pass
                time.sleep(0.05)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
