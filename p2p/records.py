"""What the swarm says of itself in the hash table: one frozen class for each kind of record.

``to_value`` gives the plain map that ``Dht.store`` signs; ``from_value`` reads one that came from a
peer and raises RemoteError unless every bound holds. ``read_all`` reads what ``Dht.get`` returned and
skips (with an event) what is not readable, so that one hostile writer cannot hide the others. Unknown
fields are ignored, so that a later version can add some; a missing or wrong one makes the record
unreadable.

Limits: 8 addresses of 256 characters a record, 1 KiB for a certificate; the record as a whole is
bounded by ``p2p.kad.record.VALUE_LIMIT``. That the certificate in a record is genuine is for
``p2p.membership.Trust`` to say, not for this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Self, TypeGuard, TypeVar

import attrs

from p2p.errors import RemoteError
from p2p.event import Emit, Event, ignore
from p2p.identity import PeerId
from p2p.kad.record import Record
from p2p.membership import CERTIFICATE_LIMIT

MAX_ADDRS: Final = 8
MAX_ADDR_CHARS: Final = 256
MAX_STEP: Final = 1 << 48
MAX_SLOTS: Final = 1 << 16
MAX_STAGES: Final = 256
MAX_RATE: Final = 1e9
"""Upper bound of rates, bandwidths and weights; what a peer claims beyond it is nonsense."""
PHASES: Final = frozenset(
    {"joining", "queued", "downloading", "syncing", "warming", "active", "paused", "leaving"}
)

MAX_CLAIMS: Final = 16
MAX_DONE: Final = 32
MAX_SHARD: Final = 1 << 20
MAX_FINGERPRINT: Final = 64

_Kind = TypeVar("_Kind", "StageRecord", "ClockRecord", "CandidateRecord", "LeaseRecord")


@attrs.frozen(kw_only=True)
class RecordUnreadable(Event):
    """A signed record that does not say what its key promises; it was skipped."""

    key: str
    owner: str


def stage_key(run: str, stage: int) -> str:
    """Where the replicas of a stage announce themselves."""
    return f"stage/{run}/{stage}"


def clock_key(run: str) -> str:
    """Where trainers publish how many samples they completed."""
    return f"clock/{run}"


def lease_key(run: str) -> str:
    """Where trainers say which shards of the data they work on."""
    return f"lease/{run}"


def round_key(run: str, stage: int, number: int) -> str:
    """Where candidates of one averaging round find each other."""
    return f"round/{run}/{stage}/{number}"


@attrs.frozen(kw_only=True)
class StageRecord:
    """One replica of one stage: where it is, how far, and how much it can take."""

    addrs: tuple[str, ...]
    phase: str
    step: int
    slots: int
    """Microbatches that it could accept now."""
    rate: float
    """Samples a second that it lately completed."""
    certificate: bytes
    disagreement: float | None = None
    """Relative distance to the others on the last averaged slice."""
    snapshot_step: int | None = None
    """Step of the newest state that it could serve."""
    working: int | None = None
    """Microbatches in progress."""
    round: tuple[int, float, int, float] | None = None
    """Its last averaging: number, fraction averaged, members, unix time."""
    capacity: float | None = None
    """Samples a second that it could complete if it always had work."""
    moves: tuple[int, ...] = ()
    """Stages where it would go."""
    generation: int = 0
    """Roll-backs of the run that its state has seen."""

    def to_value(self) -> dict[str, Any]:
        last = None if self.round is None else list(self.round)
        lists = {"addrs": list(self.addrs), "moves": list(self.moves), "round": last}
        return {**attrs.asdict(self), **lists}

    @classmethod
    def from_value(cls, value: Any) -> Self:
        if not (
            isinstance(value, Mapping)
            and _are_addrs(value.get("addrs"))
            and isinstance(value.get("phase"), str)
            and value["phase"] in PHASES
            and _is_count(value.get("step"), MAX_STEP)
            and _is_count(value.get("slots"), MAX_SLOTS)
            and _is_amount(value.get("rate"))
            and _is_certificate(value.get("certificate"))
            and (value.get("disagreement") is None or _is_amount(value["disagreement"]))
            and (value.get("snapshot_step") is None or _is_count(value["snapshot_step"], MAX_STEP))
            and (value.get("working") is None or _is_count(value["working"], MAX_SLOTS))
            and (value.get("round") is None or _is_round(value["round"]))
            and _is_count(value.get("generation", 0), MAX_STEP)
            and (value.get("capacity") is None or _is_amount(value["capacity"]))
            and _are_stages(value.get("moves", []))
        ):
            raise RemoteError("a stage record that is not what its key promises")
        disagreement = value.get("disagreement")
        return cls(
            addrs=tuple(value["addrs"]),
            phase=value["phase"],
            step=value["step"],
            slots=value["slots"],
            rate=float(value["rate"]),
            certificate=value["certificate"],
            disagreement=None if disagreement is None else float(disagreement),
            snapshot_step=value.get("snapshot_step"),
            working=value.get("working"),
            round=None if value.get("round") is None else tuple(value["round"]),
            generation=value.get("generation", 0),
            capacity=None if value.get("capacity") is None else float(value["capacity"]),
            moves=tuple(value.get("moves", [])),
        )


@attrs.frozen(kw_only=True)
class ClockRecord:
    """How many samples a trainer completed so far: its share of the step clock."""

    samples: int
    at: float
    """The trainer's unix time when it said so."""
    signature: bytes = attrs.field(repr=False)
    """The trainer's own, over run and samples: the statement that microbatch headers carry too.

    Checked by the reader who counts it (``stage.clock``), not here.
    """
    loss: float | None = None
    """Mean of its last microbatches' losses, for people."""
    evaluated: tuple[int, float] | None = None
    """Step and loss of its last evaluation, if it is the trainer that evaluates."""
    others: tuple[tuple[str, int, bytes], ...] = ()
    """What it knows of other trainers, first those that said nothing new for longest: peer id, samples, and
    their own signature. The record of one that is gone for ever expires; what it did still counts."""

    def to_value(self) -> dict[str, Any]:
        last = None if self.evaluated is None else list(self.evaluated)
        return {**attrs.asdict(self), "evaluated": last, "others": [list(other) for other in self.others]}

    @classmethod
    def from_value(cls, value: Any) -> Self:
        if not (
            isinstance(value, Mapping)
            and _is_count(value.get("samples"), MAX_STEP)
            and _is_number(value.get("at"))
            and isinstance(value.get("signature"), bytes)
            and len(value["signature"]) == 64
        ):
            raise RemoteError("a clock record that is not what its key promises")
        loss, evaluated = value.get("loss"), value.get("evaluated")
        # The count has to be read whatever became of the loss: a run that diverges says NaN here.
        loss = loss if _is_amount(loss) else None
        evaluated = evaluated if _is_evaluation(evaluated) else None
        others = value.get("others")
        return cls(
            others=tuple((who, count, by) for who, count, by in others) if _are_counts(others) else (),
            samples=value["samples"],
            at=float(value["at"]),
            signature=value["signature"],
            loss=None if loss is None else float(loss),
            evaluated=None if evaluated is None else (evaluated[0], float(evaluated[1])),
        )


OTHERS = 24
"""Most counts of others in a clock record; they fit it."""


def _are_counts(value: object) -> TypeGuard[list[tuple[str, int, bytes]]]:
    return (
        isinstance(value, list)
        and len(value) <= OTHERS
        and all(
            isinstance(item, list)
            and len(item) == 3
            and isinstance(item[0], str)
            and _is_count(item[1], MAX_STEP)
            and isinstance(item[2], bytes)
            and len(item[2]) == 64
            for item in value
        )
    )


@attrs.frozen
class Claim:
    """What a trainer says of one shard of the data; see ``stage.leases``."""

    shard: int
    term: int
    """Grows with every change of hands."""
    state: str
    """held, free or wanted."""
    mark: int
    """Every position below it is done."""
    completed: int
    """How many are, those above the mark included."""
    done: tuple[int, ...]
    """Some positions above the mark that are done."""
    cursor: tuple[int, int, int, int]
    """Where to go on reading."""


@attrs.frozen(kw_only=True)
class LeaseRecord:
    """The shards of the data that a trainer works on."""

    until: float
    """Unix time at which its claims are over."""
    data: str
    """Fingerprint of everything that positions depend on."""
    claims: tuple[Claim, ...]

    def to_value(self) -> dict[str, Any]:
        claims = [
            [
                claim.shard,
                claim.term,
                claim.state,
                claim.mark,
                claim.completed,
                [*claim.done],
                [*claim.cursor],
            ]
            for claim in self.claims
        ]
        return {"until": self.until, "data": self.data, "claims": claims}

    @classmethod
    def from_value(cls, value: Any) -> Self:
        if not (
            isinstance(value, Mapping)
            and _is_number(value.get("until"))
            and isinstance(value.get("data"), str)
            and len(value["data"]) <= MAX_FINGERPRINT
            and isinstance(value.get("claims"), list)
            and len(value["claims"]) <= MAX_CLAIMS
            and all(_is_claim(claim) for claim in value["claims"])
        ):
            raise RemoteError("a lease record that is not what its key promises")
        claims = tuple(
            Claim(shard, term, state, mark, completed, tuple(done), tuple(cursor))
            for shard, term, state, mark, completed, done, cursor in value["claims"]
        )
        return cls(until=float(value["until"]), data=value["data"], claims=claims)


@attrs.frozen(kw_only=True)
class CandidateRecord:
    """A replica that wants to take part in one averaging round."""

    addrs: tuple[str, ...]
    bandwidth: float
    """Bytes a second that it believes it can send."""
    weight: float
    """Samples behind its parameters since the last round; 0 while syncing."""
    certificate: bytes

    def to_value(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "addrs": list(self.addrs)}

    @classmethod
    def from_value(cls, value: Any) -> Self:
        if not (
            isinstance(value, Mapping)
            and _are_addrs(value.get("addrs"))
            and _is_amount(value.get("bandwidth"))
            and _is_amount(value.get("weight"))
            and _is_certificate(value.get("certificate"))
        ):
            raise RemoteError("a candidate record that is not what its key promises")
        return cls(
            addrs=tuple(value["addrs"]),
            bandwidth=float(value["bandwidth"]),
            weight=float(value["weight"]),
            certificate=value["certificate"],
        )


def read_all(kind: type[_Kind], records: Mapping[str, Record], *, emit: Emit = ignore) -> dict[PeerId, _Kind]:
    """The readable ones of what ``Dht.get`` returned, by owner."""
    found: dict[PeerId, _Kind] = {}
    for record in records.values():
        try:
            found[record.owner] = kind.from_value(record.value)
        except RemoteError:
            emit(RecordUnreadable(key=record.key, owner=record.owner))
    return found


def _are_stages(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= MAX_STAGES
        and all(_is_count(stage, MAX_STAGES) for stage in value)
    )


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e15 < value < 1e15


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= MAX_RATE


def _is_round(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and _is_count(value[0], MAX_STEP)
        and _is_amount(value[1])
        and _is_count(value[2], MAX_SLOTS)
        and _is_number(value[3])
    )


def _is_claim(value: Any) -> bool:
    match value:
        case [shard, int(), str(state), mark, completed, list(done), list(cursor)]:
            return (
                _is_count(shard, MAX_SHARD)
                and state in ("held", "free", "wanted")
                and len(done) <= MAX_DONE
                and len(cursor) == 4
                and all(_is_count(count, MAX_STEP) for count in (value[1], mark, completed, *done, *cursor))
                and min(done, default=mark + 1) > mark >= cursor[3]
            )
    return False


def _is_evaluation(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and _is_count(value[0], MAX_STEP) and _is_amount(value[1])
    )


def _is_certificate(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) <= CERTIFICATE_LIMIT


def _are_addrs(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_ADDRS
        and all(isinstance(addr, str) and 0 < len(addr) <= MAX_ADDR_CHARS for addr in value)
    )
