"""A look back at who asks: at the asker alone, and only so often."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from agorad import outside
from agorad.outside import PROTOCOL, Outside, ask
from agorad.run import NodeRef
from p2p import selfreport
from p2p.errors import P2PError, PeerGone, Refused
from p2p.host import Host
from p2p.identity import Identity
from p2p.multiaddr import Multiaddr
from p2p.probe import Prober
from p2p.selfreport import SelfReport

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")


def test_it_looks_back_at_the_asker_and_at_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "LOOKS", 4)

    async def main() -> None:
        server, asker, third = (Host(Identity.generate()) for _ in range(3))
        server.handle(PROTOCOL, Outside(Prober(server, lambda _peer: False)).serve, open_to_all=True)
        report = SelfReport(bytes(16), lambda peer: peer == server.peer_id)
        asker.handle(selfreport.PROTOCOL, report.serve, open_to_all=True, aside=True)
        async with server.run([LOCAL]), asker.run([LOCAL]), third.run([LOCAL]):
            ref = NodeRef(peer_id=server.peer_id, addrs=tuple(str(addr.bare()) for addr in server.addrs))
            own = [str(addr.bare()) for addr in asker.addrs]
            by, seen = await ask(asker, [ref], own, size=100_000)
            assert (by, seen.reached) == (server.peer_id, True)
            assert (seen.rtt_ms or 0) > 0
            assert (seen.up_mbps or 0) > 0
            assert (seen.down_mbps or 0) > 0
            for strange in ("/ip4/192.0.2.7/tcp/80", "/dns4/localhost/tcp/22", "junk"):
                _by, seen = await ask(asker, [ref], [strange])
                assert not seen.reached
                assert "where the question came from" in seen.why
            with pytest.raises(Refused, match="looked at often"):
                await ask(asker, [ref], own)

    trio.run(main)


@pytest.mark.parametrize(
    "header",
    [
        {"t": "probe", "addrs": [], "bytes": 0},
        {"t": "look", "addrs": "x", "bytes": 0},
        {"t": "look", "addrs": ["x" * 300], "bytes": 0},
        {"t": "look", "addrs": [], "bytes": 5_000_000},
        {"t": "look", "addrs": [], "bytes": True},
        {},
    ],
)
def test_what_is_no_question_is_dropped(header: dict[str, Any]) -> None:
    async def main() -> None:
        server, asker = Host(Identity.generate()), Host(Identity.generate())
        server.handle(PROTOCOL, Outside(Prober(server, lambda _peer: False)).serve, open_to_all=True)
        async with server.run([LOCAL]), asker.run():
            call = await asker.call(server.peer_id, PROTOCOL, addrs=server.addrs, deadline=5.0)
            async with call:
                await call.send(header)
                with trio.fail_after(5.0), pytest.raises(PeerGone):
                    await call.receive()

    trio.run(main)


def test_nobody_to_ask() -> None:
    async def main() -> None:
        asker = Host(Identity.generate())
        async with asker.run():
            with pytest.raises(P2PError, match="lists no node"):
                await ask(asker, [], [])

    trio.run(main)
