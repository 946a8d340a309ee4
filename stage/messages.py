"""The messages of ``/agora/microbatch/1``: one microbatch is one call.

    caller                                   callee (a replica of the next stage)
    microbatch {header} [ids, c]   ->
                                   <-        busy | no_replica | accepted {load}
    payload [ids, c]               ->        only where the payload did not come with the header
                                   <-        progress {path}, any number of times
                                   <-        answer {loss, c_hash, path, load, stale, receipts} [dc]

Payload forward: T+1 little-endian uint32 ids, then ``c`` packed by ``stage.boundary`` (absent towards
the head). Payload back: ``dc`` packed likewise (absent towards the trainer and for evaluation); for a ticket
of generation what ``stage.likeliest`` packs, unchanged from the tail to the trainer. Everything but the
payloads forward and ``dc`` is counted as control traffic. Sans-IO and torch-free; hostile input ->
RemoteError.
"""

from __future__ import annotations

from typing import Any

import attrs

from p2p.errors import RemoteError
from p2p.identity import PeerId
from stage.clock import Reading, readings_from_wire
from stage.receipts import are_signatures
from stage.ticket import Ticket

PROTOCOL = "/agora/microbatch/1"
BASIS = 0
"""Version of the subspace basis in which this program computes and sends."""
WIRE_DTYPES = ("fp32", "bf16", "int8")
MAX_LOSS = 1e6
"""A loss of this size or more is no number to go on with."""
MAX_PATH = 64
MAX_DOCUMENTS = 4096
MAX_TOKENS = 1 << 20
MAX_SLOTS = 1 << 16
PEER_ID_CHARS = 64
"""More than any peer id has; what a path names is written into ledgers."""


@attrs.frozen(kw_only=True)
class Request:
    """Header of a microbatch."""

    ticket: Ticket
    clock: list[Reading]
    basis: int
    """Version of the subspace basis that ``c`` is in."""
    path: list[PeerId]
    """Who has worked on it so far, the trainer first."""
    tokens: int
    """T; the ids are T+1."""
    documents: list[int]
    """Positions (ascending, in [1, T)) at which a new document begins; attention does not cross them."""
    dtype: str
    dtype_back: str
    inline: bool
    """Whether the payload follows this message at once, or only after ``accepted``."""
    deadline_s: float
    """How long the caller will wait, counted from now."""
    hint: list[PeerId] = attrs.field(factory=list)
    """Who works on it already in the stages after the callee's, or did: to be asked first. May be empty."""
    place: int | None = None
    """Of a ticket of generation: where in the T tokens that stands whose next one is asked."""

    def to_wire(self) -> dict[str, Any]:
        return {
            **({} if self.place is None else {"place": self.place}),
            "t": "microbatch",
            "ticket": self.ticket.to_wire(),
            "clock": [reading.to_wire() for reading in self.clock],
            "basis": self.basis,
            "path": list(self.path),
            "tokens": self.tokens,
            "documents": self.documents,
            "dtype": self.dtype,
            "dtype_back": self.dtype_back,
            "inline": self.inline,
            "deadline": self.deadline_s,
            "hint": list(self.hint),
        }

    @classmethod
    def from_wire(cls, header: dict[str, Any]) -> Request:
        match header:
            case {
                "t": "microbatch",
                "ticket": ticket,
                "clock": clock,
                "basis": basis,
                "path": list(path),
                "tokens": tokens,
                "documents": list(documents),
                "dtype": str(dtype),
                "dtype_back": str(dtype_back),
                "inline": bool(inline),
                "deadline": float(deadline_s),
                "hint": list(hint),
            }:
                pass
            case _:
                raise RemoteError("microbatch: a field is missing or has the wrong type")
        if dtype not in WIRE_DTYPES or dtype_back not in WIRE_DTYPES:
            raise RemoteError(f"microbatch: unknown wire dtype {dtype!r} or {dtype_back!r}")
        if not (_whole(tokens, MAX_TOKENS) and tokens and _whole(basis, 2**31) and 0 < deadline_s < 86_400):
            raise RemoteError("microbatch: tokens, deadline or basis out of range")
        if not _is_path(path) or not _is_path(hint):
            raise RemoteError(f"microbatch: path or hint is not a list of at most {MAX_PATH} peer ids")
        if len(documents) > MAX_DOCUMENTS or not _ascending(documents, tokens):
            raise RemoteError("microbatch: document boundaries are not ascending positions in [1, T)")
        issued, place = Ticket.from_wire(ticket), header.get("place")
        if place is not None if issued.kind != "generate" else not _whole(place, tokens - 1):
            raise RemoteError("microbatch: tickets of generation, and no others, name a place in [0, T)")
        return cls(
            ticket=issued, clock=readings_from_wire(clock), basis=basis,
            path=[PeerId(peer) for peer in path], tokens=tokens, documents=documents,
            dtype=dtype, dtype_back=dtype_back, inline=inline, deadline_s=deadline_s,
            hint=[PeerId(peer) for peer in hint], place=place,
        )  # fmt: skip


def _whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most  # a bool is an int too, but not here


def _is_path(path: list[Any]) -> bool:
    return len(path) <= MAX_PATH and all(isinstance(p, str) and 0 < len(p) <= PEER_ID_CHARS for p in path)


def _ascending(documents: list[Any], tokens: int) -> bool:
    last = 0
    for position in documents:
        if type(position) is not int or not last < position < tokens:
            return False
        last = position
    return True


@attrs.frozen
class Load:
    """How busy the callee is, by its own word."""

    slots: int
    """Free slots, this microbatch and what is on its way to it not counted."""
    working: int = 0
    """Microbatches in progress there, of all callers."""
    service_s: float = 0.0
    """Seconds of its device that a microbatch takes, lately; 0 before the first."""

    def to_wire(self) -> list[Any]:
        return [self.slots, self.working, self.service_s]


def _load(value: Any) -> Load:
    match value:
        case [slots, working, float(service_s)] if (
            _whole(slots, MAX_SLOTS) and _whole(working, MAX_SLOTS) and 0.0 <= service_s < 86_400
        ):
            return Load(slots, working, service_s)
    raise RemoteError("microbatch: load is not [slots, working, seconds] within their bounds")


@attrs.frozen(kw_only=True)
class Accepted:
    load: Load

    def to_wire(self) -> dict[str, Any]:
        return {"t": "accepted", "load": self.load.to_wire()}


@attrs.frozen(kw_only=True)
class BusyReply:
    retry_after_s: float

    def to_wire(self) -> dict[str, Any]:
        return {"t": "busy", "retry_after": self.retry_after_s}


@attrs.frozen(kw_only=True)
class NoReplica:
    """Some later stage has no live replica; nothing was added anywhere by this call."""

    stage: int

    def to_wire(self) -> dict[str, Any]:
        return {"t": "no_replica", "stage": self.stage}


@attrs.frozen(kw_only=True)
class Progress:
    """The callee handed the microbatch on, and its next stage accepted it."""

    path: list[PeerId]
    """Who works on it in the stages after the callee's, the next stage first, as far as is known."""

    def to_wire(self) -> dict[str, Any]:
        return {"t": "progress", "path": list(self.path)}


@attrs.frozen(kw_only=True)
class Answer:
    """The microbatch is done from the callee to the tail; the payload of this message is ``dc``, if any."""

    loss: float
    """Mean cross-entropy a token, nats; 0 for a ticket of generation."""
    c_hash: bytes
    """SHA-256 of the packed ``c`` that the answer belongs to (empty towards the trainer)."""
    path: list[PeerId]
    """All that worked on it, the trainer first."""
    load: Load
    stale: bool
    """True if somewhere downstream a cached answer for another ``c`` was used."""
    receipts: list[bytes] = attrs.field(factory=list, repr=False)
    """What the last peers of ``path`` signed, from the callee to the tail; see ``stage.receipts``."""

    def to_wire(self) -> dict[str, Any]:
        return {
            "t": "answer", "loss": self.loss, "c_hash": self.c_hash,
            "path": list(self.path), "load": self.load.to_wire(), "stale": self.stale,
            "receipts": list(self.receipts),
        }  # fmt: skip


Reply = Accepted | BusyReply | NoReplica | Progress | Answer


def reply_from_wire(header: dict[str, Any]) -> Reply:
    """Reads any message of the callee. Raises RemoteError."""
    match header:
        case {"t": "accepted", "load": load}:
            return Accepted(load=_load(load))
        case {"t": "busy", "retry_after": float(retry_after_s)} if 0.0 <= retry_after_s <= 600.0:
            return BusyReply(retry_after_s=retry_after_s)
        case {"t": "no_replica", "stage": stage} if _whole(stage, MAX_PATH):
            return NoReplica(stage=stage)
        case {"t": "progress", "path": list(path)} if path and _is_path(path):
            return Progress(path=[PeerId(peer) for peer in path])
        case {
            "t": "answer",
            "loss": float(loss),
            "c_hash": bytes(c_hash),
            "path": list(path),
            "load": load,
            "stale": bool(stale),
            "receipts": list(receipts),
        } if _is_path(path) and len(c_hash) in (0, 32) and are_signatures(receipts):
            # A loss that is not finite would poison every mean that it enters.
            if not 0.0 <= loss < MAX_LOSS:
                raise RemoteError("answer: loss is not a sensible number")
            peers = [PeerId(peer) for peer in path]
            return Answer(
                loss=loss, c_hash=c_hash, path=peers, load=_load(load), stale=stale, receipts=receipts
            )
    raise RemoteError("microbatch: a reply that is none of accepted, busy, no_replica, progress, answer")
