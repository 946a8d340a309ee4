"""Which daemons a command talks to: options shared by all that open control sockets.

``--dir`` names a demo's folder (its ``swarm.json`` lists the sockets), ``--config`` a node's settings,
``--socket`` the socket itself; without any of them the settings that ``agorad`` itself would read and
those of the system's services, else the nodes that ``agoractl join`` made for the run joined last.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import click

from agorad.ask import Unreachable
from agorad.config import SYSTEM_STATE, default_path, load
from agorad.join.answers import configs
from agorad.usage import NamedPath
from p2p.errors import LocalError

F = TypeVar("F", bound=Callable[..., Any])


@attrs.frozen
class Target:
    """A node's name, as far as it is known before it is asked, and its control socket."""

    name: str
    socket: Path


def target_options(command: F) -> F:
    """Adds the three options to a click command."""
    path = NamedPath()
    for option in (
        click.option("--socket", type=path, help="The control socket of one node."),
        click.option("--config", type=path, help="The settings of one node."),
        click.option("--dir", "folder", type=path, help="The folder of a demo: all its nodes."),
    ):
        command = option(command)
    return command


def find(folder: Path | None, config: Path | None, socket: Path | None) -> list[Target]:
    """The nodes that were named; ``Unreachable`` when none was and this machine has no settings."""
    if sum(choice is not None for choice in (folder, config, socket)) > 1:
        raise click.UsageError("name nodes by one of --dir, --config and --socket")
    if folder is not None:
        return _of_swarm(folder)
    if socket is not None:
        return [Target(socket.name, socket)]
    path = config or default_path()
    if config is not None:
        settings = load(config)
        return [Target(settings.name, settings.control)]
    found = [path] if path.exists() else []
    found += services() or ([] if found else configs())
    if not found:
        raise Unreachable(f"this machine has no node: there is no {path}; name one with --config or --dir")
    targets = {settings.control: Target(settings.name, settings.control) for settings in map(load, found)}
    return list(targets.values())


def services() -> list[Path]:
    """Settings of the nodes that are instances of the system's service, as far as this user may look."""
    try:
        return sorted(SYSTEM_STATE.glob("*/agorad.toml"))
    except OSError:
        return []


def _of_swarm(folder: Path) -> list[Target]:
    path = folder / "swarm.json"
    try:
        nodes = json.loads(path.read_text())["nodes"]
        return [Target(str(node["name"]), Path(node["control"])) for node in nodes]
    except OSError as error:
        raise LocalError(f"{folder} is not the folder of a running demo: {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LocalError(f"{path} is damaged: {error!r}") from error
