"""Who reduces what: pure arithmetic that every member repeats and gets the same answer from.

A vector of ``floats`` fp32 numbers is cut into parts of ``part_bytes`` (the last one shorter). Each
part has one reducer; a member reduces a contiguous run of parts in proportion to its share, so that
one that nobody can dial (share 0) reduces nothing. Parts are small enough that reducing, sending and
deputising overlap, and at least one a reducer where the vector allows it.

Shares follow bandwidth (``portions``), so that all members need the same time where that is possible: a
member sends its own numbers for the rest of the vector, and the means of its share to everybody.

Weights are what members say of themselves (samples since the last round), so the leader bounds them:
nobody counts more than ``CLAMP`` times the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

FLOAT_BYTES: Final = 4
MAX_PART_BYTES: Final = 1 << 20
PART_BYTES: Final = MAX_PART_BYTES - 4096
"""As a rule: with its header it fills four batches of records; a whole MiB leaves 447 bytes for a fifth."""
MAX_PARTS: Final = 4096
PARTS_EACH: Final = 4
"""Parts that a reducer has at least, given enough numbers: it reduces one while others move."""
ALIGNMENT: Final = 1024
"""Parts end on blocks of 256 floats, the unit that slices are made of."""
CLAMP: Final = 4.0
ALIKE: Final = 1.25
"""Speeds no further apart than this are the same: nobody measures better than that."""


def part_size(floats: int, reducers: int, wanted: int) -> int:
    """Bytes a part: ``wanted``, less where reducers would wait, more where parts would be too many.

    Less, too, so that reducers of one speed have as many parts each, where blocks allow: a round is over with
    the last of them.
    """
    total, reducers = floats * FLOAT_BYTES, max(1, reducers)
    size = min(wanted, -(-total // (PARTS_EACH * reducers)))
    size = _aligned(max(size, -(-total // MAX_PARTS), 1))
    parts = max(1, -(-total // size))
    for many in range(-(-parts // reducers) * reducers, min(2 * parts, MAX_PARTS) + 1, reducers):
        even = _aligned(-(-total // many))
        if 0 < even <= size and -(-total // even) % reducers == 0:
            return even
    return size


def _aligned(size: int) -> int:
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


def portions(mbps: Sequence[float], dialled: Sequence[bool]) -> list[float]:
    """The share of each member, adding up to 1; for who cannot be dialled 0, unless nobody can be.

    ``mbps``: what each says that it can send, 0 where that is not known. Nobody counts as faster or slower
    than ``CLAMP`` times the median, and the unknown as the median: a boast does not draw everything to one.

    With share s of a vector B long, n members, a member sends and receives B(1 - s) and B(n - 1)s: in time
    ``(1 + (n - 2)s)B / speed``. Shares make these times equal; who is too slow even without a share has none.
    """
    n = len(mbps)
    reducers = [i for i in range(n) if dialled[i]] or list(range(n))
    known = [speed for speed in mbps if speed > 0]
    if n < 3 or not known:  # two send the same whatever they reduce
        return [1 / len(reducers) if i in reducers else 0.0 for i in range(n)]
    usual = statistics.median(known)
    speeds = [min(max(speed / usual, 1 / CLAMP), CLAMP) if speed > 0 else 1.0 for speed in mbps]
    speeds = [1.0 if 1 / ALIKE <= speed <= ALIKE else speed for speed in speeds]
    while True:
        seconds = (n - 2 + len(reducers)) / sum(speeds[i] for i in reducers)
        slow = [i for i in reducers if seconds * speeds[i] <= 1]
        if not slow:
            break
        reducers = [i for i in reducers if i not in slow]
    return [(seconds * speeds[i] - 1) / (n - 2) if i in reducers else 0.0 for i in range(n)]


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
