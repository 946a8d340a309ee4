"""Certificates: one spelling, one verdict, and every way of being refused."""

from __future__ import annotations

import math

import attrs
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import LocalError, Refused, RemoteError
from p2p.identity import Identity
from p2p.membership import CERTIFICATE_LIMIT, Certificate, Membership, Trust, issue

NOW = 1_800_000_000.0
AUTHORITY = Identity.generate(b"a" * 32)
STRANGER = Identity.generate(b"s" * 32)
WORKER = Identity.generate(b"w" * 32)
SEED = Identity.generate(b"e" * 32)
TRUST = Trust(
    run="run-1",
    manifest_hash=b"\0" * 32,
    authorities=frozenset({AUTHORITY.peer_id}),
    standing={SEED.peer_id: "seed"},
)


def certificate(identity: Identity = AUTHORITY, **changes: object) -> Certificate:
    fields: dict[str, object] = {
        "run": "run-1",
        "account": "alice",
        "peer_id": WORKER.peer_id,
        "stage": 2,
        "issued": NOW,
        "expires": NOW + 3600,
        **changes,
    }
    return issue(identity, **fields)  # type: ignore[arg-type]


def code_of(cert: Certificate | None, now: float = NOW, peer: Identity = WORKER) -> str:
    with pytest.raises(Refused) as refusal:
        TRUST.check(cert, peer.peer_id, now)
    return refusal.value.code


def test_a_certificate_survives_the_wire_and_makes_a_member() -> None:
    member = TRUST.check_encoded(certificate().encode(), WORKER.peer_id, NOW)
    assert (member.role, member.stage, member.account) == ("worker", 2, "alice")
    assert member.expires == NOW + 3600


@pytest.mark.parametrize("stage", [None, 0, 65535])
def test_stage_round_trips(stage: int | None) -> None:
    original = certificate(stage=stage)
    assert Certificate.decode(original.encode()) == original


def test_listed_nodes_need_no_certificate_and_never_expire() -> None:
    member = TRUST.check(None, SEED.peer_id, math.inf)
    assert member.role == "seed"
    member.require_valid(math.inf)


def test_refusals_have_codes() -> None:
    assert code_of(None) == "no_certificate"
    assert code_of(certificate(run="run-2")) == "wrong_run"
    assert code_of(certificate(), peer=STRANGER) == "wrong_key"
    assert code_of(certificate(STRANGER)) == "unknown_authority"
    assert code_of(certificate(), now=NOW + 3601) == "certificate_expired"
    assert code_of(certificate(issued=NOW + 120)) == "not_yet_valid"
    for change in ({"stage": 1}, {"role": "trainer"}, {"account": "bob"}, {"expires": NOW + 1e9}):
        assert code_of(attrs.evolve(certificate(), **change)) == "bad_signature"


def test_a_signature_for_another_purpose_is_none() -> None:
    genuine = certificate()
    statement = msgpack.packb(msgpack.unpackb(genuine.encode())[:-1])
    forged = attrs.evolve(genuine, signature=AUTHORITY.sign("record", statement))
    assert code_of(forged) == "bad_signature"


def test_grace_keeps_a_member_and_ends() -> None:
    cert = certificate(grace_until=NOW + 5000)
    member = TRUST.check(cert, WORKER.peer_id, NOW + 4000)
    member.require_valid(NOW + 4999)
    with pytest.raises(Refused, match="certificate_expired"):
        member.require_valid(NOW + 5001)
    assert code_of(cert, now=NOW + 5001) == "certificate_expired"


def test_damaged_bytes_are_a_typed_refusal_at_the_gate() -> None:
    membership = Membership(TRUST, lambda: None, lambda: NOW)
    with pytest.raises(Refused, match="bad_signature"):
        membership.admit(WORKER.peer_id, b"\x91\x01")
    assert membership.admit(SEED.peer_id, b"nonsense that a listed node does not need").role == "seed"


def test_two_spellings_of_one_certificate_are_not_both_good() -> None:
    data = certificate(stage=2).encode()
    longer = data.replace(b"\x02\xcb", b"\xcc\x02\xcb", 1)  # stage 2 as uint8 instead of fixint
    assert longer != data
    with pytest.raises(RemoteError, match="canonical"):
        Certificate.decode(longer)


@pytest.mark.parametrize("field", range(11))
@pytest.mark.parametrize("value", [None, -1, True, "", "x" * 65, b"x" * 65, math.nan, math.inf, [], 1 << 40])
def test_no_field_takes_just_anything(field: int, value: object) -> None:
    row = msgpack.unpackb(certificate().encode())
    if field == 5 and value is None:
        pytest.skip("a certificate without a stage is one")
    row[field] = value
    with pytest.raises(RemoteError):
        Certificate.decode(msgpack.packb(row))


@given(st.binary(max_size=300))
def test_decode_never_fails_in_another_way(data: bytes) -> None:
    with pytest.raises(RemoteError):
        Certificate.decode(data)


@given(st.integers(0, 400), st.integers(0, 255))
def test_no_changed_byte_is_accepted(position: int, value: int) -> None:
    data = bytearray(certificate().encode())
    position %= len(data)
    if data[position] == value:
        return
    data[position] = value
    with pytest.raises(Refused):
        TRUST.check_encoded(bytes(data), WORKER.peer_id, NOW)


def test_limits() -> None:
    assert len(certificate(run="r" * 64, account="a" * 64).encode()) < CERTIFICATE_LIMIT
    with pytest.raises(RemoteError, match="limit"):
        Certificate.decode(b"x" * (CERTIFICATE_LIMIT + 1))
    with pytest.raises(LocalError, match="account"):
        certificate(account="a" * 65)
    with pytest.raises(LocalError, match="role"):
        certificate(role="king")


def test_a_dropped_authority_is_believed_for_an_overlap_and_a_revoked_one_is_not() -> None:
    other = Identity.generate(b"o" * 32)
    trust = attrs.evolve(TRUST)
    newer = attrs.evolve(TRUST, manifest_hash=b"\1" * 32, authorities=frozenset({other.peer_id}))
    own = certificate()

    def judged(at: float) -> str | float:
        try:
            return trust.check(own, WORKER.peer_id, at).expires
        except Refused as refusal:
            return refusal.code

    trust.renew(newer, NOW, 30.0)
    assert judged(NOW) == judged(NOW + 30) == NOW + 30
    assert judged(NOW + 30.1) == "unknown_authority"
    trust.renew(attrs.evolve(newer, manifest_hash=b"\2" * 32), NOW + 20, 30.0)
    assert judged(NOW + 29) == NOW + 30, "a further manifest prolongs nothing"
    trust.renew(attrs.evolve(newer, revoked=frozenset({AUTHORITY.peer_id})), NOW + 25, 30.0)
    assert judged(NOW + 25) == "unknown_authority"
    trust.renew(TRUST, NOW + 26, 30.0)
    assert judged(NOW + 26) == NOW + 3600, "and back again"
    trust.renew(attrs.evolve(newer, revoked=frozenset({AUTHORITY.peer_id})), NOW + 27, 30.0)
    assert judged(NOW + 27) == "unknown_authority"
    stranger = certificate(STRANGER)
    with pytest.raises(Refused, match="not an authority"):
        trust.check(stranger, WORKER.peer_id, NOW)
