"""What an authority remembers: which node belongs to which account, and what it was granted.

SQLite in one file, one connection, every change one transaction on disk (``synchronous=FULL``) before
the certificate that it stands for leaves. Blocking: the role calls it from one worker thread at a time.
A file with a newer schema than ours is refused instead of guessed at.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

import attrs

from p2p.errors import LocalError

_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE grants (
    peer_id TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    stage INTEGER NOT NULL,
    first_granted REAL NOT NULL,
    issued REAL NOT NULL,
    expires REAL NOT NULL
) STRICT;
CREATE INDEX grants_by_account ON grants (account);
"""


@attrs.frozen(kw_only=True)
class Grant:
    """The last certificate that a node was given."""

    peer_id: str
    account: str
    stage: int
    issued: float
    expires: float


class Store:
    """Grants by node. A node stays bound to its account for good."""

    def __init__(self, path: Path) -> None:
        try:
            # The role serialises its calls; they only come from different threads of a pool.
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise LocalError(f"cannot use the authority's database {path}: {error}") from error
        if version > _SCHEMA_VERSION:
            raise LocalError(f"{path} was written by a newer agorad (schema {version}); update agorad")

    def grant_of(self, peer_id: str) -> Grant | None:
        """What this node was granted last."""
        row = self._db.execute(
            "SELECT peer_id, account, stage, issued, expires FROM grants WHERE peer_id = ?", (peer_id,)
        ).fetchone()
        return None if row is None else _grant(row)

    def nodes_of(self, account: str) -> int:
        """Nodes bound to the account."""
        (count,) = self._db.execute("SELECT count(*) FROM grants WHERE account = ?", (account,)).fetchone()
        return int(count)

    def replicas(self, now: float, *, besides: str) -> dict[int, int]:
        """Nodes with a running certificate by stage, ``besides`` left out."""
        rows = self._db.execute(
            "SELECT stage, count(*) FROM grants WHERE expires > ? AND peer_id != ? GROUP BY stage",
            (now, besides),
        )
        return {int(stage): int(count) for stage, count in rows}

    def record(self, grant: Grant) -> None:
        """Remember a grant; on return it is on disk."""
        self._db.execute(
            "INSERT INTO grants (peer_id, account, stage, first_granted, issued, expires) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (peer_id) DO UPDATE SET "
            "stage = excluded.stage, issued = excluded.issued, expires = excluded.expires",
            (grant.peer_id, grant.account, grant.stage, grant.issued, grant.issued, grant.expires),
        )

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _grant(row: tuple[str, str, int, float, float]) -> Grant:
    peer_id, account, stage, issued, expires = row
    return Grant(peer_id=peer_id, account=account, stage=stage, issued=issued, expires=expires)
