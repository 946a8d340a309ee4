"""The trainer role: reads data, sends microbatches to the head's replicas, keeps the clock.

It ends by itself, with code 0, when the run's goal is reached or its time is over. Each trainer of the
manifest has a shard of the data, which owes an equal part of the steps; the shard of one that is gone goes
to another (``agorad.leasing``). What its workers have signed for goes to an authority as receipts
(``agorad.points``), the last of it before the trainer ends.
"""

from __future__ import annotations

import math
import random

import trio

from agorad import generating, trainer_data
from agorad.clockwatch import watch_clock
from agorad.leasing import Leasing
from agorad.metrics.readings import Readings
from agorad.node import Node
from agorad.outbox import Outbox
from agorad.points import Submitter
from p2p.errors import LocalError
from p2p.records import OTHERS, ClockRecord, clock_key
from stage.clock import StepClock
from stage.credits import Credits, places
from stage.data import Source
from stage.data.files import Unavailable
from stage.events import DataUnavailable
from stage.generation import Generation
from stage.leases import Leases
from stage.nexthop import NextHop
from stage.progress import JOURNAL, Journal
from stage.roster import Roster, StageView
from stage.router import Router
from stage.trainer import DATA_RETRY_S, Trainer

PUBLISH_S = 0.5
"""Least pause between two clock records."""
CLOCK_TTL_S = 600.0
STORE_S = 5.0


async def run(node: Node) -> None:
    """Train until the goal, the time, or a stop."""
    manifest, settings = node.manifest, node.config.trainer
    trainers = [ref.peer_id for ref in manifest.trainers]
    if node.identity.peer_id not in trainers:
        raise LocalError(
            f"this node's key {node.identity.peer_id} is not among the trainers of run {manifest.run.id!r}; "
            "its operator has to list it in the manifest"
        )
    source = await _source(node)
    if source is None:
        return
    trust = node.trust
    clock = StepClock(manifest.run.id, frozenset(trainers), manifest.training.target_batch)
    roster = Roster(node.dht, trust, node.clock)
    heads = roster.view(0)
    stages = [roster.view(stage) for stage in range(manifest.model.stages)]
    next_hop = NextHop(
        node.host, heads, Router(random.Random(node.rng.random())), node.emit, stages=manifest.model.stages
    )

    measured = Credits()

    def credits() -> int:
        if settings.credits:
            return settings.credits
        slots = [[view.places(peer) for peer in view.serving()] for view in stages]
        return measured.count(sum(map(len, slots)), places(slots), len(trainers))

    def goal(shard: int) -> int | None:
        """Each shard owes an equal part of the steps."""
        if settings.steps is None:
            return None
        samples = settings.steps * manifest.training.target_batch
        return samples * (shard + 1) // len(trainers) - samples * shard // len(trainers)

    def over() -> bool:
        """Whether nobody owes anything any more, as far as somebody is left to work on it."""
        owed = ((shard, goal(shard)) for shard in range(len(trainers)) if not leases.hopeless(shard))
        return all(
            positions is not None
            and max(journal.shard(shard).completed, leases.completed(shard)) >= positions
            for shard, positions in owed
        )

    journal = Journal.load(node.config.node.state / JOURNAL, source.fingerprint)
    journal.start()
    outbox = await trio.to_thread.run_sync(Outbox, node.config.node.state / "receipts")
    submitter = Submitter(node, outbox)
    ending = trio.Event()
    trainer = Trainer(
        identity=node.identity,
        run=manifest.run.id,
        model=manifest.model,
        training=manifest.training,
        clock=clock,
        source=source,
        goal=goal,
        next_hop=next_hop,
        credits=credits,
        answered=measured.answered,
        journal=journal,
        emit=node.emit,
        stopping=ending,
        keep=submitter.keep,
        over=over,
        now=node.clock,
    )

    async def end_on_stop() -> None:
        await node.stopping.wait()
        ending.set()

    async def end_on_time(seconds: float) -> None:
        await trio.sleep(seconds)
        ending.set()

    def update_status() -> None:
        node.status.update(
            step=clock.step,
            loss=trainer.loss,
            microbatches={"completed": trainer.completed, "in_flight": trainer.in_flight},
            data=source.describe(),
        )

    def readings() -> Readings:
        return Readings(
            in_progress=trainer.in_flight, samples=clock.samples, tokens_a_sample=manifest.model.seq
        )

    def take_manifest() -> None:
        trainer.training = node.manifest.training

    node.manifest_taken.append(take_manifest)
    node.update_status = update_status
    node.readings = readings
    node.nursery.start_soon(roster.run)
    node.nursery.start_soon(_publish_clock, node, clock, trainer)
    node.nursery.start_soon(watch_clock, node, clock, lambda: None)
    node.nursery.start_soon(end_on_stop)
    node.nursery.start_soon(submitter.run)
    generating.install(
        node,
        Generation(
            identity=node.identity,
            run=manifest.run.id,
            model=manifest.model,
            training=lambda: trainer.training,
            clock=clock,
            next_hop=next_hop,
            shard=trainers.index(node.identity.peer_id),
            first=int(node.clock() * 1000),
        ),
        source.tokens,
        clock,
    )
    node.ready()
    node.status["phase"] = "joining"
    await _until_served(stages, ending)
    leases = Leases(node.identity.peer_id, trainers, source.fingerprint, node.clock())
    leasing = Leasing(node, leases, trainer, journal)
    await leasing.look()
    node.nursery.start_soon(leasing.run)
    node.status["phase"] = "active"

    def hold(held: bool) -> None:
        trainer.held = held
        node.status["phase"] = "leaving" if node.stopping.is_set() else "paused" if held else "active"

    node.pausing.attach(hold)
    if settings.seconds is not None:
        node.nursery.start_soon(end_on_time, settings.seconds)
    await trainer.run()
    await leasing.publish()
    await submitter.finish()
    await _store_clock(node, clock, trainer)


async def _source(node: Node) -> Source | None:
    """The data; a hub that is away is waited for. None if the node is told to stop before it answers."""
    settings, manifest = node.config.trainer, node.manifest
    kept = node.config.node.state / "hub"
    while not node.stopping.is_set():
        try:
            return await trio.to_thread.run_sync(
                lambda: trainer_data.source(settings, manifest, shards=len(manifest.trainers), kept=kept),
                abandon_on_cancel=True,
            )
        except Unavailable as error:
            node.emit(DataUnavailable(why=str(error)))
            with trio.move_on_after(DATA_RETRY_S):
                await node.stopping.wait()
    return None


async def _until_served(stages: list[StageView], ending: trio.Event) -> None:
    """Until each stage has a replica that takes work: before that, microbatches would only bounce."""
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await ending.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        for view in stages:
            while not view.serving():
                await view.wait_changed()
        nursery.cancel_scope.cancel()


async def _publish_clock(node: Node, clock: StepClock, trainer: Trainer) -> None:
    """The clock record follows the count, so that replicas without work still see the steps.

    It is stored again while the count stands still: a newcomer who finds none takes the run for a new one.
    """
    while True:
        trainer.clock_changed = trio.Event()
        await _store_clock(node, clock, trainer)
        await trio.sleep(PUBLISH_S)
        with trio.move_on_after(CLOCK_TTL_S / 4):
            await trainer.clock_changed.wait()


async def _store_clock(node: Node, clock: StepClock, trainer: Trainer) -> None:
    own = node.identity.peer_id
    mine = next((r for r in clock.readings if r.trainer == own), None)
    if mine is None:
        return
    others = [(r.trainer, r.samples, r.signature) for r in clock.readings if r.trainer != own]
    record = ClockRecord(
        others=tuple(others[:OTHERS]),
        samples=mine.samples,
        at=node.clock(),
        signature=mine.signature,
        loss=_finite(trainer.loss),
        evaluated=trainer.evaluated if trainer.evaluated and math.isfinite(trainer.evaluated[1]) else None,
    )
    await node.dht.store(
        clock_key(node.manifest.run.id),
        own,
        record.to_value(),
        ttl=CLOCK_TTL_S,
        deadline=STORE_S,
    )


def _finite(loss: float | None) -> float | None:
    """A record holds no other numbers; a run that diverges is to keep its clock."""
    return loss if loss is not None and math.isfinite(loss) else None
