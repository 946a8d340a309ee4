"""``agoractl leave``: nodes finish or hand back their work and end."""

from __future__ import annotations

import click

from agorad.ask import NoAnswer, Unreachable
from agorad.cli.targets import Where, find, target_options


@click.command()
@target_options
def leave(where: Where) -> None:
    """Ask nodes to stop cleanly; returns once they were asked, they end within 30 s.

    Example: agoractl leave --config ~/.config/agora/agorad.toml
    """
    asked = 0
    trouble: Unreachable | NoAnswer | None = None
    for target in find(where):
        try:
            target.ask("leave")
        except (Unreachable, NoAnswer) as error:
            trouble = trouble or error
        else:
            asked += 1
            click.echo(f"{target.name} is leaving", err=True)
    if not asked and trouble is not None:
        raise trouble
