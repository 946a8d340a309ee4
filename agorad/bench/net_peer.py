"""One end of ``bench net``: ``python -m agorad.bench.net_peer``, told what to do by a line of JSON on stdin.

``listen``: a host that takes payloads and echoes small calls, and a bare sink; says its address and port.
``send``: measures, says what came out. Both are members of a run of their own: certificates, gates and
counters are those of the daemon.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any, Final

import trio

from agorad.bench import member
from agorad.bench.member import say
from p2p import noise
from p2p.errors import PeerGone
from p2p.host import Host
from p2p.identity import PeerId
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from p2p.sealed import BATCH, READ_SIZE, RECORD
from p2p.transport import tune

BULK: Final = "/agora/bench-bulk/1"
ECHO: Final = "/agora/bench-echo/1"
MESSAGE: Final = 1 << 20
"""Bytes of one message, about what a microbatch's boundary has."""
CALL: Final = 1024
PAUSE_S: Final = 0.05
"""Between two small calls beside the bulk."""
AEAD_S: Final = 0.5
WAIT_S: Final = 30.0
KEY: Final = bytes(range(32))


async def listen(spec: dict[str, Any]) -> None:
    host = member.host(spec)

    async def bulk(call: Call) -> None:
        left = int((await call.receive()).header["bytes"])
        await call.send({"t": "go"})
        while left > 0:
            left -= len((await call.receive(max_payload=MESSAGE, ahead=max(0, left - MESSAGE))).payload)
        await call.send({"t": "done"})

    async def echo(call: Call) -> None:
        while True:
            try:
                await call.send({}, (await call.receive(max_payload=CALL)).payload)
            except PeerGone:
                return

    async def sink(stream: trio.SocketStream) -> None:
        tune(stream)
        cipher, rest = noise.Cipher(KEY), b""
        plain = memoryview(bytearray(READ_SIZE + RECORD))
        left = int.from_bytes(await stream.receive_some(8), "big")
        await stream.send_all(b".")
        while left > 0:
            data = rest + await stream.receive_some(READ_SIZE)
            view, offset = memoryview(data), 0
            while len(data) - offset >= 2:
                size = data[offset] << 8 | data[offset + 1]
                if len(data) - offset < 2 + size:
                    break
                cipher.decrypt_into(view[offset + 2 : offset + 2 + size], plain[: size - noise.TAG])
                left -= size - noise.TAG
                offset += 2 + size
            rest = data[offset:]
        await stream.send_all(b".")

    host.handle(BULK, bulk)
    host.handle(ECHO, echo)
    async with trio.open_nursery() as nursery, host.run([Multiaddr.tcp(spec["address"], 0)]):
        listeners = await trio.open_tcp_listeners(0, host=spec["address"])
        nursery.start_soon(trio.serve_listeners, sink, listeners)
        say(addr=str(host.addrs[0]), port=listeners[0].socket.getsockname()[1])
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


async def send(spec: dict[str, Any]) -> None:
    size, repeat = int(spec["bytes"]), int(spec["repeat"])
    host = member.host(spec)
    addr = Multiaddr.parse(spec["addr"])
    peer = addr.peer_id
    assert peer is not None
    ours: list[float] = []
    bare: list[float] = []
    beside: list[float] = []
    async with host.run():
        await host.connect(peer, addrs=[addr], deadline=WAIT_S)
        idle = await calls(host, peer, 20)
        for number in range(repeat):
            ours.append(await bulk_of(host, peer, size, beside))
            progress(f"run {number + 1} of {repeat}: {size / ours[-1] / 1e6:.0f} MB/s")
            if number < spec["bare_runs"]:
                bare.append(await bare_of(spec["address"], int(spec["port"]), size))
    say(
        seconds=ours,
        framing_seconds=bare,
        aead_mb_per_s=aead(),
        idle_ms=idle * 1e3,
        call_ms=[value * 1e3 for value in beside],
    )


async def bulk_of(host: Host, peer: PeerId, size: int, beside: list[float]) -> float:
    """Seconds from the first byte to the word that all has arrived; small calls go on beside it."""
    chunk = memoryview(os.urandom(MESSAGE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(small_calls, host, peer, beside)
        async with await host.call(peer, BULK, deadline=WAIT_S) as call:
            await call.send({"bytes": size})
            await call.receive()
            began = time.perf_counter()
            left = size
            while left > 0:
                await call.send({}, chunk[:left])
                left -= MESSAGE
            await call.receive()
            seconds = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    return seconds


async def calls(host: Host, peer: PeerId, count: int) -> float:
    """Median seconds of an exchange of 1 KB."""
    taken: list[float] = []
    async with await host.call(peer, ECHO, deadline=WAIT_S) as call:
        for _ in range(count):
            taken.append(await exchange(call))
    return statistics.median(taken)


async def small_calls(host: Host, peer: PeerId, taken: list[float]) -> None:
    async with await host.call(peer, ECHO, deadline=WAIT_S) as call:
        while True:
            taken.append(await exchange(call))
            await trio.sleep(PAUSE_S)


async def exchange(call: Call) -> float:
    began = time.perf_counter()
    await call.send({}, bytes(CALL))
    await call.receive(max_payload=CALL)
    return time.perf_counter() - began


async def bare_of(address: str, port: int, size: int) -> float:
    """The same bytes through a loop that cuts, encrypts and sends, and knows no streams."""
    stream = await trio.open_tcp_stream(address, port)
    tune(stream)
    cipher = noise.Cipher(KEY)
    plain = memoryview(os.urandom(noise.MAX_PLAINTEXT))
    out = memoryview(bytearray(BATCH * RECORD))
    async with stream:
        await stream.send_all(size.to_bytes(8, "big"))
        await stream.receive_some(1)
        began = time.perf_counter()
        left = size
        while left > 0:
            used = 0
            for _ in range(BATCH):
                if left <= 0:
                    break
                amount = min(left, len(plain))
                sealed = amount + noise.TAG
                out[used], out[used + 1] = sealed >> 8, sealed & 0xFF
                cipher.encrypt_into(plain[:amount], out[used + 2 : used + 2 + sealed])
                used += 2 + sealed
                left -= amount
            await stream.send_all(out[:used])
        await stream.receive_some(1)
        return time.perf_counter() - began


def aead() -> float:
    """MB a second that one core encrypts."""
    cipher = noise.Cipher(KEY)
    plain = memoryview(os.urandom(noise.MAX_PLAINTEXT))
    out = memoryview(bytearray(RECORD))
    done, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < AEAD_S:
        for _ in range(16):
            cipher.encrypt_into(plain, out[: len(plain) + noise.TAG])
        done += 16 * len(plain)
    return done / taken / 1e6


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    spec = json.loads(sys.stdin.readline())
    trio.run(listen if spec["end"] == "listen" else send, spec)


if __name__ == "__main__":
    main()
