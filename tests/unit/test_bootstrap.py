"""Whom a node asks for its way into the hash table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from agorad.living import _bootstrap
from agorad.run import Manifest, NodeRef
from p2p.identity import Identity, PeerId


def ref(number: int, *addrs: str) -> NodeRef:
    return NodeRef(peer_id=Identity.generate(bytes([number]) * 32).peer_id, addrs=addrs)


SEED, OTHER_SEED = ref(1, "/ip4/127.0.0.1/tcp/1"), ref(2, "/ip4/127.0.0.1/tcp/2")
AUTHORITY, HIDDEN = ref(3, "/ip4/127.0.0.1/tcp/3"), ref(4)
MANIFEST: Any = SimpleNamespace(seeds=(SEED, OTHER_SEED), authorities=(AUTHORITY, HIDDEN))


def asked(role: str, own: PeerId) -> list[PeerId]:
    return [peer for peer, _addrs in _bootstrap(cast(Manifest, MANIFEST), role, own)]


def test_a_dead_seed_keeps_nobody_out() -> None:
    everybody = [SEED.peer_id, OTHER_SEED.peer_id, AUTHORITY.peer_id]
    assert asked("worker", PeerId("w")) == asked("trainer", PeerId("t")) == everybody
    assert asked("authority", AUTHORITY.peer_id) == everybody[:2]


def test_a_seed_waits_for_nobody_but_seeds() -> None:
    assert asked("seed", SEED.peer_id) == [OTHER_SEED.peer_id]
