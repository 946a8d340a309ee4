"""What an operator does at a running authority, through its control socket; and the list of the removed.

Each change is one transaction with its line in the audit log, counts at the next decision, and wakes who
waits. Removed members are published at once, and every ``PUBLISH_S``, as a list signed by this authority
(``revocation``); their certificates are worth nothing from then on. So is the newest manifest of the run
(``manifests``), once there is a second version. Limits: those of the fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from agorad import manifests, standing
from agorad.authority import revocation
from agorad.authority.issue import JOINS_PAUSED, MAX_NODES
from agorad.control import BadRequest
from agorad.events import Operated
from p2p.errors import LocalError, P2PError, RemoteError
from p2p.identity import PeerId, parse_peer_id
from p2p.membership import Revoked

if TYPE_CHECKING:
    from agorad.authority.desk import Desk
    from agorad.node import Node

PUBLISH_S: Final = 20.0
LIST_TTL_S: Final = 600.0
STORE_S: Final = 5.0
MOST_NODES: Final = 1_000_000
MOST_HOURS: Final = 24.0 * 3650
AUDIT_LIMIT: Final = 1000
MANIFEST: Final = "manifest"
"""Setting and audit line that say which version was published."""
KINDS: Final = ("account", "peer")


class Operator:
    """Commands of one authority."""

    def __init__(self, node: Node, desk: Desk) -> None:
        self._node = node
        self._desk = desk
        self._changed = trio.Event()
        node.commands.update(
            {
                "members": self._members,
                "ban": self._ban,
                "unban": self._unban,
                "bans": self._bans,
                "joins": self._joins,
                "capacity": self._capacity,
                "audit": self._audit,
                "publish": self._publish,
                "passes": self._passes,
            }
        )

    async def publish(self) -> None:
        """Keep this authority's list of revoked peers in the hash table, until cancelled."""
        while True:
            self._changed = trio.Event()
            try:
                await self._store_list()
                await self._store_manifest()
            except (P2PError, trio.TooSlowError):
                pass  # the next time is seconds away
            with trio.move_on_after(PUBLISH_S):
                await self._changed.wait()

    async def _store_manifest(self) -> None:
        node = self._node
        if node.manifest.run.version == 1:
            return  # everybody began with it
        own, run = node.identity.peer_id, node.manifest.run.id
        pages = enumerate(manifests.pages(node.manifest))
        values: dict[tuple[str, str], Any] = {(manifests.key(run, page), own): value for page, value in pages}
        await node.dht.store_many(values, ttl=LIST_TTL_S, deadline=STORE_S)

    async def _store_list(self) -> None:
        node, now = self._node, self._node.clock()
        peers = await self._desk.ask(self.revoked, now)
        node.trust.revocations.replace(node.identity.peer_id, now, peers)
        own, run = node.identity.peer_id, node.manifest.run.id
        values: dict[tuple[str, str], Any] = {
            (revocation.key(run, page), own): value for page, value in enumerate(revocation.pages(peers, now))
        }
        await node.dht.store_many(values, ttl=LIST_TTL_S, deadline=STORE_S)

    def revoked(self, now: float) -> dict[PeerId, Revoked]:
        """Members whose certificates may still be believed although they, or their account, are banned."""
        store, grace_s = self._desk.store, self._node.config.authority.grace_s
        by_name = {(ban.kind, ban.name): ban for ban in store.bans(now)}
        found = {}
        for grant in store.active(now - grace_s):
            ban = by_name.get(("peer", grant.peer_id)) or by_name.get(("account", grant.account))
            if ban is not None:
                last = grant.expires + grace_s
                until = last if ban.until is None else min(last, ban.until)
                found[PeerId(grant.peer_id)] = Revoked(until, ban.why)
        return found

    # commands

    async def _members(self, _request: Mapping[str, Any]) -> list[dict[str, Any]]:
        now = self._node.clock()
        grants = await self._desk.ask(self._desk.store.active, now)
        return [
            {
                "peer_id": grant.peer_id, "account": grant.account, "stage": grant.stage,
                "addrs": list(grant.addrs), "issued": grant.issued, "expires": grant.expires,
            }
            for grant in sorted(grants, key=lambda grant: (grant.stage, grant.account, grant.peer_id))
        ]  # fmt: skip

    async def _ban(self, request: Mapping[str, Any]) -> dict[str, Any]:
        kind, name, by = _target(request)
        why = _words(request, "why", revocation.WHY_LIMIT, "removed by the operator")
        hours = request.get("hours")
        if hours is not None and not (type(hours) in (int, float) and 0 < hours <= MOST_HOURS):
            raise BadRequest(f"hours is a number above 0 and at most {MOST_HOURS:g}")
        now = self._node.clock()
        until = None if hours is None else now + hours * 3600
        await self._change("ban", f"{kind} {name}", self._desk.store.ban, kind, name, why, until, by, now)
        return {"kind": kind, "name": name, "until": until}

    async def _unban(self, request: Mapping[str, Any]) -> dict[str, Any]:
        kind, name, by = _target(request)
        unban, now = self._desk.store.unban, self._node.clock()
        if not await self._change("unban", f"{kind} {name}", unban, kind, name, by, now):
            raise BadRequest(f"there is no ban of {kind} {name!r}")
        return {"kind": kind, "name": name}

    async def _bans(self, _request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [attrs.asdict(ban) for ban in await self._desk.ask(self._desk.store.bans, self._node.clock())]

    async def _joins(self, request: Mapping[str, Any]) -> dict[str, Any]:
        paused = request.get("paused")
        if type(paused) is not bool:
            raise BadRequest("paused is true or false")
        await self._set(JOINS_PAUSED, "1" if paused else "", request)
        return {"paused": paused}

    async def _capacity(self, request: Mapping[str, Any]) -> dict[str, Any]:
        nodes = request.get("nodes")
        if nodes is not None and not (type(nodes) is int and 0 <= nodes <= MOST_NODES):
            raise BadRequest(f"nodes is a whole number from 0 to {MOST_NODES}, or nothing for the manifest's")
        await self._set(MAX_NODES, "" if nodes is None else str(nodes), request)
        return {"nodes": await self._desk.ask(self._desk.issuer.max_nodes)}

    async def _audit(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        limit = request.get("limit", 100)
        if not (type(limit) is int and 0 < limit <= AUDIT_LIMIT):
            raise BadRequest(f"limit is a whole number from 1 to {AUDIT_LIMIT}")
        return [attrs.asdict(entry) for entry in await self._desk.ask(self._desk.store.audit_log, limit)]

    async def _publish(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Put a newer manifest into force, here and, through the hash table, everywhere."""
        content, signature = request.get("content"), request.get("signature")
        if not isinstance(content, str) or not isinstance(signature, str):
            raise BadRequest("content and signature are those of a signed manifest, as texts")
        node = self._node
        try:
            newer = manifests.parse(content.encode(), signature)
            manifests.follow(node.manifest, newer)
            manifests.pages(newer)
            if node.identity.peer_id not in newer.trust().authorities:
                raise LocalError(
                    "the newer manifest no longer lists this authority; publish it at one that stays"
                )
        except (LocalError, RemoteError) as error:
            raise BadRequest(str(error)) from error
        changed = manifests.changed(node.manifest, newer)
        await self._set(MANIFEST, f"{newer.run.version} {newer.hash.hex()[:16]}", request)
        if newer.run.version > node.manifest.run.version:  # it may have come another way meanwhile
            standing.take(node, newer)
        self._changed.set()
        return {"version": newer.run.version, "hash": newer.hash.hex(), "changed": changed}

    async def _passes(self, request: Mapping[str, Any]) -> list[str]:
        """Let a peer download every stage's state: a pass each, in hexadecimal."""
        try:
            peer = parse_peer_id(str(request.get("peer")))
        except RemoteError as error:
            raise BadRequest(str(error)) from error
        by, now = _words(request, "by", 64, "operator"), self._node.clock()
        await self._change("passes", peer, self._desk.store.note, "passes", peer, by, now)
        stages = range(self._node.manifest.model.stages)
        return [self._desk.issuer.guest_pass(peer, stage, now).hex() for stage in stages]

    async def _set(self, name: str, value: str, request: Mapping[str, Any]) -> None:
        by, now = _words(request, "by", 64, "operator"), self._node.clock()
        await self._change(name, value, self._desk.store.set_setting, name, value, by, now)

    async def _change(self, what: str, detail: str, change: Callable[..., Any], *arguments: object) -> Any:
        done = await self._desk.ask(change, *arguments)
        self._changed.set()
        self._desk.room.changed()
        self._node.emit(Operated(what=what, detail=detail))
        return done


def _target(request: Mapping[str, Any]) -> tuple[str, str, str]:
    kind, name = request.get("kind"), request.get("name")
    if kind not in KINDS:
        raise BadRequest("kind is account or peer")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise BadRequest("name is an account or a peer id: 1 to 64 letters, digits, '-', '.', '_'")
    return str(kind), name, _words(request, "by", 64, "operator")


def _words(request: Mapping[str, Any], field: str, limit: int, otherwise: str) -> str:
    value = request.get(field) or otherwise
    if not isinstance(value, str) or len(value.encode()) > limit or not value.isprintable():
        raise BadRequest(f"{field} is a text of at most {limit} printable characters")
    return value
