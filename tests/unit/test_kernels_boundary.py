"""expand and project against double precision, their gradients, their registration, and misuse."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import agora_kernels
import pytest
import torch
from torch import Tensor

from stage import kernels
from stage.kernels import reference

SEED = 0xFEDCBA9876543210
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (3, 5, 2),
    (4, 64, 16),
    (7, 59, 17),
    (97, 111, 33),
    (256, 192, 24),
    (5, 1025, 51),
    (9, 1040, 23),
    (65, 530, 34),
    (2, 300, 1024),
    (24, 801, 3),
    (8, 416, 130),
]


@pytest.fixture(params=agora_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = agora_kernels.instruction_set()
    agora_kernels.use_instruction_set(request.param)
    yield request.param
    agora_kernels.use_instruction_set(before)


def inputs(rows: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + d * 31 + k)
    c = torch.randn(rows, k, generator=generator).to(dtype)
    basis = (torch.randn(d, k, generator=generator) / d**0.5).to(dtype)
    ids = torch.randint(0, 1 << 32, (rows,), generator=generator)
    return c, basis, ids


def at_most_twice(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of torch in the same dtype; half a unit in the last place is free."""
    floor = float(exact.abs().max()) * torch.finfo(ours.dtype).eps / 2
    allowed = 2 * float((plain.double() - exact).abs().max()) + floor
    assert float((ours.double() - exact).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("rows", "d", "k"), SHAPES)
def test_error_at_most_twice_torchs(
    instruction_set: str, rows: int, d: int, k: int, dtype: torch.dtype
) -> None:
    c, basis, ids = inputs(rows, d, k, dtype)
    table = reference.token_table(ids, d, SEED, 0.1)
    exact = c.double() @ basis.double().T + table.double()
    ours = kernels.expand(c, basis, ids, SEED, 0.1)
    assert ours.dtype is dtype
    at_most_twice(ours, c @ basis.T + table.to(dtype), exact)
    low = table.to(dtype).contiguous()
    ours = kernels.expand_rows(c, basis, low)
    assert ours.dtype is dtype
    at_most_twice(ours, torch.addmm(low, c, basis.T), c.double() @ basis.double().T + low.double())

    dh = torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    at_most_twice(kernels.project(dh, basis), dh @ basis, dh.double() @ basis.double())
    at_most_twice(
        kernels.project_difference(dh, low, basis),
        (dh - low) @ basis,
        (dh.double() - low.double()) @ basis.double(),
    )


def test_calls_at_once_have_layouts_of_their_own() -> None:
    """Memory of U's layouts is kept between calls; two calls must never hold the same piece."""
    cases = []
    for seed in range(8):  # of one size, so that all want each other's memory; more than are kept
        g = torch.Generator().manual_seed(seed)
        h, basis = torch.randn(16, 1024, generator=g), torch.randn(1024, 51, generator=g)
        cases.append(
            (h, basis, kernels.project(h, basis), kernels.expand_rows(h[:, :51].contiguous(), basis, h))
        )

    def differ(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> int:
        h, basis, c, out = case
        again = [
            (kernels.project(h, basis), kernels.expand_rows(h[:, :51].contiguous(), basis, h))
            for _ in range(100)
        ]
        return sum(not (torch.equal(c, x) and torch.equal(out, y)) for x, y in again)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(differ, cases)) == [0] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("d", "n", "k"), [(1, 1, 1), (9, 7, 3), (64, 48, 16), (130, 33, 17), (257, 401, 51), (40, 97, 40)]
)
def test_weights_in_the_subspace(instruction_set: str, d: int, n: int, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(d)
    basis = torch.linalg.qr(torch.randn(d, k, generator=g))[0].contiguous()
    weights = torch.randn(d, n, generator=g).to(dtype)
    exact = basis.double() @ (basis.double().T @ weights.double())
    plain = (basis.to(dtype) @ (basis.to(dtype).T @ weights)).to(dtype)
    version = weights._version
    kernels.subspace_weights(weights, basis)
    assert weights._version > version
    at_most_twice(weights, plain, exact)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_error_at_full_width(dtype: torch.dtype) -> None:
    """The longest sums of the 8B stage, and large results, which are written past the caches."""
    c, basis, ids = inputs(1000, 5120, 51, dtype)
    rows = kernels.token_table(ids, 5120, SEED, 0.1, dtype=dtype)
    h = kernels.expand_rows(c, basis, rows)
    at_most_twice(h, torch.addmm(rows, c, basis.T), c.double() @ basis.double().T + rows.double())
    at_most_twice(kernels.project(h, basis), h @ basis, h.double() @ basis.double())


@pytest.mark.parametrize(("rows", "dtype"), [(1100, torch.float32), (2100, torch.bfloat16)])
def test_large_results_are_the_same(rows: int, dtype: torch.dtype) -> None:
    """Beyond 16 MiB results bypass the caches: the values may not depend on it, nor on alignment."""
    d, k = 4112, 5
    c, basis, ids = inputs(rows, d, k, dtype)
    table = kernels.token_table(ids, d, SEED, 0.1, dtype=dtype)
    part = slice(1024, 1032)
    assert torch.equal(table[part], kernels.token_table(ids[part], d, SEED, 0.1, dtype=dtype))
    whole = kernels.expand_rows(c, basis, table)
    assert torch.equal(whole[part], kernels.expand_rows(c[part], basis, table[part]))
    shifted = torch.empty(rows * d + 1, dtype=dtype)[1:].view(rows, d)
    assert torch.equal(kernels.expand_rows(c, basis, table, out=shifted), whole)


@pytest.mark.parametrize("left", [*DTYPES, torch.float64])
@pytest.mark.parametrize("middle", DTYPES)
@pytest.mark.parametrize("right", [*DTYPES, torch.float64])
def test_mixed_dtypes(left: torch.dtype, middle: torch.dtype, right: torch.dtype) -> None:
    c, basis, ids = inputs(9, 70, 10)
    c, basis = c.to(left), basis.to(middle)
    h = kernels.expand(c, basis, ids, 3, 0.5, dtype=right)
    assert h.dtype is right
    close = {"rtol": 2 * torch.finfo(right).eps, "atol": 2e-6}
    torch.testing.assert_close(h, reference.expand(c, basis, ids, 3, 0.5, right), **close)
    rows = kernels.token_table(ids, 70, 3, 0.5, dtype=right)
    torch.testing.assert_close(
        kernels.expand_rows(c, basis, rows), reference.expand_rows(c, basis, rows), **close
    )
    for dtype in (None, torch.float32):
        ours = kernels.project_difference(h, rows, basis, dtype=dtype)
        assert ours.dtype is (dtype or right)
        close = {"rtol": 2 * torch.finfo(ours.dtype).eps, "atol": 1e-5}
        torch.testing.assert_close(
            ours, reference.project_difference(h, rows, basis, dtype or right), **close
        )
        torch.testing.assert_close(
            kernels.project(h, basis, dtype=dtype), reference.project(h, basis, dtype), **close
        )


def test_zero_c_gives_the_table_to_the_bit(instruction_set: str) -> None:
    _, basis, ids = inputs(33, 130, 8)
    h = kernels.expand(torch.zeros(33, 8), basis, ids, SEED, 0.1)
    assert torch.equal(h, reference.token_table(ids, 130, SEED, 0.1))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_a_row_depends_on_itself_alone(instruction_set: str, dtype: torch.dtype) -> None:
    """Coalesced microbatches give the bits that each would give alone, on any number of threads."""
    c, basis, ids = inputs(301, 192, 19, dtype)
    rows = kernels.token_table(ids, 192, SEED, 0.1, dtype=dtype)
    dh = torch.randn(301, 192).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        h, dc = kernels.expand(c, basis, ids, SEED, 0.1), kernels.project(dh, basis)
        added, taken = kernels.expand_rows(c, basis, rows), kernels.project_difference(dh, rows, basis)
    finally:
        torch.set_num_threads(threads)
    if dtype is torch.float32:  # rows in fewer bits were rounded before they were added
        assert torch.equal(added, h)
    for row in (0, 1, 5, 299, 300):
        one = slice(row, row + 1)
        assert torch.equal(h[one], kernels.expand(c[one], basis, ids[one], SEED, 0.1))
        assert torch.equal(added[one], kernels.expand_rows(c[one], basis, rows[one]))
        assert torch.equal(dc[one], kernels.project(dh[one], basis))
        assert torch.equal(taken[one], kernels.project_difference(dh[one], rows[one], basis))


@pytest.mark.parametrize(
    ("rows", "d", "k"),
    [(1, 1, 1), (3, 2, 3), (9, 33, 5), (17, 1025, 51), (64, 2048, 16), (40, 3104, 50), (11, 130, 300)],
)
def test_products_of_bf16_are_summed_in_fp32(instruction_set: str, rows: int, d: int, k: int) -> None:
    """Both factors are bf16, the result is not: it has the precision of the sums, however they are made."""
    c, basis, _ = inputs(rows, d, k, torch.bfloat16)
    g = torch.Generator().manual_seed(3)
    h = torch.randn(rows * d + 1, generator=g).to(torch.bfloat16)
    for dh in (h[:-1].view(rows, d), h[1:].view(rows, d)):  # the second lies between two pairs
        ours, exact = kernels.project(dh, basis, dtype=torch.float32), dh.double() @ basis.double()
        size = dh.double().abs() @ basis.double().abs()
        assert ((ours - exact).abs() <= 1e-6 * size).all()
    plus = torch.randn(rows, d, generator=g)
    ours = kernels.expand_rows(c, basis, plus)
    exact = c.double() @ basis.double().T + plus
    size = c.double().abs() @ basis.double().abs().T + plus.abs()
    assert ((ours - exact).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(instruction_set: str, value: float) -> None:
    """Padding may not let it into other rows, nor hide it."""
    for dtype in DTYPES:
        c, basis, _ = inputs(20, 131, 9, dtype)
        rows, dh = torch.zeros(20, 131, dtype=dtype), torch.ones(20, 131, dtype=dtype)
        c[13, 8] = dh[13, 130] = value
        h, dc = kernels.expand_rows(c, basis, rows), kernels.project(dh, basis)
        others = torch.arange(20) != 13
        assert h[others].isfinite().all()
        assert dc[others].isfinite().all()
        assert not h[13].isfinite().any()
        assert not dc[13].isfinite().any()


def test_leading_dimensions() -> None:
    c, basis, ids = inputs(12, 20, 6)
    flat = kernels.expand(c, basis, ids, 1, 0.1)
    assert torch.equal(kernels.expand(c.view(3, 4, 6), basis, ids.view(3, 4), 1, 0.1), flat.view(3, 4, 20))
    assert kernels.project(flat.view(2, 6, 20), basis).shape == (2, 6, 6)


def test_gradients() -> None:
    c, basis, ids = inputs(6, 20, 5, torch.float64)
    wide = basis.double()
    assert torch.autograd.gradcheck(
        lambda x: kernels.expand(x, wide, ids, SEED, 0.1), c.double().requires_grad_()
    )
    dh = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kernels.project(x, wide), dh)
    rows = reference.token_table(ids, 20, SEED, 0.1).double()
    assert torch.autograd.gradcheck(lambda x: kernels.expand_rows(x, wide, rows), c.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x: kernels.project_difference(x, rows, wide), dh)

    small = c.detach().float().requires_grad_()
    h = kernels.expand(small, basis.float(), ids, SEED, 0.1)
    torch.autograd.backward(h.sum())  # an expanded, non-contiguous gradient
    assert small.grad is not None
    torch.testing.assert_close(small.grad, basis.float().sum(0).expand(6, 5))


def test_gradients_have_the_dtype_of_their_tensor() -> None:
    c, basis, ids = inputs(6, 20, 5)
    low = c.bfloat16().requires_grad_()
    rows = kernels.token_table(ids, 20, 1, 0.1, dtype=torch.float16)
    h = kernels.expand_rows(low, basis, rows)
    kernels.project(h, basis, dtype=torch.float32).sum().backward()  # type: ignore[no-untyped-call]
    assert low.grad is not None
    assert low.grad.dtype is torch.bfloat16
    want = basis.sum(1).expand(6, 20) @ basis
    torch.testing.assert_close(low.grad.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("seed", [3, -5])
def test_registration(seed: int) -> None:
    c, basis, ids = inputs(6, 20, 5)
    rows, h = torch.randn(6, 20), torch.randn(6, 20, requires_grad=True)
    follow = c.clone().requires_grad_()
    torch.library.opcheck(torch.ops.agora.expand, (follow, basis, ids, seed, 0.1))
    torch.library.opcheck(torch.ops.agora.expand, (follow, basis, ids, seed, 0.1, torch.bfloat16))
    torch.library.opcheck(torch.ops.agora.expand_rows, (follow, basis, rows))
    torch.library.opcheck(torch.ops.agora.project, (h, basis))
    torch.library.opcheck(torch.ops.agora.project_difference, (h, rows, basis, torch.bfloat16))
    # An operator's seed is signed, the kernel's is not.
    assert torch.equal(
        torch.ops.agora.expand(c, basis, ids, seed, 0.1), kernels.expand(c, basis, ids, seed % (1 << 64), 0.1)
    )


@pytest.mark.long
def test_compiles_whole() -> None:
    """No graph break, and any number of rows in one compilation."""

    def both(c: Tensor, basis: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        h = kernels.expand(c, basis, ids, (1 << 64) - 5, 0.1) + kernels.expand_rows(c, basis, rows)
        return kernels.project(h, basis) + kernels.project_difference(h, rows, basis)

    whole = torch.compile(both, fullgraph=True, dynamic=True)
    for count in (6, 11):
        c, basis, ids = inputs(count, 20, 5)
        rows = kernels.token_table(ids, 20, 3, 0.1)
        one, two = c.clone().requires_grad_(), c.clone().requires_grad_()
        eager, fast = both(one, basis, ids, rows), whole(two, basis, ids, rows)
        torch.testing.assert_close(fast, eager)
        eager.sum().backward()  # type: ignore[no-untyped-call]
        fast.sum().backward()
        torch.testing.assert_close(two.grad, one.grad)


def test_results_in_memory_of_the_callers() -> None:
    c, basis, ids = inputs(33, 130, 8)
    rows = kernels.token_table(ids, 130, 3, 0.1)
    h, small = torch.empty(33, 130), torch.empty(33, 8, dtype=torch.float16)
    version = h._version
    assert kernels.token_table(ids, 130, 3, 0.1, out=h) is h
    assert torch.equal(h, rows)
    assert h._version > version
    assert torch.equal(kernels.expand_rows(c, basis, rows, out=h), kernels.expand_rows(c, basis, rows))
    assert torch.equal(kernels.expand(c, basis, ids, 3, 0.1, out=h), kernels.expand(c, basis, ids, 3, 0.1))
    assert torch.equal(kernels.project(h, basis, out=small), kernels.project(h, basis, dtype=torch.float16))
    assert torch.equal(
        kernels.project_difference(h, rows, basis, out=small),
        kernels.project_difference(h, rows, basis, dtype=torch.float16),
    )


def bad_calls() -> list[tuple[object, type[Exception], str]]:
    c, basis, ids = inputs(4, 12, 3)
    h = torch.ones(4, 12)
    return [
        (lambda: kernels.expand([1.0], basis, ids, 1, 0.1), TypeError, "tensor"),  # type: ignore[arg-type]
        (lambda: kernels.expand(c.int(), basis, ids, 1, 0.1), TypeError, "int32"),
        (lambda: kernels.expand(c, basis, ids.int(), 1, 0.1), TypeError, "int64"),
        (lambda: kernels.expand(c, basis, ids[:3], 1, 0.1), ValueError, "fit"),
        (lambda: kernels.expand(c, basis[:, :2].contiguous(), ids, 1, 0.1), ValueError, "fit"),
        (lambda: kernels.expand(c.T.contiguous().T, basis, ids, 1, 0.1), ValueError, "contiguous"),
        (lambda: kernels.expand(c[:0], basis, ids[:0], 1, 0.1), ValueError, "empty"),
        (lambda: kernels.expand(c, basis[:0], ids, 1, 0.1), ValueError, "matrix"),
        (lambda: kernels.expand(c, basis, ids - (1 << 33), 1, 0.1), ValueError, "token ids"),
        (lambda: kernels.expand(c, basis, ids, -1, 0.1), ValueError, "seed"),
        (lambda: kernels.expand(c, basis, ids, 1, float("inf")), ValueError, "finite"),
        (lambda: kernels.expand(c, basis.to("meta"), ids, 1, 0.1), ValueError, "meta"),
        (lambda: kernels.expand(c, basis.to_sparse(), ids, 1, 0.1), TypeError, "dense"),
        (
            lambda: kernels.expand(torch.ones(4, 1025), torch.ones(12, 1025), ids, 1, 0.1),
            ValueError,
            "limits",
        ),
        (lambda: kernels.project(torch.ones(4, 11), basis), ValueError, "fit"),
        (lambda: kernels.project(torch.tensor(1.0), basis), ValueError, "fit"),
        (lambda: kernels.project(h.T, basis), ValueError, "contiguous"),
        (lambda: kernels.project(h[:, ::2], basis[:6]), ValueError, "contiguous"),
        (lambda: kernels.project(h, basis, dtype=torch.int8), TypeError, "dtype"),
        (lambda: kernels.project(h, basis, out=h[:, :3]), ValueError, "contiguous"),
        (lambda: kernels.project(h, basis, out=h.view(-1)[:12].view(4, 3)), ValueError, "memory with h"),
        (lambda: kernels.project(h, basis, out=torch.empty(3, 4)), ValueError, "shape"),
        (lambda: kernels.project_difference(h, h[:3], basis), ValueError, "fit"),
        (lambda: kernels.project_difference(h, h.half(), basis), TypeError, "float16"),
        (lambda: kernels.expand_rows(c, basis, h[:, :11].contiguous()), ValueError, "fit"),
        (lambda: kernels.expand_rows(c, basis, h.clone().requires_grad_()), ValueError, "constant"),
        (lambda: kernels.expand_rows(c, basis, h, out=h), ValueError, "memory with rows"),
        (lambda: kernels.expand_rows(c.clone().requires_grad_(), basis, h, out=h * 2), ValueError, "out="),
        (lambda: kernels.expand(c, basis, ids, 1, 0.1, dtype=torch.int32), TypeError, "dtype"),
        (lambda: kernels.subspace_weights(h.T.contiguous()[:11], basis), ValueError, "fit"),
        (lambda: kernels.subspace_weights(torch.ones(12), basis), ValueError, "matrix"),
        (lambda: kernels.subspace_weights(torch.ones(4, 12).T, basis), ValueError, "contiguous"),
        (lambda: kernels.subspace_weights(basis, basis), ValueError, "memory with U"),
        (lambda: kernels.subspace_weights(torch.ones(12, 2).int(), basis), TypeError, "int32"),
    ]


@pytest.mark.parametrize("index", range(len(bad_calls())))
def test_misuse_is_named(index: int) -> None:
    call, error, words = bad_calls()[index]
    assert callable(call)
    with pytest.raises(error, match=words):
        call()
