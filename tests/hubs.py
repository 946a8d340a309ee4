"""A real HTTP server that speaks the routes of the Hugging Face hub which a data set is read by."""

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

import pyarrow
import pyarrow.parquet

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


def fill(hub: Hub, folder: Path) -> None:
    """Five files of parquet and another; ``folder`` is for what lies in between."""
    for number in range(5):
        texts = ["".join(f"<{number}:{index}:{word}>" for word in range(12)) for index in range(120)]
        path = folder / "made.parquet"
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=20, compression="none")
        hub.files[f"data/train-{number:05d}.parquet"] = path.read_bytes()
    hub.files["README.md"] = b"# A corpus"
