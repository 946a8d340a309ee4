"""``agoractl logs``: what a node wrote: its log file, or the journal where a service has it there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from agorad.cli.targets import SERVICES, Target, Where, one, target_options
from agorad.config import Config, default_path
from agorad.console import friendly
from p2p.errors import LocalError

CHUNK: Final = 64 << 10
LOOK_S: Final = 0.25
_LEVELS: Final = ("debug", "info", "warning", "error")


@click.command()
@click.option("--follow", "-f", "following", is_flag=True, help="Go on as more is written.")
@click.option(
    "--lines", "-n", type=click.IntRange(0, 1_000_000), default=50, show_default=True, help="So many."
)
@click.option("--level", type=click.Choice(_LEVELS), default="debug", help="Only these and worse.")
@click.option("--json", "as_json", is_flag=True, help="The lines as they are.")
@target_options
def logs(following: bool, lines: int, level: str, as_json: bool, where: Where) -> None:
    """The log of a node, also of one that does not run.

    Example: agoractl logs --follow --level warning
    """
    target = one(where)
    settings = target.settings()
    if settings.node.log is None:
        _journal(target, settings, following, lines)
        return
    shown = _Shown(level, as_json)
    try:
        with settings.node.log.open("rb") as file:
            for line in _last(file, lines):
                shown.say(line)
            rest = b""
            while following:
                if not (chunk := file.read(CHUNK)):
                    sys.stdout.flush()
                    if _replaced(file, settings.node.log):
                        file.close()
                        file = settings.node.log.open("rb")  # a new one was begun
                        continue
                    time.sleep(LOOK_S)
                    continue
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    shown.say(line)
    except OSError as error:
        raise LocalError(f"cannot read the log {settings.node.log}: {error.strerror}") from error
    except KeyboardInterrupt:
        return


class _Shown:
    def __init__(self, level: str, as_json: bool) -> None:
        self._least = _LEVELS.index(level)
        self._as_json = as_json

    def say(self, line: bytes) -> None:
        """One line; what is no event (a traceback, torch's words) is shown as it is."""
        text = line.decode(errors="replace")
        entry: Any = None
        try:
            entry = json.loads(text)
        except ValueError:
            pass
        if not isinstance(entry, dict):
            if text and not self._as_json:
                click.echo(text)
            return
        if _LEVELS.index(entry.get("level", "info")) < self._least:
            return
        said = text if self._as_json or "event" not in entry else friendly(entry)
        if said is not None:  # else it is for programs
            click.echo(said)


def _last(file: Any, count: int) -> list[bytes]:
    """The last lines; the file stands at its end afterwards."""
    end = file.seek(0, os.SEEK_END)
    data, at = b"", end
    while at > 0 and data.count(b"\n") <= count:
        before, at = at, max(0, at - CHUNK)
        file.seek(at)
        data = file.read(before - at) + data
    file.seek(end)
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return lines[-count:] if count else []


def _replaced(file: Any, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _journal(target: Target, settings: Config, following: bool, lines: int) -> None:
    """The service's, where there is one."""
    unit = _unit(target)
    program = shutil.which("journalctl")
    if unit is None or program is None:
        raise LocalError(
            f"{settings.name} writes no log file: set node.log in {target.config}; what it reports is in "
            "agoractl events"
        )
    command = [program, "--unit", unit, "--lines", str(lines), "--output", "cat"]
    sys.stdout.flush()
    code = subprocess.run([*command, "--follow"] if following else command, check=False).returncode
    if code:
        raise LocalError(f"journalctl ended with code {code}; it may need sudo or the group systemd-journal")


def _unit(target: Target) -> str | None:
    if target.config is None:
        return None
    if target.config.parent.parent == SERVICES:
        return f"agorad@{target.config.parent.name}"
    return "agorad" if target.config == default_path() else None
