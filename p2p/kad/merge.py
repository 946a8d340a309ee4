"""Several nodes' answers about one key, made into one: the newest record of each subkey, and its end.

Signatures say what an owner wrote; two things remain each keeper's word: that there is nothing newer, and
how long a record has left. The highest seq that anybody shows wins, so that one honest keeper is enough to
hear of the newest. An end that lies behind the signed one needs two keepers that say so (the second
latest claim counts), or the owner's own answer: a keeper that answers with what is over is believed by
nobody, yet an owner whose clock is slow loses nothing. No keeper shortens a life: the latest claim up to
the signed end counts.

Limits: those of the answers; nothing is kept beyond one look-up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import attrs

from p2p.identity import PeerId
from p2p.kad.record import Record


@attrs.define
class _Claims:
    record: Record
    trusted: float
    """The latest end that needs no witness: the owner's word, our own copy's, or up to the signed one."""
    latest: float = 0.0
    second: float = 0.0

    def end(self) -> float:
        return max(self.trusted, self.second)


@final
class Merge:
    """One look-up's answers; ``own`` are the records that we keep ourselves."""

    def __init__(self, own: Iterable[Record] = ()) -> None:
        self._claims: dict[str, _Claims] = {}
        for record in own:
            self._claims[record.subkey] = _Claims(record, record.expires)

    def heard(self, peer: PeerId, records: Iterable[Record]) -> None:
        """What ``peer`` keeps of the key; each record with the end it claims. At most one answer a peer."""
        for record in records:
            alone = record.expires if peer == record.owner else min(record.expires, record.owner_expires)
            known = self._claims.get(record.subkey)
            if known is None or record.seq > known.record.seq:
                known = self._claims[record.subkey] = _Claims(record, alone)
            elif record.wire != known.record.wire:
                continue
            known.trusted = max(known.trusted, alone)
            if record.expires > known.latest:
                known.latest, known.second = record.expires, known.latest
            elif record.expires > known.second:
                known.second = record.expires

    def alive(self, now: float) -> dict[str, Record]:
        """The live records by subkey."""
        return {
            subkey: attrs.evolve(claims.record, expires=claims.end())
            for subkey, claims in self._claims.items()
            if claims.end() > now
        }
