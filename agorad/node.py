"""One node of a run: the parts that all roles share, put together, started and stopped.

Theory of operation. ``run_node`` builds what a role stands on, in this order: state folder and locks,
event bus and log, identity, manifest, host with membership, control socket, hash table; then it calls
the role's ``async def run(node: Node) -> None``. A role registers its protocols on ``node.host`` and
its commands in ``node.commands``, calls ``node.ready()`` once it serves, keeps ``node.status`` true,
and returns when its work is done or soon after ``node.stopping`` is set. Whatever it started in
``node.nursery`` is cancelled after that, then the host closes its connections.

Stopping: the first SIGTERM or SIGINT sets ``node.stopping`` and gives the role ``DRAIN_S`` to return;
a second one ends the process at once. SIGHUP reads the configuration again: all or nothing, and only
what is looked up at use (the authority's settings and account file) changes. Limits: one role a
process; a role that overstays its drain is cancelled.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from agorad import (
    __version__,
    config,
    control,
    control_server,
    hours,
    manifests,
    points,
    preflight,
    probing,
    reachability,
    standing,
    state_dirs,
)
from agorad.commands import Pace
from agorad.commands import install as install_commands
from agorad.config import Config
from agorad.events import Bus, Ready, Reloaded, Started, Stopped, Stopping, Trouble
from agorad.exitcodes import DaemonExit, ExitCode, verdict
from agorad.log import Log
from agorad.metrics import serve as metrics
from agorad.metrics.book import Book
from agorad.metrics.readings import Readings
from agorad.notify import Notifier
from agorad.pausing import Pausing
from agorad.run import Manifest
from agorad.steady import SteadyClock
from agorad.supervision.levers import Levers
from agorad.supervision.watch import Supervisor
from p2p.errors import LocalError, P2PError
from p2p.event import Event
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.kad import Dht
from p2p.limits import Limits
from p2p.membership import Certificate, Membership, Trust
from p2p.multiaddr import Multiaddr
from p2p.transport import TcpTransport
from stage.events import Traffic
from stage.traffic import BoundaryCount

ROUND_PROTOCOLS: Final = "/agora/round/"
TRAFFIC_S: Final = 5.0
"""Between two traffic reports, so that little of a killed node's is lost."""
DRAIN_S: Final = 27.0
"""A role has this long to hand back its work; the whole stop stays under 30 s."""
FAREWELL_S: Final = 1.0


@attrs.define(eq=False)
class Node:
    """What a role is given. Attributes are for reading unless they say otherwise."""

    config: Config
    """Replaced as a whole on SIGHUP: look settings up at use where that should matter."""
    manifest: Manifest
    """The one in force; ``standing`` replaces it as a whole when the operator signs a newer one."""
    identity: Identity
    host: Host
    dht: Dht
    bus: Bus
    nursery: trio.Nursery
    """For the role's background tasks; cancelled once the role returned."""
    notifier: Notifier
    commands: dict[str, control.Command] = attrs.field(factory=dict)
    """Control commands by name; roles add theirs."""
    status: dict[str, Any] = attrs.field(factory=dict)
    """The role's part of ``agoractl status``; see ``status_document``. Written by the role."""
    update_status: Callable[[], None] = lambda: None
    """The role's: brings ``status`` up to date, called whenever somebody asks."""
    trust: Trust = attrs.field(init=False, default=attrs.Factory(lambda self: self.manifest.trust(), True))
    """Whom this node believes; one object, so that a revocation counts everywhere at once."""
    certificate: Certificate | None = None
    """What this node presents in hello; set by ``joining``."""
    book: Book = attrs.field(factory=Book)
    """The node's figures."""
    readings: Callable[[], Readings] = Readings
    """The role's: what it can say of itself now."""
    levers: Levers = attrs.field(factory=Levers)
    """What supervision may do; set by the role."""
    manifest_taken: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when ``manifest`` was replaced by a newer one; roles add theirs."""
    watch_s: float = standing.WATCH_S
    """Longest pause between two looks at what authorities publish."""
    stopping: trio.Event = attrs.field(factory=trio.Event)
    """Set when the node is to leave."""
    session: bytes = attrs.field(factory=lambda: os.urandom(16), repr=False)
    """Random, one a process: tells a restart of this node from a second one with the same key."""
    secret: str | None = attrs.field(default=None, repr=False)
    """The account's secret or token, handed over by who started this process; until the first grant."""
    clock: Callable[[], float] = time.time
    """Unix time as the node counts it: ``steady``, but for tests."""
    steady: SteadyClock = attrs.field(factory=SteadyClock)
    rng: random.Random = attrs.field(factory=random.Random)
    warnings: dict[str, str] = attrs.field(factory=dict)
    """Present troubles by key, as sentences for ``agoractl status``; roles set and delete."""
    boundary: BoundaryCount = attrs.field(factory=BoundaryCount)
    """Boundary payload that this node sent; counted by the roles."""
    inspector: probing.Inspector = attrs.field(init=False)
    """How this node looks at others."""
    started_at: float = 0.0
    """Of the process; same clock as ``time.time``."""
    is_ready: bool = False
    metrics_url: str | None = None
    """Where the figures are served."""
    farewells: list[Callable[[], Awaitable[None]]] = attrs.field(factory=list)
    """Called once the role has returned, while the host still runs: short words to peers."""
    again: bool = False
    """Whether the process starts anew once this node has ended."""
    pausing: Pausing = attrs.field(
        init=False, default=attrs.Factory(lambda self: Pausing(self.bus.emit, self.clock), True)
    )
    pace: Pace = attrs.field(factory=Pace)
    """Of microbatches."""
    ending: DaemonExit | None = None
    """How this node ends, where that is not cleanly; set by ``end``."""

    def emit(self, event: Event) -> None:
        """Report an event."""
        self.bus.emit(event)

    def learn_listed(self) -> None:
        """The manifest's nodes are known without the hash table, so start order is free."""
        for ref in (*self.manifest.seeds, *self.manifest.authorities, *self.manifest.trainers):
            if ref.addrs and ref.peer_id != self.identity.peer_id:
                self.host.learn(ref.peer_id, ref.multiaddrs())

    def ready(self) -> None:
        """The role serves; tell the manager and the log. Calling it again does nothing."""
        if self.is_ready:
            return
        self.is_ready = True
        self.status.setdefault("phase", "active")
        addrs = [str(addr) for addr in self.host.addrs]
        self.emit(Ready(seconds=round(self.clock() - self.started_at, 3), addrs=addrs))
        self.notifier.ready()
        self.nursery.start_soon(reachability.watch, self)

    def socket_made_again(self, trouble: str) -> None:
        """The control socket was gone; ``trouble`` says why it cannot be made again, empty if it was."""
        if trouble:
            self.warnings["control"] = f"the control socket is gone and cannot be made again: {trouble}"
        else:
            self.warnings.pop("control", None)
            self.emit(Trouble(kind="control", why="the control socket was gone", reaction="made again"))

    def stop(self, why: str) -> None:
        """Begin to leave; calling it again does nothing."""
        if not self.stopping.is_set():
            self.emit(Stopping(why=why))
            if self.again:  # a start that begins anew is still a start
                if self.is_ready:
                    self.notifier.reloading()
            else:
                self.notifier.stopping()
            self.status["phase"] = "leaving"
            self.stopping.set()

    def restart(self, why: str = "asked to restart") -> None:
        """Leave in order, then begin anew in the same process; the manager is told of a reload."""
        if not self.stopping.is_set():
            self.again = True
            self.stop(why)

    def reload(self) -> None:
        """Read the settings again, all or nothing; ``LocalError`` says why they were kept as before."""
        if self.is_ready:
            self.notifier.reloading()
        try:
            fresh = self._fresh()
        except LocalError as error:
            self.emit(Reloaded(ok=False, why=str(error)))
            raise
        else:
            self.config = fresh
            _apply_limits(self)
            self.emit(Reloaded(ok=True, why=""))
        finally:
            if self.is_ready:
                self.notifier.ready()

    def _fresh(self) -> Config:
        path = self.config.path
        if path is None:
            raise LocalError("this node was not started from a file")
        fresh = config.load(path)
        for section, kind in (("node", config.NodeSection), ("metrics", config.MetricsSection)):
            for field in attrs.fields(kind):
                before = getattr(getattr(self.config, section), field.name)
                if getattr(getattr(fresh, section), field.name) != before:
                    raise LocalError(f"{section}.{field.name} changes only with a restart: agoractl restart")
        return fresh

    def end(self, exit: DaemonExit) -> None:
        """Leave in order, as with ``stop``, and end with this code; the first one counts."""
        if self.ending is None:
            self.ending = exit
        self.stop(exit.why)

    def traffic(self) -> Traffic:
        """What this process sent so far, by kind."""
        counters = self.host.counters
        averaging = sum(
            sent for name, (sent, _received) in counters.protocols.items() if name.startswith(ROUND_PROTOCOLS)
        )
        return Traffic(
            boundary=self.boundary.bytes,
            averaging=averaging,
            control=counters.bytes_out - self.boundary.bytes - averaging,
            forward_hops=self.boundary.forward_hops,
            backward_hops=self.boundary.backward_hops,
        )

    def status_document(self) -> dict[str, Any]:
        """This node as ``agoractl status --json`` shows it."""
        self.update_status()
        warnings = list(self.warnings.values())
        if self.bus.unwritten:
            warnings.append(f"{self.bus.unwritten} events could not be written to {self.config.events}")
        return {
            "name": self.config.name,
            "role": self.config.node.role,
            "pid": os.getpid(),
            "peer_id": self.identity.peer_id,
            "version": __version__,
            "uptime_s": round(self.clock() - self.started_at, 3),
            "run": self.manifest.run.id,
            "manifest": {"version": self.manifest.run.version, "hash": self.manifest.hash.hex()},
            "phase": "joining",
            "stage": None,
            "step": 0,
            "loss": None,
            "microbatches": {},
            "round": None,
            "peers": len(self.host.connections),
            "points": None,
            "queue": None,
            "addrs": [str(addr) for addr in self.host.addrs],
            "metrics": self.metrics_url,
            **self.status,
            **self._extra(),
            "warnings": warnings,
        }

    def _extra(self) -> dict[str, Any]:
        """What is added to the role's own words."""
        found: dict[str, Any] = {}
        if _done(batches := self.status.get("microbatches") or {}) is not None:
            found["microbatches"] = {**batches, "per_minute": self.pace.per_minute()}
        if self.pausing.why:
            until = self.pausing.until
            found["paused"] = self.pausing.why
            found["paused_until"] = until if until is not None and math.isfinite(until) else None
        return found


Role = Callable[[Node], Awaitable[None]]


async def run_node(
    settings: Config,
    role: Role,
    *,
    started_at: float,
    signals: AsyncIterator[int] | None = None,
    secret: str | None = None,
    lifeline: int | None = None,
) -> bool:
    """Live as one node until the role returns or one of ``signals`` says so. Raises what went wrong.

    ``lifeline``: a pipe that nobody writes to; the node leaves when its other end is closed.
    True: the process is to start again.
    """
    listen = _addresses(settings.node.listen, "node.listen")
    announce = _addresses(settings.node.announce, "node.announce")
    manifest = preflight.check(settings)
    await _check_free(listen)
    fresh = not settings.events.exists()
    state_dirs.prepare(settings.node.state)
    locks = [state_dirs.claim(settings.node.state)]
    identity = Identity.load_or_create(settings.identity)
    locks.append(state_dirs.claim(settings.identity))
    bus = Bus(settings.events)
    bus.subscribe(Log(sys.stderr, settings.node.log))
    bus.emit(
        Started(
            name=settings.name,
            role=settings.node.role,
            run=manifest.run.id,
            peer_id=identity.peer_id,
            version=__version__,
        )
    )
    try:
        again = await _live(
            settings, manifest, identity, bus, listen, announce, role, started_at, signals, secret, lifeline
        )
    except BaseException as error:
        code, why = verdict(error)
        bus.emit(Stopped(code=code, why=why or repr(error)[:200]))
        if fresh and code == ExitCode.USAGE:
            _forget(settings)  # it never took part, so there is nothing to remember
        raise
    else:
        bus.emit(Stopped(code=ExitCode.CLEAN, why="restarting" if again else "done"))
        return again
    finally:
        bus.close()
        for lock in locks:
            os.close(lock)


def _forget(settings: Config) -> None:
    """Remove what a node that could not start wrote, and the folder if nothing else is in it."""
    for path in (settings.events, settings.node.state / manifests.FILE):
        path.unlink(missing_ok=True)
    try:
        settings.node.state.rmdir()
    except OSError:
        return  # it holds a key, or somebody else's files


async def _check_free(listen: list[Multiaddr]) -> None:
    """``LocalError`` for an address that cannot be bound, found before a state folder is made for it."""
    for addr in listen:
        try:
            listener = await TcpTransport().listen(addr)
        except LocalError as error:
            from agorad.ports import holder  # only where it is needed

            by = holder(addr.port) if addr.port and "in use" in str(error) else ""
            taken = f" by {by}" if by else ""
            raise LocalError(f"{error}{taken}; name another address in node.listen") from error
        await listener.aclose()


async def _live(
    settings: Config,
    manifest: Manifest,
    identity: Identity,
    bus: Bus,
    listen: list[Multiaddr],
    announce: list[Multiaddr],
    role: Role,
    started_at: float,
    signals: AsyncIterator[int] | None,
    secret: str | None,
    lifeline: int | None,
) -> bool:
    rng = random.Random()
    manifest, known = manifests.restore(settings.node.state, manifest)
    steady = SteadyClock()
    host = Host(identity, emit=bus.emit, clock=steady, rng=rng, limits=limits_of(settings, manifest))
    dht = Dht(host, identity, clock=steady, rng=rng, emit=bus.emit)
    listener = control.listen(settings.control)
    try:
        async with trio.open_nursery() as services:
            async with host.run(listen), trio.open_nursery() as nursery:
                node = Node(
                    config=settings,
                    manifest=manifest,
                    identity=identity,
                    host=host,
                    dht=dht,
                    bus=bus,
                    nursery=nursery,
                    notifier=Notifier(),
                    rng=rng,
                    clock=steady,
                    steady=steady,
                    started_at=started_at,
                    secret=secret,
                )
                node.trust.known = known
                host.membership = Membership(node.trust, lambda: _presented(node), node.clock)
                host.announce = announce
                _apply_limits(node)
                node.inspector = probing.install(node)
                if signals is not None:
                    services.start_soon(_obey, signals, node)
                if lifeline is not None:
                    services.start_soon(_until_alone, lifeline, node)
                services.start_soon(node.notifier.watchdog)
                services.start_soon(node.notifier.starting)
                services.start_soon(node.notifier.tell, node.status_document)
                services.start_soon(_report_traffic, node)
                services.start_soon(_keep_pace, node)
                services.start_soon(node.pausing.run)
                await services.start(metrics.run, node)
                services.start_soon(Supervisor(node).run)
                install_commands(node)
                points.install(node)
                await services.start(
                    control_server.keep, settings.control, listener, node.commands, node.socket_made_again
                )
                node.learn_listed()
                nursery.start_soon(standing.watch, node)
                await nursery.start(dht.run, _bootstrap(manifest, settings.node.role, identity.peer_id))
                await _drain(node, role)
                node.stop("the role's work is done")
                node.farewells.append(dht.leave)
                with trio.move_on_after(FAREWELL_S):
                    for farewell in () if node.again else node.farewells:
                        await farewell()
                node.emit(node.traffic())
                nursery.cancel_scope.cancel()
            services.cancel_scope.cancel()  # after the host closed, so that it may say goodbye
        if node.ending is not None:
            raise node.ending
        return node.again
    finally:
        listener.close()
        with contextlib.suppress(OSError):  # on a disk that became read-only it stays, and is replaced
            settings.control.unlink(missing_ok=True)


def limits_of(settings: Config, manifest: Manifest) -> Limits:
    """An authority holds a connection for everybody who waits in its queue, beside its members'."""
    usual = Limits()
    if settings.node.role != "authority":
        return usual
    return attrs.evolve(usual, connections=usual.connections + manifest.admission.queue_limit)


async def _drain(node: Node, role: Role) -> None:
    """Run the role; once stopping is set it has ``DRAIN_S`` left."""

    async def enforce(scope: trio.CancelScope) -> None:
        await node.stopping.wait()
        scope.deadline = trio.current_time() + DRAIN_S

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(enforce, scope)
            await role(node)
        nursery.cancel_scope.cancel()


async def _report_traffic(node: Node) -> None:
    while True:
        await trio.sleep(TRAFFIC_S)
        node.emit(node.traffic())


async def _keep_pace(node: Node) -> None:
    while True:
        node.update_status()
        if (done := _done(node.status.get("microbatches"))) is not None:
            node.pace.note(trio.current_time(), done)
        await trio.sleep(TRAFFIC_S)


def _done(batches: Mapping[str, Any] | None) -> int | None:
    return None if not batches else batches.get("completed", batches.get("added"))


async def _until_alone(lifeline: int, node: Node) -> None:
    """Who started this node was killed, or it would have asked it to leave: nobody else will."""
    await trio.lowlevel.wait_readable(lifeline)
    node.stop("the command that started it is gone")


async def _obey(signals: AsyncIterator[int], node: Node) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            with contextlib.suppress(LocalError):  # the event said so
                node.reload()
        elif node.again:  # not again, then: this time to stay away
            node.again = False
            node.notifier.stopping()
        elif node.stopping.is_set():
            os._exit(128 + number)
        else:
            node.stop(f"asked to ({signal.Signals(number).name})")


def _apply_limits(node: Node) -> None:
    limits = node.config.limits
    node.host.upload.rate = None if limits.upload_mbps is None else limits.upload_mbps * 125_000
    node.host.download.rate = None if limits.download_mbps is None else limits.download_mbps * 125_000
    node.pausing.outside_hours = lambda now: hours.outside(limits.hours, now)


def _presented(node: Node) -> bytes | None:
    return None if node.certificate is None else node.certificate.encode()


def _bootstrap(manifest: Manifest, role: str, own: PeerId) -> list[tuple[PeerId, list[Multiaddr]]]:
    """Through whom a node finds the hash table: seeds, and authorities, in case no seed is up.

    A seed knows other seeds only: the first node of a run has nobody to wait for.
    """
    others = () if role == "seed" else manifest.authorities
    refs = (*manifest.seeds, *(ref for ref in others if ref.addrs))
    return [(ref.peer_id, ref.multiaddrs()) for ref in refs if ref.peer_id != own]


def _addresses(texts: tuple[str, ...], setting: str) -> list[Multiaddr]:
    try:
        return [Multiaddr.parse(text) for text in texts]
    except P2PError as error:
        raise LocalError(f"{setting}: {error}") from error


def start_time() -> float:
    """Unix time at which this process began, from /proc where there is one."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
