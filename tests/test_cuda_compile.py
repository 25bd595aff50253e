"""What the compiler makes of the CUDA sources: registers, spills, vector width, for every kernel and architecture.

Needs nvcc (on PATH, or `pip install 'fused_clip_adam[gpu-checks]'`), no GPU. The register table is committed beside
this file; after a change to the kernels: python tests/test_cuda_compile.py --write
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("registers_cuda.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = ("norm", "prologue", "reduce", "logits", "objective", "step")


def find_nvcc() -> str | None:
    if found := shutil.which("nvcc"):
        return found
    for folder in map(Path, sys.path):
        if (packaged := folder / "nvidia" / "cu13" / "bin" / "nvcc").exists():
            return str(packaged)
    return None


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    for folder in map(Path, sys.path):  # Triton brings one
        if (packaged := folder / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
            return str(packaged)
    return None


NVCC = find_nvcc()
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc: pip install 'fused_clip_adam[gpu-checks]'"),
    pytest.mark.xdist_group("cuda_compile"),  # one worker compiles for all
]


def nvcc_release() -> str:
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


@functools.cache
def compiled() -> tuple[Path, dict[str, dict[str, dict[str, int]]]]:
    """(folder of the cubins, architecture -> kernel -> what ptxas says of it)."""
    from torch.utils import cpp_extension

    folder = Path(tempfile.mkdtemp(prefix="fused_clip_adam_"))
    flags = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-Xptxas=-v",
    ]
    flags += [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]

    def compile_one(job: tuple[str, str]) -> tuple[str, str]:
        source, architecture = job
        target = folder / f"{source}.{architecture}.cubin"
        command = [NVCC, "-cubin", f"-arch={architecture}", *flags, str(ROOT / "csrc" / "cuda" / f"{source}.cu")]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return architecture, done.stdout + done.stderr

    jobs = [(source, architecture) for source in reversed(SOURCES) for architecture in ARCHITECTURES]
    facts: dict[str, dict[str, dict[str, int]]] = {architecture: {} for architecture in ARCHITECTURES}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for architecture, log in pool.map(compile_one, jobs):
            facts[architecture].update(parse_ptxas(log))
    return folder, {architecture: dict(sorted(kernels.items())) for architecture, kernels in facts.items()}


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            "registers": re.search(r"Used (\d+) registers", part),
            "stack": re.search(r"(\d+) bytes stack frame", part),
            "spill_stores": re.search(r"(\d+) bytes spill stores", part),
            "spill_loads": re.search(r"(\d+) bytes spill loads", part),
            "shared": re.search(r"(\d+) bytes smem", part),
        }
        name = short_name(part[: part.index("'")])
        found[name] = {key: int(match.group(1)) if match else 0 for key, match in numbers.items()}
    return found


@functools.cache
def short_name(mangled: str) -> str:
    """`update_runs_kernel<float, float, float, 0, false>` of the kernel's mangled name."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "").replace("fca::", "").removeprefix("void ")
    text = re.sub(
        r"\(Overshoot\)(\d)",
        lambda m: ("NONE", "ALIGN_BLOCK", "ALIGN_ELEMENT", "CAUTIOUS", "GRAMS", "ATAN2")[int(m[1])],
        text,
    )
    return re.sub(r"\((?:Row|long|Work|ReduceWork|Forward|Backward|int|double).*$", "", text)


def sass(architecture: str, source: str) -> dict[str, str]:
    """Kernel -> its machine code as text."""
    folder, _ = compiled()
    command = [find_cuobjdump(), "-sass", str(folder / f"{source}.{architecture}.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : (\S+)", text)
    return {short_name(name): body for name, body in zip(parts[1::2], parts[2::2])}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_uses_local_memory(architecture):
    facts = compiled()[1][architecture]
    assert len(facts) == 8 + 1 + 21 + 129 + 16 + 9  # norm, prologue, reduce, step, logits, objective
    bad = {name: row for name, row in facts.items() if row["stack"] or row["spill_stores"] or row["spill_loads"]}
    assert not bad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_leave_blocks_enough_on_a_multiprocessor(architecture):
    for name, row in compiled()[1][architecture].items():
        if name.startswith("update"):
            few = architecture == "sm_80" or any(own in name for own in ("ALIGN_BLOCK, true", "guarded", "samples"))
            few = few or (architecture == "sm_100" and "ALIGN_BLOCK" in name)
            blocks = 2 if "<double" in name or few else 3
            if name.startswith("update_runs_guarded_kernel<float") and architecture == "sm_90":
                blocks = 3
            if name.startswith("update_runs_kernel<float"):  # four elements a thread
                blocks = 5 if architecture == "sm_90" else 4
            assert row["registers"] <= 65536 // (blocks * 256), name
            assert blocks * (row["shared"] + 1024) <= 100 * 1024, name
        elif name.startswith("logits"):  # 1,024 threads a multiprocessor
            assert row["registers"] <= (128 if "<double" in name else 64), name
        else:
            assert row["registers"] <= (255 if "<double" in name else 128), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_register_table_is_the_committed_one(architecture):
    committed = json.loads(TABLE.read_text())
    if committed["nvcc"] != nvcc_release():
        pytest.skip(f"the table is of nvcc {committed['nvcc']}, this is {nvcc_release()}")
    assert compiled()[1][architecture] == committed["kernels"][architecture], f"python {Path(__file__).name} --write"


@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump (Triton brings one)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_tensors_move_16_bytes_at_a_time(architecture):
    kernels = sass(architecture, "step")
    seen = 0
    for name, code in kernels.items():
        if not name.startswith("update_runs"):
            continue
        storage = re.search(r"<(.*)>", name).group(1).split(", ")[:3]
        # A 16-byte word of the parameter, and as many elements of the others: two words of float beside 16 bits.
        float_words = 1 if storage[0] == "float" else 2
        words = [float_words if kind == "float" else 1 for kind in (storage[0], storage[1], storage[2], storage[2])]
        assert code.count("LDG.E.128") >= sum(words), name
        assert code.count("STG.E.128") >= words[0] + words[2] + words[3], name
        assert not re.search(r"\b(LDL|STL)\b", code), name
        seen += 1
    assert seen == 60 + 5  # of one rule, guarded
    for name, code in [*sass(architecture, "norm").items(), *sass(architecture, "reduce").items()]:
        sampled_halves = "true, 4>" in name and "LDG.E.64" in code  # four elements of 16 bits
        assert "LDG.E.128" in code or "singles" in name or "unit_sums" in name or sampled_halves, name
    logits = sass(architecture, "logits")
    assert len(logits) == 16
    for name, code in logits.items():
        assert code.count("LDG.E.128.STRONG") >= 4, name  # four words of a thread
        assert code.count("STG.E.128") >= (4 if "backward" in name else 0), name


@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump (Triton brings one)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_are_in_flight_together(architecture):
    # 64 bytes of a thread: each load only where the sample has a weight, and no arithmetic between them.
    kernels = {name: code for name, code in sass(architecture, "step").items() if name.startswith("update_samples")}
    assert len(kernels) == 8
    for name, code in kernels.items():
        wide = re.search(r"<(.*)>", name).group(1).split(", ")[1] == "float"
        ops = "".join(
            "L" if op else "." for op in re.findall(rf"(@!?P\d LDG\.E\.{128 if wide else 64}\b)|FMUL|FADD|FFMA", code)
        )
        assert ("LLLL" if wide else "LLLLLLLL") in ops, name
        assert not re.search(r"\b(LDL|STL)\b", code), name


@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump (Triton brings one)")
def test_loads_are_in_flight_together():
    # A whole tile of the plain float32 kernel: four 16-byte loads, one after another, before anything waits for one.
    code = sass("sm_90", "step")["update_runs_kernel<float, float, float, NONE, false>"]
    wide = "".join(op[0] for op in re.findall(r"(LDG|STG|MUFU)\.(?:E\.128|RSQ|RCP)", code))
    assert "LLLL" in wide
    # From there to the last of its three stores: the instructions of four elements. 270 an element would be the limit.
    lines = instructions(code)
    loads = [i for i, line in enumerate(lines) if "LDG.E.128" in line]
    stores = [i for i, line in enumerate(lines) if "STG.E.128" in line]
    first = next(i for n, i in enumerate(loads) if n + 3 < len(loads) and loads[n + 3] - i < 40)
    last = [i for i in stores if i > first][2]
    assert (last - first) / 4 < 80


def instructions(code: str) -> list[str]:
    return [line for line in code.splitlines() if re.search(r"/\*[0-9a-f]{4,5}\*/\s+\S", line)]


@pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump (Triton brings one)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_wait_for_memory_and_not_for_instructions(architecture):
    # An H100 issues 20 instructions in the time of a bfloat16 logit's 2 bytes forward, 39 in that of the 4 backward; an
    # H200, whose memory is faster, 14 and 31.
    kernels = sass(architecture, "logits")
    for entropy, forward_limit, backward_limit in (("false", 8, 17), ("true", 10, 20)):
        forward = instructions(kernels[f"logits_forward_kernel<BFloat16, float, {entropy}>"])
        backward = instructions(kernels[f"logits_backward_kernel<BFloat16, float, {entropy}>"])
        loads = [i for i, line in enumerate(forward) if "LDG.E.128.STRONG" in line]
        assert len(loads) == 4 and loads[3] - loads[0] < 80
        # From the first comparison to the last of 32 powers, and one more where the maximum has grown.
        maxima = [i for i, line in enumerate(forward) if "FMNMX" in line]
        powers = [i for i, line in enumerate(forward) if "MUFU.EX2" in line and i > maxima[0]]
        assert (powers[32] - maxima[0]) / 32 < forward_limit, entropy
        words = [i for i, line in enumerate(backward) if "LDG.E.128" in line]
        stores = [i for i, line in enumerate(backward) if "STG.E.128" in line]
        assert len(words) == 4 and words[3] - words[0] < 80
        assert (stores[3] - words[0]) / 32 < backward_limit, entropy


def main() -> None:
    TABLE.write_text(json.dumps({"nvcc": nvcc_release(), "kernels": compiled()[1]}, indent=1) + "\n")
    print(f"wrote {TABLE.name}: {sum(map(len, compiled()[1].values()))} kernels")


if __name__ == "__main__":
    main()
