"""A snapshot that is being downloaded, on the disk, so that what came outlives a break or a restart.

Two files beside the snapshots: ``incoming.data``, as large as the whole from the beginning (so that a full
disk is found before the download, not at its end), and ``incoming.manifest``, which says what it will be.
Opened again with the same manifest, every chunk is read and the sound ones are kept: nothing but the bytes
themselves says how far it came. Chunks that an own snapshot has are copied from it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from p2p.errors import LocalError, RemoteError
from stage.state import CHUNK, SnapshotManifest

NAME = "incoming"
RECENT_S = 120.0
"""A download that rested for less than this may go on where it stopped, however old its snapshot."""


class Chunks(Protocol):
    """Where a chunk may lie already: ``stage.snapshot.SnapshotFile`` is one."""

    @property
    def manifest(self) -> SnapshotManifest: ...
    def chunk(self, index: int) -> bytes: ...


class Incoming:
    """See the head of this file. Used by one thread at a time, but for ``take``."""

    def __init__(self, folder: Path, manifest: SnapshotManifest) -> None:
        """Open or begin it. Raises LocalError, e.g. when there is no room for the whole."""
        self.manifest = manifest
        self.folder = folder
        self._lock = threading.Lock()
        self.data = folder / f"{NAME}.data"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            begun = read_manifest(folder) == manifest and self.data.exists()
            if not begun:
                remove(folder)
            self._file = os.open(self.data, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise LocalError(f"{self.data}: {error.strerror}") from None
        try:
            os.posix_fallocate(self._file, 0, manifest.size)
            os.ftruncate(self._file, manifest.size)
            if not begun:
                part = folder / f"{NAME}.manifest.part"
                part.write_bytes(manifest.encode())
                part.rename(folder / f"{NAME}.manifest")
        except OSError as error:
            os.close(self._file)
            with contextlib.suppress(OSError):
                remove(folder)  # it would keep the room that something else needs
            raise LocalError(
                f"no room for a state of {manifest.size} bytes in {folder}: {error.strerror}"
            ) from None
        self._missing = set(range(len(manifest.chunks)))
        self.bytes_here = 0
        """Bytes of the chunks that are here."""
        if begun:
            for index in range(len(manifest.chunks)):
                if manifest.verify_chunk(index, self._read(index)):
                    self._have(index)

    @property
    def missing(self) -> frozenset[int]:
        """Chunks that are not here."""
        return frozenset(self._missing)

    def salvage(self, others: Iterable[Chunks]) -> None:
        """Copy the chunks that these snapshots have too; a damaged one is passed over."""
        for other in others:
            places = {digest: index for index, digest in enumerate(other.manifest.chunks)}
            for index in sorted(self._missing):
                place = places.get(self.manifest.chunks[index])
                if place is not None:
                    with contextlib.suppress(LocalError):
                        self.take(index, other.chunk(place))

    def take(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Keep a chunk; False if it is not what the manifest says. On any thread. Raises LocalError."""
        if len(data) != self.manifest.chunk_size(index) or not self.manifest.verify_chunk(index, data):
            return False
        try:
            written = os.pwrite(self._file, data, index * CHUNK)
        except OSError as error:
            raise LocalError(f"{self.data}: {error.strerror}") from None
        if written != len(data):
            raise LocalError(f"{self.data}: only {written} of {len(data)} bytes were written")
        self._have(index)
        return True

    def _have(self, index: int) -> None:
        with self._lock:
            if index in self._missing:
                self._missing.discard(index)
                self.bytes_here += self.manifest.chunk_size(index)

    def settle(self, path: Path) -> None:
        """Whole: flush the data and give them their name as a snapshot's. Raises OSError."""
        assert not self._missing
        os.fsync(self._file)
        self.data.rename(path)
        (self.folder / f"{NAME}.manifest").unlink(missing_ok=True)

    def close(self) -> None:
        """What is here stays, to go on with."""
        os.close(self._file)

    def _read(self, index: int) -> bytes:
        try:
            return os.pread(self._file, self.manifest.chunk_size(index), index * CHUNK)
        except OSError:
            return b""  # to be fetched again


def read_manifest(folder: Path) -> SnapshotManifest | None:
    """Of the download that lies there; None if there is none that can go on."""
    try:
        return SnapshotManifest.decode((folder / f"{NAME}.manifest").read_bytes())
    except (OSError, RemoteError):
        return None


def rested_s(folder: Path, now: float) -> float | None:
    """Seconds since the last chunk of it came, by the wall clock; None if there is none."""
    try:
        return now - (folder / f"{NAME}.data").stat().st_mtime
    except OSError:
        return None


def remove(folder: Path) -> None:
    """Forget the download that lies there. Raises OSError."""
    for suffix in ("manifest", "data"):
        (folder / f"{NAME}.{suffix}").unlink(missing_ok=True)
