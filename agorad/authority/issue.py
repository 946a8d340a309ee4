"""The authority's word: what it knows of a node, which stage it gets, and the certificate that says so.

``Issuer`` joins manifest, store and key. Everything here blocks (the database) and runs in a worker thread;
what is decided without the database is in ``admission`` and ``assign``. A grant is on disk before ``grant``
returns the certificate that it stands for; room in the run and in the account is checked in the same
transaction, so that several authorities on one database do not give a place twice.

Settings that the operator changes while it runs lie in the store, by name: ``joins_paused`` ("" or "0": no)
and ``max_nodes`` (a number; "" for the manifest's). They are read at every decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

import attrs

from agorad.authority.admission import check_account_room, check_software, refusal
from agorad.authority.assign import Choice, StageNeeds, choose_stage
from agorad.authority.messages import Join, Renew
from agorad.authority.store import Grant, Store
from agorad.run import Manifest
from p2p.identity import Identity, PeerId
from p2p.membership import Certificate, issue
from p2p.passes import LIFE_S, Pass

JOINS_PAUSED = "joins_paused"
MAX_NODES = "max_nodes"


@attrs.frozen(kw_only=True)
class Capacity:
    """Whether the run takes nodes at this moment."""

    free: int
    paused: bool
    last_entered: float = -math.inf
    """When an authority of the run let the last node in."""


@attrs.frozen(kw_only=True)
class Issuer:
    """An authority's means of saying yes."""

    identity: Identity
    manifest: Manifest
    store: Store
    needs: tuple[StageNeeds, ...]
    """Of the manifest's stages, by ``assign.stage_needs``."""
    lifetime_s: float
    grace_s: float

    def known(self, peer: PeerId, account: str, now: float) -> Grant | None:
        """What this node was granted before. ``Refused`` if it, or ``account`` ("": any), may not be here."""
        before = self.store.grant_of(peer)
        if before is not None and account not in ("", before.account):
            raise refusal(
                "identity_bound",
                f"this node's key belongs to account {before.account!r}, not to {account!r}",
            )
        owner = before.account if before is not None else account
        ban = self.store.banned(owner, peer, now)
        if ban is not None:
            what = "node" if ban.kind == "peer" else f"account {owner!r}"
            end = "" if ban.until is None else f" for another {(ban.until - now) / 3600:.1f} h"
            raise refusal("banned", f"this {what} was removed by the run's operator{end}: {ban.why}")
        return before

    def check_account(self, account: str, peer: PeerId, waiting: Set[str], now: float) -> None:
        """``Refused`` if the account has all its nodes; ``waiting``: those of it in the queue."""
        others = (self.store.peers_of(account, now) | waiting) - {peer}
        check_account_room(self.manifest.admission, account, len(others))

    def capacity(self, now: float, *, settling: bool = False) -> Capacity:
        """Free slots of the run, and whether joins are held.

        ``settling``: the authority was away. Members whose certificates ran out meanwhile are in their grace
        and about to renew, so their slots are not free.
        """
        paused = self.store.setting(JOINS_PAUSED) not in (None, "", "0")
        taken = self.store.active(now - self.grace_s if settling else now)
        return Capacity(
            free=self.max_nodes() - len(taken), paused=paused, last_entered=self.store.last_entered(now)
        )

    def max_nodes(self) -> int:
        """The manifest's limit, or what the operator set instead."""
        text = self.store.setting(MAX_NODES) or ""
        return int(text) if text.isdecimal() else self.manifest.admission.max_nodes

    def choose(
        self,
        join: Join,
        peer: PeerId,
        now: float,
        *,
        promised: int | None = None,
        waiting: Mapping[int, int] | None = None,
        mbps: float | None = None,
        usual_mbps: float | None = None,
    ) -> Choice:
        """The stage for a joiner; ``waiting``: how many are to go where before it."""
        replicas = dict(waiting or {})
        for grant in self.store.active(now):
            if grant.peer_id != peer:
                replicas[grant.stage] = replicas.get(grant.stage, 0) + 1
        before = self.store.grant_of(peer)
        return choose_stage(
            self.needs,
            replicas,
            join.facts,
            wanted=join.stage,
            before=None if before is None else before.stage,
            held=_at_work(before, join, now),
            promised=promised,
            mbps=mbps,
            usual_mbps=usual_mbps,
        )

    def check_move(self, join: Join, peer: PeerId, stage: int, now: float) -> None:
        """``Refused`` if a node at work may not change to ``stage`` now; else the pace counts it as moved.

        A node that was started anew asks with another session: where it begins is its user's to say.
        """
        before = self.store.grant_of(peer)
        if before is None or before.stage == stage or not _at_work(before, join, now):
            return
        pace_s = self.manifest.admission.move_pace_s
        if math.isinf(pace_s):
            raise refusal("no_move", "this run lets no node change its stage (admission.moves_per_hour)")
        active = self.store.active(now)
        if not any(grant.stage == before.stage and grant.peer_id != peer for grant in active):
            raise refusal("no_move", f"stage {before.stage} would be left without a node", pace_s)
        wait_s = self.store.claim_move(now, pace_s)
        if wait_s > 0:
            raise refusal(
                "no_move", f"another node changed its stage; the next may in {wait_s:.0f} s", wait_s
            )

    def grant(
        self, join: Join, peer: PeerId, account: str, stage: int, now: float, *, entering: bool = False
    ) -> Certificate:
        """Record a grant and sign it. ``Refused`` if there is no room (any more).

        ``entering``: out of the queue, so it is ``Refused`` as ``busy`` where that is faster than the pace.
        """
        return self._record(peer, account, stage, join.session, join.addrs, now, entering)

    def guest_pass(self, peer: PeerId, stage: int, now: float) -> bytes:
        """Lets a node that waits download the state of the stage where it will probably go."""
        shown = Pass(
            run=self.manifest.run.id,
            peer_id=peer,
            stage=stage,
            expires=now + LIFE_S,
            authority=self.identity.peer_id,
        )
        return shown.signed(self.identity).encode()

    def renew(self, renew: Renew, peer: PeerId, now: float) -> Certificate:
        """The same for a node that is in. Its place is its own as long as its certificate runs."""
        before = self.known(peer, "", now)
        if before is None or before.left or now > before.expires + self.grace_s:
            raise refusal("unknown_peer", "this authority keeps no place for this node")
        check_software(self.manifest.admission, None, renew.software, now)
        stage = min(before.stage, self.manifest.model.stages - 1)
        return self._record(peer, before.account, stage, renew.session, renew.addrs, now)

    def leave(self, peer: PeerId, session: bytes, now: float) -> None:
        """Free the node's place, unless another process has it by now."""
        before = self.store.grant_of(peer)
        if before is not None and before.session in (session, b""):
            self.store.released(peer, now)

    def _record(
        self,
        peer: PeerId,
        account: str,
        stage: int,
        session: bytes,
        addrs: tuple[str, ...],
        now: float,
        entering: bool = False,
    ) -> Certificate:
        expires = now + self.lifetime_s
        certificate = issue(
            self.identity,
            run=self.manifest.run.id,
            account=account,
            peer_id=peer,
            role="worker",
            stage=stage,
            issued=now,
            expires=expires,
            grace_until=expires + self.grace_s,
        )
        grant = Grant(
            peer_id=peer,
            account=account,
            stage=stage,
            session=session,
            addrs=addrs,
            issued=now,
            expires=expires,
        )
        self.store.grant(
            grant,
            max_nodes=self.max_nodes(),
            max_per_account=self.manifest.admission.max_nodes_per_account,
            now=now,
            entering=entering,
            pace_s=self.manifest.admission.pace_s,
        )
        return certificate


def _at_work(before: Grant | None, join: Join, now: float) -> bool:
    """Whether the process that asks has a place already, whose certificate may not have reached it."""
    if before is None or before.left or before.expires <= now:
        return False
    return before.session == join.session
