"""The kernels of the data path on tensors: shapes, checks, autograd, ``torch.library`` registration.

Theory of operation: ``agora_kernels`` takes addresses and sizes; this module makes sure that they are what
the kernel believes (dtype, device, contiguity, length; a ``TypeError`` or ``ValueError`` that says what is
wrong, never a crash), allocates the results, and tells autograd of tensors that were changed in place.
CPU tensors in float32 and bfloat16 run compiled, on torch's number of threads; CUDA tensors where the build
has CUDA; float64 and everything else runs ``stage.kernels_reference``.

``expand`` and ``project`` are the operators ``agora::expand`` and ``agora::project``; called from here in
eager mode they skip the dispatcher's Python layers, which would cost more than a small microbatch's work.

Limits: k at most 1024, d at most 2^20, token ids in [0, 2^32) (checked on the CPU; on CUDA their low 32 bits
count), 2^31 blocks (2 TiB of weights).
Guarantees: values of the token table, genesis values, slices, merges and reductions are equal to the bit on
every machine. A row of ``expand`` or ``project`` depends on that row alone, so a batch gives the same bits
as its rows one by one; another instruction set may differ by a rounding.
Sources: csrc/functors (what is computed), docs/kernels.md (why).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from stage import kernels_reference as reference
from stage.kernels_reference import BLOCK as BLOCK

try:
    import agora_kernels as _native
except ImportError as problem:  # pragma: no cover - a broken installation
    raise ImportError(
        f"the compiled kernels cannot be loaded ({problem}): reinstall with 'pip install -e .'"
    ) from problem

_CODES = {torch.float32: 0, torch.bfloat16: 1}
_MODES = {"delta": 0, "overwrite": 1}
_MAX_K, _MAX_D, _MAX_BLOCKS = 1024, 1 << 20, 1 << 31
_MASK64 = 0xFFFFFFFFFFFFFFFF
_SLICE_DOMAIN = 0x534C4943  # "SLIC"


# -- checks ---------------------------------------------------------------------------------------------


def _check(
    name: str, tensor: object, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, not {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {tensor.layout}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _check_seed(name: str, value: int) -> int:
    if not 0 <= value <= _MASK64:
        raise ValueError(f"{name} must lie in [0, 2^64), not {value}")
    return value


def _check_scale(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return value


_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def _check_basis(x: Tensor, basis: object, columns: int, name: str) -> None:
    _check("U", basis, _FLOATS, x.device)
    assert isinstance(basis, Tensor)
    if basis.dim() != 2 or 0 in basis.shape:
        raise ValueError(f"U must be a matrix of d rows and k columns, not {tuple(basis.shape)}")
    d, k = basis.shape
    if d > _MAX_D or k > _MAX_K:
        raise ValueError(f"U of {d} x {k} is beyond the limits d <= {_MAX_D}, k <= {_MAX_K}")
    if x.dim() < 1 or x.shape[-1] != basis.shape[columns]:
        raise ValueError(f"{name} of shape {tuple(x.shape)} does not fit U of shape {(d, k)}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")


def _check_expand(c: Tensor, basis: Tensor, ids: Tensor, scale: float) -> None:
    _check("c", c, _FLOATS)
    _check_basis(c, basis, 1, "c")
    _check("ids", ids, (torch.int64,), c.device)
    if ids.shape != c.shape[:-1]:
        raise ValueError(f"ids of shape {tuple(ids.shape)} do not fit c of shape {tuple(c.shape)}")
    _check_scale("scale", scale)


def _check_project(dh: Tensor, basis: Tensor) -> None:
    _check("dh", dh, _FLOATS)
    _check_basis(dh, basis, 0, "dh")


# -- launching ------------------------------------------------------------------------------------------


def _compiled(*tensors: Tensor) -> bool:
    """Whether a compiled kernel exists for these."""
    device = tensors[0].device.type
    return (device == "cpu" or (device == "cuda" and _native.has_cuda)) and not any(
        tensor.dtype is torch.float64 for tensor in tensors
    )


def _launch(name: str, device: torch.device, *arguments: Any) -> Any:
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            return getattr(_native, f"cuda_{name}")(*arguments, stream)
    return getattr(_native, name)(*arguments, torch.get_num_threads())


# -- generator ------------------------------------------------------------------------------------------


def random_normal(
    seed: int, stream: int, n: int, std: float, *, device: torch.device | str = "cpu"
) -> Tensor:
    """``n`` nearly normal fp32 values, mean 0: element i of a stream is the same on every machine.

    Sum of four uniform bytes, so at most 3.451 ``std`` in size. ``stream``: 64 bits that name the tensor.
    """
    _check_seed("seed", seed)
    _check_seed("stream", stream)
    _check_scale("std", std)
    if n <= 0:
        raise ValueError(f"n must be positive, not {n}")
    where = torch.device(device)
    out = torch.empty(n, dtype=torch.float32, device=where)
    if not _compiled(out):
        return reference.random_normal(seed, stream, n, std, where)
    _launch("normal", out.device, out.data_ptr(), n, seed, stream, std * reference.UNIT)
    return out


def token_table(ids: Tensor, d: int, seed: int, scale: float = 1.0) -> Tensor:
    """Rows of ``scale * F`` for the ids, fp32 ``[..., d]``: made once a microbatch by a stage."""
    _check("ids", ids, (torch.int64,))
    _check_seed("seed", seed)
    _check_scale("scale", scale)
    if not 0 < d <= _MAX_D:
        raise ValueError(f"d must lie in [1, {_MAX_D}], not {d}")
    if ids.numel() == 0:
        raise ValueError("ids are empty")
    if not _compiled(ids):
        return reference.token_table(ids, d, seed, scale)
    out = torch.empty((*ids.shape, d), dtype=torch.float32, device=ids.device)
    factor = scale * reference.UNIT
    _launch("token_rows", ids.device, out.data_ptr(), ids.data_ptr(), ids.numel(), d, seed, factor)
    return out


# -- boundary -------------------------------------------------------------------------------------------


def _expand(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    _check_expand(c, basis, ids, scale)
    if not _compiled(c, basis):
        return reference.expand(c, basis, ids, seed, scale)
    d, k = basis.shape
    h = torch.empty((*c.shape[:-1], d), dtype=c.dtype, device=c.device)
    _launch(
        "expand", c.device,
        c.data_ptr(), _CODES[c.dtype], basis.data_ptr(), _CODES[basis.dtype], ids.data_ptr(),
        h.data_ptr(), _CODES[h.dtype], ids.numel(), d, k, seed, scale * reference.UNIT,
    )  # fmt: skip
    return h


def _project(dh: Tensor, basis: Tensor) -> Tensor:
    _check_project(dh, basis)
    if not _compiled(dh, basis):
        return reference.project(dh, basis)
    d, k = basis.shape
    out = torch.empty((*dh.shape[:-1], k), dtype=dh.dtype, device=dh.device)
    _launch(
        "project", dh.device,
        dh.data_ptr(), _CODES[dh.dtype], basis.data_ptr(), _CODES[basis.dtype],
        out.data_ptr(), _CODES[out.dtype], out.numel() // k, d, k,
    )  # fmt: skip
    return out


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
        ctx.save_for_backward(basis)
        return _expand(c, basis, ids, seed, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (basis,) = ctx.saved_tensors
        return project(grads[0].contiguous(), basis), None, None, None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dh: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return _project(dh, basis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (basis,) = ctx.saved_tensors
        return grads[0] @ basis.to(grads[0].dtype).T, None


@torch.library.custom_op("agora::expand", mutates_args=())
def _expand_op(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    return _expand(c, basis, ids, seed & _MASK64, scale)


@torch.library.custom_op("agora::project", mutates_args=())
def _project_op(dh: Tensor, basis: Tensor) -> Tensor:
    return _project(dh, basis)


@_expand_op.register_fake
def _(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    return c.new_empty((*c.shape[:-1], basis.shape[0]))


@_project_op.register_fake
def _(dh: Tensor, basis: Tensor) -> Tensor:
    return dh.new_empty((*dh.shape[:-1], basis.shape[1]))


def _keep_basis(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _expand_backward(ctx: Any, grad: Tensor) -> Any:
    return _project_op(grad.contiguous(), ctx.saved_tensors[0]), None, None, None, None


def _project_backward(ctx: Any, grad: Tensor) -> Any:
    return grad @ ctx.saved_tensors[0].to(grad.dtype).T, None


_expand_op.register_autograd(_expand_backward, setup_context=_keep_basis)
_project_op.register_autograd(_project_backward, setup_context=_keep_basis)


def expand(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    """``h = c U^T + scale F[ids]``: ``[..., k]`` to ``[..., d]`` in c's dtype, summed in fp32.

    Differentiable in ``c``; U is a constant of the run and gets no gradient.
    """
    _check_seed("seed", seed)
    if torch.compiler.is_compiling():
        # An operator's integers are signed.
        signed = seed - (1 << 64) if seed >> 63 else seed
        compiled: Tensor = _expand_op(c, basis, ids, signed, scale)
        return compiled
    result: Tensor = _Expand.apply(c, basis, ids, seed, scale)  # type: ignore[no-untyped-call]
    return result


def project(dh: Tensor, basis: Tensor) -> Tensor:
    """``dh U``: ``[..., d]`` to ``[..., k]`` in dh's dtype, summed in fp32. Differentiable in ``dh``."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _project_op(dh, basis)
        return compiled
    result: Tensor = _Project.apply(dh, basis)  # type: ignore[no-untyped-call]
    return result


# -- slices ---------------------------------------------------------------------------------------------


def slice_key(seed: int, stage: int, cycle: int) -> int:
    """The permutation's key: another for every run, stage and cycle of slices."""
    _check_seed("seed", seed)
    if not 0 <= stage < 1 << 32 or not 0 <= cycle <= _MASK64:
        raise ValueError(f"stage {stage} or cycle {cycle} is out of range")
    low, high, _, _ = reference.philox((stage, cycle & 0xFFFFFFFF, cycle >> 32, _SLICE_DOMAIN), seed)
    return high << 32 | low


def slice_range(blocks: int, r: int, n_slices: int) -> tuple[int, int]:
    """Positions [first, stop) of slice ``r`` in the permutation; slices differ by one block at most."""
    if not 0 < blocks <= _MAX_BLOCKS:
        raise ValueError(f"blocks must lie in [1, {_MAX_BLOCKS}], not {blocks}")
    if not 0 <= r < n_slices:
        raise ValueError(f"there is no slice {r} of {n_slices}")
    return r * blocks // n_slices, (r + 1) * blocks // n_slices


def slice_blocks(blocks: int, r: int, n_slices: int, key: int) -> Tensor:
    """The 256-float blocks of slice ``r``, int64, in packed order (on the CPU)."""
    first, stop = slice_range(blocks, r, n_slices)
    out = torch.empty(stop - first, dtype=torch.int64)
    _native.slice_blocks(out.data_ptr(), blocks, first, stop - first, _check_seed("key", key))
    return out


def _check_flat(flat: Tensor) -> int:
    _check("flat", flat, (torch.float32,))
    if flat.dim() != 1 or flat.numel() == 0 or flat.numel() % BLOCK:
        raise ValueError(f"flat must be 1-D and a multiple of {BLOCK} floats long, not {tuple(flat.shape)}")
    return flat.numel() // BLOCK


def slice_pack(flat: Tensor, r: int, n_slices: int, key: int) -> Tensor:
    """A copy of slice ``r`` of the weights, fp32, one block after the other."""
    blocks = _check_flat(flat)
    first, stop = slice_range(blocks, r, n_slices)
    _check_seed("key", key)
    flat = flat.detach()
    if not _compiled(flat):
        return reference.slice_pack(flat, reference.slice_blocks(blocks, first, stop, key))
    packed = torch.empty((stop - first) * BLOCK, dtype=torch.float32, device=flat.device)
    if packed.numel():
        addresses = flat.data_ptr(), packed.data_ptr()
        _launch("slice_pack", flat.device, *addresses, blocks, first, stop - first, key)
    return packed


def slice_merge(
    flat: Tensor,
    snapshot: Tensor | None,
    average: Tensor,
    r: int,
    n_slices: int,
    key: int,
    mode: Literal["delta", "overwrite"] = "delta",
    ranges: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Put the average of slice ``r`` into the weights, in place.

    ``delta``: ``w += average - snapshot``, where ``snapshot`` is what was packed when the round began;
    ``overwrite``: ``w = average`` (``snapshot`` may be None). ``ranges``: the ascending, disjoint ranges of
    floats of the packed slice that were averaged; None for all of it.
    """
    blocks = _check_flat(flat)
    first, stop = slice_range(blocks, r, n_slices)
    _check_seed("key", key)
    if mode not in _MODES:
        raise ValueError(f"mode must be 'delta' or 'overwrite', not {mode!r}")
    size = (stop - first) * BLOCK
    if mode == "overwrite":
        snapshot = None
    elif snapshot is None:
        raise ValueError("a delta merge needs the snapshot that was averaged")
    for name, packed in (("snapshot", snapshot), ("average", average)):
        if packed is not None:
            _check(name, packed, (torch.float32,), flat.device)
            if packed.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(packed.shape)}, the slice has {size} floats")
    done = 0
    for start, end in [(0, size)] if ranges is None else ranges:
        if not done <= start <= end <= size:
            raise ValueError(f"range ({start}, {end}) is not ascending, disjoint and within {size} floats")
        done = end
    wanted = [(a, b) for a, b in ([(0, size)] if ranges is None else ranges) if a < b]
    if not wanted:
        return
    with torch.no_grad():
        if not _compiled(flat):
            chosen = reference.slice_blocks(blocks, first, stop, key)
            reference.slice_merge(flat, snapshot, average, chosen, wanted)
            return
        before = average if snapshot is None else snapshot
        addresses = flat.data_ptr(), before.data_ptr(), average.data_ptr()
        for start, end in wanted:
            place = blocks, first, stop - first, key, start, end, _MODES[mode]
            _launch("slice_merge", flat.device, *addresses, *place)
        torch.autograd.graph.increment_version(flat)


# -- reduce ---------------------------------------------------------------------------------------------


_VERDICT_CHUNK = 4096  # elements that a CUDA block looks at


def _reduce_add(total: Tensor, part: Tensor, weight: float) -> tuple[bool, float]:
    place = total.data_ptr(), part.data_ptr(), part.numel(), _CODES[part.dtype], weight
    if total.device.type == "cpu":
        usable, norm2 = _launch("reduce_add", total.device, *place)
        return usable, norm2
    chunks = (part.numel() + _VERDICT_CHUNK - 1) // _VERDICT_CHUNK
    verdicts = torch.empty((chunks, 2), dtype=torch.float64, device=part.device)
    look = part.data_ptr(), _CODES[part.dtype], part.numel(), weight, verdicts.data_ptr()
    _launch("reduce_inspect", part.device, *look)
    norm2, bad = verdicts.sum(0).tolist()
    if bad == 0:
        _launch("reduce_add", total.device, *place)
    return bad == 0, norm2


def reduce_add(total: Tensor, part: Tensor, weight: float) -> tuple[bool, float]:
    """``total += weight * part`` in place unless a value is unusable; (usable, squared norm of ``part``).

    Usable: finite, and ``weight * value`` at most 2^112 in size. An unusable part leaves no trace.
    """
    _check("total", total, (torch.float32,))
    _check("part", part, (torch.float32, torch.bfloat16), total.device)
    if total.dim() != 1 or total.numel() == 0 or part.shape != total.shape:
        raise ValueError(f"part of shape {tuple(part.shape)} does not fit a total of {tuple(total.shape)}")
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"weight must be finite and not negative, not {weight}")
    with torch.no_grad():
        if not _compiled(total):
            return reference.reduce_add(total, part, weight)
        usable, norm2 = _reduce_add(total, part, weight)
        if usable:
            torch.autograd.graph.increment_version(total)
        return usable, norm2


def reduce_finish(total: Tensor, weight_sum: float) -> Tensor:
    """``total / weight_sum``: the weighted mean of what was added."""
    _check("total", total, (torch.float32,))
    if total.numel() == 0:
        raise ValueError("total is empty")
    if not math.isfinite(weight_sum) or weight_sum <= 0:
        raise ValueError(f"weight_sum must be finite and positive, not {weight_sum}")
    if not _compiled(total):
        return reference.reduce_finish(total, weight_sum)
    out = torch.empty_like(total)
    _launch("reduce_finish", total.device, total.data_ptr(), out.data_ptr(), total.numel(), weight_sum)
    return out
