"""A data set of the hub, from a real HTTP server that speaks the hub's routes and breaks off."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from p2p.errors import LocalError
from stage.data import Source
from stage.data import hub as hub_module
from stage.data.files import Unavailable
from stage.data.hub import KEPT, Dataset, HubFiles

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/corpus"


class Hub:
    """What the server has, what it was asked, and what goes wrong."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fail: list[int] = []
        """Status of the next answers."""
        self.cut: list[int] = []
        """Bytes after which the next transfers break off."""
        self.sent = 0
        self.endpoint = ""


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.respond(body=False)

        def do_GET(self) -> None:
            self.respond(body=True)

        def log_message(self, *_arguments: Any) -> None:
            pass

        def respond(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.fail:
                self.answer(hub.fail.pop(0), b"{}", body)
            elif path == f"/api/datasets/{REPO}/revision/main":
                known = {
                    "id": REPO,
                    "sha": COMMIT,
                    "siblings": [],
                    "tags": [],
                    "private": False,
                    "downloads": 1,
                }
                self.answer(200, json.dumps(known).encode(), body)
            elif path.startswith(f"/api/datasets/{REPO}/tree/{COMMIT}"):
                folder = path.removeprefix(f"/api/datasets/{REPO}/tree/{COMMIT}").strip("/")
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                    if name.startswith(folder)
                ]
                self.answer(
                    200, json.dumps([{"type": "directory", "path": "data", "oid": "0"}, *tree]).encode(), body
                )
            elif path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/"):
                self.file(hub.files.get(path.removeprefix(f"/datasets/{REPO}/resolve/{COMMIT}/")), body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, status: int, data: bytes, body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def file(self, data: bytes | None, body: bool) -> None:
            assert data is not None
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            rest = data[first:]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if body:
                if hub.cut:
                    rest = rest[: hub.cut.pop(0)]
                    self.close_connection = True
                self.wfile.write(rest)
                hub.sent += len(rest)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(hub_module, "PAUSE_S", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # less is not kept
    made = Hub()
    for number in range(5):
        texts = ["".join(f"<{number}:{index}:{word}>" for word in range(12)) for index in range(600)]
        path = tmp_path / "made.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table({"text": texts}), path, row_group_size=100, compression="none"
        )
        made.files[f"data/train-{number:05d}.parquet"] = path.read_bytes()
    made.files["README.md"] = b"# A corpus"
    with serving(made):
        yield made


def files_of(hub: Hub, folder: Path, text: str = REPO) -> HubFiles:
    return HubFiles(text, folder, "text", endpoint=hub.endpoint)


def fetched(hub: Hub) -> list[str]:
    return [asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET /datasets")]


def test_files_are_fetched_one_at_a_time_and_few_are_kept(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    source = Source(files_of(hub, folder), 64, 5)
    assert fetched(hub) == []
    assert "5 files" in source.describe()
    rows: list[bytes] = []
    for position in range(8000):
        row = source.row(0, position).ids
        if source.cursor(0, position).lap:
            break
        rows.append(row)
        assert len(list(folder.glob("data/*.parquet"))) <= KEPT
    assert len(set(rows)) == len(rows) > 4000
    assert len(set(fetched(hub)[:5])) == 5


def test_a_trainer_that_starts_again_needs_no_hub_for_what_it_has(hub: Hub, tmp_path: Path) -> None:
    first = Source(files_of(hub, tmp_path / "hub"), 64, 5)
    wanted = [first.row(0, position) for position in range(20)]
    asked = len(hub.asked)
    again = Source(files_of(hub, tmp_path / "hub"), 64, 5)
    assert [again.row(0, position) for position in range(20)] == wanted
    assert again.fingerprint == first.fingerprint
    assert len(hub.asked) == asked


def test_a_broken_transfer_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    size = len(hub.files["data/train-00000.parquet"])
    hub.cut = [size // 2, size // 4]
    Source(files_of(hub, tmp_path / "hub"), 64, 5).row(0, 0)
    assert hub.cut == []
    assert hub.sent < 1.3 * size, "what was there was not sent again"


def test_a_hub_that_is_busy_is_asked_again_and_then_given_up(hub: Hub, tmp_path: Path) -> None:
    catalog = files_of(hub, tmp_path / "hub")
    hub.fail = [503, 503]
    Source(catalog, 64, 5).row(0, 0)
    hub.fail = [503] * 1000
    with pytest.raises(Unavailable, match="data set owner/corpus"):
        files_of(hub, tmp_path / "other")
    hub.fail = []
    files_of(hub, tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("owner/nothing", "has no data set"),
        ("owner/corpus@v9", "has no data set"),
        ("owner/corpus/none", "no parquet"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(LocalError, match=words):
        files_of(hub, tmp_path / "hub", text)
    assert not (tmp_path / "hub").exists()


def test_a_data_set_that_wants_a_token(hub: Hub, tmp_path: Path) -> None:
    hub.fail = [403]
    with pytest.raises(LocalError, match="set HF_TOKEN"):
        files_of(hub, tmp_path / "hub")


def test_a_column_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    source = Source(HubFiles(REPO, tmp_path / "hub", "body", endpoint=hub.endpoint), 64, 5)
    with pytest.raises(LocalError, match="has no column 'body'"):
        source.row(0, 0)


@pytest.mark.parametrize(
    "text", ["", "corpus", "a/../b", "a/b@", "a/b c", "/", "https://hub/a/b", "a/..", "a/b@../x"]
)
def test_names_of_no_data_set(text: str) -> None:
    with pytest.raises(LocalError, match="names no data set"):
        Dataset.parse(text)


def test_names_of_data_sets() -> None:
    assert Dataset.parse("a/b") == Dataset("a/b", "", "main")
    assert Dataset.parse("a/b/data/CC-MAIN-2024-10") == Dataset("a/b", "data/CC-MAIN-2024-10", "main")
    assert Dataset.parse("a/b@refs/convert/parquet") == Dataset("a/b", "", "refs/convert/parquet")
