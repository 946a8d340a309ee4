"""``agoractl identity``: the key that a node is known by."""

from __future__ import annotations

import json
from pathlib import Path

import click

from agorad.config import default_path, load
from agorad.usage import NamedPath
from p2p.errors import LocalError
from p2p.identity import Identity


@click.command()
@click.argument("path", type=NamedPath(), required=False)
@click.option(
    "--config", type=NamedPath(), envvar="AGORA_CONFIG", help="The node's settings, which name the key."
)
@click.option("--create", is_flag=True, help="Make the key if there is none.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def identity(path: Path | None, config: Path | None, create: bool, as_json: bool) -> None:
    """Show the peer id of a key file, or of the node's own; --create makes one.

    Example: agoractl identity operator.key --create
    """
    if path is None:
        settings = config or default_path()
        if not settings.exists():
            raise LocalError(f"there is no {settings} to find the node's key by; name a key file")
        path = load(settings).identity
    created = not path.exists()
    if created and not create:
        raise LocalError(f"there is no key at {path}; add --create to make one")
    key = Identity.load_or_create(path)
    if as_json:
        click.echo(json.dumps({"peer_id": key.peer_id, "path": str(path), "created": created}))
    else:
        click.echo(key.peer_id)
