"""Joining over real sockets: an authority and workers, each a whole node, in one process."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from agorad import config, run
from agorad.authority import accounts
from agorad.exitcodes import DaemonExit, ExitCode, verdict
from agorad.joining import obtain_certificate, pause
from agorad.living import run_node
from agorad.node import Node
from agorad.roles import authority
from agorad.run import Admission, Manifest, NodeRef, RunInfo
from p2p.errors import Refused
from p2p.identity import Identity
from p2p.membership import Certificate, issue
from p2p.rpc import Call
from stage.config import ModelConfig, TrainingConfig
from tests.sentences import complete

DEADLINE_S = 60.0
MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1, 1))
PRIVATE = "/agora/test-members-only/1"


class Place:
    """A run on disk with one authority; makes nodes' settings."""

    def __init__(self, folder: Path, **admission: Any) -> None:
        self.folder = folder
        self.operator = Identity.generate()
        self.authority = Identity.generate()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        here = f"/ip4/127.0.0.1/tcp/{self.port}"
        self.manifest = Manifest(
            run=RunInfo(name="t", id="t-1", operator=self.operator.peer_id),
            authorities=(NodeRef(peer_id=self.authority.peer_id, addrs=(here,)),),
            model=MODEL,
            training=TrainingConfig(seed=1),
            admission=Admission(**admission),
        ).signed(self.operator)
        run.save(self.manifest, folder / "run.toml")
        (folder / "authority").mkdir()
        self.authority.save(folder / "authority" / "identity.key")
        self.secret = accounts.add(folder / "accounts.toml", "alice")
        accounts.add(folder / "accounts.toml", "bob")
        (folder / "secret").write_text(self.secret + "\n")

    def settings(self, name: str, role: str, **sections: dict[str, Any]) -> config.Config:
        port = self.port if role == "authority" else 0
        node = {"role": role, "name": name, "run": "run.toml", "state": name}
        table = {"node": {**node, "listen": [f"/ip4/127.0.0.1/tcp/{port}"]}, **sections}
        return config.from_table(table, self.folder)

    def authority_settings(self) -> config.Config:
        return self.settings("authority", "authority", authority={"accounts": "accounts.toml"})

    def worker(self, name: str, **worker: Any) -> config.Config:
        worker = {"account": "alice", "secret_file": "secret", **worker}
        return self.settings(name, "worker", worker=worker)


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
        if role is authority.run:  # who asks before it serves is told that it speaks no such protocol
            await until_event(node, "ready")
        yield node
        node.stop("the test is over")


async def idle(node: Node) -> None:
    await node.stopping.wait()


async def until_event(node: Node, name: str, count: int = 1) -> list[dict[str, Any]]:
    async with contextlib.aclosing(node.bus.follow()) as batches:
        async for _batch in batches:
            found = [entry for entry in node.bus.since() if entry["event"] == name]
            if len(found) >= count:
                return found
    raise AssertionError


async def ask(place: Place, node: Node) -> Any:
    """What a member gets from the authority on a protocol that is for members only."""
    async with await node.host.call(place.authority.peer_id, PRIVATE, deadline=5.0) as call:
        await call.send({})
        return (await call.receive()).header["stage"]


def within(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(DEADLINE_S):
            await main()

    trio.run(limited)


def test_a_worker_is_let_in_kept_and_known_again(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        settings = place.worker("w", stage=2)
        async with living(place.authority_settings(), authority.run) as office:
            async with living(settings, idle) as node:
                granted = await obtain_certificate(node)
                assert granted is not None
                assert (granted.stage, granted.account, granted.run) == (2, "alice", "t-1")
                assert node.certificate == granted
                assert granted.expires - granted.issued == 3600
            # Another stage means asking again, this time without the secret: the key is known.
            elsewhere = attrs.evolve(settings.worker, stage=0, secret_file=None)
            async with living(attrs.evolve(settings, worker=elsewhere), idle) as node:
                again = await obtain_certificate(node)
                assert again is not None
                assert again.stage == 0
            assert office.bus.counts["join_answered"] == 2
        # No authority is there any more: the certificate in the state folder still is.
        async with living(attrs.evolve(settings, worker=elsewhere), idle) as node:
            assert await obtain_certificate(node) == again

    within(main)


def test_refusals_end_the_daemon_with_code_11(tmp_path: Path) -> None:
    place = Place(tmp_path, max_nodes_per_account=1)
    (tmp_path / "wrong").write_text("guess")

    async def refused(settings: config.Config, code: str) -> None:
        async with living(settings, idle) as node:
            with pytest.raises(DaemonExit, match=rf"\({code}\)") as end:
                await obtain_certificate(node)
            assert end.value.code == ExitCode.REFUSED
            complete(end.value.why)

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as office:
            await refused(place.worker("a", account="carol"), "unknown_account")
            await refused(place.worker("a", secret_file="wrong"), "wrong_secret")
            await refused(place.worker("a", account="bob"), "wrong_secret")
            settings = attrs.evolve(place.worker("a").worker, secret_file=None)
            await refused(attrs.evolve(place.worker("a"), worker=settings), "secret_needed")
            await refused(place.worker("a", stage=3), "wrong_stage")
            async with living(place.worker("a", stage=1), idle) as node:
                assert await obtain_certificate(node) is not None
                await refused(place.worker("b"), "account_full")
            await refused(place.worker("a", account="bob", stage=0), "identity_bound")
            outcomes = [e["outcome"] for e in office.bus.since() if e["event"] == "join_answered"]
            assert outcomes[-3:] == ["granted", "account_full", "identity_bound"]

    within(main)


def test_stages_fill_evenly_and_survive_the_authoritys_death(tmp_path: Path) -> None:
    place = Place(tmp_path, max_nodes_per_account=9)

    async def main() -> None:
        stages = []
        async with contextlib.AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(living(place.worker(f"w{i}"), idle)) for i in range(6)]
            for life in (nodes[:3], nodes[3:]):
                async with living(place.authority_settings(), authority.run):
                    for node in life:
                        granted = await obtain_certificate(node)
                        assert granted is not None
                        stages.append(granted.stage)
        assert stages == [0, 1, 2, 0, 1, 2]

    within(main)


def test_a_worker_waits_for_an_authority_that_is_not_there_yet(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.worker("w"), idle) as node, trio.open_nursery() as nursery:
            nursery.start_soon(obtain_certificate, node)
            await until_event(node, "join_delayed")
            async with living(place.authority_settings(), authority.run):
                await until_event(node, "certificate_granted")
                assert node.certificate is not None

    within(main)


def test_stopping_while_waiting_gives_none(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.worker("w"), idle) as node, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: _stop_after_delay(node))
            assert await obtain_certificate(node) is None

    async def _stop_after_delay(node: Node) -> None:
        await until_event(node, "join_delayed")
        node.stop("enough")

    within(main)


def test_an_old_certificate_is_renewed_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.authority_settings(), authority.run):
            settings = place.worker("w")
            async with living(settings, idle) as node:
                first = await obtain_certificate(node)
                assert first is not None
                now = node.clock()
                old = _certificate(place, node, issued=now - 3000, expires=now + 600)
            (settings.node.state / "certificate").write_bytes(old.encode())
            async with living(settings, idle) as node:
                assert await obtain_certificate(node) == old
                await until_event(node, "certificate_granted")
                assert node.certificate is not None
                assert node.certificate.issued >= now - 1

    within(main)


def test_only_members_reach_what_is_not_open_to_all(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def serve(call: Call) -> None:
        await call.receive()
        assert call.member is not None
        await call.send({"stage": call.member.stage})

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as office:
            office.host.handle(PRIVATE, serve)
            async with living(place.worker("w", stage=1), idle) as node:
                now = node.clock()
                stranger = Identity.generate()
                bad = {
                    "no_certificate": None,
                    "certificate_expired": _certificate(place, node, issued=now - 90, expires=now - 1),
                    "wrong_run": _certificate(place, node, run="t-2"),
                    "wrong_key": _certificate(place, node, peer_id=stranger.peer_id),
                    "unknown_authority": _certificate(place, node, identity=stranger),
                    "bad_signature": attrs.evolve(_certificate(place, node), stage=2),
                }
                for code, certificate in bad.items():
                    node.certificate = certificate
                    with pytest.raises(Refused) as refusal:
                        await ask(place, node)
                    assert refusal.value.code == code
                assert await obtain_certificate(node) is not None
                assert await ask(place, node) == 1  # presented again on the same connection

    within(main)


def test_another_manifest_is_another_run(tmp_path: Path) -> None:
    place = Place(tmp_path)
    altered = attrs.evolve(
        place.manifest, training=TrainingConfig(seed=2), content=b"", signature=None
    ).signed(place.operator)
    run.save(altered, tmp_path / "altered.toml")

    async def main() -> None:
        async with living(place.authority_settings(), authority.run) as office:
            office.host.handle(PRIVATE, idle)  # type: ignore[arg-type]
            settings = place.worker("w")
            other = attrs.evolve(settings, node=attrs.evolve(settings.node, run=tmp_path / "altered.toml"))
            async with living(other, idle) as node:
                with pytest.raises(Refused) as refusal:
                    await ask(place, node)
                assert refusal.value.code == "manifest_mismatch"

    within(main)


def test_an_authority_that_is_not_listed_does_not_start(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "authority" / "identity.key").unlink()

    async def main() -> None:
        await run_node(place.authority_settings(), authority.run, started_at=time.time())

    with pytest.raises(BaseException) as end:
        within(main)
    code, sentence = verdict(end.value)
    assert code == ExitCode.USAGE
    assert "a run's authority needs one that the manifest lists" in str(sentence)


def test_two_daemons_do_not_share_a_state_folder(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.worker("w"), idle):
            with pytest.raises(DaemonExit) as end:
                await run_node(place.worker("w"), idle, started_at=time.time())
            assert end.value.code == ExitCode.DUPLICATE

    within(main)


def _certificate(place: Place, node: Node, **changes: Any) -> Certificate:
    now = node.clock()
    fields = {
        "identity": place.authority,
        "run": "t-1",
        "account": "alice",
        "peer_id": node.identity.peer_id,
        "stage": 1,
        "issued": now,
        "expires": now + 60,
        **changes,
    }
    identity = fields.pop("identity")
    return issue(identity, **fields)


def test_a_machine_that_slept_renews_when_it_wakes() -> None:
    slept = 0.0

    async def main() -> None:
        nonlocal slept
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause, 3600.0, lambda: trio.current_time() + slept)
            await trio.sleep(100.0)
            slept = 7200.0
        assert trio.current_time() - began < 150.0
        slept = 0.0
        began = trio.current_time()
        await pause(3600.0, lambda: -trio.current_time())  # a clock set back does not put it off
        assert trio.current_time() - began == pytest.approx(3600.0)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
