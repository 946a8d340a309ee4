"""Errors of the reference system's catalogue whose counterparts no other test triggers, over real sockets."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agorad import run as runs
from agorad import standing
from agorad.authority import revocation
from agorad.authority.messages import PROTOCOL
from agorad.exitcodes import ExitCode, verdict
from agorad.joining import obtain_certificate
from agorad.living import run_node
from agorad.node import Node
from agorad.roles import authority
from agorad.run import NodeRef
from p2p.identity import Identity, PeerId
from p2p.membership import issue
from p2p.rpc import Call
from stage.replica import Replica
from tests.net.test_authority import Place, idle, living, until_event, within
from tests.sentences import complete


class InOrder(random.Random):
    """Asks authorities in the manifest's order."""

    def shuffle(self, x: Any) -> None:
        pass


async def nonsense(node: Node) -> None:
    """An authority whose every answer is none."""

    async def answer(call: Call) -> None:
        await call.receive()
        await call.send({"t": "html", "body": "<h1>request is blocked</h1>"})

    node.host.handle(PROTOCOL, answer, open_to_all=True)
    node.ready()
    await node.stopping.wait()


@pytest.mark.catalogue(27)
def test_an_authority_that_answers_nonsense_is_passed_over(tmp_path: Path) -> None:
    place = Place(tmp_path)
    sound = place.manifest.authorities[0]
    mad = Identity.generate()
    (tmp_path / "mad").mkdir()
    mad.save(tmp_path / "mad" / "identity.key")

    async def main() -> None:
        async with living(place.settings("mad", "seed"), nonsense) as other:
            ref = NodeRef(peer_id=mad.peer_id, addrs=(str(other.host.addrs[0].bare()),))
            for name, refs in (("alone", (ref,)), ("both", (ref, sound))):
                manifest = attrs.evolve(place.manifest, authorities=refs, content=b"", signature=None)
                runs.save(manifest.signed(place.operator), tmp_path / f"{name}.toml")

            def settings(role: str, manifest: str) -> Any:
                given = place.authority_settings() if role == "authority" else place.worker(manifest)
                return attrs.evolve(given, node=attrs.evolve(given.node, run=tmp_path / f"{manifest}.toml"))

            async with living(settings("worker", "alone"), idle) as node, trio.open_nursery() as nursery:
                nursery.start_soon(obtain_certificate, node)
                delayed = (await until_event(node, "join_delayed"))[0]
                assert "authority" in delayed["why"]
                assert delayed["retry_s"] > 0
                node.stop("seen enough")
            async with (
                living(settings("authority", "both"), authority.run),
                living(settings("worker", "both"), idle) as node,
            ):
                node.rng = InOrder()
                certificate = await obtain_certificate(node)
                assert certificate is not None
                assert certificate.authority == sound.peer_id

    within(main)


@pytest.mark.catalogue(40)
def test_a_list_of_the_removed_that_nobody_can_read_harms_nobody(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def member(node: Node) -> None:
        node.watch_s = 0.1
        await obtain_certificate(node)
        await node.stopping.wait()

    async def main() -> None:
        async with (
            living(place.authority_settings(), authority.run) as desk,
            living(place.worker("w"), member) as worker,
        ):
            await until_event(worker, "certificate_granted")
            key = revocation.key(place.manifest.run.id, 0)
            await desk.dht.store(key, desk.identity.peer_id, {"pages": "all"}, ttl=60.0, deadline=5.0)
            with trio.fail_after(20):
                while not worker.bus.counts["list_unreadable"]:
                    await standing.look(worker, set())
            (told,) = await until_event(worker, "list_unreadable")
            assert (told["authority"], bool(told["why"])) == (desk.identity.peer_id, True)
            assert not worker.stopping.is_set()
            assert worker.certificate is not None

    within(main)


def ended(settings: Any, role: Callable[[Node], Awaitable[None]]) -> tuple[int, str]:
    """Code and sentence with which a node ends by itself."""
    found: list[tuple[ExitCode, str | None]] = []

    async def main() -> None:
        try:
            await run_node(settings, role, started_at=time.time())
        except BaseException as error:
            if isinstance(error, trio.Cancelled):
                raise
            found.append(verdict(error))

    within(main)
    code, why = found[0]
    assert why is not None
    return int(code), why


@pytest.mark.catalogue(14)
@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_a_worker_without_its_device_ends_before_it_joins(tmp_path: Path, device: str) -> None:
    import torch

    from agorad.roles import worker

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    place = Place(tmp_path)  # its authority does not run: who asked it would wait for ever
    settings = place.worker("w")
    settings = attrs.evolve(settings, node=attrs.evolve(settings.node, device=device))
    code, why = ended(settings, worker.run)
    assert code == ExitCode.ACCELERATOR
    complete(why, f"node.device = '{device}'", "use ")


def keep_certificate(place: Place, peer: PeerId, state: Path) -> None:
    """As an earlier life would have kept it: the node begins without asking anybody."""
    now = time.time()
    kept = issue(
        place.authority, run="t-1", account="alice", peer_id=peer, role="worker", stage=1,
        issued=now - 60, expires=now + 600,
    )  # fmt: skip
    (state / "certificate").write_bytes(kept.encode())


STARVED = """
import re, resource, sys, torch
used = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
limit = used + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from agorad.main import main
main()
"""
"""A worker whose weights of 1 GiB do not fit."""


@pytest.mark.catalogue(30)
def test_a_worker_that_finds_no_memory_ends_with_code_16(tmp_path: Path) -> None:
    place = Place(tmp_path)
    big = attrs.evolve(place.manifest.model, d=4096, k=256, heads=32, kv_heads=32, head_dim=128, ffn=16384)
    manifest = attrs.evolve(place.manifest, model=big, content=b"", signature=None)
    runs.save(manifest.signed(place.operator), tmp_path / "run.toml")
    (state := tmp_path / "w").mkdir()
    identity = Identity.generate()
    identity.save(state / "identity.key")
    keep_certificate(place, identity.peer_id, state)
    (tmp_path / "agorad.toml").write_text(
        '[node]\nrole = "worker"\nrun = "run.toml"\nstate = "w"\ndevice = "cpu"\n'
        'listen = ["/ip4/127.0.0.1/tcp/0"]\n[worker]\naccount = "alice"\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", STARVED, "--config", str(tmp_path / "agorad.toml")],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.MEMORY, done.stderr
    complete(done.stderr.strip().splitlines()[-1], "agorad: out of memory", "worker.slots")


@pytest.mark.catalogue(35)
def test_weights_that_are_not_finite_end_a_worker_that_nobody_can_help(tmp_path: Path) -> None:
    from agorad.roles import worker

    place = Place(tmp_path)
    found: list[tuple[int, str]] = []

    async def spoil(node: Node, nursery: trio.Nursery) -> None:
        await until_event(node, "ready")
        replica = node.levers.resync.__self__  # type: ignore[attr-defined]
        assert isinstance(replica, Replica)
        replica._compute.weights.flat[7] = float("nan")  # type: ignore[attr-defined]
        await replica._save(1)  # as its turn for a snapshot comes

    async def role(node: Node) -> None:
        keep_certificate(place, node.identity.peer_id, node.config.node.state)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spoil, node, nursery)
            await worker.run(node)
            nursery.cancel_scope.cancel()

    async def main() -> None:
        async with living(place.authority_settings(), authority.run):
            try:
                await run_node(place.worker("w"), role, started_at=time.time())
            except BaseException as error:
                if isinstance(error, trio.Cancelled):
                    raise
                code, why = verdict(error)
                found.append((int(code), why or ""))

    within(main)
    code, why = found[0]
    assert code == ExitCode.NUMERICAL
    complete(why, "the weights are no numbers", "start it again", "no other replica of this stage")
    assert not list((tmp_path / "w" / "snapshots").glob("*.manifest")), "a spoiled state was kept"
