"""What a node that does not answer did last, from its event file: events are data, so this reads no log.

The end of the file is read, ``TAIL`` bytes at most. Everything in it may be missing: a node that never ran
has no file, one that was killed has no last word.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Final

import attrs

from agorad.exitcodes import advice
from agorad.words import duration

TAIL: Final = 256 << 10


@attrs.frozen(kw_only=True)
class LastSeen:
    """None where the file does not say."""

    at: float | None = None
    """Unix time of its last event."""
    started_at: float | None = None
    phase: str | None = None
    stage: int | None = None
    step: int | None = None
    code: int | None = None
    """Its exit code, if it ended by itself."""
    why: str = ""

    def sentence(self) -> str:
        """For people: when and how it ended, and what it did."""
        if self.at is None:
            return "it has never run here"
        ago = f"{duration(max(0.0, time.time() - self.at))} ago"
        if self.code is None:
            said = f"its last word was {ago}, without a goodbye: killed, or the machine went down"
        elif self.code == 0:
            said = f"it ended cleanly {ago}"
        else:
            said = f"it ended {ago} with code {self.code}: {self.why}"
        did = [f"{word} {value}" for word, value in (("stage", self.stage), ("step", self.step)) if value]
        return said + (f"; it was {self.phase}" if self.phase else "") + "".join(f", {word}" for word in did)

    def remedy(self, again: str) -> str:
        """What to do to have it back; ``again`` says how it is started."""
        return f"{advice(self.code)}; then {again}" if self.code else again


def last_seen(events: Path) -> LastSeen:
    """From ``events.jsonl``; an empty ``LastSeen`` if it cannot be read."""
    found: dict[str, Any] = {}
    for entry in tail(events):
        kind, found["at"] = entry.get("event"), entry.get("at")
        if kind == "started":
            found = {"at": entry.get("at"), "started_at": entry.get("at")}
        elif kind == "phase":
            found["phase"] = entry.get("to")
        elif kind in ("step", "resumed"):
            found["step"] = entry.get("step")
            found["stage"] = entry.get("stage", found.get("stage"))
        elif kind == "stopped":
            found["code"], found["why"] = entry.get("code"), str(entry.get("why", ""))
    return LastSeen(**found)


def tail(events: Path, size: int = TAIL) -> list[dict[str, Any]]:
    """The last events of a file, oldest first; damaged lines are left out."""
    try:
        with events.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read(size).split(b"\n")[1 if end > size else 0 :]
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries
