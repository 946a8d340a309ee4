"""What a role is given: one node of a run, the parts that all roles share.

A role registers its protocols on ``node.host`` and its commands in ``node.commands``, calls ``node.ready()``
once it serves, keeps ``node.status`` true, and returns when its work is done or soon after ``node.stopping``
is set. How a node comes about and ends: ``living``.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import attrs
import trio

from agorad import __version__, config, control, hours, probing, reachability, standing
from agorad.commands import Pace
from agorad.config import Config
from agorad.events import Bus, Ready, Reloaded, Stopping, Trouble
from agorad.exitcodes import DaemonExit
from agorad.metrics.book import Book
from agorad.metrics.readings import Readings
from agorad.notify import Notifier
from agorad.pausing import Pausing
from agorad.run import Manifest
from agorad.steady import SteadyClock
from agorad.supervision.levers import Levers
from p2p.errors import LocalError
from p2p.event import Event
from p2p.host import Host
from p2p.identity import Identity
from p2p.kad import Dht
from p2p.limits import Limits
from p2p.membership import Certificate, Trust
from stage.events import Traffic
from stage.traffic import BoundaryCount

ROUND_PROTOCOLS: Final = "/agora/round/"


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
            self.apply_limits()
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

    def apply_limits(self) -> None:
        """Give what the settings bound to who keeps the bounds."""
        limits = self.config.limits
        self.host.upload.rate = None if limits.upload_mbps is None else limits.upload_mbps * 125_000
        self.host.download.rate = None if limits.download_mbps is None else limits.download_mbps * 125_000
        self.pausing.outside_hours = lambda now: hours.outside(limits.hours, now)

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

    @property
    def microbatches_done(self) -> int | None:
        """By the role's own words; None where it counts none."""
        batches: Mapping[str, Any] = self.status.get("microbatches") or {}
        done: int | None = batches.get("completed", batches.get("added"))
        return done

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
        if self.microbatches_done is not None:
            found["microbatches"] = {**self.status["microbatches"], "per_minute": self.pace.per_minute()}
        if self.pausing.why:
            until = self.pausing.until
            found["paused"] = self.pausing.why
            found["paused_until"] = until if until is not None and math.isfinite(until) else None
        return found


def limits_of(settings: Config, manifest: Manifest) -> Limits:
    """An authority holds a connection for everybody who waits in its queue, beside its members'."""
    usual = Limits()
    if settings.node.role != "authority":
        return usual
    return attrs.evolve(usual, connections=usual.connections + manifest.admission.queue_limit)
