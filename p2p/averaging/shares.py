"""Who reduces what: pure arithmetic that every member repeats and gets the same answer from.

A vector of ``floats`` fp32 numbers is cut into parts of ``part_bytes`` (the last one shorter). Each
part has one reducer; a member reduces a contiguous run of parts in proportion to its share, so that
one that nobody can dial (share 0) reduces nothing. Parts are small enough that reducing, sending and
deputising overlap, and at least one a reducer where the vector allows it.

Weights are what members say of themselves (samples since the last round), so the leader bounds them:
nobody counts more than ``CLAMP`` times the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

FLOAT_BYTES: Final = 4
MAX_PART_BYTES: Final = 1 << 20
MAX_PARTS: Final = 4096
PARTS_EACH: Final = 4
"""Parts that a reducer has at least, given enough numbers: it reduces one while others move."""
ALIGNMENT: Final = 1024
"""Parts end on blocks of 256 floats, the unit that slices are made of."""
CLAMP: Final = 4.0


def part_size(floats: int, reducers: int, wanted: int) -> int:
    """Bytes a part: ``wanted``, less where reducers would wait, more where parts would be too many."""
    total = floats * FLOAT_BYTES
    size = min(wanted, -(-total // (PARTS_EACH * max(1, reducers))))
    size = max(size, -(-total // MAX_PARTS), 1)
    return -(-size // ALIGNMENT) * ALIGNMENT


def spans(floats: int, part_bytes: int) -> list[tuple[int, int]]:
    """Byte range ``[start, stop)`` of every part."""
    total = floats * FLOAT_BYTES
    return [(start, min(start + part_bytes, total)) for start in range(0, total, part_bytes)]


def owners(parts: int, shares: Sequence[float]) -> list[int]:
    """The reducer (an index into ``shares``) of every part; runs are contiguous, within one part of exact.

    Part p goes to the member in whose interval of the cumulated shares its middle lies.
    """
    total = sum(shares)
    if total <= 0:
        raise ValueError("no member can reduce: all shares are zero")
    result: list[int] = []
    last = max(i for i, share in enumerate(shares) if share > 0)
    member, reached = 0, shares[0] / total
    for part in range(parts):
        middle = (part + 0.5) / parts
        while member < last and middle >= reached:
            member += 1
            reached += shares[member] / total
        result.append(member)
    return result


def clamp(weights: Sequence[float]) -> list[float]:
    """Weights bounded by ``CLAMP`` x the median of those above zero; all zero stays all zero."""
    positive = [weight for weight in weights if weight > 0]
    if not positive:
        return list(weights)
    limit = CLAMP * statistics.median(positive)
    return [min(weight, limit) for weight in weights]


def groups(count: int, limit: int) -> list[int]:
    """Sizes of the fewest groups of at most ``limit`` that ``count`` members split into, nearly equal."""
    pieces = -(-count // limit)
    return [count // pieces + (1 if i < count % pieces else 0) for i in range(pieces)]
