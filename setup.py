"""What to compile (FUSED_CLIP_ADAM_BUILD=auto|none|cpu|cuda) and from which sources; pyproject.toml holds the rest.

"auto" compiles the CUDA kernels where torch is a CUDA build; "cuda" also where it is not, for another machine: the
stable ABI's headers are the same. TORCH_CUDA_ARCH_LIST (as for any torch extension) names the GPUs to compile for; by
default sm_80, sm_90 and sm_100.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "fused_clip_adam builds against the torch you already have, and none is importable here. Install torch >= 2.10 "
        f"first, then: pip install --no-build-isolation .   ({error})"
    ) from error

CPU_SOURCES = [
    f"csrc/cpu/{name}.cpp"
    for name in ("library", "table", "norm", "prologue", "reduce", "step", "step_guarded", "objective", "logits")
]
CUDA_SOURCES = [
    f"csrc/cuda/{name}.cu" for name in ("library", "norm", "prologue", "reduce", "step", "objective", "logits")
]
SHARED_HEADERS = sorted(glob.glob("csrc/*.h"))
CPU_HEADERS = SHARED_HEADERS + sorted(glob.glob("csrc/cpu/*.h"))
CUDA_HEADERS = SHARED_HEADERS + sorted(glob.glob("csrc/cuda/*.h"))

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
# Nine tenths of a library would be debug symbols, where the interpreter was itself compiled with -g.
LINK_ARGS = ["-lstdc++", "-lgcc_s", "-Wl,--strip-debug"] if sys.platform == "linux" else []
# CUDA's runtime is linked in, as nvcc itself does by default, and kept to ourselves: torch brings one too. torch's own
# CUDA functions come with libtorch, which a linker that drops what nobody names would leave out beside a CPU build.
CUDA_LINK_ARGS = ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
CUDA_LINK_ARGS += ["-l:libcudart_static.a", "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
CUDA_LINK_ARGS += LINK_ARGS


def compiler() -> str | None:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


# As on the CPU no multiply-add is contracted, so that both give the same bits; the passes wait for memory, not for it.
# step.cu holds a hundred kernels: split over the cores they take a fraction of two minutes, and come out the same.
NVCC_ARGS = ["-O3", "-std=c++17", "-fmad=false", "-DUSE_CUDA", "--split-compile=0"]


def cuda_toolkit() -> str | None:
    """The folder above bin/nvcc: torch's choice, nvcc on PATH, or the `gpu-checks` extra's beside torch."""
    if cpp_extension.CUDA_HOME:  # None where torch is not a CUDA build, whatever is installed
        return cpp_extension.CUDA_HOME
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    beside_torch = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia", "cu13")
    for folder in (named, on_path and os.path.dirname(os.path.dirname(os.path.realpath(on_path))), beside_torch):
        if folder and os.path.exists(os.path.join(folder, "bin", "nvcc")):
            return folder
    return None


def nvcc_says(toolkit: str, *arguments: str) -> str:
    done = subprocess.run([f"{toolkit}/bin/nvcc", *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def cuda_version(toolkit: str) -> str:
    """As in torch's versions: cu130 for the nvcc of CUDA 13.0."""
    return "cu" + "".join(re.search(r"release (\d+)\.(\d+)", nvcc_says(toolkit, "--version")).groups())


def cuda_library_dirs(toolkit: str) -> list[str]:
    """Where nvcc itself links from: layouts differ, and bin/nvcc may be a script that calls another folder's."""
    plan = nvcc_says(toolkit, "--dryrun", "-x", "cu", os.devnull)
    named = re.findall(r'"-L([^"]+)"', re.search(r"LIBRARIES=(.*)", plan).group(1))
    return [folder for folder in (*named, f"{toolkit}/lib") if os.path.isdir(folder)]  # the gpu-checks extra's is lib


def build_choice(toolkit: str | None) -> str:
    choice = os.environ.get("FUSED_CLIP_ADAM_BUILD", "auto")
    if choice not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FUSED_CLIP_ADAM_BUILD={choice!r} is unknown; accepted: auto, none, cpu, cuda")
    no_toolkit = "" if toolkit else "no CUDA toolkit (nvcc) found on PATH, in CUDA_HOME or from the gpu-checks extra"
    if choice == "cuda" and no_toolkit:
        raise SystemExit(f"FUSED_CLIP_ADAM_BUILD=cuda: {no_toolkit}")
    if choice == "auto":
        if not compiler():
            print("fused_clip_adam: no C++ compiler found; installing without the native kernels.")
            return "none"
        if torch.version.cuda is not None and no_toolkit:
            print(f"fused_clip_adam: building without the CUDA kernels: {no_toolkit}.")
        choice = "cuda" if torch.version.cuda is not None and toolkit else "cpu"
    return choice


toolkit = cuda_toolkit()
choice = build_choice(toolkit)
with open("fused_clip_adam/_version.py") as file:
    version = re.search(r'__version__ = "(.+)"', file.read()).group(1)
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
    cpp_extension.CUDA_HOME = toolkit  # where BuildExtension looks for nvcc
    version += f"+{cuda_version(toolkit)}"  # of its own, beside the CPU build's
    extensions.append(
        # Not CUDAExtension: it links against libraries that only a CUDA build of torch has.
        CppExtension(
            "fused_clip_adam._C_cuda",
            CUDA_SOURCES,
            include_dirs=[os.path.abspath("csrc")],
            library_dirs=cuda_library_dirs(toolkit),
            define_macros=STABLE_ABI,
            extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": NVCC_ARGS},
            extra_link_args=CUDA_LINK_ARGS,
            depends=CUDA_HEADERS,
            py_limited_api=True,
        )
    )

setup(
    version=version,
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
