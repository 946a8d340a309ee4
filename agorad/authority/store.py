"""What an authority remembers: which node belongs to which account, what it was granted, who waits.

Every change is one transaction on disk before the certificate that it stands for leaves; see ``database`` for
where and how, ``schema`` for the tables. Blocking: the role calls it from a worker thread. Every method may
raise ``Refused`` as ``unavailable`` while the database fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from agorad.authority.admission import refusal
from agorad.authority.books import Books, Execute, keep_tenure
from agorad.authority.database import Database
from agorad.authority.queue import Place

LAST_MOVE: Final = "last_move"
"""Setting: unix time at which a node changed its stage last."""
_COLUMNS: Final = 'peer_id, account, stage, session, addrs, issued, expires, "left"'


@attrs.frozen(kw_only=True)
class Grant:
    """The last certificate that a node was given."""

    peer_id: str
    account: str
    stage: int
    session: bytes = b""
    addrs: tuple[str, ...] = ()
    issued: float
    expires: float
    left: bool = False
    """It gave its place back; its certificate may still run."""


@attrs.frozen(kw_only=True)
class Ban:
    """An account or a peer that the operator removed."""

    kind: str
    name: str
    why: str
    until: float | None


@attrs.frozen
class Audited:
    """One change that an operator made, in the transaction of the change itself."""

    at: float
    by: str
    what: str
    detail: str


class Store:
    """Grants by node. A node stays bound to its account for good."""

    def __init__(self, where: Path | str) -> None:
        """``where``: a file for SQLite, or an SQLAlchemy URL."""
        self._db = Database(where)

    def grant_of(self, peer: str) -> Grant | None:
        """What this node was granted last."""
        with self._db.transaction() as execute:
            return _grant_of(execute, peer)

    def active(self, now: float) -> list[Grant]:
        """Nodes with a running certificate that have not left."""
        with self._db.transaction() as execute:
            return _active(execute, now)

    def peers_of(self, account: str, now: float) -> set[str]:
        """Nodes of the account whose certificate runs, left or not.

        One that left can go on with its certificate to the end: for its account it counts that long.
        """
        with self._db.transaction() as execute:
            return _peers_of(execute, account, now)

    def grant(
        self,
        grant: Grant,
        *,
        max_nodes: int,
        max_per_account: int,
        now: float,
        entering: bool = False,
        pace_s: float = 0.0,
    ) -> None:
        """Remember a grant; on return it is on disk. ``Refused`` if there is no room. One transaction.

        ``entering``: it comes out of the queue, at the earliest ``pace_s`` after the last that did, whichever
        authority let that one in.
        """
        with self._db.transaction(exclusive=True) as execute:
            before = _grant_of(execute, grant.peer_id)
            if before is not None and before.account != grant.account:
                raise refusal("identity_bound", f"this node's key belongs to account {before.account!r}")
            others = [other for other in _active(execute, now) if other.peer_id != grant.peer_id]
            if len(others) >= max_nodes:
                raise refusal("full", f"the run has {len(others)} nodes, all it takes", 60.0)
            if len(_peers_of(execute, grant.account, now) - {grant.peer_id}) >= max_per_account:
                raise refusal("account_full", f"account {grant.account!r} has {max_per_account} nodes")
            wait_s = _last_entered(execute, now) + pace_s - now
            if entering and wait_s > 0:
                raise refusal("busy", "another authority of the run let a node in just now", wait_s)
            execute(
                "INSERT INTO grants (peer_id, account, stage, session, addrs, first_granted, issued, "
                "expires, entered) VALUES (:peer_id, :account, :stage, :session, :addrs, :issued, :issued, "
                ":expires, :entered) ON CONFLICT (peer_id) DO UPDATE SET "
                "stage = excluded.stage, session = excluded.session, addrs = excluded.addrs, "
                'issued = excluded.issued, expires = excluded.expires, "left" = 0, '
                "entered = CASE WHEN excluded.entered > 0 THEN excluded.entered ELSE grants.entered END",
                {
                    "peer_id": grant.peer_id,
                    "account": grant.account,
                    "stage": grant.stage,
                    "session": grant.session,
                    "addrs": json.dumps(grant.addrs),
                    "issued": grant.issued,
                    "expires": grant.expires,
                    "entered": now if entering else 0.0,
                },
            )
            keep_tenure(
                execute,
                peer=grant.peer_id,
                stage=grant.stage,
                account=grant.account,
                issued=grant.issued,
                expires=grant.expires,
            )

    def last_entered(self, now: float) -> float:
        """When the queue of an authority let a node in last; ``-inf``: never."""
        with self._db.transaction() as execute:
            return _last_entered(execute, now)

    def released(self, peer: str, now: float) -> None:
        """The node left: its slot in the run is free."""
        with self._db.transaction() as execute:
            execute('UPDATE grants SET "left" = 1 WHERE peer_id = :peer', {"peer": peer})

    def ban(self, kind: str, name: str, why: str, until: float | None, by: str, now: float) -> None:
        """Keep an account or a peer out."""
        with self._db.transaction() as execute:
            execute(
                "INSERT INTO bans (kind, name, why, until) VALUES (:kind, :name, :why, :until) "
                "ON CONFLICT (kind, name) DO UPDATE SET why = excluded.why, until = excluded.until",
                {"kind": kind, "name": name, "why": why, "until": until},
            )
            _audit(execute, now, by, "ban", f"{kind} {name}: {why}")

    def unban(self, kind: str, name: str, by: str, now: float) -> bool:
        """Take a ban back; False if there was none."""
        with self._db.transaction() as execute:
            gone = execute(
                "DELETE FROM bans WHERE kind = :kind AND name = :name RETURNING name",
                {"kind": kind, "name": name},
            )
            if gone:
                _audit(execute, now, by, "unban", f"{kind} {name}")
        return bool(gone)

    def bans(self, now: float) -> list[Ban]:
        """Those that hold."""
        with self._db.transaction() as execute:
            rows = execute(
                "SELECT kind, name, why, until FROM bans WHERE until IS NULL OR until > :now "
                "ORDER BY kind, name",
                {"now": now},
            )
        return [_ban(row) for row in rows]

    def banned(self, account: str, peer: str, now: float) -> Ban | None:
        """The ban of either, if there is one."""
        with self._db.transaction() as execute:
            rows = execute(
                "SELECT kind, name, why, until FROM bans WHERE (until IS NULL OR until > :now) "
                "AND ((kind = 'account' AND name = :account) OR (kind = 'peer' AND name = :peer)) LIMIT 1",
                {"now": now, "account": account, "peer": peer},
            )
        return _ban(rows[0]) if rows else None

    def setting(self, name: str) -> str | None:
        """What the operator set at run time."""
        with self._db.transaction() as execute:
            rows = execute("SELECT value FROM settings WHERE name = :name", {"name": name})
        return str(rows[0][0]) if rows else None

    def set_setting(self, name: str, value: str, by: str, now: float) -> None:
        """Set at run time; counts at the next decision."""
        with self._db.transaction() as execute:
            execute(
                "INSERT INTO settings (name, value) VALUES (:name, :value) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                {"name": name, "value": value},
            )
            _audit(execute, now, by, name, value)

    def claim_move(self, now: float, pace_s: float) -> float:
        """Seconds until a node may change its stage; 0: this one may, and is the last that did."""
        with self._db.transaction(exclusive=True) as execute:
            rows = execute("SELECT value FROM settings WHERE name = :name", {"name": LAST_MOVE})
            last = min(now, float(rows[0][0])) if rows else -math.inf
            if now < last + pace_s:
                return last + pace_s - now
            execute(
                "INSERT INTO settings (name, value) VALUES (:name, :value) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                {"name": LAST_MOVE, "value": repr(now)},
            )
        return 0.0

    def note(self, what: str, detail: str, by: str, now: float) -> None:
        """A line of the audit for what changes nothing here."""
        with self._db.transaction() as execute:
            _audit(execute, now, by, what, detail)

    def audit_log(self, limit: int) -> list[Audited]:
        """What operators did, the newest first."""
        with self._db.transaction() as execute:
            rows = execute(
                "SELECT at, by, what, detail FROM audit ORDER BY id DESC LIMIT :limit", {"limit": limit}
            )
        return [Audited(*row) for row in rows]

    def place(self, peer: str, account: str, arrived: float, seen: float) -> None:
        """Remember a place in the queue."""
        with self._db.transaction() as execute:
            execute(
                "INSERT INTO places (peer_id, account, arrived, seen) VALUES (:peer, :account, :arrived, "
                ":seen) ON CONFLICT (peer_id) DO UPDATE SET account = excluded.account, "
                "arrived = excluded.arrived, seen = excluded.seen",
                {"peer": peer, "account": account, "arrived": arrived, "seen": seen},
            )

    def places(self) -> list[Place]:
        """All that are remembered."""
        with self._db.transaction() as execute:
            return [Place(*row) for row in execute("SELECT peer_id, account, arrived, seen FROM places", {})]

    def drop_place(self, peer: str) -> None:
        """Forget one."""
        with self._db.transaction() as execute:
            execute("DELETE FROM places WHERE peer_id = :peer", {"peer": peer})

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @property
    def books(self) -> Books:
        """Receipts, ledger and balances, in the same database."""
        return Books(self._db.transaction)


def _grant_of(execute: Execute, peer: str) -> Grant | None:
    rows = execute(f"SELECT {_COLUMNS} FROM grants WHERE peer_id = :peer", {"peer": peer})
    return _grant(rows[0]) if rows else None


def _active(execute: Execute, now: float) -> list[Grant]:
    query = f'SELECT {_COLUMNS} FROM grants WHERE expires > :now AND "left" = 0'
    return [_grant(row) for row in execute(query, {"now": now})]


def _last_entered(execute: Execute, now: float) -> float:
    ((last,),) = execute("SELECT MAX(entered) FROM grants", {})
    return min(float(last), now) if last else -math.inf  # another's clock may be ahead


def _peers_of(execute: Execute, account: str, now: float) -> set[str]:
    query = "SELECT peer_id FROM grants WHERE account = :account AND expires > :now"
    return {str(row[0]) for row in execute(query, {"account": account, "now": now})}


def _audit(execute: Execute, at: float, by: str, what: str, detail: str) -> None:
    values = {"at": at, "by": by, "what": what, "detail": detail}
    execute("INSERT INTO audit (at, by, what, detail) VALUES (:at, :by, :what, :detail)", values)


def _ban(row: Sequence[Any]) -> Ban:
    return Ban(kind=row[0], name=row[1], why=row[2], until=row[3])


def _grant(row: Sequence[Any]) -> Grant:
    peer_id, account, stage, session, addrs, issued, expires, left = row
    return Grant(
        peer_id=peer_id,
        account=account,
        stage=stage,
        session=bytes(session),
        addrs=tuple(json.loads(addrs)),
        issued=issued,
        expires=expires,
        left=bool(left),
    )
