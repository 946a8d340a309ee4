"""One real stage at work, in a process of its own: what a plan's memory is held against.

``run`` starts ``python -m stage.trial``, which makes the stage with its weights, runs microbatches of random
ids through forward and backward pass (all forward passes first, so that as many wait as the plan says), takes
a step, packs and merges a slice, and says the most memory that the process ever had (VmHWM), beside what it
had with everything imported and nothing made. What comes from other stages is zeros; memory and time do not
depend on it.

Linux, and the CPU as device.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import attrs

from p2p.averaging import Outcome
from p2p.errors import LocalError
from stage.config import ModelConfig, TrainingConfig
from stage.memory import Mode

TIMEOUT_S: Final = 3600.0


@attrs.frozen
class Measured:
    """Bytes of memory and seconds."""

    bare_bytes: int
    """Resident with everything imported, before the stage was made."""
    peak_bytes: int
    """The most that was ever resident."""
    sequence_s: float
    """Forward and backward pass of one sequence."""


def run(
    model: ModelConfig, training: TrainingConfig, stage: int, mode: Mode, *, graphs: int = 1, threads: int = 2
) -> Measured:
    """Measure a stage, with ``graphs`` microbatches waiting for their gradient.

    Raises LocalError if the process fails, e.g. for want of memory.
    """
    wanted = {
        "model": attrs.asdict(model),
        "training": attrs.asdict(training),
        "stage": stage,
        "graphs": graphs,
        "mode": attrs.asdict(mode),
        "threads": threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "stage.trial"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise LocalError(f"the trial of stage {stage} ended with code {done.returncode}: {last}")
    return Measured(**json.loads(done.stdout))


def _work(wanted: dict[str, Any]) -> Measured:
    import torch

    torch.set_num_threads(wanted["threads"])
    model = ModelConfig(**{**wanted["model"], "layers": tuple(wanted["model"]["layers"])})
    training = TrainingConfig(**wanted["training"])
    # the first pass loads libraries, which keep buffers, whatever the model's size
    small = attrs.evolve(
        model, vocab=256, seq=256, layers=(1, 1, 1), d=512, k=8, heads=4, kv_heads=4, head_dim=128, ffn=512
    )
    mode = Mode(**wanted["mode"])
    _live(small, training, 1, 1, mode)
    bare = _memory("VmRSS")
    sequence_s = _live(model, training, wanted["stage"], wanted["graphs"], mode)
    return Measured(bare, _memory("VmHWM"), sequence_s)


def _live(model: ModelConfig, training: TrainingConfig, stage: int, graphs: int, mode: Mode) -> float:
    """A replica's life in short; seconds of a sequence."""
    import torch

    from p2p.identity import PeerId
    from stage.compute import StageCompute, wire_shape
    from stage.messages import Request
    from stage.settings import ComputeSettings
    from stage.ticket import Ticket

    settings = ComputeSettings(dtype=mode.dtype, optimizer=mode.optimizer, graph=mode.graph)
    compute = StageCompute(model, training, stage, settings=settings, in_flight=graphs)
    shape = wire_shape(model, training, stage)
    ids = torch.randint(model.vocab, (model.seq + 1,), dtype=torch.int32).numpy().tobytes()
    ticket = Ticket(
        run="trial", trainer=PeerId(""), kind="train", shard=0, position=0,
        ids_hash=hashlib.sha256(ids).digest(), weight=1.0,
    )  # fmt: skip
    header = Request(
        ticket=ticket,
        clock=[],
        basis=0,
        path=[],
        tokens=model.seq,
        documents=[],
        dtype=training.wire_dtype,
        dtype_back=training.wire_dtype_backward,
        inline=True,
        deadline_s=60.0,
    )
    c, dc = memoryview(bytes(shape.c_bytes)), memoryview(bytes(shape.next_back_bytes))
    compute.samples = 1  # a step of no gradient, so that the moments are there before the first microbatch
    compute.step(1)
    began = time.perf_counter()
    held = [compute.forward(header, memoryview(ids), c) for _ in range(graphs)]
    for each in held:
        compute.backward(each, dc)
    sequence_s = (time.perf_counter() - began) / graphs
    del held, each
    compute.step(2)
    packed = compute.pack(0)
    vector = memoryview(bytearray(packed.buffer()))
    compute.merge(packed, _all_averaged(packed.index, vector))
    return sequence_s


def _all_averaged(slice_index: int, vector: memoryview) -> Outcome:
    return Outcome(
        number=0,
        slice_index=slice_index,
        members=(),
        fraction=1.0,
        vector=vector,
        averaged=[(0, len(vector) // 4)],
        contributors=[],
        checksum="",
        drops=(),
        payload_out=0,
        payload_in=0,
        weight_total=1.0,
    )


def _memory(name: str) -> int:
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps(attrs.asdict(_work(json.load(sys.stdin)))))
