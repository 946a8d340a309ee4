"""The client of the control socket: plain blocking sockets, so that a command starts in no time.

``ask`` sends one request and returns the result; ``ask_all`` asks several daemons at once, so that one that
hangs costs its own time alone; ``follow`` yields the items of a streaming command. Failures are three: nobody
there, no answer in time, and an answer that says no.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from agorad.control import encode, reachable

ANSWER_LIMIT: Final = 16 << 20
"""Bytes of one answer line."""
CONNECT_S: Final = 5.0
READ_S: Final = 0.1
"""Time for an answer that is there already, where others have used up what was given to all."""


class Unreachable(Exception):  # noqa: N818
    """No daemon answers on the socket; the text says what to do."""


class NotAllowed(Unreachable):
    """The socket is another user's."""


class NoAnswer(Exception):  # noqa: N818
    """The daemon did not answer in time."""


class CommandFailed(Exception):  # noqa: N818
    """The daemon answered no; ``code`` is for programs, the text for people."""

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code


def ask(path: Path, do: str, *, timeout: float = 5.0, **arguments: Any) -> Any:
    """The result of command ``do`` of the daemon that listens on ``path``."""
    with _opened(path, {"do": do, **arguments}) as connection:
        return _answer(connection, path, timeout)


def ask_all(
    paths: Sequence[Path], do: str, *, timeout: float = 5.0
) -> list[Any | Unreachable | NoAnswer | CommandFailed]:
    """What each daemon says, or how it fails, in the order of ``paths``; all within one ``timeout``."""
    found: list[Any] = []
    until = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                found.append(stack.enter_context(_opened(path, {"do": do})))
            except (Unreachable, NoAnswer) as error:
                found.append(error)
        for at, path in enumerate(paths):
            if isinstance(found[at], socket.socket):
                try:
                    left = max(READ_S, until - time.monotonic())
                    found[at] = _answer(found[at], path, left, said_s=timeout)
                except (Unreachable, NoAnswer, CommandFailed) as error:
                    found[at] = error
    return found


def follow(path: Path, do: str, *, timeout: float | None = None, **arguments: Any) -> Iterator[Any]:
    """The items that streaming command ``do`` yields, each within ``timeout``; ends when the daemon does."""
    with _opened(path, {"do": do, **arguments}) as connection:
        for message in _messages(connection, path, timeout):
            if "item" not in message:
                _result(message)
                return
            yield message["item"]


@contextlib.contextmanager
def _opened(path: Path, request: Mapping[str, Any]) -> Iterator[socket.socket]:
    """A connection on which the request was sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CONNECT_S)
        try:
            with reachable(path) as name:
                connection.connect(name)
            connection.sendall(encode(request))
        except FileNotFoundError as error:
            raise Unreachable(f"no daemon: there is no socket at {path}") from error
        except PermissionError as error:
            raise NotAllowed(
                f"not allowed to open {path}: run this as the user that the daemon runs as, or with sudo"
            ) from error
        except TimeoutError as error:
            raise NoAnswer(f"the daemon on {path} does not accept") from error
        except OSError as error:
            raise Unreachable(f"no daemon answers on {path} ({error.strerror})") from error
        yield connection


def _answer(connection: socket.socket, path: Path, timeout: float, *, said_s: float | None = None) -> Any:
    for message in _messages(connection, path, timeout, said_s=said_s):
        return _result(message)
    raise Unreachable(f"the daemon on {path} closed the connection without an answer")


def _messages(
    connection: socket.socket, path: Path, timeout: float | None, *, said_s: float | None = None
) -> Iterator[dict[str, Any]]:
    late = f"the daemon on {path} did not answer within {said_s or timeout} s"
    buffer = bytearray()
    while True:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (end := buffer.find(b"\n")) < 0:
            if len(buffer) > ANSWER_LIMIT:
                raise CommandFailed("too_large", f"the daemon on {path} sent more than {ANSWER_LIMIT} bytes")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise NoAnswer(late)
            connection.settimeout(left)
            try:
                chunk = connection.recv(64 << 10)
            except TimeoutError as error:
                raise NoAnswer(late) from error
            except OSError:
                return
            if not chunk:
                return
            buffer += chunk
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise CommandFailed("bad_answer", f"what listens on {path} is no agorad")
        yield message


def _result(message: dict[str, Any]) -> Any:
    if not message.get("ok"):
        raise CommandFailed(str(message.get("code")), str(message.get("error")))
    return message.get("result")
