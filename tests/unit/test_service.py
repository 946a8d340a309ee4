"""The service's files without a systemd: what is written, what is shown, what a failure leaves behind."""

from __future__ import annotations

import configparser
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agorad.exitcodes import RETRYABLE, ExitCode
from agorad.journal import encode
from agorad.notify import summary
from agorad.service import changes, files, install, program, user
from agorad.service.changes import Change
from agorad.service.files import UNITS, render
from agorad.service.manager import Manager
from agorad.service.program import Program
from p2p.errors import LocalError

PROGRAM = Program("/opt/agorad/bin/agorad")


def unit(text: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(text)
    return parsed


def test_both_units_are_one_but_for_name_and_settings() -> None:
    one, many = ((UNITS / f"{name}.service").read_text().splitlines() for name in ("agorad", "agorad@"))
    differ = [pair for pair in zip(one, many, strict=True) if pair[0] != pair[1]]
    assert [pair[0].partition("=")[0] for pair in differ if "=" in pair[0]] == ["Description", "ExecStart"]


def test_units_restart_after_the_codes_that_say_so_and_no_other() -> None:
    service = unit((UNITS / "agorad.service").read_text())["Service"]
    forced = {int(code) for code in service["RestartForceExitStatus"].split()}
    prevented = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert forced == set(RETRYABLE)
    assert forced | prevented | {0} == set(map(int, ExitCode))
    assert service["Restart"] == "on-abnormal"


def test_a_user_s_unit_starts_again_and_waits_like_the_system_s() -> None:
    system, mine = (unit((UNITS / name).read_text())["Service"] for name in ("agorad@.service", user.UNIT))
    for name, value in system.items():
        if name.startswith(("Restart", "Timeout", "Watchdog", "Kill", "Type", "UMask", "LimitCORE")):
            assert mine.get(name) == value, name


def test_a_user_s_unit_has_program_and_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (change,) = user.wanted("/opt/agorad/bin/agorad", Path("/home/a b/100%/agora"), 254)
    assert change.path == tmp_path / ".config/systemd/user/agorad@.service"
    made = change.after or ""
    assert 'ExecStart=/opt/agorad/bin/agorad --config "/home/a b/100%%/agora/%i/agorad.toml"\n' in made
    assert "RestartSteps=6" in made
    assert "User=" not in made


def test_without_a_session_there_is_no_service_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert "XDG_RUNTIME_DIR is not set" in user.why_not()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert f"no systemd of yours answers in {tmp_path}" in user.why_not()
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd" / "private").touch()
    assert user.why_not() == ""


def test_lines_for_a_newer_systemd_are_left_out_of_an_older_one() -> None:
    text = (UNITS / "agorad.service").read_text()
    assert "RestartSteps=6" in render(text, PROGRAM, 254)
    for version in (0, 252):
        assert "RestartSteps" not in render(text, PROGRAM, version)
        assert "systemd 254" not in render(text, PROGRAM, version)


def test_the_program_and_the_folders_that_it_needs_are_put_in() -> None:
    text = (UNITS / "agorad@.service").read_text()
    home = Program('"/home/a b/.venv/bin/agorad"', (Path("/home/a b/.venv"), Path("/home/100%")))
    made = render(text, home, 252)
    assert 'ExecStart="/home/a b/.venv/bin/agorad" --config /var/lib/agora/%i/agorad.toml\n' in made
    assert 'BindReadOnlyPaths="/home/a b/.venv"\nBindReadOnlyPaths=/home/100%%\n' in made
    assert "BindReadOnlyPaths" not in render(text, PROGRAM, 252)


def test_a_program_that_others_cannot_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "HIDDEN", ())
    place = tmp_path / "closed" / "venv"
    place.mkdir(parents=True)
    place.chmod(0o755)
    (tmp_path / "closed").chmod(0o700)
    with pytest.raises(LocalError, match=r"chmod o\+rx .*closed"):
        program.require_readable(place)
    monkeypatch.setattr(program, "HIDDEN", (str(tmp_path),))
    program.require_readable(place)  # it is bound: what lies above it is not asked


def test_of_folders_in_folders_the_outer_one_is_enough() -> None:
    paths = [Path(text) for text in ("/a/b", "/a", "/ab", "/c/d", "/c/d")]
    assert program.outermost(paths) == [Path("/a"), Path("/ab"), Path("/c/d")]


def test_changes_are_made_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before\nkept\n")
    (tmp_path / "folder").mkdir()
    found = [
        changes.wanted(tmp_path / "old", "after\nkept\n"),
        changes.wanted(tmp_path / "new" / "file", "text\n"),
        Change(tmp_path / "folder", None, "a folder is in the way"),
    ]
    planned = [change for change in found if change is not None]
    with pytest.raises(LocalError, match="folder"):
        changes.apply(planned)
    assert (tmp_path / "old").read_text() == "before\nkept\n"
    assert not (tmp_path / "new" / "file").exists()
    assert list(tmp_path.glob(".*")) == []
    changes.apply(planned[:2])
    assert changes.wanted(tmp_path / "old", "after\nkept\n") is None
    assert planned[0].lines() == [f"~ {tmp_path / 'old'}", "    -before", "    +after"]
    assert planned[1].lines() == [f"+ {tmp_path / 'new' / 'file'} (1 lines)"]


class Answers:
    """A systemctl that does nothing but fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.asked: list[str] = []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        words = " ".join(command)
        self.asked.append(words)
        bad = bool(self.failing) and words.startswith(self.failing)
        out = "systemd 255 (255.4)" if "--version" in words else ""
        return subprocess.CompletedProcess(command, int(bad), out, "it broke\n" if bad else "")


@pytest.fixture
def rooted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All paths of an installation below a folder of the test's."""
    places = {name: tmp_path / place.relative_to("/") for name, place in files.PLACES.items()}
    monkeypatch.setattr(files, "PLACES", places)
    monkeypatch.setattr(files, "install", _with_root(files.install))
    monkeypatch.setattr(files, "uninstall", _with_root(files.uninstall))
    for name in ("STATE", "RUNTIME", "SETTINGS"):
        monkeypatch.setattr(install, name, tmp_path / getattr(install, name).relative_to("/"))
    monkeypatch.setattr(install, "_has_account", lambda: False)
    return tmp_path


def _with_root(plain: Callable[..., list[Change]]) -> Callable[..., list[Change]]:
    return lambda *arguments: plain(*arguments, Path("/"))


@pytest.mark.parametrize(
    "failing", ["systemd-sysusers", "systemd-tmpfiles", "systemctl daemon-reload", "systemctl enable"]
)
def test_an_installation_that_fails_leaves_nothing(rooted: Path, failing: str) -> None:
    said: list[str] = []
    manager = Manager(Answers(failing))
    with pytest.raises(LocalError, match=rf"{failing}.*failed with 1: it broke"):
        install.install(PROGRAM, manager, ["0"], dry_run=False, start=True, log=said.append)
    assert [path for path in rooted.rglob("*") if path.is_file()] == []
    assert said == ["that failed; putting everything back"]


def test_a_dry_run_asks_and_changes_nothing(rooted: Path) -> None:
    answers = Answers()
    done = install.install(PROGRAM, Manager(answers), ["0"], dry_run=True, start=True, log=lambda _text: None)
    assert [change.kind for change in done.files] == ["created"] * 4
    assert any("start agorad@0.service" in step for step in done.steps)
    assert [path for path in rooted.rglob("*") if path.is_file()] == []
    harmless = r"systemctl (--version|is-enabled|is-active|list-units|list-unit-files)\b.*"
    assert [words for words in answers.asked if not re.fullmatch(harmless, words)] == []


def test_the_status_line_is_one_line_for_people() -> None:
    status = {
        "phase": "active", "stage": 2, "step": 812, "loss": 2.71312, "peers": 7, "warnings": [],
    }  # fmt: skip
    assert summary(status) == "active, stage 2, step 812, loss 2.713, 7 peers"
    waiting = {"phase": "queued", "stage": None, "step": 0, "loss": None, "peers": 1}
    waiting |= {"queue": {"position": 3, "eta_s": 9.0}, "warnings": ["the clock is off"]}
    assert summary(waiting) == "queued, place 3, 1 peer; the clock is off"


def test_a_journal_entry_holds_whatever_an_event_holds() -> None:
    entry = {
        "event": "phase",
        "why": "two\nlines",
        "members": ["a", "b"],
        "fraction": 0.5,
        "long": "x" * 9000,
    }
    sent = encode("warning", "a line", entry)
    assert sent.startswith(b"MESSAGE=a line\nPRIORITY=4\nSYSLOG_IDENTIFIER=agorad\nAGORA_EVENT=phase\n")
    assert b"AGORA_WHY\n" + (9).to_bytes(8, "little") + b"two\nlines\n" in sent
    assert b'AGORA_MEMBERS=["a","b"]\nAGORA_FRACTION=0.5\n' in sent
    assert len(sent) < 5000
