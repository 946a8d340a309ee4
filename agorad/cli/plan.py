"""``agoractl run plan``: what a run needs and reaches on given machines and links, before anybody joins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, get_args

import attrs
import click

from agorad.cli import simulate as simulation
from agorad.usage import NamedPath
from p2p.errors import LocalError
from stage import hardware, presets
from stage.config import SLOTS, ModelConfig, TrainingConfig
from stage.hardware import GB, MFU, Gpu, Link, Machine
from stage.memory import DeviceKind, Dtype, Graph, OptimizerPlace
from stage.plan import GRAPHS, OPTIMIZERS, ROUND_S, DoesNotFit, Plan, Setting, StagePlan, fit
from stage.plan import plan as plan_run

DEFAULT_GPU: Final = "RTX 4090"
CPU_TFLOPS: Final = 0.1
"""Assumed of two ordinary cores, sustained in fp32."""
LOOPBACK: Final = Link(mbps=1e5, rtt_ms=0.2)
"""Between nodes on one machine."""


@click.command()
@click.argument("path", metavar="[RUN]", type=NamedPath(), required=False)
@click.option("--preset", metavar="NAME", help=f"Instead of a manifest: {', '.join(presets.PRESETS)}.")
@click.option("--fit", "wanted", metavar="vram=GB,ram=GB", help="Search a cut into stages that fits.")
@click.option("--vram", type=float, metavar="GB", help="Memory of a GPU: modes are chosen to fit.")
@click.option("--ram", type=float, metavar="GB", help="Memory of a host.")
@click.option("--gpu", metavar="NAME", help=f"What computes.  [default: {DEFAULT_GPU}]")
@click.option("--tflops", type=float, help=f"Sustained, instead of {MFU:.0%} of the GPU's peak.")
@click.option("--mbps", type=float, help="A line's rate, each way.  [default: 200, with --cores no limit]")
@click.option("--rtt-ms", type=float, help="Between two nodes.  [default: 40, with --cores none]")
@click.option("--replicas", type=int, default=2, show_default=True, help="Of every stage.")
@click.option("--device", type=click.Choice(get_args(DeviceKind)), default="cuda", show_default=True)
@click.option("--dtype", type=click.Choice(get_args(Dtype)), help="[default: bf16 on a GPU, else fp32]")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Only this, instead of the best that fits.")
@click.option("--graph", type=click.Choice(GRAPHS), help="Only this, instead of the best that fits.")
@click.option("--measure", type=int, metavar="STAGE", help="Run this stage here, to compare (--device cpu).")
@simulation.options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def plan(
    path: Path | None,
    preset: str | None,
    wanted: str | None,
    vram: float | None,
    ram: float | None,
    gpu: str | None,
    tflops: float | None,
    mbps: float | None,
    rtt_ms: float | None,
    replicas: int,
    device: DeviceKind,
    dtype: Dtype | None,
    optimizer: OptimizerPlace | None,
    graph: Graph | None,
    measure: int | None,
    simulate: bool,
    as_json: bool,
    **simulated: Any,
) -> None:
    """Memory, traffic and speed of every stage on given machines and links.

    Example: agoractl run plan --preset 8b --fit vram=24,ram=32

    With --simulate the run is played through in virtual time with the real routing: machines of different
    speed, lines, and replicas that leave and come back.
    """
    model, training = _described(path, preset)
    if wanted is not None:
        if vram is not None or ram is not None:
            raise LocalError("--fit names the memory itself; leave out --vram and --ram")
        vram, ram = _memory_of(wanted)
    if device == "cpu" and vram is not None:
        raise LocalError("a CPU has no VRAM; name the memory with ram alone")
    limited = vram is not None or ram is not None
    setting = Setting(
        model=model,
        training=training,
        machine=_machine(device, gpu, tflops, vram, ram),
        link=_link(mbps, rtt_ms, LOOPBACK if simulated["cores"] else Link()),
        replicas=replicas,
        device=device,
        dtype=dtype or ("bf16" if device == "cuda" else "fp32"),
        optimizers=(optimizer,) if optimizer else OPTIMIZERS,
        # what a stage cannot do without; a worker keeps graphs in what memory is left
        graphs=(graph,) if graph else GRAPHS if limited else ("recompute",),
    )
    try:
        found = fit(setting) if wanted is not None else plan_run(setting)
    except DoesNotFit as error:
        hint = "" if wanted is not None else "; --fit searches a cut that fits"
        raise click.ClickException(f"{error}{hint}") from None
    measured = None if measure is None else _measured(found, measure)
    run = simulation.simulate(found, **simulated) if simulate else None
    if as_json:
        extra = {} if measured is None else {"measured": measured}
        if run is not None:
            extra["simulated"] = simulation.document(*run)
        click.echo(json.dumps(document(found) | extra))
        return
    click.echo("\n".join(table(found) + ([] if run is None else simulation.lines(*run))))
    if measured is not None:
        planned, peak = measured["planned_bytes"], measured["peak_bytes"]
        click.echo(
            f"stage {measured['stage']} measured here: {peak / GB:.2f} GB, planned {planned / GB:.2f} GB "
            f"({peak / planned - 1:+.1%}), {measured['sequence_s']:.1f} s a sequence "
            f"({measured['tflops']:.3g} TFLOP/s)"
        )


def _measured(found: Plan, index: int) -> dict[str, Any]:
    """The real stage at work on this machine, beside what was planned."""
    from stage import trial

    setting = found.setting
    if setting.device != "cpu":
        raise LocalError("--measure runs on this machine's CPU; plan for that: --device cpu")
    if not 0 <= index < len(found.stages):
        raise LocalError(f"--measure {index}: the stages are 0 to {len(found.stages) - 1}")
    stage = found.stages[index]
    measured = trial.run(
        setting.model, setting.training, index, stage.mode, graphs=stage.in_flight,
        say=lambda line: click.echo(f"measuring, {line}", err=True),
    )  # fmt: skip
    return {
        "stage": index,
        "planned_bytes": stage.memory.vram_bytes + stage.memory.host_bytes,
        **attrs.asdict(measured),
        "tflops": stage.flops / measured.sequence_s / 1e12,
    }


def _described(path: Path | None, preset: str | None) -> tuple[ModelConfig, TrainingConfig]:
    if (path is None) == (preset is None):
        raise LocalError("name either a run's manifest or a --preset")
    if preset is not None:
        return presets.preset(preset)
    from agorad import run as manifests

    assert path is not None
    manifest = manifests.load(path)
    return manifest.model, manifest.training


def _link(mbps: float | None, rtt_ms: float | None, default: Link) -> Link:
    return Link(
        mbps=default.mbps if mbps is None else mbps, rtt_ms=default.rtt_ms if rtt_ms is None else rtt_ms
    )


def _memory_of(text: str) -> tuple[float | None, float | None]:
    """``vram=24,ram=32`` in GB; either may be missing."""
    values: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        name = name.strip()
        try:
            number = float(value)
        except ValueError:
            raise LocalError(f"--fit {text!r}: write it like vram=24,ram=32, in GB") from None
        if name not in ("vram", "ram") or name in values:
            raise LocalError(f"--fit {text!r}: name vram and ram once each, like vram=24,ram=32")
        values[name] = number
    return values.get("vram"), values.get("ram")


def _machine(
    device: DeviceKind, gpu: str | None, tflops: float | None, vram: float | None, ram: float | None
) -> Machine:
    if device == "cpu":
        if gpu is not None:
            raise LocalError("--gpu and --device cpu exclude each other")
        card = Gpu(CPU_TFLOPS / MFU, 0, hardware.HOST_GB_S / hardware.BANDWIDTH_SHARE)
    else:
        card = hardware.find_gpu(gpu or DEFAULT_GPU)
    return Machine(
        tflops=card.tflops * MFU if tflops is None else tflops,
        bandwidth_gb_s=card.bandwidth_gb_s * hardware.BANDWIDTH_SHARE,
        vram_bytes=None if vram is None else vram * GB,
        ram_bytes=None if ram is None else ram * GB,
    )


def document(found: Plan) -> dict[str, Any]:
    """The plan as JSON: bytes, seconds, FLOPs."""
    setting = found.setting
    return {
        "stages": [_stage(stage) for stage in found.stages],
        "tokens_per_second": found.tokens_per_second,
        "bottleneck": found.bottleneck,
        "layers": list(setting.model.layers),
        "params": sum(stage.params for stage in found.stages),
        "replicas": setting.replicas,
        "device": setting.device,
        "machine": attrs.asdict(setting.machine),
        "link": attrs.asdict(setting.link),
        "notes": notes(found),
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": stage.layers,
        "params": stage.params,
        **attrs.asdict(stage.mode),
        "in_flight": stage.in_flight,
        "vram_bytes": stage.memory.vram_bytes,
        "host_bytes": stage.memory.host_bytes,
        "components": {"device": stage.memory.device, "host": stage.memory.host},
        "boundary_bytes": stage.boundary_bytes,
        "round_bytes": stage.round_bytes,
        "gradient_bytes": stage.gradient_bytes,
        "up_bytes": stage.up_bytes,
        "down_bytes": stage.down_bytes,
        "flops": stage.flops,
        "compute_s": stage.compute_s,
        "step_s": stage.step_s,
        "up_s": stage.up_s,
        "down_s": stage.down_s,
        "round_s": stage.round_s,
        "period_s": stage.period_s,
        "limit": stage.limit,
    }


def notes(found: Plan) -> list[str]:
    """What an operator has to change or know, one sentence each."""
    said = []
    slots = max(stage.in_flight for stage in found.stages)
    if slots > SLOTS:
        said.append(f"{slots} microbatches in flight need worker.slots = {slots} (the default is {SLOTS})")
    longest = max(found.stages, key=lambda stage: stage.round_s)
    if longest.round_s > ROUND_S:
        said.append(
            f"a round of stage {longest.stage} takes {longest.round_s:.0f} s on these lines, more than the "
            f"{ROUND_S:.0f} s that it may: lower training.slice_fraction"
        )
    if found.setting.replicas == 1:
        said.append("a single replica averages with nobody: no rounds")
    return said


def table(found: Plan) -> list[str]:
    """The plan for people, in lines."""
    setting, machine, link, model = (
        found.setting,
        found.setting.machine,
        found.setting.link,
        found.setting.model,
    )
    memory = ("VRAM GB", "RAM GB") if setting.device == "cuda" else ("data GB", "rest GB")
    rows = [
        (
            "stage",
            "layers",
            "parameters",
            *memory,
            "optimizer",
            "graph",
            "up MB",
            "round MB",
            "seconds",
            "limit",
        )
    ]
    for stage in found.stages:
        rows.append(
            (
                str(stage.stage),
                str(stage.layers),
                f"{stage.params:,}",
                f"{stage.memory.vram_bytes / GB:.2f}",
                f"{stage.memory.host_bytes / GB:.2f}",
                stage.mode.optimizer,
                stage.mode.graph + (f" {stage.in_flight}" if stage.mode.graph == "retain" else ""),
                f"{stage.up_bytes / 1e6:.2f}",
                f"{stage.round_bytes / 1e6:.0f}",
                f"{stage.period_s:.3f}",
                stage.limit,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = {rows[0].index(name) for name in ("optimizer", "graph", "limit")}
    return [
        f"{sum(stage.params for stage in found.stages):,} parameters, {sum(model.layers)} layers in "
        f"{model.stages} stages, {model.seq} tokens a sequence",
        f"a boundary carries {found.stages[0].boundary_bytes:,} bytes a sequence each way",
        f"{setting.replicas} replicas a stage, each {machine.tflops:.3g} TFLOP/s sustained in "
        f"{setting.dtype}, {link.mbps:g} Mbit/s, {link.rtt_ms:g} ms; GB = 10^9 bytes",
        "",
        *(
            "  ".join(
                cell.ljust(width) if at in words else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ),
        "",
        f"{found.tokens_per_second:,.0f} tokens a second, limited by {found.bottleneck}",
        *(f"! {sentence}" for sentence in notes(found)),
    ]
