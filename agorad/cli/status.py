"""``agoractl status``: what this machine's nodes do, straight from their memory, on one screen."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from typing import Any, Final

import attrs
import click

from agorad import __version__
from agorad.ask import CommandFailed, NoAnswer, NotAllowed, Unreachable, ask_all
from agorad.cli.last_seen import LastSeen, last_seen
from agorad.cli.status_screen import folded, screen
from agorad.cli.targets import Target, Where, find, how_to_start, target_options
from p2p.errors import LocalError

ANSWER_S: Final = 3.0
WATCH_S: Final = 1.0


@attrs.frozen
class Down:
    """A node that does not answer."""

    target: Target
    error: Unreachable | NoAnswer
    seen: LastSeen

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"name": self.target.name, "why": str(self.error), "last": attrs.asdict(self.seen)}


@click.command()
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--watch", is_flag=True, help="Live, until interrupted.")
def status(where: Where, as_json: bool, watch: bool) -> None:
    """What this machine's nodes do: phase, stage, step, loss, rounds, peers, warnings.

    Ends with code 3 if no node answers, after saying what they did last.

    Example: agoractl status --watch
    """
    targets = find(where)
    if watch and not as_json and sys.stdout.isatty():
        _live(targets)
        return
    while True:
        nodes, down = gather(targets)
        if as_json:
            click.echo(json.dumps({"nodes": nodes, "down": [node.to_json() for node in down]}))
        elif nodes:
            click.echo("\n".join(screen(nodes, _width(), down=len(down))))
        _tell(nodes, down, as_json)
        if not watch:
            if down and not nodes:
                sys.exit(3 if isinstance(down[0].error, Unreachable) else 4)
            return
        sys.stdout.flush()
        time.sleep(WATCH_S)


def gather(targets: list[Target]) -> tuple[list[dict[str, Any]], list[Down]]:
    """Status of each node that answers, and what is known of each that does not."""
    nodes: list[dict[str, Any]] = []
    down = []
    answers = ask_all([target.socket for target in targets], "status", timeout=ANSWER_S)
    for target, answer in zip(targets, answers, strict=True):
        if isinstance(answer, CommandFailed):
            down.append(Down(target, Unreachable(str(answer)), _last_seen(target)))
        elif isinstance(answer, Unreachable | NoAnswer):
            down.append(Down(target, answer, _last_seen(target)))
        else:
            nodes.append(answer)
    return nodes, down


def _last_seen(target: Target) -> LastSeen:
    try:
        return last_seen(target.settings().events)
    except LocalError:
        return LastSeen()


def _tell(nodes: list[dict[str, Any]], down: list[Down], as_json: bool) -> None:
    for entry in down:
        if entry.target.config is None or as_json or isinstance(entry.error, NotAllowed):
            click.echo(f"agoractl: {entry.target.name}: {entry.error}", err=True)
            continue
        if isinstance(entry.error, NoAnswer):
            click.echo(f"agoractl: {entry.target.name} runs but {entry.error}; agoractl doctor", err=True)
            continue
        remedy = entry.seen.remedy(how_to_start(entry.target.config))
        click.echo(f"agoractl: {entry.target.name} does not run: {entry.seen.sentence()}", err=True)
        click.echo(f"  {remedy}", err=True)
    others = {str(node["version"]) for node in nodes if node.get("version", __version__) != __version__}
    if others:
        click.echo(
            f"agoractl: this is version {__version__}, running nodes are {', '.join(sorted(others))}; "
            "agoractl restart brings them up to date",
            err=True,
        )


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _live(targets: list[Target]) -> None:
    """The same screen redrawn in place; ends by Ctrl-C or SIGTERM, and leaves the terminal as it was.

    The alternate screen is drawn on: nothing of it is left behind, nor does a change of size tear it.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)

    def draw() -> Text:
        nodes, down = gather(targets)
        lines = screen(nodes, console.width, down=len(down)) if nodes else []
        lines += (
            ["", *(line for entry in down for line in folded(f"! {_lost(entry)}", console.width))]
            if down
            else []
        )
        lines += ["", f"{time.strftime('%H:%M:%S')}, every second; Ctrl-C ends this"]
        shown = Text("\n".join(lines), overflow="ellipsis", no_wrap=True)
        shown.highlight_regex(r"(?m)^(! |    ).*$", "yellow")
        shown.highlight_regex(r"\bactive\b", "green")
        return shown

    def end(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        with Live(draw(), console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
            while True:
                time.sleep(WATCH_S)
                live.update(draw(), refresh=True)
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)


def _lost(entry: Down) -> str:
    if isinstance(entry.error, NoAnswer):
        return f"{entry.target.name} runs but {entry.error}"
    if isinstance(entry.error, NotAllowed) or entry.target.config is None:
        return f"{entry.target.name}: {entry.error}"
    return f"{entry.target.name} does not run: {entry.seen.sentence()}"
