"""The node's process: does it run, does it answer, how did it end last, and what does it complain about."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from typing import Any

from agorad import __version__
from agorad.ask import NoAnswer
from agorad.cli.targets import how_to_start
from agorad.doctor.machine import open_files, process_state
from agorad.doctor.patient import Patient
from agorad.doctor.sharing import lock_holder
from agorad.join.findings import Finding


def look(patient: Patient) -> Iterator[Finding]:
    """All of it."""
    status = patient.status
    if status is None:
        yield from _silent(patient)
        return
    yield Finding(
        name="daemon", verdict="ok", found=f"process {status['pid']} is {status['phase']}, version "
        f"{status.get('version', 'unknown')}",
    )  # fmt: skip
    if status.get("version", __version__) != __version__:
        yield Finding(
            name="running version", verdict="warn",
            found=f"the daemon runs {status['version']}, installed is {__version__}",
            remedy="agoractl restart",
        )  # fmt: skip
    yield from _words(status)


def _silent(patient: Patient) -> Iterator[Finding]:
    path = patient.socket
    if isinstance(patient.silence, NoAnswer):
        why, remedy = _why_silent(patient)
        yield Finding(
            name="daemon", verdict="fail", found=f"it runs but does not answer: {patient.silence}{why}",
            remedy=remedy,
        )  # fmt: skip
        return
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = 0
    except NotADirectoryError:
        mode = 0  # said of the state folder
    except OSError as error:
        yield Finding(
            name="control socket", verdict="fail", found=f"{path}: {error.strerror}",
            remedy="run this as the daemon's user, or with sudo",
        )  # fmt: skip
        return
    if mode and not stat.S_ISSOCK(mode):
        yield Finding(
            name="control socket", verdict="fail", found=f"{path} is in the way and is no socket",
            remedy="move it elsewhere, or set node.control",
        )  # fmt: skip
    elif mode and "not allowed" in str(patient.silence):
        yield Finding(
            name="control socket", verdict="fail", found=str(patient.silence),
            remedy="run this as the daemon's user, or with sudo",
        )  # fmt: skip
        return
    elif mode:
        yield Finding(
            name="control socket", verdict="warn",
            found=f"{path} was left by a daemon that is gone: it was killed, or the machine went down",
            remedy="nothing: the next start replaces it",
        )  # fmt: skip
    seen = patient.seen
    yield Finding(
        name="daemon", verdict="fail", found=f"it does not run: {seen.sentence()}",
        remedy=seen.remedy(how_to_start(patient.path)),
    )  # fmt: skip


def _why_silent(patient: Patient) -> tuple[str, str]:
    """What the system says of a process that does not, and what to do."""
    state = patient.settings.node.state if patient.settings is not None else None
    pid = lock_holder(state) if state is not None else None
    if pid is None:
        return "", "it may be stopped or frozen (ps shows T): kill -CONT it, or restart its service"
    used, most = open_files(pid)
    if most and used >= most:
        return (
            f"; process {pid} has all of its {most} files open",
            f"restart it, or raise its limit (prlimit --nofile=16384 --pid {pid}; LimitNOFILE= of a service)",
        )
    if process_state(pid) == "T":
        return f"; process {pid} is stopped", f"kill -CONT {pid}"
    return f"; process {pid} hangs", f"restart its service, or kill -ABRT {pid}: its log then says where"


def _words(status: dict[str, Any]) -> Iterator[Finding]:
    for warning in status.get("warnings", ()):
        yield Finding(
            name="warning", verdict="warn", found=str(warning),
            remedy="docs/troubleshooting.md; agoractl events shows what led to it",
        )  # fmt: skip
    if status.get("paused"):
        yield Finding(
            name="paused", verdict="warn", found=f"this node does no work: {status['paused']}",
            remedy="agoractl resume, or the hours in its settings",
        )  # fmt: skip
    last = status.get("round")
    if last and time.time() - last["at"] > 3600 and status["phase"] == "active":
        yield Finding(
            name="rounds", verdict="warn", found="the last averaging round was more than an hour ago",
            remedy="agoractl swarm shows whether the stage has other replicas; agoractl events --follow",
        )  # fmt: skip
