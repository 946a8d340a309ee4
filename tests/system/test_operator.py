"""An operator at a running swarm: removes a member, holds joins, changes capacity, reads what was done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sentences import complete
from tests.system.swarms import Demo, demo

SMALL = ("--set", "model.seq=64", "--set", "training.target_batch=8")


def authority(swarm: Demo, folder: Path, *arguments: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", "authority", *arguments, "--dir", str(folder), "--json"],
        capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


@pytest.mark.catalogue(39)
@pytest.mark.long
def test_a_removed_member_is_out_within_seconds_and_training_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "swarm"
    with demo(folder, "--stages", "1", "--workers", "2", "--seconds", "45", *SMALL) as swarm:
        swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > 5, 60, "first work")
        peer = swarm.node("worker-0-1")["peer_id"]
        assert {row["peer_id"] for row in authority(swarm, folder, "members")} >= {peer}
        began = time.time()
        authority(swarm, folder, "ban", "peer", peer, "--why", "sends nonsense", "--hours", "2")
        swarm.wait_for(lambda: swarm.count("worker-0-1", "stopped") > 0, 40, "its end")
        stopped = swarm.events("worker-0-1")[-1]
        assert stopped["at"] - began < 30.0
        assert stopped["code"] == 17
        complete(stopped["why"], "sends nonsense")
        after = swarm.count("trainer-0", "microbatch_completed")
        swarm.wait_for(
            lambda: swarm.count("trainer-0", "microbatch_completed") > after + 5, 30, "work without it"
        )
        assert [ban["name"] for ban in authority(swarm, folder, "bans")] == [peer]
        assert "no ban" in authority(swarm, folder, "unban", "account", "nobody", code=1)
        authority(swarm, folder, "unban", "peer", peer)
        assert authority(swarm, folder, "joins", "pause") == {"paused": True}
        assert authority(swarm, folder, "joins", "resume") == {"paused": False}
        assert authority(swarm, folder, "capacity", "7") == {"nodes": 7}
        done = [entry["what"] for entry in authority(swarm, folder, "audit")]
        assert done == ["max_nodes", "joins_paused", "joins_paused", "unban", "ban"]
        report = swarm.finish(code=1)  # a node that ends with 17 did not end well
    assert report["microbatches"]["lost"] == 0
    assert report["exit"]["worker-0-1"] == 17
