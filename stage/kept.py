"""Answers that a replica keeps for whoever lost its caller or its answer, and when they may be used again.

An answer belongs to the ``c`` that it was computed for. For the same ``c`` it is given as often as it is
asked for; for another one (a replacement's weights differ) once, marked stale. Bounded by number and by bytes
of gradients; the oldest goes first. Sans-IO and torch-free.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import attrs

from stage.messages import Answer
from stage.ticket import Ticket

MAX_ANSWERS = 512
MAX_ANSWER_BYTES = 64 << 20


@attrs.define
class Kept:
    """An answer; of one that is given again, ``answer.stale`` may be set."""

    answer: Answer
    """Its path begins with this replica; whoever gets the answer has its own path before it.

    Its receipts are those of later stages; this replica's own is signed for whoever gets the answer.
    """
    dc: Any
    ids_hash: bytes
    reused: bool = False
    """Given for another ``c`` than its own."""


class KeptAnswers:
    """By ticket, the latest of each."""

    def __init__(self, dc_bytes: int) -> None:
        """``dc_bytes``: of the gradient in each."""
        self.most = max(1, min(MAX_ANSWERS, MAX_ANSWER_BYTES // max(1, dc_bytes)))
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __contains__(self, ticket_id: str) -> bool:
        return ticket_id in self._kept

    def add(self, ticket_id: str, kept: Kept) -> None:
        self._kept[ticket_id] = kept
        self._kept.move_to_end(ticket_id)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)

    def reuse(self, ticket: Ticket, c_hash: bytes) -> Kept | None:
        """The answer to give for this ``c``; None where the work has to be done."""
        kept = self._kept.get(ticket.id)
        if kept is None or kept.ids_hash != ticket.ids_hash:
            return None  # a trainer that began anew, with other data
        if kept.answer.c_hash == c_hash:
            return kept
        if kept.reused:
            return None
        kept.reused = True
        return attrs.evolve(kept, answer=attrs.evolve(kept.answer, stale=True))
