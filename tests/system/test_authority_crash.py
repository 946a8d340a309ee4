"""An authority's memory under kill -9: nothing that was acknowledged is lost, and nothing is there twice.

A writer grants and credits as fast as it can and says each thing on its standard output only after the store
said it is done; it is killed at random moments and started again on the same database.
``test_authority_kills`` does the same to the whole daemon.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agorad.authority.store import Store
from tests.system import postgres

WRITER = """
import sys
from agorad.authority.ledger import Credit, StoredReceipt
from agorad.authority.store import Grant, Store
where, life = sys.argv[1], int(sys.argv[2])
from pathlib import Path
store = Store(where if '://' in where else Path(where))
for turn in range(100000):
    name = f'{life}-{turn}'
    store.grant(Grant(peer_id=name, account='alice', stage=0, issued=0.0, expires=1e9),
                max_nodes=10**9, max_per_account=10**9, now=0.0)
    print('grant', name, flush=True)
    tickets = [f't{name}-{n}' for n in range(4)]
    credit = (Credit(account='alice', peer_id=name, mflop=7),)
    store.books.add_receipts(
        [StoredReceipt(ticket=t, at=1.0, packed=t.encode(), credits=credit) for t in tickets], 1.0)
    print('credit', name, flush=True)
"""
KILLS = 50


def lives(where: str, rng: random.Random, kills: int, first: int = 0) -> dict[str, set[str]]:
    """What was acknowledged before each of so many violent ends."""
    said: dict[str, set[str]] = {"grant": set(), "credit": set()}
    for life in range(first, first + kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, where, str(life)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert writer.stdout is not None
        line = writer.stdout.readline()  # it is at work: from here on every moment is as good as another
        assert line, writer.communicate()[1].decode()
        time.sleep(rng.uniform(0.0, 0.15))
        writer.kill()
        rest, _err = writer.communicate()
        for word in [line, *rest.splitlines()]:
            parts = word.decode().split()
            if len(parts) == 2 and word.count(b"-") == 1:
                said[parts[0]].add(parts[1])
    return said


def check(where: str, said: dict[str, set[str]]) -> None:
    store = Store(where if "://" in where else Path(where))
    granted = {grant.peer_id for grant in store.active(1.0)}
    assert said["grant"] <= granted
    balances = {balance.peer_id: balance.compute for balance in store.books.balances()}
    assert {name for name, compute in balances.items() if compute} >= said["credit"]
    assert set(balances.values()) <= {0, 28}, "a batch is credited as a whole and once"
    with store._db.transaction() as execute:
        ((receipts,),) = execute("SELECT count(*) FROM receipts", {})
        ((ledger,),) = execute("SELECT COALESCE(SUM(mflop), 0) FROM ledger", {})
    assert int(ledger) == sum(balances.values()) == 7 * int(receipts)
    store.close()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_sqlite_survives_its_writer(tmp_path: Path) -> None:
    where = str(tmp_path / "authority.sqlite")
    said = lives(where, random.Random(KILLS), KILLS)
    assert len(said["grant"]) >= KILLS
    check(where, said)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(postgres.programs() is None, reason=postgres.WHY_NOT)
def test_postgresql_survives_its_writer_and_its_own_end() -> None:
    with postgres.server() as server:
        rng = random.Random(7)
        said = lives(server.url, rng, KILLS)
        check(server.url, said)
        for life in range(KILLS, KILLS + 3):
            server.stop(signal.SIGKILL)
            server.start()
            more = lives(server.url, rng, 1, life)
            said = {kind: said[kind] | more[kind] for kind in said}
        check(server.url, said)
