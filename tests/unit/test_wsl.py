"""WSL2's Windows side, with recorded stand-ins for the Windows commands, and a parser for the script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agorad.cli import service as command
from agorad.service.install import Done
from agorad.wsl import detect, ini, script, setup
from p2p.errors import LocalError

HEAD = "\r\nListen on ipv4:             Connect to ipv4:\r\n\r\n"
HEAD += "Address         Port        Address         Port\r\n"
RULES = "--------------- ----------  --------------- ----------\r\n"
ROW = "0.0.0.0         {port}       172.28.3.7      {port}\r\n"


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins on PATH that note how they are called; the folder of the Windows user."""
    programs, user = tmp_path / "bin", tmp_path / "mnt" / "Users" / "Ann"
    programs.mkdir()
    user.mkdir(parents=True)
    answers = {
        "cmd.exe": r"printf '%s\r\n' 'C:\Users\Ann'",
        "wslpath": rf"""
            case "$1 $2" in
                "-u "*) echo {user};;
                "-w /") printf '%s\n' '\\wsl.localhost\Debian\';;
                *) printf '%s\n' 'C:\Users\Ann\agora-wsl.ps1';;
            esac""",
        "wslinfo": f"cat {tmp_path}/mode 2>/dev/null || exit 1",
        "netsh.exe": f"cat {tmp_path}/forwarded",
        "powershell.exe": f"cat {tmp_path}/says; exit $(cat {tmp_path}/code)",
    }
    for name, answer in answers.items():
        noting = (
            f'(printf "%s" "{name}"; for word; do printf " <%s>" "$word"; done; echo) >> {tmp_path}/calls'
        )
        (programs / name).write_text(f"#!/bin/sh\n{noting}\n{answer}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "forwarded").write_text("")
    (tmp_path / "says").write_text("set up: TCP 49200\n")
    (tmp_path / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.delenv("WSL_DISTRO_NAME", raising=False)
    return user


def calls(user: Path, name: str) -> list[str]:
    text = (user.parents[2] / "calls").read_text()
    return [line for line in text.splitlines() if line.startswith(name)]


@pytest.mark.parametrize(
    ("release", "wsl2"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", True),
        ("6.6.36.3-microsoft-standard-WSL2+", True),
        ("4.4.0-19041-Microsoft", False),
        ("6.1.0-18-amd64", False),
    ],
)
def test_wsl2_is_known_by_its_kernel(release: str, wsl2: bool) -> None:
    assert detect.is_wsl2(release) == wsl2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[boot]\nsystemd=true\n"),
        ("[network]\nhostname=x\n", "[network]\nhostname=x\n\n[boot]\nsystemd=true\n"),
        ("[boot]\nsystemd = false # no\n[user]\n", "[boot]\nsystemd=true\n[user]\n"),
        ("[Boot]\n# mine\ncommand=a\n\n[user]\n", "[Boot]\n# mine\ncommand=a\nsystemd=true\n\n[user]\n"),
        ("[boot]\nSystemd = true\n", "[boot]\nSystemd = true\n"),
        ("# systemd=true\n", "# systemd=true\n\n[boot]\nsystemd=true\n"),
        ("\ufeff[boot]\r\ncommand=a\r\n", "\ufeff[boot]\r\ncommand=a\r\nsystemd=true\r\n"),
    ],
)
def test_one_setting_is_changed_and_nothing_else(before: str, after: str) -> None:
    assert ini.with_setting(before, "boot", "systemd", "true") == after
    assert ini.with_setting(after, "boot", "systemd", "true") == after


def test_windows_is_set_up_once(windows: Path) -> None:
    (windows / ".wslconfig").write_bytes(b"[wsl2]\r\nmemory=8GB\r\n")
    side = setup.windows()
    planned = Done()
    setup.install(planned, side, [49200, 49201], dry_run=True)
    assert [change.path.name for change in planned.files] == [".wslconfig", "agora-wsl.ps1"]
    assert not side.script.exists()
    done = Done()
    setup.install(done, side, [49200, 49201], dry_run=False)
    assert (windows / ".wslconfig").read_bytes() == b"[wsl2]\r\nmemory=8GB\r\nvmIdleTimeout=-1\r\n"
    text = side.script.read_bytes().decode()
    assert "$Distribution = 'Debian'\r\n" in text
    assert "$Ports = @(49200, 49201)\r\n" in text
    assert "$Mirrored = $false\r\n" in text
    assert calls(windows, "powershell.exe") == [
        "powershell.exe <-NoProfile> <-ExecutionPolicy> <Bypass> <-File> <C:\\Users\\Ann\\agora-wsl.ps1>"
    ]
    assert "administrator rights" in done.steps[0]

    rows = "".join(ROW.format(port=port) for port in (49200, 49201))
    (windows.parents[2] / "forwarded").write_text(HEAD + RULES + rows)
    again = Done()
    setup.install(again, side, [49200, 49201], dry_run=False)
    assert again.nothing
    assert len(calls(windows, "powershell.exe")) == 1

    # Another port, or a forwarding that somebody removed: set up again.
    setup.install(Done(), side, [49205], dry_run=False)
    assert "@(49205)" in side.script.read_text()
    assert len(calls(windows, "powershell.exe")) == 2

    gone = Done()
    setup.uninstall(gone, side, dry_run=False)
    assert calls(windows, "powershell.exe")[-1].endswith("<-Uninstall>")
    assert not side.script.exists()
    setup.uninstall(nothing := Done(), side, dry_run=False)
    assert nothing.nothing


def test_mirrored_networking_needs_no_forwarding(windows: Path) -> None:
    (windows.parents[2] / "mode").write_text("mirrored\n")
    side = setup.windows()
    done = Done()
    setup.install(done, side, [49200], dry_run=False)
    assert "$Mirrored = $true\r\n" in side.script.read_bytes().decode()
    assert "forwarding" not in done.steps[0]
    again = Done()
    setup.install(again, side, [49200], dry_run=False)
    assert again.nothing


def test_refused_rights_leave_nothing_and_say_what_to_do(windows: Path) -> None:
    (windows.parents[2] / "code").write_text("1")
    side = setup.windows()
    with pytest.raises(LocalError, match=r'as administrator.*-File "C:\\Users\\Ann\\agora-wsl.ps1"'):
        setup.install(Done(), side, [49200], dry_run=False)
    assert not side.script.exists()
    assert not side.settings.exists()


def test_without_windows_programs_the_sentence_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LocalError, match="interop"):
        setup.windows()


def test_names_cannot_leave_their_quotes() -> None:
    text = script.script("it's ’odd’", [1], mirrored=False)
    assert "$Distribution = 'it''s ’’odd’’'\r\n" in text
    for name in ("", 'a"b', "a\nb"):
        with pytest.raises(LocalError, match="name of a distribution"):
            script.script(name, [1], mirrored=False)
    with pytest.raises(LocalError, match="TCP ports"):
        script.script("Debian", [0], mirrored=False)


def test_forwarded_ports_are_read_from_netsh() -> None:
    text = HEAD + RULES + ROW.format(port=49200)
    assert setup.forwarded(text) == {49200: "172.28.3.7"}
    assert setup.forwarded("") == {}


def test_ports_are_those_of_the_nodes(tmp_path: Path) -> None:
    node = '[node]\nrole="seed"\nrun="r"\nstate="s"\nlisten=["/ip4/0.0.0.0/tcp/{}", "/ip6/::/tcp/{}"]\n'
    (tmp_path / "a.toml").write_text(node.format(49300, 49300))
    (tmp_path / "b.toml").write_text(node.format(49299, 0))
    (tmp_path / "c.toml").write_text("broken")
    assert setup.ports([tmp_path / f"{name}.toml" for name in "abcd"]) == [49299, 49300]
    assert setup.ports([]) == [49200]


def test_systemd_is_turned_on_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "wsl.conf"
    conf.write_text("[user]\ndefault=ann\n")
    monkeypatch.setattr(detect, "is_wsl2", lambda: True)
    monkeypatch.setattr(command, "is_running", lambda: False)
    monkeypatch.setattr(command.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup, "systemd_setting", lambda real=setup.systemd_setting: real(conf))

    def install(*words: str) -> Result:
        return CliRunner().invoke(command.service, ["install", *words])

    assert install("--dry-run").exit_code == 1
    assert conf.read_text() == "[user]\ndefault=ann\n"
    done = install("--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["next"] == [setup.RESTART]
    assert conf.read_text() == "[user]\ndefault=ann\n\n[boot]\nsystemd=true\n"
    again = install()
    assert again.exit_code == 1
    assert "begins with the next start of WSL" in again.stdout
    assert "--shutdown" in again.stdout


def test_the_script_parses() -> None:
    tree_sitter = pytest.importorskip("tree_sitter", reason="pip install tree-sitter tree-sitter-powershell")
    powershell = pytest.importorskip("tree_sitter_powershell", reason="pip install tree-sitter-powershell")
    parser = tree_sitter.Parser(tree_sitter.Language(powershell.language()))
    text = script.script("Ubuntu-24.04", [49200], mirrored=True).encode()
    assert not parser.parse(text).root_node.has_error
    assert parser.parse(text.replace(b"while ($true) {", b"while ($true {")).root_node.has_error
