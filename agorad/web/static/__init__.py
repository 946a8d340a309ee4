"""The page's style sheet, script and icon. Their addresses hold a hash of what they are, so they never go
stale.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
NAMES: Final = ("page.css", "page.js", "icon.svg")


@cache
def content(name: str) -> bytes:
    """One of ``NAMES``."""
    return Path(__file__).with_name(name).read_bytes()


@cache
def path(name: str) -> str:
    """Where it is."""
    stem, _, ending = name.partition(".")
    return f"/static/{stem}.{hashlib.sha256(content(name)).hexdigest()[:12]}.{ending}"
