"""Stages for newcomers: what a machine can hold, where replicas are missing, and a sentence about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agorad.authority.assign import GIB, Need, StageNeeds, choose_stage, stage_needs
from agorad.authority.messages import Facts
from p2p.errors import Refused
from stage.config import ModelConfig, TrainingConfig
from stage.memory import Mode, stage_memory
from stage.presets import preset


def _stage(gib: float, *, traffic: int = 0) -> StageNeeds:
    need = Need("device", int(gib * GIB), 4 * GIB, int(3 * gib * GIB))
    lean = Need("host", int(gib * GIB / 2), 16 * GIB, int(4 * gib * GIB))
    return StageNeeds((need, lean), traffic)


STAGES = (_stage(20), _stage(10), _stage(30))
BIG, MIDDLE, SMALL = (Facts(vram_gib=gib, ram_gib=32) for gib in (40, 24, 12))


@pytest.mark.parametrize(
    ("facts", "replicas", "stage"),
    [
        (BIG, {}, 0),
        (BIG, {0: 1, 1: 1}, 2),
        (BIG, {0: 2, 1: 1, 2: 3}, 1),
        (MIDDLE, {0: 5, 1: 4}, 1),  # stage 2 has none, and this machine cannot hold it
        (MIDDLE, {0: 3, 1: 4}, 0),
        (SMALL, {1: 9}, 1),
        (Facts(), {0: 1}, 1),  # says nothing of itself: held to hold all
    ],
)
def test_the_least_replicated_stage_that_the_machine_holds(
    facts: Facts, replicas: dict[int, int], stage: int
) -> None:
    choice = choose_stage(STAGES, replicas, facts)
    assert choice.stage == stage
    assert f"stage {stage}" in choice.why
    if facts.vram_gib:
        assert f"of {facts.vram_gib:.1f} GiB GPU memory" in choice.why


def test_a_lean_optimizer_is_named_where_only_it_fits() -> None:
    choice = choose_stage((_stage(20),), {}, SMALL)
    assert choice.why.endswith('10.0 of 12.0 GiB GPU memory with compute.optimizer = "host"')
    assert choose_stage(STAGES, {1: 9}, SMALL).stage == 1  # rather than 0 with another optimizer


def test_what_cannot_be_held_is_refused_with_figures() -> None:
    with pytest.raises(Refused) as no:
        choose_stage(STAGES, {}, Facts(vram_gib=4, ram_gib=64))
    assert no.value.code == "vram_too_small"
    assert "the smallest stage needs 5.0 GiB of GPU memory, and this machine has 4.0 GiB" in no.value.why
    with pytest.raises(Refused) as no:
        choose_stage(STAGES, {}, Facts(vram_gib=40, ram_gib=2))
    assert no.value.code == "ram_too_small"
    with pytest.raises(Refused) as no:
        choose_stage(STAGES, {}, Facts(ram_gib=8))
    assert no.value.code == "ram_too_small"
    assert "30.0 GiB of memory on a CPU" in no.value.why
    with pytest.raises(Refused) as no:
        choose_stage(STAGES, {}, SMALL, wanted=2)
    assert no.value.code == "vram_too_small"
    assert "stage 2 needs 15.0 GiB" in no.value.why
    with pytest.raises(Refused) as no:
        choose_stage(STAGES, {}, BIG, wanted=3)
    assert no.value.code == "wrong_stage"


def test_wishes_and_history_count_within_reason() -> None:
    assert choose_stage(STAGES, {2: 9}, BIG, wanted=2).stage == 2
    assert choose_stage(STAGES, {2: 1}, BIG, before=2).stage == 2
    assert choose_stage(STAGES, {2: 2}, BIG, before=2).stage == 0
    assert choose_stage(STAGES, {1: 1}, BIG, promised=1).stage == 1
    assert choose_stage(STAGES, {1: 2}, BIG, promised=1).stage == 0
    assert choose_stage(STAGES, {}, MIDDLE, before=2).stage == 0


def test_bandwidth_breaks_ties() -> None:
    stages = (_stage(1, traffic=50), _stage(1, traffic=100), _stage(1, traffic=20))
    assert choose_stage(stages, {}, BIG, mbps=50, usual_mbps=100).stage == 2
    assert choose_stage(stages, {}, BIG, mbps=200, usual_mbps=100).stage == 1
    assert choose_stage(stages, {2: 1}, BIG, mbps=50, usual_mbps=100).stage == 0
    assert choose_stage(stages, {}, BIG, mbps=50).stage == 0
    assert "50 Mbit/s" in choose_stage(stages, {}, BIG, mbps=50, usual_mbps=100).why


def test_needs_are_those_of_the_plan() -> None:
    model, training = preset("8b")
    needs = stage_needs(model, training)
    assert len(needs) == model.stages
    for stage, one in enumerate(needs):
        lean = stage_memory(model, training, stage, Mode("bf16", "device", "recompute"))
        assert (one.needs[0].vram, one.needs[0].ram) == (lean.vram_bytes, lean.host_bytes)
    assert needs[-1].traffic < needs[1].traffic  # one boundary less


@given(
    st.lists(st.integers(0, 20), min_size=3, max_size=3),
    st.sampled_from([BIG, MIDDLE, SMALL, Facts()]),
    st.none() | st.integers(0, 2),
    st.none() | st.floats(1, 1000),
)
def test_no_choice_is_worse_than_the_best_by_two(
    counts: list[int], facts: Facts, before: int | None, mbps: float | None
) -> None:
    replicas = dict(enumerate(counts))
    choice = choose_stage(STAGES, replicas, facts, before=before, mbps=mbps, usual_mbps=100.0)
    able = [i for i, gib in enumerate((20, 10, 30)) if not facts.vram_gib or gib <= facts.vram_gib]
    assert choice.stage in able
    assert replicas[choice.stage] <= min(replicas[i] for i in able) + (before is not None)


def test_filling_a_run_keeps_stages_even() -> None:
    model = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1, 1))
    needs = stage_needs(model, TrainingConfig(seed=1))
    replicas: dict[int, int] = {}
    for _ in range(31):
        stage = choose_stage(needs, replicas, Facts(ram_gib=16)).stage
        replicas[stage] = replicas.get(stage, 0) + 1
    assert max(replicas.values()) - min(replicas.values()) == 1
