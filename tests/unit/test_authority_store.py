"""The authority's memory on SQLite, and on a real PostgreSQL where there is one: the same from both."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agorad.authority.books import Books, Execute
from agorad.authority.ledger import Credit, StoredReceipt
from agorad.authority.queue import Place
from agorad.authority.schema import STEPS
from agorad.authority.store import Grant, Store
from p2p.errors import LocalError, Refused
from tests.system import postgres
from tests.unit import test_receipts as work

Open = Callable[[], Store]


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server | None]:
    if postgres.programs() is None:
        yield None
        return
    with postgres.server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, server: postgres.Server | None, tmp_path: Path) -> Iterator[Open]:
    if request.param == "postgresql" and server is None:
        pytest.skip(postgres.WHY_NOT)
    where: Path | str = tmp_path / "authority.sqlite"
    if request.param == "postgresql":
        import psycopg

        assert server is not None
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute("DROP SCHEMA public CASCADE")
            admin.execute("CREATE SCHEMA public")
        where = server.url
    stores: list[Store] = []

    def make() -> Store:
        stores.append(Store(where))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def grant(peer: str, account: str = "alice", *, stage: int = 0, issued: float = 0.0) -> Grant:
    return Grant(
        peer_id=peer, account=account, stage=stage, session=b"s" * 16, addrs=("/ip4/192.0.2.1/tcp/1",),
        issued=issued, expires=issued + 100.0,
    )  # fmt: skip


def put(
    store: Store, peer: str, account: str = "alice", nodes: int = 100, each: int = 100, now: float = 0.0
) -> str:
    try:
        store.grant(grant(peer, account, issued=now), max_nodes=nodes, max_per_account=each, now=now)
    except Refused as refused:
        return refused.code
    return "granted"


def test_a_grant_is_remembered_by_the_next_life(opened: Open) -> None:
    store = opened()
    assert store.grant_of("a") is None
    assert put(store, "a") == "granted"
    store.close()
    again = opened()
    assert again.grant_of("a") == grant("a")
    assert [found.peer_id for found in again.active(99.0)] == ["a"]
    assert again.active(101.0) == []


def test_room_and_binding(opened: Open) -> None:
    store = opened()
    assert put(store, "a", each=2) == "granted"
    assert put(store, "a", "bob") == "identity_bound"
    assert put(store, "b", each=2) == "granted"
    assert put(store, "c", each=2) == "account_full"
    assert put(store, "c", "bob", nodes=2) == "full"
    assert put(store, "a", nodes=2, each=2, now=50.0) == "granted", "a renewal needs no room of its own"
    store.released("a", 60.0)
    assert put(store, "c", "bob", nodes=2, now=60.0) == "granted", "its slot in the run is free"
    assert store.peers_of("alice", 60.0) == {"a", "b"}, "but its account's is not, yet"
    assert put(store, "d", each=2, now=60.0) == "account_full"


def test_bans_settings_places_and_the_log_of_it(opened: Open) -> None:
    store = opened()
    store.ban("account", "alice", "noise", 50.0, "root", 1.0)
    store.ban("peer", "p", "worse", None, "root", 2.0)
    store.ban("account", "alice", "more noise", 60.0, "root", 3.0)
    banned = store.banned("alice", "x", 10.0)
    assert banned is not None
    assert (banned.why, banned.until) == ("more noise", 60.0)
    assert store.banned("alice", "x", 61.0) is None
    assert [ban.name for ban in store.bans(10.0)] == ["alice", "p"]
    assert store.unban("peer", "p", "root", 4.0)
    assert not store.unban("peer", "p", "root", 5.0)
    assert store.setting("max_nodes") is None
    store.set_setting("max_nodes", "7", "root", 6.0)
    store.set_setting("max_nodes", "8", "root", 7.0)
    assert store.setting("max_nodes") == "8"
    assert [(entry.at, entry.what) for entry in store.audit_log(3)] == [
        (7.0, "max_nodes"), (6.0, "max_nodes"), (4.0, "unban"),
    ]  # fmt: skip
    store.place("p", "alice", 1.0, 2.0)
    store.place("p", "alice", 1.0, 3.0)
    store.place("q", "bob", 2.0, 2.0)
    store.drop_place("q")
    assert store.places() == [Place("p", "alice", 1.0, 3.0)]


def test_authorities_on_one_database_keep_one_pace(opened: Open) -> None:
    one, other = opened(), opened()
    assert one.last_entered(0.0) == -math.inf

    def enter(store: Store, peer: str, now: float, pace_s: float = 10.0) -> str:
        try:
            store.grant(
                grant(peer, issued=now), max_nodes=9, max_per_account=9, now=now,
                entering=True, pace_s=pace_s,
            )  # fmt: skip
        except Refused as refused:
            return f"{refused.code} {refused.retry_after or 0:g}"
        return "granted"

    assert enter(one, "a", 100.0) == "granted"
    assert enter(other, "b", 104.0) == "busy 6"
    assert put(other, "a", now=105.0) == "granted", "a renewal has no pace"
    assert (one.last_entered(106.0), one.last_entered(99.0)) == (100.0, 99.0)
    assert enter(other, "b", 110.0) == "granted"
    assert enter(one, "c", 111.0) == "busy 9"
    assert enter(one, "c", 111.0, pace_s=0.0) == "granted"


def receipt(ticket: str, *credits: tuple[str, int]) -> StoredReceipt:
    return StoredReceipt(
        ticket=ticket, at=5.0, packed=ticket.encode(),
        credits=tuple(Credit(peer_id=peer, account="alice", mflop=mflop) for peer, mflop in credits),
    )  # fmt: skip


def test_a_ticket_is_credited_once(opened: Open) -> None:
    store = opened()
    put(store, "a")
    put(store, "b")
    big = 1 << 50
    assert store.books.add_receipts([receipt("t1", ("a", big), ("b", 2)), receipt("t2", ("a", 1))], 6.0) == {
        "t1", "t2",
    }  # fmt: skip
    assert store.books.add_receipts([receipt("t2", ("a", 1)), receipt("t3", ("b", 5))], 7.0) == {"t3"}
    found = {balance.peer_id: balance.compute for balance in store.books.balances()}
    assert found == {"a": big + 1, "b": 7}
    assert store.books.add_presence([("a", 1000.0)], gap_s=90.0) == 0
    assert store.books.add_presence([("a", 1060.0), ("stranger", 1060.0)], gap_s=90.0) > 0
    assert store.books.add_presence([("a", 1060.0)], gap_s=90.0) == 0
    assert store.books.held("a", 0, 50.0, 0.0) == "alice"
    assert store.books.held("a", 1, 50.0, 0.0) is None


def test_authorities_on_one_database_give_no_place_twice(opened: Open) -> None:
    stores = [opened() for _ in range(3)]
    outcomes: list[str] = []

    def rush(store: Store, number: int) -> None:
        for turn in range(20):
            outcomes.append(put(store, f"{number}-{turn}", f"account-{turn % 5}", nodes=17, each=4))

    threads = [threading.Thread(target=rush, args=(store, number)) for number, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    active = stores[0].active(0.0)
    assert outcomes.count("granted") == len(active) == 17
    assert set(outcomes) <= {"granted", "full", "account_full"}
    assert max(len(stores[0].peers_of(f"account-{n}", 0.0)) for n in range(5)) <= 4


def test_receipts_from_two_authorities_at_once(opened: Open) -> None:
    stores = [opened() for _ in range(2)]
    put(stores[0], "a")
    new: list[set[str]] = []

    def submit(store: Store) -> None:
        for batch in range(10):
            batch_of = [receipt(f"t{batch}-{n}", ("a", 1)) for n in range(20)]
            new.append(store.books.add_receipts(batch_of, 6.0))

    threads = [threading.Thread(target=submit, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(map(len, new)) == len(set().union(*new)) == 200
    balance = stores[0].books.balance("a")
    assert balance is not None
    assert balance.compute == 200


def test_a_recomputation_sees_one_moment_however_much_is_credited_meanwhile(opened: Open) -> None:
    reader, writer = opened(), opened()
    issued = work.NOW - 50.0
    for stage, worker in enumerate(work.WORKERS):
        writer.grant(
            grant(worker.peer_id, stage=stage, issued=issued), max_nodes=9, max_per_account=9, now=issued
        )
    credited = 0

    def credit() -> None:
        nonlocal credited
        receipts = [work.receipt(work.ticket(credited + number)) for number in range(3)]
        holder = writer.books.holder({worker.peer_id for worker in work.WORKERS}, 0.0)
        stored = [work.RULES.credit(true, true.encode(), holder) for true in receipts]
        assert len(writer.books.add_receipts(stored, work.NOW)) == 3
        credited += 3

    @contextmanager
    def disturbed(*, snapshot: bool = False) -> Iterator[Execute]:
        """Something is credited after every statement."""
        with reader.books.transact(snapshot=snapshot) as execute:

            def then_credit(statement: str, values: Any) -> Any:
                rows = execute(statement, values)
                credit()
                return rows

            yield then_credit

    credit()
    found = Books(disturbed).recompute(work.RULES)
    assert (found.receipts, found.troubles) == (3, ())
    assert credited >= 15
    after = reader.books.recompute(work.RULES)
    assert (after.receipts, after.troubles) == (credited, ())


@pytest.mark.parametrize("version", range(1, len(STEPS)))
def test_files_of_earlier_versions_are_taken_up(tmp_path: Path, version: int) -> None:
    path = tmp_path / "authority.sqlite"
    with sqlite3.connect(path) as old:
        for step in STEPS[:version]:
            old.executescript(step)
        old.execute(f"PRAGMA user_version={version}")
        old.execute(
            "INSERT INTO grants (peer_id, account, stage, first_granted, issued, expires) "
            "VALUES ('a', 'alice', 1, 5.0, 6.0, 100.0)"
        )
    store = Store(path)
    found = store.grant_of("a")
    store.close()
    assert found is not None
    assert (found.account, found.stage, found.addrs, found.left) == ("alice", 1, (), False)


def test_what_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    newer = tmp_path / "newer.sqlite"
    sqlite3.connect(newer).execute("PRAGMA user_version=999").close()
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"no database " * 1000)
    for where, words in (
        (newer, "newer agorad"),
        (damaged, "not a database"),
        (tmp_path / "none" / "x.sqlite", "unable to open"),
        ("mysql://root@host/name", "not supported"),
        ("not a url", "no URL"),
        ("postgresql://me:geheim@127.0.0.1:9/name", "cannot use"),
        ("postgresql://me@127.0.0.1:9/name?password=geheim", "cannot use"),
        ("postgresql://me@127.0.0.1:9/name?sslpassword=geheim", "cannot use"),
        ("postgresql://me:ge@geheim@127.0.0.1:9/name", "%40|cannot use"),
        ("postgresql://me:geheim@127.0.0.1:port/name", "no URL"),
        ("postgresql://me:geheim@[::1/name", "no URL"),
        ("sqlite://", "name a file"),
    ):
        with pytest.raises(LocalError, match=words) as error:
            Store(where)
        assert "\n" not in str(error.value)
        assert "geheim" not in str(error.value)


def test_a_database_that_goes_away_is_unavailable_and_comes_back(server: postgres.Server | None) -> None:
    if server is None:
        pytest.skip(postgres.WHY_NOT)
    store = Store(server.url)
    put(store, "before")
    server.stop()
    with pytest.raises(Refused) as refused:
        store.grant_of("before")
    assert refused.value.code == "unavailable"
    server.start()
    assert store.grant_of("before") is not None
    store.close()
