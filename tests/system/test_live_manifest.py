"""A newer manifest in a running swarm: each replica trains by it from its next step on; nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.swarms import demo

SMALL = ("--set", "model.seq=64", "--set", "training.target_batch=8")


def agoractl(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "agorad.cli", *arguments, "--json"],
        capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.long
def test_a_new_learning_rate_reaches_every_replica_at_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "swarm"
    with demo(folder, "--stages", "2", "--workers", "2", "--seconds", "60", *SMALL) as swarm:
        swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > 5, 60, "first work")
        path = Path(swarm.swarm()["manifest"])
        text = path.read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("lr = ")]
        path.write_text(text.replace(line, "lr = 0.00125"))
        assert (
            agoractl("run", "sign", str(path), "--key", str(folder / "operator.key"))["manifest"]["run"][
                "version"
            ]
            == 2
        )
        done = agoractl("authority", "publish", str(path), "--dir", str(folder))
        assert (done["version"], done["changed"]) == (2, ["training.lr"])
        names = [node["name"] for node in swarm.nodes]
        workers = [node["name"] for node in swarm.nodes if node["role"] == "worker"]
        swarm.wait_for(
            lambda: all(swarm.count(name, "manifest_taken") for name in names), 40, "it everywhere"
        )
        swarm.wait_for(lambda: all(swarm.count(name, "settings_taken") for name in workers), 40, "the rate")
        report = swarm.finish()
        for name in workers:
            kinds = [event for event in swarm.events(name) if event["event"] in ("step", "settings_taken")]
            (at,) = [n for n, event in enumerate(kinds) if event["event"] == "settings_taken"]
            assert kinds[at]["settings"] == ["lr = 0.00125"]
            assert kinds[at + 1]["step"] == kinds[at]["step"]
            assert 0 < at < len(kinds) - 1
        assert not any(swarm.count(name, "manifest_ignored") for name in names)
    assert report["microbatches"]["lost"] == 0
