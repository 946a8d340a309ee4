"""Presets have the sizes that they are known for; their stages can be made."""

import attrs
import pytest
import torch

from p2p.errors import LocalError
from stage import presets
from stage.genesis import genesis
from stage.model import Stage, TailLoss
from stage.parameters import forward_flops, parameter_count, parameter_specs


def test_8b_has_the_parameters_of_the_reference() -> None:
    model, _ = presets.preset("8b")
    on_meta = [
        sum(torch.empty(spec.shape, device="meta").numel() for spec in parameter_specs(model, stage))
        for stage in range(model.stages)
    ]
    assert on_meta == [1_366_411_008, *[906_579_968] * 5, 2_732_856_320]
    assert sum(on_meta) == 8_632_167_168


def test_8b_takes_the_flops_of_the_reference() -> None:
    """13.2, 8.80 and 24.5 TFLOP a sequence."""
    model, _ = presets.preset("8b")
    forward = [forward_flops(model, stage) / 1e12 for stage in (0, 1, 6)]
    assert forward == pytest.approx([13.2, 8.80, 24.5], rel=0.01)


@pytest.mark.parametrize(("name", "millions"), [("demo", 0.66), ("100m", 110), ("1b", 880), ("8b", 8632)])
def test_sizes(name: str, millions: float) -> None:
    model, training = presets.preset(name)
    total = sum(parameter_count(model, stage) for stage in range(model.stages))
    assert total / 1e6 == pytest.approx(millions, rel=0.25)
    assert training.warmup_steps <= training.total_steps


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_stage_of_every_kind_works_in_small(name: str) -> None:
    model, _ = presets.preset(name, layers=(1, 1, 1))
    model = attrs.evolve(
        model, vocab=64, d=32, k=4, heads=4, kv_heads=2, head_dim=8, ffn=32, seq=8, layers=(1, 1, 1)
    )
    state = None
    for index in range(3):
        named = genesis(model, index, 1).named()
        state = Stage(model, index, 1).forward(named, torch.arange(9).unsqueeze(0), state)
    assert isinstance(state, TailLoss)
    assert bool(state.losses.isfinite().all())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(LocalError, match="no preset '9b'"):
        presets.preset("9b")


def test_steps_shorten_the_warm_up() -> None:
    _, training = presets.preset("8b", steps=100)
    assert (training.total_steps, training.warmup_steps) == (100, 100)
