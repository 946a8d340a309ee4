"""A swarm of 3 x 2 over lines of 200 Mbit/s and 80 ms beside the same one without limit and delay.

    python bench/wan.py [--boundary demo|100m] [--whole] [--pairs 6] [--seconds 12] [--wait 300]

Both swarms are up at once, behind one relay, and work in turns (``tests/system/linked.py``). ``--whole``: a
boundary as wide as the model, so that nothing is compressed. ``--wait``: milliseconds that every worker's
device takes for a microbatch, so that this machine's processors bound neither swarm. Prints one JSON line for
each pair of turns and one with the medians. Needs root, as a lab does.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

import attrs
import click

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.system.linked import BOUNDARY_100M, measure

SETTINGS = {"demo": (), "100m": BOUNDARY_100M}
WIDTH = {"demo": 128, "100m": 64}
"""Of what stands for each."""


@click.command(help=__doc__)
@click.option("--boundary", type=click.Choice(sorted(SETTINGS)), default="demo")
@click.option("--whole", is_flag=True)
@click.option("--pairs", default=6, type=click.IntRange(min=1))
@click.option("--seconds", default=8.0, type=click.FloatRange(min=1))
@click.option("--wait", type=click.FloatRange(min=1))
def main(boundary: str, whole: bool, pairs: int, seconds: float, wait: float | None) -> None:
    settings = SETTINGS[boundary] + ((f"model.k={WIDTH[boundary]}",) if whole else ())
    with tempfile.TemporaryDirectory() as folder:
        wait_s = wait / 1000 if wait is not None else None
        found = measure(Path(folder), settings, pairs=pairs, seconds=seconds, wait_s=wait_s)
    for pair in found:
        print(json.dumps(attrs.asdict(pair)), flush=True)
    line = {
        "boundary": boundary,
        "whole": whole,
        "wait_ms": wait,
        "free": round(statistics.median(pair.free.tokens_per_second for pair in found)),
        "limited": round(statistics.median(pair.limited.tokens_per_second for pair in found)),
        "ratio": round(statistics.median(pair.ratio for pair in found), 3),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
