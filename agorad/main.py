"""``agorad``: read the settings, play one role in the foreground, end with a code that means something.

The role's module is imported only once the settings are known, so that everything but the worker
starts without torch. Errors that people can mend are one sentence on stderr; a traceback means a bug.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import resource
import signal
import stat
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import click
import trio

from agorad import __version__, preflight
from agorad.config import ROLES, Config, default_path, load
from agorad.exitcodes import DaemonExit, ExitCode, verdict
from agorad.living import run_node, start_time
from agorad.notify import Notifier
from agorad.pages import use_large_pages
from agorad.usage import NamedPath, complain
from p2p.errors import LocalError

DESCRIPTORS = 8192


class _Command(click.Command):
    """Its errors of usage are one sentence too."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **{**extra, "prog_name": "agorad", "standalone_mode": False})
        except click.ClickException as error:
            sys.exit(complain(error, "agorad"))


@click.command(cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_path", type=NamedPath(), envvar="AGORA_CONFIG", help="Settings, TOML.")
@click.option("--role", type=click.Choice(ROLES), help="Instead of node.role.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Overrides one setting.")
@click.option("--log-file", type=NamedPath(), help="Instead of node.log.")
@click.option("--secret-fd", type=click.IntRange(3), help="Descriptor to read the account's secret from.")
@click.option("--lifeline-fd", type=click.IntRange(3), help="Descriptor of a pipe; leave when it is closed.")
@click.option("--check-config", is_flag=True, help="Check settings, manifest and key; start nothing.")
@click.version_option(__version__, prog_name="agorad")
def main(
    config_path: Path | None,
    role: str | None,
    assignments: tuple[str, ...],
    log_file: Path | None,
    secret_fd: int | None,
    lifeline_fd: int | None,
    check_config: bool,
) -> None:
    """Take part in training one model together with others."""
    if log_file is not None:
        assignments = (*assignments, f"node.log={log_file.absolute()}")
    try:
        settings = load(config_path or default_path(), role=role, assignments=assignments)
        if check_config:
            preflight.check(settings)
            click.echo(f"{settings.path}: fine")
            return
        _live(settings, None if secret_fd is None else _secret(secret_fd), _pipe(lifeline_fd))
    except BaseException as error:
        sys.exit(_explain(error))


def _secret(descriptor: int) -> str:
    """All of a pipe that somebody filled and closed; nothing of it is kept on disk or in the environment."""
    try:
        with os.fdopen(descriptor, "rb") as pipe:
            return pipe.read(preflight.SECRET_LIMIT).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"cannot read the account's secret from descriptor {descriptor}") from error


def _pipe(descriptor: int | None) -> int | None:
    try:
        if descriptor is not None and not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise LocalError(f"--lifeline-fd {descriptor} is no pipe")
    except OSError as error:
        raise LocalError(f"--lifeline-fd {descriptor}: {error.strerror}") from error
    return descriptor


def _live(settings: Config, secret: str | None, lifeline: int | None) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # A manager's watchdog ends a loop that hangs with SIGABRT: the log then says where it hung.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the same for who asks, without an end
    # A host may have more connections than the descriptors that many systems allow at first.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if secret is not None:  # a memory image of a crash would hold it
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    use_large_pages()
    # Importing torch takes seconds; being asked to stop in that time is a clean end as well.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: sys.exit(ExitCode.CLEAN))
    role = _role(settings.node.role)

    async def live() -> bool:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            return await run_node(
                settings, role.run, started_at=_began(), signals=signals, secret=secret, lifeline=lifeline
            )

    if trio.run(live):
        _begin_again()


_AGAIN = "AGORA_STARTED_AGAIN"


def _began() -> float:
    """Unix time: of the process, or of its new beginning."""
    return float(os.environ.pop(_AGAIN, 0.0)) or start_time()


def _begin_again() -> None:
    """This process with the same arguments and the program that is installed now. Its secret was used up."""
    Notifier().again()
    os.environ[_AGAIN] = str(time.time())
    arguments = [sys.executable, "-m", "agorad.main"]
    given = iter(sys.argv[1:])
    for argument in given:
        if argument == "--secret-fd":
            next(given, None)
        elif not argument.startswith("--secret-fd="):
            arguments.append(argument)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, arguments)


def _role(name: str) -> Any:
    """The role's module. What it needs and the machine lacks is a requirement, not a bug."""
    try:
        return importlib.import_module(f"agorad.roles.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "agorad", "p2p", "stage"):
            raise
        raise DaemonExit(
            ExitCode.REQUIREMENTS,
            f"the role {name} needs {missing}, which is not installed for {sys.executable}; "
            "install agorad with its requirements: `make`, or pip install agorad",
        ) from error


def _explain(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else ExitCode.BUG
    if isinstance(error, KeyboardInterrupt):
        return 130
    code, sentence = verdict(error)
    if sentence is None:
        traceback.print_exception(error)
        sentence = "this is a bug in agorad; please report it with the lines above"
    click.echo(f"agorad: {sentence}", err=True)
    return code


if __name__ == "__main__":
    main()
