"""The desk of an authority: joins, renewals and leavings, from the first word to the certificate.

``/agora/authority/1`` is open to guests: a guest asks to become a member here. A join is one stream that
lasts until the joiner is in or out: it is told what is being checked and its place in the queue, and tells
how far its download is. The order of the checks: the message's bounds, run and manifest (hello compared
them), protocols and software, clock, bans, account, its room, memory and disk, whether the key is in use
elsewhere, port, network, then the queue, and with the grant itself room in run and account once more.

Rules are in the modules beside this one, looking at a joiner from outside in ``agorad.probing``. The database
is asked in one worker thread, a question at a time. Limits: one stream a peer, ``JOINS`` joins being checked
at once, 10 s for a peer to say what it wants; those of looking are in ``agorad.probing``.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeVar

import attrs
import trio

from agorad import probing
from agorad.authority import accounts
from agorad.authority.admission import (
    Findings,
    check_alone,
    check_clock,
    check_machine,
    check_network,
    check_port,
    check_software,
    refusal,
)
from agorad.authority.assign import Choice, stage_needs
from agorad.authority.hub import Hub
from agorad.authority.issue import Capacity, Issuer
from agorad.authority.messages import (
    WHY_LIMIT,
    Bye,
    Checking,
    Granted,
    Join,
    Leave,
    Progress,
    Queued,
    Renew,
    read_request,
)
from agorad.authority.queue import Place, Queue
from agorad.authority.store import Grant, Store
from agorad.authority.waiting import Waiter, WaitingRoom
from agorad.events import JoinAnswered
from agorad.node import Node, limits_of
from p2p.errors import LocalError, Refused, RemoteError
from p2p.groups import plain
from p2p.hello import judge_again
from p2p.identity import PeerId
from p2p.membership import Certificate
from p2p.passes import LIFE_S
from p2p.rpc import Call

ASK_S: Final = 10.0
JOINS: Final = 256
LOOK_S: Final = 75.0
"""For a look from outside, waiting for its turn included."""
BUSY_S: Final = 2.0
SETTLE_S: Final = 60.0
"""After a start members have this long to renew what ran out meanwhile; they ask every 45 s at least."""
PASS_S: Final = LIFE_S / 2
"""Between two words to one who waits, so that its pass never ends."""
USUAL: Final = 100
"""Measured bandwidths of the last so many joiners say what is usual."""

T = TypeVar("T")


class Outside:
    """How joiners look from outside: ``agorad.probing``, through this node and others of the run."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def inspect(self, peer: PeerId, addrs: Sequence[str], enough_mbps: float) -> Findings:
        """Whether it can be reached, how far it is, and whether its line reaches ``enough_mbps`` (0: any)."""
        size = probing.MEASURE_BYTES if enough_mbps else 0
        return await probing.inspect(self._node, peer, addrs, bytes=size, enough_mbps=enough_mbps or math.inf)

    async def session_of(self, peer: PeerId, addrs: Sequence[str]) -> bytes | None:
        """The process that answers with the peer's key there."""
        return await probing.session_of(self._node, peer, addrs)


@attrs.frozen(kw_only=True)
class Joiner:
    """Who passed all checks."""

    peer: PeerId
    join: Join
    """Without its secret."""
    account: str
    before: Grant | None
    mbps: float | None
    warning: str


class Desk:
    """Serves joins, renewals and leavings."""

    def __init__(self, node: Node, store: Store, outside: Outside) -> None:
        self.node = node
        self.store = store
        self.outside = outside
        self.hub = Hub(node.config.authority.hub_endpoint)
        self.room = WaitingRoom(
            Queue(node.manifest.admission),
            clock=node.clock,
            capacity=self.capacity,
            save=self._save,
            forget=self._forget,
        )
        self._needs = stage_needs(node.manifest.model, node.manifest.training)
        self._thread = trio.CapacityLimiter(1)
        self._door = trio.Lock()
        self._peers: set[PeerId] = set()
        self._checking = 0
        self._began = trio.current_time()
        self._mbps: deque[float] = deque(maxlen=USUAL)
        self._closed = False

    async def close(self) -> None:
        """Close the database, behind the question that a thread may still be asking it."""
        with trio.CancelScope(shield=True):
            await self.ask(self._shut)

    def _shut(self) -> None:
        self._closed = True
        self.store.close()

    async def restore(self) -> None:
        """Take up the places that an earlier life left."""
        places = await self.ask(self.store.places)
        self.room.queue.restore(places, self.node.clock())

    async def serve(self, call: Call) -> None:
        """The handler of the protocol."""
        try:
            with trio.fail_after(ASK_S):
                request = read_request((await call.receive()).header)
        except trio.TooSlowError as error:
            raise RemoteError("a peer opened a join and said nothing") from error
        if isinstance(request, Leave):
            await self.ask(self.issuer.leave, call.peer, request.session, self.node.clock())
            self.room.changed()
            await call.send(Bye().to_header())
            return
        report = partial(JoinAnswered, peer=call.peer)
        account, stage = "", None
        try:
            with self._alone(call.peer):
                self._same_run(call)
                if isinstance(request, Renew):
                    certificate, why = await self._renew(call, request)
                else:
                    account, stage = request.account, request.stage
                    joiner = await self._check(call, request)
                    request = joiner.join  # the secret has served
                    certificate, why = await self._admit(call, joiner)
        except Refused as no:
            self.node.emit(report(account=account, stage=stage, outcome=no.code))
            raise
        self.node.emit(report(account=certificate.account, stage=certificate.stage, outcome="granted"))
        granted = Granted(certificate=certificate.encode(), account=certificate.account, why=why[:WHY_LIMIT])
        await call.send(granted.to_header())

    def take_manifest(self) -> None:
        """Go on by a newer manifest's rules; who waits is told what that means."""
        manifest = self.node.manifest
        self.room.queue.rules = manifest.admission
        self.node.host.limits = limits_of(self.node.config, manifest)  # of connections, with the queue's
        self._needs = stage_needs(manifest.model, manifest.training)
        self.room.changed()

    def _same_run(self, call: Call) -> None:
        """``Refused`` as hello found; but an odd certificate is no reason not to ask for a good one."""
        if self.node.host.membership is not None:
            judge_again(call.connection, self.node.host.membership)
        greeting, found = call.connection.hello, call.connection.refusal
        if greeting is None or found is None:
            return
        other = greeting.run != self.node.manifest.run.id
        if other or found.code in ("manifest_mismatch", "version_mismatch"):
            raise found

    @property
    def issuer(self) -> Issuer:
        """With the settings and the manifest of this moment."""
        return Issuer(
            identity=self.node.identity,
            manifest=self.node.manifest,
            store=self.store,
            needs=self._needs,
            lifetime_s=self.node.config.authority.lifetime_s,
            grace_s=self.node.config.authority.grace_s,
        )

    # a join

    async def _check(self, call: Call, join: Join) -> Joiner:
        rules, peer, now = self.node.manifest.admission, call.peer, self.node.clock()
        with self._few():
            warning = check_software(rules, join.facts.version, join.facts.software, now)
            check_clock(rules, join.facts.clock, now)
            account, before = await self._account(call, join)
            await self._check_room(peer, account)
            check_machine(rules, join.facts)
            findings = await self._look_at(call, join, before)
        return Joiner(
            peer=peer,
            join=attrs.evolve(join, secret=None),
            account=account,
            before=before,
            mbps=None if findings is None else findings.mbps,
            warning=warning,
        )

    async def _admit(self, call: Call, joiner: Joiner) -> tuple[Certificate, str]:
        before = joiner.before
        if before is not None and not before.left and before.expires > self.node.clock():
            certificate, choice = await self._grant(joiner, None)  # its place in the run is still its own
        else:
            certificate, choice = await self._queue(call, joiner)
        return certificate, ". ".join(filter(None, (choice.why, joiner.warning)))

    async def _account(self, call: Call, join: Join) -> tuple[str, Grant | None]:
        """Whose node this is, proven."""
        before = await self.ask(self.issuer.known, call.peer, join.account, self.node.clock())
        if self.node.manifest.admission.accounts == "file":
            await self.ask(self._by_file, join, before)
            return (join.account if before is None else before.account), before
        if join.secret is None:
            if before is None:
                raise refusal("secret_needed", "the first join of a node needs a Hugging Face token")
            return before.account, before
        await call.send(Checking(what="account").to_header())
        name = await self.hub.whoami(join.secret)
        if join.account not in ("", name):
            raise refusal("bad_token", f"the token is {name!r}'s, not {join.account!r}'s")
        await self.ask(self.issuer.known, call.peer, name, self.node.clock())
        return name, before

    async def _check_room(self, peer: PeerId, account: str) -> None:
        # Who waits is read before who is in: a node on its way from the one to the other is in both.
        waiting = self.room.of_account(account)
        await self.ask(self.issuer.check_account, account, peer, waiting, self.node.clock())

    def _by_file(self, join: Join, before: Grant | None) -> None:
        try:
            listed = accounts.load(self.node.config.authority.accounts)
        except LocalError as error:
            raise refusal("unavailable", "the authority cannot read its accounts", 30.0) from error
        if before is not None:
            listed.known(before.account)
        elif join.secret is None:
            listed.known(join.account)
            raise refusal("secret_needed", f"the first join for account {join.account!r} needs its secret")
        else:
            listed.authenticate(join.account, join.secret)

    async def _look_at(self, call: Call, join: Join, before: Grant | None) -> Findings | None:
        """Whether the key is in use elsewhere, the port open and the line good."""
        rules = self.node.manifest.admission
        await self._check_alone(call.peer, join.session, before)
        if not (rules.port_test or rules.max_rtt_ms or rules.min_mbps):
            return None
        if rules.port_test:
            await call.send(Checking(what="port").to_header())
        if rules.max_rtt_ms or rules.min_mbps:
            await call.send(Checking(what="network").to_header())
        try:
            with trio.fail_after(LOOK_S):
                findings = await self.outside.inspect(call.peer, join.addrs, rules.min_mbps)
        except trio.TooSlowError as error:
            said = f"nobody had the time to look at this node from outside within {LOOK_S:g} s"
            raise refusal("busy", said, BUSY_S) from error
        check_port(rules, findings, join.addrs)
        check_alone(findings.session, join.session)
        check_network(rules, findings)
        if findings.mbps is not None:
            self._mbps.append(findings.mbps)
        return findings

    async def _check_alone(self, peer: PeerId, session: bytes, before: Grant | None) -> None:
        """``Refused`` if the process that got the last certificate still answers, and is another."""
        if before is None or before.left or before.session in (session, b"") or not before.addrs:
            return
        if before.expires > self.node.clock():
            check_alone(await self.outside.session_of(peer, before.addrs), session)

    async def _queue(self, call: Call, joiner: Joiner) -> tuple[Certificate, Choice]:
        """Wait for a turn, telling the joiner; then grant."""
        async with self._door:  # of two nodes of an account only one comes in here at a time
            await self._check_room(joiner.peer, joiner.account)
            waiter = self.room.enter(joiner.peer, joiner.account)
        with self.room.waiting(waiter):
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear, call, waiter.place)
                    result = await self._until_granted(call, joiner, waiter)
                    nursery.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                cause = plain(group)
                if isinstance(cause, Refused):
                    await self.room.close(waiter.place, granted=False)
                raise cause from None
        return result

    async def _until_granted(self, call: Call, joiner: Joiner, waiter: Waiter) -> tuple[Certificate, Choice]:
        place = waiter.place
        while True:
            with trio.move_on_after(PASS_S):  # then nothing is new but the pass
                await waiter.news()
            if waiter.called:
                try:
                    result = await self._grant(joiner, place.stage, entering=True)
                except Refused as no:
                    if no.code not in ("full", "busy"):
                        raise
                    waiter.called = False  # another authority was faster: wait on
                    self.room.changed()
                else:
                    await self.room.close(place, granted=True)
                    return result
            elif waiter.out is not None:
                raise waiter.out
            elif waiter.view is not None:
                if place.stage is None:
                    waiting = self.room.stages(besides=joiner.peer)
                    place.stage = (await self.ask(self._choose, joiner, None, waiting)).stage
                await self.room.save(place)
                view = waiter.told = waiter.view
                queued = Queued(
                    position=view.position,
                    eta_s=view.eta_s,
                    paused=view.paused,
                    waitlisted=view.waitlisted,
                    stage=place.stage,
                    guest_pass=self.issuer.guest_pass(joiner.peer, place.stage, self.node.clock()),
                )
                await call.send(queued.to_header())

    async def _hear(self, call: Call, place: Place) -> None:
        """What a queued joiner says of its download; its stream's end frees nobody's place but its own."""
        while True:
            report = Progress.from_header((await call.receive()).header)
            self.room.queue.progress(
                place.peer, self.node.clock(), finished=report.finished, eta_s=report.eta_s
            )

    def _choose(
        self, joiner: Joiner, promised: int | None, waiting: Mapping[int, int] | None = None
    ) -> Choice:
        return self.issuer.choose(
            joiner.join,
            joiner.peer,
            self.node.clock(),
            promised=promised,
            waiting=waiting,
            mbps=joiner.mbps,
            usual_mbps=statistics.median(self._mbps) if self._mbps else None,
        )

    async def _grant(
        self, joiner: Joiner, promised: int | None, *, entering: bool = False
    ) -> tuple[Certificate, Choice]:
        def both() -> tuple[Certificate, Choice]:
            choice = self._choose(joiner, promised)  # nobody else is granted anything in between
            join, now = joiner.join, self.node.clock()
            self.issuer.check_move(join, joiner.peer, choice.stage, now)
            certificate = self.issuer.grant(
                join, joiner.peer, joiner.account, choice.stage, now, entering=entering
            )
            return certificate, choice

        return await self.ask(both)

    # a renewal

    async def _renew(self, call: Call, renew: Renew) -> tuple[Certificate, str]:
        now = self.node.clock()
        before = await self.ask(self.issuer.known, call.peer, "", now)
        await self._check_alone(call.peer, renew.session, before)
        warning = check_software(self.node.manifest.admission, None, renew.software, now)
        certificate = await self.ask(self.issuer.renew, renew, call.peer, self.node.clock())
        return certificate, warning

    # what it stands on

    async def ask(self, question: Callable[..., T], *args: object) -> T:
        """In the database's thread."""

        def in_thread() -> T:
            if self._closed:
                raise refusal("unavailable", "this authority is stopping", 5.0)
            return question(*args)

        return await trio.to_thread.run_sync(in_thread, limiter=self._thread)

    async def capacity(self) -> Capacity:
        """Whether the run takes nodes now."""
        settling = trio.current_time() - self._began < SETTLE_S
        return await self.ask(partial(self.issuer.capacity, self.node.clock(), settling=settling))

    async def _save(self, place: Place) -> None:
        await self.ask(self.store.place, place.peer, place.account, place.arrived, place.seen)

    async def _forget(self, peer: str) -> None:
        await self.ask(self.store.drop_place, peer)

    @contextmanager
    def _alone(self, peer: PeerId) -> Iterator[None]:
        if peer in self._peers:
            raise refusal("busy", "another request of this node is being answered already", BUSY_S)
        self._peers.add(peer)
        try:
            yield
        finally:
            self._peers.discard(peer)

    @contextmanager
    def _few(self) -> Iterator[None]:
        if self._checking >= JOINS:
            raise refusal("busy", f"{JOINS} other nodes are being looked at already", BUSY_S)
        self._checking += 1
        try:
            yield
        finally:
            self._checking -= 1
