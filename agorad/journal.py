"""The journal of systemd, spoken natively: a line for people, and every fact of the event as a field.

``journalctl -u agorad -o cat`` reads like a terminal; ``journalctl AGORA_EVENT=round_finished AGORA_STAGE=2``
or ``-p warning`` finds by fact. Used where standard error is the journal itself (``JOURNAL_STREAM``); the
protocol is a datagram of ``NAME=value`` lines, source: systemd.io/JOURNAL_NATIVE_PROTOCOL.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any, Final, TextIO

PATH: Final = "/run/systemd/journal/socket"
PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3}
FIELD_LIMIT: Final = 4096
"""Bytes of one field; longer values are cut, since a datagram has to hold them all."""


def is_journal(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to the stream goes to the journal."""
    try:
        told = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM", "") == f"{told.st_dev}:{told.st_ino}"


class Journal:
    """An open way to the journal; ``OSError`` if there is none."""

    def __init__(self, path: str = PATH) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def write(self, level: str, line: str, entry: Mapping[str, Any]) -> None:
        """One event. A journal that has no room loses it: the event file has it too."""
        try:
            self._socket.send(encode(level, line, entry))
        except OSError:
            return


def encode(level: str, line: str, entry: Mapping[str, Any]) -> bytes:
    """The datagram."""
    fields = {"MESSAGE": line, "PRIORITY": str(PRIORITIES[level]), "SYSLOG_IDENTIFIER": "agorad"}
    for name, value in entry.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
        fields[f"AGORA_{name.upper()}"] = text
    return b"".join(
        _field(name, text.encode("utf-8", "backslashreplace")[:FIELD_LIMIT]) for name, text in fields.items()
    )


def _field(name: str, value: bytes) -> bytes:
    if b"\n" in value:
        return name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return name.encode() + b"=" + value + b"\n"
