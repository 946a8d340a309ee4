"""The boundary codec: sizes to the byte, exactness, bad input."""

import struct

import pytest
import torch

from p2p.errors import LocalError, RemoteError
from stage import boundary
from stage.config import WireDtype

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

DTYPES: tuple[WireDtype, ...] = ("fp32", "bf16", "int8")


@pytest.mark.parametrize(
    ("dtype", "size"), [("fp32", 7 * 5 * 4), ("bf16", 7 * 5 * 2), ("int8", 7 * 5 + 7 * 4)]
)
def test_sizes(dtype: WireDtype, size: int) -> None:
    assert boundary.payload_bytes(7, 5, dtype) == size
    assert len(boundary.pack(torch.randn(7, 5), dtype)) == size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_round_trip(dtype: WireDtype, wrap: type[bytes]) -> None:
    c = torch.randn(9, 6) * torch.logspace(-6, 6, 9)[:, None]
    c[4] = 0
    back = boundary.unpack(wrap(boundary.pack(c, dtype)), 9, 6, dtype)
    if dtype == "fp32":
        assert torch.equal(back, c)
    elif dtype == "bf16":
        assert torch.equal(back, c.bfloat16().float())
    else:
        step = c.abs().amax(1, keepdim=True) / 127
        assert bool(((back - c).abs() <= step * 0.5001).all())


def test_pack_into_a_part_of_a_larger_message() -> None:
    c = torch.randn(3, 4)
    message = bytearray(10 + boundary.payload_bytes(3, 4, "fp32"))
    boundary.pack(c.t().contiguous().t(), "fp32", memoryview(message)[10:])
    assert message[:10] == bytes(10)
    assert torch.equal(boundary.unpack(memoryview(message)[10:], 3, 4, "fp32"), c)
    with pytest.raises(LocalError, match="bytes"):
        boundary.pack(c, "fp32", bytearray(5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_length(dtype: WireDtype, change: int) -> None:
    size = boundary.payload_bytes(3, 4, dtype)
    with pytest.raises(RemoteError, match="bytes"):
        boundary.unpack(bytes(size + change), 3, 4, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(dtype: WireDtype, value: float) -> None:
    buffer = bytearray(boundary.pack(torch.ones(3, 4), dtype))
    raw = struct.pack("<f", value)
    buffer[4:8] = raw if dtype != "bf16" else raw[2:] * 2
    with pytest.raises(RemoteError, match="finite"):
        boundary.unpack(buffer, 3, 4, dtype)


def test_token_ids() -> None:
    raw = struct.pack("<4I", 1, 2, 3, 255)
    assert boundary.unpack_ids(raw, 3, 256).tolist() == [1, 2, 3, 255]
    for bad in (struct.pack("<4I", 1, 2, 3, 256), struct.pack("<4I", 1, 2, 3, 0xFFFFFFFF), raw[:-1]):
        with pytest.raises(RemoteError):
            boundary.unpack_ids(bad, 3, 256)
