"""The event bus: every event of this process, numbered, stored, counted and handed on.

Theory of operation. Components get ``Bus.emit`` as a plain callable. ``emit`` numbers the event,
appends it as one JSON line to ``events.jsonl`` with a single ``write`` to a descriptor in append mode
(so that it is in the kernel, and survives a kill -9 of this process, before ``emit`` returns; the
accounting of microbatches relies on that), keeps it in a ring for ``agoractl events``, counts it, and
calls the subscribers. A line: ``{"id", "at" (unix seconds), "event", ...fields}``; bytes are
hexadecimal. Ids grow by one within a process and start at 1 in each.

Limits: 4096 events in the ring; the file is renamed to ``events.jsonl.1`` at 256 MiB, one old file is
kept. ``emit`` is for the daemon's trio thread only. It never raises and never waits: a full disk is
counted in ``unwritten`` and training goes on; a subscriber that raises is dropped and reported.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from p2p.errors import LocalError
from p2p.event import Event, event_fields, event_name

RING: Final = 4096
FILE_LIMIT: Final = 256 << 20

Entry = dict[str, Any]
"""An event as it is stored: id, at, event, and its fields."""


@attrs.frozen(kw_only=True)
class Started(Event):
    """The daemon began: who it is."""

    name: str
    role: str
    run: str
    peer_id: str
    version: str


@attrs.frozen(kw_only=True)
class Ready(Event):
    """The node serves; ``seconds`` since the process began."""

    seconds: float
    addrs: list[str]


@attrs.frozen(kw_only=True)
class Stopping(Event):
    """The node leaves."""

    why: str


@attrs.frozen(kw_only=True)
class Stopped(Event):
    """The last event of a process that ended by itself."""

    code: int
    why: str


@attrs.frozen(kw_only=True)
class Held(Event):
    """The node is paused: it does no work ``until`` then, or until it is let go."""

    why: str
    until: float | None


@attrs.frozen(kw_only=True)
class LetGo(Event):
    """The node is no longer paused."""


@attrs.frozen(kw_only=True)
class Reloaded(Event):
    """SIGHUP: the configuration was read again; ``why`` says what was wrong if it was kept as before."""

    ok: bool
    why: str


@attrs.frozen(kw_only=True)
class AddressObserved(Event):
    """Another node sees this one at ``address``, which is none of this machine's own; it is announced."""

    address: str
    by: str


@attrs.frozen(kw_only=True)
class Reachability(Event):
    """Whether others can dial this node, when it is first known and whenever it changes."""

    reachable: bool
    addr: str
    """The address that answered."""
    by: str
    """The listed node that tried."""
    why: str


@attrs.frozen(kw_only=True)
class ListUnreadable(Event):
    """What an authority published of revoked peers cannot be read; the list known before goes on to count."""

    authority: str
    why: str


@attrs.frozen(kw_only=True)
class ManifestTaken(Event):
    """A newer manifest of the run's operator is in force here; ``changed`` names what it changes."""

    version: int
    hash: bytes
    changed: list[str]


@attrs.frozen(kw_only=True)
class ManifestIgnored(Event):
    """What an authority published as a newer manifest is none that may follow the one in force."""

    authority: str
    why: str


@attrs.frozen(kw_only=True)
class UpdateWanted(Event):
    """The manifest asks for newer software than this node runs; ``why`` says from when on."""

    why: str


@attrs.frozen(kw_only=True)
class Operated(Event):
    """An operator changed something at this authority; the same is in its audit log."""

    what: str
    detail: str


@attrs.frozen(kw_only=True)
class CertificateGranted(Event):
    """This node has a (new) certificate."""

    account: str
    stage: int | None
    expires: float
    authority: str
    why: str = ""
    """Explains the stage; a warning may follow."""


@attrs.frozen(kw_only=True)
class Moving(Event):
    """This node goes to another stage, where it is missed more: it restarts, and fetches the state there."""

    origin: int
    target: int
    gain: float
    """By how much the slower of the two stages is faster afterwards than the target was."""


@attrs.frozen(kw_only=True)
class MoveRefused(Event):
    """This node should go to another stage by everybody's rule, and no authority lets it now."""

    stage: int
    why: str


@attrs.frozen(kw_only=True)
class JoinChecking(Event):
    """An authority looks at something that takes a moment: ``account``, ``port`` or ``network``."""

    what: str


@attrs.frozen(kw_only=True)
class JoinQueued(Event):
    """This node's place in the queue; ``waitlisted``: the run is full, ``eta_s`` null: nobody can tell."""

    position: int
    eta_s: float | None
    paused: bool
    waitlisted: bool
    stage: int


@attrs.frozen(kw_only=True)
class RenewalOverdue(Event):
    """The certificate ran out and no authority renewed it; members believe it until ``grace_until``."""

    why: str
    grace_until: float


@attrs.frozen(kw_only=True)
class JoinDelayed(Event):
    """No authority granted a certificate this time; the node asks again in ``retry_s``."""

    why: str
    retry_s: float


@attrs.frozen(kw_only=True)
class JoinAnswered(Event):
    """An authority answered a join: ``outcome`` is ``granted`` or a refusal's code."""

    peer: str
    account: str
    stage: int | None
    outcome: str


@attrs.frozen(kw_only=True)
class ReceiptsSubmitted(Event):
    """A trainer handed receipts to an authority: ``new`` were credited, ``known`` had been before.

    ``refused`` were not believed; ``why`` is the first one's ticket and reason.
    """

    authority: str
    new: int
    known: int
    refused: int
    why: str
    waiting: int


@attrs.frozen(kw_only=True)
class ReceiptsDelayed(Event):
    """No authority took receipts this time; ``waiting`` are kept, the next attempt is in ``retry_s``."""

    why: str
    waiting: int
    retry_s: float


@attrs.frozen(kw_only=True)
class ReceiptsDropped(Event):
    """Receipts were given up, the oldest first: nobody is credited for them."""

    count: int
    why: str


@attrs.frozen(kw_only=True)
class ShardTaken(Event):
    """This trainer works on a shard of the data from now on."""

    shard: int
    mark: int
    """Its oldest position that is not known to be done."""


@attrs.frozen(kw_only=True)
class ShardLeft(Event):
    """This trainer works on a shard no more."""

    shard: int
    why: str


@attrs.frozen(kw_only=True)
class ReceiptsCredited(Event):
    """An authority checked a trainer's receipts and credited the ``new`` ones."""

    trainer: str
    new: int
    known: int
    refused: int


@attrs.frozen(kw_only=True)
class Trouble(Event):
    """Something is wrong with this node, and what is done about it (``agorad.supervision``)."""

    kind: str
    why: str
    reaction: str


@attrs.frozen(kw_only=True)
class PushFailed(Event):
    """Figures could not be sent to the gateway that the settings name; told at first and seldom after."""

    why: str
    failures: int


@attrs.frozen(kw_only=True)
class TroubleOver(Event):
    """A trouble that was told is over."""

    kind: str


@attrs.frozen(kw_only=True)
class SubscriberFailed(Event):
    """A part of the daemon that listens to events raised and was disconnected: a bug."""

    subscriber: str
    error: str


Subscriber = Callable[[Entry], None]


class Bus:
    """See the module's head. ``path`` None keeps events in memory only (tests, command line)."""

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._fd = -1
        self._size = 0
        self._ring: deque[Entry] = deque(maxlen=RING)
        self._subscribers: list[Subscriber] = []
        self._news: trio.Event | None = None
        self.last_id = 0
        self.counts: Counter[str] = Counter()
        self.unwritten = 0
        """Events that the disk did not take."""
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise LocalError(
                    f"cannot write the event file {path}: {error.strerror}; move away what is there"
                ) from error

    def emit(self, event: Event) -> None:
        """Record and hand on; on return the line is with the operating system."""
        self.last_id += 1
        name = event_name(type(event))
        entry: Entry = {"id": self.last_id, "at": self._clock(), "event": name, **event_fields(event)}
        self.counts[name] += 1
        self._ring.append(entry)
        if self._fd >= 0:
            self._write(entry)
        for subscriber in tuple(self._subscribers):
            self._hand(subscriber, entry)
        if self._news is not None:
            self._news.set()
            self._news = None

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with every entry from now on; returns what ends it."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber) if subscriber in self._subscribers else None

    def since(self, last_seen: int = 0) -> list[Entry]:
        """Entries after id ``last_seen`` that are still in the ring."""
        return [entry for entry in self._ring if entry["id"] > last_seen]

    async def follow(self, last_seen: int = 0) -> AsyncGenerator[list[Entry], None]:
        """Batches of entries after ``last_seen``, for ever; a slow reader sees a gap in the ids."""
        while True:
            batch = self.since(last_seen)
            if batch:
                last_seen = batch[-1]["id"]
                yield batch
            else:
                if self._news is None:
                    self._news = trio.Event()
                await self._news.wait()

    def close(self) -> None:
        """Close the file; events after this are kept in memory only."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _write(self, entry: Entry) -> None:
        line = encode_entry(entry)
        try:
            if self._size + len(line) > FILE_LIMIT and self._path is not None:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self.close()
                self._open(self._path)
            written = os.write(self._fd, line)
            if written != len(line):  # the disk's last bytes: half a line would spoil the next one too
                os.ftruncate(self._fd, self._size)
                self.unwritten += 1
                return
        except OSError:
            self.unwritten += 1
            return
        self._size += written

    def _hand(self, subscriber: Subscriber, entry: Entry) -> None:
        try:
            subscriber(entry)
        except Exception as error:  # one listener's bug must not reach the emitter, nor repeat
            self._subscribers.remove(subscriber)
            self.emit(SubscriberFailed(subscriber=repr(subscriber), error=repr(error)))


def encode_entry(entry: Entry) -> bytes:
    """One JSON line, newline included. A number that is not finite, which JSON has no word for, is null."""
    try:
        line = _dumps(entry)
    except ValueError:
        line = _dumps(_finite(entry))
    # What is no character at all (a half of a pair, out of a file name) stays readable as JSON's own escape.
    return (line + "\n").encode("utf-8", "backslashreplace")


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=_plain, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
