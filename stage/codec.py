"""How parts of a round travel: bf16, or int8 with a scale every 256 numbers; fp32 is ``PlainCodec``.

A member encodes its own numbers, the reducer adds them up in fp32 and encodes the mean once, and all take
over that mean as decoded: so that they agree to the bit, and each number is rounded twice at most. Sizes: 2
bytes a number; 1 byte and 4 for each begun block. Little endian.
"""

from __future__ import annotations

from typing import Any, Final

import numpy

from p2p.averaging.reducer import Buffer, Codec, PlainCodec

BLOCK: Final = 256
"""Numbers that share a scale in int8: the largest of them is 127 steps."""
_FP32: Final = numpy.dtype("<f4")
_WORD: Final = numpy.dtype("<u4")
_HALF: Final = numpy.dtype("<u2")
_QUIET: Final = 0x7FC0
"""A bf16 that is no number."""

Floats = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


class Bf16Codec:
    """The upper half of fp32, rounded to nearest, ties to even."""

    error = 2.0**-8

    def size(self, n: int) -> int:
        return n // 2

    def encode(self, part: Buffer) -> Buffer:
        words = numpy.frombuffer(part, _WORD)
        rounded = (words + (0x7FFF + (words >> 16 & 1)).astype(_WORD)) >> 16
        no_number = numpy.isnan(words.view(_FP32))  # rounding may carry one past all exponents
        return numpy.where(no_number, _QUIET, rounded).astype(_HALF).tobytes()

    def decode(self, coded: Buffer) -> Buffer:
        return (numpy.frombuffer(coded, _HALF).astype(_WORD) << 16).astype(_WORD).tobytes()


class Int8Codec:
    """Whole steps of a block's scale, scales first. A number that is not finite makes its block NaN."""

    error = 1 / 127

    def size(self, n: int) -> int:
        count = n // 4
        return count + 4 * -(-count // BLOCK)

    def encode(self, part: Buffer) -> Buffer:
        values = numpy.frombuffer(part, _FP32)
        blocks = numpy.zeros((-(-len(values) // BLOCK), BLOCK), numpy.float32)
        blocks.reshape(-1)[: len(values)] = values
        with numpy.errstate(invalid="ignore"):
            scales = (numpy.abs(blocks).max(axis=1, initial=0) / numpy.float32(127)).astype(_FP32)
            scales[~numpy.isfinite(scales)] = numpy.nan
            steps = blocks / numpy.where(scales > 0, scales, numpy.float32(1))[:, None]
        whole = numpy.clip(numpy.rint(numpy.nan_to_num(steps)), -127, 127).astype(numpy.int8)
        coded: bytes = scales.tobytes() + whole.reshape(-1)[: len(values)].tobytes()
        return coded

    def decode(self, coded: Buffer) -> Buffer:
        count = len(coded) - 4 * -(-len(coded) // (BLOCK + 4))
        blocks = -(-count // BLOCK)
        scales = numpy.frombuffer(coded, _FP32, blocks)
        whole = numpy.frombuffer(coded, numpy.int8, count, 4 * blocks)
        values: Floats = whole.astype(numpy.float32) * numpy.repeat(scales, BLOCK)[:count]
        return values.astype(_FP32).tobytes()


CODECS: Final[dict[str, Codec]] = {"fp32": PlainCodec(), "bf16": Bf16Codec(), "int8": Int8Codec()}
