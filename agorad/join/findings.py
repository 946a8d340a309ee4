"""What a machine is like, held against what the run asks for: the table that ``agoractl join`` begins with.

Nothing here is sent anywhere and nothing is believed by the run because of it: the authority measures again
what can be measured (port, round-trip time, bandwidth, clock). It only spares people a wait. Blocking: at
most some seconds.
"""

from __future__ import annotations

import errno
import platform
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from agorad import facts
from agorad.run import Manifest
from stage.memory import Mode, stage_memory

GIB: Final = facts.GIB
DESCRIPTORS: Final = 4096
OLDEST_PYTHON: Final = (3, 11)


@attrs.frozen(kw_only=True)
class Finding:
    """One line of the table."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return attrs.asdict(self)


def look(manifest: Manifest, *, device: str, port: int, state: Path) -> list[Finding]:
    """All findings for one node."""
    return [*_program(), *_machine(manifest, device, state), _port(port)]


def _program() -> Iterator[Finding]:
    system = platform.system()
    yield Finding(
        name="system",
        verdict="ok" if system == "Linux" else "fail",
        found=f"{system} {platform.release()}",
        remedy="" if system == "Linux" else "run agorad on Linux, or in WSL2 on Windows",
    )
    version = sys.version_info[:2]
    yield Finding(
        name="Python",
        verdict="ok" if version >= OLDEST_PYTHON else "fail",
        found=platform.python_version(),
        remedy="" if version >= OLDEST_PYTHON else "install Python 3.11 or newer",
    )
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS
    yield Finding(
        name="open files",
        verdict="ok" if enough else "warn",
        found="no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}",
        remedy="" if enough else f"raise the hard limit to {DESCRIPTORS}: LimitNOFILE= or ulimit -Hn",
    )


def _machine(manifest: Manifest, device: str, state: Path) -> Iterator[Finding]:
    rules = manifest.admission
    gpu, vram = facts.find_gpu(device)
    if gpu:
        yield Finding(name="GPU", verdict="ok", found=gpu)
    elif rules.min_vram_gib:
        yield Finding(
            name="GPU", verdict="fail", found="none that nvidia-smi shows",
            remedy="this run needs one: install NVIDIA's driver, or choose it with --gpu-id",
        )  # fmt: skip
    else:
        yield Finding(
            name="GPU", verdict="warn", found="none that nvidia-smi shows",
            remedy="the node computes on the processor, which is slow",
        )  # fmt: skip
    if gpu or rules.min_vram_gib:
        yield _amount("GPU memory", vram, rules.min_vram_gib, "admission.min_vram_gib", "use a larger card")
    ram = facts.ram_bytes() / GIB
    yield _amount("memory", ram, rules.min_ram_gib, "admission.min_ram_gib", "use a machine with more")
    disk = facts.free_bytes(state) / GIB
    yield _amount(
        "disk", disk, rules.min_disk_gib, "admission.min_disk_gib", f"free some space where {state} lies"
    )
    model, training = manifest.model, manifest.training
    kind: Literal["cuda", "cpu"] = "cuda" if gpu else "cpu"
    needs = [stage_memory(model, training, stage, Mode(), device=kind) for stage in range(model.stages)]
    if gpu:
        least, have, what = min(need.vram_bytes for need in needs) / GIB, vram, "GPU memory"
    else:
        least, have, what = min(need.vram_bytes + need.host_bytes for need in needs) / GIB, ram, "memory"
    yield Finding(
        name="smallest stage",
        verdict="ok" if have >= least else "warn",
        found=f"needs {least:.1f} GiB of {what}",
        remedy="" if have >= least else "agoractl run plan shows settings that need less (compute.optimizer)",
    )


def _amount(name: str, have: float, least: float, setting: str, remedy: str) -> Finding:
    enough = have >= least
    asked = f"; the run asks for {least:g} ({setting})" if least else ""
    return Finding(
        name=name,
        verdict="ok" if enough else "fail",
        found=f"{have:.1f} GiB{asked}",
        remedy="" if enough else remedy,
    )


def _port(port: int) -> Finding:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("0.0.0.0", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return Finding(
                name="port",
                verdict="fail",
                found=f"TCP {port}: {'something else listens there' if taken else error.strerror}",
                remedy="name another with --host-port",
            )
    return Finding(name="port", verdict="ok", found=f"TCP {port} is free; others must reach it from outside")
