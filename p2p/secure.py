"""From a raw byte stream to a proven peer: multistream-select, Noise, multistream-select again.

The dialer sends its wish for ``/noise`` together with the first Noise message, and its wish for
``/yamux/1.0.0`` together with the third: two round trips in all. ``/agora/aside/1`` in its place is the
same yamux on a connection that stands beside the one that both use (``Host.aside``). Nothing here has
a deadline of its own; the caller bounds the whole (``Limits.handshake_s``). Reads at most one record
beyond need and hands back what it read too much.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, final

import attrs
import trio

from p2p import multistream, noise, yamux
from p2p.errors import PeerGone, RemoteError
from p2p.identity import Identity, PeerId

Entropy = Callable[[int], bytes]
"""Gives that many secret random bytes: ``os.urandom``, or a seeded source in simulations."""

READ_SIZE = 65_536
ASIDE: Final = "/agora/aside/1"
"""Yamux, on a connection that neither side uses for anything but what it was made for."""


@attrs.frozen
class Upgraded:
    """A stream on which both sides are proven and speak yamux."""

    stream: trio.abc.Stream
    secured: noise.Secured
    ciphertext: bytes
    """Read from the stream, not yet decrypted."""
    plaintext: bytes
    """Decrypted, not yet parsed: the first yamux bytes."""
    aside: bool = False
    """Whether the dialer wants it beside the connection that calls use."""


async def upgrade(
    stream: trio.abc.Stream,
    identity: Identity,
    *,
    expected: PeerId | None,
    entropy: Entropy,
    dialer: bool,
    aside: bool = False,
) -> Upgraded:
    """Run the handshakes. RemoteError if the peer breaks them or is not the ``expected`` one."""
    channel = _Channel(stream)
    handshake = noise.Handshake(identity, initiator=dialer, static=entropy(32), ephemeral=entropy(32))
    muxer = ASIDE if aside else yamux.PROTOCOL
    if dialer:
        await channel.send(multistream.proposal(noise.PROTOCOL) + _framed(handshake.write()))
        await _confirm(channel.read, noise.PROTOCOL)
        handshake.read(await channel.message())
        third = _framed(handshake.write())
        secured = _check(handshake.result(), expected)
        wish = secured.sending.encrypt(multistream.proposal(muxer), b"")
        await channel.send(third + _framed(wish))
        inner = _Plain(channel, secured.receiving)
        await _confirm(inner.read, muxer)
    else:
        await _listen(channel.read, channel.send, noise.PROTOCOL)
        handshake.read(await channel.message())
        await channel.send(_framed(handshake.write()))
        handshake.read(await channel.message())
        secured = _check(handshake.result(), expected)
        inner = _Plain(channel, secured.receiving)

        async def answer(data: bytes) -> None:
            await channel.send(_framed(secured.sending.encrypt(data, b"")))

        muxer = await _listen(inner.read, answer, yamux.PROTOCOL, ASIDE)
    return Upgraded(stream, secured, bytes(channel.buffer), bytes(inner.buffer), muxer == ASIDE)


def _check(secured: noise.Secured, expected: PeerId | None) -> noise.Secured:
    if expected is not None and secured.peer_id != expected:
        raise RemoteError(f"{expected} was dialled but {secured.peer_id} answered")
    return secured


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


@final
class _Channel:
    """Exact reads over a stream that gives what it likes."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.buffer = bytearray()

    async def send(self, data: bytes) -> None:
        if data:
            try:
                await self._stream.send_all(data)
            except trio.BrokenResourceError as error:
                raise PeerGone("the peer closed the connection during the handshake") from error

    async def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            try:
                data = await self._stream.receive_some(READ_SIZE)
            except trio.BrokenResourceError as error:
                raise PeerGone("the peer closed the connection during the handshake") from error
            if not data:
                raise PeerGone("the peer closed the connection during the handshake")
            self.buffer += data
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    async def message(self) -> bytes:
        return await self.read(int.from_bytes(await self.read(2), "big"))


@final
class _Plain:
    """Exact reads of what the records hold."""

    def __init__(self, channel: _Channel, cipher: noise.Cipher) -> None:
        self._channel = channel
        self._cipher = cipher
        self.buffer = bytearray()

    async def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.buffer += self._cipher.decrypt(await self._channel.message(), b"")
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken


async def _confirm(read: Callable[[int], Awaitable[bytes]], protocol: str) -> None:
    confirmation = multistream.Confirmation(protocol)
    while confirmation.missing:
        confirmation.feed(await read(confirmation.missing))


async def _listen(
    read: Callable[[int], Awaitable[bytes]], send: Callable[[bytes], Awaitable[None]], *protocols: str
) -> str:
    """Which of the protocols was agreed."""
    listener = multistream.Listener(lambda wish: wish in protocols)
    while listener.missing:
        reply = listener.feed(await read(listener.missing))
        if reply:  # an empty record would look like the end of the stream to some
            await send(reply)
    assert listener.protocol is not None
    return listener.protocol
