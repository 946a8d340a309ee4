"""A stage's state, downloaded while its node still waits in the queue.

The authority's word about the place names the stage where the node will probably go and brings a guest pass
for it (``p2p.passes``). ``run`` reads the stage's roster, which is open to guests, asks the freshest ACTIVE
replica, and installs what it got as a snapshot of this node's own: after the grant the node begins with it
like with a snapshot of an earlier life, and downloads again only if it is older than the run allows. While
the node waits on, it looks every ``LOOK_S`` whether that became so.

Limits: one download at a time; ``RETRY_S`` after donors that failed; those of ``stage.donor``.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from p2p.errors import LocalError, P2PError, Refused
from p2p.event import Emit
from p2p.host import Host
from stage.config import ModelConfig
from stage.events import FetchFailed
from stage.fetch import Fetch, Source
from stage.parameters import Layout, parameter_specs
from stage.roster import Roster
from stage.snapshot import SnapshotStore

LOOK_S = 30.0
RETRY_S = 5.0


class Ahead:
    """See the module's head."""

    def __init__(
        self,
        *,
        host: Host,
        roster: Roster,
        store: SnapshotStore,
        model: ModelConfig,
        stale_steps: Callable[[], int],
        emit: Emit,
    ) -> None:
        self.finished = False
        """Whether a state that the node may begin with is on the disk."""
        self.eta_s: float | None = None
        self._host = host
        self._roster = roster
        self._store = store
        self._model = model
        self._stale_steps = stale_steps
        self._emit = emit
        self._stage: int | None = None
        self._pass: bytes | None = None
        self._have: int | None = None
        """Step of the state of ``_stage`` that is on the disk."""
        self._news = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._scope = trio.CancelScope()

    def offered(self, stage: int, guest_pass: bytes | None) -> None:
        """The authority says where the node will probably go, and lets it download."""
        if stage != self._stage:
            self._stage, self.finished, self.eta_s = stage, False, None
            self._scope.cancel()
            self._news.set()
        self._pass = guest_pass

    async def run(self) -> None:
        """Download whatever is offered, until cancelled."""
        while True:
            self._news = trio.Event()
            stage, wait_s = self._stage, LOOK_S
            if stage is not None and self._pass is not None:
                with trio.CancelScope() as self._scope:
                    wait_s = LOOK_S if await self._look(stage) else RETRY_S
            with trio.move_on_after(wait_s):
                await self._news.wait()

    async def settle(self, stage: int, stopping: trio.Event) -> None:
        """The node was granted ``stage``: let a download of it end, drop any other."""
        self._pass = None
        if stage != self._stage:
            self._scope.cancel()
            return
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await stopping.wait()
                self._scope.cancel()

            nursery.start_soon(give_up)
            await self._idle.wait()
            nursery.cancel_scope.cancel()

    async def _look(self, stage: int) -> bool:
        """Whether there is nothing to do for a while."""
        view = self._roster.view(stage)
        await self._roster.refresh(view)
        donors = view.in_phase("active")
        if not donors:
            return True  # nobody to ask: what this stage begins with is made from the run's seed
        layout = Layout.of(parameter_specs(self._model, stage))
        self._have = await trio.to_thread.run_sync(self._step_on_disk, layout.fingerprint)
        newest = max(entry.record.step for entry in donors.values())
        if self._have is not None and newest - self._have <= self._stale_steps():
            self.finished, self.eta_s = True, 0.0
            return True
        self._idle = trio.Event()
        try:
            freshest = sorted(donors, key=lambda peer: -donors[peer].record.step)
            for donor in freshest:
                sources = [donor, *(other for other in freshest if other != donor)]
                try:
                    await self._fetch(
                        [Source(peer, donors[peer].addrs) for peer in sources], stage, layout, newest
                    )
                except (P2PError, trio.TooSlowError) as error:
                    why = error.why if isinstance(error, Refused) else str(error) or "too slow"
                    self._emit(FetchFailed(donor=donor, why=why))
                    continue
                return True
            return False
        finally:
            self._idle.set()

    async def _fetch(self, donors: list[Source], stage: int, layout: Layout, newest: int) -> None:
        def progress(done: int, left: int, seconds: float) -> None:
            if done:
                self.eta_s = left * seconds / done

        fetch = Fetch(
            self._host,
            stage,
            floats=layout.size,
            fingerprint=layout.fingerprint,
            store=self._store,
            emit=self._emit,
            guest_pass=self._pass,
            progress=progress,
        )
        with await fetch.run(donors, oldest=newest - self._stale_steps()) as file:
            self._have, self.finished, self.eta_s = file.manifest.step, True, 0.0

    def _step_on_disk(self, fingerprint: str) -> int | None:
        """Step of the newest snapshot, if it is one of this stage."""
        try:
            file = self._store.newest()
        except LocalError:
            return None
        if file is None:
            return None
        with file:
            return file.manifest.step if file.manifest.fingerprint == fingerprint else None
