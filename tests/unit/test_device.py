"""The device thread: one job at a time, by priority; what was cancelled in time never runs.

Jobs are held by threading events, so that every order is forced and nothing sleeps.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import pytest
import trio
import trio.testing

import stage.device
from stage.device import BACKWARD, FORWARD, STEP, Device

PATIENCE_S = 10.0


class Gate:
    """A job that tells when it began and ends when it is let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.go.wait(PATIENCE_S)
        return "gate"

    async def wait_began(self) -> None:
        await trio.to_thread.run_sync(self.began.wait, PATIENCE_S)


def run(test: Callable[[Device], object]) -> None:
    async def main() -> None:
        with trio.fail_after(PATIENCE_S), Device() as device:
            await test(device)  # type: ignore[misc]

    trio.run(main)


def test_results_arguments_and_errors_come_back() -> None:
    async def test(device: Device) -> None:
        assert await device.run(FORWARD, divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await device.run(FORWARD, divmod, 7, 0)
        assert await device.run(STEP, threading.get_ident) != threading.get_ident()
        assert sum(device.busy_s.values()) > 0

    run(test)


def test_backward_goes_before_steps_before_forward_and_oldest_first() -> None:
    order: list[str] = []

    async def test(device: Device) -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.run, FORWARD, gate)
            await gate.wait_began()
            for name, priority in (
                ("f1", FORWARD), ("s1", STEP), ("b1", BACKWARD), ("f2", FORWARD), ("b2", BACKWARD),
            ):  # fmt: skip
                nursery.start_soon(device.run, priority, order.append, name)
                await trio.testing.wait_all_tasks_blocked()
            gate.go.set()
        assert order == ["b1", "b2", "s1", "f1", "f2"]

    run(test)


def test_a_job_cancelled_before_it_began_never_runs() -> None:
    ran: list[str] = []

    async def test(device: Device) -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.run, FORWARD, gate)
            await gate.wait_began()
            with trio.move_on_after(0) as scope:
                await device.run(BACKWARD, ran.append, "dropped")
            assert scope.cancelled_caught
            gate.go.set()
        await device.run(FORWARD, ran.append, "after")
        assert ran == ["after"]

    run(test)


def test_a_job_cancelled_while_it_runs_ends_and_its_result_is_heard() -> None:
    heard: list[str] = []

    async def test(device: Device) -> None:
        gate, scope = Gate(), trio.CancelScope()

        async def work() -> None:
            with scope:
                heard.append(await device.run(BACKWARD, gate))
                await trio.lowlevel.checkpoint()
                heard.append("not reached")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await gate.wait_began()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert heard == []
            gate.go.set()
        assert heard == ["gate"]
        assert scope.cancelled_caught

    run(test)


def test_an_error_of_a_cancelled_job_is_not_swallowed() -> None:
    async def test(device: Device) -> None:
        gate, scope = Gate(), trio.CancelScope()

        def fails() -> None:
            gate()
            raise ValueError("the job's own")

        async def work() -> None:
            with scope, pytest.raises(ValueError, match="the job's own"):
                await device.run(BACKWARD, fails)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            await gate.wait_began()
            scope.cancel()
            gate.go.set()

    run(test)


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.device, "MAX_QUEUED", 2)

    async def test(device: Device) -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.run, FORWARD, gate)
            await gate.wait_began()
            for _ in range(2):
                nursery.start_soon(device.run, FORWARD, str)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RuntimeError, match="slots"):
                await device.run(BACKWARD, str)
            gate.go.set()

    run(test)


def test_closing_ends_what_is_queued_and_a_closed_device_says_so() -> None:
    ran: list[str] = []

    async def main() -> None:
        device, gate = Device(), Gate()
        async with trio.open_nursery() as nursery:
            with device:
                nursery.start_soon(device.run, FORWARD, gate)
                await gate.wait_began()
                nursery.start_soon(device.run, FORWARD, ran.append, "queued")
                await trio.testing.wait_all_tasks_blocked()
                gate.go.set()
            assert ran == ["queued"]
        with pytest.raises(RuntimeError, match="closed"):
            await device.run(FORWARD, str)

    trio.run(main)


def test_an_idle_device_holds_nobodys_job() -> None:
    class Tensor:
        """Stands for what is large."""

    async def test(device: Device) -> None:
        tensor, freed = Tensor(), threading.Event()
        weakref.finalize(tensor, freed.set)
        await device.run(FORWARD, id, tensor)
        del tensor
        assert await trio.to_thread.run_sync(freed.wait, PATIENCE_S / 2)

    run(test)


def test_what_a_job_raised_is_told_whoever_handles_it() -> None:
    told: list[BaseException] = []

    def fail() -> None:
        raise ValueError("of the job")

    async def main() -> None:
        with trio.fail_after(PATIENCE_S), Device(failed=told.append) as device:
            assert await device.run(STEP, lambda: 7) == 7
            with pytest.raises(ValueError, match="of the job"):
                await device.run(STEP, fail)

    trio.run(main)
    assert [str(error) for error in told] == ["of the job"]
