"""Events: everything that happens is a frozen attrs object handed to a plain callable.

``p2p`` and ``stage`` define theirs beside the code that emits them; ``agorad/events.py`` owns the
bus. An event's wire name is its class name in snake case (``PeerRefused`` -> ``peer_refused``);
fields whose name is a Python keyword end in an underscore that the wire drops (``from_`` -> ``from``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Event:
    """Base class; subclasses are ``@attrs.frozen(kw_only=True)`` with plain msgpack-able fields."""


Emit = Callable[[Event], None]
"""What a component is given to report events with. Must not block and must not raise."""


def ignore(_event: Event) -> None:
    """The ``Emit`` of components whose owner listens to nothing."""


def event_name(kind: type[Event]) -> str:
    """Wire name of an event class: ``RoundFinished`` -> ``round_finished``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def event_fields(event: Event) -> dict[str, Any]:
    """Fields of an event by wire name, as plain values."""
    return {name.rstrip("_"): value for name, value in attrs.asdict(event).items()}
