"""/agora/authority/1: what a joiner and an authority say to each other, every field bounded.

One stream, several messages. A joiner opens with ``Join`` (or, once it is in, ``Renew`` or ``Leave``). The
authority answers with ``Checking`` while it looks, with ``Queued`` whenever the joiner's place changes, and
ends with ``Granted``, ``Bye`` or a typed refusal; a queued joiner tells by ``Progress`` how far its download
is. ``read_request`` and ``read_answer`` turn a header into one of these or raise ``RemoteError``; they never
read more than they bound. No payloads, no IO here.

Limits: 64 characters an account, 256 a secret, 8 addresses of 256 characters, 100 a text of the facts,
600 a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, get_args

import attrs

from p2p.errors import RemoteError
from p2p.membership import CERTIFICATE_LIMIT, NAME_LIMIT
from p2p.multiaddr import Multiaddr
from p2p.passes import PASS_LIMIT

PROTOCOL: Final = "/agora/authority/1"
SECRET_LIMIT: Final = 256
ADDRS_LIMIT: Final = 8
ADDR_LIMIT: Final = 256
TEXT_LIMIT: Final = 100
WHY_LIMIT: Final = 600
SESSION_BYTES: Final = 16
MOST_GIB: Final = 1e6
MOST_S: Final = 1e9

Check = Literal["account", "port", "network"]
CHECKS: Final[tuple[Check, ...]] = get_args(Check)


@attrs.frozen(kw_only=True)
class Facts:
    """What a machine says of itself. Bounded here, believed nowhere that it can be measured."""

    gpu: str = ""
    """Name of the accelerator; empty on a CPU."""
    vram_gib: float = 0.0
    ram_gib: float = 0.0
    disk_gib: float = 0.0
    """Free where the node keeps its state."""
    cloud: str = ""
    """Provider, where one was recognised."""
    software: str = ""
    """Version of agorad."""
    version: tuple[int, int] = (1, 1)
    """Oldest and newest version of the protocols that it speaks."""
    clock: float = 0.0
    """Unix time at the joiner, when it asked."""

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {**attrs.asdict(self), "version": list(self.version)}

    @classmethod
    def from_header(cls, header: object) -> Facts:
        """``RemoteError`` unless every field is there and within its bounds."""
        if not isinstance(header, Mapping):
            raise RemoteError("a join without facts")
        return cls(
            gpu=_text(header, "gpu", TEXT_LIMIT),
            vram_gib=_number(header, "vram_gib", 0.0, MOST_GIB),
            ram_gib=_number(header, "ram_gib", 0.0, MOST_GIB),
            disk_gib=_number(header, "disk_gib", 0.0, MOST_GIB),
            cloud=_text(header, "cloud", TEXT_LIMIT),
            software=_text(header, "software", TEXT_LIMIT),
            version=_range(header.get("version")),
            clock=_number(header, "clock", 0.0, 1e11),
        )


@attrs.frozen(kw_only=True)
class Join:
    """A peer asks to be let in as a worker."""

    T: ClassVar[str] = "join"
    account: str
    """Empty where the hub names it (``admission.accounts = "huggingface"``)."""
    secret: str | None = attrs.field(default=None, repr=False)
    """The account's secret or a hub token; only while the node's key is bound to no account."""
    stage: int | None = None
    """Asked for; None leaves the choice to the authority."""
    addrs: tuple[str, ...] = ()
    """Announced multiaddrs."""
    session: bytes = bytes(SESSION_BYTES)
    """Random, one a process: a restart of a node is told from a second one by it."""
    facts: Facts = Facts()

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {
            "t": self.T,
            "account": self.account,
            "secret": self.secret,
            "stage": self.stage,
            "addrs": list(self.addrs),
            "session": self.session,
            "facts": self.facts.to_header(),
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Join:
        """Read and bound what came from a peer; ``RemoteError`` if it is no join."""
        _is(header, cls.T)
        secret = None if header.get("secret") is None else _text(header, "secret", SECRET_LIMIT)
        return cls(
            account=_text(header, "account", NAME_LIMIT),
            secret=secret,
            stage=_stage(header.get("stage")),
            addrs=_addrs(header.get("addrs")),
            session=_session(header.get("session")),
            facts=Facts.from_header(header.get("facts")),
        )


@attrs.frozen(kw_only=True)
class Renew:
    """A member asks for a fresh certificate."""

    T: ClassVar[str] = "renew"
    session: bytes
    addrs: tuple[str, ...] = ()
    software: str = ""

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": self.T, "session": self.session, "addrs": list(self.addrs), "software": self.software}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Renew:
        """``RemoteError`` if it is no renewal."""
        _is(header, cls.T)
        return cls(
            session=_session(header.get("session")),
            addrs=_addrs(header.get("addrs")),
            software=_text(header, "software", TEXT_LIMIT),
        )


@attrs.frozen(kw_only=True)
class Leave:
    """A member gives its place back."""

    T: ClassVar[str] = "leave"
    session: bytes

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": self.T, "session": self.session}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Leave:
        """``RemoteError`` if it is no leaving."""
        _is(header, cls.T)
        return cls(session=_session(header.get("session")))


@attrs.frozen(kw_only=True)
class Progress:
    """How far a queued joiner's download of the state is."""

    T: ClassVar[str] = "progress"
    finished: bool
    eta_s: float | None = None

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": self.T, "finished": self.finished, "eta_s": self.eta_s}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Progress:
        """``RemoteError`` if it is no report."""
        _is(header, cls.T)
        return cls(finished=_truth(header, "finished"), eta_s=_seconds(header, "eta_s"))


@attrs.frozen(kw_only=True)
class Checking:
    """The authority looks at something that takes a moment."""

    T: ClassVar[str] = "checking"
    what: Check

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": self.T, "what": self.what}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Checking:
        """``RemoteError`` if it is none."""
        _is(header, cls.T)
        what = header.get("what")
        for known in CHECKS:
            if what == known:
                return cls(what=known)
        raise RemoteError("the authority checks something that this version does not know")


@attrs.frozen(kw_only=True)
class Queued:
    """The joiner's place; sent whenever it changes."""

    T: ClassVar[str] = "queued"
    position: int
    """1 is next."""
    eta_s: float | None
    """None where nothing is known to estimate from."""
    paused: bool
    """The operator holds all joins back."""
    waitlisted: bool
    """The run is full: places come free as nodes leave."""
    stage: int
    """Where the joiner will probably go, so that it can download meanwhile."""
    guest_pass: bytes | None = attrs.field(default=None, repr=False)
    """What lets it: ``p2p.passes``. A fresh one comes before this one ends."""

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": self.T, **attrs.asdict(self)}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Queued:
        """``RemoteError`` if it is none."""
        _is(header, cls.T)
        position, stage = header.get("position"), _stage(header.get("stage"))
        if type(position) is not int or not 1 <= position < 1 << 31 or stage is None:
            raise RemoteError("a place in the queue that is none")
        shown = header.get("guest_pass")
        if shown is not None and not (isinstance(shown, bytes) and 0 < len(shown) <= PASS_LIMIT):
            raise RemoteError("a place in the queue with a pass that is none")
        return cls(
            position=position,
            eta_s=_seconds(header, "eta_s"),
            paused=_truth(header, "paused"),
            waitlisted=_truth(header, "waitlisted"),
            stage=stage,
            guest_pass=shown,
        )


@attrs.frozen(kw_only=True)
class Granted:
    """Let in. On disk at the authority before this leaves."""

    T: ClassVar[str] = "granted"
    certificate: bytes = attrs.field(repr=False)
    account: str
    why: str
    """Explains the stage, for people."""

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": self.T, **attrs.asdict(self)}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Granted:
        """``RemoteError`` if it is none; the certificate itself is judged elsewhere."""
        _is(header, cls.T)
        certificate = header.get("certificate")
        if not isinstance(certificate, bytes) or not 0 < len(certificate) <= CERTIFICATE_LIMIT:
            raise RemoteError("the authority's answer is not a certificate")
        return cls(
            certificate=certificate,
            account=_text(header, "account", NAME_LIMIT),
            why=_text(header, "why", WHY_LIMIT),
        )


@attrs.frozen(kw_only=True)
class Bye:
    """The place is free again."""

    T: ClassVar[str] = "bye"

    def to_header(self) -> dict[str, Any]:
        """What goes over the wire."""
        return {"t": self.T}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Bye:
        """``RemoteError`` if it is none."""
        _is(header, cls.T)
        return cls()


Request = Join | Renew | Leave
Answer = Checking | Queued | Granted | Bye
_REQUESTS: Final[dict[str, type[Join] | type[Renew] | type[Leave]]] = {
    kind.T: kind for kind in (Join, Renew, Leave)
}
_ANSWERS: Final[dict[str, type[Checking] | type[Queued] | type[Granted] | type[Bye]]] = {
    kind.T: kind for kind in (Checking, Queued, Granted, Bye)
}


def read_request(header: Mapping[str, Any]) -> Request:
    """The first message of a stream; ``RemoteError`` if it is none that an authority knows."""
    kind = header.get("t")
    if not isinstance(kind, str) or kind not in _REQUESTS:
        raise RemoteError("a first message that is neither join, renew nor leave")
    return _REQUESTS[kind].from_header(header)


def read_answer(header: Mapping[str, Any]) -> Answer:
    """A message of an authority; ``RemoteError`` if it is none."""
    kind = header.get("t")
    if not isinstance(kind, str) or kind not in _ANSWERS:
        raise RemoteError("an answer that no authority gives")
    return _ANSWERS[kind].from_header(header)


def _is(header: Mapping[str, Any], kind: str) -> None:
    if header.get("t") != kind:
        raise RemoteError(f"a message that is no {kind!r}")


def _text(header: Mapping[str, Any], name: str, limit: int) -> str:
    value = header.get(name)
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise RemoteError(f"{name} is not a text of at most {limit} printable characters")
    return value


def _number(header: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RemoteError(f"{name} is not a number from {low:g} to {high:g}")
    return float(value)


def _seconds(header: Mapping[str, Any], name: str) -> float | None:
    return None if header.get(name) is None else _number(header, name, 0.0, MOST_S)


def _truth(header: Mapping[str, Any], name: str) -> bool:
    value = header.get(name)
    if type(value) is not bool:
        raise RemoteError(f"{name} is neither true nor false")
    return value


def _stage(value: object) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 16):
        raise RemoteError("a stage that is no small whole number")
    return value


def _range(value: object) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(bound) is int and 0 <= bound < 1 << 16 for bound in value)
    ):
        raise RemoteError("version is not a range")
    return value[0], value[1]


def _session(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != SESSION_BYTES:
        raise RemoteError(f"session is not {SESSION_BYTES} bytes")
    return value


def _addrs(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > ADDRS_LIMIT:
        raise RemoteError(f"addrs is not a list of at most {ADDRS_LIMIT}")
    for addr in value:
        if not isinstance(addr, str) or len(addr) > ADDR_LIMIT:
            raise RemoteError(f"an address that is not a text of at most {ADDR_LIMIT} characters")
        Multiaddr.parse(addr)
    return tuple(value)
