"""Which replica should move to which stage, if any. Pure and torch-free.

A pipeline is as fast as its slowest stage, and a stage as fast as its replicas together. A move takes a
replica from one stage to another; it is worth proposing when the *slower of the two stages* is faster
afterwards than the receiving stage is now, by at least ``LEAST_GAIN``. With every such move the sorted list
of the stages' rates grows in lexicographic order: moves cannot go in circles, small differences move nobody.
The receiving stage is the slowest, the giving one the fastest that has a fitting replica to spare. What the
mover does not do while it downloads and catches up must be earned back within ``HORIZON_S``. Of several
movers that with the best outcome goes; ties are broken by peer id, so that everybody who sees the
same rates proposes the same move.

Rates are microbatches a second. Whoever uses this makes sure that one move is under way at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from p2p.identity import PeerId

LEAST_GAIN: Final = 0.2
HORIZON_S: Final = 1800.0
"""How long a volunteer may be expected to stay."""


@attrs.frozen
class Move:
    """A replica that should change its stage."""

    peer: PeerId
    origin: int
    target: int
    gain: float
    """By how much the slower of the two stages is faster afterwards than the target is now; infinite for a
    target that has nobody."""


def propose(
    rates: Sequence[Mapping[PeerId, float]],
    work: Sequence[float],
    *,
    cost_s: Callable[[PeerId, int], float | None],
) -> Move | None:
    """The move that helps most, or None.

    ``rates``: of the serving replicas of each stage. ``work``: what one microbatch costs a machine at each
    stage, in any one unit, by which a rate at one stage tells that at another. ``cost_s``: seconds that a
    replica serves nobody when it moves to a stage, None if it must not or cannot go there.
    """
    totals = [sum(stage.values()) for stage in rates]
    target = min(range(len(totals)), key=lambda stage: (totals[stage], stage))
    origins = sorted(range(len(totals)), key=lambda stage: (-totals[stage], stage))
    for origin in origins:
        if len(rates[origin]) < 2 or totals[origin] <= totals[target]:
            continue  # a stage is never emptied
        best: tuple[float, PeerId] | None = None
        for peer, rate in sorted(rates[origin].items()):
            cost = cost_s(peer, target)
            if cost is None:
                continue
            there = rate * work[origin] / work[target]
            after = min(totals[origin] - rate, totals[target] + there)
            if not _pays(after, totals[target], cost):
                continue
            if best is None or after > best[0]:
                best = after, peer
        if best is not None:
            gain = best[0] / totals[target] - 1 if totals[target] else float("inf")
            return Move(best[1], origin, target, gain)
    return None


def _pays(after: float, before: float, cost_s: float) -> bool:
    """Whether a slowest stage that gets from one rate to another outweighs a mover away for that long."""
    if after < before * (1 + LEAST_GAIN) or after <= 0:
        return False
    return (after - before) * HORIZON_S > after * cost_s
