"""Base58 with Bitcoin's alphabet, the text form of libp2p peer ids.

Quadratic in the input, so input is limited; a peer id has 52 characters.
"""

from __future__ import annotations

from p2p.errors import RemoteError

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
MAX_LENGTH = 128
_VALUE = {character: value for value, character in enumerate(ALPHABET)}


def encode(data: bytes) -> str:
    """Text of ``data``; every leading zero byte becomes a ``1``."""
    number = int.from_bytes(data, "big")
    digits: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(ALPHABET[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def decode(text: str) -> bytes:
    """Inverse of ``encode``; RemoteError on a foreign character or an absurd length."""
    if len(text) > MAX_LENGTH:
        raise RemoteError(f"base58 text of {len(text)} characters; at most {MAX_LENGTH} are read")
    number = 0
    for character in text:
        value = _VALUE.get(character)
        if value is None:
            raise RemoteError(f"{character!r} is not a base58 character")
        number = number * 58 + value
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
