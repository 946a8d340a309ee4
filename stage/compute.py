"""What runs on the device thread: forward, backward, step, slice pack and merge of one stage.

``StageCompute`` joins model, weights and optimizer under the rules that keep them honest:

- A microbatch's graph is retained from its forward to its backward pass, on the weights that it started
  with (copy-on-write, ``stage.weights``). If steps and merges would pile up more versions than are
  allowed, the graphs on old versions are dropped, and those microbatches run their forward pass again
  when their gradient comes: never on a mixture of old and new weights.
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
from stage import boundary, genesis, kernels
from stage.config import ModelConfig, TrainingConfig
from stage.messages import Request
from stage.microbatch import Shape
from stage.model import Stage, TailLoss, document_index
from stage.optimizer import Held as HeldState
from stage.optimizer import Optimizer
from stage.snapshot import State
from stage.weights import Version


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
        dtype=training.wire_dtype,
        dtype_back=training.wire_dtype_backward,
    )


class HeldMicrobatch:
    """A microbatch after its forward pass. ``c`` (packed) is for the caller; so is ``loss``, which the
    tail knows after the backward pass (of an evaluation, after the forward pass)."""

    def __init__(self, released: list[HeldMicrobatch], ids: Tensor, docs: Tensor | None, weight: float):
        self.loss = 0.0
        self.c: Any = b""
        self.ids = ids
        self.docs = docs
        self.weight = weight
        self.c_in: Tensor | None = None
        self.out: Tensor | TailLoss | None = None
        self.version: Version | None = None
        self._released = released

    def drop_graph(self) -> None:
        """Free the graph and its hold on the weights."""
        self.out = None
        if self.version is not None:
            self.version.release()
            self.version = None

    def release(self) -> None:
        """From any thread: the device thread lets go at its next job."""
        self._released.append(self)


@attrs.frozen
class PackedSlice:
    """A slice as it was when its round began."""

    index: int
    key: int
    values: Tensor
    """fp32, 1-D, on the CPU."""
    generation: int

    def buffer(self) -> memoryview:
        """The slice as little-endian fp32."""
        return self.values.numpy().data.cast("B")


class StageCompute:
    """See the module's docstring."""

    def __init__(
        self, model: ModelConfig, training: TrainingConfig, stage: int, *, emit: Emit = ignore
    ) -> None:
        self.model = model
        self.training = training
        self.index = stage
        self.stage = Stage(model, stage, training.seed)
        self.weights = genesis.genesis(model, stage, training.seed)
        self.optimizer = Optimizer(
            self.weights, training, stage=stage, stages=model.stages, basis=self.stage.U, emit=emit
        )
        self.samples = 0
        """Samples in the accumulator."""
        self._held: set[HeldMicrobatch] = set()
        self._released: list[HeldMicrobatch] = []
        self._generation = 0
        """Grows when the whole state is replaced."""

    # Microbatches

    def forward(self, request: Request, ids: memoryview, c: memoryview) -> HeldMicrobatch:
        """One forward pass. Raises RemoteError if ids or ``c`` are not what they should be."""
        self._sweep()
        tokens = boundary.unpack_ids(ids, request.tokens, self.model.vocab)
        docs = None
        if request.documents:
            docs = document_index(tuple(request.documents), request.tokens).unsqueeze(0)
        held = HeldMicrobatch(self._released, tokens.unsqueeze(0), docs, request.ticket.weight)
        if not self.stage.is_head:
            c_in = boundary.unpack(c, request.tokens, self.model.k, self.training.wire_dtype)
            held.c_in = c_in.unsqueeze(0)
        if request.ticket.kind == "train":
            self._held.add(held)
            self._run_forward(held)
            out = held.out
        else:
            with torch.no_grad():
                out = self.stage.forward(self.weights.named(), held.ids, held.c_in, docs=held.docs)
        if isinstance(out, TailLoss):
            if request.ticket.kind != "train":
                held.loss = float(out.losses[0])
        elif out is not None:
            held.c = boundary.pack(out.detach()[0], self.training.wire_dtype)
        return held

    def _run_forward(self, held: HeldMicrobatch) -> None:
        if held.c_in is not None:
            held.c_in = held.c_in.detach().requires_grad_()
        held.version = self.weights.begin()
        held.out = self.stage.forward(
            held.version.leaves, held.ids, held.c_in, docs=held.docs, weights=torch.tensor([held.weight])
        )

    def backward(self, held: HeldMicrobatch, dc: memoryview) -> Any:
        """Adds the gradient of a microbatch; the packed gradient of ``c_in`` (empty at the head).

        Raises RemoteError on a gradient that is not finite, before anything is added.
        """
        self._sweep()
        back = self.training.wire_dtype_backward
        gradient = None
        if not self.stage.is_tail:
            gradient = boundary.unpack(dc, self.model.seq, self.model.k, back).unsqueeze(0)
        if held.out is None:
            self._run_forward(held)
        if isinstance(held.out, TailLoss):
            held.out.backward()
            held.loss = float(held.out.losses[0])
        else:
            assert held.out is not None
            held.out.backward(gradient)  # type: ignore[no-untyped-call]
        held.drop_graph()
        self._held.discard(held)
        self.samples += 1
        if held.c_in is None:
            return b""
        assert held.c_in.grad is not None
        return boundary.pack(held.c_in.grad[0], back)

    def _sweep(self) -> None:
        while self._released:
            held = self._released.pop()
            held.drop_graph()
            self._held.discard(held)

    def _make_writable(self) -> None:
        """Let go of graphs on old weights where the bound on versions asks for it.

        What may still hold an old version after that is the one snapshot that is being written.
        """
        self._sweep()
        if not self.weights.can_write:
            for held in self._held:
                if held.version is not None and held.version.flat is not self.weights.flat:
                    held.drop_graph()

    # Steps and slices

    def step(self, step: int) -> int:
        """The clock reached ``step``: how many samples the update used."""
        self._make_writable()
        taken = self.optimizer.step(step, self.samples)
        if taken.outcome in ("updated", "not finite"):
            self.samples = 0
        return taken.samples if taken.outcome == "updated" else 0

    def forget(self) -> None:
        """Throw away what is accumulated: the replica fell behind and its gradients with it."""
        if self.samples:
            self.weights.zero_gradient()
            self.samples = 0

    def pack(self, number: int) -> PackedSlice:
        """Slice of round ``number``."""
        slices = self.training.slices
        cycle, index = divmod(number, slices)
        key = kernels.slice_key(self.training.seed, self.index, cycle)
        values = kernels.slice_pack(self.weights.flat, index, slices, key)
        return PackedSlice(index, key, values, self._generation)

    def merge(self, packed: PackedSlice, outcome: Outcome) -> float:
        """Merge what was averaged; relative distance of our slice to the average.

        Raises LocalError if the whole state was replaced since the slice was packed.
        """
        if packed.generation != self._generation:
            raise LocalError("the state was replaced while the round went on")
        self._make_writable()
        average = torch.frombuffer(outcome.vector, dtype=torch.float32)
        distance = _distance(packed.values, average, outcome.averaged)
        mode = self.training.merge
        assert mode != "ema"  # refused by the manifest
        kernels.slice_merge(
            self.weights.writable(), packed.values, average, packed.index, self.training.slices,
            packed.key, mode, outcome.averaged,
        )  # fmt: skip
        self.optimizer.constrain()
        return distance

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
        self._sweep()
        for held in self._held:
            held.drop_graph()
        self.optimizer.load(state.flat, state.exp_avg, state.exp_avg_sq, state.updates, state.fingerprint)
        self.forget()
        self._generation += 1


def _distance(own: Tensor, average: Tensor, ranges: Sequence[tuple[int, int]]) -> float:
    """‖own − average‖ / ‖average‖ over the averaged ranges of floats."""
    apart = norm = 0.0
    for start, stop in ranges:
        apart += float((own[start:stop] - average[start:stop]).square().sum())
        norm += float(average[start:stop].square().sum())
    return (apart / norm) ** 0.5 if norm else 0.0
