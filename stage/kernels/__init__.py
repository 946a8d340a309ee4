"""The kernels of the data path on tensors: shapes, checks, autograd, ``torch.library`` registration.

Theory of operation: ``agora_kernels`` takes addresses and sizes; this module makes sure that they are what
the kernel believes (dtype, device, contiguity, length; a ``TypeError`` or ``ValueError`` that says what is
wrong, never a crash), allocates the results, and tells autograd of tensors that were changed in place.
CPU tensors in float32, bfloat16 and float16 run compiled, on torch's number of threads; CUDA tensors where
the build has CUDA; float64 and everything else runs ``stage.kernels.reference``.

Limits: k at most 1024, d at most 2^20, token ids in [0, 2^32) (checked on the CPU; on CUDA their low 32 bits
count), 2^31 blocks (2 TiB of weights).
Guarantees: values of the token table, genesis values, slices, merges and reductions are equal to the bit on
every machine. A row of ``expand`` or ``project`` depends on that row alone, so a batch gives the same bits
as its rows one by one; another instruction set may differ by a rounding.
Sources: csrc/functors (what is computed), docs/kernels.md (why).
"""

from stage.kernels.boundary import expand, expand_rows, project, project_difference, subspace_weights
from stage.kernels.generator import random_normal, token_table
from stage.kernels.reduce import reduce_add, reduce_finish
from stage.kernels.reference import BLOCK
from stage.kernels.slices import slice_blocks, slice_key, slice_merge, slice_pack, slice_range
from stage.kernels.wire import project_into, wire_bytes, wire_pack

__all__ = [
    "BLOCK",
    "expand",
    "expand_rows",
    "project",
    "project_difference",
    "project_into",
    "random_normal",
    "reduce_add",
    "reduce_finish",
    "slice_blocks",
    "slice_key",
    "slice_merge",
    "slice_pack",
    "slice_range",
    "subspace_weights",
    "token_table",
    "wire_bytes",
    "wire_pack",
]
