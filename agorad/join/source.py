"""The run manifest that a contributor names: a path, or an http(s) address, checked before it is believed.

The operator's signature is checked in both cases; whose key it is, is for the person to compare. Limits:
1 MiB, 15 s.
"""

from __future__ import annotations

import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

import click

from agorad import run
from agorad.run import Manifest
from agorad.settings import FILE_LIMIT
from p2p.errors import LocalError

FETCH_S: Final = 15.0


def load(where: str) -> Manifest:
    """The checked manifest; ``LocalError`` with one sentence for what is wrong with it."""
    if not where.startswith(("http://", "https://")):
        if where == "":
            raise click.UsageError("the path of the manifest is empty")
        return run.load(Path(where))
    try:
        with urllib.request.urlopen(where, timeout=FETCH_S) as answer:
            data: bytes = answer.read(FILE_LIMIT + 1)
    except urllib.error.HTTPError as error:
        raise LocalError(f"cannot fetch {where}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise LocalError(f"cannot fetch {where}: {why}; is the address right?") from error
    if len(data) > FILE_LIMIT:
        raise LocalError(f"{where} is larger than {FILE_LIMIT} bytes: not a run manifest")
    try:
        manifest = run.from_table(tomllib.loads(data.decode()))
        manifest.check_signature()
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LocalError(f"{where} is not a run manifest: {error}") from error
    except LocalError as error:
        raise LocalError(f"{where}: {error}") from error
    return manifest
