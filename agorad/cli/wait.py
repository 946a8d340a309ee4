"""``agoractl wait``: until a node is as a script needs it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final

import click

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.cli.pause import Span
from agorad.cli.targets import Where, find, target_options
from p2p.records import PHASES

LOOK_S: Final = 0.2
_COUNTS: Final = ("step", "round", "peers", "microbatches")

Condition = Callable[[dict[str, Any] | None], bool]
"""Of a status, or of None for a node that does not run."""


class Wanted(click.ParamType):  # type: ignore[type-arg]
    """``running``, ``gone``, a phase, or a count that is reached, like ``step=N``."""

    name = "condition"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value == "running":
            return lambda status: status is not None
        if value == "gone":
            return lambda status: status is None
        if value in PHASES:
            return lambda status: status is not None and status["phase"] == value
        found = re.fullmatch(r"(\w+)=(\d{1,12})", value)
        if found is None or found[1] not in _COUNTS:
            known = ", ".join(["running", "gone", *sorted(PHASES), *(f"{name}=N" for name in _COUNTS)])
            self.fail(f"{value!r} is nothing to wait for; known: {known}", param, ctx)
        name, least = found[1], int(found[2])
        return lambda status: status is not None and _count(status, name) >= least


@click.command()
@click.option(
    "--for",
    "conditions",
    type=Wanted(),
    multiple=True,
    required=True,
    metavar="CONDITION",
    help="running, gone, a phase such as active, or step=N, round=N, peers=N, microbatches=N.",
)
@click.option("--timeout", type=Span(), default="60s", show_default=True, help="Like 90s, 30m or 2h.")
@click.option("--any", "any_node", is_flag=True, help="One node is enough; all of them by default.")
@target_options
def wait(conditions: tuple[Condition, ...], timeout: float, any_node: bool, where: Where) -> None:
    """Return once the nodes are so: 0, or 4 after the time is over. Several --for: all of them at once.

    Example: agoractl wait --for active --for step=100 --timeout 10m
    """
    until = time.monotonic() + timeout
    while True:
        try:
            statuses = [_status(target.socket) for target in find(where)]
        except Unreachable:
            statuses = [None]  # no node has settings here yet
        fits = [all(condition(status) for condition in conditions) for status in statuses]
        if any(fits) if any_node else all(fits):
            return
        if time.monotonic() >= until:
            now = ", ".join("not running" if s is None else f"{s['name']} {s['phase']}" for s in statuses)
            raise NoAnswer(f"not so within {timeout:g} s; now: {now}")
        time.sleep(LOOK_S)


def _status(socket: Any) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = ask(socket, "status", timeout=2.0)
    except (Unreachable, NoAnswer, CommandFailed):
        return None
    return found


def _count(status: dict[str, Any], name: str) -> int:
    if name == "microbatches":
        batches = status.get(name) or {}
        return int(batches.get("completed", batches.get("added", 0)))
    if name == "round":
        return int((status.get(name) or {}).get("number", -1))
    return int(status.get(name) or 0)
