"""``agoractl bench allreduce``: real members that live and die, told as the contract says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "cli-schemas.json").read_text())["$defs"]


def bench(*arguments: str, code: int = 0) -> Any:
    command = [sys.executable, "-m", "agorad.cli", "bench", "allreduce", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    if code == 2:
        return done.stderr
    result = json.loads(done.stdout)
    jsonschema.Draft202012Validator(SCHEMA["bench allreduce"]).validate(result)
    return result


@pytest.mark.timeout(110)
def test_survivors_of_a_kill_hold_the_same_exact_means() -> None:
    result = bench("--peers=3", "--floats=300007", "--kill=1@0")
    assert (result["survivors"], len(result["killed"])) == (2, 1)
    assert result["failed"] == []
    assert result["identical"]
    assert len(result["hashes"]) == 2
    assert result["max_error"] < 1e-6
    # A leader that dies at its commit may take it along: the others then have a round of their own.
    assert {drop["peer"] for drop in result["drops"]} <= set(result["killed"])
    assert result["fraction"] == 1.0
    assert len(result["stolen"]) == len(result["seconds"])


@pytest.mark.long
@pytest.mark.parametrize("floats", [0, 1, 7, 1_000_003])
def test_any_number_of_floats(floats: int) -> None:
    result = bench("--peers=4", f"--floats={floats}", "--repeat=1")
    assert result["fraction"] == 1.0
    assert result["identical"]
    assert result["drops"] == []
    assert result["max_error"] < 1e-6


@pytest.mark.long
def test_one_who_loses_its_only_mate_says_so_and_fails() -> None:
    result = bench("--peers=2", "--floats=1000", "--kill=0@0", code=1)
    assert result["fraction"] == 0
    assert len(result["failed"]) == 1


@pytest.mark.long
@pytest.mark.timeout(130)
def test_members_behind_lines_agree_and_no_round_is_faster_than_its_lines() -> None:
    """docs/benchmarks.md has what rounds reach of their lines; how busy this machine is decides that here."""
    command = [sys.executable, "-m", "agorad.cli", "bench", "allreduce", "--peers=3", "--floats=5000000"]
    done = subprocess.run(
        [*command, "--repeat=2", "--link=100/40", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode and "lab" in done.stderr:
        pytest.skip(done.stderr)
    result = json.loads(done.stdout)
    jsonschema.Draft202012Validator(SCHEMA["bench allreduce"]).validate(result)
    assert result["link"] == {"mbps": 100.0, "rtt_ms": 40.0}
    assert result["fraction"] == 1.0
    assert result["identical"]
    assert result["drops"] == []
    needed = max(result["bytes_out"]) * 8 / 100e6
    print(f"{needed:.2f} s of a line; rounds took {result['seconds']}")
    assert min(result["seconds"]) >= needed


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("--peers=1", "nobody to average with"),
        ("--peers=65", "2 to 64"),
        ("--floats=-1", "floats, not -1"),
        ("--kill=4@1", "no member 4"),
        ("--kill=soon", "MEMBER@SECONDS"),
        ("--kill=1@-1", "before it there is no round"),
        ("--kill=1@nan", "from 0 to"),
        ("--slow=9", "no member 9"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(argument: str, word: str) -> None:
    from click.testing import CliRunner

    from agorad.cli.bench import bench as command

    said = CliRunner().invoke(command, ["allreduce", argument])
    assert said.exit_code == 2
    assert word in said.output
