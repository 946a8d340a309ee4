"""``agoractl doctor``: what is wrong with a node, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from typing import Final

import click

from agorad.ask import Unreachable
from agorad.cli.targets import Target, Where, find, of_machine, target_options, unread
from agorad.config import default_path
from agorad.doctor.diagnose import PARTS, diagnose, verdict
from agorad.doctor.patient import Patient, examine
from agorad.join.findings import Finding
from p2p.errors import LocalError

_MARKS: Final = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command()
@target_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--only", type=click.Choice(PARTS), help="One part of it; network takes seconds.")
@click.option("--offline", is_flag=True, help="Only what can be seen on this machine.")
@click.option("--no-measure", is_flag=True, help="Do not measure the line (4 MB).")
@click.option("--quiet", "-q", is_flag=True, help="Only what is not as it should be.")
def doctor(
    where: Where, as_json: bool, only: str | None, offline: bool, no_measure: bool, quiet: bool
) -> None:
    """Look at settings, machine, daemon and line; each finding comes with its remedy.

    Works with the daemon down. Ends with code 5 if there is a problem, 0 with warnings only.

    Example: agoractl doctor --only network
    """
    patients = [(target, examine(target)) for target in _targets(where)]
    beside = [*(patient for _target, patient in patients), *_beside([target for target, _ in patients])]
    reports = [
        (target, diagnose(patient, beside, over_the_net=not offline, measure=not no_measure, only=only))
        for target, patient in patients
    ]
    if as_json:
        nodes = [
            {"node": target.name, "verdict": verdict(found), "findings": [_plain(one) for one in found]}
            for target, found in reports
        ]
        click.echo(json.dumps({"nodes": nodes}))
    else:
        for target, found in reports:
            click.echo(f"{target.name}: {verdict(found)}")
            _show([one for one in found if not quiet or one.verdict != "ok"])
    if any(finding.verdict == "fail" for _target, found in reports for finding in found):
        sys.exit(5)


def _targets(where: Where) -> list[Target]:
    """Settings that cannot be read are a finding here, not an error."""
    if where.config is not None and where.folder is None and where.socket is None:
        try:
            return find(where)
        except LocalError:
            return [unread(where.config)]
    try:
        return find(where, unread)
    except Unreachable:
        path = default_path()
        return [Target("node", path.parent / "control.sock", path)]


def _beside(known: list[Target]) -> list[Patient]:
    """The machine's other nodes: this one must not share a port or a key with them."""
    sockets = {target.socket for target in known}
    return [examine(target) for target in of_machine(unread) if target.socket not in sockets]


def _plain(finding: Finding) -> dict[str, str]:
    return {
        "name": finding.name,
        "verdict": finding.verdict,
        "found": finding.found,
        "remedy": finding.remedy,
    }


def _show(found: list[Finding]) -> None:
    colour = False if os.environ.get("NO_COLOR") else None
    width = max((len(finding.name) for finding in found), default=0)
    for finding in found:
        mark, shade = _MARKS[finding.verdict]
        click.echo(
            f"  {click.style(mark, fg=shade)}  {finding.name.ljust(width)}  {finding.found}", color=colour
        )
        if finding.remedy:
            click.echo(f"        {' ' * width}  → {finding.remedy}", color=colour)
