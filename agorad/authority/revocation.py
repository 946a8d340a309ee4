"""The list of peers that an authority took out, as it stands in the hash table. Pure.

An authority signs its list as records of its own (``revoked/<run>/<page>``, its peer id as subkey): each page
a map ``{at, pages, peers: [[peer id, until, why], …]}``. ``at`` is the unix time of the whole list; pages of
different times do not go together. Readers take a list only whole. An entry lasts as long as the certificate
that it takes back could be believed, so lists stay short. Limits: ``PAGES`` pages of ``PER_PAGE`` peers, 100
characters a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from p2p.errors import RemoteError
from p2p.identity import PeerId
from p2p.membership import Revoked

PAGES: Final = 64
PER_PAGE: Final = 20
"""At most 180 bytes each, so that a page fits a record."""
WHY_LIMIT: Final = 100
PEER_CHARS: Final = 64


def key(run: str, page: int) -> str:
    """Where a page lies."""
    return f"revoked/{run}/{page}"


def pages(peers: Mapping[PeerId, Revoked], at: float) -> list[dict[str, Any]]:
    """The list as values of records, at least one; what is beyond the limit waits for its end by itself."""
    rows = [
        [peer, revoked.until, revoked.why.encode()[:WHY_LIMIT].decode(errors="ignore")]
        for peer, revoked in sorted(peers.items(), key=lambda item: -item[1].until)[: PAGES * PER_PAGE]
    ]
    count = max(1, -(-len(rows) // PER_PAGE))
    return [
        {"at": at, "pages": count, "peers": rows[page * PER_PAGE : (page + 1) * PER_PAGE]}
        for page in range(count)
    ]


def page_count(value: object) -> int:
    """Of a list, by its first page; ``RemoteError`` if it is none."""
    return int(_page(value)["pages"])


def read(values: Sequence[object]) -> tuple[float, dict[PeerId, Revoked]]:
    """Time and peers of a list from all its pages; ``RemoteError`` unless they belong together."""
    read_pages = [_page(value) for value in values]
    if len({(page["at"], page["pages"]) for page in read_pages}) != 1:
        raise RemoteError("pages of different lists of revoked peers")
    if read_pages[0]["pages"] != len(read_pages):
        raise RemoteError("a list of revoked peers with a page missing")
    found: dict[PeerId, Revoked] = {}
    for page in read_pages:
        for row in page["peers"]:
            found[PeerId(row[0])] = Revoked(float(row[1]), row[2])
    return float(read_pages[0]["at"]), found


def _page(value: object) -> Mapping[str, Any]:
    if not (
        isinstance(value, Mapping)
        and _is_time(value.get("at"))
        and type(value.get("pages")) is int
        and 1 <= value["pages"] <= PAGES
        and isinstance(value.get("peers"), list)
        and len(value["peers"]) <= PER_PAGE
        and all(_is_row(row) for row in value["peers"])
    ):
        raise RemoteError("a list of revoked peers that is none")
    return value


def _is_row(row: object) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 3
        and isinstance(row[0], str)
        and 0 < len(row[0]) <= PEER_CHARS
        and _is_time(row[1])
        and isinstance(row[2], str)
        and len(row[2]) <= WHY_LIMIT
    )


def _is_time(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and 0.0 <= value < 1e11
