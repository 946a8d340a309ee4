"""A disk that is full or cannot be written, and descriptors that run out.

Training goes on without a disk: snapshots are skipped, events are counted as unwritten. What can be spared
(old logs and events, the older of two snapshots) is removed, once a trouble. Where no room is left for the
next snapshot the warning comes before the trouble does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from agorad.supervision.reactions import Quiet, Reaction, Vitals

SPARE: Final = 64 << 20
"""Room that a node wants beside its next snapshot."""
MOST_DESCRIPTORS: Final = 0.9
FEW_DESCRIPTORS: Final = 0.7
MB: Final = 1_000_000


class Disk(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._low = False
        self._failed = False
        self._unwritten = 0

    def heard(self, event: Mapping[str, Any], at: float) -> Iterable[Reaction]:
        if event["event"] == "save_failed":
            first, self._failed = not self._failed, True
            if first:
                yield Reaction("disk", "make_room")
            yield Reaction("disk", "warn", f"{event['why']}; training goes on, but a restart would lose it")
        elif event["event"] == "saved" and self._failed:
            self._failed = False
            yield Reaction("disk", "clear")

    def look(self, now: Vitals) -> Iterable[Reaction]:
        if now.unwritten > self._unwritten:
            lost, self._unwritten = now.unwritten - self._unwritten, now.unwritten
            yield Reaction("events", "warn", f"{lost} events could not be written: is the disk full?")
        elif now.unwritten:
            yield Reaction("events", "clear")
        if now.disk_free is None:
            return
        wanted = now.snapshot_bytes + SPARE
        if not self._low and now.disk_free < wanted:
            self._low = True
            yield Reaction("disk_low", "make_room")
            yield Reaction(
                "disk_low",
                "warn",
                f"{now.disk_free / MB:.0f} MB are free on the state folder's disk, {wanted / MB:.0f} are "
                "wanted for the next snapshot: make room",
            )
        elif self._low and now.disk_free > wanted + SPARE:
            self._low = False
            yield Reaction("disk_low", "clear")


class Descriptors(Quiet):
    """Open files and connections against what the system allows this process."""

    def __init__(self) -> None:
        self._many = False

    def look(self, now: Vitals) -> Iterable[Reaction]:
        if not now.descriptors_most:
            return
        share = now.descriptors / now.descriptors_most
        if not self._many and share > MOST_DESCRIPTORS:
            self._many = True
            yield Reaction(
                "descriptors",
                "warn",
                f"{now.descriptors} of {now.descriptors_most} file descriptors are in use, so new "
                "connections may fail: raise the limit (LimitNOFILE= of the service, or ulimit -n)",
            )
        elif self._many and share < FEW_DESCRIPTORS:
            self._many = False
            yield Reaction("descriptors", "clear")
