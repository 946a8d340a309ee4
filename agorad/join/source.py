"""The run manifest that a contributor names: a path, or an http(s) address, checked before it is believed.

The operator's signature is checked in all cases. Whose key it is a person has to compare the first time; from
then on a manifest of the same run that another key signed is refused, and of two editions of one operator the
newer counts. Limits: 1 MiB, ``FETCH_S`` in all.
"""

from __future__ import annotations

import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Final

import click

from agorad import manifests, run
from agorad.join.answers import Answers, states
from agorad.run import Manifest
from agorad.settings import FILE_LIMIT
from p2p.errors import LocalError

FETCH_S: Final = 15.0
PIECE: Final = 64 << 10


def is_address(where: str) -> bool:
    """Whether it is fetched and not read."""
    return where.lower().startswith(("http://", "https://"))


def load(where: str) -> Manifest:
    """The checked manifest; ``LocalError`` with one sentence for what is wrong with it."""
    if not is_address(where):
        if where == "":
            raise click.UsageError("the path of the manifest is empty")
        if "://" in where:
            raise click.UsageError(f"{where} is neither a path nor an http or https address")
        return run.load(Path(where))
    shown = _shown(where)
    try:
        manifest = run.from_table(tomllib.loads(_fetch(where, shown).decode()))
        manifest.check_signature()
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise LocalError(f"{shown} is not a run manifest: {error}; is the address right?") from error
    except LocalError as error:
        raise LocalError(str(error) if shown in str(error) else f"{shown}: {error}") from error
    return manifest


def settled(manifest: Manifest, earlier: Answers) -> Manifest:
    """The edition to use: this one, or a newer one of the same operator that a node here has.

    ``LocalError`` where another operator signed it than the one known from before.
    """
    if earlier.operator and earlier.operator != manifest.run.operator:
        raise LocalError(
            f"run {manifest.run.id!r} was joined before with a manifest of operator {earlier.operator}; this "
            f"one is signed by {manifest.run.operator}: not joined; ask the operator which one is right, "
            "--reconfigure takes it"
        )
    for path in states().joinpath(manifest.run.id).glob("gpu*/run.toml"):
        try:
            here = manifests.restore(path.parent, run.load(path))[0]  # what it took up while it ran
        except LocalError:
            continue  # damaged: written anew
        same = (here.run.id, here.run.operator) == (manifest.run.id, manifest.run.operator)
        if same and here.run.version > manifest.run.version:
            manifest = here
    return manifest


def last() -> Manifest:
    """The manifest of the run that was joined last."""
    from agorad.join.answers import recall

    runs = list(recall())
    if not runs:
        raise click.UsageError("name the run: the path or the address of its run.toml")
    folder = states() / runs[-1]
    for path in sorted(folder.glob("gpu*/run.toml")):
        return run.load(path)
    raise LocalError(f"nothing is left of run {runs[-1]} in {folder}; name its manifest")


def _fetch(where: str, shown: str) -> bytes:
    until = time.monotonic() + FETCH_S
    data = bytearray()
    try:
        with urllib.request.urlopen(where, timeout=FETCH_S) as answer:
            while piece := answer.read1(PIECE):
                data += piece
                if len(data) > FILE_LIMIT:
                    raise LocalError(f"{shown} is larger than {FILE_LIMIT} bytes: not a run manifest")
                if time.monotonic() > until:
                    raise LocalError(f"{shown} takes longer than {FETCH_S:.0f} s to load; try again later")
    except urllib.error.HTTPError as error:
        raise LocalError(
            f"cannot fetch {shown}: the server answers {error.code} {error.reason}; is the address right?"
        ) from error
    except (OSError, ValueError, urllib.error.URLError) as error:
        why = getattr(error, "reason", None) or error
        raise LocalError(f"cannot fetch {shown}: {why}; is the address right?") from error
    return bytes(data)


def _shown(where: str) -> str:
    """Without a password, should the address hold one."""
    parts = urllib.parse.urlsplit(where)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
