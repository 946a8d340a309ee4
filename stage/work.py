"""Work in progress on one microbatch, and the calls that wait for it.

Calls join work and leave it (``stage.microbatch``): how they leave decides how long it goes on without them.
"""

from __future__ import annotations

import trio

from p2p.identity import PeerId
from p2p.rpc import Call
from stage.kept import Kept
from stage.messages import Request

ORPHAN_S = 5.0
"""How long work goes on without a caller: its replacement comes once the loss is noticed (2 s), its lease has
run out (1.5 s), and its own stage is computed again."""


class Work:
    """One microbatch in progress here, and who waits for it."""

    def __init__(self, request: Request, ids: memoryview, c: memoryview, c_hash: bytes) -> None:
        self.request = request
        """That of the call which brought it."""
        self.ids = ids
        self.c = c
        self.c_hash = c_hash
        self.callers: tuple[Call, ...] = ()
        """Never changed in place: the device thread looks at it."""
        self.path: list[PeerId] = []
        """Who works on it in later stages, as far as it is known, the next stage first."""
        self.result: Kept | None = None
        self.failure: Exception | None = None
        """Neither result nor failure once it is done: it was dropped."""
        self.done = False
        self.scope = trio.CancelScope()
        self._news = trio.Event()

    async def news(self) -> None:
        """Wait until ``path`` has grown or the work is done."""
        await self._news.wait()

    def tell(self) -> None:
        """There is news."""
        news, self._news = self._news, trio.Event()
        news.set()

    def passed_on(self, path: list[PeerId]) -> None:
        self.path = path
        self.tell()

    def join(self, call: Call) -> None:
        self.callers = (*self.callers, call)
        self.scope.deadline = float("inf")

    def leave(self, call: Call, *, lost: bool) -> None:
        """Without callers the work ends: at once, or after a while if they were lost and may be replaced."""
        self.callers = tuple(one for one in self.callers if one is not call)
        if not self.callers and lost:
            self.scope.deadline = trio.current_time() + ORPHAN_S
        elif not self.callers:
            self.scope.cancel()

    @property
    def orphan(self) -> bool:
        return not self.callers

    @property
    def leased(self) -> bool:
        """Whether a caller that waits was alive a moment ago; callable from any thread."""
        return any(call.connection.lease.fresh() for call in self.callers)
