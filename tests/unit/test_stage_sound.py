"""Weights that are not finite, or absurd: found in the replica that has them, whoever sends it what."""

from __future__ import annotations

import contextlib

import pytest
import torch

from p2p.errors import Refused
from p2p.identity import Identity
from stage.compute import StageCompute
from stage.config import ModelConfig, TrainingConfig
from stage.messages import BASIS, Request
from stage.passes import NOT_FINITE
from stage.ticket import Ticket

MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=16, layers=(1, 1, 1))


def replica(stage: int) -> StageCompute:
    return StageCompute(MODEL, TrainingConfig(seed=1), stage)


def spoil(compute: StageCompute, value: float) -> None:
    """One weight of each kilobyte, as a broken memory would."""
    compute.weights.writable()[::256] = value
    compute.weights.refresh()


def work(compute: StageCompute, c: torch.Tensor) -> None:
    trainer = Identity.generate(bytes(32)).peer_id
    ticket = Ticket(run="run", trainer=trainer, kind="train", shard=0, position=0, ids_hash=b"", weight=1.0)
    request = Request(
        ticket=ticket, tokens=MODEL.seq, documents=[], dtype="fp32", dtype_back="fp32", basis=BASIS,
        path=[], clock=[], deadline_s=1.0, inline=True,
    )  # fmt: skip
    ids = torch.arange(MODEL.seq + 1, dtype=torch.int32).numpy().data.cast("B")
    held = compute.forward(request, ids, c.contiguous().numpy().data.cast("B"))
    if compute.stage.is_tail:
        compute.backward(held, memoryview(b""))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_spoilt_weights_are_found_and_refuse_work(stage: int, value: float) -> None:
    compute = replica(stage)
    c = torch.randn(MODEL.seq, MODEL.k) if stage else torch.empty(0)
    assert compute.sound()
    work(compute, c)
    spoil(compute, value)
    assert not compute.sound()
    with pytest.raises(Refused) as refused:
        work(compute, c)
    assert refused.value.code == NOT_FINITE


@pytest.mark.parametrize("stage", [1, 2])
def test_numbers_of_others_do_not_make_our_weights_unsound(stage: int) -> None:
    compute = replica(stage)
    with contextlib.suppress(Refused):
        work(compute, torch.full((MODEL.seq, MODEL.k), 3e38))
    assert compute.sound()
