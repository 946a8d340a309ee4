"""What one poisoned contributor of five does to the others, by robust rule.

    python bench/poison.py [--rule clip ...] [--poison negated ...] [--steps 160] [--seed 1] [--json]

Five replicas of a small model train on rows of their own of Python's source and average a slice of 5 % after
every step, through the reducers and the exchange that a run uses (messages are handed over in memory). The
last one trains as they do, but what it sends is poisoned from the first round on. The figure is the mean loss
of the four others on held-out rows, beside that of five honest ones without a rule. The poison ``stale`` is
what the replica held 100 rounds ago, the genesis for the first hundred.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fidelity_run import Chain

from p2p.averaging.butterfly import Exchange
from p2p.averaging.outcome import Outcome
from p2p.averaging.reducer import MakeReducer
from p2p.averaging.roster import Candidate, Roster, RoundKey, draft
from stage import kernels
from stage.config import ModelConfig, TrainingConfig
from stage.data import Source
from stage.merging import Merger, PackedSlice
from stage.model import Stage
from stage.robust import RULES, reducer

REPLICAS = 5
STALE = 100
"""Rounds."""
EVAL_ROWS = 64
MODEL = ModelConfig(
    d=64, k=64, heads=2, kv_heads=1, head_dim=32, ffn=128, seq=32, layers=(1,), rope_theta=100.0,
    full_rank_tail=True, f_scale=0.0,
)  # fmt: skip
BATCH = 8
"""Rows a step and replica."""


class Replica:
    """One replica of the only stage: it trains, packs and merges."""

    def __init__(self, training: TrainingConfig) -> None:
        self.chain = Chain(MODEL, training, Stage, "cpu")
        self.training = training
        self.weights = self.chain.weights[0]
        self.merger = Merger(training, self.weights)
        self.past = deque([self.weights.flat.clone()], maxlen=STALE + 1)
        """Weights after the last rounds, the oldest first."""

    def stale(self, packed: PackedSlice) -> torch.Tensor:
        """The slice as it was ``STALE`` rounds ago."""
        return kernels.slice_pack(self.past[0], packed.index, self.training.slices, packed.key)


Poison = Callable[[Replica, PackedSlice, numpy.random.Generator], Any]
POISONS: dict[str, Poison] = {
    "nan": lambda _, packed, __: numpy.full(packed.values.numel(), numpy.nan, "<f4"),
    "infinite": lambda _, packed, __: numpy.full(packed.values.numel(), numpy.inf, "<f4"),
    "negated": lambda _, packed, __: -packed.values.numpy(),
    "thousandfold": lambda _, packed, __: 1000 * packed.values.numpy(),
    "random": lambda _, packed, rng: rng.standard_normal(packed.values.numel()),
    "stale": lambda replica, packed, _: replica.stale(packed).numpy(),
}


def exchanged(roster: Roster, vectors: Sequence[bytes], make: MakeReducer) -> list[Outcome]:
    """What the members hold after one round without faults, in the roster's order."""
    exchanges = [
        Exchange(
            roster, peer, memoryview(vector), make,
            lambda domain, said: b"s" * 64, lambda peer, domain, said, signature: True, 0.0, 60.0,
        )
        for peer, vector in zip(roster.peers, vectors, strict=True)
    ]  # fmt: skip
    for exchange in exchanges:
        exchange.start()
    while any(exchange.out for exchange in exchanges):
        for sender, exchange in enumerate(exchanges):
            out, exchange.out = exchange.out, []
            for send in out:
                exchanges[send.to].heard(sender, send.header, memoryview(bytes(send.payload)))
    outcomes = [exchange.outcome for exchange in exchanges if exchange.outcome is not None]
    if len(outcomes) != len(exchanges):
        raise RuntimeError(f"the round failed: {[exchange.failed for exchange in exchanges]}")
    return outcomes


def others_loss(rule: Any, poison: str | None, steps: int, seed: int) -> float:
    """Held-out loss of the honest replicas in the end, nats a byte."""
    training = TrainingConfig(
        seed=seed, target_batch=BATCH, average_every=1, lr=1e-2, warmup_steps=min(10, steps),
        total_steps=steps, robust=rule,
    )  # fmt: skip
    source, rng, make = Source(None, MODEL.seq, seed), numpy.random.default_rng(seed), reducer(rule)
    replicas = [Replica(training) for _ in range(REPLICAS)]
    names = [
        Candidate(peer=f"m{i}", addrs=("/a",), bandwidth=0.0, weight=float(BATCH)) for i in range(REPLICAS)
    ]  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        packs = []
        for i, replica in enumerate(replicas):
            first = ((step - 1) * REPLICAS + i) * BATCH
            replica.chain.step(step, [source.row(0, first + row) for row in range(BATCH)])
            packs.append(replica.merger.pack(step))
        sent = [packed.values.numpy() for packed in packs]
        if poison is not None:
            sent[-1] = POISONS[poison](replicas[-1], packs[-1], rng)
        roster = draft(
            RoundKey(run="poison", stage=0, number=step), names[0].peer, names, slice_index=packs[0].index,
            floats=packs[0].values.numel(), part_bytes=1 << 20, seconds=60.0,
        )  # fmt: skip
        order = [int(peer[1:]) for peer in roster.peers]
        outcomes = exchanged(roster, [sent[i].astype("<f4").tobytes() for i in order], make)
        for i, outcome in zip(order, outcomes, strict=True):
            average = torch.frombuffer(outcome.vector, dtype=torch.float32)
            replicas[i].merger.merge(packs[i], average, outcome.averaged)
            replicas[i].past.append(replicas[i].weights.flat.clone())
    held_out = source.held_out(EVAL_ROWS)
    return float(numpy.mean([replica.chain.evaluate(held_out) for replica in replicas[:-1]]))


@click.command(help=__doc__)
@click.option("--rule", "rules", multiple=True, type=click.Choice(["none", *RULES]), default=["none", *RULES])
@click.option("--poison", "poisons", multiple=True, type=click.Choice(list(POISONS)), default=list(POISONS))
@click.option("--steps", default=160)
@click.option("--seed", default=1)
@click.option("--json", "as_json", is_flag=True, help="One JSON line a run.")
def main(rules: Sequence[str], poisons: Sequence[str], steps: int, seed: int, as_json: bool) -> None:
    torch.set_num_threads(1)
    honest = others_loss("none", None, steps, seed)
    for rule in rules:
        for poison in (None, *poisons) if rule != "none" else poisons:
            loss = others_loss(rule, poison, steps, seed)
            line = {"rule": rule, "poison": poison, "loss": loss, "honest": honest, "ratio": loss / honest}
            text = f"{rule:14} {poison or 'honest':13} {loss:.3f}  {100 * (loss / honest - 1):+.1f} %"
            print(json.dumps(line) if as_json else text, flush=True)


if __name__ == "__main__":
    main()
