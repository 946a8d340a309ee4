"""``agoractl service``: agorad as a service of the system, installed and removed."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import click

from agorad.config import SYSTEM_STATE
from agorad.service import install as steps
from agorad.service import manager, program, user
from agorad.service.changes import apply
from agorad.service.install import Done
from agorad.service.running import is_running
from agorad.wsl import detect, setup
from p2p.errors import LocalError

_INSTANCE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@click.group()
def service() -> None:
    """Nodes that start with the machine: systemd units.

    Example: sudo agoractl service install --dry-run
    """


@service.command()
@click.argument("instances", nargs=-1, metavar="[NAME]...")
@click.option("--now", is_flag=True, help="Start them as well.")
@click.option("--no-windows", is_flag=True, help="On WSL2: leave Windows as it is.")
@click.option("--dry-run", is_flag=True, help="Say what would change, change nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def install(instances: tuple[str, ...], now: bool, no_windows: bool, dry_run: bool, as_json: bool) -> None:
    """Install the units; enable NAME, or all that have settings.

    NAME is a GPU's number, or what its folder in /var/lib/agora is called; "agorad" is the node of
    /etc/agora/agorad.toml. Can be repeated: what is there already is left alone. On WSL2 it turns
    systemd on, and sets up Windows so that peers reach the nodes.

    Example: sudo agoractl service install 0 1 --now
    """
    named = ["" if name == "agorad" else name for name in instances]
    for name in named:
        if name and not _INSTANCE.fullmatch(name):
            raise click.UsageError(f"{name!r} cannot be the name of a node: letters, digits, - and _")
    wsl = detect.is_wsl2()
    if wsl and not is_running():
        sys.exit(_turn_systemd_on(dry_run, as_json))
    _require(dry_run)
    done = steps.install(
        program.find(), manager.Manager(), named, dry_run=dry_run, start=now, log=lambda text: _say(text)
    )
    if wsl and not no_windows:
        try:
            setup.install(done, setup.windows(), setup.ports(), dry_run=dry_run)
        except LocalError:
            _show(done, dry_run, as_json, nothing="")  # this side is installed all the same
            raise
    _show(done, dry_run, as_json, nothing="already installed: nothing to change")


@service.command()
@click.option("--purge", is_flag=True, help="The state folder too: keys, and with them who the nodes are.")
@click.option("--yes", is_flag=True, help="Do not ask about --purge.")
@click.option("--no-windows", is_flag=True, help="On WSL2: leave Windows as it is.")
@click.option("--dry-run", is_flag=True, help="Say what would change, change nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def uninstall(purge: bool, yes: bool, no_windows: bool, dry_run: bool, as_json: bool) -> None:
    """Stop and remove the service; the state folder stays.

    Without root it is the caller's own, which `agoractl join` made.

    Example: sudo agoractl service uninstall
    """
    if os.geteuid() != 0 and not purge and user.place().exists():
        done = user.uninstall(dry_run=dry_run)
        done.hints.append("state and keys stay in ~/.local/state/agora")
        _show(done, dry_run, as_json, nothing="not installed: nothing to remove")
        return
    _require(dry_run)
    if purge and not yes and not dry_run:
        if not sys.stdin.isatty():
            raise click.UsageError("--purge removes the nodes' keys for good: say --yes as well")
        click.confirm(f"Remove {SYSTEM_STATE} with the nodes' keys for good?", abort=True, err=True)
    done = steps.uninstall(manager.Manager(), dry_run=dry_run, purge=purge)
    if detect.is_wsl2() and not no_windows:
        setup.uninstall(done, setup.windows(), dry_run=dry_run)
    _show(done, dry_run, as_json, nothing="not installed: nothing to remove")


def _turn_systemd_on(dry_run: bool, as_json: bool) -> int:
    """WSL2 without systemd: the setting for it, and what then is to be done in Windows. Not done yet: 1."""
    if os.geteuid() != 0 and not dry_run:
        raise LocalError(f"changing {setup.CONF} takes root: sudo; --dry-run shows what would change")
    done = Done(files=setup.systemd_setting(), hints=[setup.RESTART])
    if not dry_run:
        apply(done.files)
    _show(done, dry_run, as_json, nothing="systemd is turned on, and begins with the next start of WSL")
    return 1


def _require(dry_run: bool) -> None:
    if not is_running():
        raise LocalError(
            "systemd does not run here, so there is nothing to install a service in; "
            "`agoractl join` and `agorad` work in the foreground, under any supervisor"
        )
    if os.geteuid() != 0 and not dry_run:
        raise LocalError("this takes root: sudo; --dry-run shows what would change")


def _show(done: Done, dry_run: bool, as_json: bool, *, nothing: str) -> None:
    if as_json:
        click.echo(json.dumps(_document(done, dry_run)))
        return
    if done.nothing:
        click.echo(nothing)
    for change in done.files:
        for line in change.lines():
            click.echo(line)
    for step in done.steps:
        click.echo(f"* {step}")
    if dry_run and not done.nothing:
        click.echo("nothing was changed (--dry-run)")
    for hint in done.hints:
        click.echo(f"next: {hint}")


def _document(done: Done, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "changed": not done.nothing,
        "files": [
            {"path": str(change.path), "kind": change.kind, "lines": change.lines()} for change in done.files
        ],
        "steps": done.steps,
        "next": done.hints,
    }


def _say(text: str) -> None:
    click.echo(text, err=True)
