"""Messages heard as they arrive: whole and in order however they are cut, and an end for what is none."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.hearing import Hearing

SIZES = struct.Struct(">II")


class Heard:
    """A hearing of headers that are one number, and what came of it."""

    def __init__(self, refuse: int = -1) -> None:
        self.messages: list[tuple[int, bytes]] = []
        self.coming: list[int] = []
        self._refuse = refuse
        into = memoryview(bytearray(300))
        self.hearing = Hearing(
            self._sizes_of, self._header_of, self._heard, self.coming.append, size=SIZES.size, into=into
        )
        self._target = self.hearing.first

    def _sizes_of(self, data: memoryview) -> tuple[int, int]:
        header_size, payload_size = SIZES.unpack(data)
        if payload_size > 300:
            raise ValueError("too much")
        return header_size, payload_size

    def _header_of(self, data: memoryview) -> dict[str, Any]:
        return {"n": int(bytes(data))}

    def _heard(self, header: dict[str, Any], payload: memoryview) -> None:
        if header["n"] == self._refuse:
            raise ValueError("not this one")
        self.messages.append((header["n"], bytes(payload)))

    def feed(self, data: bytes) -> int:
        """How much of it was taken."""
        taken = 0
        while taken < len(data) and self._target:
            size = min(len(self._target), len(data) - taken)
            self._target[:size] = data[taken : taken + size]
            self._target = self._target[size:] or self.hearing.filled()
            taken += size
        return taken


def wire(messages: list[tuple[int, bytes]]) -> bytes:
    return b"".join(
        SIZES.pack(len(str(number)), len(payload)) + str(number).encode() + payload
        for number, payload in messages
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.binary(max_size=300)), max_size=6),
    st.lists(st.integers(1, 400), min_size=1, max_size=20),
)
def test_messages_are_whole_however_they_are_cut(messages: list[tuple[int, bytes]], cuts: list[int]) -> None:
    heard, data, turn = Heard(), wire(messages), 0
    while data:
        cut = cuts[turn % len(cuts)]
        assert heard.feed(data[:cut]) == len(data[:cut])
        data, turn = data[cut:], turn + 1
    assert heard.messages == messages
    assert heard.coming == [len(str(number)) + len(payload) for number, payload in messages]
    assert heard.hearing.failure is None


@pytest.mark.parametrize(
    ("last", "taken"),
    [
        (SIZES.pack(1, 301), 8),
        (SIZES.pack(3, 5) + b"abc", 11),
        (wire([(7, b"x")]), 10),
        (wire([(7, b"")]), 9),
    ],
)
def test_what_is_no_message_ends_it_with_its_failure(last: bytes, taken: int) -> None:
    heard = Heard(refuse=7)
    first = wire([(1, b"a"), (2, b"")])
    assert heard.feed(first + last + b"more") == len(first) + taken
    assert heard.messages == [(1, b"a"), (2, b"")]
    assert isinstance(heard.hearing.failure, ValueError)
