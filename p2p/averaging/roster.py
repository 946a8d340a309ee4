"""The roster: everything that the members of one averaging round must agree on, signed by its leader.

The group id is the hash of the encoded roster and travels in every message of the round, so members with
different rosters can never mix their parts. What can be derived is not stored: part p's byte range and
reducer follow from ``part_bytes`` and ``shares``; the deputy of a reducer is the next member in order.
Times are durations from the moment a member learns of the commit, so clocks need not agree.

Limits: 2 to 64 members, 0 to 2^28 floats, parts of at most 1 MiB, at most 4096 of them, 4 addresses a member;
an encoded roster stays under 40 KiB, inside one message header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

import attrs
import msgpack

from p2p.averaging import fields, shares
from p2p.errors import RemoteError

if TYPE_CHECKING:
    from p2p.identity import PeerId

MAX_MEMBERS: Final = 64
MAX_FLOATS: Final = 1 << 28
MAX_ADDRS: Final = 4
ADDR_LIMIT: Final = 128
NAME_LIMIT: Final = 64
ROSTER_LIMIT: Final = 40 << 10
MAX_WEIGHT: Final = 1e12
MAX_SECONDS: Final = 3600.0

_DOMAIN: Final = "roster"
_FIELDS: Final = (
    "run", "stage", "number", "slice", "floats", "part_bytes", "seconds", "leader", "members",
)  # fmt: skip

Sign = Callable[[str, bytes], bytes]
Verify = Callable[["PeerId", str, bytes, bytes], bool]


@attrs.frozen(kw_only=True)
class RoundKey:
    """What candidates of one round have in common."""

    run: str
    stage: int
    number: int

    def rank(self, peer: PeerId) -> bytes:
        """Orders candidates; the lowest leads. A new number shuffles the order, so no peer leads always."""
        return hashlib.sha256(f"{peer}\0{self.run}\0{self.stage}\0{self.number}".encode()).digest()


@attrs.frozen(kw_only=True)
class Candidate:
    """One who wants to take part, as it describes itself."""

    peer: PeerId
    addrs: tuple[str, ...]
    """Where it can be dialled; empty for one that cannot."""
    bandwidth: float
    """Megabits a second that it offers, its own word."""
    weight: float

    def encode(self) -> list[Any]:
        return [self.peer, list(self.addrs), self.bandwidth, self.weight]

    @classmethod
    def decode(cls, value: Any) -> Candidate:
        if not isinstance(value, list) or len(value) != 4:
            raise RemoteError("a candidate is a list of four fields")
        named = dict(zip(("peer", "addrs", "bandwidth", "weight"), value, strict=True))
        addrs = fields.array(named, "addrs", MAX_ADDRS)
        if not all(isinstance(addr, str) and 0 < len(addr) <= ADDR_LIMIT for addr in addrs):
            raise RemoteError("an address must be a short string")
        return cls(
            peer=cast("PeerId", fields.text(named, "peer", NAME_LIMIT)),
            addrs=tuple(addrs),
            bandwidth=fields.number(named, "bandwidth", 0.0, MAX_WEIGHT),
            weight=fields.number(named, "weight", 0.0, MAX_WEIGHT),
        )


@attrs.frozen(kw_only=True, slots=False)  # slots would forbid the cached group id
class Roster:
    """Who averages what, how it is cut, and for how long."""

    key: RoundKey
    slice_index: int
    floats: int
    part_bytes: int
    seconds: float
    """From the commit to the end of the round."""
    leader: PeerId
    members: tuple[Candidate, ...]
    """In order; weights are the accepted ones."""
    shares: tuple[float, ...]

    @cached_property
    def encoded(self) -> bytes:
        return cast(
            bytes,
            msgpack.packb(
                [
                    self.key.run,
                    self.key.stage,
                    self.key.number,
                    self.slice_index,
                    self.floats,
                    self.part_bytes,
                    self.seconds,
                    self.leader,
                    [
                        [*member.encode(), share]
                        for member, share in zip(self.members, self.shares, strict=True)
                    ],
                ]
            ),
        )

    @cached_property
    def group(self) -> bytes:
        """The group id."""
        return hashlib.sha256(self.encoded).digest()

    @cached_property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(member.peer for member in self.members)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        return shares.spans(self.floats, self.part_bytes)

    @cached_property
    def owners(self) -> list[int]:
        """Index of the reducer of every part."""
        return shares.owners(len(self.spans), self.shares)

    def deputy(self, member: int) -> int:
        """Index of the member that vouches for what ``member`` reduced."""
        return (member + 1) % len(self.members)

    def sign(self, sign: Sign) -> bytes:
        return sign(_DOMAIN, self.encoded)

    def check(self, signature: bytes, verify: Verify) -> None:
        """Raise ``RemoteError`` unless the leader signed this roster."""
        if not verify(self.leader, _DOMAIN, self.encoded, signature):
            raise RemoteError("the roster is not signed by its leader")

    @classmethod
    def decode(cls, data: bytes) -> Roster:
        """Read a roster that a peer sent; everything derived from it is safe to compute afterwards."""
        if len(data) > ROSTER_LIMIT:
            raise RemoteError("a roster that is too long")
        try:
            value = msgpack.unpackb(data)
        except (ValueError, msgpack.UnpackException) as error:
            raise RemoteError("a roster that is not msgpack") from error
        if not isinstance(value, list) or len(value) != len(_FIELDS):
            raise RemoteError("a roster has nine fields")
        named = dict(zip(_FIELDS, value, strict=True))
        rows = fields.array(named, "members", MAX_MEMBERS)
        if not all(isinstance(row, list) and len(row) == 5 for row in rows):
            raise RemoteError("a member of a roster has five fields")
        portions = tuple(fields.number({"share": row[4]}, "share", 0.0, MAX_WEIGHT) for row in rows)
        roster = cls(
            key=RoundKey(
                run=fields.text(named, "run", NAME_LIMIT),
                stage=fields.integer(named, "stage", 0, 1 << 16),
                number=fields.integer(named, "number", 0, 1 << 53),
            ),
            slice_index=fields.integer(named, "slice", 0, 1 << 31),
            floats=fields.integer(named, "floats", 0, MAX_FLOATS),
            part_bytes=fields.integer(named, "part_bytes", 4, shares.MAX_PART_BYTES),
            seconds=fields.number(named, "seconds", 0.0, MAX_SECONDS),
            leader=cast("PeerId", fields.text(named, "leader", NAME_LIMIT)),
            members=tuple(Candidate.decode(row[:4]) for row in rows),
            shares=portions,
        )
        if len(set(roster.peers)) != len(rows) or len(rows) < 2:
            raise RemoteError("a roster names two or more different members")
        if roster.part_bytes % shares.FLOAT_BYTES or sum(portions) <= 0:
            raise RemoteError("a roster whose parts nobody can reduce")
        if roster.floats * shares.FLOAT_BYTES > roster.part_bytes * shares.MAX_PARTS:
            raise RemoteError("a roster with too many parts")
        return roster


def draft(
    key: RoundKey,
    leader: PeerId,
    candidates: list[Candidate],
    *,
    slice_index: int,
    floats: int,
    part_bytes: int,
    seconds: float,
    distrusted: Collection[PeerId] = (),
) -> Roster:
    """The roster of these candidates; who cannot be dialled comes first, since the earlier dials the later.

    Weights are clamped here and shares follow bandwidth; a member that cannot be dialled reduces nothing
    unless nobody can be, nor does one whom the leader distrusts.
    """
    ordered = sorted(candidates, key=lambda one: (bool(one.addrs), key.rank(one.peer)))
    accepted = shares.clamp([one.weight for one in ordered])
    members = tuple(attrs.evolve(one, weight=w) for one, w in zip(ordered, accepted, strict=True))
    portions = shares.portions(
        [one.bandwidth for one in members],
        [bool(one.addrs) and one.peer not in distrusted for one in members],
    )
    reducers = sum(1 for portion in portions if portion)
    return Roster(
        key=key,
        slice_index=slice_index,
        floats=floats,
        part_bytes=shares.part_size(floats, reducers, part_bytes),
        seconds=seconds,
        leader=leader,
        members=members,
        shares=tuple(portions),
    )
