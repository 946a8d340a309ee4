"""The service under a real systemd, booted for the test: install, start, die, hang, stop, remove.

The whole of it: ready means ready, SIGKILL and a hung loop bring a restart, wrong settings do not, a stop
is a clean end, and after an uninstall nothing is left but the state folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import jsonschema
import pytest
import tomli_w

from tests.system.booted import ENVIRONMENT, HOME, Machine, booted, lacking

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "docs" / "cli-schemas.json"
LACKING = lacking()
pytestmark = pytest.mark.skipif(LACKING != "", reason=LACKING)

HANG = """
import signal, time
def hang(*_): time.sleep(3600)
signal.signal(signal.SIGUSR2, hang)  # the only thread that counts stops here
"""
DROP_IN = f"""[Service]
Environment=PYTHONPATH=/opt/hang:{ROOT} PYTHONDONTWRITEBYTECODE=1
RestartSec=200ms
WatchdogSec=%d
TimeoutAbortSec=2
"""
NOT_OURS = re.compile(
    r"/(var/log|var/lib/systemd|var/lib/private|var/cache|run|tmp|var/tmp|dev)(/|$)|/etc/.*-$|\.pwd\.lock$|"
    r"/etc/\.updated$|/var/\.updated$|/etc/machine-id$"
)
"""What a system writes by itself: journal, backups of its account files, stamps."""


@attrs.frozen
class Host:
    """The booted machine with our command."""

    machine: Machine
    upper: Path

    def ctl(
        self, *words: str, code: int | None = 0, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """``agoractl`` inside, as root."""
        return self.machine.run(
            "env", f"PYTHONPATH={ROOT}", "PYTHONDONTWRITEBYTECODE=1", "AGORA_TOKEN=",
            sys.executable, "-m", "agorad.cli", *words, code=code, timeout=timeout,
        )  # fmt: skip

    def status(self, *words: str) -> list[dict[str, Any]]:
        """The nodes that answer."""
        return json.loads(self.ctl("status", "--json", *words).stdout)["nodes"]

    def put(self, path: str, text: str) -> None:
        """A file of root's that everybody may read."""
        place = self.machine.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def files(self) -> dict[str, str]:
        """What differs from the machine outside, by path, with the contents' sum."""
        script = f"cd {self.upper} && find . -type f -exec md5sum {{}} + ; find . ! -type f ! -type d"
        done = subprocess.run(
            ["nsenter", "-t", str(self.machine.pid), "-m", "sh", "-c", script],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        rows = (line.rpartition(" ") for line in done.stdout.splitlines())
        found = {path.removeprefix("."): summed for summed, _, path in rows}
        return {
            path: summed
            for path, summed in found.items()
            if not NOT_OURS.search(path) and not _same(Path(path), summed.strip())
        }

    def until(self, true: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait."""
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, (
                f"no {what}; {self.machine.run('journalctl', '-n60', '-ocat').stdout}"
            )
            time.sleep(0.1)


@contextmanager
def host(run: Path, watchdog_s: int = 5) -> Iterator[Host]:
    """Booted, with a run's files in /var/lib/agora; the program is this checkout's."""
    with booted() as machine:
        it = Host(machine, machine.place / "upper")
        it.put("/opt/hang/sitecustomize.py", HANG)
        for unit in ("agorad", "agorad@"):
            it.put(f"/etc/systemd/system/{unit}.service.d/test.conf", DROP_IN % watchdog_s)
        shutil.copytree(run, machine.root / "var/lib/agora")
        yield it


def _same(path: Path, summed: str) -> bool:
    """Whether the file says the same outside: it was written, and written back."""
    return path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() == summed


def make_run(folder: Path, *settings: str) -> Path:
    """What an operator makes."""
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run(
        [sys.executable, "-m", "agorad.cli", "run", "init", "t", "--dir", str(folder), *words],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return folder


def pid(found: Host, unit: str) -> int:
    return int(found.machine.show(unit, "MainPID")["MainPID"])


SEED = {"node": {"role": "seed", "run": "/var/lib/agora/run.toml", "state": "/var/lib/agora/seed",
                 "listen": ["/ip4/127.0.0.1/tcp/49170"]}}  # fmt: skip


@pytest.mark.timeout(300)
def test_a_node_lives_as_a_service(tmp_path: Path) -> None:
    with host(make_run(tmp_path / "run")) as here:
        machine = here.machine
        before = here.files()
        # Installed once, shown before, and a second time for nothing.
        planned = json.loads(here.ctl("service", "install", "--dry-run", "--json").stdout)
        jsonschema.validate(planned, json.loads(SCHEMAS.read_text())["$defs"]["service"])
        assert here.files() == before
        (machine.root / "var/lib/agora/seed/agorad.toml").rename(machine.root / "root/aside.toml")
        here.put("/etc/agora/agorad.toml", tomli_w.dumps(SEED | {"worker": {"slotz": 3}}))
        made = json.loads(here.ctl("service", "install", "--json", "agorad").stdout)
        assert [change["kind"] for change in made["files"]] == ["created"] * 4
        assert len(planned["files"]) == 4
        again = json.loads(here.ctl("service", "install", "--json", "agorad").stdout)
        assert (again["changed"], again["files"], again["steps"]) == (False, [], [])
        here.put("/etc/tmpfiles.d/agora.conf", "# spoilt\n")
        mended = here.ctl("service", "install", "agorad").stdout
        assert "~ /etc/tmpfiles.d/agora.conf" in mended
        assert "-# spoilt" in mended
        assert machine.show("agorad", "UnitFileState") == {"UnitFileState": "enabled"}
        exposure = machine.run("systemd-analyze", "security", "--no-pager", "agorad.service").stdout
        assert float(re.search(r"exposure level for \S+: ([\d.]+)", exposure)[1]) <= 3.0

        # Wrong settings: said where to look, and not tried again.
        machine.run("systemctl", "start", "agorad", code=1)
        ended = machine.show("agorad", "ActiveState", "ExecMainStatus", "NRestarts")
        assert ended == {"ActiveState": "failed", "ExecMainStatus": "2", "NRestarts": "0"}
        assert "slotz" in machine.journal("agorad")
        assert "slotz" in here.ctl("status", code=2).stderr

        # Active means ready: the command returns, and the node answers.
        here.put("/etc/agora/agorad.toml", tomli_w.dumps(SEED))
        machine.run("systemctl", "reset-failed", "agorad")
        machine.run("systemctl", "start", "agorad")
        (node,) = here.status()
        assert (node["role"], node["phase"], node["pid"]) == ("seed", "active", pid(here, "agorad"))
        assert (machine.root / "run/agora/seed/control.sock").is_socket()
        machine.wait_for("agorad", 10, StatusText="active, 0 peers")
        said = machine.run(
            "journalctl", "-o", "json", "AGORA_EVENT=ready", "_SYSTEMD_UNIT=agorad.service"
        ).stdout
        fields = json.loads(said)
        assert (fields["PRIORITY"], fields["MESSAGE"][:18]) == ("6", "[NODE] ready after")
        assert json.loads(fields["AGORA_SECONDS"]) > 0
        identity = (machine.root / "var/lib/agora/seed/identity.key").stat()
        assert (identity.st_mode & 0o777, identity.st_uid != 0) == (0o600, True)
        machine.run("systemctl", "reload", "agorad")
        assert here.status()[0]["pid"] == node["pid"]

        # Restarted by its owner: it begins anew in the same process, and systemd sees no end.
        here.ctl("restart", "--config", "/etc/agora/agorad.toml")
        machine.wait_for("agorad", 20, NRestarts="0", ActiveState="active")
        (anew,) = here.status()
        assert (anew["pid"], anew["peer_id"]) == (node["pid"], node["peer_id"])

        # Killed: there again, as the same node.
        machine.run("kill", "-KILL", str(node["pid"]))
        machine.wait_for("agorad", 20, NRestarts="1", ActiveState="active")
        (back,) = here.status()
        assert back["peer_id"] == node["peer_id"]
        assert back["pid"] != node["pid"]

        # Hung: ended by the watchdog, with the place in the journal, and there again.
        machine.run("kill", "-USR2", str(back["pid"]))
        machine.wait_for("agorad", 30, NRestarts="2", ActiveState="active")
        assert "in hang" in machine.journal("agorad")

        # Stopped: a clean end.
        began = time.monotonic()
        machine.run("systemctl", "stop", "agorad")
        assert time.monotonic() - began < 30
        ended = machine.show("agorad", "ActiveState", "ExecMainStatus", "Result", "NRestarts")
        assert ended == {
            "ActiveState": "inactive",
            "ExecMainStatus": "0",
            "Result": "success",
            "NRestarts": "2",
        }

        # Removed while it runs: nothing is left but the state folder, and that is root's.
        machine.run("systemctl", "start", "agorad")
        (machine.root / "etc/agora/agorad.toml").unlink()
        (machine.root / "etc/agora").rmdir()
        here.ctl("service", "uninstall")
        left = {path: summed for path, summed in here.files().items() if before.get(path) != summed}
        assert [path for path in left if not path.startswith("/var/lib/agora/")] == [f"{HOME}/aside.toml"]
        assert (machine.root / "var/lib/agora/seed/identity.key").stat().st_uid == 0
        assert not (machine.root / "run/agora").exists()
        assert machine.run("id", "agora", code=1).stdout == ""
        assert machine.run("systemctl", "cat", "agorad", code=None).returncode != 0
        assert "not installed" in here.ctl("service", "uninstall").stdout


@pytest.mark.long
@pytest.mark.timeout(500)
def test_two_workers_join_train_die_and_leave_as_services(tmp_path: Path) -> None:
    small = ("model.seq=32", "model.layers=[1]", "training.target_batch=2", "training.total_steps=100000")
    with host(make_run(tmp_path / "run", *small), watchdog_s=40) as here:
        machine, state = here.machine, here.machine.root / "var/lib/agora"
        here.ctl("service", "install", "seed", "trainer", "--now")
        shutil.copytree(tmp_path / "run", machine.root / "root/run")
        secret = (tmp_path / "run" / "invitation").read_text().strip().partition(":")[2]
        # The authority is away: the units start, and are not active, since they are not in.
        joined = here.ctl("join", f"{HOME}/run/run.toml", "--skip-input", "--gpu-id", "cpu").stdout
        assert "agorad@0.service started" in joined
        second = tomllib.loads((state / "0/agorad.toml").read_text())
        second["node"] |= {"name": "gpu1", "listen": ["/ip4/0.0.0.0/tcp/49201"], "run": "../run.toml"}
        second["node"].pop("identity")
        second["metrics"]["listen"] = "127.0.0.1:49191"
        second["worker"]["secret_file"] = "invitation"
        here.put("/var/lib/agora/1/agorad.toml", tomli_w.dumps(second))
        here.put("/var/lib/agora/1/invitation", secret)
        here.ctl("service", "install", "1", "--now")
        said = lambda: machine.show("agorad@0", "StatusText").get("StatusText", "")  # noqa: E731
        here.until(lambda: said().startswith("joining"), 60, "word of joining")
        assert machine.show("agorad@0", "ActiveState") == {"ActiveState": "activating"}
        handed = list((machine.root / "run/agora").rglob("secret"))
        assert [path.read_text() for path in handed] == [secret]
        here.ctl("service", "install", "authority", "--now")
        for name in ("agorad@0", "agorad@1"):
            machine.wait_for(name, 90, ActiveState="active", NRestarts="0")
        assert list((machine.root / "run/agora").rglob("secret")) == []
        found = {node["name"]: node for node in here.status()}
        assert sorted(found) == ["authority", "gpu0", "gpu1", "seed", "trainer"]
        assert found["gpu0"]["peer_id"] != found["gpu1"]["peer_id"]
        assert found["gpu0"]["stage"] == found["gpu1"]["stage"] == 0

        def steps(kind: str) -> list[int]:
            lines = (state / "0" / "events.jsonl").read_text().splitlines()
            return [event["step"] for event in map(json.loads, lines) if event["event"] == kind]

        here.until(lambda: max(steps("saved"), default=0) >= 20, 120, "snapshot")
        # Killed: there again, with its own snapshot; the other one did not notice.
        before = pid(here, "agorad@1")
        machine.run("systemctl", "kill", "-s", "KILL", "agorad@0")
        machine.wait_for("agorad@0", 60, NRestarts="1", ActiveState="active")
        assert [step >= 20 for step in steps("resumed")] == [True]
        assert pid(here, "agorad@1") == before
        # Joined again on a terminal: it tells what the node does, and Ctrl-C ends the telling only.
        machine.run("systemctl", "stop", "agorad@0")
        words = (
            f"exec env PYTHONPATH={ROOT} {sys.executable} -m agorad.cli join {HOME}/run/run.toml --skip-input"
        )
        terminal = subprocess.Popen(
            machine.inside("script", "-qefc", f"{words} --gpu-id cpu", "/dev/null"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**ENVIRONMENT, "TERM": "dumb"},
        )  # fmt: skip
        try:
            machine.wait_for("agorad@0", 60, ActiveState="active")
            time.sleep(2)
            assert terminal.stdin is not None
            terminal.stdin.write(b"\x03")
            terminal.stdin.flush()
            told = terminal.communicate(timeout=20)[0].decode()
        finally:
            terminal.kill()
        assert "Ctrl-C ends this display, not the node" in told, told
        assert "[NODE] starting on cpu; its log is `journalctl -u agorad@0`" in told, told
        assert terminal.returncode == 0, told
        assert machine.show("agorad@0", "ActiveState") == {"ActiveState": "active"}

        # Stopped while it works: it drains.
        began = time.monotonic()
        machine.run("systemctl", "stop", "agorad@0", "agorad@1")
        assert time.monotonic() - began < 30
        for name in ("agorad@0", "agorad@1"):
            ended = machine.show(name, "ActiveState", "ExecMainStatus", "Result")
            assert ended == {
                "ActiveState": "inactive",
                "ExecMainStatus": "0",
                "Result": "success",
            }, machine.journal(name)
        journal = machine.run("journalctl", "--no-pager", "-o", "cat").stdout
        assert secret not in journal
        here.ctl("service", "uninstall")
        assert machine.run("systemctl", "list-units", "--all", "--no-legend", "agorad*").stdout == ""
