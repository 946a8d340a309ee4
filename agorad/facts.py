"""What a machine says of itself when it joins: accelerator, memory, disk, software. Torch-free.

Facts are for the authority's first look and for its choice of a stage; where something can be measured it is.
GPUs are asked for through ``nvidia-smi``, which comes with the driver; without it, or on the CPU, there is
none. Blocking: at most ``ASK_S``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from agorad import __version__
from agorad.authority.messages import TEXT_LIMIT, Facts
from agorad.config import Config
from p2p.hello import VERSION

ASK_S: Final = 5.0
GIB: Final = 1 << 30


def gather(settings: Config, clock: float) -> Facts:
    """Of this machine, as this node would use it. What cannot be found out is empty or 0."""
    gpu, vram = find_gpu(settings.node.device)
    if settings.compute.memory_gib is not None and vram:
        vram = min(vram, settings.compute.memory_gib)
    return Facts(
        gpu=gpu[:TEXT_LIMIT],
        vram_gib=round(vram, 2),
        ram_gib=round(ram_bytes() / GIB, 2),
        disk_gib=round(free_bytes(settings.node.state) / GIB, 2),
        cloud=os.environ.get("AGORA_CLOUD", "")[:TEXT_LIMIT],
        software=__version__,
        version=VERSION,
        clock=clock,
    )


def find_gpu(device: str) -> tuple[str, float]:
    """Name and GiB of the GPU that ``node.device`` means; ("", 0.0) for none."""
    program = shutil.which("nvidia-smi")
    if device == "cpu" or program is None:
        return "", 0.0
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True)
        rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if line.strip()]
        name, mib = rows[_index(device, len(rows))]
        return name.strip(), float(mib) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "", 0.0


def _index(device: str, count: int) -> int:
    """Of the driver's GPUs; ``cuda:N`` counts those that CUDA_VISIBLE_DEVICES leaves."""
    number = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = range(count) if visible is None else [int(part) for part in visible.split(",")]
    return listed[number]


def ram_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(folder: Path) -> int:
    """On the disk that ``folder`` is, or will be, on; 0 if nobody can say."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
