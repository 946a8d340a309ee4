"""What the subspace costs: small models on Python's source, arm against arm at equal tokens.

    python bench/fidelity.py [--arm NAME ...] [--size small|wide] [--steps 300] [--seed 1 ...] [--json]

Every run of a size sees the same rows in the same order, so many steps of the same batch, and is judged on
the same held-out rows. An arm runs with each of several learning rates; its best (by the mean over the
seeds) stands beside all of them. A run of ``small`` takes a minute of one core; ``--minutes`` begins none
after that. Groups of arms: subspace (as shipped), dense (no compression at all), constrained (the other
variant), scale (of the token table), plain (without the norm on what a branch writes), wire (dtypes of the
boundary), ffn (saved parameters re-spent), tail (its layers unconstrained).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import click
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fidelity_run import Curve, PlainStage, train

from stage.config import ModelConfig, TrainingConfig
from stage.data import Source
from stage.model import Stage
from stage.parameters import parameter_count

LRS = (4e-3, 1.2e-2)
SIZES = {
    "small": ModelConfig(
        d=128, k=16, heads=2, kv_heads=1, head_dim=64, ffn=256, seq=64, layers=(2, 2, 2), rope_theta=100.0,
        f_scale=3.0,
    ),
    "wide": ModelConfig(
        d=256, k=16, heads=4, kv_heads=2, head_dim=64, ffn=512, seq=64, layers=(1, 2, 1), rope_theta=100.0,
        f_scale=3.0,
    ),
}  # fmt: skip


@attrs.frozen
class Arm:
    """A model, how it is trained, and the stage that runs it."""

    model: ModelConfig
    training: dict[str, Any] = attrs.Factory(dict)
    stage: type[Stage] = Stage
    move_every: int = 0
    """Steps between two moves of the basis; 0: it stays."""

    @property
    def parameters(self) -> int:
        """Trainable, of all stages."""
        return sum(parameter_count(self.model, stage) for stage in range(self.model.stages))


def dense(base: ModelConfig, f_scale: float) -> ModelConfig:
    """No subspace: one piece, full-size projections, k = d, so a trainable embedding of full width.

    With ``f_scale`` 0 the embedding starts small, as shipped models do; else at F's values.
    """
    return attrs.evolve(base, layers=(sum(base.layers),), k=base.d, full_rank_tail=True, f_scale=f_scale)


def wider(base: ModelConfig) -> ModelConfig:
    """The feed-forward width that brings the subspace model to the dense one's number of parameters."""
    budget, ffn = Arm(dense(base, 0.0)).parameters, base.ffn
    while Arm(attrs.evolve(base, ffn=ffn + 8)).parameters <= budget:
        ffn += 8
    return attrs.evolve(base, ffn=ffn)


def arms(base: ModelConfig) -> dict[str, Arm]:
    """All arms of a size; the part of a name before ``/`` is its group."""
    constrained = attrs.evolve(base, variant="constrained")
    table = {
        "subspace": Arm(base),
        "dense/small-embedding": Arm(dense(base, 0.0)),
        "dense/loud-embedding": Arm(dense(base, base.f_scale)),
        "constrained/fixed": Arm(constrained),
        "constrained/moving": Arm(constrained, move_every=50),
        "ffn/wider": Arm(wider(base)),
        "tail/full-rank": Arm(attrs.evolve(base, full_rank_tail=True)),
    }
    for scale in (0.02, 0.1, 0.3, 1.0, 2.0, 5.0):
        table[f"scale/{scale}"] = Arm(attrs.evolve(base, f_scale=scale))
    for scale in (0.02, 0.1, 1.0, 3.0):
        table[f"plain/{scale}"] = Arm(attrs.evolve(base, f_scale=scale), {}, PlainStage)
    pairs = (("bf16", "fp32"), ("int8", "fp32"), ("fp32", "bf16"), ("fp32", "int8"), ("int8", "int8"))
    for forward, backward in pairs:
        wires = {"wire_dtype": forward, "wire_dtype_backward": backward}
        table[f"wire/{forward}-{backward}"] = Arm(base, wires)
    return table


def training(arm: Arm, lr: float, seed: int, steps: int, batch: int) -> TrainingConfig:
    """The same schedule for every arm."""
    return TrainingConfig(
        seed=seed, lr=lr, target_batch=batch, warmup_steps=min(10, steps), total_steps=steps, **arm.training
    )


def summary(curves: list[Curve]) -> list[dict[str, Any]]:
    """A line an arm: its best learning rate by mean loss over seeds, and all of them."""
    lines = []
    for arm in dict.fromkeys(curve.arm for curve in curves):
        of_arm = [curve for curve in curves if curve.arm == arm]
        by_lr = {
            lr: [curve.loss for curve in of_arm if curve.lr == lr] for lr in sorted({c.lr for c in of_arm})
        }
        means = {lr: sum(losses) / len(losses) for lr, losses in by_lr.items()}
        best = min(means, key=lambda lr: means[lr])
        lines.append(
            {
                "arm": arm,
                "parameters": of_arm[0].parameters,
                "best": round(means[best], 3),
                "best_lr": best,
                "all": {f"{lr:g}": [round(loss, 3) for loss in losses] for lr, losses in by_lr.items()},
            }
        )
    return lines


@click.command(help=__doc__)
@click.option("--arm", "chosen", multiple=True, help="An arm or a group of arms; all if not given.")
@click.option("--size", type=click.Choice(list(SIZES)), default="small")
@click.option("--steps", default=300)
@click.option("--batch", default=16, help="Sequences a step.")
@click.option("--lr", "lrs", multiple=True, type=float, default=LRS)
@click.option("--seed", "seeds", multiple=True, type=int, default=(1,))
@click.option("--minutes", default=float("inf"), help="Begin no run after so many.")
@click.option("--device", default="cpu")
@click.option("--json", "as_json", is_flag=True, help="One JSON line a run and one an arm.")
def main(
    chosen: tuple[str, ...], size: str, steps: int, batch: int, lrs: tuple[float, ...],
    seeds: tuple[int, ...], minutes: float, device: str, as_json: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    table = arms(SIZES[size])
    names = [name for name in table if not chosen or name in chosen or name.split("/")[0] in chosen]
    if not names:
        raise click.UsageError(f"no such arm; there are {', '.join(table)}")
    began = time.monotonic()
    curves: list[Curve] = []
    for seed in seeds:
        source = Source(None, SIZES[size].seq, seed)
        for name in names:
            for lr in lrs:
                if time.monotonic() - began > 60 * minutes:
                    break
                arm = table[name]
                how = training(arm, lr, seed, steps, batch)
                curve = train(name, arm.model, how, source, arm.stage, device, arm.move_every)
                curves.append(attrs.evolve(curve, parameters=arm.parameters))
                show(as_json, attrs.asdict(curves[-1]), f"{name:24} lr {lr:<7g} seed {seed} {curve.loss:.3f}")
    for line in summary(curves):
        text = f"{line['arm']:24} {line['parameters']:>9} best {line['best']:.3f} at {line['best_lr']:g}"
        show(as_json, line, text)


def show(as_json: bool, line: dict[str, Any], text: str) -> None:
    """A line for programs or for people, at once."""
    print(json.dumps(line) if as_json else text, flush=True)


if __name__ == "__main__":
    main()
