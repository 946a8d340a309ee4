"""The state folder: made private, and held by one daemon at a time.

``claim`` locks the folder itself and the identity file (``flock``: gone with the process, no stale lock
files), so that two daemons never share a state nor speak with one key. Limits: flock is per machine; a
copy of the key on another machine is the authority's business.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from agorad.exitcodes import DaemonExit, ExitCode
from p2p.errors import LocalError


def prepare(state: Path) -> None:
    """Make the state folder (0700) if it is not there."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError(f"cannot make the state folder {state}: {error.strerror}") from error
    if not os.access(state, os.W_OK | os.X_OK):
        raise LocalError(f"the state folder {state} is not writable by this user")


def claim(path: Path) -> int:
    """Lock a folder or file for this process; returns the descriptor that holds the lock.

    Raises ``DaemonExit`` with code 18 if another daemon has it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LocalError(f"cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise DaemonExit(
            ExitCode.DUPLICATE, f"another agorad is running with {path}; stop it first"
        ) from error
    return descriptor
