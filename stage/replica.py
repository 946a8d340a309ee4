"""One replica's life: it follows the step clock, averages slices with its mates, and knows its phase.

    (start) -> ACTIVE                      genesis: the run's clock stands at 0
    (start) -> SYNCING                     anything else: the state is old or missing
    SYNCING -> WARMING -> ACTIVE           state no older than max_stale_steps, then close to its mates on
                                           the last slice, then warm_steps with averaging weight 0
    ACTIVE | WARMING -> SYNCING            fell behind by more than max_stale_steps, and a mate is ACTIVE
    SYNCING -> ACTIVE                      promoted: no mate was ACTIVE for PROMOTE_S, and no SYNCING mate
                                           holds a fresher state (tie: lowest hash)

While SYNCING the optimizer is frozen and averaging weight is 0; what a round brings is taken over whole. The
lag that counts is that of the state when its download began: from then on the replica follows the clock, and
the disagreement measured in a round says whether it kept up. Where the download took so long that it did not,
rounds may bring it closer for one cycle, since another download would be as old; then it is taken again.

Rounds never stop training: a slice is packed right after a step, averaged in the background, and the
difference is merged whenever it arrives. One round at a time, so a slice is never packed again before its
last correction landed. The samples behind a contribution are forgotten only when a round succeeded.

With synchronous steps (``averaging = "powersgd"``, ``stage.synchronous``) an update waits for the mean of
the stage's gradients, and every ``average_every`` steps for a slice. Then steps are late together where
rounds are slow, so who fell behind is told by the mates' steps and not by the clock; and a SYNCING replica
whose state is recent takes the others' updates.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import attrs
import trio

from p2p.averaging import Averager, NobodyCame, Outcome
from p2p.errors import LocalError, P2PError
from p2p.event import Emit
from p2p.identity import PeerId
from stage.clock import StepClock
from stage.config import TrainingConfig
from stage.device import STEP, Device
from stage.events import (
    CheckpointFailed,
    FetchFailed,
    Phase,
    RoundAbandoned,
    RoundFinished,
    SaveFailed,
    SettingsTaken,
    Step,
)
from stage.roster import MATES, SERVING, Entry, StageView
from stage.synchronous import ROUNDS, SLICE, SynchronousSteps

ROUND_S = 30.0
"""Deadline of a whole round, matchmaking included."""
PROMOTE_S = 30.0
CLOSE_RATIO = 1.5
CLOSE_FLOOR = 0.05
"""A disagreement below this is close, whatever the median of mates that happen to agree very well."""
SYNC_RETRY_S = 2.0
AHEAD = 2
"""A mate's round may be this far ahead of our own clock to be joined."""
AHEAD_SYNCING = 64
"""The same while SYNCING, when the clock comes from the hash table only."""


class PackedSlice(Protocol):
    @property
    def index(self) -> int: ...

    def buffer(self) -> memoryview: ...


class ReplicaCompute(Protocol):
    """The part of ``StageCompute`` that a replica's life needs; device thread only."""

    def configure(self, training: TrainingConfig) -> None:
        """Use these settings from the next step on."""

    def step(self, step: int) -> int:
        """Update with what is accumulated; how many samples it used."""

    def forget(self) -> None:
        """Throw away what is accumulated."""

    def pack(self, number: int) -> PackedSlice: ...

    def give_up(self, packed: Any) -> None:
        """The packed slice's round brought nothing."""

    def merge(self, packed: Any, outcome: Outcome) -> float:
        """Merge; the packed slice's relative distance to the average."""


@attrs.frozen
class Fetched:
    """A mate's state that was installed."""

    step: int
    resumed: bool
    """Whether the download went on with what an earlier one had left."""


@attrs.frozen
class LastRound:
    number: int
    fraction: float
    members: int
    at: float


class Replica:
    """See the module's docstring."""

    def __init__(
        self,
        *,
        peer_id: PeerId,
        stage: int,
        training: TrainingConfig,
        clock: StepClock,
        device: Device,
        compute: ReplicaCompute,
        averager: Averager,
        steps: SynchronousSteps | None = None,
        mates: StageView,
        refresh_mates: Callable[[], Awaitable[None]],
        fetch_state: Callable[[Sequence[PeerId], int], Awaitable[Fetched]],
        restore_state: Callable[[], Awaitable[None]],
        take_snapshot: Callable[[int], Awaitable[None]],
        snapshot_every: int,
        phase_changed: Callable[[], None],
        now: Callable[[], float],
        emit: Emit,
    ) -> None:
        self.peer_id = peer_id
        self.stage = stage
        self._training = training
        self._newer: TrainingConfig | None = None
        """Settings to take up at the next step."""
        self._clock = clock
        self._device = device
        self._compute = compute
        self._averager = averager
        self._steps = steps
        """Where updates are taken together; None: each replica for itself."""
        self._mates = mates
        self._refresh_mates = refresh_mates
        self._fetch_state = fetch_state
        self._restore_state = restore_state
        self._take_snapshot = take_snapshot
        self._snapshot_every = snapshot_every
        self._phase_changed = phase_changed
        self._now = now
        self._emit = emit
        self.phase = "joining"
        self.step = 0
        """Step of the clock that this replica has followed to."""
        self.state_step = 0
        """Step that the weights belong to; behind ``step`` only while SYNCING."""
        self.disagreement: float | None = None
        self.last_round: LastRound | None = None
        self.rounds_in_flight = 0
        self._advanced = trio.Event()
        self._fresh = False
        """While SYNCING: the state is recent enough, closeness is not yet shown."""
        self._rounds_left = 0
        """While SYNCING with a state that could not be newer: rounds that may still bring it closer."""
        self._failed_fetches = 0
        self._saving = False
        self._sync_news = trio.Event()
        """Something that ends or begins SYNCING may have happened: a phase, a round."""
        self._warm_from = 0
        self._held = False
        """Paused: no phase but that one, no steps, no rounds."""
        self._before = ""
        """The phase that was paused."""
        self._samples_since_round = 0.0
        self._last_round_number = 0
        self._mates_round = 0
        """Newest round that a mate is known to be at; with synchronous steps the newest step."""
        self._round_wanted = trio.Event()
        averager.later_round = self._mate_is_at

    def configure(self, training: TrainingConfig) -> None:
        """Take up settings of a newer manifest before the next step."""
        self._newer = training

    def resumed(self, step: int) -> None:
        """The weights are those of a snapshot of ours, or of a checkpoint, of ``step``; not while ACTIVE."""
        self.step = self.state_step = step

    def resync(self, why: str) -> bool:
        """Give the state up and fetch a mate's; False, and nothing done, where no mate is ACTIVE."""
        if not self._active_mates():
            return False
        self._fresh = False
        self.disagreement = None
        self.set_phase("syncing", why)
        return True

    # Phases

    def set_phase(self, to: str, why: str) -> None:
        """Change phase, tell the bus and the stage."""
        if to == self.phase or (self._held and to != "paused"):
            return
        before, self.phase = self.phase, to
        self._emit(Phase(from_=before, to=to, why=why))
        self._sync_news.set()
        self._phase_changed()

    def hold(self) -> None:
        """Do nothing until ``release``: no microbatches, no steps, no rounds. The clock is still followed."""
        if not self._held:
            self._held, self._before = True, self.phase
            self.set_phase("paused", "asked to")

    def release(self) -> None:
        """Back to work: at once where nothing was missed, else as after a start."""
        if not self._held:
            return
        self._held = False
        if self.lag == 0 and self._before in ("active", "warming"):
            self.set_phase(self._before, "resumed; nothing was missed")
        elif self._clock.step == 0:
            self.set_phase("active", "genesis")
        else:
            self._fresh, self.disagreement = self.lag <= self._training.max_stale_steps, None
            self.set_phase("syncing", f"resumed {self.lag} steps behind the clock")
        self._round_wanted.set()

    @property
    def serving(self) -> bool:
        """Whether this replica takes microbatches."""
        return self.phase in ("warming", "active")

    @property
    def lag(self) -> int:
        return max(0, self._clock.step - self.state_step)

    def clock_advanced(self) -> None:
        """The clock has a new step; called on the event loop."""
        self._advanced.set()

    async def run(self) -> None:
        """Enter the right phase, then follow the clock until cancelled."""
        mates_at = max(
            (entry.record.snapshot_step or 0 for entry in self._active_mates().values()), default=0
        )
        if self._held:
            pass
        elif self._clock.step == 0 and mates_at > self.state_step + self._training.max_stale_steps:
            # The run begins anew from its checkpoints, and no trainer has said yet how far it was.
            self.set_phase("syncing", f"state of step {self.state_step}, a mate has that of step {mates_at}")
        elif self._clock.step == 0:
            self.set_phase("active", "genesis")
        else:
            self._fresh = self.lag <= self._training.max_stale_steps
            self.set_phase("syncing", f"state of step {self.state_step}, the run is at {self._clock.step}")
        self._last_round_number = self._clock.step // self._training.average_every
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_clock, nursery)
            if self._steps is None:
                nursery.start_soon(self._run_rounds)
            nursery.start_soon(self._synchronise)

    # Steps

    async def _follow_clock(self, nursery: trio.Nursery) -> None:
        while True:
            target = self._target()
            if target <= self.step:
                self._advanced = trio.Event()
                if self._target() <= self.step:
                    await self._advanced.wait()
                continue
            await self._take_up(target)
            behind = self._behind(target)
            if self.serving and behind > self._training.max_stale_steps and self._active_mates():
                self._fresh = False
                self.set_phase("syncing", f"{behind} steps behind the clock")
            if not self.serving and not self._following:
                await self._device.run(STEP, self._compute.forget)
                self.step = target
            else:
                await self._update(target, nursery)
            self._round_wanted.set()

    def _target(self) -> int:
        """The step to go to: the clock's, or a later one whose update a mate is taking already."""
        clock = self._clock.step
        return clock if self._steps is None else max(clock, min(self._mates_round, clock + AHEAD))

    def _behind(self, target: int) -> int:
        if self._steps is None:
            return target - self.step
        mates = [entry.record.step for entry in self._active_mates().values()]
        return min(target, max(mates, default=0)) - self.step

    @property
    def _following(self) -> bool:
        """SYNCING, with a state that the others' updates can be made to."""
        return self._steps is not None and self.phase == "syncing" and self._fresh

    async def _take_up(self, target: int) -> None:
        if self._newer is None:
            return
        before, after, self._newer = self._training, self._newer, None
        await self._device.run(STEP, self._compute.configure, after)
        self._training = after
        names = [field.name for field in attrs.fields(TrainingConfig)]
        settings = [f"{name} = {getattr(after, name)}" for name in names if _differ(before, after, name)]
        self._emit(SettingsTaken(step=target, settings=settings))

    async def _update(self, target: int, nursery: trio.Nursery) -> None:
        if self._steps is None:
            samples = await self._device.run(STEP, self._compute.step, target)
        else:
            mates = set(self._mates.in_phase(*SERVING)) - {self.peer_id}
            samples = await self._steps.step(target, mates, weigh=self.phase == "active")
            if self.phase == "warming":
                await self._device.run(STEP, self._compute.forget)
        before, self.step, self.state_step = self.step, target, target
        self._samples_since_round += samples
        self._emit(Step(stage=self.stage, replica=self.peer_id, step=target, samples=samples))
        if self.phase == "warming" and target - self._warm_from >= self._training.warm_steps:
            self.set_phase("active", f"warmed up for {self._training.warm_steps} steps")
        every = self._snapshot_every
        if every and target // every > before // every:  # the clock may pass over the very step
            nursery.start_soon(self._save, target)
        every = self._training.average_every
        if self._steps is not None and target // every > before // every:
            await self._round(target // every, ROUNDS * target + SLICE)

    async def _save(self, step: int) -> None:
        """A snapshot while training goes on: a slow disk skips some, a full one costs no replica."""
        if self._saving:
            return
        self._saving = True
        try:
            await self._take_snapshot(step)
        except LocalError as error:
            self._emit(SaveFailed(step=step, why=str(error)))
        finally:
            self._saving = False

    # Rounds

    async def _run_rounds(self) -> None:
        """One round after the other: that of our own step, or a later one that a mate is at."""
        while True:
            number = max(self.step // self._training.average_every, self._mates_round)
            if number > self._last_round_number:
                self._last_round_number = number
                await self._round(number)
            else:
                self._round_wanted = trio.Event()
                await self._round_wanted.wait()

    def _mate_is_at(self, number: int) -> bool:
        """A mate has opened a round that we have not reached; whether we join it there.

        Replicas learn of a step at different moments, and one that takes no microbatches learns last. If
        each insisted on the round of its own step they could miss each other for ever, so the highest number
        wins, within what the clock can plausibly have advanced.
        """
        if self._held:
            return False
        if self._steps is not None:
            return self._mate_steps_to(number // ROUNDS)
        ahead = number - self._clock.step // self._training.average_every
        if ahead > (AHEAD_SYNCING if self.phase == "syncing" else AHEAD):
            return False
        self._mates_round = max(self._mates_round, number)
        self._round_wanted.set()
        return True

    def _mate_steps_to(self, step: int) -> bool:
        """The same for an update that a mate is taking: none waits for one that is over there."""
        if step - self._clock.step > AHEAD or not (self.serving or self._following):
            return False
        self._mates_round = max(self._mates_round, step)
        self._advanced.set()
        return True

    async def _round(self, number: int, wire: int | None = None) -> None:
        """Average slice ``number``, in a round of that number or of number ``wire``."""
        wire = number if wire is None else wire
        mates = set(self._mates.in_phase(*(MATES if self._steps is None else SERVING))) - {self.peer_id}
        if not mates or self._held:
            return  # a round of one is not a round
        self.rounds_in_flight += 1
        try:
            weight = self._samples_since_round if self.phase == "active" else 0.0
            packed = await self._device.run(STEP, self._compute.pack, number)
            try:
                outcome = await self._averager.average(
                    wire, packed.index, packed.buffer(), weight, expected=mates, deadline=ROUND_S
                )
            except (P2PError, trio.TooSlowError):
                await self._device.run(STEP, self._compute.give_up, packed)
                raise
            distance = await self._device.run(STEP, self._compute.merge, packed, outcome)
        except NobodyCame:
            return  # a round of one is not a round
        except (P2PError, trio.TooSlowError) as error:
            self._emit(RoundAbandoned(round=wire, stage=self.stage, why=str(error) or "timeout"))
            return
        finally:
            self.rounds_in_flight -= 1
        self._samples_since_round = max(0.0, self._samples_since_round - weight)
        self.disagreement = distance
        self._sync_news.set()
        self.last_round = LastRound(wire, outcome.fraction, len(outcome.members), self._now())
        self._emit(
            RoundFinished(
                round=wire,
                stage=self.stage,
                slice=outcome.slice_index,
                members=list(outcome.members),
                fraction=outcome.fraction,
                checksum=outcome.checksum,
                drops=[list(drop) for drop in outcome.drops],
                disagreement=distance,
            )
        )
        self._phase_changed()

    # Synchronising

    async def _synchronise(self) -> None:
        alone_since: float | None = None
        while True:
            if self.phase != "syncing":
                self._sync_news = trio.Event()
                await self._sync_news.wait()
                alone_since = None
                continue
            await self._refresh_mates()
            donors = self._active_mates()
            if not donors:
                alone_since = alone_since if alone_since is not None else trio.current_time()
                if trio.current_time() - alone_since >= PROMOTE_S and self._freshest():
                    await self._promote()
            else:
                alone_since = None
                await self._catch_up(donors)
            if self.phase == "syncing":
                self._sync_news = trio.Event()
                with trio.move_on_after(SYNC_RETRY_S):
                    await self._sync_news.wait()

    async def _promote(self) -> None:
        """Nobody else has a better state, but perhaps the run's checkpoint store."""
        try:
            await self._restore_state()
        except LocalError as error:
            self._emit(CheckpointFailed(why=str(error)))
            if not self.state_step:
                return  # ACTIVE with weights of genesis would undo the run
        if not self._active_mates() and self.phase == "syncing":
            self.step = self.state_step = max(self.step, self._clock.step)
            self.set_phase("active", f"no mate was active for {PROMOTE_S:.0f} s")

    def _active_mates(self) -> dict[PeerId, Entry]:
        mates = self._mates.in_phase("active")
        mates.pop(self.peer_id, None)
        return mates

    def _freshest(self) -> bool:
        """Whether nobody in the stage who is SYNCING too has a better claim."""

        def claim(peer: PeerId, step: int) -> tuple[int, bytes]:
            return -step, hashlib.sha256(peer.encode()).digest()

        mine = claim(self.peer_id, self.state_step)
        others = self._mates.in_phase("syncing")
        others.pop(self.peer_id, None)
        return all(mine < claim(peer, e.record.snapshot_step or 0) for peer, e in others.items())

    async def _catch_up(self, donors: dict[PeerId, Entry]) -> None:
        """Get the state, or look whether the round since then shows that it is close to the mates'."""
        if not self._fresh:
            freshest = sorted(donors, key=lambda peer: -donors[peer].record.step)
            turn = self._failed_fetches % len(freshest)
            sources = [*freshest[turn:], *freshest[:turn]]
            oldest = self._clock.step - self._training.max_stale_steps
            try:
                fetched = await self._fetch_state(sources, oldest)
            except (P2PError, trio.TooSlowError) as error:
                self._emit(FetchFailed(donor=sources[0], why=str(error) or "too slow"))
                self._failed_fetches += 1  # the next attempt asks another donor
                return
            # No further than our own clock: a step that a donor made up must not stop us from following it.
            self.state_step = min(fetched.step, self._clock.step)
            self.step = max(self.step, self.state_step)
            # Where a download takes longer than the run allows a state to lag, another would be as old: one
            # that was as new as can be when its download began has to do.
            self._fresh = fetched.resumed or fetched.step >= oldest
            self._rounds_left = self._training.slices if self.lag > self._training.max_stale_steps else 0
            self._samples_since_round = 0.0  # what was learned from them is gone with the state before
            self.disagreement = None  # that of older weights
            return
        if self.disagreement is None:
            return  # closeness is measured by a round that began after the state was installed
        close, limit = self._closeness([entry.record.disagreement for entry in donors.values()])
        if close:
            self._warm_from = self.step
            self.set_phase("warming", f"disagreement {self.disagreement:.3f}, limit {limit}")
        elif self._rounds_left:
            self._rounds_left -= 1
            self.disagreement = None
        else:
            self._fresh = False  # drifted away: take the state again

    def _closeness(self, mates: list[float | None]) -> tuple[bool, str]:
        """Whether we are as near to the average as ACTIVE mates are, and the limit for people.

        A lone ACTIVE mate is the average, at distance 0 of itself: having shared one round with it is enough.
        """
        known = [value for value in mates if value is not None]
        if len(mates) < 2 or not known or self.disagreement is None:
            return self.disagreement is not None, "none with one active mate"
        limit = max(CLOSE_FLOOR, CLOSE_RATIO * statistics.median(known))
        return self.disagreement <= limit, f"{limit:.3f}"


def _differ(before: TrainingConfig, after: TrainingConfig, name: str) -> bool:
    return bool(getattr(before, name) != getattr(after, name))
