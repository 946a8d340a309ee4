"""One node's folder a GPU: ``<state>/<run id>/gpu<N>`` with its settings, key, log, state and manifest."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import attrs
import tomli_w

from agorad import config, run
from agorad.join import cloud
from agorad.join.answers import Answers, folder
from agorad.run import Manifest
from p2p.errors import LocalError


@attrs.frozen(kw_only=True)
class Planned:
    """A node that will run here."""

    gpu: int
    device: str
    port: int
    folder: Path
    identity: Path
    log: Path

    @property
    def config(self) -> Path:
        """Its settings; ``agorad --config`` starts it again."""
        return self.folder / "agorad.toml"

    @property
    def control(self) -> Path:
        """Its control socket."""
        return self.folder / "control.sock"


def plan(
    manifest: Manifest, answers: Answers, *, device: str | None, identity: Path | None, log: Path | None
) -> list[Planned]:
    """The nodes, one a GPU. ``device``: what computes instead of GPUs, where there are none."""
    if len(answers.gpus) > 1 and (identity is not None or log is not None):
        raise LocalError("--identity-path and --log-file are one node's; join one GPU at a time with them")
    state = folder("STATE", ".local/state") / manifest.run.id
    nodes = []
    for offset, gpu in enumerate(answers.gpus):
        here = state / f"gpu{gpu}"
        nodes.append(
            Planned(
                gpu=gpu,
                device=device or f"cuda:{gpu}",
                port=answers.port + offset,
                folder=here,
                identity=(identity or here / "identity.key").absolute(),
                log=(log or here / "agorad.log").absolute(),
            )
        )
    return nodes


def write(manifest: Manifest, answers: Answers, node: Planned, place: cloud.Place) -> None:
    """Make the folder and write manifest and settings; what an earlier join left there is reused."""
    try:
        node.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        run.save(manifest, node.folder / "run.toml")
        table: dict[str, Any] = {
            "node": {
                "role": "worker", "name": f"gpu{node.gpu}", "run": "run.toml", "state": ".",
                "identity": str(node.identity), "device": node.device, "log": str(node.log),
                "listen": [f"/ip4/0.0.0.0/tcp/{node.port}"], "announce": announced(answers, node, place),
            },
            "worker": {"account": answers.account},
        }  # fmt: skip
        if answers.slots:
            table["worker"]["slots"] = answers.slots
        config.from_table(table, node.folder)
        node.config.write_text("# Written by agoractl join.\n" + tomli_w.dumps(table))
    except OSError as error:
        raise LocalError(f"cannot write {error.filename or node.folder}: {error.strerror}") from error


def announced(answers: Answers, node: Planned, place: cloud.Place) -> list[str]:
    """Addresses to tell peers; none where the node is reached where it listens."""
    first = answers.port
    port = answers.announce_port + node.port - first if answers.announce_port else 0
    port = port or cloud.announced_port(place, node.port)
    address = answers.announce_ip or place.address
    if not address:
        if port != node.port:
            raise LocalError(f"port {port} is announced, but no address: name it with --announce-ip")
        return []
    try:
        kind = f"ip{ipaddress.ip_address(address).version}"
    except ValueError:
        kind = "dns4"
    return [f"/{kind}/{address}/tcp/{port}"]
