"""Tokens a second of the demo's stages chained in one process, for 1 and 2 threads, one JSON line each.

    python bench/chained.py [--stages 3] [--steps 4] [--data PATH] [--train STEPS]

``--train`` instead trains that many steps and prints training and evaluation loss: what the demo's model
reaches without a swarm around it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

from stage import presets
from stage.chained import Chain, chained_tokens_per_second
from stage.config import split_layers
from stage.data import Source

EVAL_ROWS = 16


@click.command(help=__doc__)
@click.option("--stages", default=3)
@click.option("--steps", default=4, help="Steps to measure.")
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--threads", type=int, help="Measure this number of threads only, in this process.")
@click.option("--train", type=int, help="Train this many steps and print losses.")
def main(stages: int, steps: int, data: Path | None, threads: int | None, train: int | None) -> None:
    if threads is None and train is None:
        for count in (1, 2):  # each in a process of its own: torch fixes its threads early
            subprocess.run([sys.executable, *sys.argv, "--threads", str(count)], check=True)
        return
    model, training = presets.demo(split_layers(presets.DEMO_LAYERS, stages), train or steps)
    source = Source(data, model.seq, training.seed)
    if train is None:
        assert threads is not None
        speed = chained_tokens_per_second(model, training, source, steps=steps, threads=threads)
        print(json.dumps({"stages": stages, "threads": threads, "tokens_per_second": round(speed)}))
        return
    torch.set_num_threads(threads or 1)
    chain, began = Chain(model, training), time.perf_counter()
    for step in range(1, train + 1):
        first = (step - 1) * training.target_batch
        losses = [chain.microbatch(source.row(0, first + i)) for i in range(training.target_batch)]
        chain.step(step)
        if step % 10 == 0 or step == train:
            held_out = [chain.evaluate(row) for row in source.held_out(EVAL_ROWS)]
            line = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 3),
                "eval_loss": round(sum(held_out) / len(held_out), 3),
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
