"""c in its form on the wire: to the bit as torch says it, from any dtype, into any memory; and misuse."""

from __future__ import annotations

from collections.abc import Iterator

import agora_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stage import kernels
from stage.kernels import reference
from stage.kernels.wire import Wire

WIRES: tuple[Wire, ...] = ("fp32", "bf16", "int8")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=agora_kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = agora_kernels.instruction_set()
    agora_kernels.use_instruction_set(request.param)
    yield request.param
    agora_kernels.use_instruction_set(before)


def packed(c: Tensor, wire: Wire) -> bytes:
    buffer = bytearray(kernels.wire_bytes(*c.shape, wire))
    kernels.wire_pack(c, buffer, wire)
    return bytes(buffer)


def plainly(c: Tensor, wire: Wire) -> bytes:
    out = torch.empty(kernels.wire_bytes(*c.shape, wire), dtype=torch.uint8)
    reference.wire_pack(c, out, wire)
    return out.numpy().tobytes()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (3, 5), (77, 51), (40, 1024), (9, 1500)])
def test_equals_torch_to_the_bit(
    instruction_set: str, tokens: int, k: int, dtype: torch.dtype, wire: Wire
) -> None:
    g = torch.Generator().manual_seed(k)
    c = (torch.randn(tokens, k, generator=g) * torch.logspace(-44, 34, tokens)[:, None]).to(dtype)
    c[tokens // 2] = 0
    c = c.nan_to_num(posinf=3e4, neginf=-3e4)  # fp16 has no room for the largest
    assert packed(c, wire) == plainly(c, wire)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.sampled_from(WIRES),
)
@settings(max_examples=150, deadline=None)
def test_any_number(values: list[float], wire: Wire) -> None:
    c = torch.tensor([values])
    assert packed(c, wire) == plainly(c, wire)


def test_ties_round_to_even() -> None:
    c = torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.5, 126.5]])
    assert list(torch.frombuffer(bytearray(packed(c, "int8"))[4:], dtype=torch.int8)) == [
        127, 0, 2, -2, 0, 126,
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_the_scale(bad: float) -> None:
    """The receiver refuses it: a scale is a number it checks."""
    c = torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]])
    scales = torch.frombuffer(bytearray(packed(c, "int8")), dtype=torch.float32, count=2)
    assert scales.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("minus", [False, True])
def test_projection_goes_straight_to_the_buffer(
    instruction_set: str, dtype: torch.dtype, wire: Wire, minus: bool
) -> None:
    g = torch.Generator().manual_seed(3)
    h, rows = (torch.randn(37, 90, generator=g).to(dtype) for _ in range(2))
    basis = torch.randn(90, 19, generator=g)
    c = (
        kernels.project_difference(h, rows, basis, dtype=torch.float32)
        if minus
        else kernels.project(h, basis, dtype=torch.float32)
    )
    size = kernels.wire_bytes(37, 19, wire)
    message = bytearray(7 + size)  # of odd alignment
    kernels.project_into(h, basis, memoryview(message)[7:], wire, rows=rows if minus else None)
    assert message[:7] == bytes(7)
    if dtype is torch.float64:  # the reference rounds its sums once more
        return
    assert bytes(message[7:]) == packed(c, wire)
    tensor = torch.empty(size, dtype=torch.uint8)
    version = tensor._version
    kernels.project_into(h, basis, tensor, wire, rows=rows if minus else None)
    assert tensor.numpy().tobytes() == message[7:]
    assert tensor._version > version


def test_a_typed_tensor_takes_the_bytes() -> None:
    c = torch.randn(5, 7)
    low = torch.empty(5, 7, dtype=torch.bfloat16)
    kernels.wire_pack(c, low, "bf16")
    assert torch.equal(low, c.bfloat16())


C, H, U = torch.ones(4, 3), torch.ones(4, 12), torch.ones(12, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kernels.wire_pack(C, bytearray(47), "fp32"), ValueError, "47 bytes"),
        (lambda: kernels.wire_pack(C, bytes(48), "fp32"), ValueError, "writable"),  # type: ignore[arg-type]
        (lambda: kernels.wire_pack(C, memoryview(bytearray(96))[::2], "fp32"), ValueError, "contiguous"),
        (lambda: kernels.wire_pack(C, 5, "fp32"), TypeError, "buffer"),  # type: ignore[arg-type]
        (lambda: kernels.wire_pack(C, bytearray(48), "fp8"), ValueError, "fp8"),  # type: ignore[arg-type]
        (lambda: kernels.wire_pack(C, C, "fp32"), ValueError, "memory with c"),
        (lambda: kernels.wire_pack(C.T, bytearray(48), "fp32"), ValueError, "contiguous"),
        (lambda: kernels.wire_pack(C[:0], bytearray(0), "fp32"), ValueError, "tokens"),
        (lambda: kernels.wire_pack(C.int(), bytearray(48), "fp32"), TypeError, "int32"),
        (lambda: kernels.wire_pack(C, torch.empty(48, device="meta"), "bf16"), ValueError, "192 bytes"),
        (lambda: kernels.wire_pack(C, torch.empty(12, device="meta"), "fp32"), ValueError, "meta"),
        (lambda: kernels.wire_pack(C, torch.empty(12, requires_grad=True), "fp32"), ValueError, "gradient"),
        (lambda: kernels.project_into(H, U, bytearray(27), "int8"), ValueError, "27 bytes"),
        (lambda: kernels.project_into(H, U, H[:1].view(-1), "fp32"), ValueError, "memory with h"),
        (lambda: kernels.project_into(H, U.T, bytearray(48), "fp32"), ValueError, "contiguous"),
        (lambda: kernels.project_into(H, U, bytearray(48), "fp32", rows=H[:2]), ValueError, "fit"),
        (lambda: kernels.project_into(H[:0], U, bytearray(0), "fp32"), ValueError, "empty"),
        (lambda: agora_kernels.wire_pack(bytes(48), 0, bytearray(47), 0, 4, 3, 1), ValueError, "47 bytes"),
        (lambda: agora_kernels.wire_pack(bytes(48), 0, bytearray(48), 9, 4, 3, 1), ValueError, "dtype"),
    ],
)
def test_misuse_is_named(call: object, error: type[Exception], words: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=words):
        call()
