"""What a host reports."""

from __future__ import annotations

import attrs

from p2p.event import Event


@attrs.frozen(kw_only=True)
class Connected(Event):
    """A connection is up and the peer proven."""

    peer: str
    addr: str
    dialed: bool


@attrs.frozen(kw_only=True)
class Disconnected(Event):
    """A connection ended."""

    peer: str
    why: str


@attrs.frozen(kw_only=True)
class HandshakeFailed(Event):
    """Somebody connected and did not get through the handshakes."""

    addr: str
    why: str


@attrs.frozen(kw_only=True)
class PeerRefused(Event):
    """A peer asked for a protocol and was told no."""

    peer: str
    protocol: str
    why: str


@attrs.frozen(kw_only=True)
class LimitReached(Event):
    """A limit (its name in ``p2p.limits``) turned ``who`` away, the last of ``count`` since it was said."""

    limit: str
    who: str
    count: int


@attrs.frozen(kw_only=True)
class HandlerFailed(Event):
    """A bug: a handler raised what it must not raise."""

    peer: str
    protocol: str
    error: str
