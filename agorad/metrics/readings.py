"""What a role can say of itself at any moment; the sampler asks. Torch-free.

None and empty mean that the role has no such thing, and then there is no such series.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class Readings:
    """One look at a role. Totals count since the process began."""

    in_progress: int | None = None
    """Microbatches being worked on."""
    slots: int | None = None
    slots_free: int | None = None
    compute_s: Mapping[str, float] = attrs.field(factory=dict)
    """Seconds that the device spent, by job."""
    jobs: Mapping[str, int] = attrs.field(factory=dict)
    """Jobs that the device did, by job."""
    microbatch_flops: int = 0
    """What one microbatch of training costs here, by the manifest's model."""
    peak_flops: float | None = None
    """What the device does a second at most, where that is known."""
    gradient_norm: float | None = None
    """Of the last update's mean gradient, before clipping."""
    learning_rate: float | None = None
    vram: Mapping[str, int] = attrs.field(factory=dict)
    """Bytes of the accelerator's memory: total, free, allocated, reserved."""
    samples: int | None = None
    """Samples that the run's trainers have counted."""
    tokens_a_sample: int = 0
    waiting: int | None = None
    """Joiners in an authority's queue."""
