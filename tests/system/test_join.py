"""A run made, started and joined from empty folders, by exactly the commands that the README gives."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

README = Path(__file__).parents[2] / "README.md"
PROGRAMS = {"agoractl": "agorad.cli", "agorad": "agorad.main"}
SMALL = ("--set", "model.seq=64", "--set", "training.target_batch=4", "--stages", "1")
JOINED_S = 90.0
"""Generous: two torch imports on a machine that may be busy."""


def commands() -> list[list[str]]:
    """Those of the README's section, in order."""
    section = README.read_text().partition("## Run your own swarm\n")[2].partition("\n## ")[0]
    return [shlex.split(line) for line in re.findall(r"^(agor.*)$", section, re.MULTILINE)]


def environment(home: Path, **extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    # Named, so that a join of root's on a machine with systemd installs nothing there.
    kept["XDG_STATE_HOME"] = str(home / ".local" / "state")
    return {**kept, "HOME": str(home), "AGORA_TOKEN": "", "HF_TOKEN": "", **extra}


def argv(command: list[str]) -> list[str]:
    return [sys.executable, "-m", PROGRAMS[command[0]], *command[1:]]


def ctl(home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv(list(command)), env=environment(home), cwd=home, capture_output=True, text=True, timeout=60,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def running(home: Path, name: str, *command: str, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to ``name``; asked to leave at the end, if it still lives."""
    with (home / name).open("wb") as log:
        process = subprocess.Popen(
            argv(list(command)), env=environment(home, **extra), cwd=home, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
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


def wait_for(true: Callable[[], bool], what: Callable[[], str], seconds: float = JOINED_S) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, what()
        time.sleep(0.2)


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(41000, 48000, 7):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("0.0.0.0", port)))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def holds(root: Path, text: str) -> set[str]:
    return {p.name for p in root.rglob("*") if p.is_file() and text.encode() in p.read_bytes()}


@pytest.mark.timeout(300)  # eight processes, four of them with torch, on a machine that may be busy
def test_the_readme_from_nothing_to_points(tmp_path: Path) -> None:
    init, seed, authority, trainer, join, status, points, account, invited = commands()
    operator, alice, mallory = (tmp_path / name for name in ("operator", "alice", "mallory"))
    for home in (operator, alice, mallory):
        home.mkdir()
    first = free_ports(6)
    local = [word.replace("203.0.113.9", "127.0.0.1") for word in init]
    made = ctl(operator, *local, "--port", str(first), *SMALL)
    assert made.returncode == 0, made.stderr
    assert "then on this machine: agoractl join my-run/run.toml" in made.stderr
    own = (operator / "my-run" / "invitation").read_text().strip().partition(":")[2]
    given = ctl(operator, *account)
    secret = given.stdout.strip()
    for home in (alice, mallory):
        (home / "run.toml").write_bytes((operator / "my-run" / "run.toml").read_bytes())
    missing = ctl(alice, *invited, "--skip-input", "--host-port", str(first + 4))
    assert missing.returncode == 2
    assert "give the secret of account 'alice' with --token @FILE" in missing.stderr

    with ExitStack() as stack:
        for command in (seed, authority, trainer):
            stack.enter_context(running(operator, f"{command[2].split('/')[1]}.log", *command))
        log = operator / "authority.log"
        wait_for(lambda: '"event":"ready"' in log.read_text(), log.read_text)
        port = ("--host-port", str(first + 3))
        mine = stack.enter_context(running(operator, "join.log", *join, *port))
        port = ("--host-port", str(first + 4))
        hers = stack.enter_context(running(alice, "join.log", *invited, *port, AGORA_TOKEN=f"alice:{secret}"))
        port = ("--host-port", str(first + 5))
        his = stack.enter_context(running(mallory, "join.log", *invited, *port, AGORA_TOKEN="guessed"))

        def said(home: Path) -> str:
            return (home / "join.log").read_text()

        wait_for(lambda: "[TRAINING] active" in said(operator), lambda: said(operator))
        assert mine.poll() is None, said(operator)
        wait_for(lambda: "access granted to alice" in said(alice), lambda: said(alice))
        node = json.loads(ctl(operator, *status, "--json").stdout)["nodes"][0]
        assert node["name"] == "gpu0"
        limits = Path(f"/proc/{node['pid']}/limits").read_text()
        assert re.search(r"Max core file size +0 ", limits), "a memory image could be written"
        for process, word in ((mine, own), (hers, secret)):
            started = psutil.Process(process.pid).children(recursive=True)
            assert started
            for child in started:
                there = Path(f"/proc/{child.pid}")
                assert word.encode() not in (there / "environ").read_bytes()
                assert word.encode() not in (there / "cmdline").read_bytes()
            assert word.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()

        def earned() -> bool:
            done = ctl(operator, *points, "--json")
            rows = json.loads(done.stdout)["rows"] if done.returncode == 0 else []
            return any(row["user"] == "operator" and row["compute"] > 0 for row in rows)

        wait_for(earned, lambda: said(operator))
        assert his.wait(60) == 11, said(mallory)
        for process in (mine, hers):
            process.send_signal(signal.SIGINT)
        assert mine.wait(60) == 0, said(operator)
        assert hers.wait(60) == 0, said(alice)
    assert re.search(r"  ok    authority +answers in \d+ ms", said(operator))
    for words in ("signed by", "can be reached from outside", "ended; goodbye"):
        assert words in said(operator)
    assert re.search(r"\[ERROR\] ended with code 11: .*wrong_secret\)", said(mallory))
    assert "[ERROR] what to do: " in said(mallory)
    assert holds(alice, secret) == set()
    assert holds(operator, secret) == set()
    assert holds(operator, own) == {"invitation"}
    again = ctl(alice, "agoractl", "join", "--check", "--json")
    assert again.returncode in (0, 5), again.stderr


@pytest.mark.catalogue(31)
def test_a_second_ctrl_c_ends_at_once_and_a_killed_node_is_told(tmp_path: Path) -> None:
    """No authority is there, so the nodes wait for one."""
    made = ctl(tmp_path, "agoractl", "run", "init", "lonely", "--port", str(first := free_ports(4)))
    assert made.returncode == 0, made.stderr
    command = (
        "agoractl",
        "join",
        "lonely/run.toml",
        "--skip-input",
        "--foreground",
        "--host-port",
        str(first + 3),
    )

    def said() -> str:
        return (tmp_path / "join.log").read_text()

    def not_in_yet() -> bool:
        return "[WARNING] not in yet" in said()

    with running(tmp_path, "join.log", *command) as process:
        wait_for(not_in_yet, said)
        pid = json.loads(ctl(tmp_path, "agoractl", "status", "--json").stdout)["nodes"][0]["pid"]
        twice = ctl(tmp_path, *command)
        assert twice.returncode == 18
        assert f"this node runs already (process {pid})" in twice.stderr
        os.kill(pid, signal.SIGKILL)
        assert process.wait(20) == 137
    assert "[ERROR] ended with code 137: killed by signal 9" in said()
    assert "[ERROR] what to do: " in said()

    with running(tmp_path, "join.log", *command) as process:
        wait_for(not_in_yet, said)
        pid = json.loads(ctl(tmp_path, "agoractl", "status", "--json").stdout)["nodes"][0]["pid"]
        os.kill(pid, signal.SIGSTOP)  # it will not leave by itself
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "again to end at once" in said(), said)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.long
def test_nodes_leave_when_their_join_is_killed(tmp_path: Path) -> None:
    made = ctl(tmp_path, "agoractl", "run", "init", "lonely", "--port", str(first := free_ports(4)))
    assert made.returncode == 0, made.stderr
    command = (
        "agoractl", "join", "lonely/run.toml", "--skip-input", "--foreground", "--host-port", str(first + 3),
    )  # fmt: skip

    def said() -> str:
        return (tmp_path / "join.log").read_text()

    for _turn in range(2):  # the second one finds the folder, the key and the port free
        with running(tmp_path, "join.log", *command) as process:
            wait_for(lambda: "[WARNING] not in yet" in said(), said)
            pid = json.loads(ctl(tmp_path, "agoractl", "status", "--json").stdout)["nodes"][0]["pid"]
            process.kill()
            process.wait()
            wait_for(lambda pid=pid: not _lives(pid), lambda: "it lives on", 40.0)
    (events,) = tmp_path.rglob("events.jsonl")
    ends = [event for line in events.read_text().splitlines() if (event := json.loads(line))]
    assert [e["why"] for e in ends if e["event"] == "stopping"] == ["the command that started it is gone"] * 2
    assert [e["code"] for e in ends if e["event"] == "stopped"] == [0, 0]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("arguments", [("join", "--help"), ("run", "init", "--help")])
def test_help_has_an_example(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert "Example:" in ctl(tmp_path, "agoractl", *arguments).stdout
