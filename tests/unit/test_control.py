"""The control socket: bounded requests, typed answers, streams, deep paths, dead daemons' files."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agorad import control, control_server
from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask, ask_all, follow
from agorad.exitcodes import DaemonExit
from p2p.errors import LocalError, Refused


async def echo(request: Mapping[str, Any]) -> Any:
    return dict(request)


async def refuse(_request: Mapping[str, Any]) -> Any:
    raise Refused("too_late", "it is over")


async def wrong(_request: Mapping[str, Any]) -> Any:
    raise LocalError("that cannot be")


async def count(request: Mapping[str, Any]) -> Any:
    async def numbers() -> AsyncIterator[int]:
        for number in range(request["to"]):
            yield number

    return numbers()


async def break_off(_request: Mapping[str, Any]) -> Any:
    async def numbers() -> AsyncIterator[int]:
        yield 0
        raise Refused("too_late", "it is over")

    return numbers()


async def hang(_request: Mapping[str, Any]) -> Any:
    await trio.sleep_forever()


COMMANDS: dict[str, control.Command] = {
    "echo": echo,
    "refuse": refuse,
    "wrong": wrong,
    "count": count,
    "break_off": break_off,
    "hang": hang,
}


def with_server(path: Path, client: Callable[[], None]) -> None:
    """Run ``client`` (blocking, as agoractl is) against a server on ``path``."""

    async def main() -> None:
        with trio.fail_after(20):
            listener = control.listen(path)
            async with trio.open_nursery() as nursery:
                await nursery.start(control_server.serve, listener, COMMANDS)
                await trio.to_thread.run_sync(client)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_answers_refusals_and_streams(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    def client() -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        assert ask(path, "echo", a=1, b=["x"]) == {"a": 1, "b": ["x"]}
        assert list(follow(path, "count", to=3)) == [0, 1, 2]
        for do, code, words in (
            ("refuse", "too_late", "it is over"),
            ("wrong", "failed", "that cannot be"),
            ("nope", "bad_request", "knows break_off, count, echo"),
        ):
            with pytest.raises(CommandFailed, match=words) as failed:
                ask(path, do)
            assert failed.value.code == code
        items = follow(path, "break_off")
        assert next(items) == 0
        with pytest.raises(CommandFailed, match="it is over"):
            next(items)
        with pytest.raises(NoAnswer, match="did not answer within"):
            ask(path, "hang", timeout=0.1)

    with_server(path, client)


def test_several_requests_on_one_connection_in_any_pieces(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    lines = control.encode({"do": "echo", "n": 1}) + control.encode({"do": "echo", "n": 2})

    def client() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            for index in range(len(lines)):
                connection.sendall(lines[index : index + 1])
            answer = b""
            while answer.count(b"\n") < 2:
                answer += connection.recv(1000)
        assert answer == b'{"ok":true,"result":{"n":1}}\n{"ok":true,"result":{"n":2}}\n'

    with_server(path, client)


def test_running_out_of_descriptors_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.sock"
    accept, failures = trio.SocketListener.accept, [OSError(errno.EMFILE, "Too many open files")]

    async def sometimes(self: trio.SocketListener) -> trio.SocketStream:
        if failures:
            raise failures.pop()
        return await accept(self)

    monkeypatch.setattr(trio.SocketListener, "accept", sometimes)
    monkeypatch.setattr(control_server, "RETRY_S", 0.01)
    with_server(path, lambda: ask(path, "echo"))


def test_a_request_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    def client() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(b"x" * (control.REQUEST_LIMIT + (64 << 10)))
            with contextlib.suppress(ConnectionResetError):
                assert b"bad_request" in connection.recv(1000)
        assert ask(path, "echo") == {}

    with_server(path, client)


def test_more_clients_than_places_wait_their_turn(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    def client() -> None:
        with contextlib.ExitStack() as idle:
            for _ in range(control.CLIENTS):
                connection = idle.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(str(path))
            with pytest.raises(NoAnswer):
                ask(path, "echo", timeout=0.2)
        assert ask(path, "echo") == {}

    with_server(path, client)


def test_one_that_hangs_costs_its_own_time_alone(tmp_path: Path) -> None:
    path, nobody = tmp_path / "c.sock", tmp_path / "none.sock"

    def client() -> None:
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            frozen = [tmp_path / f"frozen-{at}.sock" for at in range(8)]
            for name in frozen:
                one = stack.enter_context(socket.socket(socket.AF_UNIX))
                one.bind(str(name))
                one.listen(1)  # takes what is asked and never answers
            found = ask_all([*frozen, path, nobody], "echo", timeout=0.5)
        assert [type(one) for one in found] == [*[NoAnswer] * 8, dict, Unreachable]
        assert "within 0.5 s" in str(found[7])
        assert time.monotonic() - began < 8 * 0.5 - 0.1

    with_server(path, client)


def test_a_path_of_any_depth(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["a-rather-long-folder-name"] * 8)
    folder.mkdir(parents=True)
    path = folder / "c.sock"
    assert len(str(path)) > 107
    with_server(path, lambda: ask(path, "echo"))
    assert [entry.name for entry in folder.iterdir()] == ["c.sock"]


def test_a_dead_daemons_socket_is_replaced_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    control.listen(path).close()
    with pytest.raises(Unreachable, match="no daemon answers"):
        ask(path, "echo")
    second = control.listen(path)
    with pytest.raises(DaemonExit, match="another agorad answers"):
        control.listen(path)
    second.close()
    path.unlink()
    path.write_text("not a socket")
    with pytest.raises(LocalError, match="in the way"):
        control.listen(path)
    assert path.read_text() == "not a socket"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="there is no socket"):
        ask(tmp_path / "c.sock", "echo")


@given(st.binary(max_size=200))
def test_no_line_breaks_the_parser(line: bytes) -> None:
    try:
        name, arguments = control.parse_request(line)
    except control.BadRequest:
        return
    assert isinstance(name, str)
    assert isinstance(arguments, dict)


def test_a_socket_that_is_gone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed, then replaced by what is nobody's socket: that is left alone until it is gone."""
    monkeypatch.setattr(control_server, "LOOK_S", 0.01)
    path, told = tmp_path / "c.sock", list[str]()

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 (a file tells nobody)
            await trio.sleep(0.01)

    async def main() -> None:
        with trio.fail_after(20):
            listener = control.listen(path)
            async with trio.open_nursery() as nursery:
                await nursery.start(control_server.keep, path, listener, COMMANDS, told.append)
                await until(lambda: path.exists())
                path.unlink()
                path.write_text("in the way")
                await until(lambda: bool(told))
                assert "is in the way of the control socket" in told[0]
                assert path.read_text() == "in the way"
                path.unlink()
                await until(lambda: "" in told)
                assert await trio.to_thread.run_sync(lambda: ask(path, "echo", a=1)) == {"a": 1}
                nursery.cancel_scope.cancel()

    trio.run(main)
