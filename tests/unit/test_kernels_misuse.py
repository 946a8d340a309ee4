"""Arguments nobody should give: a TypeError or ValueError, or what the definition says; never a crash."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import agora_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage import kernels
from stage.kernels import reference

REFUSED = (TypeError, ValueError, BufferError)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
INTEGERS = [-(1 << 70), -(1 << 63), -1, 0, 1, 2, 3, 256, 1 << 40, 1 << 63, 1 << 70]
NUMBERS = [0.0, 0.5, -1.0, 1e-45, 3e38, 1e300, float("inf"), float("nan")]
TWISTS = ["shape", "dtype", "meta", "strided", "shifted", "list", "sparse"]
FEW = settings(max_examples=30, deadline=None)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Any:
    """Mostly what is asked for; now and then of another shape, dtype, device, layout or alignment."""
    twist = draw(st.sampled_from(["", "", "", "", *TWISTS]))
    if twist == "list":
        return [1.0, 2.0]
    if twist == "shape":
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 3, 17, 256]), max_size=3)))[:2]
    if twist == "dtype":
        dtype = draw(st.sampled_from(DTYPES))
    if twist == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if twist == "strided":
        return torch.ones((*shape, 2), dtype=dtype)[..., 0]
    if twist == "shifted":  # of its dtype's alignment, but not of a vector's
        return torch.ones(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
    tensor = torch.ones(shape, dtype=dtype)
    return tensor.to_sparse() if twist == "sparse" else tensor


@given(st.data())
@FEW
def test_boundary(data: st.DataObject) -> None:
    rows, d, k = (data.draw(st.sampled_from([1, 3, 17])) for _ in range(3))
    c, basis, h, table = (data.draw(tensors(shape)) for shape in ((rows, k), (d, k), (rows, d), (rows, d)))
    ids = data.draw(tensors((rows,), torch.int64))
    out = data.draw(st.one_of(st.none(), tensors((rows, d)), st.just(h)))
    seed, scale = data.draw(st.sampled_from([5, *INTEGERS])), data.draw(st.sampled_from([0.5, *NUMBERS]))
    for call, definition in (
        (
            lambda: kernels.expand_rows(c, basis, table, out=out),
            lambda: reference.expand_rows(c, basis, table),
        ),
        (lambda: kernels.project(h, basis), lambda: reference.project(h, basis)),
        (
            lambda: kernels.project_difference(h, table, basis),
            lambda: reference.project_difference(h, table, basis, h.dtype),
        ),
    ):
        with suppress(*REFUSED):
            result = call()
            if result.device.type == "cpu":
                torch.testing.assert_close(result, definition(), rtol=2e-2, atol=1e-4)
    for other in (
        lambda: kernels.expand(c, basis, ids, seed, scale, out=out),
        lambda: kernels.token_table(ids, d, seed, scale),
        lambda: kernels.wire_pack(c, bytearray(4 * rows * k), "fp32"),
        lambda: kernels.project_into(h, basis, bytearray(rows * (k + 4)), "int8", rows=table),
        lambda: kernels.subspace_weights(h, basis),
    ):
        with suppress(*REFUSED):
            other()


@given(st.data())
@FEW
def test_slices_and_sums(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 255, 256, 1024]))
    weights, copy, total, part = (data.draw(tensors((size,))) for _ in range(4))
    r, count, key = (data.draw(st.sampled_from([0, 1, 2, *INTEGERS])) for _ in range(3))
    weight = data.draw(st.sampled_from([0.5, *NUMBERS]))
    dtype = data.draw(st.sampled_from(["fp32", "bf16", "int8"]))
    average = data.draw(st.one_of(tensors((-(-size // 256) * 256,)), st.just(weights)))
    mode = data.draw(st.sampled_from(["delta", "overwrite", "ema"]))
    for call in (
        lambda: kernels.slice_pack(weights, 0, 1, 3, dtype=dtype, snapshot=average, consensus=copy),
        lambda: kernels.slice_pack([weights, copy], r, count, key, dtype=dtype, consensus=[copy, total]),
        lambda: kernels.slice_merge(weights, average, average, 0, 1, 3, mode, drift=copy, compute=part),
        lambda: kernels.slice_merge(weights, average, average, r, count, key, mode, [(r, count)], mu=weight),
        lambda: kernels.reduce_add(total, part, weight),
        lambda: kernels.reduce_add(total, part, 0.5, out=copy),
        lambda: kernels.reduce_finish(total, weight),
        lambda: kernels.random_normal(key, 1, r, weight),
    ):
        with suppress(*REFUSED):
            call()


BINDINGS = {
    "normal": "bnssft",
    "token_rows": "btbnnsft",
    "expand": "btbtbbtnnnsft",
    "expand_rows": "btbtbbtnnnt",
    "project": "btbbtbtnnnt",
    "wire_pack": "btbtnnt",
    "subspace_weights": "btbtnnnt",
    "slice_blocks": "bnnns",
    "slice_pack": "bbnbtbnnnst",
    "slice_merge": "bbbtbbbtnnnnsnntft",
    "reduce_add": "bbbntft",
    "reduce_finish": "bbnft",
}
"""Of each argument: memory, a number, a small number such as a dtype or threads, a seed, a float."""


@pytest.mark.parametrize("name", BINDINGS)
def test_bindings(name: str) -> None:
    memory = st.one_of(
        st.sampled_from([0, 1 << 70, None, bytes(64)]), st.sampled_from([0, 3, 64, 1040]).map(bytearray)
    )
    kinds = {
        "b": memory,
        "n": st.sampled_from([1, 2, 1 << 31, (1 << 40) - 1, *INTEGERS]),
        "t": st.sampled_from([0, 1, 2, 3, -1, 99, (1 << 31) - 1, 1 << 31]),
        "s": st.sampled_from([1, *INTEGERS]),
        "f": st.sampled_from(NUMBERS),
    }

    @given(st.tuples(*(kinds[kind] for kind in BINDINGS[name])))
    @FEW
    def called(arguments: tuple[object, ...]) -> None:
        with suppress(*REFUSED):
            getattr(agora_kernels, name)(*arguments)

    called()


@pytest.mark.parametrize("threads", [-(1 << 31), -1, 0, 1, 1000, (1 << 31) - 1])
def test_any_number_of_threads(threads: int) -> None:
    h, u, out = bytearray(4 * 3 * 5), bytearray(4 * 5 * 2), bytearray(b"x" * (4 * 3 * 2))
    agora_kernels.project(h, 0, 0, u, 0, out, 0, 3, 5, 2, threads)
    assert out == bytes(4 * 3 * 2)
