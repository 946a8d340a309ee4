"""A worker that is missed more at another stage goes there.

Every ``LOOK_S`` a worker reads who serves which stage and how fast, and asks the rule
that all share (``stage.balance``) who should move. Only the one that it names acts: it asks an authority
for a certificate of the other stage, which the authority grants if the run allows moves, none was lately, and
the stage that is left keeps another node. Then the worker finishes what it has in progress, begins anew in
the same process, and fetches the other stage's state from its replicas like every newcomer. Without an
authority nobody moves.

What counts is what a replica could do if it always had work (``StageRecord.capacity``, by its own word),
clamped to ``MOST`` times the median of all; replicas that say nothing yet, or are on their way in, count like
the median. A stage without an ACTIVE replica is nobody's target: there would be no state to fetch.
Nobody moves whose settings name its stage, or while it is held.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from agorad import facts, joining
from agorad.authority.assign import stage_needs
from agorad.events import MoveRefused, Moving
from p2p.errors import P2PError
from p2p.identity import PeerId
from stage.balance import Move, propose
from stage.parameters import forward_flops, parameter_count
from stage.roster import MATES, Entry, Roster, StageView

if TYPE_CHECKING:
    from agorad.node import Node

LOOK_S: Final = 30.0
MOST: Final = 4.0
LINE_BYTES_S: Final = 25e6
"""Assumed of a mover's line: 200 Mbit/s."""
CATCH_UP_S: Final = 30.0
"""Assumed between the end of the download and serving."""
STATE_BYTES: Final = 12
"""A weight, with its moments."""


class Capacity:
    """Samples a second of computing: what a replica could do if it always had work."""

    OVER: Final = 16
    """Of the last so many looks."""
    LEAST: Final = 8
    """Microbatches before anything is said."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=self.OVER)

    def samples_a_second(self, busy_s: float, count: int) -> float | None:
        """With the seconds of computing and the count of this moment; None: too early to say."""
        self._seen.append((busy_s, count))
        (busy_first, first), (busy_last, last) = self._seen[0], self._seen[-1]
        if last - first < self.LEAST or busy_last <= busy_first:
            return None
        return round((last - first) / (busy_last - busy_first), 4)


def possible(node: Node) -> tuple[int, ...]:
    """The stages where this node would go. Blocking: it looks at the machine."""
    if node.config.worker.stage is not None or not node.manifest.admission.moves_per_hour:
        return ()
    known = facts.gather(node.config, node.clock())
    needs = stage_needs(node.manifest.model, node.manifest.training)
    return tuple(stage for stage, need in enumerate(needs) if need.mode_for(known) is not None)


def proposed(views: Sequence[StageView], work: Sequence[float], params: Sequence[int]) -> Move | None:
    """The move that is due by what the roster says, the same at everybody who reads the same."""
    mates = [view.in_phase(*MATES) for view in views]
    usual = _usual(mates, work)
    if usual is None:
        return None
    entries = {peer: entry for stage in mates for peer, entry in stage.items()}

    def cost_s(peer: PeerId, stage: int) -> float | None:
        entry = entries[peer].record
        alive = any(mate.record.phase == "active" for mate in mates[stage].values())
        if entry.phase != "active" or stage not in entry.moves or not alive:
            return None
        return STATE_BYTES * params[stage] / LINE_BYTES_S + CATCH_UP_S

    rates = [
        {peer: _rate(entry, usual / work[stage]) for peer, entry in here.items()}
        for stage, here in enumerate(mates)
    ]
    return propose(rates, work, cost_s=cost_s)


def _usual(mates: Sequence[dict[PeerId, Entry]], work: Sequence[float]) -> float | None:
    """The median replica's work a second; None while a stage has told nothing."""
    said = [
        [entry.record.capacity * work[stage] for entry in here.values() if entry.record.capacity]
        for stage, here in enumerate(mates)
    ]
    if not all(said):
        return None
    return statistics.median(power for stage in said for power in stage)


def _rate(entry: Entry, usual: float) -> float:
    return min(entry.record.capacity or usual, MOST * usual)


async def watch(
    node: Node, roster: Roster, stage: int, *, phase: Callable[[], str], moved: Callable[[], None]
) -> None:
    """Until this node moves: then ``moved`` was called and the node restarts. Or until cancelled."""
    model = node.manifest.model
    stages = range(model.stages)
    work = [float(forward_flops(model, index)) for index in stages]
    params = [parameter_count(model, index) for index in stages]
    while True:
        await trio.sleep(LOOK_S * node.rng.uniform(0.75, 1.25))
        if phase() != "active":
            continue
        views = [roster.view(index) for index in stages]
        for view in views:
            await roster.refresh(view)
        move = proposed(views, work, params)
        if move is None or move.peer != node.identity.peer_id:
            continue
        try:
            await joining.obtain_move(node, move.target)
        except (P2PError, trio.TooSlowError) as error:
            node.emit(MoveRefused(stage=move.target, why=str(error) or "no authority answered"))
            continue
        node.emit(Moving(origin=stage, target=move.target, gain=round(min(move.gain, 1e6), 3)))
        moved()
        node.restart(f"this node moves from stage {stage} to stage {move.target}")
        return
