"""What the hash table reports (see ``docs/events.md``)."""

from __future__ import annotations

import attrs

from p2p.event import Event


@attrs.frozen(kw_only=True)
class DhtJoined(Event):
    """Another node answered: we are part of the table."""

    peers: int
    seconds: float


@attrs.frozen(kw_only=True)
class DhtIsolated(Event):
    """Nobody can be reached at the moment; it is tried again in ``retry_in`` seconds."""

    retry_in: float


@attrs.frozen(kw_only=True)
class ClockSkewed(Event):
    """A peer's clock is off ours by more than a message's way; told once until it is right again."""

    peer: str
    seconds: float
    """How far it is ahead of ours."""


@attrs.frozen(kw_only=True)
class RecordRefused(Event):
    """A record was not kept: one that ``peer`` sent us, or one of ours that ``peer`` would not take."""

    peer: str
    key: str
    code: str
