"""``agoractl join``: from one command to nodes at work.

Looks at the machine, asks what it cannot know (never with ``--skip-input``), keeps the answers for the next
time, writes one node's folder a GPU and runs the nodes in the foreground until Ctrl-C.
"""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import attrs
import click

from agorad.config import DEFAULT_PORT
from agorad.join import answers as kept
from agorad.join import cloud, findings, layout, source
from agorad.join.answers import Answers, Secret
from agorad.join.findings import Finding
from agorad.run import Manifest
from agorad.usage import NamedPath
from p2p.errors import LocalError

MOST_GPUS: Final = 16
_MARKS: Final = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


class _Dashed(click.Command):
    """Options may be spelled with underscores too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        def dashed(arg: str) -> str:
            if not arg.startswith("--"):
                return arg
            name, equals, value = arg.partition("=")
            return name.replace("_", "-") + equals + value

        return super().parse_args(ctx, [dashed(arg) for arg in args])


@click.command(cls=_Dashed)
@click.argument("where", metavar="[RUN]", required=False)
@click.option("--gpu-id", "gpu_ids", multiple=True, metavar="N[,N…]", help="GPUs to use; one node each.")
@click.option("--token", metavar="@FILE|-", help="The account's secret or Hugging Face token.")
@click.option("--account", help="The account, where the run keeps its own list.")
@click.option("--email", help="Taken and kept for compatibility; nothing sends it.")
@click.option("--host-port", type=click.IntRange(1, 65535), help="TCP port; 49200 + GPU id by default.")
@click.option("--announce-port", type=click.IntRange(1, 65535), help="Its number outside, if another.")
@click.option("--announce-ip", help="Address or name that peers reach this machine at.")
@click.option("--identity-path", type=NamedPath(), help="The node's key file.")
@click.option("--log-file", type=NamedPath(), help="The node's log.")
@click.option("--batch-size-override", type=click.IntRange(1, 1024), help="Microbatches at a time.")
@click.option("--use-docker", is_flag=True, help="Not available in this version.")
@click.option("--skip-input", is_flag=True, help="Ask nothing; missing values are errors.")
@click.option("--reconfigure", is_flag=True, help="Ask again instead of using earlier answers.")
@click.option("--check", "only_check", is_flag=True, help="Look at the machine, start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --check: findings as one JSON document.")
def join(
    where: str | None,
    gpu_ids: tuple[str, ...],
    token: str | None,
    account: str | None,
    email: str | None,
    host_port: int | None,
    announce_port: int | None,
    announce_ip: str | None,
    identity_path: Path | None,
    log_file: Path | None,
    batch_size_override: int | None,
    use_docker: bool,
    skip_input: bool,
    reconfigure: bool,
    only_check: bool,
    as_json: bool,
) -> None:
    """Take part in a run. RUN is the path or the address of its manifest; the last run by default.

    Example: agoractl join https://example.org/run.toml
    """
    if use_docker:
        raise click.UsageError("--use-docker is not available in this version; join without it")
    if as_json and not only_check:
        raise click.UsageError("--json goes with --check")
    manifest, beside = _manifest(where)
    earlier = Answers() if reconfigure else kept.recall().get(manifest.run.id, Answers())
    place = cloud.detect()
    device, count = _device()
    chosen = attrs.evolve(
        earlier,
        account=account if account is not None else earlier.account,
        email=email if email is not None else earlier.email,
        gpus=_gpus(gpu_ids) or earlier.gpus,
        announce_ip=announce_ip if announce_ip is not None else earlier.announce_ip,
        announce_port=announce_port or earlier.announce_port,
        port=host_port or earlier.port,
        slots=batch_size_override or earlier.slots,
    )
    chosen = attrs.evolve(chosen, gpus=chosen.gpus or (0,))
    if device is None and (missing := [gpu for gpu in chosen.gpus if gpu >= count]):
        raise LocalError(f"there is no GPU {missing[0]}: nvidia-smi shows {count}, numbered from 0")
    chosen = attrs.evolve(chosen, port=chosen.port or DEFAULT_PORT + chosen.gpus[0])
    nodes = layout.plan(manifest, chosen, device=device, identity=identity_path, log=log_file)
    if not as_json:
        click.echo(_greeting(manifest, place), err=True)
    found = [
        finding
        for node in nodes
        for finding in findings.look(manifest, device=node.device, port=node.port, state=node.folder)
    ]
    if as_json:
        click.echo(json.dumps({"run": manifest.run.id, "findings": [f.to_json() for f in found]}))
    else:
        click.echo("\n".join(_table(found)), err=True)
    if only_check:
        sys.exit(5 if any(finding.verdict == "fail" for finding in found) else 0)
    if failed := next((finding for finding in found if finding.verdict == "fail"), None):
        click.echo(f"agoractl: {failed.name}: {failed.found}; {failed.remedy}", err=True)
        sys.exit(1)
    secret = kept.given_secret(token, beside)
    ask = sys.stdin.isatty() and not skip_input
    chosen, secret = _complete(manifest, chosen, secret, nodes, ask=ask, place=place, again=reconfigure)
    for node in nodes:
        layout.write(manifest, chosen, node, place)
    click.echo(f"settings kept in {kept.keep(manifest.run.id, chosen)}", err=True)
    from agorad.join.live import Live

    sys.exit(Live(lambda line: click.echo(line)).run(nodes, secret))


def _manifest(where: str | None) -> tuple[Manifest, Path | None]:
    """The manifest, and the folder it lies in if it is a file."""
    if where is not None:
        local = None if where.startswith(("http://", "https://")) else Path(where).absolute().parent
        return source.load(where), local
    runs = list(kept.recall())
    if not runs:
        raise click.UsageError("name the run: the path or the address of its run.toml")
    folder = kept.folder("STATE", ".local/state") / runs[-1]
    for path in sorted(folder.glob("gpu*/run.toml")):
        return source.load(str(path)), None
    raise LocalError(f"nothing is left of run {runs[-1]} in {folder}; name its manifest")


def _device() -> tuple[str | None, int]:
    """(None, how many) where there are GPUs, else ("cpu", 0)."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        try:
            done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=5.0, check=True)
        except (OSError, subprocess.SubprocessError):
            return "cpu", 0
        count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
        if count:
            return None, count
    return "cpu", 0


def _gpus(texts: tuple[str, ...]) -> tuple[int, ...]:
    numbers = [part.strip() for text in texts for part in text.split(",")]
    if not all(part.isdigit() and int(part) < 256 for part in numbers):
        raise click.UsageError(f"--gpu-id {','.join(texts)}: whole numbers from 0, like 0 or 0,1")
    gpus = tuple(dict.fromkeys(int(part) for part in numbers))
    if len(gpus) > MOST_GPUS:
        raise click.UsageError(f"--gpu-id names {len(gpus)} GPUs; {MOST_GPUS} are possible")
    return gpus


def _greeting(manifest: Manifest, place: cloud.Place) -> str:
    info, model = manifest.run, manifest.model
    where = f"; this machine is at {place.cloud}" if place.cloud else ""
    return (
        f"run {info.name} ({info.id}), version {info.version}, signed by {info.operator}\n"
        f"{sum(model.layers)} layers in {model.stages} stages, d {model.d}{where}"
    )


def _table(found: list[Finding]) -> list[str]:
    width = max(len(finding.name) for finding in found)
    lines = []
    for finding in found:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        lines.append(f"  {_MARKS[finding.verdict]}  {finding.name.ljust(width)}  {finding.found}{remedy}")
    return lines


def _complete(
    manifest: Manifest,
    chosen: Answers,
    secret: Secret | None,
    nodes: list[layout.Planned],
    *,
    ask: bool,
    place: cloud.Place,
    again: bool,
) -> tuple[Answers, Secret | None]:
    """What is missing is asked for, or named in an error."""
    listed = manifest.admission.accounts == "file"
    if secret is not None and listed and secret.split()[0]:
        chosen = attrs.evolve(chosen, account=secret.split()[0])
    new = [node for node in nodes if not (node.folder / "certificate").exists()]
    if listed and not chosen.account:
        if not ask:
            raise click.UsageError(
                f"run {manifest.run.name!r} lets in whom its operator lists: ask for an invitation and give "
                "it with --token @FILE or AGORA_TOKEN, or name --account and its secret"
            )
        chosen = attrs.evolve(chosen, account=click.prompt("Account", err=True))
    if secret is None and new and (ask or not listed):
        what = "The account's secret" if listed else "Hugging Face token (read access is enough)"
        if not ask:
            raise click.UsageError(
                "this node is not known to the run yet: give a Hugging Face token in HF_TOKEN, or with "
                "--token @FILE"
            )
        typed: Any = getpass.getpass(f"{what}: ")
        secret = Secret(typed.strip()) if typed.strip() else None
    if ask and (again or place.cloud) and not chosen.announce_ip:
        first = cloud.announced_port(place, chosen.port)
        chosen = attrs.evolve(
            chosen,
            announce_ip=click.prompt(
                "Address that peers reach this machine at (empty: its own)",
                default=place.address, show_default=bool(place.address), err=True,
            ),
        )  # fmt: skip
        if chosen.announce_ip and cloud.remaps(place):
            chosen = attrs.evolve(
                chosen, announce_port=click.prompt("Port outside", default=first, type=int, err=True)
            )
    return chosen, secret
