"""The swarm against the same stages chained in one process, on the same cores, in one run.

    python bench/ratio.py [--stages 3] [--workers 2] [--steps 60] [--repeats 1]

Prints one JSON line: tokens a second of the chain with 1 and with 2 threads (no network, graphs kept, no
recomputation), of the swarm, and their ratio (over the better of the two). Between measurements nothing
else should run on the machine; what does, shows in the spread of ``--repeats``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click


def chained(stages: int, threads: int) -> float:
    """Tokens a second of the chain, in a process of its own."""
    bench = Path(__file__).with_name("chained.py")
    command = [sys.executable, str(bench), "--stages", str(stages), "--threads", str(threads)]
    return float(json.loads(subprocess.check_output(command))["tokens_per_second"])


def swarm(stages: int, workers: int, steps: int) -> float:
    """Tokens a second of a demo without evaluation, as its report has it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "agorad.cli", "demo", "--json", "--dir", f"{folder}/swarm",
            "--stages", str(stages), "--workers", str(workers), "--steps", str(steps),
            "--set", "training.eval_every=0",
        ]  # fmt: skip
        return float(json.loads(subprocess.check_output(command))["tokens_per_second"])


@click.command(help=__doc__)
@click.option("--stages", default=3)
@click.option("--workers", default=2)
@click.option("--steps", default=30)
@click.option("--repeats", default=1)
def main(stages: int, workers: int, steps: int, repeats: int) -> None:
    for _ in range(repeats):
        one, two = chained(stages, 1), chained(stages, 2)
        together = swarm(stages, workers, steps)
        line = {"chained_1": one, "chained_2": two, "swarm": round(together)}
        print(json.dumps({**line, "ratio": round(together / max(one, two), 3)}), flush=True)


if __name__ == "__main__":
    main()
