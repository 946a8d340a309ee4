"""A round's connections over lines with queues, simulated chunk by chunk, and what one look decides."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter

import pytest

from p2p.averaging.filling import DRAINING, LEAST, LONG_S, LOOK_S, MEASURE_S, MOST, OPEN, SHORT_S, Filling
from p2p.path import NEAR_S, Path

LINE = 25e6
"""Bytes a second: 200 Mbit/s."""
RTT_S = 0.04
QUEUE = 2_500_000
"""Bytes that wait before a line at most: a tenth of a second."""
CHUNK = 20_000

Pair = tuple[int, int]


class Swarm:
    """Members that each send so much to every other, over a line up and a line down of each.

    A window is what a pair may have under way; a chunk for which a queue has no room is sent again a round
    trip later. Answers wait in the queue of the sender's own line down, as real ones do.
    """

    def __init__(
        self, fillings: list[Filling[int] | None], volumes: dict[Pair, int], windows: dict[Pair, int],
        line: float = LINE,
    ) -> None:  # fmt: skip
        self.now = 0.0
        self.lost: list[float] = []
        """When a chunk was."""
        self.done: dict[Pair, float] = {}
        self.arrived: Counter[Pair] = Counter()
        self._fillings = fillings
        self._left = dict(volumes)
        self._volumes = volumes
        self._windows = windows
        self._line = line
        self._under_way: Counter[Pair] = Counter()
        self._rtt = dict.fromkeys(volumes, RTT_S)
        self._rates: dict[Pair, float] = {}
        self._next = dict.fromkeys(volumes, 0.0)
        self._waiting: set[Pair] = set()
        self._free: dict[tuple[str, int], float] = {}
        self._order = itertools.count()
        self._due: list[tuple[float, int, str, Pair, float]] = []

    def run(self) -> float:
        """Seconds until all has arrived."""
        for member in range(len(self._fillings)):
            self._at(0.0, "look", (member, member))
        for pair in self._volumes:
            self._at(0.0, "send", pair)
        while len(self.done) < len(self._volumes):
            self.now, _, what, pair, began = heapq.heappop(self._due)
            getattr(self, f"_{what}")(pair, began)
        return self.now

    def _at(self, when: float, what: str, pair: Pair, began: float = 0.0) -> None:
        heapq.heappush(self._due, (when, next(self._order), what, pair, began))

    def _wait(self, line: tuple[str, int]) -> float:
        return max(0.0, self._free.get(line, 0.0) - self.now)

    def _through(self, line: tuple[str, int]) -> float | None:
        """When a chunk that comes now is through the line; None: no room."""
        wait = self._wait(line)
        if wait * self._line > QUEUE:
            return None
        self._free[line] = self.now + wait + CHUNK / self._line
        return self._free[line]

    def _look(self, pair: Pair, _: float) -> None:
        member, filling = pair[0], self._fillings[pair[0]]
        if filling is None:
            return
        paths = {
            to: Path(
                self._rtt[member, to], RTT_S, 0.0, self._windows[member, to], unsent=self._left[member, to],
                arrived=self.arrived[member, to],
            )
            for sender, to in self._volumes
            if sender == member
        }  # fmt: skip
        for to, rate in filling.look(self.now, paths).items():
            self._rates[member, to] = rate
        self._at(self.now + LOOK_S, "look", pair)

    def _send(self, pair: Pair, _: float) -> None:
        while self._left[pair] > 0 and self._under_way[pair] + CHUNK <= self._windows[pair]:
            if self._next[pair] > self.now:
                if pair not in self._waiting:
                    self._waiting.add(pair)
                    self._at(self._next[pair], "turn", pair)
                return
            rate = self._rates.get(pair, 1e9)
            self._next[pair] = max(self.now, self._next[pair]) + CHUNK / rate
            self._left[pair] -= CHUNK
            self._under_way[pair] += CHUNK
            through = self._through(("up", pair[0]))
            self._at(through + RTT_S / 2, "land", pair, self.now) if through else self._lose(pair)

    def _turn(self, pair: Pair, _: float) -> None:
        self._waiting.discard(pair)
        self._send(pair, 0.0)

    def _land(self, pair: Pair, began: float) -> None:
        through = self._through(("down", pair[1]))
        self._at(through, "take", pair, began) if through else self._lose(pair)

    def _take(self, pair: Pair, began: float) -> None:
        self._at(self.now + RTT_S / 2 + self._wait(("down", pair[0])), "answer", pair, began)

    def _answer(self, pair: Pair, began: float) -> None:
        self._rtt[pair] += (self.now - began - self._rtt[pair]) / 8
        self.arrived[pair] += CHUNK
        self._under_way[pair] -= CHUNK
        if self.arrived[pair] >= self._volumes[pair]:
            self.done.setdefault(pair, self.now)
        self._send(pair, 0.0)

    def _lose(self, pair: Pair) -> None:
        self.lost.append(self.now)
        self._at(self.now + RTT_S, "again", pair)

    def _again(self, pair: Pair, _: float) -> None:
        self._left[pair] += CHUNK
        self._under_way[pair] -= CHUNK
        self._send(pair, 0.0)


def swarm(
    windows: list[int], *, before: float | None = LINE, line: float = LINE, volume: int = 20_000_000
) -> tuple[Swarm, list[Filling[int]]]:
    """Of four; the windows of each pair in turn. ``before`` None: nobody bounds anything."""
    pairs = list(itertools.permutations(range(4), 2))
    fillings = [Filling[int](before or 0.0) for _ in range(4)]
    in_turn = dict(zip(pairs, itertools.cycle(windows), strict=False))
    made = Swarm(
        list(fillings) if before is not None else [None] * 4, dict.fromkeys(pairs, volume), in_turn, line
    )
    return made, fillings


LEAST_S = 3 * 20e6 / LINE


def test_open_windows_lose_nothing_and_the_line_is_full() -> None:
    bounded, _ = swarm([3_000_000, 2_000_000, 4_000_000])
    unbounded, _ = swarm([3_000_000, 2_000_000, 4_000_000], before=None)
    seconds = bounded.run()
    unbounded.run()
    assert not bounded.lost
    assert len(unbounded.lost) > 100
    assert seconds < LEAST_S * 1.05 + RTT_S


def test_pairs_get_equal_parts_whatever_their_windows() -> None:
    windows = [600_000, 1_200_000, 2_400_000, 900_000, 1_800_000]
    bounded, _ = swarm(windows)
    unbounded, _ = swarm(windows, before=None)
    bounded.run()
    unbounded.run()

    def spread(one: Swarm) -> float:
        return max(one.done.values()) - min(one.done.values())

    assert spread(bounded) < 0.3 * spread(unbounded)


def test_a_line_that_is_not_known_is_found_out() -> None:
    """Whatever is lost is lost early on."""
    made, fillings = swarm([1_200_000], before=0.0)
    assert made.run() < LEAST_S * 1.1 + RTT_S
    assert not [when for when in made.lost if when > 0.5]
    assert all(0.9 * LINE < filling.measured < 1.1 * LINE for filling in fillings)


def test_a_line_that_was_thought_slower_is_filled_soon() -> None:
    made, _ = swarm([3_000_000], before=LINE / 2)
    assert made.run() < LEAST_S * 1.15


def test_a_line_that_became_slower_is_known_after_a_round_or_two() -> None:
    before, lost = LINE, []
    for _ in range(3):
        made, fillings = swarm([3_000_000], before=before, line=LINE / 2)
        seconds = made.run()
        lost.append(len(made.lost))
        before = fillings[0].measured
    assert lost[1] < lost[0] / 20
    assert lost[2] == 0
    assert seconds < 2 * LEAST_S * 1.05 + RTT_S


def test_who_has_something_to_send_divides_the_line() -> None:
    filling = Filling[str](LINE)
    ready = Path(RTT_S + 0.02, RTT_S, 0.0, unsent=1)
    idle = Path(RTT_S, RTT_S, 0.0)
    assert filling.look(0.0, {"a": ready, "b": ready, "c": ready})["a"] == pytest.approx(LINE / 3)
    assert filling.look(0.1, {"a": ready, "b": idle, "c": ready})["a"] == pytest.approx(LINE / 2)
    assert filling.look(0.2, {"a": idle, "b": idle, "c": idle})["a"] == pytest.approx(LINE / 3)
    assert filling.look(0.3, {}) == {}


def test_whoever_waits_before_its_receiver_gets_less() -> None:
    filling = Filling[str](LINE)
    path, far = Path(RTT_S + 0.02, RTT_S, 0.0, unsent=1), Path(RTT_S + 0.09, RTT_S, 0.0, unsent=1)
    rates = filling.look(0.0, {"a": path, "b": far})
    assert rates["b"] == pytest.approx(DRAINING * rates["a"])
    assert rates["a"] == pytest.approx(LINE / 2)


def test_the_whole_stays_near_what_arrives_whatever_round_trips_say() -> None:
    slow, fast = Filling[str](LINE), Filling[str](LINE)
    for look in range(200):
        late = slow.look(look * LOOK_S, {"a": Path(RTT_S + 2 * LONG_S, RTT_S, 0.0, unsent=1)})
        soon = fast.look(look * LOOK_S, {"a": Path(RTT_S + SHORT_S / 2, RTT_S, 0.0, unsent=1)})
    assert late["a"] == pytest.approx(LEAST * DRAINING * LINE)
    assert soon["a"] == pytest.approx(MOST * LINE)


@pytest.mark.parametrize("before", [0.0, LINE])
def test_neighbours_are_not_bounded_and_take_nothing_of_the_line(before: float) -> None:
    filling = Filling[str](before)
    for look in range(100):
        near = Path(0.06, NEAR_S / 2, 0.0, unsent=1, arrived=look * 1_000_000)
        assert filling.look(look * LOOK_S, {"near": near}) == {}
    assert filling.measured == 0
    rates = Filling[str](LINE).look(0.0, {"near": near, "far": Path(RTT_S + 0.02, RTT_S, 0.0, unsent=1)})
    assert rates == {"far": pytest.approx(LINE)}


def test_a_connection_that_was_made_anew_counts_from_its_beginning() -> None:
    filling = Filling[str]()
    for look, arrived in enumerate([10_000_000, *[0] * 40]):
        filling.look(look * LOOK_S, {"a": Path(RTT_S, RTT_S, 0.0, unsent=1, arrived=arrived)})
    assert filling.measured == 0


@pytest.mark.parametrize(("pause_every", "measured"), [(12, 0.0), (1000, LINE)])
def test_what_is_sent_in_bursts_says_nothing_of_the_line(pause_every: int, measured: float) -> None:
    filling, arrived = Filling[str](), 0.0
    for look in range(200):
        sending = look % pause_every > 0
        path = Path(RTT_S, RTT_S, 0.0, unsent=sending, arrived=int(arrived))
        filling.look(look * LOOK_S, {"idle": Path(RTT_S, RTT_S, 0.0), "a": path})
        arrived += sending * LINE * LOOK_S
    assert filling.measured == pytest.approx(measured)


def test_what_growing_windows_let_through_is_no_line_but_a_known_one_may_be_more() -> None:
    unknown, known, arrived, first = Filling[str](), Filling[str](LINE / 10), 0.0, 0.0
    for look in range(60):
        path = Path(RTT_S, RTT_S, 0.0, unsent=1, arrived=int(arrived))
        unknown.look(look * LOOK_S, {"a": path})
        known.look(look * LOOK_S, {"a": path})
        first = first or unknown.measured
        if look * LOOK_S == MEASURE_S:
            assert unknown.measured == 0 < known.measured < LINE / 2
        arrived += min(LINE, LINE / 64 * 2 ** (look * LOOK_S / 2 / RTT_S)) * LOOK_S
    assert first > 0.85 * LINE
    assert unknown.measured == known.measured == pytest.approx(LINE)


def test_looks_that_came_seconds_apart_measure_nothing_alone() -> None:
    filling = Filling[str]()
    for look in range(4):
        path = Path(RTT_S, RTT_S, 0.0, unsent=1, arrived=int(look * 2.0 * LINE))
        filling.look(look * 2.0, {"a": path})
        assert filling.measured == 0
    for look in range(1, 17):
        path = Path(RTT_S, RTT_S, 0.0, unsent=1, arrived=int((6.0 + look * LOOK_S) * LINE))
        filling.look(6.0 + look * LOOK_S, {"a": path})
    assert filling.measured == pytest.approx(LINE)


@pytest.mark.parametrize(
    ("before", "window", "rested", "is_open"),
    [
        (0.0, 10 * OPEN, False, False),
        (LINE, 500_000, False, True),  # three parts of 8.3 MB/s over 60 ms
        (LINE, 499_000, False, False),
        (LINE, 500_000, True, False),
        (LINE / 10, 50_000, False, True),
        (LINE * 10, OPEN, False, True),
        (LINE * 10, OPEN - 1, False, False),
    ],
)
def test_a_window_is_open_where_its_part_fits(
    before: float, window: int, rested: bool, is_open: bool
) -> None:
    assert Filling[int](before).is_open(Path(RTT_S, RTT_S, 0.0, window, rested), 3) is is_open
