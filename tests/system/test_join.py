"""A run made, started and joined from empty folders with the commands that the README names."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

SMALL = ("--set", "model.seq=64", "--set", "training.target_batch=4")


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    return {**kept, "HOME": str(home), "AGORA_TOKEN": "", "HF_TOKEN": ""}


def ctl(home: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agorad.cli", *arguments],
        env={**environment(home), **extra}, cwd=home, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def daemon(config: Path, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (config.parent / "out.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "agorad.main", "--config", str(config)],
            env=environment(home), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(35)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(true: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.2)


def free_ports() -> int:
    """The first of four free ports in a row."""
    for first in range(41000, 48000, 7):
        with ExitStack() as stack:
            try:
                for port in range(first, first + 4):
                    stack.enter_context(socket.create_server(("0.0.0.0", port)))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def holds(root: Path, text: str) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


def test_from_nothing_to_an_active_node(tmp_path: Path) -> None:
    operator, joiner = tmp_path / "operator", tmp_path / "joiner"
    operator.mkdir()
    joiner.mkdir()
    first = free_ports()
    made = ctl(operator, "run", "init", "my-run", "--stages", "1", "--port", str(first), *SMALL)
    assert made.returncode == 0, made.stderr
    assert "agoractl join" in made.stderr
    folder = operator / "my-run"
    invitation = (folder / "invitation").read_text().strip()
    secret = invitation.partition(":")[2]
    (joiner / "run.toml").write_bytes((folder / "run.toml").read_bytes())
    asked = ctl(joiner, "join", "run.toml", "--skip-input", "--host-port", str(first + 3))
    assert asked.returncode == 2
    assert "ask for an invitation" in asked.stderr
    with ExitStack() as stack:
        for role in ("seed", "authority", "trainer"):
            stack.enter_context(daemon(folder / role / "agorad.toml", operator))
        command = ("join", "run.toml", "--skip-input", "--host-port", str(first + 3))
        wrong = ctl(joiner, *command, AGORA_TOKEN="operator:no")
        assert wrong.returncode == 11, wrong.stdout + wrong.stderr
        assert "what to do:" in wrong.stdout
        process = subprocess.Popen(
            [sys.executable, "-m", "agorad.cli", *command],
            env={**environment(joiner), "AGORA_TOKEN": invitation}, cwd=joiner,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            node: dict[str, object] = {}

            def working() -> bool:
                assert process.poll() is None, process.communicate()
                done = ctl(joiner, "status", "--json")
                if done.returncode == 0:
                    node.update(json.loads(done.stdout)["nodes"][0])
                batches = node.get("microbatches")
                return (
                    node.get("phase") == "active"
                    and isinstance(batches, dict)
                    and batches.get("added", 0) > 0
                )

            wait_for(working, "a node at work")
            pid = int(str(node["pid"]))
            for what in ("cmdline", "environ"):
                assert secret.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()
            assert secret.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    for words in ("access granted", "port dialled from outside", "→ active", "ended with 0"):
        assert words in out
    assert "signed by" in err
    assert holds(joiner, secret) == []
    assert secret not in out + err
    assert {p.name for p in holds(operator, secret)} == {"invitation"}
    again = ctl(joiner, "join", "--check", "--json")
    assert again.returncode in (0, 5), again.stderr


@pytest.mark.parametrize("arguments", [("join", "--help"), ("run", "init", "--help")])
def test_help_has_an_example(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = ctl(tmp_path, *arguments)
    assert "Example:" in done.stdout
