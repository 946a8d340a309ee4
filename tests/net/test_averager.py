"""Averaging rounds over real TCP, Noise and yamux on loopback, one host a member in one process."""

from __future__ import annotations

import array
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from p2p.averaging import (
    Averager,
    MemberDropped,
    Outcome,
    PlainReducer,
    RosterCommitted,
    RoundConfig,
    RoundFailed,
)
from p2p.connection import Connection
from p2p.errors import PeerGone, Refused
from p2p.event import Event
from p2p.host import Host
from p2p.host_events import HandlerFailed
from p2p.identity import Identity, PeerId
from p2p.kad.record import Record, seal
from p2p.membership import Membership, Trust, issue
from p2p.multiaddr import Multiaddr
from p2p.path import FILLING, SO_MAX_PACING_RATE, UNBOUNDED, Path

AUTHORITY = Identity.generate(b"a" * 32)
TRUST = Trust(run="r", manifest_hash=b"m" * 32, authorities=frozenset([AUTHORITY.peer_id]))


def admit(host: Host, stage: int | None) -> None:
    """Make the host a member of a stage, or a guest."""
    certificate = None
    if stage is not None:
        certificate = issue(
            AUTHORITY,
            run="r",
            account="somebody",
            peer_id=host.peer_id,
            stage=stage,
            issued=time.time(),
            expires=time.time() + 600,
        ).encode()
    host.membership = Membership(TRUST, lambda: certificate, time.time)


class FakeTable:
    """What a hash table does as far as a round can tell: signed records by key, shared by all."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Record]] = {}

    def of(self, identity: Identity) -> TableView:
        return TableView(self, identity)


@attrs.frozen
class TableView:
    table: FakeTable
    identity: Identity

    async def store(self, key: str, subkey: str, value: Any, *, ttl: float, deadline: float) -> int:
        await trio.lowlevel.checkpoint()
        record = seal(self.identity, key, subkey, value, seq=1, issued=1e9, ttl=ttl)
        self.table.records.setdefault(key, {})[subkey] = record
        return 1

    async def get(self, key: str, *, deadline: float, fresh: bool = True) -> dict[str, Record]:
        await trio.lowlevel.checkpoint()
        return dict(self.table.records.get(key, {}))


@attrs.define
class Member:
    host: Host
    averager: Averager
    events: list[Event]
    scope: trio.CancelScope
    rounds: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def kill(self) -> None:
        """Everything of this member stops at once, its connections end."""
        self.rounds.cancel()
        self.scope.cancel()


@asynccontextmanager
async def members(
    count: int,
    *,
    acquainted: bool = True,
    config: RoundConfig = RoundConfig(),
    table: FakeTable | None = None,
    reducer: Callable[[int], Any] = PlainReducer,
) -> AsyncIterator[list[Member]]:
    """``count`` hosts that run until the block ends; each dies when its scope is cancelled."""
    table = table or FakeTable()
    made: list[Member] = []
    bugs: list[Event] = []

    async def live(seed: int, task_status: trio.TaskStatus[Member]) -> None:
        identity = Identity.generate(bytes([seed]) * 32)
        events: list[Event] = []
        host = Host(
            identity, emit=lambda event: bugs.append(event) if isinstance(event, HandlerFailed) else None
        )
        admit(host, 1)
        averager = Averager(
            host,
            table.of(identity),
            identity,
            run="r",
            stage=1,
            reducer=reducer,
            emit=events.append,
            rng=random.Random(seed),
            config=config,
        )
        with trio.CancelScope() as scope:
            async with host.run([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]):
                task_status.started(Member(host, averager, events, scope))
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for seed in range(count):
            made.append(await nursery.start(live, seed))
        if acquainted:
            for one in made:
                for other in made:
                    one.host.learn(other.host.peer_id, other.host.addrs)
        yield made
        nursery.cancel_scope.cancel()
    assert not bugs, bugs


def numbers(count: int, seed: int) -> array.array[float]:
    rng = random.Random(seed)
    return array.array("f", [rng.uniform(-1, 1) for _ in range(count)])


async def run_round(
    group: Sequence[Member],
    vectors: Sequence[array.array[float]],
    weights: Sequence[float],
    *,
    number: int = 1,
    deadline: float = 20.0,
    delays: Sequence[float] | None = None,
    expected: bool = True,
    fill: bool = False,
) -> list[Outcome | str]:
    """One round of all; an outcome or the reason of its failure for each. Members that die give 'died'."""
    results: list[Outcome | str] = ["died"] * len(group)
    peers: list[PeerId] = [member.host.peer_id for member in group] if expected else []

    async def take_part(i: int) -> None:
        with trio.CancelScope() as group[i].rounds:
            await trio.sleep(delays[i] if delays else 0)
            try:
                results[i] = await group[i].averager.average(
                    number,
                    5,
                    memoryview(vectors[i]),
                    weights[i],
                    expected=peers,
                    deadline=deadline,
                    fill=fill,
                )
            except RoundFailed as error:
                results[i] = str(error)

    async with trio.open_nursery() as nursery:
        for i in range(len(group)):
            nursery.start_soon(take_part, i)
    return results


def weighted_mean(vectors: Sequence[array.array[float]], weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [
        sum(w * x for w, x in zip(weights, column, strict=True)) / total
        for column in zip(*vectors, strict=True)
    ]


def distance(outcome: Outcome, mean: Sequence[float]) -> float:
    values = array.array("f", bytes(outcome.vector))
    return max(abs(value - exact) for value, exact in zip(values, mean, strict=True))


def agree(results: Sequence[Outcome | str]) -> list[Outcome]:
    """The outcomes; all alike in what must be alike."""
    outcomes = [result for result in results if isinstance(result, Outcome)]
    assert len({(o.checksum, tuple(o.averaged), o.members, o.fraction) for o in outcomes}) == 1, results
    return outcomes


@pytest.mark.parametrize("weights", [[1, 1], [1, 3], [2, 1, 1], [1, 0, 2], [1, 1, 1, 1], [0, 3]])
def test_a_round_gives_everybody_the_weighted_mean(weights: list[float]) -> None:
    async def main() -> None:
        vectors = [numbers(30_000, seed) for seed in range(len(weights))]
        async with members(len(weights)) as group:
            began = trio.current_time()
            outcomes = agree(await run_round(group, vectors, weights))
            assert trio.current_time() - began < 5
        assert len(outcomes) == len(weights)
        mean = weighted_mean(vectors, weights)
        for outcome in outcomes:
            assert outcome.fraction == 1.0
            assert outcome.averaged == [(0, 30_000)]
            assert outcome.drops == ()
            assert len(outcome.members) == len(weights)
            assert outcome.weight_total == sum(weights)
            assert distance(outcome, mean) < 1e-6
        sent = sum(outcome.payload_out for outcome in outcomes)
        received = sum(outcome.payload_in for outcome in outcomes)
        assert received <= sent < received + 1000 * len(weights)  # last words may not be read any more
        for member in group:
            assert [type(event) for event in member.events] == [RosterCommitted]

    trio.run(main)


def test_mates_who_never_heard_of_each_other_meet_in_the_table() -> None:
    async def main() -> None:
        async with members(3, acquainted=False) as group:
            vectors = [numbers(1000, seed) for seed in range(3)]
            assert len(agree(await run_round(group, vectors, [1, 1, 1], expected=False))) == 3

    trio.run(main)


def test_many_rounds_in_a_row_with_members_that_start_apart() -> None:
    async def main() -> None:
        async with members(3) as group:
            vectors = [numbers(5000, seed) for seed in range(3)]
            for number in range(1, 7):
                delays = [0.3 * ((i + number) % 3) for i in range(3)]
                results = await run_round(group, vectors, [1, 1, 1], number=number, delays=delays)
                assert len(agree(results)) == 3
        for member in group:
            assert not member.averager._sessions
            assert not member.averager._followers

    trio.run(main)


def test_a_sender_of_nan_is_dropped_and_healed() -> None:
    async def main() -> None:
        vectors = [numbers(9000, seed) for seed in range(3)]
        vectors[1] = array.array("f", [float("nan")] * 9000)
        async with members(3) as group:
            outcomes = agree(await run_round(group, vectors, [1, 1, 1]))
        assert len(outcomes) == 3
        mean = weighted_mean([vectors[0], vectors[2]], [1, 1])
        for outcome in outcomes:
            assert outcome.fraction == 1.0
            assert outcome.weight_total == 2.0
            assert distance(outcome, mean) < 1e-6
        assert all(any(isinstance(event, MemberDropped) for event in member.events) for member in group)

    trio.run(main)


@pytest.mark.skipif(
    not hasattr(socket, "TCP_CONGESTION"), reason="Linux finds a line's speed in ways to choose"
)
def test_lines_of_a_round_are_filled_and_are_afterwards_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are full is measured in docs/benchmarks.md."""
    line = 2_000_000
    part, free = line.to_bytes(8, "little"), UNBOUNDED.to_bytes(8, "little")

    def ways(one: Member) -> set[tuple[bytes, bytes]]:
        """How the speed of each connection is found, and its bound in bytes a second."""
        wires = [connection._wire._socket for connection in one.host.connections.values()]
        return {
            (
                wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"),
                wire.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8),
            )
            for wire in wires
            if wire is not None
        }

    async def main() -> None:
        vectors = [numbers(40_000, seed) for seed in range(2)]
        wire = Tripwire(2, lambda: None)
        async with members(2, reducer=wire.make, config=RoundConfig(part_bytes=8192)) as group:
            agree(await run_round(group, vectors, [1.0] * 2))
            for one in group:
                one.averager._line = line
                for connection in one.host.connections.values():
                    if not (connection._wire.controlled(FILLING) and connection._wire.controlled(b"reno")):
                        pytest.skip("this kernel does not have both ways")
            seen: list[set[tuple[bytes, bytes]]] = []
            wire.then = lambda: seen.append(ways(group[0]) | ways(group[1]))
            for number, (path, fill, way) in enumerate(
                [
                    (Path(0.04, 0.04, 1e6, 120_000), True, (FILLING, part)),
                    (Path(0.04, 0.04, 1e6, 120_000), False, (b"reno", free)),
                    (Path(0.04, 0.04, 1e6, 119_999), True, (b"reno", part)),
                    (Path(0.04, 0.04, 1e6, 120_000, rested=True), True, (b"reno", part)),
                ],
                start=2,
            ):
                monkeypatch.setattr(Connection, "path", lambda self, path=path: path)
                wire.left = 2
                agree(await run_round(group, vectors, [1.0] * 2, number=number, fill=fill))
                assert seen.pop() == {way}, (path, fill)
                assert ways(group[0]) | ways(group[1]) == {(b"reno", free)}

    trio.run(main)


class Tripwire:
    """A reducer that counts parts and calls back at one of them: a moment inside the exchange."""

    def __init__(self, at: int, then: Callable[[], None]) -> None:
        self.left, self.then = at, then

    def make(self, nbytes: int) -> PlainReducer:
        self.left -= 1
        if self.left == 0:
            self.then()
        return PlainReducer(nbytes)


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("parts", [1, 5, 12, 20])
def test_survivors_of_a_death_in_the_exchange_finish_alike(count: int, parts: int) -> None:
    async def main() -> None:
        vectors = [numbers(40_000, seed) for seed in range(count)]
        wire = Tripwire(parts, lambda: None)
        async with members(count, reducer=wire.make, config=RoundConfig(part_bytes=8192)) as group:
            victim = group[1]
            wire.then = victim.kill
            began = trio.current_time()
            results = await run_round(group, vectors, [1.0] * count, deadline=20)
            assert trio.current_time() - began < 12  # of 20 given
            survivors = agree([result for i, result in enumerate(results) if i != 1])
            assert len(survivors) == count - 1, results
            assert survivors[0].fraction == 1.0  # the deputy reduced what the dead one had not
            for i, outcome in zip([i for i in range(count) if i != 1], survivors, strict=True):
                start = 0
                for begin, end in [*outcome.averaged, (40_000, 40_000)]:  # its own numbers in between
                    kept = array.array("f", bytes(outcome.vector[start * 4 : begin * 4]))
                    assert kept == vectors[i][start:begin]
                    start = end

    trio.run(main)


@pytest.mark.parametrize("late", [0, 1])
def test_one_who_comes_while_the_exchange_runs_is_told_and_disturbs_nobody(late: int) -> None:
    async def main() -> None:
        vectors = [numbers(40_000, seed) for seed in range(3)]
        running = trio.Event()
        wire = Tripwire(3, running.set)
        async with members(3, reducer=wire.make, config=RoundConfig(part_bytes=8192)) as group:
            latecomer = group.pop(late)
            everybody = [member.host.peer_id for member in (*group, latecomer)]

            async def come() -> None:
                await running.wait()
                began = trio.current_time()
                with pytest.raises(RoundFailed):
                    await latecomer.averager.average(
                        1, 5, memoryview(vectors[2]), 1.0, expected=everybody, deadline=20
                    )
                assert trio.current_time() - began < 10  # of 20 given: it is told
                assert not any(isinstance(event, RosterCommitted) for event in latecomer.events)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(come)
                outcomes = agree(await run_round(group, vectors[:2], [1.0, 1.0]))
        assert len(outcomes) == 2
        assert all(outcome.fraction == 1.0 and not outcome.drops for outcome in outcomes)

    trio.run(main)


@pytest.mark.long
def test_a_machine_that_stands_still_in_the_exchange_drops_nobody() -> None:
    async def main() -> None:
        vectors = [numbers(20_000, seed) for seed in range(2)]
        wire = Tripwire(4, lambda: time.sleep(6))  # both members, past the mark for silent senders
        async with members(2, reducer=wire.make, config=RoundConfig(part_bytes=8192)) as group:
            outcomes = agree(await run_round(group, vectors, [1.0] * 2, deadline=12))
        assert len(outcomes) == 2
        assert all(outcome.fraction == 1.0 and not outcome.drops for outcome in outcomes)

    trio.run(main)


@pytest.mark.parametrize("when", [0.0, 0.005, 0.02])
def test_a_death_around_the_commit_leaves_no_one_hanging(when: float) -> None:
    async def main() -> None:
        vectors = [numbers(3000, seed) for seed in range(4)]
        async with members(4) as group, trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(when)
                group[2].kill()

            nursery.start_soon(kill)
            began = trio.current_time()
            results = await run_round(group, vectors, [1.0] * 4, deadline=12)
            assert trio.current_time() - began < 14
            survivors = [result for i, result in enumerate(results) if i != 2]
            outcomes = [result for result in survivors if isinstance(result, Outcome)]
            assert len({outcome.checksum for outcome in outcomes}) <= 1
            assert len(outcomes) >= 2, results

    trio.run(main)


@pytest.mark.catalogue(36)
def test_one_alone_is_told_why_and_when_its_mate_is_dead_soon() -> None:
    async def main() -> None:
        async with members(2) as group:
            group[1].kill()
            await trio.testing.wait_all_tasks_blocked(0.05)
            began = trio.current_time()
            peers = [member.host.peer_id for member in group]
            with pytest.raises(RoundFailed):
                await group[0].averager.average(
                    1, 0, memoryview(numbers(10, 0)), 1.0, expected=peers, deadline=20
                )
            assert trio.current_time() - began < 6

    trio.run(main)


def test_all_weights_zero_change_nothing() -> None:
    async def main() -> None:
        async with members(2) as group:
            vectors = [numbers(100, seed) for seed in range(2)]
            results = await run_round(group, vectors, [0, 0])
            assert all(isinstance(result, str) and "no weight" in result for result in results), results

    trio.run(main)


@pytest.mark.parametrize(("stage", "code"), [(2, "wrong_stage"), (None, "no_certificate")])
def test_outsiders_and_other_stages_are_refused(stage: int | None, code: str) -> None:
    async def main() -> None:
        async with members(1) as group:
            stranger = Host(Identity.generate(b"s" * 32))
            admit(stranger, stage)
            async with stranger.run():
                target = group[0].host
                call = await stranger.call(target.peer_id, "/agora/round/1", addrs=target.addrs, deadline=5)
                async with call:
                    await call.send({"t": "where", "number": 0})
                    with pytest.raises(Refused) as refusal:
                        await call.receive()
                    assert refusal.value.code == code

    trio.run(main)


def test_nonsense_ends_the_call() -> None:
    async def main() -> None:
        async with members(2) as group:
            mine, theirs = group[0].host, group[1].host
            for first in ({"t": "nonsense"}, {"t": "link", "group": b"short"}, {"t": "announce"}, {}):
                async with await mine.call(theirs.peer_id, "/agora/round/1", deadline=5) as call:
                    await call.send(first)
                    with trio.fail_after(2), pytest.raises(PeerGone):
                        await call.receive()

    trio.run(main)
