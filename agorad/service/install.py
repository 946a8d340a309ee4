"""Installing and removing the service: what changes, in an order that never leaves half of it.

Install writes units, account and folders, then enables what has settings. Uninstall stops and disables all
of our units, removes the files and the account, and leaves the state folder, from then on root's: it
holds the keys that nodes are known by. After a later install the first start gives it back to the service.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from agorad.config import SYSTEM_RUNTIME as RUNTIME
from agorad.config import SYSTEM_STATE as STATE
from agorad.service import changes, files
from agorad.service.changes import Change
from agorad.service.manager import Manager
from agorad.service.program import Program
from p2p.errors import LocalError

ACCOUNT: Final = "agora"
SETTINGS: Final = Path("/etc/agora/agorad.toml")


@attrs.define
class Done:
    """What was changed, or would be: files, and steps as sentences."""

    files: list[Change] = attrs.field(factory=list)
    steps: list[str] = attrs.field(factory=list)
    hints: list[str] = attrs.field(factory=list)

    @property
    def nothing(self) -> bool:
        """Whether all was as it should be."""
        return not self.files and not self.steps


def unit(instance: str) -> str:
    """The unit of an instance: empty for the one of /etc/agora/agorad.toml."""
    return f"agorad@{instance}.service" if instance else "agorad.service"


def instances() -> list[str]:
    """Those that have settings on this machine."""
    found = [""] if SETTINGS.exists() else []
    try:
        return found + sorted(path.parent.name for path in STATE.glob("*/agorad.toml"))
    except OSError:
        return found


def install(
    program: Program,
    manager: Manager,
    named: list[str],
    *,
    dry_run: bool,
    start: bool,
    log: Callable[[str], None],
) -> Done:
    """Make it so; with ``dry_run`` only say what would be made so."""
    done = Done(files=files.install(program, manager.version()))
    wanted = [unit(name) for name in (named or instances())]
    account, runtime = _has_account(), RUNTIME.is_dir()
    if not account:
        done.steps.append(f"create the account {ACCOUNT}")
    if not runtime:
        done.steps.append(f"create {RUNTIME}")
    enable = [name for name in wanted if not manager.is_enabled(name)]
    begin = [name for name in wanted if start and not manager.is_active(name)]
    done.steps += [f"enable {name}, so that it starts with the machine" for name in enable]
    done.steps += [f"start {name}" for name in begin]
    running = [name for name in manager.known() if manager.is_active(name)] if done.files else []
    done.hints += [f"systemctl restart {name}   # it still runs as it was" for name in running]
    if not wanted:
        done.hints.append(
            f"write {SETTINGS}, or let `agoractl join` do it; then systemctl enable --now agorad"
        )
    elif not start:
        idle = [name.removesuffix(".service") for name in wanted if not manager.is_active(name)]
        if idle:
            done.hints.append(f"systemctl start {' '.join(idle)}")
    if dry_run or done.nothing:
        return done
    made = changes.apply(done.files)
    try:
        if not account:
            manager.do("systemd-sysusers", str(files.PLACES["agora.sysusers"]))
        if not runtime:
            manager.do("systemd-tmpfiles", "--create", str(files.PLACES["agora.tmpfiles"]))
        if made:
            manager.do("systemctl", "daemon-reload")
        if enable:
            manager.do("systemctl", "enable", "--quiet", *enable)
    except (LocalError, KeyboardInterrupt):
        log("that failed; putting everything back")
        for name in enable:
            manager.says("systemctl", "disable", "--quiet", name)
        changes.undo(made)
        if not account:
            _remove_account(manager)
        if not runtime:
            shutil.rmtree(RUNTIME, ignore_errors=True)
        manager.says("systemctl", "daemon-reload")
        raise
    if begin:
        manager.do("systemctl", "start", "--no-block", *begin)
    return done


def uninstall(manager: Manager, *, dry_run: bool, purge: bool) -> Done:
    """Remove all of it but the state folder, or with ``purge`` that as well."""
    done = Done(files=files.uninstall())
    units = manager.units()
    account = _has_account()
    done.steps += units.steps
    done.steps += [f"remove {RUNTIME}"] if RUNTIME.exists() else []
    done.steps += [f"remove the account {ACCOUNT}"] if account else []
    if STATE.exists() and purge:
        done.steps.append(f"remove {STATE} with the keys in it")
    elif STATE.exists():
        if account:
            done.steps.append(f"give {STATE} to root")
        done.hints.append(f"{STATE} stays, with keys and state; `--purge` removes it too")
    if dry_run or done.nothing:
        return done
    manager.end(units, lambda: changes.apply(done.files))
    shutil.rmtree(RUNTIME, ignore_errors=True)
    if STATE.exists() and purge:
        shutil.rmtree(STATE)
    elif STATE.exists() and account:
        _to_root(STATE)
    if account:
        _remove_account(manager)
    return done


def _has_account() -> bool:
    try:
        pwd.getpwnam(ACCOUNT)
    except KeyError:
        return False
    return True


def _remove_account(manager: Manager) -> None:
    if _has_account():
        manager.do("userdel", ACCOUNT)


def _to_root(folder: Path) -> None:
    """No later account with the same number shall have the keys. Links are given, not followed."""
    for place, folders, names in os.walk(folder):
        for name in (".", *folders, *names):
            os.lchown(Path(place) / name, 0, 0)
