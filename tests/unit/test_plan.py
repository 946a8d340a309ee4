"""Plans: known figures, formulas held against the code, cuts that fit, refusals in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from agorad.cli import main
from p2p.errors import LocalError
from stage import hardware, kernels, memory, presets, replica, trial
from stage.config import ModelConfig
from stage.functions import VOCAB_BLOCK
from stage.genesis import genesis
from stage.hardware import GB, Link, Machine
from stage.memory import Mode
from stage.model import LOGITS_CHUNK, Stage, TailLoss
from stage.parameters import forward_flops
from stage.plan import ROUND_S, DoesNotFit, Setting, _cut, fit, plan
from stage.powersgd import PowerSGD
from stage.weights import CHUNK

SMALL = ModelConfig(
    vocab=512, d=256, k=8, heads=8, kv_heads=2, head_dim=32, ffn=704, seq=128, layers=(3, 2, 2)
)  # fmt: skip


def setting(name: str = "8b", **changes: Any) -> Setting:
    model, training = presets.preset(name)
    machine = Machine(
        tflops=changes.pop("tflops", 66.0),
        bandwidth_gb_s=700,
        vram_bytes=changes.pop("vram", None),
        ram_bytes=changes.pop("ram", None),
    )
    return Setting(model=model, training=training, machine=machine, **changes)


@attrs.frozen
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


RunPlan = Callable[..., Done]


@pytest.fixture
def run_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunPlan:
    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["agoractl", "run", "plan", *arguments])
        try:
            main()
        except SystemExit as end:
            return Done(int(end.code or 0), *capsys.readouterr())
        return Done(0, *capsys.readouterr())

    return call


def test_8b_has_the_figures_of_the_reference(run_plan: RunPlan) -> None:
    done = run_plan("--preset", "8b", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    stages = document["stages"]
    assert [stage["params"] for stage in stages] == [1_366_411_008, *[906_579_968] * 5, 2_732_856_320]
    assert {stage["boundary_bytes"] for stage in stages} == {835_584}
    assert stages[1]["round_bytes"] == pytest.approx(906_579_968 * 4 / 20, rel=1e-4)
    assert document["bottleneck"] == "stage 6: compute"
    for stage in stages:
        assert stage["vram_bytes"] == sum(stage["components"]["device"].values())
        assert stage["host_bytes"] == sum(stage["components"]["host"].values())
    for_people = run_plan("--preset", "8b").stdout
    assert "835,584 bytes" in for_people
    assert "2,732,856,320" in for_people


def test_a_manifest_is_planned_and_torch_stays_out(tmp_path: Path) -> None:
    from agorad import run as manifests
    from agorad.run import Manifest, RunInfo
    from p2p.identity import Identity

    operator = Identity.generate()
    model, training = presets.preset("100m")
    info = RunInfo(name="x", id="x", operator=operator.peer_id)
    manifests.save(Manifest(run=info, model=model, training=training).signed(operator), tmp_path / "run.toml")
    code = (
        f"import sys; sys.argv = ['agoractl', 'run', 'plan', {str(tmp_path / 'run.toml')!r}, '--json']\n"
        "from agorad.cli import main\nmain()\nsys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["stages"]) == 3


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(dtype: memory.Dtype, stage: int, wide: bool) -> None:
    model = attrs.evolve(SMALL, full_rank_tail=wide)
    low = torch.float32 if dtype == "fp32" else torch.bfloat16
    named = genesis(model, stage, 1).named()
    leaves = {name: tensor.to(low, copy=True).requires_grad_() for name, tensor in named.items()}
    part = Stage(model, stage, 1, dtype=low)
    lasting = {tensor.untyped_storage().data_ptr() for tensor in (part.U, *leaves.values())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in lasting:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(model.vocab, (1, model.seq + 1))
    c = None if stage == 0 else torch.randn(1, model.seq, model.k, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        left = part.forward(leaves, ids, c)
    pack(left.x if isinstance(left, TailLoss) else ids)
    pack(ids)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert saved == memory.graph_bytes(model, stage, dtype)


def test_constants_are_those_of_the_code() -> None:
    assert memory.STAGING == CHUNK
    assert (memory.LOGITS, memory.VOCAB_ROWS, ROUND_S) == (LOGITS_CHUNK, VOCAB_BLOCK, replica.ROUND_S)
    model, training = presets.preset("demo")
    for wire in ("fp32", "bf16", "int8"):
        changed = attrs.evolve(training, wire_dtype=wire, wire_dtype_backward=wire)
        for backward in (False, True):
            size = memory.wire_bytes(model, changed, backward=backward)
            assert size == kernels.wire_bytes(model.seq, model.k, wire)
    blocks = genesis(model, 0, 1).layout.size // kernels.BLOCK
    spans = [kernels.slice_range(blocks, r, training.slices) for r in range(training.slices)]
    largest = max(stop - first for first, stop in spans)
    assert memory.round_bytes(model, training, 0) == largest * kernels.BLOCK * 4
    assert memory.gradient_bytes(model, training, 0) == (0, 0, 0)
    together = attrs.evolve(training, averaging="powersgd", powersgd_rank=4)
    layout = genesis(model, 0, 1).layout
    factors = PowerSGD(layout, 4, 1, torch.zeros(layout.size))
    first = factors.project(1).values
    second = factors.contribute(first, [(0, first.numel())], 1).values
    left, right, whole = memory.gradient_bytes(model, together, 0)
    assert (first.nbytes, second.nbytes, factors.nbytes) == (left, right + whole, right)
    apart, joined = (
        plan(attrs.evolve(setting("demo"), training=each)).stages[0] for each in (training, together)
    )
    assert joined.gradient_bytes == left + right + whole
    assert joined.up_bytes > apart.up_bytes


def test_a_cut_that_fits_is_found_and_balanced() -> None:
    found = fit(setting(vram=24 * GB, ram=32 * GB))
    assert sum(stage.layers for stage in found.stages) == 32
    for stage in found.stages:
        assert stage.memory.vram_bytes <= 24 * GB
        assert stage.memory.host_bytes <= 32 * GB
        assert stage.mode.optimizer == "device"
    times = sorted(stage.period_s for stage in found.stages)
    assert times[-1] < 1.5 * times[0]
    assert len(found.stages) <= 10
    tail = found.stages[-1]
    assert tail.layers < max(stage.layers for stage in found.stages)
    assert tail.mode.graph == "retain"


def test_modes_that_save_memory_are_taken_only_where_needed() -> None:
    places = [
        {stage.mode.optimizer for stage in fit(setting(vram=gigabytes * GB, ram=64 * GB)).stages}
        for gigabytes in (80, 16, 12)
    ]
    assert places[0] == {"device"}
    assert "8bit" in places[1]
    assert "host" not in places[1]
    assert "host" in places[2]
    with pytest.raises(
        DoesNotFit, match=r"stage 31 \(the tail, 1 layer\) needs .* of VRAM .* bytes too many"
    ):
        fit(setting(vram=5 * GB, ram=64 * GB))
    with pytest.raises(DoesNotFit, match="of RAM"):
        fit(setting(vram=80 * GB, ram=1 * GB))


@pytest.mark.parametrize(("megabytes", "cuts"), [(None, 28), (16, 13)])
def test_the_best_cut_is_found(megabytes: float | None, cuts: int) -> None:
    """Against all cuts of nine layers in three stages, the tail heavy with a large vocabulary."""
    room = None if megabytes is None else memory.CUDA_CONTEXT + megabytes * 1e6
    base = setting("demo", vram=room, tflops=1e-3, optimizers=("8bit",), graphs=("recompute",))
    base = attrs.evolve(base, model=attrs.evolve(base.model, vocab=4096, layers=(3, 3, 3)))
    periods = {}
    for first in range(1, 8):
        for second in range(1, 9 - first):
            cut = (first, second, 9 - first - second)
            try:
                found = plan(attrs.evolve(base, model=attrs.evolve(base.model, layers=cut)))
            except DoesNotFit:
                continue
            periods[cut] = found.slowest.period_s
    assert len(periods) == cuts
    chosen = _cut(base, 3, {})
    assert chosen is not None
    assert periods[chosen] == min(periods.values())


def test_times_and_their_limits() -> None:
    quick = plan(setting(tflops=66.0))
    body = quick.stages[1]
    assert body.flops == 4 * forward_flops(quick.setting.model, 1) or body.mode.graph == "retain"
    assert quick.tokens_per_second == pytest.approx(2 * 4096 / quick.slowest.period_s)
    slow = plan(setting(link=Link(mbps=5.0)))
    assert slow.slowest.limit in ("up-link", "down-link")
    assert slow.tokens_per_second < quick.tokens_per_second
    assert plan(setting(replicas=4)).tokens_per_second == pytest.approx(2 * quick.tokens_per_second, rel=0.01)
    alone = plan(setting(replicas=1)).stages[1]
    assert alone.round_s == 0.0
    # c and ids forward, dc back, and a round of 181 MB a member every 20 steps of 1024 sequences
    assert body.up_bytes == 2 * 835_584 + 4 * 4097 + 181_316_608 / (20 * 1024)


def test_more_latency_needs_more_in_flight() -> None:
    near, far = (plan(setting(link=Link(rtt_ms=rtt))).stages for rtt in (0.0, 500.0))
    assert [stage.in_flight for stage in near][-1] == 1
    assert all(a.in_flight >= 7 - at for at, a in enumerate(near))
    assert far[0].in_flight > near[0].in_flight


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "name either"),
        (["--preset", "9b"], "no preset"),
        (["--preset", "8b", "--fit", "vram=nan"], "vram = nan"),
        (["--preset", "8b", "--fit", "vram=0"], "vram = 0"),
        (["--preset", "8b", "--fit", "vram=-3,ram=2"], "vram = -3"),
        (["--preset", "8b", "--fit", "vram=1e30"], "vram = 1e+30"),
        (["--preset", "8b", "--fit", "disk=4"], "like vram=24,ram=32"),
        (["--preset", "8b", "--fit", "vram=lots"], "like vram=24,ram=32"),
        (["--preset", "8b", "--fit", "vram=24", "--ram", "32"], "--fit names the memory"),
        (["--preset", "8b", "--mbps", "0"], "mbps = 0"),
        (["--preset", "8b", "--mbps", "inf"], "mbps = inf"),
        (["--preset", "8b", "--rtt-ms", "-1"], "rtt-ms = -1"),
        (["--preset", "8b", "--tflops", "nan"], "tflops = nan"),
        (["--preset", "8b", "--replicas", "0"], "replicas = 0"),
        (["--preset", "8b", "--gpu", "abacus"], "no figures"),
        (["--preset", "8b", "--device", "cpu", "--vram", "8"], "no VRAM"),
        (["no-such-file.toml"], "no-such-file.toml"),
    ],
)
def test_nonsense_is_refused_with_one_sentence(run_plan: RunPlan, arguments: list[str], word: str) -> None:
    done = run_plan(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_does_not_fit_is_said_and_ends_with_1(run_plan: RunPlan) -> None:
    done = run_plan("--preset", "8b", "--fit", "vram=5,ram=32")
    assert (done.returncode, done.stdout) == (1, "")
    assert "bytes too many" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_cards_are_found_by_their_usual_names() -> None:
    assert hardware.find_gpu("NVIDIA GeForce RTX 4090") == hardware.find_gpu("4090")
    with pytest.raises(LocalError, match="known: RTX 3090"):
        hardware.find_gpu("")


def test_a_mode_moves_bytes_where_it_says() -> None:
    model, training = presets.preset("8b")
    n = 906_579_968

    def need(optimizer: memory.OptimizerPlace) -> memory.Memory:
        return memory.stage_memory(model, training, 1, Mode("bf16", optimizer, "recompute"))

    fixed = ("weights", "compute", "gradients", "optimizer")
    flat = {
        place: sum(need(place).device[part] for part in fixed) / n for place in ("device", "8bit", "host")
    }
    assert flat == pytest.approx({"device": 18, "8bit": 12.03125, "host": 6}, rel=1e-4)
    assert need("host").host["weights"] + need("host").host["optimizer"] == pytest.approx(12 * n, rel=1e-4)


def check_trial(chosen: Setting, stage: int, mode: Mode, graphs: int = 1) -> None:
    """The real stage's peak is within a tenth of the plan's device and host memory."""
    need = memory.stage_memory(chosen.model, chosen.training, stage, mode, graphs=graphs, device="cpu")
    measured = trial.run(chosen.model, chosen.training, stage, mode, graphs=graphs)
    planned = need.vram_bytes + need.host_bytes
    assert measured.peak_bytes == pytest.approx(planned, rel=0.1)
    above = measured.peak_bytes - measured.bare_bytes
    assert above == pytest.approx(planned - need.host["process"], rel=0.1)


@pytest.mark.parametrize(
    ("stage", "graphs", "mode"),
    [
        (1, 2, Mode("fp32", "device", "retain")),
        (2, 1, Mode("fp32", "8bit", "recompute")),
        pytest.param(1, 2, Mode("fp32", "host", "recompute"), marks=pytest.mark.long),
        pytest.param(1, 2, Mode("bf16", "device", "recompute"), marks=pytest.mark.long),
        pytest.param(2, 1, Mode("bf16", "8bit", "retain"), marks=pytest.mark.long),
    ],
)
def test_a_real_stage_takes_what_was_planned(
    monkeypatch: pytest.MonkeyPatch, stage: int, graphs: int, mode: Mode
) -> None:
    """Small enough for every run. glibc keeps freed blocks below 32 MB, which is much of a stage as small as
    this one: here they go back to the system. Real stages are measured as they are, in the long tests."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    chosen = setting("100m")
    chosen = attrs.evolve(chosen, model=attrs.evolve(chosen.model, seq=256, layers=(1, 3, 2)))
    check_trial(chosen, stage, mode, graphs)


def test_a_stage_is_measured_from_the_command_line(run_plan: RunPlan) -> None:
    done = run_plan("--preset", "demo", "--device", "cpu", "--graph", "retain", "--measure", "1", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["measured"]
    assert measured["peak_bytes"] == pytest.approx(measured["planned_bytes"], rel=0.1)
    assert measured["sequence_s"] > 0
    assert "backward pass 1 of" in done.stderr
    for arguments in (["--measure", "1"], ["--device", "cpu", "--measure", "3"]):
        done = run_plan("--preset", "demo", "--graph", "retain", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "--measure" in done.stderr


def test_a_trial_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, mode = setting("demo"), Mode("fp32", "device", "retain")
    with pytest.raises(LocalError, match=r"trial of stage 99 ended with code 1: \S"):
        trial.run(chosen.model, chosen.training, 99, mode)
    monkeypatch.setattr(trial, "TIMEOUT_S", 0.2)
    with pytest.raises(LocalError, match="had not ended"):
        trial.run(chosen.model, chosen.training, 1, mode)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_of_1b_takes_what_was_planned(stage: int) -> None:
    """6 and 15 GB."""
    check_trial(setting("1b"), stage, Mode("fp32", "device", "retain"))
