"""The authority's tables, as the steps by which they grew. Pure data.

Each step is SQLite's SQL, statements ended by semicolons (so none inside one); ``database`` spells it for
PostgreSQL. Steps are only ever added: a database remembers how many it has been through.

    grants      a node's last certificate, when it last came out of the queue, and its account, for good
    places      the queue, so that it outlives a restart
    settings    what the operator set at run time
    bans        accounts and peers kept out
    audit       what operators changed, written in the transaction of the change
    tenures     who held certificates for which stage, and when
    receipts    work that was credited, once a ticket
    ledger      credits, only ever added
    balances    their running sums, a peer
"""

from __future__ import annotations

from typing import Final

STEPS: Final = (
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
    """
ALTER TABLE grants ADD COLUMN entered REAL NOT NULL DEFAULT 0;
CREATE INDEX grants_by_entry ON grants (entered);
""",
)
