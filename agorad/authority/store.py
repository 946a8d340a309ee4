"""What an authority remembers: which node belongs to which account, what it was granted, who waits.

SQLite in one file, one connection, every change one transaction on disk (``synchronous=FULL``) before
the certificate that it stands for leaves. Blocking: the role calls it from one worker thread at a time.
A file with a newer schema than ours is refused instead of guessed at.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from agorad.authority.admission import refusal
from agorad.authority.books import Books, Execute, keep_tenure
from agorad.authority.queue import Place
from p2p.errors import LocalError

_SCHEMA_VERSION: Final = 4
_STEPS: Final = (
    """
CREATE TABLE grants (
    peer_id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    stage INTEGER NOT NULL,
    first_granted REAL NOT NULL,
    issued REAL NOT NULL,
    expires REAL NOT NULL
) STRICT;
CREATE INDEX grants_by_account ON grants (account);
""",
    """
ALTER TABLE grants ADD COLUMN session BLOB NOT NULL DEFAULT x'';
ALTER TABLE grants ADD COLUMN addrs TEXT NOT NULL DEFAULT '[]';
ALTER TABLE grants ADD COLUMN "left" INTEGER NOT NULL DEFAULT 0;
CREATE TABLE places (
    peer_id TEXT PRIMARY KEY, account TEXT NOT NULL, arrived REAL NOT NULL, seen REAL NOT NULL
) STRICT;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE bans (
    kind TEXT NOT NULL, name TEXT NOT NULL, why TEXT NOT NULL, until REAL, PRIMARY KEY (kind, name)
) STRICT;
""",
    """
CREATE TABLE audit (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, by TEXT NOT NULL, what TEXT NOT NULL, detail TEXT NOT NULL
) STRICT;
""",
    """
CREATE TABLE tenures (
    peer_id TEXT NOT NULL, stage INTEGER NOT NULL, account TEXT NOT NULL,
    since REAL NOT NULL, until REAL NOT NULL, PRIMARY KEY (peer_id, stage, since)
) STRICT;
CREATE TABLE receipts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ticket TEXT NOT NULL UNIQUE, packed BLOB NOT NULL
) STRICT;
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, account TEXT NOT NULL, peer_id TEXT NOT NULL,
    kind TEXT NOT NULL, mflop INTEGER NOT NULL, receipts INTEGER NOT NULL, first_ticket TEXT NOT NULL
) STRICT;
CREATE TABLE balances (
    peer_id TEXT PRIMARY KEY, account TEXT NOT NULL, compute INTEGER NOT NULL, presence INTEGER NOT NULL,
    active_s REAL NOT NULL, joined REAL NOT NULL, present REAL NOT NULL, seen REAL NOT NULL
) STRICT;
INSERT INTO tenures SELECT peer_id, stage, account, first_granted, expires FROM grants;
INSERT INTO balances SELECT peer_id, account, 0, 0, 0, first_granted, 0, 0 FROM grants;
""",
)
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

    def __init__(self, path: Path) -> None:
        try:
            # The role serialises its calls; they only come from different threads of a pool.
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;")
            with self._transaction():  # of two that open it, one migrates
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                for number, step in enumerate(_STEPS[version:], version + 1):
                    for statement in step.split(";")[:-1]:
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={number}")
        except sqlite3.Error as error:
            raise LocalError(f"cannot use the authority's database {path}: {error}") from error
        if version > _SCHEMA_VERSION:
            raise LocalError(f"{path} was written by a newer agorad (schema {version}); update agorad")

    def grant_of(self, peer: str) -> Grant | None:
        """What this node was granted last."""
        query = f"SELECT {_COLUMNS} FROM grants WHERE peer_id = ?"
        row = self._db.execute(query, (peer,)).fetchone()
        return None if row is None else _grant(row)

    def active(self, now: float) -> list[Grant]:
        """Nodes with a running certificate that have not left."""
        query = f'SELECT {_COLUMNS} FROM grants WHERE expires > ? AND NOT "left"'
        return [_grant(row) for row in self._db.execute(query, (now,))]

    def peers_of(self, account: str, now: float) -> set[str]:
        """Nodes of the account whose certificate runs, left or not.

        One that left can go on with its certificate to the end: for its account it counts that long.
        """
        query = "SELECT peer_id FROM grants WHERE account = ? AND expires > ?"
        return {peer for (peer,) in self._db.execute(query, (account, now))}

    def grant(self, grant: Grant, *, max_nodes: int, max_per_account: int, now: float) -> None:
        """Remember a grant; on return it is on disk. ``Refused`` if there is no room. One transaction."""
        with self._transaction():
            before = self.grant_of(grant.peer_id)
            if before is not None and before.account != grant.account:
                raise refusal("identity_bound", f"this node's key belongs to account {before.account!r}")
            others = [other for other in self.active(now) if other.peer_id != grant.peer_id]
            if len(others) >= max_nodes:
                raise refusal("full", f"the run has {len(others)} nodes, all it takes", 60.0)
            if len(self.peers_of(grant.account, now) - {grant.peer_id}) >= max_per_account:
                raise refusal("account_full", f"account {grant.account!r} has {max_per_account} nodes")
            self._db.execute(
                "INSERT INTO grants (peer_id, account, stage, session, addrs, first_granted, issued, "
                "expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (peer_id) DO UPDATE SET "
                "stage = excluded.stage, session = excluded.session, addrs = excluded.addrs, "
                'issued = excluded.issued, expires = excluded.expires, "left" = 0',
                (
                    grant.peer_id,
                    grant.account,
                    grant.stage,
                    grant.session,
                    json.dumps(grant.addrs),
                    grant.issued,
                    grant.issued,
                    grant.expires,
                ),
            )
            keep_tenure(
                self._execute,
                peer=grant.peer_id,
                stage=grant.stage,
                account=grant.account,
                issued=grant.issued,
                expires=grant.expires,
            )

    def released(self, peer: str, now: float) -> None:
        """The node left: its slot in the run is free."""
        self._db.execute('UPDATE grants SET "left" = 1 WHERE peer_id = ?', (peer,))

    def ban(self, kind: str, name: str, why: str, until: float | None, by: str, now: float) -> None:
        """Keep an account or a peer out."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO bans VALUES (?, ?, ?, ?)", (kind, name, why, until))
            self._audit(now, by, "ban", f"{kind} {name}: {why}")

    def unban(self, kind: str, name: str, by: str, now: float) -> bool:
        """Take a ban back; False if there was none."""
        with self._transaction():
            gone = self._db.execute("DELETE FROM bans WHERE kind = ? AND name = ?", (kind, name)).rowcount
            if gone:
                self._audit(now, by, "unban", f"{kind} {name}")
        return bool(gone)

    def bans(self, now: float) -> list[Ban]:
        """Those that hold."""
        query = "SELECT kind, name, why, until FROM bans WHERE until IS NULL OR until > ? ORDER BY kind, name"
        return [
            Ban(kind=row[0], name=row[1], why=row[2], until=row[3]) for row in self._db.execute(query, (now,))
        ]

    def banned(self, account: str, peer: str, now: float) -> Ban | None:
        """The ban of either, if there is one."""
        row = self._db.execute(
            "SELECT kind, name, why, until FROM bans WHERE (until IS NULL OR until > ?) "
            "AND ((kind = 'account' AND name = ?) OR (kind = 'peer' AND name = ?))",
            (now, account, peer),
        ).fetchone()
        return None if row is None else Ban(kind=row[0], name=row[1], why=row[2], until=row[3])

    def setting(self, name: str) -> str | None:
        """What the operator set at run time."""
        row = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_setting(self, name: str, value: str, by: str, now: float) -> None:
        """Set at run time; counts at the next decision."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))
            self._audit(now, by, name, value)

    def audit_log(self, limit: int) -> list[Audited]:
        """What operators did, the newest first."""
        query = "SELECT at, by, what, detail FROM audit ORDER BY id DESC LIMIT ?"
        return [Audited(*row) for row in self._db.execute(query, (limit,))]

    def _audit(self, at: float, by: str, what: str, detail: str) -> None:
        values = (at, by, what, detail)
        self._db.execute("INSERT INTO audit (at, by, what, detail) VALUES (?, ?, ?, ?)", values)

    def place(self, peer: str, account: str, arrived: float, seen: float) -> None:
        """Remember a place in the queue."""
        self._db.execute("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?)", (peer, account, arrived, seen))

    def places(self) -> list[Place]:
        """All that are remembered."""
        return [Place(*row) for row in self._db.execute("SELECT peer_id, account, arrived, seen FROM places")]

    def drop_place(self, peer: str) -> None:
        """Forget one."""
        self._db.execute("DELETE FROM places WHERE peer_id = ?", (peer,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def books(self) -> Books:
        """Receipts, ledger and balances, in the same database."""
        return Books(self._books_transaction)

    @contextmanager
    def _books_transaction(self) -> Iterator[Execute]:
        with self._transaction():
            yield self._execute

    def _execute(self, statement: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _grant(row: tuple[Any, ...]) -> Grant:
    peer_id, account, stage, session, addrs, issued, expires, left = row
    return Grant(
        peer_id=peer_id,
        account=account,
        stage=stage,
        session=session,
        addrs=tuple(json.loads(addrs)),
        issued=issued,
        expires=expires,
        left=bool(left),
    )
