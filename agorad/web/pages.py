"""The pages, as HTML made of ``Facts``. Pure.

They say everything without a script; ``page.js`` only replaces the sections marked ``data-live`` when
something is new. Landmarks, one ``h1``, captions on tables, sentences on charts; colours are never the only
sign of anything.
"""

from __future__ import annotations

from typing import Final

import attrs

from agorad.console import short
from agorad.web import charts, parts, static
from agorad.web.facts import Facts
from agorad.web.html import Child, Safe, tag

NAV: Final = (("/", "Swarm"), ("/leaderboard", "Leaderboard"), ("/join", "Join"), ("/api/v1/", "API"))
BOARD: Final = 200
"""Accounts that the leaderboard's page lists; the rest is in the API."""


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
            show_y=parts.compact,
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
        parts.live_part("summary", parts.summary(facts)),
        parts.live_part(
            "stages",
            tag("h2", "Stages", id="stages-title"),
            tag(
                "p",
                f"The model's {sum(manifest.model.layers)} layers are cut in {manifest.model.stages} stages; "
                "the replicas of a stage hold the same layers and share its work.",
                cls="about",
            ),
            tag(
                "div",
                [parts.stage_table(facts, stage) for stage in range(manifest.model.stages)],
                cls="stages",
            ),
        ),
        parts.live_part(
            "curves",
            tag("h2", "Curves", id="curves-title"),
            tag("div", drawn.loss, drawn.throughput, drawn.replicas, cls="curves"),
        ),
        tag(
            "div",
            parts.live_part(
                "rounds", tag("h2", "Averaging rounds", id="rounds-title"), parts.rounds_table(facts)
            ),
            parts.live_part(
                "changes", tag("h2", "Joins and departures", id="changes-title"), parts.changes(facts)
            ),
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
            tag("td", parts.points(row.score), cls="number"),
            tag("td", parts.points(row.compute), cls="number minor"),
            tag("td", parts.points(row.presence), cls="number minor"),
            tag("td", f"{row.active_h:.1f}", cls="number"),
            tag("td", parts.clock_time(row.joined, "%Y-%m-%d"), cls="minor"),
            tag("td", parts.badge(row.status, row.status)),
        )
        for row in facts.rows[:BOARD]
    ]
    shown = f"; the first {BOARD}" if len(facts.rows) > BOARD else ""
    table = tag(
        "table",
        tag("caption", f"{len(facts.rows)} account{'s' * (len(facts.rows) != 1)} by score{shown}"),
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
        parts.live_part(
            "board", parts.scroll(table, "Leaderboard") if rows else parts.empty("Nobody has joined yet.")
        ),
    )


def node(facts: Facts, peer: str) -> Safe:
    """``/node/PEER``, of one that ``facts`` knows."""
    replica, place, earned = facts.replica(peer), facts.waiting(peer), facts.earned.get(peer)
    account = next((found.account for found in (replica, earned, place) if found is not None), "")
    phase = replica.phase if replica is not None else "queued" if place is not None else "away"
    rows: list[tuple[str, Child]] = [("State", parts.badge(phase, parts.PHASES[phase])), ("Account", account)]
    if place is not None:
        rows += [
            ("Place in the queue", str(place.position)),
            ("Its turn", parts.turn(place.eta_s)),
            ("Connection", "open" if place.present else "gone; the place is kept for a while"),
        ]
        if place.stage is not None:
            rows.append(("Will probably go to", f"stage {place.stage}"))
    if replica is not None:
        rows += [
            ("Stage", str(replica.stage)),
            ("Step", f"{replica.step:,} of the run's {facts.step:,}"),
            ("Load", parts.load(replica)),
            ("Speed", f"{replica.rate:.2f} samples a second"),
        ]
        if replica.round is not None:
            number, fraction, members, at = replica.round
            said = f"{number}: averaged {fraction:.0%} among {members}, at "
            rows.append(("Last round", [said, parts.clock_time(at)]))
        if replica.disagreement is not None:
            rows.append(("Distance to its mates", f"{replica.disagreement:.2g}"))
        if replica.snapshot_step is not None:
            rows.append(("State kept of step", f"{replica.snapshot_step:,}"))
    if earned is not None:
        rows += [
            ("Compute", parts.points(earned.compute)),
            ("Presence", parts.points(earned.presence)),
            ("Seen for", f"{earned.active_h:.1f} hours"),
            ("Joined", parts.clock_time(earned.joined, "%Y-%m-%d %H:%M")),
        ]
    changes = [change for change in facts.history.changes if change.peer == peer]
    return _document(
        facts,
        "",
        f"Node {short(peer)}",
        tag("h1", f"Node {short(peer)}"),
        tag("p", tag("code", peer), cls="peer"),
        parts.live_part(
            "node", tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in rows], cls="facts")
        ),
        parts.live_part(
            "node-changes", tag("h2", "What it did", id="node-changes-title"), parts.change_list(changes)
        ),
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
        parts.live_part("door", tag("h2", "If you joined now", id="door-title"), parts.door(facts)),
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
        parts.live_part("queue", tag("h2", "The queue", id="queue-title"), parts.queue_table(facts)),
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
                (tag("dt", tag("code", path) if "PEER" in path else parts.link(path)), tag("dd", said))
                for path, said in endpoints
            ],
            cls="endpoints",
        ),
    )


def problem(facts: Facts, title: str, said: str) -> Safe:
    """Instead of a page."""
    return _document(facts, "", title, tag("h1", title), tag("p", said))


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
                    tag("span", parts.clock_time(facts.at), id="as-of"),
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
