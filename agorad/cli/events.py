"""``agoractl events``: a node's events, for people as lines, for programs as JSON lines."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from agorad.ask import ask, follow
from agorad.cli.targets import Where, one, target_options
from agorad.console import friendly


@click.command()
@target_options
@click.option("--since", type=click.IntRange(min=0), default=0, help="Only events after this id.")
@click.option("--follow", "following", is_flag=True, help="Go on as new ones happen.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines, all events, also on a terminal.")
def events(where: Where, since: int, following: bool, as_json: bool) -> None:
    """What a node reports (the last 4096 events), as it happens with --follow.

    Example: agoractl events --dir /tmp/my-demo --node worker-0-0 --follow
    """
    target = one(where)
    machine = as_json or not sys.stdout.isatty()
    with target.advised():
        if following:
            for batch in follow(target.socket, "events", since=since, follow=True):
                _show(batch, machine)
        else:
            _show(ask(target.socket, "events", since=since), machine)


def _show(entries: list[dict[str, Any]], machine: bool) -> None:
    for entry in entries:
        line = json.dumps(entry) if machine else friendly(entry)
        if line is not None:
            click.echo(line)
