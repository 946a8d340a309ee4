"""The boundary's CUDA kernels, run on the CPU by tests/emulation: the definition's bits, or its precision.

Every call is made with two schedules of the emulated threads. Scratch and prepared bases start as NaN, so
that reading what no kernel wrote shows.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from stage.kernels import reference
from tests import emulation

SEED = 0xFEDCBA9876543210
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)
WIRES = {"fp32": 0, "bf16": 1, "int8": 3}
# Ragged rows, columns and k; odd d and k above 64, for which there are no tensor cores.
SHAPES = [(1, 8, 1), (5, 64, 16), (3, 59, 17), (9, 72, 65)]
SPANS = (3, 1416, 51)
"""Two spans of d, the last one ragged."""
LONG = [(130, 136, 51), (67, 2648, 64), (2, 300, 130)]
MIXED = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float16, torch.float32),
]
"""Of c, the basis and h."""

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="there is no g++")


@pytest.fixture(params=["0", "1"], autouse=True)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGORA_EMULATION_SEED", request.param)
    torch.manual_seed(7)


def aligned(shape: tuple[int, ...], dtype: torch.dtype, aside: bool) -> Tensor:
    """Ones at an address that vectors can be read from or, aside, one element further on."""
    numbers = int(torch.Size(shape).numel())
    room = torch.ones(numbers + 17, dtype=dtype)
    first = -room.data_ptr() % 16 // room.element_size() + int(aside)
    return room[first : first + numbers].view(shape)


def moved(tensor: Tensor, aside: bool) -> Tensor:
    return aligned(tuple(tensor.shape), tensor.dtype, aside).copy_(tensor)


def prepared(cuda: ModuleType, basis: Tensor, h_dtype: torch.dtype) -> Tensor | None:
    d, k = basis.shape
    numbers = cuda.cuda_prepared_numbers(CODES[h_dtype], CODES[basis.dtype], d, k)
    if numbers == 0:
        return None
    out = aligned((numbers,), h_dtype, False).fill_(float("nan"))
    cuda.cuda_prepare_basis(
        basis.data_ptr(), CODES[basis.dtype], out.data_ptr(), CODES[h_dtype], d, k, 0
    )  # fmt: skip
    return out


def expand(
    cuda: ModuleType, c: Tensor, basis: Tensor, ids: Tensor | None, table: Tensor | None, h: Tensor
) -> Tensor:
    (rows, k), d = c.shape, basis.shape[0]
    ready = prepared(cuda, basis, h.dtype)
    tail = 0 if ready is None else ready.data_ptr()
    head = (c.data_ptr(), CODES[c.dtype], basis.data_ptr(), CODES[basis.dtype])
    if table is not None:
        cuda.cuda_expand_rows(
            *head, table.data_ptr(), h.data_ptr(), CODES[h.dtype], rows, d, k, tail, 0
        )  # fmt: skip
    else:
        assert ids is not None
        factor = 0.1 * reference.UNIT
        cuda.cuda_expand(
            *head, ids.data_ptr(), h.data_ptr(), CODES[h.dtype], rows, d, k, SEED, factor, tail, 0
        )  # fmt: skip
    return h


def project(
    cuda: ModuleType, h: Tensor, table: Tensor | None, basis: Tensor, out: Tensor, code: int
) -> Tensor:
    rows, (d, k) = h.shape[0], basis.shape
    ready = prepared(cuda, basis, h.dtype)
    scratch = aligned((cuda.cuda_scratch_numbers(rows, d, k),), torch.float32, False).fill_(float("nan"))
    cuda.cuda_project(
        h.data_ptr(), CODES[h.dtype], 0 if table is None else table.data_ptr(), basis.data_ptr(),
        CODES[basis.dtype], out.data_ptr(), code, rows, d, k, 0 if ready is None else ready.data_ptr(),
        scratch.data_ptr(), 0,
    )  # fmt: skip
    return out


def close(ours: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The rule of twice torch's error, with half a unit in the last place of the largest to spare."""
    floor = float(exact.abs().max()) * torch.finfo(ours.dtype).eps / 2
    error, of_torch = (float((x.double() - exact).abs().max()) for x in (ours, plain))
    assert error <= 2 * of_torch + floor


def compare(
    cuda: ModuleType,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    aside: bool,
) -> None:
    """All four products of one shape; c, the basis and h of the dtypes."""
    rows, d, k = shape
    c = moved(torch.randn(rows, k).to(dtypes[0]), aside)
    basis = moved((torch.randn(d, k) / d**0.5).to(dtypes[1]), aside)
    ids = torch.randint(0, 1 << 32, (rows,))
    exact_table = reference.token_table(ids, d, SEED, 0.1)
    table = moved(exact_table.to(dtypes[2]), aside)
    h = moved(torch.randn(rows, d).to(dtypes[2]), aside)
    low_c, low_basis = c.to(dtypes[2]), basis.to(dtypes[2])
    product = c.double() @ basis.double().T
    plain = low_c @ low_basis.T + table

    def fresh(width: int) -> Tensor:
        return aligned((rows, width), dtypes[2], aside).fill_(float("nan"))

    close(expand(cuda, c, basis, None, table, fresh(d)), product + table.double(), plain)
    close(expand(cuda, c, basis, ids, None, fresh(d)), product + exact_table.double(), plain)
    code = CODES[dtypes[2]]
    close(project(cuda, h, None, basis, fresh(k), code), h.double() @ basis.double(), h @ low_basis)
    exact = (h.double() - table.double()) @ basis.double()
    close(project(cuda, h, table, basis, fresh(k), code), exact, (h - table) @ low_basis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("d", [1, 59, 1040])
def test_generator(cuda: ModuleType, dtype: torch.dtype, aside: bool, d: int) -> None:
    ids = torch.randint(0, 1 << 32, (3,))
    out = aligned((3, d), dtype, aside)
    factor = 0.1 * reference.UNIT
    cuda.cuda_token_rows(out.data_ptr(), CODES[dtype], ids.data_ptr(), 3, d, SEED, factor, 0)
    assert torch.equal(out, reference.token_table(ids, d, SEED, 0.1, dtype))
    values = aligned((d,), torch.float32, aside)
    cuda.cuda_normal(values.data_ptr(), d, SEED, 5, factor, 0)
    assert torch.equal(values, reference.random_normal(SEED, 5, d, 0.1, torch.device("cpu")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.long) for s in [SPANS, *LONG])]
)
@pytest.mark.parametrize("aside", [False, True])
def test_products(cuda: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int], aside: bool) -> None:
    compare(cuda, shape, (dtype, dtype, dtype), aside)


def test_several_spans(cuda: ModuleType) -> None:
    compare(cuda, SPANS, (torch.bfloat16,) * 3, False)


@pytest.mark.parametrize("dtypes", MIXED)
def test_mixed_types(cuda: ModuleType, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    compare(cuda, (5, 72, 51), dtypes, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("offset", [0, 1])
def test_wire_forms(cuda: ModuleType, dtype: torch.dtype, wire: str, offset: int) -> None:
    """The same bytes from c itself, and from a projection whose fp32 result is c."""
    rows, d, k = 9, 40, 51
    h, basis = torch.randn(rows, d).to(dtype), torch.randn(d, k)
    h = moved(h, False)
    sums = project(cuda, h, None, basis, torch.empty(rows, k), 0)
    low = torch.randn(rows, k).to(dtype)
    low[3] = 0
    size = {"fp32": 4 * rows * k, "bf16": 2 * rows * k, "int8": 4 * rows + rows * k}[wire]
    want, room = torch.empty(size, dtype=torch.uint8), torch.zeros(size + 1, dtype=torch.uint8)
    out = room[offset : offset + size]
    reference.wire_pack(sums, want, wire)
    project(cuda, h, None, basis, out, WIRES[wire])
    assert torch.equal(out, want)
    reference.wire_pack(low, want, wire)
    cuda.cuda_wire_pack(low.data_ptr(), CODES[dtype], out.data_ptr(), WIRES[wire], rows, k, 0)
    assert torch.equal(out, want)
