"""The routing table: whom we know, near us in detail and far from us in outline.

One bucket for each number of leading bits shared with our own id, each of at most ``k`` contacts,
least recently heard first. A full bucket keeps what it has (a peer that has been up for long is the
likeliest to stay up) and remembers newcomers in a cache of ``k``; a contact that fails leaves at once
and the freshest of the cache takes its place. Contacts that left are remembered for a while in
``lost``, so that a node whose whole network went away can find its way back without any seed.

Limits: ``k`` contacts and ``k`` replacements a bucket, 256 buckets, 64 lost contacts, ``MAX_ADDRS``
addresses a contact. Only peers that we have heard from ourselves may be put in here; hearsay is for
lookups to try. Source: Kademlia (2002), sections 2.2 and 4.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import final

import attrs

from p2p.identity import PeerId
from p2p.kad.ids import BITS, bucket_index, node_id

MAX_ADDRS = 4
"""Addresses kept and handed on for one contact."""

MAX_LOST = 64


@attrs.frozen
class Contact:
    """A peer, its place, and where it says that it listens (multiaddrs as text, newest knowledge)."""

    peer: PeerId
    addrs: tuple[str, ...] = ()
    id: int = attrs.field(init=False, eq=False, repr=False)

    @id.default
    def _place(self) -> int:
        return node_id(self.peer)


class _Bucket:
    __slots__ = ("contacts", "replacements", "touched")

    def __init__(self, now: float) -> None:
        self.contacts: OrderedDict[PeerId, Contact] = OrderedDict()
        self.replacements: OrderedDict[PeerId, Contact] = OrderedDict()
        self.touched = now


@final
class Table:
    """See the file's opening. Not a network object: it learns only what it is told."""

    def __init__(self, own: PeerId, *, k: int = 20) -> None:
        self.own = own
        self.own_id = node_id(own)
        self.k = k
        self._buckets: dict[int, _Bucket] = {}
        self._size = 0
        self._lost: OrderedDict[PeerId, Contact] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Contact]:
        for bucket in self._buckets.values():
            yield from bucket.contacts.values()

    def __contains__(self, peer: PeerId) -> bool:
        return self.find(peer) is not None

    def find(self, peer: PeerId) -> Contact | None:
        bucket = self._buckets.get(bucket_index(self.own_id, node_id(peer)))
        return bucket.contacts.get(peer) if bucket else None

    def heard(self, contact: Contact, now: float) -> bool:
        """A peer spoke to us. True if it is in the table afterwards (not merely a replacement)."""
        if contact.peer == self.own:
            return False
        index = bucket_index(self.own_id, contact.id)
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = _Bucket(now)
        bucket.touched = now
        self._lost.pop(contact.peer, None)
        known = bucket.contacts.pop(contact.peer, None)
        if known is not None:
            bucket.contacts[contact.peer] = contact if contact.addrs else known
            return True
        cached = bucket.replacements.pop(contact.peer, None)
        if cached is not None and not contact.addrs:
            contact = cached
        if len(bucket.contacts) < self.k:
            bucket.contacts[contact.peer] = contact
            self._size += 1
            return True
        bucket.replacements[contact.peer] = contact
        if len(bucket.replacements) > self.k:
            bucket.replacements.popitem(last=False)
        return False

    def failed(self, peer: PeerId) -> None:
        """A peer did not answer: out it goes, and the freshest replacement comes in."""
        bucket = self._buckets.get(bucket_index(self.own_id, node_id(peer)))
        if bucket is None:
            return
        bucket.replacements.pop(peer, None)
        gone = bucket.contacts.pop(peer, None)
        if gone is None:
            return
        self._size -= 1
        self._lost[peer] = gone
        if len(self._lost) > MAX_LOST:
            self._lost.popitem(last=False)
        if bucket.replacements:
            fresh, contact = bucket.replacements.popitem()
            bucket.contacts[fresh] = contact
            self._size += 1

    def nearest(self, target: int, count: int) -> list[Contact]:
        """The ``count`` known contacts nearest to ``target``, nearest first."""
        here = bucket_index(self.own_id, target)
        deeper = [index for index in self._buckets if index > here]
        shallower = sorted((index for index in self._buckets if index < here), reverse=True)
        found: list[Contact] = []
        # Whoever shares more leading bits with the target is nearer: its own bucket, all deeper ones
        # together, then those before it one by one.
        for group in ([here], deeper, *([index] for index in shallower)):
            if len(found) >= count:
                break
            contacts = [
                contact
                for index in group
                if (bucket := self._buckets.get(index)) is not None
                for contact in bucket.contacts.values()
            ]
            contacts.sort(key=lambda contact: contact.id ^ target)
            found += contacts
        return found[:count]

    def stale(self, before: float) -> list[int]:
        """Buckets that exist or lie between us and our nearest contact, unheard since ``before``."""
        if not self._size:
            return []
        deepest = max(index for index, bucket in self._buckets.items() if bucket.contacts)
        return [
            index
            for index in range(min(deepest + 1, BITS))
            if (bucket := self._buckets.get(index)) is None or bucket.touched < before
        ]

    def refreshed(self, index: int, now: float) -> None:
        """A lookup into this bucket was made; do not ask for another before it is stale again."""
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = _Bucket(now)
        bucket.touched = now

    @property
    def lost(self) -> list[Contact]:
        """Contacts that left lately, latest first."""
        return list(reversed(self._lost.values()))
