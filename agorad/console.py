"""Events as lines for people: ``12:04:09 [STEP] step 12, 8 samples``.

A table from event name to tag and sentence; events that are not in it are for programs and give no
line. Used by the daemon on a terminal and by the demo's live view, which reads other processes' events
as JSON. Lines fit 100 columns: long values are cut.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Final

WIDTH: Final = 100
CHARACTERS: Final = 4 * WIDTH
"""On a line: marks take no column, and a text may have any number of them."""
_HEAD: Final = ("id", "at", "event")


def friendly(entry: Mapping[str, Any], *, with_time: bool = True) -> str | None:
    """The line for one event, or None where people need none."""
    kind = entry.get("event", "")
    if kind not in _LINES:
        return None
    tag, sentence = _LINES[kind]
    at = time.strftime("%H:%M:%S ", time.localtime(entry.get("at", 0.0))) if with_time else ""
    try:
        text = sentence(entry)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
        # Another version's, or with a number that is none (null in JSON): the facts as they are.
        text = ", ".join(f"{name} {value}" for name, value in entry.items() if name not in _HEAD)
    return fit(f"{at}[{tag}] {text}")


def fit(text: str) -> str:
    """``text`` on one line of at most ``WIDTH`` columns.

    What a terminal would obey, which a peer may have chosen, is a dot; wide characters take two columns.
    """
    shown, width = [], 0
    for character in text:
        if not character.isprintable():
            character = "·"
        width += columns(character)
        shown.append(character)
        if width > WIDTH or len(shown) > CHARACTERS:
            break
    else:
        return "".join(shown)
    while width > WIDTH - 1:
        width -= columns(shown.pop())
    return "".join(shown) + "…"


def columns(character: str) -> int:
    """That a terminal gives to a printable character."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def short(peer_id: str | None) -> str:
    """The end of a peer id, which differs between peers as their beginning does not."""
    return (peer_id or "?")[-6:]


def _round(e: Mapping[str, Any]) -> str:
    drops = f", dropped {', '.join(short(peer) for peer, _why in e['drops'])}" if e["drops"] else ""
    return (
        f"round {e['round']} of stage {e['stage']}: averaged {e['fraction']:.0%} of slice {e['slice']} "
        f"among {len(e['members'])}{drops}"
    )


def _queued(e: Mapping[str, Any]) -> str:
    if e["paused"]:
        return f"place {e['position']} in the queue; the operator has paused joins"
    if e["eta_s"] is None:
        when = "waiting for a node to leave" if e["waitlisted"] else "nobody can say how long it takes"
    else:
        when = f"about {duration(e['eta_s'])} to go"
    return f"place {e['position']} in the queue; {'the run is full; ' if e['waitlisted'] else ''}{when}"


def duration(seconds: float) -> str:
    """``2 h 5 min``, ``3 min 4 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _granted(e: Mapping[str, Any]) -> str:
    return f"access granted by {short(e['authority'])}{': ' if e.get('why') else ''}{e.get('why', '')}"


_CHECKING: Final = {
    "account": "the authority asks the Hugging Face hub whose token this is",
    "port": "the authority has this node's port dialled from outside",
    "network": "peers of the run measure the line to this node",
}


def _joined(e: Mapping[str, Any]) -> str:
    stage = "" if e["stage"] is None else f" for stage {e['stage']}"
    return f"{short(e['peer'])} ({e['account']}): {e['outcome']}{stage}"


def _ready(e: Mapping[str, Any]) -> str:
    places = ", ".join(addr.partition("/p2p/")[0] for addr in e["addrs"])
    return f"ready after {e['seconds']:.1f} s on {places}"


def _reachability(e: Mapping[str, Any]) -> str:
    if e["reachable"]:
        return f"others can dial this node at {e['addr']}"
    return f"others cannot dial this node: {e['why']}; it dials them"


_LINES: Final[dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]]] = {
    "started": ("NODE", lambda e: f"{e['name']} ({e['role']}) of run {e['run']}, id …{short(e['peer_id'])}"),
    "ready": ("NODE", _ready),
    "stopping": ("NODE", lambda e: f"leaving: {e['why']}"),
    "stopped": ("NODE", lambda e: f"ended with {e['code']}: {e['why']}"),
    "held": ("NODE", lambda e: f"paused: {e['why']}"),
    "let_go": ("NODE", lambda _e: "no longer paused"),
    "reloaded": ("NODE", lambda e: "settings read again" if e["ok"] else f"settings kept: {e['why']}"),
    "certificate_granted": ("JOIN", _granted),
    "address_observed": ("NET", lambda e: f"{short(e['by'])} sees this machine at {e['address']}"),
    "reachability": ("NET", _reachability),
    "limit_reached": ("LIMIT", lambda e: f"{e['limit']} reached, {e['count']} turned away; last {e['who']}"),
    "operated": ("ADMIN", lambda e: f"{e['what']} {e['detail']}"),
    "join_checking": ("JOIN", lambda e: _CHECKING.get(e["what"], e["what"])),
    "join_queued": ("JOIN", _queued),
    "manifest_taken": ("RUN", lambda e: f"manifest version {e['version']}: {', '.join(e['changed'])}"),
    "manifest_ignored": ("WARNING", lambda e: f"a newer manifest is not taken up: {e['why']}"),
    "update_wanted": ("WARNING", lambda e: e["why"]),
    "settings_taken": ("RUN", lambda e: f"from step {e['step']} on: {', '.join(e['settings'])}"),
    "moving": (
        "JOIN",
        lambda e: f"moving from stage {e['origin']} to stage {e['target']}, where it is missed more",
    ),
    "move_refused": ("JOIN", lambda e: f"cannot go to stage {e['stage']} now: {e['why']}"),
    "renewal_overdue": ("JOIN", lambda e: f"the certificate ran out, in grace now: {e['why']}"),
    "join_delayed": ("JOIN", lambda e: f"not in yet ({e['why']}); asking again in {e['retry_s']:.0f} s"),
    "join_answered": ("JOIN", _joined),
    "receipts_delayed": (
        "POINTS",
        lambda e: f"{e['waiting']} receipts wait ({e['why']}); trying again in {e['retry_s']:.0f} s",
    ),
    "data_unavailable": ("DATA", lambda e: f"no data for now: {e['why']}"),
    "shard_taken": ("DATA", lambda e: f"shard {e['shard']} from position {e['mark']} on"),
    "shard_left": ("DATA", lambda e: f"shard {e['shard']} left: {e['why']}"),
    "receipts_dropped": ("POINTS", lambda e: f"{e['count']} receipts given up: {e['why']}"),
    "subscriber_failed": ("BUG", lambda e: f"{e['subscriber']} failed: {e['error']}"),
    "handler_failed": ("BUG", lambda e: f"a handler failed: {e.get('error', '')}"),
    "peer_refused": ("PEER", lambda e: f"refused {short(e['peer'])} on {e['protocol']}: {e['why']}"),
    "microbatch_failed": ("BATCH", lambda e: f"{e['ticket']} given up: {e['why']}"),
    "rerouted": ("ROUTE", lambda e: f"{e['ticket']}: {short(e['from'])} → {short(e['to'])}, {e['why']}"),
    "step": ("STEP", lambda e: f"stage {e['stage']}: step {e['step']}, {e['samples']} samples"),
    "held_back": (
        "LOG",
        lambda e: f"{e['count']} more of {e['of']} within a minute: agoractl events has them",
    ),
    "trouble": ("TROUBLE", lambda e: f"{e['why']} ({e['reaction'].replace('_', ' ')})"),
    "push_failed": ("METRICS", lambda e: f"figures are not sent: {e['why']}"),
    "trouble_over": ("TROUBLE", lambda e: f"{e['kind']}: over"),
    "bad_output": ("BATCH", lambda e: f"step {e['step']}: what was computed here is not finite"),
    "bad_gradient": ("STEP", lambda e: f"step {e['step']}: a gradient that is not finite was thrown away"),
    "round_finished": ("ROUND", _round),
    "gradients_averaged": (
        "ROUND",
        lambda e: f"stage {e['stage']}: gradients of step {e['step']}, {len(e['members'])} replicas",
    ),
    "round_abandoned": ("ROUND", lambda e: f"round {e['round']} of stage {e['stage']}: {e['why']}"),
    "phase": ("PHASE", lambda e: f"{e['from']} → {e['to']}: {e['why']}"),
    "saved": ("DISK", lambda e: f"snapshot of step {e['step']}, {e['bytes'] / 1e6:.1f} MB"),
    "save_failed": ("DISK", lambda e: f"{e['why']}; training goes on"),
    "state_fetched": (
        "STATE",
        lambda e: f"step {e['step']} from {short(e['donor'])}, {e['bytes'] / 1e6:.1f} MB",
    ),
    "evaluated": ("EVAL", lambda e: f"step {e['step']}: loss {e['loss']:.4f} on {e['rows']} rows"),
}
