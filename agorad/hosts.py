"""Host names and addresses that people write, checked, as the multiaddr protocols they are."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from p2p.errors import LocalError

_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def kind_of(text: str) -> str:
    """``ip4``, ``ip6`` or ``dns4``; ``LocalError`` for what peers could not reach."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        labels = text.split(".")
        if labels[-1].isdigit() or not all(map(_LABEL.fullmatch, labels)) or len(text) > 253:
            raise LocalError(f"{text!r} is neither an IP address nor a host name") from None
        return "dns4"
    if address.is_unspecified or address.is_multicast:
        raise LocalError(f"{text} is no address that peers could reach")
    return f"ip{address.version}"
