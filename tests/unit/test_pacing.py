"""The pace of an upload over a line with a queue, simulated; and what the kernel says of a real one."""

from __future__ import annotations

import pytest
import trio

from p2p import path
from p2p.path import Path
from stage.pacing import LEAST, SHARE, SLOWEST, TICK_S, Pace


def over_a_line(line: float, least_rtt_s: float, queue_s: float, seconds: float) -> tuple[float, float]:
    """The share of a line of ``line`` bytes a second that was used, and how long its queue was."""
    pace, waiting, rtt = Pace(), 0.0, least_rtt_s
    given = waits = ticks = 0.0
    for tick in range(int(seconds / TICK_S)):
        offered = (pace.rate if pace.rate is not None else 1e12) * TICK_S
        room = queue_s * line
        taken = min(offered, room - waiting + line * TICK_S)
        waiting = max(0.0, waiting + taken - line * TICK_S)
        got = min(taken, line * TICK_S)
        rtt += (least_rtt_s + waiting / line - rtt) * 0.9
        pace.look(Path(rtt, least_rtt_s, got / TICK_S))
        if tick * TICK_S > seconds / 2:
            ticks, given, waits = ticks + 1, given + got, waits + waiting / line
    return given / (ticks * TICK_S * line), waits / ticks


@pytest.mark.parametrize("mbps", [4, 50, 200, 1000])
@pytest.mark.parametrize("rtt_ms", [2, 40, 150])
@pytest.mark.parametrize("queue_ms", [30, 100, 500])
def test_the_line_is_full_and_its_queue_short(mbps: int, rtt_ms: int, queue_ms: int) -> None:
    share, waits_s = over_a_line(mbps * 125_000, rtt_ms / 1000, queue_ms / 1000, 20.0)
    assert share > 0.85
    assert waits_s < 0.002


def test_others_who_fill_the_line_are_yielded_to_and_the_download_goes_on() -> None:
    pace, line = Pace(), 25e6
    for _ in range(10):
        pace.look(Path(0.04, 0.04, line))
    for _ in range(100):
        pace.look(Path(0.12, 0.04, 5e6))
    assert pace.rate == LEAST * line
    for _ in range(100):
        assert pace.rate is not None
        pace.look(Path(0.041, 0.04, pace.rate))
    assert pace.rate > 0.9 * line


def test_the_first_bound_is_set_when_the_speed_is_known() -> None:
    pace = Pace()
    for doubled in range(10):
        assert pace.look(Path(0.041, 0.04, 2.0**doubled * 1e4)) is None
    bounds = [pace.look(Path(0.041, 0.04, 5.2e6)) for _ in range(10)]
    assert bounds[:2] == [None] * 2
    assert next(bound for bound in bounds if bound is not None) == SHARE * 5.2e6


def test_a_slow_beginning_bounds_nothing() -> None:
    pace = Pace()
    assert all(pace.look(Path(0.041, 0.04, 4e4)) is None for _ in range(50))
    assert pace.look(Path(0.041, 0.04, 2e7)) is None


def test_a_wait_while_it_grows_bounds_nothing() -> None:
    pace = Pace()
    assert all(pace.look(Path(0.12, 0.1, 4e4 * 2**n)) is None for n in range(8))


def test_a_bound_that_was_too_low_is_gone_in_seconds() -> None:
    pace, line = Pace(), 25e6
    for _ in range(10):
        pace.look(Path(0.12, 0.1, 4e4))
    assert pace.rate == SLOWEST
    for _ in range(100):
        assert pace.rate is not None
        pace.look(Path(0.1, 0.1, min(pace.rate, line)))
    assert pace.rate > line


def test_the_kernel_tells_of_a_connection_and_paces_it() -> None:
    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        client = await trio.open_tcp_stream(*listener.socket.getsockname())
        server = await listener.accept()
        for _ in range(3):
            await client.send_all(b"x")
            await server.receive_some(1)
            await server.send_all(b"y")
            await client.receive_some(1)
        seen = path.look(client.socket)
        assert seen is not None
        assert 0 < seen.least_rtt_s <= seen.rtt_s < 5
        path.bound(client.socket, 4e6)
        took = await passing(client, server, 3_000_000)
        path.bound(client.socket, None)
        free = await passing(client, server, 3_000_000)
        assert took > 0.2
        assert free < took
        await client.aclose()
        path.bound(client.socket, 1.0)  # of a socket that is closed: nothing
        assert path.look(client.socket) is None
        assert path.look(None) is None
        await server.aclose()
        await listener.aclose()

    async def bounded() -> None:
        with trio.fail_after(20):
            await main()

    trio.run(bounded)


async def passing(client: trio.SocketStream, server: trio.SocketStream, size: int) -> float:
    began, got = trio.current_time(), 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, bytes(size))
        while got < size:
            got += len(await server.receive_some(65536))
    return trio.current_time() - began
