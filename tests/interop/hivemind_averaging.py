"""Averaging rounds of hivemind on this machine, measured as ``agoractl bench allreduce`` measures ours.

One process makes the averagers, each of which is two more of its own: hivemind's averager and the libp2p
daemon beside it. A round is timed from the moment at which all are matched and told to begin to the last end.

``python hivemind_averaging.py PEERS FLOATS ROUNDS [KILL_S]`` writes one JSON document. With KILL_S the last
averager and its daemon are killed so many seconds after the last round has begun; ``survivors`` says of each
other how long its step took, how it ended, and what part of its vector is not as the first survivor has it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hivemind
import torch
from hivemind.averaging.control import AveragingStage

LOCAL = ["/ip4/127.0.0.1/tcp/0"]
MATCH_S = 60.0
STEP_S = 60.0


def kill(pid: int) -> None:
    """The process and its children, which are hivemind's daemons."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)


def ends(steps: list[Any], began: float) -> list[dict[str, Any]]:
    """How long each step took and what it ended with."""
    found: list[dict[str, Any]] = [{} for _ in steps]
    while not all(found):
        for step, end in zip(steps, found, strict=True):
            late = time.monotonic() - began > STEP_S + 10
            if not end and (step.done() or late):
                why = "never" if not step.done() else repr(step.exception() or "done")
                end.update(seconds=time.monotonic() - began, why=why)
        time.sleep(0.01)
    return found


def main(peers: int, floats: int, rounds: int, kill_s: float | None = None) -> None:
    nodes: list[Any] = []
    for _ in range(peers):
        first = nodes[0].get_visible_maddrs() if nodes else ()
        nodes.append(hivemind.DHT(initial_peers=first, host_maddrs=LOCAL, start=True))
    vectors = [torch.full((floats,), float(i)) for i in range(peers)]
    averagers = [
        hivemind.DecentralizedAverager(
            [vector],
            dht=node,
            prefix="bench",
            target_group_size=peers,
            min_group_size=peers,
            min_matchmaking_time=3.0,
            request_timeout=2.0,
            start=True,
        )
        for vector, node in zip(vectors, nodes, strict=True)
    ]
    seconds, survivors = [], None
    for number in range(rounds):
        steps = [averager.step(wait=False, require_trigger=True, timeout=STEP_S) for averager in averagers]
        until = time.monotonic() + MATCH_S
        while any(step.stage != AveragingStage.AWAITING_TRIGGER for step in steps):
            if time.monotonic() > until:
                raise SystemExit("hivemind's peers found no group in time")
            time.sleep(0.01)
        began = time.monotonic()
        for step in steps:
            step.allow_allreduce()
        if kill_s is not None and number == rounds - 1:
            time.sleep(kill_s)
            kill(averagers[-1].pid)
            kill(nodes[-1].pid)
            survivors = ends(steps[:-1], began)
            break
        for step in steps:
            step.result(STEP_S)
        seconds.append(time.monotonic() - began)
    if survivors is not None:
        first = averagers[0]._averaged_tensors[0]  # without their lock: one that hangs holds it
        for number, (averager, end) in enumerate(zip(averagers, survivors, strict=False)):
            tensor = averager._averaged_tensors[0]
            end["differs"] = float((tensor != first).double().mean())
            end["not_averaged"] = float((tensor == number).double().mean())
        print(json.dumps({"peers": peers, "floats": floats, "survivors": survivors}), flush=True)
        return
    error = 0.0
    for averager in averagers:
        with averager.get_tensors() as (tensor,):
            error = max(error, float((tensor - (peers - 1) / 2).abs().max()))
    print(json.dumps({"peers": peers, "floats": floats, "seconds": seconds, "max_error": error}), flush=True)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:5]))
    except (Exception, SystemExit) as error:
        print(error or type(error).__name__, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # hivemind's threads may wait for daemons that are gone
