"""The ledger that the event logs of a swarm are: what must be in it whatever happened."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Protocol

import attrs

SETTLED_S = 10.0
"""After a fault has ended: what was held up by it is answered, or asked for elsewhere, by then."""
PASS_S = 2.0
"""For a backward pass to end that stood still with its process."""


class Logged(Protocol):
    """A swarm whose nodes' events can be read."""

    @property
    def nodes(self) -> list[dict[str, Any]]: ...

    def events(self, name: str) -> list[dict[str, Any]]: ...


@attrs.define
class Fault:
    """What was done to a worker, and when, in unix time."""

    name: str
    how: str
    at: float
    until: float


@attrs.frozen
class Added:
    """One gradient that one replica added."""

    name: str
    at: float


def additions(swarm: Logged) -> dict[tuple[int, str], list[Added]]:
    """By stage and ticket, in order of time."""
    found: dict[tuple[int, str], list[Added]] = {}
    for node in swarm.nodes:
        for event in swarm.events(node["name"]):
            if event["event"] == "microbatch_added":
                place = found.setdefault((event["stage"], event["ticket"]), [])
                place.append(Added(node["name"], event["at"]))
    return {key: sorted(each, key=lambda one: one.at) for key, each in found.items()}


def check_ledger(swarm: Logged, stages: int) -> None:
    """Every completed microbatch was added at every stage by the replica that the path names."""
    done = {
        event["ticket"]: event["path"]
        for event in swarm.events("trainer-0")
        if event["event"] == "microbatch_completed"
    }
    added: dict[tuple[int, str], set[str]] = {}
    for node in swarm.nodes:
        for event in swarm.events(node["name"]):
            if event["event"] == "microbatch_added":
                added.setdefault((event["stage"], event["ticket"]), set()).add(event["replica"])
    for ticket, path in done.items():
        assert len(path) == stages + 1
        for stage in range(stages):
            assert path[stage + 1] in added.get((stage, ticket), set()), (ticket, stage)


@attrs.frozen
class Twice:
    """Gradients that were added again at their stage."""

    charged: dict[int, set[str]]
    """The tickets that each fault explains, by its number."""
    unexplained: list[tuple[int, str, list[Added]]]


def check_chaos(swarm: Logged, stages: int, faults: Iterable[Fault]) -> Twice:
    """Each issued microbatch ended once; each completed one was in before its answer, and twice only where
    a replica that was past its commit point suffered a fault meanwhile, or was called by one that did.
    Returns what counted twice."""
    trainer = swarm.events("trainer-0")
    issued = Counter(e["ticket"] for e in trainer if e["event"] == "microbatch_issued")
    ends = {e["ticket"]: e for e in trainer if e["event"] in ("microbatch_completed", "microbatch_failed")}
    assert set(issued) == set(ends), sorted(set(issued) ^ set(ends))
    assert all(end["why"] for end in ends.values() if end["event"] == "microbatch_failed")
    added = additions(swarm)
    for ticket, end in ends.items():
        if end["event"] == "microbatch_completed":
            for stage in range(stages):
                assert added[stage, ticket][0].at <= end["at"], (stage, ticket)
    charged: dict[int, set[str]] = defaultdict(set)
    blame, left = dict(enumerate(faults)), left_behind(swarm)
    unexplained = []
    for (stage, ticket), each in added.items():
        for first, again in pairwise(each):
            suspects = [
                number
                for number, fault in blame.items()
                if _explains(fault, first, again, left.get(ticket, set()))
            ]
            if suspects:
                number = min(suspects, key=lambda one: (ticket not in charged[one], len(charged[one])))
                charged[number].add(ticket)
            else:
                unexplained.append((stage, ticket, each))
    return Twice({number: tickets for number, tickets in charged.items() if tickets}, unexplained)


def left_behind(swarm: Logged) -> dict[str, set[str]]:
    """By ticket, the workers that a caller gave up for another of their stage."""
    logs = {node["name"]: swarm.events(node["name"]) for node in swarm.nodes}
    names = {
        e["replica"]: name for name, log in logs.items() for e in log if e["event"] == "microbatch_added"
    }
    found: dict[str, set[str]] = defaultdict(set)
    for log in logs.values():
        for event in log:
            if event["event"] == "rerouted" and event["from"] in names:
                found[event["ticket"]].add(names[event["from"]])
    return found


def _explains(fault: Fault, first: Added, again: Added, left: set[str]) -> bool:
    meanwhile = fault.at - SETTLED_S <= again.at and first.at <= fault.until + SETTLED_S
    if fault.name == first.name:  # it was past its commit point, and its answer was lost
        return meanwhile
    if fault.name == again.name:  # it stood still in the midst of adding, and its replacement was faster
        return fault.at <= first.at <= fault.until and again.at <= fault.until + PASS_S
    # Their caller was lost before it could say upstream whom it had called.
    return meanwhile and fault.name in left
