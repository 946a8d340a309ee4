"""Stock py-libp2p and js-libp2p nodes against ours, both ways: Noise, yamux, identify, ping, text forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
import trio

from agorad import run
from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.run import Manifest, NodeRef, RunInfo
from p2p.errors import DialError
from p2p.host import Host
from p2p.identify import identify, ping
from p2p.identity import Identity, PeerId, encode_public_key, parse_peer_id, peer_id_of
from p2p.multiaddr import Multiaddr
from stage.config import ModelConfig, TrainingConfig
from tests.interop import peers
from tests.interop.peers import Foreign

pytestmark = pytest.mark.timeout(600)
LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
ADDRS = [
    "/ip4/203.0.113.7/tcp/49200",
    "/ip6/2001:db8::1/tcp/1",
    "/ip6/::/tcp/65535",
    "/dns/seed.example.org/tcp/49170",
    "/dns4/seed.example.org/tcp/443/wss",
    "/dnsaddr/example.org",
    "/ip4/1.2.3.4/udp/9/quic-v1",
    "/ip4/1.2.3.4/udp/9/quic-v1/webtransport/certhash/uEiDDq4_xNyDorZBH3TlGazyJdOWSwvo4PUo5YHFMrvDE8g",
    "/ip4/1.2.3.4/udp/9/webrtc-direct",
]


@pytest.fixture(scope="module", params=["py", "js"])
def foreign(request: pytest.FixtureRequest) -> Iterator[Foreign]:
    node = Foreign(peers.py_libp2p() if request.param == "py" else peers.js_libp2p())
    yield node
    assert node.end() == 0


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A seed as a user starts it: its peer id and address."""
    place = tmp_path_factory.mktemp("seed")
    operator, key = Identity.generate(), Identity.generate()
    key.save(place / "identity.key")
    manifest = Manifest(
        run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
        seeds=(NodeRef(peer_id=key.peer_id),),
        model=ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1)),
        training=TrainingConfig(seed=1),
    )
    run.save(manifest.signed(operator), place / "run.toml")
    node = {"role": "seed", "run": "run.toml", "state": ".", "listen": ["/ip4/127.0.0.1/tcp/0"]}
    (place / "agorad.toml").write_text(tomli_w.dumps({"node": {**node, "control": str(place / "c")}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "agorad.main", "--config", str(place / "agorad.toml")],
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    try:
        yield {"peer": str(key.peer_id), "addr": address_of(place / "c", process)}
    finally:
        process.terminate()
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.communicate()


def address_of(control: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the seed ended"
        try:
            return str(ask(control, "status")["addrs"][0])
        except (Unreachable, NoAnswer, CommandFailed, IndexError):
            time.sleep(0.1)
    raise AssertionError("the seed says no address")


def hosted(main: Callable[[Host], Awaitable[None]]) -> None:
    async def outer() -> None:
        host = Host(Identity.generate())
        with trio.fail_after(90):
            async with host.run([LOCAL]):
                await main(host)

    trio.run(outer)


def test_stock_node_pings_and_identifies_a_seed(foreign: Foreign, seed: dict[str, str]) -> None:
    about = foreign.ask(dial=seed["addr"])
    assert "error" not in about
    assert about["peer"] == seed["peer"]
    assert about["pings"] == 3
    assert about["agent"].startswith("agorad")
    assert about["protocol_version"] == "ipfs/0.1.0"
    assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/agora/hello/1"} <= set(about["protocols"])
    assert about["observed"].startswith("/ip4/127.0.0.1/tcp/")
    assert Multiaddr.parse(about["addrs"][0]).at(PeerId(seed["peer"])) == Multiaddr.parse(seed["addr"])


def test_stock_node_dials_again_and_again(foreign: Foreign) -> None:
    async def main(host: Host) -> None:
        for _ in range(3):
            about = await trio.to_thread.run_sync(lambda: foreign.ask(dial=str(host.addrs[0])))
            assert about.get("pings") == 3, about
        assert PeerId(foreign.peer) in host.connections

    hosted(main)


def test_we_dial_ping_and_identify_a_stock_node(foreign: Foreign) -> None:
    async def main(host: Host) -> None:
        peer = parse_peer_id(foreign.peer)
        connection = await host.connect(peer, addrs=[Multiaddr.parse(foreign.addr)], deadline=20)
        for number in range(5):
            assert await ping(connection, block=bytes([number] * 32), deadline=10) < 10
        for _ in range(3):
            about = await identify(connection, deadline=10)
            assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0"} <= set(about.protocols)
            assert Multiaddr.parse(foreign.addr).bare() in [addr.bare() for addr in about.addrs]
            assert about.observed is not None
            assert about.observed.host == "127.0.0.1"
        assert await connection.ping(10) < 10  # yamux's own
        assert connection.usable

    hosted(main)


def test_both_ways_on_the_connection_that_we_dialled(foreign: Foreign) -> None:
    async def main(host: Host) -> None:
        peer = parse_peer_id(foreign.peer)
        connection = await host.connect(peer, addrs=[Multiaddr.parse(foreign.addr)], deadline=20)
        # An answer means that they have it in their table, too; before, they might dial one of their own.
        await ping(connection, block=b"w" * 32, deadline=10)
        about = await trio.to_thread.run_sync(lambda: foreign.ask(dial=str(host.addrs[0])))
        assert about.get("pings") == 3, about
        assert host.connections[peer] is connection
        assert await ping(connection, block=b"x" * 32, deadline=10) < 10

    hosted(main)


def test_wrong_peer_id_is_refused_by_both(foreign: Foreign, seed: dict[str, str]) -> None:
    other = Identity.generate().peer_id
    assert "error" in foreign.ask(dial=str(Multiaddr.parse(seed["addr"]).at(other)))

    async def main(host: Host) -> None:
        with pytest.raises(DialError):
            await host.connect(other, addrs=[Multiaddr.parse(foreign.addr).at(other)], deadline=10)

    hosted(main)


def test_peer_ids_and_keys_have_the_same_forms(foreign: Foreign) -> None:
    for number in range(20):
        key = Identity.generate(bytes([number]) * 32)
        said = foreign.ask(key=encode_public_key(key.public_key).hex())
        assert said["peer"] == key.peer_id
        assert parse_peer_id(said["cid"]) == key.peer_id
        assert peer_id_of(key.public_key) == key.peer_id


def test_addresses_have_the_same_forms(foreign: Foreign) -> None:
    for text in [*ADDRS, f"{ADDRS[0]}/p2p/{foreign.peer}", f"{ADDRS[0]}/p2p/{foreign.peer}/p2p-circuit"]:
        ours = Multiaddr.parse(text)
        said = foreign.ask(text=text)
        assert said == {"bytes": ours.encode().hex(), "text": str(ours)}, json.dumps(said)
        assert Multiaddr.decode(bytes.fromhex(said["bytes"])) == ours
