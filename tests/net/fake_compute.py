"""The work of a stage without any: bytes in, bytes out, and a gate where it waits."""

from __future__ import annotations

import hashlib
import threading
import time

import trio

from p2p.errors import RemoteError
from stage.messages import Request
from stage.microbatch import Shape

PATIENCE_S = 15.0
TOKENS, BOUNDARY, LIKELIEST = 4, 8, 24
IDS = bytes(4 * (TOKENS + 1))
C = bytes(range(BOUNDARY))
OTHER_C = bytes(BOUNDARY)


class Gate:
    """Where the device thread waits once it is shut."""

    def __init__(self) -> None:
        self._began = threading.Event()
        self._go = threading.Event()
        self._go.set()

    def shut(self) -> None:
        self._began.clear()
        self._go.clear()

    def open(self) -> None:
        self._go.set()

    def __call__(self) -> None:
        self._began.set()
        self._go.wait(PATIENCE_S)

    async def reached(self) -> None:
        assert await trio.to_thread.run_sync(self._began.wait, PATIENCE_S)


class FakeHeld:
    """A microbatch after its forward pass."""

    def __init__(self, compute: FakeCompute, c: bytes) -> None:
        self.loss, self.c, self.likeliest = 1.5, c, b""
        self._compute = compute
        compute.held.add(self)

    def release(self) -> None:
        self._compute.held.discard(self)


class FakeCompute:
    """Bytes in, bytes out that depend on ``weights``, and a memory of what was asked."""

    def __init__(self, shape: Shape, weights: bytes) -> None:
        self._shape = shape
        self._weights = weights
        self.forwards: list[tuple[float, Request]] = []
        self.gradients: list[bytes] = []
        self.held: set[FakeHeld] = set()
        self.at_forward, self.at_backward = Gate(), Gate()
        self.refuses_gradients = False
        self.likeliest = b""
        """What it answered last to a ticket of generation."""

    def forward(self, request: Request, ids: memoryview, c: memoryview) -> FakeHeld:
        assert (len(ids), len(c)) == (len(IDS), self._shape.c_bytes)
        self.forwards.append((time.time(), request))
        self.at_forward()
        out = hashlib.sha256(self._weights + bytes(ids) + bytes(c)).digest()
        held = FakeHeld(self, b"" if self._shape.tail else out[:BOUNDARY])
        if self._shape.tail and request.ticket.kind == "generate":
            self.likeliest = held.likeliest = out[:LIKELIEST]
        return held

    def backward(self, held: FakeHeld, dc: memoryview) -> bytes:
        assert held in self.held
        assert len(dc) == self._shape.next_back_bytes
        self.at_backward()
        if self.refuses_gradients:
            raise RemoteError("not finite")
        self.gradients.append(bytes(dc))
        return hashlib.sha256(self._weights + bytes(dc)).digest()[: self._shape.dc_bytes]
