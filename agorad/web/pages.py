"""The pages, as HTML made of ``Facts``. Pure.

They say everything without a script; ``page.js`` only replaces the sections marked ``data-live`` when
something is new. Landmarks, one ``h1``, captions on tables, sentences on charts; colours are never the only
sign of anything.
"""

from __future__ import annotations

import time
from typing import Final

import attrs

from agorad.console import duration, short
from agorad.web import charts, static
from agorad.web.facts import Facts, Replica
from agorad.web.history import Change
from agorad.web.html import Child, Safe, tag

SHOWN: Final = 24
"""Replicas of a stage that the page lists; the rest is in the API."""
RECENT: Final = 12
PLACES: Final = 20

NAV: Final = (("/", "Swarm"), ("/leaderboard", "Leaderboard"), ("/join", "Join"), ("/api/v1/", "API"))
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


@attrs.frozen
class Drawn:
    """The charts of the swarm page; drawing them costs more than all else, so they are made less often."""

    loss: Safe
    throughput: Safe
    replicas: Safe


def draw(facts: Facts) -> Drawn:
    """Blocking: tens of milliseconds."""
    history, seq = facts.history, facts.manifest.model.seq
    trained = [(float(moment.step), moment.loss) for moment in history.moments if moment.loss is not None]
    return Drawn(
        charts.figure(
            "chart-loss",
            "Loss",
            [
                ("training", trained),
                ("held-out", [(float(step), loss) for step, loss in history.evaluations]),
            ],
            x="step",
            y="loss",
            show_x=lambda step: f"{step:,.0f}",
            show_y=lambda loss: f"{loss:.3g}",
        ),
        charts.figure(
            "chart-throughput",
            "Throughput, tokens a second",
            [("tokens a second", [(at, rate * seq) for at, rate in history.rates()])],
            x="time (UTC)",
            y="tokens a second",
            show_x=charts.clock_time,
            show_y=compact,
            from_zero=True,
        ),
        charts.figure(
            "chart-replicas",
            "Replicas at work",
            [("replicas", [(moment.at, float(moment.active)) for moment in history.moments])],
            x="time (UTC)",
            y="replicas",
            show_x=charts.clock_time,
            show_y=lambda count: f"{count:.0f}",
            from_zero=True,
        ),
    )


def swarm(facts: Facts, drawn: Drawn) -> Safe:
    """``/``: the run now."""
    manifest = facts.manifest
    return _document(
        facts,
        "/",
        "Swarm",
        tag("h1", "The swarm now"),
        _live("summary", _summary(facts)),
        _live(
            "stages",
            tag("h2", "Stages", id="stages-title"),
            tag(
                "p",
                f"The model's {sum(manifest.model.layers)} layers are cut in {manifest.model.stages} stages; "
                "the replicas of a stage hold the same layers and share its work.",
                cls="about",
            ),
            tag("div", [_stage(facts, stage) for stage in range(manifest.model.stages)], cls="stages"),
        ),
        _live(
            "curves",
            tag("h2", "Curves", id="curves-title"),
            tag("div", drawn.loss, drawn.throughput, drawn.replicas, cls="curves"),
        ),
        tag(
            "div",
            _live("rounds", tag("h2", "Averaging rounds", id="rounds-title"), _rounds(facts)),
            _live("changes", tag("h2", "Joins and departures", id="changes-title"), _changes(facts)),
            cls="columns",
        ),
    )


def leaderboard(facts: Facts) -> Safe:
    """``/leaderboard``."""
    head = ("#", "Account", "Score", "Compute", "Presence", "Hours", "Since", "Status")
    minor = ("Compute", "Presence", "Since")
    rows = [
        tag(
            "tr",
            tag("td", str(row.rank)),
            tag("th", row.user, scope="row"),
            tag("td", points(row.score), cls="number"),
            tag("td", points(row.compute), cls="number minor"),
            tag("td", points(row.presence), cls="number minor"),
            tag("td", f"{row.active_h:.1f}", cls="number"),
            tag("td", _time(row.joined, "%Y-%m-%d"), cls="minor"),
            tag("td", _badge(row.status, row.status)),
        )
        for row in facts.rows[:200]
    ]
    table = tag(
        "table",
        tag("caption", f"{len(facts.rows)} accounts by score, in PFLOP"),
        tag(
            "thead",
            tag(
                "tr", [tag("th", name, scope="col", cls="minor" if name in minor else None) for name in head]
            ),
        ),
        tag("tbody", rows),
    )
    return _document(
        facts,
        "/leaderboard",
        "Leaderboard",
        tag("h1", "Leaderboard"),
        tag(
            "p",
            "Compute is what trainers' receipts say that an account's nodes have computed. Presence is "
            "1 PFLOP for each hour in which others saw a node of it. The score is their sum.",
            cls="about",
        ),
        _live("board", _scroll(table, "Leaderboard") if rows else _empty("Nobody has joined yet.")),
    )


def node(facts: Facts, peer: str) -> Safe:
    """``/node/PEER``, of one that ``facts`` knows."""
    replica, place, earned = facts.replica(peer), facts.waiting(peer), facts.earned.get(peer)
    account = next((found.account for found in (replica, earned, place) if found is not None), "")
    phase = replica.phase if replica is not None else "queued" if place is not None else "away"
    rows: list[tuple[str, Child]] = [("State", _badge(phase, PHASES[phase])), ("Account", account)]
    if place is not None:
        rows += [
            ("Place in the queue", str(place.position)),
            ("Its turn", _turn(place.eta_s)),
            ("Connection", "open" if place.present else "gone; the place is kept for a while"),
        ]
        if place.stage is not None:
            rows.append(("Will probably go to", f"stage {place.stage}"))
    if replica is not None:
        rows += [
            ("Stage", str(replica.stage)),
            ("Step", f"{replica.step:,} of the run's {facts.step:,}"),
            ("Load", _load(replica)),
            ("Speed", f"{replica.rate:.2f} samples a second"),
        ]
        if replica.round is not None:
            number, fraction, members, at = replica.round
            said = f"{number}: averaged {fraction:.0%} among {members}, at "
            rows.append(("Last round", [said, _time(at)]))
        if replica.disagreement is not None:
            rows.append(("Distance to its mates", f"{replica.disagreement:.2g}"))
        if replica.snapshot_step is not None:
            rows.append(("State kept of step", f"{replica.snapshot_step:,}"))
    if earned is not None:
        rows += [
            ("Compute", f"{points(earned.compute)} PFLOP"),
            ("Presence", f"{points(earned.presence)} PFLOP"),
            ("Seen for", f"{earned.active_h:.1f} hours"),
            ("Joined", _time(earned.joined, "%Y-%m-%d %H:%M")),
        ]
    changes = [change for change in facts.history.changes if change.peer == peer]
    return _document(
        facts,
        "",
        f"Node {short(peer)}",
        tag("h1", f"Node {short(peer)}"),
        tag("p", tag("code", peer), cls="peer"),
        _live("node", tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in rows], cls="facts")),
        _live("node-changes", tag("h2", "What it did", id="node-changes-title"), _change_list(changes)),
    )


def join(facts: Facts, host: str) -> Safe:
    """``/join``; ``host``: where this page is, as the reader's browser calls it."""
    rules = facts.manifest.admission
    needs = [
        text
        for wanted, text in (
            (rules.min_vram_gib, f"{rules.min_vram_gib:g} GiB of GPU memory"),
            (rules.min_ram_gib, f"{rules.min_ram_gib:g} GiB of memory"),
            (rules.min_disk_gib, f"{rules.min_disk_gib:g} GiB of free disk"),
            (rules.min_mbps, f"{rules.min_mbps:g} Mbit/s each way"),
            (rules.max_rtt_ms, f"at most {rules.max_rtt_ms:g} ms to the others"),
            (rules.port_test, "a TCP port that others can reach (49200; your router may have to forward it)"),
            (rules.min_version, f"agorad {rules.min_version} or newer"),
        )
        if wanted
    ]
    account = (
        "It asks for a Hugging Face token, which is sent to the authority once, to learn your account's name."
        if rules.accounts == "huggingface"
        else "It asks for the secret that the run's operator gave you, which is used once."
    )
    where = f"http://{host}/run.toml"
    steps = [
        ("Get agorad.", tag("pre", tag("code", "git clone <agorad's repository> && cd agorad && make demo"))),
        ("Join with this run's manifest.", tag("pre", tag("code", f".venv/bin/agoractl join {where}"))),
        (account, None),
        ("Watch your node.", tag("pre", tag("code", ".venv/bin/agoractl status --watch"))),
    ]
    return _document(
        facts,
        "/join",
        "Join",
        tag("h1", "Join this run"),
        _live("door", tag("h2", "If you joined now", id="door-title"), _door(facts)),
        tag(
            "section",
            tag("h2", "How", id="how-title"),
            tag("ol", [tag("li", tag("p", said), block) for said, block in steps], cls="steps"),
            tag(
                "p",
                "The manifest is ",
                tag("a", "run.toml", href="/run.toml"),
                ". It is signed by ",
                tag("code", facts.manifest.run.operator),
                "; compare that key with what the operator told you.",
            ),
            aria_labelledby="how-title",
        ),
        tag(
            "section",
            tag("h2", "What your machine needs", id="needs-title"),
            tag("ul", [tag("li", text) for text in needs]) if needs else tag("p", "The run has no limits."),
            aria_labelledby="needs-title",
        ),
        tag(
            "section",
            tag("h2", "Where is my node?", id="where-title"),
            tag(
                "form",
                tag("label", "Peer id, as ", tag("code", "agoractl identity"), " shows it", for_="peer"),
                tag(
                    "span",
                    tag(
                        "input", id="peer", name="peer", type="text", required=True, maxlength=64,
                        autocomplete="off", spellcheck="false",
                    ),
                    tag("button", "Show", type="submit"),
                    cls="ask",
                ),
                action="/node",
                method="get",
            ),
            aria_labelledby="where-title",
        ),
        _live("queue", tag("h2", "The queue", id="queue-title"), _queue(facts)),
    )  # fmt: skip


def api(facts: Facts, endpoints: tuple[tuple[str, str], ...]) -> Safe:
    """``/api/v1/`` for people."""
    return _document(
        facts,
        "/api/v1/",
        "API",
        tag("h1", "API"),
        tag("p", "All that these pages show, as JSON; GET only. Poll with If-None-Match.", cls="about"),
        tag(
            "dl",
            [
                (tag("dt", tag("code", path) if "PEER" in path else _link(path)), tag("dd", said))
                for path, said in endpoints
            ],
            cls="endpoints",
        ),
    )


def problem(facts: Facts, title: str, said: str) -> Safe:
    """Instead of a page."""
    return _document(facts, "", title, tag("h1", title), tag("p", said))


def compact(value: float) -> str:
    """``12``, ``3.4 k``, ``5.6 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def points(pflop: float) -> str:
    """PFLOP, with the digits that matter."""
    return f"{pflop:,.1f}" if pflop >= 100 else f"{pflop:.3f}" if pflop >= 0.01 else f"{pflop:.2g}"


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


def _document(facts: Facts, here: str, title: str, *main: Child) -> Safe:
    run = facts.manifest.run
    links = [
        tag("li", tag("a", name, href=path, aria_current="page" if path == here else None))
        for path, name in NAV
    ]
    return Safe("<!doctype html>\n") + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", f"{title} · {run.name}"),
            tag("link", rel="stylesheet", href=static.path("page.css")),
            tag("link", rel="icon", href=static.path("icon.svg"), type="image/svg+xml"),
            tag("script", src=static.path("page.js"), defer=True),
        ),
        tag(
            "body",
            tag("a", "Skip to the content", href="#main", cls="skip"),
            tag(
                "header",
                tag("p", tag("a", run.name, href="/"), cls="run"),
                tag("nav", tag("ul", links), aria_label="Pages"),
            ),
            tag("main", main, id="main", tabindex="-1"),
            tag(
                "footer",
                tag(
                    "p",
                    "As of ",
                    tag("span", _time(facts.at), id="as-of"),
                    " UTC. ",
                    tag("span", id="control"),
                ),
                tag("p", id="news", role="status", cls="hidden"),
                tag("p", "Run ", tag("code", run.id), f", manifest version {run.version}."),
            ),
        ),
        lang="en",
        data_page=title,
    )  # type: ignore[return-value]


def _summary(facts: Facts) -> Child:
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
        ("Waiting to join", "–" if door is None else str(door.waiting), _door_word(facts)),
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


def _stage(facts: Facts, stage: int) -> Child:
    replicas = facts.of_stage(stage)
    layers = facts.manifest.model.layers
    first = sum(layers[:stage])
    said = f"layers {first} to {first + layers[stage] - 1}" if layers[stage] > 1 else f"layer {first}"
    title = tag("h3", f"Stage {stage} ", tag("span", said), id=f"stage-{stage}")
    if not replicas:
        return tag(
            "section",
            title,
            tag("p", _badge("missing", "nobody"), " Training waits for a node here.", cls="empty"),
            aria_labelledby=f"stage-{stage}",
        )
    rows = [
        tag(
            "tr",
            tag("th", _node_link(replica), scope="row"),
            tag("td", _badge(replica.phase, PHASES[replica.phase])),
            tag("td", _load(replica)),
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
        tag("p", f"and {more} more, in the ", _link("/api/v1/swarm", "API"), ".") if more > 0 else None,
        aria_labelledby=f"stage-{stage}",
    )


def _node_link(replica: Replica) -> Safe:
    return tag(
        "a",
        tag("span", replica.account, cls="account"),
        " ",
        tag("code", short(replica.peer)),
        href=f"/node/{replica.peer}",
    )


def _load(replica: Replica) -> Child:
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


def _badge(kind: str, text: str) -> Safe:
    return tag("span", text, cls=f"badge {kind if kind.isalpha() else ''}")


def _rounds(facts: Facts) -> Child:
    rounds = sorted(facts.history.rounds, key=lambda one: one.at, reverse=True)[:RECENT]
    if not rounds:
        return _empty("No round has ended yet.")
    rows = [
        tag(
            "tr",
            tag("th", f"Stage {one.stage}, round {one.number}", scope="row"),
            tag("td", str(one.members), cls="number"),
            tag("td", f"{one.fraction:.0%}", cls="number"),
            tag("td", _time(one.at), cls="number"),
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


def _changes(facts: Facts) -> Child:
    return _change_list(list(facts.history.changes))


def _change_list(changes: list[Change]) -> Child:
    if not changes:
        return _empty("Nothing has happened since this page began to watch.")
    rows = [
        tag("li", _time(change.at), " ", tag("span", sentence(change)))
        for change in reversed(changes[-RECENT:])
    ]
    return tag("ol", rows, cls="events")


def _door(facts: Facts) -> Child:
    door = facts.door
    if door is None:
        return tag("p", "The authority does not know yet.")
    rows = [
        ("Places free", f"{door.free:,}"),
        ("Waiting before you", str(door.waiting)),
        ("Your turn", "when the operator lets nodes in again" if door.paused else _turn(door.eta_s)),
    ]
    return [
        tag(
            "p",
            _badge("paused" if door.paused or not door.free else "active", _door_word(facts)),
            cls="about",
        ),
        tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in rows], cls="facts"),
    ]


def _door_word(facts: Facts) -> str:
    door = facts.door
    if door is None:
        return ""
    if door.paused:
        return "joins are paused"
    return f"{door.free:,} places free" if door.free else "the run is full"


def _turn(eta_s: float | None) -> str:
    if eta_s is None:
        return "when a node leaves; nobody can say when"
    return "at once" if eta_s < 1 else f"in about {duration(eta_s)}"


def _queue(facts: Facts) -> Child:
    if not facts.queue:
        return _empty("Nobody waits.")
    rows = [
        tag(
            "tr",
            tag("td", str(place.position), cls="number"),
            tag("th", tag("a", tag("code", short(place.peer)), href=f"/node/{place.peer}"), scope="row"),
            tag("td", "–" if place.stage is None else str(place.stage), cls="number"),
            tag("td", "downloaded" if place.downloaded else "here" if place.present else "away"),
            tag("td", _turn(place.eta_s)),
        )
        for place in facts.queue[:PLACES]
    ]
    head = [tag("th", name, scope="col") for name in ("#", "Node", "Stage", "State", "Turn")]
    more = len(facts.queue) - PLACES
    caption = f"{len(facts.queue)} waiting" + (f"; the first {PLACES}" if more > 0 else "")
    return tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", rows))


def _live(key: str, *children: Child) -> Safe:
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


def _scroll(table: Safe, name: str) -> Safe:
    return tag("div", table, cls="scroll", role="region", aria_label=name, tabindex="0")


def _link(path: str, text: str = "") -> Safe:
    return tag("a", text or tag("code", path), href=path)


def _empty(said: str) -> Safe:
    return tag("p", said, cls="empty")


def _time(at: float, form: str = "%H:%M:%S") -> Safe:
    whole = time.gmtime(at)
    return tag("time", time.strftime(form, whole), datetime=time.strftime("%Y-%m-%dT%H:%M:%SZ", whole))
