"""The step clock: how far the run is, told by trainers and believed by everybody.

Each trainer signs a growing count of the samples that it saw completed. The count travels in the
header of every microbatch and lies in the DHT (``clock/{run}``). The run's step is the sum over
trainers divided by the target batch: one clock for all stages, with nobody in charge of it. Counts
only grow, so readings may arrive in any order and twice. Sans-IO and torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import msgpack

from p2p.errors import RemoteError
from p2p.identity import Identity, PeerId, verify

DOMAIN = "clock"
MAX_READINGS = 64
"""Most readings in one header: more trainers than this send the ones that changed last."""


def signed_bytes(run: str, samples: int) -> bytes:
    """What a trainer signs."""
    packed: bytes = msgpack.packb([run, samples])
    return packed


@attrs.frozen
class Reading:
    """One trainer's signed count of completed samples."""

    trainer: PeerId
    samples: int
    signature: bytes

    @classmethod
    def signed(cls, identity: Identity, run: str, samples: int) -> Reading:
        return cls(identity.peer_id, samples, identity.sign(DOMAIN, signed_bytes(run, samples)))

    def to_wire(self) -> list[Any]:
        return [self.trainer, self.samples, self.signature]


def readings_from_wire(value: Any) -> list[Reading]:
    """Checks types and ranges, not signatures. Raises RemoteError."""
    if not isinstance(value, list) or len(value) > MAX_READINGS:
        raise RemoteError(f"clock: not a list of at most {MAX_READINGS} readings")
    readings = []
    for item in value:
        match item:
            case [str(trainer), int(samples), bytes(signature)] if (
                type(samples) is int and 0 <= samples < 2**63 and len(signature) == 64
            ):
                readings.append(Reading(PeerId(trainer), samples, signature))
            case _:
                raise RemoteError("clock: a reading is not [trainer, samples, signature]")
    return readings


class StepClock:
    """The newest verified reading of each trainer of the run."""

    def __init__(self, run: str, trainers: frozenset[PeerId], target_batch: int) -> None:
        self._run = run
        self._trainers = trainers
        self._target_batch = target_batch
        self._newest: dict[PeerId, Reading] = {}

    @property
    def samples(self) -> int:
        """Completed samples of all trainers together."""
        return sum(reading.samples for reading in self._newest.values())

    @property
    def step(self) -> int:
        return self.samples // self._target_batch

    @property
    def readings(self) -> list[Reading]:
        """What to put into a header: the ones that changed last."""
        return list(self._newest.values())[-MAX_READINGS:]

    def observe(self, readings: Iterable[Reading]) -> bool:
        """Take what is newer; True if the step advanced. Raises RemoteError on a forged reading.

        Only a reading that would move its trainer's count costs a signature check. One forged reading
        condemns them all: nothing is taken, so that no advance goes by without its True.
        """
        before, newer = self.step, dict[PeerId, Reading]()
        for reading in readings:
            known = newer.get(reading.trainer) or self._newest.get(reading.trainer)
            if known is not None and known.samples >= reading.samples:
                continue
            if reading.trainer not in self._trainers:
                raise RemoteError("clock: a reading by a peer that the manifest does not list as a trainer")
            data = signed_bytes(self._run, reading.samples)
            if not verify(reading.trainer, DOMAIN, data, reading.signature):
                raise RemoteError("clock: a reading with a bad signature")
            newer[reading.trainer] = reading
        for trainer, reading in newer.items():
            self._newest.pop(trainer, None)  # so that the order is that of the changes
            self._newest[trainer] = reading
        return self.step > before
