"""What docker/compose.yaml asks of an engine, done with the kernel's own means: our nodes start in it.

No engine is needed: private namespaces over a copy of this machine (an overlay in memory that is made
read-only), with the service's account, volumes, folders in memory and command, and the state folder as the
Dockerfile leaves it. What is in the image (its Python, its packages) is this checkout's instead. Needs root.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import ROOT
from tests.system.booted import lacking
from tests.system.small_runs import make

LACKING = lacking()
pytestmark = [pytest.mark.skipif(LACKING != "", reason=LACKING), pytest.mark.long]
ACCOUNT = "1234"  # of the operator who made the run's folder; not the image's own
INSIDE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=256m tmpfs "$PLACE"
mkdir "$PLACE/upper" "$PLACE/work" "$PLACE/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$PLACE/upper",workdir="$PLACE/work" "$PLACE/root"
cd "$PLACE/root"
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
for seen in {seen}; do
  [ -e ".$seen" ] || {{ mkdir -p ".$seen"; mount --bind "$seen" ".$seen"; }}
  place="$seen"
  while [ "$place" != / ]; do place=$(dirname "$place"); chmod o+x ".$place"; done
done
rm -rf etc/agora var/lib/agora
install -d -o 10001 -g 10001 -m {mode} var/lib/agora
{mounts}
ip link set lo up
mount -o remount,ro .
exec chroot . setpriv --reuid {account} --regid {account} --clear-groups --no-new-privs --bounding-set=-all \\
  env -i -C /var/lib/agora HOME=/var/lib/agora PATH=/usr/bin:/bin PYTHONPATH={root} \\
  PYTHONDONTWRITEBYTECODE=1 sh -c {script}
"""
LIVE = """
{command} 2>/tmp/log &
for turn in $(seq 60); do
  {health} >/tmp/status 2>/tmp/error && break
  kill -0 $! || break
  sleep 0.2
done
touch /var/lib/agora/x /usr/x 2>/dev/null && echo "the root can be written"
kill $!
wait $!
echo "ended with $?"
cat /tmp/status /tmp/error /tmp/log
"""


def ours(words: list[str]) -> str:
    """A command of the image as this checkout's."""
    module = {"agorad": "agorad.main", "agoractl": "agorad.cli"}[words[0]]
    return shlex.join([sys.executable, "-m", module, *words[1:]])


def mounts(service: dict[str, Any], run: Path) -> str:
    """Shell lines for the service's volumes and folders in memory."""
    lines = []
    for entry in service["tmpfs"]:
        place, _, options = entry.partition(":")
        if place != "/tmp":
            lines += [f"mkdir -p .{place}", f"mount -t tmpfs -o {options} tmpfs .{place}"]
    for entry in service["volumes"]:
        source, target, *flags = re.sub(r"\$\{AGORA_RUN[^}]*\}", str(run), entry).split(":")
        lines.append(f"mkdir -p .{target}" if Path(source).is_dir() else f"touch .{target}")
        lines.append(f"mount --bind {shlex.quote(source)} .{target}")
        if flags == ["ro"]:
            lines.append(f"mount -o remount,bind,ro .{target}")
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["seed", "authority", "trainer"])
def test_a_service_of_the_compose_file_starts_and_is_healthy(name: str, tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    subprocess.run(["chown", "-R", f"{ACCOUNT}:{ACCOUNT}", str(run)], check=True)
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"][name]
    assert service["user"] == "${AGORA_UID:-1000}:${AGORA_GID:-1000}"
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    mode = re.search(r"install -d -o agora -g agora -m (\d+) /var/lib/agora", dockerfile)
    health = re.search(r"HEALTHCHECK .*CMD (\[.*\])", dockerfile)
    assert mode is not None
    assert health is not None
    live = LIVE.format(command=ours(service["command"]), health=ours(json.loads(health[1])))
    seen = {str(ROOT), sys.prefix, str(Path(sys.executable).resolve().parents[1])}
    script = INSIDE.format(
        seen=shlex.join(seen), mode=mode[1], mounts=mounts(service, run), account=ACCOUNT, root=ROOT,
        script=shlex.quote(live),
    )  # fmt: skip
    place = Path(tempfile.mkdtemp(prefix="agora-container-", dir="/var/tmp"))
    try:
        done = subprocess.run(
            ["unshare", "--fork", "--pid", "--mount", "--uts", "--ipc", "--net", "--kill-child=SIGKILL",
             "sh", "-c", script],
            env={"PATH": os.environ["PATH"], "PLACE": str(place)}, capture_output=True, text=True,
            check=False, timeout=110, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        place.rmdir()
    said = done.stdout + done.stderr
    assert "ended with 0" in done.stdout, said
    assert "can be written" not in done.stdout, said
    status = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"nodes"'))
    assert [node["role"] for node in status["nodes"]] == [name], said
