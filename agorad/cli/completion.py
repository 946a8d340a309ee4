"""``agoractl completion``: what a shell reads to complete commands, options and names of nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import click
from click.shell_completion import get_completion_class

SHELLS: Final = ("bash", "zsh", "fish")
_WHERE: Final = {
    "bash": 'eval "$(agoractl completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(agoractl completion zsh)" in ~/.zshrc, behind compinit',
    "fish": "agoractl completion fish > ~/.config/fish/completions/agoractl.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def completion(shell: str | None) -> None:
    """Print what bash, zsh or fish needs to complete agoractl; your own shell by default.

    Example: eval "$(agoractl completion bash)"
    """
    from agorad.cli import agoractl

    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise click.UsageError(f"name the shell: {', '.join(SHELLS)}")
    found = get_completion_class(name)
    assert found is not None
    click.echo(found(agoractl, {}, "agoractl", "_AGORACTL_COMPLETE").source())
    if os.isatty(1):
        click.echo(f"# to have it always: {_WHERE[name]}", err=True)
