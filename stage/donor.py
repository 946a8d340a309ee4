"""State for stage-mates: the donor's side of ``/agora/state/1``; the other is ``stage.fetch``.

Newcomers are members of the donor's stage, and nodes that wait in the queue and show a pass for it
(``p2p.passes``). The newcomer says which stage it wants, and perhaps which snapshot, by its digest: one of
which it has a part, or that it gets from another donor too. A donor that is ACTIVE gives that one if it has
it, else (unless nothing else is of use to the newcomer) it makes sure that its newest snapshot is of about
its present step and gives that: the manifest, its signature over it, then chunk by chunk what is asked for,
packed where that pays (``stage.packing``), at a pace that leaves the line to training (``stage.pacing``).
Files are read in threads.

A snapshot that was given stays readable for ``HOLD_S`` after its last reader, even when newer ones have
pushed it off the disk's folder: who lost the line goes on where it stopped.

Limits: ``NEWCOMERS`` members and ``GUESTS`` guests at a time, others are refused ``busy``; ``HELD`` snapshots
held; ``CHUNK_S`` for the next message of either side, ``GUEST_S`` for a guest's first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import attrs
import trio

from p2p import passes
from p2p.errors import LocalError, PeerGone, Refused, RemoteError
from p2p.hello import Admission, check_gate
from p2p.identity import Identity
from p2p.rpc import Call
from stage.pacing import TICK_S, Pace
from stage.packing import Packer
from stage.snapshot import SnapshotFile, SnapshotStore

PROTOCOL = "/agora/state/1"
NEWCOMERS = 2
GUESTS = 1
HELD = 2
HOLD_S = 120.0
CHUNK_S = 30.0
PACKED = 1
"""Chunks that wait, packed, behind the one that is being sent; one more is being packed."""
GUEST_S = 5.0
"""For a guest to show its pass."""
BUSY_S = 5.0


@attrs.frozen
class Parcel:
    """A chunk as it travels."""

    index: int
    data: bytes
    packed: bool


@attrs.define
class Given:
    """A snapshot that was given to somebody; its file is open."""

    file: SnapshotFile
    readers: int = 0
    last_at: float = 0.0
    """When its last reader left, ``trio.current_time``."""


class Donor:
    """Handler of ``/agora/state/1``."""

    def __init__(
        self,
        identity: Identity,
        store: SnapshotStore,
        stage: int,
        refresh: Callable[[], Awaitable[None]],
        membership: Admission | None,
    ) -> None:
        """``refresh`` makes the store's newest snapshot one of the present step, or raises Refused.

        ``membership`` judges who asks: the protocol is open to all, since a guest may show a pass.
        """
        self._identity = identity
        self._store = store
        self._stage = stage
        self._refresh = refresh
        self._membership = membership
        self._served = {"member": 0, "guest": 0}
        self._given: dict[bytes, Given] = {}
        """By digest, the one that was given last at the end."""

    async def handle(self, call: Call) -> None:
        """Serve one newcomer."""
        wanted = await self._wish(call)
        kind = self._judge(call, wanted.get("pass"))
        digest, only = self._read(wanted)
        limit = NEWCOMERS if kind == "member" else GUESTS
        if self._served[kind] >= limit:
            raise Refused("busy", f"{limit} newcomers are being served already", BUSY_S)
        self._served[kind] += 1
        try:
            given = await self._choose(digest, only)
            given.readers += 1
            try:
                await self._serve(call, given.file)
            finally:
                given.readers -= 1
                given.last_at = trio.current_time()
        finally:
            self._served[kind] -= 1

    def close(self) -> None:
        """Nobody is served any more."""
        for given in self._given.values():
            given.file.close()
        self._given.clear()

    def _read(self, wanted: dict[str, Any]) -> tuple[bytes, bool]:
        """The digest that is asked for and whether nothing else will do."""
        match wanted:
            case {"t": "want", "stage": self._stage, **more} if more.keys() <= {"pass", "snapshot", "only"}:
                digest, only = more.get("snapshot", b""), more.get("only", False)
                if isinstance(digest, bytes) and len(digest) in (0, 32) and type(only) is bool:
                    return digest, only
        raise Refused("wrong_stage", f"this replica has the state of stage {self._stage} only")

    async def _choose(self, digest: bytes, only: bool) -> Given:
        """The snapshot to give."""
        self._forget_old()
        given = self._given.pop(digest, None)
        if given is None:
            file = await trio.to_thread.run_sync(self._store.find, digest) if digest else None
            if file is None and only:
                raise Refused("not_here", "this replica does not have that snapshot")
            if file is None:
                await self._refresh()
                file = await trio.to_thread.run_sync(self._store.newest)
            if file is None:
                raise Refused("not_active", "this replica has no state to give", BUSY_S)
            given = self._given.pop(file.manifest.digest, None)
            if given is None:
                given = Given(file)
            else:
                file.close()  # it is open already
        self._given[given.file.manifest.digest] = given
        return given

    def _forget_old(self) -> None:
        spare = len(self._given) + 1 - HELD
        for digest, given in list(self._given.items()):
            if not given.readers and (spare > 0 or trio.current_time() - given.last_at > HOLD_S):
                self._given.pop(digest).file.close()
                spare -= 1

    async def _serve(self, call: Call, file: SnapshotFile) -> None:
        manifest = file.manifest
        await call.send({"t": "manifest", "signature": manifest.signed(self._identity)}, manifest.encode())
        ready, packed = trio.open_memory_channel[Parcel | Refused](PACKED)
        paced = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pack, call, file, ready)
            async for parcel in packed:
                if isinstance(parcel, Refused):
                    raise parcel  # behind the chunks that could be read
                if not paced:  # a newcomer may look through what it has before it asks: that is no slow line
                    paced = True
                    nursery.start_soon(_keep_pace, call)
                header = {"t": "chunk", "index": parcel.index, **({"packed": True} if parcel.packed else {})}
                with trio.fail_after(CHUNK_S):
                    await call.send(header, parcel.data)
            nursery.cancel_scope.cancel()

    async def _pack(
        self, call: Call, file: SnapshotFile, ready: trio.MemorySendChannel[Parcel | Refused]
    ) -> None:
        """Make ready what is asked for while what was asked for before is on its way."""
        packer = Packer()

        def read(index: int) -> Parcel:
            data = file.chunk(index)
            packed = packer.pack(data)
            return Parcel(index, data, False) if packed is None else Parcel(index, packed, True)

        async with ready:
            while True:
                try:
                    with trio.fail_after(CHUNK_S):
                        asked = (await call.receive()).header
                except PeerGone:
                    return  # the newcomer has what it wanted
                index = chunk_index(asked, len(file.manifest.chunks))
                try:
                    parcel = await trio.to_thread.run_sync(read, index)
                except LocalError as error:
                    self._given.pop(file.manifest.digest, None)
                    why = f"this replica cannot read its snapshot: {error}"
                    await ready.send(Refused("damaged", why, BUSY_S))
                    return
                await ready.send(parcel)

    async def _wish(self, call: Call) -> dict[str, Any]:
        """The first message. Who is no member, and shows no pass in it, hears what it lacks in any case."""
        lacks: Refused | None = None
        try:
            if self._membership is not None:
                check_gate(call.connection, self._membership)
        except Refused as refusal:
            lacks = refusal
        try:
            with trio.fail_after(CHUNK_S if lacks is None else GUEST_S):
                return (await call.receive()).header
        except (RemoteError, trio.TooSlowError):
            if lacks is not None:
                raise lacks from None
            raise

    def _judge(self, call: Call, shown: object) -> Literal["member", "guest"]:
        """``Refused`` unless the caller is a mate, or shows a pass for this stage."""
        membership = self._membership
        if call.member is None and isinstance(shown, bytes) and membership is not None:
            passes.check(shown, membership.trust, call.peer, self._stage, membership.clock())
            return "guest"
        if membership is not None:
            check_gate(call.connection, membership)
        if call.member is None or (call.member.role, call.member.stage) != ("worker", self._stage):
            raise Refused("wrong_stage", f"this replica has the state of stage {self._stage} only")
        return "member"


async def _keep_pace(call: Call) -> None:
    """Until cancelled: the download takes of the line what training leaves."""
    pace = Pace()
    try:
        while True:
            await trio.sleep(TICK_S)
            path = call.connection.path()
            if path is not None:
                call.connection.pace(pace.look(path))
    finally:
        call.connection.pace(None)


def chunk_index(header: dict[str, Any], chunks: int) -> int:
    """The chunk that a message is about. Raises RemoteError."""
    match header:
        case {"t": "chunk", "index": int(index)} if 0 <= index < chunks:
            return index
    raise RemoteError("state: not a message about one of the snapshot's chunks")
