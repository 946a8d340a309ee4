"""Running a simulation so that the same seed gives the same trace.

What has to be fixed: the clock (virtual, jumping), trio's order of tasks that are ready at the same
moment (a private switch that trio keeps for this purpose), and every source of randomness (arguments
everywhere in ``p2p``). Iteration over sets of objects would still differ; ``p2p`` has none that
matters, and ``PYTHONHASHSEED`` covers sets of text. No threads may run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio
import trio.testing

T = TypeVar("T")


def run(seed: int, main: Callable[..., Awaitable[T]], *args: Any) -> T:
    """``trio.run`` in virtual time with task order drawn from ``seed``."""
    scheduler = trio._core._run  # the only handle that trio offers, see trio issue 239
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    state = scheduler._r.getstate()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    scheduler._r.seed(seed)
    try:
        return trio.run(main, *args, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before  # type: ignore[misc]
        scheduler._r.setstate(state)
