"""What ``agoractl service`` does on WSL2, beside what it does on every Linux.

Two files and one program. ``/etc/wsl.conf`` gets ``systemd=true``: without it there is no systemd to install
in, and Windows has to start WSL again. The Windows user's ``.wslconfig`` gets ``vmIdleTimeout=-1``, so that
the machine is not shut down as idle. ``agora-wsl.ps1`` in that user's folder sets up ports, firewall and
log-on task; it is run at once, and Windows then asks for administrator rights, the one step that needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import attrs

from agorad.config import DEFAULT_PORT, SYSTEM_STATE, load
from agorad.service import changes, manager
from agorad.service.changes import Change
from agorad.service.install import SETTINGS, Done
from agorad.wsl import detect, ini, script
from agorad.wsl.detect import CMD, POWERSHELL, Run
from p2p.errors import LocalError, P2PError
from p2p.multiaddr import Multiaddr

CONF: Final = Path("/etc/wsl.conf")
RESTART: Final = "in Windows: wsl.exe --shutdown, then open this distribution and run this again"


@attrs.frozen
class Windows:
    """The Windows side, as seen from here."""

    user: Path
    """The user's folder."""
    powershell: str
    run: Run

    @property
    def script(self) -> Path:
        """Where the script is written."""
        return self.user / "agora-wsl.ps1"

    @property
    def settings(self) -> Path:
        """Of all of WSL."""
        return self.user / ".wslconfig"


def windows(run: Run = manager.run) -> Windows:
    """Find the Windows user's folder; ``LocalError`` where Windows programs cannot be started."""
    said = run([detect.program("cmd.exe", CMD), "/d", "/c", "echo %USERPROFILE%"]).stdout.strip()
    if not said or "%" in said:
        raise LocalError(
            "Windows does not say where its user's folder is; is [interop] off in /etc/wsl.conf?"
        )
    folder = run(["wslpath", "-u", said]).stdout.strip()
    if not folder:
        raise LocalError(f"wslpath knows no path for {said}")
    return Windows(Path(folder), detect.program("powershell.exe", POWERSHELL), run)


def systemd_setting(conf: Path = CONF) -> list[Change]:
    """What has to change so that this distribution starts with systemd."""
    change = changes.wanted(conf, ini.with_setting(changes.current(conf) or "", "boot", "systemd", "true"))
    return [] if change is None else [change]


def windows_files(side: Windows, distribution: str, ports: list[int], *, mirrored: bool) -> list[Change]:
    """What has to change in the Windows user's folder."""
    kept = changes.current(side.settings) or ""
    found = [
        changes.wanted(side.settings, ini.with_setting(kept, "wsl2", "vmIdleTimeout", "-1")),
        changes.wanted(side.script, script.script(distribution, ports, mirrored=mirrored)),
    ]
    return [change for change in found if change is not None]


def set_up(side: Windows, *, remove: bool = False) -> str:
    """Run the script; what it says. Waits until the user answered Windows' question for the rights."""
    path = side.run(["wslpath", "-w", str(side.script)]).stdout.strip()
    words = [side.powershell, "-NoProfile", "-ExecutionPolicy", "Bypass", "-File", path]
    done = side.run([*words, "-Uninstall"] if remove else words)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        raise LocalError(
            f"Windows is not set up: {last}. Run PowerShell as administrator in Windows, and in it: "
            f'powershell -ExecutionPolicy Bypass -File "{path}"{" -Uninstall" if remove else ""}'
        )
    return done.stdout.strip()


def ports(settings: list[Path] | None = None) -> list[int]:
    """TCP ports that this machine's nodes listen on; the first node's where there is none yet."""
    paths = [SETTINGS, *sorted(SYSTEM_STATE.glob("*/agorad.toml"))] if settings is None else settings
    found: set[int] = set()
    for path in paths:
        try:
            listen = load(path).node.listen
        except LocalError:
            continue  # one that cannot be read listens nowhere
        for text in listen:
            try:
                port = Multiaddr.parse(text).port
            except P2PError:
                continue
            if port:
                found.add(port)
    return sorted(found) or [DEFAULT_PORT]


def forwarded(text: str) -> dict[int, str]:
    """From ``netsh interface portproxy show v4tov4``: port to address."""
    rows = (line.split() for line in text.splitlines())
    return {int(row[1]): row[2] for row in rows if len(row) == 4 and row[1].isdigit() and row[3].isdigit()}


def install(done: Done, side: Windows, wanted_ports: list[int], *, dry_run: bool) -> None:
    """Bring the Windows side up to date and note in ``done`` what that changed."""
    mirrored = detect.networking(side.run) == "mirrored"
    files = windows_files(side, detect.distribution(run=side.run), wanted_ports, mirrored=mirrored)
    there = set(wanted_ports) <= set(forwarded(_netsh(side)))
    done.files += files
    if any(change.path == side.settings for change in files):
        done.hints.append("the next `wsl.exe --shutdown` in Windows makes .wslconfig count")
    if any(change.path == side.script for change in files) or not (mirrored or there):
        listed = ", ".join(map(str, wanted_ports))
        done.steps.append(
            f"set up Windows for TCP {listed}: firewall rule, log-on task"
            f"{'' if mirrored else ', forwarding that follows this machine'} "
            "(Windows asks for administrator rights; nothing else needs them)"
        )
        if not dry_run:
            changes.apply(files)
            try:
                set_up(side)
            except LocalError:
                changes.undo(files)
                raise
    elif not dry_run:
        changes.apply(files)
    done.hints.append(
        "`agoractl join` has the port dialled from outside and says if it is open; "
        "a router in front of Windows has to forward it too"
    )


def uninstall(done: Done, side: Windows, *, dry_run: bool) -> None:
    """Take the Windows side away; ``.wslconfig`` stays, other things may rely on it."""
    if not side.script.exists():
        return
    done.files.append(Change(side.script, changes.current(side.script), None))
    done.steps.append(
        "remove log-on task, firewall rule and forwarding from Windows (it asks for the rights)"
    )
    if not dry_run:
        set_up(side, remove=True)
        changes.apply(done.files[-1:])


def _netsh(side: Windows) -> str:
    program = detect.program("netsh.exe", "Windows/System32/netsh.exe")
    return side.run([program, "interface", "portproxy", "show", "v4tov4"]).stdout
