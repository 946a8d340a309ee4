"""State from a stage-mate: ``/agora/state/1``, both sides.

Newcomers are members of the donor's stage, and nodes that wait in the queue and show a pass for it
(``p2p.passes``). The newcomer says which stage it wants; the donor, if ACTIVE, makes sure that its newest
snapshot is of its present step, and answers with that snapshot's manifest and its signature over it. Then the
newcomer asks for chunks one after the other, several ahead, and checks each against the manifest. Both sides
read and write files in threads.

Limits: ``NEWCOMERS`` members and ``GUESTS`` guests at a time, others are refused ``busy``; ``AHEAD`` chunks
asked ahead; ``CHUNK_S`` for the next message of either side, ``GUEST_S`` for a guest's first; a manifest no
larger than one of this stage's size can be.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import attrs
import trio

from p2p import passes
from p2p.errors import PeerGone, Refused, RemoteError
from p2p.event import Emit
from p2p.hello import Admission, check_gate
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from stage.events import StateFetched, StateFetching
from stage.snapshot import SnapshotStore
from stage.state import CHUNK, Assembly, SnapshotManifest, manifest_bytes, open_manifest

PROTOCOL = "/agora/state/1"
NEWCOMERS = 2
GUESTS = 1
AHEAD = 4
CHUNK_S = 30.0
GUEST_S = 5.0
"""For a guest to show its pass."""
DIAL_S = 5.0
TELL_S = 2.0
"""Between two reports of a download."""


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

    async def handle(self, call: Call) -> None:
        """Serve one newcomer."""
        wanted = await self._wish(call)
        kind = self._judge(call, wanted.pop("pass", None))
        if wanted != {"t": "want", "stage": self._stage}:
            raise Refused("wrong_stage", f"this replica has the state of stage {self._stage} only")
        limit = NEWCOMERS if kind == "member" else GUESTS
        if self._served[kind] >= limit:
            raise Refused("busy", f"{limit} newcomers are being served already", 5.0)
        self._served[kind] += 1
        try:
            await self._refresh()
            file = await trio.to_thread.run_sync(self._store.newest)
            if file is None:
                raise Refused("not_active", "this replica has no state to give", 5.0)
            with file:
                manifest = file.manifest
                header = {"t": "manifest", "signature": manifest.signed(self._identity)}
                await call.send(header, manifest.encode())
                while True:
                    try:
                        with trio.fail_after(CHUNK_S):
                            asked = (await call.receive()).header
                    except PeerGone:
                        return  # the newcomer has what it wanted
                    index = _index(asked, len(manifest.chunks))
                    data = await trio.to_thread.run_sync(file.chunk, index)
                    with trio.fail_after(CHUNK_S):
                        await call.send({"t": "chunk", "index": index}, data)
        finally:
            self._served[kind] -= 1

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


@attrs.frozen
class Fetched:
    """A whole, verified state."""

    manifest: SnapshotManifest
    data: bytearray | mmap.mmap


async def fetch(
    host: Host,
    donor: PeerId,
    addrs: Sequence[Multiaddr],
    stage: int,
    *,
    floats: int,
    fingerprint: str,
    room: Callable[[int], bytearray | mmap.mmap],
    progress: Callable[[SnapshotManifest, int], None] = lambda _manifest, _done: None,
    guest_pass: bytes | None = None,
) -> Fetched:
    """A mate's state, in memory that ``room`` gives for its size; with a pass where we are no member yet.

    ``progress`` is told the bytes that are here: none once the manifest is, then after each chunk.

    Raises P2PError, or trio.TooSlowError when the donor stalls.
    """
    async with await host.call(donor, PROTOCOL, addrs=addrs, deadline=DIAL_S) as call:
        wish = {"t": "want", "stage": stage}
        await call.send(wish if guest_pass is None else {**wish, "pass": guest_pass})
        with trio.fail_after(CHUNK_S):
            answer = await call.receive(max_payload=manifest_bytes(floats))
        signature = answer.header.get("signature")
        if answer.header.get("t") != "manifest" or not isinstance(signature, bytes):
            raise RemoteError("state: the donor's first answer is not a manifest")
        manifest = open_manifest(donor, bytes(answer.payload), signature)
        assembly = Assembly(manifest, floats=floats, fingerprint=fingerprint, room=room)
        wanted = assembly.missing()
        asked = done = 0
        progress(manifest, done)
        while not assembly.complete:
            while asked < len(wanted) and asked < len(wanted) - len(assembly.missing()) + AHEAD:
                await call.send({"t": "chunk", "index": wanted[asked]})
                asked += 1
            with trio.fail_after(CHUNK_S):
                part = await call.receive(max_payload=CHUNK)
            index = _index(part.header, len(manifest.chunks))
            await trio.to_thread.run_sync(assembly.add, index, part.payload)
            done += len(part.payload)
            progress(manifest, done)
    return Fetched(*assembly.result())


class Telling:
    """Says in events how the download of a state goes: at its beginning, every ``TELL_S``, at its end."""

    def __init__(self, donor: PeerId, emit: Emit) -> None:
        self._donor = donor
        self._emit = emit
        self._began = trio.current_time()
        self._told = -TELL_S

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return trio.current_time() - self._began

    def progress(self, manifest: SnapshotManifest, done: int) -> None:
        """What ``fetch`` reports."""
        seconds = self.seconds
        if done and seconds - self._told < TELL_S:
            return
        self._told = seconds
        self._emit(
            StateFetching(
                donor=self._donor, step=manifest.step, bytes=done, size=manifest.size, seconds=seconds
            )
        )

    def installed(self, manifest: SnapshotManifest) -> None:
        """The state is where it belongs."""
        self._emit(
            StateFetched(donor=self._donor, step=manifest.step, bytes=manifest.size, seconds=self.seconds)
        )


def _index(header: dict[str, Any], chunks: int) -> int:
    match header:
        case {"t": "chunk", "index": int(index)} if 0 <= index < chunks:
            return index
    raise RemoteError("state: not a message about one of the snapshot's chunks")
