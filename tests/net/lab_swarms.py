"""Whole swarms in a lab: a demo's files with the addresses of the lab's places, one process a node."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import tomli_w

from agorad import run
from agorad.demo import layout
from agorad.lab.network import Place
from agorad.run import NodeRef
from agorad.settings import unstructure
from p2p.identity import Identity


@attrs.frozen
class LabSwarm:
    """Nodes' names and their places."""

    folder: Path
    places: Mapping[str, Place]

    def write(self, plan: layout.Plan) -> layout.Layout:
        """The plan's files, and no test of ports at the door. What it returns has the addresses of before."""
        made = layout.prepare(plan, self.folder)
        addrs = {}
        for number, node in enumerate(made.nodes):
            node.reserved.close()
            addrs[node.name] = f"/ip4/{self.places[node.name].addr}/tcp/{49200 + number}"
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
        run.save(manifest.signed(Identity.load(self.folder / "operator.key")), made.manifest_path)
        return made

    @contextmanager
    def running(self, names: Iterable[str], nice: int = 0) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
        """These nodes as processes, asked to leave at the end; ``nice``: how far they yield to others."""
        nodes = {}
        try:
            for name in names:
                config = self.folder / name / "agorad.toml"
                words = (
                    "nice",
                    "-n",
                    str(nice),
                    sys.executable,
                    "-m",
                    "agorad.main",
                    "--config",
                    str(config),
                )
                with (self.folder / f"{name}.err").open("wb") as errors:
                    nodes[name] = subprocess.Popen(self.places[name].command(*words), stderr=errors)
            yield nodes
        finally:
            for node in nodes.values():
                node.terminate()
            for node in nodes.values():
                try:
                    node.wait(30)
                finally:
                    node.kill()

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        """What a node has written down so far."""
        path = self.folder / name / "events.jsonl"
        if not path.exists():
            return []
        found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return [event for event in found if event["event"] in kinds]
