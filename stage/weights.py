"""The weights of one stage: flat fp32 masters, the copy that passes compute with, one gradient accumulator.

Everything that treats the weights as a vector (optimizer, slices, snapshots, checksums) sees one flat
tensor, the masters: matrices that decay first, then the norm scales that do not, padded to a multiple of
256. The model sees named leaf tensors. Where passes compute in fp32 on the device of the masters, the leaves
share the masters' storage and their ``.grad`` is preset to views of one flat accumulator, so that backward
adds in place. Otherwise (bf16 compute, or masters in host memory) the leaves are views of a *compute copy*
on the device, and what autograd makes for a leaf is added to the fp32 accumulator and freed at once, one
matrix at a time. Whoever changes masters calls ``refresh`` for the range.

Versions. An autograd graph keeps its leaves by reference, so storage that a graph still needs must not
change: the backward pass would then use weights that its forward pass never saw. Each graph in flight
therefore holds a ``Version`` from ``begin()`` and gives it back with ``release()``; whoever reads the masters
on another thread holds them with ``hold()``. Whoever wants to change weights asks for ``writable()``: the
current storage if nobody holds it, otherwise a copy, while the old graphs keep the old storage. Gradients of
all versions land in the one accumulator: a step taken in between makes them stale by a step, never wrong.

Bounds. At most ``max_versions`` old storages of leaves exist at a time, and ``max_copies`` old masters
for readers; both may be 0. When ``can_write`` is False, holders have to let go first.

Not thread-safe: one thread owns a ``Weights``. Others may read a held version's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from p2p.errors import LocalError
from stage.parameters import Layout, ParameterSpec

CHUNK = 1 << 22
"""Floats that passes over whole vectors take at a time, where they need room of their own (16 MiB)."""

MAX_VERSIONS = 3
"""Old storages of leaves that may exist at a time, however much memory there is."""


class Version:
    """A hold on the weights as they were at ``begin()`` (with leaves) or ``hold()`` (without)."""

    def __init__(self, store: _Store, leaves: dict[str, Tensor], *, reader: bool = False) -> None:
        self._store: _Store | None = store
        self._reader = reader
        self.flat = store.flat
        self.leaves = leaves
        store.holds += 1
        store.readers += reader

    def release(self) -> None:
        """Give the hold back, once the graph that uses ``leaves`` is done; twice does no harm."""
        if self._store is not None:
            self._store.holds -= 1
            self._store.readers -= self._reader
            self._store = None
            self.leaves = {}


class _Store:
    """One storage of the weights, and who needs it."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.holds = 0
        """Graphs and readers."""
        self.readers = 0


class Weights:
    """See the head of this file.

    ``compute_dtype``: what passes compute with, where it is not the masters' ``dtype``. ``host``: masters in
    host memory (pinned where the device is an accelerator), so that passes need a copy in any case.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        host: bool = False,
        max_versions: int = MAX_VERSIONS,
        max_copies: int = 1,
    ) -> None:
        self.layout = Layout.of(specs)
        self.device = torch.device(device)
        self.max_versions = max_versions
        self.max_copies = max_copies
        self.generation = 0
        """Grows whenever the weights may change."""
        self.gradient = torch.zeros(self.layout.size, dtype=dtype, device=device)
        """The accumulator: sum over samples since it was last zeroed; keep its storage."""
        self.gradients: dict[str, Tensor] = self.layout.views(self.gradient)
        """The accumulator's views by name."""
        pinned = host and self.device.type == "cuda"
        where = torch.device("cpu") if host else self.device
        flat = torch.zeros(self.layout.size, dtype=dtype, device=where, pin_memory=pinned)
        self._masters = self._compute = _Store(flat)
        low = dtype if compute_dtype is None else compute_dtype
        if host or low is not dtype:
            self._compute = _Store(torch.zeros(self.layout.size, dtype=low, device=device))
        self._leaves = self._new_leaves()
        self._old: list[_Store] = []
        self._old_masters: list[_Store] = []

    @property
    def flat(self) -> Tensor:
        """The current masters, to read. To change them ask for ``writable()``."""
        return self._masters.flat

    @property
    def compute(self) -> Tensor | None:
        """The current compute copy (flat, same layout); None where passes use the masters."""
        return None if self._compute is self._masters else self._compute.flat

    def named(self) -> dict[str, Tensor]:
        """The current masters by name, without gradients; writing needs ``writable()`` first."""
        views: dict[str, Tensor] = self.layout.views(self.flat)
        return views

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The current leaves; to use them in a graph, ``begin()``."""
        return self._leaves

    def passing(self) -> dict[str, Tensor]:
        """What a pass without gradients uses now, by name."""
        views: dict[str, Tensor] = self.layout.views(self._compute.flat)
        return views

    def begin(self) -> Version:
        """Hold what passes compute with, for one microbatch."""
        return Version(self._compute, self._leaves)

    def hold(self) -> Version:
        """Hold the masters, for a reader."""
        return Version(self._masters, {}, reader=True)

    @property
    def versions(self) -> int:
        """Old storages of leaves that somebody still holds."""
        self._old = [store for store in self._old if store.holds]
        return len(self._old)

    @property
    def can_write(self) -> bool:
        """False while one more copy would exceed a bound: wait for a release."""
        return not self._too_many_versions and not self._too_many_copies

    @property
    def _too_many_versions(self) -> bool:
        return self._compute.holds > 0 and self.versions >= self.max_versions

    @property
    def _too_many_copies(self) -> bool:
        self._old_masters = [store for store in self._old_masters if store.readers]
        return self._masters.readers > 0 and len(self._old_masters) >= self.max_copies

    def writable(self) -> Tensor:
        """The masters, to be changed in place now, before the next ``begin()``; then ``refresh``."""
        if self._too_many_versions:
            raise LocalError(f"weights: {self.max_versions} older versions are still held")
        if self._too_many_copies:
            raise LocalError(f"weights: readers still hold {self.max_copies + 1} states")
        shared = self._masters is self._compute
        if self._masters.readers or (shared and self._masters.holds):
            old, self._masters = self._masters, _Store(_copy(self._masters.flat))
            if old.readers:
                self._old_masters.append(old)
            if shared:
                self._replace_compute(self._masters)
        if not shared and self._compute.holds:
            self._replace_compute(_Store(self._compute.flat.clone()))
        self.generation += 1
        return self._masters.flat

    def _replace_compute(self, store: _Store) -> None:
        self._old.append(self._compute)
        self._compute = store
        self._leaves = self._new_leaves()

    def refresh(self, start: int = 0, stop: int | None = None) -> None:
        """Bring the compute copy up to the masters in this range of floats."""
        compute = self.compute
        if compute is None:
            return
        end = self.layout.size if stop is None else stop
        for begin in range(start, end, CHUNK):
            part = slice(begin, min(begin + CHUNK, end))
            compute[part].copy_(self.flat[part])

    def zero_gradient(self) -> None:
        """Start a new accumulation."""
        self.gradient.zero_()

    def _new_leaves(self) -> dict[str, Tensor]:
        in_place = self._compute.flat.dtype is self.gradient.dtype
        leaves: dict[str, Tensor] = {}
        for name, view in self.layout.views(self._compute.flat).items():
            leaf = view.detach().requires_grad_()
            if in_place:
                leaf.grad = self.gradients[name]
            else:
                leaf.register_post_accumulate_grad_hook(_add_to(self.gradients[name]))
            leaves[name] = leaf
        return leaves


def _copy(flat: Tensor) -> Tensor:
    """A copy in memory of the same kind (``clone`` would forget that it was pinned)."""
    made = torch.empty(flat.numel(), dtype=flat.dtype, device=flat.device, pin_memory=flat.is_pinned())
    return made.copy_(flat)


def _add_to(accumulator: Tensor) -> Callable[[Tensor], None]:
    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        accumulator.add_(leaf.grad)
        leaf.grad = None

    return add
