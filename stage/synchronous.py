"""Synchronous steps: the replicas of a stage take each update together, with the mean of their gradients.

One step of the clock is up to two rounds (``stage.powersgd``): of the left factors, then of the right ones
with all that travels whole. Who has another mean of the left factors than a candidate cannot share the second
round with it: the mean's checksum stands where rounds of weights name their slice. Every member then makes
the same update, so replicas stay equal but for what they miss; rounds of slices mend that.

    a round fails           nothing is lost and nothing moves: gradient and samples wait for the next step
                            (error feedback commits only with a round that brought this replica's numbers to
                            the others). After ``MAX_CARRIED`` in a row the replica goes on with its own.
    no mate has it open     the replica's own gradient, uncompressed
    this replica is new     weight 0: it takes the others' mean; its own gradients are thrown away

Round numbers follow from the step, ``ROUNDS`` of them each, so that a replica that comes late to a step meets
its mates at the next. Limits: groups of ``RoundConfig.group_size``; replicas in different groups of the first
round cannot meet in the second, so a stage should not have more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from p2p.averaging import Averager, NobodyCame, Outcome
from p2p.errors import P2PError
from p2p.event import Emit
from p2p.identity import PeerId
from stage.device import STEP, Device
from stage.events import GradientsAveraged, RoundAbandoned

if TYPE_CHECKING:
    from stage.compute import StageCompute
    from stage.powersgd import Contribution, Projected

ROUNDS: Final = 3
"""Round numbers a step: left factors, right factors, a slice of the weights."""
SLICE: Final = 2
FACTOR_S: Final = 15.0
"""Deadline of each of the two rounds, matchmaking included."""
MAX_CARRIED: Final = 3
"""Steps in a row whose gradient waits for a round that works."""


class SynchronousSteps:
    """The updates of one replica; one at a time."""

    def __init__(
        self, *, me: PeerId, stage: int, device: Device, compute: StageCompute, averager: Averager, emit: Emit
    ) -> None:
        self._me = me
        self._stage = stage
        self._device = device
        self._compute = compute
        self._averager = averager
        self._emit = emit
        self._carried = 0

    async def step(self, step: int, mates: set[PeerId], *, weigh: bool) -> int:
        """The update that leads to ``step``, with whom of ``mates`` takes it too; own samples behind it."""
        if not mates:
            return await self._alone(step)
        number = ROUNDS * step
        try:
            projected = await self._device.run(STEP, self._compute.project, step)
            sent_bytes, second = 0, 0
            first = None
            if projected.values.numel():
                try:
                    first = await self._round(number, 0, projected, mates, weigh)
                except NobodyCame:
                    return await self._alone(step)
                sent_bytes, second = first.payload_out, int(first.checksum[:7], 16)
                mates = set(first.members) - {self._me}
            number += 1
            contribution = await self._device.run(STEP, self._compute.contribute, step, first, weigh)
            try:
                outcome = await self._round(number, second, contribution, mates, weigh)
            except NobodyCame:
                if first is None:
                    return await self._alone(step)
                raise
            used = await self._device.run(
                STEP, self._compute.step_averaged, step, contribution, outcome, self._me
            )
        except (P2PError, trio.TooSlowError) as error:
            self._emit(RoundAbandoned(round=number, stage=self._stage, why=str(error) or "timeout"))
            self._carried += 1
            return await self._alone(step) if weigh and self._carried > MAX_CARRIED else 0
        self._carried = 0
        self._emit(
            GradientsAveraged(
                round=number,
                step=step,
                stage=self._stage,
                members=list(outcome.members),
                fraction=outcome.fraction,
                bytes=sent_bytes + outcome.payload_out,
            )
        )
        return used

    async def _alone(self, step: int) -> int:
        self._carried = 0
        return await self._device.run(STEP, self._compute.step, step)

    async def _round(
        self, number: int, kind: int, sent: Projected | Contribution, mates: set[PeerId], weigh: bool
    ) -> Outcome:
        weight = float(sent.samples) if weigh else 0.0
        return await self._averager.average(
            number,
            kind,
            sent.values.numpy().data.cast("B"),
            weight,
            expected=mates,
            deadline=FACTOR_S,
            fill=True,
        )
