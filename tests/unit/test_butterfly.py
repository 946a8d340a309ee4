"""The butterfly under every fault: members that finish agree to the byte, and what counts is the mean.

``Swarm`` runs the state machines of all members over in-memory links that keep order within a pair, as
TCP does, and deliver between pairs in an order drawn from a seed, some payloads in two pieces. Faults strike
after a number of deliveries: a member dies (all its links end), a link is cut (both ends notice, later and
apart), a member falls mute (connected, does nothing; only time resolves it), a member becomes slow (a few
messages, to it or from it, pass while everybody else has nothing left to do but wait), the machine of all
stands still for more than half of the round.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections import deque
from collections.abc import Sequence

import attrs
import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2p.averaging.butterfly import Exchange, Send
from p2p.averaging.reducer import Codec, PlainCodec, PlainReducer
from p2p.averaging.roster import Candidate, RoundKey, draft
from p2p.averaging.verdict import Value, Verdict
from p2p.errors import RemoteError
from stage.codec import CODECS

SECONDS = 10.0
KEY = RoundKey(run="r", stage=0, number=1)


def sign_as(peer: str) -> object:
    return lambda domain, data: hashlib.sha512(f"{peer}{domain}".encode() + data).digest()


def verify(peer: str, domain: str, data: bytes, signature: bytes) -> bool:
    return signature == sign_as(peer)(domain, data)  # type: ignore[operator]


@attrs.define
class Fault:
    """``what`` strikes ``who`` (a member, or a pair for a cut) after ``after`` deliveries."""

    what: str
    who: tuple[int, int]
    after: int


class Swarm:
    """All members of one round and the links between them."""

    def __init__(
        self,
        weights: Sequence[float],
        seed: int,
        *,
        floats: int = 1500,
        vectors: list[bytes] | None = None,
        codec: Codec = PlainCodec(),
        audits: random.Random | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        n = len(weights)
        self.n = n
        members = [
            Candidate(peer=f"m{i}", addrs=("/a",), bandwidth=1.0, weight=weights[i])  # type: ignore[arg-type]
            for i in range(n)
        ]
        self.roster = draft(
            KEY, members[0].peer, members, slice_index=0, floats=floats, part_bytes=1024, seconds=SECONDS
        )
        numbers = random.Random(seed + 1)
        self.vectors = vectors or [
            struct.pack(f"<{floats}f", *(numbers.uniform(-3, 3) for _ in range(floats))) for _ in range(n)
        ]
        self.exchanges = [
            Exchange(
                self.roster,
                peer,
                memoryview(self.vectors[i]),
                PlainReducer,
                sign_as(peer),  # type: ignore[arg-type]
                verify,  # type: ignore[arg-type]
                0.0,
                SECONDS,
                codec,
                audits or random.Random(seed + i),
            )
            for i, peer in enumerate(self.roster.peers)
        ]
        self.links: dict[tuple[int, int], deque[Send | None]] = {
            (a, b): deque() for a in range(n) for b in range(n) if a != b
        }
        self.begun: dict[tuple[int, int], memoryview] = {}
        """Where the payload of the first message of a link goes, once some of it is there."""
        self.dead: set[int] = set()
        self.mute: set[int] = set()
        self.slow: set[int] = set()
        self.cut: set[tuple[int, int]] = set()
        self.delivered = 0
        self.now = 0.0

    def run(self, faults: Sequence[Fault] = ()) -> None:
        waiting = sorted(faults, key=lambda fault: fault.after)
        for i, exchange in enumerate(self.exchanges):
            if i not in self.dead:
                exchange.start()
                self._drain(i)
        while True:
            while waiting and waiting[0].after <= self.delivered:
                self._strike(waiting.pop(0))
            waiting_for = [
                pair for pair, queue in self.links.items() if queue and pair[1] not in (self.mute | self.dead)
            ]
            ready = [pair for pair in waiting_for if not self.slow & set(pair)]
            if ready:
                self._deliver(self.rng.choice(ready))
                continue
            if waiting:  # nothing left to deliver: whatever has not struck yet does so now
                self._strike(waiting.pop(0))
                continue
            alive = [
                i for i in range(self.n) if i not in self.dead | self.mute and not self.exchanges[i].done
            ]
            if not alive:
                return
            late = [pair for pair in waiting_for if self.rng.random() < 0.7]
            if late and self.rng.random() < 0.7:
                self._deliver(self.rng.choice(late))
                continue
            self.now = min(self.exchanges[i].wake_at() for i in alive)
            assert self.now <= SECONDS + 1e-6
            for i in alive:
                self.exchanges[i].tick(self.now)
                self._drain(i)

    def _deliver(self, pair: tuple[int, int]) -> None:
        message = self.links[pair][0]
        sender, receiver = pair
        exchange = self.exchanges[receiver]
        if message is not None and pair not in self.begun:
            size = len(message.payload)
            place = exchange.place(sender, message.header, size)
            self.begun[pair] = memoryview(bytearray(size)) if place is None else place
            if place is not None:
                place[: size // 2] = message.payload[: size // 2]
                if self.rng.random() < 0.5:
                    return  # the rest comes later, if at all
        self.links[pair].popleft()
        self.delivered += 1
        payload = self.begun.pop(pair, memoryview(b""))
        if message is None:
            exchange.lost(sender, "connection lost")
        else:
            payload[:] = message.payload
            exchange.heard(sender, message.header, payload)
        self._drain(receiver)

    def _drain(self, member: int) -> None:
        out, self.exchanges[member].out = self.exchanges[member].out, []
        for send in out:
            if (member, send.to) not in self.cut and send.to not in self.dead:
                self.links[member, send.to].append(send)

    def _strike(self, fault: Fault) -> None:
        a, b = fault.who
        if fault.what == "mute":
            self.mute.add(a)
        elif fault.what == "slow":
            self.slow.add(a)
        elif fault.what == "stop":
            self._stop()
        elif fault.what == "kill":
            self.dead.add(a)
            for other in range(self.n):
                if other != a:
                    self._break(a, other)
        elif a != b:
            self._break(a, b)
            self._break(b, a)

    def _stop(self) -> None:
        """All wake up late, and look at the clock before they read what has come."""
        self.now = min(0.9 * SECONDS, self.now + 0.6 * SECONDS)
        for i in range(self.n):
            if i not in self.dead | self.mute and self.now >= self.exchanges[i].wake_at():
                self.exchanges[i].stood_still(self.now)
                self.exchanges[i].tick(self.now)
                self._drain(i)

    def _break(self, a: int, b: int) -> None:
        """``b`` gets some prefix of what ``a`` had on the way, then the end."""
        if (a, b) not in self.cut:
            self.cut.add((a, b))
            queue = self.links[a, b]
            for _ in range(self.rng.randint(0, len(queue))):
                queue.pop()
            queue.append(None)

    @property
    def finished(self) -> list[int]:
        return [
            i
            for i in range(self.n)
            if i not in self.dead and i not in self.mute and self.exchanges[i].outcome is not None
        ]

    def check(self) -> None:
        """The invariants: same ranges, same checksum, same bytes; own numbers everywhere else."""
        outcomes = {i: self.exchanges[i].outcome for i in self.finished}
        assert len({(o.checksum, tuple(o.averaged), o.members) for o in outcomes.values() if o}) <= 1
        for i, outcome in outcomes.items():
            assert outcome is not None
            assert 0 < outcome.fraction <= 1
            expected = bytearray(self.vectors[i])
            for start, stop in outcome.averaged:
                expected[start * 4 : stop * 4] = outcome.vector[start * 4 : stop * 4]
            assert outcome.vector == expected


def mean(swarm: Swarm) -> list[float]:
    weights = [member.weight for member in swarm.roster.members]
    count = len(swarm.vectors[0]) // 4
    rows = [struct.unpack(f"<{count}f", vector) for vector in swarm.vectors]
    return [
        sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
        for column in zip(*rows, strict=True)
    ]


@pytest.mark.parametrize("weights", [[1, 1], [1, 3], [1, 2, 3], [1, 0, 2], [0, 5], [1, 1, 1, 1], [2] * 7])
def test_without_faults_all_hold_the_weighted_mean(weights: list[float]) -> None:
    swarm = Swarm(weights, 1)
    swarm.run()
    assert swarm.finished == list(range(len(weights)))
    swarm.check()
    for exchange in swarm.exchanges:
        outcome = exchange.outcome
        assert outcome is not None
        assert outcome.fraction == 1.0
        assert outcome.averaged == [(0, 1500)]
        assert outcome.drops == ()
        assert set(outcome.members) == set(swarm.roster.peers)
        assert outcome.weight_total == sum(member.weight for member in swarm.roster.members)
        assert struct.unpack("<1500f", outcome.vector) == pytest.approx(mean(swarm), rel=1e-6, abs=1e-7)


@settings(max_examples=150, deadline=None)
@given(st.integers(3, 6), st.integers(0, 5), st.integers(0, 200), st.integers(0, 1 << 30))
@example(3, 0, 0, 0)
def test_one_member_dies_at_any_moment_and_all_others_finish_alike(
    n: int, victim: int, after: int, seed: int
) -> None:
    swarm = Swarm([1.0] * n, seed)
    swarm.run([Fault("kill", (victim % n, 0), after)])
    swarm.check()
    assert len(swarm.finished) == n - 1, [exchange.failed for exchange in swarm.exchanges]
    assert swarm.now == 0.0  # every loss is settled by the loss itself, nobody waits for a timer
    outcome = swarm.exchanges[swarm.finished[0]].outcome
    assert outcome is not None
    assert outcome.fraction == 1.0  # its deputy reduced what it had not


FAULTS = st.lists(
    st.builds(
        Fault,
        st.sampled_from(["kill", "cut", "cut", "mute", "slow", "stop"]),
        st.tuples(st.integers(0, 5), st.integers(0, 5)),
        st.integers(0, 150),
    ),
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6), FAULTS, st.integers(0, 1 << 30), st.sampled_from([0.0, 1.0]))
def test_whatever_happens_those_who_finish_agree(
    n: int, faults: list[Fault], seed: int, first: float
) -> None:
    swarm = Swarm([first] + [1.0] * (n - 1), seed)
    usable = [attrs.evolve(fault, who=(fault.who[0] % n, fault.who[1] % n)) for fault in faults]
    swarm.run(usable)
    swarm.check()
    assert all(e.done for i, e in enumerate(swarm.exchanges) if i not in swarm.dead | swarm.mute)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_thousand_schedules_of_faults() -> None:
    rng = random.Random(20261121)
    finished = whole = 0
    for _ in range(2000):
        n = rng.randint(2, 9)
        swarm = Swarm([rng.choice([0.0, 1.0, 3.0]) for _ in range(n - 1)] + [1.0], rng.randrange(1 << 30))
        faults = [
            Fault(
                rng.choice(["kill", "kill", "cut", "mute", "slow", "stop"]),
                (rng.randrange(n), rng.randrange(n)),
                rng.randrange(40 * n),
            )
            for _ in range(rng.randint(0, 4))
        ]
        swarm.run(faults)
        swarm.check()
        assert all(e.done for i, e in enumerate(swarm.exchanges) if i not in swarm.dead | swarm.mute)
        outcomes = [swarm.exchanges[i].outcome for i in swarm.finished]
        finished += bool(outcomes)
        whole += bool(outcomes and outcomes[0] and outcomes[0].fraction == 1.0)
    assert finished > 1500  # pairs that lose one fail, and so do rounds that lose half
    assert whole > 1300


@pytest.mark.parametrize("after", [0, 3, 10, 25])
def test_a_machine_that_stands_still_drops_nobody_and_a_death_after_it_is_still_mended(after: int) -> None:
    swarm = Swarm([1.0] * 4, after)
    swarm.run([Fault("stop", (0, 0), after)])
    swarm.check()
    assert swarm.finished == [0, 1, 2, 3]
    assert all(e.outcome and e.outcome.fraction == 1.0 and not e.outcome.drops for e in swarm.exchanges)
    swarm = Swarm([1.0] * 4, after)
    swarm.run([Fault("stop", (0, 0), after), Fault("kill", (1, 1), after + 2)])
    swarm.check()
    assert swarm.finished == [0, 2, 3]
    assert all(swarm.exchanges[i].outcome.fraction == 1.0 for i in swarm.finished)  # type: ignore[union-attr]


def test_a_machine_that_stands_still_again_and_again_still_drops_who_is_silent() -> None:
    exchange = Swarm([1.0] * 3, 1).exchanges[0]
    due = exchange.wake_at()
    exchange.stood_still(due + 1.0)
    put_off = exchange.wake_at()
    assert put_off > due + 1.0
    exchange.stood_still(put_off + 1.0)
    assert exchange.wake_at() == put_off
    exchange.tick(put_off + 1.0)  # the mark is passed
    assert {why for _, why in exchange.drops} == {"sent nothing in time"}


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_numbers_that_are_not_finite_are_refused_and_the_sender_still_receives(culprit: int) -> None:
    good = [struct.pack("<300f", *([float(i + 1)] * 300)) for i in range(3)]
    good[culprit] = (
        struct.pack("<300f", *([1.0] * 299 + [float("nan")])) if culprit else b"\x00\x00\xc0\x7f" * 300
    )
    swarm = Swarm([1, 1, 1], 3, floats=300, vectors=good)
    swarm.run()
    swarm.check()
    assert len(swarm.finished) == 3
    outcome = swarm.exchanges[(culprit + 1) % 3].outcome
    assert outcome is not None
    assert outcome.fraction == 1.0
    values = struct.unpack("<300f", outcome.vector)
    assert all(value == value for value in values)


def test_a_mute_sender_is_dropped_by_time_alone() -> None:
    swarm = Swarm([1, 1, 1, 1], 5)
    swarm.run([Fault("mute", (2, 0), 0)])
    swarm.check()
    assert swarm.finished == [0, 1, 3]
    outcome = swarm.exchanges[0].outcome
    assert outcome is not None
    assert [peer for peer, _ in outcome.drops] == [swarm.roster.peers[2]]
    assert outcome.fraction == 1.0


def test_nonsense_from_a_member_is_a_remote_error() -> None:
    swarm = Swarm([1, 0, 1], 7)
    weights = [member.weight for member in swarm.roster.members]
    light = weights.index(0)
    me, heavy = [i for i in range(3) if i != light]
    exchange = swarm.exchanges[me]
    owners = exchange.roster.owners
    mine, other = owners.index(me), owners.index(light)
    part = memoryview(bytes(1024))
    exchange.heard(heavy, {"t": "raw", "p": mine}, part)
    signed = {"t": "mean", "p": other, "rd": light, "by": 5, "sig": bytes(64)}
    bad: list[tuple[int, dict[str, object], memoryview]] = [
        (heavy, {"t": "raw", "p": mine}, part),  # twice
        (heavy, {"t": "raw", "p": other}, part),  # reduced elsewhere
        (light, {"t": "raw", "p": mine}, part),  # has no weight
        (heavy, {"t": "raw", "p": 99}, part),
        (heavy, {"t": "raw"}, part),
        (light, {"t": "nothing"}, part),
        (light, {}, part),
        (light, signed, part),  # not signed by it
        (heavy, {**signed, "p": mine}, part),
        (light, {**signed, "by": 0}, part),
        (light, signed, part[:4]),
        (heavy if exchange.roster.deputy(me) == light else light, {"t": "ack", "p": mine}, part),
        (heavy, {"t": "ask", "p": [owners.index(exchange.roster.deputy(me))]}, part),
        (heavy, {"t": "ask", "p": list(range(5000))}, part),
        (heavy, {"t": "gone", "p": [mine]}, part),
        (light, {"t": "report"}, part),
        (light, {"t": "accept", "ballot": heavy, "mask": 3}, part[:96]),
    ]
    for sender, header, payload in bad:
        with pytest.raises(RemoteError):
            exchange.heard(sender, header, payload)


def test_a_mean_that_is_still_coming_changes_nothing_once_another_one_came() -> None:
    swarm = Swarm([1, 1, 1], 7)
    exchange = swarm.exchanges[2]
    part = swarm.roster.owners.index(0)
    begin, end = swarm.roster.spans[part]
    deputy, reducer = swarm.roster.peers[1], swarm.roster.peers[0]
    assert swarm.roster.deputy(0) == 1

    def told(peer: str, mean: bytes) -> dict[str, object]:
        said = b"%b%d/%d/%b" % (swarm.roster.group, part, 7, blake3(mean).digest())
        signature = sign_as(peer)("round-part", said)  # type: ignore[operator]
        return {"t": "mean", "p": part, "rd": swarm.roster.peers.index(peer), "by": 7, "sig": signature}

    slow, good = b"\x01" * (end - begin), b"\x02" * (end - begin)
    place = exchange.place(0, told(reducer, slow), len(slow))
    assert place is not None
    assert exchange.place(1, told(deputy, good), len(good)) is None  # one at a time
    assert exchange.place(1, told(deputy, good), len(good) - 4) is None
    with pytest.raises(RemoteError, match="did not sign"):
        exchange.heard(1, told(deputy, slow), memoryview(good))
    exchange.heard(1, told(deputy, good), memoryview(good))
    place[:] = slow
    exchange.heard(0, told(reducer, slow), place)
    assert bytes(exchange._result.vector[begin:end]) == good
    assert exchange.place(0, told(reducer, slow), len(slow)) is None  # held
    mine = swarm.roster.owners.index(2)
    assert exchange.place(0, {"t": "mean", "p": mine}, 1024) is None  # reduced here
    for header in ({"t": "mean"}, {"t": "mean", "p": True}, {"t": "mean", "p": -1}, {"t": "mean", "p": 999}):
        assert exchange.place(0, header, 1024) is None


def test_a_reducer_that_tells_two_stories_makes_no_part_count() -> None:
    digests = [b"a" * 16 + b"b" * 16, b"a" * 16 + b"c" * 16, b"a" * 16 + b"b" * 16]
    verdict = Verdict(0, 3, 2)
    verdict.report(digests[0])
    for member in (1, 2):
        verdict.heard(member, "report", {}, memoryview(digests[member]))
    verdict.start()
    verdict.heard(1, "accepted", {"ballot": 0}, memoryview(b""))
    # Member 1 holds half of what the best one holds: it sits out, the others keep both parts.
    assert verdict.decided == Value(0b101, digests[0])


class Always(random.Random):
    """Audits whenever it is asked."""

    def random(self) -> float:
        return 0.0


class Liar(PlainReducer):
    """Returns something near the mean."""

    def finish(self) -> bytes:
        values = struct.unpack(f"<{len(self._sum)}f", super().finish())
        return struct.pack(f"<{len(values)}f", *(value * 1.01 for value in values))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 0, 2, 5], [0.5] * 6])
def test_audits_of_honest_reducers_find_nothing_and_hold_nobody_up(weights: list[float], codec: str) -> None:
    swarm = Swarm(weights, 3, floats=6000, codec=CODECS[codec], audits=Always(1))
    swarm.run()
    swarm.check()
    assert swarm.finished == list(range(len(weights)))
    assert swarm.now == 0.0
    for exchange, member in zip(swarm.exchanges, swarm.roster.members, strict=True):
        assert len(exchange._auditor._showed) == (len(weights) - 1 if member.weight else 0)
    assert all(e.accused is None and e.outcome and not e.outcome.drops for e in swarm.exchanges)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("liar", [0, 1, 3])
def test_a_reducer_that_is_audited_does_not_get_away_with_another_mean(liar: int, codec: str) -> None:
    swarm = Swarm([1.0] * 4, liar, floats=6000, codec=CODECS[codec], audits=Always(1))
    swarm.exchanges[liar]._make_reducer = Liar
    swarm.exchanges[liar]._auditor.part = -1
    swarm.run()
    swarm.check()
    assert swarm.finished == [0, 1, 2, 3]
    deputy = swarm.exchanges[swarm.roster.deputy(liar)]
    assert [e.accused for e in swarm.exchanges].count(None) == 3
    assert deputy.accused == swarm.roster.peers[liar]
    assert deputy.outcome is not None
    [(named, why)] = deputy.outcome.drops
    assert named == deputy.accused
    part = int(why.split("part ")[1].split()[0])
    begin, end = (place // 4 for place in swarm.roster.spans[part])
    for exchange in swarm.exchanges:  # the part counts for nobody
        assert exchange.outcome is not None
        assert all(stop <= begin or start >= end for start, stop in exchange.outcome.averaged)
        assert exchange.outcome.fraction == pytest.approx(1 - (end - begin) / 6000)


def test_a_contributor_that_does_not_answer_an_audit_ends_it_without_a_finding() -> None:
    swarm = Swarm([1.0] * 3, 2, audits=Always(1))
    mute = swarm.exchanges[0]
    mute._show = lambda deputy, part: None  # type: ignore[method-assign]
    swarm.run()
    swarm.check()
    assert swarm.finished == [0, 1, 2]
    assert all(exchange.accused is None for exchange in swarm.exchanges)
    assert swarm.now <= 0.5 * SECONDS


def test_who_is_distrusted_reduces_nothing() -> None:
    members = Swarm([1.0] * 3, 1).roster.members
    made = draft(
        KEY, members[0].peer, list(members), slice_index=0, floats=5000, part_bytes=1024, seconds=9.0,
        distrusted=[members[1].peer],
    )  # fmt: skip
    assert [bool(share) for share in made.shares] == [True, False, True]
    assert 1 not in made.owners


def test_a_report_with_little_does_not_void_the_round() -> None:
    verdict = Verdict(0, 3, 4)
    verdict.report(b"a" * 64)
    verdict.heard(1, "report", {}, memoryview(b"a" * 64))
    verdict.heard(2, "report", {}, memoryview(bytes(64)))
    verdict.start()
    verdict.heard(2, "accepted", {"ballot": 0}, memoryview(b""))
    assert verdict.decided == Value(0b011, b"a" * 64)
