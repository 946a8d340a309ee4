"""Which replica of the next stage gets the next microbatch: weighted round-robin in virtual time.

Every replica has a virtual time. The choice is the replica with the least; its time then grows by
what the microbatch is expected to cost there (a moving average of its response times), so that a
replica twice as fast is chosen twice as often, interleaved (SWARM, arXiv 2301.11913, section 3.2).
The reply corrects the charge. A newcomer enters at the level of the busiest, not at zero, so that
it is not flooded before anything is known of it. A replica that failed is left alone for a growing
while and forgiven as soon as its own fresh record or an answer shows it alive. Sans-IO: time is an
argument, so is randomness. One router serves one caller and one next stage.
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


class Router:
    """Virtual-time choice among the replicas of one stage."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._replicas: dict[PeerId, _Replica] = {}

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

    def choose(self, now: float, exclude: Collection[PeerId] = ()) -> PeerId | None:
        """The next replica, charged for one microbatch; None if nobody can be asked now."""
        ready = [
            (known.virtual, self._rng.random(), peer)
            for peer, known in self._replicas.items()
            if peer not in exclude and known.busy_until <= now and known.failed_until <= now
        ]
        if not ready:
            return None
        peer = min(ready)[2]
        chosen = self._replicas[peer]
        chosen.virtual += self._cost(chosen)
        chosen.slots = max(0, chosen.slots - 1)
        return peer

    def _cost(self, replica: _Replica) -> float:
        if replica.expected_s is not None:
            return replica.expected_s
        known = [other.expected_s for other in self._replicas.values() if other.expected_s is not None]
        return sum(known) / len(known) if known else 1.0

    def wait_s(self, now: float) -> float | None:
        """How long until somebody can be asked again; None if the stage has no replica at all."""
        waits = [max(known.busy_until, known.failed_until) - now for known in self._replicas.values()]
        return max(0.0, min(waits)) if waits else None

    def empty(self) -> bool:
        return not self._replicas

    def free(self, peer: PeerId) -> bool:
        """Whether the peer's last word was that it has room."""
        known = self._replicas.get(peer)
        return known is not None and known.slots > 0

    def answered(self, peer: PeerId, seconds: float, slots: int) -> None:
        """An answer came after this long; correct the charge and forgive."""
        known = self._replicas.get(peer)
        if known is None:
            return
        charged = self._cost(known)
        known.expected_s = (
            seconds if known.expected_s is None else (1 - ALPHA) * known.expected_s + ALPHA * seconds
        )
        known.virtual += known.expected_s - charged
        known.failures, known.failed_until, known.busy_until = 0, 0.0, 0.0
        known.slots = slots

    def room(self, peer: PeerId, slots: int) -> None:
        """The peer accepted and said how much room is left."""
        if peer in self._replicas:
            self._replicas[peer].slots = slots

    def busy(self, peer: PeerId, now: float, retry_after_s: float) -> None:
        """The peer had no room: not a failure, and it has done no work to be charged for."""
        known = self._replicas.get(peer)
        if known is not None:
            known.busy_until = now + retry_after_s
            known.virtual -= self._cost(known)
            known.slots = 0

    def failed(self, peer: PeerId, now: float) -> None:
        """The peer did not answer or broke the protocol: leave it alone, longer each time."""
        known = self._replicas.get(peer)
        if known is not None:
            wait = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0**known.failures)
            known.failed_until = now + wait * self._rng.uniform(0.75, 1.25)
            known.failures += 1
            known.slots = 0
