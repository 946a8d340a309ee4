"""The boundary's CUDA kernels against double precision and the definition: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage import kernels
from stage.kernels import reference
from stage.kernels.launch import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and native.has_cuda), reason="no GPU, or a build without CUDA"
    ),
]

SEED = 0xFEDCBA9876543210
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Ragged rows, columns and k; odd d and k above 64 (no tensor cores); several spans; an 8B microbatch.
SHAPES = [(1, 8, 1), (5, 64, 16), (130, 136, 51), (3, 59, 17), (9, 72, 65), (33, 1416, 51), (4096, 5120, 51)]


def close(ours: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The rule of twice torch's error, with half a unit in the last place of the largest to spare."""
    floor = float(exact.abs().max()) * torch.finfo(ours.dtype).eps / 2
    error, of_torch = ((x.double() - exact).abs().max().item() for x in (ours, plain))
    assert error <= 2 * of_torch + floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "k"), SHAPES)
def test_error_at_most_twice_torchs(rows: int, d: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows + d + k)
    c = torch.randn(rows, k, device="cuda").to(dtype)
    basis = (torch.randn(d, k, device="cuda") / d**0.5).to(dtype)
    ids = torch.randint(0, 1 << 32, (rows,), device="cuda")
    table = kernels.token_table(ids, d, SEED, 0.1, dtype=dtype)
    assert torch.equal(table, reference.token_table(ids, d, SEED, 0.1, dtype))
    product = c.double() @ basis.double().T
    plain = c @ basis.T + table
    close(kernels.expand_rows(c, basis, table), product + table.double(), plain)
    fused = product + reference.token_table(ids, d, SEED, 0.1).double()
    close(kernels.expand(c, basis, ids, SEED, 0.1), fused, plain)
    h = torch.randn(rows, d, device="cuda").to(dtype)
    close(kernels.project(h, basis), h.double() @ basis.double(), h @ basis)
    difference = (h.double() - table.double()) @ basis.double()
    close(kernels.project_difference(h, table, basis), difference, (h - table) @ basis)


def test_a_changed_basis_is_prepared_anew() -> None:
    h = torch.randn(64, 128, device="cuda").bfloat16()
    basis = torch.randn(128, 16, device="cuda").bfloat16()
    before = kernels.project(h, basis)
    basis.mul_(2)
    assert torch.equal(kernels.project(h, basis), before * 2)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wire_forms_at_any_address(dtype: torch.dtype, offset: int) -> None:
    rows, d, k = 67, 200, 51
    h = torch.randn(rows * d + 1, device="cuda").to(dtype)[offset : offset + rows * d].view(rows, d)
    basis = torch.randn(d, k, device="cuda")
    c = kernels.project(h, basis, dtype=torch.float32)
    forms: tuple[kernels.wire.Wire, ...] = ("fp32", "bf16", "int8")
    for wire in forms:
        size = kernels.wire_bytes(rows, k, wire)
        want = torch.empty(size, dtype=torch.uint8, device="cuda")
        reference.wire_pack(c, want, wire)
        out = torch.zeros(size + 1, dtype=torch.uint8, device="cuda")[offset : offset + size]
        kernels.project_into(h, basis, out, wire)
        assert torch.equal(out, want)
        out.zero_()
        kernels.wire_pack(c, out, wire)
        assert torch.equal(out, want)
