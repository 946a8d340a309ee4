"""multistream-select 1.0: both sides agree on what a byte stream speaks. Sans-IO.

A message is a varint length, UTF-8 text and a newline. The dialer sends ``/multistream/1.0.0`` and
the protocol that it wants; the listener echoes both, or answers ``na``. A dialer that wants one
protocol only (all of ours do) sends its first payload right behind the proposal, so that
negotiation costs no round trip: ``proposal`` is the prefix and ``Confirmation`` reads the answer
when the first bytes come back. ``Listener`` is the other side.
Limits: a message has at most 256 bytes; a listener hears at most 8 proposals a stream.
Source: github.com/multiformats/multistream-select.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import final

from p2p import protobuf
from p2p.errors import RemoteError, UnsupportedProtocol

VERSION = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
MIN_MESSAGE = 3
"""Length, one character, newline."""
MAX_MESSAGE = 256
MAX_PROPOSALS = 8


def encode(text: str) -> bytes:
    """One message."""
    data = text.encode() + b"\n"
    return protobuf.encode_varint(len(data)) + data


@lru_cache(maxsize=256)
def proposal(protocol: str) -> bytes:
    """What a dialer sends first, and what a listener that speaks the protocol echoes."""
    return encode(VERSION) + encode(protocol)


def proposed(data: bytes) -> tuple[str, int] | None:
    """The protocol that ``data`` begins by proposing, and how many bytes that takes.

    None unless the whole proposal is there and simple; then ``Listener`` has to look closer.
    """
    if not data.startswith(_GREETING) or len(data) <= len(_GREETING):
        return None
    begin, size = len(_GREETING) + 1, data[len(_GREETING)]
    line = data[begin : begin + size]
    if not 1 < size < 0x80 or len(line) < size or line[-1:] != b"\n" or not line.isascii():
        return None
    return line[:-1].decode(), begin + size


_GREETING = encode(VERSION)


@final
class _Lines:
    """Cuts a byte stream into messages, never taking a byte more than it must."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._least = len(_GREETING)  # the first message can be no other

    @property
    def missing(self) -> int:
        """How many bytes are certainly part of the current message; 0 when it is complete."""
        if not self._buffer:
            return self._least
        if self._buffer[-1] & 0x80 and len(self._buffer) < 2:
            return 1
        length, offset = protobuf.decode_varint(bytes(self._buffer[:2]))
        if not 1 <= length <= MAX_MESSAGE:
            raise RemoteError(f"a multistream-select message of {length} bytes")
        if (missing := offset + length - len(self._buffer)) < 0:  # shorter than any that is allowed here
            raise RemoteError(f"a multistream-select message of {length} bytes is none of ours")
        return missing

    def feed(self, data: bytes) -> str | None:
        """Add at most ``missing`` bytes; the message once it is whole."""
        self._buffer += data
        if self._least == len(_GREETING) and not _GREETING.startswith(self._buffer):
            # Not waited for what its first byte, taken for a length, would promise.
            raise RemoteError(f"the stream starts with {bytes(self._buffer[:60])!r}, not with {VERSION}")
        if self.missing:
            return None
        _length, offset = protobuf.decode_varint(bytes(self._buffer[:2]))
        line = bytes(self._buffer[offset:])
        self._buffer.clear()
        self._least = MIN_MESSAGE
        if not line.endswith(b"\n"):
            raise RemoteError("a multistream-select message does not end its line")
        try:
            return line[:-1].decode()
        except UnicodeDecodeError as error:
            raise RemoteError("a multistream-select message is not text") from error


@final
class Confirmation:
    """The dialer's side: feed it ``missing`` bytes at a time until that is 0."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self._lines = _Lines()
        self._expected = [VERSION, protocol]

    @property
    def missing(self) -> int:
        return self._lines.missing if self._expected else 0

    def feed(self, data: bytes) -> None:
        """UnsupportedProtocol when the listener said no."""
        line = self._lines.feed(data)
        if line is None:
            return
        if line == NOT_AVAILABLE and self._expected[0] == self.protocol:
            raise UnsupportedProtocol(f"the peer does not speak {self.protocol}")
        if line != self._expected[0]:
            raise RemoteError(f"multistream-select answered {line[:60]!r} to {self._expected[0]!r}")
        del self._expected[0]


@final
class Listener:
    """The listener's side: ``feed`` returns what to send; ``protocol`` is set once one was agreed."""

    def __init__(self, speaks: Callable[[str], bool]) -> None:
        self.protocol: str | None = None
        self._speaks = speaks
        self._lines = _Lines()
        self._greeted = False
        self._proposals = 0

    @property
    def missing(self) -> int:
        return self._lines.missing if self.protocol is None else 0

    def feed(self, data: bytes) -> bytes:
        line = self._lines.feed(data)
        if line is None:
            return b""
        if not self._greeted:
            if line != VERSION:
                raise RemoteError(f"the stream starts with {line[:60]!r}, not with {VERSION}")
            self._greeted = True
            return encode(VERSION)
        if self._speaks(line):
            self.protocol = line
            return encode(line)
        self._proposals += 1
        if self._proposals >= MAX_PROPOSALS:
            raise RemoteError(f"the peer proposed {MAX_PROPOSALS} protocols that we do not speak")
        return encode(NOT_AVAILABLE)
