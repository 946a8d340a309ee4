"""Addresses that say how to reach a peer: ``/ip4/10.0.0.1/tcp/49200/p2p/12D3Koo…``.

A multiaddr is a list of (protocol, value) pairs with a text and a binary form (multiformats
specification). We read the protocols below, dial ``ip4|ip6|dns*`` + ``tcp``, and keep the others
verbatim so that a peer may announce more than we can use. Limits: 16 parts, 512 bytes.
"""

from __future__ import annotations

import base64
import ipaddress
from typing import Self, final

import attrs

from p2p import protobuf
from p2p.errors import RemoteError
from p2p.identity import PeerId, parse_peer_id, peer_id_bytes, peer_id_from_bytes

MAX_PARTS = 16
MAX_BYTES = 512
_TEXT_VALUE = -1  # the value is length-prefixed UTF-8 (names) or a multihash (p2p)

# name -> (code, value size in bytes; 0: no value)
_PROTOCOLS = {
    "ip4": (4, 4),
    "tcp": (6, 2),
    "ip6": (41, 16),
    "dns": (53, _TEXT_VALUE),
    "dns4": (54, _TEXT_VALUE),
    "dns6": (55, _TEXT_VALUE),
    "dnsaddr": (56, _TEXT_VALUE),
    "udp": (273, 2),
    "webrtc-direct": (280, 0),
    "webrtc": (281, 0),
    "p2p-circuit": (290, 0),
    "unix": (400, _TEXT_VALUE),
    "p2p": (421, _TEXT_VALUE),
    "https": (443, 0),
    "tls": (448, 0),
    "sni": (449, _TEXT_VALUE),
    "noise": (454, 0),
    "quic": (460, 0),
    "quic-v1": (461, 0),
    "webtransport": (465, 0),
    "certhash": (466, _TEXT_VALUE),
    "ws": (477, 0),
    "wss": (478, 0),
    "http": (480, 0),
}
_BY_CODE = {code: name for name, (code, _size) in _PROTOCOLS.items()}
_ALIASES = {"ipfs": "p2p"}
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")


@final
@attrs.frozen
class Multiaddr:
    """A checked multiaddr; equal addresses compare equal whatever their spelling was."""

    parts: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From text; RemoteError with a sentence when it is malformed."""
        if len(text) > MAX_BYTES or not text.startswith("/"):
            raise RemoteError(f"{text[:80]!r} is not a multiaddr: it must start with '/' and stay short")
        words = text.strip("/").split("/")
        parts: list[tuple[str, str]] = []
        position = 0
        while position < len(words):
            name = _ALIASES.get(words[position], words[position])
            position += 1
            if name not in _PROTOCOLS:
                raise RemoteError(f"{text!r}: {name!r} is not a multiaddr protocol that we know")
            value = ""
            if _PROTOCOLS[name][1] != 0:
                if position == len(words):
                    raise RemoteError(f"{text!r}: {name} needs a value")
                value = words[position]
                position += 1
            parts.append((name, _canonical(name, value)))
        return cls._checked(parts)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """From the binary form; RemoteError when it is malformed or has a protocol unknown to us."""
        if len(data) > MAX_BYTES:
            raise RemoteError("multiaddr is too long")
        parts: list[tuple[str, str]] = []
        offset = 0
        while offset < len(data):
            code, offset = protobuf.decode_varint(data, offset)
            name = _BY_CODE.get(code)
            if name is None:
                raise RemoteError(f"multiaddr protocol {code} is not one that we know")
            size = _PROTOCOLS[name][1]
            if size == _TEXT_VALUE:
                size, offset = protobuf.decode_varint(data, offset)
            if size > len(data) - offset:
                raise RemoteError("multiaddr is cut short")
            parts.append((name, _text(name, data[offset : offset + size])))
            offset += size
        return cls._checked(parts)

    @classmethod
    def _checked(cls, parts: list[tuple[str, str]]) -> Self:
        if not 1 <= len(parts) <= MAX_PARTS:
            raise RemoteError(f"a multiaddr has 1 to {MAX_PARTS} parts, not {len(parts)}")
        return cls(tuple(parts))

    @classmethod
    def tcp(cls, host: str, port: int) -> Self:
        """``/ip4|ip6|dns/host/tcp/port``."""
        try:
            kind = f"ip{ipaddress.ip_address(host).version}"
        except ValueError:
            kind = "dns"
        return cls((((kind, _canonical(kind, host))), ("tcp", str(port))))

    def encode(self) -> bytes:
        """The binary form."""
        out = bytearray()
        for name, value in self.parts:
            code, size = _PROTOCOLS[name]
            raw = _binary(name, value)
            out += protobuf.encode_varint(code)
            if size == _TEXT_VALUE:
                out += protobuf.encode_varint(len(raw))
            out += raw
        return bytes(out)

    def __str__(self) -> str:
        return "".join(f"/{name}/{value}" if value else f"/{name}" for name, value in self.parts)

    @property
    def peer_id(self) -> PeerId | None:
        """The peer that answers there, if the address says."""
        return next((PeerId(value) for name, value in reversed(self.parts) if name == "p2p"), None)

    @property
    def host(self) -> str | None:
        """IP address or name, where the address starts with one."""
        return self.parts[0][1] if self.parts[0][0] in _HOSTS else None

    @property
    def port(self) -> int | None:
        """TCP port of an address that TCP can dial, else None."""
        if self.host is None or len(self.parts) < 2 or self.parts[1][0] != "tcp":
            return None
        if any(name != "p2p" for name, _value in self.parts[2:]):
            return None  # a WebSocket or relayed address is not ours to dial
        return int(self.parts[1][1])

    def bare(self) -> Self:
        """Without the peer id."""
        parts = tuple(part for part in self.parts if part[0] != "p2p")
        return attrs.evolve(self, parts=parts) if parts else self

    def at(self, peer_id: PeerId) -> Self:
        """With this peer id at its end."""
        return attrs.evolve(self, parts=(*self.bare().parts, ("p2p", str(peer_id))))


def _canonical(name: str, value: str) -> str:
    return _text(name, _binary(name, value))


def _binary(name: str, value: str) -> bytes:
    try:
        if name in ("ip4", "ip6"):
            address = ipaddress.IPv4Address(value) if name == "ip4" else ipaddress.IPv6Address(value)
            return address.packed
        if name in ("tcp", "udp"):
            if not (value.isascii() and value.isdigit()):
                raise ValueError("not a number")
            return int(value).to_bytes(2, "big")
    except (ValueError, OverflowError) as error:
        raise RemoteError(f"{value!r} is not a value for /{name}") from error
    if name == "p2p":
        return peer_id_bytes(parse_peer_id(value))
    if name == "certhash":
        return _certificate_hash(value)
    if _PROTOCOLS[name][1] == _TEXT_VALUE and not value:
        raise RemoteError(f"/{name} needs a value")
    return value.encode()


def _certificate_hash(value: str) -> bytes:
    """Bytes of a multihash in multibase; others write base64url (``u``) alone."""
    try:
        if not value.startswith("u"):
            raise ValueError("not base64url")
        return base64.b64decode(value[1:] + "=" * (-len(value[1:]) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise RemoteError(f"{value!r} is not a value for /certhash") from error


def _text(name: str, data: bytes) -> str:
    if _PROTOCOLS[name][1] == _TEXT_VALUE and not data:
        raise RemoteError(f"/{name} needs a value")
    if name in ("ip4", "ip6"):
        return str(ipaddress.ip_address(data))
    if name in ("tcp", "udp"):
        return str(int.from_bytes(data, "big"))
    if name == "p2p":
        return peer_id_from_bytes(data)
    if name == "certhash":
        return "u" + base64.urlsafe_b64encode(data).decode().rstrip("=")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RemoteError(f"the value of /{name} is not text") from error
    if "/" in text or not text.isprintable():
        raise RemoteError(f"the value of /{name} has a character that it must not have")
    return text
