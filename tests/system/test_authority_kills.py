"""The whole authority under kill -9 at random moments, while strangers come, wait, renew and leave, and a
trainer hands in receipts, all over real connections.

Whatever was answered before a death has to be in the database after it: certificates, leavings, places in the
queue, receipts. Room in the run and in accounts holds at every moment, and no receipt is credited twice.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import msgpack
import pytest
import tomli_w
import trio

from agorad import run
from agorad.authority import accounts, leaderboard
from agorad.authority.ledger import Rules
from agorad.authority.messages import (
    PROTOCOL,
    Checking,
    Facts,
    Granted,
    Join,
    Leave,
    Queued,
    Renew,
    read_answer,
)
from agorad.authority.store import Store
from agorad.run import Admission, Manifest, NodeRef, RunInfo
from p2p.errors import P2PError, Refused
from p2p.host import Host
from p2p.identity import Identity
from p2p.membership import Certificate, Membership
from stage.config import ModelConfig, TrainingConfig
from stage.receipts import Receipt, sign
from stage.ticket import Ticket
from tests.system import postgres

EACH = 3
"""Strangers of an account; fewer may be in."""
MOST_EACH = 2
BATCH = 16
KILLS = 50
LIFE_S = 30.0
"""A life lasts for so long at most."""
MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1))


@attrs.define(eq=False)
class Stranger:
    """Somebody who comes and goes, and what the authority has answered."""

    account: str
    secret: str
    rng: random.Random
    identity: Identity = attrs.field(factory=Identity.generate)
    certificate: Certificate | None = None
    """The last one that came."""
    asking: bool = False
    """Something was asked since and not answered: it may have been done or not."""
    leaving: bool = False
    """It said that it leaves."""
    left: bool = False
    """And was answered."""
    queued: bool = False
    """It was told its place, on a stream that is open."""
    granted: int = 0
    refused: Counter[str] = attrs.field(factory=Counter)

    @property
    def inside(self) -> bool:
        return self.certificate is not None and not self.leaving

    async def live(self, town: Town) -> None:
        host = town.host(self.identity)
        async with host.run([]):
            while True:
                await trio.sleep(self.rng.uniform(0.0, 0.6))
                try:
                    with trio.move_on_after(self._patience_s()):
                        await self._act(host, town)
                except Refused as no:
                    self.refused[no.code] += 1
                    await trio.sleep(self.rng.uniform(0.0, 2.0))
                except P2PError:
                    pass  # it is dead at present
                finally:
                    self.queued = False

    def _patience_s(self) -> float:
        """Some lose the line, at any point; others wait."""
        return self.rng.uniform(0.5, 10.0) if self.rng.random() < 0.3 else 60.0

    async def _act(self, host: Host, town: Town) -> None:
        if not self.inside:
            facts = Facts(clock=time.time())
            await self._ask(host, town, Join(
                account=self.account, secret=self.secret, session=bytes(16), facts=facts,
            ).to_header())  # fmt: skip
        elif self.rng.random() < 0.5:
            renew = Renew(session=bytes(16), addrs=(), software="0.1.0")
            await self._ask(host, town, renew.to_header())
        else:
            await self._leave(host, town)

    async def _ask(self, host: Host, town: Town, header: dict[str, Any]) -> None:
        async with await host.call(town.authority.peer_id, PROTOCOL, deadline=20.0) as call:
            self.asking = True
            await call.send(header)
            while True:
                answer = read_answer((await call.receive()).header)
                if isinstance(answer, Granted):
                    self.certificate = Certificate.decode(answer.certificate)
                    self.asking = self.leaving = self.left = self.queued = False
                    self.granted += 1
                    return
                assert isinstance(answer, Queued | Checking)
                self.queued = isinstance(answer, Queued)

    async def _leave(self, host: Host, town: Town) -> None:
        async with await host.call(town.authority.peer_id, PROTOCOL, deadline=20.0) as call:
            self.leaving = True
            await call.send(Leave(session=bytes(16)).to_header())
            await call.receive()
            self.left = True

    def check(self, store: Store) -> None:
        """What was answered is known."""
        grant, own = store.grant_of(self.identity.peer_id), self.certificate
        if own is None:
            assert grant is None or self.asking, "a grant that nobody asked for"
            return
        assert grant is not None, f"a certificate that the authority knows nothing of: {own}"
        assert grant.account == own.account == self.account
        assert grant.issued >= own.issued, "the newest certificate is not known"
        if grant.issued > own.issued:
            assert self.asking, "a newer grant that nobody asked for"
            return
        assert (grant.stage, grant.expires) == (own.stage, own.expires)
        assert not grant.left or self.leaving
        assert grant.left or not self.left, "a leaving that was answered is forgotten"


@attrs.define(eq=False)
class Town:
    """A run with one authority, its strangers, and a trainer."""

    folder: Path
    manifest: Manifest
    authority: Identity
    trainer: Identity
    strangers: list[Stranger]
    database: str
    acknowledged: list[str] = attrs.field(factory=list)
    doubtful: int = 0
    """Batches whose answer was lost although they had been credited."""

    def host(self, identity: Identity) -> Host:
        host = Host(identity)
        host.membership = Membership(self.manifest.trust(), lambda: None, time.time)
        host.learn(self.authority.peer_id, self.manifest.authorities[0].multiaddrs())
        return host

    def store(self) -> Store:
        return Store(self.database or self.folder / "authority" / "authority.sqlite")

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "out").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "agorad.main", "--config", str(self.folder / "agorad.toml")],
                stdout=out, stderr=out,
            )  # fmt: skip

    async def train(self, stop: trio.Event) -> None:
        """Hand in receipts until told to stop and the last batch was answered."""
        host, position = self.host(self.trainer), 0
        async with host.run([]):
            while not stop.is_set():
                workers = self._pipeline()
                if workers:
                    receipts = [self._receipt(position + n, workers) for n in range(BATCH)]
                    position += BATCH
                    await self._hand_in(host, receipts)
                else:
                    await trio.sleep(0.05)

    async def _hand_in(self, host: Host, receipts: list[Receipt]) -> None:
        packed, before = [receipt.encode() for receipt in receipts], False
        while True:
            try:
                with trio.fail_after(20.0):
                    credited = await self._submit(host, packed)
            except (P2PError, trio.TooSlowError):
                before = True  # it may have arrived
                await trio.sleep(0.05)
                continue
            assert credited.refused == (), "a certificate that the authority does not remember"
            assert (credited.new, credited.known) in ((BATCH, 0), (0, BATCH)), "half a batch"
            assert before or credited.new == BATCH, "it was there before it was handed in"
            self.doubtful += credited.known > 0
            self.acknowledged += [receipt.ticket.id for receipt in receipts]
            return

    async def _submit(self, host: Host, packed: list[bytes]) -> leaderboard.Credited:
        points = leaderboard.PROTOCOL
        async with await host.call(self.authority.peer_id, points, deadline=15.0) as call:
            await call.send({"t": "submit", "count": len(packed)})
            await call.send({"t": "receipts"}, msgpack.packb(packed))
            return leaderboard.Credited.from_header((await call.receive()).header)

    @property
    def answers(self) -> int:
        """So many were given so far."""
        return sum(stranger.granted for stranger in self.strangers) + len(self.acknowledged) // BATCH

    async def some_life(self, rng: random.Random) -> None:
        """Some time of an authority that was just started: from none to that of many answers."""
        until, patience = self.answers + rng.randrange(len(self.strangers)), time.monotonic() + LIFE_S
        if rng.random() < 0.2:
            await trio.sleep(rng.uniform(0.0, 2.0))  # it is hardly born
            return
        while self.answers < until and time.monotonic() < patience:  # noqa: ASYNC110
            await trio.sleep(0.01)
        await trio.sleep(rng.uniform(0.0, 0.1))

    def _pipeline(self) -> list[Stranger]:
        """One holder of a certificate a stage, or nobody."""
        found = []
        for stage in range(MODEL.stages):
            holders = [
                s for s in self.strangers if s.certificate is not None and s.certificate.stage == stage
            ]
            found += random.sample(holders, min(1, len(holders)))
        return found if len(found) == MODEL.stages else []

    def _receipt(self, position: int, workers: list[Stranger]) -> Receipt:
        key = self.trainer
        ticket = Ticket(
            run=self.manifest.run.id, trainer=key.peer_id, kind="train", shard=0, position=position,
            ids_hash=bytes(32), weight=1.0,
        ).signed_by(key)  # fmt: skip
        callers = [key.peer_id, *(worker.identity.peer_id for worker in workers)]
        signed = [
            sign(worker.identity, ticket, stage, callers[stage]) for stage, worker in enumerate(workers)
        ]
        return Receipt(
            ticket=ticket, at=time.time(), peers=tuple(callers[1:]), statements=tuple(signed)
        ).signed_by(key)

    def check(self, waited: list[Stranger]) -> None:
        """The database of a dead authority. ``waited``: who had a place when it died."""
        store = self.store()
        try:
            now = time.time()
            active = store.active(now)
            capacity = self.manifest.admission.max_nodes
            assert len(active) <= capacity
            assert sum(stranger.inside for stranger in self.strangers) <= capacity
            for account in {stranger.account for stranger in self.strangers}:
                assert len(store.peers_of(account, now)) <= MOST_EACH
            for stranger in self.strangers:
                stranger.check(store)
            places = {place.peer for place in store.places()} | {grant.peer_id for grant in active}
            assert {stranger.identity.peer_id for stranger in waited} <= places, "a lost place"
            credited = {row[0] for row in self._rows(store, "SELECT ticket FROM receipts")}
            assert credited >= set(self.acknowledged), "a lost receipt"
        finally:
            store.close()

    def check_books(self) -> None:
        """At the end: each receipt once, and what was credited is what they are worth."""
        store = self.store()
        try:
            audit = store.books.recompute(Rules.of(self.manifest))
            assert audit.troubles == ()
            assert audit.receipts == len(self.acknowledged) == len(set(self.acknowledged))
            ((rows,),) = self._rows(store, "SELECT SUM(receipts) FROM ledger WHERE kind = 'compute'")
            assert int(rows) == MODEL.stages * len(self.acknowledged)
        finally:
            store.close()

    def _rows(self, store: Store, query: str) -> Any:
        with store._db.transaction(snapshot=True) as execute:
            return execute(query, {})


def found(folder: Path, database: str, rng: random.Random, size: int = 20) -> Town:
    """A run for so many accounts."""
    operator, key, trainer = (Identity.generate() for _ in range(3))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    addr = f"/ip4/127.0.0.1/tcp/{port}"
    manifest = Manifest(
        run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
        authorities=(NodeRef(peer_id=key.peer_id, addrs=(addr,)),),
        trainers=(NodeRef(peer_id=trainer.peer_id),),
        model=MODEL,
        training=TrainingConfig(seed=1),
        # Strangers here serve nobody: there is nothing to dial back.
        admission=Admission(
            max_nodes=size * 6 // 5, max_nodes_per_account=MOST_EACH, port_test=False, max_rtt_ms=0.0
        ),
    ).signed(operator)
    run.save(manifest, folder / "run.toml")
    (folder / "authority").mkdir()
    key.save(folder / "authority" / "identity.key")
    secrets = [accounts.add(folder / "accounts.toml", f"user-{n}") for n in range(size)]
    strangers = [
        Stranger(f"user-{n}", secrets[n], random.Random(rng.random()))
        for n in range(size)
        for _ in range(EACH)
    ]
    table = {
        "node": {"role": "authority", "run": "run.toml", "state": "authority", "listen": [addr]},
        "authority": {"accounts": "accounts.toml", "database": database},
    }
    (folder / "agorad.toml").write_text(tomli_w.dumps(table))
    return Town(folder, manifest, key, trainer, strangers, database)


def survive(town: Town, kills: int, rng: random.Random) -> None:
    """Kill the authority so many times, look at what is left each time, let the last life end in order."""

    async def main() -> None:
        stop = trio.Event()
        async with trio.open_nursery() as nursery, trio.open_nursery() as training:
            for stranger in town.strangers:
                nursery.start_soon(stranger.live, town)
            training.start_soon(town.train, stop)
            for _life in range(kills):
                process = town.start()
                try:
                    await town.some_life(rng)
                    assert process.poll() is None, (town.folder / "out").read_text()[-2000:]
                finally:
                    os.kill(process.pid, signal.SIGKILL)
                waited = [stranger for stranger in town.strangers if stranger.queued]
                process.wait()
                await trio.sleep(0.05)  # what it had sent is read
                await trio.to_thread.run_sync(town.check, waited)
            process = town.start()
            try:
                enough = len(town.acknowledged) + BATCH
                with trio.fail_after(60):
                    while len(town.acknowledged) < enough:  # noqa: ASYNC110
                        await trio.sleep(0.1)
                stop.set()
                with trio.fail_after(60):
                    while training.child_tasks:  # noqa: ASYNC110
                        await trio.sleep(0.1)
                nursery.cancel_scope.cancel()
                process.send_signal(signal.SIGTERM)
                with trio.CancelScope(shield=True):
                    assert await trio.to_thread.run_sync(process.wait, 30) == 0
            finally:
                process.kill()
                process.wait()

    trio.run(main)
    town.check([])
    town.check_books()
    granted = sum(stranger.granted for stranger in town.strangers)
    refused = sum((stranger.refused for stranger in town.strangers), Counter())
    print(
        f"{kills} kills: {granted} certificates, {len(town.acknowledged)} receipts, "
        f"{town.doubtful} batches credited whose answer was lost; refusals: {dict(refused)}"
    )
    assert granted >= kills
    assert town.acknowledged
    assert set(refused) <= {"account_full", "busy", "unavailable", "unknown_peer"}, refused


def test_killed_on_sqlite_a_few_times(tmp_path: Path) -> None:
    rng = random.Random(3)
    survive(found(tmp_path, "", rng, size=4), 3, rng)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_killed_on_sqlite(tmp_path: Path) -> None:
    rng = random.Random(KILLS)
    survive(found(tmp_path, "", rng), KILLS, rng)


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.skipif(postgres.programs() is None, reason=postgres.WHY_NOT)
def test_killed_on_postgresql(tmp_path: Path) -> None:
    rng = random.Random(7)
    with postgres.server() as server:
        survive(found(tmp_path, server.url, rng), KILLS, rng)
