"""A busy peer is given longer, a dead one is not."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from p2p.patience import LAST, MOST, Patience


def test_a_peer_that_answers_in_time_has_what_the_limit_says() -> None:
    patience = Patience()
    assert patience.with_peer(2.0) == 2.0
    rng = random.Random(1)
    for number in range(200):
        patience.answered(rng.uniform(0.0, 0.8), number / 2)
        patience.woke(rng.uniform(0.0, 0.1))
        assert patience.with_peer(2.0) == 2.0


def test_a_busy_peer_has_longer_and_only_while_it_is_busy() -> None:
    patience = Patience()
    for number, seconds in enumerate((0.1, 0.2, 1.4, 0.3, 1.6, 0.9, 1.8)):
        patience.answered(seconds, number / 2)
    assert patience.with_peer(2.0) == 3.2
    assert patience.with_peer(20.0) == 20.0
    for number in range(LAST):
        patience.answered(0.05, 10 + number / 2)
    assert patience.with_peer(2.0) == 2.0


def test_an_interrupted_line_is_no_busy_peer() -> None:
    patience = Patience()
    for seconds, now in ((0.1, 0.0), (3.0, 4.0), (2.5, 4.0), (2.0, 4.1), (0.1, 4.5), (0.1, 5.0)):
        patience.answered(seconds, now)
        assert patience.with_peer(2.0) == 2.0


def test_who_is_late_itself_judges_later() -> None:
    patience = Patience()
    patience.answered(0.01, 0.0)
    patience.woke(1.2)
    assert patience.with_peer(2.0) > 2.3
    for _ in range(8):
        patience.woke(0.0)
    assert patience.with_peer(2.0) == 2.0


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=50), st.floats(0.01, 100))
def test_it_has_an_end(told: list[tuple[bool, float]], limit: float) -> None:
    patience = Patience()
    for late, seconds in told:
        if late:
            patience.woke(seconds)
        else:
            patience.answered(seconds, seconds)
        assert limit <= patience.with_peer(limit) <= MOST * limit
