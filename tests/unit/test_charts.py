"""Axes that can be read: round numbers within the range, a few of them, each unlike the others."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agorad.web.charts import clock_ticks, clock_time, figure, ticks

SPANS = st.floats(1, 10**8)


@given(st.floats(-1e6, 1e6), SPANS)
def test_ticks_lie_within(low: float, span: float) -> None:
    found = ticks([low, low + span])
    assert 1 <= len(found) <= 6
    assert all(low - span * 1e-6 <= one <= low + span * (1 + 1e-6) for one in found)


@given(st.floats(1e9, 3e9), SPANS)
def test_times_lie_within_and_are_few(low: float, span: float) -> None:
    found = clock_ticks([low, low + span])
    assert 1 <= len(found) <= 9
    assert all(low <= one <= low + span for one in found)


@settings(deadline=None, max_examples=20)
@given(st.floats(1e9, 3e9), st.sampled_from([60, 200, 900, 9_000, 90_000, 900_000, 9_000_000]))
def test_labels_tell_times_apart(low: float, span: float) -> None:
    points = [(low + part * span / 50, 1.0 + part) for part in range(51)]
    drawn = figure("chart", "Speed", [("speed", points)], x="time", y="speed", show_x=clock_time, show_y=str)
    axis = re.search(r'<g class="axis x[^"]*">(.*?)<g class="series', drawn, re.DOTALL)
    assert axis is not None
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", axis[1])
    assert 2 <= len(labels) == len(set(labels))


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)]])
def test_nothing_is_drawn_of_less_than_two_points(points: list[tuple[float, float]]) -> None:
    drawn = figure("chart", "Speed", [("speed", points)], x="time", y="speed", show_x=str, show_y=str)
    assert "nothing to draw yet" in drawn
