"""Every CUDA source compiles, warnings being errors, for the oldest and newest cards in mind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def compile_for(source: Path, archs: list[str], out: Path) -> None:
    command = [str(NVCC), "-std=c++17", "-O1", "-Werror", "all-warnings", "-c", str(source)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    done = subprocess.run([*command, "-o", str(out / "out.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_sources() -> None:
    assert len(SOURCES) >= 3


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles(source: Path, tmp_path: Path) -> None:
    compile_for(source, ["80", "90"], tmp_path)


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_all_cards(source: Path, tmp_path: Path) -> None:
    listed = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = {line.removeprefix("sm_") for line in listed.stdout.split()}
    compile_for(source, [arch for arch in ("75", "86", "89", "100", "120") if arch in known], tmp_path)
