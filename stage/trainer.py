"""The trainer: turns rows of data into microbatches and hears of each that it is done.

It owns no weights. Each microbatch is a signed ticket, sent to a replica of the first stage; the answer
comes back through the nested call. Completions grow the trainer's signed sample count, which is the run's
clock (``stage.clock``). ``credits`` microbatches are in flight at most: enough to keep every replica
busy, no more. A microbatch that no replica takes right now is kept and tried again; it fails only when
the trainer is told to stop before anybody answered. Rows come from ``stage.data``, read ahead in a thread.

Every issued microbatch ends as exactly one ``microbatch_completed`` or ``microbatch_failed``. The journal
(``stage.progress``) makes a restarted trainer go on where it was: it repeats only what was in flight.
Evaluation rows travel as ``eval`` tickets, each on two paths, and count nowhere. Whatever was answered leaves
a signed receipt (``stage.receipts``), which goes to ``keep`` before the microbatch counts as completed.
Torch-free.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import trio

from p2p.errors import LocalError
from p2p.event import Emit
from p2p.identity import Identity
from stage.clock import Reading, StepClock
from stage.config import ModelConfig, TrainingConfig
from stage.data import Row, Source
from stage.data.files import Unavailable
from stage.events import DataUnavailable, Evaluated, MicrobatchCompleted, MicrobatchFailed, MicrobatchIssued
from stage.messages import BASIS, Request
from stage.nexthop import NextHop, NoReplicaError, Passed
from stage.progress import Journal, Shard
from stage.receipts import Receipt
from stage.ticket import Ticket

CALL_S = 120.0
"""One attempt to get a microbatch through the whole pipeline."""
RETRY_S = 0.5
"""Pause after a stage was found empty."""
DRAIN_S = 20.0
"""How long microbatches in flight may still finish once the trainer is told to stop."""
EVAL_ROWS = 8
DATA_RETRY_S = 5.0
"""Pause after data were not to be had."""
JOURNAL_S = 1.0
"""Between two times that the journal is synced to the disk."""
AHEAD = 16_384
"""Most positions that a shard may be ahead of its oldest open one."""


class Trainer:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        identity: Identity,
        run: str,
        model: ModelConfig,
        training: TrainingConfig,
        clock: StepClock,
        source: Source,
        goal: Callable[[int], int | None],
        next_hop: NextHop,
        credits: Callable[[], int],
        answered: Callable[[float, float], None],
        journal: Journal,
        emit: Emit,
        stopping: trio.Event,
        keep: Callable[[Receipt], None],
        over: Callable[[], bool],
        now: Callable[[], float],
    ) -> None:
        """``goal``: positions that a shard owes; ``over``: whether all shards of others have what they owe;
        ``answered``: hears when an answer came and how long it took; ``keep``: takes receipts; ``now``: unix
        time."""
        self._identity = identity
        self._run = run
        self._model = model
        self.training = training
        """Replaced when a newer manifest comes into force."""
        self.held = False
        """Nothing new is issued while it is set."""
        self._clock = clock
        self._source = source
        self._goal = goal
        self._next_hop = next_hop
        self._credits = credits
        self._answered = answered
        self._journal = journal
        self._emit = emit
        self._stopping = stopping
        self._others_over = over
        self._keep = keep
        self._now = now
        self._next: dict[int, int] = {}
        """Of each shard in work: the next position to look at. Whose turn it is stands first."""
        self._of_shard = Counter[int]()
        """Microbatches in flight."""
        self._reading = trio.CapacityLimiter(1)
        self._preparing = False
        self._behind, self._due = trio.open_memory_channel[tuple[int, int]](1)
        self._in_flight = 0
        self._changed = trio.Event()
        self._evaluated_at = -1
        self._evaluating = False
        self._evaluated = 0
        """Evaluations due so far, by the clock."""
        self._evaluation_scope = trio.CancelScope()
        self._rows_held_out: list[Row] | None = None
        self._scopes: set[trio.CancelScope] = set()
        """One for each microbatch in flight, to give them up by."""
        self.loss: float | None = None
        """Exponential mean of the last losses, for people."""
        self.evaluated: tuple[int, float] | None = None
        """Step and loss of the last evaluation."""
        self.clock_changed = trio.Event()
        self.resting = trio.Event()
        """Set while there is nothing left to do but to wait for other trainers."""

    def take(self, shard: int, told: Shard | None = None) -> None:
        """Work on that shard too, from where the journal says, or its former holder if that is further."""
        if told is not None:
            self._journal.adopt(shard, told)
        progress = self._journal.shard(shard)
        self._source.seek(shard, progress.cursor)
        self._next[shard] = progress.mark
        self.resting = trio.Event()
        self._changed.set()

    def drop(self, shard: int) -> None:
        """Begin nothing of that shard any more."""
        self._next.pop(shard, None)

    def idle(self, shard: int) -> bool:
        """Whether nothing of that shard is in flight."""
        return not self._of_shard[shard]

    @property
    def _evaluates(self) -> bool:
        """Evaluations are for whoever has the first shard."""
        return 0 in self._next

    @property
    def completed(self) -> int:
        return self._journal.samples

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def run(self) -> None:
        """Until the goal is reached, or ``stopping`` is set and what is in flight has ended."""
        self._publish()
        self._evaluated = self._clock.step // max(1, self.training.eval_every)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_journal)
                nursery.start_soon(self._prepare)
                nursery.start_soon(self._watch_stopping)
                async with trio.open_nursery() as work:
                    if self._evaluates and self._journal.samples == 0:
                        with trio.CancelScope() as self._evaluation_scope:
                            await self._held_out()  # so that nothing is learnt before they are looked at
                        work.start_soon(self._evaluation, 0)
                    await self._issue(work)
                if self._evaluates and self._evaluated_at < self._clock.step:
                    await self._evaluation(self._clock.step)
                nursery.cancel_scope.cancel()
        finally:
            with suppress(LocalError):  # as in _keep_journal
                self._journal.flush()
                self._journal.sync()
            self._journal.close()

    async def _issue(self, work: trio.Nursery) -> None:
        while not self._stopping.is_set():
            if self._in_flight == 0 and self._over():
                return
            may = self._in_flight < self._credits() and not self.held
            name = self._following() if may else None
            if name is not None:
                self._in_flight += 1
                self._of_shard[name[0]] += 1
                work.start_soon(self._one, work, *name)
                continue
            self._changed = trio.Event()
            with trio.move_on_after(1.0):  # credits follow the roster, which tells nobody here
                await self._changed.wait()

    def _over(self) -> bool:
        goals = ((shard, self._goal(shard)) for shard in self._next)
        mine = all(goal is not None and self._journal.shard(shard).completed >= goal for shard, goal in goals)
        if mine:
            self.resting.set()
        return mine and self._others_over()

    def _following(self) -> tuple[int, int] | None:
        """Shard and position of what comes next, if there is something to do."""
        for shard, position in self._next.items():
            progress, goal = self._journal.shard(shard), self._goal(shard)
            while position in progress.done:
                position += 1
            if (goal is None or position < goal) and position < progress.mark + AHEAD:
                del self._next[shard]
                self._next[shard] = position + 1
                return shard, position
        return None

    async def _one(self, work: trio.Nursery, shard: int, position: int) -> None:
        row = None
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                row = await self._row(shard, position)
            finally:
                self._scopes.discard(scope)
        if row is None:
            self._landed(shard)
            return
        ticket = self._ticket("train", position, row)
        began = trio.current_time()
        self._emit(MicrobatchIssued(ticket=ticket.id))
        passed = None
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                passed = await self._through(ticket, row)
            finally:
                self._scopes.discard(scope)
        self._landed(shard)
        if passed is None:
            self._emit(MicrobatchFailed(ticket=ticket.id, why="the trainer stopped before an answer came"))
            return
        loss = passed.answer.loss
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self._answered(trio.current_time(), trio.current_time() - began)
        # Said before it is noted down: a trainer that is killed in between repeats it, and skips nothing.
        self._emit(MicrobatchCompleted(ticket=ticket.id, path=list(passed.answer.path), loss=loss))
        self._journal.complete(shard, position)
        self._publish()
        step, every = self._clock.step, self.training.eval_every
        # The clock is everybody's: it may pass the very step between two completions of ours.
        if self._evaluates and every and step // every > self._evaluated:
            self._evaluated = step // every
            if not self._evaluating:
                work.start_soon(self._evaluation, step)

    def _landed(self, shard: int) -> None:
        self._in_flight -= 1
        self._of_shard[shard] -= 1
        self._changed.set()

    async def _row(self, shard: int, position: int) -> Row:
        """Of the training data; LocalError if they cannot be read any more."""
        while (found := self._source.at_hand(shard, position)) is None:
            try:
                await trio.to_thread.run_sync(
                    self._source.row, shard, position, abandon_on_cancel=True, limiter=self._reading
                )
            except Unavailable as error:
                self._emit(DataUnavailable(why=str(error)))
                await trio.sleep(DATA_RETRY_S)
        if not self._preparing and self._source.unprepared(shard, position):
            self._preparing = True
            self._behind.send_nowait((shard, position))
        return found

    async def _prepare(self) -> None:
        """Reads on before it is needed."""
        async for shard, position in self._due:
            with suppress(LocalError, Unavailable):  # whoever needs the rows says it
                await trio.to_thread.run_sync(
                    self._source.prepare, shard, position, abandon_on_cancel=True, limiter=self._reading
                )
            self._preparing = False

    async def _through(self, ticket: Ticket, row: Row) -> Passed:
        """Sends one microbatch until it is answered."""
        while True:
            request = Request(
                ticket=ticket,
                clock=self._clock.readings,
                basis=BASIS,
                path=[self._identity.peer_id],
                tokens=self._model.seq,
                documents=list(row.starts),
                dtype=self.training.wire_dtype,
                dtype_back=self.training.wire_dtype_backward,
                inline=False,
                deadline_s=CALL_S,
            )
            try:
                passed = await self._next_hop.send(request, [row.ids], back_bytes=0)
            except (NoReplicaError, trio.TooSlowError):
                await trio.sleep(RETRY_S)
            else:
                self._keep(self._receipt(ticket, passed))
                return passed

    def _receipt(self, ticket: Ticket, passed: Passed) -> Receipt:
        """Of an answer whose statements ``NextHop`` has checked."""
        return Receipt(
            ticket=ticket,
            at=self._now(),
            peers=tuple(passed.answer.path[1:]),
            statements=tuple(passed.answer.receipts),
        ).signed_by(self._identity)

    def _ticket(self, kind: str, position: int, row: Row) -> Ticket:
        return Ticket(
            run=self._run,
            trainer=self._identity.peer_id,
            kind=kind,
            shard=row.shard,
            position=position,
            ids_hash=hashlib.sha256(row.ids).digest(),
            weight=1.0,
        ).signed_by(self._identity)

    def _publish(self) -> None:
        self._clock.observe([Reading.signed(self._identity, self._run, self._journal.samples)])
        self.clock_changed.set()

    async def _evaluation(self, step: int) -> None:
        """Held-out rows, each on two paths (two tickets; the router interleaves replicas)."""
        self._evaluating = True
        self._evaluated_at = step
        losses: list[float] = []

        async def one(row: Row, number: int) -> None:
            ticket = self._ticket("eval", number, row)
            losses.append((await self._through(ticket, row)).answer.loss)

        rows: list[Row] = []
        try:
            with trio.move_on_after(0.0 if self._stopping.is_set() else CALL_S) as self._evaluation_scope:
                rows = await self._held_out()
                first = self._journal.evaluate(2 * len(rows))
                for number, row in enumerate(rows):
                    async with trio.open_nursery() as pair:
                        for path in range(2):
                            pair.start_soon(one, row, first + 2 * number + path)
        finally:
            self._evaluating = False
        if rows and len(losses) == 2 * len(rows):
            loss = math.fsum(losses) / len(losses)
            self.evaluated = step, loss
            self.clock_changed.set()
            self._emit(Evaluated(step=step, loss=loss, rows=len(rows)))

    async def _held_out(self) -> list[Row]:
        while self._rows_held_out is None:
            try:
                self._rows_held_out = await trio.to_thread.run_sync(
                    self._source.held_out, EVAL_ROWS, abandon_on_cancel=True, limiter=self._reading
                )
            except Unavailable as error:
                self._emit(DataUnavailable(why=str(error)))
                await trio.sleep(DATA_RETRY_S)
        return self._rows_held_out

    async def _keep_journal(self) -> None:
        while True:
            await trio.sleep(JOURNAL_S)
            try:
                self._journal.flush()
                await trio.to_thread.run_sync(self._journal.sync)
                if self._read_on() or self._journal.long:
                    copy = self._journal.copy()
                    await trio.to_thread.run_sync(copy.write)
                    self._journal.replace(copy)
            except LocalError:
                pass  # a disk that is full for a while: only a restart now would repeat more than it has to

    def _read_on(self) -> bool:
        """Whether a shard's oldest open position has come to another window of the data."""
        moved = False
        for shard in self._next:
            progress = self._journal.shard(shard)
            cursor = self._source.cursor(shard, progress.mark)
            moved = moved or cursor != progress.cursor
            progress.cursor = cursor
        return moved

    async def _watch_stopping(self) -> None:
        await self._stopping.wait()
        self._changed.set()
        self._evaluation_scope.cancel()
        await trio.sleep(DRAIN_S)
        for scope in list(self._scopes):
            scope.cancel()
