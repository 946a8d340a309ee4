"""The checkpoint store: a local folder, fsspec's file system in memory, S3 and datasets of the hub.

The last two are real servers on loopback, asked by their own clients.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from p2p.errors import LocalError
from p2p.identity import Identity
from stage import checkpoints, hub_commit
from stage.checkpoints import CheckpointStore, Entry, Line
from stage.snapshot import SnapshotFile, SnapshotStore
from stage.state import CHUNK
from tests.hub_store import DATASET, OTHER_TOKEN, Hub, hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client's own

FLOATS = 256 * 400  # a chunk and a bit
WRITER, STRANGER = (Identity.generate(bytes([number]) * 32) for number in (1, 2))
FINGERPRINT = "f" * 64


@attrs.frozen
class Held:
    step: int
    updates: int = 3
    floats: int = FLOATS
    fingerprint: str = FINGERPRINT

    def read(self, vector: int, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.float32) + 1000 * vector + self.step


def saved(folder: Path, step: int) -> SnapshotFile:
    store = SnapshotStore(folder)
    store.save(Held(step))
    file = store.newest()
    assert file is not None
    return file


def publish(store: CheckpointStore, folder: Path, step: int, line: Line = Line(), keep: int = 2) -> None:
    with saved(folder, step) as file:
        store.save(file.readable, file.manifest, WRITER, line, keep=keep)


def begin(store: CheckpointStore, folder: Path, step: int) -> int:
    """Like a worker without mates; the step that it has then."""
    manifest = store.manifest(step, {WRITER.peer_id}, floats=FLOATS, fingerprint=FINGERPRINT)
    own = SnapshotStore(folder)
    arriving = own.receive(manifest)
    try:
        store.fetch(arriving)
        own.install(arriving).close()
    finally:
        arriving.close()
        own.let_go()
    state = own.load_newest()
    assert state is not None
    for vector in range(3):
        assert torch.equal(state.vectors[vector], Held(state.step).read(vector, 0, FLOATS))
    return state.step


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket at an S3 server of our own on loopback."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    server = pytest.importorskip("moto.server", reason="pip install 'moto[s3]' flask flask-cors")
    import fsspec

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket/deep/er"
    finally:
        patch.undo()
        running.stop()


@pytest.fixture(scope="module")
def hf() -> Iterator[Hub]:
    """A dataset at a server of our own on loopback, for the hub's client."""
    with pytest.MonkeyPatch.context() as patch, hub(patch) as server:
        yield server


@pytest.fixture(params=["local", "file", "memory", "s3", "hf"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "local":
            return str(tmp_path / "store")
        case "file":
            return f"file://{tmp_path}/store"
        case "memory":
            return f"memory://{tmp_path.name}/store"
        case "hf":
            request.getfixturevalue("hf")
            return f"hf://datasets/{DATASET}/{tmp_path.name}"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_what_was_published_is_found_and_taken_by_others(url: str, tmp_path: Path) -> None:
    store = CheckpointStore(url, "run", 1)
    assert store.entries(Line()) == []
    for step in (10, 20, 30):
        publish(store, tmp_path / "writer", step)
    assert store.entries(Line()) == [Entry(20), Entry(30)]
    other = CheckpointStore(url, "run", 1)
    assert begin(other, tmp_path / "reader", 30) == 30
    assert begin(other, tmp_path / "reader", 20) == 20
    with pytest.raises(LocalError, match="FileNotFoundError"):
        begin(other, tmp_path / "reader", 10)
    assert CheckpointStore(url, "run", 0).entries(Line()) == []
    assert CheckpointStore(url, "run2", 1).entries(Line()) == []


def test_who_looked_before_sees_what_others_wrote_since(url: str, tmp_path: Path) -> None:
    reader = CheckpointStore(url, "run", 1)
    with ThreadPoolExecutor(1) as elsewhere:  # file systems keep what they listed, a thread each
        for step, there in ((10, [10]), (20, [10, 20]), (30, [20, 30])):
            elsewhere.submit(publish, CheckpointStore(url, "run", 1), tmp_path / "writer", step).result()
            assert reader.entries(Line()) == [Entry(step) for step in there]
    assert begin(reader, tmp_path / "reader", 30) == 30


@pytest.mark.parametrize("kind", ["s3", "hf"])
def test_a_store_that_is_not_there_is_no_empty_one(kind: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)
    wrong = {"s3": "s3://no-such-bucket/store", "hf": "hf://datasets/owner/nothing/store"}[kind]
    with pytest.raises(LocalError, match="make its bucket or repository"):
        CheckpointStore(wrong, "run", 0).entries(Line())


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, "credentials"), (OTHER_TOKEN, "credentials"), ("hf_old", "Invalid credentials")],
)
def test_a_dataset_that_this_node_may_not_see_is_no_empty_store(
    hf: Hub, token: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(LocalError, match=words):
        CheckpointStore(f"hf://datasets/{DATASET}/private", "run", 0).entries(Line())


def test_a_checkpoint_is_one_commit_which_waits_for_others(
    hf: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_commit, "WAIT_S", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    store = CheckpointStore(f"hf://datasets/{DATASET}/commits", "run", 0)
    before = hf.commits
    for step, refusals in ((10, []), (20, [409, 429]), (30, [503])):
        hf.refusals = list(refusals)
        publish(store, tmp_path / "writer", step)
    assert hf.commits - before == 3
    assert store.entries(Line()) == [Entry(20), Entry(30)]
    kept = [f"{step:012d}.{kind}" for step in (20, 30) for kind in ("manifest", "state")]
    assert sorted(name.rsplit("/", 1)[1] for name in hf.files if name.startswith("commits/")) == [
        *kept,
        "latest",
    ]
    del hf.files["commits/run/stage-0/000000000020.state"]  # by hand
    publish(store, tmp_path / "writer", 40)
    assert store.entries(Line()) == [Entry(30), Entry(40)]
    assert not any("000000000020" in name for name in hf.files if name.startswith("commits/"))
    hf.refusals = [403]
    with pytest.raises(LocalError, match="403"):
        publish(store, tmp_path / "writer", 50)
    hf.refusals = [409] * hub_commit.TRIES
    with pytest.raises(LocalError, match="409"):
        publish(store, tmp_path / "writer", 50)
    assert store.entries(Line()) == [Entry(30), Entry(40)]


def test_a_chunk_is_read_once_and_nothing_is_printed(
    hf: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(f"hf://datasets/{DATASET}/once", "run", 0)
    publish(store, tmp_path / "writer", 10)
    before = hf.given
    assert begin(store, tmp_path / "reader", 10) == 10
    with saved(tmp_path / "writer", 10) as file:
        assert hf.given - before < 1.1 * file.manifest.size
    assert capfd.readouterr() == ("", "")


def test_a_roll_back_ends_one_line_and_begins_another(url: str, tmp_path: Path) -> None:
    store = CheckpointStore(url, "run", 0)
    for step in (10, 20, 30):
        publish(store, tmp_path / "writer", step, keep=5)
    back = Line(generation=1, back_to=25)
    assert store.entries(back) == [Entry(10), Entry(20)]
    for step in (40, 50, 60):
        publish(store, tmp_path / "writer", step, back, keep=4)
    assert store.entries(back) == [Entry(20), Entry(40, 1), Entry(50, 1), Entry(60, 1)]
    assert store.entries(Line(2, 20)) == [Entry(20)]
    with pytest.raises(LocalError, match="rolled back"):
        publish(store, tmp_path / "writer", 70)  # by one who has not heard of it
    assert len(store.entries(back)) == 4
    assert begin(store, tmp_path / "reader", 60) == 60
    with pytest.raises(LocalError):
        begin(store, tmp_path / "reader", 30)


def test_only_writers_of_this_run_and_stage_are_believed(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    publish(CheckpointStore(url, "run", 0), tmp_path / "writer", 10)
    with pytest.raises(LocalError, match="does not name a writer"):
        CheckpointStore(url, "run", 0).manifest(
            10, {STRANGER.peer_id}, floats=FLOATS, fingerprint=FINGERPRINT
        )
    (tmp_path / "store/run/stage-0").rename(tmp_path / "store/run/stage-1")
    with pytest.raises(LocalError, match="signature"):
        begin(CheckpointStore(url, "run", 1), tmp_path / "reader", 10)
    (tmp_path / "store/run").rename(tmp_path / "store/other")
    with pytest.raises(LocalError, match="signature"):
        begin(CheckpointStore(url, "other", 1), tmp_path / "reader", 10)


def test_damage_is_found_and_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    url, folder = str(tmp_path / "store"), tmp_path / "store/run/stage-0"
    store = CheckpointStore(url, "run", 0)
    publish(store, tmp_path / "writer", 10)
    data, manifest, listed = (folder / name for name in (f"{10:012d}.state", f"{10:012d}.manifest", "latest"))
    good = data.read_bytes()
    data.write_bytes(good[:CHUNK] + bytes([good[CHUNK] ^ 1]) + good[CHUNK + 1 :])
    with pytest.raises(LocalError, match=f"damaged at byte {CHUNK}"):
        begin(store, tmp_path / "reader", 10)
    assert SnapshotStore(tmp_path / "reader").load_newest() is None
    data.write_bytes(good)
    assert begin(store, tmp_path / "reader", 10) == 10  # with what came the first time
    packed = manifest.read_bytes()
    for bad in (b"", b"\xc1", packed[:-1], packed + b"x", packed[:-1] + bytes([packed[-1] ^ 1])):
        manifest.write_bytes(bad)
        with pytest.raises(LocalError):
            begin(store, tmp_path / "reader", 10)
    for words in (b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 2, "checkpoints": []}', b"\xff"):
        listed.write_bytes(words)
        with pytest.raises(LocalError, match=r"no list of checkpoints|update agorad"):
            store.entries(Line())


def test_a_writer_that_dies_on_the_way_changed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path / "store"), "run", 0)
    publish(store, tmp_path / "writer", 10)
    real = checkpoints._put
    for survives in range(3):
        done = 0

        def dying(fs: Any, content: bytes | Path, path: str, survives: int = survives) -> None:
            nonlocal done
            if done == survives:
                raise KeyboardInterrupt
            done += 1
            real(fs, content, path)

        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "_put", dying)
            with pytest.raises(KeyboardInterrupt):
                publish(store, tmp_path / "writer", 20)
        assert store.entries(Line()) == [Entry(10)]
        assert begin(store, tmp_path / "reader", 10) == 10
    publish(store, tmp_path / "writer", 20)
    publish(store, tmp_path / "writer", 30)
    left = sorted(os.listdir(tmp_path / "store/run/stage-0"))  # noqa: PTH208
    assert left == [f"{step:012d}.{kind}" for step in (20, 30) for kind in ("manifest", "state")] + ["latest"]
    assert json.loads((tmp_path / "store/run/stage-0/latest").read_text())["checkpoints"] == [
        [20, 0],
        [30, 0],
    ]


def test_a_store_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for url, words in (
        ("nonsense://x/y", "nonsense"),
        (str(tmp_path / "file"), "Not a directory|NotADirectory"),
    ):
        with pytest.raises(LocalError, match=words):
            publish(CheckpointStore(url, "run", 0), tmp_path / "writer", 10)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module("fsspec.registry").known_implementations
    monkeypatch.setitem(known, "sss", {"class": "no_such.thing", "err": "Install sssfs"})
    with pytest.raises(LocalError, match="needs a package: Install sssfs"):
        CheckpointStore("sss://bucket/x", "run", 0).entries(Line())
