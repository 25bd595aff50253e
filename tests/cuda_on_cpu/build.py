"""Compiles csrc/cuda/*.cu as C++ for the CPU: python tests/cuda_on_cpu/build.py [--sanitize]

Prints the path of the library; only what has changed is compiled again. FUSED_CLIP_ADAM_CUDA_LIBRARY set to that
path makes backend="cuda" run on CPU tensors; tests/conftest.py does so where there is no GPU.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
]


def compiler() -> str | None:
    """The C++ compiler's command, or None."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def build(sanitize: bool = False) -> Path:
    """The library's path; compiles what is missing or older than its sources.

    Raises:
        RuntimeError: no compiler, or it fails.
    """
    from torch.utils import cpp_extension

    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler to run the CUDA sources on the CPU with")
    folder = ROOT / "build" / ("cuda_on_cpu_sanitized" if sanitize else "cuda_on_cpu")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_C_cuda.so"
    includes = [str(ROOT / "tests" / "cuda_on_cpu"), str(ROOT / "csrc"), *cpp_extension.include_paths()]
    flags = [*FLAGS, *(SANITIZERS if sanitize else []), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), *Path(__file__).parent.glob("*.h")]
    shared = hashlib.sha256(" ".join([command, *flags, *includes]).encode())
    for path in sorted(headers):
        shared.update(path.read_bytes())

    def state(source: Path) -> str:
        own = shared.copy()
        own.update(source.read_bytes())
        return own.hexdigest()

    wanted = {source: state(source) for source in sources}
    everything = "\n".join(wanted.values())
    stamp = folder / "stamp"
    if library.exists() and stamp.exists() and stamp.read_text() == everything:
        return library

    print(f"building {library.relative_to(ROOT)} (about a minute)", file=sys.stderr, flush=True)

    def compile_one(source: Path) -> Path:
        target, own_stamp = folder / f"{source.stem}.o", folder / f"{source.stem}.stamp"
        if target.exists() and own_stamp.exists() and own_stamp.read_text() == wanted[source]:
            return target
        own_stamp.unlink(missing_ok=True)
        include_flags = [word for path in includes for word in ("-I", path)]
        run([*command.split(), "-c", *flags, *include_flags, "-x", "c++", str(source), "-o", str(target)])
        own_stamp.write_text(wanted[source])
        return target

    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    run([*command.split(), "-shared", *(SANITIZERS if sanitize else []), *objects, "-o", str(library), *link])
    stamp.write_text(everything)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv[1:]))
