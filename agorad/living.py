"""A node's life: what a role stands on is built, the role runs, and all of it ends in order.

Theory of operation. ``run_node`` builds in this order: state folder and locks, event bus and log, identity,
manifest, host with membership, control socket, hash table; then it calls the role's
``async def run(node: Node) -> None``. Whatever the role started in ``node.nursery`` is cancelled after it
returned, then the host closes its connections.

Stopping: the first SIGTERM or SIGINT sets ``node.stopping`` and gives the role ``DRAIN_S`` to return;
a second one ends the process at once. SIGHUP reads the configuration again: all or nothing, and only
what is looked up at use (the authority's settings and account file) changes. Limits: one role a
process; a role that overstays its drain is cancelled.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from agorad import (
    __version__,
    control,
    control_server,
    manifests,
    points,
    preflight,
    probing,
    standing,
    state_dirs,
)
from agorad.commands import install as install_commands
from agorad.config import Config
from agorad.events import Bus, Started, Stopped
from agorad.exitcodes import ExitCode, verdict
from agorad.log import Log
from agorad.metrics import serve as metrics
from agorad.node import Node, limits_of
from agorad.notify import Notifier
from agorad.run import Manifest
from agorad.steady import SteadyClock
from agorad.supervision.watch import Supervisor
from p2p.errors import LocalError, P2PError
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.kad import Dht
from p2p.membership import Membership
from p2p.multiaddr import Multiaddr
from p2p.transport import TcpTransport

TRAFFIC_S: Final = 5.0
"""Between two traffic reports, so that little of a killed node's is lost."""
DRAIN_S: Final = 27.0
"""A role has this long to hand back its work; the whole stop stays under 30 s."""
FAREWELL_S: Final = 1.0

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
                node.apply_limits()
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
        if (done := node.microbatches_done) is not None:
            node.pace.note(trio.current_time(), done)
        await trio.sleep(TRAFFIC_S)


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
