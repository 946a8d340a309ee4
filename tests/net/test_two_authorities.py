"""Two authorities of one run on one database."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agorad import run as runs
from agorad import standing
from agorad.config import Config
from agorad.node import Node
from agorad.roles import authority
from agorad.run import NodeRef
from p2p.errors import Refused
from p2p.identity import Identity
from p2p.rpc import Call
from tests.net.test_authority import PRIVATE, Place, living, until_event, within
from tests.net.test_manifest_versions import joined, publish, signed

PACE_S = 0.3


class Pair(Place):
    """A run whose manifest lists two."""

    def __init__(self, folder: Path, **admission: Any) -> None:
        super().__init__(folder, max_rtt_ms=0.0, **admission)  # on a busy machine that measures the machine
        self.keys = Identity.generate(), Identity.generate()
        self.refs = tuple(self._ref(n, key) for n, key in enumerate(self.keys))
        self.manifest = signed(self, 2, authorities=self.refs)
        runs.save(self.manifest, folder / "run.toml")

    def _ref(self, number: int, key: Identity) -> NodeRef:
        (self.folder / f"authority-{number}").mkdir()
        key.save(self.folder / f"authority-{number}" / "identity.key")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return NodeRef(peer_id=key.peer_id, addrs=(f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}",))

    def one(self, number: int) -> Config:
        shared = {"accounts": "accounts.toml", "database": f"sqlite:///{self.folder}/shared.sqlite"}
        found = self.settings(f"authority-{number}", "authority", authority=shared)
        return attrs.evolve(found, node=attrs.evolve(found.node, listen=self.refs[number].addrs))


async def serve(call: Call) -> None:
    await call.receive()
    await call.send({})


async def heard(node: Node, by: Node) -> str:
    node.host.learn(by.identity.peer_id, by.host.addrs)
    try:
        async with await node.host.call(by.identity.peer_id, PRIVATE, deadline=5.0) as call:
            await call.send({})
            await call.receive()
    except Refused as refusal:
        return refusal.code
    return "heard"


def test_a_dropped_authoritys_members_renew_at_another_and_are_believed_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_by_itself(*_arguments: object) -> None:
        """Here the test says who hears of a manifest when."""

    monkeypatch.setattr(standing, "look_for_manifest", not_by_itself)
    place = Pair(tmp_path, max_nodes_per_account=4)
    first, second = place.keys
    dropped = signed(place, 3, authorities=place.refs[1:])
    info = attrs.evolve(dropped.run, version=4, revoked=(first.peer_id,))
    revoked = attrs.evolve(dropped, run=info, content=b"").signed(place.operator)

    async def main() -> None:
        async with (
            living(place.worker("a"), joined) as a,
            living(place.worker("b"), joined) as b,
            living(place.worker("c"), joined) as c,
        ):
            async with living(place.one(0), authority.run):
                for node in (a, b, c):
                    await until_event(node, "certificate_granted")
                    assert node.certificate is not None
                    assert node.certificate.authority == first.peer_id
            async with living(place.one(1), authority.run) as office:
                for node in (b, c):
                    node.host.handle(PRIVATE, serve)
                assert [await heard(a, b), await heard(a, c)] == ["heard", "heard"]
                b.watch_s = 1.5 / standing.OVERLAP
                standing.take(office, dropped)
                standing.take(b, dropped)  # before a hears of it
                (_, renewed) = await until_event(b, "certificate_granted", 2)
                assert renewed["authority"] == second.peer_id
                assert await heard(a, b) == "heard"
                await trio.sleep(1.6)
                # The member that b saw at hello has run out; where they greeted anew since (a's hash table
                # joins again when it likes), b does not know who vouched for it.
                assert await heard(a, b) in {"certificate_expired", "unknown_authority"}
                standing.take(a, dropped)
                await until_event(a, "certificate_granted", 2)
                assert await heard(a, b) == "heard"
                # Revoked: no overlap. The one who holds such a certificate renews all the same.
                standing.take(office, revoked)
                standing.take(b, revoked)
                assert await heard(c, b) == "unknown_authority"
                standing.take(c, revoked)
                await until_event(c, "certificate_granted", 2)
                assert await heard(c, b) == "heard"

    within(main)


@pytest.mark.long
def test_nobody_is_out_while_an_authority_is_dropped_in_a_live_run(tmp_path: Path) -> None:
    place = Pair(tmp_path, max_nodes_per_account=4)
    first, second = place.keys
    watch_s = 3.0
    refused: Counter[str] = Counter()

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(living(place.worker(f"w{n}"), joined)) for n in range(4)]
            async with living(place.one(0), authority.run):
                for node in nodes:
                    (granted,) = await until_event(node, "certificate_granted")
                    assert granted["authority"] == first.peer_id
            office = await stack.enter_async_context(living(place.one(1), authority.run))
            for node in nodes:
                node.host.handle(PRIVATE, serve)
                node.watch_s = watch_s
                node.trust.heard_other()  # ends the pause that it began with
            await trio.sleep(watch_s)
            await publish(office, signed(place, 3, authorities=place.refs[1:]))
            until = trio.current_time() + 5 * watch_s
            while trio.current_time() < until:
                for one, other in itertools.permutations(nodes, 2):
                    refused[await heard(one, other)] += 1
                await trio.sleep(0.1)
            for node in nodes:
                (_, renewed) = await until_event(node, "certificate_granted", 2)
                assert renewed["authority"] == second.peer_id

    within(main)
    assert refused["heard"] > 100
    # Who has not heard of the newest manifest yet does not know whoever has; it looks at once.
    assert set(refused) <= {"heard", "manifest_mismatch"}, refused


def test_both_together_keep_the_pace(tmp_path: Path) -> None:
    place = Pair(tmp_path, max_nodes_per_account=6, joins_per_minute=60 / PACE_S)

    async def main() -> None:
        async with living(place.one(0), authority.run) as one, living(place.one(1), authority.run) as other:
            async with contextlib.AsyncExitStack() as stack:
                nodes = [
                    await stack.enter_async_context(living(place.worker(f"w{n}"), joined)) for n in range(6)
                ]
                granted = [(await until_event(node, "certificate_granted"))[0] for node in nodes]
            assert not any(node.bus.counts["join_delayed"] for node in nodes), "nobody was sent away"
        assert {event["authority"] for event in granted} <= {one.identity.peer_id, other.identity.peer_id}
        entered = sorted(event["expires"] for event in granted)
        gaps = [after - before for before, after in itertools.pairwise(entered)]
        assert min(gaps) >= PACE_S - 0.001

    within(main)
