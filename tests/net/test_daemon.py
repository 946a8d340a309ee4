"""The daemon as a process: readiness, memory, signals, exit codes, what systemd hears."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import tomli_w

from agorad import run
from agorad.ask import ask
from agorad.authority import accounts
from agorad.run import Manifest, NodeRef, RunInfo
from p2p.identity import Identity
from stage.config import ModelConfig, TrainingConfig
from tests.sentences import complete

WAIT_S = 60.0
ROLES = ("seed", "authority")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run's folder with settings of a seed and an authority in it."""
    operator = Identity.generate()
    refs = {}
    for role in ROLES:
        (tmp_path / role).mkdir()
        key = Identity.generate()
        key.save(tmp_path / role / "identity.key")
        refs[role] = NodeRef(peer_id=key.peer_id)
        node = {"role": role, "run": "../run.toml", "state": ".", "listen": ["/ip4/127.0.0.1/tcp/0"]}
        (tmp_path / role / "agorad.toml").write_text(tomli_w.dumps({"node": node}))
    accounts.add(tmp_path / "authority" / "accounts.toml", "alice")
    manifest = Manifest(
        run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
        seeds=(refs["seed"],),
        authorities=(refs["authority"],),
        model=ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1)),
        training=TrainingConfig(seed=1),
    )
    run.save(manifest.signed(operator), tmp_path / "run.toml")
    return tmp_path


def command(place: Path, role: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "agorad.main", "--config", str(place / role / "agorad.toml"), *more]


@contextmanager
def daemon(
    place: Path, role: str, *more: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A daemon that is ready, and the socket on which it notifies."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place / "notify"))
        manager.settimeout(WAIT_S)
        process = subprocess.Popen(
            command(place, role, *more),
            env={**os.environ, "NOTIFY_SOCKET": str(place / "notify"), **environment},
            stderr=subprocess.PIPE,
        )
        try:
            while (message := heard(manager)) == "WATCHDOG=1":
                pass
            assert message == "READY=1"
            yield process, manager
        finally:
            process.kill()
            process.communicate()
            (place / "notify").unlink()


def heard(manager: socket.socket) -> str:
    """The next message but words for people."""
    while (message := manager.recv(1000).decode()).startswith("STATUS="):
        continue
    return message


def refused(place: Path, role: str, *more: str) -> tuple[int, str]:
    """Exit code and last line of a daemon that should not start."""
    done = subprocess.run(
        command(place, role, *more), capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(("role", "memory_mb", "cpu_s"), [("seed", 60, 1.0), ("authority", 100, 2.0)])
def test_small_and_quick(place: Path, role: str, memory_mb: int, cpu_s: float) -> None:
    with daemon(place, role) as (process, _manager):
        usage = psutil.Process(process.pid)
        # CPU time, since the machine that runs the tests may be busy with something else.
        assert sum(usage.cpu_times()[:2]) < cpu_s
        assert usage.memory_info().rss < memory_mb * 1e6
        assert usage.children() == []
        status = ask(place / role / "control.sock", "status")
        assert (status["role"], status["pid"], status["phase"]) == (role, process.pid, "active")


def test_it_leaves_when_who_started_it_is_gone(place: Path) -> None:
    lifeline, held = os.pipe()
    process = subprocess.Popen(
        command(place, "seed", "--lifeline-fd", str(lifeline)), stderr=subprocess.PIPE, pass_fds=(lifeline,)
    )
    os.close(lifeline)
    try:
        assert process.stderr is not None
        while b'"event":"ready"' not in (line := process.stderr.readline()):
            assert line, "it ended"
        os.close(held)  # as the kernel does for a process that was killed
        _out, said = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        assert b"the command that started it is gone" in said
    finally:
        process.kill()
        process.communicate()
    for descriptor in ("0", "999"):
        assert refused(place, "seed", "--lifeline-fd", descriptor)[0] == 2


def test_sigterm_ends_it_cleanly_and_leaves_no_socket(place: Path) -> None:
    with daemon(place, "seed") as (process, manager):
        process.send_signal(signal.SIGTERM)
        assert heard(manager) == "STOPPING=1"
        assert process.wait(WAIT_S) == 0
    assert not (place / "seed" / "control.sock").exists()
    names = [json.loads(line)["event"] for line in (place / "seed" / "events.jsonl").open()]
    assert names[0] == "started"
    assert names[-3:] == ["stopping", "traffic", "stopped"]


def test_leave_is_a_clean_end_too(place: Path) -> None:
    with daemon(place, "seed") as (process, _manager):
        assert ask(place / "seed" / "control.sock", "leave") == {}
        assert process.wait(WAIT_S) == 0


def test_a_killed_daemon_can_be_started_again(place: Path) -> None:
    with daemon(place, "seed") as (process, _manager):
        process.kill()
        process.wait(WAIT_S)
        assert (place / "seed" / "control.sock").exists()
    with daemon(place, "seed"):
        assert ask(place / "seed" / "control.sock", "status")["phase"] == "active"


def test_sighup_reads_the_settings_again_all_or_nothing(place: Path) -> None:
    settings = place / "authority" / "agorad.toml"
    good = settings.read_text()
    with daemon(place, "authority") as (process, manager):
        for text, verdict in (
            (good + "\n[authority]\nlifetime_s = 60.0\n", "reloaded"),
            (good.replace("tcp/0", "tcp/1"), "changes only with a restart"),
            (good + "\n[authority]\nlifetim = 3\n", "did you mean 'lifetime_s'"),
        ):
            settings.write_text(text)
            process.send_signal(signal.SIGHUP)
            assert heard(manager).startswith("RELOADING=1")
            assert heard(manager) == "READY=1"
            last = ask(place / "authority" / "control.sock", "events")[-1]
            assert last["event"] == "reloaded"
            assert last["ok"] if verdict == "reloaded" else verdict in last["why"]


def test_the_watchdog_is_fed(place: Path) -> None:
    with daemon(place, "seed", WATCHDOG_USEC="200000") as (_process, manager):
        assert [heard(manager) for _ in range(3)] == ["WATCHDOG=1"] * 3


def test_two_daemons_do_not_share_state_or_key(place: Path) -> None:
    key = str(place / "seed" / "identity.key")
    with daemon(place, "seed"):
        code, sentence = refused(place, "seed")
        assert code == 18
        assert "another agorad is running" in sentence
        code, _sentence = refused(
            place, "seed", "--set", "node.state=../copy", "--set", f"node.identity={key}"
        )
        assert code == 18


def test_a_port_in_use_is_a_sentence(place: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, sentence = refused(place, "seed", "--set", f"node.listen=/ip4/127.0.0.1/tcp/{port}")
    assert code == 2
    assert str(port) in sentence


@pytest.mark.catalogue(1)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda place: (place / "run.toml").write_text("x"), "run.toml"),
        (lambda place: (place / "run.toml").unlink(), "cannot read the run manifest"),
        (lambda place: (place / "seed" / "identity.key").write_bytes(b"x"), "identity.key is damaged"),
        (lambda place: (place / "seed" / "agorad.toml").write_text("[nod]\n"), "did you mean 'node'"),
        (lambda place: (place / "seed" / "control.sock").mkdir(), "in the way of the control socket"),
        (lambda place: (place / "seed" / "events.jsonl").mkdir(), "cannot write the event file"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(place: Path, damage: object, words: str) -> None:
    damage(place)  # type: ignore[operator]
    code, sentence = refused(place, "seed")
    assert code == 2
    assert sentence.startswith("agorad: ")
    complete(sentence, words)


def test_being_stopped_while_it_loads_is_clean(place: Path) -> None:
    """The worker's imports take seconds; here a role whose import lasts until the signal comes."""
    slow = place / "slow.py"
    slow.write_text(
        "import sys, signal, agorad.roles\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'agorad.roles.seed':\n"
        "            print('importing', flush=True)\n"
        "            signal.pause()\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from agorad.main import main\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(slow), "--config", str(place / "seed" / "agorad.toml")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_second_sigterm_ends_it_at_once(place: Path) -> None:
    """A role that does not return is not waited for twice."""
    stuck = place / "stuck.py"
    stuck.write_text(
        "import trio, agorad.roles.seed as seed\n"
        "async def run(node):\n    node.ready()\n    await trio.sleep_forever()\n"
        "seed.run = run\nfrom agorad.main import main\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(stuck), "--config", str(place / "seed" / "agorad.toml")],
        stderr=subprocess.PIPE,
        bufsize=0,  # select knows nothing of lines that Python has read ahead
    )
    assert process.stderr is not None
    try:
        for expected in (b'"ready"', b'"stopping"'):
            line = b""
            while expected not in line:
                assert select.select([process.stderr], [], [], WAIT_S)[0]
                line = process.stderr.readline()
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_a_restart_is_a_reload_to_the_manager_and_the_watchdog_waits(place: Path) -> None:
    with daemon(place, "seed", WATCHDOG_USEC="20000000") as (process, manager):
        before = ask(place / "seed" / "control.sock", "status")
        ask(place / "seed" / "control.sock", "restart")
        said: list[str] = []
        while not said or said[-1] != "WATCHDOG_USEC=20000000":
            said.append(heard(manager).replace("\n", " "))
        words = [line.partition("=")[0] for line in said if line != "WATCHDOG=1"]
        words = [word for word in words if word not in ("STATUS", "EXTEND_TIMEOUT_USEC")]
        assert words == ["RELOADING", "WATCHDOG_USEC", "READY", "WATCHDOG_USEC"]
        assert "WATCHDOG_USEC=90000000 WATCHDOG=1" in said
        after = ask(place / "seed" / "control.sock", "status")
        assert (after["pid"], after["peer_id"]) == (process.pid, before["peer_id"])
        assert process.poll() is None
