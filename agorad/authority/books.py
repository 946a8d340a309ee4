"""The books on disk: receipts, the append-only ledger, balances, and who held which stage when.

What is credited is one transaction: a receipt whose ticket is new, a ledger row for each peer of the batch,
and that peer's balance; so a crash leaves all of it or nothing, and a batch that is submitted again changes
nothing. Ledger rows are only ever added. Balances are their running sums, for quick answers;
``agorad.authority.ledger`` holds both against the receipts. *Tenures* say which peer held certificates for
which stage and when; a certificate that follows one that still runs continues its tenure.

Written in the SQL that SQLite and PostgreSQL share. Blocking; ``Transact`` comes from the store, which
owns the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import attrs

from agorad.authority.ledger import (
    CLOCK_S,
    OLDEST_S,
    Audit,
    Balance,
    Holder,
    Rules,
    StoredReceipt,
    audit,
    presence_mflop,
)

PAGE: Final = 1000
"""Receipts read at a time."""

Execute = Callable[[str, Mapping[str, Any]], Sequence[Sequence[Any]]]
"""Run one statement with named parameters; returns the rows, if it has any."""


class Transact(Protocol):
    """One transaction, as ``database.Database.transaction`` gives it."""

    def __call__(self, *, snapshot: bool = False) -> AbstractContextManager[Execute]: ...


_BALANCE: Final = "peer_id, account, compute, presence, active_s, joined, seen"
_TENURE: Final = "peer_id, stage, account, since, until"


def keep_tenure(
    execute: Execute, *, peer: str, stage: int, account: str, issued: float, expires: float
) -> None:
    """Part of a grant's transaction: the peer holds the stage until ``expires``."""
    same = {"peer": peer, "stage": stage, "account": account, "issued": issued, "expires": expires}
    running = execute(
        "SELECT since FROM tenures WHERE peer_id = :peer AND stage = :stage AND until >= :issued "
        "ORDER BY since DESC LIMIT 1",
        same,
    )
    if running:
        execute(
            "UPDATE tenures SET until = :expires "
            "WHERE peer_id = :peer AND stage = :stage AND since = :since AND until < :expires",
            same | {"since": running[0][0]},
        )
    else:
        execute(
            "INSERT INTO tenures (peer_id, stage, account, since, until) "
            "VALUES (:peer, :stage, :account, :issued, :expires)",
            same,
        )
    execute(
        "INSERT INTO balances (peer_id, account, compute, presence, active_s, joined, present, seen) "
        "VALUES (:peer, :account, 0, 0, 0, :issued, 0, 0) ON CONFLICT (peer_id) DO NOTHING",
        same,
    )


@attrs.frozen
class Books:
    """Reads and adds; see the module's docstring."""

    transact: Transact

    def held(self, peer: str, stage: int, at: float, grace_s: float) -> str | None:
        """The peer's account if members honoured a certificate of it for this stage at that time."""
        return self.holder({peer}, grace_s)(peer, stage, at)

    def holder(self, peers: Iterable[str], grace_s: float) -> Holder:
        """The same for several peers, as they are now; one transaction however often it is asked."""
        with self.transact() as execute:
            rows = [
                row
                for peer in peers
                for row in execute(f"SELECT {_TENURE} FROM tenures WHERE peer_id = :peer", {"peer": peer})
            ]
        return _holder(rows, grace_s)

    def add_receipts(self, receipts: Sequence[StoredReceipt], now: float) -> set[str]:
        """Credit those whose ticket was never credited; returns these tickets."""
        new: set[str] = set()
        earned: dict[str, _Earned] = {}
        with self.transact() as execute:
            for receipt in sorted(receipts, key=lambda receipt: receipt.ticket):
                if not execute(
                    "INSERT INTO receipts (ticket, packed) VALUES (:ticket, :packed) "
                    "ON CONFLICT (ticket) DO NOTHING RETURNING id",
                    {"ticket": receipt.ticket, "packed": receipt.packed},
                ):
                    continue
                new.add(receipt.ticket)
                for credit in receipt.credits:
                    row = earned.setdefault(credit.peer_id, _Earned(credit.account, receipt.ticket))
                    row.mflop += credit.mflop
                    row.receipts += 1
                    row.at = max(row.at, receipt.at)
            for peer, row in sorted(earned.items()):  # in order: two authorities must not wait for each other
                self._enter(execute, now, peer, row, "compute")
                execute(
                    "UPDATE balances SET compute = compute + :mflop, "
                    "seen = CASE WHEN seen < :at THEN :at ELSE seen END WHERE peer_id = :peer",
                    {"peer": peer, "mflop": row.mflop, "at": min(row.at, now)},
                )
        return new

    def add_presence(self, seen: Iterable[tuple[str, float]], *, gap_s: float) -> int:
        """Credit peers with the time since they were seen last, if that is at most ``gap_s``; MFLOP."""
        credited = 0
        with self.transact() as execute:
            for peer, at in sorted(seen):
                found = execute("SELECT account, present FROM balances WHERE peer_id = :peer", {"peer": peer})
                if not found or at <= found[0][1]:
                    continue  # a stranger, or another authority saw it later than we did
                account, before = found[0]
                seconds = at - before if at - before <= gap_s else 0.0
                row = _Earned(account, "", presence_mflop(seconds))
                # Conditional on what was read: of two authorities that see it at once one credits the time.
                changed = execute(
                    "UPDATE balances SET presence = presence + :mflop, active_s = active_s + :seconds, "
                    "present = :at, seen = CASE WHEN seen < :at THEN :at ELSE seen END "
                    "WHERE peer_id = :peer AND present = :before RETURNING peer_id",
                    {"peer": peer, "mflop": row.mflop, "seconds": seconds, "at": at, "before": before},
                )
                if changed and row.mflop:
                    self._enter(execute, at, peer, row, "presence")
                    credited += row.mflop
        return credited

    def balances(self) -> list[Balance]:
        """Of every peer that was ever granted anything."""
        with self.transact() as execute:
            return [_balance(row) for row in execute(f"SELECT {_BALANCE} FROM balances ORDER BY peer_id", {})]

    def balance(self, peer: str) -> Balance | None:
        """Of one peer."""
        with self.transact() as execute:
            rows = execute(f"SELECT {_BALANCE} FROM balances WHERE peer_id = :peer", {"peer": peer})
        return _balance(rows[0]) if rows else None

    def recompute(self, rules: Rules) -> Audit:
        """What the stored receipts are worth by the rules, against what was credited; see ``ledger.audit``.

        It may run beside authorities that credit: all is of one moment, and nobody waits for it.
        """
        with self.transact(snapshot=True) as execute:
            rows = execute("SELECT account, kind, SUM(mflop) FROM ledger GROUP BY account, kind", {})
            balances = [_balance(row) for row in execute(f"SELECT {_BALANCE} FROM balances", {})]
            tenures = execute(f"SELECT {_TENURE} FROM tenures", {})
            ledger = {(str(account), str(kind)): int(total) for account, kind, total in rows}
            holder = _holder(tenures, OLDEST_S)  # whatever the grace was at that time
            return audit(rules, self._receipts(execute), holder, ledger, balances)

    def _receipts(self, execute: Execute) -> Iterator[bytes]:
        """Stored receipts, oldest first."""
        after = 0
        while True:
            rows = execute(
                "SELECT id, packed FROM receipts WHERE id > :after ORDER BY id LIMIT :page",
                {"after": after, "page": PAGE},
            )
            if not rows:
                return
            for _id, packed in rows:
                yield bytes(packed)
            after = rows[-1][0]

    def _enter(self, execute: Execute, at: float, peer: str, row: _Earned, kind: str) -> None:
        execute(
            "INSERT INTO ledger (at, account, peer_id, kind, mflop, receipts, first_ticket) "
            "VALUES (:at, :account, :peer, :kind, :mflop, :receipts, :ticket)",
            {
                "at": at,
                "account": row.account,
                "peer": peer,
                "kind": kind,
                "mflop": row.mflop,
                "receipts": row.receipts,
                "ticket": row.first_ticket,
            },
        )


@attrs.define
class _Earned:
    """A ledger row in the making."""

    account: str
    first_ticket: str
    mflop: int = 0
    receipts: int = 0
    at: float = 0.0


def _holder(rows: Iterable[Sequence[Any]], grace_s: float) -> Holder:
    tenures: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    for peer_id, stage, account, since, until in rows:
        tenures.setdefault((peer_id, stage), []).append((since - CLOCK_S, until + grace_s + CLOCK_S, account))

    def holder(peer: str, stage: int, at: float) -> str | None:
        spans = tenures.get((peer, stage), ())
        return next((account for begin, end, account in spans if begin <= at <= end), None)

    return holder


def _balance(row: Sequence[Any]) -> Balance:
    peer_id, account, compute, presence, active_s, joined, seen = row
    return Balance(
        peer_id=str(peer_id),
        account=str(account),
        compute=int(compute),
        presence=int(presence),
        active_s=float(active_s),
        joined=float(joined),
        seen=float(seen),
    )
