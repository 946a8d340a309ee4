"""The authority: answers joins with certificates, on the same host as everything else.

``/agora/authority/1`` is open to guests. One message each way: a join (account, secret the first time,
wanted stage), then a certificate or a typed refusal; a renewal is the same join without a secret. One
decision at a time, in a worker thread (SQLite); 10 s for a peer to say what it wants.
"""

from __future__ import annotations

from functools import partial

import trio

from agorad.authority import accounts
from agorad.authority.issue import PROTOCOL, Issuer, JoinRequest
from agorad.authority.store import Store
from agorad.events import JoinAnswered
from agorad.node import Node
from p2p.errors import LocalError, Refused, RemoteError
from p2p.membership import Certificate
from p2p.rpc import Call

ASK_S = 10.0


async def run(node: Node) -> None:
    """Serve until asked to stop."""
    if node.identity.peer_id not in {ref.peer_id for ref in node.manifest.authorities}:
        raise LocalError(
            f"{node.identity.peer_id} is not an authority of run {node.manifest.run.id!r}; "
            "the manifest lists those that are"
        )
    accounts.load(node.config.authority.accounts)  # a damaged file is better known now than at a join
    store = await trio.to_thread.run_sync(Store, node.config.node.state / "authority.sqlite")
    one_at_a_time = trio.CapacityLimiter(1)

    async def decide(request: JoinRequest, call: Call) -> Certificate:
        issuer = Issuer(
            identity=node.identity,
            manifest=node.manifest,
            store=store,
            lifetime_s=node.config.authority.lifetime_s,
            grace_s=node.config.authority.grace_s,
        )

        def in_thread() -> Certificate:
            try:
                listed = accounts.load(node.config.authority.accounts)
            except LocalError as error:
                raise Refused("unavailable", "the authority cannot read its accounts", 30.0) from error
            return issuer.decide(request, call.peer, listed, node.clock())

        return await trio.to_thread.run_sync(in_thread, limiter=one_at_a_time)

    async def serve(call: Call) -> None:
        try:
            with trio.fail_after(ASK_S):
                message = await call.receive()
        except trio.TooSlowError as error:
            raise RemoteError("a peer opened a join and said nothing") from error
        request = JoinRequest.from_header(message.header)
        report = partial(JoinAnswered, peer=call.peer, account=request.account)
        try:
            certificate = await decide(request, call)
        except Refused as refusal:
            node.emit(report(stage=request.stage, outcome=refusal.code))
            raise
        node.emit(report(stage=certificate.stage, outcome="granted"))
        await call.send({"t": "granted", "certificate": certificate.encode()})

    node.host.handle(PROTOCOL, serve, open_to_all=True)
    node.ready()
    try:
        await node.stopping.wait()
    finally:
        store.close()
