"""What a machine is like, held against what the run asks for: the table that ``agoractl join`` begins with.

Nothing here is sent anywhere and nothing is believed by the run because of it: the authority measures again
what can be measured (port, round-trip time, bandwidth, clock). It only spares people a wait. Blocking: at
most some seconds. torch is looked at without importing it.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from agorad import facts
from agorad.ask import CommandFailed, NoAnswer, Unreachable, ask
from agorad.exitcodes import ExitCode
from agorad.join.cloud import Place
from agorad.join.layout import Planned
from agorad.join.reach import Reach
from agorad.run import Manifest
from stage.memory import Mode, stage_memory

GIB: Final = facts.GIB
DESCRIPTORS: Final = 4096
OLDEST_PYTHON: Final = (3, 11)
ANSWER_S: Final = 1.0


@attrs.frozen(kw_only=True)
class Finding:
    """One line of the table."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""
    exit: int = ExitCode.REQUIREMENTS
    """How a join ends that fails for this."""

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return attrs.asdict(self)


def of_machine(
    manifest: Manifest, nodes: Sequence[Planned], place: Place, reach: Reach | None, *, system: str = ""
) -> list[Finding]:
    """All that does not depend on answers. ``system``: another machine's, for tests."""
    return [
        *_system(system or platform.system(), place),
        *_torch(nodes),
        *_devices(manifest, nodes),
        *_room(manifest, nodes),
        *(() if reach is None else _network(manifest, reach)),
    ]


def of_node(node: Planned, place: Place, *, label: str = "port") -> Finding:
    """Whether the node's port is free."""
    running = _running(node)
    if running is not None:
        return Finding(
            name=label, verdict="fail", found=f"this node runs already (process {running})",
            remedy="agoractl status shows it, agoractl leave stops it", exit=ExitCode.DUPLICATE,
        )  # fmt: skip
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("0.0.0.0", node.port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return Finding(
                name=label, verdict="fail",
                found=f"TCP {node.port}: {'something else listens there' if taken else error.strerror}",
                remedy="name another with --host-port", exit=ExitCode.PORT,
            )  # fmt: skip
    outside = place.outside(node.port)
    if outside is None and not node.announce_port:
        open_ones = ", ".join(map(str, sorted(place.ports))) or "none"
        return Finding(
            name=label, verdict="warn",
            found=f"{place.cloud} lets TCP {node.port} not through (it does: {open_ones})",
            remedy="expose it there, or name another with --host-port or its number outside with "
            "--announce-port",
        )  # fmt: skip
    number = node.announce_port or outside
    elsewhere = "" if number == node.port else f", {number} outside"
    return Finding(
        name=label,
        verdict="ok",
        found=f"TCP {node.port} is free{elsewhere}; others must reach it from outside",
    )


def _running(node: Planned) -> int | None:
    """The process id of a daemon that lives in this node's folder."""
    if not node.control.exists():
        return None
    try:
        return int(ask(node.control, "status", timeout=ANSWER_S)["pid"])
    except (Unreachable, NoAnswer, CommandFailed, KeyError, TypeError, ValueError):
        return None


def _system(system: str, place: Place) -> Iterator[Finding]:
    wsl = "microsoft" in platform.release().lower()
    at = f", {'at ' if place.provider else ''}{place.cloud}" if place.cloud else ""
    yield Finding(
        name="system",
        verdict="fail" if system != "Linux" else "warn" if wsl else "ok",
        found=f"{system} {platform.release()}{' (WSL2)' if wsl else at}",
        remedy="run agorad on Linux, or in WSL2 on Windows"
        if system != "Linux"
        else "Windows has to forward the port: networkingMode=mirrored in .wslconfig, or netsh portproxy"
        if wsl
        else "",
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
        remedy="" if enough else f"raise the hard limit to {DESCRIPTORS}: ulimit -Hn, or LimitNOFILE=",
    )


def torch_version() -> str:
    """Of the installed torch, like ``2.13.0+cpu``; empty without one."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _torch(nodes: Sequence[Planned]) -> Iterator[Finding]:
    version = torch_version()
    if not version:
        yield Finding(
            name="torch", verdict="fail", found="not installed",
            remedy="install agorad with its requirements: pip install torch",
        )  # fmt: skip
    elif version.endswith("+cpu") and any(node.device != "cpu" for node in nodes):
        yield Finding(
            name="torch", verdict="fail", found=f"{version} cannot use a GPU",
            remedy="install torch with CUDA, or compute on the processor: --gpu-id cpu",
        )  # fmt: skip
    else:
        yield Finding(name="torch", verdict="ok", found=version)


def _devices(manifest: Manifest, nodes: Sequence[Planned]) -> Iterator[Finding]:
    least = manifest.admission.min_vram_gib
    gpus = {gpu.index: gpu for gpu in facts.find_gpus()}
    need = _least(manifest, "cuda")
    for node in nodes:
        number = "" if len(nodes) == 1 else f" {node.gpu}"
        gpu = gpus.get(node.gpu)
        if node.device == "cpu" or gpu is None:
            missing = node.device != "cpu"
            fail = missing or least > 0
            yield Finding(
                name=f"GPU{number}",
                verdict="fail" if fail else "warn",
                found=f"nvidia-smi shows no GPU {node.gpu}" if missing else _without(gpus.values()),
                remedy="install NVIDIA's driver, or choose a GPU with --gpu-id"
                if fail
                else "the node computes on the processor, which is slow",
            )
            continue
        yield Finding(name=f"GPU{number}", verdict="ok", found=gpu.name)
        yield _amount(
            f"GPU{number} memory", gpu.vram_gib, least, "admission.min_vram_gib", "use a GPU with more"
        )
        if gpu.free_gib < need <= gpu.vram_gib:
            yield Finding(
                name=f"GPU{number} free", verdict="warn",
                found=f"{gpu.free_gib:.1f} GiB; the smallest stage needs {need:.1f}",
                remedy="stop what else uses the GPU: nvidia-smi names it",
            )  # fmt: skip
        elif gpu.vram_gib < need:
            yield _too_small(f"{need:.1f} GiB of GPU memory")


def _without(gpus: Any) -> str:
    return "not used, by your choice" if gpus else "none that nvidia-smi shows"


def _too_small(what: str) -> Finding:
    return Finding(
        name="smallest stage", verdict="warn", found=f"needs {what}",
        remedy="agoractl run plan shows settings that need less (compute.optimizer)",
    )  # fmt: skip


def _room(manifest: Manifest, nodes: Sequence[Planned]) -> Iterator[Finding]:
    rules, count = manifest.admission, len(nodes)
    ram = facts.ram_bytes() / GIB
    yield _amount("memory", ram, rules.min_ram_gib, "admission.min_ram_gib", "use a machine with more")
    if nodes[0].device == "cpu" and (need := _least(manifest, "cpu")) > ram:
        yield _too_small(f"{need:.1f} GiB of memory")
    state = nodes[0].folder
    disk = facts.free_bytes(state) / GIB
    yield _amount(
        "disk", disk, rules.min_disk_gib, "admission.min_disk_gib",
        f"free some space where {state} lies, or set XDG_STATE_HOME",
    )  # fmt: skip
    if not _writable(state):
        yield Finding(
            name="state folder", verdict="fail", found=f"cannot write in {state}",
            remedy="correct its owner, or set XDG_STATE_HOME", exit=ExitCode.USAGE,
        )  # fmt: skip
    if count > rules.max_nodes_per_account:
        yield Finding(
            name="nodes", verdict="warn", found=f"{count}; an account may have {rules.max_nodes_per_account} "
            "(admission.max_nodes_per_account)", remedy="those beyond it will be refused",
        )  # fmt: skip


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _least(manifest: Manifest, kind: Literal["cuda", "cpu"]) -> float:
    """GiB that the smallest stage needs there."""
    model, training = manifest.model, manifest.training
    needs = [stage_memory(model, training, stage, Mode(), device=kind) for stage in range(model.stages)]
    return min(n.vram_bytes if kind == "cuda" else n.vram_bytes + n.host_bytes for n in needs) / GIB


def _amount(name: str, have: float, least: float, setting: str, remedy: str) -> Finding:
    enough = have >= least
    asked = f"; the run asks for {least:g} ({setting})" if least else ""
    return Finding(
        name=name,
        verdict="ok" if enough else "fail",
        found=f"{have:.1f} GiB{asked}",
        remedy="" if enough else remedy,
    )


def _network(manifest: Manifest, reach: Reach) -> Iterator[Finding]:
    if not reach.answered:
        yield Finding(
            name="authority", verdict="warn", found=f"none answers: {reach.why}",
            remedy="look at the line and the firewall, or ask the run's operator; the node goes on trying",
        )  # fmt: skip
        return
    limit = manifest.admission.max_rtt_ms
    far = bool(limit) and reach.rtt_ms > limit
    yield Finding(
        name="authority",
        verdict="warn" if far else "ok",
        found=f"answers in {reach.rtt_ms:.0f} ms"
        + (f"; the run allows {limit:g} to its nodes (admission.max_rtt_ms)" if far else ""),
        remedy="use a wired line, or a machine nearer to the run's others" if far else "",
    )
    if reach.skew_s is not None:
        most = manifest.admission.max_clock_skew_s
        off = bool(most) and abs(reach.skew_s) > most
        way = "ahead of" if reach.skew_s > 0 else "behind"
        same = abs(reach.skew_s) < max(0.1, reach.rtt_ms / 1000)
        yield Finding(
            name="clock",
            verdict="fail" if off else "ok",
            found="as the authority's" if same else f"{abs(reach.skew_s):.1f} s {way} the authority's"
            + (f"; {most:g} s are allowed (admission.max_clock_skew_s)" if off else ""),
            remedy="set the clock: timedatectl set-ntp true" if off else "",
        )  # fmt: skip
    if reach.seen_at and reach.seen_at not in reach.own:
        yield Finding(
            name="address", verdict="ok", found=f"others see this machine at {reach.seen_at}, "
            f"behind a router: it has to forward the port to {reach.own[0] if reach.own else 'this machine'}",
        )  # fmt: skip
