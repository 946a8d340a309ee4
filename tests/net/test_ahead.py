"""The state of a stage, downloaded while its node waits in the queue; and passes that are none."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import torch
import trio
from torch import Tensor

from agorad.authority.messages import PROTOCOL as AUTHORITY
from agorad.authority.messages import Facts, Join, Queued, read_answer
from agorad.control import BadRequest
from agorad.joining import obtain_certificate
from agorad.node import Node
from p2p import passes
from p2p.errors import P2PError, Refused
from p2p.identity import Identity, PeerId
from p2p.passes import Pass
from p2p.records import StageRecord
from stage import donor
from stage.ahead import Ahead
from stage.donor import Donor
from stage.fetch import Fetch, Source
from stage.parameters import Layout, parameter_specs
from stage.roster import Declaration, Roster
from stage.snapshot import SnapshotStore
from tests.net.test_authority import MODEL, Place, idle, living, until_event, within
from tests.net.test_join_stream import crowd, operator, serving, until_queued

STAGE = 1
LAYOUT = Layout.of(parameter_specs(MODEL, STAGE))


@attrs.define
class Held:
    """A state like the optimizer holds one for a snapshot."""

    step: int
    updates: int = 3
    floats: int = LAYOUT.size
    fingerprint: str = LAYOUT.fingerprint

    def read(self, vector: int, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.float32) + 1000 * vector + self.step


class Replica:
    """A member of the stage that gives its state away and is in the roster."""

    def __init__(self, node: Node, step: int = 40) -> None:
        self.node = node
        self.step = step
        self.phase = "active"
        self.asked = 0
        self.gate = trio.Event()
        self.gate.set()
        self.store = SnapshotStore(node.config.node.state / "snapshots")
        self.donor = Donor(node.identity, self.store, STAGE, self.refresh, node.host.membership)
        self.declaration = Declaration(
            node.dht, node.manifest.run.id, STAGE, node.identity.peer_id, self.describe
        )

    async def refresh(self) -> None:
        self.asked += 1
        await self.gate.wait()
        await trio.to_thread.run_sync(self.store.save, Held(self.step))

    def describe(self) -> StageRecord:
        assert self.node.certificate is not None
        return StageRecord(
            addrs=tuple(str(addr) for addr in self.node.host.addrs),
            phase=self.phase,
            step=self.step,
            slots=1,
            rate=0.0,
            certificate=self.node.certificate.encode(),
        )


@asynccontextmanager
async def replica(place: Place, name: str = "old") -> AsyncIterator[Replica]:
    async with living(place.worker(name, stage=STAGE), idle) as node:
        assert await obtain_certificate(node) is not None
        one = Replica(node)
        node.host.handle(donor.PROTOCOL, one.donor.handle, open_to_all=True)
        node.nursery.start_soon(one.declaration.run)
        yield one


def ahead_of(node: Node) -> Ahead:
    return Ahead(
        host=node.host,
        roster=Roster(node.dht, node.trust, node.clock),
        store=SnapshotStore(node.config.node.state / "snapshots"),
        model=node.manifest.model,
        stale_steps=lambda: 5,
        emit=node.emit,
    )


@asynccontextmanager
async def queued(place: Place, *, donor_waits: bool = False) -> AsyncIterator[tuple[Replica, Node, Ahead]]:
    """A replica that trains, and a node that waits for it in the queue while joins are held."""
    async with (
        serving(place),
        replica(place) as old,
        living(place.worker("new", stage=STAGE), idle) as node,
    ):
        if donor_waits:
            old.gate = trio.Event()
        operator(place, "joins_paused", "1")
        ahead = ahead_of(node)
        node.nursery.start_soon(ahead.run)
        node.nursery.start_soon(obtain_certificate, node, ahead)
        yield old, node, ahead


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.02)


def test_a_queued_node_has_the_state_when_its_turn_comes(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with queued(place) as (old, node, ahead):
            (fetched,) = await until_event(node, "state_fetched")
            assert (fetched["donor"], fetched["step"]) == (old.node.identity.peer_id, 40)
            assert fetched["bytes"] == 12 * LAYOUT.size
            assert node.certificate is None  # still a guest
            assert ahead.finished
            state = SnapshotStore(node.config.node.state / "snapshots").load_newest()
            assert state is not None
            assert (state.step, state.updates, state.fingerprint) == (40, 3, LAYOUT.fingerprint)
            for vector in range(3):
                assert torch.equal(state.vectors[vector], Held(40).read(vector, 0, LAYOUT.size))
            operator(place, "joins_paused", "")
            await until_event(node, "certificate_granted")
            await ahead.settle(STAGE, node.stopping)
            assert old.asked == 1

    within(main)


def test_a_download_that_began_in_the_queue_ends_after_the_grant(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with queued(place, donor_waits=True) as (old, node, ahead):
            await until(lambda: old.asked == 1)
            operator(place, "joins_paused", "")
            (granted,) = await until_event(node, "certificate_granted")
            old.gate.set()
            await ahead.settle(granted["stage"], node.stopping)
            assert node.bus.counts["state_fetched"] == 1

    within(main)


def test_another_stage_drops_the_download(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with queued(place, donor_waits=True) as (old, node, ahead):
            await until(lambda: old.asked == 1)
            await ahead.settle(STAGE + 1, node.stopping)
            old.gate.set()
            await trio.sleep(0.2)
            assert node.bus.counts["state_fetched"] == 0

    within(main)


def test_a_state_that_grew_old_in_the_queue_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage.ahead.LOOK_S", 0.2)
    monkeypatch.setattr("stage.roster.DECLARE_S", 0.2)
    place = crowd(tmp_path)

    async def main() -> None:
        async with queued(place) as (old, node, _ahead):
            await until_event(node, "state_fetched")
            old.step = 45  # as far as the run lets a state lie behind
            old.declaration.changed()
            await trio.sleep(1.0)
            assert old.asked == 1
            old.step = 46
            old.declaration.changed()
            await until_event(node, "state_fetched", 2)
            old.phase, old.step = "syncing", 99
            old.declaration.changed()
            await trio.sleep(0.6)
            assert old.asked == 2

    within(main)


def test_guests_are_few_and_members_do_not_wait_for_them(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with serving(place), replica(place) as old, replica(place, "mate") as mate:
            old.gate = trio.Event()

            async def take(node: Node, shown: bytes | None) -> str:
                try:
                    fetch = Fetch(
                        node.host,
                        STAGE,
                        floats=LAYOUT.size,
                        fingerprint=LAYOUT.fingerprint,
                        store=SnapshotStore(node.config.node.state / "taken"),
                        emit=node.emit,
                        guest_pass=shown,
                    )
                    (await fetch.run([Source(old.node.identity.peer_id, old.node.host.addrs)])).close()
                except Refused as no:
                    return no.code
                return "taken"

            async with (
                living(place.worker("g1"), idle) as first,
                living(place.worker("g2"), idle) as second,
                trio.open_nursery() as nursery,
            ):
                results: dict[str, str] = {}

                async def note(name: str, node: Node, shown: bytes | None) -> None:
                    results[name] = await take(node, shown)

                nursery.start_soon(note, "g1", first, good(place, first).encode())
                await until(lambda: old.asked == 1)
                assert await take(second, good(place, second).encode()) == "busy"
                nursery.start_soon(note, "mate", mate.node, None)
                await until(lambda: old.asked == 2)
                old.gate.set()
                await until(lambda: len(results) == 2)
                assert results == {"g1": "taken", "mate": "taken"}
                assert await take(second, good(place, second).encode()) == "taken"

    within(main)


def good(place: Place, node: Node, **changes: object) -> Pass:
    fields = {
        "run": "t-1",
        "peer_id": node.identity.peer_id,
        "stage": STAGE,
        "expires": time.time() + 600.0,
        "authority": place.authority.peer_id,
        **changes,
    }
    return Pass(**fields).signed(place.authority)  # type: ignore[arg-type]


def test_passes_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage.donor.GUEST_S", 0.5)
    place = crowd(tmp_path)

    async def main() -> None:
        async with (
            serving(place) as office,
            replica(place) as old,
            living(place.worker("guest"), idle) as node,
        ):
            stranger = Identity.generate()
            pass_ = good(place, node)
            encoded = pass_.encode()
            assert old.node.certificate is not None
            bad: list[tuple[object, str]] = [
                (None, "no_certificate"),
                ("text", "no_certificate"),
                (b"", "bad_signature"),
                (b"\xc1", "bad_signature"),
                (bytes(passes.PASS_LIMIT + 1), "bad_signature"),
                (encoded[:-1], "bad_signature"),
                (encoded + b"\x00", "bad_signature"),
                (encoded[:-1] + bytes([encoded[-1] ^ 1]), "bad_signature"),
                (attrs.evolve(pass_, expires=time.time() + 700).encode(), "bad_signature"),
                (attrs.evolve(pass_, signature=bytes(64)).encode(), "bad_signature"),
                (good(place, node, run="t-2").encode(), "wrong_run"),
                (good(place, node, peer_id=stranger.peer_id).encode(), "wrong_key"),
                (good(place, node, stage=STAGE + 1).encode(), "wrong_stage"),
                (good(place, node, authority=stranger.peer_id).encode(), "unknown_authority"),
                (
                    attrs.evolve(pass_, authority=stranger.peer_id).signed(stranger).encode(),
                    "unknown_authority",
                ),
                (good(place, node, expires=time.time() - 1).encode(), "certificate_expired"),
                (good(place, node, expires=time.time() + 86_400).encode(), "not_yet_valid"),
                (old.node.certificate.encode(), "bad_signature"),
            ]
            for shown, code in bad:
                assert (await shows(node, old, {"t": "want", "stage": STAGE, "pass": shown})) == code, shown
            silent = await node.host.call(
                old.node.identity.peer_id, donor.PROTOCOL, addrs=old.node.host.addrs, deadline=5.0
            )
            async with silent as call:
                with pytest.raises(Refused) as no:
                    await call.receive()  # without a word of our own
                assert no.value.code == "no_certificate"
            other = {"t": "want", "stage": STAGE + 1, "pass": encoded}
            assert await shows(node, old, other) == "wrong_stage"
            assert await shows(node, old, {"t": "want", "stage": STAGE, "pass": encoded}) == ""
            assert old.asked == 1
            # An operator asks for passes to all stages.
            made = await office.commands["passes"]({"peer": node.identity.peer_id})
            assert len(made) == place.manifest.model.stages
            asked = {"t": "want", "stage": STAGE, "pass": bytes.fromhex(made[STAGE])}
            assert await shows(node, old, asked) == ""
            (entry,) = await office.commands["audit"]({})
            assert (entry["what"], entry["detail"]) == ("passes", node.identity.peer_id)
            for nobody in ({}, {"peer": 7}, {"peer": "x" * 60}):
                with pytest.raises(BadRequest, match="peer id"):
                    await office.commands["passes"](nobody)

    within(main)


async def shows(node: Node, old: Replica, wish: dict[str, object]) -> str:
    """The code of the refusal, "" if there is none."""
    there = old.node.identity.peer_id
    async with await node.host.call(there, donor.PROTOCOL, addrs=old.node.host.addrs, deadline=5.0) as call:
        await call.send(wish)
        try:
            await call.receive(max_payload=1 << 20)
        except Refused as no:
            return no.code
        return ""


def test_a_pass_opens_nothing_else(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with serving(place), replica(place) as old, living(place.worker("guest"), idle) as node:
            shown = good(place, node).encode()
            closed = [name for name in old.node.host.protocols if name.startswith("/agora/")]

            async def private(_call: object) -> None:
                raise AssertionError("a guest came in")

            old.node.host.handle("/agora/test-members-only/1", private)  # type: ignore[arg-type]
            gated = [
                name
                for name in [*closed, "/agora/test-members-only/1"]
                if name not in ("/agora/hello/1", "/agora/kad/1", "/agora/self/1", donor.PROTOCOL)
            ]
            assert gated
            for protocol in gated:
                for header in ({"pass": shown}, {"t": "want", "stage": STAGE, "pass": shown}):
                    assert await refused(node, old.node.identity.peer_id, old, protocol, header) == (
                        "no_certificate"
                    )
            # Nor is it a certificate in hello.
            old_trust = old.node.trust
            with pytest.raises(Refused) as no:
                old_trust.check_encoded(shown, node.identity.peer_id, time.time())
            assert no.value.code == "bad_signature"

    within(main)


async def refused(node: Node, there: PeerId, old: Replica, protocol: str, header: dict[str, object]) -> str:
    async with await node.host.call(there, protocol, addrs=old.node.host.addrs, deadline=5.0) as call:
        try:
            await call.send(header)
            await call.receive()
        except Refused as no:
            return no.code
        except P2PError as error:
            return str(error)
    return ""


def test_the_pass_comes_again_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agorad.authority.desk.PASS_S", 0.3)
    place = crowd(tmp_path, port_test=False, max_rtt_ms=0.0)

    async def main() -> None:
        async with serving(place), living(place.worker("w"), idle) as node:
            operator(place, "joins_paused", "1")
            join = Join(
                account="alice", secret=place.secret, session=node.session, facts=Facts(clock=time.time())
            )
            async with await node.host.call(place.authority.peer_id, AUTHORITY, deadline=5) as call:
                await call.send(join.to_header())
                ends = []
                for _ in range(3):
                    place_ = read_answer((await call.receive()).header)
                    assert isinstance(place_, Queued)
                    assert place_.guest_pass is not None
                    shown = Pass.decode(place_.guest_pass)
                    assert (shown.peer_id, shown.stage) == (node.identity.peer_id, place_.stage)
                    passes.check(
                        place_.guest_pass, node.trust, node.identity.peer_id, place_.stage, time.time()
                    )
                    ends.append(shown.expires)
                assert ends[0] < ends[1] < ends[2]
                assert ends[0] <= time.time() + passes.LIFE_S

    within(main)


def test_without_anybody_to_ask_the_node_waits_on(tmp_path: Path) -> None:
    place = crowd(tmp_path)

    async def main() -> None:
        async with serving(place), living(place.worker("w"), idle) as node:
            operator(place, "joins_paused", "1")
            ahead = ahead_of(node)
            node.nursery.start_soon(ahead.run)
            node.nursery.start_soon(obtain_certificate, node, ahead)
            await until_queued(node, 1, True, False)
            await trio.sleep(0.5)
            assert not ahead.finished
            operator(place, "joins_paused", "")
            await until_event(node, "certificate_granted")
            await ahead.settle(0, node.stopping)

    within(main)
