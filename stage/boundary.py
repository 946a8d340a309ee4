"""How ``c`` and its gradient travel between stages: T·k numbers as fp32, bf16 or int8.

    fp32   T·k little-endian floats: exact
    bf16   T·k rounded to nearest even
    int8   T fp32 scales (largest magnitude of the token / 127), then T·k signed codes

Input from the wire is checked for length and finiteness before anybody computes with it; what is wrong
raises RemoteError. Little-endian machines only, which is every machine that torch supports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p2p.errors import LocalError, RemoteError
from stage import kernels
from stage.config import WireDtype

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_SCALE_BYTES = 4


def payload_bytes(tokens: int, k: int, dtype: WireDtype) -> int:
    """Exact size of one packed ``c`` or gradient."""
    return kernels.wire_bytes(tokens, k, dtype)


def pack(c: Tensor, dtype: WireDtype, into: bytearray | memoryview | None = None) -> bytearray | memoryview:
    """``c`` [T, k] in wire form, written once into ``into`` (made here if not given), which is returned."""
    tokens, k = c.shape
    size = payload_bytes(tokens, k, dtype)
    buffer = bytearray(size) if into is None else into
    if memoryview(buffer).nbytes != size:
        raise LocalError(f"boundary: the buffer has {memoryview(buffer).nbytes} bytes, not {size}")
    kernels.wire_pack(c.detach().contiguous(), buffer, dtype)
    return buffer


def unpack(buffer: bytes | bytearray | memoryview, tokens: int, k: int, dtype: WireDtype) -> Tensor:
    """A ``c`` or gradient [T, k] fp32 from the wire; may share the buffer's memory."""
    view = memoryview(buffer).cast("B")
    size = payload_bytes(tokens, k, dtype)
    if view.nbytes != size:
        raise RemoteError(f"boundary: {view.nbytes} bytes, where {tokens} x {k} in {dtype} are {size}")
    if view.readonly:
        view = memoryview(bytearray(view))
    if dtype == "int8":
        scales = torch.frombuffer(view, dtype=torch.float32, count=tokens)
        codes = torch.frombuffer(view, dtype=torch.int8, offset=tokens * _SCALE_BYTES)
        c = codes.view(tokens, k) * scales[:, None]
    else:
        c = torch.frombuffer(view, dtype=_TORCH[dtype]).view(tokens, k).float()
    if not bool(torch.isfinite(c).all()):
        raise RemoteError("boundary: a number is not finite")
    return c


def unpack_ids(buffer: bytes | bytearray | memoryview, tokens: int, vocab: int) -> Tensor:
    """T+1 token ids [T+1] int64 from the wire. RemoteError unless all lie in the vocabulary."""
    view = memoryview(buffer).cast("B")
    if view.nbytes != 4 * (tokens + 1):
        raise RemoteError(
            f"boundary: {view.nbytes} bytes of ids, where {tokens + 1} ids take {4 * (tokens + 1)}"
        )
    ids = torch.frombuffer(bytearray(view), dtype=torch.int32).long() & 0xFFFFFFFF
    if int(ids.max()) >= vocab:
        raise RemoteError(f"boundary: a token id is outside the vocabulary of {vocab}")
    return ids
