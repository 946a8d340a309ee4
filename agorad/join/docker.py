"""``join --use-docker``: the same join, in a container.

The answers are asked for out here; inside, ``agoractl join --skip-input`` does the rest. The container gets
nothing that it does not need: no capabilities, a read-only root, the node's folders, one port a node, and the
GPUs if there are. The account's secret goes in through standard input, so that neither ``docker inspect`` nor
a process argument has it. No image is pulled unless ``AGORA_IMAGE`` names one: a name of ours could be
anybody's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs

from agorad import __version__
from agorad.join import answers
from agorad.join.secret import Secret
from p2p.errors import LocalError

HOME: Final = "/var/lib/agora"
STOP_S: Final = 35
"""Docker's patience with a leaving node, which takes up to 30 s."""


@attrs.frozen(kw_only=True)
class Container:
    """What to run."""

    run: str
    """The manifest: an address, a file, or empty for the run joined last."""
    flags: Sequence[str]
    """For the join inside."""
    ports: Sequence[int]
    gpus: bool
    secret: Secret | None


def image() -> str:
    """The image's name: the environment's, else the one that ``docker build`` makes here."""
    return os.environ.get("AGORA_IMAGE") or f"agorad:{__version__}"


def command(container: Container, uid: int, gid: int) -> list[str]:
    """The ``docker run`` that does it."""
    words = [
        "docker", "run", "--rm", "--interactive", "--init", "--name", f"agorad-{container.ports[0]}",
        "--stop-timeout", str(STOP_S), "--read-only", "--tmpfs", "/tmp:size=64m,mode=1777",
        "--tmpfs", "/run/agora:size=1m,mode=1777", "--cap-drop", "ALL",
        "--security-opt", "no-new-privileges:true", "--ulimit", "nofile=16384:16384", "--ulimit", "core=0",
    ]  # fmt: skip
    if "AGORA_IMAGE" not in os.environ:
        words += ["--pull", "never"]
    if uid == 0:  # the image's own account; a folder of root's would be closed to it
        words += ["--volume", f"agorad:{HOME}"]
    else:
        words += ["--user", f"{uid}:{gid}"]
        for outside, inside in folders():
            words += ["--volume", f"{outside}:{HOME}/{inside}"]
    for port in container.ports:
        words += ["--publish", f"{port}:{port}/tcp"]
    if container.gpus:
        words += ["--gpus", "all"]
    run = container.run
    if run and "://" not in run:
        path = Path(run).absolute()
        if any(letter in str(path) for letter in ":,"):
            raise LocalError(f"docker cannot mount {path}: rename it without : and ,")
        words += ["--volume", f"{path}:/run.toml:ro"]
        run = "/run.toml"
    words += [image(), "agoractl", "join", *([run] if run else []), "--skip-input", "--foreground"]
    return [*words, *container.flags, *(["--token", "-"] if container.secret else [])]


def folders() -> list[tuple[Path, str]]:
    """What a node keeps, here and in the container's home."""
    return [(answers.states(), ".local/state/agora"), (answers.path().parent, ".config/agora")]


def start(container: Container) -> int:
    """Run it until it ends; its exit code. Ctrl-C and SIGTERM let the nodes leave."""
    if shutil.which("docker") is None:
        raise LocalError("docker is not there: install it, or join without --use-docker")
    uid, gid = os.getuid(), os.getgid()
    words = command(container, uid, gid)
    if uid != 0:
        for outside, _inside in folders():
            outside.mkdir(mode=0o700, parents=True, exist_ok=True)  # docker would make it root's
    if "--pull" in words and subprocess.run(
        ["docker", "image", "inspect", image()], capture_output=True, check=False
    ).returncode:  # fmt: skip
        raise LocalError(
            f"there is no image {image()}, or docker does not answer (`docker version`): build it where the "
            f"source is, docker build -t {image()} -f docker/Dockerfile . or name another in AGORA_IMAGE"
        )
    process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    before = {
        number: signal.signal(number, lambda number, _frame: process.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        assert process.stdin is not None
        if container.secret is not None:
            process.stdin.write(container.secret.text.encode() + b"\n")
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended before it read; its words say why
    try:
        code = process.wait()
        return 1 if code in (125, 126, 127) else code  # docker's own failures, which it has named
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
