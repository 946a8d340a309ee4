"""The two passes of microbatches through one stage, and what waits between them.

- As many microbatches as memory has room for retain their graph from the forward to the backward pass, on
  the weights that they started with (copy-on-write, ``stage.weights``). If steps and merges would pile up
  more versions than are allowed, the graphs on old versions are dropped. Microbatches without a graph are
  computed again when their gradient comes, layer by layer from what each layer was given, or all of it if
  the weights changed meanwhile: never on a mixture of old and new weights.
- The tail's two passes are one job at the commit, since nobody waits for its output in between.

All methods are for the device thread, except ``HeldMicrobatch.release``.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from p2p.errors import Refused
from stage import boundary, likeliest
from stage.config import ModelConfig, TrainingConfig
from stage.messages import MAX_LOSS, Request
from stage.model import Stage, TailLoss, document_index
from stage.placement import Peak, SavedBytes
from stage.weights import Version, Weights

NOT_FINITE = "not_finite"
"""The refusal of a replica whose own numbers are not, or absurd; its caller goes to another one."""
WHAT_IS_NOT_FINITE = "what this replica computes is not finite"


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


@final
class Passes:
    """Microbatches on the weights as they are."""

    def __init__(
        self,
        stage: Stage,
        weights: Weights,
        training: TrainingConfig,
        model: ModelConfig,
        *,
        device: torch.device,
        retain: int,
    ) -> None:
        self.retain = retain
        """Graphs that may wait for their gradient at a time; the rest is computed again."""
        self.stage = stage
        self.weights = weights
        self.model = model
        self.device = device
        self._wire = training.wire_dtype
        self._wire_back = training.wire_dtype_backward
        self._seed = training.seed
        self._held: set[HeldMicrobatch] = set()
        self._released: list[HeldMicrobatch] = []

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
            c_in = boundary.unpack(c, request.tokens, self.model.k, self._wire)
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
        held.c = boundary.pack(answer, self._wire)
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

    def backward(self, held: HeldMicrobatch, dc: memoryview) -> None:
        """Adds the gradient of a microbatch; then ``answer`` is for its caller.

        Raises RemoteError on a gradient that is not finite, before anything is added; Refused where the loss
        that a tail computes is not.
        """
        self._sweep()
        gradient = None
        if not self.stage.is_tail:
            here = boundary.unpack(dc, self.model.seq, self.model.k, self._wire_back)
            gradient = here.unsqueeze(0).to(self.device)
        if held.out is None and self.retain:
            self._run_whole(held)
        if held.out is not None:
            self._backward_whole(held, gradient)
        else:
            self._backward_states(held, gradient)
        held.drop_graph()
        self._held.discard(held)

    def answer(self, held: HeldMicrobatch) -> Any:
        """The packed gradient of ``c_in`` (empty at the head), after the backward pass."""
        if held.c_in is None:
            return b""
        assert held.c_in.grad is not None
        return boundary.pack(held.c_in.grad[0], self._wire_back)

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

    def make_room(self) -> None:
        """Let go of graphs on old weights where the bound on versions asks for it."""
        self._sweep()
        if not self.weights.can_write:
            for held in self._held:
                if held.version is not None and (
                    self.weights.max_versions == 0 or held.version.leaves is not self.weights.leaves
                ):
                    held.drop_graph()

    def drop_graphs(self) -> None:
        """Let go of all: the weights are about to be replaced."""
        self._sweep()
        for held in self._held:
            held.drop_graph()

    # Memory and health

    @property
    def graphs(self) -> int:
        """How many wait for their gradient now."""
        return sum(held.out is not None for held in self._held)

    @property
    def input_bytes(self) -> int:
        """What the others keep of their layers' inputs."""
        return sum(state.nbytes for held in self._held for state in held.states)

    def measure(self) -> tuple[int, int]:
        """One microbatch of noise: bytes of a retained graph, and most at a time layer by layer.

        What it adds to the gradient is the caller's to remove.
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
        return saved.bytes * len(self.stage.layers), peak.bytes

    def sound(self) -> bool:
        """Whether what the weights make of noise is finite."""
        held, _ = self._noise()
        with torch.no_grad():
            out = self.stage.forward(self.weights.passing(), held.ids, held.c_in)
            if isinstance(out, TailLoss):
                return 0.0 <= float(out.losses[0]) < MAX_LOSS
        return bool(torch.isfinite(out).all())

    def _noise(self) -> tuple[HeldMicrobatch, Tensor]:
        """A microbatch that nobody sent, and what may stand for its gradient."""
        generator = torch.Generator().manual_seed(self._seed)
        size = (1, self.model.seq + 1)
        ids = torch.randint(self.model.vocab, size, generator=generator).to(self.device)
        held = HeldMicrobatch(self._released, ids, None, 1.0)
        noise = torch.randn((1, self.model.seq, self.model.k), generator=generator).to(self.device)
        if not self.stage.is_head:
            held.c_in = noise
        return held, noise
