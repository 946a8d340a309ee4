"""A seed, as a user starts it, under strangers that speak nonsense: each is dropped and said once."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import trio

from agorad import run
from agorad.ask import NoAnswer, Unreachable, ask
from agorad.run import Manifest, NodeRef, RunInfo
from p2p import multistream, noise, yamux
from p2p.errors import P2PError
from p2p.host import Host
from p2p.identify import ping
from p2p.identity import Identity
from p2p.multiaddr import Multiaddr
from p2p.secure import Upgraded, upgrade
from stage.config import ModelConfig, TrainingConfig

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]
DROPPED_S = 30.0
RNG = random.Random(6)
HELLO = multistream.proposal("/noise")
TLS = bytes.fromhex("16030100c8010000c40303") + RNG.randbytes(190)


class Seed:
    """Its process, and what it says."""

    def __init__(self, folder: Path) -> None:
        operator, self.key = Identity.generate(), Identity.generate()
        self.key.save(folder / "identity.key")
        manifest = Manifest(
            run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
            seeds=(NodeRef(peer_id=self.key.peer_id),),
            model=ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1)),
            training=TrainingConfig(seed=1),
        )
        run.save(manifest.signed(operator), folder / "run.toml")
        node = {"role": "seed", "run": "run.toml", "state": ".", "listen": ["/ip4/127.0.0.1/tcp/0"]}
        (folder / "agorad.toml").write_text(tomli_w.dumps({"node": {**node, "control": str(folder / "c")}}))
        self.log = folder / "events.jsonl"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agorad.main", "--config", str(folder / "agorad.toml")],
            stderr=(folder / "err").open("wb"),
        )
        until = time.monotonic() + 60
        addrs: list[str] = []
        while not addrs:
            assert self.process.poll() is None, (folder / "err").read_text()
            assert time.monotonic() < until
            try:
                addrs = ask(folder / "c", "status")["addrs"]
            except (Unreachable, NoAnswer):
                time.sleep(0.1)
        self.addr = Multiaddr.parse(addrs[0])

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def still_serves(self) -> None:
        async def main() -> None:
            with trio.fail_after(30):
                async with Host(Identity.generate()).run() as host:
                    connection = await host.connect(self.key.peer_id, addrs=[self.addr], deadline=20)
                    assert await ping(connection, block=os.urandom(32), deadline=10) < 10

        trio.run(main)


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seed]:
    one = Seed(tmp_path_factory.mktemp("seed"))
    try:
        yield one
        one.process.terminate()
        assert one.process.wait(30) == 0
        assert not one.events("handler_failed")
        assert not one.events("trouble")
    finally:
        one.process.kill()
        one.process.wait()


BEFORE = {
    "random bytes": RNG.randbytes(4096),
    "zeros": bytes(4096),
    "TLS": TLS,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "another multistream": b"\x13/multistream/2.0.0\n",
    "a line without an end": b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80" + b"a" * 100,
    "a muxer before security": multistream.proposal("/yamux/1.0.0") + b"/mplex/6.7.0\n" * 20,
    "half a handshake": HELLO + struct.pack(">H", 32) + RNG.randbytes(32) + b"\x00\x20" + RNG.randbytes(32),
    "an empty Noise message": HELLO + b"\x00\x00" * 4,
}


@pytest.mark.parametrize("what", BEFORE)
def test_who_never_says_who_it_is(seed: Seed, what: str) -> None:
    said, port = len(seed.events("handshake_failed")), seed.addr.port
    with socket.create_connection(("127.0.0.1", port), timeout=DROPPED_S) as stranger:
        own = stranger.getsockname()[1]
        try:
            stranger.sendall(BEFORE[what])
            while stranger.recv(65_536):
                pass
        except ConnectionError:
            pass  # dropped with what we said unread
    until = time.monotonic() + 5
    while len(seed.events("handshake_failed")) == said and time.monotonic() < until:
        time.sleep(0.05)
    (failed,) = seed.events("handshake_failed")[said:]
    assert failed["addr"] == f"/ip4/127.0.0.1/tcp/{own}"
    assert failed["why"]
    seed.still_serves()


def frame(kind: int, flags: int, stream: int, length: int) -> bytes:
    return yamux.HEADER.pack(0, kind, flags, stream, length)


def sealed(plain: bytes) -> Callable[[noise.Cipher], bytes]:
    """Records of these bytes."""

    def records(cipher: noise.Cipher) -> bytes:
        out = []
        for start in range(0, len(plain), noise.MAX_PLAINTEXT):
            record = cipher.encrypt(plain[start : start + noise.MAX_PLAINTEXT], b"")
            out.append(struct.pack(">H", len(record)) + record)
        return b"".join(out)

    return records


SYN_DATA = frame(yamux.DATA, yamux.SYN, 1, 0)
AFTER: dict[str, Callable[[noise.Cipher], bytes]] = {
    "bytes that are no record": lambda _cipher: b"\x10\x00" + RNG.randbytes(4096),
    "a record shorter than its seal": lambda _cipher: b"\x00\x05hello",
    "a record twice": lambda cipher: 2 * sealed(frame(yamux.PING, yamux.SYN, 0, 7))(cipher),
    "no yamux": sealed(b"GET / HTTP/1.1\r\n\r\n"),
    "another version": sealed(b"\x01" + bytes(11)),
    "an unknown frame": sealed(frame(9, 0, 0, 0)),
    "the seed's own parity": sealed(frame(yamux.DATA, yamux.SYN, 2, 0)),
    "stream zero": sealed(frame(yamux.DATA, yamux.SYN, 0, 0)),
    "a stream opened twice": sealed(SYN_DATA * 2),
    "more than the window": sealed(SYN_DATA + frame(yamux.DATA, 0, 1, 0xFFFFFFFF)),
    "a window beyond 32 bits": sealed(SYN_DATA + frame(yamux.WINDOW_UPDATE, 0, 1, 0xFFFFFFFF) * 2),
    "data behind the end": sealed(
        SYN_DATA + frame(yamux.DATA, yamux.FIN, 1, 0) + frame(yamux.DATA, 0, 1, 4) + b"more"
    ),
    "pings without number, answers unread": sealed(frame(yamux.PING, yamux.SYN, 0, 1) * 600_000),
}


@pytest.mark.parametrize("what", AFTER)
def test_who_is_proven_and_then_talks_nonsense(seed: Seed, what: str) -> None:
    stranger = Identity.generate()

    async def main() -> None:
        with trio.fail_after(DROPPED_S):
            stream = await trio.open_tcp_stream("127.0.0.1", seed.addr.port or 0)
            async with stream:
                proven = await proved(stream, stranger, seed)
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(AFTER[what](proven.secured.sending))
                    while "unread" not in what and await stream.receive_some():
                        pass

    trio.run(main)
    until = time.monotonic() + 5
    while not (gone := [e for e in seed.events("disconnected") if e["peer"] == stranger.peer_id]):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(gone) == 1
    assert gone[0]["why"]
    assert "internal error" not in gone[0]["why"]
    seed.still_serves()


async def proved(stream: trio.abc.Stream, stranger: Identity, seed: Seed) -> Upgraded:
    try:
        return await upgrade(stream, stranger, expected=seed.key.peer_id, entropy=os.urandom, dialer=True)
    except P2PError as error:
        raise AssertionError(f"the seed takes no handshake any more: {error}") from error
