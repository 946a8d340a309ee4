"""``agoractl ping``: one peer by path and time."""

from __future__ import annotations

import json
import statistics
from typing import Final

import click

from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.cli.peers import address
from agorad.cli.targets import Where, find, target_options, typed_so_far
from p2p.errors import LocalError

LEAST_S: Final = 30.0
COMPLETE_S: Final = 0.2


def _known(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Roles, and peers that a node of this machine is connected to; nobody is waited for."""
    words = ["authority", "seed", "trainer"]
    try:
        target = find(typed_so_far(ctx))[0]
        words += [row["peer_id"] for row in ask(target.socket, "peers", timeout=COMPLETE_S)["peers"]]
    except (Unreachable, NoAnswer, CommandFailed, LocalError, click.ClickException):
        pass
    return [word for word in words if word.startswith(incomplete)]


@click.command()
@click.argument("peer", shell_complete=_known)
@click.option("--count", type=click.IntRange(1, 50), default=5, show_default=True, help="So many echoes.")
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def ping(peer: str, count: int, where: Where, as_json: bool) -> None:
    """Reach a peer from this machine's node: PEER is its id, the end of it, or seed, authority, trainer.

    Example: agoractl ping authority --count 3
    """
    target = find(where)[0]
    found = target.ask("ping", timeout=LEAST_S + 5 * count, peer=peer, count=count)
    if as_json:
        click.echo(json.dumps(found))
        return
    who = f"…{found['peer_id'][-6:]}" + (f" ({found['role']})" if found["role"] else "")
    way = "dialled by us" if found["dialed"] else "dialled by them"
    for ms in found["ms"]:
        click.echo(f"pong from {who} at {address(found['addr'])}, {way}: {ms:.1f} ms")
    least, most, middle = min(found["ms"]), max(found["ms"]), statistics.median(found["ms"])
    seen = "" if found["observed"] is None else f"; it sees us at {address(found['observed'])}"
    click.echo(f"{len(found['ms'])} of {count}: median {middle:.1f} ms, {least:.1f} to {most:.1f}{seen}")
