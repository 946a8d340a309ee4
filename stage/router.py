"""Which replica of the next stage gets the next microbatch: weighted round-robin in virtual time.

Every replica has a virtual time. The choice is the replica with the least; its time then grows by
what the microbatch is expected to cost there (a moving average of its response times), so that a
replica twice as fast is chosen twice as often, interleaved (SWARM, arXiv 2301.11913, section 3.2).
The reply corrects exactly that charge. A newcomer enters at the level of the busiest, not at zero, so
that it is not flooded before anything is known of it; for the same reason one that could not be asked for
a while comes back at the level that the choice has reached, not with the time it missed in hand. A replica
that failed is left alone for a growing while and forgiven as soon as its own fresh record or an answer
shows it alive. Sans-IO: time is an argument, so is randomness. One router serves one caller and one
next stage.
"""

from __future__ import annotations

import random
from collections.abc import Collection

import attrs

from p2p.identity import PeerId

ALPHA = 0.2
"""Weight of the newest response time in the moving average."""
BACKOFF_FIRST_S = 1.0
BACKOFF_MOST_S = 30.0


@attrs.define
class _Replica:
    virtual: float
    expected_s: float | None = None
    busy_until: float = 0.0
    failed_until: float = 0.0
    failures: int = 0
    seen_at: float = 0.0
    slots: int = 0
    """Free slots at its last word; the payload goes with the first message only where this is > 0."""
    away: bool = False
    """Busy or failed since it was last chosen."""


@attrs.frozen(eq=False)
class Choice:
    """One microbatch charged to one replica, to be told ``answered``, ``busy``, ``failed`` or ``unused``."""

    peer: PeerId
    charge: float
    room: bool
    """Whether the replica's last word was that it has room: the payload may go with the first message."""


class Router:
    """Virtual-time choice among the replicas of one stage."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._replicas: dict[PeerId, _Replica] = {}
        self._level = 0.0
        """Virtual time of the last choice before it was charged."""

    def update(self, roster: dict[PeerId, float]) -> None:
        """The stage's serving replicas and when each last spoke for itself. Others are forgotten."""
        busiest = max((known.virtual for known in self._replicas.values()), default=0.0)
        for peer, seen_at in roster.items():
            known = self._replicas.get(peer)
            if known is None:
                self._replicas[peer] = _Replica(virtual=busiest, seen_at=seen_at)
            elif seen_at > known.seen_at:
                known.seen_at = seen_at
                if known.failures == 1:  # one failure is forgiven by fresh evidence, a series is not
                    known.failed_until = 0.0
        for peer in self._replicas.keys() - roster.keys():
            del self._replicas[peer]

    def choose(self, now: float, exclude: Collection[PeerId] = ()) -> Choice | None:
        """The next replica, charged for one microbatch; None if nobody can be asked now."""
        ready = []
        for peer, known in self._replicas.items():
            if peer in exclude or known.busy_until > now or known.failed_until > now:
                continue
            if known.away:
                known.away, known.virtual = False, max(known.virtual, self._level)
            ready.append((known.virtual, self._rng.random(), peer))
        if not ready:
            return None
        self._level, _, peer = min(ready)
        chosen = self._replicas[peer]
        choice = Choice(peer, self._cost(chosen), chosen.slots > 0)
        chosen.virtual += choice.charge
        chosen.slots = max(0, chosen.slots - 1)
        return choice

    def _cost(self, replica: _Replica) -> float:
        if replica.expected_s is not None:
            return replica.expected_s
        known = [other.expected_s for other in self._replicas.values() if other.expected_s is not None]
        return sum(known) / len(known) if known else 1.0

    def wait_s(self, now: float) -> float | None:
        """How long until somebody can be asked again; None if the stage has no replica at all."""
        waits = [max(known.busy_until, known.failed_until) - now for known in self._replicas.values()]
        return max(0.0, min(waits)) if waits else None

    def failing(self, now: float) -> bool:
        """Whether every replica failed lately; one that is only busy is alive."""
        return all(known.failed_until > now for known in self._replicas.values())

    def empty(self) -> bool:
        return not self._replicas

    def answered(self, choice: Choice, seconds: float, slots: int) -> None:
        """An answer came after this long; correct the charge and forgive."""
        known = self._replicas.get(choice.peer)
        if known is None:
            return
        known.expected_s = (
            seconds if known.expected_s is None else (1 - ALPHA) * known.expected_s + ALPHA * seconds
        )
        known.virtual += known.expected_s - choice.charge
        known.failures, known.failed_until, known.busy_until = 0, 0.0, 0.0
        known.slots = slots

    def room(self, choice: Choice, slots: int) -> None:
        """The peer accepted and said how much room is left."""
        if choice.peer in self._replicas:
            self._replicas[choice.peer].slots = slots

    def busy(self, choice: Choice, now: float, retry_after_s: float) -> None:
        """The peer had no room: not a failure, and it has done no work to be charged for."""
        known = self._replicas.get(choice.peer)
        if known is not None:
            known.busy_until = now + retry_after_s
            known.virtual -= choice.charge
            known.slots, known.away = 0, True

    def failed(self, choice: Choice, now: float) -> None:
        """The peer did not answer or broke the protocol: leave it alone, longer each time.

        All that was in flight fails with it; that is one failure, not one for each microbatch.
        """
        known = self._replicas.get(choice.peer)
        if known is not None and known.failed_until <= now:
            wait = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(known.failures, 16))
            known.failed_until = now + wait * self._rng.uniform(0.75, 1.25)
            known.failures += 1
            known.slots, known.away = 0, True

    def unused(self, choice: Choice) -> None:
        """Nothing came of it and the peer is not to blame: a later stage was empty, or the call dropped."""
        known = self._replicas.get(choice.peer)
        if known is not None:
            known.virtual -= choice.charge
