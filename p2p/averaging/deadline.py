"""How long the exchange of a round may take: pure arithmetic, done by the leader for its roster.

Three times what the last exchanges took, so that one who lags is not waited for much longer than it is
worth; never longer than three times what the slowest link needs for its bytes and two seconds. With less, a
round that is a fifth slower than others met the mark at which deputies take over, and what they ask for again
made it slower still. Not below ``FLOOR_S``: a busy machine stands still for a second or two, and a round that
is given up costs more than a wait. With neither measured, nothing bounds it but the round's own end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

TIMES: Final = 3.0
LINK_TIMES: Final = 3.0
SPARE_S: Final = 2.0
FLOOR_S: Final = 5.0
REMEMBERED: Final = 5
"""Exchanges that are looked at."""


def exchange_seconds(recent: Sequence[float], nbytes: int, members: int, mbps: Sequence[float]) -> float:
    """Seconds; infinity where nothing is known.

    ``recent``: seconds that the last exchanges took; ``nbytes``: of the vector; ``mbps``: what each member's
    link carries, 0 where that is not known.
    """
    typical = TIMES * statistics.median(recent) if recent else math.inf
    known = [speed for speed in mbps if speed > 0]
    link = math.inf
    if known:
        moved = 2 * nbytes * (members - 1) / members  # each way: its numbers out and means in, or the reverse
        link = LINK_TIMES * moved * 8 / (min(known) * 1e6) + SPARE_S
    return max(FLOOR_S, min(typical, link))
