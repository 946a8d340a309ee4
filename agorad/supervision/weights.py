"""Weights that are not finite, and what is no sign of them.

``bad_output`` and a snapshot that is not finite are reasons to examine the weights at once;
``bad_gradient`` is one after ``BAD`` in a row: gradients come from others, who can make them as large as
they like. Weights that are finite are not touched, whoever says otherwise: a neighbour's numbers must not
make this node throw its state away. Weights that are not: the state of a mate is fetched; where there is
none, or where it happens again within ``AGAIN_S``, the node ends (15), and its next life begins with its
own last sound snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from agorad.exitcodes import ExitCode
from agorad.supervision.reactions import Quiet, Reaction

BAD: Final = 3
EXAMINE_S: Final = 5.0
"""Least time between two examinations, each a pass over the weights."""
AGAIN_S: Final = 1800.0


class Weights(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._bad = 0
        self._examined = -math.inf
        self._resynced = -math.inf

    def heard(self, event: Mapping[str, Any], at: float) -> Iterable[Reaction]:
        match event["event"]:
            case "bad_output":
                yield from self._examine(at)
            case "save_failed" if "not finite" in event["why"]:
                yield from self._examine(at)
            case "bad_gradient":
                self._bad += 1
                if self._bad >= BAD:
                    yield from self._examine(at)
            case "step" if event["samples"]:
                self._bad = 0
                yield Reaction("gradients", "clear")
            case "state_fetched":
                yield Reaction("weights", "clear")

    def _examine(self, at: float) -> Iterable[Reaction]:
        if at - self._examined >= EXAMINE_S:
            self._examined = at
            yield Reaction("weights", "examine")

    def examined(self, finite: bool, at: float) -> Iterable[Reaction]:
        """What an examination found."""
        if finite:
            if self._bad >= BAD:
                yield Reaction(
                    "gradients",
                    "warn",
                    f"{self._bad} gradients in a row were not finite and were thrown away; the weights are "
                    "sound, so they come from another stage",
                )
                self._bad = 0
            return
        self._bad = 0
        if at - self._resynced < AGAIN_S:
            yield self.end(f"again, {at - self._resynced:.0f} s after the last time")
        else:
            self._resynced = at
            yield Reaction("weights", "resync", "the weights are no numbers to go on with")

    def end(self, why: str) -> Reaction:
        """No state to go on with."""
        return Reaction(
            "weights",
            "end",
            f"the weights are no numbers to go on with ({why}); start it again: it goes on from its last "
            "sound snapshot and others' state. If that returns, look at the machine's memory and clocks",
            ExitCode.NUMERICAL,
        )
