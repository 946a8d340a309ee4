"""Typed swarm records: they survive the table, and hostile ones are skipped."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import RemoteError
from p2p.event import Event
from p2p.identity import Identity
from p2p.kad.record import Record, Verifier, seal
from p2p.records import (
    OTHERS,
    CandidateRecord,
    Claim,
    ClockRecord,
    LeaseRecord,
    RecordUnreadable,
    StageRecord,
    read_all,
    stage_key,
)

ALICE, BOB = Identity.generate(b"a" * 32), Identity.generate(b"b" * 32)
KEY = stage_key("run", 1)
STAGE = StageRecord(
    addrs=("/ip4/10.0.0.1/tcp/1",),
    phase="active",
    step=7,
    slots=2,
    rate=1.5,
    certificate=b"c",
    disagreement=0.01,
    snapshot_step=5,
)
CLOCK = ClockRecord(samples=3, at=1.5, signature=bytes(64))
LEASE = LeaseRecord(until=5.0, data="ab", claims=(Claim(3, 1, "held", 40, 42, (41, 44), (0, 0, 2, 36)),))
CANDIDATE = CandidateRecord(addrs=(), bandwidth=1e6, weight=0.0, certificate=b"")
ALL: list[StageRecord | ClockRecord | LeaseRecord | CandidateRecord] = [
    STAGE,
    attrs.evolve(STAGE, disagreement=None, snapshot_step=None),
    attrs.evolve(STAGE, generation=2),
    attrs.evolve(STAGE, working=3, round=(4, 0.5, 2, 1e9)),
    CLOCK,
    attrs.evolve(CLOCK, loss=2.5, evaluated=(40, 2.25)),
    LEASE,
    attrs.evolve(CLOCK, others=tuple((f"trainer{n}" + 44 * "x", 1 << 40, bytes(64)) for n in range(OTHERS))),
    CANDIDATE,
]


def through(value: Any, who: Identity = ALICE) -> Record:
    return Verifier().open(seal(who, KEY, who.peer_id, value, seq=1, issued=0.0, ttl=10).wire)


@pytest.mark.parametrize("record", ALL)
def test_records_come_back(record: StageRecord | ClockRecord | LeaseRecord | CandidateRecord) -> None:
    assert type(record).from_value(through(record.to_value()).value) == record
    assert type(record).from_value({**record.to_value(), "later": 1}) == record


NONSENSE: list[Any] = [
    None,
    True,
    -1,
    1 << 60,
    float("nan"),
    float("inf"),
    "x" * 3000,
    b"x" * 3000,
    [1],
    ["a"] * 9,
    {},
]
OPTIONAL = (
    "disagreement",
    "snapshot_step",
    "working",
    "round",
    "loss",
    "evaluated",
    "generation",
    "capacity",
    "moves",
    "others",
)
FINE = {
    ("at", -1),
    ("until", -1),
    *((name, None) for name in OPTIONAL if name not in ("generation", "moves")),
}
FOR_PEOPLE = ("loss", "evaluated", "others")
"""Nonsense here must not make a trainer's count unreadable."""


@pytest.mark.parametrize("record", ALL)
@pytest.mark.parametrize("bad", NONSENSE, ids=lambda bad: repr(bad)[:12])
def test_each_field_is_checked(
    record: StageRecord | ClockRecord | LeaseRecord | CandidateRecord, bad: Any
) -> None:
    for field in record.to_value():
        if field in FOR_PEOPLE:
            assert getattr(type(record).from_value({**record.to_value(), field: bad}), field) in (None, ())
        elif (field, bad) == ("moves", [1]):
            continue  # a list of stages it is
        elif (field, bad if bad in (None, -1) else 0) not in FINE:
            with pytest.raises(RemoteError):
                type(record).from_value({**record.to_value(), field: bad})


def test_missing_fields_are_unreadable() -> None:
    for record in ALL:
        for field in record.to_value():
            if field not in OPTIONAL:
                value = record.to_value()
                del value[field]
                with pytest.raises(RemoteError):
                    type(record).from_value(value)


@pytest.mark.parametrize(
    "claim",
    [
        [0, 0, "held", 0, 0, []], [0, 0, "kept", 0, 0, [], [0] * 4], [0, 0, "held", 4, 4, [4], [0] * 4],
        [0, 0, "held", 4, 4, [], [0, 0, 0, 5]], [0, 0, "held", 4, 4, [], [0, 0, 0]],
        [-1, 0, "held", 4, 4, [], [0] * 4], [0, True, "held", 4, 4, [], [0] * 4],
        [0, 0, "held", 4, 1 << 50, [], [0] * 4], [0, 0, "held", 4, 4, [*range(5, 50)], [0] * 4],
        [0, 0, "held", 4, 4, ["5"], [0] * 4], [0, 0, "held", "4", 4, [], [0] * 4], [1 << 30, *([0] * 6)],
    ],
)  # fmt: skip
def test_a_claim_that_is_none(claim: list[Any]) -> None:
    with pytest.raises(RemoteError):
        LeaseRecord.from_value({**LEASE.to_value(), "claims": [claim]})


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_like)
def test_anything_is_read_or_refused(value: Any) -> None:
    for kind in (StageRecord, ClockRecord, LeaseRecord, CandidateRecord):
        with pytest.raises(RemoteError):
            kind.from_value(value)


def test_one_hostile_writer_hides_nobody() -> None:
    events: list[Event] = []
    found: dict[str, Record] = {
        ALICE.peer_id: through(STAGE.to_value()),
        BOB.peer_id: through({"addrs": 1}, BOB),
    }
    assert read_all(StageRecord, found, emit=events.append) == {ALICE.peer_id: STAGE}
    assert events == [RecordUnreadable(key=KEY, owner=BOB.peer_id)]
