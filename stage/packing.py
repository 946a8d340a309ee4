"""Chunks of a state made smaller for the line, where it pays.

Fp32 numbers of a state are nearly random but for sign and exponent: compressed as they lie they shrink by
7 %, sorted into byte planes (all first bytes, all second bytes, …) by 14 to 19 % (docs/benchmarks.md). A
donor tries chunk by chunk; after one that did not shrink by ``WORTH`` it sends the next ``PAUSE`` as they
are. Level 1 of zstandard is faster than any home line. Torch-free.
"""

from __future__ import annotations

import numpy
import zstandard

from p2p.errors import RemoteError

WORTH = 0.95
"""A packed chunk larger than this share of the plain one is not worth unpacking."""
PAUSE = 15
LEVEL = 1
PLANES = 4


class Packer:
    """Packs the chunks of one download, one at a time; on any thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdCompressor(level=LEVEL)
        self._rest = 0

    def pack(self, chunk: bytes) -> bytes | None:
        """The packed chunk; None where plain is as good."""
        if self._rest:
            self._rest -= 1
            return None
        packed = self._zstd.compress(_planes(chunk))
        if len(packed) > WORTH * len(chunk):
            self._rest = PAUSE
            return None
        return packed


def unpack(packed: bytes | bytearray | memoryview, size: int) -> memoryview:
    """The chunk of ``size`` bytes that was packed. Raises RemoteError; never makes more than ``size``."""
    try:
        if zstandard.frame_content_size(packed) != size:  # what it would make is known before it is made
            raise RemoteError("state: a packed chunk is not of the size that its manifest says")
        planes = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
    except zstandard.ZstdError as error:
        raise RemoteError(f"state: a packed chunk cannot be unpacked: {error}") from None
    if len(planes) != size:
        raise RemoteError("state: a packed chunk is not of the size that its manifest says")
    return _numbers(planes)


def _planes(data: bytes) -> bytes:
    """All first bytes, all second bytes, …; a state is whole fp32 numbers, so is each chunk."""
    return numpy.frombuffer(data, numpy.uint8).reshape(-1, PLANES).T.tobytes()


def _numbers(planes: bytes) -> memoryview:
    """Back. Plane by plane: numpy's transposed copy takes three times as long this way round."""
    numbers = numpy.empty((len(planes) // PLANES, PLANES), numpy.uint8)
    for place, plane in enumerate(numpy.frombuffer(planes, numpy.uint8).reshape(PLANES, -1)):
        numbers[:, place] = plane
    return numbers.reshape(-1).data
