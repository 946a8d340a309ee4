"""What this process and its machine have left, read from /proc and the file system. Never raises.

Memory is the machine's, or the control group's where that allows less (containers, systemd's MemoryMax).
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Final

import attrs

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
CGROUPS: Final = Path("/sys/fs/cgroup")


@attrs.frozen(kw_only=True)
class Machine:
    """Bytes, but for what says otherwise; 0 where nobody can tell."""

    memory_total: int
    memory_available: int
    resident: int
    cpu_s: float
    load: float
    """Runnable tasks a processor, mean of a minute."""
    descriptors: int
    descriptors_most: int
    disk_total: int
    disk_free: int


def look(state: Path) -> Machine:
    """Of now; ``state`` is a folder on the disk that is meant."""
    total, available = memory()
    disk_total, disk_free = _disk(state)
    return Machine(
        memory_total=total,
        memory_available=available,
        resident=_resident(),
        cpu_s=sum(os.times()[:2]),
        load=os.getloadavg()[0] / (os.cpu_count() or 1),
        descriptors=_descriptors(),
        descriptors_most=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disk_total=disk_total,
        disk_free=disk_free,
    )


def memory(meminfo: Path = Path("/proc/meminfo"), group: Path | None = None) -> tuple[int, int]:
    """(total, available) to this process."""
    fields = {}
    for line in _text(meminfo).splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()[:1]
        if number and number[0].isdigit():
            fields[name] = int(number[0]) * 1024
    total, available = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    group = _own_group() if group is None else group
    most, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if most.isdigit() and used.isdigit() and (total == 0 or int(most) < total):
        reclaimable = _stat(group / "memory.stat", "inactive_file")
        total = int(most)
        available = min(available or total, max(0, int(most) - int(used) + reclaimable))
    return total, available


def _own_group() -> Path:
    """The control group (version 2) that we are in."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            return CGROUPS / line[3:].lstrip("/")
    return CGROUPS


def _stat(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        words = line.split()
        if words[:1] == [name] and words[1:2] and words[1].isdigit():
            return int(words[1])
    return 0


def _resident() -> int:
    words = _text(Path("/proc/self/statm")).split()
    return int(words[1]) * PAGE if len(words) > 1 else 0


def _descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough, and cheaper
    except OSError:  # there may be none left to list them with
        return 0


def _disk(folder: Path) -> tuple[int, int]:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return 0, 0
    return usage.total, usage.free


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
