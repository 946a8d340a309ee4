"""systemd, as far as a service needs it: is it there, which version, do this."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Final

import attrs

from p2p.errors import LocalError

COMMAND_S: Final = 90.0
"""Longer than a unit's TimeoutStopSec and the kill after it."""

Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command's end and its output; ``LocalError`` if it cannot be started or takes too long."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_S, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise LocalError(f"cannot run {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise LocalError(f"{' '.join(command)} did not end within {COMMAND_S:.0f} s") from error


@attrs.frozen
class Units:
    """Units of ours, and which of them have to be ended before their files go."""

    known: list[str]
    running: list[str]
    enabled: list[str]

    @property
    def steps(self) -> list[str]:
        """What their end takes, for people."""
        stops = [f"stop {name} (it hands back its work first, up to 30 s)" for name in self.running]
        return [*stops, *(f"disable {name}" for name in self.enabled)]


class Manager:
    """systemctl and its relatives; ``runner`` is replaced in tests. ``user``: the systemd of who calls."""

    def __init__(self, runner: Run = run, *, user: bool = False) -> None:
        self._runner = runner
        self._user = user

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        of_user = self._user and command[0] == "systemctl"
        return self._runner([command[0], "--user", *command[1:]] if of_user else command)

    def do(self, *command: str) -> str:
        """Its output; ``LocalError`` with its last words if it fails."""
        done = self._run(list(command))
        if done.returncode != 0:
            words = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
            raise LocalError(
                f"{' '.join(command)} failed with {done.returncode}: {words or 'it said nothing'}"
            )
        return done.stdout

    def says(self, *command: str) -> str:
        """Its output, however it ended."""
        return self._run(list(command)).stdout

    def succeeds(self, *command: str) -> bool:
        """Whether it did what it was asked for."""
        return self._run(list(command)).returncode == 0

    def version(self) -> int:
        """Of systemd; 0 if it does not say."""
        found = re.search(r"\d+", self.says("systemctl", "--version"))
        return int(found.group()) if found else 0

    def is_enabled(self, unit: str) -> bool:
        """Whether it starts at boot."""
        return self.says("systemctl", "is-enabled", unit).strip() == "enabled"

    def is_active(self, unit: str) -> bool:
        """Whether it runs, or is about to."""
        return self.says("systemctl", "is-active", unit).strip() in ("active", "activating", "reloading")

    def known(self) -> list[str]:
        """Units of ours that are loaded or enabled."""
        patterns = ("agorad.service", "agorad@*.service")
        loaded = self.says("systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", *patterns)
        files = self.says("systemctl", "list-unit-files", "--no-legend", "--full", *patterns)
        names = {line.split()[0] for text in (loaded, files) for line in text.splitlines() if line.split()}
        return sorted(name for name in names if name != "agorad@.service")

    def units(self) -> Units:
        """Ours, as they are now."""
        known = self.known()
        return Units(
            known,
            running=[name for name in known if self.is_active(name)],
            enabled=[name for name in known if self.is_enabled(name)],
        )

    def end(self, units: Units, remove_files: Callable[[], object]) -> None:
        """Stop and disable them, remove what ``remove_files`` does, and forget that they ever were."""
        if units.running:
            self.do("systemctl", "stop", *units.running)
        if units.enabled:
            self.do("systemctl", "disable", "--quiet", *units.enabled)
        remove_files()
        self.do("systemctl", "daemon-reload")
        for name in units.known:
            self.says("systemctl", "reset-failed", name)
