"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests find nothing.
What threads share, the pool and the memory of U's layouts, under ThreadSanitizer as well.

The module is compiled once more, with redzones around its memory; the preloaded runtime puts some around
torch's tensors too. The optimisation stays that of CMakeLists.txt, so what is looked at is what ships.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
TESTS = ["boundary", "misuse", "reduce", "slices", "table", "wire"]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS -g1"

# Run in the sanitized process: that build and no other, then what the arguments say.
START = """
import sys, agora_kernels
assert agora_kernels.__file__.startswith(sys.argv[1]), agora_kernels.__file__
"""
RUN_TESTS = START + "import pytest\nsys.exit(pytest.main(sys.argv[2:]))"
WRITE_PAST_A_TENSOR = f"""{START}
import torch
tensor = torch.empty(10)
agora_kernels.normal(tensor.data_ptr(), 11, 1, 1, 1.0, 1)
"""

# Calls at once, of more layouts than are kept, as the bindings make them.
CALLS_AT_ONCE = """
#include <stdlib.h>
#include <thread>
#include <vector>
#include "cpu/basis.h"
#include "cpu/pool.h"

int main() {
    std::vector<float> u(96 * 51, 1.0f);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; caller++) {
        callers.emplace_back([&u, caller] {
            for (int call = 0; call < 200; call++) {
                agora::Basis basis{u.data(), 0, 64 + 16 * (caller % 3), 51};
                agora::Layout rows = agora::rows_of(basis, 48), last = agora::last_columns(basis);
                std::vector<float> sums(16);
                agora::parallel_for(2, 16, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; i++) sums[i] = rows[i] + last[i] + 1;
                });
                for (float sum : sums)
                    if (sum != 3) abort();
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
}
"""


def runtime() -> list[str]:
    """The libraries that a Python without sanitizers must load first; empty where there are none."""
    if not shutil.which("g++") or not shutil.which("cmake"):
        return []
    found = []
    # libstdc++ because the runtime looks for it when it starts, to catch what throws.
    for name in ("libasan.so", "libstdc++.so"):
        command = ["g++", f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            return []
        found.append(path)
    return found


RUNTIME = runtime()
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not RUNTIME, reason="there is no g++ with libasan, or no cmake"),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the sanitized ``agora_kernels``."""
    out, build = tmp_path_factory.mktemp("sanitized"), tmp_path_factory.mktemp("build")
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_COMPILER=g++",
        f"-DCMAKE_CXX_FLAGS={FLAGS}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DAGORA_CUDA_ARCHS=",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


def run(module: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(module), str(ROOT)]),
        "LD_PRELOAD": " ".join(RUNTIME),
        # Python itself never frees all. Absurd sizes are refused as without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # -P: the working directory holds the ordinary build.
    command = [sys.executable, "-P", "-c", code, str(module), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_the_sanitizer_sees_torchs_memory(module: Path) -> None:
    """Without this, silence below would mean nothing."""
    done = run(module, WRITE_PAST_A_TENSOR)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("name", TESTS)
def test_nothing_is_found(module: Path, name: str) -> None:
    path = ROOT / "tests" / "unit" / f"test_kernels_{name}.py"
    done = run(module, RUN_TESTS, "-q", "-p", "no:cacheprovider", "-m", "not long and not gpu", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_calls_at_once_race_for_nothing(tmp_path: Path) -> None:
    source, program = tmp_path / "calls.cpp", tmp_path / "calls"
    source.write_text(CALLS_AT_ONCE)
    kernels = [str(ROOT / "csrc" / "cpu" / name) for name in ("basis.cpp", "pool.cpp")]
    command = ["g++", "-std=c++17", "-O1", "-g1", "-fsanitize=thread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), *kernels, "-o", str(program), "-pthread"], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
