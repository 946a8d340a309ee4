"""State from stage-mates: the newcomer's side of ``/agora/state/1``; the other is ``stage.donor``.

The first donor that is asked chooses the snapshot. Others are asked for the very same one, by its digest,
and those that have it (replicas that took it from the same donor, or whose states are equal) send part of
it. A part that an earlier attempt left on the disk is named to the first donor, which goes on with it if it
still holds it; whoever has it may. What to ask whom is ``stage.download``; each chunk is checked against the
manifest in a thread and lies on the disk before the next is asked (``stage.incoming``). The download goes on
as long as one donor does.

Limits: ``HELPERS`` donors beside the first, asked only while ``WORTH_HELP`` chunks are missing; ``CHUNK_S``
for the next message of a donor; a manifest no larger than one of this stage's size can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import attrs
import trio

from p2p.errors import P2PError, RemoteError
from p2p.event import Emit
from p2p.host import Host
from p2p.identity import PeerId
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from stage import checkpoints
from stage.donor import CHUNK_S, PROTOCOL, chunk_index
from stage.download import AHEAD, Download
from stage.events import ChunkBad, StateFetched, StateFetching
from stage.incoming import RECENT_S
from stage.packing import unpack
from stage.snapshot import SnapshotFile, SnapshotStore
from stage.state import CHUNK, SnapshotManifest, manifest_bytes, open_manifest

HELPERS = 2
WORTH_HELP = 8
DIAL_S = 5.0
TELL_S = 2.0
"""Between two reports of a download."""


class Arriving(checkpoints.Arriving, Protocol):
    """What a state is taken into."""

    @property
    def bytes_here(self) -> int:
        """Of its chunks that came."""


A = TypeVar("A", bound=Arriving)


@attrs.frozen
class Source:
    """A mate that may have the state."""

    peer: PeerId
    addrs: Sequence[Multiaddr]


class Fetch:
    """One download, from its first question to a snapshot of our own."""

    def __init__(
        self,
        host: Host,
        stage: int,
        *,
        floats: int,
        fingerprint: str,
        store: SnapshotStore | None,
        emit: Emit,
        guest_pass: bytes | None = None,
        progress: Callable[[int, int, float], None] = lambda _done, _size, _seconds: None,
    ) -> None:
        """``floats`` and ``fingerprint`` are those of our own stage's layout.

        ``store``: where ``run`` installs the state. ``guest_pass`` is shown where we are no member yet;
        ``progress`` hears bytes that came, bytes still to come, seconds.
        """
        self._host = host
        self._stage = stage
        self._floats = floats
        self._fingerprint = fingerprint
        self._store = store
        self._emit = emit
        self._pass = guest_pass
        self._progress = progress
        self.resumed = False
        """Whether it went on with what an earlier attempt had left."""

    async def run(self, donors: Sequence[Source], *, oldest: int = 0) -> SnapshotFile:
        """The state of the first donor, installed in the store as our newest snapshot; to be closed.

        A part on the disk is gone on with if it is of step ``oldest`` or newer, or came a moment ago. Raises
        P2PError, or trio.TooSlowError when the donor stalls; what came stays on the disk.
        """
        assert self._store is not None
        first, *others = donors
        digest = await trio.to_thread.run_sync(self._begun, self._store, oldest)
        async with await self._host.call(first.peer, PROTOCOL, addrs=first.addrs, deadline=DIAL_S) as call:
            manifest = await self._ask(call, {"snapshot": digest} if digest else {})
            self.resumed = manifest.digest == digest
            arriving = await trio.to_thread.run_sync(self._store.receive, manifest)
            try:
                telling = _Telling(first.peer, arriving, self._emit, self._progress)
                lines = _Lines(arriving, telling, self._emit)
                await self._all(lines, call, others)
                file = await trio.to_thread.run_sync(self._store.install, arriving)
            finally:
                arriving.close()
                self._store.let_go()
        telling.installed()
        return file

    async def weights(self, donors: Sequence[Source], begin: Callable[[SnapshotManifest], A]) -> A:
        """What ``begin`` makes of the first donor's present state, with the chunks that it wants of it.

        Nothing is installed. Raises P2PError, or trio.TooSlowError when the donor stalls.
        """
        first, *others = donors
        async with await self._host.call(first.peer, PROTOCOL, addrs=first.addrs, deadline=DIAL_S) as call:
            arriving = begin(await self._ask(call, {}))
            telling = _Telling(first.peer, arriving, self._emit, self._progress)
            await self._all(_Lines(arriving, telling, self._emit), call, others)
        return arriving

    def _begun(self, store: SnapshotStore, oldest: int) -> bytes:
        """Digest of the download that lies on the disk and is worth going on with; empty if none is."""
        manifest, rested_s = store.begun(), store.rested_s()
        if manifest is None or rested_s is None:
            return b""
        return manifest.digest if manifest.step >= oldest or rested_s < RECENT_S else b""

    async def _all(self, lines: _Lines, call: Call, others: Sequence[Source]) -> None:
        """Until every chunk is there, or the last donor is gone."""
        failure: list[Exception] = []

        async def draw_first() -> None:
            try:
                await lines.draw(call)
            except (P2PError, trio.TooSlowError) as error:
                failure.append(error)

        if lines.download.complete:
            return
        async with trio.open_nursery() as nursery:
            lines.complete = nursery.cancel_scope.cancel
            nursery.start_soon(draw_first)
            if lines.download.left > WORTH_HELP:
                for helper in others[:HELPERS]:
                    nursery.start_soon(self._help, lines, helper)
        if not lines.download.complete:
            raise failure[0]

    async def _help(self, lines: _Lines, helper: Source) -> None:
        wish = {"snapshot": lines.manifest.digest, "only": True}
        try:
            call = await self._host.call(helper.peer, PROTOCOL, addrs=helper.addrs, deadline=DIAL_S)
            async with call:
                if (await self._ask(call, wish)).digest != lines.manifest.digest:
                    raise RemoteError("state: the donor gives another snapshot than was asked for")
                await lines.draw(call)
        except (P2PError, trio.TooSlowError):
            pass  # the first donor has all of it

    async def _ask(self, call: Call, wish: dict[str, Any]) -> SnapshotManifest:
        shown = {} if self._pass is None else {"pass": self._pass}
        await call.send({"t": "want", "stage": self._stage, **shown, **wish})
        with trio.fail_after(CHUNK_S):
            answer = await call.receive(max_payload=manifest_bytes(self._floats))
        signature = answer.header.get("signature")
        if answer.header.get("t") != "manifest" or not isinstance(signature, bytes):
            raise RemoteError("state: the donor's first answer is not a manifest")
        manifest = open_manifest(call.peer, bytes(answer.payload), signature)
        manifest.check_layout(self._floats, self._fingerprint)
        return manifest


class _Lines:
    """The calls of one download, and what comes through them."""

    def __init__(self, arriving: Arriving, telling: _Telling, emit: Emit) -> None:
        self.manifest = arriving.manifest
        self.download: Download[PeerId] = Download(arriving.missing)
        self.complete: Callable[[], None] = lambda: None
        """Called once the last chunk is there."""
        self._arriving = arriving
        self._telling = telling
        self._emit = emit

    async def draw(self, call: Call) -> None:
        """Take chunks from one donor until all are there. Raises P2PError, trio.TooSlowError."""
        download, donor = self.download, call.peer
        try:
            while not download.complete:
                while (index := download.ask(donor)) is not None:
                    await call.send({"t": "chunk", "index": index})
                with trio.fail_after(CHUNK_S):
                    part = await call.receive(max_payload=CHUNK, ahead=(AHEAD - 1) * CHUNK)
                index = chunk_index(part.header, len(self.manifest.chunks))
                packed = part.header.get("packed", False) is True
                good = await trio.to_thread.run_sync(self._take, index, part.payload, packed)
                if not good:
                    self._emit(ChunkBad(donor=donor, chunk=index))
                download.came(donor, index, good=good)
                self._telling.came(len(part.payload))
        finally:
            download.gone(donor)
        self.complete()

    def _take(self, index: int, data: memoryview, packed: bool) -> bool:
        try:
            plain = unpack(data, self.manifest.chunk_size(index)) if packed else data
        except RemoteError:
            return False
        return self._arriving.take(index, plain)


class _Telling:
    """Says in events how a download goes: at its beginning, every ``TELL_S``, at its end."""

    def __init__(
        self, donor: PeerId, arriving: Arriving, emit: Emit, progress: Callable[[int, int, float], None]
    ) -> None:
        self._donor = donor
        self._arriving = arriving
        self._manifest = arriving.manifest
        self._emit = emit
        self._progress = progress
        self._began = trio.current_time()
        self._told = -TELL_S
        self._kept = arriving.bytes_here
        self._line = 0
        self._tell()

    def came(self, size: int) -> None:
        """A chunk did, as ``size`` bytes."""
        self._line += size
        here = self._arriving.bytes_here
        self._progress(here - self._kept, self._manifest.size - here, trio.current_time() - self._began)
        if trio.current_time() - self._began - self._told >= TELL_S:
            self._tell()

    def _tell(self) -> None:
        self._told = trio.current_time() - self._began
        self._emit(
            StateFetching(
                donor=self._donor,
                step=self._manifest.step,
                bytes=self._arriving.bytes_here,
                size=self._manifest.size,
                seconds=self._told,
            )
        )

    def installed(self) -> None:
        """The state is where it belongs."""
        self._emit(
            StateFetched(
                donor=self._donor,
                step=self._manifest.step,
                bytes=self._manifest.size,
                kept=self._kept,
                line=self._line,
                seconds=trio.current_time() - self._began,
            )
        )
