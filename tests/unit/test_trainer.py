"""The trainer against a next hop that answers as told, in virtual time; its journal; damaged journals."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
import trio.testing

from p2p.errors import LocalError
from p2p.event import Event
from p2p.identity import Identity
from stage.clock import Reading, StepClock
from stage.config import ModelConfig, TrainingConfig
from stage.data import Cursor, Row, Source
from stage.events import Evaluated, MicrobatchCompleted, MicrobatchFailed, MicrobatchIssued
from stage.messages import Answer, Load, Request
from stage.nexthop import NextHop, NoReplicaError, Passed
from stage.progress import LINES, Journal, samples_of
from stage.receipts import Receipt, sign
from stage.trainer import EVAL_ROWS, Trainer

TRAINER = Identity.generate(bytes([1]) * 32)
MATE = Identity.generate(bytes([2]) * 32)
WORKER = Identity.generate(bytes([3]) * 32)
LISTED = frozenset({TRAINER.peer_id, MATE.peer_id})
MODEL = ModelConfig(
    d=16, k=4, layers=(1, 1), heads=2, kv_heads=1, head_dim=8, ffn=16, seq=4
)  # fmt: skip
BATCH = 4
DATA = "0123456789abcdef"


class Pipeline:
    """Stands for ``NextHop``: checks what it is given, and answers in ``seconds`` unless told otherwise."""

    def __init__(self) -> None:
        self.seconds = 0.1
        self.asked: list[str] = []
        self.at_work = self.most_at_work = 0
        self.trouble: Callable[[Request], Exception | None] = lambda _request: None
        self.hangs: Callable[[Request], bool] = lambda _request: False

    async def send(self, request: Request, payload: list[bytes], *, back_bytes: int) -> Passed:
        request.ticket.check("run", LISTED, payload[0])
        assert (request.path, back_bytes, len(payload)) == ([TRAINER.peer_id], 0, 1)
        self.asked.append(request.ticket.id)
        train = request.ticket.kind == "train"
        self.at_work += train
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            await trio.sleep(math.inf if self.hangs(request) else self.seconds)
        finally:
            self.at_work -= train
        trouble = self.trouble(request)
        if trouble is not None:
            raise trouble
        answer = Answer(
            loss=2.0,
            c_hash=b"",
            path=[*request.path, WORKER.peer_id],
            load=Load(1),
            stale=False,
            receipts=[sign(WORKER, request.ticket, 0, TRAINER.peer_id)],
        )
        return Passed(answer, memoryview(b""), WORKER.peer_id)


class Rows:
    """Stands for ``Source``."""

    def seek(self, shard: int, cursor: Cursor) -> None:
        pass

    def cursor(self, shard: int, position: int) -> Cursor:
        return Cursor(window=position // 16, begin=position - position % 16)

    def at_hand(self, shard: int, position: int) -> Row:
        return Row(shard, position, position.to_bytes(5, "little"), ())

    def unprepared(self, shard: int, position: int) -> bool:
        return False

    def held_out(self, count: int) -> list[Row]:
        return [Row(0, number, bytes([255] * 4 + [number]), ()) for number in range(count)]


@attrs.define
class Bench:
    """A trainer and what surrounds it."""

    folder: Path
    goal: int | None = None
    credits: int = 3
    shard: int = 1
    """Evaluations come with the first one."""
    eval_every: int = 2
    events: list[Event] = attrs.field(factory=list)
    pipeline: Pipeline = attrs.field(factory=Pipeline)
    clock: StepClock = attrs.field(factory=lambda: StepClock("run", LISTED, BATCH))
    stopping: trio.Event = attrs.field(factory=trio.Event)
    took: list[tuple[float, float]] = attrs.field(factory=list)
    receipts: list[Receipt] = attrs.field(factory=list)

    def trainer(self) -> Trainer:
        """At work on the shard that evaluates, or on another."""
        journal = Journal.load(self.folder / "journal.jsonl", DATA)
        journal.start()
        trainer = Trainer(
            identity=TRAINER,
            run="run",
            model=MODEL,
            training=TrainingConfig(seed=1, target_batch=BATCH, eval_every=self.eval_every),
            clock=self.clock,
            source=cast(Source, Rows()),
            goal=lambda _shard: self.goal,
            next_hop=cast(NextHop, self.pipeline),
            credits=lambda: self.credits,
            answered=lambda now, took: self.took.append((now, took)),
            journal=journal,
            emit=self.events.append,
            stopping=self.stopping,
            over=lambda: True,
            keep=self.receipts.append,
            now=lambda: 1e9,
        )
        trainer.take(self.shard)
        return trainer

    def run(self, meanwhile: Callable[[Trainer], Any] | None = None) -> Trainer:
        """To its end, in virtual time. Without a deadline in it: while a thread syncs the journal, the clock
        jumps to whatever deadline is next, and on a slow disk that would be this one."""
        trainer = self.trainer()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                if meanwhile is not None:
                    nursery.start_soon(meanwhile, trainer)
                await trainer.run()
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))
        return trainer

    def tickets(self, kind: type[Any]) -> list[str]:
        return [event.ticket for event in self.events if isinstance(event, kind)]

    def saved(self) -> Journal:
        return Journal.load(self.folder / "journal.jsonl", DATA)


def test_it_ends_at_its_goal_with_every_microbatch_completed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, goal=10)
    trainer = bench.run()
    expected = [f"train:1:{position}" for position in range(10)]
    assert sorted(bench.tickets(MicrobatchIssued)) == sorted(bench.tickets(MicrobatchCompleted)) == expected
    assert bench.tickets(MicrobatchFailed) == []
    assert bench.pipeline.most_at_work == 3
    assert (trainer.completed, trainer.in_flight, bench.clock.samples) == (10, 0, 10)
    saved = bench.saved()
    assert (saved.samples, saved.evaluations) == (10, 0)
    assert (saved.shards[1].mark, saved.shards[1].done) == (10, set())
    for receipt in bench.receipts:  # one each, and they are true
        receipt.check("run", LISTED, 1)
        assert receipt.at == 1e9
    assert sorted(receipt.ticket.id for receipt in bench.receipts) == expected
    assert [took for _now, took in bench.took] == pytest.approx([0.1] * 10)


def test_what_nobody_takes_is_kept_and_tried_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, goal=6)
    times = dict.fromkeys((f"train:1:{position}" for position in range(6)), 0)

    def trouble(request: Request) -> Exception | None:
        times[request.ticket.id] += 1
        return [NoReplicaError(1), trio.TooSlowError(), None][min(times[request.ticket.id], 3) - 1]

    bench.pipeline.trouble = trouble
    bench.run()
    assert set(times.values()) == {3}
    assert len(bench.tickets(MicrobatchIssued)) == len(bench.tickets(MicrobatchCompleted)) == 6


def test_told_to_stop_it_drains_gives_up_the_rest_and_a_restart_takes_it_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, credits=4)
    stuck = {"train:1:5", "train:1:6"}
    bench.pipeline.hangs = lambda request: request.ticket.id in stuck

    async def stop_later(_trainer: Trainer) -> None:
        await trio.sleep(2.05)
        bench.stopping.set()
        await trio.sleep_forever()

    bench.run(stop_later)
    assert set(bench.tickets(MicrobatchFailed)) == stuck
    issued = bench.tickets(MicrobatchIssued)
    assert len(issued) == len(set(issued))
    assert set(issued) == set(bench.tickets(MicrobatchCompleted)) | stuck
    saved = bench.saved()
    assert (saved.shards[1].mark, saved.samples) == (5, len(issued) - 2)
    assert saved.shards[1].done == set(range(7, len(issued)))
    again = Bench(tmp_path, goal=saved.samples + 4)
    again.run()
    assert stuck <= set(again.tickets(MicrobatchIssued)[: again.credits])
    assert set(again.tickets(MicrobatchIssued)) & set(issued) == stuck
    assert (again.saved().shards[1].mark, again.saved().shards[1].done) == (saved.samples + 4, set())


def test_evaluation_takes_each_row_on_two_paths_and_counts_nowhere(tmp_path: Path) -> None:
    bench = Bench(tmp_path, goal=5 * BATCH, shard=0)
    bench.run()
    evaluated = [event for event in bench.events if isinstance(event, Evaluated)]
    steps = [event.step for event in evaluated]
    assert (steps[0], steps[-1], steps) == (0, 5, sorted(set(steps)))
    assert all((event.loss, event.rows) == (2.0, EVAL_ROWS) for event in evaluated)
    evaluations = [ticket for ticket in bench.pipeline.asked if ticket.startswith("eval")]
    assert len(evaluations) == len(set(evaluations)) == 2 * EVAL_ROWS * len(evaluated)
    assert len(bench.tickets(MicrobatchCompleted)) == bench.clock.samples == 5 * BATCH


def test_evaluation_is_due_even_if_another_trainer_moved_the_clock_past_its_step(tmp_path: Path) -> None:
    bench = Bench(tmp_path, goal=4 * BATCH, shard=0, eval_every=10, credits=1)

    async def mate(_trainer: Trainer) -> None:
        await trio.sleep(1.05)  # ten completions: the first evaluation is over, the clock stands at 2
        bench.clock.observe([Reading.signed(MATE, "run", 14 * BATCH)])
        await trio.sleep_forever()

    bench.run(mate)
    steps = [event.step for event in bench.events if isinstance(event, Evaluated)]
    assert steps == [0, 16, 18]


def test_a_stop_does_not_wait_for_an_evaluation_that_nobody_answers(tmp_path: Path) -> None:
    bench = Bench(tmp_path, shard=0)
    bench.pipeline.hangs = lambda request: request.ticket.kind == "eval"
    took: list[float] = []

    async def stop_later(_trainer: Trainer) -> None:
        await trio.sleep(1.05)
        took.append(trio.current_time())
        bench.stopping.set()
        try:
            await trio.sleep_forever()
        finally:
            took.append(trio.current_time())

    bench.run(stop_later)
    assert took[1] - took[0] < 1.0
    assert not [event for event in bench.events if isinstance(event, Evaluated)]


HEAD = '{"format":2,"data":"%s","samples":0,"evaluations":0,"shards":{%s}}\n'
SHARD = '"0":{"mark":%s,"done":%s,"cursor":%s}'


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "{\n", "3\n", "[]\n", "{}\n", HEAD[:-1], "\udcff\n",
        HEAD.replace("2", "1") % (DATA, ""), HEAD.replace("0,", "-1,", 1) % (DATA, ""),
        HEAD.replace("0,", "true,", 1) % (DATA, ""),
        *(
            HEAD % (DATA, SHARD % fields)
            for fields in [
                ('"1"', "[]", "[0,0,0,0]"), ("1", "3", "[0,0,0,0]"), ("1", '"0"', "[0,0,0,0]"),
                ("1", "[0]", "[0,0,0,0]"), ("1", "[1]", "[0,0,0,0]"), ("0", "[-1]", "[0,0,0,0]"),
                ("1", "[[2]]", "[0,0,0,0]"), ("1", "[]", "[0,0,0,2]"), ("1", "[]", "[0,0,0,0,0]"),
                ("1", "[]", '[0,0,"",0]'),
            ]
        ),
        *(HEAD % (DATA, "") + line for line in ("\n", "[0]\n", "[0,-1]\n", "[0,true]\n", "{}\n", "x\n")),
    ],
)  # fmt: skip
def test_a_damaged_journal_is_one_clear_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LocalError, match=r"damaged .*remove it"):
        Journal.load(path, DATA)


def test_an_unreadable_journal_is_one_too(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="cannot read"):
        Journal.load(tmp_path, DATA)
    assert samples_of(tmp_path) == samples_of(tmp_path / "none") == 0


def test_a_journal_of_other_data_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl", DATA).start()
    with pytest.raises(LocalError, match="about other data"):
        Journal.load(tmp_path / "journal.jsonl", "another")


class FullDisk:
    """``os.write`` of a disk that has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, descriptor: int, data: bytes) -> int:
        fits = data[: self.room]
        self.room -= len(fits)
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return WRITE(descriptor, fits)


WRITE = os.write


def test_a_full_disk_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, goal=40)
    disk = FullDisk(12 * len("[0,0]\n") + 3)
    monkeypatch.setattr("stage.progress.os.write", disk)

    async def repair(trainer: Trainer) -> None:
        (tmp_path / "journal.new").mkdir()  # no copy can be made
        while trainer.completed < 35:  # noqa: ASYNC110
            await trio.sleep(0.1)
        before = bench.saved()
        assert 11 <= before.samples <= 12  # and no half line
        disk.room = 1 << 20
        (tmp_path / "journal.new").rmdir()
        await trio.sleep(1.5)
        assert bench.saved().samples >= 35
        assert trainer.completed >= 35

    bench.run(repair)
    assert bench.saved().samples == bench.saved().shards[1].mark == 40


def test_a_journal_may_be_cut_off_anywhere(tmp_path: Path) -> None:
    """What a power cut leaves: some of the lines, the last one perhaps in part."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, DATA)
    journal.start()
    head = path.stat().st_size
    order = [3, 0, 1, 7, 2, 5, 4, 9, 8, 6]
    for position in order:
        journal.complete(0, position)
    assert journal.evaluate(16) == 1
    text = path.read_bytes()
    ends = [index for index, byte in enumerate(text) if byte == ord("\n")]
    for size in range(head, len(text) + 1):
        path.write_bytes(text[:size])
        read = Journal.load(path, DATA)
        known = order[: sum(end < size for end in ends[1:])]
        assert read.samples == len(known)
        shard = read.shard(0)
        assert set(range(shard.mark)) | shard.done == set(known)
        assert shard.mark not in shard.done
    assert read.evaluations == 16


def test_a_journal_is_made_short_while_it_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, DATA)
    journal.start()
    for position in range(LINES):
        assert not journal.long
        journal.complete(1, position)
    assert journal.long
    copy = journal.copy()
    journal.complete(1, LINES + 5)
    copy.write()
    journal.complete(1, LINES)
    assert Journal.load(path, DATA).samples == LINES + 2  # the old one is whole until the new one is
    journal.replace(copy)
    journal.complete(1, LINES)  # a microbatch that was repeated counts once
    journal.complete(1, LINES + 2)
    journal.sync()
    journal.close()
    read = Journal.load(path, DATA)
    assert (read.samples, read.shards[1].mark) == (LINES + 3, LINES + 1)
    assert read.shards[1].done == {LINES + 2, LINES + 5}
    assert len(path.read_bytes().splitlines()) == 5
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
