"""A systemd of the tests' own: process 1 of private namespaces, over a copy of this machine.

Needs root, unshare and systemd. Nothing that happens inside is seen outside: the root is an overlay whose
upper side is in memory and thrown away, /run and /tmp are fresh, and the network has nothing but a
loopback. A checkout or interpreter that lies where the overlay shows nothing of it (under /tmp, on a mount
of its own) is bound to its place. Ends with the context, with everything that runs inside.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

INIT = Path("/lib/systemd/systemd")
ROOT = Path(__file__).parents[2]
BOOT_S = 60.0
HOME = "/root"
ENVIRONMENT = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": HOME, "NO_COLOR": "1"}
PREPARE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=1g tmpfs "$BOOT"
mkdir "$BOOT/upper" "$BOOT/work" "$BOOT/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$BOOT/upper",workdir="$BOOT/work" "$BOOT/root"
cd "$BOOT/root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
for seen in "$CHECKOUT" "$INTERPRETER"; do
  if [ ! -e ".$seen/pyproject.toml" ] && [ ! -e ".$seen/pyvenv.cfg" ]; then
    mkdir -p ".$seen"
    mount --bind "$seen" ".$seen"
  fi
done
ip link set lo up
rm -rf etc/systemd/system/*.wants var/lib/agora
export container=lxc
exec chroot . {init} --system --unit=multi-user.target --log-level=warning --show-status=0
"""


def lacking() -> str:
    """Why no systemd can be booted here; empty if one can."""
    if os.geteuid() != 0:
        return "booting a systemd takes root"
    for program in ("unshare", "nsenter", "systemctl", "ip"):
        if shutil.which(program) is None:
            return f"{program} is not there (Debian: apt install systemd util-linux iproute2)"
    if not INIT.exists():
        return f"there is no {INIT} (Debian: apt install systemd)"
    tried = subprocess.run(
        ["unshare", "--fork", "--pid", "--mount", "--cgroup", "sh", "-c",
         "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt && mkdir /mnt/u /mnt/w /mnt/r && "
         "mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /mnt/r"],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    return f"no private namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@attrs.frozen
class Machine:
    """The booted one. ``root`` is its root folder, reachable from outside."""

    pid: int
    place: Path
    """Where the overlay is, inside."""

    @property
    def root(self) -> Path:
        """As seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    def inside(self, *command: str) -> list[str]:
        """The command that runs this one inside."""
        return ["nsenter", "-t", str(self.pid), "-p", "-m", "-n", "-u", "-i", "-r", "-w", *command]

    def run(
        self, *command: str, code: int | None = 0, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """A command inside; asserts its exit code unless that is None."""
        done = subprocess.run(
            self.inside(*command),
            capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )  # fmt: skip
        assert code is None or done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        out = self.run("systemctl", "show", unit, *(f"-p{name}" for name in properties)).stdout
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def wait_for(self, unit: str, timeout: float, **wanted: str) -> dict[str, str]:
        """Until the unit's properties are those."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.show(unit, *wanted)
            if found == wanted:
                return found
            assert time.monotonic() < deadline, f"{unit}: {found}, not {wanted}\n{self.journal(unit)}"
            time.sleep(0.1)

    def journal(self, unit: str) -> str:
        """What the unit said."""
        return self.run("journalctl", "-u", unit, "--no-pager", "-o", "cat", code=None).stdout


@contextmanager
def booted() -> Iterator[Machine]:
    """A machine that is up."""
    place = Path(tempfile.mkdtemp(prefix="agora-boot-", dir="/var/tmp"))
    command = ["unshare", "--fork", "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup"]
    process = subprocess.Popen(
        [*command, "--kill-child=SIGKILL", "sh", "-c", PREPARE.replace("{init}", str(INIT))],
        env={
            "PATH": os.environ["PATH"], "BOOT": str(place), "CHECKOUT": str(ROOT), "INTERPRETER": sys.prefix,
        }, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield _up(process, place)
    finally:
        process.send_signal(signal.SIGKILL)  # and with it process 1, and with that everything inside
        process.communicate()
        place.rmdir()


def _up(process: subprocess.Popen[bytes], place: Path) -> Machine:
    deadline = time.monotonic() + BOOT_S
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while True:
        assert process.poll() is None, (process.stdout.read() if process.stdout else b"").decode()
        assert time.monotonic() < deadline, f"no systemd after {BOOT_S} s"
        found = children.read_text().split()
        if found and Path(f"/proc/{found[0]}/comm").read_text().strip() == "systemd":
            machine = Machine(int(found[0]), place)
            state = machine.run("systemctl", "is-system-running", code=None).stdout.strip()
            if state in ("running", "degraded"):
                return machine
        time.sleep(0.1)
