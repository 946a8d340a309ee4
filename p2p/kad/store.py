"""What one node keeps for the swarm: records by key and subkey, until they end.

Rules: the highest seq of an owner wins, an equal one is the same record again (welcome), a lower one
is old. Nothing that has ended is ever returned; ended records leave by a heap of expiries, whose
entries of records since replaced are skipped when they surface.

Limits, each with a typed refusal: ``MAX_SUBKEYS`` a key (``key_full``), ``MAX_PER_OWNER`` records of
one owner (``owner_full``), ``MAX_BYTES`` in all, counting ``OVERHEAD`` for each record
(``store_full``). A record that replaces one of its owner's own place never meets the first two.
"""

from __future__ import annotations

import heapq
from typing import Final, final

from p2p.errors import Refused
from p2p.identity import PeerId
from p2p.kad.record import Record

MAX_SUBKEYS: Final = 1024
MAX_PER_OWNER: Final = 256
MAX_BYTES: Final = 64 << 20
OVERHEAD: Final = 1024
"""Bytes that a record costs beyond its own: decoded value, three index entries, objects."""


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
        self._keys: dict[str, dict[str, Record]] = {}
        self._owners: dict[PeerId, int] = {}
        self._ends: list[tuple[float, int, str, str]] = []
        self._pushes = 0
        self._count = 0
        self._bytes = 0
        self._max_subkeys = max_subkeys
        self._max_per_owner = max_per_owner
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """Memory accounted for, overhead included."""
        return self._bytes

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
            if record.wire == before.wire:
                return False
            raise Refused("old", f"seq {record.seq} is not newer than {before.seq}")
        grown = self._bytes + _cost(record) - (_cost(before) if before else 0)
        if before is None and len(kept) >= self._max_subkeys:
            raise Refused("key_full", f"{record.key!r} has {len(kept)} subkeys already", 10.0)
        if before is None and self._owners.get(record.owner, 0) >= self._max_per_owner:
            raise Refused("owner_full", f"{self._max_per_owner} records of this owner are kept already", 10.0)
        if grown > self._max_bytes:
            raise Refused("store_full", f"this node keeps {self._max_bytes >> 20} MiB already", 10.0)
        if before is None:
            self._owners[record.owner] = self._owners.get(record.owner, 0) + 1
            self._count += 1
        self._keys.setdefault(record.key, {})[record.subkey] = record
        self._bytes = grown
        self._pushes += 1
        heapq.heappush(self._ends, (record.expires, self._pushes, record.key, record.subkey))
        if len(self._ends) > 64 + 4 * self._count:
            self._rebuild_heap()
        return True

    def get(self, key: str, now: float) -> dict[str, Record]:
        """The live records of a key by subkey; a copy."""
        self.expire(now)
        return dict(self._keys.get(key, {}))

    def page(self, key: str, after: str | None, budget: int, now: float) -> tuple[list[Record], bool]:
        """Live records in order of subkey behind ``after``, up to ``budget`` bytes; whether more follow."""
        self.expire(now)
        kept = self._keys.get(key, {})
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
            end, _, key, subkey = heapq.heappop(self._ends)
            record = self._keys.get(key, {}).get(subkey)
            if record is not None and record.expires == end:
                self._drop(record)

    def _drop(self, record: Record) -> None:
        kept = self._keys[record.key]
        del kept[record.subkey]
        if not kept:
            del self._keys[record.key]
        left = self._owners[record.owner] - 1
        if left:
            self._owners[record.owner] = left
        else:
            del self._owners[record.owner]
        self._count -= 1
        self._bytes -= _cost(record)

    def _rebuild_heap(self) -> None:
        """Entries of replaced records would otherwise pile up for as long as those had to live."""
        self._ends = [
            (record.expires, number, record.key, record.subkey)
            for number, record in enumerate(
                (record for kept in self._keys.values() for record in kept.values()), start=-self._count
            )
        ]
        heapq.heapify(self._ends)


def _cost(record: Record) -> int:
    return len(record.wire) + OVERHEAD


def newest(into: dict[str, Record], records: list[Record]) -> None:
    """Merge answers of several nodes: the highest seq of a subkey wins, the longer life among equals."""
    for record in records:
        known = into.get(record.subkey)
        if known is None or (record.seq, record.expires) > (known.seq, known.expires):
            into[record.subkey] = record
