"""The worker role: one replica of one stage. The only role that imports torch.

Start: certificate, genesis weights, the newest own snapshot if there is one, the run's clock; then the
replica's life (``stage.replica``) beside the microbatch server, the donor of state and the roster. Stop:
withdraw from the roster, finish or hand back what is in progress, snapshot, leave.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import attrs
import torch
import trio

from agorad import moving, neighbours, points
from agorad.checkpoints import Checkpoints, snapshots_of
from agorad.clockwatch import read_clock, watch_clock
from agorad.exitcodes import DaemonExit, ExitCode, hardware
from agorad.joining import obtain_certificate
from agorad.keeping import Keeper
from agorad.metrics.readings import Readings
from agorad.node import Node
from agorad.supervision.levers import Levers
from agorad.supervision.memory import AcceleratorMemory
from agorad.supervision.progress import Company, Work
from agorad.supervision.progress import Device as HungDevice
from agorad.supervision.reactions import Vitals
from agorad.supervision.rounds import Rounds
from agorad.supervision.weights import Weights
from p2p.averaging import Averager, RoundConfig
from p2p.errors import LocalError, P2PError, Refused
from p2p.event import Event
from p2p.groups import plain
from p2p.identity import PeerId
from p2p.membership import Certificate
from p2p.records import StageRecord
from stage import messages
from stage.ahead import Ahead
from stage.clock import StepClock
from stage.compute import StageCompute, wire_shape
from stage.device import STEP, Device
from stage.donor import PROTOCOL as STATE_PROTOCOL
from stage.donor import Donor
from stage.events import BadOutput
from stage.microbatch import MicrobatchServer
from stage.nexthop import NextHop
from stage.parameters import ticket_flops
from stage.passes import NOT_FINITE
from stage.placement import DeviceError, choose_device, give_back, peak_flops, vram
from stage.replica import Replica
from stage.robust import reducer
from stage.roster import Declaration, Roster
from stage.router import Router
from stage.snapshot import SnapshotStore
from stage.synchronous import SynchronousSteps

DRAIN_S = 10.0
"""How long microbatches in progress may still take once the node is to leave."""
CLOCK_RETRY_S = 0.5


async def run(node: Node) -> None:
    """Serve one stage until asked to stop."""
    torch.set_num_threads(node.config.node.threads)
    manifest = node.manifest
    store = SnapshotStore(snapshots_of(node.config.node.state, manifest.checkpoint.generation))
    # Before it takes a place that others wait for.
    await trio.to_thread.run_sync(_device, node.config.node.device)
    certificate = await _join(node, store)
    if certificate is None:
        return  # stopped while joining
    stage = certificate.stage
    if stage is None or not 0 <= stage < manifest.model.stages:
        raise LocalError(f"the authority assigned stage {stage}; this run has {manifest.model.stages}")
    node.status["stage"] = stage
    node.nursery.start_soon(points.follow, node)
    clock = StepClock(
        manifest.run.id,
        frozenset(ref.peer_id for ref in manifest.trainers),
        manifest.training.target_batch,
    )
    settings = node.config
    token = trio.lowlevel.current_trio_token()

    def emit_from_device(event: Event) -> None:
        """Steps are taken on the device's thread; the bus and who listens to it belong to this one."""
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(node.emit, event)

    def make() -> StageCompute:
        return StageCompute(
            manifest.model,
            manifest.training,
            stage,
            settings=settings.compute,
            device=_device(settings.node.device),
            in_flight=settings.worker.slots,
            emit=emit_from_device,
        )

    compute = await trio.to_thread.run_sync(make)
    faults = Faults(lambda: node.emit(BadOutput(stage=stage, step=clock.step)))
    with Device(failed=faults.note) as device:
        # OpenMP keeps the number for each thread that starts it.
        await device.run(STEP, torch.set_num_threads, node.config.node.threads)
        # Events are for the trio thread: what the warm-up decides is said after it.
        node.emit(await device.run(STEP, compute.warm_up))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(faults.watch)
            await _Worker(node, stage, clock, compute, device, store).run()
            nursery.cancel_scope.cancel()


def _device(name: str) -> torch.device:
    try:
        return choose_device(name)
    except DeviceError as error:
        raise DaemonExit(ExitCode.ACCELERATOR, str(error)) from error


async def _join(node: Node, store: SnapshotStore) -> Certificate | None:
    """The certificate; a node that waits for it downloads the state of its probable stage meanwhile."""
    ahead = Ahead(
        host=node.host,
        roster=Roster(node.dht, node.trust, node.clock, lambda: node.manifest.checkpoint.generation),
        store=store,
        model=node.manifest.model,
        stale_steps=lambda: node.manifest.training.max_stale_steps,
        emit=node.emit,
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ahead.run)
            certificate = await obtain_certificate(node, ahead)
            if certificate is not None and certificate.stage is not None:
                await ahead.settle(certificate.stage, node.stopping)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise plain(group) from None
    return certificate


class Rate:
    """How fast a count grows, over the last ``OVER_S`` or so."""

    OVER_S = 30.0

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=64)

    def samples_a_second(self, now: float, count: int) -> float:
        """With the count of this moment."""
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self.OVER_S:
            self._seen.popleft()
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return round((last - first) / (ended - began), 4) if ended > began else 0.0


class Faults:
    """Ends the worker when a job finds memory or accelerator failing.

    Most jobs belong to a peer's call, whose failure costs the call alone: the worker would take microbatch
    after microbatch and lose each.
    """

    def __init__(self, bad_output: Callable[[], None] = lambda: None) -> None:
        """``bad_output`` is told when what was computed is not finite."""
        self._bad_output = bad_output
        self._end: DaemonExit | None = None
        self._found = trio.Event()

    def note(self, error: BaseException) -> None:
        """What a job raised."""
        if isinstance(error, Refused) and error.code == NOT_FINITE:
            self._bad_output()
        if self._end is None and (end := hardware(error)) is not None:
            self._end = end
            self._found.set()

    async def watch(self) -> None:
        """Raises DaemonExit once there is a reason."""
        await self._found.wait()
        assert self._end is not None
        raise self._end


class _Worker:
    """Wires the parts of one replica together."""

    def __init__(
        self,
        node: Node,
        stage: int,
        clock: StepClock,
        compute: StageCompute,
        device: Device,
        store: SnapshotStore,
    ) -> None:
        manifest = node.manifest
        self.node = node
        self.stage = stage
        self.clock = clock
        self.compute = compute
        self.device = device
        self.peer_id: PeerId = node.identity.peer_id
        self.store = store
        self.rate = Rate()
        self.capacity = moving.Capacity()
        self.moves: tuple[int, ...] = ()
        """Stages where this node would go."""
        self.moved = False
        self.checkpoints = Checkpoints(node, stage, floats=compute.floats, fingerprint=compute.fingerprint)
        generation = self.checkpoints.generation
        self.roster = Roster(node.dht, node.trust, node.clock, lambda: generation)
        self.mates = self.roster.view(stage)
        self.declaration = Declaration(node.dht, manifest.run.id, stage, self.peer_id, self.describe)
        self.keeper = Keeper(
            node,
            stage,
            clock=clock,
            compute=compute,
            device=device,
            store=store,
            checkpoints=self.checkpoints,
            mates=self.mates,
        )
        self.donor = Donor(node.identity, store, stage, self.keeper.donated, node.host.membership)
        tail = stage == manifest.model.stages - 1
        next_hop = None
        if not tail:
            router = Router(random.Random(node.rng.random()))
            view = self.roster.view(stage + 1)
            next_hop = NextHop(
                node.host, view, router, node.emit, node.boundary, stages=manifest.model.stages
            )
        averager = Averager(
            node.host,
            node.dht,
            node.identity,
            run=manifest.run.id if generation == 0 else f"{manifest.run.id}+{generation}",
            stage=stage,
            emit=node.emit,
            clock=trio.current_time,
            rng=node.rng,
            config=RoundConfig(),
            reducer=reducer(manifest.training.robust),
        )
        steps = None
        if manifest.training.averaging == "powersgd":
            steps = SynchronousSteps(
                me=self.peer_id,
                stage=stage,
                device=device,
                compute=compute,
                averager=averager,
                emit=node.emit,
            )
        self.replica = Replica(
            peer_id=self.peer_id,
            stage=stage,
            training=manifest.training,
            clock=clock,
            device=device,
            compute=compute,
            averager=averager,
            steps=steps,
            mates=self.mates,
            refresh_mates=lambda: self.roster.refresh(self.mates),
            fetch_state=self.keeper.fetch,
            restore_state=self.keeper.restore,
            take_snapshot=self.keeper.snapshot,
            snapshot_every=node.config.worker.snapshot_every,
            phase_changed=self.declaration.changed,
            now=node.clock,
            emit=node.emit,
        )
        self.keeper.replica = self.replica
        self.server = MicrobatchServer(
            identity=node.identity,
            run=manifest.run.id,
            trainers=frozenset(ref.peer_id for ref in manifest.trainers),
            shape=wire_shape(manifest.model, manifest.training, stage),
            clock=clock,
            device=device,
            compute=compute,
            next_hop=next_hop,
            slots=node.config.worker.slots,
            emit=node.emit,
            serving=lambda: self.replica.serving and not node.stopping.is_set(),
            step=lambda: self.replica.step,
            clock_advanced=self.replica.clock_advanced,
            count=node.boundary,
        )

    async def run(self) -> None:
        node = self.node
        await self.keeper.resume()
        await self.read_first_clock()
        if node.stopping.is_set():
            return  # without the clock its phase would be a guess
        node.host.handle(messages.PROTOCOL, self.server.handle, max_payload=self.server.request_bytes)
        node.host.handle(STATE_PROTOCOL, self.donor.handle, open_to_all=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.server.run)
            await self.roster.refresh(self.mates)
            await self.keeper.begin_at_checkpoint()
            if node.stopping.is_set():
                nursery.cancel_scope.cancel()
                return
            nursery.start_soon(self.roster.run)
            nursery.start_soon(self.checkpoints.run, self.store, self.active_step, self.keeper.snapshot)
            nursery.start_soon(neighbours.keep, node, self.roster, self.stage)
            nursery.start_soon(watch_clock, node, self.clock, self.replica.clock_advanced)
            nursery.start_soon(self.replica.run)
            node.manifest_taken.append(self.take_manifest)
            if node.manifest.training != self.compute.training:  # it changed while this node began
                self.replica.configure(node.manifest.training)
            node.update_status = self.update_status
            node.pausing.attach(lambda held: self.replica.hold() if held else self.replica.release())
            node.readings = self.readings
            node.levers = self.levers()
            await trio.lowlevel.checkpoint()
            self.moves = await trio.to_thread.run_sync(moving.possible, node)
            nursery.start_soon(self.declaration.run)
            if self.moves:
                nursery.start_soon(
                    partial(
                        moving.watch,
                        node,
                        Roster(node.dht, node.trust, node.clock),
                        self.stage,
                        phase=lambda: self.replica.phase,
                        moved=self.has_moved,
                    )
                )
            node.ready()
            await node.stopping.wait()
            await self.leave()
            nursery.cancel_scope.cancel()
        self.donor.close()

    def take_manifest(self) -> None:
        """A newer one is in force."""
        self.replica.configure(self.node.manifest.training)
        if self.checkpoints.rolled_back():
            self.node.restart()

    def active_step(self) -> int | None:
        """Step of the state while this replica is ACTIVE."""
        return self.replica.step if self.replica.phase == "active" else None

    async def read_first_clock(self) -> None:
        """The run's step decides the phase to begin in, so it has to be known, not guessed."""
        while not self.node.stopping.is_set():
            try:
                await read_clock(self.node, self.clock)
                return
            except (P2PError, trio.TooSlowError):
                await trio.sleep(CLOCK_RETRY_S)

    def has_moved(self) -> None:
        """The next life is at another stage: what is kept of this one is of no use there."""
        self.moved = True

    def describe(self) -> StageRecord:
        certificate = self.node.certificate
        assert certificate is not None
        last = self.replica.last_round
        return StageRecord(
            addrs=tuple(str(addr) for addr in self.node.host.dialable_addrs)[:8],
            phase="leaving" if self.node.stopping.is_set() else self.replica.phase,
            step=self.replica.step,
            slots=0 if self.server.shedding else max(0, self.server.slots_free),
            rate=self.rate.samples_a_second(trio.current_time(), self.server.added),
            certificate=certificate.encode(),
            disagreement=self.replica.disagreement,
            snapshot_step=self.replica.state_step,
            working=self.server.in_progress,
            capacity=self.capacity.samples_a_second(sum(self.device.busy_s.values()), self.server.added),
            moves=self.moves if self.replica.phase == "active" else (),
            generation=self.checkpoints.generation,
            round=None if last is None else (last.number, last.fraction, last.members, last.at),
        )

    def update_status(self) -> None:
        last = self.replica.last_round
        self.node.status.update(
            phase="leaving" if self.node.stopping.is_set() else self.replica.phase,
            step=self.replica.step,
            loss=self.server.last_loss,
            microbatches={"added": self.server.added, "in_progress": self.server.in_progress},
            round=None
            if last is None
            else {
                "number": last.number,
                "fraction": last.fraction,
                "members": last.members,
                "at": last.at,
            },
            rounds_in_flight=self.replica.rounds_in_flight,
            disagreement=self.replica.disagreement,
        )

    def readings(self) -> Readings:
        taken = self.compute.last_step
        return Readings(
            in_progress=self.server.in_progress,
            slots=self.node.config.worker.slots,
            slots_free=self.server.slots_free,
            compute_s=dict(self.device.busy_s),
            jobs=dict(self.device.jobs),
            microbatch_flops=ticket_flops(self.node.manifest.model, self.stage, "train"),
            peak_flops=peak_flops(self.compute.device, self.node.config.metrics.peak_tflops),
            gradient_norm=None if taken is None else taken.norm,
            learning_rate=None if taken is None else taken.lr,
            vram=vram(self.compute.device),
            samples=self.clock.samples,
        )

    async def leave(self) -> None:
        """Nobody sends more; what is in progress ends or is handed back; the state is kept."""
        with trio.move_on_after(DRAIN_S):
            await self.declaration.withdraw()
            await self.server.wait_idle()
        await self.keeper.leave(moved=self.moved)

    # Supervision

    def levers(self) -> Levers:
        return Levers(
            shed=self.shed,
            resync=self.replica.resync,
            trim=lambda: self.device.run(STEP, give_back, self.compute.device),
            sound=lambda: self.device.run(STEP, self.compute.sound),
            make_room=self.make_room,
            vitals=self.vitals,
            rules=(AcceleratorMemory(), Weights(), Rounds(), HungDevice(), Company(), Work()),
        )

    def shed(self, on: bool) -> None:
        self.server.shedding = on
        self.declaration.changed()

    def make_room(self) -> None:
        with contextlib.suppress(LocalError):  # where nothing can be removed, the trouble itself is told
            self.store.make_room()

    def vitals(self, now: Vitals) -> Vitals:
        memory, since = vram(self.compute.device), self.device.running_since
        return attrs.evolve(
            now,
            vram_total=memory.get("total", 0),
            vram_free=memory.get("free", 0),
            snapshot_bytes=self.keeper.saved_bytes,
            job_s=None if since is None else time.monotonic() - since,
            step=self.replica.step,
            added=self.server.added,
        )
