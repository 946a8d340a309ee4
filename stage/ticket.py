"""The ticket of a microbatch: what a trainer signs, and the one name its work is known by.

A ticket says which run, which row of which data shard, what is to be done with it (train, eval,
generate), the SHA-256 of its token ids and the weight it counts with. Workers accept work only on a
ticket signed by a trainer that the manifest lists, so nobody else can feed gradients to the swarm,
and every ledger line about a microbatch names its ``id``. Torch-free: trainers use it too.
"""

from __future__ import annotations

import hashlib
from typing import Any

import attrs
import msgpack

from p2p.errors import RemoteError
from p2p.identity import Identity, PeerId, verify

KINDS = ("train", "eval", "generate")
DOMAIN = "ticket"
MAX_WEIGHT = 64.0
"""Most samples' weight that one ticket may claim; a trainer's own bug must not drown a batch."""


@attrs.frozen(kw_only=True)
class Ticket:
    """One microbatch of one sequence. ``shard`` and ``position`` name its row; positions only grow."""

    run: str
    trainer: PeerId
    kind: str
    shard: int
    position: int
    ids_hash: bytes
    """SHA-256 of the T+1 little-endian uint32 token ids."""
    weight: float
    signature: bytes = b""

    @property
    def id(self) -> str:
        """Unique in the run: trainers own disjoint shards, and kinds count positions apart."""
        return f"{self.kind}:{self.shard}:{self.position}"

    def signed_by(self, identity: Identity) -> Ticket:
        """The same ticket with this trainer's signature."""
        return attrs.evolve(self, signature=identity.sign(DOMAIN, self._signed_bytes()))

    def _signed_bytes(self) -> bytes:
        fields = [self.run, self.kind, self.shard, self.position, self.ids_hash, self.weight]
        packed: bytes = msgpack.packb(fields)
        return packed

    def to_wire(self) -> list[Any]:
        """Msgpack-able form; ``from_wire`` reads it back."""
        return [
            self.run, self.trainer, self.kind, self.shard, self.position,
            self.ids_hash, self.weight, self.signature,
        ]  # fmt: skip

    @classmethod
    def from_wire(cls, value: Any) -> Ticket:
        """Checks types and ranges, not yet the signature. Raises RemoteError."""
        if not isinstance(value, list) or len(value) != 8:
            raise RemoteError("ticket: not a list of 8 fields")
        run, trainer, kind, shard, position, ids_hash, weight, signature = value
        ok = (
            isinstance(run, str)
            and isinstance(trainer, str)
            and kind in KINDS
            and type(shard) is int
            and type(position) is int
            and 0 <= shard < 2**31
            and 0 <= position < 2**63
            and isinstance(ids_hash, bytes)
            and len(ids_hash) == 32
            and isinstance(weight, float)
            and 0.0 < weight <= MAX_WEIGHT
            and isinstance(signature, bytes)
            and len(signature) == 64
        )
        if not ok:
            raise RemoteError("ticket: a field has the wrong type or is out of range")
        return cls(
            run=run, trainer=PeerId(trainer), kind=kind, shard=shard, position=position,
            ids_hash=ids_hash, weight=weight, signature=signature,
        )  # fmt: skip

    def check(self, run: str, trainers: frozenset[PeerId], ids: bytes | memoryview) -> None:
        """Raises RemoteError unless a trainer of this run signed it for exactly these ids."""
        if hashlib.sha256(ids).digest() != self.ids_hash:
            raise RemoteError("ticket: the token ids are not the ones that it was signed for")
        self.check_issued(run, trainers)

    def check_issued(self, run: str, trainers: frozenset[PeerId]) -> None:
        """Raises RemoteError unless a trainer of this run signed it."""
        if self.run != run:
            raise RemoteError(f"ticket: it is for run {self.run}, this is {run}")
        if self.trainer not in trainers:
            raise RemoteError("ticket: signed by a peer that the manifest does not list as a trainer")
        if not verify(self.trainer, DOMAIN, self._signed_bytes(), self.signature):
            raise RemoteError("ticket: bad signature")
