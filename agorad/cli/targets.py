"""Which daemons a command talks to: options shared by all that open control sockets.

``--dir`` names a demo's folder (its ``swarm.json`` lists the nodes), ``--config`` a node's settings,
``--socket`` the socket itself, ``--node`` picks by name among several. The first three may also come from
the environment (``AGORA_DIR``, ``AGORA_CONFIG``, ``AGORA_SOCKET``). Without any of them: every node of
this machine, which are those with settings where ``agorad`` and its services look for them, those that
``agoractl join`` made for the run joined last, and whoever else has a socket in a runtime folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import attrs
import click
from click.core import ParameterSource

from agorad.ask import NoAnswer, NotAllowed, Unreachable, ask, ask_all
from agorad.config import Config, default_path, load
from agorad.join.answers import configs
from agorad.usage import NamedPath
from p2p.errors import LocalError

F = TypeVar("F", bound=Callable[..., Any])

SERVICES: Final = Path("/var/lib/agora")
"""Holds a folder a service, with its settings."""
RUNTIME: Final = Path("/run/agora")
SYSTEM: Final = Path("/etc/agora/agorad.toml")


@attrs.frozen
class Target:
    """A node's name, as far as it is known before it is asked, and its control socket."""

    name: str
    socket: Path
    config: Path | None = None
    """Its settings; None where only the socket was named."""

    def settings(self) -> Config:
        """LocalError where they cannot be read, or are not known."""
        if self.config is None:
            raise LocalError(f"the settings of the node on {self.socket} are not known; name it by --config")
        return load(self.config)

    def ask(self, do: str, *, timeout: float = 5.0, **arguments: Any) -> Any:
        """As ``agorad.ask.ask``; where nobody answers it also says how the node is started."""
        with self.advised():
            return ask(self.socket, do, timeout=timeout, **arguments)

    @contextlib.contextmanager
    def advised(self) -> Iterator[None]:
        """Adds to ``Unreachable`` how this node is started."""
        try:
            yield
        except NotAllowed:
            raise
        except Unreachable as error:
            raise Unreachable(f"{error}; {how_to_start(self.config)}") from error


@attrs.frozen(kw_only=True)
class Where:
    """What the options said."""

    folder: Path | None = None
    config: Path | None = None
    socket: Path | None = None
    nodes: tuple[str, ...] = ()
    """Names; empty: all."""


def target_options(command: F) -> F:
    """Adds the four options to a click command, which is given ``where``."""

    @functools.wraps(command)
    def run(
        *, folder: Path | None, config: Path | None, socket: Path | None, node: tuple[str, ...], **rest: Any
    ) -> Any:
        named = {"folder": folder, "config": config, "socket": socket}
        origin = click.get_current_context().get_parameter_source
        typed = {key for key in named if origin(key) is ParameterSource.COMMANDLINE}
        if typed:  # what the command line names counts, whatever the environment says
            named = {key: path if key in typed else None for key, path in named.items()}
        return command(where=Where(**named, nodes=node), **rest)

    path, wrapped = NamedPath(), cast(F, run)
    for option in (
        click.option(
            "--node", metavar="NAME", multiple=True, shell_complete=names,
            help="Only the node of this name; can be repeated.",
        ),
        click.option("--socket", type=path, envvar="AGORA_SOCKET", help="The control socket of one node."),
        click.option("--config", type=path, envvar="AGORA_CONFIG", help="The settings of one node."),
        click.option(
            "--dir", "folder", type=path, envvar="AGORA_DIR", help="The folder of a demo: all its nodes."
        ),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def unread(path: Path) -> Target:
    """A node whose settings cannot be read, for who wants to say so."""
    return Target(path.name, path.absolute().parent / "control.sock", path)


def find(where: Where, broken: Callable[[Path], Target] | None = None) -> list[Target]:
    """The nodes that were named; ``Unreachable`` when none was and this machine has none.

    ``broken`` makes a target of the machine's settings that cannot be read; without it they are an error.
    """
    found = _all(where, broken)
    if not where.nodes:
        return found
    known = [target.name for target in found]
    for name in where.nodes:
        if name not in known:
            raise click.UsageError(f"no node is called {name!r}; there are {', '.join(known)}")
    return [target for target in found if target.name in where.nodes]


def one(where: Where) -> Target:
    """The only node that was named, or that this machine has."""
    found = find(where)
    if len(found) != 1:
        known = ", ".join(target.name for target in found)
        raise click.UsageError(f"{len(found)} nodes match ({known}); name one with --node")
    return found[0]


def of_role(where: Where, role: str) -> Target | None:
    """The first node of this role among those that were named, or that this machine has.

    None if there is none; ``Unreachable`` or ``NoAnswer`` if one of the others may be.
    """
    found = find(where)
    answers = ask_all([target.socket for target in found], "status")
    for target, answer in zip(found, answers, strict=True):
        if isinstance(answer, dict) and answer.get("role") == role:
            return target
    for answer in answers:
        if isinstance(answer, Unreachable | NoAnswer):
            raise answer
    return None


def names(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of nodes, for the shell's completion; nothing where they cannot be found out."""
    try:
        return [target.name for target in _all(typed_so_far(ctx)) if target.name.startswith(incomplete)]
    except (LocalError, Unreachable, click.ClickException, TypeError):
        return []


def typed_so_far(ctx: click.Context) -> Where:
    """What a line that a shell is to complete has named already."""
    given = ctx.params.get
    return Where(folder=given("folder"), config=given("config"), socket=given("socket"))


def how_to_start(config: Path | None) -> str:
    """The command that has a node back: its service's, the join's that made it, or the daemon itself."""
    if config is None:
        return "start it again"
    if config.parent.parent == SERVICES:
        return f"start it: systemctl start agorad@{config.parent.name}"
    if config == SYSTEM:
        return "start it: systemctl start agorad"
    if config in configs():
        return "start it: agoractl join"
    return f"start it: agorad --config {config}"


def _all(where: Where, broken: Callable[[Path], Target] | None = None) -> list[Target]:
    if sum(choice is not None for choice in (where.folder, where.config, where.socket)) > 1:
        raise click.UsageError("name nodes by one of --dir, --config and --socket")
    if where.folder is not None:
        return _of_swarm(where.folder)
    if where.socket is not None:
        return [Target(where.socket.name, where.socket)]
    if where.config is not None:
        return [_of_settings(where.config)]
    found = list(of_machine(broken))
    if not found:
        raise Unreachable(
            f"this machine has no node: there is no {default_path()}; name one with --config or --dir"
        )
    return found


def of_machine(broken: Callable[[Path], Target] | None = None) -> Iterator[Target]:
    """Every node that has its settings in a usual place, then sockets whose settings cannot be read."""
    seen: set[Path] = set()
    services = [path for path in _glob(SERVICES, "*/agorad.toml") if os.access(path, os.R_OK)]
    first = default_path()
    for path in dict.fromkeys([*([first] if first.exists() else ()), *services, *configs()]):
        try:
            target = _of_settings(path)
        except LocalError:
            if broken is None:
                raise
            target = broken(path)
        if target.socket not in seen:
            seen.add(target.socket)
            yield target
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    for folder in (RUNTIME, *([Path(runtime) / "agora"] if runtime.startswith("/") else ())):
        for socket in _glob(folder, "*.sock"):
            if socket not in seen:
                yield Target(socket.stem, socket)


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _of_settings(path: Path) -> Target:
    settings = load(path)
    return Target(settings.name, settings.control, path)


def _of_swarm(folder: Path) -> list[Target]:
    path = folder / "swarm.json"
    try:
        nodes = json.loads(path.read_text())["nodes"]
        return [Target(str(node["name"]), Path(node["control"]), Path(node["config"])) for node in nodes]
    except OSError as error:
        raise LocalError(f"{folder} is not the folder of a running demo: {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LocalError(f"{path} is damaged: {error!r}") from error
