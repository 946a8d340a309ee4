"""A first look at the run's authorities before anything is started: do they answer, how far, at what time.

With a key made for this look alone, as a guest: one connection, a few pings, one question that everybody may
ask (its answer carries the other's clock). Nothing is told and nothing is believed. Blocking, ``LOOK_S`` at
most.
"""

from __future__ import annotations

import socket
import time
from typing import Final

import attrs
import trio

from agorad.run import Manifest, NodeRef
from p2p.errors import P2PError
from p2p.groups import plain
from p2p.host import Host
from p2p.identify import identify, ping
from p2p.identity import Identity
from p2p.kad import messages as kad

LOOK_S: Final = 8.0
ONE_S: Final = 4.0
PINGS: Final = 3


@attrs.frozen(kw_only=True)
class Reach:
    """What was seen."""

    answered: bool = False
    why: str = ""
    """Of no answer, a sentence for each authority tried."""
    rtt_ms: float = 0.0
    skew_s: float | None = None
    """How far our clock is ahead of theirs; None if nobody said."""
    seen_at: str = ""
    """The address that this machine has for them."""
    own: tuple[str, ...] = ()
    """The address that this machine has for itself, on that line."""


def look(manifest: Manifest) -> Reach:
    """The first authority that answers; the manifest's order."""
    refs = [ref for ref in manifest.authorities if ref.addrs]
    if not refs:
        return Reach(why="the manifest names no address of one")
    return trio.run(_look, refs)


async def _look(refs: list[NodeRef]) -> Reach:
    troubles = []
    with trio.move_on_after(LOOK_S):
        for ref in refs:
            try:
                with trio.fail_after(ONE_S):
                    return await _one(ref)
            except trio.TooSlowError:
                troubles.append(f"{ref.addrs[0]}: no answer in {ONE_S:.0f} s")
            except P2PError as error:
                troubles.append(str(error))
            except BaseExceptionGroup as group:
                found = plain(group)
                if not isinstance(found, P2PError | trio.TooSlowError):
                    raise
                troubles.append(str(found) or f"{ref.addrs[0]}: no answer in {ONE_S:.0f} s")
    return Reach(why="; ".join(troubles) or "no answer in time")


async def _one(ref: NodeRef) -> Reach:
    host = Host(Identity.generate())
    async with host.run():
        connection = await host.connect(ref.peer_id, addrs=ref.multiaddrs(), deadline=ONE_S)
        seen = (await identify(connection, deadline=ONE_S)).observed
        rtt = min([await ping(connection, block=bytes(32), deadline=ONE_S) for _ in range(PINGS)])
        return Reach(
            answered=True,
            rtt_ms=rtt * 1000,
            skew_s=await skew(host, ref),
            seen_at="" if seen is None or seen.host is None else seen.host,
            own=_own(ref),
        )


async def skew(host: Host, ref: NodeRef) -> float | None:
    """How far our clock is ahead of that node's, in seconds; None if it does not say."""
    began = time.time()
    question = kad.FindValue(key="clock", after=None, now=began, addrs=())
    try:
        async with await host.call(ref.peer_id, kad.PROTOCOL, deadline=ONE_S) as call:
            await call.send(kad.question_header(question))
            answer = kad.read_answer((await call.receive(max_payload=kad.MAX_PAYLOAD)).header)
    except P2PError:
        return None
    return (began + time.time()) / 2 - answer.now


def _own(ref: NodeRef) -> tuple[str, ...]:
    """The local address from which packets go there; nothing is sent for it."""
    addr = ref.multiaddrs()[0]
    try:
        with socket.socket(
            socket.AF_INET6 if ":" in (addr.host or "") else socket.AF_INET, socket.SOCK_DGRAM
        ) as s:
            s.connect((addr.host or "", addr.port or 9))
            return (str(s.getsockname()[0]),)
    except OSError:
        return ()
