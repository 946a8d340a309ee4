"""``agoractl pause`` and ``agoractl resume``: hold the nodes of this machine, and let them go on."""

from __future__ import annotations

import re
import time
from typing import Any, Final

import click

from agorad.ask import CommandFailed, NoAnswer, Unreachable
from agorad.cli.targets import Where, find, target_options

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Span(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A time such as ``90s``, ``30m``, ``2h`` or ``1d``, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*([smhd]?)", value.strip())
        if found is None or not (seconds := float(found[1]) * _UNITS[found[2] or "s"]):
            self.fail(f"{value!r} is not a time like 90s, 30m, 2h or 1d", param, ctx)
        return seconds


@click.command()
@click.option("--for", "seconds", type=Span(), help="Resume by itself after this time, like 2h.")
@target_options
def pause(seconds: float | None, where: Where) -> None:
    """Hold the nodes here: what they have is finished, nothing new is taken, the place in the run is kept.

    Others route around a paused node at once. It neither computes nor averages; a restart ends the pause.

    Example: agoractl pause --for 2h
    """
    _each(where, "pause", _until(seconds), seconds=seconds)


@click.command()
@target_options
def resume(where: Where) -> None:
    """Let paused nodes go on; they catch up with the run first if they missed steps.

    Example: agoractl resume
    """
    _each(where, "resume", "goes on")


def _until(seconds: float | None) -> str:
    if seconds is None:
        return "is paused; agoractl resume lets it go on"
    return f"is paused until {time.strftime('%a %H:%M', time.localtime(time.time() + seconds))}"


def _each(where: Where, do: str, done: str, **arguments: Any) -> None:
    """Ask all nodes that were named; those that cannot be paused matter only if none can."""
    trouble: Exception | None = None
    asked = 0
    for target in find(where):
        try:
            target.ask(do, **arguments)
        except (Unreachable, NoAnswer, CommandFailed) as error:
            trouble = trouble or error
        else:
            asked += 1
            click.echo(f"{target.name} {done}", err=True)
    if not asked and trouble is not None:
        raise trouble
