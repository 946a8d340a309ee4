"""A join's nodes as services: ``agorad@N``, one a GPU, of the system if root joins, else of the user.

The unit's folder, /var/lib/agora/N or ~/.local/state/agora/N, is a link to the node's folder of the run that
was joined last: a GPU works for one run at a time, and keys and states of other runs stay where they are. The
account's secret is handed over in a file in /run, which is memory; the node removes it once it was let in or
refused.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable
from typing import Final

import attrs

from agorad.config import SYSTEM_RUNTIME, secret_of
from agorad.join.answers import states
from agorad.join.layout import Planned
from agorad.join.live import Process
from agorad.join.secret import Secret
from agorad.service import install, program, user
from agorad.service.install import ACCOUNT, Done
from agorad.service.manager import Manager
from agorad.service.running import is_running
from p2p.errors import LocalError

ASK_S: Final = 1.0
"""Between two questions to systemd how a unit is."""


def why_not(nodes: list[Planned]) -> str:
    """Why these nodes cannot be services, as a sentence; empty if they can."""
    if not is_running():
        return "systemd does not run here"
    if os.environ.get("XDG_STATE_HOME"):
        return "XDG_STATE_HOME keeps the node out of the folder where services have their state"
    for node in nodes:
        for path in (node.identity, node.log):
            if path.parent != node.folder:
                return f"{path} is not in {node.folder}, where a service may write"
    if _is_user():
        return user.why_not()
    try:
        program.find()
    except LocalError as error:
        return str(error)
    return ""


def _is_user() -> bool:
    return os.geteuid() != 0


def unit(node: Planned) -> str:
    """The node's unit."""
    return f"agorad@{node.gpu}.service"


def prepare(nodes: list[Planned], log: Callable[[str], None]) -> Done:
    """Link the units' folders and install the service as far as it is not; starts nothing."""
    for node in nodes:
        link = states() / str(node.gpu)
        if link.exists() and not link.is_symlink():
            raise LocalError(
                f"{link} is a folder of its own, not of a join: move it, or join with --foreground"
            )
        fresh = link.with_name(f".{link.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(node.folder.relative_to(states()), target_is_directory=True)
        fresh.replace(link)
    names = [str(node.gpu) for node in nodes]
    if _is_user():
        return user.install(program.command(), states(), names, log)
    return install.install(program.find(), Manager(), names, dry_run=False, start=False, log=log)


def launch(node: Planned, secret: Secret | None) -> tuple[Process, str]:
    """Start the node's unit, or start it again if it worked for another run; how to read its log."""
    manager = Manager(user=_is_user())
    if secret is not None:
        _hand_over(node, secret)
    manager.says("systemctl", "reset-failed", unit(node))
    manager.do("systemctl", "restart", "--no-block", unit(node))
    return Running(unit(node), manager), f"`{journal(node)}`"


def journal(node: Planned) -> str:
    """How to read its log."""
    return f"journalctl {'--user ' if _is_user() else ''}-u agorad@{node.gpu}"


def systemctl() -> str:
    """How to speak to its manager."""
    return "systemctl --user" if _is_user() else "systemctl"


def _hand_over(node: Planned, secret: Secret) -> None:
    uid, gid = os.getuid(), os.getgid()
    if _is_user():
        runtime = user.runtime()
        path = None if runtime is None else runtime / "agora" / str(node.gpu) / "secret"
    else:
        path = secret_of(node.folder)
        account = pwd.getpwnam(ACCOUNT)
        uid, gid = account.pw_uid, account.pw_gid
    assert path is not None, "why_not looked"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (path.parent, *path.parent.parents):
        if _is_user() or folder == SYSTEM_RUNTIME:
            break
        os.chown(folder, uid, gid)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        os.fchown(file.fileno(), uid, gid)
        file.write(secret.split()[1])


@attrs.define
class Running:
    """A unit, seen as the process that it is about."""

    unit: str
    manager: Manager
    returncode: int | None = None
    _asked_at: float = 0.0

    def poll(self) -> int | None:
        """How it ended; None while it runs, starts or is about to be started again."""
        now = time.monotonic()
        if self.returncode is not None or now - self._asked_at < ASK_S:
            return self.returncode
        self._asked_at = now
        names = ("ActiveState", "Job", "ExecMainCode", "ExecMainStatus")
        text = self.manager.says("systemctl", "show", self.unit, *(f"-p{name}" for name in names))
        found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if found.get("ActiveState") in ("inactive", "failed") and found.get("Job", "") in ("", "0"):
            status = int(found.get("ExecMainStatus") or 0)
            self.returncode = status if found.get("ExecMainCode") in ("0", "1") else -status
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """It is systemd's."""

    def kill(self) -> None:
        """It is systemd's."""

    def wait(self) -> int:
        """Nobody waits for a service."""
        return self.returncode or 0
