"""What to ask whom while a state is downloaded: sans-IO.

A download has one manifest and any number of donors that hold the same snapshot. Each donor is asked for
up to ``AHEAD`` chunks ahead, in the order in which they lie. What a donor owes when it goes is asked of
another; where nothing is left to ask but what others owe, a donor is asked for that too, so that none can
hold the end up. A chunk that is not what the manifest says is asked again; a donor that sent ``LIES`` such
chunks is done with. Torch-free.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from p2p.errors import RemoteError

AHEAD = 4
LIES = 3

D = TypeVar("D", bound=Hashable)


class Download(Generic[D]):
    """The chunks that are still wanted, and who was asked for which. ``D`` names a donor."""

    def __init__(self, wanted: Iterable[int]) -> None:
        self._left = set(wanted)
        self._unasked = sorted(self._left, reverse=True)
        self._owed: dict[D, list[int]] = {}
        self._lies: dict[D, int] = {}

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return not self._left

    @property
    def left(self) -> int:
        """Chunks that are not there yet."""
        return len(self._left)

    def ask(self, donor: D) -> int | None:
        """The chunk to ask this donor for now; None while it owes enough."""
        owed = self._owed.setdefault(donor, [])
        if len(owed) >= AHEAD:
            return None
        while self._unasked:
            index = self._unasked.pop()
            if index in self._left:
                owed.append(index)
                return index
        for other, theirs in self._owed.items():
            for index in theirs:
                if other != donor and index in self._left and index not in owed:
                    owed.append(index)
                    return index
        return None

    def owed(self, donor: D) -> bool:
        """Whether this donor was asked for something that it has not sent."""
        return bool(self._owed.get(donor))

    def came(self, donor: D, index: int, *, good: bool) -> None:
        """The donor sent chunk ``index``; ``good``: it is what the manifest says.

        Raises RemoteError if it was not asked for it, and at its last lie.
        """
        owed = self._owed.get(donor, [])
        if index not in owed:
            raise RemoteError(f"state: chunk {index} was not asked for")
        owed.remove(index)
        if good:
            self._left.discard(index)
            return
        self._again(index)
        self._lies[donor] = self._lies.get(donor, 0) + 1
        if self._lies[donor] >= LIES:
            raise RemoteError(f"state: {LIES} chunks are not what the manifest says")

    def gone(self, donor: D) -> None:
        """The donor sends no more."""
        for index in self._owed.pop(donor, []):
            self._again(index)

    def _again(self, index: int) -> None:
        if index in self._left and not any(index in owed for owed in self._owed.values()):
            self._unasked.append(index)
