"""What one node keeps for the swarm: records by key and subkey, until they end.

Rules: the highest seq of an owner wins, an equal one is the same record again (welcome), a lower one
is old. Nothing that has ended is ever returned; ended records leave by a heap of times, whose entries
of records since replaced are skipped when they surface. A record that replaced one of longer life
leaves its seq behind until that one's end: the older one is signed and not over, and whoever kept a
copy could otherwise bring it back.

Limits, each with a typed refusal: ``MAX_SUBKEYS`` a key (``key_full``), ``MAX_PER_OWNER`` records of
one owner (``owner_full``), ``MAX_BYTES`` in all, counting ``OVERHEAD`` for each record
(``store_full``). A record that replaces one of its owner's own place never meets the first two; a seq that
was left behind counts as a record of no bytes.
"""

from __future__ import annotations

import heapq
from typing import Final, final

import attrs

from p2p.errors import Refused
from p2p.identity import PeerId
from p2p.kad.record import Record

MAX_SUBKEYS: Final = 1024
MAX_PER_OWNER: Final = 256
MAX_BYTES: Final = 64 << 20
OVERHEAD: Final = 1024
"""Bytes that a record costs beyond its own: decoded value, three index entries, objects."""


@attrs.define
class _Place:
    """What one subkey of one key holds: a record, or the seq of one that ended before its elders."""

    owner: PeerId
    seq: int
    record: Record | None
    until: float
    """When nothing signed for this place up to ``seq`` can be alive any more."""

    @property
    def bytes(self) -> int:
        return OVERHEAD + (0 if self.record is None else len(self.record.wire))


@final
class Store:
    """See the file's opening."""

    def __init__(
        self,
        *,
        max_subkeys: int = MAX_SUBKEYS,
        max_per_owner: int = MAX_PER_OWNER,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._keys: dict[str, dict[str, _Place]] = {}
        self._owners: dict[PeerId, int] = {}
        self._ends: list[tuple[float, int, str, str]] = []
        self._pushes = 0
        self._places = 0
        self._live = 0
        self._bytes = 0
        self._max_subkeys = max_subkeys
        self._max_per_owner = max_per_owner
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return self._live

    @property
    def bytes(self) -> int:
        """Memory accounted for, overhead included."""
        return self._bytes

    @property
    def keys(self) -> list[str]:
        """Every key of which something is kept; a copy."""
        return list(self._keys)

    def put(self, record: Record, now: float) -> bool:
        """Keep a verified record. False if it is the one we have; ``Refused`` if it may not stay."""
        self.expire(now)
        if record.expires <= now:
            raise Refused("expired", f"the record ended {now - record.expires:.1f} s ago")
        kept = self._keys.get(record.key, {})
        before = kept.get(record.subkey)
        # Two owners can meet in one place only under "", in a key that names both: first come.
        if before is not None and before.owner != record.owner:
            raise Refused("not_owner", f"{record.key!r} belongs to {before.owner} until it expires")
        if before is not None and record.seq <= before.seq:
            if before.record is not None and record.wire == before.record.wire:
                return False
            raise Refused("old", f"seq {record.seq} is not newer than {before.seq}")
        until = max(record.expires, record.owner_expires, before.until if before else 0.0)
        place = _Place(record.owner, record.seq, record, until)
        grown = self._bytes + place.bytes - (before.bytes if before else 0)
        if before is None and len(kept) >= self._max_subkeys:
            raise Refused("key_full", f"{record.key!r} has {len(kept)} subkeys already", 10.0)
        if before is None and self._owners.get(record.owner, 0) >= self._max_per_owner:
            raise Refused("owner_full", f"{self._max_per_owner} records of this owner are kept already", 10.0)
        if grown > self._max_bytes:
            raise Refused("store_full", f"this node keeps {self._max_bytes >> 20} MiB already", 10.0)
        if before is None:
            self._owners[record.owner] = self._owners.get(record.owner, 0) + 1
            self._places += 1
        if before is None or before.record is None:
            self._live += 1
        self._keys.setdefault(record.key, {})[record.subkey] = place
        self._bytes = grown
        self._remind(record.expires, record.key, record.subkey)
        return True

    def get(self, key: str, now: float) -> dict[str, Record]:
        """The live records of a key by subkey; a copy."""
        self.expire(now)
        places = self._keys.get(key, {})
        return {subkey: place.record for subkey, place in places.items() if place.record is not None}

    def page(self, key: str, after: str | None, budget: int, now: float) -> tuple[list[Record], bool]:
        """Live records in order of subkey behind ``after``, up to ``budget`` bytes; whether more follow."""
        kept = self.get(key, now)
        rest = sorted(subkey for subkey in kept if after is None or subkey > after)
        taken: list[Record] = []
        for subkey in rest:
            budget -= len(kept[subkey].wire) + 16
            if budget < 0 and taken:
                break
            taken.append(kept[subkey])
        return taken, len(taken) < len(rest)

    def expire(self, now: float) -> None:
        """Drop what has ended."""
        while self._ends and self._ends[0][0] <= now:
            _, _, key, subkey = heapq.heappop(self._ends)
            place = self._keys.get(key, {}).get(subkey)
            if place is None:
                continue
            if place.until <= now:
                self._drop(place, key, subkey)
            elif place.record is not None and place.record.expires <= now:
                self._bytes -= len(place.record.wire)
                self._live -= 1
                place.record = None
                self._remind(place.until, key, subkey)

    def _remind(self, at: float, key: str, subkey: str) -> None:
        self._pushes += 1
        heapq.heappush(self._ends, (at, self._pushes, key, subkey))
        if len(self._ends) > 64 + 4 * self._places:
            self._rebuild_heap()

    def _drop(self, place: _Place, key: str, subkey: str) -> None:
        kept = self._keys[key]
        del kept[subkey]
        if not kept:
            del self._keys[key]
        left = self._owners[place.owner] - 1
        if left:
            self._owners[place.owner] = left
        else:
            del self._owners[place.owner]
        self._places -= 1
        self._live -= place.record is not None
        self._bytes -= place.bytes

    def _rebuild_heap(self) -> None:
        """Entries of replaced records would otherwise pile up for as long as those had to live."""
        self._ends = []
        for key, kept in self._keys.items():
            for subkey, place in kept.items():
                end = place.until if place.record is None else place.record.expires
                self._ends.append((end, len(self._ends) - self._places, key, subkey))
        heapq.heapify(self._ends)
