"""The page under load: 200 requests a second to an authority on one core, whose loop has to stay awake."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agorad.ask import ask
from agorad.demo import layout
from agorad.demo.layout import Plan

RATE = 200
SECONDS = 15
LAG_S = 0.05
MEMORY = 200_000_000
PATHS = ("/", "/api/v1/swarm", "/leaderboard", "/api/v1/history", "/join", "/api/v1/leaderboard")


@pytest.fixture
def office(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Control socket and process of an authority with a page, on one core."""
    plan = Plan(stages=1, workers=1, trainers=1, steps=9, seconds=None, data=None, assignments=())
    made = layout.prepare(plan, tmp_path)
    for node in made.nodes:
        node.reserved.close()
    (node,) = made.of_role("authority")
    process = subprocess.Popen(
        [sys.executable, "-m", "agorad.main", "--config", str(node.config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if ask(node.control, "status").get("page"):
                    break
            except Exception:  # it begins
                assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield node.control, process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_the_loop_stays_awake_at_200_requests_a_second(office: tuple[Path, int]) -> None:
    control, pid = office
    where = re.fullmatch(r"http://([0-9.]+):(\d+)/", ask(control, "status")["page"])
    assert where is not None
    address = (where[1], int(where[2]))
    shares = []
    for _attempt in range(3):  # others use this machine too: the quietest counts
        before = lags(control)
        answered = trio.run(hammer, address)
        after = lags(control)
        looks = {bound: after[bound] - before.get(bound, 0.0) for bound in after}
        total = looks[float("inf")]
        late = total - max(count for bound, count in looks.items() if bound <= LAG_S)
        print(
            f"{answered} answers, {total:.0f} looks at the loop, {late:.0f} later than {LAG_S * 1000:.0f} ms"
        )
        assert answered == RATE * SECONDS
        assert total > SECONDS
        shares.append(late / total)
    assert min(shares) <= 0.01
    status = Path(f"/proc/{pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 < MEMORY  # type: ignore[index]


async def hammer(address: tuple[str, int]) -> int:
    """Ask at an even pace over a few connections; how many answers were good."""
    good = 0
    began = trio.current_time()

    async def ask_on(number: int, of: int) -> None:
        nonlocal good
        stream = await trio.open_tcp_stream(*address)
        async with stream:
            for turn in range(RATE * SECONDS // of):
                await trio.sleep_until(began + (turn * of + number) / RATE)
                path = PATHS[turn % len(PATHS)]
                head = f"GET {path} HTTP/1.1\r\nhost: a\r\naccept-encoding: gzip\r\n\r\n"
                await stream.send_all(head.encode())
                answered = await read_answer(stream)
                good += answered

    with trio.fail_after(SECONDS * 4):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask_on, number, 20)
    return good


async def read_answer(stream: trio.SocketStream) -> bool:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = await stream.receive_some(65536)
        assert piece
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
    while len(body) < length:
        piece = await stream.receive_some(65536)
        assert piece
        body += piece
    return head.startswith(b"HTTP/1.1 200")


def lags(control: Path) -> dict[float, float]:
    """Looks at the loop by the bound that they stayed under, so far."""
    text = ask(control, "metrics")
    found = re.findall(r'agora_loop_lag_seconds_bucket\{.*?le="([^"]+)"\} (\S+)', text)
    return {float(bound): float(count) for bound, count in found}
