"""Figures as people read them: times, amounts of bytes, tables. Cheap to import."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def duration(seconds: float) -> str:
    """``2d03h``, ``3h12m``, ``12m05s`` or ``7s``."""
    whole = int(seconds)
    if whole >= 48 * 3600:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def size(count: float) -> str:
    """``512 B``, ``1.2 MB``: powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def or_dash(value: Any) -> str:
    """The value, or "-" where there is none."""
    return "-" if value is None else str(value)


def align(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    dispensable: Collection[str] = (),
) -> list[str]:
    """Lines of columns. Those in ``dispensable`` go first, in its order, where ``width`` is too small."""
    every = [head, *rows]
    widths = {name: max(len(row[at]) for row in every) for at, name in enumerate(head)}
    for name in dispensable:
        if width is None or sum(widths.values()) + 2 * (len(widths) - 1) <= width:
            break
        widths.pop(name, None)
    return [
        "  ".join(row[at].ljust(widths[name]) for at, name in enumerate(head) if name in widths).rstrip()
        for row in every
    ]
