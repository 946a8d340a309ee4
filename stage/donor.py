"""State from a stage-mate: ``/agora/state/1``, both sides.

The newcomer says which stage it is of; the donor, if ACTIVE, makes sure that its newest snapshot is of its
present step, and answers with that snapshot's manifest and its signature over it. Then the newcomer asks
for chunks one after the other, several ahead, and checks each against the manifest. Both sides read and
write files in threads.

Limits: ``NEWCOMERS`` at a time, others are refused ``busy``; ``AHEAD`` chunks asked ahead; ``CHUNK_S`` for
the next message of either side; a manifest no larger than one of this stage's size can be.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import attrs
import trio

from p2p.errors import PeerGone, Refused, RemoteError
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from stage.snapshot import SnapshotStore
from stage.state import CHUNK, Assembly, SnapshotManifest, manifest_bytes, open_manifest

PROTOCOL = "/agora/state/1"
NEWCOMERS = 2
AHEAD = 4
CHUNK_S = 30.0
DIAL_S = 5.0


class Donor:
    """Handler of ``/agora/state/1``."""

    def __init__(
        self,
        identity: Identity,
        store: SnapshotStore,
        stage: int,
        refresh: Callable[[], Awaitable[None]],
    ) -> None:
        """``refresh`` makes the store's newest snapshot one of the present step, or raises Refused."""
        self._identity = identity
        self._store = store
        self._stage = stage
        self._refresh = refresh
        self._newcomers = 0

    async def handle(self, call: Call) -> None:
        """Serve one newcomer."""
        with trio.fail_after(CHUNK_S):
            wanted = (await call.receive()).header
        mate = call.member is not None and (call.member.role, call.member.stage) == ("worker", self._stage)
        if wanted != {"t": "want", "stage": self._stage} or not mate:
            raise Refused("wrong_stage", f"this replica has the state of stage {self._stage} only")
        if self._newcomers >= NEWCOMERS:
            raise Refused("busy", f"{NEWCOMERS} newcomers are being served already", 5.0)
        self._newcomers += 1
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
            self._newcomers -= 1


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
) -> Fetched:
    """A mate's state, in memory that ``room`` gives for its size.

    ``progress`` is told the bytes that are here: none once the manifest is, then after each chunk.

    Raises P2PError, or trio.TooSlowError when the donor stalls.
    """
    async with await host.call(donor, PROTOCOL, addrs=addrs, deadline=DIAL_S) as call:
        await call.send({"t": "want", "stage": stage})
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


def _index(header: dict[str, Any], chunks: int) -> int:
    match header:
        case {"t": "chunk", "index": int(index)} if 0 <= index < chunks:
            return index
    raise RemoteError("state: not a message about one of the snapshot's chunks")
