"""What the kernel knows of a TCP connection's path, and how fast it may send there.

Read with ``TCP_INFO``, bounded with ``SO_MAX_PACING_RATE``, by which the kernel spaces packets of one socket
whatever the queue of the device. How the kernel finds the speed is chosen with ``TCP_CONGESTION``. All are
Linux's; elsewhere, and on streams that are no sockets, there are no figures and nothing happens.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

import attrs
import trio

SO_MAX_PACING_RATE: Final = 47
USUAL: Final = b"bbr"
"""What every connection is given where the kernel has it. It keeps no queue before a line, in which
microbatches would wait, and a connection that paused goes on at its speed. CUBIC begins anew: a microbatch of
400 KB there and back took 135 ms in place of 75 over lines of 200 Mbit/s and 40 ms (docs/benchmarks.md)."""
FILLING: Final = b"cubic"
"""For a round that training waits for: several BBR connections leave a tenth of a line unused."""
NEAR_S: Final = 0.005
"""A round trip of a local network."""
UNBOUNDED: Final = (1 << 64) - 1
_INFO: Final = struct.Struct("=8xI4xI24xI20xI8xI60xII8xQ24xI")
"""Of struct tcp_info (linux/tcp.h), each tcpi_: rto, snd_mss, last_data_sent, rtt, snd_cwnd, notsent_bytes,
min_rtt, delivery_rate, delivered. Times are microseconds, but last_data_sent's milliseconds."""


@attrs.frozen
class Path:
    """Figures of one moment."""

    rtt_s: float
    """Smoothed over the last answers."""
    least_rtt_s: float
    """Least of some minutes: the line's own, with nobody waiting in its queues."""
    delivered: float
    """Bytes a second that lately reached the other end."""
    window: int = 0
    """Bytes that may be under way."""
    rested: bool = False
    """Whether nothing was sent for so long that a way which is not BBR would open its window anew."""
    unsent: int = 0
    """Bytes that the kernel was given and has not sent once."""
    arrived: int = 0
    """Bytes that have reached the other end since the connection began; a packet counts as a full one."""

    @property
    def near(self) -> bool:
        """Whether the peer is on this machine or network: the processor is what is short there, no line."""
        return self.least_rtt_s < NEAR_S


def look(sock: trio.socket.SocketType | None) -> Path | None:
    """The path of a connected socket; None where the kernel does not say."""
    if sock is None or not hasattr(socket, "TCP_INFO"):
        return None
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    except OSError:
        return None
    if len(told) < _INFO.size:
        return None
    timeout, segment, quiet_ms, rtt, window, unsent, least, delivered, packets = _INFO.unpack(told)
    if not rtt or not least or least == 0xFFFFFFFF:
        return None  # nothing has been answered yet
    rested = quiet_ms * 1000 > timeout
    arrived = packets * segment
    return Path(rtt / 1e6, least / 1e6, float(delivered), window * segment, rested, unsent, arrived)


def bound(sock: trio.socket.SocketType | None, rate: float | None) -> None:
    """Send at most so many bytes a second; None: as fast as it goes."""
    if sock is not None and hasattr(socket, "TCP_INFO"):
        value = UNBOUNDED if rate is None else max(1, int(rate))
        with contextlib.suppress(OSError):  # a kernel without it, or a socket that was closed
            sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("=Q", value))


def controlled(sock: trio.socket.SocketType | None, by: bytes) -> bytes:
    """Have the kernel find the socket's speed in this way from now on, if it can; the way so far."""
    if sock is None or not hasattr(socket, "TCP_CONGESTION"):
        return b""
    try:
        before = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, by)
    except OSError:  # a kernel without it, or a socket that was closed
        return b""
    return before
