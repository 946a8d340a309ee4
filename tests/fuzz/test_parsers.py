"""Every parser of what peers send, fed with bent and random bytes: it answers in typed errors alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets

SECONDS = float(os.environ.get("AGORA_FUZZ_SECONDS", "20"))
"""For each parser, in the long test."""
MOST_MB = 1024


@st.composite
def bent(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good input with some of its bytes changed, taken out or put in; or any bytes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "double"]))
        if kind == "change" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 8))]
        elif kind == "double":
            data += data[place:][:256]
        else:
            data[place:place] = draw(st.binary(max_size=8))
    return bytes(data)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_bent_input_ends_in_a_typed_error(name: str) -> None:
    seeds = targets.seeds(name)
    for seed in seeds:
        targets.attempt(name, seed)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(bent(seeds), st.binary(max_size=200)))
    def check(data: bytes) -> None:
        targets.attempt(name, data)

    check()


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_coverage_guided_fuzzer_finds_nothing(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has no wheel for every Python)")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.guided", name, str(corpus)),
            *(f"-max_total_time={SECONDS:.0f}", f"-rss_limit_mb={MOST_MB}", "-timeout=60", "-max_len=4096"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=SECONDS + 240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr or "Done" in done.stderr, done.stderr[-2000:]
