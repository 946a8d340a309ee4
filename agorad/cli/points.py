"""``agoractl points``: the leaderboard, as an authority of the run has it."""

from __future__ import annotations

import json
import time
from typing import Any, Final

import click

from agorad.ask import CommandFailed, NoAnswer, Unreachable
from agorad.cli.targets import Where, find, target_options

ANSWER_S: Final = 10.0
MOST: Final = 256
_COLUMNS: Final = ("rank", "user", "active", "joined", "compute", "presence", "score", "status")


@click.command()
@target_options
@click.option("--limit", type=click.IntRange(1, MOST), default=50, show_default=True, help="Rows to show.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def points(where: Where, limit: int, as_json: bool) -> None:
    """Who has earned what: a node of this machine asks an authority of its run.

    A point is a PFLOP of microbatches that a trainer issued and had answered, or an hour of presence.

    Example: agoractl points --dir /tmp/my-demo
    """
    trouble: Exception | None = None
    for target in find(where):
        try:
            found = target.ask("points", timeout=ANSWER_S, limit=limit)
        except (Unreachable, NoAnswer, CommandFailed) as error:
            trouble = trouble or error
            continue
        click.echo(json.dumps(found) if as_json else "\n".join(table(found)))
        return
    if trouble is not None:
        raise trouble


def table(found: dict[str, Any]) -> list[str]:
    """Lines for people; the asker's own row is marked, and added where it is further down."""
    own = found.get("own")
    shown = list(found["rows"])
    if own is not None and own["user"] not in [row["user"] for row in shown]:
        shown.append(own)
    rows = [_COLUMNS, *(_row(row) for row in shown)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS))]
    lines = []
    for row, source in zip(rows, [None, *shown], strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        mark = "*" if source is not None and own is not None and source["user"] == own["user"] else " "
        lines.append(f"{mark} {cells}".rstrip())
    count = found["accounts"]
    head = f"{count} account{'s' * (count != 1)}; points are PFLOP"
    node = found.get("node")
    if node is not None:
        head += f"; this node: {amount(node['compute'])} compute, {amount(node['presence'])} presence"
    return [head, "", *lines]


def amount(pflop: float) -> str:
    """Three digits that mean something, or whole numbers."""
    return f"{pflop:,.0f}" if pflop >= 100 else f"{pflop:.3g}"


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["rank"]),
        str(row["user"]),
        f"{row['active_h']:.1f} h",
        time.strftime("%Y-%m-%d", time.gmtime(row["joined"])),
        amount(row["compute"]),
        amount(row["presence"]),
        amount(row["score"]),
        str(row["status"]),
    )
