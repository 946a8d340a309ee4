"""Averaging rounds of hivemind on this machine, measured as ``agoractl bench allreduce`` measures ours.

One process makes the averagers, each of which is two more of its own: hivemind's averager and the libp2p
daemon beside it. A round is timed from the moment at which all are matched and told to begin to the last end.

``python hivemind_averaging.py PEERS FLOATS ROUNDS`` writes one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import hivemind
import torch
from hivemind.averaging.control import AveragingStage

LOCAL = ["/ip4/127.0.0.1/tcp/0"]
MATCH_S = 60.0


def main(peers: int, floats: int, rounds: int) -> None:
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
    seconds = []
    for _ in range(rounds):
        steps = [averager.step(wait=False, require_trigger=True, timeout=120) for averager in averagers]
        until = time.monotonic() + MATCH_S
        while any(step.stage != AveragingStage.AWAITING_TRIGGER for step in steps):
            if time.monotonic() > until:
                raise SystemExit("hivemind's peers found no group in time")
            time.sleep(0.01)
        began = time.monotonic()
        for step in steps:
            step.allow_allreduce()
        for step in steps:
            step.result(120)
        seconds.append(time.monotonic() - began)
    error = 0.0
    for averager in averagers:
        with averager.get_tensors() as (tensor,):
            error = max(error, float((tensor - (peers - 1) / 2).abs().max()))
    print(json.dumps({"peers": peers, "floats": floats, "seconds": seconds, "max_error": error}), flush=True)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except (Exception, SystemExit) as error:
        print(error or type(error).__name__, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # hivemind's threads may wait for daemons that are gone
