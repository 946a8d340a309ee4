"""One node's folder a GPU: ``<state>/<run id>/gpu<N>`` with its settings, key, log, state and manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import attrs
import tomli_w

from agorad import config, run
from agorad.config import DEFAULT_PORT
from agorad.hosts import kind_of
from agorad.join.answers import Answers, NodeAnswers, states
from agorad.join.cloud import Place
from agorad.metrics import address as metrics
from agorad.run import Manifest
from p2p.errors import LocalError

LOG_LIMIT: Final = 64 << 20
"""Bytes of a log at which a new one is begun at the next start; one old log is kept."""


@attrs.frozen(kw_only=True)
class Planned:
    """A node that will run here."""

    gpu: int
    device: str
    port: int
    announce_port: int
    """0: the same, or what the provider says."""
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
        return config.runtime_of(self.folder) / "control.sock"

    @property
    def answers(self) -> NodeAnswers:
        """What to keep of it."""
        usual = self.folder / "identity.key", self.folder / "agorad.log"
        return NodeAnswers(
            port=0 if self.port == DEFAULT_PORT + self.gpu else self.port,
            announce_port=self.announce_port,
            identity="" if self.identity == usual[0] else str(self.identity),
            log="" if self.log == usual[1] else str(self.log),
        )


def plan(
    manifest: Manifest,
    answers: Answers,
    *,
    cpu: bool,
    port: int | None = None,
    announce_port: int | None = None,
    identity: Path | None = None,
    log: Path | None = None,
) -> list[Planned]:
    """The nodes, one a GPU. ``port`` and ``announce_port`` are the first GPU's, the others' lie beside it."""
    if len(answers.gpus) > 1 and (identity is not None or log is not None):
        raise LocalError("--identity-path and --log-file are one node's; join one GPU at a time with them")
    first = answers.gpus[0]
    nodes = []
    for gpu in answers.gpus:
        kept, here = answers.node(gpu), states() / manifest.run.id / f"gpu{gpu}"
        beside = gpu - first
        own = port + beside if port else kept.port or DEFAULT_PORT + gpu
        outside = announce_port + beside if announce_port else kept.announce_port
        if not 0 < own < 1 << 16 or not 0 <= outside < 1 << 16:
            raise LocalError(f"GPU {gpu} would get port {own}, announced as {outside or own}: there is none")
        nodes.append(
            Planned(
                gpu=gpu,
                device="cpu" if cpu else f"cuda:{gpu}",
                port=own,
                announce_port=outside,
                folder=here,
                identity=(identity or Path(kept.identity or here / "identity.key")).absolute(),
                log=(log or Path(kept.log or here / "agorad.log")).absolute(),
            )
        )
    if len({node.port for node in nodes}) < len(nodes):
        raise LocalError("two of the nodes would listen on one port; give the first one's with --host-port")
    return nodes


def write(
    manifest: Manifest, answers: Answers, node: Planned, place: Place, *, service: bool = False
) -> None:
    """Make the folder and write manifest and settings; what an earlier join left there is reused.

    A service has no log file: what it says is in the journal.
    """
    table: dict[str, Any] = {
        "node": {
            "role": "worker", "name": f"gpu{node.gpu}", "run": "run.toml", "state": ".",
            "identity": str(node.identity), "device": node.device, "log": str(node.log),
            "listen": [f"/ip4/0.0.0.0/tcp/{node.port}"], "announce": announced(answers, node, place),
        },
        "worker": {"account": answers.account},
        "metrics": {"listen": f"127.0.0.1:{metrics.DEFAULT_PORT + node.gpu}"},
    }  # fmt: skip
    if service:
        del table["node"]["log"]
    if answers.slots:
        table["worker"]["slots"] = answers.slots
    config.from_table(table, node.folder)
    try:
        node.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        run.save(manifest, node.folder / "run.toml")
        node.config.write_text("# Written by agoractl join.\n" + tomli_w.dumps(table))
        for path in (node.identity, node.log):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if node.log.exists() and node.log.stat().st_size > LOG_LIMIT:
            node.log.replace(node.log.with_name(node.log.name + ".1"))
    except OSError as error:
        raise LocalError(f"cannot write {error.filename or node.folder}: {error.strerror}") from error


def open_log(node: Planned) -> int:
    """A descriptor that appends to the node's log, which is its owner's alone."""
    try:
        return os.open(node.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LocalError(f"cannot write the log {node.log}: {error.strerror}; see --log-file") from error


def announced(answers: Answers, node: Planned, place: Place) -> list[str]:
    """Addresses to tell peers; none where the node is reached where it listens."""
    port = node.announce_port or place.outside(node.port) or node.port
    address = answers.announce_ip or place.address
    if not address:
        if port != node.port:
            raise LocalError(f"port {port} is announced, but no address: name it with --announce-ip")
        return []
    return [f"/{kind_of(address)}/{address}/tcp/{port}"]
