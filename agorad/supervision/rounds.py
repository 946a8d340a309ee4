"""Averaging rounds that fail because of this node.

Most failed rounds say nothing about who failed. Two do: the others finished with parts that did not reach
this member, and every other of at least two members was lost to it. After ``MANY`` of these in a row all
connections are made anew; after another ``MANY`` the node ends (13), as one whose line does not carry
rounds. A round that finishes forgives all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from agorad.exitcodes import ExitCode
from agorad.supervision.reactions import Quiet, Reaction
from p2p.averaging.outcome import EVERYBODY_LOST, PARTS_MISSED

MANY: Final = 3


class Rounds(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._members: dict[int, int] = {}
        self._ours = 0

    def heard(self, event: Mapping[str, Any], at: float) -> Iterable[Reaction]:
        match event["event"]:
            case "roster_committed":
                self._members = {event["round"]: len(event["members"])}
            case "round_finished" | "gradients_averaged":
                if self._ours >= MANY:
                    yield Reaction("rounds", "clear")
                self._ours = 0
            case "round_abandoned":
                alone = event["why"] == EVERYBODY_LOST and self._members.get(event["round"], 0) > 2
                if not alone and event["why"] != PARTS_MISSED:
                    return
                self._ours += 1
                why = f"{self._ours} averaging rounds in a row failed here alone ({event['why']})"
                if self._ours == MANY:
                    yield Reaction("rounds", "reconnect", f"{why}; connections are made anew")
                elif self._ours >= 2 * MANY:
                    yield Reaction(
                        "rounds", "end", f"{why}; look at the line, then start again", ExitCode.NETWORK
                    )
