"""The address of the page, as settings write it. Torch- and HTTP-free."""

from __future__ import annotations

import ipaddress
from typing import Final

from p2p.errors import LocalError

DEFAULT_PORT: Final = 49190
"""Of the first GPU's node; the others' follow."""


def read_address(text: str) -> tuple[str, int]:
    """``host:port`` with a literal address, an IPv6 one in brackets. Raises LocalError."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        good = bool(colon) and bracketed == (address.version == 6) and port.isascii() and port.isdecimal()
    except ValueError:
        good = False
    if not good or int(port) > 65535:
        raise LocalError(
            f"metrics.listen = {text!r} is not an address and a port, like 127.0.0.1:{DEFAULT_PORT}"
        )
    return str(address), int(port)
