"""Receipts: who did what for which microbatch, signed hop by hop, and by the trainer that issued it.

Theory of operation. A replica that answers a microbatch signs a *statement*: that it worked, at this stage,
on this ticket, for this caller. The statement's fields are all known to whoever reads the answer (the
ticket from its request, the peers from its path), so only the signature travels, one for each stage from
the callee to the tail. Every caller checks all of them before it believes an answer; so whoever altered one
is found out by the caller next to it, and nobody else is blamed. A replica that gives a kept answer to
another caller signs anew for that caller; what later stages signed names this replica as their caller and
stays true.

When the answer reaches the trainer, its ticket and the statements of all stages, with the trainer's own
signature and the time, are a *receipt*: it shows without any further source that this trainer issued the
microbatch and had it answered, and which peer worked at each stage for which other. A chain can be
continued by the next peer only, since each statement names its caller's key, and it begins at the
trainer's.

Encoding: msgpack, in a fixed order, under the domains ``receipt`` and ``completed``:

    statement  [1, run, ticket id, ids hash, stage, peer, caller, kind]
    receipt    [1, ticket, at, [[peer, signature], … by stage], signature]; the signature covers the rest

A receipt that does not encode back to the same bytes is refused, so one receipt has one spelling.
Costs: 0.1 ms a signature. Limits: ``MAX_PATH`` - 1 stages, ``RECEIPT_LIMIT`` bytes. Sans-IO and torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import attrs
import msgpack

from p2p.errors import RemoteError
from p2p.identity import Identity, PeerId, verify
from stage.ticket import Ticket

DOMAIN: Final = "receipt"
"""Of a replica's statement."""
COMPLETED: Final = "completed"
"""Of a trainer's signature under a receipt."""
SIGNATURE_BYTES: Final = 64
MAX_STAGES: Final = 63
"""As many as a microbatch's path has room for, besides the trainer."""
RECEIPT_LIMIT: Final = 12 << 10
"""Bytes of an encoded receipt: of 63 stages it has 8 KiB."""
PEER_ID_CHARS: Final = 64
_VERSION: Final = 1


def statement(ticket: Ticket, stage: int, peer: PeerId, caller: PeerId) -> bytes:
    """What ``peer`` signs: it worked on the ticket at ``stage`` and answered ``caller``."""
    return _pack([_VERSION, ticket.run, ticket.id, ticket.ids_hash, stage, peer, caller, ticket.kind])


def sign(identity: Identity, ticket: Ticket, stage: int, caller: PeerId) -> bytes:
    """This replica's signature under its statement; 64 bytes."""
    return identity.sign(DOMAIN, statement(ticket, stage, identity.peer_id, caller))


def check_chain(
    ticket: Ticket, *, first: int, stages: int, peers: Sequence[PeerId], signatures: Sequence[bytes]
) -> None:
    """Raises RemoteError unless every stage from ``first`` to the last has worked for the one before.

    ``peers``: the caller of stage ``first``, and then who worked at each stage.
    """
    if len(peers) != stages - first + 1 or len(signatures) != stages - first:
        raise RemoteError(
            f"receipts: {len(signatures)} statements of {len(peers) - 1} peers, "
            f"for stages {first} to {stages - 1}"
        )
    if len(set(peers)) != len(peers):
        raise RemoteError("receipts: one peer stands at two stages")
    for stage, caller, peer, signature in zip(
        range(first, stages), peers[:-1], peers[1:], signatures, strict=True
    ):
        if not verify(peer, DOMAIN, statement(ticket, stage, peer, caller), signature):
            raise RemoteError(f"receipts: {peer} did not sign that it worked at stage {stage} for {caller}")


@attrs.frozen(kw_only=True)
class Receipt:
    """A microbatch that a trainer issued and had answered, and who worked on it."""

    ticket: Ticket
    at: float
    """Unix time of the answer, by the trainer's clock."""
    peers: tuple[PeerId, ...]
    """Who worked, by stage."""
    statements: tuple[bytes, ...] = attrs.field(repr=False)
    """Their signatures, by stage."""
    signature: bytes = attrs.field(default=b"", repr=False)
    """The trainer's, under all of it."""

    def signed_by(self, trainer: Identity) -> Receipt:
        """The same receipt with the trainer's signature."""
        return attrs.evolve(self, signature=trainer.sign(COMPLETED, _pack(self._content())))

    def encode(self) -> bytes:
        """The canonical bytes."""
        return _pack([*self._content(), self.signature])

    def _content(self) -> list[Any]:
        hops = [[peer, signature] for peer, signature in zip(self.peers, self.statements, strict=True)]
        return [_VERSION, self.ticket.to_wire(), self.at, hops]

    @classmethod
    def decode(cls, data: bytes) -> Receipt:
        """Checks shape and bounds, not yet any signature. Raises RemoteError."""
        if len(data) > RECEIPT_LIMIT:
            raise RemoteError(f"a receipt of {len(data)} bytes; the limit is {RECEIPT_LIMIT}")
        try:
            row = msgpack.unpackb(data, raw=False, max_map_len=0, max_array_len=MAX_STAGES)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise RemoteError("a receipt that is not msgpack") from error
        match row:
            case [version, list(ticket), float(at), list(hops), bytes(signature)] if version == _VERSION:
                pass
            case _:
                raise RemoteError(f"a receipt that is not a version {_VERSION} list of 5 fields")
        if not (math.isfinite(at) and hops and all(map(_is_hop, hops)) and len(signature) == SIGNATURE_BYTES):
            raise RemoteError("a receipt with a field out of its bounds")
        receipt = cls(
            ticket=Ticket.from_wire(ticket),
            at=at,
            peers=tuple(PeerId(peer) for peer, _signature in hops),
            statements=tuple(signature for _peer, signature in hops),
            signature=signature,
        )
        if receipt.encode() != data:
            raise RemoteError("a receipt that is not in canonical form")
        return receipt

    def check(self, run: str, trainers: frozenset[PeerId], stages: int) -> None:
        """Raises RemoteError unless a trainer of the run issued it and every stage signed for it."""
        ticket = self.ticket
        ticket.check_issued(run, trainers)
        if not verify(ticket.trainer, COMPLETED, _pack(self._content()), self.signature):
            raise RemoteError("receipts: not signed by the trainer that issued the ticket")
        check_chain(
            ticket, first=0, stages=stages, peers=(ticket.trainer, *self.peers), signatures=self.statements
        )


def are_signatures(values: list[Any]) -> bool:
    """Whether a list off the wire has the shape of an answer's statements."""
    return len(values) <= MAX_STAGES and all(
        isinstance(value, bytes) and len(value) == SIGNATURE_BYTES for value in values
    )


def _is_hop(hop: Any) -> bool:
    match hop:
        case [str(peer), bytes(signature)]:
            return 0 < len(peer) <= PEER_ID_CHARS and len(signature) == SIGNATURE_BYTES
    return False


def _pack(row: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(row, use_bin_type=True)
    return packed
