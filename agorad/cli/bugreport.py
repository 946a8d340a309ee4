"""``agoractl bugreport``: one archive for whoever is to help, with the secrets removed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from agorad.ask import Unreachable
from agorad.bugreport import write
from agorad.cli.targets import Where, find, target_options
from agorad.usage import NamedPath


@click.command()
@target_options
@click.option("--output", type=NamedPath(), help="The archive; a new one in this folder by default.")
@click.option("--offline", is_flag=True, help="Leave out what the network shows.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def bugreport(where: Where, output: Path | None, offline: bool, as_json: bool) -> None:
    """Versions, settings, status, findings, last events and log lines of this machine's nodes, in one file.

    Nothing is sent. Secrets, tokens, keys and mail addresses are not in it.

    Example: agoractl bugreport --output report.tar.gz
    """
    try:
        targets = find(where)
    except Unreachable:
        targets = []  # versions and machine are of use even so
    path = output or Path(time.strftime("agora-bugreport-%Y%m%d-%H%M%S.tar.gz"))
    report = write(targets, path, over_the_net=not offline)
    if as_json:
        files = [{"name": name, "bytes": size} for name, size in sorted(report.files.items())]
        found = {"path": str(report.path), "files": files}
        click.echo(json.dumps({**found, "hidden": report.hidden, "addresses": report.addresses}))
        return
    click.echo(str(report.path))
    click.echo(
        f"{len(report.files)} files; {report.hidden} secrets and mail addresses were taken out, "
        f"{report.addresses} internet addresses renamed; look through it before you send it: "
        f"tar -xzf {report.path}",
        err=True,
    )
