"""Two workers behind firewalls that let nothing in train and average with the others, in a lab.

One is a head, one a tail: the head is fed over the connection that it opened to the trainer, the tail over
those that it opened to the heads. The two never meet.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli_w

from agorad import run
from agorad.demo import layout
from agorad.lab.network import Line, NoLab, Place, lab
from agorad.run import NodeRef
from agorad.settings import unstructure
from p2p.identity import Identity

PLACES = {
    "seed": 0, "authority": 0, "trainer-0": 0,
    "worker-0-0": 1, "worker-1-0": 2, "worker-0-1": 3, "worker-1-1": 4,
}  # fmt: skip
WALLED = ("worker-0-1", "worker-1-1")  # places 3 and 4


def moved(folder: Path, places: list[Place]) -> None:
    """A demo's files, with the addresses of these places, and no test of ports at the door."""
    plan = layout.Plan(
        stages=2,
        workers=2,
        trainers=1,
        steps=4000,
        seconds=None,
        data=None,
        assignments=("training.target_batch=8",),
    )
    made = layout.prepare(plan, folder)
    addrs = {}
    for number, node in enumerate(made.nodes):
        node.reserved.close()
        addrs[node.name] = f"/ip4/{places[PLACES[node.name]].addr}/tcp/{49200 + number}"
        table = tomllib.loads(node.config.read_text())
        table["node"]["listen"] = [addrs[node.name]]
        node.config.write_text(tomli_w.dumps(table))

    def refs(role: str) -> tuple[NodeRef, ...]:
        nodes = made.of_role(role)
        return tuple(NodeRef(peer_id=node.identity.peer_id, addrs=(addrs[node.name],)) for node in nodes)

    changed = attrs.evolve(
        made.manifest,
        seeds=refs("seed"),
        authorities=refs("authority"),
        trainers=refs("trainer"),
        admission=attrs.evolve(made.manifest.admission, port_test=False),
        training=attrs.evolve(made.manifest.training, eval_every=0),
    )
    manifest = run.from_table(unstructure(changed))  # with a content of its own to sign
    run.save(manifest.signed(Identity.load(folder / "operator.key")), made.manifest_path)


@contextmanager
def running(folder: Path, places: list[Place]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    nodes = {}
    try:
        for name, place in PLACES.items():
            config = folder / name / "agorad.toml"
            command = places[place].command(sys.executable, "-m", "agorad.main", "--config", str(config))
            with (folder / f"{name}.err").open("wb") as errors:
                nodes[name] = subprocess.Popen(command, stderr=errors)
        yield nodes
    finally:
        for node in nodes.values():
            node.terminate()
        for node in nodes.values():
            try:
                node.wait(30)
            finally:
                node.kill()


def events(folder: Path, name: str, *kinds: str) -> list[dict[str, Any]]:
    path = folder / name / "events.jsonl"
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [event for event in found if event["event"] in kinds]


def done(folder: Path) -> dict[str, bool]:
    what = {}
    for name in WALLED:
        peer = Identity.load(folder / name / "identity.key").peer_id
        what[f"{name} knows"] = [e["reachable"] for e in events(folder, name, "reachability")] == [False]
        since = [e["at"] for e in events(folder, name, "reachability")] or [0.0]
        added = [e for e in events(folder, name, "microbatch_added") if e["at"] > since[0]]
        what[f"{name} trains"] = len(added) >= 20
        rounds = events(folder, name, "round_finished")
        what[f"{name} averages"] = any(len(e["members"]) == 2 and e["at"] > since[0] for e in rounds)
        mates = events(folder, f"{name[:-1]}0", "round_finished")
        what[f"{name} is averaged with"] = any(peer in e["members"] and not e["drops"] for e in mates)
    for name in ("worker-0-0", "worker-1-0"):
        what[f"{name} knows"] = [e["reachable"] for e in events(folder, name, "reachability")] == [True]
    return what


@pytest.mark.long
@pytest.mark.timeout(400)
def test_workers_that_nobody_can_dial_train_and_average(tmp_path: Path) -> None:
    try:
        with lab([Line(delay_ms=2, walled=number >= 3) for number in range(5)]) as places:
            moved(tmp_path, places)
            with running(tmp_path, places) as nodes:
                until = time.monotonic() + 240
                while not all((seen := done(tmp_path)).values()):
                    assert all(node.poll() is None for node in nodes.values())
                    assert time.monotonic() < until, [what for what, true in seen.items() if not true]
                    time.sleep(1)
    except NoLab as error:
        pytest.skip(str(error))
