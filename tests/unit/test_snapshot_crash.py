"""No crash leaves a snapshot that is not whole: a writer killed at any moment, a disk full at any step.

The writer is forked from this process, so that a kill costs milliseconds, not an import of torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p2p.errors import LocalError
from stage import snapshot
from stage.snapshot import SnapshotStore
from stage.state import CHUNK

FLOATS = 100 * 1024  # more than a chunk in all
assert 3 * 4 * FLOATS > CHUNK


class Filled:
    """A state in which every number is the step."""

    floats = FLOATS
    updates = 3
    fingerprint = "f" * 64

    def __init__(self, step: int, value: float | None = None) -> None:
        self.step = step
        self._value = float(step) if value is None else value

    def read(self, vector: int, start: int, stop: int) -> Tensor:
        return torch.full((stop - start,), self._value)


def newest(folder: Path) -> int | None:
    """Step of the newest snapshot, all of whose bytes are those of that step; nothing was passed over."""
    store = SnapshotStore(folder)
    state = store.load_newest()
    assert store.problems == []
    if state is None:
        return None
    assert all(bool((vector == float(state.step)).all()) for vector in state.vectors)
    return state.step


def write_for_ever(folder: Path, first: int, told: int) -> None:
    """Save step after step, and tell which one is done."""
    store = SnapshotStore(folder)
    for step in range(first, first + 1_000_000):
        store.save(Filled(step))
        os.write(told, step.to_bytes(8, "big"))


def killed_writer(folder: Path, first: int, within_s: float) -> tuple[int, float]:
    """Kill -9 a writer within that time after its first save; the last it told of, and the first's time."""
    torch.set_num_threads(1)
    reader, told = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            write_for_ever(folder, first, told)
        finally:
            os._exit(1)
    os.close(told)
    with os.fdopen(reader, "rb") as said:
        words = said.read(8)
        save_s = time.monotonic() - began
        time.sleep(within_s)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        words += said.read()
    return int.from_bytes(words[-8:], "big"), save_s


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.long)])
def test_kill_9_during_writes_loses_no_snapshot(tmp_path: Path, kills: int) -> None:
    rng = random.Random(5)
    save_s, in_the_middle = 0.0, 0
    for number in range(kills):
        saved, save_s = killed_writer(tmp_path, 1000 * number + 1, rng.uniform(0.0, 1.5 * save_s))
        left = [path.suffix for path in tmp_path.iterdir()]
        in_the_middle += ".part" in left or left.count(".state") != left.count(".manifest")
        # What it told of is there, or the next one, of which it could not tell any more.
        assert newest(tmp_path) in (saved, saved + 1)
    assert in_the_middle >= kills // 10, "the kills did not hit the writing"
    SnapshotStore(tmp_path).save(Filled(1_000_000))
    assert newest(tmp_path) == 1_000_000
    assert len(list(tmp_path.iterdir())) == 4  # two snapshots, nothing of all the others


def failing(at: int) -> Callable[[], None]:
    """Raises "no space left" at its ``at``-th call."""
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return call


@pytest.mark.parametrize("at", range(1, 10))
def test_a_disk_that_is_full_at_any_step_leaves_the_one_before_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    store = SnapshotStore(tmp_path)
    store.save(Filled(1))
    full = failing(at)
    opened, fsync, rename = Path.open, os.fsync, Path.rename

    def fail_open(self: Path, *args: Any, **kwargs: Any) -> Any:
        full()
        return opened(self, *args, **kwargs)

    def fail_fsync(descriptor: int) -> None:
        full()
        fsync(descriptor)

    def fail_rename(self: Path, target: Path) -> Path:
        full()
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fail_open)
        patched.setattr(os, "fsync", fail_fsync)
        patched.setattr(Path, "rename", fail_rename)
        failed: Any = contextlib.nullcontext()
        if at <= 8:
            failed = pytest.raises(LocalError, match="No space left on device")
        with failed:
            store.save(Filled(2))
    assert not list(tmp_path.glob("*.part"))
    if at <= 6:  # both files: opened, flushed, renamed
        assert newest(tmp_path) == 1
        assert len(list(tmp_path.iterdir())) == 2
    else:
        assert newest(tmp_path) == 2


def test_a_state_that_is_not_finite_pushes_no_sound_one_out(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    store.save(Filled(1))
    for value in (float("nan"), float("inf")):
        with pytest.raises(LocalError, match="not finite"):
            store.save(Filled(2, value))
    assert newest(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_room_is_made_by_what_can_be_spared(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    for step in (1, 2, 3):
        store.save(Filled(step))
    (tmp_path / "00000009-step-9.state.part").write_bytes(bytes(100))
    store.make_room()
    assert newest(tmp_path) == 3
    assert len(list(tmp_path.iterdir())) == 2
    SnapshotStore(tmp_path / "none").make_room()
    assert snapshot.KEEP == 2
