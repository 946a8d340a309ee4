"""The CUDA kernels of averaging, run on the CPU by tests/emulation: the bits of the definition.

Every call is made with several schedules of the emulated threads; results must not depend on them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.blocks import blocks_in, table_of
from tests import emulation

BLOCK, INT8_BLOCK = reference.BLOCK, reference.INT8_BLOCK
PACKED = {
    "fp32": (torch.float32, BLOCK, 0),
    "bf16": (torch.bfloat16, BLOCK, 1),
    "int8": (torch.uint8, 260, 3),
}
MODES = ["delta", "overwrite", "ema"]
PARTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
SIZES = [[1], [5 * BLOCK + 3], [BLOCK, 77, 70 * BLOCK + 255, 2, 3 * BLOCK]]

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="there is no g++")


@pytest.fixture(params=["0", "1"], autouse=True)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGORA_EMULATION_SEED", request.param)
    torch.manual_seed(7)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def aside(tensor: Tensor) -> Tensor:
    """The same numbers one element further on than vectors can be read."""
    return torch.cat([tensor.new_zeros(1), tensor])[1:]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("offset", [False, True])
def test_pack(cuda: ModuleType, kind: str, sizes: list[int], offset: bool) -> None:
    dtype, width, code = PACKED[kind]
    weights, before = ([torch.randn(n) for n in sizes] for _ in range(2))
    blocks = blocks_in(weights)
    first, stop = blocks // 3, blocks
    key, size = 0x1234567890ABCDEF, stop - first
    wanted, wanted_snapshot = torch.empty(size * width, dtype=dtype), torch.empty(size * BLOCK)
    chosen = reference.slice_blocks(blocks, first, stop, key)
    reference.slice_pack(weights, before, wanted, wanted_snapshot, chosen)
    if offset:
        weights, before = [aside(w) for w in weights], [aside(b) for b in before]
    packed, snapshot = torch.zeros_like(wanted), torch.zeros(size * BLOCK)
    if offset:
        packed, snapshot = aside(packed), aside(snapshot)
    tables = table_of(weights), table_of(before)
    cuda.cuda_slice_pack(
        address(tables[0]), address(tables[1]), len(sizes), address(packed), code,
        address(snapshot), blocks, first, size, key, 0,
    )  # fmt: skip
    assert torch.equal(packed.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(snapshot, wanted_snapshot)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [False, True])
def test_merge(cuda: ModuleType, kind: str, mode: str, low: torch.dtype, offset: bool) -> None:
    dtype, width, code = PACKED[kind]
    sizes, key, mu = SIZES[2], 99, 0.75
    shift = aside if offset else torch.clone
    weights, drift, before = ([shift(torch.randn(n)) for n in sizes] for _ in range(3))
    compute = [shift(torch.zeros(n, dtype=low)) for n in sizes]
    blocks = blocks_in(weights)
    first, count = 3, blocks - 5
    average = torch.randn(count * BLOCK).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "int8":
        fresh = torch.empty(count * INT8_BLOCK, dtype=torch.uint8)
        reference.to_int8(average.view(-1, BLOCK), fresh.view(-1, INT8_BLOCK))
        average = fresh
    average, snapshot = shift(average), torch.randn(count * BLOCK)
    assert average.numel() == count * width
    assert average.dtype is dtype
    for start, stop in [(0, count * BLOCK), (100, 101), (BLOCK + 9, 9 * BLOCK + 30), (512, 512)]:
        mine = [[tensor.clone() for tensor in listed] for listed in (weights, drift, before, compute)]
        chosen = reference.slice_blocks(blocks, first, first + count, key)
        reference.slice_merge(
            mine[0], snapshot, average, chosen, mode, [(start, stop)], mu, mine[1], mine[2], mine[3]
        )
        tables = [table_of(listed) for listed in (weights, drift, before, compute)]
        cuda.cuda_slice_merge(
            address(tables[0]), 0 if mode == "overwrite" else address(snapshot), address(average), code,
            *map(address, tables[1:]), PARTS[low], len(sizes), blocks, first, count, key,
            start, stop, MODES.index(mode), mu, 0,
        )  # fmt: skip
        for theirs, ours in zip((weights, drift, before, compute), mine, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("dtype", PARTS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("spoiled", [False, True])
def test_reduce(cuda: ModuleType, dtype: torch.dtype, offset: bool, spoiled: bool) -> None:
    n = 37 * BLOCK if dtype is torch.uint8 else 9001
    values = torch.randn(n)
    if spoiled:
        values[n // 2] = float("nan")
    part = values.to(dtype) if dtype is not torch.uint8 else torch.empty(n // BLOCK * 260, dtype=dtype)
    if dtype is torch.uint8:
        reference.to_int8(values.view(-1, BLOCK), part.view(-1, INT8_BLOCK))
    total, out = torch.randn(n), torch.full((n,), 5.0)
    wanted = out.clone()
    usable, norm2 = reference.reduce_add(total, part, 0.3, wanted)
    if offset:
        part, total, out = aside(part), aside(total), aside(out)
    found = torch.full((-(-n // 4096), 2), -1.0, dtype=torch.float64)
    cuda.cuda_reduce_inspect(address(part), PARTS[dtype], n, 0.3, address(found), 0)
    verdict = found.sum(0)
    cuda.cuda_reduce_add(
        address(total), address(part), address(out), n, PARTS[dtype], 0.3, address(verdict), 0
    )
    assert usable == (float(verdict[1]) == 0) == (not spoiled)
    if usable:
        assert float(verdict[0]) == pytest.approx(norm2, rel=1e-12)
    assert torch.equal(out, wanted)
    cuda.cuda_reduce_finish(address(out), address(out), n, 7.0, 0)
    assert torch.equal(out, reference.reduce_finish(wanted, 7.0))


def test_the_emulator_finds_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL(str(emulation.build_library(tmp_path, "faulty.cpp")))
    out = (ctypes.c_float * 64)()
    right = [float(63 - i) for i in range(64)]

    def results(fault: int) -> set[bool]:
        found = set()
        for seed in range(8):
            monkeypatch.setenv("AGORA_EMULATION_SEED", str(seed))
            assert library.run(out, fault) == 0
            found.add(list(out) == right)
        return found

    assert results(0) == {True}
    assert False in results(1)  # a barrier is missing
    assert library.run(out, 2) != 0  # threads wait at different barriers
    assert library.run(out, 3) != 0  # a thread waits for those of its warp, they wait elsewhere
    assert results(4) == {False}  # what nobody wrote is read: NaN
