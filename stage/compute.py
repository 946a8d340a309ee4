"""What runs on the device thread: forward, backward, step, slice pack and merge of one stage.

``StageCompute`` joins model, weights and optimizer under the rules that keep them honest:

- As many microbatches as memory has room for retain their graph from the forward to the backward pass, on
  the weights that they started with (copy-on-write, ``stage.weights``). If steps and merges would pile up
  more versions than are allowed, the graphs on old versions are dropped. Microbatches without a graph are
  computed again when their gradient comes, layer by layer from what each layer was given, or all of it if
  the weights changed meanwhile: never on a mixture of old and new weights.
- The tail's two passes are one job at the commit, since nobody waits for its output in between.
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
from p2p.errors import LocalError, Refused
from p2p.event import Emit, ignore
from p2p.identity import PeerId
from stage import boundary, genesis, likeliest
from stage.config import ModelConfig, TrainingConfig
from stage.events import BadGradient, Computing
from stage.memory import Memory
from stage.merging import Merger, PackedSlice
from stage.messages import MAX_LOSS, Request
from stage.microbatch import Shape
from stage.model import Stage, TailLoss, document_index
from stage.optimizer import Held as HeldState
from stage.optimizer import Optimizer, StepTaken
from stage.placement import Peak, SavedBytes, compiles, compute_dtype, memory_budget
from stage.powersgd import Contribution, PowerSGD, Projected
from stage.settings import ComputeSettings
from stage.snapshot import State
from stage.weights import CHUNK, MAX_VERSIONS, Version

FIRST_GRAPHS = 8
"""Graphs that have room before copies of the weights do; more of them have what the copies leave."""
NOT_FINITE = "not_finite"
"""The refusal of a replica whose own numbers are not, or absurd; its caller goes to another one."""
WHAT_IS_NOT_FINITE = "what this replica computes is not finite"


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


class HeldMicrobatch:
    """A microbatch after its forward pass. ``c`` (packed) is for the caller; so is ``loss``, which the
    tail knows after the backward pass (of an evaluation, after the forward pass)."""

    def __init__(self, released: list[HeldMicrobatch], ids: Tensor, docs: Tensor | None, weight: float):
        self.loss = 0.0
        self.c: Any = b""
        self.likeliest: Any = b""
        self.ids = ids
        self.docs = docs
        self.weight = weight
        self.c_in: Tensor | None = None
        self.out: Tensor | None = None
        """Retained: the end of the graph."""
        self.version: Version | None = None
        self.states: list[Tensor] = []
        """Not retained: what each layer was given, on the weights of ``generation``."""
        self.generation = -1
        self._released = released

    def drop_graph(self) -> None:
        """Free the graph and its hold on the weights."""
        self.out = None
        self.states = []
        if self.version is not None:
            self.version.release()
            self.version = None

    def release(self) -> None:
        """From any thread: the device thread lets go at its next job."""
        self._released.append(self)


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
        self.retain = 0 if settings.graph == "recompute" else in_flight
        """Graphs that may wait for their gradient at a time; the rest is computed again."""
        if compiles(settings.compile, self.device):
            self.stage.compile()
        self.graph_bytes = 0
        """Of one retained graph, once ``warm_up`` has measured it."""
        self.peak_bytes = 0
        """What a microbatch needs at most while it is computed layer by layer, as measured."""
        self.samples = 0
        """Samples in the accumulator."""
        self.last_step: StepTaken | None = None
        """The last update that was made."""
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
            docs = document_index(tuple(request.documents), request.tokens).unsqueeze(0).to(self.device)
        ids_here = tokens.unsqueeze(0).to(self.device)
        held = HeldMicrobatch(self._released, ids_here, docs, request.ticket.weight)
        if not self.stage.is_head:
            c_in = boundary.unpack(c, request.tokens, self.model.k, self.training.wire_dtype)
            held.c_in = c_in.unsqueeze(0).to(self.device)
        train = request.ticket.kind == "train"
        if train:
            self._held.add(held)
        if not train:
            with torch.no_grad():
                out = self.stage.forward(self.weights.passing(), held.ids, held.c_in, docs=held.docs)
            if isinstance(out, TailLoss) and request.place is not None:
                held.likeliest = self._likeliest(out.logits(request.place)[0])
                return held
            if isinstance(out, TailLoss):
                held.loss = float(out.losses[0])
                self._check_loss(held.loss)
                return held
        elif self.stage.is_tail:
            return held  # nobody waits for its output: its two passes run in one go, at the commit
        elif sum(other.out is not None for other in self._held) < self.retain:
            out = self._run_whole(held)
        else:
            out = self._run_states(held)
        answer = out.detach()[0]
        if not bool(torch.isfinite(answer).all()):
            raise Refused(NOT_FINITE, WHAT_IS_NOT_FINITE)
        held.c = boundary.pack(answer, self.training.wire_dtype)
        return held

    def _likeliest(self, logits: Tensor) -> bytes:
        """The answer to a ticket of generation, of logits [V]."""
        if not bool(torch.isfinite(logits).all()):
            raise Refused(NOT_FINITE, WHAT_IS_NOT_FINITE)
        ordered, tokens = logits.sort(descending=True, stable=True)
        most = likeliest.MOST
        return likeliest.pack(tokens[:most].tolist(), ordered[:most].tolist())

    def _run_whole(self, held: HeldMicrobatch) -> Tensor:
        """A forward pass that retains its graph, on the weights as they are now: c, or the tail's x."""
        held.version = self.weights.begin()
        prepared = self.stage.prepare(held.ids, held.docs)
        if held.c_in is not None:
            held.c_in = held.c_in.detach().requires_grad_()
        state = self.stage.enter(held.version.leaves, prepared, held.c_in)
        for layer in self.stage.layers:
            state = self.stage.layer(held.version.leaves, layer, state, prepared)
        held.out = self.stage.leave(held.version.leaves, state, prepared)
        return held.out

    def _run_states(self, held: HeldMicrobatch) -> Tensor:
        """A forward pass that keeps what each layer was given, and what the last one answered."""
        with torch.no_grad():
            leaves = self.weights.passing()
            prepared = self.stage.prepare(held.ids, held.docs)
            state = self.stage.enter(leaves, prepared, held.c_in)
            held.states = [state]
            for layer in self.stage.layers:
                state = self.stage.layer(leaves, layer, state, prepared)
                held.states.append(state)
        held.generation = self.weights.generation
        return state

    def backward(self, held: HeldMicrobatch, dc: memoryview) -> Any:
        """Adds the gradient of a microbatch; the packed gradient of ``c_in`` (empty at the head).

        Raises RemoteError on a gradient that is not finite, before anything is added; Refused where the loss
        that a tail computes is not.
        """
        self._sweep()
        back = self.training.wire_dtype_backward
        gradient = None
        if not self.stage.is_tail:
            here = boundary.unpack(dc, self.model.seq, self.model.k, back)
            gradient = here.unsqueeze(0).to(self.device)
        if held.out is None and self.retain:
            self._run_whole(held)
        if held.out is not None:
            self._backward_whole(held, gradient)
        else:
            self._backward_states(held, gradient)
        held.drop_graph()
        self._held.discard(held)
        self.samples += 1
        if held.c_in is None:
            return b""
        assert held.c_in.grad is not None
        return boundary.pack(held.c_in.grad[0], back)

    def _backward_whole(self, held: HeldMicrobatch, gradient: Tensor | None) -> None:
        assert held.out is not None
        assert held.version is not None
        if gradient is None:
            gradient = self._commit_loss(held, held.out, held.version.leaves)
        torch.autograd.backward(held.out, gradient)

    def _backward_states(self, held: HeldMicrobatch, gradient: Tensor | None) -> None:
        """Layer by layer from the last, each run again with its graph: one layer's graph at a time."""
        if held.generation != self.weights.generation or not held.states:
            self._run_states(held)  # never a mixture of what old and new weights computed
        version = held.version = self.weights.begin()
        prepared = self.stage.prepare(held.ids, held.docs)
        state = held.states.pop()
        if gradient is None:
            state.requires_grad_()
            out = self.stage.leave(version.leaves, state, prepared)
            torch.autograd.backward(out, self._commit_loss(held, out, version.leaves))
            gradient = state.grad
        for layer in reversed(self.stage.layers):
            given = held.states.pop().detach().requires_grad_()
            torch.autograd.backward(self.stage.layer(version.leaves, layer, given, prepared), gradient)
            gradient = given.grad
        if held.c_in is not None:
            held.c_in = held.c_in.detach().requires_grad_()
        torch.autograd.backward(self.stage.enter(version.leaves, prepared, held.c_in), gradient)

    def _commit_loss(self, held: HeldMicrobatch, x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        """The tail's loss; the gradient of the output matrix is added, that of x returned."""
        weight = torch.tensor([held.weight], device=self.device)
        loss = TailLoss(x, leaves["out"], held.ids[:, 1:], weight.to(self.stage.state_dtype))
        dx = loss.seed(self.weights.gradients["out"])
        held.loss = float(loss.losses[0])
        self._check_loss(held.loss)  # what was added may not be finite either: then the next step drops it
        return dx

    def _check_loss(self, loss: float) -> None:
        if not 0.0 <= loss < MAX_LOSS:
            raise Refused(NOT_FINITE, f"the loss that this replica computes is {loss:g}")

    def _sweep(self) -> None:
        while self._released:
            held = self._released.pop()
            held.drop_graph()
            self._held.discard(held)

    def _make_writable(self) -> None:
        """Let go of graphs on old weights where the bound on versions asks for it, then wait for readers
        that there is no room to copy for: the one snapshot that is being written."""
        self._sweep()
        if not self.weights.can_write:
            for held in self._held:
                if held.version is not None and (
                    self.weights.max_versions == 0 or held.version.leaves is not self.weights.leaves
                ):
                    held.drop_graph()
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
        held, _ = self._noise()
        with torch.no_grad():
            out = self.stage.forward(self.weights.passing(), held.ids, held.c_in)
            if isinstance(out, TailLoss):
                return 0.0 <= float(out.losses[0]) < MAX_LOSS
        return bool(torch.isfinite(out).all())

    def _noise(self) -> tuple[HeldMicrobatch, Tensor]:
        """A microbatch that nobody sent, and what may stand for its gradient."""
        generator = torch.Generator().manual_seed(self.training.seed)
        size = (1, self.model.seq + 1)
        ids = torch.randint(self.model.vocab, size, generator=generator).to(self.device)
        held = HeldMicrobatch(self._released, ids, None, 1.0)
        noise = torch.randn((1, self.model.seq, self.model.k), generator=generator).to(self.device)
        if not self.stage.is_head:
            held.c_in = noise
        return held, noise

    # Memory

    def memory(self) -> Memory:
        """Bytes by component as they are now, named as in ``stage.memory``."""
        weights, optimizer = self.weights, self.optimizer
        graphs = sum(held.out is not None for held in self._held)
        inputs = sum(state.nbytes for held in self._held for state in held.states)
        device = {
            "compute": 0 if weights.compute is None else weights.compute.nbytes,
            "gradients": weights.gradient.nbytes,
            "activations": graphs * self.graph_bytes + inputs,
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
        held, noise = self._noise()
        prepared = self.stage.prepare(held.ids)
        with Peak(self.device) as peak:
            self._run_states(held)
            self._backward_states(held, None if self.stage.is_tail else noise)
        held.drop_graph()
        state = self.stage.enter(self.weights.leaves, prepared, held.c_in).detach().requires_grad_()
        known = [*self.weights.leaves.values(), self.stage.U, *prepared.rotary]
        with SavedBytes(known) as saved:
            end = self.stage.layer(self.weights.leaves, self.stage.layers[0], state, prepared)
        del end, state, prepared
        self.weights.zero_gradient()
        self.graph_bytes = saved.bytes * len(self.stage.layers)
        self.peak_bytes = peak.bytes
        return self._decide()

    def _decide(self) -> Computing:
        memory, weights = self.memory(), self.weights
        on_cpu = self.device.type == "cpu"
        fixed = memory.vram_bytes + (memory.host_bytes if on_cpu else 0)
        budget = memory_budget(self.settings.memory_gib, self.device)
        room = budget - fixed - self.peak_bytes
        wanted = 1 if self.stage.is_tail else self.in_flight
        if self.settings.graph == "auto":
            self.retain = min(wanted, FIRST_GRAPHS, max(0, room // max(1, self.graph_bytes)))
        room = max(0, room - self.retain * self.graph_bytes)
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
            self.retain = min(wanted, self.retain + room // max(1, self.graph_bytes))
        return Computing(
            stage=self.index,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            optimizer=self.settings.optimizer,
            graphs=self.retain,
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
        self._sweep()
        for held in self._held:
            held.drop_graph()
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
