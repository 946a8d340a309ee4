"""The trainer: turns rows of data into microbatches and hears of each that it is done.

It owns no weights. Each microbatch is a signed ticket, sent to a replica of the first stage; the answer
comes back through the nested call. Completions grow the trainer's signed sample count, which is the run's
clock (``stage.clock``). ``credits`` microbatches are in flight at most: enough to keep every replica
busy, no more. A microbatch that no replica takes right now is kept and tried again; it fails only when
the trainer is told to stop before anybody answered.

Every issued microbatch ends as exactly one ``microbatch_completed`` or ``microbatch_failed``. The journal
(``journal.json``: next position, positions that are open, completed samples) makes a restarted trainer go
on where it was: it repeats only what was in flight. Evaluation rows travel as ``eval`` tickets, each on two
paths, and count nowhere. Whatever was answered leaves a signed receipt (``stage.receipts``), which goes to
``keep`` before the microbatch counts as completed. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from p2p.errors import LocalError
from p2p.event import Emit
from p2p.identity import Identity
from stage.clock import Reading, StepClock
from stage.config import ModelConfig, TrainingConfig
from stage.data import ByteSource, Row
from stage.events import Evaluated, MicrobatchCompleted, MicrobatchFailed, MicrobatchIssued
from stage.messages import BASIS, Request
from stage.nexthop import NextHop, NoReplicaError, Passed
from stage.receipts import Receipt
from stage.ticket import Ticket

CALL_S = 120.0
"""One attempt to get a microbatch through the whole pipeline."""
RETRY_S = 0.5
"""Pause after a stage was found empty."""
DRAIN_S = 20.0
"""How long microbatches in flight may still finish once the trainer is told to stop."""
EVAL_ROWS = 8
JOURNAL_S = 1.0


@attrs.define
class Journal:
    """What survives a restart of the trainer."""

    path: Path
    next_position: int = 0
    open: set[int] = attrs.field(factory=set)
    """Positions below ``next_position`` that nobody has answered."""
    samples: int = 0
    evaluations: int = 0
    """Tickets of evaluation so far: their positions grow too."""

    @classmethod
    def load(cls, path: Path) -> Journal:
        try:
            saved = json.loads(path.read_text())
            evaluations = saved.get("evaluations", 0)
            journal = cls(path, saved["next_position"], set(saved["open"]), saved["samples"], evaluations)
            counts = (journal.next_position, journal.samples, evaluations, *journal.open)
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("a count is not a whole number")
            if max(journal.open, default=-1) >= journal.next_position:
                raise ValueError("a position is open that was never begun")
            return journal
        except FileNotFoundError:
            return cls(path)
        except OSError as error:
            raise LocalError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LocalError(
                f"{path} is damaged ({error}); remove it to start the trainer's data from the beginning"
            ) from None

    def text(self) -> str:
        fields = {
            "next_position": self.next_position,
            "open": sorted(self.open),
            "samples": self.samples,
            "evaluations": self.evaluations,
        }
        return json.dumps(fields)

    def write(self, text: str) -> None:
        """Atomically; may run in a thread, since ``text`` was taken before. Raises LocalError."""
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(text)
            temporary.replace(self.path)
        except OSError as error:
            raise LocalError(f"cannot write {self.path}: {error.strerror or error}") from None

    def take(self) -> int:
        """The next position that was never worked on."""
        position = self.next_position
        self.next_position += 1
        self.open.add(position)
        return position


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
        source: ByteSource,
        shard: int,
        goal_samples: int | None,
        next_hop: NextHop,
        credits: Callable[[], int],
        journal: Journal,
        emit: Emit,
        stopping: trio.Event,
        evaluate: bool,
        keep: Callable[[Receipt], None],
        now: Callable[[], float],
    ) -> None:
        """``keep``: takes the receipt of each answer; ``now``: unix time."""
        self._identity = identity
        self._run = run
        self._model = model
        self.training = training
        """Replaced when a newer manifest comes into force."""
        self.held = False
        """Nothing new is issued while it is set."""
        self._clock = clock
        self._source = source
        self._shard = shard
        self._goal = goal_samples
        self._next_hop = next_hop
        self._credits = credits
        self._journal = journal
        self._emit = emit
        self._stopping = stopping
        self._evaluate = evaluate
        self._keep = keep
        self._now = now
        self._reopened = sorted(journal.open)
        self._in_flight = 0
        self._changed = trio.Event()
        self._evaluated_at = -1
        self._evaluating = False
        self._evaluated = 0
        """Evaluations due so far, by the clock."""
        self._evaluation_scope = trio.CancelScope()
        self._scopes: set[trio.CancelScope] = set()
        """One for each microbatch in flight, to give them up by."""
        self.loss: float | None = None
        """Exponential mean of the last losses, for people."""
        self.evaluated: tuple[int, float] | None = None
        """Step and loss of the last evaluation."""
        self.clock_changed = trio.Event()

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
                nursery.start_soon(self._watch_stopping)
                async with trio.open_nursery() as work:
                    if self._evaluate and self._journal.samples == 0:
                        work.start_soon(self._evaluation, 0)
                    await self._issue(work)
                if self._evaluate and self._evaluated_at < self._clock.step:
                    await self._evaluation(self._clock.step)
                nursery.cancel_scope.cancel()
        finally:
            with suppress(LocalError):  # as in _keep_journal: the one before is there
                self._journal.write(self._journal.text())

    async def _issue(self, work: trio.Nursery) -> None:
        while not self._stopping.is_set():
            planned = self._journal.samples + self._in_flight
            if self._goal is not None and planned >= self._goal:
                if self._in_flight == 0:
                    return
            elif self._in_flight < self._credits() and not self.held:
                position = self._reopened.pop(0) if self._reopened else self._journal.take()
                self._in_flight += 1
                work.start_soon(self._one, work, position)
                continue
            self._changed = trio.Event()
            with trio.move_on_after(1.0):  # credits follow the roster, which tells nobody here
                await self._changed.wait()

    async def _one(self, work: trio.Nursery, position: int) -> None:
        row = self._source.row(self._shard, position)
        ticket = self._ticket("train", position, row)
        self._emit(MicrobatchIssued(ticket=ticket.id))
        passed = None
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                passed = await self._through(ticket, row)
            finally:
                self._scopes.discard(scope)
        self._in_flight -= 1
        self._changed.set()
        if passed is None:
            self._emit(MicrobatchFailed(ticket=ticket.id, why="the trainer stopped before an answer came"))
            return
        self._journal.open.discard(position)
        self._journal.samples += 1
        self._publish()
        loss = passed.answer.loss
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self._emit(MicrobatchCompleted(ticket=ticket.id, path=list(passed.answer.path), loss=loss))
        step, every = self._clock.step, self.training.eval_every
        # The clock is everybody's: it may pass the very step between two completions of ours.
        if self._evaluate and every and step // every > self._evaluated:
            self._evaluated = step // every
            if not self._evaluating:
                work.start_soon(self._evaluation, step)

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
            shard=self._shard,
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

        async def one(row: Row) -> None:
            self._journal.evaluations += 1
            ticket = self._ticket("eval", self._journal.evaluations, row)
            losses.append((await self._through(ticket, row)).answer.loss)

        rows = min(EVAL_ROWS, self._source.eval_rows)
        try:
            with trio.move_on_after(0.0 if self._stopping.is_set() else CALL_S) as self._evaluation_scope:
                for number in range(rows):
                    async with trio.open_nursery() as pair:
                        for _path in range(2):
                            pair.start_soon(one, self._source.eval_row(number))
        finally:
            self._evaluating = False
        if len(losses) == 2 * rows:
            loss = math.fsum(losses) / len(losses)
            self.evaluated = step, loss
            self.clock_changed.set()
            self._emit(Evaluated(step=step, loss=loss, rows=rows))

    async def _keep_journal(self) -> None:
        while True:
            await trio.sleep(JOURNAL_S)
            try:
                await trio.to_thread.run_sync(self._journal.write, self._journal.text())
            except LocalError:
                pass  # a disk that is full for a while: only a restart now would repeat more than it has to

    async def _watch_stopping(self) -> None:
        await self._stopping.wait()
        self._changed.set()
        self._evaluation_scope.cancel()
        await trio.sleep(DRAIN_S)
        for scope in list(self._scopes):
            scope.cancel()
