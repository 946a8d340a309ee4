"""How one worker computes: the ``[compute]`` section of a node's own settings. Torch-free.

Nothing here is seen by other nodes: whatever a worker chooses, the microbatches, slices and snapshots that it
exchanges have the same form. What each mode costs is in docs/worker.md.
"""

from __future__ import annotations

from typing import Literal

import attrs

from p2p.errors import LocalError

ComputeDtype = Literal["auto", "fp32", "bf16"]
OptimizerKind = Literal["device", "8bit", "host"]
GraphMode = Literal["auto", "retain", "recompute"]
CompileMode = Literal["auto", "on", "off"]


@attrs.frozen(kw_only=True)
class ComputeSettings:
    """``[compute]``: precision and memory of a worker."""

    dtype: ComputeDtype = "auto"
    """Of matrices and activations; masters, sums and moments are fp32. auto: bf16 on a GPU that has it."""
    optimizer: OptimizerKind = "device"
    """Where AdamW's state lies: fp32 on the device, 8-bit codes on the device, or in host memory."""
    graph: GraphMode = "auto"
    """Whether a microbatch's graph waits for its gradient or is made again. auto: as many as fit wait."""
    compile: CompileMode = "auto"
    """Whether layers go through torch.compile. auto: on a GPU."""
    memory_gib: float | None = None
    """What this worker may use; all of a GPU's memory, half of the host's, where it is not set."""

    def __attrs_post_init__(self) -> None:
        if self.memory_gib is not None and not 0.0 < self.memory_gib <= 65536.0:
            raise LocalError(f"compute.memory_gib = {self.memory_gib} must be above 0 and at most 65536")
