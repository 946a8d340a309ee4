"""Every number that bounds what a peer can make us hold, wait for or do, in one place.

Sizes in bytes, times in seconds. The defaults suit a home link and a host with some hundred peers.
"""

from __future__ import annotations

from typing import final

import attrs

KIB = 1024
MIB = 1024 * KIB


@final
@attrs.frozen(kw_only=True)
class Limits:
    """Written limits of one host."""

    # connections
    connections: int = 2048
    reserved: int = 256
    """Of these, the last ones are for members: a guest that gets one is closed after its hello, or another
    from an address that has more of them."""
    peer_connections: int = 4
    """Of one peer, those included that are being replaced."""
    arrivals: int = 2048
    """Connections that one address may open at once, and then so many a second."""
    arrivals_per_s: float = 128.0
    handshakes: int = 64
    """Inbound connections that are still proving who they are, shared between addresses: ``p2p.door``."""
    handshake_s: float = 10.0
    dial_s: float = 8.0
    """For one dial of all addresses of a peer, handshake included."""
    dial_stagger_s: float = 0.25
    """Head start of an address over the next one of the same peer."""
    redial_s: float = 0.2
    """How long a peer that could not be reached is left alone, jittered and doubled each time, up to"""
    redial_most_s: float = 2.0
    """so much; an address that was not tried, or a connection from it, ends that."""
    hello_s: float = 5.0
    asides: int = 16
    """Inbound connections aside at once; more are closed."""
    aside_s: float = 30.0
    """How long a connection aside may live."""
    close_s: float = 1.0

    # streams
    inbound_streams: int = 256
    raw_streams: int = 8
    """Of one connection and protocol that is not ours (identify, ping)."""
    echo_s: float = 20.0
    """How long the echo of a ping may wait for a peer that does not read."""
    unread: int = 256 * MIB
    """Received from guests and not taken by handlers, of a host; the guest that adds to it goes."""
    outbound_streams: int = 768
    calls_per_protocol: int = 128
    """Handlers of one protocol running at once for one connection."""
    negotiation_s: float = 10.0
    first_message_s: float = 30.0
    """How long a handler waits for its caller's first message to begin, and for its header."""
    window: int = MIB
    """What a stream between agora peers starts with, agreed in hello (others: 256 KiB)."""
    big_window: int = 4 * MIB
    """What a stream may grow to while a large payload is awaited."""
    window_budget: int = 64 * MIB
    """Credit above 256 KiB a stream that one connection may have out."""
    host_window_budget: int = 512 * MIB
    """The same for all connections of a host together."""
    queued_frames: int = 4096
    """Control frames waiting because a peer does not read; more end the connection."""

    # messages
    header: int = 64 * KIB
    known_peers: int = 4096
    known_addrs: int = 8
    """Addresses kept for one peer."""

    # liveness
    ping_s: float = 10.0
    silence_s: float = 20.0
    stuck_s: float = 60.0
    """A peer that takes none of a batch (256 KiB at most) for so long is gone."""
    watched_ping_s: float = 0.5
    watched_silence_s: float = 2.0
    lease_s: float = 1.5
