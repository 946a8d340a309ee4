"""What is known of the run at one moment, and the JSON that says it. Pure.

Addresses of nodes are not among it: who takes part tells them to members, not to everybody who reads a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from agorad.authority.leaderboard import ROWS, Row
from agorad.run import Manifest
from agorad.web.history import History

SERVING: Final = ("warming", "active")


@attrs.frozen(kw_only=True)
class Replica:
    """One node in the roster, by its own word."""

    peer: str
    account: str
    stage: int
    phase: str
    step: int
    slots: int
    """Microbatches that it could take now."""
    working: int | None
    """Microbatches in progress."""
    rate: float
    """Samples a second."""
    disagreement: float | None
    snapshot_step: int | None
    round: tuple[int, float, int, float] | None
    """Number, fraction, members, unix time."""

    @property
    def load(self) -> float | None:
        """0 idle, 1 full."""
        if self.working is None or not self.working + self.slots:
            return None
        return self.working / (self.working + self.slots)


@attrs.frozen(kw_only=True)
class Trainer:
    """Where microbatches come from."""

    peer: str
    samples: int
    at: float
    """When it said so."""
    loss: float | None


@attrs.frozen(kw_only=True)
class Waiting:
    """A node in the queue of this authority."""

    peer: str
    account: str
    position: int
    stage: int | None
    present: bool
    """Its stream is open."""
    downloaded: bool
    eta_s: float | None


@attrs.frozen(kw_only=True)
class Door:
    """What a node would find that asks to join now."""

    free: int
    """Places."""
    paused: bool
    waiting: int
    eta_s: float | None
    """Until a newcomer's turn; None where nobody can tell."""


@attrs.frozen(kw_only=True)
class Earned:
    """A node in the books."""

    account: str
    compute: float
    """PFLOP."""
    presence: float
    active_h: float
    joined: float
    seen: float


@attrs.frozen(kw_only=True)
class Facts:
    """All of it, at one moment. ``version`` grows with each."""

    version: int = 0
    at: float = 0.0
    manifest: Manifest
    step: int = 0
    samples: int = 0
    loss: float | None = None
    samples_per_second: float = 0.0
    replicas: tuple[Replica, ...] = ()
    trainers: tuple[Trainer, ...] = ()
    door: Door | None = None
    queue: tuple[Waiting, ...] = ()
    rows: tuple[Row, ...] = ()
    earned: Mapping[str, Earned] = attrs.field(factory=dict)
    """By peer."""
    history: History = attrs.field(factory=History)

    @property
    def tokens_per_second(self) -> float:
        return self.samples_per_second * self.manifest.model.seq

    @property
    def active(self) -> int:
        """Replicas that take work."""
        return sum(replica.phase in SERVING for replica in self.replicas)

    @property
    def evaluated(self) -> tuple[int, float] | None:
        return self.history.evaluations[-1] if self.history.evaluations else None

    def of_stage(self, stage: int) -> list[Replica]:
        return [replica for replica in self.replicas if replica.stage == stage]

    def replica(self, peer: str) -> Replica | None:
        return next((replica for replica in self.replicas if replica.peer == peer), None)

    def waiting(self, peer: str) -> Waiting | None:
        return next((place for place in self.queue if place.peer == peer), None)

    def knows(self, peer: str) -> bool:
        """Whether there is a page of this node."""
        return peer in self.earned or self.replica(peer) is not None or self.waiting(peer) is not None


def swarm(facts: Facts) -> dict[str, Any]:
    """``/api/v1/swarm``."""
    manifest = facts.manifest
    return {
        "at": facts.at,
        "run": {
            "name": manifest.run.name,
            "id": manifest.run.id,
            "version": manifest.run.version,
            "operator": manifest.run.operator,
            "hash": manifest.hash.hex(),
        },
        "step": facts.step,
        "total_steps": manifest.training.total_steps,
        "samples": facts.samples,
        "tokens": facts.samples * manifest.model.seq,
        "samples_per_second": round(facts.samples_per_second, 4),
        "tokens_per_second": round(facts.tokens_per_second, 2),
        "loss": facts.loss,
        "evaluation": _evaluation(facts),
        "stages": [
            {
                "stage": stage,
                "layers": layers,
                "replicas": [replica_document(replica) for replica in facts.of_stage(stage)],
            }
            for stage, layers in enumerate(manifest.model.layers)
        ],
        "trainers": [attrs.asdict(trainer) for trainer in facts.trainers],
        "door": door(facts),
    }


def replica_document(replica: Replica) -> dict[str, Any]:
    """One node of a stage."""
    last = replica.round
    return {
        "peer_id": replica.peer,
        "account": replica.account,
        "phase": replica.phase,
        "step": replica.step,
        "slots": replica.slots,
        "working": replica.working,
        "load": None if replica.load is None else round(replica.load, 3),
        "samples_per_second": replica.rate,
        "disagreement": replica.disagreement,
        "snapshot_step": replica.snapshot_step,
        "round": None
        if last is None
        else {"number": last[0], "fraction": last[1], "members": last[2], "at": last[3]},
    }


def door(facts: Facts) -> dict[str, Any] | None:
    """Whether joiners get in; null until it is known."""
    return None if facts.door is None else attrs.asdict(facts.door)


def past(facts: Facts) -> dict[str, Any]:
    """``/api/v1/history``."""
    history, seq = facts.history, facts.manifest.model.seq
    return {
        "at": facts.at,
        "curve": [attrs.asdict(moment) for moment in history.moments],
        "tokens_per_second": [[at, round(rate * seq, 2)] for at, rate in history.rates()],
        "evaluations": [list(pair) for pair in history.evaluations],
        "rounds": [attrs.asdict(one) for one in reversed(history.rounds)],
        "changes": [change_document(change) for change in reversed(history.changes)],
    }


def change_document(change: Any) -> dict[str, Any]:
    """One coming or going."""
    document: dict[str, Any] = attrs.asdict(change)
    document["peer_id"] = document.pop("peer")
    return document


def leaderboard(facts: Facts) -> dict[str, Any]:
    """``/api/v1/leaderboard``."""
    return {
        "at": facts.at,
        "accounts": len(facts.rows),
        "rows": [attrs.asdict(row) for row in facts.rows[:ROWS]],
    }


def node(facts: Facts, peer: str) -> dict[str, Any]:
    """``/api/v1/nodes/PEER``."""
    replica, waiting, earned = facts.replica(peer), facts.waiting(peer), facts.earned.get(peer)
    account = next((found.account for found in (replica, earned, waiting) if found is not None), "")
    return {
        "at": facts.at,
        "peer_id": peer,
        "account": account,
        "stage": replica.stage if replica is not None else None if waiting is None else waiting.stage,
        "phase": replica.phase if replica is not None else "queued" if waiting is not None else "away",
        "replica": None if replica is None else replica_document(replica),
        "queue": None
        if waiting is None
        else {
            "position": waiting.position,
            "eta_s": waiting.eta_s,
            "present": waiting.present,
            "downloaded": waiting.downloaded,
        },
        "points": None
        if earned is None
        else {
            "compute": earned.compute,
            "presence": earned.presence,
            "active_h": earned.active_h,
            "joined": earned.joined,
            "seen": earned.seen,
        },
    }


def joining(facts: Facts) -> dict[str, Any]:
    """``/api/v1/join``."""
    rules = facts.manifest.admission
    return {
        "at": facts.at,
        "door": door(facts),
        "needs": {
            "accounts": rules.accounts,
            "min_vram_gib": rules.min_vram_gib,
            "min_ram_gib": rules.min_ram_gib,
            "min_disk_gib": rules.min_disk_gib,
            "min_mbps": rules.min_mbps,
            "max_rtt_ms": rules.max_rtt_ms,
            "port_test": rules.port_test,
            "min_version": rules.min_version,
        },
        "queue": [
            {
                "peer_id": place.peer,
                "position": place.position,
                "stage": place.stage,
                "present": place.present,
                "downloaded": place.downloaded,
                "eta_s": place.eta_s,
            }
            for place in facts.queue[:ROWS]
        ],
    }


def _evaluation(facts: Facts) -> dict[str, Any] | None:
    last = facts.evaluated
    return None if last is None else {"step": last[0], "loss": last[1]}
