"""The tool tests/cuda_on_cpu: its self-test, plain and sanitized, and bugs that only the sanitizers can see."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).parent / "cuda_on_cpu"
PLAIN = ("-O2", "-Wall", "-Wextra", "-Werror")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fvisibility=hidden")
FLAGS = ("-std=c++17", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{TOOL}", "-x", "c++")

PROGRAM = """
#include <cuda_runtime.h>
#include <climits>
#include <vector>
%s
int main(int argc, char**) {
  std::vector<float> memory(64);
  std::vector<int> numbers(64, INT_MAX);
  (void)numbers;
  cuda_on_cpu::launch(kernel, "kernel", 1, 32, 64, nullptr, %s, argc - 1);
}
"""

# The kernel, its argument, and what a sanitizer says, whichever is first. `broken`: the program has an argument.
BUGS = {
    "write past the end": (
        "__global__ void kernel(float* out, int broken) { out[threadIdx.x + 33 * broken] = 1; }",
        "memory.data()",
        "heap-buffer-overflow",
    ),
    "write past shared memory": (
        """__global__ void kernel(float* out, int broken) {
             __shared__ float tile[32];
             float* slot = tile + threadIdx.x;
             slot[broken] = 1;
             __syncthreads();
             *out = tile[0];
           }""",
        "memory.data()",
        "global-buffer-overflow|insufficient space",
    ),
    "write past dynamic shared memory": (
        """__global__ void kernel(float* out, int broken) {
             float* tile = cuda_on_cpu::dynamic_shared<float>();
             if (threadIdx.x < 16) tile[threadIdx.x + broken] = 1;
             __syncthreads();
             *out = tile[0];
           }""",
        "memory.data()",
        "heap-buffer-overflow",
    ),
    "write past a local array": (
        """__global__ void kernel(float* out, int broken) {
             float values[4] = {};
             __syncthreads();
             float* slot = values + 3 + broken;
             *slot = 1;
             __syncthreads();
             out[threadIdx.x] = values[threadIdx.x % 4];
           }""",
        "memory.data()",
        "stack-buffer-overflow|insufficient space",
    ),
    "misaligned vector load": (
        """__global__ void kernel(float* out, int broken) {
             const float4 v = *reinterpret_cast<const float4*>(out + broken);
             out[0] = v.y;
           }""",
        "memory.data()",
        "misaligned address",
    ),
    "misaligned vector load with a cache hint": (
        """__global__ void kernel(float* out, int broken) {
             out[0] = __ldcs(reinterpret_cast<const float2*>(out + broken)).y;
           }""",
        "memory.data()",
        "misaligned address",
    ),
    "misaligned vector store": (
        """__global__ void kernel(float* out, int broken) {
             __stcs(reinterpret_cast<float4*>(out + broken), make_float4(0, 1, 2, 3));
           }""",
        "memory.data()",
        "misaligned address",
    ),
    "int overflow": (
        "__global__ void kernel(int* out, int broken) { out[threadIdx.x] += broken; }",
        "numbers.data()",
        "signed integer overflow",
    ),
}


def compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    pytest.skip("no C++ compiler on this machine")


def build(source: Path, program: Path, flags: tuple[str, ...]) -> None:
    if "-fsanitize=address,undefined" in flags:
        empty = program.with_suffix(".probe.cpp")
        empty.write_text("int main() {}\n")
        probe = subprocess.run([*compiler().split(), *flags, str(empty), "-o", str(program)], capture_output=True)
        if probe.returncode != 0:
            pytest.skip("the C++ compiler has no sanitizers")
    command = [*compiler().split(), *FLAGS, *flags, str(source), "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    # A preloaded sanitizer is the one of `make asan`, not necessarily of these programs.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    "flags",
    (PLAIN, (*PLAIN, "-DCUDA_ON_CPU_UCONTEXT"), SANITIZED),
    ids=("plain", "ucontext", "sanitized"),
)
def test_selftest(tmp_path, flags):
    program = tmp_path / "selftest"
    build(TOOL / "selftest.cpp", program, flags)
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith(", 0 failed")


@pytest.mark.parametrize("bug", BUGS)
def test_sanitizers_see(tmp_path, bug):
    kernel, argument, report = BUGS[bug]
    source, program = tmp_path / "bug.cu", tmp_path / "bug"
    source.write_text(PROGRAM % (kernel, argument))
    build(source, program, SANITIZED)
    right, broken = run(program), run(program, "broken")
    assert right.returncode == 0, right.stderr
    assert broken.returncode != 0
    assert re.search(report, broken.stderr)
    assert "bug.cu:" in broken.stderr  # it names the place
