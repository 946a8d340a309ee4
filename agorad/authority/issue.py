"""The decision at a join: is this node let in, at which stage, with which certificate.

``decide`` is called with everything it looks at (manifest, accounts, store, time), refuses with a
typed reason or records a grant and signs. The rules, in this order: a node stays with the account it
was first granted to and needs the secret only that once; an account has at most
``admission.max_nodes_per_account`` nodes and the run ``admission.max_nodes``; the stage is the one
asked for, else the one it had, else the one with the fewest running certificates (the lowest of
several). Certificates run for ``lifetime_s``, with grace behind that. Blocking (SQLite).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from agorad.authority.accounts import AccountFile
from agorad.authority.store import Grant, Store
from agorad.run import Manifest
from p2p.errors import Refused, RemoteError
from p2p.identity import Identity, PeerId
from p2p.membership import NAME_LIMIT, Certificate, issue

PROTOCOL: Final = "/agora/authority/1"
SECRET_LIMIT: Final = 256


@attrs.frozen(kw_only=True)
class JoinRequest:
    """A peer asks to be let in as a worker."""

    account: str
    secret: str | None = attrs.field(repr=False)
    stage: int | None

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> JoinRequest:
        """Read and bound what came from a peer; ``RemoteError`` if it is no request."""
        account, secret, stage = (header.get(name) for name in ("account", "secret", "stage"))
        well_formed = (
            header.get("t") == "join"
            and isinstance(account, str)
            and 0 < len(account) <= NAME_LIMIT
            and (secret is None or (isinstance(secret, str) and len(secret) <= SECRET_LIMIT))
            and (stage is None or (type(stage) is int and 0 <= stage < 1 << 16))
        )
        if not well_formed:
            raise RemoteError("a join request with a field out of its bounds")
        return cls(account=str(account), secret=secret, stage=stage)

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": "join", "account": self.account, "secret": self.secret, "stage": self.stage}


@attrs.frozen(kw_only=True)
class Issuer:
    """An authority's means of saying yes."""

    identity: Identity
    manifest: Manifest
    store: Store
    lifetime_s: float
    grace_s: float

    def decide(self, request: JoinRequest, peer: PeerId, accounts: AccountFile, now: float) -> Certificate:
        """Grant (recorded before it is returned) or raise ``Refused``."""
        before = self.store.grant_of(peer)
        if before is not None and before.account != request.account:
            raise Refused("identity_bound", f"this node's key belongs to account {before.account!r}")
        if before is None:
            self._admit(request, accounts)
        else:
            accounts.known(request.account)
        replicas = self.store.replicas(now, besides=peer)
        if sum(replicas.values()) >= self.manifest.admission.max_nodes:
            raise Refused("full", "the run has all the nodes it takes at present", retry_after=60.0)
        stages = self.manifest.model.stages
        stage = choose_stage(request.stage, before.stage if before else None, replicas, stages)
        expires = now + self.lifetime_s
        certificate = issue(
            self.identity,
            run=self.manifest.run.id,
            account=request.account,
            peer_id=peer,
            role="worker",
            stage=stage,
            issued=now,
            expires=expires,
            grace_until=expires + self.grace_s,
        )
        self.store.record(
            Grant(peer_id=peer, account=request.account, stage=stage, issued=now, expires=expires)
        )
        return certificate

    def _admit(self, request: JoinRequest, accounts: AccountFile) -> None:
        if request.secret is None:
            accounts.known(request.account)
            raise Refused("secret_needed", f"the first join for account {request.account!r} needs its secret")
        accounts.authenticate(request.account, request.secret)
        limit = self.manifest.admission.max_nodes_per_account
        if self.store.nodes_of(request.account) >= limit:
            raise Refused("account_full", f"account {request.account!r} has {limit} nodes, as many as it may")


def choose_stage(wanted: int | None, before: int | None, replicas: Mapping[int, int], stages: int) -> int:
    """The stage a node gets; ``Refused`` if it asks for one that the run does not have."""
    if wanted is not None:
        if wanted >= stages:
            raise Refused("wrong_stage", f"the run has stages 0 to {stages - 1}; there is no stage {wanted}")
        return wanted
    if before is not None and before < stages:
        return before
    return min(range(stages), key=lambda stage: (replicas.get(stage, 0), stage))
