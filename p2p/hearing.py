"""Messages of a call, heard as their bytes arrive: for calls that carry many, where a turn for each is dear.

``Hearing`` says where the next bytes belong (``first``, then what ``filled`` returns each time that is full)
and hands every message over as soon as it is whole. Sans-IO; an empty buffer says that it is over. Limits:
those of ``rpc``; one payload buffer, and headers as they come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

_NOTHING = memoryview(b"")


@final
class Hearing:
    """The messages of one direction of one call, from the beginning of one of them on."""

    def __init__(
        self,
        sizes_of: Callable[[memoryview], tuple[int, int]],
        header_of: Callable[[memoryview], dict[str, Any]],
        heard: Callable[[dict[str, Any], memoryview], None],
        coming: Callable[[int], None],
        *,
        size: int,
        into: memoryview,
        place: Callable[[dict[str, Any], int], memoryview | None] = lambda header, size: None,
    ) -> None:
        """``sizes_of`` the first ``size`` bytes: of header (above 0) and payload. ``header_of`` reads one.

        Both may raise, and so may ``heard``: then it ends, with ``failure``. ``coming`` is told how much of
        a message is to come. Payloads lie where ``place`` says by header and size, in so many bytes; else in
        ``into``, which ``sizes_of`` lets no message outgrow.
        """
        self.failure: Exception | None = None
        self._sizes_of = sizes_of
        self._header_of = header_of
        self._heard = heard
        self._coming = coming
        self._sizes = memoryview(bytearray(size))
        self._into = into
        self._place = place
        self._buffer = self.first = self._sizes
        self._header: dict[str, Any] | None = None
        self._payload_size = 0

    def filled(self) -> memoryview:
        """The last buffer is full: the next one, or nothing where this is over."""
        try:
            self._buffer = self._next()
        except Exception as error:
            self.failure = error
            self._buffer = _NOTHING
        return self._buffer

    def _next(self) -> memoryview:
        if self._buffer is self._sizes:
            header_size, self._payload_size = self._sizes_of(self._sizes)
            self._coming(header_size + self._payload_size)
            return memoryview(bytearray(header_size))
        if self._header is None:
            header = self._header_of(self._buffer)
            if self._payload_size:
                self._header = header
                place = self._place(header, self._payload_size)
                return self._into[: self._payload_size] if place is None else place
            self._heard(header, _NOTHING)
        else:
            header, self._header = self._header, None
            self._heard(header, self._buffer)
        return self._sizes
