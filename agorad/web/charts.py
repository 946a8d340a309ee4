"""Curves as SVG, drawn by pygal and dressed by the page's own style sheet. Pure; slow enough for a thread.

pygal brings its colours as an inline style sheet and its tooltips as a script: the page's content policy
allows neither, so they are taken out. A chart is a picture with a sentence that says what it shows; its
figures are also there as a table.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from agorad.web.html import Child, Safe, tag

POINTS: Final = 120
"""Most points of a line; what is between them is averaged."""
ROWS: Final = 12
"""Of the table."""

CLOCK_STEPS: Final = (
    1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400,
)  # fmt: skip
"""Seconds between the labels of a time axis."""

Points = Sequence[tuple[float, float]]


def figure(
    key: str,
    title: str,
    lines: Sequence[tuple[str, Points]],
    *,
    x: str,
    y: str,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    from_zero: bool = False,
) -> Safe:
    """A chart with its sentence and its table; ``key`` names its elements."""
    lines = [(name, points) for name, points in lines if points]
    if not lines or max(len(points) for _name, points in lines) < 2:
        return tag(
            "figure",
            tag("figcaption", title, id=f"{key}-title"),
            tag("p", "There is nothing to draw yet.", cls="empty"),
            id=key,
        )
    drawn = _drawn(lines, show_x, show_y, from_zero)
    said = ". ".join(_sentence(name, points, x, show_x, show_y) for name, points in lines)
    return tag(
        "figure",
        tag("figcaption", title, _legend([name for name, _points in lines]), id=f"{key}-title"),
        tag(
            "div",
            drawn,
            cls="chart",
            role="img",
            aria_label=f"{title}. {said}.",
        ),
        tag(
            "details",
            tag("summary", "Figures ", tag("span", f"of {title}", cls="hidden")),
            [_table(name, points, x, y, show_x, show_y) for name, points in lines],
            id=f"{key}-figures",
        ),
        id=key,
    )


def thinned(points: Points, most: int = POINTS) -> list[tuple[float, float]]:
    """At most so many: the means of equal groups, the last point as it is."""
    if len(points) <= most:
        return list(points)
    size = len(points) / (most - 1)
    groups = [points[int(i * size) : int((i + 1) * size)] for i in range(most - 1)]
    means = [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups if g]
    return [*means, points[-1]]


def clock_time(at: float, form: str = "%H:%M:%S") -> str:
    """Of a unix time, UTC."""
    return time.strftime(form, time.gmtime(at))


def _drawn(
    lines: Sequence[tuple[str, Points]],
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    from_zero: bool,
) -> Safe:
    import pygal

    heights = [*_all(lines, 1), *([0.0] if from_zero else [])]
    labels = (clock_ticks if show_x is clock_time else ticks)(_all(lines, 0))
    if show_x is clock_time and len(labels) > 1:
        show_x = partial(clock_time, form=_clock_form(labels[1] - labels[0]))
    chart: Any = pygal.XY(
        width=440, height=210, margin=4, spacing=6, show_legend=False, show_dots=False, stroke=True,
        js=[], css=[], disable_xml_declaration=True, no_prefix=True, print_values=False,
        x_labels=labels, y_labels=ticks(heights), range=(min(heights), max(heights) or 1.0),
        truncate_label=-1,
        show_x_guides=False, show_y_guides=True,
        x_value_formatter=show_x, value_formatter=show_y,
    )  # fmt: skip
    for name, points in lines:
        few = thinned(points)
        chart.add(name, few, show_dots=len(few) < 40)
    svg = str(chart.render(is_unicode=True))
    for part in _TAKEN_OUT:
        svg = part.sub("", svg)
    return Safe(_NUMBER.sub(lambda found: f"{float(found[0]):.1f}", svg))


def ticks(values: Sequence[float], about: int = 4) -> list[float]:
    """Round numbers over the range of the values."""
    low, high = min(values), max(values)
    if high <= low:
        return [low]
    raw = (high - low) / about
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def clock_ticks(values: Sequence[float], about: int = 4) -> list[float]:
    """Whole minutes, hours and days, or what divides them, over a range of unix times."""
    low, high = min(values), max(values)
    step = next((step for step in CLOCK_STEPS if step * about >= high - low), CLOCK_STEPS[-1])
    step *= math.ceil((high - low) / step / (2 * about)) or 1  # many days
    return [float(at) for at in range(math.ceil(low / step) * step, math.floor(high) + 1, step)] or [low]


def _clock_form(step: float) -> str:
    """What of a time tells labels apart that are so many seconds from each other."""
    return (
        "%d %b"
        if step >= 86_400
        else "%d %b %H:%M"
        if step >= 43_200
        else "%H:%M"
        if step >= 60
        else "%H:%M:%S"
    )


def _all(lines: Sequence[tuple[str, Points]], axis: int) -> list[float]:
    return [point[axis] for _name, points in lines for point in points]


_TAKEN_OUT: Final = (
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"<defs>.*?</defs>|<style.*?</style>|<script.*?</script>", re.DOTALL),
    re.compile(r"<desc[^>]*>.*?</desc>", re.DOTALL),
    re.compile(r"<title>.*?</title>", re.DOTALL),
    re.compile(r'<g transform="[^"]*" class="plot tooltip-overlay">.*(?=</g></svg>)', re.DOTALL),
    re.compile(r' style="[^"]*"| id="[^"]*"'),
)
_NUMBER: Final = re.compile(r"-?\d+\.\d{2,}(?:e-?\d+)?")


def _legend(names: Sequence[str]) -> Child:
    if len(names) < 2:
        return None
    return tag("span", [tag("span", name, cls=f"key key-{i}") for i, name in enumerate(names)], cls="keys")


def _sentence(
    name: str, points: Points, x: str, show_x: Callable[[float], str], show_y: Callable[[float], str]
) -> str:
    (first_x, first), (last_x, last) = points[0], points[-1]
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    return (
        f"{name}: from {show_y(first)} at {x} {show_x(first_x)} to {show_y(last)} at {show_x(last_x)}, "
        f"between {show_y(low)} and {show_y(high)}"
    )


def _table(
    name: str,
    points: Points,
    x: str,
    y: str,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
) -> Safe:
    rows = [tag("tr", tag("td", show_x(at)), tag("td", show_y(value))) for at, value in thinned(points, ROWS)]
    head = tag("tr", tag("th", x, scope="col"), tag("th", y, scope="col"))
    return tag("table", tag("caption", name), tag("thead", head), tag("tbody", rows))
