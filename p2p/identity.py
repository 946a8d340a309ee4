"""Who a peer is: an Ed25519 key, the peer id that contains it, signatures by it.

A peer id is the base58 text of an identity multihash over the protobuf public key (libp2p peer-ids
specification), 52 characters starting with ``12D3Koo``; so the key is read off the id and a
signature needs no directory. Everything of ours is signed under a domain,
``b"agora:" + domain + b"\\0" + data``, so that a signature made for one purpose is none for another.
Only ``sign_libp2p`` signs foreign bytes, for the Noise handshake, whose own prefix is the domain.

The key file is libp2p's protobuf ``PrivateKey`` (what other implementations write), mode 0600.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NewType, Self, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2p import base58, protobuf
from p2p.errors import LocalError, RemoteError
from p2p.files import read_small

PeerId = NewType("PeerId", str)

ED25519 = 1
"""libp2p's KeyType number."""

KEY_FILE_LIMIT = 4096
_MULTIHASH_PREFIX = b"\x00\x24"  # identity "hash" of 36 bytes
_CID_PREFIX = b"\x01\x72"  # CID version 1, content type libp2p-key
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_CID_BASES = {"b": _BASE32, "k": "0123456789abcdefghijklmnopqrstuvwxyz", "z": base58.ALPHABET}
_KEY_PREFIX = protobuf.field(1, ED25519) + b"\x12\x20"  # key type, then 32 bytes of key


def peer_id_of(public_key: bytes) -> PeerId:
    """Peer id of a raw Ed25519 public key."""
    return PeerId(base58.encode(_MULTIHASH_PREFIX + _KEY_PREFIX + public_key))


@lru_cache(maxsize=4096)
def public_key_of(peer_id: PeerId) -> bytes:
    """Raw public key inside a peer id; RemoteError when it is not an Ed25519 peer id."""
    data = base58.decode(peer_id)
    prefix = _MULTIHASH_PREFIX + _KEY_PREFIX
    if len(data) != len(prefix) + 32 or not data.startswith(prefix):
        raise RemoteError(f"{peer_id!r} is not an Ed25519 peer id")
    return data[len(prefix) :]


def parse_peer_id(text: str) -> PeerId:
    """Peer id from any of its text forms: base58, or a CIDv1 in base32, 36 or 58 (``b``, ``k``, ``z``).

    RemoteError when it is none, or holds no Ed25519 key (libp2p peer-ids specification, "Decoding").
    """
    digits = _CID_BASES.get(text[:1])
    if digits is None or len(text) > base58.MAX_LENGTH:
        peer_id = PeerId(text)
        public_key_of(peer_id)
        return peer_id
    number = 0
    for character in text[1:]:
        value = digits.find(character)
        if value < 0:
            raise RemoteError(f"{text!r} is not a peer id: {character!r} does not belong to its base")
        number = number * len(digits) + value
    if digits is _BASE32:
        number >>= 5 * len(text[1:]) % 8  # what fills up the last character
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    if not data.startswith(_CID_PREFIX):
        raise RemoteError(f"{text!r} is a content id, but not of a libp2p key")
    return peer_id_from_bytes(data[len(_CID_PREFIX) :])


def peer_id_bytes(peer_id: PeerId) -> bytes:
    """The multihash, the binary form of a peer id."""
    return _MULTIHASH_PREFIX + _KEY_PREFIX + public_key_of(peer_id)


def peer_id_from_bytes(data: bytes) -> PeerId:
    """Peer id of a multihash; RemoteError when it holds no Ed25519 key."""
    peer_id = PeerId(base58.encode(data[:64]))
    public_key_of(peer_id)
    return peer_id


def encode_public_key(public_key: bytes) -> bytes:
    """libp2p's protobuf ``PublicKey``."""
    return _KEY_PREFIX + public_key


def decode_public_key(data: bytes) -> bytes:
    """Raw key of a protobuf ``PublicKey``; RemoteError for other key types."""
    found = protobuf.last_fields(data)
    key = found.get(2)
    if found.get(1) != ED25519 or not isinstance(key, bytes) or len(key) != 32:
        raise RemoteError("the peer's identity key is not an Ed25519 key")
    return key


@lru_cache(maxsize=1024)
def _verifier(public_key: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public_key)


def verify_libp2p(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` over exactly ``data`` was made by ``public_key``."""
    try:
        _verifier(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def verify(peer_id: PeerId, domain: str, data: bytes, signature: bytes) -> bool:
    """Whether ``peer_id`` signed ``data`` under ``domain``; False for a malformed id too."""
    try:
        key = public_key_of(peer_id)
    except RemoteError:
        return False
    return verify_libp2p(key, _signed_bytes(domain, data), signature)


def short(peer_id: PeerId) -> str:
    """Last six characters: for people, never for programs."""
    return peer_id[-6:]


def _signed_bytes(domain: str, data: bytes) -> bytes:
    return b"agora:" + domain.encode() + b"\0" + data


@final
class Identity:
    """A private key and what follows from it."""

    __slots__ = ("_key", "_seed", "peer_id", "public_key")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise LocalError(f"an Ed25519 seed has 32 bytes, not {len(seed)}")
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id}>"  # never the key

    def sign(self, domain: str, data: bytes) -> bytes:
        """Signature for a purpose of ours."""
        return self._key.sign(_signed_bytes(domain, data))

    def sign_libp2p(self, data: bytes) -> bytes:
        """Signature over foreign bytes that carry libp2p's own prefix."""
        return self._key.sign(data)

    @classmethod
    def generate(cls, seed: bytes | None = None) -> Self:
        """A new key; with ``seed`` (32 bytes) always the same one."""
        return cls(os.urandom(32) if seed is None else seed)

    def encode(self) -> bytes:
        """libp2p's protobuf ``PrivateKey``: seed and public key behind each other."""
        return protobuf.field(1, ED25519) + protobuf.field(2, self._seed + self.public_key)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Inverse of ``encode``; LocalError, since a key is always our own."""
        try:
            found = protobuf.last_fields(data)
        except RemoteError as error:
            raise LocalError(f"this is not a libp2p private key ({error})") from error
        key = found.get(2)
        if found.get(1) != ED25519 or not isinstance(key, bytes) or len(key) not in (32, 64):
            raise LocalError("this is not an Ed25519 private key in libp2p's form")
        identity = cls(key[:32])
        if key[32:] not in (b"", identity.public_key):
            raise LocalError("the public half of the key does not belong to its private half")
        return identity

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Identity from a key file; LocalError with one sentence when that cannot be."""
        path = Path(path)
        try:
            data = read_small(path, KEY_FILE_LIMIT + 1)
        except OSError as error:
            raise LocalError(f"cannot read the key file {path}: {error.strerror or error}") from error
        try:
            if len(data) > KEY_FILE_LIMIT:
                raise LocalError("it is too long")
            return cls.decode(data)
        except LocalError as error:
            raise LocalError(
                f"the key file {path} is damaged: {error}; put a copy of it back, or remove it for a new one"
            ) from error

    def save(self, path: Path | str) -> None:
        """Write the key file, readable by the owner only; an existing file is never overwritten."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written aside and linked: no reader ever sees half a key, no second writer wins silently.
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(self.encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.link(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise LocalError(f"cannot write the key file {path}: {error.strerror or error}") from error

    @classmethod
    def load_or_create(cls, path: Path | str) -> Self:
        """The identity of ``path``, made and saved where there is none yet."""
        path = Path(path)
        if not path.exists():
            cls.generate().save(path)
        return cls.load(path)
