"""Real stages over real sockets: what an fp32 wire adds to loss and gradients (nothing), and its bytes."""

from __future__ import annotations

import hashlib
import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import trio

from p2p.host import Host
from p2p.identity import Identity
from p2p.membership import Membership, Trust, issue
from p2p.multiaddr import Multiaddr
from p2p.records import StageRecord
from stage.chained import Chain
from stage.clock import StepClock
from stage.compute import StageCompute, wire_shape
from stage.config import ModelConfig, TrainingConfig
from stage.data import Row, Source
from stage.device import Device
from stage.generation import Generation, Wish
from stage.messages import PROTOCOL, Request
from stage.microbatch import MicrobatchServer
from stage.nexthop import NextHop
from stage.roster import Entry, StageView
from stage.router import Router
from stage.ticket import Ticket
from stage.traffic import BoundaryCount

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
T, K = 32, 12
NOW = 1_000_000.0


def settings(stages: int, **training: Any) -> tuple[ModelConfig, TrainingConfig]:
    model = ModelConfig(
        d=64, k=K, heads=2, kv_heads=1, head_dim=32, ffn=96, seq=T, layers=tuple([1] * (stages - 1) + [2])
    )
    return model, TrainingConfig(seed=7, **training)


def source(tmp_path: Path) -> Source:
    words = random.Random(3).choices(["pipeline", "stage", "replica", "basis", "wire", "round"], k=4000)
    for number in range(4):  # several documents, so that some rows cross a boundary
        (tmp_path / f"{number}.txt").write_text(" ".join(words[number::4]))
    return Source(tmp_path, T, seed=7)


@attrs.define
class Replica:
    host: Host
    compute: StageCompute
    server: MicrobatchServer
    count: BoundaryCount


class Pipeline:
    """One replica a stage and a trainer, each with a host of its own."""

    def __init__(self, model: ModelConfig, training: TrainingConfig) -> None:
        self.model, self.training = model, training
        self.authority, self.trainer = Identity.generate(b"a" * 32), Identity.generate(b"t" * 32)
        self.trust = Trust(
            run="run",
            manifest_hash=bytes(32),
            authorities=frozenset({self.authority.peer_id}),
            standing={self.trainer.peer_id: "trainer"},
        )
        self.replicas: list[Replica] = []
        self.events: list[Any] = []

    async def start(self, stack: AsyncExitStack) -> None:
        next_hop = None
        for stage in reversed(range(self.model.stages)):
            next_hop = await self._stage(stack, stage, next_hop)
        host = await self._host(stack, self.trainer, None)
        self.first = NextHop(
            host, next_hop, Router(random.Random(1)), self.events.append, stages=self.model.stages
        )

    async def _host(self, stack: AsyncExitStack, identity: Identity, certificate: bytes | None) -> Host:
        host = Host(identity)
        host.membership = Membership(self.trust, lambda: certificate, lambda: NOW)
        await stack.enter_async_context(host.run([LOOPBACK]))
        return host

    async def _stage(self, stack: AsyncExitStack, stage: int, following: StageView | None) -> StageView:
        identity = Identity.generate(bytes([stage]) * 32)
        certificate = issue(
            self.authority, run="run", account="x", peer_id=identity.peer_id, role="worker",
            stage=stage, issued=NOW, expires=NOW + 600,
        ).encode()  # fmt: skip
        host = await self._host(stack, identity, certificate)
        compute = StageCompute(self.model, self.training, stage)
        count = BoundaryCount()
        next_hop = None
        if following is not None:
            router = Router(random.Random(1))
            stages = self.model.stages
            next_hop = NextHop(host, following, router, self.events.append, count, stages=stages)
        trainers = frozenset({self.trainer.peer_id})
        server = MicrobatchServer(
            identity=identity,
            run="run",
            trainers=trainers,
            shape=wire_shape(self.model, self.training, stage),
            clock=StepClock("run", trainers, self.training.target_batch),
            device=stack.enter_context(Device()),
            compute=compute,
            next_hop=next_hop,
            slots=8,
            emit=self.events.append,
            serving=lambda: True,
            step=lambda: 0,
            clock_advanced=lambda: None,
            count=count,
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        await nursery.start(server.run)
        host.handle(PROTOCOL, server.handle, max_payload=server.request_bytes)
        self.replicas.insert(0, Replica(host, compute, server, count))
        record = StageRecord(
            addrs=tuple(str(addr) for addr in host.addrs), phase="active", step=0, slots=8,
            rate=0.0, certificate=certificate,
        )  # fmt: skip
        view = StageView(stage)
        view.replace({identity.peer_id: Entry(identity.peer_id, record, list(host.addrs), 1.0)})
        return view

    async def train(self, row: Row, kind: str = "train") -> float:
        ticket = Ticket(
            run="run", trainer=self.trainer.peer_id, kind=kind, shard=row.shard, position=row.position,
            ids_hash=hashlib.sha256(row.ids).digest(), weight=1.0,
        ).signed_by(self.trainer)  # fmt: skip
        request = Request(
            ticket=ticket, clock=[], basis=0, path=[self.trainer.peer_id], tokens=T,
            documents=list(row.starts), dtype=self.training.wire_dtype,
            dtype_back=self.training.wire_dtype_backward, inline=False, deadline_s=30.0,
        )  # fmt: skip
        passed = await self.first.send(request, [row.ids], back_bytes=0)
        assert [self.trainer.peer_id, *(r.host.peer_id for r in self.replicas)] == passed.answer.path
        return passed.answer.loss


def run(pipeline: Pipeline, rows: list[Row], kind: str = "train") -> list[float]:
    async def main() -> list[float]:
        async with AsyncExitStack() as stack:
            await pipeline.start(stack)
            return [await pipeline.train(row, kind) for row in rows]

    return trio.run(main)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_fp32_wire_adds_nothing(tmp_path: Path, stages: int) -> None:
    model, training = settings(stages)
    data = source(tmp_path)
    everything = [data.row(0, position) for position in range(900)]
    crossing = [row for row in everything if row.starts]
    assert crossing
    rows = [*everything[:9], *crossing[:3]]
    pipeline = Pipeline(model, training)
    losses = run(pipeline, rows)
    chain = Chain(model, training)
    assert losses == pytest.approx([chain.microbatch(row) for row in rows], rel=1e-5)
    for replica, weights in zip(pipeline.replicas, chain.weights, strict=True):
        ours, theirs = replica.compute.weights.gradient, weights.gradient
        assert replica.compute.samples == len(rows)
        assert theirs.norm() > 0
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


WIDTH = {"fp32": 4 * K, "bf16": 2 * K, "int8": K + 4}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("back", ["fp32", "int8"])
def test_boundary_payload_is_the_formula(tmp_path: Path, dtype: Any, back: Any) -> None:
    model, training = settings(3, wire_dtype=dtype, wire_dtype_backward=back)
    data = source(tmp_path)
    rows = [data.row(0, position) for position in range(5)]
    pipeline = Pipeline(model, training)
    run(pipeline, rows)
    total = sum(replica.count.bytes for replica in pipeline.replicas)
    assert total == len(rows) * 2 * (T * WIDTH[dtype] + 4 * (T + 1) + T * WIDTH[back])
    sent = sum(r.host.counters.protocols[PROTOCOL][0] for r in pipeline.replicas)
    assert sent == total  # what the hosts saw leave is what was counted


def test_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    model, training = settings(2)
    row = source(tmp_path).held_out(1)[0]
    pipeline = Pipeline(model, training)
    [loss] = run(pipeline, [row], kind="eval")
    assert loss == pytest.approx(Chain(model, training).evaluate(row), rel=1e-5)
    for replica in pipeline.replicas:
        assert replica.compute.samples == 0
        assert replica.server.added == 0
        assert float(replica.compute.weights.gradient.abs().sum()) == 0.0
    assert pipeline.replicas[0].count.forward_hops == 1
    assert sum(replica.count.backward_hops for replica in pipeline.replicas) == 0


def greedy(chain: Chain, known: list[int], count: int) -> list[int]:
    """The likeliest tokens by the stages in one process, sequences that grow full going on with a half."""
    made: list[int] = []
    for _ in range(count):
        if len(known) > T:
            known = known[-T // 2 :]
        ids, state = torch.tensor([[*known, 0]]), None
        with torch.no_grad():
            for stage, weights in zip(chain.stages, chain.weights, strict=True):
                state = stage.forward(weights.named(), ids, state)
            made.append(int(state.logits(len(known) - 1)[0].argmax()))
        known = [*known, made[-1]]
    return made


def test_generated_text_is_that_of_the_stages_in_one_process(tmp_path: Path) -> None:
    model, training = settings(3)
    pipeline = Pipeline(model, training)
    prompt = list(b"a pipeline of stages")

    async def main() -> list[int]:
        async with AsyncExitStack() as stack:
            await pipeline.start(stack)
            generation = Generation(
                identity=pipeline.trainer, run="run", model=model, training=lambda: training,
                clock=StepClock("run", frozenset({pipeline.trainer.peer_id}), 4), next_hop=pipeline.first,
                shard=0, first=0,
            )  # fmt: skip
            wish = Wish(most=T, temperature=0.0, top_k=0, top_p=1.0, seed=1)
            return [token async for token in generation.tokens(prompt, wish, None)]

    assert trio.run(main) == greedy(Chain(model, training), prompt, T)
    for replica in pipeline.replicas:
        assert replica.server.added == replica.compute.samples == 0
        assert float(replica.compute.weights.gradient.abs().sum()) == 0.0
