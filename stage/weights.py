"""The weights of one stage: one flat buffer, named views of it, one gradient accumulator.

Everything that treats the weights as a vector (optimizer, slices, snapshots, checksums) sees one flat
tensor: matrices that decay first, then the norm scales that do not, padded to a multiple of 256. The
model sees named leaf tensors that share its storage and whose ``.grad`` is preset to views of one flat
accumulator, so that backward adds in place and nothing is gathered afterwards.

Versions. An autograd graph keeps its leaves by reference, so storage that a graph still needs must not
change: the backward pass would then use weights that its forward pass never saw. Each microbatch in
flight therefore holds a ``Version`` from ``begin()`` and gives it back with ``release()``. Whoever wants
to change weights asks for ``writable()``: the current storage if nobody holds it, otherwise a copy with
new leaves, while the old graphs keep the old storage. Gradients of all versions land in the one
accumulator: a step taken in between makes them stale by a step, never wrong. At most ``max_versions``
old storages exist at a time; when ``can_write`` is False the caller waits for a release.

Not thread-safe: one thread owns a ``Weights``. Others may read a held version's tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2p.errors import LocalError
from stage.parameters import Layout, ParameterSpec


class Version:
    """A hold on the weights as they were at ``begin()``."""

    def __init__(self, store: _Store) -> None:
        self._store: _Store | None = store
        self.flat = store.flat
        self.leaves = store.leaves

    def release(self) -> None:
        """Give the hold back, once the graph that uses ``leaves`` is done; twice does no harm."""
        if self._store is not None:
            self._store.holds -= 1
            self._store = None
            self.leaves = {}


class _Store:
    """One storage of the weights with its leaves."""

    def __init__(self, flat: Tensor, layout: Layout, gradients: dict[str, Tensor]) -> None:
        self.flat = flat
        self.holds = 0
        self.leaves: dict[str, Tensor] = {}
        for name, view in layout.views(flat).items():
            leaf = view.detach().requires_grad_()
            leaf.grad = gradients[name]
            self.leaves[name] = leaf


class Weights:
    """See the head of this file."""

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_versions: int = 3,
    ) -> None:
        self.layout = Layout.of(specs)
        self.gradient = torch.zeros(self.layout.size, dtype=dtype, device=device)
        """The accumulator: sum over samples since it was last zeroed; keep its storage."""
        self.max_versions = max_versions
        self._gradients = self.layout.views(self.gradient)
        flat = torch.zeros(self.layout.size, dtype=dtype, device=device)
        self._current = _Store(flat, self.layout, self._gradients)
        self._old: list[_Store] = []

    @property
    def flat(self) -> Tensor:
        """The current weights, to read. To change them ask for ``writable()``."""
        return self._current.flat

    def named(self) -> dict[str, Tensor]:
        """The current weights by name, without gradients; writing needs ``writable()`` first."""
        return self.layout.views(self._current.flat)

    def begin(self) -> Version:
        """Hold the current weights for one microbatch (or one reader)."""
        self._current.holds += 1
        return Version(self._current)

    @property
    def versions(self) -> int:
        """Old storages that somebody still holds."""
        self._old = [store for store in self._old if store.holds]
        return len(self._old)

    @property
    def can_write(self) -> bool:
        """False while one more copy would exceed ``max_versions``: wait for a release."""
        return self._current.holds == 0 or self.versions < self.max_versions

    def writable(self) -> Tensor:
        """The flat buffer, to be changed in place now, before the next ``begin()``."""
        if self._current.holds:
            if not self.can_write:
                raise LocalError(f"weights: {self.max_versions} older versions are still held")
            self._old.append(self._current)
            self._current = _Store(self._current.flat.clone(), self.layout, self._gradients)
        return self._current.flat

    def zero_gradient(self) -> None:
        """Start a new accumulation."""
        self.gradient.zero_()
