"""What to compile (FUSED_CLIP_ADAM_BUILD=auto|none|cpu|cuda) and from which sources; pyproject.toml holds the rest.

TORCH_CUDA_ARCH_LIST (as for any torch extension) names the GPUs to compile for; by default sm_80, sm_90 and sm_100.
"""

import os
import shutil
import sys

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        "fused_clip_adam builds against the torch you already have, and none is importable here. Install torch >= 2.10 "
        f"first, then: pip install --no-build-isolation fused_clip_adam   ({error})"
    ) from error

CPU_SOURCES = [
    f"csrc/cpu/{name}.cpp"
    for name in ("library", "table", "norm", "prologue", "reduce", "step", "step_guarded", "objective", "logits")
]
CUDA_SOURCES = [
    f"csrc/cuda/{name}.cu" for name in ("library", "norm", "prologue", "reduce", "step", "objective", "logits")
]
SHARED_HEADERS = [f"csrc/{name}.h" for name in ("update_math", "objective_math", "storage", "table", "check_args")]
CPU_HEADERS = SHARED_HEADERS + [f"csrc/cpu/{name}.h" for name in ("isa", "table", "tile", "update_chunk")]
CUDA_HEADERS = SHARED_HEADERS + [f"csrc/cuda/{name}.h" for name in ("device", "slots", "rows")]

# The stable ABI of torch 2.10: one library for every later torch and every Python.
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020a000000000000")]

# No contraction to fused multiply-add: every instruction set gives the bits of the written equations. Without
# -fno-math-errno g++ does not vectorise the square root, without -fno-trapping-math not the selects; neither changes a
# value.
COMPILE_ARGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
]


# The C++ runtime that torch has loaded, named before whatever the compiler adds on its own: one that links its runtime
# statically by default gives a library whose exceptions nobody else can catch, so that a refused argument ends Python.
LINK_ARGS = ["-lstdc++", "-lgcc_s"] if sys.platform == "linux" else []


def compiler() -> str | None:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


# As on the CPU no multiply-add is contracted, so that both give the same bits; the passes wait for memory, not for it.
# step.cu holds a hundred kernels: split over the cores they take a fraction of two minutes, and come out the same.
NVCC_ARGS = ["-O3", "-std=c++17", "-fmad=false", "-DUSE_CUDA", "--split-compile=0"]


def build_choice() -> str:
    choice = os.environ.get("FUSED_CLIP_ADAM_BUILD", "auto")
    if choice not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FUSED_CLIP_ADAM_BUILD={choice!r} is unknown; accepted: auto, none, cpu, cuda")
    why_no_cuda = ""
    if torch.version.cuda is None:
        why_no_cuda = f"torch {torch.__version__} is not a CUDA build"
    elif CUDA_HOME is None:
        why_no_cuda = "no CUDA toolkit (nvcc) found on PATH or in CUDA_HOME"
    if choice == "cuda" and why_no_cuda:
        raise SystemExit(f"FUSED_CLIP_ADAM_BUILD=cuda: {why_no_cuda}")
    if choice == "auto":
        choice = ("cpu" if why_no_cuda else "cuda") if compiler() else "none"
        if choice == "none":
            print("fused_clip_adam: no C++ compiler found; installing without the native kernels.")
        elif torch.version.cuda is not None and choice == "cpu":
            print(f"fused_clip_adam: building without the CUDA kernels: {why_no_cuda}.")
    return choice


choice = build_choice()
extensions = []
if choice in ("cpu", "cuda"):
    extensions.append(
        CppExtension(
            "fused_clip_adam._C",
            CPU_SOURCES,
            include_dirs=[os.path.abspath("csrc")],
            define_macros=STABLE_ABI,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            depends=CPU_HEADERS,
            py_limited_api=True,
        )
    )
if choice == "cuda":
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    extensions.append(
        CUDAExtension(
            "fused_clip_adam._C_cuda",
            CUDA_SOURCES,
            include_dirs=[os.path.abspath("csrc")],
            define_macros=STABLE_ABI,
            extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": NVCC_ARGS},
            extra_link_args=LINK_ARGS,
            depends=CUDA_HEADERS,
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
