"""Noise_XX_25519_ChaChaPoly_SHA256 with libp2p's identity payload. Sans-IO.

Three messages prove both peer ids and give two ciphers:  -> e;  <- e, ee, s, es;  -> s, se.
The second and third carry the sender's identity key and its signature over the Noise static key.
``Handshake`` is the state machine: ``write`` and ``read`` alternate, then ``result``. Key material
is an argument, so that a simulation replays. On the wire every message, and later every record, is
a 2-byte big-endian length and at most 65,535 bytes; a record holds at most 65,519 of plaintext.
Peers that both compute AES in hardware may go on with AES-256-GCM (``Cipher.faster``), under another key.
Sources: noiseprotocol.org/noise.html (revision 34), github.com/libp2p/specs/tree/master/noise.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import final

import attrs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from p2p import protobuf
from p2p.errors import LocalError, RemoteError
from p2p.identity import (
    Identity,
    PeerId,
    decode_public_key,
    encode_public_key,
    peer_id_of,
    verify_libp2p,
)

PROTOCOL = "/noise"
NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
SIGNED_PREFIX = b"noise-libp2p-static-key:"
FASTER = b"agora aes-256-gcm"
MAX_RECORD = 65_535
TAG = 16
MAX_PLAINTEXT = MAX_RECORD - TAG
_NONCE = struct.Struct("<4xQ")


@final
class Cipher:
    """One direction of a secured connection: a key and a counter."""

    __slots__ = ("_aead", "_count", "_key")

    def __init__(self, key: bytes, suite: type[ChaCha20Poly1305 | AESGCM] = ChaCha20Poly1305) -> None:
        self._key = key
        self._aead = suite(key)
        self._count = 0

    def faster(self) -> Cipher:
        """What follows in this direction with AES-256-GCM; its key tells nothing of this one."""
        return Cipher(_hkdf(self._key, FASTER)[0], AESGCM)

    def _nonce(self) -> bytes:
        self._count += 1  # 2**64 records never happen: 10**6 a second last 500,000 years
        return _NONCE.pack(self._count - 1)

    def encrypt(self, plaintext: bytes, associated: bytes) -> bytes:
        return self._aead.encrypt(self._nonce(), plaintext, associated)

    def decrypt(self, ciphertext: bytes, associated: bytes) -> bytes:
        try:
            return self._aead.decrypt(self._nonce(), ciphertext, associated)
        except InvalidTag as error:
            raise RemoteError("a Noise message does not decrypt: wrong key or altered bytes") from error

    def encrypt_into(self, plaintext: memoryview, out: memoryview) -> None:
        """``out`` is 16 bytes longer than ``plaintext`` and does not overlap it."""
        self._aead.encrypt_into(self._nonce(), plaintext, None, out)

    def decrypt_into(self, ciphertext: memoryview, out: memoryview) -> None:
        """``out`` is 16 bytes shorter than ``ciphertext`` and does not overlap it."""
        try:
            self._aead.decrypt_into(self._nonce(), ciphertext, None, out)
        except InvalidTag as error:
            raise RemoteError("a Noise record does not decrypt: altered or lost bytes") from error


@attrs.frozen
class Secured:
    """What a finished handshake yields."""

    peer_id: PeerId
    sending: Cipher
    receiving: Cipher


def _hkdf(chaining_key: bytes, material: bytes) -> tuple[bytes, bytes]:
    temp = hmac.digest(chaining_key, material, "sha256")
    first = hmac.digest(temp, b"\x01", "sha256")
    return first, hmac.digest(temp, first + b"\x02", "sha256")


@final
class Handshake:
    """One side of the handshake. ``static`` and ``ephemeral`` are fresh 32-byte secrets."""

    def __init__(self, identity: Identity, *, initiator: bool, static: bytes, ephemeral: bytes) -> None:
        self._identity = identity
        self._initiator = initiator
        self._static = X25519PrivateKey.from_private_bytes(static)
        self._ephemeral = X25519PrivateKey.from_private_bytes(ephemeral)
        self._hash = NAME  # exactly 32 bytes, so the name itself starts the hash
        self._chaining_key = NAME
        self._cipher: Cipher | None = None
        self._remote_ephemeral = b""
        self._remote_static = b""
        self._remote_peer: PeerId | None = None
        self._messages = 0
        self._mix_hash(b"")  # the empty prologue

    @property
    def done(self) -> bool:
        return self._messages == 3

    @property
    def writes_next(self) -> bool:
        """Whether it is our turn."""
        return not self.done and (self._messages % 2 == 0) == self._initiator

    def write(self) -> bytes:
        """The next message of ours, without its length."""
        if not self.writes_next:
            raise LocalError("it is the peer's turn in the Noise handshake")
        self._messages += 1
        if self._messages == 1:
            public = self._ephemeral.public_key().public_bytes_raw()
            self._mix_hash(public)
            self._mix_hash(b"")  # empty payload, no key yet
            return public
        out = b""
        if self._messages == 2:
            out = self._ephemeral.public_key().public_bytes_raw()
            self._mix_hash(out)
            self._mix_dh(self._ephemeral, self._remote_ephemeral)
        static = self._static.public_key().public_bytes_raw()
        out += self._seal(static)
        self._mix_dh(self._static, self._remote_ephemeral)
        return out + self._seal(self._payload(static))

    def read(self, message: bytes) -> None:
        """The peer's next message; RemoteError when it proves nothing."""
        if self.done or self.writes_next:
            raise LocalError("it is our turn in the Noise handshake")
        self._messages += 1
        if self._messages == 1:
            if len(message) < 32:
                raise RemoteError("the first Noise message is too short")
            self._remote_ephemeral = message[:32]
            self._mix_hash(message[:32])
            self._mix_hash(message[32:])
            return
        if self._messages == 2:
            if len(message) < 32:
                raise RemoteError("the second Noise message is too short")
            self._remote_ephemeral, message = message[:32], message[32:]
            self._mix_hash(self._remote_ephemeral)
            self._mix_dh(self._ephemeral, self._remote_ephemeral)
        self._remote_static = self._open(message[: 32 + TAG])
        self._mix_dh(self._ephemeral, self._remote_static)
        self._remote_peer = self._check(self._open(message[32 + TAG :]))

    def result(self) -> Secured:
        """The peer and the ciphers, after three messages."""
        if not self.done or self._remote_peer is None:
            raise LocalError("the Noise handshake is not finished")
        first, second = (Cipher(key) for key in _hkdf(self._chaining_key, b""))
        if self._initiator:
            return Secured(self._remote_peer, sending=first, receiving=second)
        return Secured(self._remote_peer, sending=second, receiving=first)

    def _payload(self, static: bytes) -> bytes:
        signature = self._identity.sign_libp2p(SIGNED_PREFIX + static)
        return protobuf.field(1, encode_public_key(self._identity.public_key)) + protobuf.field(2, signature)

    def _check(self, payload: bytes) -> PeerId:
        found = protobuf.last_fields(payload)
        key, signature = found.get(1), found.get(2)
        if not isinstance(key, bytes) or not isinstance(signature, bytes):
            raise RemoteError("the peer's Noise payload has no identity")
        public_key = decode_public_key(key)
        if not verify_libp2p(public_key, SIGNED_PREFIX + self._remote_static, signature):
            raise RemoteError("the peer's identity did not sign its Noise key")
        return peer_id_of(public_key)

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix_dh(self, ours: X25519PrivateKey, theirs: bytes) -> None:
        try:
            secret = ours.exchange(X25519PublicKey.from_public_bytes(theirs))
        except ValueError as error:  # a point of low order gives an all-zero secret
            raise RemoteError("the peer's Noise key is not a usable point") from error
        self._chaining_key, key = _hkdf(self._chaining_key, secret)
        self._cipher = Cipher(key)

    def _seal(self, plaintext: bytes) -> bytes:
        assert self._cipher is not None
        sealed = self._cipher.encrypt(plaintext, self._hash)
        self._mix_hash(sealed)
        return sealed

    def _open(self, sealed: bytes) -> bytes:
        assert self._cipher is not None
        plaintext = self._cipher.decrypt(sealed, self._hash)
        self._mix_hash(sealed)
        return plaintext
