"""What a replica of a stage needs in memory, component by component, as formulas. Torch-free.

Theory of operation. A worker's memory is a few flat vectors over the stage's N weights, which are there all
the time, and what one microbatch makes on its way. The vectors follow from the mode:

    component    bytes a weight          where
    weights      4 (fp32 masters)        device; host memory with ``optimizer = host``
    compute      2 in bf16, 4 in fp32    device: what passes read; none where they read the masters themselves
    gradients    4                       device
    optimizer    8 / 2 + 8/256 / 8       device / device (8-bit codes, a scale a 256 weights) / host
    drift        4 with ``merge = ema``  where the masters are
    factors      of the gradients' matrices, with ``averaging = powersgd``: device; their mean is workspace

*Activations* are what autograd keeps of a microbatch between its forward and its backward pass: the sum of
what the functions of ``stage.functions`` and the products save, times the graphs that wait at a time. With
recomputation one layer's graph exists at a time, beside each layer's input for every microbatch in flight.
*Workspace* is the largest set of temporaries beside them: of a layer's backward pass, of the loss, or of a
step. Averaging packs a slice, receives its average and sums its own share.

The counts follow the code and are held against it by tests: saved tensors to the byte, whole processes
within a tenth. What is an assumption is a named constant. Not counted: a mask over documents
(rows that hold several), copies of weights for readers and old graphs (a worker makes them only where room
is left), the page cache (snapshots and downloaded states are files).
Units: bytes. Source of the modes: docs/plan.md.
"""

from __future__ import annotations

from typing import Final, Literal

import attrs

from stage.config import ModelConfig, TrainingConfig
from stage.factors import sizes
from stage.parameters import BLOCK, Layout, is_wide, parameter_specs

Dtype = Literal["fp32", "bf16"]
OptimizerPlace = Literal["device", "8bit", "host"]
Graph = Literal["retain", "recompute"]
DeviceKind = Literal["cuda", "cpu"]

WIDTH: Final[dict[Dtype, int]] = {"fp32": 4, "bf16": 2}
MOMENTS_8BIT: Final = 2 + 8 / 256
"""Two codes a weight, two fp32 scales a block of 256."""

LOGITS: Final = 1 << 26
"""Most logits at a time, as in ``stage.model``."""
VOCAB_ROWS: Final = 1 << 14
"""Rows of the output matrix whose gradient exists at a time in bf16, as in ``stage.functions``."""
STAGING: Final = 1 << 22
"""Floats in each of a host optimizer's two buffers a direction, as ``stage.weights.CHUNK``."""
SLICE_COPIES: Final = 3
"""A slice as packed, its average, and sums of our share with what is on its way."""

CUDA_CONTEXT: Final = 600_000_000
"""Assumed: CUDA context, cuBLAS workspaces and loaded kernels."""
CUDA_SLACK: Final = 0.05
"""Assumed: what the caching allocator cannot use, of activations and workspace."""
CUDA_HOST_BASE: Final = 1_500_000_000
"""Assumed: a process with torch and CUDA's libraries, before its data."""
CPU_BASE: Final = 310_000_000
"""Measured: a process with torch, its libraries in use, and the daemon, before its data (torch 2.13)."""


@attrs.frozen
class Mode:
    """How a worker trades memory against time: its ``[compute]`` settings."""

    dtype: Dtype = "bf16"
    optimizer: OptimizerPlace = "device"
    graph: Graph = "retain"

    def __str__(self) -> str:
        return f"{self.dtype}, optimizer {self.optimizer}, {self.graph}"


@attrs.frozen
class Memory:
    """Bytes by component."""

    device: dict[str, int]
    """In the device's memory; on a CPU that is host memory too."""
    host: dict[str, int]

    @property
    def vram_bytes(self) -> int:
        """All of the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All of the host's."""
        return sum(self.host.values())


def stage_memory(
    model: ModelConfig,
    training: TrainingConfig,
    stage: int,
    mode: Mode,
    *,
    graphs: int = 1,
    device: DeviceKind = "cuda",
) -> Memory:
    """What a replica needs while it trains with ``graphs`` microbatches between forward and backward."""
    floats = Layout.of(parameter_specs(model, stage)).size
    on_host = mode.optimizer == "host"
    shared = mode.dtype == "fp32" and not on_host
    if mode.graph == "retain":
        activations = graphs * graph_bytes(model, stage, mode.dtype)
    else:
        activations = layer_bytes(model, stage, mode.dtype) + graphs * inputs_bytes(model, stage)
    slice_bytes = round_bytes(model, training, stage)
    left, right, whole = gradient_bytes(model, training, stage)
    workspace = max(
        backward_bytes(model, stage, mode.dtype) + state_bytes(model, stage, mode.dtype),
        loss_bytes(model, stage, mode.dtype),
        2 * slice_bytes,  # distances are taken of whole slices
        4 * floats + left + right + whole if left + right + whole else 0,  # a mean gradient
    )
    on_device = {
        "weights": 0 if on_host else 4 * floats,
        "compute": 0 if shared else WIDTH[mode.dtype] * floats,
        "gradients": 4 * floats,
        "optimizer": {"device": 8 * floats, "8bit": round(MOMENTS_8BIT * floats), "host": 0}[mode.optimizer],
        "activations": activations,
        "workspace": workspace,
        "factors": right,
    }
    drift = 4 * floats if training.merge == "ema" else 0
    on_device["drift"] = 0 if on_host else drift
    in_host = {
        "drift": drift if on_host else 0,
        "process": CPU_BASE if device == "cpu" else CUDA_HOST_BASE,
        "slices": SLICE_COPIES * max(slice_bytes, left, right + whole),
        "weights": 4 * floats if on_host else 0,
        "optimizer": 8 * floats if on_host else 0,
        "staging": 2 * (4 + WIDTH[mode.dtype]) * min(STAGING, floats) if on_host else 0,
    }
    if device == "cuda":
        on_device["runtime"] = CUDA_CONTEXT + round(CUDA_SLACK * (activations + workspace))
    return Memory(on_device, in_host)


def round_bytes(model: ModelConfig, training: TrainingConfig, stage: int) -> int:
    """The largest slice of the stage's weights that a round averages, fp32."""
    blocks = Layout.of(parameter_specs(model, stage)).size // BLOCK
    return -(-blocks // training.slices) * BLOCK * 4


def gradient_bytes(model: ModelConfig, training: TrainingConfig, stage: int) -> tuple[int, int, int]:
    """What a synchronous step averages, fp32: left factors, and in a second round right ones and the rest.

    Nothing where replicas step for themselves.
    """
    if training.averaging != "powersgd":
        return 0, 0, 0
    left, right, whole = sizes(Layout.of(parameter_specs(model, stage)), training.powersgd_rank)
    return 4 * left, 4 * right, 4 * whole


def wire_bytes(model: ModelConfig, training: TrainingConfig, *, backward: bool = False) -> int:
    """One microbatch's c, or its gradient, between two stages."""
    dtype = training.wire_dtype_backward if backward else training.wire_dtype
    row = model.k + 4 if dtype == "int8" else model.k * {"fp32": 4, "bf16": 2}[dtype]
    return model.seq * row


def layer_bytes(model: ModelConfig, stage: int, dtype: Dtype) -> int:
    """What autograd keeps of one layer of one sequence.

    Both reads keep x and one sum a token; attention keeps its heads, the unit and the rotated queries and
    keys, its output and two sums a head; SwiGLU keeps both factors and their product; both writes keep
    the branch (k numbers a token, or d where the stage is wide) and one sum a token.
    """
    turned, heads = model.heads + model.kv_heads, model.heads + 2 * model.kv_heads
    written = model.d if is_wide(model, stage) else model.k
    low = 3 * model.d + (heads + 2 * turned) * model.head_dim + 3 * model.ffn + 2 * written
    sums = 4 + turned + model.heads
    return model.seq * (low * WIDTH[dtype] + sums * 4)


def graph_bytes(model: ModelConfig, stage: int, dtype: Dtype) -> int:
    """What is kept of one sequence of a whole stage: its layers, tables, ids, and what the tail ends with."""
    layers = model.layers[stage] * layer_bytes(model, stage, dtype)
    rotary = model.seq * model.head_dim * 4
    ends = 0
    if stage == model.stages - 1:  # x before and after the last norm's scale
        ends = model.seq * (2 * model.d * WIDTH[dtype] + 4)
    return layers + rotary + ends + 8 * (model.seq + 1)


def inputs_bytes(model: ModelConfig, stage: int) -> int:
    """What recomputation keeps of one sequence in flight: every layer's input in fp32, and the ids."""
    width = model.d if is_wide(model, stage) else model.k
    return model.layers[stage] * model.seq * width * 4 + 8 * (model.seq + 1)


def state_bytes(model: ModelConfig, stage: int, dtype: Dtype) -> int:
    """The token table's rows and the residual stream on its way, or its gradient."""
    width = model.d if is_wide(model, stage) else model.k
    return model.seq * (model.d * WIDTH[dtype] + 2 * width * 4)


def backward_bytes(model: ModelConfig, stage: int, dtype: Dtype) -> int:
    """The most that a layer's backward pass has beyond what it has freed by then.

    Either SwiGLU's: the gradient of the product, of both factors and one temporary, less the product; or
    that of a matrix, which exists once before it is added to the accumulator.
    """
    e, tokens, d, ffn = WIDTH[dtype], model.seq, model.d, model.ffn
    written = d if is_wide(model, stage) else model.k
    gate = 3 * tokens * ffn
    write = tokens * (ffn + written) + ffn * written
    read = ffn * d + tokens * d - tokens * ffn
    return e * max(gate, write, read)


def loss_bytes(model: ModelConfig, stage: int, dtype: Dtype) -> int:
    """The tail's loss: one chunk of logits with the temporaries of its soft-max, and the gradient of x."""
    if stage != model.stages - 1:
        return 0
    rows = min(model.seq, max(1, LOGITS // model.vocab))
    logits = rows * model.vocab
    low = 0
    if dtype == "bf16":
        low = 2 * logits + min(VOCAB_ROWS, model.vocab) * model.d * 2
    return 2 * 4 * logits + low + model.seq * model.d * WIDTH[dtype]
