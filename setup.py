"""Compiles ``agora_kernels`` with CMake as part of an ordinary ``pip install``.

CPU kernels always; CUDA kernels where ``nvcc`` is on PATH and a GPU is found, or for the architectures in
the environment variable ``AGORA_CUDA_ARCHS`` ("80;90"). Everything else about the package is in
pyproject.toml. What is missing is named in one sentence, not in a page of compiler output.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def cuda_archs() -> str:
    """Architectures to build for, such as "80;90"; empty for a build without CUDA."""
    wanted = os.environ.get("AGORA_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";").strip(";")
    if wanted:
        if not shutil.which("nvcc"):
            sys.exit(
                "error: AGORA_CUDA_ARCHS is set but nvcc is not on PATH: install the CUDA toolkit or unset it"
            )
        return wanted
    if not shutil.which("nvcc") or not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""  # a driver that does not answer: as good as no GPU
    caps = {line.strip().replace(".", "") for line in found.stdout.splitlines()}
    return ";".join(sorted(cap for cap in caps if cap.isdigit()))


def check_tools() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        sys.exit(
            f"error: the C++ compiler {compiler!r} is missing: install one (Debian, Ubuntu: apt install g++)"
        )
    if not shutil.which("cmake"):
        sys.exit(
            "error: cmake is missing: install it (Debian, Ubuntu: apt install cmake; or pip install cmake)"
        )
    if not shutil.which("make"):
        sys.exit("error: make is missing: install it (Debian, Ubuntu: apt install make)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        sys.exit(
            f"error: Python.h is missing: install Python's headers (Debian, Ubuntu: apt install {package})"
        )


class CMakeBuild(build_ext):
    """Runs CMake instead of distutils' compiler."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        check_tools()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        # A cache made by another interpreter or in another place would be refused or, worse, used.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        archs = cuda_archs()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Unix Makefiles",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DAGORA_CUDA_ARCHS={archs}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)]):
            if subprocess.run(command, check=False).returncode != 0:
                sys.exit(f"error: compiling the kernels failed at: {' '.join(command)}")


setup(
    ext_modules=[Extension("agora_kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Only where the system has none: setuptools hands this to pip as a build requirement.
    setup_requires=[] if shutil.which("cmake") else ["cmake>=3.18"],
)
