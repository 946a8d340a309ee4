"""A real PostgreSQL for tests: made in a folder, on a port of its own, gone with the test."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

START_S = 30.0


def programs() -> Path | None:
    """The folder of ``initdb`` and ``postgres``, wherever the distribution keeps it."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").exists()), None)


WHY_NOT = "no PostgreSQL here: apt install postgresql"


@attrs.define
class Server:
    """A running server; ``url`` has no password, since only loopback reaches it."""

    binaries: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://agora@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [
            str(self.binaries / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port),
            "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=50",
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **_unprivileged())
        until = time.monotonic() + START_S
        ready = [str(self.binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < until, "PostgreSQL does not answer"
            time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT at once but in order, SIGKILL as a power cut does; children included."""
        if self.process is None:
            return
        children = _children(self.process.pid)
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        self.process.wait(30)
        self.process = None


@contextmanager
def server() -> Iterator[Server]:
    """A fresh, empty server on loopback."""
    binaries = programs()
    assert binaries is not None
    with tempfile.TemporaryDirectory(prefix="agora-postgres-") as name, socket.socket() as probe:
        folder = Path(name)
        who = _unprivileged()
        if who:
            os.chown(folder, who["user"], who["group"])
        made = subprocess.run(
            [str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "agora", "-A", "trust", "-N"],
            capture_output=True, text=True, check=False, timeout=120, cwd=folder, **who,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        probe.bind(("127.0.0.1", 0))
        running = Server(binaries, folder, probe.getsockname()[1])
        probe.close()
        try:
            running.start()
            yield running
        finally:
            running.stop()


def _unprivileged() -> dict[str, int]:
    """PostgreSQL refuses to run as root: whom to run it as instead."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid}
    raise AssertionError("root without a 'nobody'")


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
            except (OSError, IndexError):
                continue
    return found
