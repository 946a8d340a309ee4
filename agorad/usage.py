"""What people did wrong on a command line, as one sentence, and paths that are none.

click prints a usage block of several lines; here every error is one line: what is wrong, and where help
is. ``NamedPath`` is click's path with the empty one refused: ``--data "$UNSET"`` would otherwise mean the
working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class NamedPath(click.Path):
    """A path as ``pathlib.Path``, never empty."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


def once(ctx: click.Context, command: click.Command, args: list[str]) -> None:
    """A usage error for an option that is there twice: click takes the last one and says nothing."""
    ctx = click.Context(command, info_name=command.name, parent=ctx)
    while isinstance(command, click.Group):
        below = command.get_command(ctx, args[0]) if args else None
        if below is None:
            return
        command, args = below, args[1:]
        ctx = click.Context(command, info_name=command.name, parent=ctx)
    words = args[: args.index("--")] if "--" in args else args
    for param in command.params:
        if not isinstance(param, click.Option) or param.multiple or param.count:
            continue
        forms = tuple(param.opts)
        given = [word for word in words if word.partition("=")[0] in forms]
        if len(given) > 1:
            ctx.fail(f"{given[-1].partition('=')[0]} is given {len(given)} times; give it once")


def complain(error: click.ClickException, program: str) -> int:
    """Print the sentence to stderr; the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # newer versions of click have it; not an error of words
        error.show()
    elif isinstance(error, click.UsageError):
        command = program if error.ctx is None else error.ctx.command_path
        text = error.format_message().rstrip(".")
        what, _, hint = text.partition("Did you mean")  # "x. Did you mean y?" or "x. (Did you mean z?)"
        if hint:
            text = f"{what.rstrip('. (')}; did you mean{hint.rstrip('?)')}"
        click.echo(f"{program}: {text[:1].lower()}{text[1:]} (see {command} --help)", err=True)
    else:
        click.echo(f"{program}: {error.format_message()}", err=True)
    return error.exit_code
