"""``agoractl join``: from one command to nodes at work.

Looks at the machine, asks what it cannot know (never with ``--skip-input``), keeps the answers for the next
time, writes one node's folder a GPU and starts the nodes: as services where systemd runs (root: the
system's, else the user's), else in the foreground until Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import click

from agorad import facts
from agorad.join import answers, cloud, docker, findings, layout, questions, reach, secret, source, unit
from agorad.join.answers import Answers
from agorad.join.cloud import Place
from agorad.join.findings import Finding
from agorad.join.layout import Planned
from agorad.join.lines import COLOURS, Line
from agorad.join.live import Live
from agorad.join.secret import Secret
from agorad.run import Manifest
from agorad.service import running
from agorad.usage import NamedPath
from p2p.errors import LocalError

T = TypeVar("T")
_MARKS: Final = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


class _Dashed(click.Command):
    """Options may be spelled with underscores too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        def dashed(arg: str) -> str:
            if not arg.startswith("--"):
                return arg
            name, equals, value = arg.partition("=")
            return name.replace("_", "-") + equals + value

        return super().parse_args(ctx, [dashed(arg) for arg in args])


@attrs.frozen(kw_only=True)
class _Flags:
    """What was said on the command line."""

    gpu_ids: tuple[str, ...]
    token: str | None
    account: str | None
    email: str | None
    host_port: int | None
    announce_port: int | None
    announce_ip: str | None
    identity_path: Path | None
    log_file: Path | None
    batch_size_override: int | None
    use_docker: bool
    skip_input: bool
    reconfigure: bool
    only_check: bool
    foreground: bool
    as_json: bool


@click.command(cls=_Dashed)
@click.argument("where", metavar="[RUN]", required=False)
@click.option("--gpu-id", "gpu_ids", multiple=True, metavar="N[,N…]|cpu", help="GPUs to use; one node each.")
@click.option("--token", metavar="@FILE|-", help="The account's secret or Hugging Face token.")
@click.option("--account", help="The account, where the run keeps its own list.")
@click.option("--email", help="Kept in the settings on this machine; nothing sends it.")
@click.option("--host-port", type=click.IntRange(1, 65535), help="TCP port; 49200 + GPU id by default.")
@click.option("--announce-port", type=click.IntRange(1, 65535), help="Its number outside, if another.")
@click.option("--announce-ip", help="Address or name that peers reach this machine at.")
@click.option("--identity-path", type=NamedPath(), help="The node's key file.")
@click.option("--log-file", type=NamedPath(), help="The node's log.")
@click.option("--batch-size-override", type=click.IntRange(1, 1024), help="Microbatches at a time.")
@click.option("--use-docker", is_flag=True, help="In a container; see docs/running.md.")
@click.option("--skip-input", is_flag=True, help="Ask nothing; missing values are errors.")
@click.option("--reconfigure", is_flag=True, help="Ask again instead of using earlier answers.")
@click.option("--check", "only_check", is_flag=True, help="Look at the machine, start nothing.")
@click.option("--foreground", is_flag=True, help="No service, even where systemd could run one.")
@click.option("--json", "as_json", is_flag=True, help="With --check: findings as one JSON document.")
def join(where: str | None, **flags: Any) -> None:
    """Take part in a run. RUN is the path or the address of its manifest; the last run by default.

    Example: agoractl join https://example.org/run.toml
    """
    found = secret.from_environment()  # before anything is started that could inherit it
    sys.exit(_join(where, _Flags(**flags), found))


def _join(where: str | None, flags: _Flags, token: str) -> int:
    if flags.use_docker and (flags.identity_path or flags.log_file or flags.only_check):
        raise click.UsageError("--use-docker goes without --identity-path, --log-file and --check")
    if flags.as_json and not flags.only_check:
        raise click.UsageError("--json goes with --check; add that")
    manifest = source.last() if where is None else source.load(where)
    remembered = answers.recall().get(manifest.run.id)
    earlier = Answers() if flags.reconfigure or remembered is None else remembered
    manifest = source.settled(manifest, earlier)
    local = None if where is None or source.is_address(where) else Path(where).absolute().parent
    given = secret.given(flags.token, token, local)
    ask = sys.stdin.isatty() and sys.stderr.isatty() and not flags.skip_input
    first_time = ask and (flags.reconfigure or remembered is None)
    place = cloud.detect()
    if not flags.as_json:
        click.echo(_greeting(manifest, flags.reconfigure or remembered is None), err=True)

    gpus = facts.find_gpus()
    chosen = _chosen(flags, earlier, given)
    cpu = flags.gpu_ids == ("cpu",) or (not gpus and not flags.gpu_ids)
    if not chosen.gpus:
        several = first_time and len(gpus) > 1 and not flags.only_check and not cpu
        chosen = attrs.evolve(chosen, gpus=questions.choose_gpus(gpus) if several else (0,))

    def plan(port: int | None, outside: int | None) -> list[Planned]:
        return layout.plan(
            manifest, chosen, cpu=cpu, port=port, announce_port=outside,
            identity=flags.identity_path, log=flags.log_file,
        )  # fmt: skip

    nodes = plan(flags.host_port, flags.announce_port)
    if flags.use_docker:
        return _in_docker(where, manifest, flags, chosen, nodes, given, cpu=cpu, ask=ask)
    seen = reach.look(manifest)
    found = findings.of_machine(manifest, nodes, place, seen)
    if flags.only_check:
        found += _ports(nodes, place)
        if flags.as_json:
            click.echo(json.dumps({"run": manifest.run.id, "findings": [f.to_json() for f in found]}))
        else:
            _show(found)
        return 5 if any(finding.verdict == "fail" for finding in found) else 0
    _show(found)
    if (code := _failed(found)) is not None:
        return code
    new = any(not (node.folder / "certificate").exists() for node in nodes)
    if not ask and (sentence := questions.missing(manifest, chosen, given, new=new)):
        raise click.UsageError(sentence)
    if ask and new and (given is None or questions.missing(manifest, chosen, given, new=new)):
        chosen, given = questions.who(manifest, chosen, given)
    if first_time:
        if flags.email is None:
            address = questions.ask("Email (optional, stays on this machine)", questions.email, chosen.email)
            chosen = attrs.evolve(chosen, email=address)
        chosen, port, outside = questions.where(
            chosen, nodes[0], place, port_given=flags.host_port is not None
        )
        nodes = plan(port, outside or None)
    found = _ports(nodes, place)
    _show(found)
    if (code := _failed(found)) is not None:
        return code
    reason = "--foreground" if flags.foreground else unit.why_not(nodes)
    for node in nodes:
        layout.write(manifest, chosen, node, place, service=not reason)
    by_gpu = chosen.nodes | {node.gpu: node.answers for node in nodes}
    kept = answers.keep(manifest.run.id, attrs.evolve(chosen, operator=manifest.run.operator, nodes=by_gpu))
    told = f"answers are kept in {kept}, the token is not; "
    if reason:
        told += "Ctrl-C leaves the run cleanly"
        if running.is_running() and not flags.foreground:
            told += f" (in the foreground: {reason})"
        click.echo(_wrapped(told, 0, sys.stderr), err=True)
        return Live(_say, warm_steps=manifest.training.warm_steps).run(nodes, given)
    return _as_services(nodes, given, told, manifest.training.warm_steps)


def _in_docker(
    where: str | None,
    manifest: Manifest,
    flags: _Flags,
    chosen: Answers,
    nodes: list[Planned],
    given: Secret | None,
    *,
    cpu: bool,
    ask: bool,
) -> int:
    """The join that goes on in a container, with what was said and asked out here."""
    new = os.getuid() == 0 or any(not (node.folder / "certificate").exists() for node in nodes)
    if ask and new and given is None:
        chosen, given = questions.who(manifest, chosen, given)
    said = {
        "--gpu-id": "cpu" if cpu else ",".join(str(node.gpu) for node in nodes),
        "--host-port": nodes[0].port,
        "--account": chosen.account,
        "--email": chosen.email,
        "--announce-ip": chosen.announce_ip,
        "--announce-port": flags.announce_port,
        "--batch-size-override": flags.batch_size_override,
    }
    container = docker.Container(
        run=where or "",
        flags=[word for name, value in said.items() if value for word in (name, str(value))],
        ports=[node.port for node in nodes],
        gpus=not cpu,
        secret=given,
    )
    return docker.start(container)


def _as_services(nodes: list[Planned], given: Secret | None, told: str, warm_steps: int) -> int:
    """Start them and, on a terminal, tell what they do until Ctrl-C, which ends the telling only."""
    done = unit.prepare(nodes, lambda text: click.echo(text, err=True))
    for change in done.files:
        click.echo(change.lines()[0], err=True)
    for step in done.steps:
        click.echo(f"* {step}", err=True)
    for hint in done.hints:
        if hint.partition(" ")[0] != "systemctl":  # it is started here
            click.echo(_wrapped(f"next: {hint}", 0, sys.stderr), err=True)
    names = " ".join(unit.unit(node).removesuffix(".service") for node in nodes)
    told += f"{names} starts by itself from now on; `{unit.systemctl()} stop {names}` leaves the run cleanly"
    click.echo(_wrapped(told, 0, sys.stderr), err=True)
    if not sys.stdout.isatty():
        for node in nodes:
            unit.launch(node, given)
            click.echo(f"{unit.unit(node)} started: agoractl status, {unit.journal(node)} -f")
        return 0
    click.echo("Ctrl-C ends this display, not the node", err=True)
    return Live(_say, warm_steps=warm_steps, launch=unit.launch, attached=True).run(nodes, given)


def _chosen(flags: _Flags, earlier: Answers, given: Secret | None) -> Answers:
    """Earlier answers with what the command line says laid over them."""

    def read(option: str, value: str | None, check: Callable[[str], T], default: T) -> T:
        try:
            return default if value is None else check(value)
        except LocalError as error:
            raise click.UsageError(f"{option}: {error}") from None

    listed = ",".join(flags.gpu_ids) if flags.gpu_ids else None
    if flags.gpu_ids == ("cpu",):
        listed = "0"
    named = given.split()[0] if given is not None else ""
    account = read("--account", flags.account, questions.account, named or earlier.account)
    if flags.account and named not in ("", account):
        raise click.UsageError(f"--account {account}: the invitation is one of account {named}")
    return attrs.evolve(
        earlier,
        account=account,
        email=read("--email", flags.email, questions.email, earlier.email),
        gpus=read("--gpu-id", listed, questions.gpus, earlier.gpus),
        announce_ip=read("--announce-ip", flags.announce_ip, questions.host, earlier.announce_ip),
        slots=flags.batch_size_override or earlier.slots,
    )


def _ports(nodes: list[Planned], place: Place) -> list[Finding]:
    return [
        findings.of_node(node, place, label="port" if len(nodes) == 1 else f"GPU {node.gpu} port")
        for node in nodes
    ]


def _greeting(manifest: Manifest, first: bool) -> str:
    info, model = manifest.run, manifest.model
    compare = "\ncompare this key with what the operator published" if first else ""
    return (
        f"run {info.name} ({info.id}), version {info.version}: "
        f"{sum(model.layers)} layers in {model.stages} stages, d {model.d}\n"
        f"signed by {info.operator}{compare}"
    )


def _show(found: list[Finding]) -> None:
    width = max(len(finding.name) for finding in found)
    for finding in found:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        text = _wrapped(f"{finding.found}{remedy}", width + 10, sys.stderr)
        mark, colour = _MARKS[finding.verdict]
        click.echo(
            f"  {click.style(mark, fg=colour)}  {finding.name.ljust(width)}  {text}",
            err=True,
            color=_colour(),
        )


def _failed(found: list[Finding]) -> int | None:
    failed = next((finding for finding in found if finding.verdict == "fail"), None)
    if failed is None:
        return None
    click.echo(f"agoractl: {failed.name}: {failed.found}; {failed.remedy}", err=True)
    return int(failed.exit)


def _say(label: str, line: Line) -> None:
    """One line on stdout: time, node if there are several, tag, sentence."""
    tag, sentence = line
    head = f"{time.strftime('%H:%M:%S')} {label}{' ' if label else ''}"
    text = _wrapped(sentence, len(head) + len(tag) + 3, sys.stdout)
    click.echo(f"{head}{click.style(f'[{tag}]', fg=COLOURS[tag])} {text}", color=_colour())
    sys.stdout.flush()


def _wrapped(text: str, indent: int, stream: Any) -> str:
    """Broken between words where a terminal is too narrow for it."""
    if not stream.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns) - 1
    lines = textwrap.wrap(text, max(20, width - indent), break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines)


def _colour() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None
