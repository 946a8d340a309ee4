"""Memory that runs out, of the host and of the accelerator.

Host: below ``SHED`` of what there is, no new microbatches are taken, until ``CALM`` is free again. Below
``LAST`` at ``LOOKS`` looks in a row, a node that holds ``OURS`` of it or more ends in order (16), before
the kernel ends it without a word. One that holds less is not the cause and stays. Accelerator: below
``SHED_VRAM`` cached memory is given back and nothing new taken, once; an allocation that fails ends the
worker anyway (``exitcodes.hardware``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agorad.exitcodes import ExitCode
from agorad.supervision.reactions import Quiet, Reaction, Vitals

SHED: Final = 0.08
CALM: Final = 0.12
LAST: Final = 0.03
LOOKS: Final = 3
OURS: Final = 0.25
SHED_VRAM: Final = 0.02
CALM_VRAM: Final = 0.05
GIB: Final = 1 << 30


class HostMemory(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._short = False
        self._last = 0

    def look(self, now: Vitals) -> Iterable[Reaction]:
        if not now.memory_total:
            return
        share = now.memory_available / now.memory_total
        left = f"{now.memory_available / GIB:.1f} of {now.memory_total / GIB:.1f} GiB of memory are left"
        self._last = self._last + 1 if share < LAST else 0
        if self._last >= LOOKS and now.resident >= OURS * now.memory_total:
            yield Reaction(
                "memory",
                "end",
                f"{left}, and this node holds {now.resident / GIB:.1f}; give it more memory, or less to do: "
                "worker.slots, compute.optimizer, compute.graph",
                ExitCode.MEMORY,
            )
        elif not self._short and share < SHED:
            self._short = True
            yield Reaction("memory", "shed", f"{left}: no new microbatches until there is more")
        elif self._short and share > CALM:
            self._short = False
            yield Reaction("memory", "resume")


class AcceleratorMemory(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._short = False

    def look(self, now: Vitals) -> Iterable[Reaction]:
        if not now.vram_total:
            return
        share = now.vram_free / now.vram_total
        if not self._short and share < SHED_VRAM:
            self._short = True
            left = f"{now.vram_free / GIB:.2f} of {now.vram_total / GIB:.1f} GiB of the accelerator are left"
            yield Reaction("vram", "trim")
            yield Reaction(
                "vram", "warn", f"{left}; does something else use it? compute.memory_gib sets a limit"
            )
        elif self._short and share > CALM_VRAM:
            self._short = False
            yield Reaction("vram", "clear")
