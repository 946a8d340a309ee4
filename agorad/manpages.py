"""Manual pages, made from the commands themselves: what ``--help`` says, as roff for ``man``.

One page a command, ``agoractl-status.1``, and one for ``agoractl`` with all of them and the exit codes;
``agorad.1`` is the daemon's. Nothing is written by hand twice: a changed option is in the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import click

from agorad import __version__
from agorad.exitcodes import RETRYABLE, ExitCode, advice

EXITS: Final = (
    ("0", "done"),
    ("1", "failed"),
    ("2", "usage, settings or unreadable input"),
    ("3", "daemon not reachable"),
    ("4", "not in time"),
    ("5", "problems were found"),
)


def pages() -> Iterator[tuple[str, str]]:
    """File name and text of every page."""
    from agorad.cli import agoractl
    from agorad.main import main as agorad

    yield from _pages(agoractl, "agoractl", click.Context(agoractl, info_name="agoractl"))
    context = click.Context(agorad, info_name="agorad")
    yield "agorad.1", _page(agorad, "agorad", context, [], _daemon_exits())


def _pages(command: click.Command, name: str, context: click.Context) -> Iterator[tuple[str, str]]:
    below: list[tuple[str, click.Command]] = []
    if isinstance(command, click.Group):
        for word in command.list_commands(context):
            found = command.get_command(context, word)
            if found is not None and not found.hidden:
                below.append((word, found))
    rows = [(f"{name} {word}", _first(found)) for word, found in below]
    yield f"{name.replace(' ', '-')}.1", _page(command, name, context, rows, EXITS)
    for word, found in below:
        yield from _pages(found, f"{name} {word}", click.Context(found, info_name=word, parent=context))


def _page(
    command: click.Command,
    name: str,
    context: click.Context,
    below: list[tuple[str, str]],
    exits: tuple[tuple[str, str], ...],
) -> str:
    title = name.replace(" ", "-")
    usage = " ".join(command.collect_usage_pieces(context))
    body, example = _help(command)
    lines = [
        f'.TH "{title.upper()}" "1" "" "agorad {__version__}" "agorad"',
        ".SH NAME",
        f"{_roff(title)} \\- {_roff(_first(command))}",
        ".SH SYNOPSIS",
        f".B {_roff(name)}",
        _roff(usage),
        ".SH DESCRIPTION",
    ]
    for paragraph in body:
        lines += [_roff(paragraph), ".PP"]
    options = [found for param in command.get_params(context) if (found := param.get_help_record(context))]
    if options:
        lines.append(".SH OPTIONS")
        for form, said in options:
            lines += [".TP", f"\\fB{_roff(form)}\\fR", _roff(said) or "."]
    if below:
        lines.append(".SH COMMANDS")
        for form, said in below:
            lines += [".TP", f"\\fB{_roff(form)}\\fR", _roff(said)]
    if example:
        lines += [".SH EXAMPLE", ".nf", _roff(example), ".fi"]
    lines.append(".SH EXIT STATUS")
    for code, said in exits:
        lines += [".TP", f"\\fB{code}\\fR", _roff(said)]
    return "\n".join([*lines, ""])


def _help(command: click.Command) -> tuple[list[str], str]:
    """Paragraphs of the help text, and the example that ends it."""
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", (command.help or "").strip())
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    example = ""
    if paragraphs and paragraphs[-1].startswith("Example:"):
        example = paragraphs.pop().removeprefix("Example:").strip()
    return paragraphs, example


def _first(command: click.Command) -> str:
    return command.get_short_help_str(limit=200).rstrip(".")


def _daemon_exits() -> tuple[tuple[str, str], ...]:
    def said(code: ExitCode) -> str:
        again = "; the service starts it again" if code in RETRYABLE else ""
        return f"{code.name.lower()}: {advice(code)}{again}" if code else "asked to end"

    return tuple((str(int(code)), said(code)) for code in ExitCode)


def _roff(text: str) -> str:
    """Text that roff takes as it is: no escapes, no line that begins like a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    escaped = "".join(char if char.isascii() else f"\\[u{ord(char):04X}]" for char in escaped)
    return "\n".join(f"\\&{line}" if line[:1] in ".'" else line for line in escaped.split("\n"))
