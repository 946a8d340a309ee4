"""How the daemon ends: the exit codes of ``agorad``, and which failure means which.

A role that must end for a reason of its own raises ``DaemonExit``; everything else that escapes is
mapped here. Units restart only on the codes in ``RETRYABLE``. Source: interfaces "agorad".
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Final

from p2p.errors import LocalError, Refused


class ExitCode(IntEnum):
    """Exit codes of ``agorad``; a contract with units and scripts."""

    CLEAN = 0
    BUG = 1
    USAGE = 2
    REQUIREMENTS = 10
    REFUSED = 11
    PORT = 12
    NETWORK = 13
    ACCELERATOR = 14
    NUMERICAL = 15
    MEMORY = 16
    REMOVED = 17
    DUPLICATE = 18


RETRYABLE: Final = frozenset({1, 13, 14, 15, 16})


class DaemonExit(Exception):  # noqa: N818, it is a decision, not an error
    """The daemon ends with ``code``; ``why`` is a sentence for people."""

    def __init__(self, code: ExitCode, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why


_HARDWARE: Final = {
    "builtins.MemoryError": (ExitCode.MEMORY, "out of memory"),
    "torch.OutOfMemoryError": (ExitCode.MEMORY, "out of memory on the accelerator"),
    "torch.AcceleratorError": (ExitCode.ACCELERATOR, "the accelerator failed"),
}
"""By class, since torch is not imported here."""
_HARDWARE_TEXTS: Final = {
    "DefaultCPUAllocator": (ExitCode.MEMORY, "out of memory"),
    "CUDA error": (ExitCode.ACCELERATOR, "the accelerator failed"),
    "CUDA kernel not launched": (ExitCode.ACCELERATOR, "the accelerator failed"),
}
"""What torch and our kernels say in a plain RuntimeError."""
_ADVICE: Final = {
    ExitCode.MEMORY: "; give it more, or less to do: worker.slots, compute.optimizer, compute.graph",
    ExitCode.ACCELERATOR: "; if that returns after a restart, look at the system's log",
}


def hardware(error: BaseException) -> DaemonExit | None:
    """How the daemon ends if this failure is one of the hardware: memory or accelerator; None otherwise."""
    found = None
    for kind in type(error).__mro__:
        found = found or _HARDWARE.get(f"{kind.__module__}.{kind.__qualname__}")
    if found is None and isinstance(error, RuntimeError):
        found = next((end for text, end in _HARDWARE_TEXTS.items() if text in str(error)), None)
    if found is None:
        return None
    code, why = found
    said = str(error).strip().partition("\n")[0][:200]
    return DaemonExit(code, f"{why}{': ' if said else ''}{said}{_ADVICE[code]}")


def verdict(error: BaseException) -> tuple[ExitCode, str | None]:
    """Exit code and sentence for what escaped; the sentence is None where only a traceback helps."""
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, DaemonExit):
            return leaf.code, leaf.why
    for leaf in leaves:
        if (end := hardware(leaf)) is not None:
            return end.code, end.why
    if all(isinstance(leaf, LocalError | Refused) for leaf in leaves):
        code = ExitCode.USAGE if isinstance(leaves[0], LocalError) else ExitCode.REFUSED
        return code, str(leaves[0])
    return ExitCode.BUG, None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


_WHAT_TO_DO: Final = {
    ExitCode.BUG: "start it again; if it returns, report it with the log",
    ExitCode.USAGE: "correct what is named and start it again",
    ExitCode.REQUIREMENTS: "this machine, its line or its clock has to meet what the run asks for",
    ExitCode.REFUSED: "read what the authority says; its operator can change it",
    ExitCode.PORT: "open or forward the port in router and firewall, or announce the outside one",
    ExitCode.NETWORK: "look at the line, then start it again; nothing is lost",
    ExitCode.ACCELERATOR: "look at nvidia-smi and the system's log, then start it again",
    ExitCode.NUMERICAL: "start it again; it fetches a sound state from the others",
    ExitCode.MEMORY: "give it more memory or less to do: --batch-size-override, compute.optimizer",
    ExitCode.REMOVED: "write to the run's operator",
    ExitCode.DUPLICATE: "stop the other node with this key, or give this one its own: --identity-path",
}


def advice(code: int) -> str:
    """What a person does about an exit code; empty for a clean end and for codes that are none of ours."""
    return _WHAT_TO_DO.get(ExitCode(code), "") if code in ExitCode._value2member_map_ else ""
