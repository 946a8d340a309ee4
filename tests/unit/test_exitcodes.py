"""What ends the daemon, and with which code."""

from __future__ import annotations

import pytest
import torch
import trio

from agorad.exitcodes import DaemonExit, ExitCode, hardware, verdict
from agorad.roles.worker import Faults
from p2p.errors import LocalError, Refused
from stage.device import FORWARD, Device

HARDWARE = [
    (MemoryError(), ExitCode.MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ExitCode.MEMORY),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ExitCode.MEMORY),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), ExitCode.ACCELERATOR),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), ExitCode.ACCELERATOR),
    (RuntimeError("CUDA kernel not launched: invalid argument"), ExitCode.ACCELERATOR),
]


@pytest.mark.parametrize(("error", "code"), HARDWARE)
def test_failing_hardware_has_its_codes_and_a_sentence(error: Exception, code: ExitCode) -> None:
    group = BaseExceptionGroup("", [LocalError("beside it"), ExceptionGroup("", [error])])
    found, why = verdict(group)
    assert found == code
    assert why is not None
    assert str(error) in why
    assert "\n" not in why


def test_other_failures_are_not_the_hardwares() -> None:
    for error in (
        RuntimeError("sizes must match"),
        ValueError("CUDA error"),
        LocalError("no"),
    ):
        assert hardware(error) is None
    assert verdict(RuntimeError("odd"))[0] == ExitCode.BUG
    assert verdict(LocalError("no"))[0] == ExitCode.USAGE
    assert verdict(Refused("banned", "no"))[0] == ExitCode.REFUSED


@pytest.mark.parametrize(("error", "code"), HARDWARE)
def test_a_job_that_fails_so_ends_the_worker_though_its_call_was_handled(
    error: Exception, code: ExitCode
) -> None:
    def job() -> None:
        raise error

    async def main() -> None:
        faults = Faults()
        with trio.fail_after(10), Device(failed=faults.note) as device:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(faults.watch)
                for call in (lambda: [].pop(), job):
                    with pytest.raises(Exception) as caught:  # as a host does with what a handler raises
                        await device.run(FORWARD, call)
                    assert not isinstance(caught.value, DaemonExit)
                await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as end:
        trio.run(main)
    assert verdict(end.value)[0] == code
