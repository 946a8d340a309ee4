"""The state of one replica: what it begins with, what is written of it, and what replaces it.

It begins with the newest own snapshot that is sound, else with the run's checkpoint where no mate could give
its state, else with a mate's. Snapshots are written while training goes on, one at a time: now and then, for
newcomers who ask for state, and when the replica leaves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import final

import trio

from agorad.checkpoints import Checkpoints, remove_older
from agorad.events import Trouble
from agorad.exitcodes import DaemonExit, ExitCode
from agorad.node import Node
from p2p.errors import LocalError, Refused, RemoteError
from p2p.groups import plain
from p2p.identity import PeerId
from stage.clock import StepClock
from stage.compute import StageCompute
from stage.device import STEP, Device
from stage.events import CheckpointFailed, Resumed, Saved, SaveFailed
from stage.fetch import Fetch, Source
from stage.replica import Fetched, Replica
from stage.roster import StageView
from stage.snapshot import SnapshotStore


@final
class Keeper:
    """Of the state that ``compute`` holds."""

    replica: Replica
    """Whose state it is; set by who makes both, since a replica is given what this one does."""

    def __init__(
        self,
        node: Node,
        stage: int,
        *,
        clock: StepClock,
        compute: StageCompute,
        device: Device,
        store: SnapshotStore,
        checkpoints: Checkpoints,
        mates: StageView,
    ) -> None:
        self.saved_bytes = 0
        """Of the last snapshot."""
        self._node = node
        self._stage = stage
        self._clock = clock
        self._compute = compute
        self._device = device
        self._store = store
        self._checkpoints = checkpoints
        self._mates = mates
        self._saving = trio.Lock()

    async def resume(self) -> None:
        """Load the newest own snapshot, if there is a sound one of this stage.

        One whose numbers are none to go on with is removed, and the one before is tried.
        """
        tried = 0
        while True:
            state = await trio.to_thread.run_sync(self._store.load_newest)
            for problem in self._store.problems:
                self._node.warnings["snapshot"] = problem
            if state is None:
                break
            try:
                await self._device.run(STEP, self._compute.load, state)
            except LocalError as error:
                # It was given another stage since, say. What it lacks then a mate has.
                self._node.warnings["snapshot"] = str(error)
                return
            if await self._device.run(STEP, self._compute.sound):
                self.replica.resumed(state.step)
                self._node.emit(Resumed(step=state.step))
                return
            tried += 1
            self._node.emit(
                Trouble(
                    kind="weights",
                    why=f"the snapshot of step {state.step} holds no numbers to go on with",
                    reaction="removed",
                )
            )
            await trio.to_thread.run_sync(self._store.discard_newest)
        if tried:
            raise DaemonExit(
                ExitCode.NUMERICAL,
                f"none of {tried} snapshots holds weights to go on with, so they were removed; start it "
                "again: it fetches the state of another replica",
            )

    async def begin_at_checkpoint(self) -> None:
        """Where no mate could give its state: that of the run's store, if it is newer than ours."""
        if self._mates.in_phase("active"):
            return
        try:
            async with trio.open_nursery() as nursery:

                async def give_up() -> None:
                    await self._node.stopping.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(give_up)
                await self.restore()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            error = plain(group)
            if not isinstance(error, LocalError):
                raise error from None
            if not self.replica.state_step and (self._clock.step or self._checkpoints.generation):
                raise DaemonExit(
                    ExitCode.NETWORK,
                    f"no other replica of stage {self._stage} is up, this one has no state, and {error}",
                ) from None
            self._node.emit(CheckpointFailed(why=str(error)))

    async def restore(self) -> None:
        """The run's newest checkpoint, if it is newer than our state. Raises LocalError."""
        file = await self._checkpoints.restore(self._store, self.replica.state_step or None)
        if file is not None:
            with file:
                await self._device.run(STEP, self._compute.load, file.mapped())
            self.replica.resumed(file.manifest.step)

    async def fetch(self, donors: Sequence[PeerId], oldest: int) -> Fetched:
        """Install the state of the first of these mates, perhaps with help of the others."""
        fetch = Fetch(
            self._node.host,
            self._stage,
            floats=self._compute.floats,
            fingerprint=self._compute.fingerprint,
            store=self._store,
            emit=self._node.emit,
        )
        sources = [Source(donor, self._mates.addrs(donor)) for donor in donors]
        with await fetch.run(sources, oldest=oldest) as file:
            await self._device.run(STEP, self._compute.load, file.mapped())
            if not await self._device.run(STEP, self._compute.sound):
                await trio.to_thread.run_sync(self._store.discard_newest)
                raise RemoteError("the donor's weights are no numbers to go on with")
            return Fetched(file.manifest.step, fetch.resumed)

    async def snapshot(self, step: int) -> None:
        """Write the state of ``step`` to disk while training goes on; one at a time."""
        async with self._saving:
            held = await self._device.run(STEP, self._compute.hold, step)
            try:
                size = await trio.to_thread.run_sync(self._store.save, held)
            finally:
                held.release()
        self.saved_bytes = size
        self._node.emit(Saved(step=step, bytes=size))
        state = self._node.config.node.state
        await trio.to_thread.run_sync(remove_older, state, self._checkpoints.generation)

    async def donated(self) -> None:
        """A newcomer asks for state: give it one of about now, not the last snapshot, however old.

        A few newcomers one after the other get the same: each snapshot is written for many to read.
        """
        if self.replica.phase != "active":
            raise Refused("not_active", f"this replica is {self.replica.phase}", 5.0)
        newest, spare = self._store.newest_step(), self._node.manifest.training.max_stale_steps // 5
        if newest is None or not self.replica.step - spare <= newest <= self.replica.step:
            await self.snapshot(self.replica.step)

    async def leave(self, *, moved: bool) -> None:
        """Keep what the next life begins with. ``moved``: it is at another stage."""
        # One of before a roll-back goes into a folder that nobody begins with.
        if moved:
            with contextlib.suppress(LocalError):  # then the next life says that it does not fit
                await trio.to_thread.run_sync(self._store.clear)
            return
        spoilt = self._node.ending is not None and self._node.ending.code == ExitCode.NUMERICAL
        if self.replica.phase in ("active", "warming") and not spoilt:
            try:
                await self.snapshot(self.replica.step)
            except LocalError as error:  # a full disk: the one before is what is left
                self._node.emit(SaveFailed(step=self.replica.step, why=str(error)))
