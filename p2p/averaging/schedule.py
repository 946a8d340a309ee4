"""When a round gives up on whom: its marks, and how far it has come. Sans-IO.

The marks are fractions of the round's duration, each a last resort: losing a link is noticed by the
connection itself within 2 s and resolves everything that waited for it at once. A process that stood still
did not hear what was said meanwhile: it divides what is left of the round anew (``stood_still``).
"""

from __future__ import annotations

from typing import Final, final

RAW_BY: Final = 0.4
"""Fraction of the round after which silent senders are dropped from the parts they have not sent."""
ACK_BY: Final = 0.48
"""After which a silent deputy is not waited for."""
TAKE_BY: Final = 0.5
"""After which a deputy takes over what it was not handed."""
TAKEN_BY: Final = 0.68
"""After which silent senders are dropped from parts that were taken over."""
MEANS_BY: Final = 0.76
"""After which parts that have not come are given up."""
REPORT_BY: Final = 0.82
"""After which the verdict is made from the reports at hand."""
BALLOT_EVERY: Final = 0.035
"""Between the turns of successive ballot owners where nobody is known to be lost; the last is at the end."""

_ROUNDING: Final = 1e-9
"""So that a timer set for ``wake_at`` finds its mark passed, whatever the last bit of the division."""


@final
class Schedule:
    """Of one member, which is number ``me`` of the round."""

    __slots__ = ("_began", "_marks", "_put_off", "_seconds", "passed", "turn")

    def __init__(self, now: float, seconds: float, me: int) -> None:
        self._began = now
        self._seconds = seconds
        self.passed = 0.0
        """How much of the round is over, a fraction of its duration."""
        self.turn = REPORT_BY + me * BALLOT_EVERY
        """When this member owns a ballot, whoever is known to be lost."""
        self._marks = (RAW_BY, ACK_BY, TAKE_BY, TAKEN_BY, MEANS_BY, REPORT_BY, self.turn)
        self._put_off = -1.0
        """Where the schedule stood when it was last put off."""

    def advance(self, now: float) -> float:
        """Time has come to ``now``; how much of the round is over."""
        passed = (now - self._began) / self._seconds if self._seconds > 0 else 1.0
        self.passed = max(self.passed, passed + _ROUNDING)
        return self.passed

    def stood_still(self, now: float) -> None:
        """This process was stopped until ``now``: nobody was silent, nobody was heard.

        The marks still ahead share what is left of the round; its end stays where it was agreed. Every mark
        is put off once, or a machine that stands still again and again would wait for the silent to the end.
        """
        left = self._began + self._seconds - now
        if left > 0 and self._put_off < self.passed < 1.0:
            self._put_off = self.passed
            self._seconds = left / (1.0 - self.passed)
            self._began = now - self.passed * self._seconds

    def wake_at(self) -> float:
        """When the next mark is reached."""
        due = [mark for mark in self._marks if mark > self.passed]
        return self._began + self._seconds * min([*due, 1.0])
