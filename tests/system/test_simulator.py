"""Swarms do what the simulator said beforehand, from what single workers were measured to take."""

from __future__ import annotations

from pathlib import Path

import pytest

from agorad.lab.network import NoLab
from tests.system.predicted import Calibration, Swarm, calibrated, laid_out, measured, prediction

ELSEWHERE = 0.25
"""Processors that may be busy with other things: what they take is not there for the swarm."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrated(tmp_path_factory.mktemp("known") / "s")


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "words",
    [
        "2/2/2",
        "1/3,wait=100/400+400+4000",
        "2/2/2,wait=200,link=200+80",
        "4/1/1,wait=150",
    ],
)
def test_a_swarm_does_what_was_predicted(known: Calibration, tmp_path: Path, words: str) -> None:
    swarm = Swarm.read(words)
    try:
        with laid_out(swarm, tmp_path / "s") as placed:
            predicted = prediction(swarm, placed.made, known)["tokens_per_second"]
            print(f"{words}: {predicted:.0f} tokens a second predicted")
            run = measured(placed)
    except NoLab as error:
        pytest.skip(str(error))
    print(run.words())
    if run.elsewhere > ELSEWHERE or known.elsewhere > ELSEWHERE:
        pytest.skip(f"the machine was busy with other things ({run.elsewhere:.2f} processors)")
    reached = run.tokens_per_second
    if not swarm.waits:
        reached *= known.pace(run)  # minutes later the machine may be slower or faster
    assert reached == pytest.approx(predicted, rel=0.15)
