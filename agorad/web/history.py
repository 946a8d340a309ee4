"""What a page shows of the past: curves, evaluations, rounds, who came and went. Pure; time is an argument.

Everything is bounded, however long the run lasts. A curve holds at most ``MOMENTS`` points: when it is full
every second one goes and from then on points are taken half as often, so that it always covers the whole run
as seen from here. It outlives a restart as a plain document (``to_document``, ``read``); a damaged one is an
empty one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs

MOMENTS: Final = 400
EVALUATIONS: Final = 200
ROUNDS: Final = 60
CHANGES: Final = 100
FIRST_GAP_S: Final = 2.0
NOW_S: Final = 30.0
"""What "now" means for throughput."""
FORMAT: Final = 1


@attrs.frozen
class Moment:
    """The run as it was at one time."""

    at: float
    step: int
    samples: int
    loss: float | None
    active: int
    """Replicas that take work."""


@attrs.frozen
class Round:
    """One averaging, as its members tell it."""

    stage: int
    number: int
    fraction: float
    members: int
    at: float


@attrs.frozen
class Change:
    """Somebody came, went, or is in another phase."""

    at: float
    what: str
    """``joined``, ``left``, ``vanished``, or the phase."""
    peer: str
    account: str
    stage: int


class History:
    """See the module's head."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.evaluations: list[tuple[int, float]] = []
        self.rounds: deque[Round] = deque(maxlen=ROUNDS)
        """The newest last."""
        self.changes: deque[Change] = deque(maxlen=CHANGES)
        """The newest last."""
        self._gap_s = FIRST_GAP_S
        self._recent: deque[Moment] = deque(maxlen=64)

    def note(self, moment: Moment) -> None:
        """The run as it is now."""
        last = self._recent[-1] if self._recent else None
        if last is not None and (moment.at <= last.at or moment.samples < last.samples):
            self._recent.clear()  # the clock was set, or the trainers' count could not be read for a while
        self._recent.append(moment)
        while len(self._recent) > 2 and moment.at - self._recent[1].at >= NOW_S:
            self._recent.popleft()
        if self.moments and 0 <= moment.at - self.moments[-1].at < self._gap_s:
            return
        self.moments.append(moment)
        if len(self.moments) >= MOMENTS:
            del self.moments[1::2]
            self._gap_s *= 2

    def note_evaluation(self, step: int, loss: float) -> None:
        """An evaluation, which may have been noted before."""
        if any(step <= known for known, _loss in self.evaluations[-1:]):
            return
        self.evaluations.append((step, loss))
        if len(self.evaluations) >= EVALUATIONS:
            del self.evaluations[1::2]

    def note_round(self, told: Round) -> None:
        """A round as one of its members tells it; the fullest account of each counts."""
        for place, known in enumerate(self.rounds):
            if (known.stage, known.number) == (told.stage, told.number):
                if (told.members, told.fraction) > (known.members, known.fraction):
                    self.rounds[place] = told
                return
        newest = max((known.number for known in self.rounds if known.stage == told.stage), default=-1)
        if told.number > newest or told.at > max((known.at for known in self.rounds), default=0.0):
            self.rounds.append(told)

    def note_change(self, change: Change) -> None:
        """Somebody came or went."""
        self.changes.append(change)

    def copy(self) -> History:
        """As it is now, for another thread."""
        other = History()
        other.moments, other.evaluations = self.moments.copy(), self.evaluations.copy()
        other.rounds, other.changes = self.rounds.copy(), self.changes.copy()
        other._gap_s, other._recent = self._gap_s, self._recent.copy()
        return other

    def samples_per_second(self) -> float:
        """Over the last ``NOW_S``."""
        return _rate(self._recent[0], self._recent[-1]) if len(self._recent) > 1 else 0.0

    def rates(self) -> list[tuple[float, float]]:
        """Unix time and samples a second, between the points of the curve."""
        return [
            (after.at, _rate(before, after))
            for before, after in zip(self.moments, self.moments[1:], strict=False)
            if after.samples >= before.samples and after.at > before.at
        ]

    def to_document(self, run: str) -> dict[str, Any]:
        """For ``read``."""
        return {
            "format": FORMAT,
            "run": run,
            "gap_s": self._gap_s,
            "moments": [list(attrs.astuple(moment)) for moment in self.moments],
            "evaluations": [list(pair) for pair in self.evaluations],
            "rounds": [list(attrs.astuple(one)) for one in self.rounds],
            "changes": [list(attrs.astuple(change)) for change in self.changes],
        }


def read(document: Any, run: str) -> History:
    """A kept history; an empty one if this is none, or of another run."""
    history = History()
    match document:
        case {
            "format": 1,
            "run": str(of),
            "gap_s": float(gap_s),
            "moments": list(moments),
            "evaluations": list(evaluations),
            "rounds": list(rounds),
            "changes": list(changes),
        } if of == run and FIRST_GAP_S <= gap_s < 1e9:
            history._gap_s = gap_s
            history.moments = [Moment(*row) for row in _rows(moments, "niifi", MOMENTS)]
            history.evaluations = [(row[0], row[1]) for row in _rows(evaluations, "in", EVALUATIONS)]
            history.rounds.extend(Round(*row) for row in _rows(rounds, "iinin", ROUNDS))
            history.changes.extend(Change(*row) for row in _rows(changes, "nsssi", CHANGES))
    return history


_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "n": (float, int),
    "i": (int,),
    "s": (str,),
    "f": (float, int, type(None)),
}


def _rows(rows: Sequence[Any], kinds: str, most: int) -> Iterable[list[Any]]:
    """Those that are what they should be, the last ``most``."""
    for row in rows[-most:]:
        if isinstance(row, list) and len(row) == len(kinds):
            pairs = list(zip(row, kinds, strict=True))
            typed = all(type(value) in _KINDS[kind] for value, kind in pairs)
            if typed and all(not isinstance(value, float) or math.isfinite(value) for value, _ in pairs):
                yield row


def _rate(before: Moment, after: Moment) -> float:
    seconds = after.at - before.at
    return max(0, after.samples - before.samples) / seconds if seconds > 0 else 0.0
