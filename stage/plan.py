"""What a run will need and reach, before anybody joins: memory, traffic, tokens a second. Torch-free.

Theory of operation. A replica of stage s spends on each of its sequences

    compute   (forward + 2 forward, + the layers' forward again with recomputation) / sustained FLOP/s
    step      the optimizer's pass over the weights, shared by the sequences that it took between two steps
    up, down  the bytes that it sends and receives, over its line: boundary payload of every sequence, and
              2 (n - 1) / n slices a round, shared by the sequences between two rounds

Compute, sending and receiving overlap, so the slowest of the three is its period; a stage's rate is the
sum of its replicas', the swarm's that of the slowest stage. Latency costs nothing as long as enough
microbatches are in flight; how many that takes, ``in_flight``, decides how many graphs wait.

``fit`` searches the cut of the layers. For every number of stages it starts with one layer each and gives
the next layer to the stage that is fastest with it (and still fits), which minimises the slowest stage's
time, since times only grow with layers. Of all numbers it takes the one with the least machine time a
sequence (stages × slowest period), and fewer stages where that costs less than ``FEWER``. 8-bit moments
are tried where no cut has room for exact ones, the host's memory where that is not enough either.

Assumptions, beside those of ``stage.memory`` and ``stage.hardware``: all machines alike, nobody leaves, the
trainer's line is no limit (it sends 4 bytes a token).
Limits: 256 stages, 4096 layers, as everywhere.
"""

from __future__ import annotations

import heapq
import math
from typing import Final, Literal

import attrs

from stage import memory
from stage.config import MAX_STAGES, ModelConfig, TrainingConfig, split_layers
from stage.hardware import GB, HOST_GB_S, PCIE_GB_S, Link, Machine, check
from stage.memory import DeviceKind, Dtype, Graph, Memory, Mode, OptimizerPlace
from stage.parameters import forward_flops, parameter_count

FEWER: Final = 0.05
"""Machine time that a cut in fewer stages may cost more."""
ROUND_S: Final = 30.0
"""What a round may take: as in ``stage.replica``."""
STEP_BYTES: Final[dict[OptimizerPlace, int]] = {"device": 40, "8bit": 28, "host": 8}
"""Bytes a weight that a step moves through the device's memory: masters, gradients (norm, clipping, update,
zeroing), moments and the compute copy, read and written."""
HOST_STEP_BYTES: Final = 28
"""Bytes a weight that a step on the host moves through its memory."""
OPTIMIZERS: Final[tuple[OptimizerPlace, ...]] = ("device", "8bit", "host")
GRAPHS: Final[tuple[Graph, ...]] = ("retain", "recompute")

MAX_IN_FLIGHT: Final = 1024
"""As many as ``worker.slots`` can be."""

Resource = Literal["compute", "up-link", "down-link"]


@attrs.frozen(kw_only=True)
class Setting:
    """What is planned, for which machines. Of ``optimizers`` and ``graphs`` the first that fits is taken."""

    model: ModelConfig
    training: TrainingConfig
    machine: Machine
    link: Link = attrs.Factory(Link)
    replicas: int = 2
    device: DeviceKind = "cuda"
    dtype: Dtype = "bf16"
    optimizers: tuple[OptimizerPlace, ...] = OPTIMIZERS
    graphs: tuple[Graph, ...] = GRAPHS

    def __attrs_post_init__(self) -> None:
        check("replicas", self.replicas, 1, 100_000)

    def modes(self) -> list[Mode]:
        """In order of preference: exact moments before a graph that waits, the host last."""
        return [Mode(self.dtype, place, graph) for place in self.optimizers for graph in self.graphs]


@attrs.frozen
class StagePlan:
    """One replica of a stage. Times are seconds a sequence of this replica, bytes those of a sequence."""

    stage: int
    layers: int
    params: int
    mode: Mode
    in_flight: int
    """Microbatches between its forward and its backward pass that keep it busy."""
    memory: Memory
    flops: int
    """Of one sequence, forward, backward and recomputation."""
    boundary_bytes: int
    """c of one sequence, at one boundary."""
    round_bytes: int
    """The slice that a round averages."""
    gradient_bytes: int
    """What the two rounds of a synchronous step average together; 0 without such steps."""
    up_bytes: float
    down_bytes: float
    compute_s: float
    step_s: float
    up_s: float
    down_s: float
    round_s: float
    """A round's own traffic, alone on the line."""

    @property
    def period_s(self) -> float:
        """Between two sequences of this replica."""
        return max(self.compute_s + self.step_s, self.up_s, self.down_s)

    @property
    def limit(self) -> Resource:
        """What the period is made of."""
        times: dict[Resource, float] = {
            "compute": self.compute_s + self.step_s,
            "up-link": self.up_s,
            "down-link": self.down_s,
        }
        return max(times, key=times.__getitem__)


@attrs.frozen
class Plan:
    """All stages, and what the swarm reaches."""

    setting: Setting
    stages: tuple[StagePlan, ...]

    @property
    def slowest(self) -> StagePlan:
        """The stage that the others wait for."""
        return max(self.stages, key=lambda stage: stage.period_s)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole swarm."""
        return self.setting.replicas * self.setting.model.seq / self.slowest.period_s

    @property
    def machine_s(self) -> float:
        """Machine seconds a sequence: what a cut costs, however many replicas there are."""
        return len(self.stages) * self.slowest.period_s

    @property
    def bottleneck(self) -> str:
        """Which stage, and what of it."""
        return f"stage {self.slowest.stage}: {self.slowest.limit}"


class DoesNotFit(Exception):  # noqa: N818
    """No mode of some stage fits; the sentence names stage, component and bytes."""


def plan(setting: Setting) -> Plan:
    """The plan of the model's own cut. Raises DoesNotFit."""
    stages = range(setting.model.stages)
    return Plan(setting, tuple(plan_stage(setting, stage, in_flight(setting, stage)) for stage in stages))


def plan_stage(setting: Setting, stage: int, count: int) -> StagePlan:
    """One stage, with ``count`` microbatches in flight, in the first mode that fits. Raises DoesNotFit."""
    needs = []
    for mode in setting.modes():
        need = memory.stage_memory(
            setting.model, setting.training, stage, mode, graphs=count, device=setting.device
        )
        if not excess(setting, need):
            return _timed(setting, stage, mode, count, need)
        needs.append((mode, need))
    raise DoesNotFit(_missing(setting, stage, needs))


def in_flight(setting: Setting, stage: int) -> int:
    """Microbatches that one replica of a stage holds so that nobody waits.

    One for each stage from here to the tail, and what is on the lines in between while each computes one.
    """
    model, link = setting.model, setting.link
    after = model.stages - 1 - stage
    layer, tail = (forward_flops(*_alone(model, 1, head=False, tail=last)) for last in (False, True))
    work = 3 * (layer * (sum(model.layers) - 1) + tail)
    period = work / model.stages / (setting.machine.tflops * 1e12)
    there = memory.wire_bytes(model, setting.training)
    back = memory.wire_bytes(model, setting.training, backward=True)
    hop_s = link.rtt_ms / 1000 + (there + back) / link.bytes_per_s
    return min(after + 1 + math.ceil(after * hop_s / period), MAX_IN_FLIGHT)


def excess(setting: Setting, need: Memory) -> dict[str, int]:
    """Bytes too many, by "VRAM" and "RAM"; empty if it fits. On a CPU all of it is RAM."""
    machine = setting.machine
    wanted = {"VRAM": need.vram_bytes, "RAM": need.host_bytes}
    if setting.device == "cpu":
        wanted = {"RAM": need.vram_bytes + need.host_bytes}
    room = {"VRAM": machine.vram_bytes, "RAM": machine.ram_bytes}
    return {
        name: math.ceil(size - limit)
        for name, size in wanted.items()
        if (limit := room[name]) is not None and size > limit
    }


def fit(setting: Setting) -> Plan:
    """The best cut of the model's layers for these machines. Raises DoesNotFit."""
    for allowed in range(1, len(setting.optimizers) + 1):
        exact = attrs.evolve(setting, optimizers=setting.optimizers[:allowed])
        best = _best_cut(exact)
        if best is not None:
            return best
    raise DoesNotFit(_why_not(setting))


def _best_cut(setting: Setting) -> Plan | None:
    """With any of the optimizers; None if no cut fits."""
    layers = sum(setting.model.layers)
    known: dict[tuple[bool, bool, int, int], float | None] = {}
    best: Plan | None = None
    for stages in range(1, min(layers, MAX_STAGES) + 1):
        cut = _cut(setting, stages, known)
        if cut is None:
            continue
        found = plan(attrs.evolve(setting, model=attrs.evolve(setting.model, layers=cut)))
        if best is None or found.machine_s < best.machine_s * (1 - FEWER):
            best = found
    return best


def _cut(
    setting: Setting, stages: int, known: dict[tuple[bool, bool, int, int], float | None]
) -> tuple[int, ...] | None:
    """Layers of every stage in the fastest cut in that many; None if none fits.

    ``known`` are the periods of stages by what decides them: head, tail, microbatches in flight, layers.
    """
    like = attrs.evolve(setting, model=attrs.evolve(setting.model, layers=_even(setting.model, stages)))
    waiting = [in_flight(like, stage) for stage in range(stages)]
    counts = [0] * stages
    heap: list[tuple[float, int]] = []

    def offer(stage: int) -> bool:
        """Put the stage with one more layer on the heap, if that fits."""
        head, tail, layers = stage == 0, stage == stages - 1, counts[stage] + 1
        key = head, tail, waiting[stage], layers
        if key not in known:
            model, index = _alone(setting.model, layers, head=head, tail=tail)
            try:
                alone = plan_stage(attrs.evolve(setting, model=model), index, waiting[stage])
                known[key] = alone.period_s
            except DoesNotFit:
                known[key] = None
        period = known[key]
        if period is not None:
            heapq.heappush(heap, (period, -stage))  # of equals the later: it holds fewer graphs
        return period is not None

    for stage in range(stages):
        if not offer(stage):
            return None
        counts[stage] = 1
    heap.clear()
    for stage in range(stages):
        offer(stage)
    for _ in range(sum(setting.model.layers) - stages):
        if not heap:
            return None
        stage = -heapq.heappop(heap)[1]
        counts[stage] += 1
        offer(stage)
    return tuple(counts)


def _even(model: ModelConfig, stages: int) -> tuple[int, ...]:
    return split_layers(sum(model.layers), stages)


def _alone(model: ModelConfig, layers: int, *, head: bool, tail: bool) -> tuple[ModelConfig, int]:
    """The smallest model that has a stage of that kind and size, and the stage's number in it."""
    cut = (*([] if head else [1]), layers, *([] if tail else [1]))
    return attrs.evolve(model, layers=cut), 0 if head else 1


def _timed(setting: Setting, stage: int, mode: Mode, count: int, need: Memory) -> StagePlan:
    """The stage's times in this mode."""
    model, training, link = setting.model, setting.training, setting.link
    machine, replicas = setting.machine, setting.replicas
    params = parameter_count(model, stage)
    forward = forward_flops(model, stage)
    again = forward if mode.graph == "recompute" else 0
    if again and stage == model.stages - 1:
        again -= 2 * model.seq * model.vocab * model.d  # the output matrix is not used twice
    flops = 3 * forward + again

    moved = STEP_BYTES[mode.optimizer] * params / (machine.bandwidth_gb_s * GB)
    if mode.optimizer == "host":
        crossing = 4 + memory.WIDTH[mode.dtype]
        moved += params * (HOST_STEP_BYTES / HOST_GB_S + crossing / PCIE_GB_S) / GB
    a_step = training.target_batch / replicas  # sequences of one replica

    slice_bytes = memory.round_bytes(model, training, stage)
    a_round = 2 * (replicas - 1) / replicas * slice_bytes
    averaging = a_round / (a_step * training.average_every)
    gradients = sum(memory.gradient_bytes(model, training, stage))
    averaging += 2 * (replicas - 1) / replicas * gradients / a_step
    there = memory.wire_bytes(model, training)
    back = memory.wire_bytes(model, training, backward=True)
    ids = 4 * (model.seq + 1)
    head, tail = stage == 0, stage == model.stages - 1
    up = averaging + (0 if tail else there + ids) + (0 if head else back)
    down = averaging + ids + (0 if head else there) + (0 if tail else back)
    return StagePlan(
        stage=stage,
        layers=model.layers[stage],
        params=params,
        mode=mode,
        in_flight=count,
        memory=need,
        flops=flops,
        boundary_bytes=there,
        round_bytes=slice_bytes,
        gradient_bytes=gradients,
        up_bytes=up,
        down_bytes=down,
        compute_s=flops / (machine.tflops * 1e12),
        step_s=moved / a_step,
        up_s=up / link.bytes_per_s,
        down_s=down / link.bytes_per_s,
        round_s=a_round / link.bytes_per_s,
    )


def _missing(setting: Setting, stage: int, needs: list[tuple[Mode, Memory]]) -> str:
    """Which stage does not fit, by how much, and which component is the largest."""
    mode, need = min(needs, key=lambda pair: sum(excess(setting, pair[1]).values()))
    short = excess(setting, need)
    name = max(short, key=short.__getitem__)
    parts = dict(need.host if name == "RAM" else need.device)
    if setting.device == "cpu":
        for part, size in need.device.items():
            parts[part] = parts.get(part, 0) + size
    largest = max(parts, key=parts.__getitem__)
    layers = setting.model.layers[stage]
    kind = "head" if stage == 0 else "tail" if stage == setting.model.stages - 1 else "body"
    total = sum(parts.values())
    return (
        f"stage {stage} (the {kind}, {layers} layer{'s' * (layers != 1)}) needs {total / GB:.2f} GB of "
        f"{name} even with {mode}: {short[name]} bytes too many; its largest component is {largest}, "
        f"{parts[largest]} bytes"
    )


def _why_not(setting: Setting) -> str:
    """Which stage does not fit even with a single layer."""
    layers = sum(setting.model.layers)
    stages = min(layers, MAX_STAGES)
    if stages == layers:
        setting = attrs.evolve(setting, model=attrs.evolve(setting.model, layers=(1,) * stages))
        for stage in {stages - 1, 0, stages // 2}:
            plan_stage(setting, stage, in_flight(setting, stage))
    return f"no cut of {layers} layers in at most {stages} stages fits these machines"
