"""The reducer adds what is usable and refuses what it must."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import agora_kernels
import pytest
import torch

from p2p.errors import LocalError, RemoteError
from stage import kernels
from stage.kernels import reference
from stage.reduce import KernelReducer

BLOCK = kernels.BLOCK


@pytest.fixture(params=agora_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = agora_kernels.instruction_set()
    agora_kernels.use_instruction_set(request.param)
    yield request.param
    agora_kernels.use_instruction_set(before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 4095, 4097, 100_001])
def test_reduce_equals_reference(instruction_set: str, n: int, dtype: torch.dtype) -> None:
    ours, plain = torch.zeros(n), torch.zeros(n)
    for weight in (1.0, 0.3, 0.0, 17.5):
        part = torch.randn(n).to(dtype)
        usable, norm2 = kernels.reduce_add(ours, part, weight)
        expected = reference.reduce_add(plain, part, weight, plain)
        assert usable is expected[0] is True
        assert norm2 == pytest.approx(expected[1], rel=1e-12)
    assert torch.equal(ours, plain)
    assert torch.equal(kernels.reduce_finish(ours, 18.8), reference.reduce_finish(plain, 18.8))


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_larger_than_caches_is_reduced_alike(instruction_set: str, place: int) -> None:
    """Sums of more than 16 MiB go past the caches, where they are aligned to lines."""
    n = (1 << 22) + 4097
    total, part, plain = torch.randn(n), torch.randn(n), torch.empty(n)
    out = torch.zeros(n + 16)[place:][:n]
    usable, norm2 = kernels.reduce_add(total, part, 0.3, out=out)
    expected = reference.reduce_add(total, part, 0.3, plain)
    assert usable is expected[0] is True
    assert norm2 == pytest.approx(expected[1], rel=1e-12)
    assert torch.equal(out, plain)


def test_norms_are_equal_to_the_bit_on_every_instruction_set() -> None:
    part, before, norms = torch.randn(10_007), agora_kernels.instruction_set(), set()
    for name in agora_kernels.instruction_sets():
        agora_kernels.use_instruction_set(name)
        norms.add(kernels.reduce_add(torch.zeros(10_007), part, 0.3)[1])
    agora_kernels.use_instruction_set(before)
    assert len(norms) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -1e34])
@pytest.mark.parametrize("place", [0, 15, 16, 4096, 4999])
def test_unusable_part_leaves_no_trace(instruction_set: str, value: float, place: int) -> None:
    total = torch.ones(5000)
    part = torch.zeros(5000)
    part[place] = value
    assert not kernels.reduce_add(total, part, 1.0)[0]
    assert torch.equal(total, torch.ones(5000))
    assert not reference.reduce_add(total, part, 1.0, total)[0]
    usable_at_weight_zero = abs(value) < float("inf")
    assert kernels.reduce_add(total, part, 0.0)[0] is usable_at_weight_zero


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 40])
def test_int8_parts_are_added_as_what_they_mean(instruction_set: str, blocks: int) -> None:
    weights, zero = torch.randn(blocks * BLOCK), torch.zeros(blocks * BLOCK)
    part = kernels.slice_pack(weights, 0, 1, 3, dtype="int8", consensus=zero)
    ours, plain = torch.ones(blocks * BLOCK), torch.ones(blocks * BLOCK)
    usable, norm2 = kernels.reduce_add(ours, part, 0.5)
    expected = reference.reduce_add(plain, part, 0.5, plain)
    assert usable is expected[0] is True
    assert norm2 == pytest.approx(expected[1], rel=1e-12)
    assert torch.equal(ours, plain)
    part[:4] = torch.tensor([math.nan]).view(torch.uint8)
    assert not kernels.reduce_add(ours, part, 0.5)[0]
    assert torch.equal(ours, plain)


def test_a_sum_beside_the_last_one(instruction_set: str) -> None:
    """One pass into another buffer gives the bits of two passes in place, and leaves the total alone."""
    total, part = torch.randn(9001), torch.randn(9001)
    out, in_place = torch.empty(9001), total.clone()
    assert kernels.reduce_add(total, part, 0.3, out=out) == kernels.reduce_add(in_place, part, 0.3)
    assert torch.equal(out, in_place)
    before = total.clone()
    part[8999] = math.inf
    assert not kernels.reduce_add(total, part, 0.3, out=out)[0]
    assert torch.equal(total, before)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_reducer_takes_the_weighted_mean_of_any_buffer() -> None:
    reducer = KernelReducer(8)
    reducer.add(floats(1, 2), 1.0)
    odd = memoryview(b"\x00" + floats(3, 4))[1:]  # where a frame put it: not aligned, not writable
    reducer.add(odd, 3.0)
    assert struct.unpack("<2f", reducer.finish()) == (2.5, 3.5)


def test_reducer_unaligned_parts_of_every_length() -> None:
    for n in range(1, 70):
        part = torch.arange(n, dtype=torch.float32).numpy().tobytes()
        reducer = KernelReducer(4 * n)
        for shift in range(4):
            reducer.add(memoryview(bytes(shift) + part)[shift:], 1.0)
        assert reducer.finish() == part


def test_reducer_refusals() -> None:
    reducer = KernelReducer(8)
    reducer.add(floats(1, 2), 1.0)
    for part in (b"", floats(1), floats(1, 2, 3), floats(1, float("nan")), floats(1, float("inf"))):
        with pytest.raises(RemoteError):
            reducer.add(part, 1.0)
    assert struct.unpack("<2f", reducer.finish()) == (1, 2)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(LocalError):
            reducer.add(floats(1, 2), weight)
    for nbytes in (0, 3, -4):
        with pytest.raises(LocalError):
            KernelReducer(nbytes)
    with pytest.raises(LocalError, match="no weight"):
        KernelReducer(4).finish()


def bad_calls() -> list[tuple[object, type[Exception], str]]:
    flat, packed = torch.zeros(4 * BLOCK), torch.zeros(2 * BLOCK)
    return [
        (lambda: kernels.reduce_add(flat, packed, 1.0), ValueError, "fit"),
        (lambda: kernels.reduce_add(packed, packed.double(), 1.0), TypeError, "float64"),
        (lambda: kernels.reduce_add(packed, packed, 1.0), ValueError, "share memory"),
        (lambda: kernels.reduce_add(packed, packed.clone(), -1.0), ValueError, "weight"),
        (lambda: kernels.reduce_add(packed, packed.clone(), 1.0, out=flat), ValueError, "out"),
        (lambda: kernels.reduce_add(flat[:100], flat[100:].byte(), 1.0), ValueError, "whole blocks"),
        (lambda: kernels.reduce_finish(packed, 0.0), ValueError, "positive"),
        (lambda: kernels.reduce_finish(packed[:0], 1.0), ValueError, "empty"),
    ]


@pytest.mark.parametrize("index", range(8))
def test_misuse_is_named(index: int) -> None:
    call, error, words = bad_calls()[index]
    assert callable(call)
    with pytest.raises(error, match=words):
        call()
