"""``agoractl bench kernels``: each kernel at each size beside a copy, torch eager and torch.compile.

All in one run, interleaved. A kernel's speed is what must move over the time it took, as a share of this
device's copy of large buffers (bytes read and written both counted; the median of a copy before each kernel).
Ratios are over 1 where ours is faster.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from agorad.bench.averaging_cases import averaging_cases
from agorad.bench.boundary_cases import boundary_cases
from agorad.bench.cases import Case, sizes
from agorad.bench.timing import seconds

COPY_BYTES: Final = 128_000_000
COMPILED_SIZE: Final = "8b"
"""torch.compile takes half a minute for a kernel: only this size is put beside it."""
KERNELS: Final = (
    "token_table", "expand", "expand_inline", "project", "project_difference", "project_int8",
    "subspace_weights", "pack", "merge", "reduce",
)  # fmt: skip

Say = Callable[[str], None]


def run(
    device: torch.device,
    wanted_sizes: Sequence[str],
    wanted_kernels: Sequence[str],
    *,
    compiled: bool,
    say: Say,
) -> dict[str, Any]:
    """The document of the command's ``--json``."""
    copies = []
    rows = []
    for name in wanted_sizes:
        for case in _cases(name, device, wanted_kernels):
            say(f"{case.kernel} {case.size} {case.dtype}")
            copies.append(copy_gb_per_s(device))
            whole = case.whole() if compiled and name == COMPILED_SIZE and case.whole else None
            works = [case.ours, *case.eager, *([whole] if whole else [])]
            times = seconds(works, device)
            rows.append(_row(case, times, whole is not None))
        gc.collect()
    copy = sorted(copies)[len(copies) // 2]
    for row in rows:
        row["of_copy"] = row["gb_per_s"] / copy
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "copy_gb_per_s": copy,
        "rows": rows,
    }


def _cases(name: str, device: torch.device, wanted: Sequence[str]) -> Iterator[Case]:
    size = sizes()[name]
    sources: list[tuple[tuple[str, ...], Callable[[], Iterator[Case]]]] = [
        (KERNELS[:-3], lambda: boundary_cases(size, torch.float32, device)),
        (KERNELS[:-3], lambda: boundary_cases(size, torch.bfloat16, device)),
        (KERNELS[-3:], lambda: averaging_cases(size, device)),
    ]
    for kernels, cases in sources:
        if set(kernels) & set(wanted):
            yield from (case for case in cases() if case.kernel in wanted)


def _row(case: Case, times: list[float], whole: bool) -> dict[str, Any]:
    ours, *others = times
    eager = min(others[: len(case.eager)])
    return {
        "kernel": case.kernel,
        "size": case.size,
        "dtype": case.dtype,
        "bytes": case.bytes,
        "seconds": ours,
        "gb_per_s": case.bytes / ours / 1e9,
        "of_copy": 0.0,
        "vs_eager": eager / ours,
        "vs_compile": others[-1] / ours if whole else None,
    }


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written a second by a copy of large buffers."""
    buffers = [torch.ones(COPY_BYTES // 4, device=device) for _ in range(4)]
    [took] = seconds([lambda i: buffers[i % 2].copy_(buffers[2 + i % 2])], device)
    return 2 * COPY_BYTES / took / 1e9
