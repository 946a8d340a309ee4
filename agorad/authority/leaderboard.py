"""The leaderboard: accounts by what they have earned, and the words of ``/agora/points/1``.

A row is ``[rank, user, active_h, joined, compute, presence, score, status]``: hours seen by others, unix
time of the first grant, PFLOP of compute and of presence, their sum, and ``active``, ``away`` or
``banned``. Equal scores have equal ranks. ``rank`` is pure; messages are bounded by ``ROWS`` and read into
frozen values or ``RemoteError``.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import Any, Final

import attrs

from agorad.authority.ledger import Balance, pflop
from p2p.errors import RemoteError
from p2p.membership import NAME_LIMIT

PROTOCOL: Final = "/agora/points/1"
ROWS: Final = 256
"""Most rows of an answer; a header has room for them."""
BATCH: Final = 256
"""Receipts of one submission."""
BATCH_BYTES: Final = 1 << 20
WHY_LIMIT: Final = 160
"""Characters of a reason, in an answer to a submission."""
ACTIVE_S: Final = 300.0
"""Who was seen or credited within this time is active."""
STATUSES: Final = ("active", "away", "banned")


@attrs.frozen(kw_only=True)
class Row:
    """One account."""

    rank: int
    user: str
    active_h: float
    joined: float
    compute: float
    """PFLOP, as the two below."""
    presence: float
    score: float
    status: str

    @classmethod
    def from_wire(cls, row: Any) -> Row:
        """Reads what ``to_wire`` made. Raises RemoteError."""
        match row:
            case [int(rank), str(user), *numbers, str(status)] if len(numbers) == 5:
                sane = all(type(value) is float and 0 <= value < math.inf for value in numbers)
                if sane and rank > 0 and len(user) <= NAME_LIMIT and status in STATUSES:
                    active_h, joined, compute, presence, score = numbers
                    return cls(
                        rank=rank,
                        user=user,
                        active_h=active_h,
                        joined=joined,
                        compute=compute,
                        presence=presence,
                        score=score,
                        status=status,
                    )
        raise RemoteError("points: a row of the leaderboard is not one")

    def to_wire(self) -> list[Any]:
        """In the order of the fields."""
        return list(attrs.astuple(self))


@attrs.frozen(kw_only=True)
class Leaderboard:
    """The first rows, and the asker's own."""

    rows: tuple[Row, ...]
    accounts: int
    """How many there are in all."""
    own: Row | None
    """Of the asker's account."""
    node: tuple[float, float] | None
    """Compute and presence of the asking node alone, PFLOP."""
    at: float
    """Unix time of the authority."""

    def to_header(self) -> dict[str, Any]:
        return {
            "t": "leaderboard",
            "rows": [row.to_wire() for row in self.rows],
            "accounts": self.accounts,
            "own": None if self.own is None else self.own.to_wire(),
            "node": None if self.node is None else list(self.node),
            "at": self.at,
        }

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Leaderboard:
        """Reads an authority's answer. Raises RemoteError."""
        match header:
            case {
                "t": "leaderboard",
                "rows": list(rows),
                "accounts": int(accounts),
                "own": own,
                "node": node,
                "at": float(at),
            } if len(rows) <= ROWS and accounts >= 0:
                return cls(
                    rows=tuple(map(Row.from_wire, rows)),
                    accounts=accounts,
                    own=None if own is None else Row.from_wire(own),
                    node=_pair(node),
                    at=at,
                )
        raise RemoteError("points: not a leaderboard")

    def document(self) -> dict[str, Any]:
        """As ``agoractl points --json`` shows it."""
        return {
            "at": self.at,
            "accounts": self.accounts,
            "rows": [attrs.asdict(row) for row in self.rows],
            "own": None if self.own is None else attrs.asdict(self.own),
            "node": None if self.node is None else {"compute": self.node[0], "presence": self.node[1]},
        }


@attrs.frozen(kw_only=True)
class Credited:
    """What an authority made of a submission."""

    new: int
    known: int
    refused: tuple[tuple[str, str], ...]
    """Ticket (as far as it could be read) and reason, of each receipt that was not believed."""

    def to_header(self) -> dict[str, Any]:
        refused = [list(pair) for pair in self.refused]
        return {"t": "credited", "new": self.new, "known": self.known, "refused": refused}

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Credited:
        """Reads an authority's answer. Raises RemoteError."""
        match header:
            case {"t": "credited", "new": int(new), "known": int(known), "refused": list(refused)} if (
                0 <= new <= BATCH and 0 <= known <= BATCH and len(refused) <= BATCH
            ):
                pairs = [(ticket, why) for ticket, why in map(_texts, refused)]
                return cls(new=new, known=known, refused=tuple(pairs))
        raise RemoteError("points: not an answer to a submission")


def rank(balances: Iterable[Balance], banned: Container[str], now: float) -> list[Row]:
    """Accounts by score, highest first; equal ones by name. ``banned``: names of accounts."""
    sums: dict[str, list[float]] = {}
    for balance in balances:
        row = sums.setdefault(balance.account, [0, 0, 0.0, math.inf, 0.0])
        row[0] += balance.compute
        row[1] += balance.presence
        row[2] += balance.active_s
        row[3] = min(row[3], balance.joined)
        row[4] = max(row[4], balance.seen)
    rows: list[Row] = []
    ordered = sorted(sums.items(), key=lambda item: (-(item[1][0] + item[1][1]), item[0]))
    last = -1.0
    for place, (user, (compute, presence, active_s, joined, seen)) in enumerate(ordered, 1):
        total = compute + presence
        status = "banned" if user in banned else "active" if now - seen <= ACTIVE_S else "away"
        rows.append(
            Row(
                rank=rows[-1].rank if rows and total == last else place,
                user=user,
                active_h=round(active_s / 3600, 3),
                joined=float(joined),
                compute=pflop(int(compute)),
                presence=pflop(int(presence)),
                score=pflop(int(total)),
                status=status,
            )
        )
        last = total
    return rows


def _pair(value: Any) -> tuple[float, float] | None:
    match value:
        case None:
            return None
        case [float(compute), float(presence)] if 0 <= compute < math.inf and 0 <= presence < math.inf:
            return compute, presence
    raise RemoteError("points: a node's points are not two numbers")


def _texts(value: Any) -> tuple[str, str]:
    match value:
        case [str(ticket), str(why)] if len(ticket) <= 100 and len(why) <= WHY_LIMIT:
            return ticket, why
    raise RemoteError("points: a refusal is not a ticket and a reason")
