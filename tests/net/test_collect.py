"""The present weights of a run's stages, taken by a guest with passes: from whom, what, and when not."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest
import torch
import trio

import stage.collect
from agorad import live
from agorad.cli.targets import Target
from agorad.run import Manifest
from p2p.errors import LocalError
from p2p.groups import plain
from p2p.host import Host
from p2p.identity import Identity
from p2p.multiaddr import Multiaddr
from p2p.passes import Pass
from stage import donor
from stage.collect import LivePart, collect
from stage.config import ModelConfig
from stage.fetch import Source
from stage.parameters import Layout, parameter_specs
from stage.snapshot import SnapshotStore
from stage.state import CHUNK
from tests.net.test_averager import AUTHORITY, TRUST, admit
from tests.net.test_state import within

MODEL = ModelConfig(d=64, k=8, layers=(1, 1), heads=2, kv_heads=1, head_dim=32, ffn=2048, seq=16, vocab=256)
LAYOUTS = [Layout.of(parameter_specs(MODEL, number)) for number in range(2)]


@attrs.frozen
class Numbers:
    """A state of a stage that every number of can be told from."""

    stage: int
    step: int
    updates: int = 3

    @property
    def floats(self) -> int:
        return LAYOUTS[self.stage].size

    @property
    def fingerprint(self) -> str:
        return LAYOUTS[self.stage].fingerprint

    def read(self, vector: int, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop, dtype=torch.float32) + 1000 * self.step + vector


@attrs.define
class Replica:
    """Gives the state of a stage, of the step that it has reached."""

    source: Source
    host: Host
    scope: trio.CancelScope
    step: int = 0
    asked: int = 0


@attrs.define
class Run:
    """Two stages, and a guest."""

    folder: Path
    host: Host
    replicas: dict[str, Replica]
    told: list[int] = attrs.field(factory=list)

    def passes(self, **changes: Any) -> list[bytes]:
        fields = {
            "run": "r", "peer_id": self.host.peer_id, "expires": time.time() + 60,
            "authority": AUTHORITY.peer_id,
        }  # fmt: skip
        return [
            Pass(**(fields | {"stage": number} | changes)).signed(AUTHORITY).encode() for number in (0, 1)
        ]

    def ids(self, *names: str) -> list[str]:
        return [self.replicas[name].host.peer_id for name in names]

    async def collect(self, *names: list[str], passes: list[bytes] | None = None) -> list[LivePart]:
        donors = [[self.replicas[name].source for name in of_stage] for of_stage in names]
        with ExitStack() as files:
            parts = await collect(
                self.host, MODEL, donors, passes or self.passes(), scratch=self.folder, files=files,
                tell=lambda number, _event: self.told.append(number),
            )  # fmt: skip
            for number, part in enumerate(parts):
                numbers = Numbers(number, part.step)
                assert torch.equal(part.weights(self.folder), numbers.read(0, 0, numbers.floats))
        return parts


@asynccontextmanager
async def a_run(folder: Path, *names: str) -> AsyncIterator[Run]:
    """Replicas called like ``0a``: a stage and a letter."""

    async def live(name: str, task_status: trio.TaskStatus[Replica]) -> None:
        number, host = int(name[0]), Host(Identity.generate(name.encode().ljust(32)))
        admit(host, number)
        store = SnapshotStore(folder / name)

        async def refresh() -> None:
            replica.asked += 1
            await trio.to_thread.run_sync(store.save, Numbers(number, replica.step))

        giving = donor.Donor(host.identity, store, number, refresh, host.membership)
        host.handle(donor.PROTOCOL, giving.handle, open_to_all=True)
        with trio.CancelScope() as scope:
            async with host.run([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]):
                replica = Replica(Source(host.peer_id, host.addrs), host, scope)
                task_status.started(replica)
                await trio.sleep_forever()
        giving.close()

    guest = Host(Identity.generate(b"g" * 32))
    admit(guest, None)
    async with trio.open_nursery() as nursery:
        replicas = {name: await nursery.start(live, name) for name in names}
        async with guest.run([]):
            yield Run(folder, guest, replicas)
        nursery.cancel_scope.cancel()


def test_every_stage_gives_its_present_weights_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_run(tmp_path, "0a", "0b", "1a") as run:
            run.replicas["0a"].step, run.replicas["1a"].step = 7, 8
            parts = await run.collect(["0a", "0b"], ["1a"])
            assert [part.step for part in parts] == [7, 8]
            assert [part.where for part in parts] == run.ids("0a", "1a")
            assert [run.replicas[name].asked for name in ("0a", "0b", "1a")] == [1, 0, 1]
            sent = run.replicas["0a"].host.counters.protocols[donor.PROTOCOL][0]
            assert sent < 4 * LAYOUTS[0].size + CHUNK + 50_000  # of three vectors
            assert set(run.told) == {0, 1}

    within(main)


def test_who_is_lost_or_refuses_is_passed_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_run(tmp_path, "0a", "0b", "1a") as run:
            run.replicas["0a"].scope.cancel()
            run.replicas["0b"].step = 5
            parts = await run.collect(["0a", "0b"], ["0b", "1a"])  # it has no state of stage 1 to give
            assert [part.where for part in parts] == run.ids("0b", "1a")

    within(main)


def test_a_stage_that_nobody_gives_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.collect, "PATIENCE_S", 0.3)
    monkeypatch.setattr(stage.collect, "RETRY_S", 0.1)

    async def refused(run: Run, *names: list[str], passes: list[bytes] | None = None) -> str:
        try:
            await run.collect(*names, passes=passes)
        except BaseExceptionGroup as group:
            error = plain(group)
            assert isinstance(error, LocalError)
            return str(error)
        raise AssertionError("it was given")

    async def main() -> None:
        async with a_run(tmp_path, "0a", "1a") as run:
            assert "stage 1: it has no ACTIVE replica" in await refused(run, ["0a"], [])
            said = await refused(run, ["0a"], ["1a"], passes=run.passes(expires=time.time() - 1))
            assert "the pass ran out" in said
            said = await refused(run, ["0a"], ["1a"], passes=run.passes(peer_id=AUTHORITY.peer_id))
            assert "the pass belongs to" in said
            run.replicas["1a"].scope.cancel()
            assert "stage 1" in await refused(run, ["0a"], ["1a"])

    within(main)


class Authority:
    """Answers at its control socket, as a ``Target`` does."""

    name = "authority"

    def __init__(self, run: Run) -> None:
        self._run = run
        self.of_run = "r"

    def ask(self, do: str, *, timeout: float = 5.0, **arguments: Any) -> Any:
        if do == "passes":
            return [one.hex() for one in self._run.passes(peer_id=arguments["peer"])]
        assert (do, timeout > 5) == ("swarm", True)
        phases = {"a": "active", "b": "active", "s": "syncing"}
        rows = [
            {
                "peer_id": one.source.peer, "phase": phases[name[1]], "step": one.step,
                "addrs": [str(addr) for addr in one.source.addrs], "stage": int(name[0]),
            }
            for name, one in self._run.replicas.items()
        ]  # fmt: skip
        stages = [{"replicas": [row for row in rows if row["stage"] == number]} for number in (0, 1)]
        return {"run": self.of_run, "stages": stages}


def test_an_export_asks_the_freshest_active_replica_of_each_stage(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_run(tmp_path, "0a", "0b", "0s", "1a") as run:
            for name, step in {"0a": 5, "0b": 6, "0s": 9, "1a": 6}.items():
                run.replicas[name].step = step
            authority, said = Authority(run), list[str]()
            manifest = SimpleNamespace(run=SimpleNamespace(id="r"), model=MODEL, trust=lambda: TRUST)

            def states() -> list[str]:
                with ExitStack() as files:
                    parts = live.states(
                        cast(Manifest, manifest), cast(Target, authority), scratch=tmp_path, files=files,
                        tell=said.append,
                    )  # fmt: skip
                    return [part.where for part in parts]

            assert await trio.to_thread.run_sync(states) == run.ids("0b", "1a")
            assert any(line.startswith("stage 1: ") and line.endswith("of step 6") for line in said)
            authority.of_run = "another"
            with pytest.raises(LocalError, match="not of 'r'"):
                await trio.to_thread.run_sync(states)

    within(main)
