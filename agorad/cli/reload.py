"""``agoractl reload``: nodes read their settings again."""

from __future__ import annotations

import click

from agorad.ask import CommandFailed, NoAnswer, Unreachable
from agorad.cli.targets import Where, find, target_options


@click.command()
@target_options
def reload(where: Where) -> None:
    """Read settings again without a restart, all or nothing: limits, hours, an authority's settings.

    What changes only with a restart is named, and then nothing is changed. The same as SIGHUP.

    Example: agoractl reload
    """
    trouble: Exception | None = None
    for target in find(where):
        try:
            target.ask("reload")
        except (Unreachable, NoAnswer, CommandFailed) as error:
            if trouble is not None:
                click.echo(f"agoractl: {trouble}", err=True)
            trouble = error
        else:
            click.echo(f"{target.name} has read its settings again", err=True)
    if trouble is not None:
        raise trouble
