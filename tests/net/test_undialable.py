"""Two workers behind firewalls that let nothing in train and average with the others, in a lab.

One is a head, one a tail: the head is fed over the connection that it opened to the trainer, the tail over
those that it opened to the heads. The two never meet.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agorad.demo import layout
from agorad.lab.network import Line, NoLab, lab
from p2p.identity import Identity
from tests.net.lab_swarms import LabSwarm

PLACES = {
    "seed": 0, "authority": 0, "trainer-0": 0,
    "worker-0-0": 1, "worker-1-0": 2, "worker-0-1": 3, "worker-1-1": 4,
}  # fmt: skip
WALLED = ("worker-0-1", "worker-1-1")  # places 3 and 4


PLAN = layout.Plan(
    stages=2,
    workers=2,
    trainers=1,
    steps=4000,
    seconds=None,
    data=None,
    assignments=("training.target_batch=8",),
)


def done(swarm: LabSwarm) -> dict[str, bool]:
    what = {}
    for name in WALLED:
        peer = Identity.load(swarm.folder / name / "identity.key").peer_id
        what[f"{name} knows"] = [e["reachable"] for e in swarm.events(name, "reachability")] == [False]
        since = [e["at"] for e in swarm.events(name, "reachability")] or [0.0]
        added = [e for e in swarm.events(name, "microbatch_added") if e["at"] > since[0]]
        what[f"{name} trains"] = len(added) >= 20
        rounds = swarm.events(name, "round_finished")
        what[f"{name} averages"] = any(len(e["members"]) == 2 and e["at"] > since[0] for e in rounds)
        mates = swarm.events(f"{name[:-1]}0", "round_finished")
        what[f"{name} is averaged with"] = any(peer in e["members"] and not e["drops"] for e in mates)
    for name in ("worker-0-0", "worker-1-0"):
        what[f"{name} knows"] = [e["reachable"] for e in swarm.events(name, "reachability")] == [True]
    return what


@pytest.mark.long
@pytest.mark.timeout(400)
def test_workers_that_nobody_can_dial_train_and_average(tmp_path: Path) -> None:
    try:
        with lab([Line(delay_ms=2, walled=number >= 3) for number in range(5)]) as places:
            swarm = LabSwarm(tmp_path, {name: places[place] for name, place in PLACES.items()})
            swarm.write(PLAN)
            with swarm.running(PLACES) as nodes:
                until = time.monotonic() + 240
                while not all((seen := done(swarm)).values()):
                    assert all(node.poll() is None for node in nodes.values())
                    assert time.monotonic() < until, [what for what, true in seen.items() if not true]
                    time.sleep(1)
    except NoLab as error:
        pytest.skip(str(error))
