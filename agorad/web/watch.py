"""Looks at the run for the page: roster and clock from the hash table, the rest from this authority's tables.

While somebody reads, every ``WATCHED_S``; else every ``QUIET_S``, for the curves alone. Each look makes new
``Facts``, which nothing changes any more: they are rendered in another thread. Whoever is missing from the
roster for ``GONE_S`` has gone: one answer of the hash table may lack somebody. What the database is asked
comes every ``BOOKS_S`` at most. The history is kept in the state folder every ``KEEP_S``, and at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from agorad.authority.issue import Capacity
from agorad.authority.leaderboard import Row, rank
from agorad.authority.ledger import pflop
from agorad.clockwatch import READ_S
from agorad.web.facts import SERVING, Door, Earned, Facts, Replica, Trainer, Waiting
from agorad.web.history import Change, History, Moment, Round, read
from p2p.errors import P2PError, RemoteError
from p2p.files import write_whole
from p2p.membership import Certificate
from p2p.records import ClockRecord, clock_key, read_all
from stage.clock import Reading, StepClock
from stage.roster import Entry, Roster

if TYPE_CHECKING:
    from agorad.authority.desk import Desk
    from agorad.authority.store import Store
    from agorad.node import Node

WATCHED_S: Final = 2.0
QUIET_S: Final = 10.0
READERS_STAY_S: Final = 30.0
"""So long after the last request somebody is taken to be reading."""
GONE_S: Final = 8.0
BOOKS_S: Final = 5.0
KEEP_S: Final = 60.0
KEPT_LIMIT: Final = 1 << 20
FILE: Final = "page-history.json"


class Watch:
    """See the module's head."""

    def __init__(self, node: Node, desk: Desk) -> None:
        self._node = node
        self._desk = desk
        self._file = node.config.node.state / FILE
        self._roster = Roster(node.dht, node.trust, node.clock)
        self._views = [self._roster.view(stage) for stage in range(node.manifest.model.stages)]
        self._clock = self._new_clock()
        self._seen: dict[str, tuple[Replica, float]] = {}
        """Who is here, and when it was last in the roster; monotonic."""
        self._books_at = -math.inf
        self._kept_at = trio.current_time()
        self._read_at = -math.inf
        self._reader = trio.Event()
        self._news = trio.Event()
        self._rows: tuple[Row, ...] = ()
        self._earned: dict[str, Earned] = {}
        self._history = History()
        self._first = True
        """Whoever is there at the first look came before it."""
        self.facts = Facts(manifest=node.manifest, at=node.clock())

    def wanted(self) -> None:
        """Somebody reads."""
        quiet = trio.current_time() - self._read_at > READERS_STAY_S
        self._read_at = trio.current_time()
        if quiet:
            self._reader.set()

    async def news(self) -> None:
        """Until there are newer facts."""
        await self._news.wait()

    async def run(self) -> None:
        """Until cancelled."""
        self._history = await trio.to_thread.run_sync(_load, self._file, self._node.manifest.run.id)
        self._first = bool(self._history.changes)
        try:
            while True:
                await self._look()
                if trio.current_time() - self._kept_at >= KEEP_S:
                    await self._keep()
                watched = trio.current_time() - self._read_at <= READERS_STAY_S
                self._reader = trio.Event()
                with trio.move_on_after(WATCHED_S if watched else QUIET_S):
                    await self._reader.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._keep()

    async def _look(self) -> None:
        for view in self._views:
            await self._roster.refresh(view)
        trainers = await self._read_clock()
        door, queue = await self._read_door()
        await self._read_books()
        now, history = self._node.clock(), self._history
        replicas = self._replicas(now, history)
        losses = [trainer.loss for trainer in trainers if trainer.loss is not None]
        loss = sum(losses) / len(losses) if losses else None
        active = sum(replica.phase in SERVING for replica in replicas)
        if trainers:
            history.note(Moment(now, self._clock.step, self._clock.samples, loss, active))
        facts = Facts(
            version=self.facts.version + 1,
            at=now,
            manifest=self._node.manifest,
            step=self._clock.step,
            samples=self._clock.samples,
            loss=loss,
            samples_per_second=history.samples_per_second(),
            replicas=replicas,
            trainers=trainers,
            door=door,
            queue=queue,
            rows=self._rows,
            earned=self._earned,
            history=history.copy(),
        )
        self._first = False
        self.facts = facts
        news, self._news = self._news, trio.Event()
        news.set()

    # the roster

    def _replicas(self, now: float, history: History) -> tuple[Replica, ...]:
        """Who is here; who came, went or changed since the last look goes to the history."""
        at = trio.current_time()
        here: dict[str, Replica] = {}
        for view in self._views:
            for entry in view.entries.values():
                if entry.record.phase != "leaving":
                    here[entry.peer] = _replica(entry, view.stage)
        leaving = {
            peer for view in self._views for peer, e in view.entries.items() if e.record.phase == "leaving"
        }
        for peer, replica in here.items():
            if replica.round is not None:
                number, fraction, members, when = replica.round
                history.note_round(Round(replica.stage, number, fraction, members, min(when, now)))
            before = self._seen.get(peer)
            if before is None and not self._first:
                history.note_change(_change(now, "joined", replica))
            elif before is not None and before[0].phase != replica.phase:
                history.note_change(_change(now, replica.phase, replica))
            self._seen[peer] = replica, at
        for peer, (replica, seen) in list(self._seen.items()):
            if peer not in here and (peer in leaving or at - seen > GONE_S):
                del self._seen[peer]
                history.note_change(_change(now, "left" if peer in leaving else "vanished", replica))
        ordered = sorted(self._seen.values(), key=lambda pair: (pair[0].stage, pair[0].account, pair[0].peer))
        return tuple(replica for replica, _seen in ordered)

    async def _read_clock(self) -> tuple[Trainer, ...]:
        manifest = self._node.manifest
        listed = {ref.peer_id for ref in manifest.trainers}
        if listed != self._listed or manifest.training.target_batch != self._batch:
            self._clock = self._new_clock()
        try:
            records = await self._node.dht.get(clock_key(manifest.run.id), deadline=READ_S)
        except (P2PError, trio.TooSlowError):
            return self.facts.trainers
        found = []
        for owner, record in read_all(ClockRecord, records, emit=self._node.emit).items():
            try:
                self._clock.observe([Reading(owner, record.samples, record.signature)])
            except RemoteError:
                continue  # anybody may write under this key; only trainers count
            found.append(Trainer(peer=owner, samples=record.samples, at=record.at, loss=record.loss))
            if record.evaluated is not None:
                self._history.note_evaluation(*record.evaluated)
        return tuple(sorted(found, key=lambda trainer: trainer.peer)) or self.facts.trainers

    def _new_clock(self) -> StepClock:
        manifest = self._node.manifest
        self._listed = {ref.peer_id for ref in manifest.trainers}
        self._batch = manifest.training.target_batch
        return StepClock(manifest.run.id, frozenset(self._listed), self._batch)

    # this authority's own

    async def _read_door(self) -> tuple[Door | None, tuple[Waiting, ...]]:
        try:
            capacity: Capacity = await self._desk.capacity()
        except P2PError:
            return self.facts.door, self.facts.queue  # the database fails at present
        queue, now = self._desk.room.queue, self._node.clock()
        views = queue.views(now, free=capacity.free, paused=capacity.paused)
        places = tuple(
            Waiting(
                peer=place.peer,
                account=place.account,
                position=position,
                stage=place.stage,
                present=place.open,
                downloaded=place.finished,
                eta_s=views[place.peer].eta_s if place.peer in views else None,
            )
            for position, place in enumerate(queue.places, 1)
        )
        newcomer = queue.newcomer(now, free=capacity.free, paused=capacity.paused)
        door = Door(
            free=max(0, capacity.free), paused=capacity.paused, waiting=len(places), eta_s=newcomer.eta_s
        )
        return door, places

    async def _read_books(self) -> None:
        if trio.current_time() - self._books_at < BOOKS_S:
            return
        try:
            self._rows, self._earned = await self._desk.ask(_books, self._desk.store, self._node.clock())
        except P2PError:
            return
        self._books_at = trio.current_time()

    async def _keep(self) -> None:
        self._kept_at = trio.current_time()
        document = self._history.to_document(self._node.manifest.run.id)
        await trio.to_thread.run_sync(_save, self._file, document)


def _books(store: Store, now: float) -> tuple[tuple[Row, ...], dict[str, Earned]]:
    balances = store.books.balances()
    banned = {ban.name for ban in store.bans(now) if ban.kind == "account"}
    earned = {
        balance.peer_id: Earned(
            account=balance.account,
            compute=pflop(balance.compute),
            presence=pflop(balance.presence),
            active_h=round(balance.active_s / 3600, 3),
            joined=balance.joined,
            seen=balance.seen,
        )
        for balance in balances
    }
    return tuple(rank(balances, banned, now)), earned


def _replica(entry: Entry, stage: int) -> Replica:
    record = entry.record
    return Replica(
        peer=entry.peer,
        account=Certificate.decode(record.certificate).account,
        stage=stage,
        phase=record.phase,
        step=record.step,
        slots=record.slots,
        working=record.working,
        rate=record.rate,
        disagreement=record.disagreement,
        snapshot_step=record.snapshot_step,
        round=record.round,
    )


def _change(now: float, what: str, replica: Replica) -> Change:
    return Change(now, what, replica.peer, replica.account, replica.stage)


def _load(path: Path, run: str) -> History:
    try:
        with path.open("rb") as file:
            return read(json.loads(file.read(KEPT_LIMIT)), run)
    except (OSError, ValueError, RecursionError):
        return History()  # none, or damaged: curves begin anew


def _save(path: Path, document: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a full disk costs no more than the curves of this life
        write_whole(path, json.dumps(document).encode())
