"""Reading a peer's message header: every field is checked for type and range before it is used.

A header is a msgpack map that somebody else wrote. Each function takes the field of one type out of
it or raises ``RemoteError``, so that the state machines see only values inside their stated limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from p2p.errors import RemoteError


def integer(header: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """An integer with ``low <= value <= high``."""
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RemoteError(f"{name} must be an integer from {low} to {high}")
    return value


def number(header: Mapping[str, Any], name: str, low: float, high: float) -> float:
    """A finite number with ``low <= value <= high``."""
    value = header.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RemoteError(f"{name} must be a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise RemoteError(f"{name} must be a number from {low} to {high}")
    return float(value)


def text(header: Mapping[str, Any], name: str, limit: int) -> str:
    """A non-empty string of at most ``limit`` characters."""
    value = header.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise RemoteError(f"{name} must be a string of 1 to {limit} characters")
    return value


def blob(header: Mapping[str, Any], name: str, low: int, high: int) -> bytes:
    """A byte string of ``low`` to ``high`` bytes."""
    value = header.get(name)
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        raise RemoteError(f"{name} must be {low} to {high} bytes")
    return value


def array(header: Mapping[str, Any], name: str, limit: int) -> list[Any]:
    """A list of at most ``limit`` items; what the items are is the caller's to check."""
    value = header.get(name)
    if not isinstance(value, list) or len(value) > limit:
        raise RemoteError(f"{name} must be a list of at most {limit} items")
    return value
