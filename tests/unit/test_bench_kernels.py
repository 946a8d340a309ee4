"""``agoractl bench kernels`` prints what its contract says; on what it cannot do, a sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from agorad.bench import kernels
from agorad.bench.cases import sizes
from agorad.bench.timing import seconds


def agoractl(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agorad.cli", "bench", "kernels", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_json_has_a_row_for_every_kernel() -> None:
    done = agoractl("--size", "demo", "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["device"] == "cpu"
    assert result["threads"] == 1
    assert result["copy_gb_per_s"] > 0.1
    assert {row["kernel"] for row in result["rows"]} == set(kernels.KERNELS)
    assert {row["dtype"] for row in result["rows"]} == {"fp32", "bf16"}
    for row in result["rows"]:
        assert set(row) == {
            "kernel", "size", "dtype", "bytes", "seconds", "gb_per_s", "of_copy", "vs_eager", "vs_compile",
        }  # fmt: skip
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / result["copy_gb_per_s"])
        assert row["vs_eager"] > 0
        assert row["vs_compile"] is None


def test_the_table_is_for_people() -> None:
    done = agoractl("--size", "demo", "--kernel", "reduce")
    assert done.returncode == 0, done.stderr
    assert "MB = 10^6 bytes" in done.stdout
    assert "reduce" in done.stdout
    assert "project" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_a_sentence() -> None:
    done = agoractl("--device", "cuda", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_kernels_are_named() -> None:
    done = agoractl("--kernel", "gemm")
    assert done.returncode == 2
    assert "'gemm'" in done.stderr
    assert "subspace_weights" in done.stderr


def test_the_8b_size_is_that_of_the_issue() -> None:
    size = sizes()["8b"]
    assert (size.tokens, size.d, size.k, size.weights) == (4096, 5120, 51, 906_579_968)


def test_every_work_is_called_with_ever_new_numbers() -> None:
    seen: list[int] = []
    [took] = seconds([seen.append], torch.device("cpu"))
    assert took > 0
    assert seen == sorted(set(seen))
