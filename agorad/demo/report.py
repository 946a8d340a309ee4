"""``report.json``: what happened in a swarm, counted from the nodes' event logs and nothing else.

The logs are the ledger: an issued microbatch is a line of its trainer, an added gradient is a line that
its replica wrote before it answered. So a node that was killed still counts, and the numbers can be
checked by anybody who has the folder. Definitions, beyond ``interfaces.md``:

- ``loss.first`` is the mean over the first step's microbatches, ``loss.last`` over the last tenth of the
  run's (at least one step's): single rows differ too much for fewer to say anything.
- ``twice``: gradients of a ticket added at one stage beyond the first.
- ``gone_with_replica``: gradients that a process had added after its last step when it was killed, or when it
  fell behind and gave its state up: they never entered any weights.
- A round counts once for its stage, with the least fraction that any of its members got. It is
  ``completed`` when that is 1, ``partial`` when it is less, ``failed`` when nobody got anything.
- ``hops``: boundary crossings, so that ``bytes.boundary`` can be checked against the formula. What the
  trainer sends to the head (token ids only) crosses no stage boundary and counts as control.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

Entry = dict[str, Any]


@attrs.frozen
class NodeLog:
    """One node's events."""

    name: str
    role: str
    stage: int | None
    peer_id: str
    events: list[Entry]

    @classmethod
    def read(cls, name: str, role: str, stage: int | None, peer_id: str, path: Path) -> NodeLog:
        """A last line that a kill cut off is left out."""
        events = []
        for file in (path.with_name(path.name + ".1"), path):
            if not file.exists():
                continue
            for line in file.read_bytes().splitlines():
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict) and "event" in event:
                    events.append(event)
        return cls(name, role, stage, peer_id, events)

    def of(self, kind: str) -> list[Entry]:
        return [event for event in self.events if event["event"] == kind]

    def sessions(self) -> list[list[Entry]]:
        """Events of each process that ran as this node."""
        sessions: list[list[Entry]] = []
        for event in self.events:
            if event["event"] == "started" or not sessions:
                sessions.append([])
            sessions[-1].append(event)
        return sessions


def build(
    logs: list[NodeLog],
    *,
    tokens_a_sample: int,
    target_batch: int,
    vocab: int,
    steps: int,
    disagreement: float | None,
    exits: dict[str, int],
    states: dict[str, Entry],
) -> dict[str, Any]:
    """The report. ``states``: last status of each worker by name (step, phase)."""
    trainers = [log for log in logs if log.role == "trainer"]
    workers = [log for log in logs if log.role == "worker"]
    issued = {e["ticket"] for log in trainers for e in log.of("microbatch_issued")}
    done = _first_of_each(e for log in trainers for e in log.of("microbatch_completed"))
    completed = {e["ticket"] for e in done}
    failed = {e["ticket"] for log in trainers for e in log.of("microbatch_failed")} - completed
    begins = [e["at"] for log in trainers for e in log.of("microbatch_issued")]
    seconds = max(0.0, done[-1]["at"] - min(begins)) if done else 0.0
    tokens = len(done) * tokens_a_sample
    added = Counter((e["stage"], e["ticket"]) for log in workers for e in log.of("microbatch_added"))
    losses = [e["loss"] for e in done]
    evaluations = sorted((e for log in trainers for e in log.of("evaluated")), key=lambda e: e["step"])
    return {
        "steps": steps,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "loss": {
            "first": _mean(losses[:target_batch]),
            "last": _mean(losses[-max(target_batch, len(losses) // 10) :]),
            "uniform": math.log(vocab),
        },
        "eval_loss": [[e["step"], e["loss"]] for e in evaluations],
        "microbatches": {
            "issued": len(issued),
            "completed": len(completed),
            "failed": len(failed),
            "lost": len(issued - completed - failed),
            "rerouted": sum(len(log.of("rerouted")) for log in logs),
            "busy": sum(len(log.of("busy")) for log in logs),
            "twice": sum(count - 1 for count in added.values()),
            "reused_stale": sum(len(log.of("reused_stale")) for log in workers),
            "gone_with_replica": sum(_gone(session) for log in workers for session in log.sessions()),
        },
        "rounds": _rounds(workers),
        "disagreement": disagreement,
        "bytes": _traffic(logs, ("boundary", "averaging", "control")),
        "hops": _traffic(logs, ("forward_hops", "backward_hops")),
        "stages": [
            {
                "stage": stage,
                "replicas": [
                    {
                        "peer_id": log.peer_id,
                        "step": states.get(log.name, {}).get("step", _last_step(log)),
                        "phase": states.get(log.name, {}).get("phase", "gone"),
                        "microbatches": len(log.of("microbatch_added")),
                    }
                    for log in workers
                    if log.stage == stage
                ],
            }
            for stage in sorted({log.stage for log in workers if log.stage is not None})
        ],
        "exit": exits,
    }


def _first_of_each(completions: Iterable[Entry]) -> list[Entry]:
    """In order of time; a restarted trainer may hear again of what was completed just before."""
    first: dict[str, Entry] = {}
    for event in sorted(completions, key=lambda e: float(e["at"])):
        first.setdefault(event["ticket"], event)
    return list(first.values())


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _last_step(log: NodeLog) -> int:
    steps = log.of("step")
    return int(steps[-1]["step"]) if steps else 0


def _gone(session: list[Entry]) -> int:
    """Gradients in an accumulator that was lost: with its process, or with a state that was given up."""
    gone = pending = 0
    for event in session:
        if event["event"] == "microbatch_added":
            pending += 1
        elif event["event"] in ("step", "bad_gradient"):  # used, or thrown away for another reason
            pending = max(0, pending - event["samples"])
        elif event["event"] == "phase" and event["to"] == "syncing":
            gone, pending = gone + pending, 0
    return gone if any(event["event"] == "stopped" for event in session) else gone + pending


def _rounds(workers: list[NodeLog]) -> dict[str, Any]:
    fractions: dict[tuple[int, int], float] = {}
    for log in workers:
        for event in (*log.of("round_finished"), *log.of("gradients_averaged")):
            key = (event["stage"], event["round"])
            fractions[key] = min(fractions.get(key, 1.0), event["fraction"])
    abandoned = {(event["stage"], event["round"]) for log in workers for event in log.of("round_abandoned")}
    whole = [fraction for fraction in fractions.values() if fraction >= 1.0]
    return {
        "completed": len(whole),
        "partial": len(fractions) - len(whole),
        "failed": len(abandoned - fractions.keys()),
        "mean_fraction": _mean(list(fractions.values())),
    }


def _traffic(logs: Iterable[NodeLog], names: tuple[str, ...]) -> dict[str, int]:
    """Sums over every process of its last ``traffic`` event, which counts since the process began."""
    totals = dict.fromkeys(names, 0)
    for log in logs:
        for session in log.sessions():
            last = next((e for e in reversed(session) if e["event"] == "traffic"), None)
            for name in names:
                totals[name] += last[name] if last is not None else 0
    return totals
