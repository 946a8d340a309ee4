"""The roster: only replicas that the run's authority vouches for, fresh, and never lost to a silent table."""

from __future__ import annotations

import math
from typing import Any, cast

import attrs
import pytest
import trio
import trio.testing

from p2p.errors import RemoteError
from p2p.identity import Identity
from p2p.kad import Dht
from p2p.kad.record import Record, seal
from p2p.membership import Trust, issue
from p2p.records import StageRecord, stage_key
from stage.roster import DECLARE_S, REFRESH_S, Declaration, Roster, StageView

AUTHORITY, TRAINER, STRANGER, ONE, TWO = (Identity.generate(bytes([n]) * 32) for n in range(1, 6))
NOW = 1000.0
TRUST = Trust(
    run="run", manifest_hash=bytes(32), authorities=frozenset({AUTHORITY.peer_id}),
    standing={TRAINER.peer_id: "trainer"},
)  # fmt: skip


def certificate(who: Identity, stage: int = 1, by: Identity = AUTHORITY, **more: Any) -> bytes:
    basic: dict[str, Any] = {
        "run": "run", "account": "x", "peer_id": who.peer_id, "stage": stage, "issued": NOW - 10,
        "expires": NOW + 10,
    }  # fmt: skip
    return issue(by, **(basic | more)).encode()


def described(who: Identity, phase: str = "active", **more: Any) -> StageRecord:
    basic: dict[str, Any] = {
        "addrs": ("/ip4/127.0.0.1/tcp/4001",), "phase": phase, "step": 3, "slots": 2, "rate": 1.0,
        "certificate": more.pop("certificate", None) or certificate(who), "disagreement": None,
        "snapshot_step": None,
    }  # fmt: skip
    return StageRecord(**(basic | more))


class Table:
    """Stands for ``Dht``."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.silent = False
        self.asked = 0
        self.stored: list[tuple[float, dict[str, Any]]] = []

    def put(self, who: Identity, record: StageRecord | dict[str, Any], seq: int = 1) -> None:
        value = record.to_value() if isinstance(record, StageRecord) else record
        key = stage_key("run", 1)
        self.records[who.peer_id] = seal(who, key, who.peer_id, value, seq=seq, issued=NOW, ttl=15.0)

    async def get(self, key: str, *, deadline: float) -> dict[str, Record]:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.silent:
            raise RemoteError("nobody answers")
        return dict(self.records) if key == stage_key("run", 1) else {}

    async def store(self, key: str, subkey: str, value: Any, *, ttl: float, deadline: float) -> int:
        await trio.lowlevel.checkpoint()
        assert (key, subkey) == (stage_key("run", 1), ONE.peer_id)
        self.stored.append((trio.current_time(), value))
        if self.silent:
            raise RemoteError("nobody answers")
        return 1


def view_of(table: Table, stage: int = 1) -> StageView:
    roster = Roster(cast(Dht, table), TRUST, lambda: NOW)
    view = roster.view(stage)
    trio.run(roster.refresh, view)
    return view


def test_replicas_by_phase_with_addresses() -> None:
    table = Table()
    table.put(ONE, described(ONE), seq=7)
    table.put(TWO, described(TWO, phase="syncing"))
    view = view_of(table)
    assert view.serving() == {ONE.peer_id: 7.0}
    assert set(view.in_phase("syncing", "active")) == {ONE.peer_id, TWO.peer_id}
    assert [str(addr) for addr in view.addrs(ONE.peer_id)] == ["/ip4/127.0.0.1/tcp/4001"]
    assert view.addrs(STRANGER.peer_id) == []


@pytest.mark.parametrize(
    "record",
    [
        described(TWO, certificate=certificate(TWO, by=STRANGER)),
        described(TWO, certificate=certificate(ONE)),
        described(TWO, certificate=certificate(TWO, stage=2)),
        described(TWO, certificate=certificate(TWO, run="another")),
        described(TWO, certificate=certificate(TWO, expires=NOW - 1)),
        described(TWO, certificate=certificate(TWO, role="seed")),
        described(TWO, certificate=b"x"),
        described(TWO, addrs=("/ip4/127.0.0.1/nonsense/1",)),
        described(TWO, addrs=("\0",)),
        {"phase": "active"},
        described(TWO).to_value() | {"slots": -1},
        described(TWO).to_value() | {"disagreement": math.nan},
    ],
)
def test_one_bad_record_is_left_out_and_the_others_stay(record: Any) -> None:
    table = Table()
    table.put(ONE, described(ONE))
    table.put(TWO, record)
    assert set(view_of(table).entries) == {ONE.peer_id}


def test_a_trainer_is_no_replica() -> None:
    table = Table()
    table.put(TRAINER, described(TRAINER))
    assert view_of(table).entries == {}


def test_views_follow_the_table_wake_who_waits_and_outlast_its_silence() -> None:
    table, woken = Table(), list[float]()

    async def main() -> None:
        roster = Roster(cast(Dht, table), TRUST, lambda: NOW)
        view = roster.view(1)
        assert roster.view(1) is view

        async def wait() -> None:
            while True:
                await view.wait_changed()
                woken.append(trio.current_time() - began)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(roster.run)
            await trio.sleep(1)
            assert view.serving() == {}
            table.put(ONE, described(ONE))
            await trio.sleep(REFRESH_S)
            assert set(view.serving()) == {ONE.peer_id}
            table.silent = True
            await trio.sleep(3 * REFRESH_S)
            assert set(view.serving()) == {ONE.peer_id}
            table.silent = False
            table.records.clear()
            await trio.sleep(REFRESH_S)
            assert view.serving() == {}
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert woken == pytest.approx([REFRESH_S, 5 * REFRESH_S])


def test_a_declaration_is_repeated_and_a_change_is_told_at_once() -> None:
    table, record = Table(), described(ONE, phase="syncing")

    async def main() -> None:
        nonlocal record
        declaration = Declaration(cast(Dht, table), "run", 1, ONE.peer_id, lambda: record)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(declaration.run)
            await trio.sleep(DECLARE_S + 1)
            record = attrs.evolve(record, phase="active")
            declaration.changed()
            await trio.sleep(1)
            table.silent = True  # a table that does not answer is asked again, not given up
            await trio.sleep(DECLARE_S)
            table.silent = False
            nursery.cancel_scope.cancel()
        await declaration.withdraw()
        told = [(at - began, value["phase"]) for at, value in table.stored]
        assert told == [
            (0.0, "syncing"), (DECLARE_S, "syncing"), (DECLARE_S + 1, "active"),
            (2 * DECLARE_S + 1, "active"),
            (2 * DECLARE_S + 2, "leaving"),
        ]  # fmt: skip

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
