"""``agoractl status``: what this machine's nodes do, one row each, straight from their memory."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from agorad.ask import NoAnswer, Unreachable, ask
from agorad.cli.targets import Target, find, target_options

ANSWER_S: Final = 3.0
WATCH_S: Final = 1.0
_COLUMNS: Final = (
    "node",
    "role",
    "phase",
    "stage",
    "step",
    "loss",
    "batches",
    "last round",
    "points",
    "peers",
    "up",
)
_DISPENSABLE: Final = ("role", "up", "peers", "points")
"""What a narrow terminal does without, in this order."""


@click.command()
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--watch", is_flag=True, help="Show it again every second until interrupted.")
def status(folder: Path | None, config: Path | None, socket: Path | None, as_json: bool, watch: bool) -> None:
    """What this machine's nodes do: phase, stage, step, loss, rounds, peers, warnings.

    Example: agoractl status --dir /tmp/my-demo --watch
    """
    targets = find(folder, config, socket)
    while True:
        nodes, silent = gather(targets)
        if as_json:
            click.echo(json.dumps({"nodes": nodes}))
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            click.echo("\n".join(table(nodes, width)))
        for sentence in silent:
            click.echo(sentence, err=True)
        if not watch:
            return
        time.sleep(WATCH_S)


def gather(targets: list[Target]) -> tuple[list[dict[str, Any]], list[str]]:
    """Status of each node that answers, and a sentence for each that does not.

    If none answers, the first one's trouble is raised.
    """
    nodes: list[dict[str, Any]] = []
    troubles: list[Unreachable | NoAnswer] = []
    silent = []
    for target in targets:
        try:
            nodes.append(ask(target.socket, "status", timeout=ANSWER_S))
        except (Unreachable, NoAnswer) as error:
            troubles.append(error)
            silent.append(f"{target.name}: {error}")
    if not nodes and troubles:
        raise troubles[0]
    return nodes, silent


def table(nodes: list[dict[str, Any]], width: int | None = None) -> list[str]:
    """Lines for people; "-" is what there is not. Columns are left out where ``width`` is too small."""
    rows = [_COLUMNS, *(_row(node) for node in nodes)]
    widths = {name: max(len(row[at]) for row in rows) for at, name in enumerate(_COLUMNS)}
    for name in _DISPENSABLE:
        if width is None or sum(widths.values()) + 2 * (len(widths) - 1) <= width:
            break
        del widths[name]
    lines = [
        "  ".join(row[at].ljust(widths[name]) for at, name in enumerate(_COLUMNS) if name in widths).rstrip()
        for row in rows
    ]
    warnings = [f"! {node['name']}: {warning}" for node in nodes for warning in node.get("warnings", ())]
    runs = sorted({str(node["run"]) for node in nodes})
    return [f"{len(nodes)} node{'s' * (len(nodes) != 1)} of {', '.join(runs)}", "", *lines, *warnings]


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    last = node.get("round")
    batches = node.get("microbatches") or {}
    done = batches.get("completed", batches.get("added"))
    return (
        str(node["name"]),
        str(node["role"]),
        str(node["phase"]),
        _or_dash(node.get("stage")),
        str(node["step"]) if node["role"] in ("worker", "trainer") else "-",
        "-" if node.get("loss") is None else f"{node['loss']:.3f}",
        _or_dash(done),
        "-" if not last else f"{last['number']}: {last['fraction']:.0%} of {last['members']}",
        _points(node.get("points")),
        str(node["peers"]),
        duration(node["uptime_s"]),
    )


def _points(earned: dict[str, float] | None) -> str:
    return "-" if earned is None else f"{earned['compute'] + earned['presence']:.3g}"


def duration(seconds: float) -> str:
    """``3h12m``, ``12m05s`` or ``7s``."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)
