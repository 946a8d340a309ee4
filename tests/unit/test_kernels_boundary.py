"""expand and project against double precision, their gradients, their registration, and misuse."""

from __future__ import annotations

from collections.abc import Iterator

import agora_kernels
import pytest
import torch
from torch import Tensor

from stage import kernels
from stage.kernels import reference

SEED = 0xFEDCBA9876543210
SHAPES = [
    (1, 1, 1),
    (3, 5, 2),
    (4, 64, 16),
    (7, 59, 17),
    (97, 111, 33),
    (256, 192, 24),
    (5, 1025, 51),
    (2, 300, 1024),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "d", "k"), SHAPES)
def test_error_at_most_twice_torchs(
    instruction_set: str, rows: int, d: int, k: int, dtype: torch.dtype
) -> None:
    c, basis, ids = inputs(rows, d, k, dtype)
    table = reference.token_table(ids, d, SEED, 0.1)
    exact = c.double() @ basis.double().T + table.double()
    plain = c @ basis.T + table.to(dtype)
    ours = kernels.expand(c, basis, ids, SEED, 0.1)
    assert ours.dtype is dtype
    floor = float(exact.abs().max()) * torch.finfo(dtype).eps / 2
    assert (
        float((ours.double() - exact).abs().max()) <= 2 * float((plain.double() - exact).abs().max()) + floor
    )

    dh = torch.randn(rows, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = dh.double() @ basis.double()
    plain = dh @ basis
    ours = kernels.project(dh, basis)
    floor = float(exact.abs().max()) * torch.finfo(dtype).eps / 2
    assert (
        float((ours.double() - exact).abs().max()) <= 2 * float((plain.double() - exact).abs().max()) + floor
    )


def test_mixed_dtypes(instruction_set: str) -> None:
    c, basis, ids = inputs(9, 70, 10)
    low = basis.bfloat16()
    torch.testing.assert_close(
        kernels.expand(c, low, ids, 3, 0.5), reference.expand(c, low, ids, 3, 0.5), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        kernels.project(torch.ones(9, 70).bfloat16(), basis),
        reference.project(torch.ones(9, 70).bfloat16(), basis),
    )


def test_zero_c_gives_the_table_to_the_bit(instruction_set: str) -> None:
    _, basis, ids = inputs(33, 130, 8)
    h = kernels.expand(torch.zeros(33, 8), basis, ids, SEED, 0.1)
    assert torch.equal(h, reference.token_table(ids, 130, SEED, 0.1))


def test_a_row_depends_on_itself_alone(instruction_set: str) -> None:
    """Coalesced microbatches give the bits that each would give alone, on any number of threads."""
    c, basis, ids = inputs(301, 192, 24)
    dh = torch.randn(301, 192)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        h, dc = kernels.expand(c, basis, ids, SEED, 0.1), kernels.project(dh, basis)
    finally:
        torch.set_num_threads(threads)
    for row in (0, 1, 5, 299, 300):
        one = slice(row, row + 1)
        assert torch.equal(h[one], kernels.expand(c[one], basis, ids[one], SEED, 0.1))
        assert torch.equal(dc[one], kernels.project(dh[one], basis))


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

    small = c.detach().float().requires_grad_()
    h = kernels.expand(small, basis.float(), ids, SEED, 0.1)
    torch.autograd.backward(h.sum())  # an expanded, non-contiguous gradient
    assert small.grad is not None
    torch.testing.assert_close(small.grad, basis.float().sum(0).expand(6, 5))


@pytest.mark.parametrize("seed", [3, -5])
def test_registration(seed: int) -> None:
    c, basis, ids = inputs(6, 20, 5)
    torch.library.opcheck(torch.ops.agora.expand, (c.clone().requires_grad_(), basis, ids, seed, 0.1))
    torch.library.opcheck(torch.ops.agora.project, (torch.randn(6, 20, requires_grad=True), basis))
    # An operator's seed is signed, the kernel's is not.
    assert torch.equal(
        torch.ops.agora.expand(c, basis, ids, seed, 0.1), kernels.expand(c, basis, ids, seed % (1 << 64), 0.1)
    )


def bad_calls() -> list[tuple[object, type[Exception], str]]:
    c, basis, ids = inputs(4, 12, 3)
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
    ]


@pytest.mark.parametrize("index", range(16))
def test_misuse_is_named(index: int) -> None:
    call, error, words = bad_calls()[index]
    assert callable(call)
    with pytest.raises(error, match=words):
        call()
