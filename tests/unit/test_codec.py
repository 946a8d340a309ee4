"""Parts on the wire: as near as the form allows, equal everywhere, and nothing bad looks good."""

from __future__ import annotations

import random
import struct

import agora_kernels
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import RemoteError
from stage.codec import BLOCK, CODECS
from stage.reduce import KernelReducer
from tests.unit.test_butterfly import Swarm, mean

STEP = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.5 / 127}
"""Largest error by the largest number of a block."""
LENGTHS = st.one_of(st.integers(0, 6), st.integers(BLOCK - 2, 2 * BLOCK + 2))


def plain_bf16(values: numpy.ndarray) -> bytes:
    words = values.view("<u4")
    rounded = ((words + (0x7FFF + (words >> 16 & 1)).astype("<u4")) >> 16).astype("<u2")
    return numpy.where(numpy.isnan(values), 0x7FC0, rounded).astype("<u2").tobytes()


def plain_int8(values: numpy.ndarray) -> bytes:
    coded = b""
    for begin in range(0, len(values), BLOCK):
        block = values[begin : begin + BLOCK]
        scale = numpy.float32(numpy.abs(block).max() / numpy.float32(127))
        steps = numpy.rint(block / scale) if scale else block
        coded += scale.tobytes() + steps.astype("i1").tobytes()
    return coded


@pytest.mark.parametrize("instructions", agora_kernels.instruction_sets())
@pytest.mark.parametrize("count", [1, 15, 255, 256, 257, 1000, 4096, 70_001])
def test_the_kernels_write_what_the_definition_says(instructions: str, count: int) -> None:
    values = numpy.random.default_rng(count).normal(size=count).astype("<f4")
    values[count // 2 :: 7] = 0
    before = agora_kernels.instruction_set()
    agora_kernels.use_instruction_set(instructions)
    try:
        for name, plain in (("bf16", plain_bf16), ("int8", plain_int8)):
            coded = CODECS[name].encode(values.tobytes())
            assert coded == plain(values)
            moved = memoryview(b"x" + coded)[1:]  # parts lie wherever the line put them
            assert CODECS[name].decode(moved) == CODECS[name].decode(coded)
    finally:
        agora_kernels.use_instruction_set(before)


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_part_that_is_too_short_is_refused(name: str) -> None:
    codec = CODECS[name]
    coded = codec.encode(bytes(4 * 300))
    with pytest.raises(ValueError, match="are needed"):
        codec.decode_into(coded[:-1], memoryview(bytearray(4 * 300)))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(CODECS)), LENGTHS, st.floats(1e-30, 1e30), st.integers(0, 1 << 30))
def test_what_comes_out_is_near_what_went_in(name: str, count: int, scale: float, seed: int) -> None:
    codec = CODECS[name]
    values = (numpy.random.default_rng(seed).normal(size=count) * scale).astype("<f4")
    coded = codec.encode(values.tobytes())
    assert len(coded) == codec.size(4 * count)
    decoded = numpy.frombuffer(codec.decode(coded), "<f4")
    for begin in range(0, count, BLOCK):
        block = slice(begin, begin + BLOCK)
        bound = STEP[name] * float(numpy.abs(values[block]).max()) * 1.001
        assert float(numpy.abs(decoded[block] - values[block]).max()) <= bound


@pytest.mark.parametrize("name", ["bf16", "int8"])
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_what_is_not_finite_is_refused_behind_the_wire_too(name: str, bits: int) -> None:
    values = numpy.linspace(-1, 1, BLOCK + 9).astype("<f4")
    values[BLOCK + 3] = struct.unpack("<f", struct.pack("<I", bits))[0]
    words = bytearray(values.tobytes())
    struct.pack_into("<I", words, 4 * (BLOCK + 3), bits)
    codec = CODECS[name]
    reducer = KernelReducer(len(words))
    with pytest.raises(RemoteError):
        reducer.add(codec.decode(codec.encode(words)), 1.0)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(CODECS)),
    st.integers(0, 1300),
    st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=2, max_size=6).filter(any),
    st.integers(0, 1 << 30),
)
def test_any_size_weights_and_order_give_the_weighted_mean(
    name: str, floats: int, weights: list[float], seed: int
) -> None:
    rng = random.Random(seed)
    vectors = [struct.pack(f"<{floats}f", *(rng.uniform(-3, 3) for _ in range(floats))) for _ in weights]
    swarm = Swarm(weights, seed, floats=floats, vectors=vectors, codec=CODECS[name])
    swarm.run()
    swarm.check()
    assert len(swarm.finished) == len(weights)
    outcome = swarm.exchanges[0].outcome
    assert outcome is not None
    assert outcome.fraction == 1.0
    result = struct.unpack(f"<{floats}f", outcome.vector)
    assert result == pytest.approx(mean(swarm), rel=1e-6, abs=1e-6 + 2 * 3 * STEP[name])
