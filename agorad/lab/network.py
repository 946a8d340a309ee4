"""Nodes in network namespaces, joined by lines of known speed, delay, jitter and loss.

Every node has a namespace with one TUN device, ``line``; the kernel's token bucket bounds what it uploads,
and a relay (``relay.cpp``, compiled on first use) carries packets between the devices and adds what lies
between. Where nothing is lost on purpose, packets of TCP travel a few together, as segments, as they do in
network cards; lines count what the packets would take. Needs root on Linux, ``ip`` and ``tc`` (Debian:
iproute2), a C++ compiler and /dev/net/tun. Nothing outside the namespaces is touched, and all of it is gone
when the block ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

import attrs

TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUN_OF_SEGMENTS: Final = 0x0001 | 0x1000 | 0x4000
"""No header but the kernel's note of how it would cut a long segment into packets."""
UNCUT: Final = 0x01 | 0x02
"""Checksums and cuts of TCP over IPv4 are left out: on this machine each packet costs more than its bytes."""
CLONE_NEWNET: Final = 0x40000000
BURST: Final = "64kb"
"""Of the token bucket: what may leave at once after a pause."""
UPLOAD_QUEUE: Final = "100ms"
MAX_NODES: Final = 250


class NoLab(Exception):  # noqa: N818
    """This machine cannot make a lab; the text says what is missing."""


@final
@attrs.frozen(kw_only=True)
class Line:
    """A node's line. Delay and jitter are one way and of this end only: two ends add up."""

    up_mbps: float = 0.0
    """10^6 bits a second; 0: as fast as the machine goes."""
    down_mbps: float = 0.0
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    """Chance that a packet is lost, 0 to 1."""
    walled: bool = False
    """Behind a firewall that lets nobody connect to it; it may connect to others."""


@final
@attrs.frozen
class Place:
    """One node of a lab."""

    namespace: str
    addr: str

    def command(self, *words: str) -> list[str]:
        """The command that runs ``words`` there."""
        return ["ip", "netns", "exec", self.namespace, *words]


@contextmanager
def lab(lines: Sequence[Line]) -> Iterator[list[Place]]:
    """Places behind these lines, every one reachable from every other. NoLab with the reason."""
    _check(len(lines))
    places = [Place(f"agora-{os.getpid()}-{number}", f"10.77.0.{number + 1}") for number in range(len(lines))]
    tuns: list[int] = []
    relay: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory(prefix="agora-lab-") as folder:
        try:
            program = _compiled(Path(folder))
            try:
                for place, line in zip(places, lines, strict=True):
                    tuns.append(_node(place, line))
                    if not any(line.loss for line in lines):  # what is lost are packets, not segments
                        fcntl.ioctl(tuns[-1], TUNSETOFFLOAD, UNCUT)
            except OSError as error:
                raise NoLab(f"this machine does not let us make network namespaces: {error}") from error
            words = [_word(*end) for end in zip(tuns, places, lines, strict=True)]
            relay = subprocess.Popen([program, *words], stdin=subprocess.PIPE, pass_fds=tuns)
            yield places
        finally:
            if relay is not None:
                relay.kill()
                relay.communicate()
            for fd in tuns:
                os.close(fd)
            for place in places:
                with suppress(OSError):
                    _run("ip", "netns", "del", place.namespace)


def _check(nodes: int) -> None:
    if not 1 <= nodes <= MAX_NODES:
        raise NoLab(f"a lab has 1 to {MAX_NODES} nodes, not {nodes}")
    if os.geteuid() != 0:
        raise NoLab("a lab needs root, to make network namespaces")
    missing = [name for name in ("ip", "tc", "c++") if shutil.which(name) is None]
    if missing:
        raise NoLab(f"a lab needs {' and '.join(missing)} (Debian: iproute2 and g++)")
    if not Path("/dev/net/tun").exists():
        raise NoLab("a lab needs /dev/net/tun")


def _compiled(folder: Path) -> Path:
    program = folder / "relay"
    source = Path(__file__).with_name("relay.cpp")
    done = subprocess.run(
        ["c++", "-std=c++17", "-O2", "-o", program, source],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise NoLab(f"the lab's relay does not compile: {done.stderr[-500:]}")
    return program


def _node(place: Place, line: Line) -> int:
    """Make the namespace; the descriptor of its TUN device."""
    _run("ip", "netns", "add", place.namespace)
    tun = _tun_in(place.namespace)
    for words in (
        f"addr add {place.addr}/32 dev line",
        "link set line up",
        "link set lo up",
        "route add 10.77.0.0/24 dev line",
    ):
        _run("ip", "-n", place.namespace, *words.split())
    if line.up_mbps:
        shape = f"qdisc add dev line root tbf rate {line.up_mbps}mbit burst {BURST} latency {UPLOAD_QUEUE}"
        _run("tc", "-n", place.namespace, *shape.split())
    return tun


def _word(tun: int, place: Place, line: Line) -> str:
    return (
        f"{tun}:{place.addr}:{line.delay_ms * 1000:.0f}:{line.jitter_ms * 1000:.0f}"
        f":{line.loss * 1e6:.0f}:{line.down_mbps * 1000:.0f}:{line.walled:d}"
    )


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def _tun_in(namespace: str) -> int:
    """A TUN device called ``line`` in a namespace, opened by a thread that moves there."""
    found: list[int] = []
    failed: list[OSError] = []

    def move_and_open() -> None:
        try:
            where = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(where, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(where)
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            found.append(fd)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"line", TUN_OF_SEGMENTS))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=move_and_open)
    thread.start()
    thread.join()
    if failed:
        for fd in found:
            os.close(fd)
        raise failed[0]
    return found[0]
