"""Tickets: what a trainer signed is what is accepted, nothing else, and nonsense is a RemoteError."""

from __future__ import annotations

import hashlib
from typing import Any

import attrs
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import RemoteError
from p2p.identity import Identity, PeerId
from stage.ticket import KINDS, MAX_WEIGHT, Ticket

TRAINER, OTHER = (Identity.generate(bytes([number]) * 32) for number in (1, 2))
TRAINERS = frozenset({TRAINER.peer_id})
IDS = bytes(range(4)) * 5


def made(who: Identity = TRAINER, ids: bytes = IDS, **fields: Any) -> Ticket:
    ticket = Ticket(
        run="run", trainer=who.peer_id, kind="train", shard=0, position=7,
        ids_hash=hashlib.sha256(ids).digest(), weight=1.0,
    )  # fmt: skip
    return attrs.evolve(ticket, **fields).signed_by(who)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**63 - 1),
    st.floats(0, MAX_WEIGHT, exclude_min=True),
)
def test_a_signed_ticket_survives_the_wire_and_holds(
    kind: str, shard: int, position: int, weight: float
) -> None:
    ticket = made(kind=kind, shard=shard, position=position, weight=weight)
    again = Ticket.from_wire(msgpack.unpackb(msgpack.packb(ticket.to_wire())))
    assert again == ticket
    again.check("run", TRAINERS, memoryview(IDS))


def test_an_id_names_kind_shard_and_position() -> None:
    ids = {
        made(kind=kind, shard=shard, position=position).id
        for kind in KINDS
        for shard in (0, 1, 11)
        for position in (0, 1, 11)
    }
    assert len(ids) == 27


@pytest.mark.parametrize(
    ("ticket", "ids", "why"),
    [
        (made(), IDS + b"\0\0\0\0", "token ids"),
        (made(run="another"), IDS, "run another"),
        (made(OTHER), IDS, "does not list"),
        (attrs.evolve(made(), position=8), IDS, "bad signature"),
        (attrs.evolve(made(), kind="eval"), IDS, "bad signature"),
        (attrs.evolve(made(), weight=2.0), IDS, "bad signature"),
        (attrs.evolve(made(), shard=1), IDS, "bad signature"),
        (attrs.evolve(made(OTHER), trainer=TRAINER.peer_id), IDS, "bad signature"),
        (attrs.evolve(made(), signature=bytes(64)), IDS, "bad signature"),
    ],
)
def test_what_was_not_signed_for_is_refused(ticket: Ticket, ids: bytes, why: str) -> None:
    with pytest.raises(RemoteError, match=why):
        Ticket.from_wire(ticket.to_wire()).check("run", TRAINERS, ids)


def test_a_listed_trainer_whose_id_is_no_key_cannot_sign() -> None:
    ticket = attrs.evolve(made(), trainer=PeerId("nonsense"))
    with pytest.raises(RemoteError, match="bad signature"):
        ticket.check("run", frozenset({PeerId("nonsense")}), IDS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, b"run"), (1, None), (2, "other"), (2, ["train"]), (3, -1), (3, 2**31), (3, True), (3, 1.0),
        (4, -1), (4, 2**63), (4, "1"), (5, b""), (5, bytes(33)), (5, "x" * 32), (6, 0.0), (6, -1.0),
        (6, MAX_WEIGHT * 1.01), (6, float("nan")), (6, float("inf")), (6, 1), (7, b""), (7, bytes(65)),
        (7, None),
    ],
)  # fmt: skip
def test_every_field_has_its_bounds(field: int, value: Any) -> None:
    wire = made().to_wire()
    wire[field] = value
    with pytest.raises(RemoteError):
        Ticket.from_wire(wire)


@settings(deadline=None)
@given(ANYTHING)
def test_nonsense_is_a_remote_error(value: Any) -> None:
    with pytest.raises(RemoteError):
        Ticket.from_wire(value)


@settings(deadline=None)
@given(st.integers(0, 7), ANYTHING)
def test_one_field_of_nonsense_is_a_remote_error_or_no_valid_signature(field: int, value: Any) -> None:
    wire = made().to_wire()
    if value == wire[field]:
        return
    wire[field] = value
    with pytest.raises(RemoteError):
        Ticket.from_wire(wire).check("run", TRAINERS, IDS)
