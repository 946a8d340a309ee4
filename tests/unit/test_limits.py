"""Caps and hours of a node: what they let through, and when."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from agorad import hours
from agorad.config import from_table
from agorad.events import Bus
from agorad.pausing import Pausing
from p2p.errors import LocalError
from p2p.host import Host
from p2p.identity import Identity
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from p2p.shaper import BURST_S, SHARE_S, Shaper


def virtually(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_bytes_pass_at_the_rate_and_in_turn() -> None:
    async def main() -> None:
        shaper = Shaper(1_000_000.0)
        ends: dict[str, float] = {}

        async def send(name: str, count: int) -> None:
            for _ in range(count):
                await shaper.passage(100_000)
            ends[name] = trio.current_time()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, "one", 20)
            nursery.start_soon(send, "two", 20)
        took = max(ends.values()) - began
        assert 3.7 < took < 4.1  # 4 MB; the last passage begins 0.1 s before they are through
        assert abs(ends["one"] - ends["two"]) < 0.5
        before = trio.current_time()
        await shaper.passage(100)  # a ping, behind all that
        assert trio.current_time() == before
        shaper.rate = None
        await shaper.passage(10**9)
        assert trio.current_time() == before

    virtually(main)


def test_an_idle_line_gives_no_credit_beyond_a_moment() -> None:
    async def main() -> None:
        shaper = Shaper(1_000_000.0)
        await shaper.passage(100_000)
        await trio.sleep(60)
        began = trio.current_time()
        for _ in range(11):
            await shaper.passage(100_000)
        assert trio.current_time() - began > 0.85

    virtually(main)


def test_portions_are_small_on_slow_lines() -> None:
    assert Shaper().portion(262_144) == 262_144
    assert Shaper(125_000.0).portion(262_144) == 16_384
    assert Shaper(12_500_000.0).portion(262_144) == 262_144
    assert Shaper(1_250_000.0).portion(262_144) == 62_500


def test_a_host_sends_no_faster_than_it_may() -> None:
    size, rate = 1_000_000, 2_000_000.0
    local = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")

    async def main() -> None:
        one, two = Host(Identity.generate()), Host(Identity.generate())

        async def take(call: Call) -> None:
            message = await call.receive(max_payload=size)
            await call.send({"got": len(message.payload)})

        two.handle("/agora/test/1", take, open_to_all=True, max_payload=size)
        for shaper in (one.upload, two.download):
            async with one.run(), two.run([local]):
                free = await timed(one, two)
                shaper.rate = rate
                capped = await timed(one, two)
                shaper.rate = None
                # What was unused before may be caught up, and one portion is under way at each end.
                assert capped > size / rate - BURST_S - 2 * SHARE_S - 0.02
                assert capped > free

    async def timed(one: Host, two: Host) -> float:
        began = trio.current_time()
        async with await one.call(two.peer_id, "/agora/test/1", addrs=two.addrs, deadline=10.0) as call:
            await call.send({"t": "x"}, bytes(size))
            assert (await call.receive()).header == {"got": size}
        return trio.current_time() - began

    trio.run(main)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("", ["00:00", "12:34"], []),
        ("22:00-07:30", ["22:00", "23:59", "00:00", "07:29"], ["07:30", "12:00", "21:59"]),
        ("09:00-17:00", ["09:00", "16:59"], ["08:59", "17:00", "00:00"]),
        ("0:00-6:00, 20:00-24:00", ["00:00", "05:59", "20:00", "23:59"], ["06:00", "19:59"]),
    ],
)
def test_hours(text: str, inside: list[str], outside: list[str]) -> None:
    for times, expected in ((inside, True), (outside, False)):
        for moment in times:
            hour, _, minute = moment.partition(":")
            assert hours.within(hours.parse(text), int(hour) * 60 + int(minute)) is expected
            now = time.mktime((2026, 1, 15, int(hour), int(minute), 30, 0, 0, -1))
            assert bool(hours.outside(text, now)) is not expected


@pytest.mark.parametrize("text", ["22-7", "25:00-26:00", "10:60-11:00", "10:00-10:00", "x", "10:00-11:00,"])
def test_what_are_no_hours(text: str) -> None:
    with pytest.raises(LocalError, match=r"limits\.hours"):
        hours.parse(text)
    table = {"node": {"role": "seed", "run": "r", "state": "s"}, "limits": {"hours": text}}
    with pytest.raises(LocalError, match=r"limits\.hours"):
        from_table(table, Path("/"))


def test_a_cap_has_bounds() -> None:
    table = {"node": {"role": "seed", "run": "r", "state": "s"}, "limits": {"upload_mbps": 0.5}}
    with pytest.raises(LocalError, match=r"limits\.upload_mbps"):
        from_table(table, Path("/"))
    table["limits"] = {"upload_mbps": 20, "download_mbps": 50.5, "hours": "22:00-07:00"}  # type: ignore[dict-item]
    assert from_table(table, Path("/")).limits.download_mbps == 50.5


def test_holding_by_hand_and_by_the_hours() -> None:
    now, told, bus = [1000.0], [], Bus()
    asleep = [""]
    pausing = Pausing(bus.emit, lambda: now[0], outside_hours=lambda _now: asleep[0])
    with pytest.raises(LocalError, match="only workers and trainers"):
        pausing.hold(5000.0)
    asleep[0] = "outside its hours"
    pausing.attach(told.append)
    assert told == [True]  # it starts outside its hours
    asleep[0] = ""
    pausing.look()
    pausing.hold(2000.0)
    pausing.hold(3000.0)
    now[0] = 2500.0
    pausing.look()
    assert (told, pausing.why) == ([True, False, True], "asked to")
    asleep[0] = "outside its hours"
    now[0] = 3500.0  # the hold by hand ends, the hours have begun to count: held all the same
    pausing.look()
    assert (told, pausing.why) == ([True, False, True], "outside its hours")
    asleep[0] = ""
    pausing.look()
    pausing.release()
    assert told == [True, False, True, False]
    kinds = [entry["event"] for entry in bus.since()]
    assert kinds == ["held", "let_go", "held", "held", "let_go"]
