"""``agoractl debug``: into a running daemon, for who has to find out why it does not do what it should."""

from __future__ import annotations

import json
from typing import Any

import click

from agorad.ask import NoAnswer
from agorad.cli.targets import Where, one, target_options


@click.group()
def debug() -> None:
    """Look into a running daemon."""


@debug.command()
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def stacks(where: Where, as_json: bool) -> None:
    """What every task and thread of a node waits for or does: a tree, each with its place in the code.

    One whose event loop hangs cannot answer; SIGUSR1 makes it write its threads' stacks to stderr.

    Example: agoractl debug stacks --node gpu0
    """
    target = one(where)
    try:
        found = target.ask("stacks")
    except NoAnswer as error:
        raise NoAnswer(
            f"{error}; kill -USR1 its process: the log of its stderr then says where it is"
        ) from error
    click.echo(json.dumps(found) if as_json else "\n".join(lines(found)))


def lines(found: dict[str, Any]) -> list[str]:
    """A task a line, its frames beneath it."""
    said = [f"{len(found['tasks'])} tasks, {len(found['threads'])} threads beside the loop's"]
    for task in found["tasks"]:
        indent = "  " * task["depth"]
        said.append(f"{indent}{task['name']}")
        said += [f"{indent}    {frame}" for frame in task["frames"]]
    for thread in found["threads"]:
        said.append(f"thread {thread['name']}")
        said += [f"    {frame}" for frame in thread["frames"]]
    return said
