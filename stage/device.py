"""The device thread: everything that touches weights runs here, one job after another.

One thread and one small queue instead of locks: forward, backward, optimizer step, slice pack and
merge, and snapshots' captures never overlap, so each sees whole weights. Order: what frees memory
and unblocks others first (backward, then steps and merges, then forward), oldest first within a kind.
The queue is bounded by the slots that the worker grants; jobs are short (one microbatch or one pass
over the weights) and cannot be interrupted, so a cancelled waiter leaves its job to finish, unless
the job has not begun, in which case it is dropped.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import outcome
import trio

T = TypeVar("T")

BACKWARD, STEP, FORWARD = 0, 1, 2
JOBS = ("backward", "step", "forward")
"""Names of the priorities; a step is all that is neither pass: updates, slices, copies of the state."""
MAX_QUEUED = 4096


@attrs.define(eq=False)
class _Job:
    call: Callable[[], Any]
    token: trio.lowlevel.TrioToken
    done: trio.Event
    state: str = "queued"
    """queued -> running -> ended, or queued -> dropped."""
    result: outcome.Outcome[Any] | None = None


class Device:
    """Runs jobs on one thread by priority. Use as a context manager around the worker's life."""

    def __init__(
        self, name: str = "device", *, failed: Callable[[BaseException], None] | None = None
    ) -> None:
        """``failed`` is told, on the waiter's thread, what a job raised, whoever handles it afterwards."""
        self._failed = failed
        self._condition = threading.Condition()
        self._heap: list[tuple[int, int, _Job]] = []
        self._order = itertools.count()
        self._closing = False
        self.busy_s = dict.fromkeys(JOBS, 0.0)
        """Seconds spent in jobs since the start, by kind (utilisation = their sum / wall)."""
        self.jobs = dict.fromkeys(JOBS, 0)
        """How many there were."""
        self.running_since: float | None = None
        """``time.monotonic`` at which the present job began; None while there is none."""
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> Device:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    async def run(self, priority: int, call: Callable[..., T], *args: Any) -> T:
        """Run ``call(*args)`` on the device thread and return what it returns.

        Cancelled before the job began: the job is dropped. Cancelled later: the job ends first,
        because what it changed (an accumulator, the weights) has to be accounted for.
        """
        job = _Job(lambda: call(*args), trio.lowlevel.current_trio_token(), trio.Event())
        with self._condition:
            if self._closing:
                raise RuntimeError("the device is closed")  # nobody would ever run the job
            if len(self._heap) >= MAX_QUEUED:
                raise RuntimeError(f"the device queue holds {MAX_QUEUED} jobs: slots are not bounding it")
            heapq.heappush(self._heap, (priority, next(self._order), job))
            self._condition.notify()
        try:
            await job.done.wait()
        except trio.Cancelled:
            with self._condition:
                if job.state == "queued":
                    job.state = "dropped"
            if job.state == "dropped":
                raise
            with trio.CancelScope(shield=True):
                await job.done.wait()
        assert job.result is not None
        if self._failed is not None and isinstance(job.result, outcome.Error):
            self._failed(job.result.error)
        result: T = job.result.unwrap()
        return result

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._heap and not self._closing:
                    self._condition.wait()
                if not self._heap:
                    return
                priority, _, job = heapq.heappop(self._heap)
                if job.state == "dropped":
                    continue
                job.state = "running"
            began = self.running_since = time.monotonic()
            job.result = outcome.capture(job.call)
            self.running_since = None
            self.busy_s[JOBS[priority]] += time.monotonic() - began
            self.jobs[JOBS[priority]] += 1
            job.state = "ended"
            try:
                job.token.run_sync_soon(job.done.set)
            except trio.RunFinishedError:
                return
            del job  # while the thread waits, it holds nobody's tensors
