"""``agoractl peers``: whom this machine's nodes are connected to."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any, Final

import click

from agorad.ask import NoAnswer, Unreachable
from agorad.cli.targets import Where, find, target_options
from agorad.words import align, duration, or_dash, size

_COLUMNS: Final = ("peer", "role", "stage", "address", "way", "rtt", "sent", "received", "silent", "age")
_DISPENSABLE: Final = ("silent", "age", "way", "sent", "received", "stage")


@click.command()
@target_options
@click.option("--role", type=click.Choice(["seed", "authority", "trainer", "worker"]), help="Only these.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def peers(where: Where, role: str | None, as_json: bool) -> None:
    """Connections of this machine's nodes: to whom, where, how far, how much.

    Example: agoractl peers --role worker
    """
    found: list[dict[str, Any]] = []
    lost: list[tuple[str, Unreachable | NoAnswer]] = []
    for target in find(where):
        try:
            rows = target.ask("peers")["peers"]
        except (Unreachable, NoAnswer) as error:
            lost.append((target.name, error))
            continue
        chosen = [row for row in rows if role in (None, row["role"])]
        found.append({"node": target.name, "peers": chosen})
    if lost and not found:
        raise lost[0][1]
    for name, silence in lost:
        click.echo(f"agoractl: {name}: {silence}", err=True)
    if as_json:
        click.echo(json.dumps({"nodes": found}))
        return
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    for place, entry in enumerate(found):
        rows = entry["peers"]
        head = f"{entry['node']}: {len(rows)} connection{'s' * (len(rows) != 1)}"
        lines = align(_COLUMNS, [_row(row, terminal) for row in rows], width, _DISPENSABLE) if rows else []
        click.echo("\n".join([*([""] if place else []), head, *([""] if rows else []), *lines]))


def _row(row: dict[str, Any], terminal: bool) -> tuple[str, ...]:
    rtt = row["rtt_ms"]
    return (
        f"…{row['peer_id'][-6:]}" if terminal else row["peer_id"],
        or_dash(row["role"] or row["refused"]),
        or_dash(row["stage"]),
        address(row["addr"]),
        "out" if row["dialed"] else "in",
        "-" if rtt is None else f"{rtt:.1f} ms",
        size(row["bytes_out"]),
        size(row["bytes_in"]),
        duration(row["silent_s"]),
        duration(row["age_s"]),
    )


def address(text: str) -> str:
    """``203.0.113.9:4001`` of a multiaddr, which is left as it is where it is of another kind."""
    parts = text.split("/")
    if len(parts) < 5 or parts[3] != "tcp":
        return text
    return f"[{parts[2]}]:{parts[4]}" if parts[1] == "ip6" else f"{parts[2]}:{parts[4]}"
