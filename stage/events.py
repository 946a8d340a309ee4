"""What a pipeline stage and a trainer report. Field meanings are in ``docs/events.md``."""

from __future__ import annotations

import attrs

from p2p.event import Event


@attrs.frozen(kw_only=True)
class MicrobatchIssued(Event):
    """A trainer created a microbatch; it ends in exactly one completed or failed."""

    ticket: str


@attrs.frozen(kw_only=True)
class MicrobatchAdded(Event):
    """A replica added this microbatch's gradient to its accumulator. On disk before the answer leaves."""

    ticket: str
    stage: int
    replica: str
    step: int


@attrs.frozen(kw_only=True)
class MicrobatchCompleted(Event):
    """The trainer has the answer: every stage added it."""

    ticket: str
    path: list[str]
    loss: float


@attrs.frozen(kw_only=True)
class MicrobatchFailed(Event):
    """The trainer gave a microbatch up."""

    ticket: str
    why: str


@attrs.frozen(kw_only=True)
class Rerouted(Event):
    """A caller sent a microbatch to another replica because the first did not answer."""

    ticket: str
    from_: str
    to: str
    why: str


@attrs.frozen(kw_only=True)
class Busy(Event):
    """A replica had no free slot for a microbatch."""

    ticket: str
    replica: str


@attrs.frozen(kw_only=True)
class Reused(Event):
    """A call joined work that another one had brought, or got the answer that was kept of it."""

    ticket: str
    stage: int
    replica: str


@attrs.frozen(kw_only=True)
class ReusedStale(Event):
    """A cached answer that belongs to another ``c`` was given (once) to a replacement caller."""

    ticket: str
    stage: int
    replica: str


@attrs.frozen(kw_only=True)
class Step(Event):
    """The clock advanced and the replica followed; ``samples`` is what its update averaged (0: none)."""

    stage: int
    replica: str
    step: int
    samples: int


@attrs.frozen(kw_only=True)
class Computing(Event):
    """A worker measured a microbatch and decided how it computes: graphs that may wait, old versions."""

    stage: int
    device: str
    dtype: str
    optimizer: str
    graphs: int
    versions: int
    fixed_bytes: int
    graph_bytes: int
    peak_bytes: int
    budget_bytes: int


@attrs.frozen(kw_only=True)
class BadGradient(Event):
    """An accumulated gradient was not finite and was thrown away."""

    stage: int
    step: int
    samples: int


@attrs.frozen(kw_only=True)
class BadOutput(Event):
    """A forward pass on finite numbers gave one that is not; the microbatch was refused."""

    stage: int
    step: int


@attrs.frozen(kw_only=True)
class RoundFinished(Event):
    """An averaging round ended with something averaged, and was merged."""

    round: int
    stage: int
    slice: int
    members: list[str]
    fraction: float
    checksum: str
    drops: list[list[str]]
    disagreement: float


@attrs.frozen(kw_only=True)
class RoundAbandoned(Event):
    """An averaging round averaged nothing, and why."""

    round: int
    stage: int
    why: str


@attrs.frozen(kw_only=True)
class GradientsAveraged(Event):
    """A synchronous step: its gradient is the mean of these replicas'; ``bytes`` of payload sent for it."""

    round: int
    step: int
    stage: int
    members: list[str]
    fraction: float
    bytes: int


@attrs.frozen(kw_only=True)
class Phase(Event):
    """A replica's sync phase changed."""

    from_: str
    to: str
    why: str


@attrs.frozen(kw_only=True)
class SettingsTaken(Event):
    """A replica trains by settings of a newer manifest, from the update that leads to ``step``."""

    step: int
    settings: list[str]


@attrs.frozen(kw_only=True)
class Saved(Event):
    """A snapshot lies on disk."""

    step: int
    bytes: int


@attrs.frozen(kw_only=True)
class SaveFailed(Event):
    """A snapshot could not be written; training goes on."""

    step: int
    why: str


@attrs.frozen(kw_only=True)
class Resumed(Event):
    """A restarted replica loaded its own newest snapshot."""

    step: int


@attrs.frozen(kw_only=True)
class CheckpointSaved(Event):
    """This replica wrote its stage's state to the run's checkpoint store."""

    step: int
    bytes: int
    seconds: float


@attrs.frozen(kw_only=True)
class CheckpointFailed(Event):
    """The checkpoint store could not be written or read; training goes on."""

    why: str


@attrs.frozen(kw_only=True)
class Restored(Event):
    """A replica without mates, or after a roll-back, took its state from the checkpoint store."""

    step: int
    bytes: int
    seconds: float


@attrs.frozen(kw_only=True)
class StateFetching(Event):
    """A newcomer is downloading the state of a stage-mate: ``bytes`` of ``size`` so far."""

    donor: str
    step: int
    bytes: int
    size: int
    seconds: float


@attrs.frozen(kw_only=True)
class StateFetched(Event):
    """A newcomer has the whole state of a stage-mate: ``kept`` bytes of it were here, ``line`` bytes came."""

    donor: str
    step: int
    bytes: int
    kept: int
    line: int
    seconds: float


@attrs.frozen(kw_only=True)
class ChunkBad(Event):
    """A chunk of a state is not what its manifest says; it is asked for again."""

    donor: str
    chunk: int


@attrs.frozen(kw_only=True)
class FetchFailed(Event):
    """A stage-mate did not give its state; another is asked."""

    donor: str
    why: str


@attrs.frozen(kw_only=True)
class Evaluated(Event):
    """Mean loss over the held-out rows, each on two paths."""

    step: int
    loss: float
    rows: int


@attrs.frozen(kw_only=True)
class DataUnavailable(Event):
    """A trainer's data could not be had just now; it tries again."""

    why: str


@attrs.frozen(kw_only=True)
class Traffic(Event):
    """Bytes sent by this process since it began: ``boundary`` and ``averaging`` payload, all the rest."""

    boundary: int
    averaging: int
    control: int
    forward_hops: int
    backward_hops: int
