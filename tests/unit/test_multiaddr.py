"""Multiaddrs: both forms agree with py-multiaddr's, malformed ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import RemoteError
from p2p.identity import Identity
from p2p.multiaddr import Multiaddr

VECTORS = json.loads((Path(__file__).parent / "vectors" / "multiaddr.json").read_text())["addrs"]
PEER = Identity.generate(bytes(32)).peer_id


@pytest.mark.parametrize(("text", "binary"), VECTORS)
def test_vectors(text: str, binary: str) -> None:
    addr = Multiaddr.parse(text)
    assert addr.encode().hex() == binary
    assert Multiaddr.decode(bytes.fromhex(binary)) == addr
    assert str(addr) == text


def test_parts() -> None:
    addr = Multiaddr.parse(f"/ip4/10.0.0.1/tcp/49200/p2p/{PEER}")
    assert (addr.host, addr.port, addr.peer_id) == ("10.0.0.1", 49200, PEER)
    assert str(addr.bare()) == "/ip4/10.0.0.1/tcp/49200"
    assert addr.bare().at(PEER) == addr == addr.at(PEER)
    assert Multiaddr.parse(f"/ip4/10.0.0.1/tcp/49200/ipfs/{PEER}") == addr
    assert Multiaddr.parse("/ip4/1.2.3.4/tcp/1/ws").port is None
    assert Multiaddr.parse("/ip4/1.2.3.4/udp/1").port is None
    assert Multiaddr.tcp("::1", 5) == Multiaddr.parse("/ip6/0:0::1/tcp/5")
    assert str(Multiaddr.tcp("seed.example", 5)) == "/dns/seed.example/tcp/5"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "ip4/1.2.3.4",
        "/ip4",
        "/ip4/300.1.1.1",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/-1",
        "/ip4/1.2.3.4/tcp/x",
        "/carrier-pigeon/1",
        "/p2p/notapeer",
        "/dns/",
        "/tls" * 17,
        "/dns/" + "a" * 600,
    ],
)
def test_malformed_text(text: str) -> None:
    with pytest.raises(RemoteError):
        Multiaddr.parse(text)


@given(st.binary(max_size=80))
def test_any_bytes_are_an_address_or_a_remote_error(data: bytes) -> None:
    try:
        addr = Multiaddr.decode(data)
    except RemoteError:
        return
    assert Multiaddr.decode(addr.encode()) == addr
    assert Multiaddr.parse(str(addr)) == addr


def test_an_empty_name_is_no_name() -> None:
    with pytest.raises(RemoteError, match="needs a value"):
        Multiaddr.decode(bytes.fromhex("37003700"))
