"""CUDA kernels compiled for the CPU, as a Python module whose device memory is host memory."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# -fno-gnu-unique: two libraries in one process must not share the emulator's state.
# The kernels are a library of their own: all its thread-local memory is their shared memory.
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
BINDINGS = [HERE / "module.cpp", *sorted((ROOT / "csrc/bind").glob("cuda_*.cpp"))]
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-g1",
    "-ffp-contract=off",
    "-fno-gnu-unique",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def compiler() -> str | None:
    """g++, or None where there is none."""
    return shutil.which("g++")


def build(out: Path, *flags: str) -> Path:
    """Compiles the module into ``out`` and says where it is; AssertionError with the compiler's words."""
    includes = [HERE, Path(sysconfig.get_path("include")), Path(pybind11.get_include())]
    common = [*FLAGS, *flags, "-DAGORA_CUDA", "-DAGORA_EMULATED", *(f"-I{path}" for path in includes)]

    def compile_one(source: Path) -> Path:
        made = out / f"{source.stem}{source.suffix[1:]}.o"
        # What is emulated is worth optimising; the bindings are not.
        level = "-O1" if source.suffix == ".cu" else "-O0"
        _run([str(compiler()), level, *common, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(2) as pool:
        made = {source: pool.submit(compile_one, source) for source in [*KERNELS, *BINDINGS]}
    objects = {source: str(future.result()) for source, future in made.items()}
    library = out / "libagora_emulated.so"
    module = out / f"agora_kernels_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [str(compiler()), "-shared", *flags, "-Wl,-rpath,$ORIGIN"]
    _run([*link, *(objects[source] for source in KERNELS), "-o", str(library)])
    _run([*link, *(objects[source] for source in BINDINGS), str(library), "-o", str(module)])
    return module


def build_library(out: Path, source: str) -> Path:
    """Compiles one file of this directory alone."""
    library = out / "library.so"
    _run([str(compiler()), "-O1", *FLAGS, "-shared", f"-I{HERE}", str(HERE / source), "-o", str(library)])
    return library


def load(path: Path) -> ModuleType:
    """The module that ``build`` made."""
    spec = importlib.util.spec_from_file_location("agora_kernels_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
