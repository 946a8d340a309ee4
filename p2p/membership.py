"""Who may speak: certificates of a run's authorities, and the run's listed nodes.

Theory of operation. Noise proves which key a peer holds; this module decides what that key may do. A
*certificate* is a statement signed by an authority of the run: "in this run, this peer id acts for
this account, in this role and stage, until then". ``Trust`` is what one node knows from the
operator-signed manifest: the run id, the manifest's hash, the authorities' keys, and the *standing*
of seeds, trainers and authorities, which are members by being listed and so need no certificate
(start order is free). ``Trust.check`` turns a peer id and what it presented into a ``Member`` or
raises ``Refused``. Nothing here does IO; ``now`` is an argument (unix seconds).

Encoding: msgpack of a list of fixed order,
``[1, run, account, peer_id, role, stage|nil, issued, expires, grace_until, authority, signature]``.
The signature covers the same list without its last element, domain ``certificate``. Times are
float64. A list that does not encode back to the same bytes is refused, so that one statement has one
spelling.

Expiry: a certificate holds until ``expires``; until ``grace_until`` (equal to ``expires`` where no
grace was given) it is still honoured, so that a run outlives an absence of its authorities.

A newer manifest may drop an authority. Its certificates are honoured for a short overlap more, in which their
holders renew at another, unless the manifest says that its word counts for nothing (``revoked``).

Limits: 1 KiB a certificate, 64 characters for run and account, clocks may differ by 60 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, cast, final

import attrs
import msgpack

from p2p.errors import LocalError, Refused, RemoteError
from p2p.identity import Identity, PeerId, verify

ROLES: Final = ("seed", "worker", "trainer", "authority")
CERTIFICATE_LIMIT: Final = 1024
"""Bytes of an encoded certificate."""
NAME_LIMIT: Final = 64
"""Characters of a run id or an account name."""
CLOCK_SKEW_S: Final = 60.0
"""A certificate from an authority whose clock is this much ahead of ours is still believed."""

_VERSION: Final = 1
_DOMAIN: Final = "certificate"
_FIELDS: Final = 11


@attrs.frozen(kw_only=True)
class Certificate:
    """An authority's signed word that ``peer_id`` may take part in ``run``."""

    run: str
    account: str
    peer_id: PeerId
    role: str
    stage: int | None
    issued: float
    """Unix time, as the two below."""
    expires: float
    grace_until: float
    authority: PeerId
    signature: bytes = attrs.field(repr=False)

    def encode(self) -> bytes:
        """The canonical bytes that travel in hello and in DHT records."""
        return _pack([*self._statement(), self.signature])

    def _statement(self) -> list[Any]:
        return [
            _VERSION,
            self.run,
            self.account,
            self.peer_id,
            self.role,
            self.stage,
            self.issued,
            self.expires,
            self.grace_until,
            self.authority,
        ]

    def signature_holds(self) -> bool:
        """Whether ``authority`` really signed this; costs one Ed25519 verification."""
        return verify(self.authority, _DOMAIN, _pack(self._statement()), self.signature)

    @classmethod
    def decode(cls, data: bytes) -> Certificate:
        """Read what a peer presented; ``RemoteError`` if it is anything but a canonical certificate.

        The signature is not judged here.
        """
        if len(data) > CERTIFICATE_LIMIT:
            raise RemoteError(f"a certificate of {len(data)} bytes; the limit is {CERTIFICATE_LIMIT}")
        try:
            row = msgpack.unpackb(data, raw=False, max_map_len=0, max_array_len=_FIELDS)
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise RemoteError("a certificate that is not msgpack") from error
        if not isinstance(row, list) or len(row) != _FIELDS or row[0] != _VERSION:
            raise RemoteError(f"a certificate that is not a version {_VERSION} list of {_FIELDS} fields")
        _version, run, account, peer_id, role, stage, issued, expires, grace, authority, signature = row
        texts = (run, account, peer_id, role, authority)
        times = (issued, expires, grace)
        well_formed = (
            all(isinstance(text, str) and 0 < len(text) <= NAME_LIMIT for text in texts)
            and role in ROLES
            and (stage is None or (type(stage) is int and 0 <= stage < 1 << 16))
            and all(type(time) is float and math.isfinite(time) for time in times)
            and isinstance(signature, bytes)
            and len(signature) == 64
        )
        if not well_formed:
            raise RemoteError("a certificate with a field out of its bounds")
        certificate = cls(
            run=run,
            account=account,
            peer_id=PeerId(peer_id),
            role=role,
            stage=stage,
            issued=issued,
            expires=expires,
            grace_until=grace,
            authority=PeerId(authority),
            signature=signature,
        )
        if certificate.encode() != data:
            raise RemoteError("a certificate that is not in canonical form")
        return certificate


def issue(
    identity: Identity,
    *,
    run: str,
    account: str,
    peer_id: PeerId,
    role: str = "worker",
    stage: int | None = None,
    issued: float,
    expires: float,
    grace_until: float | None = None,
) -> Certificate:
    """Sign a certificate with the authority's ``identity``; no grace unless it is given."""
    if role not in ROLES:
        raise LocalError(f"no such role: {role!r}; roles are {', '.join(ROLES)}")
    for what, text in (("run id", run), ("account", account)):
        if not 0 < len(text) <= NAME_LIMIT:
            raise LocalError(f"the {what} must have 1 to {NAME_LIMIT} characters, not {len(text)}")
    unsigned = Certificate(
        run=run,
        account=account,
        peer_id=peer_id,
        role=role,
        stage=stage,
        issued=float(issued),
        expires=float(expires),
        grace_until=float(expires if grace_until is None else grace_until),
        authority=identity.peer_id,
        signature=b"",
    )
    return attrs.evolve(unsigned, signature=identity.sign(_DOMAIN, _pack(unsigned._statement())))


@attrs.frozen(kw_only=True)
class Member:
    """A peer that may speak, as the gate and the handlers see it."""

    peer_id: PeerId
    role: str
    stage: int | None
    expires: float
    """Unix time after which it is a guest again (grace included); infinite for listed nodes."""
    account: str

    def require_valid(self, now: float) -> None:
        """Raise ``Refused`` once the certificate has run out; asked at every stream."""
        if now > self.expires:
            raise _expired(self.expires, now)


REVOKED_LIMIT: Final = 4096
"""Peers that one authority may have taken out at a time; certificates that ran out need no entry."""


@attrs.frozen
class Revoked:
    """One peer that an authority took out before its certificate ended."""

    until: float
    """Unix time from which it may be judged by its certificate again."""
    why: str


@final
class Revocations:
    """Whom the run's authorities took out, as far as this node has heard. Shared by all who judge.

    One list an authority, replaced as a whole; an older list than the one known changes nothing.
    """

    def __init__(self) -> None:
        self._lists: dict[PeerId, tuple[float, dict[PeerId, Revoked]]] = {}

    def replace(self, authority: PeerId, at: float, entries: Mapping[PeerId, Revoked]) -> bool:
        """Take up the list that ``authority`` signed at unix time ``at``; False if a newer one is known."""
        if len(entries) > REVOKED_LIMIT:
            raise RemoteError(f"a list of {len(entries)} revoked peers; the limit is {REVOKED_LIMIT}")
        known_at, _ = self._lists.get(authority, (-math.inf, {}))
        if at < known_at:
            return False
        self._lists[authority] = at, dict(entries)
        return True

    def find(self, peer: PeerId, now: float) -> Revoked | None:
        """The entry that keeps ``peer`` out at ``now``."""
        found = (entries.get(peer) for _at, entries in self._lists.values())
        return next((entry for entry in found if entry is not None and now < entry.until), None)

    def check(self, peer: PeerId, now: float) -> None:
        """``Refused`` if an authority took ``peer`` out."""
        if (entry := self.find(peer, now)) is not None:
            raise Refused("revoked", f"the run's authority took this node out: {entry.why}")


KNOWN_LIMIT: Final = 32
"""So many other versions of the run's manifest a node goes on to accept in hello."""


@attrs.define(kw_only=True)
class Trust:
    """What one node believes about membership: the manifest's word, and the authorities' revocations.

    One object a node, shared by all who judge; ``renew`` changes it for all of them at once.
    """

    run: str
    manifest_hash: bytes
    known: tuple[bytes, ...] = ()
    """Hashes of other versions of the same run's manifest: not everybody hears of a new one at once."""
    heard_other: Callable[[], None] = attrs.field(default=lambda: None, eq=False, repr=False)
    """Called when a peer's hello names a manifest that this node does not know."""
    authorities: frozenset[PeerId]
    standing: Mapping[PeerId, str] = attrs.field(factory=dict)
    """Seeds, trainers and authorities by role: members without a certificate."""
    revoked: frozenset[PeerId] = frozenset()
    """Former authorities whose certificates count for nothing."""
    former: Mapping[PeerId, float] = attrs.field(factory=dict, eq=False)
    """Authorities that a newer manifest dropped, and the unix time until which they are believed."""
    revocations: Revocations = attrs.field(factory=Revocations, eq=False, repr=False)
    """Of members with a certificate; whom the manifest lists only a new manifest takes out."""

    def knows(self, manifest_hash: bytes) -> bool:
        """Whether this is the hash of the manifest in force or of another version of it."""
        return manifest_hash == self.manifest_hash or manifest_hash in self.known

    def renew(self, newer: Trust, now: float, overlap_s: float) -> None:
        """Believe a newer manifest from now on; revocations stay.

        Certificates of an authority that it dropped without revoking it are honoured for ``overlap_s`` more.
        """
        dropped = dict.fromkeys(self.authorities, now + overlap_s) | dict(self.former)
        gone = newer.authorities | newer.revoked
        self.former = {peer: until for peer, until in dropped.items() if until > now and peer not in gone}
        self.revoked = newer.revoked
        others = (*(one for one in self.known if one != newer.manifest_hash), self.manifest_hash)
        self.known = others[-KNOWN_LIMIT:]
        self.manifest_hash = newer.manifest_hash
        self.authorities = newer.authorities
        self.standing = newer.standing

    def check(self, certificate: Certificate | None, peer: PeerId, now: float) -> Member:
        """The member that ``peer`` is, or ``Refused`` with the reason why it is none."""
        if peer in self.standing:
            role = self.standing[peer]
            return Member(peer_id=peer, role=role, stage=None, expires=math.inf, account="")
        if certificate is None:
            raise Refused(
                "no_certificate", "this needs a membership certificate; ask the run's authority for one"
            )
        if certificate.run != self.run:
            raise Refused("wrong_run", f"the certificate is for run {certificate.run!r}, not {self.run!r}")
        if certificate.peer_id != peer:
            raise Refused("wrong_key", f"the certificate belongs to {certificate.peer_id}, not to {peer}")
        last = max(certificate.expires, certificate.grace_until)
        if certificate.authority not in self.authorities:
            believed_until = self.former.get(certificate.authority, -math.inf)
            if now > believed_until:
                raise Refused(
                    "unknown_authority", f"{certificate.authority} is not an authority of run {self.run!r}"
                )
            last = min(last, believed_until)
        if not certificate.signature_holds():
            raise Refused("bad_signature", "the certificate's signature does not match its content")
        self.revocations.check(peer, now)
        if certificate.issued > now + CLOCK_SKEW_S:
            ahead = certificate.issued - now
            raise Refused(
                "not_yet_valid", f"the certificate begins in {ahead:.0f} s; compare the clocks", ahead
            )
        if now > last:
            raise _expired(last, now)
        return Member(
            peer_id=peer,
            role=certificate.role,
            stage=certificate.stage,
            expires=last,
            account=certificate.account,
        )

    def check_encoded(self, data: bytes | None, peer: PeerId, now: float) -> Member:
        """``check`` for bytes off the wire; damaged ones are ``Refused`` as ``bad_signature``."""
        if data is None or peer in self.standing:
            return self.check(None, peer, now)
        try:
            certificate = Certificate.decode(data)
        except RemoteError as error:
            raise Refused("bad_signature", f"the certificate is damaged: {error}") from error
        return self.check(certificate, peer, now)


@final
class Membership:
    """What a host is given: whom to believe, what to present, and which time it is.

    ``own_certificate`` is asked at every hello, so that a renewed certificate is presented by itself.
    """

    def __init__(
        self,
        trust: Trust,
        own_certificate: Callable[[], bytes | None],
        clock: Callable[[], float],
    ) -> None:
        self.trust = trust
        self.own_certificate = own_certificate
        self.clock = clock

    def admit(self, peer: PeerId, certificate: bytes | None) -> Member:
        """The member that ``peer`` is at this time, or ``Refused``."""
        return self.trust.check_encoded(certificate, peer, self.clock())


def _expired(expires: float, now: float) -> Refused:
    return Refused("certificate_expired", f"the certificate ran out {now - expires:.0f} s ago; renew it")


def _pack(row: list[Any]) -> bytes:
    return cast(bytes, msgpack.packb(row, use_bin_type=True))
