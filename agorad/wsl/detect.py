"""Whether this is WSL2, and how its network hangs on Windows'."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from agorad.service import manager
from p2p.errors import LocalError

POWERSHELL: Final = "Windows/System32/WindowsPowerShell/v1.0/powershell.exe"
CMD: Final = "Windows/System32/cmd.exe"

Run = manager.Run


def is_wsl2(release: str = "") -> bool:
    """By the kernel's name; WSL1 has no kernel of its own and says Microsoft, with a capital letter."""
    release = release or platform.release()
    return "microsoft" in release and "Microsoft" not in release


def networking(run: Run = manager.run) -> str:
    """``nat``, ``mirrored``, ``none`` or ``virtioproxy``; nat where an older WSL does not say."""
    try:
        said = run(["wslinfo", "--networking-mode"]).stdout.strip().lower()
    except LocalError:
        return "nat"
    return said if said in ("nat", "mirrored", "none", "virtioproxy") else "nat"


def distribution(environment: Mapping[str, str] = os.environ, run: Run = manager.run) -> str:
    """The name under which Windows knows this Linux; sudo keeps the variable from us, wslpath does not."""
    name = environment.get("WSL_DISTRO_NAME", "")
    if not name:
        # \\wsl.localhost\Ubuntu\ or \\wsl$\Ubuntu\
        parts = run(["wslpath", "-w", "/"]).stdout.strip().split("\\")
        name = parts[3] if len(parts) > 3 else ""
    if not name:
        raise LocalError("cannot find this distribution's name; say it: WSL_DISTRO_NAME=Ubuntu")
    return name


def program(
    name: str,
    below: str,
    which: Callable[[str], str | None] = shutil.which,
    roots: tuple[Path, ...] = (Path("/mnt/c"), Path("/c")),
) -> str:
    """A Windows program: by PATH, which sudo shortens, else where it always is."""
    if found := which(name):
        return found
    for root in roots:
        if (root / below).exists():
            return str(root / below)
    raise LocalError(
        f"{name} cannot be found: let WSL start Windows programs ([interop] enabled=true in /etc/wsl.conf)"
    )
