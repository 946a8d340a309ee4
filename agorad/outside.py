"""/agora/outside/1: how a node looks from outside: its port dialled back, its distance, its line.

Anybody may ask a seed, a trainer or an authority; it looks at the asker itself, at addresses of the machine
that the question came from and at no others, so that nobody can point it at a third one. The look is that
of ``p2p.probe``: a fresh connection that proves the key, pings and, where asked to, bytes each way.

    → {t: "look", addrs, bytes}
    ← {t: "probed", reached, why, addr, rtt_ms, up_mbps, down_mbps, session}

Limits: 4 looks at once, 6 a minute and 16 MB a minute for one IP address (1024 are remembered).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from p2p.errors import LocalError, P2PError, PeerGone, Refused, RemoteError
from p2p.identity import PeerId
from p2p.multiaddr import Multiaddr
from p2p.probe import PROBE_S, Probed, Prober
from p2p.reach import MOST_ADDRS
from p2p.rpc import Call

if TYPE_CHECKING:
    from agorad.run import NodeRef
    from p2p.host import Host

PROTOCOL: Final = "/agora/outside/1"
ASK_S: Final = 5.0
ANSWER_S: Final = PROBE_S + ASK_S + 1
DIAL_S: Final = 4.0
AT_ONCE: Final = 4
LOOKS: Final = 6
BYTES: Final = 16_000_000
WITHIN_S: Final = 60.0
REMEMBERED: Final = 1024
MOST_BYTES: Final = 4_000_000
ADDR_LIMIT: Final = 256


class Outside:
    """The server."""

    def __init__(self, prober: Prober) -> None:
        self._prober = prober
        self._at_once = 0
        self._seen: OrderedDict[str, deque[tuple[float, int]]] = OrderedDict()

    async def serve(self, call: Call) -> None:
        """The handler of ``PROTOCOL``."""
        if self._at_once >= AT_ONCE:
            raise Refused("busy", f"{AT_ONCE} other nodes are being looked at", 3.0)
        self._at_once += 1
        try:
            with trio.fail_after(ASK_S):
                header = (await call.receive()).header
            addrs, size = _request(header)
            host = Multiaddr.parse(call.connection.addr).host or ""
            self._spend(host, size)
            own = [addr for addr in addrs if _host(addr) == host]
            if not own:
                seen = Probed(why=f"none of these addresses is at {host}, where the question came from")
            else:
                seen = await self._prober.probe(call.peer, own, size=size)
            await call.send(seen.to_header())
        finally:
            self._at_once -= 1

    def _spend(self, host: str, size: int) -> None:
        now = trio.current_time()
        looks = self._seen.setdefault(host, deque())
        self._seen.move_to_end(host)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        while looks and now - looks[0][0] >= WITHIN_S:
            looks.popleft()
        if len(looks) >= LOOKS or sum(spent for _at, spent in looks) + 2 * size > BYTES:
            raise Refused("busy", f"{host} was looked at often lately", WITHIN_S - (now - looks[0][0]))
        looks.append((now, 2 * size))


async def ask(
    host: Host, refs: Iterable[NodeRef], addrs: Sequence[str], *, size: int = 0
) -> tuple[PeerId, Probed]:
    """What the first of these nodes that answers sees of us, and who it is. P2PError if none answers.

    This host has to serve ``p2p.selfreport`` to it.
    """
    trouble: P2PError = LocalError("the manifest lists no node with an address that could look")
    for ref in refs:
        try:
            with trio.fail_after(DIAL_S + ANSWER_S):
                async with await host.call(
                    ref.peer_id, PROTOCOL, addrs=ref.multiaddrs(), deadline=DIAL_S
                ) as call:
                    await call.send({"t": "look", "addrs": list(addrs)[:MOST_ADDRS], "bytes": size})
                    return ref.peer_id, Probed.from_header((await call.receive()).header)
        except P2PError as error:
            trouble = error
        except trio.TooSlowError:
            trouble = PeerGone(f"{ref.peer_id} did not say what it saw")
    raise trouble


def _host(addr: str) -> str | None:
    try:
        return Multiaddr.parse(addr).host
    except RemoteError:
        return None


def _request(header: dict[str, object]) -> tuple[list[str], int]:
    addrs, size = header.get("addrs"), header.get("bytes")
    if (
        header.get("t") != "look"
        or not isinstance(addrs, list)
        or len(addrs) > MOST_ADDRS
        or not all(isinstance(addr, str) and len(addr) <= ADDR_LIMIT for addr in addrs)
    ):
        raise RemoteError(f"{PROTOCOL}: no question")
    if type(size) is not int or not 0 <= size <= MOST_BYTES:
        raise RemoteError(f"{PROTOCOL}: bytes is not 0 to {MOST_BYTES}")
    return addrs, size
