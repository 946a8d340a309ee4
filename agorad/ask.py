"""The client of the control socket: plain blocking sockets, so that a command starts in no time.

``ask`` sends one request and returns the result; ``follow`` yields the items of a streaming command.
Failures are three: nobody there, no answer in time, and an answer that says no.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from agorad.control import encode, reachable

ANSWER_LIMIT: Final = 16 << 20
"""Bytes of one answer line."""


class Unreachable(Exception):  # noqa: N818
    """No daemon answers on the socket; the text says what to do."""


class NoAnswer(Exception):  # noqa: N818
    """The daemon did not answer in time."""


class CommandFailed(Exception):  # noqa: N818
    """The daemon answered no; ``code`` is for programs, the text for people."""

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code


def ask(path: Path, do: str, *, timeout: float = 5.0, **arguments: Any) -> Any:
    """The result of command ``do`` of the daemon that listens on ``path``."""
    for message in _exchange(path, {"do": do, **arguments}, timeout):
        return _result(message)
    raise Unreachable(f"the daemon on {path} closed the connection without an answer")


def follow(path: Path, do: str, *, timeout: float | None = None, **arguments: Any) -> Iterator[Any]:
    """The items that streaming command ``do`` yields; ends when the daemon does."""
    for message in _exchange(path, {"do": do, **arguments}, timeout):
        if "item" not in message:
            _result(message)
            return
        yield message["item"]


def _exchange(path: Path, request: Mapping[str, Any], timeout: float | None) -> Iterator[dict[str, Any]]:
    deadline = None if timeout is None else time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5.0)
        try:
            with reachable(path) as name:
                connection.connect(name)
            connection.sendall(encode(request))
        except FileNotFoundError as error:
            raise Unreachable(f"no daemon: there is no socket at {path}; is agorad running?") from error
        except PermissionError as error:
            raise Unreachable(f"not allowed to open {path}; run this as the daemon's user") from error
        except TimeoutError as error:
            raise NoAnswer(f"the daemon on {path} does not accept") from error
        except OSError as error:
            raise Unreachable(f"no daemon answers on {path} ({error.strerror}); start agorad") from error
        buffer = bytearray()
        while True:
            while (end := buffer.find(b"\n")) < 0:
                if len(buffer) > ANSWER_LIMIT:
                    raise CommandFailed(
                        "too_large", f"the daemon on {path} sent more than {ANSWER_LIMIT} bytes"
                    )
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise NoAnswer(f"the daemon on {path} did not answer within {timeout} s")
                connection.settimeout(left)
                try:
                    chunk = connection.recv(64 << 10)
                except TimeoutError as error:
                    raise NoAnswer(f"the daemon on {path} did not answer within {timeout} s") from error
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
