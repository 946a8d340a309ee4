"""Points over real sockets: a small pipeline whose work is credited, and everybody who should not get any."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

import agorad.points
import p2p.errors
from agorad import config, run
from agorad.authority import accounts, points
from agorad.authority.leaderboard import PROTOCOL, Credited
from agorad.authority.ledger import Rules
from agorad.authority.store import Grant, Store
from agorad.joining import obtain_certificate
from agorad.living import run_node
from agorad.node import Node
from agorad.outbox import Outbox
from agorad.points import Submitter
from agorad.roles import authority, trainer
from agorad.run import Manifest, NodeRef, RunInfo
from p2p.errors import Refused
from p2p.identity import Identity, PeerId
from stage.config import ModelConfig, TrainingConfig
from stage.receipts import Receipt, sign
from stage.ticket import Ticket

DEADLINE_S = 90.0
MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1, 1))


class Town:
    """A run on disk with one authority and one trainer; makes nodes' settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        operator = Identity.generate()
        self.keys = {name: Identity.generate() for name in ("authority", "trainer")}
        self.ports = {}
        for name, key in self.keys.items():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.ports[name] = probe.getsockname()[1]
            (folder / name).mkdir()
            key.save(folder / name / "identity.key")
        training = TrainingConfig(seed=1, target_batch=4, average_every=100, eval_every=100)
        self.manifest = Manifest(
            run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
            authorities=(self.ref("authority"),),
            trainers=(self.ref("trainer"),),
            model=MODEL,
            training=training,
            admission=run.Admission(max_rtt_ms=0.0),  # on a busy machine that measures the machine
        ).signed(operator)
        run.save(self.manifest, folder / "run.toml")
        for account in ("alice", "bob"):
            (folder / f"{account}.secret").write_text(accounts.add(folder / "accounts.toml", account))
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2000)

    def ref(self, name: str) -> NodeRef:
        return NodeRef(peer_id=self.keys[name].peer_id, addrs=(f"/ip4/127.0.0.1/tcp/{self.ports[name]}",))

    def settings(self, name: str, role: str, **sections: dict[str, Any]) -> config.Config:
        node = {"role": role, "name": name, "run": "run.toml", "state": name, "threads": 1, "device": "cpu"}
        table = {"node": {**node, "listen": [f"/ip4/127.0.0.1/tcp/{self.ports.get(name, 0)}"]}, **sections}
        return config.from_table(table, self.folder)

    def office(self) -> config.Config:
        return self.settings("authority", "authority", authority={"accounts": "accounts.toml"})

    def trainer(self, **section: Any) -> config.Config:
        return self.settings("trainer", "trainer", trainer={"data": "text.txt", **section})

    def worker(self, name: str, stage: int, account: str = "alice") -> config.Config:
        section = {"account": account, "secret_file": f"{account}.secret", "stage": stage}
        return self.settings(name, "worker", worker=section)

    def store(self) -> Store:
        return Store(self.folder / "authority" / "authority.sqlite")

    def receipt(self, nodes: list[Node], position: int) -> Receipt:
        """As if these had worked for the trainer."""
        key = self.keys["trainer"]
        ticket = Ticket(
            run="t-1", trainer=key.peer_id, kind="train", shard=0, position=position,
            ids_hash=bytes(32), weight=1.0,
        ).signed_by(key)  # fmt: skip
        callers = [key.peer_id, *(node.identity.peer_id for node in nodes)]
        signed = [sign(node.identity, ticket, stage, callers[stage]) for stage, node in enumerate(nodes)]
        return Receipt(
            ticket=ticket, at=time.time(), peers=tuple(callers[1:]), statements=tuple(signed)
        ).signed_by(key)


@contextlib.asynccontextmanager
async def living(settings: config.Config, role: Callable[[Node], Awaitable[None]]) -> AsyncIterator[Node]:
    """A node beside the test's body; it is stopped when the body ends."""
    sender, receiver = trio.open_memory_channel[Node](1)

    async def announced(node: Node) -> None:
        sender.send_nowait(node)
        await role(node)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_node(settings, announced, started_at=time.time()))
        node = await receiver.receive()
        yield node
        node.stop("the test is over")


@contextlib.asynccontextmanager
async def serving(town: Town) -> AsyncIterator[Node]:
    """The authority, once it takes questions."""
    async with living(town.office(), authority.run) as node:
        await until(lambda: node.is_ready)
        yield node


async def idle(node: Node) -> None:
    await node.stopping.wait()


async def joined(node: Node) -> None:
    await obtain_certificate(node)
    await node.stopping.wait()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.02)


def within(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(DEADLINE_S):
            await main()

    trio.run(limited)


async def submit(node: Node, town: Town, receipts: list[bytes], **header: Any) -> Credited:
    call = await node.host.call(town.keys["authority"].peer_id, PROTOCOL, deadline=10.0)
    async with call:
        await call.send({"t": "submit", "count": len(receipts), **header})
        await call.send({"t": "receipts"}, msgpack.packb(receipts))
        return Credited.from_header((await call.receive()).header)


@contextlib.asynccontextmanager
async def three(town: Town) -> AsyncIterator[list[Node]]:
    """An authority's members, one a stage; they do nothing."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                living(town.worker(f"w{stage}", stage, "bob" if stage == 2 else "alice"), joined)
            )
            for stage in range(3)
        ]
        await until(lambda: all(node.certificate for node in nodes))
        yield nodes


def test_what_a_pipeline_works_is_credited_to_who_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agorad.roles import worker

    monkeypatch.setattr(agorad.points, "FOLLOW_FIRST_S", 0.3)
    monkeypatch.setattr(agorad.points, "FOLLOW_S", 0.3)
    monkeypatch.setattr(points, "FRESH_S", 0.0)
    monkeypatch.setattr(points, "REFILL_S", 0.01)
    town = Town(tmp_path)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            office = await stack.enter_async_context(serving(town))
            nodes = [
                await stack.enter_async_context(
                    living(town.worker(f"w{stage}", stage, "bob" if stage == 2 else "alice"), worker.run)
                )
                for stage in range(3)
            ]
            async with living(town.trainer(steps=3), trainer.run) as source:
                await until(lambda: source.bus.counts["stopped"] > 0)
                completed = source.bus.counts["microbatch_completed"]
                handed = [e for e in source.bus.since() if e["event"] == "receipts_submitted"]
                evaluated = sum(e["rows"] for e in source.bus.since() if e["event"] == "evaluated") * 2
                assert completed == 12
                assert sum(e["new"] for e in handed) == completed + evaluated
                assert [e for e in handed if e["refused"] or e["waiting"]] in ([], handed[:-1])
            asked = [await node.commands["points"]({}) for node in (*nodes, office)]
            rules = Rules.of(town.manifest)
            per_worker = [
                completed * rules.mflop(stage, "train") + evaluated * rules.mflop(stage, "eval")
                for stage in range(3)
            ]
            for stage, found in enumerate(asked[:3]):
                assert found["node"] == {"compute": per_worker[stage] / 1e9, "presence": 0.0}
                assert found["own"]["user"] == ("bob" if stage == 2 else "alice")
                scores = {row["user"]: row["score"] for row in found["rows"]}
                assert scores == {
                    "alice": (per_worker[0] + per_worker[1]) / 1e9, "bob": per_worker[2] / 1e9,
                }  # fmt: skip
                assert {row["status"] for row in found["rows"]} == {"active"}
                assert found["accounts"] == 2
            assert (asked[3]["own"], asked[3]["node"]) == (None, None)
            assert asked[3]["rows"] == asked[0]["rows"]
            for stage, node in enumerate(nodes):
                expected = {"compute": per_worker[stage] / 1e9, "presence": 0.0}
                while node.status_document()["points"] != expected:  # noqa: ASYNC110 (asked for by the clock)
                    await trio.sleep(0.05)
            line = [sys.executable, "-m", "agorad.cli", "points", "--socket", str(nodes[0].config.control)]
            shown = await trio.run_process([*line, "--json"], capture_stdout=True)
            assert json.loads(shown.stdout)["rows"] == asked[0]["rows"]
            shown = await trio.run_process(line, capture_stdout=True)
            assert b"* 1 " in shown.stdout
            assert b"alice" in shown.stdout
            line = [*line[:3], "authority", "recompute", "--socket", str(office.config.control)]
            shown = await trio.run_process([*line, "--json"], capture_stdout=True)
            found = json.loads(shown.stdout)
            assert (found["receipts"], found["troubles"]) == (completed + evaluated, [])
            assert found["compute"] == {"alice": per_worker[0] + per_worker[1], "bob": per_worker[2]}
            store = town.store()
            with store.books.transact() as execute:
                execute("UPDATE balances SET compute = compute + 1 WHERE account = 'bob'", {})
            store.close()
            shown = await trio.run_process(line, capture_stdout=True, check=False)
            assert shown.returncode == 5
            assert b"account 'bob'" in shown.stdout

    within(main)


def test_only_the_runs_trainers_hand_in_and_only_once(tmp_path: Path) -> None:
    town = Town(tmp_path)

    async def main() -> None:
        async with (
            serving(town),
            three(town) as nodes,
            living(town.trainer(), idle) as source,
            living(town.settings("guest", "worker"), idle) as guest,
        ):
            true = [town.receipt(nodes, number).encode() for number in range(5)]
            for other in (*nodes, guest):
                with pytest.raises(Refused) as refusal:
                    await submit(other, town, true)
                assert refusal.value.code == "not_trainer"
            swapped = town.receipt([nodes[1], nodes[0], nodes[2]], 9).encode()
            first = await submit(source, town, [*true[:3], swapped, b"junk"])
            assert (first.new, first.known) == (3, 0)
            assert sorted(ticket for ticket, _why in first.refused) == ["", "train:0:9"]
            again = await submit(source, town, [*true, true[0]])
            assert (again.new, again.known, again.refused) == (2, 4, ())
            for bad in ({"count": 0}, {"count": 2}, {"count": 257}, {"t": "gimme"}):
                with pytest.raises(p2p.errors.P2PError):
                    await submit(source, town, true[:1], **bad)
            board = await agorad.points.ask(nodes[0], 10)
            assert board.node == (5 * Rules.of(town.manifest).mflop(0, "train") / 1e9, 0.0)
            assert (await submit(source, town, true)).known == 5  # it still serves

    within(main)


def test_receipts_wait_for_the_authority_through_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away when the work is done, and still when the trainer ends; the next start hands all in."""
    for name, seconds in (
        ("GATHER_S", 0.05),
        ("FIRST_WAIT_S", 0.05),
        ("MOST_WAIT_S", 0.2),
        ("FINISH_S", 0.3),
    ):
        monkeypatch.setattr(agorad.points, name, seconds)
    town = Town(tmp_path)
    folder = tmp_path / "trainer" / "receipts"

    async def main() -> None:
        async with serving(town), three(town) as nodes:
            receipts = [town.receipt(nodes, number) for number in range(300)]
        async with living(town.trainer(), idle) as source:
            submitter = Submitter(source, Outbox(folder))
            source.nursery.start_soon(submitter.run)
            for receipt in receipts[:200]:
                submitter.keep(receipt)
            await until(lambda: source.bus.counts["receipts_delayed"] >= 2)
            assert "no authority takes receipts" in source.status_document()["warnings"][0]
            for receipt in receipts[200:]:
                submitter.keep(receipt)
            began = trio.current_time()
            await submitter.finish()
            assert trio.current_time() - began < 2.0
        async with serving(town) as office, living(town.trainer(), idle) as source:
            outbox = Outbox(folder)
            assert outbox.waiting == 300
            submitter = Submitter(source, outbox)
            source.nursery.start_soon(submitter.run)
            await until(lambda: not outbox.waiting)
            handed = [e for e in source.bus.since() if e["event"] == "receipts_submitted"]
            assert sum(e["new"] for e in handed) == 300
            assert office.bus.counts["receipts_credited"] == len(handed) >= 2
            await submitter.finish()

    within(main)
    store = town.store()
    found = store.books.recompute(Rules.of(town.manifest))
    store.close()
    assert (found.receipts, found.troubles) == (300, ())


def test_a_trainer_that_cannot_write_goes_on_and_says_so(tmp_path: Path) -> None:
    town = Town(tmp_path)

    async def main() -> None:
        async with living(town.trainer(), idle) as source:
            submitter = Submitter(source, Outbox(tmp_path / "box"))
            (tmp_path / "box").rmdir()
            submitter.keep(town.receipt([source, source, source], 1))
            assert source.bus.counts["receipts_dropped"] == 1

    within(main)


def test_the_leaderboard_is_for_everybody_but_not_endlessly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "BURST", 3)
    monkeypatch.setattr(points, "REFILL_S", 0.5)
    ranked = []
    rank = points._rank
    monkeypatch.setattr(points, "_rank", lambda *arguments: ranked.append(1) or rank(*arguments))
    town = Town(tmp_path)

    async def main() -> None:
        async with serving(town), living(town.settings("g", "worker"), idle) as guest:
            for _ in range(3):
                board = await agorad.points.ask(guest, 10)
                assert (board.rows, board.accounts, board.node) == ((), 0, None)
            with pytest.raises(Refused) as refusal:
                await agorad.points.ask(guest, 10)
            assert refusal.value.code == "busy"
            await trio.sleep(refusal.value.retry_after or 1.0)
            await agorad.points.ask(guest, 10)
            assert len(ranked) == 1, "worked out once for all of them"

    within(main)


def key_of(name: str) -> PeerId:
    return Identity.generate(name.encode() * 32).peer_id


def points_grant(name: str, issued: float) -> Grant:
    return Grant(peer_id=key_of(name), account=name, stage=0, issued=issued, expires=issued + 600)


def test_who_is_seen_earns_presence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time between two sightings; who is never seen earns nothing."""
    monkeypatch.setattr(points, "FLUSH_S", 0.1)
    town = Town(tmp_path)

    async def main() -> None:
        async with living(town.office(), idle) as node:
            store = town.store()
            now = time.time()
            for name in ("a", "b"):
                store.grant(points_grant(name, now - 100), max_nodes=9, max_per_account=9, now=now - 100)

            fails = [Refused("unavailable", "the disk is full", 30.0)]

            async def ask(question: Callable[..., Any], *arguments: object) -> Any:
                if question is points._add_presence and fails:
                    raise fails.pop()
                return await trio.to_thread.run_sync(lambda: question(*arguments))

            desk = points.PointsDesk(node, store, ask, town.store)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(desk.run)
                await desk.on_seen(key_of("a"), now - 60)
                await until(lambda: store.books.balance(key_of("a")).seen)  # type: ignore[union-attr]
                await desk.on_seen(key_of("a"), now)
                await until(lambda: store.books.balance(key_of("a")).presence)  # type: ignore[union-attr]
                nursery.cancel_scope.cancel()
            board = await desk.leaderboard(key_of("a"), 10)
            store.close()
            assert [(row.user, row.presence > 0) for row in board.rows] == [("a", True), ("b", False)]
            assert board.own is not None
            assert board.own.presence == pytest.approx(1 / 60)
            assert board.own.active_h == pytest.approx(1 / 60, abs=1e-3)

    within(main)
