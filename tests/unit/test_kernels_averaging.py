"""Slices are a partition, merges do what they say and nothing else, the reducer refuses what it must."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import agora_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import LocalError, RemoteError
from stage import kernels
from stage.kernels import reference
from stage.reduce import KernelReducer

BLOCK = kernels.BLOCK
GOLDEN_KEY = 0x525DAF0DEC16955E
GOLDEN_BLOCKS = [59, 1, 36, 96, 57, 21, 24, 37, 13, 19]


@pytest.fixture(params=agora_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = agora_kernels.instruction_set()
    agora_kernels.use_instruction_set(request.param)
    yield request.param
    agora_kernels.use_instruction_set(before)


@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1])
def test_slices_partition_the_blocks(key: int) -> None:
    for blocks in [*range(1, 80), 255, 256, 257, 1023, 1025, 4097]:
        n = min(20, blocks + 2)
        slices = [kernels.slice_blocks(blocks, r, n, key) for r in range(n)]
        everything = torch.cat(slices)
        assert sorted(everything.tolist()) == list(range(blocks))
        assert torch.equal(everything, reference.slice_blocks(blocks, 0, blocks, key))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_golden_permutation() -> None:
    """Members of one stage must agree on it, whatever they run on."""
    assert kernels.slice_key(7, 2, 3) == GOLDEN_KEY
    assert kernels.slice_blocks(100, 0, 10, kernels.slice_key(7, 2, 3)).tolist() == GOLDEN_BLOCKS


def test_keys_differ_and_mix() -> None:
    keys = {kernels.slice_key(s, t, c) for s in range(3) for t in range(3) for c in (0, 1, 1 << 32)}
    assert len(keys) == 27
    # A slice takes its share of every region of the weights: expected 50 of each 1000 blocks.
    for cycle in range(5):
        chosen = kernels.slice_blocks(20_000, 4, 20, kernels.slice_key(1, 1, cycle))
        counts = torch.bincount(chosen // 1000, minlength=20)
        assert int(counts.min()) > 15
        assert int(counts.max()) < 95


@given(blocks=st.integers(1, 40), n=st.integers(1, 25), key=st.integers(0, (1 << 64) - 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_pack_and_merge(blocks: int, n: int, key: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, n - 1))
    flat = torch.randn(blocks * BLOCK)
    snapshot = kernels.slice_pack(flat, r, n, key)
    chosen = kernels.slice_blocks(blocks, r, n, key)
    assert torch.equal(snapshot, reference.slice_pack(flat, chosen))
    size = snapshot.numel()

    same = flat.clone()
    kernels.slice_merge(same, snapshot, snapshot, r, n, key)
    assert torch.equal(same, flat)
    kernels.slice_merge(same, None, snapshot, r, n, key, "overwrite")
    assert torch.equal(same, flat)

    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=0, max_size=6)))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    average = torch.randn(size)
    trained = flat + 1
    for mode, before in (("delta", snapshot), ("overwrite", None)):
        ours, plain = trained.clone(), trained.clone()
        kernels.slice_merge(ours, before, average, r, n, key, mode, ranges)  # type: ignore[arg-type]
        reference.slice_merge(plain, before, average, chosen, ranges)
        assert torch.equal(ours, plain)
        assert int((ours != trained).sum()) <= sum(stop - start for start, stop in ranges)


def test_overwrite_of_all_slices_copies(instruction_set: str) -> None:
    theirs, ours = torch.randn(37 * BLOCK), torch.zeros(37 * BLOCK)
    for r in range(5):
        kernels.slice_merge(ours, None, kernels.slice_pack(theirs, r, 5, 11), r, 5, 11, "overwrite")
    assert torch.equal(ours, theirs)


def test_threads_do_not_change_a_merge() -> None:
    flat = torch.randn(2000 * BLOCK)
    average = torch.randn(1000 * BLOCK)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            mine = flat.clone()
            kernels.slice_merge(mine, kernels.slice_pack(mine, 1, 2, 5), average, 1, 2, 5)
            results.append(mine)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_autograd_notices_a_merge() -> None:
    """A graph that saved the weights must not silently go on with other ones."""
    flat = torch.randn(4 * BLOCK)
    leaf = flat.detach()[:BLOCK].requires_grad_()
    loss = (leaf * leaf).sum()
    packed = kernels.slice_pack(flat, 0, 1, 3)
    kernels.slice_merge(flat, packed, packed + 1, 0, 1, 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 4095, 4097, 100_001])
def test_reduce_equals_reference(instruction_set: str, n: int, dtype: torch.dtype) -> None:
    ours, plain = torch.zeros(n), torch.zeros(n)
    for weight in (1.0, 0.3, 0.0, 17.5):
        part = torch.randn(n).to(dtype)
        usable, norm2 = kernels.reduce_add(ours, part, weight)
        expected = reference.reduce_add(plain, part, weight)
        assert usable is expected[0] is True
        assert norm2 == pytest.approx(expected[1], rel=1e-12)
    assert torch.equal(ours, plain)
    assert torch.equal(kernels.reduce_finish(ours, 18.8), reference.reduce_finish(plain, 18.8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -1e34])
@pytest.mark.parametrize("place", [0, 15, 16, 4096, 4999])
def test_unusable_part_leaves_no_trace(instruction_set: str, value: float, place: int) -> None:
    total = torch.ones(5000)
    part = torch.zeros(5000)
    part[place] = value
    assert not kernels.reduce_add(total, part, 1.0)[0]
    assert torch.equal(total, torch.ones(5000))
    assert not reference.reduce_add(total, part, 1.0)[0]
    usable_at_weight_zero = abs(value) < float("inf")
    assert kernels.reduce_add(total, part, 0.0)[0] is usable_at_weight_zero


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
    merge = kernels.slice_merge
    return [
        (lambda: kernels.slice_pack(torch.zeros(100), 0, 2, 1), ValueError, "multiple"),
        (lambda: kernels.slice_pack(torch.zeros(0), 0, 2, 1), ValueError, "multiple"),
        (lambda: kernels.slice_pack(flat.double(), 0, 2, 1), TypeError, "float32"),
        (lambda: kernels.slice_pack(torch.zeros(8 * BLOCK)[::2], 0, 2, 1), ValueError, "contiguous"),
        (lambda: kernels.slice_pack(flat, 2, 2, 1), ValueError, "no slice"),
        (lambda: kernels.slice_pack(flat, 0, 2, -1), ValueError, "key"),
        (lambda: kernels.slice_key(1, -1, 0), ValueError, "out of range"),
        (lambda: kernels.slice_blocks(0, 0, 2, 1), ValueError, "blocks"),
        (lambda: kernels.slice_blocks(1 << 32, 0, 1 << 32, 1), ValueError, "blocks"),
        (lambda: merge(flat, packed, packed[:-1], 0, 2, 1), ValueError, "average"),
        (lambda: merge(flat, None, packed, 0, 2, 1), ValueError, "snapshot"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "ema"), ValueError, "mode"),  # type: ignore[arg-type]
        (lambda: merge(flat, packed, packed, 0, 2, 1, "delta", [(0, 513)]), ValueError, "range"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "delta", [(0, 9), (8, 20)]), ValueError, "range"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "delta", [(-1, 9)]), ValueError, "range"),
        (lambda: kernels.reduce_add(flat, packed, 1.0), ValueError, "fit"),
        (lambda: kernels.reduce_add(packed, packed.half(), 1.0), TypeError, "float16"),
        (lambda: kernels.reduce_add(packed, packed, -1.0), ValueError, "weight"),
        (lambda: kernels.reduce_finish(packed, 0.0), ValueError, "positive"),
        (lambda: kernels.reduce_finish(packed[:0], 1.0), ValueError, "empty"),
    ]


@pytest.mark.parametrize("index", range(20))
def test_misuse_is_named(index: int) -> None:
    call, error, words = bad_calls()[index]
    assert callable(call)
    with pytest.raises(error, match=words):
        call()
