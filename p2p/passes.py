"""Guest passes: an authority's word that a node which waits in the queue may download one stage's state.

A pass is no certificate: it is signed under a domain of its own and shown in one place, the first message of
``/agora/state/1``. It names run, peer and stage, holds for ``LIFE_S`` at most, and makes nobody a member.

Encoding: msgpack of ``[1, run, peer_id, stage, expires, authority, signature]``; the signature covers the
list without its last element, domain ``pass``. Limit: ``PASS_LIMIT`` bytes.
"""

from __future__ import annotations

import math
from typing import Any, Final, Self, cast

import attrs
import msgpack

from p2p.errors import Refused, RemoteError
from p2p.identity import Identity, PeerId, verify
from p2p.membership import CLOCK_SKEW_S, NAME_LIMIT, Trust

PASS_LIMIT: Final = 512
LIFE_S: Final = 900.0
"""Long enough to begin a download; one that has begun may take longer."""
DOMAIN: Final = "pass"
_VERSION: Final = 1
_FIELDS: Final = 7


@attrs.frozen(kw_only=True)
class Pass:
    """See the module's head."""

    run: str
    peer_id: PeerId
    stage: int
    expires: float
    """Unix time."""
    authority: PeerId
    signature: bytes = attrs.field(default=b"", repr=False)

    def signed(self, identity: Identity) -> Self:
        """The same with the authority's signature."""
        return attrs.evolve(self, signature=identity.sign(DOMAIN, _pack(self._statement())))

    def encode(self) -> bytes:
        """What travels."""
        return _pack([*self._statement(), self.signature])

    def _statement(self) -> list[Any]:
        return [_VERSION, self.run, self.peer_id, self.stage, self.expires, self.authority]

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """``RemoteError`` if it is anything but a canonical pass; the signature is not judged here."""
        if len(data) > PASS_LIMIT:
            raise RemoteError(f"a pass of {len(data)} bytes; the limit is {PASS_LIMIT}")
        try:
            row = msgpack.unpackb(data, raw=False, max_map_len=0, max_array_len=_FIELDS)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise RemoteError("a pass that is not msgpack") from error
        if not isinstance(row, list) or len(row) != _FIELDS or row[0] != _VERSION:
            raise RemoteError(f"a pass that is not a version {_VERSION} list of {_FIELDS} fields")
        _version, run, peer_id, stage, expires, authority, signature = row
        well_formed = (
            all(isinstance(text, str) and 0 < len(text) <= NAME_LIMIT for text in (run, peer_id, authority))
            and type(stage) is int
            and 0 <= stage < 1 << 16
            and type(expires) is float
            and math.isfinite(expires)
            and isinstance(signature, bytes)
            and len(signature) == 64
        )
        if not well_formed:
            raise RemoteError("a pass with a field out of its bounds")
        found = cls(
            run=run,
            peer_id=PeerId(peer_id),
            stage=stage,
            expires=expires,
            authority=PeerId(authority),
            signature=signature,
        )
        if found.encode() != data:
            raise RemoteError("a pass that is not in canonical form")
        return found


def check(data: bytes, trust: Trust, peer: PeerId, stage: int, now: float) -> None:
    """Raise ``Refused`` unless ``peer`` may download the state of ``stage`` with this pass."""
    try:
        shown = Pass.decode(data)
    except RemoteError as error:
        raise Refused("bad_signature", f"the pass is damaged: {error}") from error
    if shown.run != trust.run:
        raise Refused("wrong_run", f"the pass is for run {shown.run!r}, not {trust.run!r}")
    if shown.peer_id != peer:
        raise Refused("wrong_key", f"the pass belongs to {shown.peer_id}, not to {peer}")
    if shown.stage != stage:
        raise Refused("wrong_stage", f"the pass is for stage {shown.stage}, not {stage}")
    if shown.authority not in trust.authorities:
        raise Refused("unknown_authority", f"{shown.authority} is not an authority of run {trust.run!r}")
    if not verify(shown.authority, DOMAIN, _pack(shown._statement()), shown.signature):
        raise Refused("bad_signature", "the pass's signature does not match its content")
    trust.revocations.check(peer, now)
    if now > shown.expires:
        raise Refused("certificate_expired", f"the pass ran out {now - shown.expires:.0f} s ago")
    if shown.expires > now + LIFE_S + CLOCK_SKEW_S:
        raise Refused("not_yet_valid", "the pass would hold for longer than one does; compare the clocks")


def _pack(row: list[Any]) -> bytes:
    return cast(bytes, msgpack.packb(row, use_bin_type=True))
