"""Completion, manual pages and schemas come from the commands themselves, so they cover all of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner

from agorad.cli import COMMANDS, agoractl
from agorad.cli.completion import SHELLS
from agorad.cli.targets import Target, Where, find
from agorad.manpages import pages

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((ROOT / "docs" / "cli-schemas.json").read_text())["$defs"]


def every(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            found = command.get_command(context, word)
            assert found is not None
            yield from every(found, f"{name} {word}")


EVERY = dict(every(agoractl, "agoractl"))


def test_each_command_says_what_it_is_for_and_shows_how() -> None:
    for name, command in EVERY.items():
        assert command.help, name
        if not isinstance(command, click.Group):
            assert re.search(r"^\s*Example: .*agoractl", command.help, re.MULTILINE), name
    assert set(COMMANDS) == set(agoractl.list_commands(click.Context(agoractl)))


def test_the_page_of_commands_names_them_all() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        assert re.search(rf"`{name}\b", page), name
    for name in SCHEMAS:
        assert f"`{name}`" in page, name
        jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def test_a_manual_page_for_each_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(agoractl, ["man", str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = {path.name: path.read_text() for path in (tmp_path / "man1").iterdir()}
    assert set(written) == {f"{name.replace(' ', '-')}.1" for name in EVERY} | {"agorad.1"}
    status = written["agoractl-status.1"]
    assert ".SH SYNOPSIS" in status
    assert "\\-\\-watch" in status
    assert ".SH EXAMPLE\n.nf\nagoractl status \\-\\-watch" in status
    assert "duplicate" in written["agorad.1"]
    for name, text in written.items():
        bad = [line for line in text.splitlines() if line.startswith(("'", "..")) or "\t" in line]
        assert bad == [], name


@pytest.mark.skipif(not shutil.which("groff"), reason="checked by groff: apt-get install groff")
def test_groff_has_nothing_to_say_about_them() -> None:
    for name, text in pages():
        done = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-T", "utf8"],
            input=text, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), name


@pytest.mark.parametrize("shell", SHELLS)
def test_what_shells_read_is_what_they_take(shell: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(agoractl, ["completion", shell])
    assert done.exit_code == 0
    assert "_AGORACTL_COMPLETE" in done.output
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here: apt-get install {shell}")
    script = tmp_path / "completion"
    script.write_text(done.output)
    check = subprocess.run([program, "-n", str(script)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def completed(words: str, at: int) -> list[str]:
    call = "from agorad.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", call], capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "_AGORACTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)},
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_options_and_nodes_are_completed(tmp_path: Path) -> None:
    assert completed("agoractl st", 1) == ["status"]
    assert "--watch" in completed("agoractl status --w", 2)
    nodes = [{"name": f"worker-{at}", "control": "c", "config": "a"} for at in range(2)]
    (tmp_path / "swarm.json").write_text(json.dumps({"nodes": nodes}))
    assert completed(f"agoractl status --dir {tmp_path} --node w", 5) == ["worker-0", "worker-1"]
    assert completed("agoractl ping a", 2) == ["authority"]


def configs_of(*options: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(agoractl, ["config", "--json", *options])
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    jsonschema.Draft202012Validator(SCHEMAS["config"]).validate(document)
    return document["nodes"]


def test_nodes_are_found_where_services_and_joins_leave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agorad.cli import targets

    monkeypatch.setattr(targets, "SERVICES", tmp_path / "services")
    monkeypatch.setattr(targets, "RUNTIME", tmp_path / "run")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    settings = '[node]\nrole = "worker"\nrun = "run.toml"\nstate = "."\n'
    for place in ("services/0", "services/1", "config/agora"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "agorad.toml").write_text(f'{settings}name = "{place.replace("/", "-")}"\n')
    (tmp_path / "user" / "agora").mkdir(parents=True)
    (tmp_path / "user" / "agora" / "other.sock").touch()
    found = find(Where())
    assert [one.name for one in found] == ["config-agora", "services-0", "services-1", "other"]
    assert isinstance(find(Where(nodes=("services-1",)))[0], Target)
    both = ["--node", "services-1", "--node", "services-0"]
    assert [one["node"] for one in configs_of(*both)] == ["services-0", "services-1"]
    monkeypatch.setenv("AGORA_CONFIG", str(tmp_path / "services" / "0" / "agorad.toml"))
    (only,) = configs_of()
    origins = {one["name"]: one["origin"] for one in only["settings"]}
    assert (only["node"], origins["node.name"], origins["limits.hours"]) == ("services-0", "file", "default")
    (typed,) = configs_of("--config", str(tmp_path / "services" / "1" / "agorad.toml"))
    assert typed["node"] == "services-1"  # the command line counts
    with pytest.raises(click.UsageError, match="there are config-agora"):
        find(Where(nodes=("nobody",)))
