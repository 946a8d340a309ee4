"""Machines and links that a plan is made for. Torch-free; wrong values raise LocalError."""

from __future__ import annotations

import math
import re
from typing import Final

import attrs

from p2p.errors import LocalError

GB: Final = 1_000_000_000

MFU: Final = 0.4
"""Assumed share of a GPU's peak that training sustains."""
BANDWIDTH_SHARE: Final = 0.7
"""Assumed share of a memory's peak bandwidth that an optimizer step sustains."""
PCIE_GB_S: Final = 12.0
"""Assumed between host and GPU: PCIe 4.0 x8, or a slow x16."""
HOST_GB_S: Final = 20.0
"""Assumed of the host's memory."""


@attrs.frozen
class Gpu:
    """A card's published figures: dense bf16 with fp32 sums, memory, its bandwidth."""

    tflops: float
    memory_gb: float
    bandwidth_gb_s: float


GPUS: Final[dict[str, Gpu]] = {
    "RTX 3090": Gpu(71, 24, 936),
    "RTX 4080": Gpu(97.5, 16, 717),
    "RTX 4090": Gpu(165.2, 24, 1008),
    "RTX 5090": Gpu(209.5, 32, 1792),
    "RTX A6000": Gpu(154.8, 48, 768),
    "L4": Gpu(121, 24, 300),
    "L40S": Gpu(362, 48, 864),
    "A100": Gpu(312, 80, 2039),
    "H100": Gpu(989, 80, 3350),
    "H200": Gpu(989, 141, 4800),
}
"""Sources: NVIDIA's architecture papers (Ampere GA102, Ada AD102, Blackwell RTX) and data sheets (RTX A6000,
L4, L40S, A100 SXM 80 GB, H100 SXM, H200 SXM); without sparsity."""


@attrs.frozen(kw_only=True)
class Machine:
    """What one replica runs on. None: no limit."""

    tflops: float
    """Sustained, not peak."""
    bandwidth_gb_s: float
    """Of the device's memory, sustained."""
    vram_bytes: float | None = None
    ram_bytes: float | None = None

    def __attrs_post_init__(self) -> None:
        check("tflops", self.tflops, 1e-6, 1e6)
        check("bandwidth", self.bandwidth_gb_s, 1e-3, 1e6)
        for name, value in (("vram", self.vram_bytes), ("ram", self.ram_bytes)):
            if value is not None:
                check(name, value / GB, 1e-3, 1e6)


@attrs.frozen(kw_only=True)
class Link:
    """A replica's line to the others, the same both ways."""

    mbps: float = 200.0
    """Megabits a second, up and down each."""
    rtt_ms: float = 40.0

    def __attrs_post_init__(self) -> None:
        check("mbps", self.mbps, 1e-3, 1e7)
        check("rtt-ms", self.rtt_ms, 0.0, 1e5)

    @property
    def bytes_per_s(self) -> float:
        """One way."""
        return self.mbps * 1e6 / 8


def find_gpu(name: str) -> Gpu:
    """The card of that name, with or without maker, brand, case and spaces. Raises LocalError."""
    wanted = _bare(name)
    for known, gpu in GPUS.items():
        if _bare(known) == wanted:
            return gpu
    raise LocalError(f"no figures for the GPU {name!r}; known: {', '.join(GPUS)}; or give --tflops")


def _bare(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


def check(name: str, value: float, low: float, high: float) -> None:
    """LocalError unless ``value`` is a number between the bounds."""
    if not math.isfinite(value) or not low <= value <= high:
        raise LocalError(f"{name} = {value:g} must be between {low:g} and {high:g}")
