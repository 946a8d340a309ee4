"""The few corners of protobuf that libp2p's own messages need: varints and length-delimited fields.

Keys, the Noise payload and identify are small messages of fields of wire type 0 and 2. Unknown
fields are skipped as protobuf demands. Input is limited by the caller (all come in frames with a
stated size); nothing here allocates more than the input holds.
Source: protobuf.dev/programming-guides/encoding, multiformats/unsigned-varint (at most 9 bytes).
"""

from __future__ import annotations

from collections.abc import Iterator

from p2p.errors import RemoteError

MAX_VARINT_BYTES = 10


def encode_varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes, offset: int = 0) -> tuple[int, int]:
    """Value and the offset behind it."""
    value = 0
    for position in range(offset, min(len(data), offset + MAX_VARINT_BYTES)):
        byte = data[position]
        value |= (byte & 0x7F) << 7 * (position - offset)
        if byte < 0x80:
            if value >= 1 << 64:
                raise RemoteError("varint does not fit 64 bits")
            return value, position + 1
    raise RemoteError("varint is cut short or too long")


def field(number: int, value: int | bytes) -> bytes:
    """One encoded field: an int as varint, bytes as length-delimited."""
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a message in order; RemoteError when it is malformed."""
    offset = 0
    while offset < len(data):
        tag, offset = decode_varint(data, offset)
        kind = tag & 7
        if kind == 0:
            number, offset = decode_varint(data, offset)
            yield tag >> 3, number
            continue
        if kind == 2:
            length, offset = decode_varint(data, offset)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise RemoteError(f"protobuf wire type {kind} is not in use")
        if length > len(data) - offset:
            raise RemoteError("protobuf field is longer than its message")
        if kind == 2:
            yield tag >> 3, data[offset : offset + length]
        offset += length


def last_fields(data: bytes) -> dict[int, int | bytes]:
    """Fields by number, the last of each winning (protobuf's rule for non-repeated fields)."""
    return dict(fields(data))
