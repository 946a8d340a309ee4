"""``limits.hours``: at which times of the day a node works, in this machine's local time.

Written like ``22:00-07:30``, several with commas; the end may lie behind midnight. Empty: always.
"""

from __future__ import annotations

import re
import time
from typing import Final

from p2p.errors import LocalError

_SPAN: Final = re.compile(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*")
DAY: Final = 24 * 60

Spans = tuple[tuple[int, int], ...]
"""Minutes of the day: from, to."""


def parse(text: str) -> Spans:
    """LocalError for what are no times."""
    return tuple(_span(part) for part in text.split(",")) if text.strip() else ()


def _span(part: str) -> tuple[int, int]:
    found = _SPAN.fullmatch(part)
    if found is not None:
        hours = int(found[1]), int(found[3])
        minutes = int(found[2]), int(found[4])
        begin, end = (hour * 60 + minute for hour, minute in zip(hours, minutes, strict=True))
        if max(minutes) < 60 and begin < DAY and end <= DAY and begin != end:
            return begin, end
    raise LocalError(f"limits.hours: {part.strip()!r} is not of the form 22:00-07:30")


def within(spans: Spans, minute: int) -> bool:
    """Whether a minute of the day is in one of them; always, where there are none."""
    return not spans or any(
        begin <= minute < end if begin < end else minute >= begin or minute < end for begin, end in spans
    )


def outside(text: str, now: float) -> str:
    """Why a node does not work at this unix time; empty if it does."""
    local = time.localtime(now)
    if within(parse(text), local.tm_hour * 60 + local.tm_min):
        return ""
    return f"outside its hours ({text})"
