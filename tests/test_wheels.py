"""What a release consists of: runs where `make wheels` has just built it, and has the wheels installed and used.

FUSED_CLIP_ADAM_WHEELS is the folder, FUSED_CLIP_ADAM_WHEEL_PYTHONS further interpreters, torch installed, to try it on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fused_clip_adam as fca

ROOT = Path(__file__).resolve().parents[1]
FOLDER = os.environ.get("FUSED_CLIP_ADAM_WHEELS")
WHEELS = sorted(Path(FOLDER).glob("*.whl")) if FOLDER else []
PYTHONS = os.environ.get("FUSED_CLIP_ADAM_WHEEL_PYTHONS", "").split()

pytestmark = pytest.mark.skipif(not FOLDER, reason="`make wheels` builds them and runs this file")
each_wheel = pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name.split("-")[1])

# What every Linux with glibc has, and what comes with torch.
SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}
RUNTIME = {"libstdc++.so.6", "libgcc_s.so.1"}
TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}

STEPS = """
import torch
import fused_clip_adam as fca
from fused_clip_adam import backends

torch.manual_seed(0)
ours, torchs = (torch.nn.Linear(33, 7) for _ in range(2))
torchs.load_state_dict(ours.state_dict())
step = fca.FusedClipAdamW(ours.parameters(), lr=1e-2, grad_clip=1.0, backend="cpu")
reference = torch.optim.AdamW(torchs.parameters(), lr=1e-2)
for _ in range(3):
    x = torch.randn(5, 33)
    for model in (ours, torchs):
        model.zero_grad()
        model(x).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(torchs.parameters(), 1.0)
    step.step()
    reference.step()
torch.testing.assert_close(list(ours.parameters()), list(torchs.parameters()), atol=1e-6, rtol=1e-5)
print(fca.__file__)
print(backends._unavailable("cuda"))
"""


def is_cuda(wheel: Path) -> bool:
    return "+cu" in wheel.name


def libraries(wheel: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        return [Path(archive.extract(name, folder)) for name in archive.namelist() if name.endswith(".so")]


def output(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_builds_of_this_version_are_there():
    # `make wheels BUILDS=cpu` is for a machine without nvcc; a release has both.
    expected = os.environ.get("FUSED_CLIP_ADAM_WHEEL_BUILDS", "cpu cuda").split()
    assert sorted("cuda" if is_cuda(wheel) else "cpu" for wheel in WHEELS) == sorted(expected)
    for wheel in WHEELS:
        version = fca.__version__ + (r"\+cu\d+" if is_cuda(wheel) else "")
        assert re.fullmatch(rf"fused_clip_adam-{version}-cp310-abi3-linux_x86_64\.whl", wheel.name)


@each_wheel
def test_a_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith("/METADATA")).removesuffix("METADATA")
        metadata, tags = (archive.read(info + name).decode() for name in ("METADATA", "WHEEL"))
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_clip_adam").rglob("*.py")}
    compiled = {"fused_clip_adam/_C.abi3.so"} | ({"fused_clip_adam/_C_cuda.abi3.so"} if is_cuda(wheel) else set())
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert names == modules | compiled | {info + name for name in about}
    assert "Tag: cp310-abi3-linux_x86_64\n" in tags and tags.count("Tag: ") == 1
    lines = metadata.splitlines()
    assert f"Version: {wheel.name.split('-')[1]}" in lines
    assert {"Requires-Dist: torch>=2.10", "Requires-Python: >=3.10", "License-Expression: Apache-2.0"} <= set(lines)


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf (binutils)")
@each_wheel
def test_libraries_need_torch_and_the_system_alone(wheel, tmp_path):
    found = libraries(wheel, tmp_path)
    assert len(found) == 1 + is_cuda(wheel)
    for library in found:
        dynamic = output("readelf", "-d", library)
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
        assert needed <= SYSTEM | RUNTIME | TORCH and needed >= RUNTIME | {"libtorch_cpu.so"}
        # torch is in memory before the library is: a path would be one of the machine that built it.
        assert "(RPATH)" not in dynamic and "(RUNPATH)" not in dynamic
        if "cuda" in library.name:
            assert "libtorch.so" in needed  # through which torch's CUDA functions are found


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm (binutils)")
@each_wheel
def test_libraries_know_nothing_of_python_and_keep_the_cuda_runtime_to_themselves(wheel, tmp_path):
    for library in libraries(wheel, tmp_path):
        symbols = [line.split()[-1] for line in output("nm", "-D", library).splitlines()]
        assert len(symbols) > 20 and any(name.startswith("aoti_torch_") for name in symbols)
        assert not [name for name in symbols if name.startswith(("Py", "_Py", "cuda", "__cuda"))]


@each_wheel
def test_gpus_are_those_asked_for(wheel, tmp_path):
    from test_cuda_compile import find_cuobjdump

    if not is_cuda(wheel):
        assert b"sm_90" not in libraries(wheel, tmp_path)[0].read_bytes()
        return
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump (Triton brings one)")
    library = next(path for path in libraries(wheel, tmp_path) if "cuda" in path.name)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").split(";")
    number = {name: name.removesuffix("+PTX").replace(".", "") for name in asked}
    code = set(re.findall(r"\.sm_(\d+)\w?\.cubin", output(find_cuobjdump(), "--list-elf", library)))
    ptx = set(re.findall(r"\.sm_(\d+)\w?\.ptx", output(find_cuobjdump(), "--list-ptx", library)))
    assert code == set(number.values()) and ptx == {number[name] for name in asked if name.endswith("+PTX")}


def new_environment(folder: Path, python: str) -> Path:
    """An environment with nothing but torch, which it borrows from the interpreter's own."""
    output(python, "-m", "venv", folder)
    fresh = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    borrowed = "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])"
    # A line of a .pth file adds the folder and runs none of its own .pth files: no editable install comes along.
    Path(output(fresh, "-c", where).strip(), "torch.pth").write_text(output(python, "-c", borrowed))
    return fresh


@each_wheel
@pytest.mark.parametrize("python", [sys.executable, *PYTHONS], ids=lambda path: path if path in PYTHONS else "this")
def test_a_wheel_installs_and_steps_as_torch_does(wheel, python, tmp_path):
    fresh = new_environment(tmp_path / "environment", python)
    output(fresh, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel.resolve())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSED_CLIP_ADAM_")}
    environment.pop("PYTHONPATH", None)
    *_, file, reason = output(fresh, "-c", STEPS, cwd=tmp_path, env=environment).split("\n")[:-1]
    assert Path(file).is_relative_to(tmp_path)
    if output(python, "-c", "import torch; print(torch.version.cuda)").strip() != "None":
        assert (reason == "") == is_cuda(wheel)
        return
    assert re.match(r"torch \S+ is not a CUDA build; install one that is", reason)
    assert ("pip install" in reason) == (not is_cuda(wheel))  # the CUDA wheel has what it takes


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
@each_wheel
def test_cuda_library_under_a_cpu_torch_says_that_it_does_not_load(wheel, tmp_path):
    if not is_cuda(wheel):
        return
    library = next(path for path in libraries(wheel, tmp_path) if "cuda" in path.name)
    code = "from fused_clip_adam import backends; print(backends._unavailable('cuda'))"
    environment = {**os.environ, "FUSED_CLIP_ADAM_CUDA_LIBRARY": str(library)}
    reason = output(sys.executable, "-c", code, cwd=ROOT, env=environment)
    assert reason.startswith(f"the library {library.name} does not load under torch {torch.__version__}: ")


def test_source_release_is_complete():
    (path,) = Path(FOLDER).glob("*.tar.gz")
    top = f"fused_clip_adam-{fca.__version__}"
    assert path.name == f"{top}.tar.gz"
    with tarfile.open(path) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "fused_clip_adam").rglob("*.py")]
    expected = {file.relative_to(ROOT).as_posix() for file in sources if file.is_file()}
    top_files = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert expected | top_files <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests", "benchmarks", "docs"))]
