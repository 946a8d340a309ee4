"""A person without root on a machine with systemd: `agoractl join` makes a service of the person's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from tests.system.booted import ROOT, Machine, lacking
from tests.system.test_systemd import host, make_run

LACKING = lacking()
pytestmark = [pytest.mark.skipif(LACKING != "", reason=LACKING), pytest.mark.long]
UNIT = ".config/systemd/user/agorad@.service"
DROP_IN = f"[Service]\nEnvironment=PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1\nRestartSec=200ms\n"


@attrs.frozen
class Person:
    """An account inside, logged in as far as systemd knows."""

    machine: Machine
    uid: str

    def run(
        self, *words: str, code: int | None = 0, session: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command of hers."""
        runtime = (f"XDG_RUNTIME_DIR=/run/user/{self.uid}",) if session else ()
        return self.machine.run(
            "setpriv", "--reuid", self.uid, "--regid", self.uid, "--clear-groups", "env", "-C", "/home/ann",
            "HOME=/home/ann", "USER=ann", "LOGNAME=ann", f"PYTHONPATH={ROOT}", "PYTHONDONTWRITEBYTECODE=1",
            *runtime, *words, code=code,
        )  # fmt: skip

    def ctl(
        self, *words: str, code: int | None = 0, session: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """``agoractl``."""
        return self.run(sys.executable, "-m", "agorad.cli", *words, code=code, session=session)

    def show(self, name: str) -> str:
        """A property of her node's unit."""
        return self.run("systemctl", "--user", "show", "agorad@0", "--value", f"-p{name}").stdout.strip()


def test_a_join_without_root_is_a_service_of_the_user(tmp_path: Path) -> None:
    small = ("model.seq=32", "model.layers=[1]", "training.target_batch=2", "training.total_steps=100000")
    with host(make_run(tmp_path / "run", *small), watchdog_s=40) as here:
        machine = here.machine
        here.ctl("service", "install", "seed", "authority", "trainer", "--now")
        machine.run("useradd", "-m", "ann")
        ann = Person(machine, machine.run("id", "-u", "ann").stdout.strip())
        for place in (Path(sys.executable).resolve(), ROOT):  # may lie in a home that is closed to her
            machine.run("chmod", "o+x", *map(str, place.parents))
        home = machine.root / "home/ann"
        shutil.copy(tmp_path / "run" / "run.toml", home)
        (home / "token").write_text((tmp_path / "run" / "invitation").read_text())
        secret = (home / "token").read_text().strip().partition(":")[2]
        here.put(f"/home/ann/{UNIT}.d/test.conf", DROP_IN)
        machine.run("chown", "-R", "ann:ann", "/home/ann")
        join = ("join", "run.toml", "--skip-input", "--gpu-id", "cpu", "--token", "@token")

        # Not logged in: the foreground would be it, for the reason that is said.
        refused = ann.ctl(*join, "--host-port", "80", code=None, session=False)
        assert refused.returncode != 0
        assert not (home / UNIT).exists()

        machine.run("systemctl", "start", f"user@{ann.uid}")
        said = ann.ctl(*join).stderr
        assert "sudo loginctl enable-linger ann" in said
        assert "`systemctl --user stop agorad@0` leaves the run cleanly" in said
        here.until(lambda: ann.show("ActiveState") == "active", 90, "node of ann's")
        assert list((machine.root / "run/user" / ann.uid).rglob("secret")) == []
        node = json.loads(ann.ctl("status", "--json").stdout)["nodes"][0]
        assert (node["name"], node["stage"]) == ("gpu0", 0)
        owner = Path(f"/proc/{machine.pid}/root/proc/{node['pid']}/status").read_text()
        assert f"Uid:\t{ann.uid}\t" in owner

        # Killed it comes back; asked to leave it stays away; joined again it is there, without a secret.
        ann.run("systemctl", "--user", "kill", "-s", "KILL", "agorad@0")
        here.until(lambda: (ann.show("NRestarts"), ann.show("ActiveState")) == ("1", "active"), 60, "restart")
        ann.ctl("leave")
        here.until(lambda: ann.show("ActiveState") == "inactive", 40, "end")
        assert (ann.show("ExecMainStatus"), ann.show("Result")) == ("0", "success")
        machine.run("loginctl", "enable-linger", "ann")
        again = ann.ctl("join", "--skip-input").stderr
        assert "enable-linger" not in again
        here.until(lambda: ann.show("ActiveState") == "active", 90, "node of ann's, again")

        planned = json.loads(ann.ctl("service", "uninstall", "--dry-run", "--json").stdout)
        assert planned["changed"]
        assert (home / UNIT).exists()
        ann.ctl("service", "uninstall")
        assert not (home / UNIT).exists()
        assert ann.show("ActiveState") == "inactive"
        assert list((home / ".local/state/agora").rglob("identity.key")) != []
        assert secret not in machine.run("journalctl", "--no-pager", "-o", "cat").stdout
        assert "takes root" in ann.ctl("service", "uninstall", code=2).stderr
