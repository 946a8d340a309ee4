"""A swarm over home lines does hardly less than without them, though every hop takes 80 ms there and back.

Each worker's device waits, as one on a machine of its own would: where two cores compute for six machines and
carry their packets as well, packets are what is measured. Without waits: docs/benchmarks.md, "Over links".
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from agorad.lab.network import NoLab
from tests.system.linked import BOUNDARY_100M, Pair, measure

PAIRS, SECONDS = 4, 8.0
ENOUGH = 0.95
NOISE = 0.15
"""Free turns that differ by more say that the machine was not ours alone."""
STOLEN = 0.05
"""Share of the machine that its host gave to others, above which turns do not compare."""


@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.parametrize(("settings", "wait_s"), [((), 0.1), (BOUNDARY_100M, 0.3)], ids=["demo", "100m"])
def test_lines_cost_little(settings: tuple[str, ...], wait_s: float, tmp_path: Path) -> None:
    try:
        found = measure(tmp_path, settings, pairs=PAIRS, seconds=SECONDS, wait_s=wait_s)
    except NoLab as error:
        pytest.skip(str(error))
    ratio = statistics.median(pair.ratio for pair in found)
    print(f"{ratio:.3f} of {statistics.median(speeds(found)):.0f} tokens a second without lines")
    spread = statistics.stdev(speeds(found)) / statistics.mean(speeds(found))
    stolen = max(turn.stolen for pair in found for turn in (pair.free, pair.limited))
    if ratio < ENOUGH and (spread > NOISE or stolen > STOLEN):
        pytest.skip(f"the machine was busy: free turns differ by {spread:.0%}, {stolen:.0%} stolen")
    assert ratio >= ENOUGH, found


def speeds(found: list[Pair]) -> list[float]:
    return [pair.free.tokens_per_second for pair in found]
