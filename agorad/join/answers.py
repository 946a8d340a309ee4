"""What a contributor answered, kept for the next time: ``join.json`` in the settings folder, 0600.

The account's secret or token is no answer that is kept: it lives in memory until the nodes have it, and they
hand it to the authority once. Where it comes from, in this order: ``--token @FILE`` or ``--token -``,
``HF_TOKEN`` or ``AGORA_TOKEN``, a file ``invitation`` beside the manifest, a prompt.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Final

import attrs
import click

from p2p.errors import LocalError

LIMIT: Final = 64 << 10
TOKEN_LIMIT: Final = 4096
VARIABLES: Final = ("HF_TOKEN", "AGORA_TOKEN")
INVITATION: Final = "invitation"


@attrs.frozen(kw_only=True)
class Answers:
    """For one run."""

    account: str = ""
    email: str = ""
    gpus: tuple[int, ...] = ()
    """Empty until chosen."""
    port: int = 0
    """Of the first GPU; 0 until chosen."""
    announce_ip: str = ""
    announce_port: int = 0
    slots: int = 0
    """Microbatches at a time; 0 leaves it to the node."""


@attrs.frozen
class Secret:
    """An account's secret or token, out of every printed form."""

    text: str = attrs.field(repr=False)

    def split(self) -> tuple[str, str]:
        """(account, secret) of an invitation ``account:secret``; the account is empty without one."""
        account, colon, secret = self.text.partition(":")
        return (account, secret) if colon else ("", self.text)


def folder(kind: str, fallback: str) -> Path:
    """The user's ``config`` or ``state`` folder for agora, by the XDG rules."""
    root = os.environ.get(f"XDG_{kind}_HOME")
    return (Path(root) if root else Path.home() / fallback) / "agora"


def path() -> Path:
    """Where answers are kept."""
    return folder("CONFIG", ".config") / "join.json"


def recall() -> dict[str, Answers]:
    """Kept answers by run id, the last run last. A damaged file is as good as none."""
    try:
        with path().open("rb") as file:
            kept = json.loads(file.read(LIMIT))
        return {str(run): _read(entry) for run, entry in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def configs() -> list[Path]:
    """Settings of the nodes that were joined last."""
    runs = list(recall())
    root = folder("STATE", ".local/state")
    return sorted(root.joinpath(runs[-1]).glob("gpu*/agorad.toml")) if runs else []


def keep(run: str, answers: Answers) -> Path:
    """Write them, this run last; returns the file."""
    kept = recall()
    kept.pop(run, None)
    kept[run] = answers
    file = path()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = file.with_name(file.name + ".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            json.dump({name: attrs.asdict(entry) for name, entry in kept.items()}, out, indent=1)
        fresh.replace(file)
    except OSError as error:
        raise LocalError(f"cannot keep the answers in {file}: {error.strerror}") from error
    return file


def _read(entry: dict[str, object]) -> Answers:
    known = {field.name: type(field.default) for field in attrs.fields(Answers)}
    fit = {key: value for key, value in entry.items() if key in known}
    gpus = fit.pop("gpus", [])
    if not isinstance(gpus, list) or not all(type(gpu) is int for gpu in gpus):
        raise TypeError("gpus")
    for key, value in fit.items():
        if type(value) is not known[key]:
            raise TypeError(key)
    return Answers(gpus=tuple(gpus), **fit)  # type: ignore[arg-type]


def given_secret(option: str | None, beside: Path | None) -> Secret | None:
    """The secret that was given without asking, and out of this process's environment; None if none was."""
    text: str | None = None
    named = [os.environ.pop(name, "") for name in VARIABLES]  # children inherit nothing of it
    if option is not None:
        text = _from_option(option)
    elif any(named):
        text = next(value for value in named if value)
    elif beside is not None and (beside / INVITATION).exists():
        text = _from_file(beside / INVITATION)
    if text is None:
        return None
    text = text.strip()
    if not text or len(text) > TOKEN_LIMIT or not text.isprintable():
        raise LocalError("the token is empty or not one line of text; copy it again")
    return Secret(text)


def _from_option(option: str) -> str:
    if option == "-":
        return sys.stdin.readline(TOKEN_LIMIT + 2)
    if not option.startswith("@"):
        raise click.UsageError(
            "--token takes @FILE, or - for standard input: on a command line every user of this machine "
            "could read the token; HF_TOKEN works too"
        )
    return _from_file(Path(option[1:]))


def _from_file(file: Path) -> str:
    try:
        with file.open() as opened:
            return opened.read(TOKEN_LIMIT + 2)
    except OSError as error:
        raise LocalError(f"cannot read the token from {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LocalError(f"the token in {file} is not text") from error
