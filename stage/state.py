"""What a snapshot is on the wire: a manifest, signed by its donor, and chunks known by their hashes.

A snapshot is three vectors of the same length behind each other, little-endian fp32: weights, Adam's
first and second moment. Its manifest names the step, the layout's fingerprint (so that a stage never
loads another stage's or another model's state) and the SHA-256 of every CHUNK bytes. A newcomer checks
the donor's signature and that the manifest describes a state of its own stage before it allocates, then
takes chunks in any order, from anybody, each verified by itself.

Manifest: msgpack list [format, step, updates, fingerprint, floats, [hash, ...]]. Sans-IO, torch-free.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import attrs
import msgpack

from p2p.errors import RemoteError
from p2p.identity import Identity, PeerId, verify

FORMAT = 1
CHUNK = 1 << 20
VECTORS = 3
FLOAT_BYTES = 4
DOMAIN = "snapshot"
MAX_STEP = 1 << 62


def manifest_bytes(floats: int) -> int:
    """An upper bound for the encoded manifest of a state of that many weights."""
    return 256 + 34 * chunk_count(floats)


def chunk_count(floats: int) -> int:
    """Chunks of a state of that many weights."""
    return -(-VECTORS * FLOAT_BYTES * floats // CHUNK)


@attrs.frozen(slots=False)
class SnapshotManifest:
    """What a snapshot contains. ``floats`` counts one vector."""

    step: int
    updates: int
    fingerprint: str
    floats: int
    chunks: tuple[bytes, ...]

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that name this snapshot, whoever holds it."""
        return hashlib.sha256(self.encode()).digest()

    def check_layout(self, floats: int, fingerprint: str) -> None:
        """Raises RemoteError unless it is a state of a stage with that layout."""
        if self.floats != floats or self.fingerprint != fingerprint:
            raise RemoteError("snapshot: it is of another stage or another model")

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return VECTORS * FLOAT_BYTES * self.floats

    def chunk_size(self, index: int) -> int:
        """Bytes of a chunk; the last one may be short."""
        return min(CHUNK, self.size - index * CHUNK)

    def encode(self) -> bytes:
        """Canonical bytes: what is signed and what lies on disk."""
        fields = [FORMAT, self.step, self.updates, self.fingerprint, self.floats, list(self.chunks)]
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> SnapshotManifest:
        """Raises RemoteError if it is not a manifest that we can read."""
        try:
            value: Any = msgpack.unpackb(data, max_array_len=1 << 24, max_str_len=256, max_bin_len=32)
        except (ValueError, msgpack.UnpackException) as error:
            raise RemoteError(f"snapshot: the manifest cannot be read: {error}") from None
        if not isinstance(value, list) or len(value) != 6:
            raise RemoteError("snapshot: the manifest is not a list of 6 fields")
        version, step, updates, fingerprint, floats, chunks = value
        if version != FORMAT:
            raise RemoteError(f"snapshot: format {version!r}, this program reads format {FORMAT}")
        ok = (
            type(step) is int
            and 0 <= step < MAX_STEP
            and type(updates) is int
            and 0 <= updates < MAX_STEP
            and isinstance(fingerprint, str)
            and type(floats) is int
            and 0 < floats < 1 << 48
            and isinstance(chunks, list)
            and len(chunks) == chunk_count(floats)
            and all(isinstance(chunk, bytes) and len(chunk) == 32 for chunk in chunks)
        )
        if not ok:
            raise RemoteError("snapshot: a field of the manifest has the wrong type or is out of range")
        return cls(step, updates, fingerprint, floats, tuple(chunks))

    def signed(self, donor: Identity) -> bytes:
        """The donor's signature over it."""
        return donor.sign(DOMAIN, self.encode())

    def verify_chunk(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether these bytes are chunk ``index``."""
        return hashlib.sha256(data).digest() == self.chunks[index]


def open_manifest(donor: PeerId, data: bytes, signature: bytes) -> SnapshotManifest:
    """The manifest that this donor signed. Raises RemoteError."""
    if not verify(donor, DOMAIN, data, signature):
        raise RemoteError("snapshot: the manifest does not carry its donor's signature")
    return SnapshotManifest.decode(data)
