"""/ipfs/id/1.0.0 and /ipfs/ping/1.0.0: what every libp2p node may ask of every other.

Identify: the server writes one varint-framed protobuf about itself and ends the stream. Ping: the
server echoes blocks of 32 bytes until the peer ends the stream. Both are open to all, so both stay
small: an identify message is at most 8 KiB here, a ping stream handles one block at a time.
Source: github.com/libp2p/specs/tree/master/{identify,ping}.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import trio

from p2p import multistream, protobuf
from p2p.errors import PeerGone, RemoteError
from p2p.identity import decode_public_key, encode_public_key, peer_id_of
from p2p.multiaddr import Multiaddr

if TYPE_CHECKING:
    from p2p.connection import Connection
    from p2p.host import Host
    from p2p.muxed import MuxedStream

IDENTIFY = "/ipfs/id/1.0.0"
PING = "/ipfs/ping/1.0.0"
PROTOCOL_VERSION = "ipfs/0.1.0"
AGENT = "agorad"
MAX_MESSAGE = 8192
BLOCK = 32


@final
@attrs.frozen(kw_only=True)
class Identified:
    """What a peer says about itself. Only the key is checked; the rest is its word."""

    agent: str
    protocol_version: str
    addrs: tuple[Multiaddr, ...]
    observed: Multiaddr | None
    """Where the peer sees us."""
    protocols: tuple[str, ...]


def install(host: Host) -> None:
    """Serve both protocols."""

    async def serve_identify(connection: Connection, stream: MuxedStream) -> None:
        message = encode(host, connection.addr)
        await stream.send_all(protobuf.encode_varint(len(message)) + message)

    async def serve_ping(_connection: Connection, stream: MuxedStream) -> None:
        while True:
            try:
                block = await stream.receive_exactly(BLOCK)
            except PeerGone:
                return
            with trio.fail_after(host.limits.echo_s):
                await stream.send_all(block)

    host.handle_stream(IDENTIFY, serve_identify)
    host.handle_stream(PING, serve_ping)


def encode(host: Host, observed: str) -> bytes:
    """The identify message of a host, as told to a peer at ``observed``."""
    parts = [
        protobuf.field(1, encode_public_key(host.identity.public_key)),
        *(protobuf.field(2, addr.bare().encode()) for addr in host.addrs),
        *(protobuf.field(3, protocol.encode()) for protocol in host.protocols),
        protobuf.field(4, Multiaddr.parse(observed).bare().encode()),
        protobuf.field(5, PROTOCOL_VERSION.encode()),
        protobuf.field(6, AGENT.encode()),
    ]
    return b"".join(parts)


def decode(message: bytes, connection: Connection) -> Identified:
    """RemoteError when the message is malformed or carries another peer's key."""
    addrs: list[Multiaddr] = []
    protocols: list[str] = []
    texts = {5: "", 6: ""}
    observed: Multiaddr | None = None
    for number, value in protobuf.fields(message):
        if not isinstance(value, bytes):
            continue
        if number == 1 and peer_id_of(decode_public_key(value)) != connection.peer:
            raise RemoteError("identify carries another peer's key")
        if number in (2, 4):
            try:
                addr = Multiaddr.decode(value)
            except RemoteError:
                continue  # an address kind that we do not know
            if number == 2:
                addrs.append(addr)
            else:
                observed = addr
        elif number == 3:
            protocols.append(value.decode(errors="replace"))
        elif number in texts:
            texts[number] = value.decode(errors="replace")
    return Identified(
        agent=texts[6],
        protocol_version=texts[5],
        addrs=tuple(addrs),
        observed=observed,
        protocols=tuple(protocols),
    )


async def identify(connection: Connection, *, deadline: float) -> Identified:
    """Ask a peer; one at a time and connection (js-libp2p resets a second one)."""
    async with connection.identifying:
        stream = await open_raw(connection, IDENTIFY, deadline)
        try:
            with trio.move_on_after(deadline):
                size = 0
                for shift in range(0, 21, 7):
                    byte = (await stream.receive_exactly(1))[0]
                    size |= (byte & 0x7F) << shift
                    if byte < 0x80:
                        break
                if not 0 < size <= MAX_MESSAGE:
                    raise RemoteError(f"an identify message of {size} bytes")
                return decode(bytes(await stream.receive_exactly(size)), connection)
        finally:
            await stream.aclose()
    raise PeerGone("identify was not answered in time")


async def ping(connection: Connection, *, block: bytes, deadline: float) -> float:
    """Seconds of one echo of 32 random bytes: a ping that every libp2p node answers."""
    stream = await open_raw(connection, PING, deadline)
    try:
        with trio.move_on_after(deadline):
            began = trio.current_time()
            await stream.send_all(block)
            if bytes(await stream.receive_exactly(BLOCK)) != block:
                raise RemoteError("the echo of a ping differs")
            return trio.current_time() - began
    finally:
        await stream.aclose()
    raise PeerGone("ping was not answered in time")


async def open_raw(connection: Connection, protocol: str, deadline: float) -> MuxedStream:
    """A raw stream of a protocol that is not ours, agreed before this returns."""
    stream = connection.open_stream()
    try:
        with trio.move_on_after(deadline):
            await stream.send_all(multistream.proposal(protocol))
            confirmation = multistream.Confirmation(protocol)
            while missing := confirmation.missing:
                confirmation.feed(bytes(await stream.receive_exactly(missing)))
            return stream
    except BaseException:
        stream.reset()
        raise
    stream.reset()
    raise PeerGone(f"{protocol} was not agreed in time")
