"""What pages are put together from: tables, badges, the door, the queue, sentences about changes. Pure."""

from __future__ import annotations

import time
from typing import Final

from agorad.console import duration, short
from agorad.web.facts import Facts, Replica
from agorad.web.history import Change
from agorad.web.html import Child, Safe, tag

SHOWN: Final = 24
"""Replicas of a stage that the page lists; the rest is in the API."""
RECENT: Final = 12
PLACES: Final = 20

PHASES: Final = {
    "joining": "joining",
    "queued": "waiting in the queue",
    "downloading": "downloading the state",
    "syncing": "catching up",
    "warming": "warming up",
    "active": "active",
    "paused": "paused by its owner",
    "leaving": "leaving",
    "away": "away",
}


def compact(value: float) -> str:
    """``12``, ``3.4 k``, ``5.6 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def points(pflop: float) -> str:
    """Work in the unit that leaves one to three digits before the point: ``35 GFLOP``, ``3.46 PFLOP``."""
    for unit, size in (("EFLOP", 1e3), ("PFLOP", 1.0), ("TFLOP", 1e-3)):
        if pflop >= size:
            return f"{pflop / size:.3g} {unit}"
    return f"{pflop / 1e-6:.3g} GFLOP" if pflop else "0"


def sentence(change: Change) -> str:
    """What happened, without when."""
    who = f"{change.account}’s {short(change.peer)}"
    match change.what:
        case "joined":
            return f"{who} joined stage {change.stage}"
        case "left":
            return f"{who} left stage {change.stage}"
        case "vanished":
            return f"{who} vanished from stage {change.stage}"
    return f"{who} of stage {change.stage} is {PHASES.get(change.what, change.what)}"


def summary(facts: Facts) -> Child:
    total = facts.manifest.training.total_steps
    last = facts.evaluated
    counted = len(facts.replicas)
    door = facts.door
    tiles: list[tuple[str, str, str]] = [
        ("Step", f"{facts.step:,}", f"of {total:,}" if total else ""),
        ("Loss", "–" if facts.loss is None else f"{facts.loss:.3f}", "in training"),
        (
            "Held-out loss",
            "–" if last is None else f"{last[1]:.3f}",
            "not evaluated yet" if last is None else f"at step {last[0]:,}",
        ),
        ("Tokens a second", compact(facts.tokens_per_second), f"{facts.samples_per_second:.2f} samples"),
        ("Replicas at work", str(facts.active), f"of {counted} in {facts.manifest.model.stages} stages"),
        ("Waiting to join", "–" if door is None else str(door.waiting), door_word(facts)),
    ]
    return [
        tag("h2", "At a glance", id="summary-title", cls="hidden"),
        tag(
            "dl",
            [
                tag("div", tag("dt", name), tag("dd", tag("b", value), " ", tag("span", more)))
                for name, value, more in tiles
            ],
            cls="tiles",
        ),
    ]


def stage_table(facts: Facts, stage: int) -> Child:
    replicas = facts.of_stage(stage)
    layers = facts.manifest.model.layers
    first = sum(layers[:stage])
    said = f"layers {first} to {first + layers[stage] - 1}" if layers[stage] > 1 else f"layer {first}"
    title = tag("h3", f"Stage {stage} ", tag("span", said), id=f"stage-{stage}")
    if not replicas:
        return tag(
            "section",
            title,
            tag("p", badge("missing", "nobody"), " Training waits for a node here.", cls="empty"),
            aria_labelledby=f"stage-{stage}",
        )
    rows = [
        tag(
            "tr",
            tag("th", node_link(replica), scope="row"),
            tag("td", badge(replica.phase, PHASES[replica.phase])),
            tag("td", load(replica)),
            tag("td", f"{replica.step:,}", cls="number"),
            tag("td", f"{replica.rate:.2f}", cls="number minor"),
        )
        for replica in replicas[:SHOWN]
    ]
    more = len(replicas) - SHOWN
    head = [
        tag("th", name, scope="col", cls="minor" if name == "Samples/s" else None)
        for name in ("Node", "Phase", "Load", "Step", "Samples/s")
    ]
    return tag(
        "section",
        title,
        tag(
            "table",
            tag("caption", f"Replicas of stage {stage}", cls="hidden"),
            tag("thead", tag("tr", head)),
            tag("tbody", rows),
        ),
        tag("p", f"and {more} more, in the ", link("/api/v1/swarm", "API"), ".") if more > 0 else None,
        aria_labelledby=f"stage-{stage}",
    )


def node_link(replica: Replica) -> Safe:
    return tag(
        "a",
        tag("span", replica.account, cls="account"),
        " ",
        tag("code", short(replica.peer)),
        href=f"/node/{replica.peer}",
    )


def load(replica: Replica) -> Child:
    if replica.load is None:
        return tag("span", "unknown", cls="empty")
    total = (replica.working or 0) + replica.slots
    said = f"{replica.working} of {total}"
    return tag(
        "span",
        tag("meter", min=0, max=1, value=f"{replica.load:.3f}", aria_label=f"Load: {said} microbatches"),
        tag("span", said),
        cls="load",
    )


def badge(kind: str, text: str) -> Safe:
    return tag("span", text, cls=f"badge {kind if kind.isalpha() else ''}")


def rounds_table(facts: Facts) -> Child:
    rounds = sorted(facts.history.rounds, key=lambda one: one.at, reverse=True)[:RECENT]
    if not rounds:
        return empty("No round has ended yet.")
    rows = [
        tag(
            "tr",
            tag("th", f"Stage {one.stage}, round {one.number}", scope="row"),
            tag("td", str(one.members), cls="number"),
            tag("td", f"{one.fraction:.0%}", cls="number"),
            tag("td", clock_time(one.at), cls="number"),
        )
        for one in rounds
    ]
    head = [tag("th", name, scope="col") for name in ("Round", "Members", "Averaged", "Ended")]
    return tag(
        "table",
        tag("caption", f"The last {len(rows)}"),
        tag("thead", tag("tr", head)),
        tag("tbody", rows),
    )


def changes(facts: Facts) -> Child:
    return change_list(list(facts.history.changes))


def change_list(changes: list[Change]) -> Child:
    if not changes:
        return empty("Nothing has happened since this page began to watch.")
    rows = [
        tag("li", clock_time(change.at), " ", tag("span", sentence(change)))
        for change in reversed(changes[-RECENT:])
    ]
    return tag("ol", rows, cls="events")


def door(facts: Facts) -> Child:
    door = facts.door
    if door is None:
        return tag("p", "The authority does not know yet.")
    rows = [
        ("Places free", f"{door.free:,}"),
        ("Waiting before you", str(door.waiting)),
        ("Your turn", "when the operator lets nodes in again" if door.paused else turn(door.eta_s)),
    ]
    return [
        tag(
            "p",
            badge("paused" if door.paused or not door.free else "active", door_word(facts)),
            cls="about",
        ),
        tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in rows], cls="facts"),
    ]


def door_word(facts: Facts) -> str:
    door = facts.door
    if door is None:
        return ""
    if door.paused:
        return "joins are paused"
    return f"{door.free:,} places free" if door.free else "the run is full"


def turn(eta_s: float | None) -> str:
    if eta_s is None:
        return "when a node leaves; nobody can say when"
    return "at once" if eta_s < 1 else f"in about {duration(eta_s)}"


def queue_table(facts: Facts) -> Child:
    if not facts.queue:
        return empty("Nobody waits.")
    rows = [
        tag(
            "tr",
            tag("td", str(place.position), cls="number"),
            tag("th", tag("a", tag("code", short(place.peer)), href=f"/node/{place.peer}"), scope="row"),
            tag("td", "–" if place.stage is None else str(place.stage), cls="number"),
            tag("td", "downloaded" if place.downloaded else "here" if place.present else "away"),
            tag("td", turn(place.eta_s)),
        )
        for place in facts.queue[:PLACES]
    ]
    head = [tag("th", name, scope="col") for name in ("#", "Node", "Stage", "State", "Turn")]
    more = len(facts.queue) - PLACES
    caption = f"{len(facts.queue)} waiting" + (f"; the first {PLACES}" if more > 0 else "")
    return tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", rows))


def live_part(key: str, *children: Child) -> Safe:
    return tag(
        "section",
        children,
        id=key,
        data_live=True,
        aria_labelledby=f"{key}-title" if key in _TITLED else None,
    )


_TITLED: Final = frozenset(
    {"summary", "stages", "curves", "rounds", "changes", "door", "queue", "node-changes"}
)


def scroll(table: Safe, name: str) -> Safe:
    return tag("div", table, cls="scroll", role="region", aria_label=name, tabindex="0")


def link(path: str, text: str = "") -> Safe:
    return tag("a", text or tag("code", path), href=path)


def empty(said: str) -> Safe:
    return tag("p", said, cls="empty")


def clock_time(at: float, form: str = "%H:%M:%S") -> Safe:
    whole = time.gmtime(at)
    return tag("time", time.strftime(form, whole), datetime=time.strftime("%Y-%m-%dT%H:%M:%SZ", whole))
