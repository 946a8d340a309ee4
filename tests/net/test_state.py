"""State between stage-mates over real connections: broken lines, donors that die, lie, or are several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import trio
from torch import Tensor

from p2p import path
from p2p.errors import P2PError, Refused
from p2p.event import Event
from p2p.host import Host
from p2p.identity import Identity
from p2p.multiaddr import Multiaddr
from stage import donor as donor_module
from stage.donor import HELD, NEWCOMERS, Donor
from stage.events import ChunkBad, StateFetched
from stage.fetch import Fetch, Source
from stage.pacing import TICK_S, Pace
from stage.snapshot import SnapshotFile, SnapshotStore
from stage.state import CHUNK
from tests.net.test_averager import admit

STAGE = 1
FLOATS = 256 * 2048
CHUNKS = 6
assert 12 * FLOATS == CHUNKS * CHUNK


@attrs.frozen
class Held:
    """A state of random weights, made from its number."""

    step: int
    number: int = 0
    updates: int = 3
    floats: int = FLOATS
    fingerprint: str = "f" * 64

    def read(self, vector: int, start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.number + 100 * vector + start)
        return torch.randn(stop - start, generator=generator) * 0.02


class Replica:
    """A host with a store, which gives its state away."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.store = SnapshotStore(folder)
        self.refreshed = 0
        self.step: int | None = None
        """Of the state that a newcomer gets; None: that of the newest snapshot."""
        self.donor = Donor(host.identity, self.store, STAGE, self.refresh, host.membership)
        self.scope = trio.CancelScope()

    @property
    def source(self) -> Source:
        return Source(self.host.peer_id, self.host.addrs)

    async def refresh(self) -> None:
        self.refreshed += 1
        if self.step is not None:
            await trio.to_thread.run_sync(self.store.save, Held(self.step))


@asynccontextmanager
async def replicas(tmp_path: Path, *names: str) -> AsyncIterator[list[Replica]]:
    async def live(name: str, task_status: trio.TaskStatus[Replica]) -> None:
        host = Host(Identity.generate(name.encode().ljust(32)))
        admit(host, STAGE)
        one = Replica(host, tmp_path / name)
        host.handle(donor_module.PROTOCOL, one.donor.handle, open_to_all=True)
        with one.scope:
            async with host.run([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]):
                task_status.started(one)
                await trio.sleep_forever()
        one.donor.close()

    async with trio.open_nursery() as nursery:
        yield [await nursery.start(live, name) for name in names]
        nursery.cancel_scope.cancel()


@attrs.define
class Newcomer:
    host: Host
    store: SnapshotStore
    events: list[Event] = attrs.field(factory=list)
    came: Callable[[int], None] = lambda _bytes: None

    async def take(self, *donors: Replica, oldest: int = 0) -> Fetch:
        fetch = Fetch(
            self.host, STAGE, floats=FLOATS, fingerprint="f" * 64, store=self.store, emit=self.events.append,
            progress=lambda done, _left, _seconds: self.came(done),
        )  # fmt: skip
        (await fetch.run([donor.source for donor in donors], oldest=oldest)).close()
        return fetch

    def last(self) -> StateFetched:
        found = [event for event in self.events if isinstance(event, StateFetched)]
        return found[-1]

    def check(self, step: int, number: int = 0) -> None:
        state = self.store.load_newest()
        assert state is not None
        assert (state.step, self.store.problems) == (step, [])
        for vector in range(3):
            for start in range(0, FLOATS, CHUNK // 4):
                expected = Held(step, number).read(vector, start, start + CHUNK // 4)
                assert torch.equal(state.vectors[vector][start : start + CHUNK // 4], expected)


@asynccontextmanager
async def newcomer(tmp_path: Path) -> AsyncIterator[Newcomer]:
    host = Host(Identity.generate(b"n" * 32))
    admit(host, STAGE)
    async with host.run([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]):
        yield Newcomer(host, SnapshotStore(tmp_path / "newcomer"))


def within(main: Callable[[], Any], seconds: float = 60.0) -> None:
    async def bounded() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(bounded)


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        async with replicas(tmp_path, "old") as (old,), newcomer(tmp_path) as new:
            old.store.save(Held(7))
            scope = trio.CancelScope()
            new.came = lambda done: scope.cancel() if done >= 2 * CHUNK else None
            with scope:
                await new.take(old)
            assert scope.cancelled_caught
            # Meanwhile the donor went on: the folder has newer ones only, and the newcomer starts anew.
            for step in (8, 9, 10):
                old.store.save(Held(step, 1))
            again = Newcomer(new.host, SnapshotStore(new.store.folder))
            fetch = await again.take(old, oldest=1_000_000)  # far too old, but it rested for a moment only
            assert fetch.resumed
            again.check(7)
            fetched = again.last()
            assert fetched.kept >= 2 * CHUNK
            assert fetched.line < fetched.bytes - fetched.kept <= 4 * CHUNK  # packed
            assert not list(again.store.folder.glob("incoming*"))
            # What is here already is not taken again.
            old.step = 7
            await again.take(old)
            assert (again.last().kept, again.last().line) == (12 * FLOATS, 0)

    within(main)


def test_a_download_that_rested_too_long_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with replicas(tmp_path, "old") as (old,), newcomer(tmp_path) as new:
            old.store.save(Held(7))
            scope = trio.CancelScope()
            new.came = lambda done: scope.cancel() if done >= 2 * CHUNK else None
            with scope:
                await new.take(old)
            new.came = lambda _done: None
            monkeypatch.setattr("stage.fetch.RECENT_S", 0.0)
            old.step = 10
            fetch = await new.take(old, oldest=8)
            assert not fetch.resumed
            assert new.last().step == 10

    within(main)


def test_a_donor_that_dies_costs_one_retry(tmp_path: Path) -> None:
    async def main() -> None:
        async with replicas(tmp_path, "dying", "other") as (dying, other), newcomer(tmp_path) as new:
            dying.store.save(Held(7))
            other.store.save(Held(8, number=1))
            new.came = lambda done: dying.scope.cancel() if done >= 2 * CHUNK else None
            with pytest.raises(P2PError):
                await new.take(dying, other)  # the other has another state and cannot help
            new.came = lambda _done: None
            await new.take(other, dying)
            new.check(8, number=1)

    within(main)


def test_several_that_have_the_same_give_it_together_and_one_may_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage.fetch.WORTH_HELP", 1)

    async def main() -> None:
        async with replicas(tmp_path, "a", "b", "c") as donors, newcomer(tmp_path) as new:
            for donor in donors:
                donor.store.save(Held(7, number=int(donor is donors[2])))
            asked: dict[str, int] = {}

            def count(donor: Replica) -> None:
                serve = donor.donor._serve

                async def counting(call: Any, file: SnapshotFile) -> None:
                    asked[donor.host.peer_id] = asked.get(donor.host.peer_id, 0) + 1
                    await serve(call, file)

                donor.donor._serve = counting  # type: ignore[method-assign]

            for donor in donors:
                count(donor)
            first, second, _ = donors
            new.came = lambda done: first.scope.cancel() if done >= 2 * CHUNK else None
            await new.take(*donors)  # the first dies on the way, the second has all the rest
            assert set(asked) == {first.host.peer_id, second.host.peer_id}
            new.check(7)

    within(main)


def lying(file: SnapshotFile, wrong: set[int]) -> None:
    """Chunks of these numbers are read with a bit turned, and nobody looks."""
    read = file.chunk

    def chunk(index: int) -> bytes:
        data = read(index)
        return bytes([data[0] ^ 1]) + data[1:] if index in wrong else data

    file.chunk = chunk  # type: ignore[method-assign]


def test_a_corrupted_chunk_is_found_and_fetched_again_and_a_liar_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: set[int] = {1, 5}
    monkeypatch.setattr("stage.fetch.WORTH_HELP", 1)

    async def main() -> None:
        async with replicas(tmp_path, "a", "b") as (liar, honest), newcomer(tmp_path) as new:
            for donor in (liar, honest):
                donor.store.save(Held(7))
            opened = liar.store.newest

            def newest() -> SnapshotFile | None:
                file = opened()
                assert file is not None
                lying(file, wrong)
                return file

            monkeypatch.setattr(liar.store, "newest", newest)
            await new.take(liar, honest)
            new.check(7)
            bad = [event for event in new.events if isinstance(event, ChunkBad)]
            assert {event.chunk for event in bad} <= wrong
            # Alone it is asked again, and left at the third lie; what was sound is kept.
            lonely = Newcomer(new.host, SnapshotStore(tmp_path / "lonely"))
            with pytest.raises(P2PError, match="3 chunks are not what the manifest says"):
                await lonely.take(liar)
            bad = [event for event in lonely.events if isinstance(event, ChunkBad)]
            assert len(bad) == 3
            assert {event.chunk for event in bad} <= wrong
            await lonely.take(honest)
            lonely.check(7)
            assert lonely.last().kept > 0

    within(main)


def test_a_donor_whose_disk_is_damaged_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with replicas(tmp_path, "old") as (old,), newcomer(tmp_path) as new:
            old.store.save(Held(7))
            with (old.store.folder / "00000001-step-7.state").open("r+b") as file:
                file.seek(4 * CHUNK)
                file.write(b"damage")
            with pytest.raises(Refused) as no:
                await new.take(old)
            assert no.value.code == "damaged"

    within(main)


def test_the_pace_begins_with_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer that looks through what it has, before it asks, would be taken for a line of 64 KB/s."""
    looks = 0

    class Counted(Pace):
        def look(self, seen: path.Path) -> float | None:
            nonlocal looks
            looks += 1
            return super().look(seen)

    monkeypatch.setattr(donor_module, "Pace", Counted)

    async def main() -> None:
        async with replicas(tmp_path, "old") as (old,), newcomer(tmp_path) as new:
            old.store.save(Held(7))
            source, protocol = old.source, donor_module.PROTOCOL
            async with await new.host.call(source.peer, protocol, addrs=source.addrs, deadline=5.0) as call:
                await call.send({"t": "want", "stage": STAGE})
                assert (await call.receive(max_payload=CHUNK)).header["t"] == "manifest"
                await trio.sleep(5 * TICK_S)
                assert looks == 0
                await call.send({"t": "chunk", "index": 0})
                await call.receive(max_payload=CHUNK)
                await trio.sleep(5 * TICK_S)
                assert looks > 0

    within(main)


def test_newcomers_are_bounded_and_so_is_what_is_held_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with replicas(tmp_path, "old") as (old,), newcomer(tmp_path) as new:
            for step in range(HELD + 3):
                old.step = step
                taker = Newcomer(new.host, SnapshotStore(tmp_path / f"taker{step}"))
                await taker.take(old)
                assert taker.last().step == step
            assert len(old.donor._given) == HELD
            monkeypatch.setattr("stage.donor.HOLD_S", 0.0)
            old.step = HELD + 3
            await new.take(old)
            assert len(old.donor._given) == 1
            while old.donor._served["member"]:  # noqa: ASYNC110
                await trio.sleep(0.01)
            old.donor._served["member"] = NEWCOMERS
            with pytest.raises(Refused) as no:
                await new.take(old)
            assert (no.value.code, no.value.retry_after) == ("busy", 5.0)

    within(main)
