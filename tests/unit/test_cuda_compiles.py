"""Every CUDA source compiles, warnings being errors, for every card in mind; so do the bindings."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc" / "bind").glob("cuda_*.cpp"))
ARCHS = ("80", "86", "89", "90", "100", "120")
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def test_there_are_sources() -> None:
    assert len(SOURCES) >= 4
    assert len(BINDINGS) == 2


@needs_nvcc
@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_all_cards(source: Path, tmp_path: Path) -> None:
    command = [str(NVCC), "-std=c++17", "-O1", "--threads", "0", "-Werror", "all-warnings", "-c", str(source)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.stem)
def test_bindings_compile(source: Path) -> None:
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-DAGORA_CUDA", "-fsyntax-only"]
    command += [f"-I{include}" for include in includes]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
