"""A worker whose device takes a given time for each microbatch: ``python slowed.py SECONDS --config FILE``.

Its passes wait until that time is over, half of it each, so that machines of different speed can be compared
on one that computes for all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from agorad import main
from stage.compute import StageCompute


def slowed(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def wait_after(*args: Any) -> Any:
        ends = time.monotonic() + seconds
        result = call(*args)
        time.sleep(max(0.0, ends - time.monotonic()))
        return result

    return wait_after


if __name__ == "__main__":
    seconds = float(sys.argv.pop(1))
    StageCompute.forward = slowed(StageCompute.forward, seconds / 2)  # type: ignore[method-assign]
    StageCompute.backward = slowed(StageCompute.backward, seconds / 2)  # type: ignore[method-assign]
    sys.exit(main.main())
