"""The address of the page and of a gateway, as settings write them. Torch- and HTTP-free."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from p2p.errors import LocalError

DEFAULT_PORT: Final = 49190
"""Of the first GPU's node; the others' follow."""


def read_address(text: str, setting: str = "metrics.listen", port: int = DEFAULT_PORT) -> tuple[str, int]:
    """``host:port`` with a literal address, an IPv6 one in brackets. Raises LocalError."""
    host, colon, number = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        good = bool(colon) and bracketed == (address.version == 6) and number.isascii() and number.isdecimal()
    except ValueError:
        good = False
    if not good or int(number) > 65535:
        raise LocalError(f"{setting} = {text!r} is not an address and a port, like 127.0.0.1:{port}")
    return str(address), int(number)


def check_url(url: str, with_token: bool) -> None:
    """LocalError unless figures, and a token, may be sent there."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname is not None and parts.username is None
        _ = parts.port
    except ValueError:
        good = False
    if not good:
        raise LocalError(f"metrics.push = {url!r} is not an http or https URL without a password in it")
    if with_token and parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise LocalError(f"metrics.push = {url!r}: a token is sent over https only")
