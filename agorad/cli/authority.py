"""``agoractl authority``: what an operator does at a running authority, through its control socket."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from agorad import manifests
from agorad.ask import CommandFailed, NoAnswer, Unreachable
from agorad.cli.targets import Where, find, target_options
from agorad.run import load
from agorad.usage import NamedPath
from p2p.errors import LocalError

F = TypeVar("F", bound=Callable[..., Any])
RECOMPUTE_S: Final = 3600.0


@click.group()
def authority() -> None:
    """Let in, hold back and remove: an operator's commands for a running authority."""


def _options(command: F) -> F:
    json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    return target_options(json_option(command))


@authority.command()
@_options
def members(where: Where, as_json: bool) -> None:
    """Nodes with a running certificate.

    Example: agoractl authority members --config my-run/authority/agorad.toml
    """
    rows = _do("members", where)
    lines = [
        f"stage {row['stage']}  {row['account']}  {row['peer_id']}  until {_clock(row['expires'])}"
        for row in rows
    ]
    _tell(rows, as_json, lines or ["no member has a running certificate"])


@authority.command()
@click.argument("kind", type=click.Choice(["account", "peer"]))
@click.argument("name")
@click.option("--why", default="", help="What the removed are told; at most 100 characters.")
@click.option("--hours", type=float, help="For so long; for good by default.")
@_options
def ban(kind: str, name: str, why: str, hours: float | None, where: Where, as_json: bool) -> None:
    """Remove an account or a peer, and keep it out; its nodes end within seconds.

    Example: agoractl authority ban account mallory --why "sends nonsense" --hours 24
    """
    done = _do("ban", where, kind=kind, name=name, why=why, hours=hours)
    end = "for good" if done["until"] is None else f"until {_clock(done['until'])}"
    _tell(done, as_json, [f"{kind} {name} is out {end}"])


@authority.command()
@click.argument("kind", type=click.Choice(["account", "peer"]))
@click.argument("name")
@_options
def unban(kind: str, name: str, where: Where, as_json: bool) -> None:
    """Take a ban back.

    Example: agoractl authority unban account mallory
    """
    _tell(_do("unban", where, kind=kind, name=name), as_json, [f"{kind} {name} may join again"])


@authority.command()
@_options
def bans(where: Where, as_json: bool) -> None:
    """Who is kept out, and why.

    Example: agoractl authority bans
    """
    rows = _do("bans", where)
    lines = []
    for row in rows:
        end = "for good" if row["until"] is None else f"until {_clock(row['until'])}"
        lines.append(f"{row['kind']} {row['name']}  {end}  {row['why']}")
    _tell(rows, as_json, lines or ["nobody is kept out"])


@authority.command()
@click.argument("state", type=click.Choice(["pause", "resume"]))
@_options
def joins(state: str, where: Where, as_json: bool) -> None:
    """Hold all joins back, or let them go on; who waits keeps the place and is told.

    Example: agoractl authority joins pause
    """
    done = _do("joins", where, paused=state == "pause")
    _tell(done, as_json, ["joins are held back" if done["paused"] else "joins go on"])


@authority.command()
@click.argument("nodes", type=click.IntRange(0, 1_000_000), required=False)
@_options
def capacity(nodes: int | None, where: Where, as_json: bool) -> None:
    """How many nodes the run takes from now on; the manifest's number if none is given.

    Example: agoractl authority capacity 200
    """
    done = _do("capacity", where, nodes=nodes)
    _tell(done, as_json, [f"the run takes {done['nodes']} nodes"])


@authority.command()
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="So many lines.")
@_options
def audit(limit: int, where: Where, as_json: bool) -> None:
    """What operators did, the newest first.

    Example: agoractl authority audit --limit 20
    """
    rows = _do("audit", where, limit=limit)
    lines = [f"{_clock(row['at'])}  {row['by']}  {row['what']}  {row['detail']}" for row in rows]
    _tell(rows, as_json, lines or ["nothing was changed yet"])


@authority.command()
@_options
def recompute(where: Where, as_json: bool) -> None:
    """Check every stored receipt again, and the points against them. May take a while; harms nobody.

    Example: agoractl authority recompute
    """
    found = _do("recompute", where, timeout=RECOMPUTE_S)
    troubles = found["troubles"]
    lines = [f"{found['receipts']} receipts of {len(found['compute'])} accounts were checked", *troubles]
    _tell(found, as_json, lines if troubles else [*lines, "all points agree with them"])
    if troubles:
        raise SystemExit(5)


@authority.command()
@click.argument("path", metavar="RUN", type=NamedPath())
@_options
def publish(path: Path, where: Where, as_json: bool) -> None:
    """Give a running run a newer version of its manifest, signed with `agoractl run sign`.

    Example: agoractl authority publish run.toml --config my-run/authority/agorad.toml
    """
    manifest = load(path)
    if len(manifest.content) > manifests.CONTENT_LIMIT:
        raise LocalError(f"{path} is too large for a live run: {len(manifest.content)} bytes")
    assert manifest.signature is not None
    done = _do("publish", where, content=manifest.content.decode(), signature=manifest.signature.ed25519)
    what = ", ".join(done["changed"]) or "nothing that a node looks at"
    _tell(done, as_json, [f"version {done['version']} is in force; changed: {what}"])


def _do(command: str, where: Where, *, timeout: float = 15.0, **arguments: Any) -> Any:
    """The answer of the authority among the nodes that were named."""
    targets = find(where)
    trouble: Exception | None = None
    for target in targets:
        try:
            if target.ask("status")["role"] == "authority":
                return target.ask(command, timeout=timeout, by=getpass.getuser(), **arguments)
        except (Unreachable, NoAnswer) as error:
            trouble = error
    if trouble is not None:
        raise trouble
    raise CommandFailed("no_authority", "none of these nodes is an authority; name one with --config")


def _tell(document: Any, as_json: bool, lines: list[str]) -> None:
    click.echo(json.dumps(document) if as_json else "\n".join(lines))


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
