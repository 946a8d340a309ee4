"""Adam's two moments of every weight: in fp32, or in blocks of 8-bit codes.

Both kinds are seen through the same window: ``open`` gives fp32 tensors for a range of floats, AdamW changes
them, ``close`` keeps them. ``read`` and ``write`` are for snapshots, which are fp32 whatever the kind.

8-bit codes (2 + 8/256 bytes a parameter). A block of 256 weights shares one fp32 scale a moment, its largest
magnitude, which is kept exactly. Codes are not linear, because what counts is the ratio m / sqrt(v):

    m   127 levels each way, (q/127)² of the scale: fine near zero, 1.6 % apart at the top
    v   255 levels, 2^((q-255)·32/254) of the scale: 9 % apart over 32 octaves; 0 only for v = 0

So v is never rounded to zero beside an m that is not (the blow-up of linear codes), and never below the
smallest level. v moves by a few percent an update, less than a level, and rounding to nearest would hold it
fast for ever: an update rounds its logarithm up or down at random, in proportion. Reading codes back from
their own fp32 values (a snapshot) rounds to nearest and gives the same codes: nothing is lost by a restart.

Sources: block-wise 8-bit states, arXiv 2110.02861; the zero point of v, arXiv 2309.01507. The code maps here
are our own, chosen to need no table.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stage.weights import CHUNK

Moment = Literal["exp_avg", "exp_avg_sq"]

GROUP = 256
"""Weights that share a scale."""
WINDOW = 1 << 20
"""Floats that are open at a time where opening takes room: two buffers of 4 MiB and a few temporaries."""
_LEVELS = 127
_OCTAVES = 32
_STEPS = 254


class FullMoments:
    """fp32, on the device of the masters."""

    window = CHUNK

    def __init__(self, flat: Tensor) -> None:
        self.exp_avg = _zeros_like(flat)
        self.exp_avg_sq = _zeros_like(flat)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.exp_avg.nbytes + self.exp_avg_sq.nbytes

    def open(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Both moments of a range, to be changed in place."""
        return self.exp_avg[start:stop], self.exp_avg_sq[start:stop]

    def close(self, start: int, stop: int) -> None:
        """Keep what was changed."""

    def read(self, moment: Moment, start: int, stop: int) -> Tensor:
        """One moment of a range, fp32."""
        vector = self.exp_avg if moment == "exp_avg" else self.exp_avg_sq
        return vector[start:stop]

    def write(self, moment: Moment, start: int, values: Tensor) -> None:
        """Set one moment from ``start`` on."""
        self.read(moment, start, start + values.numel()).copy_(values)

    def copy(self) -> FullMoments:
        """The same moments in memory of their own."""
        other = FullMoments.__new__(FullMoments)
        other.exp_avg = _zeros_like(self.exp_avg).copy_(self.exp_avg)
        other.exp_avg_sq = _zeros_like(self.exp_avg_sq).copy_(self.exp_avg_sq)
        return other


class Moments8:
    """8-bit codes; ranges start and end on whole groups. See the head of this file."""

    window = WINDOW

    def __init__(self, flat: Tensor, seed: int = 0) -> None:
        size, device = flat.numel(), flat.device
        self._m = torch.zeros(size, dtype=torch.int8, device=device)
        self._v = torch.zeros(size, dtype=torch.uint8, device=device)
        self._m_scale = torch.zeros(size // GROUP, dtype=torch.float32, device=device)
        self._v_scale = torch.zeros(size // GROUP, dtype=torch.float32, device=device)
        room = min(size, WINDOW)
        self._open = [torch.empty(room, dtype=torch.float32, device=device) for _ in range(2)]
        self._random = torch.Generator(device).manual_seed(seed)

    @property
    def nbytes(self) -> int:
        """Bytes in all, without the windows."""
        return sum(part.nbytes for part in (self._m, self._v, self._m_scale, self._v_scale))

    @property
    def staging_bytes(self) -> int:
        """Bytes of the windows."""
        return sum(buffer.nbytes for buffer in self._open)

    def open(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Both moments of a range of at most WINDOW floats, valid until the next ``open``."""
        m, v = (buffer[: stop - start] for buffer in self._open)
        return self._decode_m(start, stop, m), self._decode_v(start, stop, v)

    def close(self, start: int, stop: int) -> None:
        """Keep what was changed in the open range."""
        m, v = (buffer[: stop - start] for buffer in self._open)
        self._encode_m(start, m)
        self._encode_v(start, v, torch.rand(v.shape, generator=self._random, device=v.device))

    def read(self, moment: Moment, start: int, stop: int) -> Tensor:
        """One moment of a range, fp32, in memory of its own: may be called from a reader's thread."""
        out = torch.empty(stop - start, dtype=torch.float32, device=self._m.device)
        return (self._decode_m if moment == "exp_avg" else self._decode_v)(start, stop, out)

    def write(self, moment: Moment, start: int, values: Tensor) -> None:
        """Set one moment from ``start`` on, rounded to nearest."""
        for at in range(0, values.numel(), WINDOW):
            part = values[at : at + WINDOW].to(self._m.device, torch.float32)
            if moment == "exp_avg":
                self._encode_m(start + at, part)
            else:
                self._encode_v(start + at, part, None)

    def copy(self) -> Moments8:
        """The same moments in memory of their own; the windows, which hold nothing now, are shared."""
        other = Moments8.__new__(Moments8)
        other._open, other._random = self._open, self._random
        other._m, other._v = self._m.clone(), self._v.clone()
        other._m_scale, other._v_scale = self._m_scale.clone(), self._v_scale.clone()
        return other

    def _decode_m(self, start: int, stop: int, out: Tensor) -> Tensor:
        out.copy_(self._m[start:stop]).div_(_LEVELS)
        out.mul_(out.abs()).view(-1, GROUP).mul_(self._scales(self._m_scale, start, stop))
        return out

    def _decode_v(self, start: int, stop: int, out: Tensor) -> Tensor:
        codes = self._v[start:stop]
        out.copy_(codes).sub_(255).mul_(_OCTAVES / _STEPS).exp2_()
        out.view(-1, GROUP).mul_(self._scales(self._v_scale, start, stop))
        return out.mul_(codes != 0)

    def _encode_m(self, start: int, m: Tensor) -> None:
        grouped = m.view(-1, GROUP)
        scale = grouped.abs().amax(1, keepdim=True)
        self._scales(self._m_scale, start, start + m.numel()).copy_(scale)
        root = grouped.abs().div_(scale).nan_to_num_(0.0).sqrt_().mul_(_LEVELS).round_()
        self._m[start : start + m.numel()].copy_(root.copysign_(grouped).view(-1))

    def _encode_v(self, start: int, v: Tensor, noise: Tensor | None) -> None:
        """``noise`` uniform in [0, 1) rounds at random in proportion; without it, to nearest."""
        grouped = v.view(-1, GROUP)
        scale = grouped.amax(1, keepdim=True)
        self._scales(self._v_scale, start, start + v.numel()).copy_(scale)
        level = (grouped / scale).log2_().mul_(_STEPS / _OCTAVES).add_(255).view(-1)
        level.add_(0.5 if noise is None else noise).floor_().clamp_(1, 255)
        self._v[start : start + v.numel()].copy_(level.nan_to_num_(0.0).mul_(v > 0))

    @staticmethod
    def _scales(scales: Tensor, start: int, stop: int) -> Tensor:
        return scales[start // GROUP : stop // GROUP, None]


def _zeros_like(flat: Tensor) -> Tensor:
    """``torch.zeros_like`` would forget that host memory was pinned."""
    return torch.zeros(flat.numel(), dtype=flat.dtype, device=flat.device, pin_memory=flat.is_pinned())
