"""The machine: Python, torch, kernels, GPU, memory, file descriptors, Windows beneath. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from agorad import __version__, facts
from agorad.authority.admission import parts
from agorad.doctor.patient import Patient
from agorad.join.findings import DESCRIPTORS, OLDEST_PYTHON, Finding, torch_version
from agorad.run import Manifest
from agorad.words import duration
from p2p.path import USUAL
from stage.memory import Mode, stage_memory

GIB: Final = facts.GIB
LEAST_AVAILABLE: Final = 1 << 30
LOAD_S: Final = 20.0
_LOAD: Final = """
import importlib.util, sys
importlib.util.module_from_spec(importlib.util.spec_from_file_location("agora_kernels", sys.argv[1]))
"""
WAYS: Final = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
SLACK_S: Final = 120.0
"""Clocks that agree differ by less."""


def look(patient: Patient) -> Iterator[Finding]:
    """All of it."""
    yield from _system()
    yield from _time(patient)
    yield from _software(patient)
    if patient.role == "worker":
        yield from _computing(patient)
        yield from _gpu(patient)
    yield from _memory(patient)
    yield from _descriptors(patient)
    yield from _congestion()


def _system() -> Iterator[Finding]:
    release = platform.release()
    if platform.system() != "Linux":
        yield Finding(
            name="system", verdict="fail", found=platform.system(),
            remedy="run agorad on Linux, or in WSL2 on Windows",
        )  # fmt: skip
    elif "microsoft" in release.lower():
        yield Finding(
            name="system", verdict="warn", found=f"Linux {release} in WSL2",
            remedy="Windows has to forward the port: agoractl service install sets that up",
        )  # fmt: skip
    else:
        yield Finding(name="system", verdict="ok", found=f"Linux {release}")
    old = sys.version_info[:2] < OLDEST_PYTHON
    yield Finding(
        name="Python", verdict="fail" if old else "ok", found=platform.python_version(),
        remedy="install Python 3.11 or newer" if old else "",
    )  # fmt: skip


def _time(patient: Patient) -> Iterator[Finding]:
    """A clock that is behind what was written earlier needs nobody else to be found wrong."""
    marks = {"the node's last event": patient.seen.at}
    if patient.manifest is not None:
        marks["the manifest"] = patient.manifest.run.created
    for name, at in marks.items():
        if at is not None and at > time.time() + SLACK_S:
            yield Finding(
                name="clock", verdict="fail",
                found=f"{name} is from {duration(at - time.time())} later than now by this machine's clock",
                remedy="set the clock: timedatectl set-ntp true; in WSL2 after sleep: sudo hwclock -s",
            )  # fmt: skip


def _software(patient: Patient) -> Iterator[Finding]:
    rules = patient.manifest.admission if patient.manifest is not None else None
    wanted = rules.min_version if rules is not None else ""
    old = bool(wanted) and parts(__version__) < parts(wanted)
    yield Finding(
        name="agorad", verdict="fail" if old else "ok",
        found=__version__ + (f"; the run takes {wanted} or newer (admission.min_version)" if old else ""),
        remedy="update agorad, then agoractl restart" if old else "",
    )  # fmt: skip


def _computing(patient: Patient) -> Iterator[Finding]:
    version = torch_version()
    cuda = patient.settings is not None and patient.settings.node.device.startswith("cuda")
    if not version:
        yield Finding(
            name="torch", verdict="fail", found="not installed",
            remedy="install agorad with its requirements: pip install torch",
        )  # fmt: skip
    elif version.endswith("+cpu") and cuda:
        yield Finding(
            name="torch", verdict="fail", found=f"{version} cannot use a GPU, and node.device asks for one",
            remedy="install torch with CUDA, or set node.device = 'cpu'",
        )  # fmt: skip
    else:
        yield Finding(name="torch", verdict="ok", found=version)
    trouble = kernels_trouble()
    yield Finding(
        name="kernels", verdict="fail" if trouble else "ok", found=trouble or "compiled",
        remedy="install agorad again, in its folder: pip install --force-reinstall --no-deps . (needs a C++ "
        "compiler)"
        if trouble
        else "",
    )  # fmt: skip


def kernels_trouble() -> str:
    """They are loaded in a process of their own: those built for another processor would end this one."""
    spec = importlib.util.find_spec("agora_kernels")
    if spec is None or spec.origin is None:
        return "agora_kernels is not there"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, spec.origin],
            capture_output=True, text=True, errors="replace", timeout=LOAD_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"agora_kernels could not be tried: {error}"
    if not done.returncode:
        return ""
    said = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
    return f"agora_kernels cannot be loaded: {said[0]}"


def _gpu(patient: Patient) -> Iterator[Finding]:
    settings, manifest = patient.settings, patient.manifest
    device = settings.node.device if settings is not None else "auto"
    if device == "cpu":
        return
    number = int(device.partition(":")[2] or 0)
    gpus = facts.find_gpus()
    gpu = next((found for found in gpus if found.index == number), None)
    least = manifest.admission.min_vram_gib if manifest is not None else 0.0
    if gpu is None:
        asked = device != "auto" or least > 0
        others = f"; there are {len(gpus)}" if gpus else ", or it is not installed"
        yield Finding(
            name="GPU", verdict="fail" if asked else "ok",
            found=f"node.device = {device!r}, but nvidia-smi shows no GPU {number}{others}"
            if asked
            else "none; the node computes on the processor",
            remedy="install NVIDIA's driver (nvidia-smi must list it), choose another cuda:N, or set "
            "node.device = 'cpu'"
            if asked
            else "",
        )  # fmt: skip
        return
    small = gpu.vram_gib < least
    asked_for = f"; the run asks for {least:g} GiB (admission.min_vram_gib)" if least else ""
    yield Finding(
        name="GPU", verdict="fail" if small else "ok", found=f"{gpu.name}, {gpu.vram_gib:.1f} GiB{asked_for}",
        remedy="use a GPU with more memory" if small else "",
    )  # fmt: skip
    need = smallest(manifest, "cuda")
    if patient.status is None and gpu.free_gib < need <= gpu.vram_gib:
        yield Finding(
            name="GPU memory", verdict="warn",
            found=f"{gpu.free_gib:.1f} GiB free; the smallest stage needs {need:.1f}",
            remedy="stop what else uses the GPU: nvidia-smi names it",
        )  # fmt: skip


def smallest(manifest: Manifest | None, kind: Literal["cuda", "cpu"]) -> float:
    """GiB that the run's smallest stage needs there; 0 without a manifest."""
    if manifest is None:
        return 0.0
    model, training = manifest.model, manifest.training
    needs = [stage_memory(model, training, stage, Mode(), device=kind) for stage in range(model.stages)]
    return min(n.vram_bytes if kind == "cuda" else n.vram_bytes + n.host_bytes for n in needs) / GIB


def _memory(patient: Patient) -> Iterator[Finding]:
    manifest = patient.manifest
    limit = cgroup_limit()
    ram = min(facts.ram_bytes(), limit) if limit is not None else facts.ram_bytes()
    least = manifest.admission.min_ram_gib if manifest is not None and patient.role == "worker" else 0.0
    asked = f"; the run asks for {least:g} (admission.min_ram_gib)" if least else ""
    capped = (
        " that this service or container may use" if limit is not None and limit < facts.ram_bytes() else ""
    )
    small = ram / GIB < least
    yield Finding(
        name="memory", verdict="fail" if small else "ok", found=f"{ram / GIB:.1f} GiB{capped}{asked}",
        remedy="use a machine with more, or raise the service's MemoryMax" if small else "",
    )  # fmt: skip
    available = available_bytes()
    on_cpu = patient.settings is not None and patient.settings.node.device == "cpu"
    need = smallest(manifest, "cpu") * GIB if patient.role == "worker" and on_cpu else 0.0
    if patient.status is None and available is not None and available < max(LEAST_AVAILABLE, need):
        yield Finding(
            name="free memory", verdict="warn",
            found=f"{available / GIB:.1f} GiB is not in use; {max(LEAST_AVAILABLE, need) / GIB:.1f} wanted",
            remedy="close what uses it (top names it), or add swap",
        )  # fmt: skip


def available_bytes(path: Path = Path("/proc/meminfo")) -> int | None:
    """That programs could still be given; None where nobody says."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The tightest memory limit above this process (version 2); None if there is none."""
    try:
        place = root / own.read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        return None
    found = []
    for folder in (place, *place.parents):
        try:
            found.append(int((folder / "memory.max").read_text()))
        except (OSError, ValueError):
            pass
        if folder == root:
            break
    return min(found, default=None)


def _descriptors(patient: Patient) -> Iterator[Finding]:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS
    yield Finding(
        name="open files", verdict="ok" if enough else "warn",
        found="no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}",
        remedy="" if enough else f"raise the hard limit to {DESCRIPTORS}: ulimit -Hn, or LimitNOFILE=",
    )  # fmt: skip
    if patient.status is None:
        return
    used, most = open_files(int(patient.status["pid"]))
    if most and used > 0.9 * most:
        yield Finding(
            name="file table", verdict="fail", found=f"the daemon has {used} of {most} files open",
            remedy="agoractl restart; raise LimitNOFILE= of the service if it fills up again",
        )  # fmt: skip


def _congestion() -> Iterator[Finding]:
    """How the kernel finds the speed of a line, for which it needs a module that not every system loads."""
    try:  # asking a socket for it would load it, for root
        loaded = WAYS.read_text().split()
    except OSError:
        return
    missing = USUAL.decode() not in loaded
    yield Finding(
        name="congestion control", verdict="warn" if missing else "ok",
        found=f"{USUAL.decode()} is not loaded" if missing else USUAL.decode(),
        remedy="sudo modprobe tcp_bbr, and for every boot: echo tcp_bbr | "
        "sudo tee /etc/modules-load.d/agora.conf; without it messages wait longer" if missing else "",
    )  # fmt: skip


def open_files(pid: int, proc: Path = Path("/proc")) -> tuple[int, int]:
    """How many a process has open and may have; (0, 0) if it may not be looked at."""
    try:
        used = len(os.listdir(proc / str(pid) / "fd"))  # noqa: PTH208 (only counted)
        for line in (proc / str(pid) / "limits").read_text().splitlines():
            if line.startswith("Max open files"):
                return used, int(line.split()[3])
    except (OSError, ValueError, IndexError):
        pass
    return 0, 0


def process_state(pid: int, proc: Path = Path("/proc")) -> str:
    """Its letter, as ps shows it: R, S, D, T, Z; empty if it is not there."""
    try:
        return (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
