"""What a role lets supervision do to it. A role that has no such lever is warned about, and that is all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from agorad.supervision.reactions import Rule, Vitals


async def _nothing() -> None:
    return


async def _sound() -> bool:
    return True


@attrs.frozen(kw_only=True)
class Levers:
    """Set by the role once it works."""

    shed: Callable[[bool], None] = lambda _on: None
    """Take no new microbatches; False: take them again."""
    resync: Callable[[str], bool] = lambda _why: False
    """Fetch the state of a mate; False where nobody has one."""
    trim: Callable[[], Awaitable[None]] = _nothing
    """Give cached memory of the accelerator back."""
    sound: Callable[[], Awaitable[bool]] = _sound
    """Whether all weights are finite."""
    make_room: Callable[[], None] = lambda: None
    """Remove what the disk can do without."""
    vitals: Callable[[Vitals], Vitals] = lambda now: now
    """Adds what only the role sees."""
    rules: tuple[Rule, ...] = ()
    """Troubles that only this role can have."""
