"""The reference system's errors: each has its line in docs/troubleshooting.md, and its test or its reason.

And what is caught before anything of ours runs: a machine on which the set-up cannot succeed.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sentences import acts, complete

ROOT = Path(__file__).parents[2]
ERRORS = (
    "configuration", "empty token", "email", "parameters", "Python", "installation", "Docker", "address echo",
    "GPU or port", "macOS", "debugger", "torch", "speed test or latency", "CUDA", "VRAM", "bad token",
    "peer id of another account", "already queued", "slow checkpoint", "port closed", "probe message", "full",
    "waitlist", "waited too long", "integrity", "paused", "not JSON", "token refresh", "peer id online",
    "out of memory", "killed", "RAM over", "Connection refused", "CUDA text", "gradients", "rounds failed",
    "no progress line", "no progress fetched", "termination signal", "checking for it", "averaging hung",
    "data stream", "handlers stuck", "metrics push", "owned by root",
)  # fmt: skip
"""Words of each error of that system, in the order of its catalogue."""
IMPOSSIBLE = "cannot happen"


def table() -> dict[int, tuple[str, str]]:
    """Number: (its error, what is here)."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    section = page.partition("## Where the reference system's errors went\n")[2]
    rows = re.findall(r"^\| (\d+) (.+?) \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) == len({number for number, _error, _here in rows})
    return {int(number): (error, here) for number, error, here in rows}


def triggered() -> dict[int, list[str]]:
    """Number: the tests marked with it."""
    found: dict[int, list[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.catalogue":
                    for number in mark.args:
                        found.setdefault(ast.literal_eval(number), []).append(f"{path.name}::{node.name}")
    return found


def test_every_error_of_the_reference_system_has_its_line() -> None:
    rows = table()
    assert list(rows) == list(range(1, len(ERRORS) + 1))
    for number, word in enumerate(ERRORS, 1):
        assert word in rows[number][0], f"line {number} is not about {word}"


def test_every_line_has_its_test_or_its_reason() -> None:
    tests = triggered()
    assert set(tests) <= set(table())
    for number, (error, here) in table().items():
        if IMPOSSIBLE in here:
            reason = here.partition(IMPOSSIBLE)[2].lstrip(" :")
            assert len(reason.split()) >= 8, f"{number} {error}: why can it not happen?"
            assert number not in tests, f"{number} {error}: a test triggers what cannot happen"
        else:
            assert tests.get(number), f"{number} {error}: no test triggers it"


def test_a_sentence_that_says_nothing_to_do_is_noticed() -> None:
    assert not acts("cannot read the file run.toml: No such file or directory")
    assert not acts("this machine has 4.0 GiB of memory, and the run asks for 8")
    assert acts("cannot read the file run.toml: No such file or directory; check the path")
    with pytest.raises(AssertionError, match="does not say"):
        complete("it failed for some reason or another; try again", "the limit")


def make(folder: Path, *variables: str) -> str:
    """What ``make`` says on its last lines before it gives up, with nothing installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run(
        ["make", "--no-print-directory", ".venv/.installed", *variables],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert not (folder / ".venv").exists()
    return next(line for line in done.stderr.splitlines() if line.startswith("make: "))


@pytest.mark.catalogue(5)
def test_an_old_python_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    complete(
        make(tmp_path, f"PYTHON={old}"), "Python 3.11 or newer is needed", "python3.9 is older", "PYTHON="
    )


@pytest.mark.catalogue(6)
def test_what_is_missing_for_the_set_up_is_named(tmp_path: Path) -> None:
    complete(make(tmp_path, "PYTHON=no-such-python"), "python3 is missing", "apt install python3")
    complete(make(tmp_path, "CXX=no-such-compiler"), "a C++ compiler is missing", "apt install g++")
