"""The pace of an upload over a line with a queue, simulated; and what the kernel says of a real one."""

from __future__ import annotations

import random
from collections import deque

import pytest
import trio

from p2p import path
from p2p.path import Path
from stage.pacing import LEAST, SHARE, SLOWEST, TICK_S, Pace

STEP_S = 0.01


def over_a_line(
    line: float,
    least_rtt_s: float,
    *,
    seconds: float = 40.0,
    queue_s: float = 0.2,
    jitter_s: float = 0.0,
    others: float = 0.0,
    before: float | None = None,
) -> tuple[float, float]:
    """The share of a line of ``line`` bytes a second that was used, and seconds of queue, in the second half.

    What the donor knows is a round trip old. ``jitter_s``: mean of what answers take longer by themselves;
    ``others``: share of the line that they offer; ``before``: how fast the line is in the first tenth.
    """
    drawn, pace, waiting, rtt = random.Random(1), Pace(), 0.0, least_rtt_s
    under_way = deque([(0.0, 0.0)] * max(1, int(least_rtt_s / STEP_S)))
    arrived: deque[float] = deque(maxlen=max(5, int(least_rtt_s / STEP_S)))
    used = waits = 0.0
    steps = int(seconds / STEP_S)
    for step in range(steps):
        speed = before if before is not None and step < steps / 10 else line
        mine = (min(2e5 * 2 ** (step / 5), 1e9) if pace.rate is None else pace.rate) * STEP_S
        theirs = others * speed * STEP_S
        taken = min(1.0, (queue_s * speed - waiting + speed * STEP_S) / (mine + theirs))
        full = waiting + taken * (mine + theirs) > speed * STEP_S
        through = speed * STEP_S * mine / (mine + theirs) if full else mine
        waiting = max(0.0, waiting + taken * (mine + theirs) - speed * STEP_S)
        under_way.append((through / STEP_S, waiting / speed))
        delivered, waited = under_way.popleft()
        arrived.append(delivered * drawn.uniform(0.95, 1.0))
        extra = drawn.expovariate(1 / jitter_s) if jitter_s else 0.0
        rtt += (least_rtt_s + waited + extra - rtt) * min(1.0, STEP_S / max(least_rtt_s, 0.02)) / 2
        if (step + 1) % round(TICK_S / STEP_S) == 0:
            pace.look(Path(rtt, least_rtt_s, sum(arrived) / len(arrived)))
        if step > steps / 2:
            used, waits = used + through, waits + waiting / speed
    return used / (line * seconds / 2), waits / (steps / 2)


@pytest.mark.parametrize("mbps", [4, 50, 200, 1000])
@pytest.mark.parametrize(("rtt_ms", "queue_ms"), [(1, 2), (20, 2), (50, 3), (100, 10), (150, 20), (600, 100)])
def test_the_line_is_used_and_its_queue_short(mbps: int, rtt_ms: int, queue_ms: float) -> None:
    share, waits_s = over_a_line(mbps * 125_000, rtt_ms / 1000, queue_s=0.5)
    assert share > (0.85 if rtt_ms < 300 else 0.75)
    assert waits_s < queue_ms / 1000


@pytest.mark.parametrize("jitter_ms", [2, 6, 12])
@pytest.mark.parametrize("rtt_ms", [20, 50])
def test_answers_that_are_late_by_themselves_are_no_queue(jitter_ms: int, rtt_ms: int) -> None:
    share, waits_s = over_a_line(25e6, rtt_ms / 1000, jitter_s=jitter_ms / 1000)
    assert share > 0.8
    assert waits_s < 0.003


@pytest.mark.parametrize("others", [0.2, 0.5, 0.7])
def test_others_on_the_line_do_not_wait_behind_a_download(others: float) -> None:
    share, waits_s = over_a_line(25e6, 0.05, others=others)
    assert 0.8 * (1 - others) < share < 1 - others
    assert waits_s < 0.006


@pytest.mark.parametrize("before", [25e6, 100e6])
def test_a_line_that_became_slower_has_no_queue_for_ever(before: float) -> None:
    share, waits_s = over_a_line(3.7e6, 0.05, seconds=80, before=before)
    assert share > 0.8
    assert waits_s < 0.003


def test_a_line_that_became_faster_is_used() -> None:
    share, _ = over_a_line(25e6, 0.05, before=3.7e6)
    assert share > 0.85


def test_others_who_fill_the_line_are_yielded_to_and_the_download_goes_on() -> None:
    pace, line = Pace(), 25e6
    for _ in range(10):
        pace.look(Path(0.04, 0.04, line))
    for _ in range(100):
        pace.look(Path(0.12, 0.04, 5e6))
        assert pace.rate is None or pace.rate >= SHARE * 5e6
    assert pace.rate is not None
    assert pace.rate < LEAST * line
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
        assert seen.unsent == 0
        path.bound(client.socket, 4e6)
        took = await passing(client, server, 3_000_000)
        after = path.look(client.socket)
        assert after is not None
        assert 0.9 < (after.arrived - seen.arrived) / 3_000_000 < 1.25  # whole segments, of 32 KiB here
        path.bound(client.socket, None)
        free = await passing(client, server, 3_000_000)
        assert took > 0.2
        assert free < took
        path.bound(client.socket, 1e5)
        taken = await client.socket.send(bytes(300_000))
        waiting = path.look(client.socket)
        assert waiting is not None
        assert 0 < waiting.unsent < taken
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
