"""The boundary's kernels against torch: the token table, expand, project, and the subspace of weights.

Torch's side has what ours avoids: the table F, stored, whose rows it gathers where our kernel makes them.
Where our kernel is given the rows, so is torch. Its products are those of its own library, results go to
memory that is there already on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from agorad.bench.cases import Case, Size, turns
from stage import boundary, kernels

VOCAB = 16_384
"""Rows of torch's stored table: enough to be beyond the caches; all of 128,256 would take 2.6 GB at 8b."""
SEED = 7


def boundary_cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The rows of one size and dtype."""
    T, d, k = size.tokens, size.d, size.k
    width = dtype.itemsize
    count = turns(T * d * width, device.type)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    basis = torch.linalg.qr(torch.randn(d, k, generator=g)).Q.to(device, dtype).contiguous()
    across = basis.t().contiguous()
    ids = [torch.randint(0, VOCAB, (T,), generator=g).to(device) for _ in range(count)]
    table = kernels.token_table(torch.arange(VOCAB, device=device), d, SEED, 1.0, dtype=dtype)
    rows = [torch.index_select(table, 0, i) for i in ids]
    hs = [normal(T, d) for _ in range(2)] + [torch.empty_like(rows[0]).normal_() for _ in range(count - 2)]
    outs = [torch.empty_like(rows[0]) for _ in range(count)]
    cs = [normal(T, k) for _ in range(count)]
    packed = bytearray(boundary.payload_bytes(T, k, "int8"))
    send = torch.frombuffer(packed, dtype=torch.uint8).to(device)
    c_out = torch.empty(T, k, dtype=dtype, device=device)
    big, small = T * d * width, T * k * width
    common: dict[str, Any] = {"size": size.name, "dtype": name}

    def at(i: int) -> int:
        return i % count

    yield Case(
        "token_table", bytes=big + 8 * T, **common,
        ours=lambda i: kernels.token_table(ids[at(i)], d, SEED, 1.0, dtype=dtype, out=outs[at(i)]),
        eager=[
            lambda i: torch.index_select(table, 0, ids[at(i)], out=outs[at(i)]),
            lambda i: torch.nn.functional.embedding(ids[at(i)], table),
        ],
        whole=lambda: _compiled(lambda t, i: t[i], lambda i: (table, ids[at(i)])),
    )  # fmt: skip

    def gather_then_product(i: int) -> Tensor:
        torch.index_select(table, 0, ids[at(i)], out=outs[at(i)])
        return outs[at(i)].addmm_(cs[at(i)], across)

    yield Case(
        "expand", bytes=2 * big + small, **common,
        ours=lambda i: kernels.expand_rows(cs[at(i)], basis, rows[at(i)], out=outs[at(i)]),
        eager=[
            lambda i: torch.addmm(rows[at(i)], cs[at(i)], across, out=outs[at(i)]),
            lambda i: torch.mm(cs[at(i)], across, out=outs[at(i)]).add_(rows[at(i)]),
        ],
        whole=lambda: _compiled(
            lambda r, c, u: r + c @ u, lambda i: (rows[at(i)], cs[at(i)], across)
        ),
    )  # fmt: skip
    yield Case(
        "expand_inline", bytes=big + small + 8 * T, **common,
        ours=lambda i: kernels.expand(cs[at(i)], basis, ids[at(i)], SEED, 1.0, out=outs[at(i)]),
        eager=[
            gather_then_product,
            lambda i: torch.addmm(table[ids[at(i)]], cs[at(i)], across, out=outs[at(i)]),
            lambda i: torch.mm(cs[at(i)], across, out=outs[at(i)]).add_(table[ids[at(i)]]),
        ],
        whole=lambda: _compiled(
            lambda t, i, c, u: t[i] + c @ u, lambda i: (table, ids[at(i)], cs[at(i)], across)
        ),
    )  # fmt: skip
    yield Case(
        "project", bytes=big + small, **common,
        ours=lambda i: kernels.project(hs[at(i)], basis, out=c_out),
        eager=[
            lambda i: torch.mm(hs[at(i)], basis, out=c_out),
            lambda i: torch.mm(hs[at(i)], across.t(), out=c_out),
        ],
        whole=lambda: _compiled(lambda h, u: h @ u, lambda i: (hs[at(i)], basis)),
    )  # fmt: skip

    def subtract_then_product(i: int) -> Tensor:
        torch.sub(hs[at(i)], rows[at(i)], out=outs[at(i)])
        return torch.mm(outs[at(i)], basis, out=c_out)

    yield Case(
        "project_difference", bytes=2 * big + small, **common,
        ours=lambda i: kernels.project_difference(hs[at(i)], rows[at(i)], basis, out=c_out),
        eager=[
            subtract_then_product,
            lambda i: torch.mm(hs[at(i)] - rows[at(i)], basis, out=c_out),
        ],
        whole=lambda: _compiled(lambda h, r, u: (h - r) @ u, lambda i: (hs[at(i)], rows[at(i)], basis)),
    )  # fmt: skip

    def quantised(i: int) -> None:
        c = torch.mm(hs[at(i)], basis).float()
        scales = c.abs().amax(1, keepdim=True) / 127.0
        send[: 4 * T].view(torch.float32).copy_(scales[:, 0])
        send[4 * T :].view(torch.int8).view(T, k).copy_((c / scales.clamp_min(1e-38)).round_())

    yield Case(
        "project_int8", bytes=big + T * (k + 4), **common,
        ours=lambda i: kernels.project_into(hs[at(i)], basis, send, "int8"),
        eager=[quantised],
    )  # fmt: skip
    columns = min(d, 4096)
    weights = [torch.empty(d, columns, dtype=dtype, device=device).normal_() for _ in range(2)]
    yield Case(
        "subspace_weights", bytes=2 * d * columns * width, **common,
        ours=lambda i: kernels.subspace_weights(weights[i % 2], basis),
        eager=[
            lambda i: torch.mm(basis, across @ weights[i % 2], out=weights[i % 2]),
            lambda i: weights[i % 2].copy_(basis @ (basis.t() @ weights[i % 2])),
        ],
    )  # fmt: skip


def _compiled(function: Any, arguments: Any) -> Any:
    fast: Any = torch.compile(function, dynamic=False)
    return lambda i: fast(*arguments(i))
