"""A stock py-libp2p node for tests/interop: TCP, Noise, yamux, identify, ping, and nothing of ours.

Prints its address as a line of JSON, then answers requests on standard input, a line of JSON each: {"dial":
multiaddr} dials, pings, and asks who is there; {"text": multiaddr} and {"key": hex of a protobuf PublicKey}
say its forms of them; {"bulk": multiaddr, "bytes": count} sends so many to another of its kind and says the
seconds from the first byte to the word that all has arrived. Ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time

import trio
from cid import make_cid
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.utils.varint import read_length_prefixed_protobuf
from multiaddr import Multiaddr

BULK = TProtocol("/bulk/1")
CHUNK = 1 << 20


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def forms(request: dict[str, str]) -> dict[str, object]:
    if "text" in request:
        addr = Multiaddr(request["text"])
        return {"bytes": addr.to_bytes().hex(), "text": str(Multiaddr(addr.to_bytes()))}
    peer = ID.from_pubkey(deserialize_public_key(bytes.fromhex(request["key"])))
    return {"peer": str(peer), "cid": str(make_cid(1, "libp2p-key", peer.to_bytes()))}


async def dial(host, text: str) -> dict[str, object]:
    info = info_from_p2p_addr(Multiaddr(text))
    await host.connect(info)
    rtts = await PingService(host).ping(info.peer_id, 3)
    stream = await host.new_stream(info.peer_id, [TProtocol(IDENTIFY)])
    about = parse_identify_response(await read_length_prefixed_protobuf(stream))
    await stream.close()
    return {
        "peer": str(info.peer_id),
        "pings": len(rtts),
        "agent": about.agent_version,
        "protocol_version": about.protocol_version,
        "protocols": list(about.protocols),
        "observed": str(Multiaddr(about.observed_addr)),
        "addrs": [str(Multiaddr(raw)) for raw in about.listen_addrs],
    }


async def sink(stream) -> None:
    """Takes what is announced, and says a byte before and after."""
    left = int(await stream.read(16))
    await stream.write(b".")
    while left > 0:
        left -= len(await stream.read(CHUNK))
    await stream.write(b".")
    await stream.close()


async def bulk(host, text: str, size: int) -> dict[str, object]:
    info = info_from_p2p_addr(Multiaddr(text))
    await host.connect(info)
    stream = await host.new_stream(info.peer_id, [BULK])
    chunk = os.urandom(CHUNK)
    await stream.write(b"%16d" % (size // CHUNK * CHUNK))
    await stream.read(1)
    began = time.perf_counter()
    for _ in range(size // CHUNK):
        await stream.write(chunk)
    await stream.read(1)
    seconds = time.perf_counter() - began
    await stream.close()
    return {"seconds": seconds, "bytes": size // CHUNK * CHUNK}


async def main() -> None:
    host = new_host(key_pair=create_new_key_pair(), muxer_preference="YAMUX")
    host.set_stream_handler(BULK, sink)
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        say(addr=str(host.get_addrs()[0]), peer=str(host.get_id()))
        while line := (await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)).strip():
            try:
                request = json.loads(line)
                if "bulk" in request:
                    with trio.fail_after(50):
                        say(**await bulk(host, request["bulk"], int(request["bytes"])))
                    continue
                if "dial" not in request:
                    say(**forms(request))
                    continue
                with trio.fail_after(20):
                    say(**await dial(host, request["dial"]))
            except Exception as error:
                say(error=repr(error))


trio.run(main)
