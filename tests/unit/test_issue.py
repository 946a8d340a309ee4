"""The authority on stages: who asks again hears the same, and nodes change their stage one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agorad.authority.assign import stage_needs
from agorad.authority.issue import Issuer
from agorad.authority.messages import Facts, Join
from agorad.authority.store import Store
from p2p.errors import LocalError, Refused
from p2p.identity import Identity, PeerId
from p2p.membership import Certificate
from tests.unit import joining

NOW = 1_800_000_000.0
HOUR_S = 3600.0
SESSION, ANOTHER = bytes(16), bytes([1]) * 16


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[Issuer]:
    manifest = joining.manifest(moves_per_hour=60.0, max_nodes_per_account=9)
    store = Store(tmp_path / "authority.sqlite")
    yield Issuer(
        identity=Identity.generate(),
        manifest=manifest,
        store=store,
        needs=stage_needs(manifest.model, manifest.training),
        lifetime_s=HOUR_S,
        grace_s=0.0,
    )
    store.close()


def ask(
    issuer: Issuer, peer: PeerId, now: float, *, session: bytes = SESSION, stage: int | None = None
) -> Certificate:
    """As the desk answers a join."""
    join = Join(account="somebody", secret="", session=session, facts=Facts(clock=now), stage=stage)
    choice = issuer.choose(join, peer, now)
    issuer.check_move(join, peer, choice.stage, now)
    return issuer.grant(join, peer, "somebody", choice.stage, now)


def peers(count: int) -> list[PeerId]:
    return [Identity.generate().peer_id for _ in range(count)]


def test_who_asks_again_has_the_place_it_was_given(issuer: Issuer) -> None:
    """The answer was lost, and meanwhile its stage became the fullest."""
    mine, *others = peers(6)
    stage = ask(issuer, mine, NOW).stage
    for other in others:
        ask(issuer, other, NOW + 1, stage=stage)
    assert ask(issuer, mine, NOW + 2).stage == stage
    # Another process of the same node, or one whose certificate has run out, goes where it is missed.
    assert ask(issuer, mine, NOW + 3, session=ANOTHER).stage != stage
    assert ask(issuer, mine, NOW + 5 + HOUR_S, session=ANOTHER).stage != stage


def test_nodes_change_their_stage_one_a_minute(issuer: Issuer) -> None:
    first, second, *_ = crowd = peers(4)
    for peer in crowd:
        ask(issuer, peer, NOW, stage=0)
    assert ask(issuer, first, NOW + 10, stage=1).stage == 1
    assert ask(issuer, first, NOW + 11, stage=1).stage == 1  # the same answer again is no other move
    with pytest.raises(Refused, match="another node changed its stage; the next may in 48 s") as no:
        ask(issuer, second, NOW + 22, stage=1)
    assert no.value.code == "no_move"
    assert ask(issuer, second, NOW + 70, stage=1).stage == 1


def test_a_stage_is_never_left_empty(issuer: Issuer) -> None:
    first, second = peers(2)
    ask(issuer, first, NOW, stage=0)
    ask(issuer, second, NOW, stage=1)
    with pytest.raises(Refused, match="stage 0 would be left without a node"):
        ask(issuer, first, NOW + 10, stage=1)
    # Whoever starts anew says where.
    assert ask(issuer, first, NOW + 20, session=ANOTHER, stage=1).stage == 1


def test_more_moves_than_anybody_can_follow_are_no_setting() -> None:
    with pytest.raises(LocalError, match=r"admission.moves_per_hour = 61 must be between 0 and 60"):
        joining.manifest(moves_per_hour=61.0)
