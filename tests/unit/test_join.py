"""The command agoractl join, without starting a node: what it refuses, asks and says."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from agorad import run as manifests
from agorad.cli.join import join
from agorad.events import CertificateGranted, JoinDelayed, JoinQueued, Ready, Started
from agorad.join import answers, docker, lines
from p2p.event import Event, event_fields, event_name
from stage.events import Phase, RoundFinished, StateFetched, StateFetching, Step
from tests.sentences import complete
from tests.unit.joining import call, manifest, own_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_home(tmp_path, monkeypatch)


# The command


@pytest.mark.catalogue(3, 4, 7, 9)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--use-docker", "--check"), "goes without --identity-path, --log-file and --check"),
        (("--json",), "--json goes with --check"),
        ((), "name the run"),
        (("run.toml", "--token", "hf_secret", "--skip-input"), "every user of this machine"),
        (("run.toml", "--skip-input", "--host_port", "1"), "lets in whom its operator lists"),
        (
            ("run.toml", "--skip_input", "--account", "bob"),
            "give the secret of account 'bob' with --token @FILE",
        ),
        (("hub.toml", "--skip_input"), "give a Hugging Face token with --token @FILE or in HF_TOKEN"),
        (("run.toml", "--gpu_id", "7x", "--skip_input"), "whole numbers from 0"),
        (("run.toml", "--email", "nobody"), "is not an email address"),
        (("run.toml", "--announce_ip", "a b"), "neither an IP address nor a host name"),
        (("run.toml", "--account", "a b"), "is no account"),
        (("run.toml", "--host-port", "0"), "0 is not in the range"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], words: str) -> None:
    manifests.save(manifest(), Path("run.toml"))
    manifests.save(manifest(accounts="huggingface"), Path("hub.toml"))
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    complete(done.output.strip().splitlines()[-1], words)
    assert "hf_secret" not in done.output
    assert not Path(".local").exists()
    assert not Path(".config").exists()


def test_an_invitation_is_its_account_s() -> None:
    manifests.save(manifest(), Path("run.toml"))
    Path("invitation").write_text("carol:s3cret\n")
    done = call("run.toml", "--skip-input", "--account", "bob")
    assert done.exit_code == 2
    assert "the invitation is one of account carol" in done.output


def test_a_join_goes_on_in_a_container(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests.save(manifest(), Path("run.toml"))
    Path("invitation").write_text("carol:s3cret\n")
    started: list[docker.Container] = []
    monkeypatch.setattr(docker, "start", lambda container: started.append(container) or 0)
    done = call("run.toml", "--skip-input", "--use_docker", "--gpu-id", "cpu", "--announce-ip", "203.0.113.9")
    assert done.exit_code == 0, done.output
    (container,) = started
    assert container.run == "run.toml"
    assert list(container.flags) == [
        "--gpu-id", "cpu", "--host-port", "49200", "--account", "carol", "--announce-ip", "203.0.113.9",
    ]  # fmt: skip
    assert (list(container.ports), container.gpus) == ([49200], False)
    assert container.secret is not None
    assert container.secret.split() == ("carol", "s3cret")
    assert not (home / ".local").exists()


def test_a_machine_that_is_too_small_is_told_what_to_do() -> None:
    manifests.save(manifest(min_ram_gib=1e5), Path("run.toml"))
    done = call("run.toml", "--skip-input")
    assert done.exit_code == 10
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("agoractl: memory: ")
    assert last.endswith("the run asks for 100000 (admission.min_ram_gib); use a machine with more")


@pytest.mark.catalogue(10)
def test_another_system_is_told_which_one_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests.save(manifest(), Path("run.toml"))
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    done = call("run.toml", "--skip-input", "--account", "bob")
    assert done.exit_code == 10
    complete(done.output.strip().splitlines()[-1], "agoractl: system: Darwin", "run agorad on Linux")


def test_a_look_starts_nothing(home: Path) -> None:
    manifests.save(manifest(min_ram_gib=1e5), Path("run.toml"))
    done = CliRunner().invoke(join, ["run.toml", "--check", "--json"])
    assert done.exit_code == 5
    found = json.loads(done.stdout)["findings"]
    assert {"system", "Python", "memory", "port"} <= {entry["name"] for entry in found}
    assert {entry["verdict"] for entry in found} <= {"ok", "warn", "fail"}
    assert not (home / ".config").exists()
    assert not (home / ".local").exists()


# On a terminal

FAKE = """
import json, sys
import agorad.cli.join as cli

class Fake:
    def __init__(self, say, *, warm_steps): pass
    def run(self, nodes, secret):
        first = nodes[0]
        told = {"port": first.port, "outside": first.announce_port, "gpus": [n.gpu for n in nodes],
                "account": None if secret is None else secret.split()[0],
                "length": 0 if secret is None else len(secret.split()[1])}
        print("RESULT", json.dumps(told))
        return 0

cli.Live = Fake
cli.join(prog_name="join")
"""


def at_the_terminal() -> None:
    """The child's only one; and Ctrl-C means something, also where whoever runs the tests ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A join in a terminal of its own, with nodes that only say what they would be."""

    def __init__(self, *arguments: str) -> None:
        self.side, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", FAKE, *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=at_the_terminal,
        )
        os.close(child)
        self.text = ""

    def until(self, words: str) -> None:
        end = time.monotonic() + 20
        while words not in self.text.replace("\r\n", " "):
            assert time.monotonic() < end, f"no {words!r} in {self.text!r}"
            if select.select([self.side], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.side, 4096).decode()
                except OSError:  # the child is gone
                    assert words in self.text.replace("\r\n", " "), self.text

    def says(self, question: str, answer: str) -> None:
        self.until(question)
        self.text = ""
        os.write(self.side, f"{answer}\n".encode())

    def result(self) -> dict[str, Any]:
        self.until("RESULT")
        self.until("}")
        assert self.process.wait(20) == 0
        told: dict[str, Any] = json.loads(self.text.partition("RESULT")[2].strip())
        return told

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.side)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as server:
        return int(server.getsockname()[1])


def test_questions_on_a_terminal(terminals: list[Terminal]) -> None:
    manifests.save(manifest(), Path("run.toml"))
    port = free_port()
    terminals.append(first := Terminal("run.toml"))
    first.until("compare this key with what the operator published")
    first.says("Your account", "no such name")
    first.says("is no account", "alice")
    first.says("The secret of account alice (not shown)", "s3cret-of-alice")
    first.says("Email (optional, stays on this machine)", "nonsense")
    assert "s3cret" not in first.text
    first.says("'nonsense' is not an email address", "")
    first.says("TCP port of this node, which others must be able to reach [49200]", "70000")
    first.says("'70000' is no port", str(port))
    first.says("Address that others reach this machine at (empty: found by itself)", "no where")
    first.says("neither an IP address nor a host name", "node.example.org")
    first.says(f"Port that others reach it at [{port}]", "7000")
    told = first.result()
    assert told == {"port": port, "outside": 7000, "gpus": [0], "account": "", "length": 15}
    assert "s3cret" not in first.text
    assert "s3cret" not in answers.path().read_text()
    assert stat.S_IMODE(answers.path().stat().st_mode) == 0o600
    config = (answers.states() / "a-run/gpu0/agorad.toml").read_text()
    assert "/dns4/node.example.org/tcp/7000" in config
    assert 'account = "alice"' in config

    terminals.append(again := Terminal("run.toml"))  # only what is not kept is asked again
    again.says("The secret of account alice (not shown)", "s3cret-of-alice")
    assert again.result() == told | {"port": port}

    terminals.append(anew := Terminal("run.toml", "--reconfigure", "--account", "bob"))
    anew.says("The secret of account bob", "x")
    anew.says("Email", "bob@example.org")
    anew.says("TCP port", str(port))
    anew.says("Address that others", "")
    assert anew.result()["outside"] == 0
    assert answers.recall()["a-run"].email == "bob@example.org"


@pytest.mark.catalogue(2)
def test_a_token_is_asked_until_there_is_one(terminals: list[Terminal]) -> None:
    manifests.save(manifest(accounts="huggingface"), Path("run.toml"))
    terminals.append(first := Terminal("run.toml", "--host-port", str(free_port())))
    first.says("Hugging Face token (not shown)", " ")
    first.until("the token is empty")
    first.says("Hugging Face token (not shown)", "hf_abcdef")
    assert "hf_abc" not in first.text
    first.says("Email", "")
    first.says("Address that others", "")
    assert first.result()["length"] == 9


def test_ctrl_c_at_a_question_keeps_nothing(terminals: list[Terminal], home: Path) -> None:
    manifests.save(manifest(), Path("run.toml"))
    terminals.append(first := Terminal("run.toml"))
    first.until("Your account")
    end = time.monotonic() + 20
    while first.process.poll() is None and time.monotonic() < end:
        os.write(first.side, b"\x03")  # again: one that comes just before the line is read is not heard
        time.sleep(0.2)
    assert first.process.returncode not in (None, 0)  # click's own; agoractl ends with 130
    assert not (home / ".config").exists()


# What nodes do, in words


def entry(event: Event, at: float = 0.0) -> dict[str, Any]:
    return {"id": 1, "at": at, "event": event_name(type(event)), **event_fields(event)}


def heard(narrator: lines.Narrator, *events: Event) -> list[str]:
    return [f"[{tag}] {text}" for event in events for tag, text in narrator.hear(entry(event))]


def granted(why: str) -> CertificateGranted:
    return CertificateGranted(account="alice", stage=2, expires=9.0, authority="12Dauthor", why=why)


def test_the_phases_of_a_join() -> None:
    now = 0.0
    narrator = lines.Narrator(2, clock=lambda: now)
    place = JoinQueued(position=3, eta_s=65.0, paused=False, waitlisted=False, stage=2)
    assert heard(narrator, place, place, attrs.evolve(place, position=1, eta_s=None, paused=True)) == [
        "[AUTH] place 3 in the queue for stage 2; about 1 min 5 s to go",
        "[AUTH] place 1 in the queue for stage 2; the operator has paused joins",
    ]
    late = JoinDelayed(why="no answer", retry_s=0.4)
    assert len(heard(narrator, late, late)) == 1
    now = 61.0
    assert len(heard(narrator, late)) == 1
    assert heard(narrator, granted("it has the fewest"), granted("renewed"))[0] == (
        "[AUTH] access granted to alice for stage 2: it has the fewest"
    )
    part = StateFetching(donor="12Ddonor", step=7, bytes=0, size=2_000_000_000, seconds=0.0)
    assert heard(narrator, part) == ["[DOWNLOAD] state of step 7: 2.0 GB from Ddonor"]
    now = 63.0
    assert heard(narrator, attrs.evolve(part, bytes=10, seconds=2.0)) == []
    now = 67.0
    assert heard(narrator, attrs.evolve(part, bytes=500_000_000, seconds=25.0)) == [
        "[DOWNLOAD] 25% of 2.0 GB, 20.0 MB/s, 1 min 15 s to go"
    ]
    done = StateFetched(donor="12Ddonor", step=7, bytes=2_000_000_000, kept=0, line=1, seconds=99.0)
    assert heard(narrator, done)[0] == "[DOWNLOAD] state of step 7: 2.0 GB in 99.0 s"
    step = Step(stage=2, replica="12Dme", step=8, samples=3)
    assert heard(narrator, step) == []
    assert heard(narrator, Phase(from_="syncing", to="warming", why="w"), step, step)[1:] == [
        "[SYNC] warmed up 1 of 2 steps", "[SYNC] warmed up 2 of 2 steps",
    ]  # fmt: skip
    assert heard(narrator, Phase(from_="warming", to="active", why="w"), step) == [
        "[TRAINING] active on stage 2: this node takes part in training (w)"
    ]
    ended = RoundFinished(
        round=1, stage=2, slice=0, members=["a", "b"], fraction=1.0, checksum="", drops=[], disagreement=0.0
    )
    assert heard(narrator, ended) == []
    status = {"phase": "active", "step": 9, "loss": 2.5, "peers": 4, "microbatches": {"added": 12}}
    said = "12 batches in the last minute, step 9, loss 2.500, 1 averaged, 4 peers"
    assert narrator.pulse(status) == ("PROGRESS", said)
    assert narrator.pulse(status | {"points": {"compute": 1.5, "presence": 1.0}})[1].endswith("2.5 points")


def test_events_that_are_unknown_or_of_another_version_give_no_line() -> None:
    narrator = lines.Narrator(2)
    for odd in ({}, {"event": "new_in_v9"}, {"event": "phase"}, {"event": "join_checking", "what": "soul"}):
        assert narrator.hear(odd) == []
    assert heard(narrator, Ready(seconds=1.0, addrs=[])) == []
    assert len(heard(narrator, Started(name="gpu0", role="worker", run="r", peer_id="12D", version="1"))) == 1
