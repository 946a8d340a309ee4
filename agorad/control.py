"""The control socket: one JSON line asks, one JSON line answers.

Theory of operation. Requests are ``{"do": name, ...arguments}``; answers are ``{"ok": true, "result":
…}`` or ``{"ok": false, "code": word, "error": sentence}``. A command whose result is an asynchronous
iterator streams: a line ``{"item": …}`` each, until it ends or the client closes. This file is
the protocol and the paths, without trio, since the client (``agorad.ask``) must start fast;
``agorad.control_server`` serves it.

The socket is made with mode 0600: whoever can open it may command the node. Its path may be deeper
than the 107 bytes that the kernel takes, so it is bound and connected through
``/proc/self/fd/N/name``, where N is its folder. A socket file that nobody answers on is a dead
daemon's and is replaced.

Limits: 64 KiB a request, 16 clients at once, 60 s for a client to ask.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from agorad.exitcodes import DaemonExit, ExitCode
from p2p.errors import LocalError

REQUEST_LIMIT: Final = 64 << 10
CLIENTS: Final = 16
IDLE_S: Final = 60.0
_SUN_PATH: Final = 107

Command = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""Takes the request, returns something JSON can say, or an asynchronous iterator of such."""


class BadRequest(Exception):  # noqa: N818
    """What a client sent is not a request; the text says why."""


def encode(message: Mapping[str, Any]) -> bytes:
    """One line."""
    return (json.dumps(message, separators=(",", ":"), default=str) + "\n").encode()


def parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a request line, or ``BadRequest``."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not a JSON line: {error}") from error
    if not isinstance(request, dict) or not isinstance(request.get("do"), str):
        raise BadRequest('a request is an object with "do": the name of a command')
    return request.pop("do"), request


def failure(code: str, error: str) -> dict[str, Any]:
    """The answer that says no."""
    return {"ok": False, "code": code, "error": error}


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits the kernel's limit, good while the context lasts."""
    plain = str(path)
    if len(os.fsencode(plain)) <= _SUN_PATH:
        yield plain
        return
    if not Path("/proc/self/fd").is_dir():
        raise LocalError(
            f"the control socket's path {path} is longer than {_SUN_PATH} bytes; set node.control"
        )
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen(path: Path) -> socket.socket:
    """A listening socket at ``path``; replaces a dead daemon's, refuses to replace a living one's."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with reachable(path) as name:
            _clear(path, name)
            mask = os.umask(0o177)
            try:
                listener.bind(name)
            finally:
                os.umask(mask)
        listener.listen(CLIENTS)
    except OSError as error:
        listener.close()
        raise LocalError(f"cannot make the control socket {path}: {error.strerror}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: Path, name: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise LocalError(f"{path} is in the way of the control socket and is not a socket; move it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise DaemonExit(ExitCode.DUPLICATE, f"another agorad answers on {path}; stop it first")
