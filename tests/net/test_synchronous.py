"""Synchronous steps of real stages in real rounds on loopback: what replicas share, what a failure costs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
import pytest
import torch
import trio
from torch import Tensor

from p2p.averaging import Averager, RoundFailed
from p2p.event import Event
from p2p.identity import PeerId
from stage.compute import StageCompute
from stage.config import ModelConfig, TrainingConfig
from stage.device import Device
from stage.events import BadGradient, GradientsAveraged, RoundAbandoned
from stage.synchronous import FACTOR_S, MAX_CARRIED, ROUNDS, SynchronousSteps
from tests.net.test_averager import Member, members

MODEL = ModelConfig(d=32, k=8, heads=2, kv_heads=1, head_dim=16, ffn=48, seq=16, layers=(1, 1), vocab=32)
TRAINING = TrainingConfig(
    seed=3, averaging="powersgd", powersgd_rank=3, warmup_steps=0, total_steps=100, min_lr_ratio=1.0
)


class Here:
    """Stands for ``Device``: the job runs here and now."""

    async def run(self, _priority: int, call: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*args)


@attrs.define
class Replica:
    member: Member
    compute: StageCompute
    steps: SynchronousSteps
    events: list[Event]

    @property
    def peer(self) -> PeerId:
        return self.member.host.peer_id

    def feed(self, seed: int, samples: int) -> Tensor:
        """Gradients of so many microbatches; their sum."""
        generator = torch.Generator().manual_seed(seed)
        fed = torch.zeros_like(self.compute.weights.gradient)
        for view in self.compute.weights.layout.views(fed).values():
            view.copy_(samples * torch.randn(view.shape, generator=generator))
        self.compute.weights.gradient.add_(fed)
        self.compute.samples += samples
        return fed

    @property
    def weights(self) -> Tensor:
        return self.compute.weights.flat.clone()

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def replicas(count: int, training: TrainingConfig = TRAINING) -> AsyncIterator[list[Replica]]:
    async with members(count) as group:
        made = []
        for member in group:
            events: list[Event] = []
            compute = StageCompute(MODEL, training, 1, emit=events.append)
            steps = SynchronousSteps(
                me=member.host.peer_id, stage=1, device=cast(Device, Here()), compute=compute,
                averager=member.averager, emit=events.append,
            )  # fmt: skip
            made.append(Replica(member, compute, steps, events))
        yield made


async def together(group: list[Replica], step: int, *, new: tuple[int, ...] = ()) -> list[int]:
    """Everybody takes a step; the samples behind each. ``new``: who has no weight yet."""
    used = [0] * len(group)
    peers = {one.peer for one in group}

    async def take(at: int) -> None:
        one = group[at]
        used[at] = await one.steps.step(step, peers - {one.peer}, weigh=at not in new)

    async with trio.open_nursery() as nursery:
        for at in range(len(group)):
            nursery.start_soon(take, at)
    return used


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(110):
            await body()

    trio.run(main)


def test_replicas_stay_equal_and_no_gradient_is_lost() -> None:
    async def body() -> None:
        async with replicas(3) as group:
            fed = torch.zeros_like(group[0].compute.weights.gradient)
            applied = torch.zeros_like(fed)
            for one in group:
                catch(one, applied if one is group[0] else None, 9)
            for step in (1, 2, 3):
                for at, one in enumerate(group):
                    fed += one.feed(10 * step + at, (2, 3, 4)[at])
                assert await together(group, step) == [2, 3, 4]
                for other in group[1:]:
                    assert torch.equal(group[0].weights, other.weights)
            left = torch.stack([one.compute.weights.gradient for one in group]).sum(dim=0)
            assert float((applied + left - fed).norm()) < 1e-4 * float(fed.norm())
            assert float(left.norm()) > 0.1 * float(fed.norm())  # factors of rank 3 do not carry it all
            assert [one.compute.samples for one in group] == [0, 0, 0]
            for one in group:
                taken = one.of(GradientsAveraged)
                assert [event.step for event in taken] == [1, 2, 3]
                assert all(len(event.members) == 3 and event.fraction == 1.0 for event in taken)
                assert taken[0].bytes < 0.8 * 4 * 4 / 3 * fed.numel()  # less than gradients as they are

    run(body)


def catch(one: Replica, applied: Tensor | None, samples: int) -> None:
    """Add to ``applied`` what updates are made with, times the samples behind it."""
    apply = one.compute.optimizer.apply

    def applying(step: int, gradient: Tensor) -> Any:
        if applied is not None:
            applied.add_(samples * gradient)
        return apply(step, gradient)

    one.compute.optimizer.apply = applying  # type: ignore[method-assign]


def test_who_is_new_takes_the_update_and_gives_nothing() -> None:
    async def body() -> None:
        async with replicas(3) as group, replicas(2) as without:
            for at, one in enumerate(group):
                one.feed(at, 2)
            for at, one in enumerate(without):
                one.feed(at, 2)
            assert await together(group, 1, new=(2,)) == [2, 2, 0]
            await together(without, 1)
            for one in (*group, *without):
                assert torch.allclose(group[0].weights, one.weights, atol=1e-6)
            assert group[2].compute.samples == 2

    run(body)


def test_a_round_that_fails_costs_a_step_and_no_gradient() -> None:
    """Three times in a row all wait for the next step; then each goes on with its own."""

    class Broken:
        async def average(self, *_args: Any, **_more: Any) -> Any:
            await trio.lowlevel.checkpoint()
            raise RoundFailed("every other member was lost")

    async def body() -> None:
        async with replicas(2) as group:
            one = group[0]
            whole = one.steps._averager
            one.steps._averager = cast(Averager, Broken())
            fed, before = one.feed(1, 2), one.weights
            for step in range(1, MAX_CARRIED + 1):
                assert await one.steps.step(step, {group[1].peer}, weigh=True) == 0
                assert torch.equal(one.weights, before)
                assert torch.equal(one.compute.weights.gradient, fed)
                assert one.compute.samples == 2
            assert await one.steps.step(MAX_CARRIED + 1, {group[1].peer}, weigh=True) == 2
            assert not torch.equal(one.weights, before)
            assert not one.compute.weights.gradient.any()
            assert [event.round for event in one.of(RoundAbandoned)] == [
                ROUNDS * step for step in range(1, MAX_CARRIED + 2)
            ]
            one.steps._averager = whole
            for at, each in enumerate(group):
                each.feed(at, 1)
            assert await together(group, 9) == [1, 1]

    run(body)


def test_without_mates_it_goes_on_alone() -> None:
    async def body() -> None:
        async with replicas(2) as group:
            one = group[0]
            before = one.weights
            one.feed(1, 2)
            assert await one.steps.step(1, set(), weigh=True) == 2
            assert not torch.equal(one.weights, before)
            gone = group[1].peer
            group[1].member.kill()
            one.feed(2, 3)
            assert await one.steps.step(2, {gone}, weigh=True) == 3  # dead, and still in the roster

    run(body)


@pytest.mark.parametrize("between", [False, True])
def test_a_mate_that_dies_takes_no_gradient_of_others_along(between: bool) -> None:
    """Before the rounds, or between the two: survivors are equal, and their gradients applied or kept."""

    async def body() -> None:
        async with replicas(3) as group:
            dead, alive = group[2], group[:2]
            if between:
                contribute = dead.compute.contribute

                def contribute_and_die(*args: Any) -> Any:
                    dead.member.kill()
                    return contribute(*args)

                dead.compute.contribute = contribute_and_die  # type: ignore[method-assign]
            else:
                dead.member.kill()
            for at, one in enumerate(group):
                one.feed(at, 2)
            peers = {one.peer for one in group}

            async def take(one: Replica, step: int) -> None:
                await one.steps.step(step, peers - {one.peer}, weigh=True)

            async def dying() -> None:
                with trio.CancelScope() as dead.member.rounds:
                    await take(dead, 1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(take, alive[0], 1)
                nursery.start_soon(take, alive[1], 1)
                if between:
                    nursery.start_soon(dying)
            assert torch.equal(alive[0].weights, alive[1].weights)
            used = [len(one.of(GradientsAveraged)) for one in alive]
            assert used[0] == used[1]
            if not used[0]:
                assert [one.compute.samples for one in alive] == [2, 2]
                await together(alive, 2)
            assert [one.compute.samples for one in alive] == [0, 0]
            assert torch.equal(alive[0].weights, alive[1].weights)

    run(body)


def test_who_missed_the_first_round_is_not_in_the_second() -> None:
    """Nor waited for: its left factors would be others."""

    async def body() -> None:
        async with replicas(3) as group:
            late = group[2]
            for at, one in enumerate(group):
                one.feed(at, 2)
            fed = late.compute.weights.gradient.clone()
            average, asked = late.member.averager.average, list[int]()

            class Missing:
                async def average(self, number: int, *args: Any, **more: Any) -> Any:
                    asked.append(number)
                    outcome = await average(number, *args, **more)
                    if number == ROUNDS:
                        raise RoundFailed("the round counts parts that did not reach this member")
                    return outcome

            late.steps._averager = cast(Averager, Missing())
            began = trio.current_time()
            assert await together(group, 1) == [2, 2, 0]
            assert trio.current_time() - began < FACTOR_S / 2
            assert asked == [ROUNDS]
            assert torch.equal(group[0].weights, group[1].weights)
            assert torch.equal(late.compute.weights.gradient, fed)
            assert [len(event.members) for event in group[0].of(GradientsAveraged)] == [2]

    run(body)


def test_a_gradient_that_is_not_finite_is_thrown_away_and_told() -> None:
    async def body() -> None:
        async with replicas(2) as group:
            for at, one in enumerate(group):
                one.feed(at, 2)
            group[0].compute.weights.gradient[3] = float("nan")
            assert await together(group, 1) == [0, 2]
            assert [event.samples for event in group[0].of(BadGradient)] == [2]
            assert torch.equal(group[0].weights, group[1].weights)
            assert bool(torch.isfinite(group[0].weights).all())

    run(body)
