"""The words between rules and whoever carries out what they say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import attrs

from agorad.exitcodes import ExitCode

Do = Literal[
    "warn", "clear", "shed", "resume", "resync", "reconnect", "make_room", "trim", "examine", "end", "end_now"
]
"""What to do.

``warn`` shows the trouble, ``clear`` ends it; ``shed`` takes no new microbatches until ``resume``; ``resync``
fetches the state of a mate; ``reconnect`` closes all connections, to be made anew; ``make_room`` removes what
the disk can do without; ``trim`` gives cached memory of the accelerator back; ``examine`` looks whether the
weights are finite; ``end`` leaves in order with ``code``, ``end_now`` does so where the process may hang.
"""


@attrs.frozen
class Reaction:
    """One thing to do, and why: a sentence for people."""

    kind: str
    """Of the trouble; a warning of the same kind replaces the one before."""
    do: Do
    why: str = ""
    code: ExitCode | None = None


@attrs.frozen(kw_only=True)
class Vitals:
    """What was seen at one look. Bytes; 0 or None where nobody can tell."""

    at: float
    """Seconds that pass while a machine is suspended too."""
    wall: float
    """Unix time by the system's clock."""
    ours: float
    """Unix time by this node's clock."""
    memory_total: int = 0
    memory_available: int = 0
    resident: int = 0
    vram_total: int = 0
    vram_free: int = 0
    disk_free: int | None = None
    snapshot_bytes: int = 0
    """Size of the last snapshot."""
    unwritten: int = 0
    """Events that the disk did not take so far."""
    descriptors: int = 0
    descriptors_most: int = 0
    connections: int = 0
    job_s: float | None = None
    """How long the device has been at its present job; None while it has none."""
    phase: str = ""
    step: int = 0
    added: int = 0
    """Microbatches added so far."""


class Rule(Protocol):
    """One kind of trouble."""

    def heard(self, event: Mapping[str, Any], at: float) -> Iterable[Reaction]:
        """An event happened."""

    def look(self, now: Vitals) -> Iterable[Reaction]:
        """A regular look."""


class Quiet:
    """A rule that says nothing; to be inherited."""

    def heard(self, event: Mapping[str, Any], at: float) -> Iterable[Reaction]:
        """Nothing to say about events."""
        return ()

    def look(self, now: Vitals) -> Iterable[Reaction]:
        """Nothing to say about looks."""
        return ()
