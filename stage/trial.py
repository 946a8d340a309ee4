"""One real stage at work, in a process of its own: what a plan's memory is held against.

``run`` starts ``python -m stage.trial``, which makes the stage with its weights, runs microbatches of random
ids through the forward pass, so that as many wait as the plan says, and the first of them, or more if that is
quick, through the backward pass, takes a step, packs and merges a slice, and says the most memory that the
process ever had (VmHWM), beside what it had with everything imported and nothing made. What comes from other
stages is zeros; memory and time do not depend on it. The process writes lines of JSON: what it is about to
do, and last what it measured.

Linux, and the CPU as device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from p2p.averaging import Outcome
from p2p.errors import LocalError
from stage.config import ModelConfig, TrainingConfig
from stage.memory import Mode

TIMEOUT_S: Final = 3600.0
BACKWARD_S: Final = 10.0
"""Backward passes end after this: at full size, one takes minutes and ten would take all of the hour."""


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
    model: ModelConfig,
    training: TrainingConfig,
    stage: int,
    mode: Mode,
    *,
    graphs: int = 1,
    threads: int = 2,
    say: Callable[[str], object] = lambda line: None,
) -> Measured:
    """Measure a stage, with ``graphs`` microbatches waiting for their gradient.

    ``say`` hears what is being done: at full size each of it takes minutes. Raises LocalError if the process
    fails, e.g. for want of memory, or has not ended after an hour.
    """
    wanted = {
        "model": attrs.asdict(model),
        "training": attrs.asdict(training),
        "stage": stage,
        "graphs": graphs,
        "mode": attrs.asdict(mode),
        "threads": threads,
    }
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        late = threading.Event()
        with subprocess.Popen(
            [sys.executable, "-m", "stage.trial"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as child:  # fmt: skip

            def stop() -> None:
                late.set()
                child.kill()

            deadline = threading.Timer(TIMEOUT_S, stop)
            deadline.start()
            try:
                measured = _followed(child, json.dumps(wanted), say)
                code = child.wait()
            finally:
                deadline.cancel()
                child.kill()
        if late.is_set():
            raise LocalError(
                f"the trial of stage {stage} had not ended after {TIMEOUT_S:.0f} s: try a shorter seq"
            )
        if measured is None or code:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
            raise LocalError(f"the trial of stage {stage} ended with code {code}: {last}")
    return measured


def _followed(child: subprocess.Popen[str], wanted: str, say: Callable[[str], object]) -> Measured | None:
    """What the process measured; None if it ended before."""
    assert child.stdin
    assert child.stdout
    with contextlib.suppress(BrokenPipeError):  # it ended; its last words say why
        child.stdin.write(wanted)
        child.stdin.close()
    for line in child.stdout:
        try:
            heard = json.loads(line)
        except ValueError:
            continue  # a library's note
        if "measured" in heard:
            return Measured(**heard["measured"])
        say(heard["doing"])
    return None


def _tell(what: str, value: object) -> None:
    print(json.dumps({what: value}), flush=True)


def _work(wanted: dict[str, Any]) -> Measured:
    _tell("doing", "importing everything")
    import torch

    torch.set_num_threads(wanted["threads"])
    model = ModelConfig(**{**wanted["model"], "layers": tuple(wanted["model"]["layers"])})
    training = TrainingConfig(**wanted["training"])
    # the first pass loads libraries, which keep buffers, whatever the model's size
    small = attrs.evolve(
        model, vocab=256, seq=256, layers=(1, 1, 1), d=512, k=8, heads=4, kv_heads=4, head_dim=128, ffn=512
    )
    mode = Mode(**wanted["mode"])
    _live(small, training, 1, 1, mode, quiet=True)
    bare = _memory("VmRSS")
    sequence_s = _live(model, training, wanted["stage"], wanted["graphs"], mode)
    return Measured(bare, _memory("VmHWM"), sequence_s)


def _live(
    model: ModelConfig, training: TrainingConfig, stage: int, graphs: int, mode: Mode, *, quiet: bool = False
) -> float:
    """A replica's life in short; seconds of a sequence."""
    import torch

    from p2p.identity import PeerId
    from stage.compute import StageCompute, wire_shape
    from stage.messages import Request
    from stage.settings import ComputeSettings
    from stage.ticket import Ticket

    started = told = time.perf_counter()

    def doing(what: str, *, again: bool = False) -> None:
        """``again``: like the last, and not worth a line if that was told within a second."""
        nonlocal told
        now = time.perf_counter()
        if not quiet and not (again and now - told < 1.0):
            _tell("doing", f"{now - started:.0f} s: {what}")
            told = now

    doing(f"making stage {stage}")
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
    doing("a step without a gradient")
    compute.step(1)
    began = time.perf_counter()
    held = []
    for i in range(graphs):
        doing(f"forward pass {i + 1} of {graphs}, {model.seq} tokens", again=i > 0)
        held.append(compute.forward(header, memoryview(ids), c))
    forward_s = (time.perf_counter() - began) / graphs
    began = time.perf_counter()
    # The first has the most memory: everything else still waits. More of them are for the time.
    for done, each in enumerate(held, 1):
        doing(f"backward pass {done} of at most {graphs}", again=done > 1)
        compute.backward(each, dc)
        if time.perf_counter() - began > BACKWARD_S:
            break
    sequence_s = forward_s + (time.perf_counter() - began) / done
    del held, each
    doing("a step, and a slice packed and merged")
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
    _tell("measured", attrs.asdict(_work(json.load(sys.stdin))))
