"""A replica's life against fakes, in virtual time: phases, and what must not end or stop it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import attrs
import pytest
import torch
import trio
import trio.testing

from p2p.averaging import Averager, Outcome, RoundFailed
from p2p.errors import LocalError
from p2p.event import Event
from p2p.identity import Identity, PeerId
from p2p.records import StageRecord
from stage.clock import Reading, StepClock
from stage.config import TrainingConfig
from stage.device import Device
from stage.events import Phase, RoundAbandoned, RoundFinished, SaveFailed, SettingsTaken, Step
from stage.merging import PackedSlice
from stage.replica import PROMOTE_S, ROUND_S, Fetched, Replica
from stage.roster import Entry, StageView

TRAINER = Identity.generate(bytes([1]) * 32)
OWN, MATE = PeerId("own"), PeerId("mate")


class Here:
    """Stands for ``Device``: the job runs here and now."""

    async def run(self, _priority: int, call: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*args)


class Weights:
    """Stands for ``StageCompute``."""

    def step(self, _step: int) -> int:
        return 1

    def configure(self, training: TrainingConfig) -> None:
        self.training = training

    def forget(self) -> None:
        pass

    def pack(self, number: int) -> Any:
        raise AssertionError(number)

    merge = pack


class NoRounds:
    later_round: Callable[[int], bool]


@attrs.define
class Bench:
    """A replica and what surrounds it; rounds are off (``average_every`` is never reached)."""

    snapshot_every: int = 0
    donated_step: int = 0
    fetch_s: float = 0.0
    resumes: bool = False
    restores: int = 0
    store_is_down: bool = False
    fetches: list[int] = attrs.field(factory=list)
    """The oldest step that each fetch would go on with."""
    events: list[Event] = attrs.field(factory=list)
    mates: StageView = attrs.field(factory=lambda: StageView(0))
    clock: StepClock = attrs.field(factory=lambda: StepClock("run", frozenset({TRAINER.peer_id}), 1))
    snapshots: list[int] = attrs.field(factory=list)
    save: Callable[[int], Awaitable[None]] | None = None
    replica: Replica = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        async def refresh() -> None:
            await trio.lowlevel.checkpoint()

        async def fetch(_donors: Sequence[PeerId], oldest: int) -> Fetched:
            self.fetches.append(oldest)
            await trio.sleep(self.fetch_s)
            return Fetched(self.donated_step, self.resumes)

        async def take_snapshot(step: int) -> None:
            self.snapshots.append(step)
            if self.save is not None:
                await self.save(step)

        self.replica = Replica(
            peer_id=OWN,
            stage=0,
            training=TrainingConfig(seed=1, target_batch=1, average_every=1 << 20),
            clock=self.clock,
            device=cast(Device, Here()),
            compute=Weights(),
            averager=cast(Averager, NoRounds()),
            mates=self.mates,
            refresh_mates=refresh,
            fetch_state=fetch,
            restore_state=self.restore,
            take_snapshot=take_snapshot,
            snapshot_every=self.snapshot_every,
            phase_changed=lambda: None,
            now=lambda: 0.0,
            emit=self.events.append,
        )

    async def restore(self) -> None:
        await trio.lowlevel.checkpoint()
        self.restores += 1
        if self.store_is_down:
            raise LocalError("the store is down")

    def mate(self, phase: str) -> None:
        record = StageRecord(
            addrs=(), phase=phase, step=0, slots=1, rate=0.0, certificate=b"", disagreement=None,
            snapshot_step=0,
        )  # fmt: skip
        self.mates.replace({MATE: Entry(MATE, record, [], 1.0)})

    def mates_at(self, *disagreements: float) -> None:
        """ACTIVE mates that measured these."""
        entries = {}
        for number, disagreement in enumerate(disagreements):
            record = StageRecord(
                addrs=(), phase="active", step=0, slots=1, rate=0.0, certificate=b"",
                disagreement=disagreement, snapshot_step=0,
            )  # fmt: skip
            peer = PeerId(f"mate{number}")
            entries[peer] = Entry(peer, record, [], 1.0)
        self.mates.replace(entries)

    async def advance(self, step: int) -> None:
        if self.clock.observe([Reading.signed(TRAINER, "run", step)]):
            self.replica.clock_advanced()
        await trio.testing.wait_all_tasks_blocked()

    def live(self, body: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.replica.run)
                await trio.testing.wait_all_tasks_blocked()
                await body()
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def test_a_lone_replica_that_fell_behind_catches_up_by_itself() -> None:
    """Nobody could give it a better state, and SYNCING would stop its stage until it is promoted."""
    bench = Bench()

    async def body() -> None:
        await bench.advance(100)
        assert (bench.replica.phase, bench.replica.step) == ("active", 100)

    bench.live(body)
    assert [event.step for event in bench.of(Step)] == [100]


@pytest.mark.catalogue(38)
def test_a_replica_that_fell_behind_an_active_mate_synchronises() -> None:
    bench = Bench()

    async def body() -> None:
        bench.mate("active")
        await bench.advance(100)
        assert bench.replica.phase == "syncing"

    bench.live(body)


def test_newer_settings_count_from_the_next_step_on() -> None:
    bench = Bench()
    newer = TrainingConfig(seed=1, target_batch=1, average_every=1 << 20, lr=0.5, max_stale_steps=7)

    async def body() -> None:
        await bench.advance(1)
        bench.replica.configure(newer)
        await trio.testing.wait_all_tasks_blocked()
        assert not bench.of(SettingsTaken)
        await bench.advance(2)
        await bench.advance(3)

    bench.live(body)
    kinds = [type(event) for event in bench.events if not isinstance(event, Phase)]
    assert kinds == [Step, SettingsTaken, Step, Step]
    (taken,) = bench.of(SettingsTaken)
    assert (taken.step, taken.settings) == (2, ["max_stale_steps = 7", "lr = 0.5"])


def test_a_step_that_a_donor_made_up_does_not_stop_the_clock() -> None:
    bench = Bench(donated_step=1 << 60)

    async def body() -> None:
        bench.mate("active")
        await bench.advance(100)
        await trio.sleep(3.0)
        assert (bench.replica.phase, bench.replica.state_step, bench.replica.step) == ("syncing", 100, 100)
        bench.mate("leaving")
        await trio.sleep(PROMOTE_S + 5.0)
        assert bench.replica.phase == "active"
        await bench.advance(101)
        assert bench.replica.step == 101

    bench.live(body)
    assert [event.step for event in bench.of(Step)] == [101]


def measured(bench: Bench, disagreement: float) -> None:
    """As after a round."""
    bench.replica.disagreement = disagreement
    bench.replica._sync_news.set()


def test_a_download_that_outlasts_the_staleness_limit_is_not_repeated_for_ever() -> None:
    bench = Bench(donated_step=100, fetch_s=40.0)

    async def body() -> None:
        bench.mates_at(0.01, 0.01)
        await bench.advance(100)
        await trio.sleep(1.0)
        await bench.advance(130)
        await trio.sleep(45.0)
        assert bench.fetches == [95]
        cycle = bench.replica._training.slices
        for _ in range(cycle):
            measured(bench, 0.5)
            await trio.sleep(5.0)
        assert (bench.replica.phase, len(bench.fetches)) == ("syncing", 1)
        measured(bench, 0.04)
        await trio.sleep(5.0)
        assert bench.replica.phase == "warming"

    bench.live(body)


def test_rounds_get_one_cycle_to_bring_an_old_state_close() -> None:
    bench = Bench(donated_step=100, fetch_s=40.0)

    async def body() -> None:
        bench.mates_at(0.01, 0.01)
        await bench.advance(100)
        await trio.sleep(1.0)
        await bench.advance(130)
        await trio.sleep(45.0)
        for _ in range(bench.replica._training.slices + 1):
            measured(bench, 0.5)
            await trio.sleep(5.0)
        assert bench.fetches == [95, 125]

    bench.live(body)


def test_a_state_that_was_old_before_its_download_is_not_enough_unless_it_went_on_with_one() -> None:
    for resumes in (False, True):
        bench = Bench(donated_step=94, resumes=resumes)

        async def body(bench: Bench = bench) -> None:
            bench.mates_at(0.01, 0.01)
            await bench.advance(100)
            await trio.sleep(1.0)
            measured(bench, 0.04)
            await trio.sleep(5.0)

        bench.live(body)
        assert bench.replica.phase == ("warming" if resumes else "syncing")
        assert (len(bench.fetches) > 1) == (not resumes)


def test_alone_and_old_it_is_promoted_after_its_time() -> None:
    bench = Bench()

    bench.clock.observe([Reading.signed(TRAINER, "run", 50)])

    async def all_of_it() -> None:
        assert bench.replica.phase == "syncing"
        await trio.sleep(PROMOTE_S - 3.0)
        assert bench.replica.phase == "syncing"
        await trio.sleep(6.0)
        assert bench.replica.phase == "active"

    bench.live(all_of_it)
    assert [(event.from_, event.to) for event in bench.of(Phase)] == [
        ("joining", "syncing"),
        ("syncing", "active"),
    ]


def test_beside_a_mate_that_began_at_a_checkpoint_it_is_not_genesis() -> None:
    """Before the trainers are back the clock stands at 0, whatever the run has behind it."""
    for step, phase in ((5, "active"), (17, "syncing")):
        bench = Bench(donated_step=step)
        record = StageRecord(
            addrs=(), phase="active", step=step, slots=1, rate=0.0, certificate=b"", snapshot_step=step
        )
        bench.mates.replace({MATE: Entry(MATE, record, [], 1.0)})

        async def body(bench: Bench = bench, phase: str = phase) -> None:
            assert bench.replica.phase == phase
            await bench.advance(18)
            await trio.sleep(1.0)
            measured(bench, 0.04)
            await trio.sleep(3.0)
            assert bench.replica.phase in ("warming", "active", "syncing")

        bench.live(body)
        assert phases(bench)[0] == phase
        assert phases(bench)[-1] == ("syncing" if phase == "active" else "warming")


def test_weights_of_genesis_are_not_promoted_while_the_store_cannot_be_read() -> None:
    bench = Bench(store_is_down=True)
    bench.clock.observe([Reading.signed(TRAINER, "run", 50)])

    async def body() -> None:
        await trio.sleep(PROMOTE_S + 6.0)
        assert bench.replica.phase == "syncing"
        assert bench.restores > 0
        bench.store_is_down = False
        await trio.sleep(6.0)
        assert bench.replica.phase == "active"

    bench.live(body)
    # With a state of its own it goes on without the store.
    other = Bench(store_is_down=True)
    other.clock.observe([Reading.signed(TRAINER, "run", 50)])
    other.replica.resumed(30)

    async def wait() -> None:
        await trio.sleep(PROMOTE_S + 6.0)
        assert other.replica.phase == "active"

    other.live(wait)


def test_a_clock_that_passes_over_a_snapshots_step_passes_over_no_snapshot() -> None:
    bench = Bench(snapshot_every=10)

    async def body() -> None:
        for step in (9, 11, 19, 20, 23, 44):
            await bench.advance(step)

    bench.live(body)
    assert bench.snapshots == [11, 20, 44]


def test_a_full_disk_costs_a_snapshot_and_not_the_replica() -> None:
    bench = Bench(snapshot_every=1)

    async def full(_step: int) -> None:
        raise LocalError("snapshot not saved: No space left on device")

    bench.save = full

    async def body() -> None:
        await bench.advance(1)
        await bench.advance(2)

    bench.live(body)
    assert bench.snapshots == [1, 2]
    assert [event.step for event in bench.of(SaveFailed)] == [1, 2]


def test_a_slow_disk_skips_snapshots_instead_of_queueing_them() -> None:
    bench = Bench(snapshot_every=1)

    async def slow(_step: int) -> None:
        await trio.sleep(10.0)

    bench.save = slow

    async def body() -> None:
        for step in range(1, 6):
            await bench.advance(step)
        await trio.sleep(11.0)
        await bench.advance(6)

    bench.live(body)
    assert bench.snapshots == [1, 6]


def phases(bench: Bench) -> list[str]:
    return [event.to for event in bench.events if isinstance(event, Phase)]


def test_a_held_replica_does_nothing_and_goes_on_where_it_was() -> None:
    bench = Bench()

    async def body() -> None:
        replica = bench.replica
        await bench.advance(1)
        replica.hold()
        replica.hold()
        assert not replica.serving
        replica.release()
        assert (replica.phase, replica.state_step) == ("active", 1)  # nothing was missed
        replica.release()
        bench.mate("active")
        replica.hold()
        await bench.advance(3)
        assert (replica.phase, replica.step, replica.state_step) == ("paused", 3, 1)
        assert not replica._averager.later_round(5)
        bench.donated_step = 3
        replica.release()
        await bench.advance(3)
        assert replica.phase == "syncing"
        assert [event.step for event in bench.events if isinstance(event, Step)] == [1]

    bench.live(body)
    assert phases(bench) == ["active", "paused", "active", "paused", "syncing"]


def test_holding_skips_no_synchronising() -> None:
    bench = Bench()

    async def body() -> None:
        bench.mate("active")
        await bench.advance(9)
        bench.replica.set_phase("syncing", "test")
        bench.replica.hold()
        bench.replica.set_phase("active", "somebody else's word")
        assert bench.replica.phase == "paused"
        bench.replica.release()
        assert bench.replica.phase == "syncing"

    bench.live(body)


def test_held_from_the_start_it_waits_and_then_begins() -> None:
    bench = Bench()
    bench.replica.hold()

    async def body() -> None:
        assert bench.replica.phase == "paused"
        bench.replica.release()
        assert bench.replica.phase == "active"

    bench.live(body)


@pytest.mark.catalogue(36, 41)
def test_rounds_that_fail_or_hang_are_abandoned_and_training_goes_on() -> None:
    bench = Bench()
    asked: list[int] = []

    class Stuck:
        """The first round fails, the second one hangs until its deadline."""

        async def average(self, number: int, *_args: Any, deadline: float, **_more: Any) -> Any:
            asked.append(number)
            if len(asked) == 1:
                raise RoundFailed("2 of 3 members are gone")
            with trio.fail_after(deadline):
                await trio.sleep_forever()

    class Packing(Weights):
        def pack(self, number: int) -> Any:
            return PackedSlice(number, 0, 0, torch.zeros(8), 0)

        def give_up(self, packed: Any) -> None:
            given_up.append(packed.number)

    given_up: list[int] = []
    bench.replica._averager = cast(Averager, Stuck())
    bench.replica._compute = Packing()
    bench.replica._training = attrs.evolve(bench.replica._training, average_every=1)

    async def body() -> None:
        bench.mate("active")
        await bench.advance(1)
        await bench.advance(2)
        await bench.advance(3)
        await trio.sleep(ROUND_S + 1)
        await bench.advance(4)
        assert bench.replica.phase == "active"
        assert [step.step for step in bench.of(Step)] == [1, 2, 3, 4]

    bench.live(body)
    assert len(asked) >= 3
    failed, hung = bench.of(RoundAbandoned)[:2]
    assert (failed.round, failed.why) == (1, "2 of 3 members are gone")
    assert (hung.round, hung.why) == (asked[1], "timeout")
    assert given_up == asked[: len(given_up)]  # no slice stays in flight
    assert len(given_up) >= 2


def test_samples_behind_a_round_that_failed_count_in_the_next() -> None:
    """And are forgotten with one that succeeded, or with the state that they went into."""
    bench = Bench()
    weights: list[float] = []

    class Sometimes:
        """Fails but for every third round."""

        async def average(
            self, number: int, index: int, buffer: memoryview, weight: float, **_more: Any
        ) -> Outcome:
            await trio.lowlevel.checkpoint()
            weights.append(weight)
            if len(weights) % 3:
                raise RoundFailed("every other member was lost")
            return Outcome(
                number=number, slice_index=index, members=(OWN, MATE), fraction=1.0, vector=bytearray(buffer),
                averaged=[(0, 8)], contributors=[], checksum="", drops=(), payload_out=0, payload_in=0,
                weight_total=1.0,
            )  # fmt: skip

    class Packing(Weights):
        def pack(self, number: int) -> Any:
            return PackedSlice(number, 0, 0, torch.zeros(8), 0)

        def give_up(self, packed: Any) -> None:
            pass

        def merge(self, _packed: Any, _outcome: Any) -> Any:
            return 0.25

    bench.replica._averager = cast(Averager, Sometimes())
    bench.replica._compute = Packing()
    bench.replica._training = attrs.evolve(bench.replica._training, average_every=1)

    async def body() -> None:
        bench.mate("active")
        for step in range(1, 9):
            await bench.advance(step)

    bench.live(body)
    assert weights == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [event.disagreement for event in bench.of(RoundFinished)] == [0.25, 0.25]
    assert bench.replica.disagreement == 0.25
