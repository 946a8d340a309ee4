"""Who has a TCP port of this machine, from what the kernel shows in /proc."""

from __future__ import annotations

import os
from pathlib import Path


def holder(port: int, proc: Path = Path("/proc")) -> str:
    """Which program listens on a TCP port, as far as this user may know."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            cells = row.split()
            if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{cells[9]}]")
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(str(link.readlink()) in inodes for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue
    return "another user's program" if os.geteuid() else "another program"
