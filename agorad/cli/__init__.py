"""``agoractl``: what people and scripts do with nodes and runs.

Each command lives in its own module, imported only when it is called, so that ``status`` answers in a
fraction of a second. Errors are one sentence on stderr. Exit codes: 0 done, 1 failed, 2 usage,
configuration or unreadable input, 3 daemon not reachable, 4 timeout, 5 found problems.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Final, cast

import click

from agorad import __version__
from agorad.settings import nearest
from agorad.usage import complain, once

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: Final = {
    "authority": ("authority", "Let in, hold back and remove, at a running authority."),
    "bench": ("bench", "Measure what this machine does."),
    "bugreport": ("bugreport", "One archive for who is to help; no secrets in it."),
    "completion": ("completion", "What a shell needs to complete agoractl."),
    "config": ("config", "A node's settings, and where they come from."),
    "debug": ("debug", "Look into a running daemon."),
    "demo": ("demo", "A whole swarm on this machine, trained on real text."),
    "doctor": ("doctor", "What is wrong here, and what to do about it."),
    "events": ("events", "What a node reports, as it happens."),
    "export": ("export", "The run's model as one folder of weights."),
    "generate": ("generate", "Text from an exported model."),
    "identity": ("identity", "Show or create a node's key."),
    "join": ("join", "Take part in a run: one command to a node at work."),
    "leave": ("leave", "Ask nodes to stop cleanly."),
    "logs": ("logs", "What a node wrote."),
    "man": ("man", "Write the manual pages."),
    "pause": ("pause", "Hold nodes: no work, but the place is kept."),
    "peers": ("peers", "Whom nodes are connected to."),
    "ping": ("ping", "Reach one peer: path and time."),
    "points": ("points", "Who has earned what: the run's leaderboard."),
    "reload": ("reload", "Nodes read their settings again."),
    "restart": ("restart", "Stop nodes in order and start them again."),
    "resume": ("pause", "Let paused nodes go on."),
    "run": ("run", "Create, sign, show and plan a run."),
    "service": ("service", "Nodes that start with the machine: systemd."),
    "status": ("status", "What this machine's nodes do."),
    "swarm": ("swarm", "The whole run: stages, replicas, load."),
    "wait": ("wait", "Until nodes are as a script needs them."),
}
"""Module of each command (which holds a click command of that name) and its line of help."""


class LazyGroup(click.Group):
    """Knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _help = COMMANDS[cmd_name]
        return cast(click.Command, getattr(importlib.import_module(f"agorad.cli.{module}"), cmd_name))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=line)
            for name, (_module, line) in sorted(COMMANDS.items())
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_module, line) in sorted(COMMANDS.items())])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            once(ctx, command, rest)
        return name, command, rest


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="agoractl")
def agoractl() -> None:
    """Talk to agorad: nodes that train one model together."""


def main() -> None:
    """Entry point: maps failures to exit codes and sentences."""
    from agorad.ask import CommandFailed, NoAnswer, Unreachable
    from p2p.errors import LocalError

    try:
        agoractl(prog_name="agoractl", standalone_mode=False)
    except click.ClickException as error:
        sys.exit(complain(error, "agoractl"))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output closed it: nothing left to say
        sys.stderr.close()
        sys.exit(1)
    except LocalError as error:
        _end(2, error)
    except Unreachable as error:
        _end(3, error)
    except NoAnswer as error:
        _end(4, error)
    except CommandFailed as error:
        _end(1, error)


def _end(code: int, error: Exception) -> None:
    click.echo(f"agoractl: {error}", err=True)
    sys.exit(code)
