"""Records: signed, owned, bounded, and over when they are over."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import LocalError, Refused, RemoteError
from p2p.identity import Identity
from p2p.kad.record import (
    KEY_LIMIT,
    MAX_TTL_S,
    RECORD_LIMIT,
    VALUE_LIMIT,
    Record,
    Verifier,
    handed,
    received,
    relayed,
    seal,
)

ALICE = Identity.generate(b"a" * 32)
BOB = Identity.generate(b"b" * 32)
NOW = 1_700_000_000.0


def made(value: Any = None, *, ttl: float = 60.0, seq: int = 1, key: str = "stage/run/0") -> Record:
    return seal(ALICE, key, ALICE.peer_id, value, seq=seq, issued=NOW, ttl=ttl)


def resigned(identity: Identity, **changes: Any) -> bytes:
    """A record whose fields an attacker chose and signed with its own key."""
    fields = {
        "version": 1,
        "key": "stage/run/0",
        "subkey": identity.peer_id,
        "value": b"\xc0",
        "owner": identity.peer_id,
        "seq": 1,
        "issued": NOW,
        "expires": NOW + 60.0,
    } | changes
    statement = list(fields.values())
    signature = identity.sign("record", msgpack.packb(statement))
    packed: bytes = msgpack.packb([*statement, signature])
    return packed


def test_a_record_comes_back_as_it_was_and_is_verified_once() -> None:
    record = made({"step": 3, "addrs": ["x"], "raw": b"\x00"})
    verifier = Verifier()
    opened = verifier.open(record.wire)
    assert opened == record
    assert verifier.open(record.wire) is opened
    assert verifier.verified == 1


def test_every_changed_byte_is_noticed() -> None:
    wire = made("value").wire
    for position in range(len(wire)):
        damaged = bytearray(wire)
        damaged[position] ^= 1
        with pytest.raises(RemoteError):
            Verifier().open(bytes(damaged))


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_a_cut_or_padded_record_is_refused(cut: int) -> None:
    wire = made("value").wire
    with pytest.raises(RemoteError):
        Verifier().open(wire[:cut])
    with pytest.raises(RemoteError):
        Verifier().open(wire + b"\xc0")


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": True},
        {"key": ""},
        {"key": "k" * (KEY_LIMIT + 1)},
        {"key": b"stage"},
        {"subkey": ALICE.peer_id},  # signed by Bob
        {"subkey": ""},  # the key does not name Bob
        {"owner": ALICE.peer_id},
        {"owner": "12D3KooW"},
        {"value": b"x" * (VALUE_LIMIT + 1)},
        {"value": "text"},
        {"value": b"\xc1"},  # not msgpack inside
        {"seq": -1},
        {"seq": 1 << 63},
        {"seq": 1.0},
        {"expires": NOW},
        {"expires": NOW + MAX_TTL_S + 2},
        {"expires": float("nan")},
        {"issued": float("inf")},
        {"expires": int(NOW + 60)},
    ],
)
def test_fields_out_of_bounds_are_refused_however_well_signed(changes: dict[str, Any]) -> None:
    Verifier().open(resigned(BOB))
    with pytest.raises(RemoteError):
        Verifier().open(resigned(BOB, **changes))


@given(st.binary(max_size=RECORD_LIMIT + 10))
def test_noise_is_a_remote_error(noise: bytes) -> None:
    with pytest.raises(RemoteError):
        Verifier().open(noise)


def test_an_empty_subkey_belongs_to_whom_the_key_names() -> None:
    key = f"node/{ALICE.peer_id}"
    record = seal(ALICE, key, "", 1, seq=1, issued=NOW, ttl=1)
    assert Verifier().open(record.wire).subkey == ""
    with pytest.raises(LocalError, match="not ours"):
        seal(BOB, key, "", 1, seq=1, issued=NOW, ttl=1)


def test_local_misuse_is_a_sentence() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ttl": 0}, "lives"),
        ({"ttl": MAX_TTL_S + 1}, "lives"),
        ({"value": b"x" * VALUE_LIMIT}, "limit"),
        ({"value": object()}, "msgpack"),
        ({"key": ""}, "characters"),
    ]
    for arguments, match in cases:
        with pytest.raises(LocalError, match=match):
            made(**arguments)


def test_the_cache_is_bounded() -> None:
    verifier = Verifier(max_bytes=3 * RECORD_LIMIT)
    wires = [made(b"x" * 4000, seq=seq).wire for seq in range(5)]
    for wire in wires:
        verifier.open(wire)
    verifier.open(wires[-1])
    assert verifier.verified == 5
    verifier.open(wires[0])
    assert verifier.verified == 6


def test_the_end_is_exact_between_equal_clocks() -> None:
    record = made(ttl=10)
    assert received(record, NOW + 9.9, skew=0.5).expires == NOW + 10
    assert relayed(record, NOW + 9.9, remaining=0.2).expires == NOW + 10
    for now in (NOW + 10, NOW + 10.1, NOW + 1000):
        with pytest.raises(Refused) as refusal:
            received(record, now, skew=0.0)
        assert refusal.value.code == "expired"


def test_a_clock_that_is_off_costs_nobody_its_record_up_to_a_minute() -> None:
    behind = made(ttl=15)  # the owner's clock is 50 s behind ours
    ours = NOW + 50
    kept = received(behind, ours, skew=-50.0)
    assert kept.expires == ours + 15
    assert relayed(behind, ours + 1, kept.expires - ours - 1).expires == pytest.approx(ours + 15)
    with pytest.raises(Refused) as refusal:
        received(behind, NOW + 61, skew=-61.0)
    assert refusal.value.code == "clock_skew"


def test_nobody_can_claim_more_than_the_tolerated_skew_or_the_whole_life() -> None:
    short, long = made(ttl=10), made(ttl=100)
    assert relayed(long, NOW + 50, remaining=100.0).expires == NOW + 150
    assert relayed(short, NOW + 9, remaining=10.0).expires == pytest.approx(NOW + 19)
    for record, now, remaining, code in [
        (long, NOW + 70, 100.0, "clock_skew"),
        (long, NOW, 161.0, "clock_skew"),
        (long, NOW, 1e9, "clock_skew"),
        (long, NOW + 30, 104.0, "future"),
        (short, NOW, 70.0, "future"),
        (short, NOW + 71, 1.0, "clock_skew"),
        (short, NOW + 5, 0.0, "expired"),
        (short, NOW + 5, -30.0, "expired"),
    ]:
        with pytest.raises(Refused) as refusal:
            relayed(record, now, remaining)
        assert refusal.value.code == code


@pytest.mark.parametrize("skew", [0.0, 2.0, -50.0, 50.0])
def test_what_begins_later_is_refused_whatever_the_senders_clock(skew: float) -> None:
    later = seal(ALICE, "k", ALICE.peer_id, 1, seq=1, issued=NOW + skew + 8.0, ttl=10.0)
    with pytest.raises(Refused) as refusal:
        received(later, NOW, skew)
    assert refusal.value.code == "future"
    received(seal(ALICE, "k", ALICE.peer_id, 1, seq=1, issued=NOW + skew, ttl=10.0), NOW, skew)


def test_a_hand_over_stretches_no_life_and_may_shorten_one() -> None:
    record = made(ttl=60)
    assert handed(record, NOW + 20, remaining=40.0).expires == NOW + 60
    assert handed(record, NOW + 20, remaining=60.0).expires == NOW + 60
    assert handed(record, NOW + 20, remaining=15.0).expires == NOW + 35
    with pytest.raises(Refused) as refusal:
        handed(record, NOW + 61, remaining=30.0)
    assert refusal.value.code == "expired"
