"""Whole nodes of a run in one process: their files, and a role that only waits."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from agorad import config, run
from agorad.living import run_node
from agorad.node import Node
from agorad.run import Manifest, NodeRef, RunInfo
from p2p.identity import Identity
from stage.config import ModelConfig, TrainingConfig

MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1))


class Place:
    """A run on disk: an authority, a seed and a trainer that are listed, and workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        operator = Identity.generate()
        listed: dict[str, tuple[NodeRef, ...]] = {}
        self.ports: dict[str, int] = {}
        for name, kind in (("authority", "authorities"), ("seed", "seeds"), ("trainer", "trainers")):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.ports[name] = free.getsockname()[1]
            identity = Identity.generate()
            (folder / name).mkdir()
            identity.save(folder / name / "identity.key")
            here = f"/ip4/127.0.0.1/tcp/{self.ports[name]}"
            listed[kind] = (NodeRef(peer_id=identity.peer_id, addrs=(here,)),)
        self.manifest = Manifest(
            run=RunInfo(name="t", id="t-1", operator=operator.peer_id),
            model=MODEL,
            training=TrainingConfig(seed=1),
            **listed,  # type: ignore[arg-type]
        ).signed(operator)
        run.save(self.manifest, folder / "run.toml")

    def settings(self, name: str, role: str) -> config.Config:
        listen = [f"/ip4/127.0.0.1/tcp/{self.ports.get(name, 0)}"]
        node = {"role": role, "name": name, "run": "run.toml", "state": name, "listen": listen}
        extra = {"worker": {"account": "a"}} if role == "worker" else {}
        if role == "authority":
            (self.folder / "accounts.toml").touch()
            extra = {"authority": {"accounts": "accounts.toml"}}
        return config.from_table({"node": node, **extra}, self.folder)


@asynccontextmanager
async def living(settings: config.Config) -> AsyncIterator[Node]:
    sender, receiver = trio.open_memory_channel[Node](1)

    async def role(node: Node) -> None:
        sender.send_nowait(node)
        await node.stopping.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run_node(settings, role, started_at=time.time()))
        node = await receiver.receive()
        yield node
        node.stop("the test is over")
