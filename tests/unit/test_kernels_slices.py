"""Slices are a partition of one or many tensors, and merges do what they say and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import agora_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stage import kernels
from stage.kernels import reference

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


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_larger_than_caches_is_packed_alike(
    instruction_set: str, dtype: Literal["fp32", "bf16"], aligned: bool
) -> None:
    """Results of more than 16 MiB go past the caches, where they are aligned to lines."""
    blocks, key = 17_000, 5
    weights = torch.arange(blocks * BLOCK, dtype=torch.float32).mul_(0.37)
    place = 0 if aligned else 1
    snapshot = torch.zeros(blocks * BLOCK + 16)[place:][: blocks * BLOCK]
    packed = kernels.slice_pack(weights, 0, 1, key, dtype=dtype, snapshot=snapshot)
    wanted = weights.view(-1, BLOCK)[kernels.slice_blocks(blocks, 0, 1, key)].flatten()
    assert torch.equal(snapshot, wanted)
    assert torch.equal(packed, wanted.to(packed.dtype))


def test_keys_differ_and_mix() -> None:
    keys = {kernels.slice_key(s, t, c) for s in range(3) for t in range(3) for c in (0, 1, 1 << 32)}
    assert len(keys) == 27
    # A slice takes its share of every region of the weights: expected 50 of each 1000 blocks.
    for cycle in range(5):
        chosen = kernels.slice_blocks(20_000, 4, 20, kernels.slice_key(1, 1, cycle))
        counts = torch.bincount(chosen // 1000, minlength=20)
        assert int(counts.min()) > 15
        assert int(counts.max()) < 95


@contextmanager
def on(name: str) -> Iterator[None]:
    before = agora_kernels.instruction_set()
    agora_kernels.use_instruction_set(name)
    try:
        yield
    finally:
        agora_kernels.use_instruction_set(before)


@contextmanager
def in_plain_torch() -> Iterator[None]:
    """Runs the definition in place of the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage.kernels.slices.compiled", lambda *_tensors: False)
        yield


def same_bits(mine: Tensor, theirs: Tensor) -> bool:
    """NaN counts as itself, and zeros have their signs."""
    numbers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[mine.element_size()]
    nan = mine.isnan() & theirs.isnan()
    return bool(((mine.view(numbers) == theirs.view(numbers)) | nan).all())


def both(call: Callable[[list[list[Tensor]]], object], *tensors: list[Tensor]) -> None:
    """Calls with copies of lists of tensors, in plain torch and compiled for each instruction set: what is
    left is equal to the bit."""
    results = []
    for context in (in_plain_torch(), *map(on, agora_kernels.instruction_sets())):
        mine = [[tensor.clone() for tensor in listed] for listed in tensors]
        with context:
            results.append((call(mine), mine))
    (expected, plain), *others = results
    for result, ours in others:
        if isinstance(result, Tensor):
            assert isinstance(expected, Tensor)
            assert same_bits(result, expected)
        for mine, theirs in zip(ours, plain, strict=True):
            assert all(same_bits(x, y) for x, y in zip(mine, theirs, strict=True))


ODD = [
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    3.4e38,
    -3.4e38,
    65519.0,
    65520.0,
    6e-8,
    1 / 3,
    math.inf,
    -math.inf,
    math.nan,
]
"""Numbers that a cast, a scale or a sum might get wrong."""


def with_odd(tensors: list[Tensor], data: st.DataObject) -> list[Tensor]:
    """The tensors with a few odd numbers in them."""
    for tensor in tensors:
        for value in data.draw(st.lists(st.sampled_from(ODD), max_size=2)):
            tensor[data.draw(st.integers(0, tensor.numel() - 1))] = value
    return tensors


SIZES = st.lists(st.integers(1, 5 * BLOCK), min_size=1, max_size=6)


@given(
    sizes=SIZES,
    n=st.integers(1, 9),
    key=st.integers(0, (1 << 64) - 1),
    kind=st.sampled_from(["fp32", "bf16", "int8"]),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_pack_is_its_definition(
    sizes: list[int], n: int, key: int, kind: Literal["fp32", "bf16", "int8"], data: st.DataObject
) -> None:
    r = data.draw(st.integers(0, n - 1))
    weights = with_odd([torch.randn(size) for size in sizes], data)
    consensus = with_odd([w + 0.01 * torch.randn(w.shape) for w in weights], data)
    count = len(kernels.slice_blocks(sum(-(-size // BLOCK) for size in sizes), r, n, key))

    def pack(lists: list[list[Tensor]]) -> Tensor:
        before = lists[1] if kind == "int8" else None
        return kernels.slice_pack(lists[0], r, n, key, dtype=kind, snapshot=lists[2][0], consensus=before)

    both(pack, weights, consensus, [torch.full((count * BLOCK,), math.nan)])


@pytest.mark.parametrize("average", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("mode", ["delta", "overwrite", "ema"])
@given(sizes=SIZES, n=st.integers(1, 4), key=st.integers(0, (1 << 64) - 1), data=st.data())
@settings(max_examples=15, deadline=None)
def test_merge_is_its_definition(
    mode: Literal["delta", "overwrite", "ema"],
    average: Literal["fp32", "bf16", "int8"],
    sizes: list[int],
    n: int,
    key: int,
    data: st.DataObject,
) -> None:
    r = data.draw(st.integers(0, n - 1))
    weights = with_odd([torch.randn(size) for size in sizes], data)
    consensus = [w + 0.01 * torch.randn(w.shape) for w in weights]
    others = with_odd([w + 0.02 * torch.randn(w.shape) for w in weights], data)
    snapshot = kernels.slice_pack(weights, r, n, key)
    mean = kernels.slice_pack(others, r, n, key, dtype=average, consensus=consensus)
    keeps, low = (
        data.draw(st.booleans()) or average == "int8",
        data.draw(st.sampled_from(["", "bf16", "fp16"])),
    )
    copies = [w.to(torch.float16 if low == "fp16" else torch.bfloat16) for w in weights]
    cuts = sorted(data.draw(st.lists(st.integers(0, snapshot.numel()), max_size=6)))
    ranges = data.draw(st.sampled_from([None, list(zip(cuts[::2], cuts[1::2], strict=False))]))

    def merge(lists: list[list[Tensor]]) -> None:
        kernels.slice_merge(
            lists[0], None if mode == "overwrite" else snapshot, mean, r, n, key, mode, ranges,
            drift=lists[1] if mode == "ema" else None, mu=0.7, consensus=lists[2] if keeps else None,
            compute=lists[3] if low else None,
        )  # fmt: skip

    both(
        merge,
        with_odd([w + 1 for w in weights], data),
        [torch.randn(size) for size in sizes],
        consensus,
        copies,
    )


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_all_slices_carry_all_weights(instruction_set: str, kind: Literal["fp32", "bf16", "int8"]) -> None:
    """Packed here, merged there: there becomes here, to the precision of the packed form."""
    sizes = [1, 255, 256, 257, 7 * BLOCK + 13, 40 * BLOCK]
    here = [torch.randn(size) for size in sizes]
    consensus = [w + 0.01 * torch.randn(w.shape) for w in here]
    there = [torch.randn(size) for size in sizes]
    copies = [torch.zeros(size, dtype=torch.float16) for size in sizes]
    kept = [c.clone() for c in consensus]
    for r in range(5):
        packed = kernels.slice_pack(here, r, 5, 11, dtype=kind, consensus=consensus)
        kernels.slice_merge(there, None, packed, r, 5, 11, "overwrite", consensus=kept, compute=copies)
    tolerance = {"fp32": 0.0, "bf16": 0.02, "int8": 0.06 / 127}[kind]
    for mine, theirs, copy, after in zip(here, there, copies, kept, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=tolerance)
        assert torch.equal(after, theirs)
        assert torch.equal(copy, theirs.half())


def test_an_average_that_is_the_snapshot_changes_nothing() -> None:
    flat = torch.randn(37 * BLOCK)
    before = flat.clone()
    packed = kernels.slice_pack(flat, 3, 5, 11)
    kernels.slice_merge(flat, packed, packed, 3, 5, 11)
    assert torch.equal(flat, before)
    kernels.slice_merge(flat, packed, packed, 3, 5, 11, "ema", drift=torch.zeros_like(flat), mu=0.5)
    assert torch.equal(flat, before)


def test_the_running_mean_of_the_drift() -> None:
    """e = mu e + (1 - mu) (w - snapshot), w = average + e; mu = 0 on the first visit sets e."""
    flat, drift = torch.zeros(BLOCK), torch.full((BLOCK,), 99.0)
    snapshot, average = kernels.slice_pack(flat, 0, 1, 0), torch.full((BLOCK,), 10.0)
    flat += 1
    kernels.slice_merge(flat, snapshot, average, 0, 1, 0, "ema", drift=drift, mu=0.0)
    assert bool((drift == 1).all() and (flat == 11).all())
    snapshot = kernels.slice_pack(flat, 0, 1, 0)
    flat += 3
    kernels.slice_merge(flat, snapshot, average, 0, 1, 0, "ema", drift=drift, mu=0.5)
    assert bool((drift == 2).all() and (flat == 12).all())


def test_a_large_slice_goes_past_the_caches(instruction_set: str) -> None:
    flat = torch.arange(3 * (1 << 20) + 77, dtype=torch.float32)
    snapshot = torch.empty(-(-flat.numel() // BLOCK) * BLOCK)
    packed = kernels.slice_pack(flat, 0, 1, 5, snapshot=snapshot)
    assert torch.equal(packed, snapshot)
    back = torch.zeros_like(flat)
    kernels.slice_merge(back, None, packed, 0, 1, 5, "overwrite")
    assert torch.equal(back, flat)


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


def bad_calls() -> list[tuple[object, type[Exception], str]]:
    flat, packed = torch.zeros(4 * BLOCK), torch.zeros(2 * BLOCK)
    low, int8 = torch.zeros(4 * BLOCK, dtype=torch.bfloat16), torch.zeros(2 * 260, dtype=torch.uint8)
    merge, pack = kernels.slice_merge, kernels.slice_pack
    return [
        (lambda: pack(torch.zeros(0), 0, 2, 1), ValueError, "empty"),
        (lambda: pack([], 0, 2, 1), ValueError, "1 to"),
        (lambda: pack([flat, torch.zeros(0)], 0, 2, 1), ValueError, "empty"),
        (lambda: pack([flat, flat.double()], 0, 2, 1), TypeError, "float32"),
        (lambda: pack([flat, flat.to("meta")], 0, 2, 1), ValueError, "meta"),
        (lambda: pack("weights", 0, 2, 1), TypeError, "tensor"),  # type: ignore[arg-type]
        (lambda: pack(flat.double(), 0, 2, 1), TypeError, "float32"),
        (lambda: pack(torch.zeros(8 * BLOCK)[::2], 0, 2, 1), ValueError, "contiguous"),
        (lambda: pack(flat, 2, 2, 1), ValueError, "no slice"),
        (lambda: pack(flat, 0, 2, -1), ValueError, "key"),
        (lambda: pack(flat, 0, 2, 1, dtype="fp8"), ValueError, "dtype"),  # type: ignore[arg-type]
        (lambda: pack(flat, 0, 2, 1, dtype="int8"), ValueError, "consensus"),
        (lambda: pack(flat, 0, 2, 1, dtype="int8", consensus=packed), ValueError, "same sizes"),
        (lambda: pack(flat, 0, 2, 1, out=packed[:-1]), ValueError, "out"),
        (lambda: pack(flat, 0, 2, 1, dtype="bf16", out=packed), TypeError, "bfloat16"),
        (lambda: pack(flat, 0, 2, 1, snapshot=packed[:-1]), ValueError, "snapshot"),
        (lambda: pack(flat, 0, 2, 1, out=packed, snapshot=packed), ValueError, "share memory"),
        (lambda: pack(flat, 0, 2, 1, out=flat[: 2 * BLOCK]), ValueError, "share memory"),
        (lambda: kernels.slice_key(1, -1, 0), ValueError, "out of range"),
        (lambda: kernels.slice_blocks(0, 0, 2, 1), ValueError, "blocks"),
        (lambda: kernels.slice_blocks(1 << 32, 0, 1 << 32, 1), ValueError, "blocks"),
        (lambda: merge(flat, packed, packed[:-1], 0, 2, 1), ValueError, "average"),
        (lambda: merge(flat, packed, int8, 0, 2, 1), ValueError, "consensus"),
        (lambda: merge(flat, packed, int8[:-1], 0, 2, 1, consensus=flat.clone()), ValueError, "average"),
        (lambda: merge(flat, packed, packed.half(), 0, 2, 1), TypeError, "float16"),
        (lambda: merge(flat, None, packed, 0, 2, 1), ValueError, "snapshot"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "ema"), ValueError, "drift"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "mean"), ValueError, "mode"),  # type: ignore[arg-type]
        (lambda: merge(flat, packed, packed, 0, 2, 1, mu=1.0), ValueError, "mu"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, mu=math.nan), ValueError, "mu"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, consensus=flat), ValueError, "share memory"),
        (lambda: merge([flat, flat], packed, packed, 0, 4, 1), ValueError, "share memory"),
        (lambda: merge(flat, flat[: 2 * BLOCK], packed, 0, 2, 1), ValueError, "share memory"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, compute=low[1:]), ValueError, "same sizes"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, compute=flat), TypeError, "bfloat16"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "delta", [(0, 513)]), ValueError, "range"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "delta", [(0, 9), (8, 20)]), ValueError, "range"),
        (lambda: merge(flat, packed, packed, 0, 2, 1, "delta", [(-1, 9)]), ValueError, "range"),
    ]


@pytest.mark.parametrize("index", range(38))
def test_misuse_is_named(index: int) -> None:
    assert len(bad_calls()) == 38
    call, error, words = bad_calls()[index]
    assert callable(call)
    with pytest.raises(error, match=words):
        call()


def test_tables_that_lie_are_refused() -> None:
    """What the binding itself checks: the kernels trust a table's rows."""
    flat, out = torch.zeros(4 * BLOCK), torch.zeros(4 * BLOCK)

    def pack(rows: list[tuple[int, int, int]], tensors: int) -> None:
        table = torch.tensor(rows, dtype=torch.int64)
        agora_kernels.slice_pack(table.numpy(), 0, tensors, out.data_ptr(), 0, 0, 4, 0, 4, 1, 1)

    pack([(flat.data_ptr(), 4 * BLOCK, 0)], 1)
    for rows, tensors in (
        ([(flat.data_ptr(), 4 * BLOCK, 0)], 2),
        ([(flat.data_ptr(), 4 * BLOCK, 0)], 0),
        ([(flat.data_ptr(), 4 * BLOCK, 1)], 1),
        ([(flat.data_ptr(), 5 * BLOCK, 0)], 1),
        ([(flat.data_ptr(), -1, 0)], 1),
        ([(0, 4 * BLOCK, 0)], 1),
        ([(flat.data_ptr() + 2, 4 * BLOCK, 0)], 1),
        ([(flat.data_ptr(), BLOCK, 0), (flat.data_ptr(), 3 * BLOCK, 2)], 2),
    ):
        with pytest.raises(ValueError, match=r"table|tensors"):
            pack(rows, tensors)
