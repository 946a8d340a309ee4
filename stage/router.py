"""Which replica of the next stage gets the next microbatch: weighted round-robin in virtual time.

*Rates.* Every answer says what a microbatch costs its replica (``Load.service_s``), and the caller sees how
long the answer took. What is left of the shortest of these times is the *floor*: the line and the later
stages, which cost the replica nothing. So ``1 + floor / service`` microbatches keep a replica busy, its
*need*.

*Room.* A replica's backlog is what this caller has in flight there and what others have, by the replica's
last word, less what it has done since. Where that is less than its need it can use one more; those
come first. Where nobody can, it is the one that gets to it soonest. So nobody waits at one replica while
another has nothing to do, whatever was believed of its rate, and callers that do not talk to each other
spread.

*Virtual time* decides among those that can use one. A choice costs its replica the time of one microbatch and
of the way there, so that one twice as fast is chosen twice as often, interleaved, and the nearer one of
equals is preferred (SWARM, arXiv 2301.11913, section 3.2). The reply corrects exactly that charge. A newcomer
enters at the virtual time of the busiest, not at zero, and gets one probe until it has answered. One that
could not be asked for a while, or could use no more, comes back no earlier than the choice has reached, not
with the time it missed in hand.

*Failures.* A replica that failed is left alone for a growing while and forgiven as soon as its own fresh
record or an answer shows it alive.

A choice looks at ``NEIGHBOURS`` replicas at most. Of a larger stage a caller uses the first of an order that
is its own, as many as ``NEIGHBOURS`` or twice what it has in flight: that keeps its connections few, and all
it has to send finds idle replicas among them; where these are still many, the choice is among some drawn at
random, which is nearly as good as all. Sans-IO: time is an argument, so is randomness. One router serves one
caller and one next stage.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping

import attrs

from p2p.identity import PeerId
from stage.messages import Load

ALPHA = 0.2
"""Weight of the newest time in the moving averages."""
FLOOR_RISES = 0.02
"""How much of a longer time enters the floor, so that one lucky answer does not stand for ever."""
NEIGHBOURS = 32
MOST_NEED = 64.0
"""A replica that says it takes no time must not be sent everything."""
BACKOFF_FIRST_S = 1.0
BACKOFF_MOST_S = 30.0
DRAIN_TIMES = 4.0
"""Others' microbatches at a replica are taken to leave in so many times the time that they take there, since
others go on sending. Measured over callers, speeds and latencies: 2 and less crowd slow replicas."""
UNKNOWN_S = 1e3
"""What one more would wait at a replica that has not answered yet: longer than anywhere else."""
PATIENCE_TIMES = 6.0
"""An answer may take so many times the usual, and as many times the usual deviation beyond that."""


@attrs.define
class _Replica:
    virtual: float
    seen_at: float = 0.0
    in_flight: int = 0
    others: int = 0
    """Microbatches of other callers that it had by its last word, which was heard at ``heard_at``."""
    heard_at: float = 0.0
    expected_s: float | None = None
    """Moving averages of the time to an answer, and of its distance from that."""
    deviation_s: float = 0.0
    service_s: float | None = None
    floor_s: float = 0.0
    rtt_s: float = 0.0
    busy_until: float = 0.0
    failed_until: float = 0.0
    failures: int = 0
    slots: int = 0
    """Free slots at its last word; the payload goes with the first message only where this is > 0."""
    away: bool = False
    """Busy, failed or full when others were chosen."""

    def wait_s(self, now: float) -> float:
        """How long a microbatch sent now would wait behind others; 0 while there is need for more."""
        service_s = self.service_s
        if service_s is None:
            return self.in_flight * UNKNOWN_S
        more = self.floor_s / service_s  # than one microbatch, to keep it busy
        beyond = self.in_flight - (more if more < MOST_NEED - 1.0 else MOST_NEED - 1.0)
        if self.others:
            others = self.others - (now - self.heard_at) / (DRAIN_TIMES * service_s)
            if others > 0.0:
                beyond += others
        return beyond * service_s if beyond > 0.999 else 0.0


@attrs.frozen(eq=False)
class Choice:
    """One microbatch charged to one replica, to be told ``answered``, ``busy``, ``failed`` or ``unused``."""

    peer: PeerId
    charge: float
    room: bool
    """Whether the replica's last word was that it has room: the payload may go with the first message."""


class Router:
    """Choice among the replicas of one stage."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._replicas: dict[PeerId, _Replica] = {}
        self._order: list[PeerId] = []
        """This caller's own; newcomers get a place at random."""
        self._roster: Mapping[PeerId, float] | None = None
        self._in_flight = 0
        self._reached = 0.0
        """Virtual time of the last choice before it was charged."""

    def update(self, roster: Mapping[PeerId, float]) -> None:
        """The stage's serving replicas and when each last spoke for itself. Others are forgotten.

        Costs nothing for a mapping that it was given before, which must not have changed since.
        """
        if roster is self._roster:
            return
        self._roster = roster
        busiest = max((known.virtual for known in self._replicas.values()), default=0.0)
        for peer, seen_at in roster.items():
            known = self._replicas.get(peer)
            if known is None:
                self._replicas[peer] = _Replica(virtual=busiest, seen_at=seen_at)
                self._order.insert(self._rng.randrange(len(self._order) + 1), peer)
            elif seen_at > known.seen_at:
                known.seen_at = seen_at
                if known.failures == 1:  # one failure is forgiven by fresh evidence, a series is not
                    known.failed_until = 0.0
        gone = self._replicas.keys() - roster.keys()
        if gone:
            for peer in gone:
                self._in_flight -= self._replicas.pop(peer).in_flight
            self._order = [peer for peer in self._order if peer not in gone]

    def choose(
        self, now: float, exclude: Collection[PeerId] = (), *, prefer: PeerId | None = None
    ) -> Choice | None:
        """The next replica, charged for one microbatch; None if nobody can be asked now.

        ``prefer``: who is asked before all others unless it failed lately, since it knows the microbatch.
        """
        if prefer is not None and prefer not in exclude:
            known = self._replicas.get(prefer)
            if known is not None and known.failed_until <= now:
                return self._charge(prefer, known)
        best = self._best(self._some(), now, exclude)
        if best is None and len(self._order) > NEIGHBOURS:
            best = self._best(self._order, now, exclude)  # all of those are away: rare, and worth the look
        if best is None:
            return None
        self._reached = self._replicas[best].virtual
        return self._charge(best, self._replicas[best])

    def _some(self) -> Iterable[PeerId]:
        most = min(len(self._order), max(NEIGHBOURS, 2 * self._in_flight))
        if most <= NEIGHBOURS:
            return self._order[:most]
        return [self._order[place] for place in self._rng.choices(range(most), k=NEIGHBOURS)]

    def _best(self, peers: Iterable[PeerId], now: float, exclude: Collection[PeerId]) -> PeerId | None:
        """Least wait first, then virtual time, then by lot."""
        replicas, reached = self._replicas, self._reached
        ready: list[tuple[float, PeerId]] = []
        least = most = virtual = 0.0
        best: PeerId | None = None
        alike = 0
        for peer in peers:
            known = replicas[peer]
            if known.busy_until > now or known.failed_until > now or (exclude and peer in exclude):
                continue
            if known.away:
                known.away = False
                if known.virtual < reached:
                    known.virtual = reached
            wait = known.wait_s(now)
            ready.append((wait, peer))
            if wait > most:
                most = wait
            if best is None or wait < least or (wait == least and known.virtual < virtual):
                least, virtual, best, alike = wait, known.virtual, peer, 1
            elif wait == least and known.virtual == virtual:
                alike += 1
                if self._rng.random() * alike < 1.0:
                    best = peer
        if most > least:
            for wait, peer in ready:
                if wait > least:
                    replicas[peer].away = True
        return best

    def _charge(self, peer: PeerId, known: _Replica) -> Choice:
        choice = Choice(peer, self._cost(known), known.slots > 0)
        known.virtual += choice.charge
        known.slots = max(0, known.slots - 1)
        known.in_flight += 1
        self._in_flight += 1
        return choice

    def _cost(self, replica: _Replica) -> float:
        if replica.service_s is not None:
            return replica.service_s + replica.rtt_s
        some = [self._replicas[peer].service_s for peer in self._order[:NEIGHBOURS]]
        times = [seconds for seconds in some if seconds is not None]
        return sum(times) / len(times) if times else 1.0

    def _ended(self, choice: Choice) -> _Replica | None:
        """Its replica, if it is still one; a choice ends once."""
        known = self._replicas.get(choice.peer)
        if known is not None and known.in_flight:
            known.in_flight -= 1
            self._in_flight -= 1
        return known

    def wait_s(self, now: float) -> float | None:
        """How long until somebody can be asked again; None if the stage has no replica at all."""
        waits = [max(known.busy_until, known.failed_until) - now for known in self._replicas.values()]
        return max(0.0, min(waits)) if waits else None

    def failing(self, now: float) -> bool:
        """Whether every replica failed lately; one that is only busy is alive."""
        return all(known.failed_until > now for known in self._replicas.values())

    def empty(self) -> bool:
        return not self._replicas

    def patience_s(self, peer: PeerId, least: float, most: float) -> float:
        """Seconds after which an answer that did not come is given up, between these bounds."""
        known = self._replicas.get(peer)
        if known is None or known.expected_s is None:
            return most
        return min(most, max(least, PATIENCE_TIMES * (known.expected_s + known.deviation_s)))

    def answered(
        self, choice: Choice, now: float, seconds: float | None, load: Load, rtt_s: float = 0.0
    ) -> None:
        """An answer came after this long; correct the charge and forgive.

        ``seconds``: None where the replica had begun before it was asked, which says nothing of its speed.
        """
        known = self._ended(choice)
        if known is None:
            return
        if seconds is not None:
            self._learn(known, seconds, load.service_s or seconds, rtt_s)
        if known.service_s is not None:
            known.virtual += known.service_s + known.rtt_s - choice.charge
        known.failures, known.failed_until, known.busy_until = 0, 0.0, 0.0
        self._hear(known, now, load)

    def _learn(self, known: _Replica, seconds: float, service_s: float, rtt_s: float) -> None:
        service_s = max(service_s, seconds / MOST_NEED, 1e-6)  # its own word, within reason
        floor_s = max(0.0, seconds - service_s)
        if known.service_s is None or known.expected_s is None:
            known.expected_s, known.deviation_s = seconds, seconds / 2
            known.service_s, known.floor_s = service_s, floor_s
        else:
            apart, beyond = seconds - known.expected_s, floor_s - known.floor_s
            known.expected_s += ALPHA * apart
            known.deviation_s += ALPHA * (abs(apart) - known.deviation_s)
            known.service_s += ALPHA * (service_s - known.service_s)
            known.floor_s += beyond if beyond < 0 else FLOOR_RISES * beyond
        known.rtt_s = rtt_s

    def accepted(self, choice: Choice, now: float, load: Load) -> None:
        """The peer accepted and said how much room is left."""
        known = self._replicas.get(choice.peer)
        if known is not None:
            self._hear(known, now, load)

    def _hear(self, known: _Replica, now: float, load: Load) -> None:
        known.slots = load.slots
        known.heard_at = now
        known.others = max(0, load.working - known.in_flight)

    def busy(self, choice: Choice, now: float, retry_after_s: float) -> None:
        """The peer had no room: not a failure, and it has done no work to be charged for."""
        known = self._ended(choice)
        if known is not None:
            known.busy_until = now + retry_after_s
            known.virtual -= choice.charge
            known.slots, known.away = 0, True

    def failed(self, choice: Choice, now: float) -> None:
        """The peer did not answer or broke the protocol: leave it alone, longer each time.

        All that was in flight fails with it; that is one failure, not one for each microbatch.
        """
        known = self._ended(choice)
        if known is not None and known.failed_until <= now:
            wait = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(known.failures, 16))
            known.failed_until = now + wait * self._rng.uniform(0.75, 1.25)
            known.failures += 1
            known.slots, known.away = 0, True

    def unused(self, choice: Choice) -> None:
        """Nothing came of it and the peer is not to blame: a later stage was empty, or the call dropped."""
        known = self._ended(choice)
        if known is not None:
            known.virtual -= choice.charge
