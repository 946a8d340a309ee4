"""``agoractl man``: the manual pages, written into a folder that ``man`` looks in."""

from __future__ import annotations

from pathlib import Path

import click

from agorad.manpages import pages
from agorad.usage import NamedPath
from p2p.errors import LocalError


@click.command()
@click.argument("folder", metavar="DIR", type=NamedPath())
def man(folder: Path) -> None:
    """Write the manual pages of agoractl and agorad into DIR/man1.

    Example: agoractl man ~/.local/share/man
    """
    place = folder / "man1"
    count = 0
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in pages():
            (place / name).write_text(text)
            count += 1
    except OSError as error:
        raise LocalError(f"cannot write {error.filename or place}: {error.strerror}") from error
    click.echo(f"{count} pages in {place}; man -M {folder} agoractl shows the first", err=True)
