"""What runs on the device thread: forward, backward, step, slice pack and merge of one stage.

``StageCompute`` joins model, weights and optimizer under the rules that keep them honest, and those of the
passes (``stage.passes``):

- The accumulator's count of samples changes in the same job as the accumulator.
- A merge adds what a round taught to weights that have moved on since the slice was packed; if the whole
  state was replaced meanwhile, there is nothing left to add it to.

All methods are for the device thread, except ``HeldMicrobatch.release``. Torch lives here, trio does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from p2p.averaging import Outcome
from p2p.errors import LocalError
from p2p.event import Emit, ignore
from p2p.identity import PeerId
from stage import boundary, genesis, likeliest
from stage.config import ModelConfig, TrainingConfig
from stage.events import BadGradient, Computing
from stage.memory import Memory
from stage.merging import Merger, PackedSlice
from stage.messages import Request
from stage.microbatch import Shape
from stage.model import Stage
from stage.optimizer import Held as HeldState
from stage.optimizer import Optimizer, StepTaken
from stage.passes import HeldMicrobatch, Passes
from stage.placement import compiles, compute_dtype, memory_budget
from stage.powersgd import Contribution, PowerSGD, Projected
from stage.settings import ComputeSettings
from stage.snapshot import State
from stage.weights import CHUNK, MAX_VERSIONS

FIRST_GRAPHS = 8
"""Graphs that have room before copies of the weights do; more of them have what the copies leave."""


def wire_shape(model: ModelConfig, training: TrainingConfig, stage: int) -> Shape:
    """Sizes of everything that a replica of this stage sends and receives."""
    forward = boundary.payload_bytes(model.seq, model.k, training.wire_dtype)
    backward = boundary.payload_bytes(model.seq, model.k, training.wire_dtype_backward)
    head, tail = stage == 0, stage == model.stages - 1
    return Shape(
        stage=stage,
        stages=model.stages,
        tokens=model.seq,
        ids_bytes=4 * (model.seq + 1),
        c_bytes=0 if head else forward,
        dc_bytes=0 if head else backward,
        next_back_bytes=0 if tail else backward,
        likeliest_bytes=likeliest.wire_bytes(model.vocab),
        dtype=training.wire_dtype,
        dtype_back=training.wire_dtype_backward,
    )


class StageCompute:
    """See the module's docstring."""

    def __init__(
        self,
        model: ModelConfig,
        training: TrainingConfig,
        stage: int,
        *,
        settings: ComputeSettings = ComputeSettings(),
        device: torch.device | str = "cpu",
        in_flight: int = 8,
        emit: Emit = ignore,
    ) -> None:
        self.model = model
        self.training = training
        self.index = stage
        self.settings = settings
        self.device = torch.device(device)
        self.dtype = compute_dtype(settings.dtype, self.device)
        self.in_flight = in_flight
        self.stage = Stage(model, stage, training.seed, dtype=self.dtype, device=self.device)
        self.weights = genesis.genesis(
            model, stage, training.seed,
            device=self.device, compute_dtype=self.dtype, host=settings.optimizer == "host",
        )  # fmt: skip
        self.optimizer = Optimizer(
            self.weights, training, stage=stage, stages=model.stages,
            kind=settings.optimizer, basis=self.stage.U, emit=emit,
        )  # fmt: skip
        self._merger = Merger(training, self.weights, stage)
        self._powersgd: PowerSGD | None = None
        if training.averaging == "powersgd":
            rank, gradient = training.powersgd_rank, self.weights.gradient
            self._powersgd = PowerSGD(self.weights.layout, rank, training.seed, gradient)
        self._emit = emit
        if compiles(settings.compile, self.device):
            self.stage.compile()
        retain = 0 if settings.graph == "recompute" else in_flight
        self.passes = Passes(self.stage, self.weights, training, model, device=self.device, retain=retain)
        self.graph_bytes = 0
        """Of one retained graph, once ``warm_up`` has measured it."""
        self.peak_bytes = 0
        """What a microbatch needs at most while it is computed layer by layer, as measured."""
        self.samples = 0
        """Samples in the accumulator."""
        self.last_step: StepTaken | None = None
        """The last update that was made."""
        self._generation = 0
        """Grows when the whole state is replaced."""

    # Microbatches

    def forward(self, request: Request, ids: memoryview, c: memoryview) -> HeldMicrobatch:
        """One forward pass. Raises RemoteError if ids or ``c`` are not what they should be."""
        return self.passes.forward(request, ids, c)

    def backward(self, held: HeldMicrobatch, dc: memoryview) -> Any:
        """Adds the gradient of a microbatch; the packed gradient of ``c_in`` (empty at the head).

        Raises RemoteError on a gradient that is not finite, before anything is added; Refused where the loss
        that a tail computes is not.
        """
        self.passes.backward(held, dc)
        self.samples += 1
        return self.passes.answer(held)

    def _make_writable(self) -> None:
        """Let go of graphs on old weights where the bound on versions asks for it, then wait for readers
        that there is no room to copy for: the one snapshot that is being written."""
        self.passes.make_room()
        self.optimizer.wait_for_readers()

    # Steps and slices

    def configure(self, training: TrainingConfig) -> None:
        """Take up settings of a newer manifest, between two steps; what slices and wire follow from stays."""
        self.training = training
        self.optimizer.configure(training)
        self._merger.configure(training)

    def step(self, step: int) -> int:
        """The clock reached ``step``: how many samples the update used."""
        self._make_writable()
        taken = self.optimizer.step(step, self.samples)
        if taken.outcome == "updated":
            self.last_step = taken
        if taken.outcome in ("updated", "not finite"):
            self.samples = 0
        return taken.samples if taken.outcome == "updated" else 0

    def forget(self) -> None:
        """Throw away what is accumulated: the replica fell behind and its gradients with it."""
        if self.samples or self._powersgd is not None:
            self.weights.zero_gradient()
            self.samples = 0

    # Synchronous steps; see ``stage.synchronous``

    def project(self, step: int) -> Projected:
        """What the first round of the update that leads to ``step`` averages."""
        assert self._powersgd is not None
        return self._powersgd.project(self._to_average(step))

    def contribute(self, step: int, first: Outcome | None, weigh: bool) -> Contribution:
        """What its second round averages; ``first``: what the first brought, None where there was none."""
        assert self._powersgd is not None
        mean = torch.frombuffer(first.vector, dtype=torch.float32) if first else torch.zeros(0)
        samples = self._to_average(step) if weigh else 0
        sent = self._powersgd.contribute(mean, first.averaged if first else [], samples)
        return attrs.evolve(sent, generation=self._generation)

    def step_averaged(self, step: int, sent: Contribution, outcome: Outcome, me: PeerId) -> int:
        """Take the update with the mean that ``outcome`` holds: own samples that are in it.

        Raises LocalError if the whole state was replaced since ``contribute``.
        """
        assert self._powersgd is not None
        if sent.generation != self._generation:
            raise LocalError("the state was replaced while the round went on")
        self._make_writable()
        ours = [(start, stop) for start, stop, members in outcome.contributors if me in members]
        mean = torch.frombuffer(outcome.vector, dtype=torch.float32)
        gradient = self._powersgd.finish(sent, mean, outcome.averaged, ours)
        used = sent.samples if ours else 0
        self.samples -= used
        self.last_step = self.optimizer.apply(step, gradient)
        return used

    def _to_average(self, step: int) -> int:
        """Samples of the accumulator that may leave it; one that is not finite is thrown away."""
        if self.samples and not self.optimizer.sound():
            self._emit(BadGradient(stage=self.index, step=step, samples=self.samples))
            self.forget()
        return self.samples if self.samples >= self.training.min_step_samples else 0

    def pack(self, number: int) -> PackedSlice:
        """Slice of round ``number``; ``merge`` or ``give_up`` has to follow."""
        return self._merger.pack(number, self._generation)

    def give_up(self, packed: PackedSlice) -> None:
        """The round of this slice brought nothing."""
        self._merger.give_up(packed)

    def merge(self, packed: PackedSlice, outcome: Outcome) -> float:
        """Merge what was averaged; relative distance of our slice to the average.

        Raises LocalError if the whole state was replaced since the slice was packed.
        """
        if packed.generation != self._generation:
            self._merger.give_up(packed)
            raise LocalError("the state was replaced while the round went on")
        self._make_writable()
        average = torch.frombuffer(outcome.vector, dtype=torch.float32)
        distance = _distance(packed.values, average, outcome.averaged)
        self._merger.merge(packed, average, outcome.averaged)
        self.optimizer.constrain()
        return distance

    def sound(self) -> bool:
        """Whether the weights are numbers to go on with: finite, and so is what they make of noise.

        What others send plays no part: huge numbers of theirs would not be our weights' fault.
        """
        vectors = [self.weights.flat]
        if self.weights.compute is not None:
            vectors.append(self.weights.compute)
        for vector in vectors:
            if not all(bool(torch.isfinite(part).all()) for part in torch.split(vector, CHUNK)):
                return False
        return self.passes.sound()

    # Memory

    def memory(self) -> Memory:
        """Bytes by component as they are now, named as in ``stage.memory``."""
        weights, optimizer = self.weights, self.optimizer
        device = {
            "compute": 0 if weights.compute is None else weights.compute.nbytes,
            "gradients": weights.gradient.nbytes,
            "activations": self.passes.graphs * self.graph_bytes + self.passes.input_bytes,
        }
        on_host = self.settings.optimizer == "host"
        masters = {"weights": weights.flat.nbytes, "optimizer": optimizer.moments.nbytes}
        if self._powersgd is not None:
            device["factors"] = self._powersgd.nbytes
        if self._merger.drift is not None:
            masters["drift"] = self._merger.drift.nbytes
        if on_host and optimizer.staging is not None:
            return Memory(device, {**masters, "staging": optimizer.staging.nbytes})
        return Memory({**masters, **device}, {})

    def warm_up(self) -> Computing:
        """Run one microbatch of noise, measure it, and decide how many graphs may wait; before serving.

        With ``graph = auto`` as many graphs are retained as fit the budget beside everything else; old
        versions of the weights and copies of the state for readers have what the first few of them leave.
        """
        self.graph_bytes, self.peak_bytes = self.passes.measure()
        self.weights.zero_gradient()
        return self._decide()

    def _decide(self) -> Computing:
        memory, weights = self.memory(), self.weights
        on_cpu = self.device.type == "cpu"
        fixed = memory.vram_bytes + (memory.host_bytes if on_cpu else 0)
        budget = memory_budget(self.settings.memory_gib, self.device)
        room = budget - fixed - self.peak_bytes
        wanted = 1 if self.stage.is_tail else self.in_flight
        if self.settings.graph == "auto":
            self.passes.retain = min(wanted, FIRST_GRAPHS, max(0, room // max(1, self.graph_bytes)))
        room = max(0, room - self.passes.retain * self.graph_bytes)
        copy = weights.flat.nbytes + self.optimizer.moments.nbytes
        if self.settings.optimizer == "host" and not on_cpu:
            weights.max_copies = 0  # host memory is what this mode is short of
        else:
            weights.max_copies = int(room >= copy)
            room -= weights.max_copies * copy
        version = weights.flat.nbytes if weights.compute is None else weights.compute.nbytes
        shared = int(weights.compute is None and weights.max_copies > 0)
        weights.max_versions = min(MAX_VERSIONS, shared + room // version)
        room -= max(0, weights.max_versions - shared) * version
        if self.settings.graph == "auto":
            self.passes.retain = min(wanted, self.passes.retain + room // max(1, self.graph_bytes))
        return Computing(
            stage=self.index,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            optimizer=self.settings.optimizer,
            graphs=self.passes.retain,
            versions=weights.max_versions,
            fixed_bytes=fixed,
            graph_bytes=self.graph_bytes,
            peak_bytes=self.peak_bytes,
            budget_bytes=budget,
        )

    # State

    @property
    def floats(self) -> int:
        """Size of the flat weights."""
        return self.weights.layout.size

    @property
    def fingerprint(self) -> str:
        """Of the layout: a state with another one does not fit."""
        return self.weights.layout.fingerprint

    def hold(self, step: int) -> HeldState:
        """The state as it is now, that of ``step``, for a reader on another thread; release it here."""
        return self.optimizer.hold(step)

    def load(self, state: State) -> None:
        """Replace the whole state. Raises LocalError if it does not fit this stage."""
        self.passes.drop_graphs()
        self.optimizer.load(state.vectors, state.updates, state.fingerprint)
        self.forget()
        self._merger.forget()
        self._generation += 1


def _distance(own: Tensor, average: Tensor, ranges: Sequence[tuple[int, int]]) -> float:
    """‖own − average‖ / ‖average‖ over the averaged ranges of floats."""
    apart = norm = 0.0
    for start, stop in ranges:
        for at in range(start, stop, CHUNK):
            part = slice(at, min(at + CHUNK, stop))
            apart += float((own[part] - average[part]).square().sum())
            norm += float(average[part].square().sum())
    return (apart / norm) ** 0.5 if norm else 0.0
