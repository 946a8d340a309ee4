"""``agoractl restart``: nodes stop in order and begin again, with the program and settings of now."""

from __future__ import annotations

import time
from typing import Final

import click

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.cli.targets import Target, Where, find, target_options

LOOK_S: Final = 0.2
READY: Final = ("active", "warming", "syncing", "paused", "queued")


@click.command()
@click.option("--timeout", type=click.FloatRange(1, 3600), default=90.0, show_default=True, help="Seconds.")
@target_options
def restart(timeout: float, where: Where) -> None:
    """Stop nodes in order and start them again; returns once they are back.

    They keep their process, place and port; settings and software are read anew. One that does not run is
    started by its service or by `agoractl join`.

    Example: agoractl restart --node gpu0
    """
    targets = find(where)
    asked: list[tuple[Target, float]] = []
    trouble: Unreachable | NoAnswer | None = None
    for target in targets:
        try:
            began = time.time() - target.ask("status")["uptime_s"]
            target.ask("restart")
        except (Unreachable, NoAnswer) as error:
            trouble = trouble or error
        else:
            asked.append((target, began))
            click.echo(f"{target.name} is restarting", err=True)
    if not asked and trouble is not None:
        raise trouble
    until = time.monotonic() + timeout
    for target, began in asked:
        _wait(target, began, until, timeout)
        click.echo(f"{target.name} is back", err=True)


def _wait(target: Target, began: float, until: float, timeout: float) -> None:
    """Until another life of the node answers."""
    while time.monotonic() < until:
        try:
            found = ask(target.socket, "status", timeout=2.0)
            if time.time() - found["uptime_s"] > began + 0.5 and found["phase"] in READY:
                return
        except (Unreachable, NoAnswer, CommandFailed):
            pass
        time.sleep(LOOK_S)
    raise NoAnswer(f"{target.name} was not back within {timeout:g} s; agoractl logs says what it does")
