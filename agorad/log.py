"""The log: a subscriber of the bus that writes lines for people or for machines.

On a terminal, friendly lines (``console``); to systemd's journal the same with every fact as a field
(``journal``); otherwise, and always in the log file, JSON lines with a ``level``. Events that happen many
times a second (one a microbatch) are ``debug`` and are not logged:
they are in ``events.jsonl`` and in the counters, so a healthy hour stays readable. Nothing in the
daemon reads a log. A log that cannot be written (closed pipe, full disk) is given up silently: the
event file says the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TextIO

from agorad.console import friendly
from agorad.events import Entry, encode_entry
from agorad.journal import Journal, is_journal
from p2p.errors import LocalError

DEBUG: Final = frozenset(
    {
        "microbatch_issued",
        "microbatch_added",
        "microbatch_completed",
        "busy",
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
        "round_abandoned",
        "bad_gradient",
        "bad_output",
        "trouble",
        "save_failed",
        "join_delayed",
        "microbatch_failed",
        "dht_isolated",
        "member_dropped",
        "clock_skewed",
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
        # Kept open for the life of the process; line buffered.
        try:
            self._file = path.open("a", buffering=1) if path is not None else None
        except OSError as error:
            raise LocalError(f"cannot write the log file {path}: {error.strerror}") from error
        if self._file is not None and _same_file(stream, self._file):
            self._stream = None

    def __call__(self, entry: Entry) -> None:
        rank = level(entry["event"])
        if rank == "debug":
            return
        line = encode_entry({"level": rank, **entry}).decode()
        if self._file is not None:
            try:
                self._file.write(line)
            except OSError:
                self._file = None
        if self._journal is not None:
            self._journal.write(rank, friendly(entry, with_time=False) or entry["event"], entry)
            return
        if self._stream is None:
            return
        text = friendly(entry) if self._terminal else line.rstrip("\n")
        if text is not None:
            try:
                print(text, file=self._stream, flush=True)
            except OSError:
                self._stream = None


def _journal(stream: TextIO) -> Journal | None:
    try:
        return Journal() if is_journal(stream) else None
    except OSError:
        return None  # JSON lines reach it as well


def _same_file(stream: TextIO, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.fstat(file.fileno()))
    except (OSError, ValueError):  # a stream without a descriptor is no file
        return False
