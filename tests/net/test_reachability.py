"""A node finds out whether others can dial it, says so when it changes, and dials them where they cannot."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agorad import neighbours, outside, reachability
from agorad.node import Node
from p2p.multiaddr import Multiaddr
from p2p.records import StageRecord
from stage.roster import Entry, Roster
from tests.net.whole_nodes import Place, living


@asynccontextmanager
async def three(folder: Path) -> AsyncIterator[tuple[Place, Node]]:
    """A worker, beside the authority and the seed that can look."""
    place = Place(folder)
    with trio.fail_after(60):
        async with (
            living(place.settings("authority", "authority")),
            living(place.settings("seed", "seed")),
            living(place.settings("w", "worker")) as worker,
        ):
            yield place, worker


def closed_port() -> Multiaddr:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Multiaddr.tcp("127.0.0.1", free.getsockname()[1])


def test_the_verdict_is_said_when_it_is_new_and_taken_back_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "LOOKS", 1000)
    for name in ("EVERY_S", "AGAIN_S", "SOON_S", "FIRST_S", "CONFIRM_S"):
        monkeypatch.setattr(reachability, name, 0.05)
    told: list[dict[str, Any]] = []

    async def said(count: int) -> dict[str, Any]:
        while len(told) < count:  # noqa: ASYNC110
            await trio.sleep(0.02)
        return told[-1]

    async def main() -> None:
        async with three(tmp_path) as (_place, node):
            node.bus.subscribe(
                lambda entry: told.append(dict(entry)) if entry["event"] == "reachability" else None
            )
            wrong = closed_port()
            node.host.announce = [wrong]
            node.ready()
            first = await said(1)
            assert (first["reachable"], first["addr"]) == (False, "")
            assert "refused" in first["why"]
            assert str(wrong) in first["why"]
            assert first["by"]
            assert node.host.dialable_addrs == []
            assert "docs/network.md" in node.warnings["reachability"]
            node.host.announce = ()
            second = await said(2)
            assert second["reachable"]
            assert second["addr"] == str(node.host.addrs[0].bare())
            assert node.host.dialable_addrs == node.host.addrs
            assert "reachability" not in node.warnings
            await trio.sleep(0.5)  # looked at again meanwhile, and nothing is new
            assert len(told) == 2
            node.host.announce = [wrong]
            assert not (await said(3))["reachable"]

    trio.run(main)


@pytest.mark.parametrize(
    ("announced", "reachable", "why"),
    [
        ("/ip4/10.9.9.9/tcp/49200", False, "sees this node at 127.0.0.1"),
        ("/ip4/8.8.8.8/tcp/49200", None, "sees this node at 127.0.0.1"),
        ("/dns4/example.org/tcp/49200", None, "sees this node at 127.0.0.1"),
    ],
)
def test_an_address_that_listed_nodes_do_not_see_is_not_dialled(
    tmp_path: Path, announced: str, reachable: bool | None, why: str
) -> None:
    async def main() -> None:
        async with three(tmp_path) as (_place, node):
            node.host.announce = [Multiaddr.parse(announced)]
            verdict = await reachability.look(node)
            assert verdict.reachable is reachable
            assert why in verdict.why

    trio.run(main)


def test_nothing_is_concluded_where_nobody_answers(tmp_path: Path) -> None:
    async def main() -> None:
        place = Place(tmp_path)
        with trio.fail_after(60):
            async with living(place.settings("w", "worker")) as node:
                assert (await reachability.look(node)).reachable is None
                assert node.host.reachable is None

    trio.run(main)


def test_who_cannot_be_dialled_dials_those_who_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "EVERY_S", 0.05)

    async def main() -> None:
        async with three(tmp_path) as (place, node), living(place.settings("before", "worker")) as caller:
            roster = Roster(node.dht, node.trust, node.clock)
            record = StageRecord(addrs=(), phase="active", step=0, slots=1, rate=0.0, certificate=b"")
            entry = Entry(caller.identity.peer_id, record, list(caller.host.addrs), 0.0)
            roster.view(0).replace({entry.peer: entry})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(neighbours.keep, node, roster, 1)
                node.host.reachable = False
                for _ in range(3):
                    with trio.fail_after(10):
                        while node.identity.peer_id not in caller.host.connections:  # noqa: ASYNC110
                            await trio.sleep(0.02)
                    connection = caller.host.connections[node.identity.peer_id]
                    connection.close("by the test")  # it comes back
                    await connection.closed.wait()
                assert not connection.dialer
                assert place.manifest.authorities[0].peer_id in node.host.connections
                nursery.cancel_scope.cancel()

    trio.run(main)
