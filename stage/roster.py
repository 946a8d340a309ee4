"""Who serves which stage: what the DHT says, checked, and this replica's own entry in it.

``Roster`` keeps a view of each stage that its owner cares about (own and next for a worker, the
first for a trainer). A view is refreshed every ``REFRESH_S`` and on request; a record counts only with
a certificate of this run for that peer, role and stage. ``Declaration`` stores the replica's own
record every ``DECLARE_S``, and at once when something that others act on has changed. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import trio

from p2p.errors import P2PError
from p2p.identity import PeerId
from p2p.kad import Dht
from p2p.membership import Certificate, Trust
from p2p.multiaddr import Multiaddr
from p2p.records import StageRecord, read_all, stage_key

REFRESH_S = 2.0
DECLARE_S = 3.0
TTL_S = 15.0
"""A replica that died is forgotten after this; callers notice much sooner by themselves."""
DEADLINE_S = 5.0
SERVING = ("warming", "active")
MATES = ("syncing", "warming", "active")


@attrs.frozen
class Entry:
    """One replica, by its own word and its certificate."""

    peer: PeerId
    record: StageRecord
    addrs: list[Multiaddr]
    seen_at: float
    """Sequence of its newest record: grows with each."""


class StageView:
    """The live replicas of one stage."""

    def __init__(self, stage: int, generation: Callable[[], int] = lambda: 0) -> None:
        """``generation``: roll-backs that the run has seen; states of others are not those of mates."""
        self.stage = stage
        self._generation = generation
        self.entries: dict[PeerId, Entry] = {}
        self._serving: dict[PeerId, float] = {}
        self._changed = trio.Event()

    def serving(self) -> Mapping[PeerId, float]:
        """Replicas that take microbatches, and when each last spoke; the same object until that changes."""
        return self._serving

    def in_phase(self, *phases: str) -> dict[PeerId, Entry]:
        """Replicas in one of these phases whose state is of this node's generation."""
        return {
            peer: entry
            for peer, entry in self.entries.items()
            if entry.record.phase in phases and entry.record.generation == self._generation()
        }

    def places(self, peer: PeerId) -> int:
        """Microbatches that a replica can work on at the same time."""
        entry = self.entries.get(peer)
        return entry.record.slots + (entry.record.working or 0) if entry else 0

    def addrs(self, peer: PeerId) -> list[Multiaddr]:
        entry = self.entries.get(peer)
        return entry.addrs if entry else []

    def replace(self, entries: dict[PeerId, Entry]) -> None:
        if entries != self.entries:
            self.entries = entries
            self._serving = {peer: e.seen_at for peer, e in entries.items() if e.record.phase in SERVING}
            changed, self._changed = self._changed, trio.Event()
            changed.set()

    async def wait_changed(self) -> None:
        await self._changed.wait()


class Roster:
    """Views of several stages, refreshed from the DHT."""

    def __init__(
        self, dht: Dht, trust: Trust, now: Callable[[], float], generation: Callable[[], int] = lambda: 0
    ) -> None:
        self._generation = generation
        self._dht = dht
        self._trust = trust
        self._now = now
        self._views: dict[int, StageView] = {}

    def view(self, stage: int) -> StageView:
        """The view of a stage; from the first call on it is kept fresh."""
        return self._views.setdefault(stage, StageView(stage, self._generation))

    async def run(self) -> None:
        """Keeps the views fresh until cancelled."""
        while True:
            for view in list(self._views.values()):
                await self.refresh(view)
            await trio.sleep(REFRESH_S)

    async def refresh(self, view: StageView) -> None:
        """Read one stage's records now. A DHT that does not answer leaves the view as it is."""
        try:
            records = await self._dht.get(stage_key(self._trust.run, view.stage), deadline=DEADLINE_S)
        except (P2PError, trio.TooSlowError):
            return
        entries = {}
        for owner, record in read_all(StageRecord, records).items():
            entry = self._entry(view.stage, owner, record, records[owner].seq)
            if entry is not None:
                entries[owner] = entry
        view.replace(entries)

    def _entry(self, stage: int, owner: PeerId, record: StageRecord, seq: int) -> Entry | None:
        try:
            member = self._trust.check(Certificate.decode(record.certificate), owner, self._now())
            addrs = [Multiaddr.parse(addr) for addr in record.addrs]
        except P2PError:
            return None
        if member.role != "worker" or member.stage != stage:
            return None
        return Entry(owner, record, addrs, float(seq))


class Declaration:
    """This replica's own record, kept in the DHT while ``run`` runs."""

    def __init__(self, dht: Dht, run: str, stage: int, peer: PeerId, describe: Callable[[], StageRecord]):
        self._dht = dht
        self._key = stage_key(run, stage)
        self._peer = peer
        self._describe = describe
        self._dirty = trio.Event()

    def changed(self) -> None:
        """Something that others act on (the phase) is new: store it now, not in some seconds."""
        self._dirty.set()

    async def run(self) -> None:
        while True:
            self._dirty = trio.Event()
            await self._store(self._describe(), TTL_S)
            with trio.move_on_after(DECLARE_S):
                await self._dirty.wait()

    async def withdraw(self) -> None:
        """Say that this replica is leaving, so that nobody has to find out."""
        await self._store(attrs.evolve(self._describe(), phase="leaving"), TTL_S)

    async def _store(self, record: StageRecord, ttl_s: float) -> None:
        try:
            value = record.to_value()
            await self._dht.store(self._key, self._peer, value, ttl=ttl_s, deadline=DEADLINE_S)
        except (P2PError, trio.TooSlowError):
            pass  # the next declaration is seconds away, and the old record still stands
