"""What to compile (FUSED_CLIP_ADAM_BUILD=auto|none|cpu) and from which sources; pyproject.toml holds the rest."""

import os
import shutil

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "fused_clip_adam builds against the torch you already have, and none is importable here. Install torch >= 2.10 "
        f"first, then: pip install --no-build-isolation fused_clip_adam   ({error})"
    ) from error

CPU_SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("library", "table", "norm", "prologue", "step", "objective")]
HEADERS = [f"csrc/{name}.h" for name in ("update_math", "objective_math", "check_args")]
HEADERS += [f"csrc/cpu/{name}.h" for name in ("isa", "table", "tile")]

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


def compiler() -> str | None:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def build_choice() -> str:
    choice = os.environ.get("FUSED_CLIP_ADAM_BUILD", "auto")
    if choice not in ("auto", "none", "cpu"):
        raise SystemExit(f"FUSED_CLIP_ADAM_BUILD={choice!r} is unknown; accepted: auto, none, cpu")
    if choice == "auto":
        choice = "cpu" if compiler() else "none"
        if choice == "none":
            print("fused_clip_adam: no C++ compiler found; installing without the native CPU kernels.")
    return choice


extensions = []
if build_choice() == "cpu":
    extensions.append(
        CppExtension(
            "fused_clip_adam._C",
            CPU_SOURCES,
            include_dirs=[os.path.abspath("csrc")],
            # The stable ABI of torch 2.10: one library for every later torch and every Python.
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=COMPILE_ARGS,
            depends=HEADERS,
            py_limited_api=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
