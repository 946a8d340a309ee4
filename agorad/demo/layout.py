"""What a demo writes before it starts anything: keys, a signed manifest, accounts, one config a node.

Everything lies in one folder, so that each node can be stopped and started again by hand with
``agorad --config FILE`` and so that removing the folder removes the swarm. Ports are chosen by the kernel:
each is reserved by binding it and is let go just before its node starts, which keeps addresses in the
manifest and in ``swarm.json`` true across restarts. ``--set`` reaches the manifest (``model``,
``training``, ``admission``, ``data``, ``checkpoint``) and the nodes (``node``, ``worker``, ``trainer``,
``authority``).
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from pathlib import Path
from typing import Any, Final

import attrs

from agorad import config as node_config
from agorad import run as manifest_file
from agorad.config import TrainerSection
from agorad.run import Manifest, NodeRef, RunInfo
from agorad.settings import nearest, override, unstructure
from p2p.errors import LocalError
from p2p.identity import Identity
from stage.config import split_layers
from stage.presets import DEMO_LAYERS
from stage.presets import demo as demo_preset

MANIFEST_SECTIONS: Final = ("model", "training", "admission", "data", "checkpoint")
SNAPSHOT_EVERY: Final = 5
"""Steps between snapshots: a demo is short, and a killed worker should have one to come back with."""
NODE_SECTIONS: Final = ("node", "worker", "trainer", "authority", "metrics")
MOST: Final = {"stages": 32, "workers": 64, "trainers": 8}
MOST_STEPS: Final = 10**9
MOST_SECONDS: Final = 1e9
DECIDED: Final = {
    "node.role": "", "node.name": "", "node.run": "", "node.state": "", "node.identity": "",
    "node.listen": "", "node.announce": "", "node.control": "", "node.log": "",
    "metrics.listen": "",
    "worker.account": "", "worker.secret_file": "", "worker.stage": "", "authority.accounts": "",
    "trainer.data": "--data", "trainer.steps": "--steps", "trainer.seconds": "--seconds",
}  # fmt: skip
"""Settings of the nodes that a demo itself gives each node, and the option that means the same."""


@attrs.frozen(kw_only=True)
class Plan:
    """What was asked for."""

    stages: int
    workers: int
    trainers: int
    steps: int | None
    seconds: float | None
    data: Path | None
    assignments: tuple[str, ...]


@attrs.frozen(kw_only=True)
class DemoNode:
    """One process of the demo."""

    name: str
    role: str
    stage: int | None
    identity: Identity
    addr: str
    folder: Path
    reserved: socket.socket

    @property
    def config(self) -> Path:
        return self.folder / "agorad.toml"

    @property
    def control(self) -> Path:
        return self.folder / "control.sock"

    @property
    def log(self) -> Path:
        return self.folder / "agorad.log"

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"


@attrs.frozen(kw_only=True)
class Layout:
    """A swarm on disk, ready to start."""

    folder: Path
    manifest_path: Path
    manifest: Manifest
    nodes: tuple[DemoNode, ...]

    def of_role(self, role: str) -> list[DemoNode]:
        return [node for node in self.nodes if node.role == role]


def check(plan: Plan) -> Manifest:
    """The manifest without its nodes: every fault of the plan shows here, before anything is written."""
    for name, most in MOST.items():
        value = getattr(plan, name)
        if not 1 <= value <= most:
            raise LocalError(f"--{name} {value}: between 1 and {most} are possible")
    if plan.steps is not None and not 1 <= plan.steps <= MOST_STEPS:
        raise LocalError(f"--steps {plan.steps}: between 1 and {MOST_STEPS} are possible")
    if plan.seconds is not None and not 0 < plan.seconds <= MOST_SECONDS:
        raise LocalError(f"--seconds {plan.seconds:g}: more than 0 and at most {MOST_SECONDS:g} are possible")
    for assignment in plan.assignments:
        _check_name(assignment)
    operator = Identity.generate()
    manifest = _manifest(plan, operator, {})
    if manifest.model.stages != plan.stages:
        raise LocalError(
            f"model.layers names {manifest.model.stages} stages, --stages asks for {plan.stages}; "
            "leave one of them out"
        )
    _node_table(plan, {"role": "worker", "run": "run.toml", "state": "."}, {})
    return manifest


def prepare(plan: Plan, folder: Path) -> Layout:
    """Write the swarm into ``folder``, which exists."""
    operator = Identity.generate()
    nodes = [_node("seed", "seed", None, folder), _node("authority", "authority", None, folder)]
    for stage in range(plan.stages):
        for replica in range(plan.workers):
            nodes.append(_node(f"worker-{stage}-{replica}", "worker", stage, folder))
    nodes += [_node(f"trainer-{index}", "trainer", None, folder) for index in range(plan.trainers)]
    listed = {
        role: tuple(
            NodeRef(peer_id=node.identity.peer_id, addrs=(node.addr,)) for node in nodes if node.role == role
        )
        for role in ("seed", "authority", "trainer")
    }
    manifest = _manifest(plan, operator, listed).signed(operator)
    operator.save(folder / "operator.key")
    manifest_path = folder / "run.toml"
    manifest_file.save(manifest, manifest_path)
    secret = secrets.token_hex(16)
    (folder / "authority").mkdir()
    accounts = f'[accounts.demo]\nsecret_sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n'
    _private(folder / "authority" / "accounts.toml", accounts)
    _private(folder / "secret", secret + "\n")
    for node in nodes:
        node.folder.mkdir(exist_ok=True)
        node.identity.save(node.folder / "identity.key")
        node_section = {
            "role": node.role, "name": node.name, "run": "../run.toml", "state": ".",
            "listen": [node.addr], "log": "agorad.log",
        }  # fmt: skip
        extra: dict[str, Any] = {"metrics": {"listen": "127.0.0.1:0"}}
        if node.role == "authority":
            extra["authority"] = {"page_listen": "127.0.0.1:0"}
        elif node.role == "worker":
            extra["worker"] = {
                "account": "demo", "secret_file": "../secret", "stage": node.stage,
                "snapshot_every": SNAPSHOT_EVERY,
            }  # fmt: skip
        elif node.role == "trainer":
            extra["trainer"] = _trainer(plan)
        _write_toml(node.config, _node_table(plan, node_section, extra))
    return Layout(folder=folder, manifest_path=manifest_path, manifest=manifest, nodes=tuple(nodes))


def trainer_settings(plan: Plan) -> TrainerSection:
    """What every trainer of the demo is told."""
    table = _node_table(
        plan, {"role": "trainer", "run": "run.toml", "state": "."}, {"trainer": _trainer(plan)}
    )
    return node_config.from_table(table, Path.cwd()).trainer


def _trainer(plan: Plan) -> dict[str, Any]:
    data = None if plan.data is None else str(plan.data.absolute())
    trainer = {"data": data, "steps": plan.steps, "seconds": plan.seconds}
    return {key: value for key, value in trainer.items() if value is not None}


def _check_name(assignment: str) -> None:
    """Of a ``--set``: its section is one that a demo has, and the setting is not the demo's own."""
    name = assignment.partition("=")[0].strip()
    section, dot, _rest = name.partition(".")
    known = MANIFEST_SECTIONS + NODE_SECTIONS
    if section not in known:
        raise LocalError(f"unknown setting in --set {assignment!r}; {nearest(section, known)}")
    if not dot or "=" not in assignment:
        raise LocalError(f"--set {assignment!r} is not of the form section.key=value")
    if name in DECIDED:
        instead = f"use {DECIDED[name]}" if DECIDED[name] else "it is different for each node"
        raise LocalError(f"--set {name} is not possible, since the demo decides it; {instead}")


def _node(name: str, role: str, stage: int | None, folder: Path) -> DemoNode:
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    addr = f"/ip4/127.0.0.1/tcp/{reserved.getsockname()[1]}"
    return DemoNode(
        name=name, role=role, stage=stage, identity=Identity.generate(),
        addr=addr, folder=folder / name, reserved=reserved,
    )  # fmt: skip


def _manifest(plan: Plan, operator: Identity, nodes: dict[str, tuple[NodeRef, ...]]) -> Manifest:
    model, training = demo_preset(split_layers(DEMO_LAYERS, plan.stages), plan.steps)
    base = Manifest(
        run=RunInfo(
            name="demo",
            id=f"demo-{secrets.token_hex(4)}",
            created=time.time(),
            operator=operator.peer_id,
        ),
        seeds=nodes.get("seed", ()),
        authorities=nodes.get("authority", ()),
        trainers=nodes.get("trainer", ()),
        model=model,
        training=training,
        admission=manifest_file.Admission(
            max_nodes_per_account=plan.stages * plan.workers,
            max_rtt_ms=0.0,  # on a busy machine that measures the machine
        ),
    )
    mine = [text for text in plan.assignments if text.partition(".")[0].strip() in MANIFEST_SECTIONS]
    return manifest_file.from_table(override(Manifest, unstructure(base), mine))


def _node_table(plan: Plan, node: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A node's config table, ``--set`` laid over it and checked."""
    mine = [text for text in plan.assignments if text.partition(".")[0].strip() in NODE_SECTIONS]
    table = override(node_config.Config, {"node": node, **extra}, mine)
    tokenizer = table.get("trainer", {}).get("tokenizer")
    if isinstance(tokenizer, str):  # meant from where it is typed
        table["trainer"]["tokenizer"] = str(Path(tokenizer).expanduser().absolute())
    node_config.from_table(table, Path("/"))
    return table


def _write_toml(path: Path, table: dict[str, Any]) -> None:
    import tomli_w

    path.write_text(tomli_w.dumps(table))


def _private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
