"""What ``agoractl join`` asks on a terminal, each with a default, each again until the answer can be.

Only what no flag said and no earlier join knows; ``--reconfigure`` asks all. Everything is written to
standard error. Without a terminal, or with ``--skip-input``, what is missing is named in one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import attrs
import click

from agorad.authority.accounts import NAME
from agorad.facts import Gpu
from agorad.hosts import kind_of
from agorad.join import layout
from agorad.join import secret as secrets
from agorad.join.answers import Answers
from agorad.join.cloud import Place
from agorad.join.secret import Secret
from agorad.run import Manifest
from p2p.errors import LocalError

MOST_GPUS: Final = 16
EMAIL: Final = re.compile(r"[^@\s]{1,64}@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+")

T = TypeVar("T")


def gpus(text: str) -> tuple[int, ...]:
    """Like ``0`` or ``0,1``; ``LocalError`` for what is none."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) < 256 for part in numbers):
        raise LocalError(f"{text!r} are no GPUs: whole numbers from 0, like 0 or 0,1")
    chosen = tuple(dict.fromkeys(int(part) for part in numbers))
    if len(chosen) > MOST_GPUS:
        raise LocalError(f"{len(chosen)} GPUs are named; {MOST_GPUS} are possible")
    return chosen


def email(text: str) -> str:
    """Checked; empty is fine."""
    if text and not (len(text) <= 254 and EMAIL.fullmatch(text)):
        raise LocalError(f"{text!r} is not an email address: give one like name@example.org, or none")
    return text


def account(text: str) -> str:
    """A name that an authority's list can hold."""
    if not NAME.fullmatch(text):
        raise LocalError(f"{text!r} is no account: 1 to 64 letters, digits, '-', '.', '_'")
    return text


def port(text: str) -> int:
    """A TCP port."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise LocalError(f"{text!r} is no port: a whole number from 1 to 65535")
    return int(text)


def host(text: str) -> str:
    """An address or name that peers could reach."""
    kind_of(text)
    return text


def ask(question: str, read: Callable[[str], T], default: str = "", *, hidden: bool = False) -> T:
    """Ask until ``read`` takes the answer. ``click.Abort`` at the end of the input."""
    while True:
        text = click.prompt(
            question, default=default, show_default=bool(default) and not hidden, hide_input=hidden,
            err=True, type=str,
        )  # fmt: skip
        try:
            return read(text.strip())
        except LocalError as error:
            click.echo(f"  {error}", err=True)


def choose_gpus(found: list[Gpu]) -> tuple[int, ...]:
    """Which of several."""
    for gpu in found:
        click.echo(f"  GPU {gpu.index}: {gpu.name}, {gpu.vram_gib:.0f} GiB", err=True)
    known = {gpu.index for gpu in found}

    def read(text: str) -> tuple[int, ...]:
        chosen = gpus(text)
        if missing := set(chosen) - known:
            raise LocalError(f"there is no GPU {min(missing)}")
        return chosen

    return ask("GPUs to use, one node each (like 0 or 0,1)", read, "0")


def who(manifest: Manifest, chosen: Answers, given: Secret | None) -> tuple[Answers, Secret | None]:
    """Account and secret."""
    if manifest.admission.accounts == "file":
        if not chosen.account:
            click.echo("This run lets in whom its operator lists.", err=True)
            chosen = attrs.evolve(chosen, account=ask("Your account", account))
        what = f"The secret of account {chosen.account} (not shown)"
    else:
        click.echo(
            "This run knows people by their Hugging Face account. The token only says who you are: it needs "
            "no permission, goes to the run's authority once and is kept nowhere. Make one at "
            "https://huggingface.co/settings/tokens",
            err=True,
        )
        what = "Hugging Face token (not shown)"
    return chosen, given or ask(what, secrets.checked, hidden=True)


def where(
    chosen: Answers, first: layout.Planned, place: Place, *, port_given: bool
) -> tuple[Answers, int, int]:
    """Answers with the address to announce, the first node's port, and its number outside (0: the same)."""
    own, outside = first.port, first.announce_port
    if not port_given:
        beside = next(iter(place.ports), own) if place.remaps and own not in place.ports else own
        own = ask("TCP port of this node, which others must be able to reach", port, str(beside))
    if not chosen.announce_ip:
        known = place.address

        def read(text: str) -> str:
            return host(text) if text else ""

        chosen = attrs.evolve(
            chosen,
            announce_ip=ask(
                "Address that others reach this machine at" + ("" if known else " (empty: found by itself)"),
                read,
                known,
            ),
        )
    if chosen.announce_ip and not outside:
        said = place.outside(own) or own
        answer = ask("Port that others reach it at", port, str(said))
        outside = 0 if answer == own and not place.remaps else answer
    return chosen, own, outside


def missing(manifest: Manifest, chosen: Answers, given: Secret | None, *, new: bool) -> str:
    """One sentence on what would have to be asked; empty if nothing."""
    listed = manifest.admission.accounts == "file"
    if given is not None and (chosen.account or not listed):
        return ""
    if listed and not chosen.account:
        return (
            f"run {manifest.run.name!r} lets in whom its operator lists: ask for an invitation and give it "
            "with --token @FILE or in AGORA_TOKEN, or name --account and give its secret in this way"
        )
    if not new:
        return ""  # the account is bound to the node's key
    if listed:
        return (
            f"this node is not known to the run yet: give the secret of account {chosen.account!r} with "
            "--token @FILE or in AGORA_TOKEN"
        )
    return (
        "this node is not known to the run yet: give a Hugging Face token with --token @FILE or in HF_TOKEN "
        "(https://huggingface.co/settings/tokens)"
    )
