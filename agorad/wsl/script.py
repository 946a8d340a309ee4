"""The PowerShell script for Windows, for this distribution and these ports."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from p2p.errors import LocalError

TEMPLATE: Final = Path(__file__).parent / "agora-wsl.ps1"


def script(distribution: str, ports: list[int], *, mirrored: bool) -> str:
    """Its text, with the line ends that Windows expects."""
    if not distribution or any(not letter.isprintable() for letter in distribution) or '"' in distribution:
        raise LocalError(f"{distribution!r} cannot be the name of a distribution")
    if not ports or any(not 0 < port < 1 << 16 for port in ports):
        raise LocalError(f"{ports}: TCP ports are between 1 and 65535")
    text = TEMPLATE.read_text()
    text = text.replace("@DISTRIBUTION@", quoted(distribution))
    text = text.replace("@PORTS@", ", ".join(str(port) for port in sorted(set(ports))))
    text = text.replace("@MIRRORED@", str(mirrored).lower())
    return text.replace("\n", "\r\n")


def quoted(text: str) -> str:
    """For between single quotes; PowerShell takes typographic ones for the same."""
    for quote in "'‘’‚‛":
        text = text.replace(quote, quote * 2)
    return text
