"""Stock libp2p nodes as processes: installed from their registries once, beside the tests' own packages."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PLACE = Path(sys.prefix) / "interop"
PY_LIBP2P = "libp2p==0.8.1"
HIVEMIND = "hivemind==1.1.12"
HIVEMIND_NEEDS = [
    "PyYAML",
    "scipy",
    "prefetch_generator",
    "msgpack",
    "sortedcontainers",
    "uvloop",
    "protobuf",
    "grpcio-tools",
    "configargparse",
    "py-multihash",
    "cryptography",
    "pydantic",
    "packaging",
    "varint",
    "base58",
    "netaddr",
    "idna",
    "py-cid",
]
"""All that it asks for but torch, which it finds where ours is."""
INSTALL_S = 400.0
ANSWER_S = 60.0


@contextlib.contextmanager
def _installing(name: str, wanted: str) -> Iterator[Path | None]:
    """The folder to install into, or None when what is ``wanted`` is there; a stamp is made at the end."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("other implementations are installed into a virtual environment only")
    folder = PLACE / name
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "installed"
    with (PLACE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            yield None
            return
        yield folder
        stamp.write_text(wanted)


def _install(what: str, command: list[str | Path], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{what} did not install within {INSTALL_S:g} s")
    if done.returncode:
        pytest.skip(f"{what} does not install here: {done.stderr.strip()[-300:]}")


def py_libp2p() -> list[str]:
    """Command of a py-libp2p node."""
    with _installing("py", PY_LIBP2P) as folder:
        if folder is not None:
            venv.create(folder / "venv", with_pip=True, clear=True)
            pip = [folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
            _install("py-libp2p", [*pip, PY_LIBP2P], folder)
    return [str(PLACE / "py/venv/bin/python"), str(HERE / "py_peer.py")]


def js_libp2p() -> list[str]:
    """Command of a js-libp2p node."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm or node is absent: apt install nodejs npm")
    wanted = (HERE / "package.json").read_text()
    with _installing("js", wanted) as folder:
        if folder is not None:
            (folder / "package.json").write_text(wanted)
            _install("js-libp2p", ["npm", "install", "--no-audit", "--no-fund", "--omit=dev"], folder)
    # Node looks for packages beside the file, so the file goes where they are.
    shutil.copy(HERE / "js_peer.mjs", PLACE / "js" / "js_peer.mjs")
    return ["node", str(PLACE / "js" / "js_peer.mjs")]


def hivemind(script: str = "hivemind_swarm.py") -> list[str]:
    """Command that measures hivemind by a script beside this file, which says what its arguments are."""
    with _installing("hivemind", " ".join([HIVEMIND, *HIVEMIND_NEEDS])) as folder:
        if folder is not None:
            venv.create(folder / "venv", with_pip=True, clear=True)
            packages = next((folder / "venv/lib").glob("python*/site-packages"))
            (packages / "torch_of_ours.pth").write_text(sysconfig.get_path("purelib"))
            pip = [folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
            # Another torch, two gigabytes of it, would be installed if pip were let.
            _install("hivemind", [*pip, "--no-deps", HIVEMIND], folder)
            _install("what hivemind needs", [*pip, "--ignore-installed", *HIVEMIND_NEEDS], folder)
    return [str(PLACE / "hivemind/venv/bin/python"), str(HERE / script)]


class Foreign:
    """A running stock node: ``addr``, ``peer``, and answers to requests."""

    def __init__(self, command: list[str]) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        first = self._line()
        self.addr: str = first["addr"]
        self.peer: str = first["peer"]

    def ask(self, **request: str) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        out = self.process.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], ANSWER_S)
        line = out.readline() if ready else b""
        if not line:
            self.process.kill()
            assert self.process.stderr is not None
            raise AssertionError(f"no answer; it said {self.process.stderr.read().decode()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> int:
        """Close its standard input and wait."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            return self.process.wait(15)
        finally:
            self.process.kill()
            self.process.wait()
