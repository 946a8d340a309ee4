"""The hash table as its users know it: store, get, and staying part of it.

``store`` signs, keeps a copy at once (so a local ``get`` sees it), and sends it to the ``replicas``
nearest nodes, in the search for them (``placing``). ``get`` merges the answers of the ``quorum`` nearest
nodes that can be heard, and asks up to ``WIDE`` when all of them came back empty.

``run`` joins (seeds, and contacts lost earlier; jittered back-off, for ever), refreshes stale buckets,
asks a missing seed now and then so that two halves of a swarm find each other again, and at half the
life of a long-lived record of ours that was not replaced sends the *same* record to the nodes that are
nearest by then. Its end never moves: a record that its owner stops storing is over at its ttl. What this node
keeps of others it hands to newcomers nearer to it, and to its heirs when it leaves (``handover``).

Limits: ``MAX_OWN`` own records, ``MAX_RECENT`` remembered answers, and those of the parts. Times of records
are the clock's that was given; waiting uses trio's. Sources: Kademlia (2002); peers that fall apart into two
tables of the same seeds are hivemind's issue 624.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from p2p.errors import LocalError, P2PError, PeerGone, Refused, RemoteError
from p2p.event import Emit, ignore
from p2p.identity import Identity, PeerId
from p2p.kad.events import DhtIsolated, DhtJoined, RecordRefused
from p2p.kad.exchange import Exchange, remember
from p2p.kad.handover import Handover
from p2p.kad.ids import BITS, key_id, random_in_bucket
from p2p.kad.lookup import Lookup
from p2p.kad.merge import Merge
from p2p.kad.placing import WIDE, Placing
from p2p.kad.record import Record, seal
from p2p.kad.search import KadLimits, drive
from p2p.kad.table import MAX_ADDRS, Contact, Table
from p2p.multiaddr import Multiaddr

if TYPE_CHECKING:
    from p2p.host import Host

Seeds = Sequence[tuple[PeerId, Sequence[Multiaddr]]]

MAX_OWN: Final = 256
MAX_RECENT: Final = 256
RECENT_S: Final = 5.0
"""Age up to which ``get(fresh=False)`` answers from what it read last."""
RENEW_FROM_S: Final = 60.0
"""Life from which a record is sent again at its half; shorter ones are replaced or over by then."""
REFRESH_S: Final = 60.0
ASKED_SEEDS: Final = 2
"""Seeds that a refresh asks, of those that are missing."""
AROUND_S: Final = 10.0
"""At least so long between two refreshes by ``look_around``."""
STALE_S: Final = 600.0
FEW: Final = 128
"""Nodes of a swarm that is small enough to know all of it."""
RETRY_FIRST_S: Final = 0.5
RETRY_MOST_S: Final = 30.0


@attrs.define
class _Own:
    record: Record
    again_at: float
    """When it is sent to the then nearest nodes again, unless replaced before."""


@final
class Dht:
    """See the file's opening. One object a host; ``run`` it in a nursery of the host's life."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        *,
        clock: Callable[[], float] = time.time,
        rng: Random | None = None,
        emit: Emit = ignore,
        limits: KadLimits = KadLimits(),
    ) -> None:
        self.table = Table(identity.peer_id, k=limits.k)
        self.joined = trio.Event()
        """Set once another node answered (at once for a node that was given no seeds)."""
        self._identity = identity
        self._clock = clock
        self._rng = rng or Random()
        self._emit = emit
        self._limits = limits
        self._seq = 0
        self._alone = True
        self._unmet: list[Contact] = []
        self._nudge = trio.Event()
        self._around_at = -math.inf
        self._seeds: dict[PeerId, Contact] = {}
        self._own: OrderedDict[tuple[str, str], _Own] = OrderedDict()
        self._own_changed = trio.Event()
        self._recent: OrderedDict[str, tuple[float, dict[str, Record]]] = OrderedDict()
        self.asked = {"store": (0, 0.0), "get": (0, 0.0)}
        """How often this node stored or read something, and the seconds that took."""
        self.hops: Counter[int] = Counter()
        """Reads by how many questions one after the other they took."""
        self._exchange = Exchange(
            host,
            self.table,
            clock=clock,
            emit=emit,
            hop_s=limits.hop_s,
            patience_s=limits.patience_s,
            newcomer=self._newcomer,
            keeps=self._keeps,
        )
        self._placing = Placing(
            self._exchange, self.table, limits, emit=emit, keeps=self._keeps, lookup=self._lookup
        )
        self._handover = Handover(self._exchange, self.table, clock=clock, replicas=limits.replicas)
        self.records = self._exchange.records
        """What this node keeps for the swarm."""

    # Asking

    async def store(self, key: str, subkey: str, value: Any, *, ttl: float, deadline: float) -> int:
        """Sign and place a record; the number of nodes that keep it so far, this one included.

        Returns once ``placing.KEPT`` do, so that every read finds it, or when no more can be had. The rest
        of its nodes is told while ``run`` runs, within the ``deadline``, which is in seconds from now. Only
        ``LocalError`` is raised: a record that nobody else took is sent again once somebody is there.
        """
        now = self._clock()
        self._seq = max(self._seq + 1, int(now * 1e6))
        record = seal(self._identity, key, subkey, value, seq=self._seq, issued=now, ttl=ttl)
        if (key, subkey) not in self._own and len(self._own) >= MAX_OWN:
            self._forget_own(now)
            if len(self._own) >= MAX_OWN:
                raise LocalError(f"this node keeps {MAX_OWN} records of its own in the table already")
        self._exchange.verifier.remember(record)
        try:
            self.records.put(record, now)
        except Refused as error:  # our clock went back, or other people's records fill our store
            self._emit(RecordRefused(peer=self._identity.peer_id, key=key, code=error.code))
        self._own[key, subkey] = _Own(record, now + ttl / 2 if ttl >= RENEW_FROM_S else math.inf)
        self._own_changed.set()
        began = trio.current_time()
        try:
            return 1 + await self._placing.place(record, deadline)
        finally:
            self._asked("store", began)

    @property
    def placing(self) -> int:
        """Records of ours of which not all nodes that should keep them have been told yet."""
        return self._placing.at_work

    async def store_many(
        self, values: Mapping[tuple[str, str], Any], *, ttl: float, deadline: float
    ) -> dict[tuple[str, str], int]:
        """``store`` of several at once, by key and subkey; how many nodes keep each. Raises as it does."""
        kept: dict[tuple[str, str], int] = {}
        misused: list[LocalError] = []

        async def one(key: str, subkey: str, value: Any) -> None:
            try:
                kept[key, subkey] = await self.store(key, subkey, value, ttl=ttl, deadline=deadline)
            except LocalError as error:
                misused.append(error)

        async with trio.open_nursery() as nursery:
            for (key, subkey), value in values.items():
                nursery.start_soon(one, key, subkey, value)
        if misused:
            raise misused[0]
        return kept

    async def get(self, key: str, *, deadline: float, fresh: bool = True) -> dict[str, Record]:
        """The live records of a key, by subkey; empty if there are none.

        ``deadline`` is in seconds from now. Raises PeerGone when nobody could be asked, although
        there should be somebody: "nothing there" and "cannot tell" are different answers.
        """
        now = self._clock()
        if not fresh and (known := self._recent.get(key)) is not None and now < known[0] + RECENT_S:
            return {subkey: record for subkey, record in known[1].items() if record.expires > now}
        merge = Merge(self.records.get(key, now).values())
        # Where this node is one of the key's keepers, its own answer counts: a call less a read.
        need = max(1, self._limits.quorum - self._keeps(key_id(key)))
        lookup = self._lookup(key_id(key), need=need)
        heard: list[int] = []

        async def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
            nodes, records, member = await self._exchange.find_value(contact, key)
            merge.heard(contact.peer, records)
            heard.append(len(records))
            if not any(heard) and len(heard) >= need:
                lookup.widen(WIDE)
            return nodes, member

        began = trio.current_time()
        try:
            with trio.move_on_after(deadline):
                await drive(lookup, ask)
        finally:
            self._asked("get", began)
        self.hops[lookup.hops] += 1
        if not heard and (lookup.queries or self._seeds):
            raise PeerGone(f"no node of the hash table answered ({lookup.queries} were asked)")
        now = self._clock()
        found = merge.alive(now)
        remember(self._recent, key, (now, found), MAX_RECENT)
        return dict(found)

    def _asked(self, operation: str, began: float) -> None:
        count, seconds = self.asked[operation]
        self.asked[operation] = count + 1, seconds + trio.current_time() - began

    async def get_many(self, keys: Iterable[str], *, deadline: float) -> dict[str, dict[str, Record]]:
        """Several keys at once; those that could not be read are missing from the answer."""
        answers: dict[str, dict[str, Record]] = {}

        async def one(key: str) -> None:
            try:
                answers[key] = await self.get(key, deadline=deadline)
            except RemoteError:
                pass

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(one, key)
        return answers

    async def nearest(self, target: int, *, deadline: float) -> list[Contact]:
        """The nodes nearest to a place that answered, nearest first, at most k."""
        lookup = self._lookup(target, need=self._limits.k)

        async def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
            return await self._exchange.find_node(contact, target)

        with trio.move_on_after(deadline):
            await drive(lookup, ask)
        return lookup.result()

    # Keeping up

    async def run(
        self, seeds: Seeds, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Join and stay; never returns by itself. Started after the first attempt to join."""
        for peer, addrs in seeds:
            if peer != self.table.own:
                self._seeds[peer] = Contact(peer, tuple(str(addr) for addr in addrs)[:MAX_ADDRS])
        if not self._seeds:
            self.joined.set()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._placing.run)
            await nursery.start(self._stay_joined)
            nursery.start_soon(self._renew)
            nursery.start_soon(self._handover.run)
            task_status.started()

    async def leave(self) -> None:
        """Hand what we keep to those that come after us; call it before ``run`` ends, with a deadline."""
        await self._handover.leave()

    async def _stay_joined(self, *, task_status: trio.TaskStatus[None]) -> None:
        retry_s = RETRY_FIRST_S
        first = True
        while True:
            self._nudge = trio.Event()
            self._alone = self._alone or len(self.table) == 0
            if self._alone and await self._join():
                self._alone = False
                retry_s = RETRY_FIRST_S
            if first:
                first = False
                task_status.started()
            await self._meet()
            if not self._alone:
                await self._nudged_within(REFRESH_S * self._rng.uniform(0.75, 1.25))
                if len(self.table):
                    await self._refresh()
            elif self._seeds or self.table.lost:
                wait_s = retry_s * self._rng.uniform(0.5, 1.5)
                self._emit(DhtIsolated(retry_in=wait_s))
                await self._nudged_within(wait_s)
                retry_s = min(RETRY_MOST_S, 2 * retry_s)
            else:
                await self._nudge.wait()  # the first node: others come to us

    async def _nudged_within(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._nudge.wait()

    async def _join(self) -> bool:
        """One attempt to be part of the table, by everybody that might still be there."""
        began = trio.current_time()
        lookup = self._lookup(self.table.own_id, need=self._limits.k, start=self._candidates())

        async def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
            # The first call of a life dials, and seeds are few: give them more time than a hop.
            hop_s = 5 * self._limits.hop_s
            return await self._exchange.find_node(contact, self.table.own_id, hop_s=hop_s)

        await drive(lookup, ask)
        if len(self.table) == 0:
            return False
        self._unmet = lookup.unasked()
        self.joined.set()
        self._emit(DhtJoined(peers=len(self.table), seconds=trio.current_time() - began))
        self._send_all_again()
        return True

    async def _meet(self) -> None:
        """Where the whole swarm is few, ask everybody once: nobody has to be dialled at first use then."""
        named = {contact.peer: contact for contact in self._unmet}
        for contact in self._unmet:
            if contact.peer in self.table or len(named) + len(self.table) > FEW:
                continue
            try:  # about any place: those near us were named when we joined
                nodes, _ = await self._exchange.find_node(contact, self._rng.getrandbits(BITS))
            except (P2PError, trio.TooSlowError):
                continue  # gone since it was named
            fresh = [node for node in nodes if node.peer not in named and node.peer != self.table.own]
            named.update((node.peer, node) for node in fresh)
            self._unmet += fresh
        self._unmet = []

    def _candidates(self) -> list[Contact]:
        """Whom to ask when nobody is sure to be there."""
        known = [*self.table, *self.table.lost, *self._seeds.values()]
        return list({contact.peer: contact for contact in known}.values())

    async def _refresh(self) -> None:
        now = trio.current_time()
        deadline = 10 * self._limits.hop_s
        missing = [seed for peer, seed in self._seeds.items() if peer not in self.table]
        for seed in self._rng.sample(missing, min(ASKED_SEEDS, len(missing))):
            try:
                await self._exchange.find_node(seed, self.table.own_id)
            except (P2PError, trio.TooSlowError):
                pass  # a seed may be down; it is asked again next time
        await self.nearest(self.table.own_id, deadline=deadline)
        stale = self.table.stale(now - STALE_S)
        if stale:
            index = self._rng.choice(stale)
            await self.nearest(random_in_bucket(self.table.own_id, index, self._rng), deadline=deadline)
            self.table.refreshed(index, now)

    async def _renew(self) -> None:
        """Send records of ours again that were not replaced at half their life."""
        while True:
            self._own_changed = trio.Event()
            now = self._clock()
            self._forget_own(now)
            due = [own for own in self._own.values() if own.again_at <= now]
            for own in due:
                own.again_at = math.inf
                self._placing.forget(own.record.key)
                await self._placing.place(own.record, 10 * self._limits.hop_s)
            if not due:
                next_at = min((own.again_at for own in self._own.values()), default=math.inf)
                with trio.move_on_after(max(0.05, next_at - now)):
                    await self._own_changed.wait()

    def _send_all_again(self) -> None:
        """What was stored while nobody was there has only been kept by ourselves."""
        self._placing.forget_all()
        for own in self._own.values():
            own.again_at = -math.inf
        self._own_changed.set()

    def _forget_own(self, now: float) -> None:
        for place in [place for place, own in self._own.items() if own.record.expires <= now]:
            del self._own[place]

    def _keeps(self, target: int) -> bool:
        """Whether we are one of the nodes that should keep what lies there."""
        nearest = self.table.nearest(target, self._limits.replicas)
        full = len(nearest) == self._limits.replicas
        return not full or self.table.own_id ^ target < nearest[-1].id ^ target

    def _newcomer(self, contact: Contact) -> None:
        if self._alone:
            self._nudge.set()
        self._handover.newcomer(contact)
        self._placing.newcomer(contact)

    def look_around(self) -> None:
        """Refresh now, missing seeds included: something suggests that we see only a part of the swarm.

        Parts whose nodes know each other only do not notice it, until the next refresh asks a seed.
        """
        now = trio.current_time()
        if not self._alone and now >= self._around_at + AROUND_S:
            self._around_at = now
            self._nudge.set()

    # Looking up

    def _lookup(
        self, target: int, *, need: int, start: Iterable[Contact] | None = None, alpha: int | None = None
    ) -> Lookup:
        if start is None:
            start = self.table.nearest(target, self._limits.k)
            if not start:
                start = self._candidates()
                if not self._alone:
                    self._nudge.set()  # everybody was lost at once: join again now, not at the next refresh
        return Lookup(
            target,
            start,
            own=self.table.own,
            need=need,
            alpha=alpha or self._limits.alpha,
            patience=self._limits.patience_s,
        )
