"""Running a ``Lookup``: questions out, answers in, as tasks.

Limits: those of the look-up, whose ``alpha`` bounds the tasks; the caller's deadline bounds the time.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

import attrs
import trio

from p2p.errors import P2PError
from p2p.kad.lookup import Lookup
from p2p.kad.table import Contact

Ask = Callable[[Contact], Awaitable[tuple[Sequence[Contact], bool]]]
"""Puts the search's question to a node: whom it names, and whether it is a member."""


@attrs.frozen(kw_only=True)
class KadLimits:
    """What an operator or a test may want otherwise."""

    k: int = 20
    alpha: int = 3
    replicas: int = 8
    """Nodes that keep a record. All of k would cost 2.5 times the stores and gain nothing: with a third
    of the nodes dead at once, one record in 15,000 is out of reach until its owner stores it again."""
    quorum: int = 3
    hop_s: float = 1.0
    """Deadline of one question."""
    patience_s: float = 0.4
    """A peer silent for this long no longer holds a lookup up."""


async def drive(lookup: Lookup, ask: Ask) -> None:
    """Run a lookup to its end; questions still open then are given up."""
    changed = trio.Event()

    async def one(contact: Contact) -> None:
        try:
            nodes, member = await ask(contact)
            lookup.answered(contact.peer, nodes, counts=member)
        except (P2PError, trio.TooSlowError):
            lookup.failed(contact.peer)
        changed.set()

    async with trio.open_nursery() as nursery:
        while not lookup.done(now := trio.current_time()):
            for contact in lookup.due(now):
                nursery.start_soon(one, contact)
            timer = lookup.timer(now)
            with trio.move_on_at(math.inf if timer is None else timer):
                await changed.wait()
            changed = trio.Event()
        nursery.cancel_scope.cancel()
