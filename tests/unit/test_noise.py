"""The handshake's bytes equal another implementation's, and nothing altered gets through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2p.errors import LocalError, RemoteError
from p2p.identity import Identity
from p2p.noise import Handshake

VECTORS = json.loads((Path(__file__).parent / "vectors" / "noise.json").read_text())
MESSAGES = [bytes.fromhex(message) for message in VECTORS["messages"]]


def side(name: str) -> Handshake:
    keys = VECTORS[name]
    return Handshake(
        Identity.generate(bytes.fromhex(keys["identity"])),
        initiator=name == "initiator",
        static=bytes.fromhex(keys["static"]),
        ephemeral=bytes.fromhex(keys["ephemeral"]),
    )


def finished() -> tuple[Handshake, Handshake]:
    one, two = side("initiator"), side("responder")
    two.read(one.write())
    one.read(two.write())
    two.read(one.write())
    return one, two


def test_bytes_are_the_vectors() -> None:
    one, two = side("initiator"), side("responder")
    assert one.writes_next
    assert not two.writes_next
    for writer, reader, expected in ((one, two, 0), (two, one, 1), (one, two, 2)):
        message = writer.write()
        assert message == MESSAGES[expected]
        reader.read(message)
    initiator, responder = one.result(), two.result()
    assert responder.peer_id == VECTORS["initiator"]["peer_id"]
    assert initiator.peer_id == VECTORS["responder"]["peer_id"]
    for plaintext, record in zip((b"first", b"second" * 100), VECTORS["initiator_records"], strict=True):
        assert initiator.sending.encrypt(plaintext, b"").hex() == record
    (back,) = VECTORS["responder_records"]
    assert initiator.receiving.decrypt(bytes.fromhex(back), b"") == b"back"


def test_buffers_carry_the_same_bytes() -> None:
    one, two = finished()
    sending, receiving = one.result().sending, two.result().receiving
    for size in (0, 1, 65_519):
        plain = bytes(range(256)) * 256
        sealed, opened = bytearray(size + 16), bytearray(size)
        sending.encrypt_into(memoryview(plain)[:size], memoryview(sealed))
        receiving.decrypt_into(memoryview(sealed), memoryview(opened))
        assert opened == plain[:size]


def test_the_faster_cipher_has_a_key_of_its_own() -> None:
    one, two = finished()
    sending, receiving = one.result().sending, two.result().receiving
    faster, read = sending.faster(), receiving.faster()
    sealed = faster.encrypt(b"plain", b"")
    assert read.decrypt(sealed, b"") == b"plain"
    assert sealed != sending.encrypt(b"plain", b"")
    with pytest.raises(RemoteError):
        receiving.decrypt(sealed, b"")
    with pytest.raises(RemoteError):
        read.decrypt(sealed, b"")  # the same record again


@pytest.mark.parametrize("number", [1, 2])
def test_every_altered_byte_is_noticed(number: int) -> None:
    message = MESSAGES[number]
    for position in range(0, len(message), 7):
        one, two = side("initiator"), side("responder")
        two.read(one.write())
        if number == 2:
            one.read(two.write())
            one.write()
        altered = bytearray(message)
        altered[position] ^= 1
        if number == 1:
            two.write()
        with pytest.raises(RemoteError):
            (one if number == 1 else two).read(bytes(altered))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_cut_is_noticed(number: int) -> None:
    for size in (0, 1, 31, 32, 47, 48, 79, 80, 95, 96, len(MESSAGES[number]) - 1):
        if size >= len(MESSAGES[number]):
            continue
        one, two = side("initiator"), side("responder")
        if number > 0:
            two.read(one.write())
            two.write()
        if number == 2:
            one.read(MESSAGES[1])
        with pytest.raises(RemoteError):
            (one if number == 1 else two).read(MESSAGES[number][:size])


def test_low_order_point_is_refused() -> None:
    two = side("responder")
    two.read(bytes(32))
    with pytest.raises(RemoteError, match="usable point"):
        two.write()


def test_static_key_of_another_identity_is_refused() -> None:
    class Thief(Identity):  # type: ignore[misc]
        """Shows a key that is not its own."""

    thief = Thief(bytes(32))
    thief.public_key = Identity.generate(b"\2" * 32).public_key
    one = Handshake(thief, initiator=True, static=b"\3" * 32, ephemeral=b"\4" * 32)
    two = side("responder")
    two.read(one.write())
    one.read(two.write())
    with pytest.raises(RemoteError, match="did not sign"):
        two.read(one.write())


def test_turns_are_kept() -> None:
    one = side("initiator")
    with pytest.raises(LocalError):
        one.read(MESSAGES[1])
    one.write()
    with pytest.raises(LocalError):
        one.write()
    with pytest.raises(LocalError):
        one.result()
