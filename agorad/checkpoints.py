"""A worker and the run's checkpoint store (``stage.checkpoints``): when it writes, and when it begins there.

A worker that the manifest names a writer publishes its stage's state every ``checkpoint.every`` steps while
it is ACTIVE, unless another writer of the stage has. Any worker that starts without an ACTIVE mate takes the
newest checkpoint that counts if it is newer than its own state: so a run goes on after everybody was gone.

A roll-back is a manifest with a higher ``checkpoint.generation``. Workers start anew when they take it up,
with an empty folder of snapshots (there is one a generation, and the older ones go once the new one has
something), and mates of other generations are none: so the first ones begin with the checkpoint, the rest
with the state of the first.

Limits: one transfer at a time, which may take ``ASK_S`` and its bytes at ``SLOWEST``; after a failure the
next try is ``RETRY_S`` later.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import trio

from agorad.node import Node
from p2p.errors import LocalError
from stage.checkpoints import CheckpointStore, Entry
from stage.events import CheckpointFailed, CheckpointSaved, Restored
from stage.snapshot import SnapshotFile, SnapshotStore
from stage.state import FLOAT_BYTES, VECTORS

LOOK_S: Final = 2.0
RETRY_S: Final = 60.0
ASK_S: Final = 60.0
SLOWEST: Final = 1e6
"""Bytes a second."""
FOLDER: Final = "snapshots"

T = TypeVar("T")


def snapshots_of(state: Path, generation: int) -> Path:
    """The folder of a node's snapshots of that generation."""
    return state / (FOLDER if generation == 0 else f"{FOLDER}-{generation}")


def remove_older(state: Path, generation: int) -> None:
    """Remove the snapshots of generations before this one."""
    for folder in state.glob(f"{FOLDER}*"):
        number = folder.name.removeprefix(FOLDER).removeprefix("-") or "0"
        if number.isdecimal() and int(number) < generation:
            shutil.rmtree(folder, ignore_errors=True)


class Checkpoints:
    """See the head of this file."""

    def __init__(self, node: Node, stage: int, *, floats: int, fingerprint: str) -> None:
        """``floats`` and ``fingerprint`` are those of the stage's layout."""
        self._node = node
        self._stage = stage
        self._floats = floats
        self._fingerprint = fingerprint
        self._line = node.manifest.checkpoint.line
        """Of the state that this worker has; a manifest with another generation makes it start anew."""

    @property
    def generation(self) -> int:
        """Of the state that this worker has."""
        return self._line.generation

    def rolled_back(self) -> bool:
        """Whether the run's manifest has moved to another generation."""
        return self._node.manifest.checkpoint.generation != self.generation

    def _store(self) -> CheckpointStore | None:
        url = self._node.manifest.checkpoint.store
        return CheckpointStore(url, self._node.manifest.run.id, self._stage) if url else None

    async def restore(self, snapshots: SnapshotStore, have: int | None) -> SnapshotFile | None:
        """The newest checkpoint that counts, installed, if it is newer than ``have``. Raises LocalError."""
        store = self._store()
        if store is None:
            return None
        began = trio.current_time()
        entries = await self._bounded(lambda: store.entries(self._line))
        if not entries or (have is not None and entries[-1].step <= have):
            return None
        step = entries[-1].step

        def take() -> SnapshotFile:
            writers = self._node.manifest.checkpoint.writers
            manifest = store.manifest(step, writers, floats=self._floats, fingerprint=self._fingerprint)
            arriving = snapshots.receive(manifest)
            try:
                store.fetch(arriving)
                return snapshots.install(arriving)
            finally:
                arriving.close()
                snapshots.let_go()

        file = await self._bounded(take, VECTORS * FLOAT_BYTES * self._floats)
        self._node.emit(Restored(step=step, bytes=file.manifest.size, seconds=trio.current_time() - began))
        return file

    async def run(
        self, snapshots: SnapshotStore, step: Callable[[], int | None], save: Callable[[int], Awaitable[None]]
    ) -> None:
        """Write checkpoints when they are due, until cancelled or the run is rolled back.

        ``step`` is that of the state while this replica is ACTIVE, else None; ``save`` writes a snapshot.
        """
        while not self.rolled_back():
            await trio.sleep(LOOK_S)
            now, settings = step(), self._node.manifest.checkpoint
            if now is None or self._node.identity.peer_id not in settings.writers or now < settings.every:
                continue
            try:
                if await self._due(now):
                    await self._write(snapshots, now, save)
            except LocalError as error:
                self._node.emit(CheckpointFailed(why=str(error)))
                self._node.warnings["checkpoint"] = str(error)
                await trio.sleep(RETRY_S)

    _newest: Entry | None = None
    """In the store, as far as this worker knows."""

    async def _due(self, step: int) -> bool:
        every, store = self._node.manifest.checkpoint.every, self._store()
        if store is None or (self._newest is not None and step // every <= self._newest.step // every):
            return False
        entries = await self._bounded(lambda: store.entries(self._line))
        self._newest = entries[-1] if entries else None
        return self._newest is None or step // every > self._newest.step // every

    async def _write(
        self, snapshots: SnapshotStore, step: int, save: Callable[[int], Awaitable[None]]
    ) -> None:
        store, settings, began = self._store(), self._node.manifest.checkpoint, trio.current_time()
        assert store is not None
        if snapshots.newest_step() != step:
            await save(step)
        file = await trio.to_thread.run_sync(snapshots.newest)
        assert file is not None
        with file:
            manifest = file.manifest
            await self._bounded(
                lambda: store.save(
                    file.readable, manifest, self._node.identity, self._line, keep=settings.keep
                ),
                manifest.size,
            )
        self._newest = Entry(manifest.step, self.generation)
        self._node.warnings.pop("checkpoint", None)
        seconds = trio.current_time() - began
        self._node.emit(CheckpointSaved(step=manifest.step, bytes=manifest.size, seconds=seconds))

    async def _bounded(self, call: Callable[[], T], size: int = 0) -> T:
        try:
            with trio.fail_after(ASK_S + size / SLOWEST):
                return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
        except trio.TooSlowError:
            url = self._node.manifest.checkpoint.store
            raise LocalError(f"the checkpoint store {url} did not answer in time") from None
