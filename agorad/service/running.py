"""Whether systemd manages this machine. On its own, since commands that must be quick ask it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

RUNNING: Final = Path("/run/systemd/system")


def is_running() -> bool:
    """Whether systemd is process 1 here (its own test: sd_booted(3))."""
    return RUNNING.is_dir()


def is_ours() -> bool:
    """Whether this process may make services of the system."""
    return is_running() and os.geteuid() == 0
