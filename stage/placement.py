"""Where and how a stage computes: device, precision, compilation, and what memory it has.

Choices are made once, at the start, from a node's settings and what the machine has; the CPU runs the same
lines as an accelerator. A device that is not there raises ``DeviceError`` with a sentence.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from p2p.errors import LocalError
from stage.hardware import find_gpu
from stage.settings import CompileMode, ComputeDtype

GIB = 1 << 30
CPU_SHARE = 0.5
"""Of the host's memory, that a worker on the CPU takes for itself where nothing is said."""


class DeviceError(LocalError):
    """The device that the settings name cannot be used."""


def choose_device(name: str) -> torch.device:
    """The device of ``node.device``: auto, cpu, cuda or cuda:N."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"node.device = {name!r}, but torch finds no CUDA device: use 'auto' or 'cpu'")
    device = torch.device("cuda" if name == "auto" else name)
    index = 0 if device.index is None else device.index
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise DeviceError(
            f"node.device = {name!r}, but the last one here is 'cuda:{last}': use that or 'auto'"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def compute_dtype(wish: ComputeDtype, device: torch.device) -> torch.dtype:
    """What matrices and activations are made of. auto: bf16 on a GPU that has it, else fp32."""
    if wish == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float32
    return torch.bfloat16 if wish == "bf16" else torch.float32


def compiles(wish: CompileMode, device: torch.device) -> bool:
    """Whether layers go through torch.compile. auto: on a GPU."""
    return wish == "on" or (wish == "auto" and device.type == "cuda")


def memory_budget(gib: float | None, device: torch.device) -> int:
    """Bytes that a worker may use on its device."""
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    return int(CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """FLOP/s of a device at most: as said, from the table of GPUs, or None."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    try:
        return find_gpu(torch.cuda.get_device_name(device)).tflops * 1e12
    except LocalError:
        return None


def vram(device: torch.device) -> dict[str, int]:
    """Bytes of an accelerator's memory: total, free (of all processes), and this one's; empty for a CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "total": total,
        "free": free,
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
    }


def give_back(device: torch.device) -> None:
    """Memory that torch keeps for later goes back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Peak:
    """Bytes that a piece of work needs at most, beside what is there before it: a context manager.

    On CUDA the allocator counts. On a CPU it is the process's resident memory (its high-water mark, set back
    at the start where the kernel lets us), which other threads and a warm allocator blur.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                pass  # then the mark is that of the whole process so far: too high, never too low
            self._before = resident("VmRSS")
        return self

    def __exit__(self, *_error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            after = torch.cuda.max_memory_allocated(self._device)
        else:
            after = resident("VmHWM")
        self.bytes = max(0, after - self._before)


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; 0 where the system does not say."""
    try:
        with Path("/proc/self/status").open() as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return 0


class SavedBytes:
    """Counts what autograd keeps of the work inside, each storage once, without ``known`` ones."""

    def __init__(self, known: list[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
