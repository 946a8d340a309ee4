"""The log: a subscriber of the bus that writes lines for people or for machines.

On a terminal, friendly lines (``console``); to systemd's journal the same with every fact as a field
(``journal``); otherwise, and always in the log file, JSON lines with a ``level``. Events that happen many
times a second (one a microbatch) are ``debug`` and are not logged: they are in ``events.jsonl`` and in the
counters, so a healthy hour stays readable. Of the others, at most ``repeats.MOST`` a minute and kind are
told, then their number; the file is bounded (``logfile``). Nothing in the daemon reads a log. A stream that
cannot be written is given up silently, a file is tried again: the event file says the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TextIO

from agorad.console import friendly
from agorad.events import Entry, encode_entry
from agorad.journal import Journal, is_journal
from agorad.logfile import LogFile
from agorad.repeats import Repeats

DEBUG: Final = frozenset(
    {
        "microbatch_issued",
        "microbatch_added",
        "microbatch_completed",
        "busy",
        "reused",
        "traffic",
        "connected",
        "disconnected",
        "handshake_failed",
        "receipts_submitted",
        "receipts_credited",
    }
)
WARNING: Final = frozenset(
    {
        "peer_refused",
        "limit_reached",
        "round_abandoned",
        "bad_gradient",
        "bad_output",
        "trouble",
        "push_failed",
        "save_failed",
        "join_delayed",
        "microbatch_failed",
        "dht_isolated",
        "member_dropped",
        "clock_skewed",
        "data_unavailable",
        "receipts_delayed",
        "receipts_dropped",
    }
)
ERROR: Final = frozenset({"subscriber_failed", "handler_failed"})


def level(name: str) -> str:
    """How much an event of this name matters to people."""
    if name in DEBUG:
        return "debug"
    return "error" if name in ERROR else "warning" if name in WARNING else "info"


class Log:
    """Subscribe an instance to the bus: ``bus.subscribe(Log(sys.stderr, None))``.

    Where the stream is the log file itself (a manager redirected it there), lines are written once.
    """

    def __init__(self, stream: TextIO, path: Path | None) -> None:
        self._stream: TextIO | None = stream
        self._terminal = stream.isatty()
        self._journal = _journal(stream)
        self._file = None if path is None else LogFile(path)
        self._repeats = Repeats()
        if self._file is not None and _same_file(stream, self._file.fileno()):
            self._stream = None

    def __call__(self, entry: Entry) -> None:
        rank, at = level(entry["event"]), entry["at"]
        for kind, count in self._repeats.over(at):
            self._tell_held(kind, count, at)
        if rank != "debug" and self._repeats.admits(entry["event"], at):
            self._tell(rank, entry)
        if entry["event"] == "stopped":
            for kind, count in self._repeats.all():
                self._tell_held(kind, count, at)

    def _tell_held(self, kind: str, count: int, at: float) -> None:
        self._tell("info", {"at": at, "event": "held_back", "of": kind, "count": count})

    def _tell(self, rank: str, entry: Entry) -> None:
        line = encode_entry({"level": rank, **entry})
        if self._file is not None:
            self._file.write(line)
        if self._journal is not None:
            self._journal.write(rank, friendly(entry, with_time=False) or entry["event"], entry)
            return
        if self._stream is None:
            return
        text = friendly(entry) if self._terminal else line.decode().rstrip("\n")
        if text is not None:
            self._print(text)

    def _print(self, text: str) -> None:
        assert self._stream is not None
        try:
            try:
                print(text, file=self._stream, flush=True)
            except UnicodeError:  # a locale that knows less
                print(text.encode("ascii", "backslashreplace").decode(), file=self._stream, flush=True)
        except (OSError, ValueError):  # its reader is gone, or it was closed
            self._stream = None


def _journal(stream: TextIO) -> Journal | None:
    try:
        return Journal() if is_journal(stream) else None
    except OSError:
        return None  # JSON lines reach it as well


def _same_file(stream: TextIO, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.fstat(file))
    except (OSError, ValueError):  # a stream without a descriptor is no file
        return False
