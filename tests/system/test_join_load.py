"""A thousand strangers in a minute at the door of one authority, a process of its own, for a hundred places.

The joiners are real hosts on loopback in this process; they say what a worker says and stay
on their streams.
"""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import attrs
import psutil
import pytest
import tomli_w
import trio

from agorad import run
from agorad.authority import accounts
from agorad.authority.messages import (
    PROTOCOL,
    Checking,
    Facts,
    Granted,
    Join,
    Leave,
    Queued,
    read_answer,
)
from agorad.authority.store import Store
from agorad.run import Admission, Manifest, NodeRef, RunInfo
from p2p.errors import P2PError, Refused
from p2p.host import Host
from p2p.identity import Identity
from p2p.membership import Certificate, Membership
from p2p.multiaddr import Multiaddr
from stage.config import ModelConfig, TrainingConfig

JOINERS = 1000
ACCOUNTS = 450
CAPACITY = 100
ARRIVE_S = 40.0
LEAVING = 40
DEADLINE_S = 240.0
MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1, 1))


@attrs.define(eq=False)
class Joiner:
    account: str
    secret: str
    identity: Identity = attrs.field(factory=Identity.generate)
    place: Queued | None = None
    first_place: int | None = None
    granted: Certificate | None = None
    granted_at: float = 0.0
    refused: str = ""
    messages: int = 0


@attrs.define(eq=False)
class Door:
    folder: Path
    manifest: Manifest
    authority: Identity
    secrets: list[str]
    nursery: trio.Nursery
    process: subprocess.Popen[bytes]
    peak_rss: int = 0

    async def join(self, joiner: Joiner) -> None:
        host = Host(joiner.identity)
        host.membership = Membership(self.manifest.trust(), lambda: None, time.time)
        host.learn(self.authority.peer_id, self.manifest.authorities[0].multiaddrs())
        async with host.run([]):
            wait_s = 0.2
            while joiner.granted is None and not joiner.refused:
                try:
                    await self._ask(host, joiner)
                except Refused as no:
                    if no.code != "busy":
                        joiner.refused = no.code
                except P2PError:
                    pass  # too many handshakes at a time: as a worker does, later again
                await trio.sleep(wait_s)
                wait_s = min(5.0, 2 * wait_s)
            await trio.sleep_forever()  # members keep their connections

    async def _ask(self, host: Host, joiner: Joiner) -> None:
        join = Join(
            account=joiner.account, secret=joiner.secret, session=bytes(16), facts=Facts(clock=time.time())
        )
        async with await host.call(self.authority.peer_id, PROTOCOL, deadline=20.0) as call:
            await call.send(join.to_header())
            while joiner.granted is None:
                answer = read_answer((await call.receive()).header)
                joiner.messages += 1
                if isinstance(answer, Queued):
                    joiner.place = answer
                    joiner.first_place = joiner.first_place or answer.position
                elif isinstance(answer, Granted):
                    joiner.granted = Certificate.decode(answer.certificate)
                    joiner.granted_at = time.monotonic()
                else:
                    assert isinstance(answer, Checking)

    async def leave(self, joiner: Joiner) -> None:
        host = Host(joiner.identity)
        host.membership = Membership(self.manifest.trust(), lambda: None, time.time)
        host.learn(self.authority.peer_id, self.manifest.authorities[0].multiaddrs())
        async with (
            host.run([]),
            await host.call(self.authority.peer_id, PROTOCOL, deadline=20.0) as call,
        ):
            await call.send(Leave(session=bytes(16)).to_header())
            await call.receive()

    async def watch(self) -> None:
        process = psutil.Process(self.process.pid)
        while True:
            self.peak_rss = max(self.peak_rss, process.memory_info().rss)
            await trio.sleep(0.5)

    def active(self) -> list[str]:
        store = Store(self.folder / "authority" / "authority.sqlite")
        try:
            return [grant.account for grant in store.active(time.time())]
        finally:
            store.close()


def _prepare(folder: Path) -> tuple[Manifest, Identity, list[str], Path]:
    operator, key = Identity.generate(), Identity.generate()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    manifest = Manifest(
        run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
        authorities=(NodeRef(peer_id=key.peer_id, addrs=(f"/ip4/127.0.0.1/tcp/{port}",)),),
        model=MODEL,
        training=TrainingConfig(seed=1),
        # Strangers here are one process that serves nobody: there is nothing to dial back.
        admission=Admission(max_nodes=CAPACITY, max_nodes_per_account=2, port_test=False, max_rtt_ms=0.0),
    ).signed(operator)
    run.save(manifest, folder / "run.toml")
    (folder / "authority").mkdir()
    key.save(folder / "authority" / "identity.key")
    secrets = [accounts.add(folder / "accounts.toml", f"user-{i}") for i in range(ACCOUNTS)]
    config = folder / "agorad.toml"
    node = {"role": "authority", "run": "run.toml", "state": "authority"}
    table = {
        "node": {**node, "listen": [str(Multiaddr.tcp("127.0.0.1", port))]},
        "authority": {"accounts": "accounts.toml"},
    }
    config.write_text(tomli_w.dumps(table))
    return manifest, key, secrets, config


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_thousand_joiners_and_a_hundred_places(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"this needs 4096 descriptors; {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else hard, hard))
    manifest, key, secrets, config = _prepare(tmp_path)
    joiners = [Joiner(f"user-{i % ACCOUNTS}", secrets[i % ACCOUNTS]) for i in range(JOINERS)]

    async def main(process: subprocess.Popen[bytes]) -> None:
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                door = Door(tmp_path, manifest, key, secrets, nursery, process)
                nursery.start_soon(door.watch)
                began = time.monotonic()
                for index, joiner in enumerate(joiners):
                    nursery.start_soon(door.join, joiner)
                    await trio.sleep(max(0.0, began + (index + 1) * ARRIVE_S / JOINERS - time.monotonic()))
                while not all(j.granted or j.refused or j.place for j in joiners):  # noqa: ASYNC110
                    await trio.sleep(0.2)
                settled_s = time.monotonic() - began
                await _check_crowd(door, joiners)
                await _check_turns(door, joiners)
                print(
                    f"all had an answer after {settled_s:.1f} s; authority's memory: "
                    f"{door.peak_rss / 1e6:.0f} MB at most; "
                    f"{sum(j.messages for j in joiners)} messages"
                )
                assert settled_s < 60 + ARRIVE_S
                assert door.peak_rss < 200e6
                nursery.cancel_scope.cancel()

    process = subprocess.Popen(
        [sys.executable, "-m", "agorad.main", "--config", str(config), "--log-file", str(tmp_path / "log")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        trio.run(main, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _check_crowd(door: Door, joiners: list[Joiner]) -> None:
    """A hundred are in, nobody twice, no account more than twice; the others know their places."""
    inside = [joiner for joiner in joiners if joiner.granted]
    assert len(inside) == CAPACITY
    assert len({joiner.granted.peer_id for joiner in inside if joiner.granted}) == CAPACITY
    active = await trio.to_thread.run_sync(door.active)
    assert len(active) == CAPACITY
    assert Counter(active) == Counter(joiner.account for joiner in inside)
    refused = Counter(joiner.refused for joiner in joiners if joiner.refused)
    assert refused == {"account_full": JOINERS - 2 * ACCOUNTS}
    both = Counter(joiner.account for joiner in joiners if joiner.granted or joiner.place)
    assert set(both.values()) == {2}
    waiting = [joiner for joiner in joiners if joiner.place and not joiner.granted]
    while len({j.place.position for j in waiting if j.place}) < len(waiting):  # noqa: ASYNC110
        await trio.sleep(0.2)  # the last news of the far back is on its way
    places = sorted(joiner.place.position for joiner in waiting if joiner.place)
    assert places == list(range(1, 2 * ACCOUNTS - CAPACITY + 1))
    assert all(joiner.place.waitlisted for joiner in waiting if joiner.place)


async def _check_turns(door: Door, joiners: list[Joiner]) -> None:
    """As nodes leave, those who waited longest get in, and no others."""
    waiting = [joiner for joiner in joiners if joiner.place and not joiner.granted]
    waiting.sort(key=lambda joiner: joiner.place.position if joiner.place else 0)
    for joiner in [joiner for joiner in joiners if joiner.granted][:LEAVING]:
        await door.leave(joiner)
    while sum(joiner.granted is not None for joiner in waiting) < LEAVING:  # noqa: ASYNC110
        await trio.sleep(0.1)
    await trio.sleep(2.0)
    got_in = [joiner for joiner in waiting if joiner.granted]
    assert got_in == waiting[:LEAVING]
    active = await trio.to_thread.run_sync(door.active)
    assert len(active) == CAPACITY
    assert max(Counter(active).values()) <= 2
