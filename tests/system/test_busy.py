"""Nine processes train on this machine's cores: none is told gone while it lives, and one that stops is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.system.swarms import Demo, demo

SECONDS = float(os.environ.get("AGORA_BUSY_SECONDS", "240"))
"""How long they train; 600 for the whole promise."""
NOTICED_S = 60.0
"""A busy machine runs nobody in time; what counts is that a stopped peer is told at all, by its silence."""


def told_gone(swarm: Demo) -> list[tuple[str, str, str]]:
    """Who took whom for gone, though nobody had left."""
    return [
        (node["name"], event["peer"], event["why"])
        for node in swarm.nodes
        for event in swarm.events(node["name"])
        if event["event"] == "disconnected" and "silent" in event["why"]
    ]


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 400)
def test_a_busy_peer_is_not_told_gone_and_a_stopped_one_is(tmp_path: Path) -> None:
    with demo(tmp_path, "--stages", "3", "--workers", "2", "--seconds", str(SECONDS + 300)) as swarm:
        assert len(swarm.nodes) == 9
        swarm.wait_for(lambda: swarm.count("trainer-0", "microbatch_completed") > 0, 180, "a microbatch")
        until = time.monotonic() + SECONDS
        swarm.wait_for(lambda: time.monotonic() > until, SECONDS + 60, "the end of the time")
        assert told_gone(swarm) == []
        assert all(swarm.count(node["name"], "started") == 1 for node in swarm.nodes)
        assert swarm.count("trainer-0", "microbatch_failed") == 0
        stopped = swarm.node("worker-1-0")
        os.kill(stopped["pid"], signal.SIGSTOP)
        try:
            swarm.wait_for(
                lambda: any(peer == stopped["peer_id"] for _by, peer, _why in told_gone(swarm)),
                NOTICED_S,
                "word of the stopped worker",
            )
        finally:
            os.kill(stopped["pid"], signal.SIGCONT)
