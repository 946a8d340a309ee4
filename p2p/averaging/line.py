"""A line: one call as two ordered queues of messages, since state machines answer at once and streams do not.

Whoever has something to say posts it to the ``Outbox``, whether the call exists yet or not; ``carry`` moves
messages both ways while the call lives. Closing an outbox ends its line once everything in it was sent, so
that last words arrive; the other side then sees the end of the stream.

Limit: 16,384 messages waiting; payloads are views of buffers that exist anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Final

import trio

from p2p.averaging.meter import Meter
from p2p.averaging.reducer import Buffer
from p2p.errors import P2PError, Refused
from p2p.rpc import Call

if TYPE_CHECKING:
    from p2p.host import Host

QUEUE_LIMIT: Final = 16384
TOGETHER: Final = 1 << 20
"""Bytes of waiting messages, and a last one, that go out as one: the line does not pause between them."""
AHEAD: Final = 2 << 20
"""Bytes beyond a message with a payload that may be under way to us: 80 ms of a line of 200 Mbit/s.
With 1 MiB one of 40 ms stood still whenever all of it was for one connection."""
HEARD: Final = "heard"

Heard = Callable[[Mapping[str, Any], memoryview], None]
Place = Callable[[Mapping[str, Any], int], memoryview | None]


def check_mate(call: Call, host: Host, stage: int) -> None:
    """Refuse a peer whose certificate is not for this stage; a host without membership trusts everybody."""
    member = call.member
    if host.membership is not None and (member is None or (member.role, member.stage) != ("worker", stage)):
        raise Refused("wrong_stage", f"rounds of stage {stage} are for its own replicas")


class Outbox:
    """Messages on their way to one peer."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._meter = meter
        self._queue: deque[tuple[dict[str, Any], Buffer]] = deque()
        self._changed = trio.Event()
        self._closed = False
        self.payload_out = 0
        self.payload_in = 0

    def post(self, header: dict[str, Any], payload: Buffer = b"", *, first: bool = False) -> None:
        """Queue a message, in front of all others if ``first``.

        One who asks and asks without reading the answers loses the line.
        """
        if len(self._queue) >= QUEUE_LIMIT:
            self._queue.clear()
            self._closed = True
        elif first and not self._closed:
            self._queue.appendleft((header, payload))
        elif not self._closed:
            self._queue.append((header, payload))
        self._changed.set()

    def close(self) -> None:
        """Nothing more will be posted."""
        self._closed = True
        self._changed.set()

    def forget_payloads(self) -> None:
        """Drop queued messages that point into buffers whose time is over."""
        self._queue = deque(one for one in self._queue if not isinstance(one[1], memoryview))

    async def drain(self, call: Call) -> None:
        """Send until closed and empty."""
        while True:
            with nullcontext() if self._meter is None else self._meter.sending():
                await self._send_waiting(call)
            if self._closed:
                return
            self._changed = trio.Event()
            await self._changed.wait()

    async def _send_waiting(self, call: Call) -> None:
        while self._queue:
            messages, size = [], 0
            while self._queue and size < TOGETHER:
                messages.append(self._queue.popleft())
                size += len(messages[-1][1])
            await call.send_together(messages)
            self.payload_out += size
            if self._meter is not None and size:
                self._meter.sent(size)


async def carry(
    call: Call,
    outbox: Outbox,
    heard: Heard,
    *,
    max_payload: int = 0,
    place: Place = lambda header, size: None,
) -> None:
    """Both directions until the outbox is closed and sent; raises what ended it earlier, RemoteError or so.

    The callee has said ``HEARD`` before: the echo that negotiation still owes leaves with the first message,
    and must not be left to a reader that would then send while the writer does. While carried, the
    connection is watched: two seconds of silence end it. A payload is ``heard``'s until it returns: the next
    one comes into the same buffer, or to where ``place`` says by its header and size.
    """
    ahead = AHEAD if max_payload else 0
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(call.connection.watched())
        failure: Exception | None = None
        buffer = memoryview(bytearray(max_payload))
        async with trio.open_nursery() as nursery:

            def told(header: Mapping[str, Any], payload: memoryview) -> None:
                outbox.payload_in += len(payload)
                if header.get("t") != HEARD:
                    heard(header, payload)

            async def listen() -> None:
                nonlocal failure
                try:
                    first = await call.receive(into=buffer, ahead=ahead)
                    told(first.header, first.payload)
                    await call.hear(told, into=buffer, ahead=ahead, place=place)
                except Exception as error:
                    failure = error
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            try:
                await outbox.drain(call)
            except P2PError as error:
                failure = failure or error
            nursery.cancel_scope.cancel()
        try:
            if failure is not None:
                raise failure
        finally:
            failure = None  # it knows this frame, which knows the round's vectors
