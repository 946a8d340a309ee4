"""How parts of a round travel: bf16, or int8 with a scale for each block of 256; fp32 is ``PlainCodec``.

A member encodes its own numbers, the reducer adds them up in fp32 and encodes the mean once, and all take
over that mean as decoded: so that they agree to the bit, and each number is rounded twice at most. Sizes: 2
bytes a number; 1 byte and 4 for each begun block. Little endian, on a little-endian machine; one thread.
"""

from __future__ import annotations

from typing import Final

import agora_kernels
import attrs

from p2p.averaging.reducer import Buffer, Codec, PlainCodec

BLOCK: Final = 256
"""Numbers that share a scale in int8: the largest is 127 steps; one that is not finite makes all NaN."""
_BF16: Final = 1
_INT8: Final = 3
"""As the kernels number the forms."""


@attrs.define
class KernelCodec:
    """One form. A block is its scale and then its numbers in steps of it (int8), or its numbers (bf16)."""

    form: int
    error: float

    def size(self, n: int) -> int:
        return n // 2 if self.form == _BF16 else n // 4 + 4 * -(-n // (4 * BLOCK))

    def encode(self, part: Buffer) -> Buffer:
        coded = bytearray(self.size(len(part)))
        if coded:
            agora_kernels.part_pack(part, coded, len(part) // 4, self.form, 1)
        return coded

    def decode(self, coded: Buffer) -> Buffer:
        scales = 0 if self.form == _BF16 else 4 * -(-len(coded) // (BLOCK + 4))
        part = memoryview(bytearray(2 * len(coded) if self.form == _BF16 else 4 * (len(coded) - scales)))
        self.decode_into(coded, part)
        return part

    def decode_into(self, coded: Buffer, part: memoryview) -> None:
        if part:
            agora_kernels.part_unpack(coded, part, len(part) // 4, self.form, 1)


CODECS: Final[dict[str, Codec]] = {
    "fp32": PlainCodec(),
    "bf16": KernelCodec(_BF16, 2.0**-8),
    "int8": KernelCodec(_INT8, 1 / 127),
}
