"""What nobody gets in with: joins that are forged, bent, oversized or another's, each refused as what it is.

One authority serves them all, one after the other, and still lets the honest joiner in at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agorad import __version__, config, run
from agorad.authority import accounts
from agorad.authority.messages import PROTOCOL
from agorad.node import Node
from agorad.roles import authority
from p2p.errors import P2PError, Refused
from p2p.identity import Identity
from p2p.membership import Certificate
from tests.net.test_authority import DEADLINE_S, Place, idle, living, until_event

FACTS: dict[str, Any] = {
    "gpu": "RTX 4090", "vram_gib": 24.0, "ram_gib": 64.0, "disk_gib": 500.0, "cloud": "",
    "software": __version__, "version": [1, 1], "clock": 0.0,
}  # fmt: skip
GONE = "gone"
"""Nonsense: the stream is reset, without a word to learn from."""


def bent() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, changes to an honest join, what comes of it)."""
    big, deep = "x" * 100_000, {"a": {"b": {"c": {}}}}
    for field, values in {
        "t": ["grant", "joint", 7, None],
        "account": [7, None, b"alice", "a" * 65, big[:60_000], "al\nice", ["alice"]],
        "secret": [7, b"secret", "s" * 257, "\0" * 10, ["s"]],
        "stage": [-1, 1 << 16, 0.5, "0", True, [0]],
        "addrs": [None, "x", [7], ["/ip4/127.0.0.1/tcp/1"] * 9, ["/ip4/" + "1" * 300], ["nonsense"], [["/"]]],
        "session": [None, "x" * 16, b"x" * 15, b"x" * 17, 16],
        "facts": [None, [], deep, 7, "facts"],
    }.items():
        for number, value in enumerate(values):
            yield f"{field} {number}", {field: value}, GONE
    for field, values in {
        "gpu": [7, "g" * 101],
        "vram_gib": [-1.0, 1e9, float("nan"), float("inf"), "24", True],
        "ram_gib": [None, float("-inf")],
        "version": [[1], [1, 2, 3], ["1", "1"], [-1, 1], None],
        "clock": ["now", float("nan"), -1.0],
        "software": [None, "v" * 101],
    }.items():
        for number, value in enumerate(values):
            yield f"facts.{field} {number}", {"facts": {**FACTS, field: value}}, GONE
    yield "no account", {"account": ""}, "unknown_account"
    yield "an account that is not there", {"account": "mallory"}, "unknown_account"
    yield "a path as an account", {"account": "../alice"}, "unknown_account"
    yield "a wrong secret", {"secret": "wrong"}, "wrong_secret"
    yield "an empty secret", {"secret": ""}, "wrong_secret"
    yield "the hash for the secret", {"secret": "0" * 64}, "wrong_secret"
    yield "no secret", {"secret": None}, "secret_needed"
    yield "a stage that is not there", {"stage": 3}, "wrong_stage"
    yield "a protocol of the past", {"facts": {**FACTS, "version": [0, 0]}}, "protocol_mismatch"
    yield "a protocol of the future", {"facts": {**FACTS, "version": [9, 9]}}, "protocol_mismatch"
    yield "a clock of the past", {"facts": {**FACTS, "clock": 1.0}}, "clock_off"
    yield "too small a card", {"facts": {**FACTS, "vram_gib": 1.0}}, "vram_too_small"
    yield "no memory", {"facts": {**FACTS, "ram_gib": 0.0}}, "ram_too_small"
    yield "no disk", {"facts": {**FACTS, "disk_gib": 0.0}}, "disk_too_small"
    yield "no address to dial", {"addrs": []}, "port_closed"
    yield "an address of nobody", {"addrs": ["/ip4/127.0.0.1/tcp/9"]}, "port_closed"
    yield "somebody's address", {"addrs": "the authority's"}, "port_closed"
    yield "software that is too old", {"facts": {**FACTS, "software": "0.0.1"}}, "version_too_old"
    yield "software without a version", {"facts": {**FACTS, "software": "newest"}}, "version_too_old"


HOSTILE = list(bent())


def honest(place: Place, node: Node, name: str = "alice") -> dict[str, Any]:
    return {
        "t": "join", "account": name, "secret": place.secret, "stage": None, "session": node.session,
        "addrs": [str(addr) for addr in node.host.addrs], "facts": {**FACTS, "clock": time.time()},
    }  # fmt: skip


async def ask(node: Node, place: Place, header: dict[str, Any]) -> str:
    """``granted``, the code of a refusal, or GONE."""
    try:
        with trio.fail_after(20.0):
            async with await node.host.call(place.authority.peer_id, PROTOCOL, deadline=10.0) as call:
                await call.send(header)
                while True:
                    answer = (await call.receive()).header
                    if answer.get("t") == "granted":
                        certificate = Certificate.decode(answer["certificate"])
                        assert certificate.peer_id == node.identity.peer_id
                        return "granted"
                    if answer.get("t") not in ("checking", "queued"):
                        return str(answer.get("t"))
    except Refused as refusal:
        return refusal.code if refusal.why else "refused without a word"
    except (P2PError, trio.TooSlowError):
        return GONE


def strict(tmp_path: Path) -> Place:
    needs = {"min_vram_gib": 8.0, "min_ram_gib": 8.0, "min_disk_gib": 8.0, "min_version": "0.0.9"}
    return Place(tmp_path, max_nodes_per_account=1, **needs)


def test_bent_joins(tmp_path: Path) -> None:
    assert len(HOSTILE) >= 40
    place = strict(tmp_path)
    came: dict[str, str] = {}

    async def body() -> None:
        with trio.fail_after(DEADLINE_S):
            async with (
                living(place.authority_settings(), authority.run) as desk,
                living(place.worker("mallory"), idle) as mallory,
                living(place.worker("alice"), idle) as alice,
            ):
                await until_event(desk, "ready")
                for name, changes, _outcome in HOSTILE:
                    header = {**honest(place, mallory), **changes}
                    if header["addrs"] == "the authority's":
                        header["addrs"] = [f"/ip4/127.0.0.1/tcp/{place.port}"]
                    if isinstance(header["facts"], dict) and header["facts"].get("clock") == 0.0:
                        header["facts"] = {**header["facts"], "clock": time.time()}
                    came[name] = await ask(mallory, place, header)
                assert await ask(alice, place, honest(place, alice)) == "granted"

    trio.run(body)
    wrong = {name: (came[name], outcome) for name, _c, outcome in HOSTILE if came[name] != outcome}
    assert wrong == {}


def test_what_is_anothers(tmp_path: Path) -> None:
    """Keys, accounts, sessions and certificates that belong to somebody else."""
    place = strict(tmp_path)
    bobs = accounts.add(tmp_path / "accounts.toml", "carol")

    async def body() -> None:
        with trio.fail_after(DEADLINE_S):
            async with (
                living(place.authority_settings(), authority.run) as desk,
                living(place.worker("alice"), idle) as alice,
                living(place.worker("mallory"), idle) as mallory,
            ):
                await until_event(desk, "ready")
                assert await ask(alice, place, honest(place, alice)) == "granted"
                carols = {**honest(place, alice, "carol"), "secret": bobs}
                assert await ask(alice, place, carols) == "identity_bound"
                assert await ask(mallory, place, honest(place, mallory)) == "account_full"
                renewal = {"t": "renew", "session": alice.session, "addrs": [], "software": __version__}
                assert await ask(mallory, place, renewal) == "unknown_peer"
                leave = {"t": "leave", "session": alice.session}
                assert await ask(mallory, place, leave) == "bye"  # of its own, whatever session it names
                assert await ask(mallory, place, honest(place, mallory)) == "account_full"
                other = {**renewal, "addrs": [str(addr) for addr in alice.host.addrs], "session": bytes(16)}
                assert await ask(alice, place, other) == "already_running"

    trio.run(body)


@pytest.mark.parametrize("twist", ["altered", "another operator"])
def test_another_manifest_of_the_same_run(tmp_path: Path, twist: str) -> None:
    """Signed by somebody else, or changed and signed again by somebody else: other people's run."""
    place = strict(tmp_path)
    mine = Identity.generate()
    info = attrs.evolve(place.manifest.run, operator=mine.peer_id)
    lax = attrs.evolve(place.manifest.admission, min_vram_gib=0.0)
    changes: dict[str, Any] = {"admission": lax} if twist == "altered" else {}
    fake = attrs.evolve(place.manifest, run=info, signature=None, content=b"", **changes).signed(mine)
    run.save(fake, tmp_path / "fake.toml")

    async def body() -> None:
        with trio.fail_after(DEADLINE_S):
            settings = place.worker("mallory")
            node: config.NodeSection = attrs.evolve(settings.node, run=tmp_path / "fake.toml")
            async with (
                living(place.authority_settings(), authority.run) as desk,
                living(attrs.evolve(settings, node=node), idle) as mallory,
            ):
                await until_event(desk, "ready")
                assert await ask(mallory, place, honest(place, mallory)) == "manifest_mismatch"

    trio.run(body)
