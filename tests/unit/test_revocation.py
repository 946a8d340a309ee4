"""Lists of revoked peers: their form, whom they keep out, and that no bad list does harm."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agorad.authority import revocation
from p2p.errors import Refused, RemoteError
from p2p.identity import Identity, PeerId
from p2p.kad.record import VALUE_LIMIT
from p2p.membership import Revocations, Revoked, Trust, issue

AUTHORITY, NODE = Identity.generate(), Identity.generate()


def many(count: int) -> dict[PeerId, Revoked]:
    peer = NODE.peer_id
    return {PeerId(f"{peer[:-4]}{number:04d}"): Revoked(1e9 + number, "ü" * 90) for number in range(count)}


@pytest.mark.parametrize("count", [0, 1, 20, 21, 1280])
def test_a_list_comes_back_and_every_page_fits_a_record(count: int) -> None:
    pages = revocation.pages(many(count), 5.0)
    assert all(len(msgpack.packb(page)) <= VALUE_LIMIT for page in pages)
    at, peers = revocation.read(pages)
    assert at == 5.0
    assert set(peers) == set(many(count))
    assert revocation.page_count(pages[0]) == len(pages)


def test_what_ends_last_is_kept_where_there_is_no_room() -> None:
    _, peers = revocation.read(revocation.pages(many(1300), 5.0))
    assert min(entry.until for entry in peers.values()) == 1e9 + 20


def test_pages_that_do_not_belong_together() -> None:
    first, second = revocation.pages(many(30), 5.0)
    other = revocation.pages(many(30), 6.0)[1]
    for values in ([first], [first, other], [first, second, second]):
        with pytest.raises(RemoteError):
            revocation.read(values)


FIELDS = st.sampled_from(["at", "pages", "peers", "x"])
LEAVES = st.none() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner), max_leaves=12
)


@given(VALUES)
def test_anything_is_read_or_refused(value: object) -> None:
    try:
        revocation.read([value])
    except RemoteError:
        pass


def test_a_revoked_peer_is_refused_until_its_time() -> None:
    trust = Trust(run="r", manifest_hash=b"", authorities=frozenset({AUTHORITY.peer_id}))
    certificate = issue(
        AUTHORITY, run="r", account="a", peer_id=NODE.peer_id, stage=0, issued=0.0, expires=100.0
    )
    assert trust.check(certificate, NODE.peer_id, 10.0).stage == 0
    trust.revocations.replace(AUTHORITY.peer_id, 9.0, {NODE.peer_id: Revoked(50.0, "sends nonsense")})
    with pytest.raises(Refused, match="sends nonsense") as refused:
        trust.check(certificate, NODE.peer_id, 10.0)
    assert refused.value.code == "revoked"
    assert trust.check(certificate, NODE.peer_id, 51.0).stage == 0


def test_an_older_list_changes_nothing_and_authorities_have_their_own() -> None:
    lists, other = Revocations(), Identity.generate().peer_id
    assert lists.replace(AUTHORITY.peer_id, 9.0, {NODE.peer_id: Revoked(50.0, "x")})
    assert not lists.replace(AUTHORITY.peer_id, 8.0, {})
    assert lists.replace(other, 1.0, {})
    assert lists.find(NODE.peer_id, 10.0) is not None
    assert lists.replace(AUTHORITY.peer_id, 10.0, {})
    assert lists.find(NODE.peer_id, 10.0) is None
    with pytest.raises(RemoteError):
        lists.replace(AUTHORITY.peer_id, 11.0, {PeerId(str(n)): Revoked(1.0, "") for n in range(4097)})


def test_listed_nodes_are_the_manifests_business() -> None:
    standing = {NODE.peer_id: "trainer"}
    trust = Trust(run="r", manifest_hash=b"", authorities=frozenset({AUTHORITY.peer_id}), standing=standing)
    trust.revocations.replace(AUTHORITY.peer_id, 9.0, {NODE.peer_id: Revoked(50.0, "x")})
    assert trust.check(None, NODE.peer_id, 10.0).role == "trainer"
