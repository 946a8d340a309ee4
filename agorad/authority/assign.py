"""Which stage a newcomer gets: the least replicated one that its machine can hold.

Pure and torch-free. ``stage_needs`` states once, by the formulas of ``stage.memory``, what each stage needs
in each mode and how much it sends; ``choose_stage`` picks, and explains the pick in a sentence for the user.
Rules, in this order: the stage asked for; the stage the node had, or was told in the queue, while no other
is shorter of replicas by two or more (what it holds of the state is worth that); the fewest replicas; of
several, by bandwidth: a machine slower than the run's usual one goes where the least is sent, a faster one
where the most is; the lowest number. A machine that does not say how much memory it has (0) is taken to hold
everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from agorad.authority.admission import refusal
from agorad.authority.messages import Facts
from p2p.errors import Refused
from stage.config import ModelConfig, TrainingConfig
from stage.memory import (
    Dtype,
    Graph,
    Mode,
    OptimizerPlace,
    gradient_bytes,
    round_bytes,
    stage_memory,
    wire_bytes,
)

GIB: Final = 1 << 30
_OPTIMIZERS: Final[tuple[OptimizerPlace, ...]] = ("device", "8bit", "host")
"""As a worker's settings, the default first."""
_GRAPHS: Final[tuple[Graph, ...]] = ("retain", "recompute")


@attrs.frozen
class Need:
    """Bytes that one replica of a stage needs with one kind of optimizer, its graphs made again."""

    optimizer: OptimizerPlace
    vram: int
    """With a GPU."""
    ram: int
    """Beside a GPU."""
    cpu: int
    """Without one, all of it host memory."""


@attrs.frozen
class StageNeeds:
    """What one stage asks of a machine."""

    needs: tuple[Need, ...]
    traffic: int
    """Bytes sent a step of the run: boundaries of a batch and a slice's average. For comparing stages."""

    def mode_for(self, facts: Facts) -> Need | None:
        """The first mode that the machine can hold; None if there is none."""
        return next((need for need in self.needs if _holds(need, facts)), None)


@attrs.frozen
class Choice:
    """A stage, and why it is that one."""

    stage: int
    why: str


def stage_needs(model: ModelConfig, training: TrainingConfig) -> tuple[StageNeeds, ...]:
    """For every stage of a run; computed once a manifest."""
    last = model.stages - 1
    batch = max(1, training.target_batch)
    return tuple(
        StageNeeds(
            needs=tuple(_need(model, training, stage, optimizer) for optimizer in _OPTIMIZERS),
            traffic=batch * (wire_bytes(model, training) if stage < last else 0)
            + batch * (wire_bytes(model, training, backward=True) if stage > 0 else 0)
            + round_bytes(model, training, stage)
            + sum(gradient_bytes(model, training, stage)),
        )
        for stage in range(model.stages)
    )


def choose_stage(
    stages: Sequence[StageNeeds],
    replicas: Mapping[int, int],
    facts: Facts,
    *,
    wanted: int | None = None,
    before: int | None = None,
    held: bool = False,
    promised: int | None = None,
    mbps: float | None = None,
    usual_mbps: float | None = None,
) -> Choice:
    """The stage a node gets. ``Refused`` for one that the run does not have or the machine cannot hold.

    ``before``: where it was. ``held``: where this very process has its place, however many are there by
    now: who asks again because an answer was lost gets the same answer.
    """
    count = len(stages)
    if wanted is not None and wanted >= count:
        raise refusal("wrong_stage", f"the run has stages 0 to {count - 1}; there is no stage {wanted}")
    modes = {index: mode for index, needs in enumerate(stages) if (mode := needs.mode_for(facts)) is not None}
    if wanted is not None:
        if wanted not in modes:
            raise _too_small(stages, [wanted], facts)
        return Choice(wanted, f"stage {wanted}, as this node asked{_memory(modes[wanted], facts)}")
    if held and before in modes:
        return Choice(before, f"stage {before}, which this node has already{_memory(modes[before], facts)}")
    if not modes:
        raise _too_small(stages, range(count), facts)
    easiest = min(_OPTIMIZERS.index(mode.optimizer) for mode in modes.values())
    # Where the default settings do, others are not asked for.
    able = [stage for stage, mode in modes.items() if _OPTIMIZERS.index(mode.optimizer) == easiest]
    fewest = min(replicas.get(stage, 0) for stage in able)
    if before in able and replicas.get(before, 0) <= fewest + 1:
        return Choice(before, f"stage {before}, where this node was before{_memory(modes[before], facts)}")
    if promised in able and replicas.get(promised, 0) <= fewest + 1:
        return Choice(
            promised, f"stage {promised}, as foreseen in the queue{_memory(modes[promised], facts)}"
        )
    short = [stage for stage in able if replicas.get(stage, 0) == fewest]
    stage, because = _by_bandwidth(stages, short, mbps, usual_mbps)
    among = (
        f"the {count} stages" if len(able) == count else f"the {len(able)} stages that this machine can hold"
    )
    nodes = "node" if fewest == 1 else "nodes"
    return Choice(
        stage, f"stage {stage}: with {fewest} other {nodes} it has the fewest of {among}{because}"
        f"{_memory(modes[stage], facts)}"
    )  # fmt: skip


def _by_bandwidth(
    stages: Sequence[StageNeeds], short: Sequence[int], mbps: float | None, usual: float | None
) -> tuple[int, str]:
    if mbps is None or usual is None or len({stages[stage].traffic for stage in short}) == 1:
        return short[0], ""
    if mbps < usual:
        stage = min(short, key=lambda stage: (stages[stage].traffic, stage))
        return stage, f"; of those it sends least, which suits a line of {mbps:.0f} Mbit/s"
    stage = min(short, key=lambda stage: (-stages[stage].traffic, stage))
    return stage, f"; of those it sends most, which a line of {mbps:.0f} Mbit/s can bear"


def _need(model: ModelConfig, training: TrainingConfig, stage: int, optimizer: OptimizerPlace) -> Need:
    gpu = _least(model, training, stage, "bf16", optimizer)
    cpu = [
        memory.vram_bytes + memory.host_bytes
        for graph in _GRAPHS
        for memory in [stage_memory(model, training, stage, Mode("fp32", optimizer, graph), device="cpu")]
    ]
    return Need(optimizer, gpu[0], gpu[1], min(cpu))


def _least(
    model: ModelConfig, training: TrainingConfig, stage: int, dtype: Dtype, optimizer: OptimizerPlace
) -> tuple[int, int]:
    return min(
        (memory.vram_bytes, memory.host_bytes)
        for graph in _GRAPHS
        for memory in [stage_memory(model, training, stage, Mode(dtype, optimizer, graph))]
    )


def _holds(need: Need, facts: Facts) -> bool:
    ram = facts.ram_gib * GIB
    if not facts.vram_gib:
        return not ram or need.cpu <= ram
    return need.vram <= facts.vram_gib * GIB and (not ram or need.ram <= ram)


def _memory(need: Need, facts: Facts) -> str:
    if facts.vram_gib:
        text = f"; it needs {need.vram / GIB:.1f} of {facts.vram_gib:.1f} GiB GPU memory"
    elif facts.ram_gib:
        text = f"; it needs {need.cpu / GIB:.1f} of {facts.ram_gib:.1f} GiB memory"
    else:
        return ""
    return text if need.optimizer == "device" else f'{text} with compute.optimizer = "{need.optimizer}"'


def _too_small(stages: Sequence[StageNeeds], which: Sequence[int], facts: Facts) -> Refused:
    needs = [need for stage in which for need in stages[stage].needs]
    what = f"stage {which[0]} needs" if len(which) == 1 else "the smallest stage needs"
    if facts.vram_gib:
        least = min(needs, key=lambda need: (need.vram, need.ram))
        if least.vram <= facts.vram_gib * GIB:
            return refusal(
                "ram_too_small",
                f"{what} {least.ram / GIB:.1f} GiB of memory beside the GPU, and this machine has "
                f"{facts.ram_gib:.1f} GiB",
            )
        return refusal(
            "vram_too_small",
            f"{what} {least.vram / GIB:.1f} GiB of GPU memory, and this machine has {facts.vram_gib:.1f} GiB",
        )
    least_cpu = min(need.cpu for need in needs)
    return refusal(
        "ram_too_small",
        f"{what} {least_cpu / GIB:.1f} GiB of memory on a CPU, and this machine has {facts.ram_gib:.1f} GiB",
    )
