"""What the pages tell people to type is typed, page after page, in a home of its own with a small live run.

The pages are one story: the operator's makes and starts the run, contributors join it, and the operator's
last chapter ends it. Addresses, ports and sizes are put in; nothing else of a command is changed. What cannot
be typed here is listed with its reason in tests/documents.py. README's "Run your own swarm" is
tests/system/test_join.py's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.documents import PAGES, ROOT, STORY, Block, blocks, not_here
from tests.system.small_runs import free_ports

COMMAND_S = 180.0
"""For one command, on a machine that may be busy."""
LASTING = {
    r"agorad --config \S+agorad.toml$": '"event":"ready"',
    r"agoractl join (?!.*--check)": "[TRAINING] active",
    r"\S*agoractl demo ": "",
    r".* --(watch|follow)$": "worker-0-0",
}
"""What does not end by itself, and what it says once it works."""


@attrs.define
class Typist:
    """Types commands in a home, as a person would: what lasts in a terminal of its own."""

    home: Path
    open: list[tuple[str, subprocess.Popen[bytes], Path]] = attrs.field(factory=list)
    typed: set[str] = attrs.field(factory=set)

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "AGORA_", "HF_"))}
        invitation = self.home / "my-run" / "invitation"
        if invitation.exists():
            kept["AGORA_TOKEN"] = invitation.read_text().strip()
        return {
            **kept, "HOME": str(self.home), "XDG_STATE_HOME": str(self.home / ".local/state"),
            "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}", "NO_COLOR": "1",
        }  # fmt: skip

    def type(self, where: str, written: str, text: str) -> None:
        """``text`` is what was ``written`` with addresses and sizes put in."""
        self.typed.add(written)
        sign = next((sign for begins, sign in LASTING.items() if re.match(begins, written)), None)
        if re.match(r"agoractl join (?!.*--check)", written):
            self.leave("agoractl join")
        if sign is not None:
            self.begin(where, text, sign)
            return
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.home, env=self.environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=COMMAND_S, check=False,
        )  # fmt: skip
        wanted = (
            (0, 5) if re.search(r"doctor|--check", text) else (0,)
        )  # 5: of this machine it may find something
        assert done.returncode in wanted, f"{where}: {text}: {done.returncode}: {done.stdout}{done.stderr}"

    def begin(self, where: str, text: str, sign: str) -> None:
        log = self.home / f"terminal-{len(self.open)}-{time.monotonic_ns()}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=self.home, env=self.environment(), stdout=out, stderr=out,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.open.append((text, process, log))
        until = time.monotonic() + COMMAND_S
        while sign not in log.read_text():
            assert process.poll() is None, f"{where}: {text}: {process.returncode}: {log.read_text()}"
            assert time.monotonic() < until, f"{where}: {text}: not yet: {log.read_text()}"
            time.sleep(0.2)

    def leave(self, begins: str, *codes: int) -> None:
        """Ctrl-C in the terminals of these commands, the last one first; who was asked to leave, leaves."""
        for text, process, log in [entry for entry in reversed(self.open) if entry[0].startswith(begins)]:
            if process.poll() is None and "asked to leave" not in log.read_text():
                process.send_signal(signal.SIGINT)
            code = process.wait(60)
            assert code in (0, *codes), f"{text}: {code}: {log.read_text()}"
            self.open = [entry for entry in self.open if entry[1] is not process]


@pytest.fixture
def typist(tmp_path: Path) -> Iterator[Typist]:
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    for name, module in (("agoractl", "agorad.cli"), ("agorad", "agorad.main")):
        (home / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (home / "bin" / name).chmod(0o755)
    (home / "deploy").symlink_to(ROOT / "deploy")
    person = Typist(home)
    try:
        yield person
    finally:
        for _text, process, _log in person.open:
            process.terminate()
        for _text, process, _log in person.open:
            try:
                process.wait(35)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def chapter(name: str, begins: str, ends: str) -> list[tuple[Block, str]]:
    """The commands of a page from one heading to before another."""
    page = next(page for page in PAGES if page.name == name)
    lines = page.read_text().splitlines()
    first = lines.index(begins) if begins else 0
    last = lines.index(ends) if ends else len(lines)
    return [(b, c) for b in blocks(page, "sh") if first < b.line <= last for c in b.commands()]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_pages_from_making_a_run_to_its_end(typist: Typist) -> None:
    first = free_ports(8)
    page, own, home = first + 3, first + 4, typist.home
    small = f" --port {first} --set model.seq=64 --set training.target_batch=4 --stages 1"

    def filled(command: str) -> str:
        text = command.replace("203.0.113.9", "127.0.0.1")
        if command.startswith("agoractl run init"):
            text = text.replace("--preset demo", "--preset demo" + small)
        text = text.replace("https://example.org/run.toml", f"http://127.0.0.1:{page}/run.toml")
        text = re.sub(r"\bRUN\b", "my-run/run.toml", text)
        if re.match(r"agoractl join ", text):
            text += f" --gpu-id cpu --host-port {own}"
        return text.replace("max_nodes_per_account=4", "max_nodes_per_account=20")

    for name, begins, ends in STORY:
        for block, command in chapter(name, begins, ends):
            if not_here(command) or (command.startswith("promtool") and not shutil.which("promtool")):
                continue
            typist.type(f"{name}:{block.line}", command, filled(command))
            if command.startswith("agoractl run init"):
                settings = home / "my-run" / "authority" / "agorad.toml"
                settings.write_text(settings.read_text().replace("49180", str(page)))
            if command.startswith("install -m 600"):  # what the page asks the person to do
                (home / "agora-secret").write_text((home / "my-run" / "invitation").read_text())
    assert (home / "authority-copy.sqlite").stat().st_size > 0
    typist.leave("agoractl join")
    typist.leave("agorad")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_readme_s_demo_and_what_is_typed_beside_it(typist: Typist) -> None:
    folder = typist.home / "swarm"

    def worker() -> int:
        found = json.loads((folder / "swarm.json").read_text())["nodes"]
        return next(node["pid"] for node in found if node["name"] == "worker-0-1")

    for block, command in chapter("README.md", "", "## What it does"):
        if not_here(command):
            continue
        text = command.replace("/tmp/swarm", str(folder)).replace(".venv/bin/", "")
        if " demo " in text:
            text += " --stages 1 --workers 2 --steps 20 --set training.target_batch=8"
        if "PID" in text:
            text = text.replace("PID", str(worker()))
        typist.type(f"README.md:{block.line}", command, text)
        if " demo " in text:
            until = time.monotonic() + COMMAND_S
            while not (folder / "swarm.json").exists():
                assert time.monotonic() < until, typist.open[0][2].read_text()
                time.sleep(0.2)
    typist.leave("agoractl status", 130)
    typist.leave("agoractl events", 130, -signal.SIGINT)
    ((_, demo, log),) = typist.open
    assert demo.wait(2 * COMMAND_S) == 0, log.read_text()
    report = json.loads((typist.home / "report.json").read_text())
    assert report["steps"] >= 20
    assert report["microbatches"]["lost"] == 0
