"""AdamW over the flat weights of a stage, driven by the run's step clock.

When the clock advances a replica takes one step of its own with the mean of its own accumulated
gradient; replicas are kept together by averaging weights, not gradients. The global norm would need all
stages, so each stage clips to its share of it, ``max_norm / sqrt(stages)``: if all shares are met, so is
the whole. With fewer than ``min_step_samples`` the gradient is carried over to the next step; with none
nothing is touched and only the number advances. A gradient that is not finite is thrown away.

A step goes over the vectors once, in pieces, so that it needs no room of the size of the weights. Where
the moments lie is a setting: ``device`` (fp32 beside the weights), ``8bit`` (codes beside the weights, see
``stage.moments``), ``host`` (masters and moments in host memory: the gradient comes piece by piece, AdamW
runs on the CPU, the compute copy on the device is refreshed piece by piece).

A snapshot is three fp32 vectors: weights, first and second moment, read piece by piece. ``hold()`` lets a
writer read them while training goes on: a step that meets a hold works on a copy, or waits for the reader
where there is no room for one (``Weights.max_copies``). Bias correction counts the updates that were made,
not the steps of the run.

Not thread-safe, like ``Weights``. Sources: AdamW, arXiv 1711.05101; 1/sqrt(stages) as in production at
Pluralis (reference: papers.md, summary 8).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Literal

import attrs
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from p2p.errors import LocalError
from p2p.event import Emit, ignore
from stage import subspace
from stage.config import TrainingConfig
from stage.events import BadGradient
from stage.moments import FullMoments, Moments8
from stage.schedule import learning_rate
from stage.settings import OptimizerKind
from stage.weights import CHUNK, Weights

EPS = 1e-8


@attrs.frozen
class StepTaken:
    """What became of the accumulated gradient."""

    step: int
    outcome: Literal["updated", "carried", "empty", "not finite"]
    samples: int
    """Samples that left the accumulator, by an update or as garbage; 0 if carried over."""
    lr: float = 0.0
    norm: float = 0.0
    """Of the mean gradient, before clipping."""


class Held:
    """The state as it was, until ``release()``; for a reader on any thread."""

    def __init__(self, optimizer: Optimizer, step: int) -> None:
        self.step = step
        self.updates = optimizer.updates
        self.fingerprint = optimizer.weights.layout.fingerprint
        self.version = optimizer.weights.hold()
        self.moments = optimizer.moments
        self._returned = optimizer._returned

    @property
    def floats(self) -> int:
        """Length of one vector."""
        return self.version.flat.numel()

    def read(self, vector: int, start: int, stop: int) -> Tensor:
        """A range of vector 0 (weights), 1 or 2 (moments), fp32, on the CPU; whole groups of 256."""
        if vector == 0:
            return self.version.flat[start:stop].cpu()
        return self.moments.read("exp_avg" if vector == 1 else "exp_avg_sq", start, stop).cpu()

    def release(self) -> None:
        """Call once, from any thread: the owner of the optimizer takes it back when it next needs to."""
        self._returned.put(self)


class Optimizer:
    """See the head of this file."""

    def __init__(
        self,
        weights: Weights,
        config: TrainingConfig,
        *,
        stage: int = 0,
        stages: int = 1,
        basis: Tensor | None = None,
        kind: OptimizerKind = "device",
        emit: Emit = ignore,
    ) -> None:
        self.weights = weights
        self.stage = stage
        self.stages = stages
        self.configure(config)
        self.basis = basis
        """U (d×k), where the stage has matrices that are kept in its span."""
        if weights.layout.constrained and basis is None:
            raise LocalError("optimizer: constrained matrices need the basis that they are kept in")
        if weights.layout.constrained and kind != "device":
            raise LocalError(
                f"compute.optimizer = {kind!r} does not work with the constrained variant; use 'device'"
            )
        self.emit = emit
        eight = kind == "8bit"
        self.moments: FullMoments | Moments8 = (
            Moments8(weights.flat, config.seed) if eight else FullMoments(weights.flat)
        )
        self.staging = HostStaging(weights) if kind == "host" else None
        self.updates = 0
        """Updates made so far: Adam's own count, part of the state."""
        self._held: set[Held] = set()
        self._returned: SimpleQueue[Held] = SimpleQueue()

    def configure(self, config: TrainingConfig) -> None:
        """Use these settings from the next step on."""
        self.config = config
        self.max_norm = config.max_norm / math.sqrt(self.stages)

    def step(self, step: int, samples: int) -> StepTaken:
        """The clock reached ``step`` with ``samples`` gradients in the accumulator.

        Ask ``weights.can_write`` first; this raises LocalError when no version may be made.
        """
        if samples == 0:
            return StepTaken(step, "empty", 0)
        if samples < self.config.min_step_samples:
            return StepTaken(step, "carried", 0)
        taken = self._take(step, self.weights.gradient, samples)
        self.weights.zero_gradient()
        return taken

    def apply(self, step: int, gradient: Tensor) -> StepTaken:
        """An update with this mean gradient (flat; it is used up); the accumulator is left alone."""
        return self._take(step, gradient, 1)

    def _take(self, step: int, gradient: Tensor, samples: int) -> StepTaken:
        norm = self._norm(gradient) / samples
        if not math.isfinite(norm):
            self.emit(BadGradient(stage=self.stage, step=step, samples=samples))
            return StepTaken(step, "not finite", samples)
        lr = learning_rate(step, self.config)
        clip = min(1.0, self.max_norm / norm) if self.max_norm and norm else 1.0
        self._update(lr, clip / samples, gradient)
        return StepTaken(step, "updated", samples, lr, norm)

    def sound(self) -> bool:
        """Whether the accumulator is finite."""
        return math.isfinite(self._norm(self.weights.gradient))

    def _norm(self, gradient: Tensor) -> float:
        """Of a flat vector; pieces are joined in double precision."""
        norms = [torch.linalg.vector_norm(part) for part in torch.split(gradient, CHUNK)]
        return float(torch.linalg.vector_norm(torch.stack(norms).double()))

    def _update(self, lr: float, factor: float, whole: Tensor) -> None:
        self._take_back()
        flat = self.weights.writable()
        self.writable_moments()
        size, window = self.weights.layout.size, self.moments.window
        pieces = [(start, min(start + window, size)) for start in range(0, size, window)]
        gradients = _pieces(whole) if self.staging is None else self.staging.gradients(whole, pieces)
        for start, stop in pieces:
            gradient = gradients(start, stop)
            moments = self.moments.open(start, stop)
            self._adamw(flat[start:stop], gradient.mul_(factor), moments, start, lr)
            self.moments.close(start, stop)
            if self.staging is None:
                self.weights.refresh(start, stop)
            else:
                self.staging.refresh(start, stop)
        self._update_constrained(flat, whole, lr)
        self.updates += 1

    def writable_moments(self) -> FullMoments | Moments8:
        """The moments, to be changed in place now; readers keep theirs."""
        if any(held.moments is self.moments for held in self._held):
            self.moments = self.moments.copy()
        return self.moments

    def _adamw(
        self, flat: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], start: int, lr: float
    ) -> None:
        """One piece, which begins at float ``start``: matrices decay, norm scales do not, and the constrained
        ones between them are not for this."""
        layout = self.weights.layout
        constrained = layout.constrained[0][0] if layout.constrained else layout.decayed
        first, last = (min(max(edge - start, 0), flat.numel()) for edge in (constrained, layout.decayed))
        with torch.no_grad():
            for part, decay in ((slice(0, first), self.config.weight_decay), (slice(last, None), 0.0)):
                if not flat[part].numel():
                    continue
                adamw(
                    [flat[part]],
                    [gradient[part]],
                    [moments[0][part]],
                    [moments[1][part]],
                    [],
                    [torch.tensor(float(self.updates), device=flat.device)],
                    fused=True,
                    amsgrad=False,
                    beta1=self.config.beta1,
                    beta2=self.config.beta2,
                    lr=lr,
                    weight_decay=decay,
                    eps=EPS,
                    maximize=False,
                )

    def _update_constrained(self, flat: Tensor, gradients: Tensor, lr: float) -> None:
        if not self.weights.layout.constrained:
            return
        config, moments = self.config, self.moments
        assert isinstance(moments, FullMoments)
        vectors = (flat, gradients, moments.exp_avg, moments.exp_avg_sq)
        for weight, gradient, first, second in zip(
            *map(self.weights.layout.constrained_views, vectors), strict=True
        ):
            assert self.basis is not None
            subspace.adamw_columns(
                weight, gradient, first, second, self.basis, updates=self.updates, lr=lr,
                beta1=config.beta1, beta2=config.beta2,
                weight_decay=config.weight_decay, eps=EPS,
            )  # fmt: skip
        self.weights.refresh(self.weights.layout.constrained[0][0], self.weights.layout.decayed)

    def constrain(self) -> None:
        """Bring the weights back into span(U) after somebody else changed single elements of them."""
        if self.basis is not None and self.weights.layout.constrained:
            subspace.constrain(self.weights.writable(), self.weights.layout, self.basis)
            self.weights.refresh()

    def hold(self, step: int) -> Held:
        """Keep the whole state, which is that of ``step``, for a reader."""
        held = Held(self, step)
        self._held.add(held)
        return held

    def wait_for_readers(self) -> None:
        """Return when no reader stands in the way of writing; they run on other threads."""
        self._take_back()
        while self._held and not self.weights.can_write:
            self._take_back(self._returned.get())

    def _take_back(self, first: Held | None = None) -> None:
        returned = [] if first is None else [first]
        while not self._returned.empty():
            returned.append(self._returned.get())
        for held in returned:
            held.version.release()
            self._held.discard(held)

    def load(
        self,
        vectors: Sequence[Tensor],
        updates: int,
        fingerprint: str | None = None,
    ) -> None:
        """Take over a whole state, a snapshot's or a donor's: weights, first and second moment, fp32.

        Raises LocalError if it does not fit, before anything is changed.
        """
        if fingerprint is not None and fingerprint != self.weights.layout.fingerprint:
            raise LocalError("state: it is of another stage or another model")
        for name, vector in zip(("weights", "exp_avg", "exp_avg_sq"), vectors, strict=True):
            good = vector.shape == self.weights.flat.shape
            if not good or not all(bool(torch.isfinite(part).all()) for part in torch.split(vector, CHUNK)):
                raise LocalError(f"state: {name} has the wrong size for this stage or is not finite")
        self.wait_for_readers()
        flat = self.weights.writable()
        self.writable_moments()
        for start in range(0, self.weights.layout.size, CHUNK):
            part = slice(start, start + CHUNK)
            flat[part].copy_(vectors[0][part])
            self.moments.write("exp_avg", start, vectors[1][part])
            self.moments.write("exp_avg_sq", start, vectors[2][part])
        self.weights.refresh()
        self.updates = updates


class HostStaging:
    """Pieces on their way between the device and host memory, in two pairs of bounded buffers.

    While AdamW works on one piece on the CPU, the next gradient and the last weights travel. On a CPU the
    copies are plain ones; the lines are the same.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        compute = weights.compute
        assert compute is not None
        self._cuda = weights.device.type == "cuda"
        room = min(CHUNK, weights.layout.size)
        self._in = [self._buffer(room, weights.gradient.dtype) for _ in range(2)]
        self._out = [self._buffer(room, compute.dtype) for _ in range(2)]
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._left: dict[int, torch.cuda.Event] = {}

    def _buffer(self, room: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(room, dtype=dtype, pin_memory=self._cuda)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, in host memory."""
        return sum(buffer.nbytes for buffer in (*self._in, *self._out))

    def gradients(self, whole: Tensor, pieces: Sequence[tuple[int, int]]) -> Callable[[int, int], Tensor]:
        """A function that gives the gradient of each piece of ``whole``, in this order."""
        following = dict(itertools.pairwise(pieces))
        self._fetch(whole, *pieces[0])

        def get(start: int, stop: int) -> Tensor:
            if (start, stop) in following:
                self._fetch(whole, *following[start, stop])
            if self._cuda:
                self._arrived.pop(start).synchronize()
            return self._in[start // CHUNK % 2][: stop - start]

        return get

    def _fetch(self, whole: Tensor, start: int, stop: int) -> None:
        room = self._in[start // CHUNK % 2][: stop - start]
        room.copy_(whole[start:stop], non_blocking=True)
        if self._cuda:
            self._arrived[start] = _now()

    def refresh(self, start: int, stop: int) -> None:
        """Send a piece of the masters to the compute copy, rounded on the way."""
        turn = start // CHUNK % 2
        if turn in self._left:
            self._left.pop(turn).synchronize()
        compute = self._weights.compute
        assert compute is not None
        room = self._out[turn][: stop - start]
        room.copy_(self._weights.flat[start:stop])
        compute[start:stop].copy_(room, non_blocking=True)
        if self._cuda:
            self._left[turn] = _now()


def _pieces(whole: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: whole[start:stop]


def _now() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
