"""The files that make the service: where they go and what they say on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from agorad.service.changes import Change, wanted
from agorad.service.program import Program, quoted

UNITS: Final = Path(__file__).parent / "units"
PLACES: Final = {
    "agorad.service": Path("/etc/systemd/system/agorad.service"),
    "agorad@.service": Path("/etc/systemd/system/agorad@.service"),
    "agora.sysusers": Path("/etc/sysusers.d/agora.conf"),
    "agora.tmpfiles": Path("/etc/tmpfiles.d/agora.conf"),
}
NEWER: Final = re.compile(r"^# from systemd (\d+) on:.*\n((?:[A-Z]\w+=.*\n)+)", re.MULTILINE)
"""Lines that an older systemd would complain about."""


def install(program: Program, version: int, root: Path = Path("/")) -> list[Change]:
    """What has to change so that the service is installed; empty if it is."""
    changes = [
        wanted(root / place.relative_to("/"), render((UNITS / name).read_text(), program, version))
        for name, place in PLACES.items()
    ]
    return [change for change in changes if change is not None]


def uninstall(root: Path = Path("/")) -> list[Change]:
    """What has to go."""
    changes = [wanted(root / place.relative_to("/"), None) for place in PLACES.values()]
    return [change for change in changes if change is not None]


def for_version(text: str, version: int) -> str:
    """Without what is for a newer systemd."""
    return NEWER.sub(lambda match: match.group() if version >= int(match.group(1)) else "", text)


def render(text: str, program: Program, version: int) -> str:
    """A file of ours for this program and this systemd (0: a version that is not known, so an old one)."""
    text = for_version(text, version)
    text = text.replace("ExecStart=/usr/bin/agorad ", f"ExecStart={program.command} ")
    if not program.bound or "ProtectHome=" not in text:
        return text
    binds = "".join(f"BindReadOnlyPaths={quoted(place)}\n" for place in program.bound)
    return re.sub(
        r"^(ProtectHome=.*\n)", lambda match: f"{match.group()}# agorad is installed there\n{binds}", text,
        count=1, flags=re.MULTILINE,
    )  # fmt: skip
