"""Who should move by what the roster says; what an authority lets happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agorad.authority.store import Store
from agorad.moving import Capacity, proposed
from p2p.errors import RemoteError
from p2p.identity import PeerId
from p2p.records import StageRecord
from stage.roster import Entry, StageView

WORK = [1.0, 1.0, 1.0]
PARAMS = [1000, 1000, 1000]


def record(**more: Any) -> StageRecord:
    basic: dict[str, Any] = {
        "addrs": (), "phase": "active", "step": 5, "slots": 4, "rate": 1.0, "certificate": b"c",
        "capacity": 2.0, "moves": (0, 1, 2),
    }  # fmt: skip
    return StageRecord(**(basic | more))


def roster(*stages: list[StageRecord]) -> list[StageView]:
    views = []
    for stage, records in enumerate(stages):
        view = StageView(stage)
        peers = [PeerId(f"s{stage}r{index}") for index in range(len(records))]
        view.replace({peer: Entry(peer, said, [], 1.0) for peer, said in zip(peers, records, strict=True)})
        views.append(view)
    return views


def test_the_first_of_the_largest_stage_goes_to_the_smallest() -> None:
    move = proposed(roster([record()] * 4, [record()], [record()]), WORK, PARAMS)
    assert move is not None
    assert (move.peer, move.origin, move.target, move.gain) == ("s0r0", 0, 1, 1.0)


def test_who_is_on_its_way_in_counts_and_does_not_move() -> None:
    coming = record(phase="syncing", capacity=None, moves=())
    assert proposed(roster([record()] * 3, [record(), coming], [record()] * 2), WORK, PARAMS) is None
    move = proposed(roster([coming, record(), record(), record()], [record()], [record()]), WORK, PARAMS)
    assert move is not None
    assert move.peer == "s0r1"


@pytest.mark.parametrize("changes", [{"moves": ()}, {"moves": (0, 2)}, {"phase": "paused"}])
def test_who_does_not_want_to_or_cannot_is_passed_over(changes: dict[str, Any]) -> None:
    others = [record(**changes)] * 3
    move = proposed(roster([*others, record()], [record()], [record()] * 4), WORK, PARAMS)
    assert move is None or move.peer == "s0r3" or move.origin == 2


def test_nobody_moves_before_every_stage_has_been_measured_or_to_one_without_a_state() -> None:
    fresh = record(capacity=None)
    assert proposed(roster([record()] * 4, [fresh], [record()]), WORK, PARAMS) is None
    syncing = record(phase="syncing")
    assert proposed(roster([record()] * 4, [syncing], [record()] * 4), WORK, PARAMS) is None


def test_a_boast_counts_no_more_than_four_times_the_usual() -> None:
    boast = record(capacity=1e6)
    move = proposed(roster([record()] * 4, [boast], [record()] * 4), WORK, PARAMS)
    assert move is None  # 4, 4 and 4 as far as anybody believes


def test_a_capacity_is_of_the_time_that_was_computed() -> None:
    capacity = Capacity()
    assert capacity.samples_a_second(0.0, 0) is None
    assert capacity.samples_a_second(1.0, 4) is None
    assert capacity.samples_a_second(5.0, 20) == pytest.approx(4.0)
    for look in range(40):
        said = capacity.samples_a_second(5.0 + look, 20 + 2 * look)
    assert said == pytest.approx(2.0)


def test_a_record_carries_both_and_bounds_them() -> None:
    value = record().to_value()
    assert StageRecord.from_value(value) == record()
    del value["capacity"], value["moves"]
    assert StageRecord.from_value(value) == record(capacity=None, moves=())
    for wrong in ({"moves": [-1]}, {"moves": "12"}, {"moves": [0] * 300}, {"capacity": -1.0}):
        with pytest.raises(RemoteError):
            StageRecord.from_value(record().to_value() | wrong)


def test_one_node_at_a_time_whoever_asks(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "a.sqlite"), Store(tmp_path / "a.sqlite")
    try:
        assert store.claim_move(1000.0, 120.0) == 0
        assert other.claim_move(1030.0, 120.0) == pytest.approx(90.0)
        assert other.claim_move(1121.0, 120.0) == 0
        assert store.claim_move(1122.0, 120.0) == pytest.approx(119.0)
        assert store.claim_move(500.0, 120.0) == pytest.approx(120.0)  # a clock that went back
    finally:
        store.close()
        other.close()
