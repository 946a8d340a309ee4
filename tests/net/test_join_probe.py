"""Joins that the authority looks into for real: the port, the line, the key's other process."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import attrs
import pytest

from agorad.exitcodes import DaemonExit, ExitCode
from agorad.joining import obtain_certificate
from agorad.node import Node
from agorad.roles import authority
from p2p import selfreport
from p2p.rpc import Call
from tests.net.test_authority import Place, idle, living, until_event, within
from tests.sentences import complete


async def refused(node: Node, code: str, exit: ExitCode) -> str:
    with pytest.raises(DaemonExit, match=rf"\({code}\)") as end:
        await obtain_certificate(node)
    assert end.value.code == exit
    complete(end.value.why)
    return end.value.why


@pytest.mark.catalogue(20, 21)
def test_a_port_that_nobody_reaches_ends_with_code_12(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        addr = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}"

        async def main() -> None:
            settings = place.worker("w")
            wrong = attrs.evolve(settings, node=attrs.evolve(settings.node, announce=(addr,)))
            async with living(place.authority_settings(), authority.run):
                async with living(wrong, idle) as node:
                    why = await refused(node, "port_closed", ExitCode.PORT)
                    assert addr in why
                    assert "refused" in why
                    assert "node.announce" in why
                async with living(settings, idle) as node:
                    assert await obtain_certificate(node) is not None

        within(main)


def test_a_line_that_is_too_slow_ends_with_code_10(tmp_path: Path) -> None:
    place = Place(tmp_path, min_mbps=1e6)

    async def main() -> None:
        async with (
            living(place.authority_settings(), authority.run),
            living(place.worker("w"), idle) as node,
        ):
            why = await refused(node, "bandwidth_too_low", ExitCode.REQUIREMENTS)
            assert "1e+06 Mbit/s each way (admission.min_mbps)" in why
            sent, received = node.host.counters.protocols[selfreport.PROTOCOL]
            assert sent == received == 4_000_000

    within(main)


@pytest.mark.catalogue(13)
def test_who_does_not_let_itself_be_measured_does_not_get_in(tmp_path: Path) -> None:
    place = Place(tmp_path, min_mbps=1.0)

    async def main() -> None:
        async with (
            living(place.authority_settings(), authority.run),
            living(place.worker("w"), idle) as node,
        ):
            honest = node.host._server._handlers[selfreport.PROTOCOL]

            async def shy(call: Call) -> None:
                for _ in range(6):
                    header = (await call.receive()).header
                    if header["t"] == "who":
                        await call.send({"t": "me", "session": node.session})
                    elif header["t"] == "ping":
                        await call.send({"t": "pong", "nonce": header["nonce"]})
                    else:
                        return  # busy, or so it would have others believe

            node.host._server._handlers[selfreport.PROTOCOL] = attrs.evolve(honest, handler=shy)
            node.nursery.start_soon(obtain_certificate, node)
            delayed = (await until_event(node, "join_delayed"))[0]
            assert "could not be measured" in delayed["why"]
            assert node.certificate is None

    within(main)


@pytest.mark.catalogue(18, 29)
def test_a_key_in_use_elsewhere_ends_with_code_18_and_its_restart_does_not(tmp_path: Path) -> None:
    place = Place(tmp_path)

    async def main() -> None:
        async with living(place.authority_settings(), authority.run):
            async with living(place.worker("w"), idle) as first:
                assert await obtain_certificate(first) is not None
                (tmp_path / "copy").mkdir()
                shutil.copy(tmp_path / "w" / "identity.key", tmp_path / "copy" / "identity.key")
                async with living(place.worker("copy"), idle) as second:
                    assert second.identity.peer_id == first.identity.peer_id
                    why = await refused(second, "already_running", ExitCode.DUPLICATE)
                    assert "another process answers" in why
            async with living(place.worker("copy"), idle) as third:
                assert await obtain_certificate(third) is not None

    within(main)
