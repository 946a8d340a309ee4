"""What averaging late and in slices costs: replicas in one process, arm against arm at equal tokens.

    python bench/fidelity_averaging.py [--arm NAME ...] [--steps 640] [--replicas 4] [--seed 1 ...] [--json]

Every arm trains the same model on the same rows in the same order, so many steps of so many sequences a
replica, and is judged on the same held-out rows by the mean of its replicas' weights. An arm runs with each
learning rate of one grid on the first seed, and with the best of them on the other seeds. Packing, merging,
optimizer and reducer are the code of a run (``stage``); only the wire is not there: an average is merged
``delay`` steps after its slice was packed.

Arms: ``gradients`` (the mean of all gradients, every step), ``powersgd`` (the same as factors of rank 16),
``none``, ``full`` (the mean of all weights, every step), ``overwrite``, ``delta``, ``ema`` (5 % of the
weights every step, ten steps late), ``soon`` (``ema``, four steps late), ``10%`` and ``20%`` (larger slices,
``ema``, nine and four steps late); in ``newcomer`` a replica is replaced half way. The learning rate stays,
or falls to a tenth (``decay/``).
"""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import attrs
import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from fidelity import show
from fidelity_run import EVAL_ROWS, Chain

from stage.config import ModelConfig, TrainingConfig
from stage.data import Row, Source
from stage.merging import Merger, PackedSlice
from stage.model import Stage
from stage.powersgd import PowerSGD
from stage.reduce import KernelReducer

LRS = (4e-3, 1.2e-2, 3.2e-2)
MODEL = ModelConfig(
    d=64, k=16, heads=2, kv_heads=1, head_dim=32, ffn=128, seq=32, layers=(2,), rope_theta=100.0, f_scale=3.0
)
BATCH = 8
"""Sequences a replica and step."""
WARM_STEPS = 2
"""Of a newcomer, with weight 0."""
CURVE = 10
"""Steps between two evaluations of the averaged model."""


@attrs.frozen
class Arm:
    """How the replicas of an arm are kept together."""

    merge: Literal["delta", "ema", "overwrite"] | None = None
    """None: by gradients, or not at all."""
    fraction: float = 0.05
    every: int = 1
    delay: int = 0
    gradients: bool = False
    rank: int = 0
    """Of gradients that travel as factors; 0: as they are."""
    newcomer: bool = False
    decay: bool = False
    """Whether the learning rate falls to a tenth by the end; else it stays after its warm-up."""


LIKE = "decay/ema"
"""The arm that a newcomer comes to; its learning rate is taken."""
ARMS: dict[str, Arm] = {
    "gradients": Arm(gradients=True),
    "ema": Arm("ema", delay=10),
    "delta": Arm("delta", delay=10),
    "overwrite": Arm("overwrite", delay=10),
    "none": Arm(),
    "soon": Arm("ema", delay=4),
    "10%": Arm("ema", fraction=0.1, delay=9),
    "20%": Arm("ema", fraction=0.2, delay=4),
    "decay/gradients": Arm(gradients=True, decay=True),
    "decay/powersgd": Arm(gradients=True, rank=16, decay=True),
    "decay/ema": Arm("ema", delay=10, decay=True),
    "decay/newcomer": Arm("ema", delay=10, newcomer=True, decay=True),
    "decay/20%": Arm("ema", fraction=0.2, delay=4, decay=True),
    "decay/full": Arm("delta", fraction=1.0, decay=True),
}


@attrs.frozen(kw_only=True)
class Result:
    """What one run of an arm came to; losses in nats a byte, of the mean of the replicas' weights."""

    arm: str
    lr: float
    seed: int
    loss: float
    one: float
    """Of the first replica's own weights."""
    disagreement: float
    """Mean relative distance of the replicas to their mean, at the end."""
    mb: float
    """That each replica sent, 10^6 bytes."""
    curve: list[float]
    """Every ``CURVE`` steps."""
    seconds: float
    """Processor time."""


class Member:
    """One replica: a model of its own, and the slices of it that are under way."""

    def __init__(self, training: TrainingConfig) -> None:
        """``training`` of the arm."""
        self.chain = Chain(MODEL, training, Stage, "cpu")
        (self.weights,), (self.optimizer,) = self.chain.weights, self.chain.optimizers
        self.merger = Merger(training, self.weights)
        self.powersgd = PowerSGD(
            self.weights.layout, training.powersgd_rank, training.seed, self.weights.gradient
        )
        self.under_way: deque[tuple[int, PackedSlice, Tensor]] = deque()
        """When it arrives, what was packed, and the average."""
        self.born = -WARM_STEPS

    def land(self, step: int) -> None:
        """Merge what has arrived by now."""
        while self.under_way and self.under_way[0][0] <= step:
            _, packed, average = self.under_way.popleft()
            self.merger.merge(packed, average, [(0, average.numel())])

    def replace(self, donor: Member, step: int) -> None:
        """Become a newcomer with the donor's state of this moment."""
        for _, packed, _ in self.under_way:
            self.merger.give_up(packed)
        self.under_way.clear()
        moments, size = donor.optimizer.moments, donor.weights.layout.size
        vectors = [moments.read(name, 0, size).clone() for name in ("exp_avg", "exp_avg_sq")]
        self.optimizer.load([donor.weights.flat.clone(), *vectors], donor.optimizer.updates)
        self.merger.forget()
        self.born = step


class Run:
    """The replicas of one run of an arm."""

    def __init__(self, arm: Arm, training: TrainingConfig, replicas: int) -> None:
        self.arm, self.training = arm, training
        self.replicas = replicas
        alone = arm.gradients and not arm.rank  # of equal gradients one replica is as good as all
        self.members = [Member(training) for _ in range(1 if alone else replicas)]
        self.sent = 0.0
        self.judge = Chain(MODEL, training, Stage, "cpu")

    def step(self, step: int, rows: list[list[Row]]) -> None:
        """All replicas take a step, each with its rows; then a round begins and others end."""
        if self.arm.gradients:
            self._gradients(step, rows)
            return
        for member, some in zip(self.members, rows, strict=True):
            member.chain.step(step, some)
        if self.arm.merge is None:
            return
        if step % self.arm.every == 0:
            self._round(step)
        for member in self.members:
            member.land(step)

    def _gradients(self, step: int, rows: list[list[Row]]) -> None:
        """All replicas take the same update."""
        if not self.arm.rank:
            (member,) = self.members
            for some in rows:
                member.chain.accumulate(some)
            member.chain.update(step, sum(map(len, rows)))
            self._count(member.weights.layout.size)
            return
        for member, some in zip(self.members, rows, strict=True):
            member.chain.accumulate(some)
        p = self._mean([member.powersgd.project(BATCH).values for member in self.members])
        whole = [(0, p.numel())]
        sent = [member.powersgd.contribute(p, whole, BATCH) for member in self.members]
        mean = self._mean([each.values for each in sent])
        whole = [(0, mean.numel())]
        for member, each in zip(self.members, sent, strict=True):
            member.optimizer.apply(step, member.powersgd.finish(each, mean, whole, whole))

    def _mean(self, vectors: list[Tensor]) -> Tensor:
        if not vectors[0].numel():
            return vectors[0]
        reducer = KernelReducer(vectors[0].nbytes)
        for vector in vectors:
            reducer.add(vector.numpy().data.cast("B"), float(BATCH))
        self._count(vectors[0].numel())
        return torch.frombuffer(bytearray(reducer.finish()), dtype=torch.float32)

    def _round(self, step: int) -> None:
        packed = [member.merger.pack(step // self.arm.every) for member in self.members]
        proven = [step - member.born >= WARM_STEPS for member in self.members]
        average = self._mean([one.values for one, counts in zip(packed, proven, strict=True) if counts])
        for member, one in zip(self.members, packed, strict=True):
            member.under_way.append((step + self.arm.delay, one, average))

    def _count(self, floats: int) -> None:
        """A butterfly's bytes: its numbers out, and the means of its share."""
        self.sent += 2 * (self.replicas - 1) / self.replicas * 4 * floats

    def mean(self) -> Tensor:
        """Of the replicas' weights."""
        return torch.stack([member.weights.flat for member in self.members]).mean(dim=0)

    def loss(self, rows: list[Row]) -> float:
        """Of the mean of the replicas' weights."""
        (weights,) = self.judge.weights
        weights.writable().copy_(self.mean())
        weights.refresh()
        return round(self.judge.evaluate(rows), 4)

    def disagreement(self) -> float:
        """Mean relative distance to the mean."""
        mean = self.mean()
        apart = [float((member.weights.flat - mean).norm()) for member in self.members]
        return sum(apart) / len(apart) / float(mean.norm())


@attrs.frozen
class Text:
    """What the runs of a seed train on and are judged by."""

    rows: list[Row]
    held_out: list[Row]

    @classmethod
    def of(cls, seed: int, count: int) -> Text:
        """``count`` rows to train on."""
        source = Source(None, MODEL.seq, seed)
        return cls([source.row(0, at) for at in range(count)], source.held_out(EVAL_ROWS))


def train(name: str, arm: Arm, lr: float, seed: int, steps: int, replicas: int, text: Text) -> Result:
    """A whole run of an arm."""
    training = TrainingConfig(
        seed=seed, lr=lr, target_batch=BATCH * replicas, warmup_steps=min(10, steps), total_steps=steps,
        merge=arm.merge or "delta", slice_fraction=arm.fraction, average_every=arm.every,
        powersgd_rank=arm.rank or 1, min_lr_ratio=0.1 if arm.decay else 1.0,
    )  # fmt: skip
    began, curve = time.process_time(), []
    run = Run(arm, training, replicas)
    for step in range(1, steps + 1):
        if arm.newcomer and step == steps // 2:
            run.members[-1].replace(run.members[0], step)
        at = (step - 1) * BATCH * replicas
        run.step(step, [text.rows[at + i * BATCH : at + (i + 1) * BATCH] for i in range(replicas)])
        if step % CURVE == 0:
            curve.append(run.loss(text.held_out))
    return Result(
        arm=name,
        lr=lr,
        seed=seed,
        loss=run.loss(text.held_out),
        one=round(run.members[0].chain.evaluate(text.held_out), 4),
        disagreement=round(run.disagreement(), 4),
        mb=round(run.sent / 1e6, 4),
        curve=curve,
        seconds=round(time.process_time() - began, 1),
    )


def summary(results: list[Result]) -> list[dict[str, Any]]:
    """A line an arm, over the seeds that its best learning rate has."""
    lines = []
    for arm in dict.fromkeys(result.arm for result in results):
        lr = best(results, arm)
        chosen = [result for result in results if (result.arm, result.lr) == (arm, lr)]
        lines.append(
            {
                "arm": arm,
                "lr": lr,
                "loss": round(mean(result.loss for result in chosen), 3),
                "seeds": [round(result.loss, 3) for result in chosen],
                "one": round(mean(result.one for result in chosen), 3),
                "disagreement": round(mean(result.disagreement for result in chosen), 4),
                "mb": chosen[0].mb,
                "grid": {result.lr: round(result.loss, 3) for result in results if result.arm == arm},
                "gap": gap(results, chosen),
                "bump": bump(results, chosen) if ARMS[arm].newcomer else None,
            }
        )
    return lines


def best(results: list[Result], arm: str) -> float:
    """The learning rate of the grid with which the first seed came to the lowest loss."""
    of_arm = [result for result in results if result.arm == arm]
    return min((result for result in of_arm if result.seed == of_arm[0].seed), key=lambda one: one.loss).lr


def gap(results: list[Result], chosen: list[Result]) -> float | None:
    """Mean relative distance to averaged gradients, seed by seed, each with the best rate of its arm."""
    like = "decay/gradients" if ARMS[chosen[0].arm].decay else "gradients"
    if not any(result.arm == like for result in results):
        return None
    lr = best(results, like)
    by_seed = {result.seed: result.loss for result in results if (result.arm, result.lr) == (like, lr)}
    gaps = [result.loss / by_seed[result.seed] - 1 for result in chosen if result.seed in by_seed]
    return round(mean(gaps), 4) if gaps else None


def bump(results: list[Result], chosen: list[Result]) -> float | None:
    """The largest rise of a newcomer's run over the same run without it, mean of the seeds."""
    undisturbed = {(result.lr, result.seed): result.curve for result in results if result.arm == LIKE}
    rises = []
    for result in chosen:
        if (result.lr, result.seed) in undisturbed:
            pairs = zip(result.curve, undisturbed[result.lr, result.seed], strict=True)
            rises.append(max(with_it - without for with_it, without in pairs))
    return round(mean(rises), 4) if rises else None


@click.command(help=__doc__)
@click.option("--arm", "chosen", multiple=True, type=click.Choice(list(ARMS)), help="All if not given.")
@click.option("--steps", default=640)
@click.option("--replicas", default=4)
@click.option("--lr", "lrs", multiple=True, type=float, default=LRS)
@click.option("--seed", "seeds", multiple=True, type=int, default=(1, 2, 3))
@click.option("--json", "as_json", is_flag=True, help="One JSON line a run and one an arm.")
def main(
    chosen: tuple[str, ...], steps: int, replicas: int, lrs: tuple[float, ...], seeds: tuple[int, ...],
    as_json: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    results: list[Result] = []
    for place, seed in enumerate(seeds):
        text = Text.of(seed, steps * replicas * BATCH)
        for name in chosen or ARMS:
            tuned = LIKE if ARMS[name].newcomer else name
            known = any(result.arm == tuned for result in results)
            grid = [best(results, tuned)] if known and (place or tuned != name) else lrs
            for lr in grid:
                results.append(train(name, ARMS[name], lr, seed, steps, replicas, text))
                last = results[-1]
                show(as_json, attrs.asdict(last), f"{name:15} lr {lr:<6g} seed {seed} {last.loss:.3f}")
    for line in summary(results):
        gap_text = "" if line["gap"] is None else f" gap {100 * line['gap']:.1f} %"
        text = f"{line['arm']:15} lr {line['lr']:<6g} loss {line['loss']:.3f}{gap_text} {line['mb']} MB"
        show(as_json, line, text)


if __name__ == "__main__":
    main()
