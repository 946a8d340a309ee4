"""The GPU tests' small cases under compute-sanitizer: no access outside a tensor, no race between threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stage.kernels.launch import native

SANITIZER = shutil.which("compute-sanitizer")
HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and native.has_cuda), reason="no GPU, or a build without CUDA"
    ),
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on PATH"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_reported(tool: str) -> None:
    assert SANITIZER is not None
    tests = [str(HERE / f"test_{what}_cuda.py") for what in ("averaging", "boundary")]
    # The 8B microbatch and the slices of millions would take a sanitizer the day.
    small = "not 4096-5120 and not sizes3 and not 20000"
    command = [
        SANITIZER, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", small, "-p", "no:cacheprovider", *tests,
    ]  # fmt: skip
    # A tensor to itself, so that what lies outside it is nobody's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command,
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
