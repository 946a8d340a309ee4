"""Serves the control socket: the trio half of ``agorad.control``.

Each client is a task; its requests are answered in order. A command that raises ``BadRequest``,
``Refused`` or another error of ``p2p`` is answered with it; anything else is a bug and ends the daemon,
like every bug. Limits are those of ``agorad.control``.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from agorad import __version__, control
from agorad.control import CLIENTS, IDLE_S, REQUEST_LIMIT, BadRequest, Command, encode, failure, parse_request
from agorad.exitcodes import DaemonExit
from p2p.errors import LocalError, P2PError, Refused

RETRY_S = 0.5
LOOK_S = 5.0
"""Between two looks whether the socket is still there."""


async def keep(
    path: Path,
    listener: socket.socket,
    commands: Mapping[str, Command],
    made_again: Callable[[str], None],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """``serve``, and make the socket again where somebody removed or replaced it (a cleaner of old files).

    ``made_again`` is told why it cannot be done yet, or nothing once it is. Clients of before are cut off.
    """
    task_status.started()
    while True:
        ours = _inode(path)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, listener, commands)
            while _inode(path) == ours:  # noqa: ASYNC110 (a file tells nobody)
                await trio.sleep(LOOK_S)
            nursery.cancel_scope.cancel()
        while True:
            try:
                listener = control.listen(path)
                break
            except (LocalError, DaemonExit) as error:
                made_again(str(error))
                await trio.sleep(LOOK_S)
        made_again("")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def serve(
    listener: socket.socket, commands: Mapping[str, Command], *, task_status: trio.TaskStatus[None]
) -> None:
    """Answer requests on ``listener`` until cancelled."""
    server = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    places = trio.Semaphore(CLIENTS)
    async with server, trio.open_nursery() as nursery:
        task_status.started()
        while True:
            await places.acquire()
            try:
                client = await server.accept()
            except OSError:  # out of descriptors, which peers can bring about; the client waits meanwhile
                places.release()
                await trio.sleep(RETRY_S)
                continue
            nursery.start_soon(_attend, client, commands, places)


async def _attend(client: trio.SocketStream, commands: Mapping[str, Command], places: trio.Semaphore) -> None:
    try:
        async with client:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                await _converse(client, commands)
    finally:
        places.release()


async def _converse(client: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    buffer = bytearray()
    while True:
        with trio.fail_after(IDLE_S):
            while (end := buffer.find(b"\n")) < 0:
                if len(buffer) > REQUEST_LIMIT:
                    answer = failure("bad_request", f"a request may have {REQUEST_LIMIT} bytes")
                    await client.send_all(encode(answer))
                    return
                chunk = await client.receive_some(16 << 10)
                if not chunk:
                    return
                buffer += chunk
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        await _answer(client, line, commands)


async def _answer(client: trio.SocketStream, line: bytes, commands: Mapping[str, Command]) -> None:
    try:
        name, arguments = parse_request(line)
        if name not in commands:
            known = ", ".join(sorted(commands))
            raise BadRequest(f"no command {name!r}; this node, of version {__version__}, knows {known}")
        result = await commands[name](arguments)
        if hasattr(result, "__aiter__"):
            async with contextlib.aclosing(result) as items:
                async for item in items:
                    await client.send_all(encode({"item": item}))
            result = None
    except BadRequest as error:
        await client.send_all(encode(failure("bad_request", str(error))))
        return
    except Refused as error:
        await client.send_all(encode(failure(error.code, error.why)))
        return
    except P2PError as error:
        await client.send_all(encode(failure("failed", str(error))))
        return
    await client.send_all(encode({"ok": True, "result": result}))
