"""/agora/hello/1: the first exchange of two agora peers on every connection.

Each side presents run id, manifest hash, protocol versions, certificate and receive window, and
judges the other's by its own ``Membership``. The verdict stays with the connection: a member, a
guest (no certificate shown: may use what is open to all), or a refusal that every gated stream is
answered with. A peer with an earlier version of the run's manifest, or a later one that is known
here, is of the same run; so is a listed authority with any: it brings what is newer. The connection
itself lives on in all cases, so that a guest can join and a refused peer reads why. A certificate is
judged again at every stream for its end (``check_gate``), all of it when another manifest came into
force, and presented again when it was renewed (``needed``). A peer that does not speak hello (another
libp2p implementation) is a guest.

One call, one message each way, both of the form {run, manifest, version: [min, max], certificate,
window, agent, aes}; the listener adds {verdict: code or ""} so that a dialer learns how it was judged.
Limits: those of a header, and of each field below.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from p2p.errors import Refused, RemoteError, UnsupportedProtocol
from p2p.identity import PeerId
from p2p.membership import CERTIFICATE_LIMIT, NAME_LIMIT, Member, Trust
from p2p.yamux import INITIAL_WINDOW

if TYPE_CHECKING:
    from p2p.connection import Connection
    from p2p.rpc import Call

PROTOCOL: Final = "/agora/hello/1"
VERSION: Final = (1, 1)
"""Oldest and newest version of our protocols that this program speaks."""
AGENT: Final = "agorad"


class Admission(Protocol):
    """What hello needs of ``p2p.membership.Membership``."""

    @property
    def trust(self) -> Trust: ...

    def own_certificate(self) -> bytes | None: ...

    def clock(self) -> float: ...

    def admit(self, peer: PeerId, certificate: bytes | None) -> Member: ...


@attrs.frozen(kw_only=True)
class Hello:
    """What one side says of itself."""

    run: str
    manifest: bytes
    version: tuple[int, int]
    certificate: bytes | None = attrs.field(repr=False)
    window: int
    agent: str
    aes: bool = False
    """Whether it computes AES in hardware, and may be written to with it; earlier programs do not say."""

    def to_wire(self) -> dict[str, Any]:
        return attrs.asdict(self)

    @classmethod
    def from_wire(cls, header: dict[str, Any]) -> Hello:
        """RemoteError unless every field is there and within its bounds."""
        run, manifest, certificate = header.get("run"), header.get("manifest"), header.get("certificate")
        version, window, agent = header.get("version"), header.get("window"), header.get("agent")
        if not (isinstance(run, str) and len(run) <= NAME_LIMIT):
            raise RemoteError("hello: run is not a short text")
        if not (isinstance(manifest, bytes) and len(manifest) <= 64):
            raise RemoteError("hello: manifest is not a hash")
        if certificate is not None and not (
            isinstance(certificate, bytes) and len(certificate) <= CERTIFICATE_LIMIT
        ):
            raise RemoteError("hello: certificate is too long or no bytes")
        if not (
            isinstance(version, list)
            and len(version) == 2
            and all(type(bound) is int and 0 <= bound < 1 << 16 for bound in version)
        ):
            raise RemoteError("hello: version is not a range")
        if not (type(window) is int and 0 <= window < 1 << 32):
            raise RemoteError("hello: window is not a size")
        if not (isinstance(agent, str) and len(agent) <= 64):
            raise RemoteError("hello: agent is not a short text")
        aes = header.get("aes", False)
        if not isinstance(aes, bool):
            raise RemoteError("hello: aes is neither yes nor no")
        return cls(
            run=run,
            manifest=manifest,
            version=(version[0], version[1]),
            certificate=certificate,
            window=window,
            agent=agent,
            aes=aes,
        )


def needed(connection: Connection, admission: Admission | None) -> bool:
    """Whether hello is still to be said: it failed so far, or our certificate is another by now."""
    return (
        admission is not None
        and connection.speaks_hello
        and (connection.hello is None or connection.presented != admission.own_certificate())
    )


async def greet(call: Call, admission: Admission) -> None:
    """The dialer's side, on a call of ``PROTOCOL`` just opened."""
    async with call:
        own = _own(call.connection, admission, call.connection.limits.window)
        await call.send(own.to_wire())
        try:
            reply = await call.receive()
        except UnsupportedProtocol:
            call.connection.speaks_hello = False  # not an agora peer: a guest
            return
        theirs = Hello.from_wire(reply.header)
        _judge(call.connection, theirs, admission)
        _agree(call.connection, theirs)
        call.connection.presented = own.certificate


async def answer(call: Call, admission: Admission) -> None:
    """The listener's side: the handler of ``PROTOCOL``."""
    hello = Hello.from_wire((await call.receive()).header)  # a header has a deadline
    _judge(call.connection, hello, admission)
    verdict = call.connection.refusal.code if call.connection.refusal is not None else ""
    # Windows come out of a budget that all peers share: who is no member gets none of it.
    known = call.connection.member is not None
    own = _own(call.connection, admission, call.connection.limits.window if known else INITIAL_WINDOW)
    _agree(call.connection, hello)
    await call.send({**own.to_wire(), "verdict": verdict})
    call.connection.presented = own.certificate


def judge_again(connection: Connection, admission: Admission) -> None:
    """Bring the verdict up to date where another manifest came into force since the hello."""
    if connection.hello is not None and connection.judged_by != admission.trust.manifest_hash:
        _judge(connection, connection.hello, admission)


def check_gate(connection: Connection, admission: Admission) -> None:
    """Raise Refused unless the peer is a member right now."""
    judge_again(connection, admission)
    if connection.refusal is not None:
        raise connection.refusal
    if connection.member is None:
        raise Refused(
            "no_certificate", "this needs a membership certificate; ask the run's authority for one"
        )
    now = admission.clock()
    connection.member.require_valid(now)
    if connection.peer not in admission.trust.standing:
        admission.trust.revocations.check(connection.peer, now)


def _own(connection: Connection, admission: Admission, window: int) -> Hello:
    certificate = admission.own_certificate()
    connection.promise_window(window)
    if has_aes():
        connection.opener.promise_aes()
    return Hello(
        run=admission.trust.run,
        manifest=admission.trust.manifest_hash,
        version=VERSION,
        certificate=certificate,
        window=window,
        agent=AGENT,
        aes=has_aes(),
    )


def _agree(connection: Connection, theirs: Hello) -> None:
    connection.agree_window(theirs.window)
    if theirs.aes and has_aes():
        connection.sealer.agree_aes()


@cache
def has_aes() -> bool:
    """Whether this processor has instructions for AES; no where the kernel does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return any("aes" in line.split() for line in lines if line.startswith(("flags", "Features")))


def _judge(connection: Connection, hello: Hello, admission: Admission) -> None:
    """Write down what the peer is."""
    connection.hello = hello
    connection.judged_by = admission.trust.manifest_hash
    connection.member = None
    connection.refusal = None
    try:
        _same_run(connection.peer, hello, admission.trust)
        if hello.certificate is not None or connection.peer in admission.trust.standing:
            connection.member = admission.admit(connection.peer, hello.certificate)
    except Refused as refusal:
        connection.refusal = refusal


def _same_run(peer: PeerId, hello: Hello, trust: Trust) -> None:
    if hello.run != trust.run:
        raise Refused("wrong_run", f"this node belongs to run {trust.run!r}, not to {hello.run!r}")
    if not trust.knows(hello.manifest):
        trust.heard_other()
        if peer not in trust.authorities:  # they hear of a newer one first, and have to spread it
            raise Refused(
                "manifest_mismatch", "the two nodes have different manifests of the run; get the newest"
            )
    if hello.version[0] > VERSION[1] or hello.version[1] < VERSION[0]:
        raise Refused(
            "version_mismatch",
            f"this node speaks versions {VERSION[0]} to {VERSION[1]},"
            f" the other {hello.version[0]} to {hello.version[1]}",
        )
