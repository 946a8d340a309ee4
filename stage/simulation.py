"""A run in virtual time: what it reaches and what it loses, by the real router and balancer.

Every sender has a ``Router`` of its own; a trainer knows all heads, a worker at most ``VIEW`` replicas of
the next stage. A microbatch is a nested call: it waits for its sender's line and its receiver's, is taken or
told BUSY, waits for the device (backward before forward, oldest first), goes on, and comes back the same
way. A replica that leaves takes what it works on with it: its callers notice at once where connections close
and after ``FROZEN_S`` where they do not, and send again; work further down that is still good is joined, not
repeated. A replica that comes (back) downloads the stage's state over its line before it serves. With
``Scenario.balance`` a replica moves when ``stage.balance`` proposes it, one at a time.

What is left out: the trainer's line, the DHT's delays beyond ``ROSTER_S``, evaluation, and that weights of
a newcomer have to agree before it is ACTIVE. The same scenario and seed give the same events.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, final

from p2p.identity import PeerId
from stage.balance import Move, propose
from stage.messages import Load
from stage.router import Router
from stage.scenario import Scenario
from stage.simulated import VIEW, Hop, Report, Sender, SimMicrobatch, SimReplica, SimTrainer, StageReport

ROSTER_S: Final = 2.0
"""Until those who should know of a replica do."""
FORGOTTEN_S: Final = 15.0
"""Until one that is gone is in nobody's roster."""
FROZEN_S: Final = 2.0
BALANCE_S: Final = 30.0
EMPTY_S: Final = 0.5


@final
class Simulation:
    """See the module's head. ``run`` once."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self._scenario = scenario
        self._rng = random.Random(seed)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self._last = len(scenario.stages) - 1
        self._replicas = [
            SimReplica(number, worker, scenario.stages[worker.stage], scenario.slots, self._rng)
            for number, worker in enumerate(scenario.workers)
        ]
        self._by_peer = {replica.peer: replica for replica in self._replicas}
        self._serving: list[dict[int, SimReplica]] = [{} for _ in scenario.stages]
        self._trainers = [SimTrainer(number, self._rng) for number in range(scenario.trainers)]
        self._cores = scenario.cores
        self._waiting: deque[SimReplica] = deque()
        self._moving: SimReplica | None = None
        self._from = scenario.seconds / 10
        self._open: set[SimMicrobatch] = set()
        """Issued and not completed."""
        self._issued = self._completed = self._counted = 0
        self._times: list[float] = []
        self._rerouted = self._busy = self._departures = self._moves = 0
        self._spent_s = self._wasted_s = 0.0

    def run(self, progress: Callable[[float], None] | None = None) -> Report:
        """``progress`` is told the share that is done, now and then."""
        for replica in self._replicas:
            self._arrive(replica)
        for stage in range(len(self._scenario.stages)):
            for sender in self._senders(stage):
                self._introduce(sender, self._draw(stage, sender.most))
        for trainer in self._trainers:
            self._fill(trainer, apart_s=0.001)
        if self._scenario.balance:
            self._at(BALANCE_S, self._balance)
        end, events, told = self._scenario.seconds, self._events, 0
        for handled in itertools.count():
            if not events or events[0][0] > end:
                break
            self._now, _, call, args = heapq.heappop(events)
            call(*args)
            if progress is not None and handled & 0xFFFF == 0 and int(100 * self._now / end) > told:
                told = int(100 * self._now / end)
                progress(self._now / end)
        self._now = end
        return self._report(handled)

    def _at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._count), call, args))

    # Who knows whom

    def _senders(self, stage: int) -> list[Sender]:
        return list(self._trainers) if stage == 0 else list(self._serving[stage - 1].values())

    def _draw(self, stage: int, most: int) -> list[SimReplica]:
        here = list(self._serving[stage].values())
        return here if len(here) <= most else self._rng.sample(here, most)

    def _introduce(self, sender: Sender, replicas: Iterable[SimReplica]) -> None:
        """From now on it knows those that serve, in place of others where it knows enough."""
        view = sender.view
        for replica in replicas:
            if not replica.serving or replica.peer in view:
                continue
            if len(view) >= sender.most:
                other = self._by_peer[self._rng.choice(list(view))]
                del view[other.peer]
                other.known_by.pop(sender.number, None)
            view[replica.peer] = self._now
            replica.known_by[sender.number] = sender
        sender.router.update(dict(view))

    def _arrive(self, replica: SimReplica) -> None:
        """The replica serves from now on."""
        replica.reset(self._scenario.slots, self._now)
        replica.cost = self._scenario.stages[replica.stage]
        replica.serving, replica.since = True, self._now
        self._serving[replica.stage][replica.number] = replica
        if self._moving is replica:
            self._moving = None
        if self._now:
            self._at(self._now + ROSTER_S, self._announce, replica, replica.since)
            if replica.stage < self._last:
                self._introduce(replica, self._draw(replica.stage + 1, VIEW))
        churn = self._scenario.churn
        if math.isfinite(churn.life_s):
            lives = self._rng.expovariate(1 / churn.life_s)
            self._at(self._now + lives, self._depart, replica, replica.since)

    def _announce(self, replica: SimReplica, since: float) -> None:
        if not replica.serving or replica.since != since:
            return
        senders = self._senders(replica.stage)
        share = 1.0 if replica.stage == 0 else min(1.0, VIEW / len(self._serving[replica.stage]))
        count = min(len(senders), max(1, math.ceil(share * len(senders)))) if senders else 0
        for sender in self._rng.sample(senders, count):
            self._introduce(sender, (replica,))

    # Coming and going

    def _depart(self, replica: SimReplica, since: float) -> None:
        if not replica.serving or replica.since != since:
            return
        churn = self._scenario.churn
        self._departures += 1
        frozen = self._rng.random() < churn.frozen
        self._stop(replica, notice_s=FROZEN_S if frozen else 0.0)
        away = self._rng.expovariate(1 / churn.away_s) if churn.away_s else 0.0
        self._at(self._now + away + self._download_s(replica, replica.stage), self._arrive, replica)

    def _download_s(self, replica: SimReplica, stage: int) -> float:
        return self._scenario.stages[stage].state_bytes / replica.worker.down

    def _stop(self, replica: SimReplica, notice_s: float) -> None:
        """It answers nobody any more; callers notice after so long."""
        replica.serving = False
        replica.served_s += self._now - max(replica.since, self._from) if self._now > self._from else 0.0
        del self._serving[replica.stage][replica.number]
        self._at(self._now + FORGOTTEN_S, self._forgotten, replica, replica.since)
        for hop in list(replica.hops.values()):
            if self._drop(hop):
                # what it had passed on is joined by whoever takes its place
                self._at(self._now + notice_s + self._rtt(), self._failed, hop)
        replica.hops.clear()
        for other in replica.view:
            self._by_peer[other].known_by.pop(replica.number, None)
        replica.view.clear()
        replica.router.update({})
        if replica.computing and self._cores is not None:
            self._cores += 1
            self._next_on_cores()

    def _forgotten(self, replica: SimReplica, since: float) -> None:
        if replica.serving and replica.since == since:
            return
        for sender in list(replica.known_by.values()):
            del sender.view[replica.peer]
            self._introduce(sender, self._draw(replica.stage, 1))
        replica.known_by.clear()

    def _drop(self, hop: Hop) -> bool:
        """Forget an attempt; whether its caller still waits for it."""
        if hop.dead or hop.done:
            return False
        hop.dead = True
        self._wasted_s += hop.spent_s
        if hop.microbatch.at.get(hop.stage) is hop:
            del hop.microbatch.at[hop.stage]
        return hop.caller is None or not hop.caller.dead

    # A microbatch on its way

    def _allowed(self, trainer: SimTrainer) -> int:
        """Microbatches that it may have in flight."""
        trainers = len(self._trainers)
        if self._scenario.credits:
            return -(-(self._scenario.credits + trainer.number + 1) // trainers)
        serving = [len(replicas) for replicas in self._serving]
        return trainer.credits.count(sum(serving), min(serving) * self._scenario.slots, trainers)

    def _fill(self, trainer: SimTrainer, apart_s: float = 0.0) -> None:
        count = self._allowed(trainer) - trainer.in_flight
        for number in range(count):
            trainer.in_flight += 1
            self._at(self._now + apart_s * number, self._issue, trainer)

    def _issue(self, trainer: SimTrainer) -> None:
        microbatch = SimMicrobatch(trainer, self._now)
        self._issued += 1
        self._open.add(microbatch)
        self._send(microbatch, None)

    def _send(self, microbatch: SimMicrobatch, caller: Hop | None) -> None:
        """Choose a replica of the next stage; again later if nobody can be asked."""
        if caller is not None and caller.dead:
            return
        stage = 0 if caller is None else caller.stage + 1
        if self._joined(microbatch, stage, caller):
            return
        router = microbatch.trainer.router if caller is None else caller.replica.router
        choice = router.choose(self._now)
        if choice is None:
            wait = router.wait_s(self._now)
            self._at(
                self._now + (EMPTY_S if wait is None else max(wait, 0.005)), self._send, microbatch, caller
            )
            return
        replica = self._by_peer[choice.peer]
        hop = Hop(microbatch, replica, stage, caller, choice, self._now)
        microbatch.at[stage] = hop
        if not replica.serving or replica.stage != stage:
            self._at(self._now + self._rtt(), self._failed_to_reach, hop)
            return
        start = self._now if choice.room else self._now + self._rtt()
        if not choice.room and replica.slots <= 0:
            self._at(start, self._told_busy, hop)
            return
        replica.hops[id(hop)] = hop
        size = self._scenario.issue_bytes if caller is None else caller.replica.cost.forward_bytes
        sender = None if caller is None else caller.replica
        self._at(self._through(sender, replica, size, start), self._came, hop)

    def _joined(self, microbatch: SimMicrobatch, stage: int, caller: Hop | None) -> bool:
        """Whether somebody at that stage works on it or has its answer, for a caller that is gone."""
        orphan = microbatch.at.get(stage)
        if orphan is None:
            return False
        if orphan.done and not orphan.replica.serving:
            self._wasted_s += orphan.spent_s
            del microbatch.at[stage]
            return False
        orphan.caller, orphan.choice = caller, None
        if orphan.done:
            self._at(self._now + self._rtt(), self._answered, orphan, caller)
        return True

    def _through(
        self, sender: SimReplica | None, receiver: SimReplica | None, size: float, start: float
    ) -> float:
        """When so many bytes are through one line and the other."""
        if sender is not None and sender.worker.up < math.inf:
            start = sender.up_free = max(start, sender.up_free) + size / sender.worker.up
        start += self._scenario.rtt_s / 2
        if receiver is not None and receiver.worker.down < math.inf:
            took = size / receiver.worker.down
            start = receiver.down_free = max(start, receiver.down_free + took)
        return start

    def _rtt(self) -> float:
        return self._scenario.rtt_s

    def _came(self, hop: Hop) -> None:
        if hop.dead:
            return
        replica = hop.replica
        if replica.slots <= 0:
            del replica.hops[id(hop)]
            self._at(self._now + self._rtt() / 2, self._told_busy, hop)
            return
        replica.slots -= 1
        if hop.choice is not None:
            self._router_of(hop).accepted(hop.choice, self._now, self._load(replica))
        if replica.cost.forward_s:
            replica.forward.append(hop)
        else:
            replica.back.append(hop)
        self._compute(replica)

    def _load(self, replica: SimReplica) -> Load:
        """What it tells its callers."""
        cost = replica.cost
        took_s = (cost.forward_s + cost.backward_s) * replica.scale
        return Load(replica.slots, self._scenario.slots - replica.slots, took_s)

    def _told_busy(self, hop: Hop) -> None:
        self._busy += 1
        if hop.choice is not None:
            self._router_of(hop).busy(
                hop.choice, self._now, hop.replica.appointments.retry_after_s(self._now)
            )
        self._again(hop)

    def _failed_to_reach(self, hop: Hop) -> None:
        if hop.choice is not None:
            self._router_of(hop).failed(hop.choice, self._now)
        self._rerouted += 1
        self._again(hop)

    def _failed(self, hop: Hop) -> None:
        """The replica went while it had the microbatch."""
        caller = hop.caller
        if caller is not None and caller.dead:
            return
        if hop.choice is not None:
            self._router_of(hop).failed(hop.choice, self._now)
        self._rerouted += 1
        self._send(hop.microbatch, caller)

    def _again(self, hop: Hop) -> None:
        if hop.dead:
            return
        hop.dead = True
        hop.microbatch.at.pop(hop.stage, None)
        self._send(hop.microbatch, hop.caller)

    def _router_of(self, hop: Hop) -> Router:
        return hop.microbatch.trainer.router if hop.caller is None else hop.caller.replica.router

    # The device

    def _compute(self, replica: SimReplica) -> None:
        if replica.computing or not (replica.back or replica.forward):
            return
        if self._cores is not None:
            if self._cores == 0:
                self._waiting.append(replica)
                return
            self._cores -= 1
        self._start(replica)

    def _start(self, replica: SimReplica) -> None:
        backward = bool(replica.back)
        hop = (replica.back if backward else replica.forward).popleft()
        if hop.dead:
            self._release_core(replica)
            return
        cost = replica.cost
        seconds = (cost.backward_s if backward else cost.forward_s) * replica.scale
        replica.computing = True
        self._at(self._now + seconds, self._computed, replica, replica.since, hop, backward, seconds)

    def _computed(self, replica: SimReplica, since: float, hop: Hop, backward: bool, seconds: float) -> None:
        self._spent_s += seconds
        hop.spent_s += seconds
        if not replica.serving or replica.since != since:
            self._wasted_s += seconds  # it left in the middle; what it had done before is counted already
            return
        replica.computing = False
        if self._now > self._from:
            replica.busy_s += seconds
        if hop.dead:
            self._wasted_s += seconds
        elif backward:
            self._added(hop)
        elif hop.stage == self._last:
            replica.back.append(hop)
        else:
            self._send(hop.microbatch, hop)
        self._release_core(replica)

    def _release_core(self, replica: SimReplica) -> None:
        if self._cores is None:
            self._compute(replica)
            return
        self._cores += 1
        if replica.back or replica.forward:
            self._waiting.append(replica)
        self._next_on_cores()

    def _next_on_cores(self) -> None:
        assert self._cores is not None
        while self._cores and self._waiting:
            replica = self._waiting.popleft()
            if replica.serving and not replica.computing and (replica.back or replica.forward):
                self._cores -= 1
                self._start(replica)

    def _added(self, hop: Hop) -> None:
        """Its gradient is in the accumulator; the answer goes back."""
        replica = hop.replica
        replica.added += 1
        replica.slots += 1
        replica.appointments.ended(self._now)
        replica.hops.pop(id(hop), None)
        hop.done = True
        caller = hop.caller
        if caller is not None and caller.dead:
            return  # kept, for whoever takes the caller's place
        receiver = None if caller is None else caller.replica
        size = replica.cost.backward_bytes + replica.cost.averaging_bytes
        self._at(self._through(replica, receiver, size, self._now), self._answered, hop, caller)

    def _answered(self, hop: Hop, caller: Hop | None) -> None:
        """The answer is with the caller that it was sent to, unless that is gone."""
        microbatch = hop.microbatch
        if caller is not None and caller.dead:
            return
        if hop.choice is not None:
            load, took_s = self._load(hop.replica), self._now - hop.asked_at
            self._router_of(hop).answered(hop.choice, self._now, took_s, load, self._rtt())
        if caller is None:
            self._complete(microbatch)
        else:
            caller.replica.back.append(caller)
            self._compute(caller.replica)

    def _complete(self, microbatch: SimMicrobatch) -> None:
        took_s = self._now - microbatch.began
        self._completed += 1
        self._open.remove(microbatch)
        if self._now > self._from:
            self._counted += 1
            self._times.append(took_s)
        trainer = microbatch.trainer
        trainer.in_flight -= 1
        trainer.credits.answered(self._now, took_s)
        self._fill(trainer)

    # Balance

    def _balance(self) -> None:
        self._at(self._now + BALANCE_S, self._balance)
        if self._moving is not None:
            return
        costs = self._scenario.stages
        rates = [
            {r.peer: r.worker.speed / costs[stage].seconds for r in serving.values()}
            for stage, serving in enumerate(self._serving)
        ]

        def cost_s(peer: PeerId, stage: int) -> float | None:
            return self._download_s(self._by_peer[peer], stage) + BALANCE_S

        move = propose(rates, [cost.seconds for cost in costs], cost_s=cost_s)
        if move is not None:
            self._move(move)

    def _move(self, move: Move) -> None:
        self._moves += 1
        replica = self._moving = self._by_peer[move.peer]
        self._stop(replica, notice_s=0.0)
        replica.stage = move.target
        self._at(self._now + self._download_s(replica, move.target), self._arrive, replica)

    # At the end

    def _report(self, events: int) -> Report:
        seconds = self._scenario.seconds - self._from
        grain = self._scenario.grain
        rate = self._counted * grain / seconds
        times = sorted(self._times) or [0.0]
        lost = len(self._open - self._still_moving())
        return Report(
            issued=self._issued * grain,
            completed=self._completed * grain,
            in_flight=(len(self._open) - lost) * grain,
            lost=lost * grain,
            microbatches_per_second=rate,
            tokens_per_second=rate * self._scenario.tokens,
            seconds_p50=times[len(times) // 2],
            seconds_p95=times[int(0.95 * len(times))],
            rerouted=self._rerouted * grain,
            busy=self._busy * grain,
            wasted=self._wasted_s / self._spent_s if self._spent_s else 0.0,
            departures=self._departures,
            moves=self._moves,
            stages=tuple(self._stage_report(stage) for stage in range(len(self._scenario.stages))),
            grain=grain,
            events=events,
        )

    def _still_moving(self) -> set[SimMicrobatch]:
        """Those with which something will happen: an event is due, or they wait for a device."""
        moving = {hop.microbatch for replica in self._replicas for hop in (*replica.back, *replica.forward)}
        for _, _, _, args in self._events:
            for arg in args:
                if isinstance(arg, Hop):
                    moving.add(arg.microbatch)
                elif isinstance(arg, SimMicrobatch):
                    moving.add(arg)
        return moving

    def _stage_report(self, stage: int) -> StageReport:
        here = [replica for replica in self._replicas if replica.stage == stage]
        served = {
            replica.number: replica.served_s
            + (self._now - max(replica.since, self._from) if replica.serving else 0.0)
            for replica in here
        }
        whole = self._now - self._from
        shares = [
            replica.busy_s / whole for replica in here if replica.serving and replica.since <= self._from
        ]
        total = sum(served.values())
        return StageReport(
            replicas=len(self._serving[stage]),
            utilisation=sum(replica.busy_s for replica in here) / total if total else 0.0,
            idle_most=min(shares, default=1.0),
            added=sum(replica.added for replica in here) * self._scenario.grain,
        )
