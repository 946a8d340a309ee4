"""The run's checkpoint store: whole states of every stage, where they outlive all replicas.

A store is a folder of any file system that fsspec knows (a local path, ``s3://bucket/folder``,
``hf://datasets/owner/name/folder``), below it ``RUN/stage-S``. A checkpoint of a stage is two files there,
like a snapshot: ``STEP.state`` (the data) and ``STEP.manifest``, the snapshot's manifest under the signature
of its writer, one of those that the run's operator named. ``latest``, written after both, lists what there
is, newest last: a checkpoint exists once it stands there, so a writer that dies in between changed nothing.
One that is pushed out leaves the list first.

A roll-back opens a new *generation*: of those before, checkpoints up to the step that it goes back to count,
later ones do not, and the next writer removes them.

Calls block and are for threads. Everything that goes wrong is a LocalError with a sentence. Torch-free; a
file system's own package is imported when a store of its kind is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol

import attrs
import msgpack

from p2p.errors import LocalError, P2PError, RemoteError
from p2p.identity import Identity, PeerId, verify
from stage.hub_commit import commit
from stage.state import CHUNK, SnapshotManifest, manifest_bytes

FORMAT = 1
DOMAIN = "checkpoint"
LIST = "latest"
LIST_LIMIT = 1 << 20
READERS = 4
"""Chunks that are read at a time."""
TIMES = 3
"""How often a chunk that is not what its manifest says is read."""


@attrs.frozen(order=True)
class Entry:
    """A checkpoint in the list."""

    step: int
    generation: int = 0
    """Roll-backs that the run had seen when it was written."""


@attrs.frozen
class Line:
    """Which checkpoints count: all of ``generation``, and of those before the ones up to ``back_to``."""

    generation: int = 0
    back_to: int = 0

    def counts(self, entry: Entry) -> bool:
        return entry.generation == self.generation or (
            entry.generation < self.generation and entry.step <= self.back_to
        )


class Arriving(Protocol):
    """What a checkpoint is read into: ``stage.incoming.Incoming`` is one. ``take`` comes on any thread."""

    @property
    def manifest(self) -> SnapshotManifest: ...
    @property
    def missing(self) -> AbstractSet[int]: ...
    def take(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Keep a chunk; False if it is not what the manifest says."""


class CheckpointStore:
    """Checkpoints of one stage of one run."""

    def __init__(self, url: str, run: str, stage: int) -> None:
        """``url``: the manifest's ``checkpoint.store``."""
        self.url = url
        self._run = run
        self._stage = stage

    def entries(self, line: Line) -> list[Entry]:
        """What there is and counts, newest last."""
        with self._open() as (fs, folder):
            return [entry for entry in self._list(fs, folder) if line.counts(entry)]

    def save(
        self, data: Path, manifest: SnapshotManifest, writer: Identity, line: Line, *, keep: int
    ) -> None:
        """Publish a snapshot whose data lie in ``data``; then remove all but the newest ``keep``."""
        new = Entry(manifest.step, line.generation)
        with self._open() as (fs, folder):
            before = self._list(fs, folder)
            if any(entry.generation > line.generation for entry in before):
                raise LocalError("the run was rolled back: a state of before is no checkpoint any more")
            counting = sorted({*(entry for entry in before if line.counts(entry)), new})
            if any(entry.step == new.step for entry in before if entry != new and line.counts(entry)):
                return  # it is there, from before the roll-back to this very step
            kept = counting[-keep:]
            lines = [[entry.step, entry.generation] for entry in kept]
            writes: dict[str, bytes | Path] = {
                self._data(folder, new.step): data,
                self._manifest(folder, new.step): self._signed(manifest, writer),
                f"{folder}/{LIST}": json.dumps({"format": FORMAT, "checkpoints": lines}).encode(),
            }
            gone = sorted({entry.step for entry in before} - {entry.step for entry in kept})
            removes = [path(folder, step) for step in gone for path in (self._manifest, self._data)]
            if _kind(fs, "hf") and not folder.startswith("buckets/"):  # those have no commits
                commit(fs, writes, removes, f"{self._run}, stage {self._stage}: step {new.step}")
                return
            if _kind(fs, "file"):
                Path(folder).mkdir(parents=True, exist_ok=True)
            for path, content in writes.items():
                _put(fs, content, path)
            for path in removes:
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(path)

    def manifest(
        self, step: int, writers: Collection[PeerId], *, floats: int, fingerprint: str
    ) -> SnapshotManifest:
        """Of the checkpoint of ``step``, if one of ``writers`` signed it for this run and stage."""
        with self._open() as (fs, folder):
            path = self._manifest(folder, step)
            signed = _read(fs, path, 0, manifest_bytes(floats) + 512)
        try:
            version, packed, writer, signature = msgpack.unpackb(signed)
            if version != FORMAT:
                raise LocalError(f"{path} is of format {version!r}; update agorad")
            if writer not in writers:
                raise LocalError(
                    f"{path} is signed by {writer}, whom the run's manifest does not name a writer"
                )
            if not verify(writer, DOMAIN, self._said(packed), signature):
                raise LocalError(f"{path} does not carry its writer's signature")
            manifest = SnapshotManifest.decode(packed)
            manifest.check_layout(floats, fingerprint)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException, RemoteError) as error:
            raise LocalError(f"{path} is no checkpoint of this stage: {error}") from None
        if manifest.step != step:
            raise LocalError(f"{path} is of step {manifest.step}")
        return manifest

    def fetch(self, arriving: Arriving) -> None:
        """Read what is missing of a checkpoint, several chunks at a time, each verified."""
        from concurrent.futures import ThreadPoolExecutor  # for who reads one only

        manifest = arriving.manifest

        def read(index: int) -> None:
            start = index * CHUNK
            for _ in range(TIMES):
                if arriving.take(index, _read(fs, path, start, start + manifest.chunk_size(index))):
                    return
            raise LocalError(f"{path} is damaged at byte {start}")

        with self._open() as (fs, folder), ThreadPoolExecutor(READERS) as readers:
            path = self._data(folder, manifest.step)
            for done in [readers.submit(read, index) for index in sorted(arriving.missing)]:
                try:
                    done.result()
                except BaseException:
                    readers.shutdown(cancel_futures=True)
                    raise

    def _list(self, fs: Any, folder: str) -> list[Entry]:
        try:
            content = _read(fs, f"{folder}/{LIST}", 0, LIST_LIMIT)
        except FileNotFoundError as error:
            if _no_store(error):
                raise LocalError(
                    f"there is no checkpoint store {self.url}: make its bucket or repository, "
                    "or look at its address and at this node's credentials"
                ) from None
            return []
        try:
            document = json.loads(content)
            if document["format"] != FORMAT:
                raise LocalError(
                    f"{self.url} holds checkpoints of format {document['format']}; update agorad"
                )
            return sorted(Entry(int(step), int(generation)) for step, generation in document["checkpoints"])
        except (ValueError, TypeError, KeyError) as error:
            raise LocalError(f"{folder}/{LIST} in {self.url} is no list of checkpoints: {error!r}") from None

    def _said(self, packed: bytes) -> bytes:
        said: bytes = msgpack.packb([self._run, self._stage, packed])
        return said

    def _signed(self, manifest: SnapshotManifest, writer: Identity) -> bytes:
        packed = manifest.encode()
        signature = writer.sign(DOMAIN, self._said(packed))
        signed: bytes = msgpack.packb([FORMAT, packed, writer.peer_id, signature])
        return signed

    def _data(self, folder: str, step: int) -> str:
        return f"{folder}/{step:012d}.state"

    def _manifest(self, folder: str, step: int) -> str:
        return f"{folder}/{step:012d}.manifest"

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, str]]:
        """The file system and the stage's folder in it; whatever fails inside is a LocalError."""
        try:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(self.url)
            fs.invalidate_cache()  # some keep what they once listed, and others write here too
            if _kind(fs, "hf"):
                from huggingface_hub.utils.tqdm import disable_progress_bars

                disable_progress_bars()
            yield fs, f"{root.rstrip('/')}/{self._run}/stage-{self._stage}"
        except P2PError:
            raise
        except ImportError as error:
            raise LocalError(f"the checkpoint store {self.url} needs a package: {error}") from error
        except Exception as error:  # every file system has errors of its own
            raise LocalError(f"the checkpoint store {self.url}: {_words(error)}") from error


def _put(fs: Any, content: bytes | Path, path: str) -> None:
    """Under its name all of it lies, or nothing. Stores of objects do so by themselves."""
    if not _kind(fs, "file"):
        if isinstance(content, Path):
            fs.put_file(str(content), path)
        else:
            fs.pipe_file(path, content)
        return
    part = Path(f"{path}.part")
    with part.open("wb") as file:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, file, CHUNK)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(fs: Any, path: str, start: int, end: int) -> bytes:
    """These bytes of a file, or those of them that it has."""
    # The hub's file system would read megabytes ahead, each time anew.
    content: bytes = fs.cat_file(
        path, start=start, end=end, **({"cache_type": "none"} if _kind(fs, "hf") else {})
    )
    return content


def _no_store(error: BaseException | None) -> bool:
    """Whether a file was not found since its bucket or repository was not: then nothing is known of it."""
    while error is not None:
        if type(error).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError"):
            return True
        response = getattr(error, "response", None)  # a dictionary where it is botocore's
        if isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket":
            return True
        error = error.__cause__
    return False


def _kind(fs: Any, protocol: str) -> bool:
    return protocol in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
