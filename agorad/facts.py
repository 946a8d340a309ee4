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

import attrs

from agorad import __version__
from agorad.authority.messages import TEXT_LIMIT, Facts
from agorad.config import Config
from agorad.join import cloud
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
        cloud=cloud.detect().cloud[:TEXT_LIMIT],
        software=__version__,
        version=VERSION,
        clock=clock,
    )


@attrs.frozen
class Gpu:
    """One that the driver shows; ``index`` counts as ``cuda:N`` does."""

    index: int
    name: str
    vram_gib: float
    free_gib: float


def find_gpu(device: str) -> tuple[str, float]:
    """Name and GiB of the GPU that ``node.device`` means; ("", 0.0) for none."""
    if device == "cpu":
        return "", 0.0
    number = int(device.partition(":")[2] or 0)
    found = next((gpu for gpu in find_gpus() if gpu.index == number), None)
    return ("", 0.0) if found is None else (found.name, found.vram_gib)


def find_gpus() -> list[Gpu]:
    """All GPUs that CUDA_VISIBLE_DEVICES leaves, in its order."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=index,uuid,name,memory.total,memory.free"
    # It needs little of our environment, which may hold what is nobody's business.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=ASK_S, check=True, env=environment,
        )  # fmt: skip
        rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]
        return [
            Gpu(index, row[2], float(row[3]) / 1024, float(row[4]) / 1024)
            for index, row in enumerate(_visible(rows))
        ]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []


def _visible(rows: list[list[str]]) -> list[list[str]]:
    """The rows that CUDA_VISIBLE_DEVICES names by number or by the beginning of a UUID, up to one unknown."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return rows
    chosen: list[list[str]] = []
    for name in named.split(","):
        name = name.strip()
        fits = [
            row for row in rows if name == row[0] or (name.startswith("GPU-") and row[1].startswith(name))
        ]
        if not fits:
            break
        chosen.append(fits[0])
    return chosen


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
