"""A record: what one peer says under one key, signed, with an end.

On the wire a record is one msgpack list in fixed order,
``[1, key, subkey, value, owner, seq, issued, expires, signature]``; ``value`` is msgpack inside a
byte string, so that a node can keep and hand on what it does not understand. The signature (domain
``record``) covers the same list without its last element. A list that does not encode back to the
same bytes is refused: one statement, one spelling, and so one entry in the cache of verified ones.

Ownership. A writer speaks only for itself: the subkey is the owner's peer id, or empty where the
owner's peer id is one of the parts of the key (split at ``/``). So nobody can overwrite or squat
somebody else's place. ``seq`` is the owner's clock in microseconds (and grows by at least one a
record); the highest seq of an owner wins.

Clocks. ``issued`` and ``expires`` are the owner's unix time. Who is sent a record by its owner knows
the owner's clock and turns ``expires`` into its own time; readers are told the seconds that remain, and
believe two keepers, or the owner, that an end is later than it reads (``p2p.kad.merge``). So a clock that
is off by up to ``MAX_SKEW_S`` costs nobody its records, and no keeper alone can stretch a life.

Limits: value 4 KiB, key 128 characters, life 3600 s. Verifying costs 92 µs (Ed25519), so
``Verifier`` remembers what it has verified, up to 8 MiB of records.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from typing import Any, Final, cast, final

import attrs
import msgpack

from p2p.errors import LocalError, Refused, RemoteError
from p2p.identity import Identity, PeerId, verify

VALUE_LIMIT: Final = 4096
KEY_LIMIT: Final = 128
MAX_TTL_S: Final = 3600.0
MAX_SKEW_S: Final = 60.0
SAME_CLOCK_S: Final = 3.0
"""Clocks this close count as equal: the difference is as likely to be the way here."""
RECORD_LIMIT: Final = VALUE_LIMIT + 512
"""Bytes of an encoded record: value, key, two peer ids, signature, numbers."""

_VERSION: Final = 1
_DOMAIN: Final = "record"
_FIELDS: Final = 9
_SEQ_LIMIT: Final = 1 << 62


@attrs.frozen(kw_only=True)
class Record:
    """One verified statement of one owner, as readers get it."""

    key: str
    subkey: str
    owner: PeerId
    seq: int
    expires: float
    """Unix time of *this* node's clock after which the record is no more."""
    value: Any
    """Decoded msgpack: plain lists, maps, strings, bytes and numbers. Not judged here."""
    wire: bytes = attrs.field(repr=False)
    """The signed bytes, to hand on."""
    issued: float = attrs.field(repr=False)
    owner_expires: float = attrs.field(repr=False)
    """``issued`` and ``expires`` as the owner's clock has them, as signed."""


def may_write(owner: PeerId, key: str, subkey: str) -> bool:
    """Whether this place is the owner's to write."""
    return subkey == owner or (subkey == "" and owner in key.split("/"))


def seal(
    identity: Identity, key: str, subkey: str, value: Any, *, seq: int, issued: float, ttl: float
) -> Record:
    """Sign a record of our own. ``LocalError`` says which limit it breaks."""
    if not 0 < len(key) <= KEY_LIMIT:
        raise LocalError(f"a key must have 1 to {KEY_LIMIT} characters, not {len(key)}")
    if not may_write(identity.peer_id, key, subkey):
        raise LocalError(f"subkey {subkey!r} of {key!r} is not ours to write")
    if not 0 < ttl <= MAX_TTL_S:
        raise LocalError(f"a record lives more than 0 and at most {MAX_TTL_S:.0f} s, not {ttl}")
    packed = _pack(value)
    if len(packed) > VALUE_LIMIT:
        raise LocalError(f"a value of {len(packed)} bytes; the limit is {VALUE_LIMIT}")
    try:
        decoded = _unpack(packed)
    except RemoteError as error:
        raise LocalError(f"a value that others could not read: {error}") from error
    expires = issued + ttl
    statement = [_VERSION, key, subkey, packed, identity.peer_id, seq, float(issued), float(expires)]
    wire = _pack([*statement, identity.sign(_DOMAIN, _pack(statement))])
    return Record(
        key=key,
        subkey=subkey,
        owner=identity.peer_id,
        seq=seq,
        expires=expires,
        value=decoded,
        wire=wire,
        issued=issued,
        owner_expires=expires,
    )


@final
class Verifier:
    """Turns bytes off the wire into records and remembers those whose signature held."""

    def __init__(self, *, max_bytes: int = 8 << 20) -> None:
        self._known: OrderedDict[bytes, Record] = OrderedDict()
        self._bytes = 0
        self._max_bytes = max_bytes
        self.verified = 0
        """Signatures actually checked; the rest came from memory."""

    def open(self, wire: bytes) -> Record:
        """The record, or ``RemoteError`` if it is malformed, not its owner's to write, or not signed.

        Its ``expires`` is the owner's time still; whether it is over is for the caller to say.
        """
        if len(wire) > RECORD_LIMIT:
            raise RemoteError(f"a record of {len(wire)} bytes; the limit is {RECORD_LIMIT}")
        digest = hashlib.sha256(wire).digest()
        known = self._known.get(digest)
        if known is not None:
            self._known.move_to_end(digest)
            return known
        record, signed, signature = _parse(wire)
        self.verified += 1
        if not verify(record.owner, _DOMAIN, signed, signature):
            raise RemoteError(f"a record under {record.key!r} whose signature does not hold")
        self.remember(record)
        return record

    def remember(self, record: Record) -> None:
        """Take a record for verified: one that held, or one that we signed ourselves."""
        digest = hashlib.sha256(record.wire).digest()
        if digest in self._known:
            return
        self._known[digest] = record
        self._bytes += len(record.wire)
        while self._bytes > self._max_bytes:
            _, old = self._known.popitem(last=False)
            self._bytes -= len(old.wire)


def received(record: Record, now: float, skew: float) -> Record:
    """A record from a sender whose clock is ``skew`` s ahead of ours, in our own time.

    Raises ``Refused`` where it is over, or its clock cannot be believed.
    """
    if abs(skew) <= SAME_CLOCK_S:
        skew = 0.0
    if not abs(skew) <= MAX_SKEW_S:
        raise Refused("clock_skew", f"the clocks differ by {skew:.0f} s; {MAX_SKEW_S:.0f} s are allowed")
    expires = record.owner_expires - skew
    if expires <= now:
        raise Refused("expired", f"the record ended {now - expires:.1f} s ago")
    if record.issued - skew > now + SAME_CLOCK_S:
        raise Refused("future", f"the record begins in {record.issued - skew - now:.0f} s")
    if expires > now + MAX_TTL_S + MAX_SKEW_S:
        raise Refused("too_long", f"the record would live {expires - now:.0f} s; at most {MAX_TTL_S:.0f}")
    return attrs.evolve(record, expires=expires)


def relayed(record: Record, now: float, remaining: float) -> Record:
    """A record as a node that keeps it told us, with the seconds it says remain.

    That word implies how far the owner's clock is off, and is refused beyond the tolerated skew or the
    record's whole life. What lies within is the keeper's claim: ``p2p.kad.merge`` weighs several.
    """
    if remaining <= 0:
        raise Refused("expired", "the record ended at the node that kept it")
    return received(record, now, record.owner_expires - now - remaining)


def handed(record: Record, now: float, remaining: float) -> Record:
    """A record for us to keep from a node that kept it: one word alone, so it stretches no life."""
    claimed = relayed(record, now, remaining)
    if claimed.owner_expires <= now:
        raise Refused("expired", f"the record ended {now - claimed.owner_expires:.1f} s ago")
    return attrs.evolve(claimed, expires=min(claimed.expires, claimed.owner_expires))


def _parse(wire: bytes) -> tuple[Record, bytes, bytes]:
    row = _unpack(wire)
    if not isinstance(row, list) or len(row) != _FIELDS or type(row[0]) is not int or row[0] != _VERSION:
        raise RemoteError(f"a record that is not a version {_VERSION} list of {_FIELDS} fields")
    _version, key, subkey, packed, owner, seq, issued, expires, signature = row
    well_formed = (
        isinstance(key, str)
        and 0 < len(key) <= KEY_LIMIT
        and isinstance(subkey, str)
        and isinstance(owner, str)
        and len(owner) <= 64
        and isinstance(packed, bytes)
        and len(packed) <= VALUE_LIMIT
        and type(seq) is int
        and 0 <= seq < _SEQ_LIMIT
        and type(issued) is float
        and type(expires) is float
        and math.isfinite(issued)
        and math.isfinite(expires)
        and 0 < expires - issued <= MAX_TTL_S + 1
        and isinstance(signature, bytes)
        and len(signature) == 64
    )
    if not well_formed:
        raise RemoteError("a record with a field out of its bounds")
    if not may_write(PeerId(owner), key, subkey):
        raise RemoteError(f"a record at {subkey!r} of {key!r}, which is not its owner's to write")
    if _pack(row) != wire:
        raise RemoteError("a record that is not in canonical form")
    record = Record(
        key=key,
        subkey=subkey,
        owner=PeerId(owner),
        seq=seq,
        expires=expires,
        value=_unpack(packed),
        wire=wire,
        issued=issued,
        owner_expires=expires,
    )
    return record, _pack(row[:-1]), signature


def _pack(value: Any) -> bytes:
    try:
        return cast(bytes, msgpack.packb(value, use_bin_type=True))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalError(f"a value that msgpack cannot carry: {error}") from error


def _unpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise RemoteError("bytes that are not msgpack, or maps with keys that cannot be keys") from error
