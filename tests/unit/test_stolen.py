"""Whose processor time it was, by what a kernel says."""

from __future__ import annotations

from pathlib import Path

import pytest

from agorad.bench.stolen import Stolen


def test_the_share_is_of_all_processors_time(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 10 0 5 35 7 0\ncpu0 1 2 3\n")
    with Stolen(stat) as away:
        stat.write_text("cpu  150 0 70 810 10 0 5 55 99 0\ncpu0 1 2 3\n")
    assert away.share == pytest.approx(20 / 100)


def test_no_time_between_two_looks_is_no_theft(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 10 0 5 35 7 0\n")
    with Stolen(stat) as away:
        pass
    assert away.share == 0.0


@pytest.mark.parametrize("said", [None, "", "cpu  1 2 3\n"])
def test_a_kernel_that_does_not_say_it_says_nothing(tmp_path: Path, said: str | None) -> None:
    if said is not None:
        (tmp_path / "stat").write_text(said)
    with Stolen(tmp_path / "stat") as away:
        pass
    assert away.share is None


def test_this_machine() -> None:
    with Stolen() as away:
        pass
    assert away.share is None or 0 <= away.share <= 1
