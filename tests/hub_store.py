"""A server on loopback that keeps a dataset as the Hugging Face hub does, for that hub's own client.

It answers what the client of ``huggingface_hub`` asks when it lists, reads, commits and deletes files of one
dataset: repository, tree, paths, ranges of files, and commits with small files inside and large ones uploaded
before (LFS). Who names another dataset, or may not see this one, hears what the hub says then.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

DATASET = "owner/weights"
TOKEN, OTHER_TOKEN = "hf_writer", "hf_of_another_account"
LARGE = 1 << 16
"""Bytes from which a file travels by itself."""


class Hub(ThreadingHTTPServer):
    """The dataset's files and what was asked of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.commits = 0
        self.refusals: list[int] = []
        """Statuses that the next commits hear."""
        self.given = 0
        """Bytes of files that were read."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(rf"/api/datasets/{DATASET}(?:/([a-z-]+)/main)?(?:/(.*))?", path)
        file = re.fullmatch(rf"/datasets/{DATASET}/resolve/main/(.*)", path)
        with self.server.lock:
            if path.startswith("/upload/") and method == "PUT":  # an address of its own, signed elsewhere
                self.server.uploads[path.removeprefix("/upload/")] = body
                self._answer(200)
            elif (shown := self.headers.get("Authorization")) != f"Bearer {TOKEN}":
                if shown is None or shown == f"Bearer {OTHER_TOKEN}":
                    self._missing("RepoNotFound", 401 if shown is None else 404)
                else:
                    said = "Invalid credentials in Authorization header"
                    self._answer(401, {"error": said}, {"X-Error-Message": said})
            elif api is not None:
                self._api(api[1] or "revision", (api[2] or "").strip("/"), body)
            elif path == f"/datasets/{DATASET}.git/info/lfs/objects/batch":
                self._upload_where(json.loads(body))
            elif file is not None:
                self._file(file[1])
            else:
                self._missing("RepoNotFound", 404)

    def _api(self, what: str, path: str, body: bytes) -> None:
        files = self.server.files
        match what:
            case "revision":
                about: dict[str, Any] = {"id": DATASET, "sha": "0" * 40, "private": True, "siblings": []}
                self._answer(200, about | {"downloads": 0, "likes": 0, "tags": [], "disabled": False})
            case "tree":
                below = f"{path}/" if path else ""
                inside = {name for name in files if name.startswith(below)}
                names = {name.removeprefix(below).split("/")[0] for name in inside}
                if inside or not path:
                    self._answer(200, [self._entry(f"{below}{name}") for name in sorted(names)])
                else:
                    self._missing("EntryNotFound", 404)
            case "paths-info":
                form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
                asked = parse_qs(body.decode())["paths"] if form else json.loads(body)["paths"]
                asked = [asked] if isinstance(asked, str) else asked
                there = [path for path in asked if any(f"{name}/".startswith(f"{path}/") for name in files)]
                self._answer(200, [self._entry(path) for path in there])
            case "preupload":
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["size"] > LARGE else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                self._answer(200, {"files": modes})
            case "commit":
                self._commit([json.loads(line) for line in body.splitlines()])
            case _:
                self._missing("EntryNotFound", 404)

    def _entry(self, path: str) -> dict[str, Any]:
        data = self.server.files.get(path)
        if data is None:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": path, "oid": oid, "size": len(data)}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        files = self.server.files
        if self.server.refusals:
            return self._answer(self.server.refusals.pop(0), {"error": "another commit is in progress"})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.commits += 1
        where = f"{self.server.url}/datasets/{DATASET}/commit/{'1' * 40}"
        return self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": where})

    def _upload_where(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/upload/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _file(self, path: str) -> None:
        data = self.server.files.get(path)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if data is None:
            self._missing("EntryNotFound", 404)
        else:
            part = data if asked is None else data[int(asked[1]) : int(asked[2]) + 1]
            self.server.given += len(part) if self.command == "GET" else 0
            self._answer(200 if asked is None else 206, part)

    def _missing(self, code: str, status: int) -> None:
        self._answer(status, {"error": "not found"}, {"X-Error-Code": code})

    def _answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Request-Id", "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        pass


@contextlib.contextmanager
def hub(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Running, until the block ends, as the hub of this process and of those that it starts."""
    from huggingface_hub import HfFileSystem, constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        patch.setattr(constants, "ENDPOINT", server.url)  # read from the environment when it was imported
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + files)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own for large files
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_TOKEN", TOKEN)
        yield server
    finally:
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()
