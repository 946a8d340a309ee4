"""Snapshots of a stage on disk: written while training goes on, verified when read, served in chunks.

A snapshot is two files, ``NUMBER-step-STEP.state`` (the data, see ``stage.state``) and ``….manifest``,
with NUMBER counting up. Each is written under a temporary name, flushed to the disk and renamed, the
manifest last: a snapshot exists when its manifest does, so a crash leaves the one before. The newest two
are kept; beside them lies what has come of a download (``stage.incoming``). The writer reads tensors that
the optimizer holds for it, so it runs on any thread; saves of one store exclude each other.

Reading verifies every chunk. ``load`` raises LocalError with a sentence that names the damage;
``load_newest`` passes over what is damaged and says so in ``problems``.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

import attrs
import torch
from torch import Tensor

from p2p.errors import LocalError, RemoteError
from stage import incoming
from stage.incoming import Incoming
from stage.state import CHUNK, FLOAT_BYTES, VECTORS, SnapshotManifest

KEEP = 2
_NAME = re.compile(r"(\d{8})-step-(\d+)\.manifest")


class Source(Protocol):
    """What is written: ``stage.optimizer.Held`` is one."""

    @property
    def floats(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def read(self, vector: int, start: int, stop: int) -> Tensor: ...


@attrs.frozen
class State:
    """The whole state of a stage, read from disk or from a donor. Its vectors may lie in a mapped file."""

    vectors: tuple[Tensor, ...]
    """Weights, first and second moment, fp32."""
    step: int
    """Step of the run's clock that it belongs to."""
    updates: int
    fingerprint: str

    @classmethod
    def of(cls, manifest: SnapshotManifest, data: bytearray | mmap.mmap) -> State:
        """The vectors inside verified data, whose memory they share."""
        vectors = torch.frombuffer(data, dtype=torch.float32).view(VECTORS, manifest.floats)
        return cls(vectors.unbind(), manifest.step, manifest.updates, manifest.fingerprint)


class SnapshotFile:
    """One snapshot on disk, open: chunks stay readable even after newer ones pushed it out."""

    def __init__(self, manifest_path: Path) -> None:
        """Raises LocalError if it is not there or its manifest is damaged."""
        self.path = manifest_path.with_suffix(".state")
        try:
            self.manifest = SnapshotManifest.decode(manifest_path.read_bytes())
            self._file = self.path.open("rb")
        except RemoteError as error:
            raise LocalError(f"{manifest_path}: {error}") from None
        except OSError as error:
            raise LocalError(f"{manifest_path}: {error.strerror}") from None

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Chunks cannot be read any more."""
        self._file.close()

    @property
    def readable(self) -> Path:
        """A path at which its data can be opened, as long as this is open."""
        return Path(f"/proc/self/fd/{self._file.fileno()}")

    def chunk(self, index: int) -> bytes:
        """Chunk ``index``, verified."""
        if not 0 <= index < len(self.manifest.chunks):
            raise LocalError(f"{self.path}: there is no chunk {index}")
        size = self.manifest.chunk_size(index)
        try:
            data = os.pread(self._file.fileno(), size, index * CHUNK)
        except OSError as error:
            raise LocalError(f"{self.path}: {error.strerror}") from None
        if not self.manifest.verify_chunk(index, data):
            raise LocalError(f"{self.path}: damaged at byte {index * CHUNK} (chunk {index})")
        return data

    def chunks(self) -> Iterator[bytes]:
        """All chunks in order."""
        for index in range(len(self.manifest.chunks)):
            yield self.chunk(index)

    def load(self) -> State:
        """The whole state, mapped, not copied. Raises LocalError if a byte of it is not what was written."""
        for _ in self.chunks():
            pass
        return self.mapped()

    def mapped(self) -> State:
        """The whole state as it lies on the disk, for who has verified it already."""
        # A private mapping: torch wants memory that it may write to, and the file stays as it is.
        return State.of(self.manifest, mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY))


class SnapshotStore:
    """The folder that one stage's snapshots lie in; made when the first one is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        """Damage that ``load_newest`` met, one sentence each."""
        self._lock = threading.Lock()
        self._arriving = False

    def _manifests(self) -> list[tuple[int, int, Path]]:
        """(number, step, path), oldest first."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LocalError(f"{self.folder}: {error.strerror}") from None
        found = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
        return sorted((int(match[1]), int(match[2]), self.folder / name) for match, name in found)

    def newest_step(self) -> int | None:
        """Step of the newest snapshot, by its name."""
        found = self._manifests()
        return found[-1][1] if found else None

    def newest(self) -> SnapshotFile | None:
        """The newest snapshot, open; to be closed. Raises LocalError if its manifest is damaged."""
        with self._lock:
            found = self._manifests()
            return SnapshotFile(found[-1][2]) if found else None

    def all(self) -> list[SnapshotFile]:
        """Every snapshot whose manifest can be read, oldest first, open; to be closed."""
        found = []
        for _, _, path in self._manifests():
            with contextlib.suppress(LocalError):
                found.append(SnapshotFile(path))
        return found

    def load_newest(self) -> State | None:
        """The newest sound snapshot, None if there is none; ``problems`` names what was passed over."""
        for _, _, path in reversed(self._manifests()):
            try:
                with SnapshotFile(path) as file:
                    return file.load()
            except LocalError as error:
                self.problems.append(str(error))
        return None

    def save(self, source: Source) -> int:
        """Write a snapshot; returns its size in bytes. Raises LocalError, e.g. when the disk is full."""
        return self._write(source.step, source.updates, source.fingerprint, source.floats, _pieces(source))

    def find(self, digest: bytes) -> SnapshotFile | None:
        """The snapshot of that digest, open; None if it is not here (any more)."""
        with self._lock:
            for _, _, path in reversed(self._manifests()):
                with contextlib.suppress(LocalError):
                    file = SnapshotFile(path)
                    if file.manifest.digest == digest:
                        return file
                    file.close()
        return None

    def begun(self) -> SnapshotManifest | None:
        """Of the download that was broken off."""
        return incoming.read_manifest(self.folder)

    def rested_s(self) -> float | None:
        """Seconds since its last chunk came; None if there is none."""
        return incoming.rested_s(self.folder, time.time())

    def receive(self, manifest: SnapshotManifest) -> Incoming:
        """Begin to download a snapshot, or go on: what is here of it is kept. To be closed; one at a time.

        A state can be larger than the host's memory has room for. Raises LocalError when the disk is full.
        """
        arriving = Incoming(self.folder, manifest)
        with contextlib.ExitStack() as files:
            with self._lock:
                self._arriving = True
                own = []
                for _, _, path in reversed(self._manifests()):
                    with contextlib.suppress(LocalError):
                        own.append(files.enter_context(SnapshotFile(path)))
            arriving.salvage(own)
        return arriving

    def install(self, arrived: Incoming) -> SnapshotFile:
        """Keep a whole download as if we had saved it, without a copy. Open, to be closed."""
        manifest = arrived.manifest
        with self._lock:
            try:
                base = self._next(manifest.step)
                arrived.settle(base.with_suffix(".state"))
                self._publish(base, manifest)
            except OSError as error:
                raise LocalError(f"snapshot not saved in {self.folder}: {error.strerror}") from None
            return SnapshotFile(base.with_suffix(".manifest"))

    def let_go(self) -> None:
        """The download that ``receive`` began has ended, well or not."""
        self._arriving = False

    def _write(
        self, step: int, updates: int, fingerprint: str, floats: int, pieces: Iterable[memoryview]
    ) -> int:
        with self._lock:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                base = self._next(step)
                hashes = _write_file(base.with_suffix(".state"), pieces)
                manifest = SnapshotManifest(step, updates, fingerprint, floats, tuple(hashes))
                self._publish(base, manifest)
            except OSError as error:
                raise LocalError(f"snapshot not saved in {self.folder}: {error.strerror}") from None
        return manifest.size

    def _next(self, step: int) -> Path:
        """Name of the next snapshot, without an ending."""
        found = self._manifests()
        return self.folder / f"{found[-1][0] + 1 if found else 1:08d}-step-{step}"

    def _publish(self, base: Path, manifest: SnapshotManifest) -> None:
        """The data lie there: from now on it is a snapshot."""
        try:
            _write_file(base.with_suffix(".manifest"), [memoryview(manifest.encode())])
        except OSError:
            base.with_suffix(".state").unlink(missing_ok=True)
            raise
        _flush(self.folder)  # the new one is surely there before an old one goes
        self._tidy(KEEP)

    def discard_newest(self) -> None:
        """Remove the newest snapshot: it is whole, and no use. Raises LocalError."""
        with self._lock:
            try:
                for _, _, path in self._manifests()[-1:]:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".state").unlink(missing_ok=True)
            except OSError as error:
                raise LocalError(f"cannot remove a snapshot in {self.folder}: {error.strerror}") from None

    def clear(self) -> None:
        """Remove all snapshots: they are of no use any more. Raises LocalError."""
        while self.newest_step() is not None:
            self.discard_newest()

    def make_room(self) -> None:
        """Remove what is left of failed saves and downloads, and all snapshots but the newest.

        Raises LocalError.
        """
        with self._lock:
            try:
                if self.folder.exists():
                    self._tidy(1)
                    if not self._arriving:
                        incoming.remove(self.folder)
            except OSError as error:
                raise LocalError(f"no room was made in {self.folder}: {error.strerror}") from None

    def _tidy(self, keep: int) -> None:
        """Remove all but the newest, manifest first, and what a crash left behind."""
        manifests = self._manifests()
        kept = {path.stem for _, _, path in manifests[-keep:]}
        for _, _, path in manifests[:-keep]:
            path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.suffix == ".part" or (path.suffix == ".state" and path.stem not in kept):
                path.unlink(missing_ok=True)
        _flush(self.folder)


def _flush(folder: Path) -> None:
    """Names that were made or removed in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pieces(source: Source) -> Iterator[memoryview]:
    """The vectors' bytes, at most a chunk at a time, without a copy of the whole.

    Raises LocalError on a number that is not finite: such a state must not push a sound one out.
    """
    floats = CHUNK // FLOAT_BYTES
    for vector in range(VECTORS):
        for start in range(0, source.floats, floats):
            part = source.read(vector, start, min(start + floats, source.floats))
            if not bool(torch.isfinite(part).all()):
                raise LocalError("snapshot not saved: the state of this replica is not finite")
            yield part.detach().numpy().data.cast("B")


def _write_file(path: Path, pieces: Iterable[memoryview]) -> list[bytes]:
    """Write atomically; returns the SHA-256 of each CHUNK bytes."""
    hashes, digest, room = [], hashlib.sha256(), CHUNK
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                while len(piece) >= room:
                    digest.update(piece[:room])
                    hashes.append(digest.digest())
                    piece, digest, room = piece[room:], hashlib.sha256(), CHUNK
                digest.update(piece)
                room -= len(piece)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)  # on a full disk it would keep the room that the next one needs
        raise
    if room < CHUNK:
        hashes.append(digest.digest())
    return hashes
