"""Times of competing functions, interleaved, so that a noisy machine is as unkind to each of them.

Every function is called with a running number: it picks its buffers by it, so that what one call left in
the caches is not what the next one reads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Work = Callable[[int], object]

SHORTEST_S = 2e-3
"""Least time of one measurement; shorter work is repeated."""
MOST_REPEATS = 2000
FEWEST_ROUNDS = 5
MOST_ROUNDS = 15
LONG_S = 2.0
"""Rounds go on until they took this long: a neighbour's burst is over then."""
SETTLE_S = 6e-3
"""Before each measurement on the CPU. Torch's threads spin for milliseconds after an operation, which takes a
core from whoever comes next, torch excepted. It is waited for busily: a core that slept begins slowly."""


def seconds(works: Sequence[Work], device: torch.device) -> list[float]:
    """Median seconds of one call of each, of FEWEST_ROUNDS to MOST_ROUNDS measurements."""
    repeats = []
    for work in works:
        once = _timed(work, device, 0, 1)  # warms up: pages, caches, compilation
        once = min(once, _timed(work, device, 1, 1))
        repeats.append(min(MOST_REPEATS, max(1, round(SHORTEST_S / max(once, 1e-7)))))
    measured: list[list[float]] = [[] for _ in works]
    number = 2
    begin = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > LONG_S:
            break
        for times, work, repeat in zip(measured, works, repeats, strict=True):
            settled = time.perf_counter() + SETTLE_S
            while device.type == "cpu" and time.perf_counter() < settled:
                pass
            times.append(_timed(work, device, number, repeat) / repeat)
            number += repeat
    return [statistics.median(times) for times in measured]


def _timed(work: Work, device: torch.device, number: int, repeat: int) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for i in range(repeat):
            work(number + i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    for i in range(repeat):
        work(number + i)
    return time.perf_counter() - start
