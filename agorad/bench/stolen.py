"""Processor time that a virtual machine's own host gives to others, which a measurement there is short of."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

_STEAL: Final = 7
"""Place in the first line of /proc/stat (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal."""
NOTABLE: Final = 0.02
"""Share of which a measurement speaks."""


class Stolen:
    """Over a ``with`` block: ``share`` of all processors' time, 0 to 1; None where no kernel says it."""

    def __init__(self, source: Path = Path("/proc/stat")) -> None:
        self._source = source
        self._before: list[int] | None = None
        self.share: float | None = None

    def __enter__(self) -> Self:
        self._before = self._ticks()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._ticks()
        if self._before is not None and after is not None:
            spent = [now - then for now, then in zip(after, self._before, strict=True)]
            self.share = max(0.0, spent[_STEAL] / sum(spent)) if sum(spent) > 0 else 0.0

    def _ticks(self) -> list[int] | None:
        try:
            first = self._source.read_text().splitlines()[0].split()
        except (OSError, IndexError):
            return None
        ticks = [int(word) for word in first[1 : _STEAL + 2]]
        return ticks if len(ticks) == _STEAL + 1 else None
