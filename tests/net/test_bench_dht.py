"""``agoractl bench dht``: what it measures is really done, and is told as the contract says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from agorad.bench.dht_peer import value_of


@pytest.mark.timeout(120)
def test_four_processes_find_what_each_other_stored() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", "bench", "dht", "--peers=4", "--json"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peers"] == 4
    assert result["success"] == 1.0
    for name in ("join_ms", "store_ms", "get_ms"):
        assert 0 < result[name]["p50"] <= result[name]["p95"] <= result[name]["max"]
    assert 10 < result["rss_mb"] < 60


def test_values_of_different_keys_differ() -> None:
    assert len(value_of("bench/1/2")) == 128
    assert value_of("bench/1/2") != value_of("bench/1/3")


def test_peers_need_no_torch() -> None:
    code = "import sys, agorad.bench.dht_peer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
