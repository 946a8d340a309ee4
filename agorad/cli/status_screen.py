"""The screen of ``agoractl status``: a verdict first, then what the nodes do, then what is wrong.

One node is shown in words, a line a subject; several are a table, a row each. "-" is what there is not.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, Final

from agorad.words import align, duration, or_dash

_COLUMNS: Final = (
    "node", "role", "phase", "stage", "step", "loss", "batches", "a min", "last round", "points", "peers",
    "up",
)  # fmt: skip
_DISPENSABLE: Final = ("role", "up", "peers", "points", "batches")
"""What a narrow terminal does without, in this order."""


def screen(nodes: list[dict[str, Any]], width: int | None = None, *, down: int = 0) -> list[str]:
    """Lines for people, of ``width`` where they can be; ``down`` further nodes do not answer."""
    lines = _one(nodes[0]) if len(nodes) == 1 and not down else table(nodes, width, down=down)
    return [*lines, *_warnings(nodes, width)]


def table(nodes: list[dict[str, Any]], width: int | None = None, *, down: int = 0) -> list[str]:
    """The verdict and a row a node. Columns are left out where ``width`` is too small."""
    runs = sorted({str(node["run"]) for node in nodes})
    phases = Counter(str(node["phase"]) for node in nodes)
    said = ", ".join(f"{count} {phase}" for phase, count in phases.most_common())
    said += f", {down} not answering" if down else ""
    rows = [_row(node) for node in nodes]
    count = len(nodes) + down
    head = f"{count} node{'s' * (count != 1)} of {', '.join(runs)}: {said}"
    return [head, "", *align(_COLUMNS, rows, width, _DISPENSABLE)]


def _warnings(nodes: list[dict[str, Any]], width: int | None) -> list[str]:
    """Whole, as their end says what to do; on several lines where they are longer than ``width``."""
    found = [f"! {node['name']}: {warning}" for node in nodes for warning in node.get("warnings", ())]
    return ["", *(line for text in found for line in folded(text, width))] if found else []


def folded(text: str, width: int | None) -> list[str]:
    """Lines of at most ``width``, the further ones indented by four; broken within no word."""
    if width is None or len(text) <= width:
        return [text]
    import textwrap  # not every screen needs it

    return textwrap.wrap(
        text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _one(node: dict[str, Any]) -> list[str]:
    """In words: a person with one node has one screen, not one row."""
    subjects = [
        ("work", _work(node)),
        ("loss", "" if node.get("loss") is None else f"{node['loss']:.4f}"),
        ("round", _round(node.get("round"), ago=True)),
        ("queue", _queue(node.get("queue"))),
        ("points", _earned(node.get("points"))),
        ("peers", f"{node['peers']} connected"),
        ("run", _run(node)),
        ("node", node["peer_id"]),
        ("agorad", f"{node.get('version', 'of an older version')}, process {node['pid']}"),
    ]
    for addr in node.get("addrs", ()):
        subjects.append(("" if subjects[-1][0] in ("at", "") else "at", str(addr).partition("/p2p/")[0]))
    return [_verdict(node), "", *(f"  {name:<8}{text}" for name, text in subjects if text)]


def _verdict(node: dict[str, Any]) -> str:
    said = f"{node['name']} is {node['phase']}"
    if (until := node.get("paused_until")) is not None:
        said += f" until {time.strftime('%H:%M', time.localtime(until))}"
    if node.get("stage") is not None:
        said += f" in stage {node['stage']}"
    if node["role"] in ("worker", "trainer"):
        said += f", step {node['step']}"
    return f"{said}, up {duration(node['uptime_s'])}"


def _work(node: dict[str, Any]) -> str:
    batches = node.get("microbatches") or {}
    done = batches.get("completed", batches.get("added"))
    if done is None:
        return ""
    rate = batches.get("per_minute")
    under_way = batches.get("in_progress", batches.get("in_flight"))
    return f"{done} microbatches" + ("" if rate is None else f", {rate:.0f} a minute") + (
        "" if under_way is None else f", {under_way} under way"
    )  # fmt: skip


def _round(last: dict[str, Any] | None, *, ago: bool = False) -> str:
    if not last:
        return ""
    said = f"{last['number']}: {last['fraction']:.0%} of {last['members']}"
    return said + (f", {duration(max(0.0, time.time() - last['at']))} ago" if ago else "")


def _queue(place: dict[str, Any] | None) -> str:
    if not place:
        return ""
    eta = place.get("eta_s")
    return f"place {place['position']}" + ("" if eta is None else f", about {duration(eta)} to go")


def _earned(earned: dict[str, float] | None) -> str:
    return "" if earned is None else f"{earned['compute']:.3g} compute, {earned['presence']:.3g} presence"


def _run(node: dict[str, Any]) -> str:
    version = (node.get("manifest") or {}).get("version")
    return f"{node['run']}" + (f", manifest version {version}" if version else "") + f", as {node['role']}"


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    batches = node.get("microbatches") or {}
    rate = batches.get("per_minute")
    earned = node.get("points")
    return (
        str(node["name"]),
        str(node["role"]),
        str(node["phase"]),
        or_dash(node.get("stage")),
        str(node["step"]) if node["role"] in ("worker", "trainer") else "-",
        "-" if node.get("loss") is None else f"{node['loss']:.3f}",
        or_dash(batches.get("completed", batches.get("added"))),
        "-" if rate is None else f"{rate:.0f}",
        _round(node.get("round")) or "-",
        "-" if earned is None else f"{earned['compute'] + earned['presence']:.3g}",
        str(node["peers"]),
        duration(node["uptime_s"]),
    )
