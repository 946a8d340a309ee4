"""What a node that joins does, as lines for its owner: ``12:04:09 [AUTH] access granted: stage 2, …``.

A ``Narrator`` a node turns the events of its daemon into lines; events that it does not know, or that are
for programs, give none. What happens all the time (batches, steps, rounds) is counted and told once a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from agorad.console import duration, short

AGAIN_S: Final = 60.0
"""The same trouble is told again after this long."""
DOWNLOAD_S: Final = 5.0
"""Between two lines about one download."""
COLOURS: Final = {
    "NODE": "blue", "NETWORK": "cyan", "AUTH": "magenta", "DOWNLOAD": "green", "SYNC": "cyan",
    "TRAINING": "green", "PROGRESS": "yellow", "WARNING": "bright_yellow", "ERROR": "red",
}  # fmt: skip

Line = tuple[str, str]
"""Tag and sentence."""

_CHECKING: Final = {
    "account": ("AUTH", "the authority asks the Hugging Face hub whose token this is"),
    "port": ("NETWORK", "checking that this node's port can be reached from outside"),
    "network": ("NETWORK", "peers of the run measure the line to this node"),
}


class Narrator:
    """See the file's opening. ``warm_steps``: of the run's manifest."""

    def __init__(self, warm_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._warm_steps = warm_steps
        self._clock = clock
        self._stage: int | None = None
        self._phase = "joining"
        self._warmed = 0
        self._told: dict[str, float] = {}
        self._queue = ""
        self._rounds = [0, 0]
        self._batches = 0
        self.ended: dict[str, Any] = {}
        """The event ``stopped``, once it came."""
        self.asked = False
        """Whether its owner asked it to leave, and so knows."""

    @property
    def active(self) -> bool:
        """Whether it takes part in training."""
        return self._phase == "active"

    def hear(self, entry: Mapping[str, Any]) -> list[Line]:
        """Lines for one event, oldest first."""
        try:
            teller = getattr(self, f"_on_{entry['event']}", None)
            return [] if teller is None else list(teller(entry))
        except (KeyError, TypeError, ValueError, AttributeError):
            return []  # an event of another version

    def pulse(self, status: Mapping[str, Any]) -> Line:
        """The line of a minute, from ``agoractl status``."""
        batches = (status.get("microbatches") or {}).get("added", 0)
        done, self._batches = batches - self._batches, batches
        (rounds, abandoned), self._rounds = self._rounds, [0, 0]
        loss, points = status.get("loss"), status.get("points") or {}
        parts = [
            f"{done} batches in the last minute{self._why_none(done)}",
            f"step {status.get('step', 0)}",
            *([] if loss is None else [f"loss {loss:.3f}"]),
            *([f"{rounds} averaged"] if rounds else []),
            *([f"{abandoned} rounds came to nothing"] if abandoned else []),
            f"{status.get('peers', 0)} peers",
            *([f"{sum(points.values()):.1f} points"] if points else []),
        ]
        where = "" if self.active else f"{status.get('phase', self._phase)}: "
        return "PROGRESS", where + ", ".join(parts)

    def _why_none(self, done: int) -> str:
        idle = self.active and not done
        return " (training needs a node on every stage, and its trainer)" if idle else ""

    def _once(self, kind: str, why: str, line: str) -> list[Line]:
        """The same trouble not again and again."""
        now = self._clock()
        if now - self._told.get(kind + why, -AGAIN_S) < AGAIN_S:
            return []
        if len(self._told) > 64:
            self._told.clear()
        self._told[kind + why] = now
        return [("WARNING", line)]

    # The node

    def _on_started(self, e: Mapping[str, Any]) -> list[Line]:
        return [("NODE", f"{e['name']} of run {e['run']}, peer id {e['peer_id']}")]

    def _on_stopping(self, e: Mapping[str, Any]) -> list[Line]:
        return [] if self.asked else [("NODE", f"leaving: {e['why']}")]

    def _on_stopped(self, e: Mapping[str, Any]) -> list[Line]:
        self.ended = dict(e)
        return []

    def _on_subscriber_failed(self, e: Mapping[str, Any]) -> list[Line]:
        return [("ERROR", f"a bug: {e['subscriber']} failed ({e['error']}); please report it with the log")]

    def _on_handler_failed(self, e: Mapping[str, Any]) -> list[Line]:
        return [("ERROR", f"a bug: {e['protocol']} failed ({e['error']}); please report it with the log")]

    def _on_manifest_taken(self, e: Mapping[str, Any]) -> list[Line]:
        what = ", ".join(e["changed"]) or "nothing that matters to this node"
        return [("NODE", f"the operator changed the run, version {e['version']} now: {what}")]

    def _on_update_wanted(self, e: Mapping[str, Any]) -> list[Line]:
        return self._once("update", e["why"], e["why"])

    # The network

    def _on_dht_joined(self, e: Mapping[str, Any]) -> list[Line]:
        return [("NETWORK", "the run's nodes are found")]

    def _on_dht_isolated(self, e: Mapping[str, Any]) -> list[Line]:
        return self._once(
            "isolated", "", f"nobody of the run can be reached; trying again in {duration(e['retry_in'])}"
        )

    def _on_address_observed(self, e: Mapping[str, Any]) -> list[Line]:
        return [("NETWORK", f"others see this machine at {e['address']}: announced to peers")]

    def _on_clock_skewed(self, e: Mapping[str, Any]) -> list[Line]:
        off = abs(e["seconds"])
        return self._once("clock", "", f"this clock and that of {short(e['peer'])} differ by {off:.0f} s")

    # Joining

    def _on_join_checking(self, e: Mapping[str, Any]) -> list[Line]:
        return [_CHECKING[e["what"]]]

    def _on_join_queued(self, e: Mapping[str, Any]) -> list[Line]:
        if e["paused"]:
            when = "the operator has paused joins"
        elif e["eta_s"] is not None:
            when = f"about {duration(e['eta_s'])} to go"
        else:
            when = "waiting for a node to leave" if e["waitlisted"] else "nobody can say how long it takes"
        full = "the run is full; " if e["waitlisted"] else ""
        text = f"place {e['position']} in the queue for stage {e['stage']}; {full}{when}"
        if text == self._queue:
            return []
        self._queue = text
        return [("AUTH", text)]

    def _on_join_delayed(self, e: Mapping[str, Any]) -> list[Line]:
        what = "not in yet" if self._stage is None else "the certificate is not renewed yet"
        return self._once(
            "delayed", e["why"], f"{what}: {e['why']}; asking again in {duration(e['retry_s'])}"
        )

    def _on_certificate_granted(self, e: Mapping[str, Any]) -> list[Line]:
        before, self._stage = self._stage, e["stage"]
        if before is not None:
            return []  # renewed
        why = f": {e['why']}" if e.get("why") else ""
        return [
            ("AUTH", f"access granted to {e['account']} for stage {e['stage']}{why}"),
            ("NODE", f"preparing stage {e['stage']}; that can take some minutes"),
        ]

    def _on_moving(self, e: Mapping[str, Any]) -> list[Line]:
        return [
            ("NODE", f"moving from stage {e['origin']} to stage {e['target']}, where it is missed more"),
            ("NODE", "it starts again and fetches the state there first; nothing is to be done"),
        ]

    def _on_renewal_overdue(self, e: Mapping[str, Any]) -> list[Line]:
        left = duration(max(0.0, e["grace_until"] - e["at"]))
        return self._once(
            "overdue",
            "",
            f"no authority renews the certificate ({e['why']}); others believe it for {left} more",
        )

    # The state

    def _on_resumed(self, e: Mapping[str, Any]) -> list[Line]:
        return [("SYNC", f"this node's own state of step {e['step']} is read from disk")]

    def _on_state_fetching(self, e: Mapping[str, Any]) -> list[Line]:
        now = self._clock()
        done = e["bytes"] >= e["size"]
        if done or now - self._told.get("download", -DOWNLOAD_S) < DOWNLOAD_S:
            return []
        self._told["download"] = now
        if e["bytes"] == 0 or e["seconds"] <= 0:
            return [("DOWNLOAD", f"state of step {e['step']}: {_size(e['size'])} from {short(e['donor'])}")]
        rate = e["bytes"] / e["seconds"]
        return [
            (
                "DOWNLOAD",
                f"{e['bytes'] / e['size']:.0%} of {_size(e['size'])}, {_size(rate)}/s, "
                f"{duration((e['size'] - e['bytes']) / rate)} to go",
            )
        ]

    def _on_state_fetched(self, e: Mapping[str, Any]) -> list[Line]:
        done = ("DOWNLOAD", f"state of step {e['step']}: {_size(e['bytes'])} in {e['seconds']:.1f} s")
        if self._stage is None:
            return [done]  # ahead of the grant
        return [
            done,
            ("SYNC", "2 of 3: waiting for a round with the others, to see how close it is"),
        ]

    def _on_fetch_failed(self, e: Mapping[str, Any]) -> list[Line]:
        return self._once(
            "fetch", e["why"], f"{short(e['donor'])} did not give its state ({e['why']}); another is asked"
        )

    def _on_phase(self, e: Mapping[str, Any]) -> list[Line]:
        self._phase = e["to"]
        if e["to"] == "syncing":
            return [("SYNC", f"1 of 3: getting the others' state ({e['why']})")]
        if e["to"] == "warming":
            self._warmed = 0
            return [
                ("SYNC", f"3 of 3: close to the others ({e['why']}); warming up for {self._warm_steps} steps")
            ]
        if e["to"] == "active":
            stage = "" if self._stage is None else f" on stage {self._stage}"
            return [("TRAINING", f"active{stage}: this node takes part in training ({e['why']})")]
        return [("NODE", f"{e['to']}: {e['why']}")]

    def _on_step(self, e: Mapping[str, Any]) -> list[Line]:
        if self._phase != "warming":
            return []
        self._warmed += 1
        return [("SYNC", f"warmed up {min(self._warmed, self._warm_steps)} of {self._warm_steps} steps")]

    # Training

    def _on_round_finished(self, e: Mapping[str, Any]) -> list[Line]:
        self._rounds[0] += 1
        return []

    def _on_round_abandoned(self, e: Mapping[str, Any]) -> list[Line]:
        self._rounds[1] += 1
        return []

    def _on_bad_gradient(self, e: Mapping[str, Any]) -> list[Line]:
        return self._once("gradient", "", f"step {e['step']}: a gradient that is not finite was thrown away")

    def _on_save_failed(self, e: Mapping[str, Any]) -> list[Line]:
        return self._once("save", e["why"], f"{e['why']}; training goes on")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
