"""Messages of a microbatch: what is sent is what is read, and every bound holds against hostile input."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import RemoteError
from p2p.identity import Identity
from stage.clock import MAX_READINGS, Reading
from stage.messages import (
    MAX_DOCUMENTS,
    MAX_PATH,
    MAX_SLOTS,
    MAX_TOKENS,
    Accepted,
    Answer,
    BusyReply,
    Load,
    NoReplica,
    Progress,
    Reply,
    Request,
    reply_from_wire,
)
from stage.ticket import Ticket

TRAINER = Identity.generate(bytes([1]) * 32)
WORKER = Identity.generate(bytes([2]) * 32)
TICKET = Ticket(
    run="run", trainer=TRAINER.peer_id, kind="train", shard=0, position=0, ids_hash=bytes(32), weight=1.0
).signed_by(TRAINER)  # fmt: skip
CLOCK = [Reading.signed(TRAINER, "run", 12)]


def made(**fields: Any) -> Request:
    basic: dict[str, Any] = {
        "ticket": TICKET, "clock": CLOCK, "basis": 0, "path": [TRAINER.peer_id], "tokens": 16,
        "documents": [3, 9], "dtype": "bf16", "dtype_back": "fp32", "inline": True, "deadline_s": 30.0,
    }  # fmt: skip
    return Request(**(basic | fields))


def over_the_wire(header: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = msgpack.unpackb(msgpack.packb(header, use_bin_type=True), raw=False)
    return read


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.integers(1, MAX_TOKENS),
    st.lists(st.integers(1, 500), max_size=20, unique=True),
    st.floats(0, 86_400, exclude_min=True, exclude_max=True),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.booleans(),
)
def test_a_request_survives_the_wire(
    tokens: int, documents: list[int], deadline_s: float, dtype: str, inline: bool
) -> None:
    request = made(
        tokens=max(tokens, 501),
        documents=sorted(documents),
        deadline_s=deadline_s,
        dtype=dtype,
        inline=inline,
    )
    assert Request.from_wire(over_the_wire(request.to_wire())) == request


GENERATE = attrs.evolve(TICKET, kind="generate").signed_by(TRAINER)


@pytest.mark.parametrize("place", [0, 15])
def test_a_ticket_of_generation_names_a_place(place: int) -> None:
    request = made(ticket=GENERATE, place=place)
    assert Request.from_wire(over_the_wire(request.to_wire())) == request


@pytest.mark.parametrize(
    ("ticket", "place"),
    [(GENERATE, None), (GENERATE, -1), (GENERATE, 16), (GENERATE, True), (GENERATE, 1.0), (TICKET, 0)],
)
def test_other_places_are_refused(ticket: Ticket, place: Any) -> None:
    with pytest.raises(RemoteError, match="place"):
        Request.from_wire(made(ticket=ticket).to_wire() | {"place": place})


def test_the_largest_request_fits_a_header() -> None:
    many = [Identity.generate(number.to_bytes(32, "big")) for number in range(1, MAX_READINGS + 1)]
    request = made(
        clock=[Reading.signed(who, "run", 2**62) for who in many],
        path=[who.peer_id for who in many],
        hint=[who.peer_id for who in many],
        tokens=MAX_TOKENS,
        documents=list(range(MAX_TOKENS - MAX_DOCUMENTS, MAX_TOKENS)),
    )
    packed = msgpack.packb(request.to_wire(), use_bin_type=True)
    assert len(packed) < 64 * 1024
    assert Request.from_wire(msgpack.unpackb(packed)) == request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("t", "other"), ("ticket", None), ("ticket", []), ("clock", {}), ("clock", [1]), ("basis", -1),
        ("basis", True), ("basis", 2**40), ("path", "me"), ("path", [1]), ("path", ["x" * 65]),
        ("path", [""]), ("path", ["x"] * (MAX_PATH + 1)), ("hint", None), ("hint", [1]), ("hint", [""]),
        ("hint", ["x"] * (MAX_PATH + 1)), ("tokens", 0), ("tokens", -1), ("tokens", True),
        ("tokens", 16.0), ("tokens", MAX_TOKENS + 1), ("documents", None), ("documents", [0]),
        ("documents", [16]), ("documents", [3, 3]), ("documents", [4, 3]), ("documents", [True]),
        ("documents", ["3"]), ("documents", [1.5]), ("dtype", "fp64"), ("dtype", b"fp32"),
        ("dtype_back", ""), ("inline", 1), ("inline", None), ("deadline", 0.0), ("deadline", -1.0),
        ("deadline", 86_400.0), ("deadline", float("nan")), ("deadline", float("inf")), ("deadline", 3),
    ],
)  # fmt: skip
def test_every_field_of_a_request_has_its_bounds(field: str, value: Any) -> None:
    header = made().to_wire()
    header[field] = value
    with pytest.raises(RemoteError):
        Request.from_wire(header)


def test_too_many_documents_are_refused() -> None:
    header = made(tokens=MAX_TOKENS, documents=list(range(1, MAX_DOCUMENTS + 2))).to_wire()
    with pytest.raises(RemoteError, match="document"):
        Request.from_wire(header)


@pytest.mark.parametrize("field", sorted(made().to_wire()))
def test_every_field_of_a_request_is_needed(field: str) -> None:
    header = made().to_wire()
    del header[field]
    with pytest.raises(RemoteError):
        Request.from_wire(header)


@settings(deadline=None)
@given(st.sampled_from(sorted(made().to_wire())), NONSENSE)
def test_nonsense_in_a_field_is_a_remote_error_or_within_bounds(field: str, value: Any) -> None:
    header = copy.deepcopy(made().to_wire())
    header[field] = value
    try:
        request = Request.from_wire(header)
    except RemoteError:
        return
    assert 0 < request.tokens <= MAX_TOKENS
    assert 0 < request.deadline_s < 86_400
    assert len(request.path) <= MAX_PATH
    assert all(0 < position < request.tokens for position in request.documents)
    msgpack.packb(request.to_wire())


ANSWER = Answer(
    loss=5.5, c_hash=bytes(32), path=[TRAINER.peer_id, WORKER.peer_id], load=Load(3, 2, 0.5), stale=False
)


@pytest.mark.parametrize(
    "reply",
    [
        Accepted(load=Load(0)), Accepted(load=Load(MAX_SLOTS, MAX_SLOTS, 9.5)), BusyReply(retry_after_s=0.05),
        NoReplica(stage=2),
        ANSWER, Answer(loss=0.0, c_hash=b"", path=[], load=Load(0), stale=True),
        Progress(path=[WORKER.peer_id]), Progress(path=[WORKER.peer_id] * MAX_PATH),
    ],
)  # fmt: skip
def test_a_reply_survives_the_wire(reply: Reply) -> None:
    assert reply_from_wire(over_the_wire(reply.to_wire())) == reply


@pytest.mark.parametrize(
    "changes",
    [
        {"t": "maybe"}, {"loss": 1}, {"loss": -0.1}, {"loss": float("nan")}, {"loss": float("inf")},
        {"loss": 1e6}, {"c_hash": "x" * 32}, {"c_hash": bytes(31)}, {"c_hash": bytes(60_000)},
        {"path": None}, {"path": [1]}, {"path": ["x" * 65]}, {"path": ["x"] * (MAX_PATH + 1)},
        {"stale": 0}, {"load": None}, {"load": []}, {"load": [1, 1]}, {"load": [1, 1, 1.0, 1]}, {"load": 3},
        {"load": [-1, 0, 0.0]}, {"load": [True, 0, 0.0]}, {"load": [2.0, 0, 0.0]},
        {"load": [MAX_SLOTS + 1, 0, 0.0]}, {"load": [1, -1, 0.0]}, {"load": [1, MAX_SLOTS + 1, 0.0]},
        {"load": [1, None, 0.0]}, {"load": [1, 1, -0.1]}, {"load": [1, 1, float("nan")]},
        {"load": [1, 1, float("inf")]}, {"load": [1, 1, 1]}, {"load": [1, 1, 86_400.0]},
    ],
)  # fmt: skip
def test_every_field_of_an_answer_has_its_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        reply_from_wire(ANSWER.to_wire() | changes)


@pytest.mark.parametrize(
    "header",
    [
        {}, {"t": "accepted"}, {"t": "accepted", "load": [-1, 0, 0.0]},
        {"t": "accepted", "load": [2**70, 0, 0.0]},
        {"t": "accepted", "slots": 1}, {"t": "progress"}, {"t": "progress", "path": []},
        {"t": "progress", "path": [1]}, {"t": "progress", "path": ["x"] * (MAX_PATH + 1)},
        {"t": "busy"}, {"t": "busy", "retry_after": -0.1}, {"t": "busy", "retry_after": 601.0},
        {"t": "busy", "retry_after": float("nan")}, {"t": "busy", "retry_after": 1},
        {"t": "no_replica", "stage": -1}, {"t": "no_replica", "stage": False},
        {"t": "no_replica", "stage": 2**40}, {"t": "refused", "code": "x"}, {"t": None}, {"t": ["busy"]},
    ],
)  # fmt: skip
def test_other_bad_replies_are_remote_errors(header: dict[str, Any]) -> None:
    with pytest.raises(RemoteError):
        reply_from_wire(header)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["load", "stage", "loss", "path", "stale", "c_hash"]), NONSENSE),
    st.sampled_from(["accepted", "busy", "no_replica", "progress", "answer", "microbatch", ""]),
)
def test_nonsense_replies_are_remote_errors_or_within_bounds(header: dict[str, Any], kind: str) -> None:
    try:
        reply = reply_from_wire({**header, "t": kind})
    except RemoteError:
        return
    match reply:
        case Accepted(load=load) | Answer(load=load):
            assert 0 <= load.slots <= MAX_SLOTS
            assert 0 <= load.service_s < 86_400
        case NoReplica(stage=stage):
            assert 0 <= stage <= MAX_PATH
        case _:
            raise AssertionError("nothing else can be complete here")
