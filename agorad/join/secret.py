"""The account's secret or token: where it comes from, and how little of it there is.

It is taken from, in this order: ``--token @FILE`` or ``--token -``, ``HF_TOKEN`` or ``AGORA_TOKEN``, a file
``invitation`` beside the manifest, a prompt. It lives in memory until the nodes have it, through a pipe that
only they inherit, and they hand it to the authority once. It is in no process argument, in no child's
environment, in no log, event or file of ours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import attrs
import click

from p2p.errors import LocalError

LIMIT: Final = 4096
VARIABLES: Final = ("HF_TOKEN", "AGORA_TOKEN")
UNUSED: Final = ("HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
"""Other programs' names for the same; not read, and kept from children all the same."""
INVITATION: Final = "invitation"


@attrs.frozen
class Secret:
    """An account's secret or token, out of every printed form."""

    text: str = attrs.field(repr=False)

    def split(self) -> tuple[str, str]:
        """(account, secret) of an invitation ``account:secret``; the account is empty without one."""
        account, colon, secret = self.text.partition(":")
        return (account, secret) if colon else ("", self.text)


def from_environment() -> str:
    """The first of the variables that is set; all of them leave this process's environment."""
    named = [os.environ.pop(name, "").strip() for name in (*VARIABLES, *UNUSED)]
    return next((value for value in named[: len(VARIABLES)] if value), "")


def given(option: str | None, environment: str, beside: Path | None) -> Secret | None:
    """The secret that was given without asking; None if none was."""
    if option is not None:
        return checked(_from_option(option))
    if environment:
        return checked(environment)
    if beside is not None and (beside / INVITATION).exists():
        return checked(_from_file(beside / INVITATION))
    return None


def checked(text: str) -> Secret:
    """One line of text, or ``LocalError``."""
    text = text.strip()
    if not text or len(text) > LIMIT or not text.isprintable():
        raise LocalError("the token is empty or not one line of text; copy it again")
    return Secret(text)


def _from_option(option: str) -> str:
    if option == "-":
        return sys.stdin.readline(LIMIT + 2)
    if not option.startswith("@"):
        raise click.UsageError(
            "--token takes @FILE, or - for standard input: on a command line every user of this machine "
            "could read the token; HF_TOKEN works too. Make a new token if this one was real"
        )
    try:
        return _from_file(Path(option[1:]).expanduser())  # no shell does it behind an @
    except RuntimeError as error:
        raise LocalError(
            f"cannot read the token from {option[1:]}: {error}; name it by its whole path"
        ) from error


def _from_file(file: Path) -> str:
    try:
        with file.open() as opened:
            return opened.read(LIMIT + 2)
    except OSError as error:
        raise LocalError(f"cannot read the token from {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LocalError(f"the token in {file} is not text") from error
