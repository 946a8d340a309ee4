"""``agoractl run``: the operator's commands around a run manifest.

``init`` makes everything a run starts with in one folder: the operator's key, keys and settings of a
seed, an authority and a trainer, an empty account file, and the signed manifest that lists them.
"""

from __future__ import annotations

import ipaddress
import json
import re
import secrets
import time
from pathlib import Path
from typing import Any, Final

import attrs
import click

from agorad import run as manifests
from agorad.authority import accounts
from agorad.cli.checkpoints import checkpoints, rollback
from agorad.cli.plan import plan
from agorad.config import PAGE_PORT
from agorad.hosts import kind_of
from agorad.metrics.address import DEFAULT_PORT
from agorad.run import Manifest, NodeRef, RunInfo
from agorad.settings import override, unstructure
from agorad.usage import NamedPath
from p2p.errors import LocalError
from p2p.identity import Identity
from stage.config import split_layers

ROLES: Final = ("seed", "authority", "trainer")
OWN_ACCOUNT: Final = "operator"
FIRST_PORT: Final = 49170
"""Of seed, authority and trainer; workers of the same machine begin at 49200."""


@click.group()
def run() -> None:
    """Create, sign, show and plan a run; give people accounts; go back to a checkpoint."""


run.add_command(plan)
run.add_command(checkpoints)
run.add_command(rollback)


@run.command()
@click.argument("name")
@click.option("--dir", "folder", type=NamedPath(), help="Where to put it; the name by default.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that peers reach the nodes at.")
@click.option(
    "--port", type=click.IntRange(1, 65533), default=FIRST_PORT, show_default=True, help="First of three."
)
@click.option("--preset", default="demo", show_default=True, help="Model and training to start from.")
@click.option("--stages", type=int, help="Cut the preset's layers in so many; its own cut by default.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="A setting of the manifest.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def init(
    name: str,
    folder: Path | None,
    host: str,
    port: int,
    preset: str,
    stages: int | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Create a run: keys, settings of its first nodes, and the signed manifest.

    A preset is one of demo, 100m, 1b and 8b; --set model.layers='[4, 6]' cuts it by hand.

    Example: agoractl run init my-run --host 203.0.113.9 --set training.target_batch=32
    """
    from stage import presets

    folder = folder or Path(name)
    operator = Identity.generate()
    keys = {role: Identity.generate() for role in ROLES}
    try:
        kind = kind_of(host)
    except LocalError as error:
        raise LocalError(f"--host {error}") from None
    refs = {
        role: NodeRef(peer_id=key.peer_id, addrs=(f"/{kind}/{host}/tcp/{port + offset}",))
        for offset, (role, key) in enumerate(keys.items())
    }
    model, training = presets.preset(preset)
    if stages is not None:
        model = attrs.evolve(model, layers=split_layers(sum(model.layers), stages))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48] or "run"
    base = Manifest(
        run=RunInfo(
            name=name, id=f"{slug}-{secrets.token_hex(4)}", created=time.time(), operator=operator.peer_id
        ),
        seeds=(refs["seed"],),
        authorities=(refs["authority"],),
        trainers=(refs["trainer"],),
        model=model,
        training=training,
    )
    manifest = manifests.from_table(override(Manifest, unstructure(base), assignments)).signed(operator)
    if folder.exists() and any(folder.iterdir()):
        raise LocalError(f"the folder {folder} is not empty; name another with --dir")
    page = f"{_page_host(kind, host)}:{PAGE_PORT}"
    for offset, (role, key) in enumerate(keys.items()):
        metrics_port = DEFAULT_PORT - 1 - offset
        _write_node(folder / role, role, key, port + offset, refs[role].addrs, metrics_port, page)
    operator.save(folder / "operator.key")
    manifests.save(manifest, folder / "run.toml")
    _invite(folder)
    _describe(manifest, folder / "run.toml", as_json)
    click.echo(
        "\n".join(f"start with: agorad --config {folder / role / 'agorad.toml'}" for role in ROLES), err=True
    )
    click.echo(f"then on this machine: agoractl join {folder / 'run.toml'}", err=True)
    if kind == "ip4" and ipaddress.ip_address(host).is_loopback:
        click.echo("only this machine can reach these nodes; --host names an address for others", err=True)
    click.echo(f"let others in with: agoractl run account NAME --dir {folder}", err=True)


@run.command()
@click.argument("path", metavar="RUN", type=NamedPath())
@click.option("--key", type=NamedPath(), required=True, help="The operator's key file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def sign(path: Path, key: Path, as_json: bool) -> None:
    """Check an edited manifest, raise its version and sign it again.

    Example: agoractl run sign run.toml --key operator.key
    """
    edited = manifests.load(path, signed=False)
    operator = Identity.load(key)
    table = edited.table()
    table.pop("signature", None)
    table["run"]["version"] = edited.run.version + (edited.signature is not None)
    manifest = manifests.from_table(table).signed(operator)
    manifests.save(manifest, path)
    _describe(manifest, path, as_json)


@run.command()
@click.argument("path", metavar="RUN", type=NamedPath())
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def show(path: Path, as_json: bool) -> None:
    """Check a manifest and its signature, and say what it describes.

    Example: agoractl run show run.toml
    """
    _describe(manifests.load(path), path, as_json)


@run.command()
@click.argument("name")
@click.option("--dir", "folder", type=NamedPath(), default=Path(), help="The run's folder.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def account(name: str, folder: Path, as_json: bool) -> None:
    """Add an account to the authority's file and print its secret, which is kept nowhere else.

    Example: agoractl run account alice --dir my-run
    """
    path = folder / "authority" / "accounts.toml"
    if not path.exists():
        raise LocalError(f"there is no account file {path}; --dir names the folder that `run init` made")
    secret = accounts.add(path, name)
    click.echo(json.dumps({"account": name, "secret": secret}) if as_json else secret)
    if not as_json:
        click.echo(
            f"give {name} this and {folder / 'run.toml'}; then: agoractl join run.toml --account {name}",
            err=True,
        )


def _page_host(kind: str, host: str) -> str:
    """Where the authority's page listens: it is there for those who can reach the nodes."""
    if kind in ("ip4", "ip6") and ipaddress.ip_address(host).is_loopback:
        return "127.0.0.1"
    return "[::]" if kind == "ip6" else "0.0.0.0"


def _write_node(
    folder: Path, role: str, key: Identity, port: int, announce: tuple[str, ...], metrics_port: int, page: str
) -> None:
    import tomli_w

    folder.mkdir(mode=0o700, parents=True)
    key.save(folder / "identity.key")
    node = {"role": role, "run": "../run.toml", "state": ".", "announce": list(announce)}
    table: dict[str, Any] = {
        "node": {**node, "listen": [f"/ip4/0.0.0.0/tcp/{port}"]},
        "metrics": {"listen": f"127.0.0.1:{metrics_port}"},
    }
    if role == "authority":
        table["authority"] = {"accounts": "accounts.toml", "page_listen": page}
    (folder / "agorad.toml").write_text(tomli_w.dumps(table))


def _invite(folder: Path) -> None:
    """The operator's own account, and its invitation beside the manifest, where ``join`` finds it."""
    listed = folder / "authority" / "accounts.toml"
    listed.touch(mode=0o600)
    invitation = folder / "invitation"
    invitation.touch(mode=0o600)
    invitation.write_text(f"{OWN_ACCOUNT}:{accounts.add(listed, OWN_ACCOUNT)}\n")


def _describe(manifest: Manifest, path: Path, as_json: bool) -> None:
    if as_json:
        table = manifest.table()
        click.echo(json.dumps({"path": str(path), "hash": manifest.hash.hex(), "manifest": table}))
        return
    info, model = manifest.run, manifest.model
    training = attrs.asdict(manifest.training)
    lines = [
        f"run {info.name} ({info.id}), version {info.version}, signed by {info.operator}",
        f"hash {manifest.hash.hex()}",
        f"model: {sum(model.layers)} layers in {model.stages} stages, d {model.d}, k {model.k}, "
        f"{model.seq} tokens a sequence, vocabulary {model.vocab}",
        "training: " + ", ".join(f"{name} {value}" for name, value in training.items()),
    ]
    for role, refs in (
        ("seed", manifest.seeds),
        ("authority", manifest.authorities),
        ("trainer", manifest.trainers),
    ):
        lines += [f"{role} {ref.peer_id} {' '.join(ref.addrs)}" for ref in refs]
    click.echo("\n".join(lines))
