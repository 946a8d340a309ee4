"""Peer ids, signatures and key files, against vectors of other implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2p import base58
from p2p.errors import LocalError, RemoteError
from p2p.identity import Identity, PeerId, decode_public_key, public_key_of, short, verify

VECTORS = json.loads((Path(__file__).parent / "vectors" / "noise.json").read_text())
# libp2p/specs peer-ids: the Ed25519 key of the test vectors.
SPEC_PRIVATE = bytes.fromhex(
    "08011240"
    "7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
SPEC_PUBLIC = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


@pytest.mark.parametrize("side", ["initiator", "responder"])
def test_vectors_of_py_libp2p(side: str) -> None:
    vector = VECTORS[side]
    identity = Identity.generate(bytes.fromhex(vector["identity"]))
    assert identity.peer_id == vector["peer_id"]
    # py-libp2p leaves the public half out, which the specification does not; both are read.
    assert Identity.decode(bytes.fromhex(vector["private_key"])).peer_id == identity.peer_id
    assert decode_public_key(bytes.fromhex(vector["public_key"])) == identity.public_key
    assert public_key_of(identity.peer_id) == identity.public_key


def test_key_of_the_specification() -> None:
    identity = Identity.decode(SPEC_PRIVATE)
    assert identity.encode() == SPEC_PRIVATE
    assert decode_public_key(SPEC_PUBLIC) == identity.public_key
    assert identity.peer_id.startswith("12D3Koo")
    assert short(identity.peer_id) == identity.peer_id[-6:]


def test_signature_belongs_to_domain_key_and_data() -> None:
    identity, other = Identity.generate(bytes(32)), Identity.generate(b"\1" * 32)
    signature = identity.sign("clock", b"7")
    assert verify(identity.peer_id, "clock", b"7", signature)
    assert not verify(identity.peer_id, "record", b"7", signature)
    assert not verify(identity.peer_id, "clock", b"8", signature)
    assert not verify(other.peer_id, "clock", b"7", signature)
    assert not verify(identity.peer_id, "clock", b"7", signature[:-1])
    assert not verify(PeerId("nonsense"), "clock", b"7", signature)


def test_key_file_is_private_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    identity = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(path).peer_id == identity.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]
    with pytest.raises(LocalError, match="cannot write the key file"):
        Identity.generate().save(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 68,
        b"not a key at all",
        SPEC_PRIVATE[:-1],
        SPEC_PRIVATE[:-1] + b"\0",
        b"\x08\x00" + SPEC_PRIVATE[2:],
        SPEC_PRIVATE * 100,
    ],
)
def test_damaged_key_file_is_one_clear_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(LocalError, match=r"the key file .* is damaged: ") as caught:
        Identity.load(path)
    assert "\n" not in str(caught.value)


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"cannot read the key file .*No such file"):
        Identity.load(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "0", "12D3KooW", "l" * 52, "1" * 500, "Qm" + "1" * 44])
def test_peer_ids_that_are_none(text: str) -> None:
    with pytest.raises(RemoteError):
        public_key_of(PeerId(text))


def test_base58_vectors() -> None:
    # from draft-msporny-base58-03
    assert base58.encode(b"Hello World!") == "2NEpo7TZRRrLZSi2U"
    assert base58.encode(bytes.fromhex("0000287fb4cd")) == "11233QC4"
    assert base58.decode("11233QC4").hex() == "0000287fb4cd"
