"""Reaching a peer that has several addresses.

All addresses race, each starting ``dial_stagger_s`` after the one before it or as soon as that one
failed (RFC 8305's idea); the first that proves the peer wins and the others are dropped. Callers that
want the same peer meanwhile ``join`` the attempt instead of dialling again. A peer that could not be reached
is left alone for a moment, longer each time (``Limits.redial_s``, jittered): whoever wants it then hears why
at once, so a dead peer costs few dials however many callers it has.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import final

import attrs
import trio

from p2p.errors import DialError, RemoteError
from p2p.identity import PeerId, short
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.secure import Upgraded
from p2p.transport import Transport

Upgrade = Callable[[trio.abc.Stream, PeerId, bool], Awaitable[Upgraded]]
"""Runs the handshakes as the dialer: the stream, whom to expect, whether aside."""


@final
class Attempt:
    """A dial under way; ``error`` is its outcome once ``done``."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: str | None = None


@attrs.frozen
class _Failure:
    """A peer could not be reached: how often by now, where, why, and until when it is left alone."""

    times: int
    addrs: frozenset[Multiaddr]
    why: str
    until: float


@final
class Dialer:
    """The dials of one host."""

    def __init__(self, transport: Transport, upgrade: Upgrade, limits: Limits, rng: random.Random) -> None:
        self._rng = rng
        self._failures: OrderedDict[PeerId, _Failure] = OrderedDict()
        self._transport = transport
        self._upgrade = upgrade
        self._limits = limits
        self._attempts: dict[PeerId, Attempt] = {}

    def join(self, peer_id: PeerId) -> Attempt | None:
        """The attempt under way, if there is one."""
        return self._attempts.get(peer_id)

    def resting(self, peer_id: PeerId, addrs: Sequence[Multiaddr], now: float) -> str | None:
        """Why the peer is not dialled just now, or None. ``now``: on a clock that nobody sets."""
        failure = self._failures.get(peer_id)
        if failure is None or now >= failure.until or not failure.addrs.issuperset(addrs):
            return None
        return f"{failure.why} (it is dialled again in {failure.until - now:.1f} s)"

    def came(self, peer_id: PeerId) -> None:
        """There is a connection to the peer, whoever made it."""
        self._failures.pop(peer_id, None)

    def failed(self, peer_id: PeerId, addrs: Sequence[Multiaddr], why: str, now: float) -> None:
        """A dial of these addresses came to nothing."""
        before = self._failures.pop(peer_id, None)
        times = 1 if before is None else before.times + 1
        rest = min(self._limits.redial_most_s, self._limits.redial_s * 2.0 ** min(times - 1, 16))
        until = now + rest * self._rng.uniform(0.5, 1.0)
        self._failures[peer_id] = _Failure(times, frozenset(addrs), why, until)
        if len(self._failures) > self._limits.known_peers:
            self._failures.popitem(last=False)

    def begin(self, peer_id: PeerId) -> Attempt:
        attempt = self._attempts[peer_id] = Attempt()
        return attempt

    def end(self, peer_id: PeerId, error: str | None) -> None:
        attempt = self._attempts.pop(peer_id)
        attempt.error = error
        attempt.done.set()

    async def dial(
        self,
        peer_id: PeerId,
        addrs: Sequence[Multiaddr],
        *,
        aside: bool = False,
        deadline: float = math.inf,
    ) -> tuple[Upgraded, Multiaddr]:
        """A proven stream and the address that gave it; DialError with all reasons otherwise.

        It takes ``Limits.dial_s`` or ``deadline`` seconds at most, whichever is less.
        """
        usable = [addr for addr in addrs if self._transport.speaks(addr)]
        usable = [addr for addr in usable if addr.peer_id in (None, peer_id)]
        usable = list(dict.fromkeys(addr.bare() for addr in usable))[: 2 * self._limits.known_addrs]
        if not usable:
            raise DialError(f"no address of {short(peer_id)} is known that can be dialled")
        reasons: list[str] = []
        won: list[tuple[Upgraded, Multiaddr]] = []

        async def race(addr: Multiaddr, failed: trio.Event) -> None:
            try:
                upgraded = await self._upgrade(await self._transport.dial(addr), peer_id, aside)
            except RemoteError as error:
                reasons.append(str(error))
                failed.set()
                return
            if won:
                await trio.aclose_forcefully(upgraded.stream)
                return
            won.append((upgraded, addr))
            nursery.cancel_scope.cancel()

        deadline = min(deadline, self._limits.dial_s)
        try:
            with trio.move_on_after(deadline):
                async with trio.open_nursery() as nursery:
                    for addr in usable:
                        failed = trio.Event()
                        nursery.start_soon(race, addr, failed)
                        with trio.move_on_after(self._limits.dial_stagger_s):
                            await failed.wait()
        except BaseException:  # cancelled, perhaps just after one had won
            for upgraded, _addr in won:
                await trio.aclose_forcefully(upgraded.stream)
            raise
        if won:
            return won[0]
        if len(reasons) < len(usable):
            reasons.append(f"no answer within {deadline:g} s")
        raise DialError(f"{short(peer_id)} could not be reached: {'; '.join(reasons)}")
