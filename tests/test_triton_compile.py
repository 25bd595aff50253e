"""What the compiler makes of the Triton kernels: registers, spills, vector width, for NVIDIA and AMD, without a GPU.

Registers are committed beside this file for one version of Triton; after a change to the kernels:
python tests/test_triton_compile.py --write
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("registers_triton.json")

F64, F32, BF16, F16 = range(4)  # enum DType of csrc/table.h
STORAGE = {
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "bfloat16, float32 states": (BF16, BF16, F32),
    "float64": (F64, F64, F64),
}
"""Types of parameter, gradient and states."""
BYTES = (8, 4, 2, 2)
ALIGN_BLOCK, ALIGN_ELEMENT, CAUTIOUS = 1, 2, 3
RULES = {
    "adamw": {},
    "gathers the norm": {"gather": True},
    "amsgrad": {"amsgrad": True},
    "L2": {"coupled": True},
    "strided": {"strided": True},
    "align 1024": {"rule": ALIGN_BLOCK, "block": 1024},
    "align 16": {"rule": ALIGN_BLOCK, "block": 16},
    "align 7": {"rule": ALIGN_BLOCK, "block": 7},
    "align 4096": {"rule": ALIGN_BLOCK, "block": 4096},
    "align element": {"rule": ALIGN_ELEMENT},
    "cautious": {"rule": CAUTIOUS},
    "align 1024 with everything": dict(
        rule=ALIGN_BLOCK, block=1024, gather=True, amsgrad=True, coupled=True, strided=True
    ),
    "align 4096 with everything": dict(
        rule=ALIGN_BLOCK, block=4096, gather=True, amsgrad=True, coupled=True, strided=True
    ),
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FEW_RULES = ("adamw", "gathers the norm", "align 1024")
RARE_RULES = ("adamw", "gathers the norm", "amsgrad", *list(RULES)[-2:])  # of float64
FEW_STORAGE = ("float32", "bfloat16")


def variants() -> dict[str, tuple]:
    """ "target: kernel" -> (target, kernel, its particulars): everything for sm_90, the commonest for the others."""
    out = {}
    for target in TARGETS:
        everything = target == "sm_90"
        for storage in STORAGE if everything else FEW_STORAGE:
            for rule in FEW_RULES if not everything else RARE_RULES if storage == "float64" else RULES:
                out[f"{target}: update, {storage}, {rule}"] = (target, "update", storage, rule)
        for storage in ("float32", "bfloat16", "float64") if everything else FEW_STORAGE:
            out[f"{target}: norm, {storage}"] = (target, "norm", storage)
        out[f"{target}: prologue"] = (target, "prologue")
    return out


VARIANTS = variants()
NVIDIA = [name for name, (target, *_) in VARIANTS.items() if target != "gfx942"]


# ---------------------------------------------------------------- compiling: in processes where nothing is interpreted


def gpu_target(name: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


POINTERS = {
    "fixed_ptr": "*i64",
    "fresh_ptr": "*i64",
    "scalars_ptr": "*fp64",
    "partials_ptr": "*fp64",
    "finished_ptr": "*i32",
    "grad_square_sum_ptr": "*fp64",
    "square_sums_ptr": "*fp64",
    "grad_scale_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
    "observed_ptr": "*fp32",
    "steps_skipped_ptr": "*i64",
}


def compile_variant(name: str) -> tuple[str, dict]:
    """(name, what the compiler made of it). Takes the constants from the launches' own functions."""
    import triton
    from triton.compiler import ASTSource

    from fused_clip_adam.backends import triton_step
    from fused_clip_adam.backends.device_table import Launch

    target, kind, *what = VARIANTS[name]
    seen = []
    # The launch functions state constants and options; catch them instead of launching.
    triton_step._launch = lambda kernel, grid, device, *arguments, **options: seen.append((kernel, options))
    lanes = 64 if target == "gfx942" else 32  # as under a torch for ROCm, or for CUDA
    triton_step._THREADS, triton_step._TAIL = lanes * triton_step._WARPS, 2 * lanes * triton_step._WARPS
    tensor = types.SimpleNamespace(numel=lambda: 5)
    dtypes = STORAGE[what[0]] if what else (F32,) * 3
    options = RULES[what[1]] if kind == "update" else {}
    launch = Launch(0, dtypes, 0, 1, 4096, 4096, options.get("strided", False))
    placed = types.SimpleNamespace(
        **dict.fromkeys(("device", "fixed", "fresh", "partials", "scalars", "finished"), tensor),
        launches=[launch],
        rows=1,
        chunks_at=0,
    )
    if kind == "norm":
        triton_step.grad_square_sums(placed)
    elif kind == "prologue":
        triton_step.prologue(placed, tensor, tensor, tensor, tensor, tensor, tensor, True)
    else:
        triton_step.update_(
            placed,
            None,
            0,
            options.get("coupled", False),
            options.get("amsgrad", False),
            options.get("rule", 0),
            options.get("block", 1),
            tensor if options.get("gather") else None,
        )
    ((kernel, chosen),) = seen
    signature = {p.name: "constexpr" if p.is_constexpr else POINTERS.get(p.name, "i32") for p in kernel.params}
    constants = {(p.num,): chosen.pop(p.name) for p in kernel.params if p.is_constexpr}
    tile = {p.name: constants[p.num,] for p in kernel.params if p.name in ("TILE", "PADDED", "GATE")}
    if target == "gfx942":
        chosen.pop("maxnreg", None)
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=gpu_target(target), options=chosen)
    facts = read_gcn(compiled) if target == "gfx942" else read_ptx(compiled, target, chosen)
    return name, {**facts, "tile": tile, "warps": chosen["num_warps"]}


def read_ptx(compiled, target: str, options: dict) -> dict:
    ptx = compiled.asm["ptx"]
    widths = collections.Counter()
    for access, vector, bits in re.findall(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx):
        widths[f"{access} {int(vector or 1) * int(bits) // 8}"] += 1
    arithmetic = collections.Counter(re.findall(r"\b((?:fma|div|sqrt|rcp|mul|add|sub)\.[\w.]*f32)\b", ptx))
    facts = {"widths": dict(widths), "arithmetic": dict(arithmetic), "local": ".local" in ptx}
    log = ptxas_log(ptx, target, options)
    for key, pattern in {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }.items():
        facts[key] = int(re.search(pattern, log).group(1))
    return {**facts, "shared": compiled.metadata.shared}


def ptxas_log(ptx: str, target: str, options: dict) -> str:
    """As Triton calls it to make the cubin; it keeps the log to itself."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = (
        tools / "ptxas-blackwell" if target == "sm_100" and (tools / "ptxas-blackwell").exists() else tools / "ptxas"
    )
    fusion = [] if options["enable_fp_fusion"] else ["--fmad=false"]
    architecture = target + "a" * (target != "sm_80")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-lineinfo", *fusion, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder, "cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def read_gcn(compiled) -> dict:
    gcn = compiled.asm["amdgcn"]

    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", gcn).group(1))

    widths = collections.Counter()
    for access, words in re.findall(r"(?:global|buffer|flat)_(load|store)_dwordx(\d)", gcn):
        widths[f"{'ld' if access == 'load' else 'st'} {4 * int(words)}"] += 1
    return {
        "widths": dict(widths),
        "local": "scratch_" in gcn,
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spill_stores": count("vgpr_spill_count"),
        "spill_loads": 0,  # SGPRs spill into lanes of VGPRs, not into memory
        "shared": compiled.metadata.shared,
    }


# ---------------------------------------------------------------- launching: Triton's own code up to the driver call


class Recorder:
    """A driver whose device accepts every launch and does nothing."""

    def __init__(self):
        self.launched: list[str] = []
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, *rest: (0, name, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(metadata.name)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return gpu_target("sm_90")


def dry_steps() -> dict:
    """Takes optimizer steps whose launches go to a Recorder; returns what was launched and what was compiled."""
    import torch
    import triton

    import fused_clip_adam as fca
    from fused_clip_adam import backends
    from fused_clip_adam.backends import triton_step

    driver = Recorder()
    triton.runtime.driver.set_active(driver)
    backends.check_name, backends.choose_step = (lambda name: name), (lambda name, device: triton_step)
    launches = {}
    # A multiple of 16, or not, and more than one chunk, are all one compilation; blocks past 2^31 are another.
    cases = [(n, clip, None) for n in (16, 17, 100_003) for clip in (1.0, None)]
    cases += [(17, 1.0, fca.AlignedMomentum(block)) for block in (2**20, 2**48)]
    for elements, clip, rule in cases:
        params = [torch.nn.Parameter(torch.zeros(elements)) for _ in range(1 + elements % 3)]
        opt = fca.FusedClipAdamW(params, backend="triton", grad_clip=clip, overshoot=rule)
        for scale in (None, torch.ones(())):
            for p in params:
                p.grad = torch.zeros_like(p)
            opt.grad_scale = opt.found_inf = scale
            if scale is not None:
                opt.observe(fca.ClipStats(torch.zeros(14)))
            driver.launched.clear()
            opt.step()
            launches[f"{elements}, {clip}, {rule}, {scale is not None}"] = list(driver.launched)
    compiled = {}
    for name in ("norm_kernel", "prologue_kernel", "update_kernel"):
        (cache, *_), *_ = getattr(triton_step, name).device_caches.values()
        compiled[name] = len(cache)
    return {"launches": launches, "compiled": compiled}


# ---------------------------------------------------------------- the tests


def compile_all(names: list[str]) -> dict[str, dict]:
    """Runs this file in a process of its own: Triton's interpreter and its compiler exclude each other."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
        command = [sys.executable, __file__, "--compile"]
        log = subprocess.run(
            command, input="\n".join(names), env=environment, capture_output=True, text=True, timeout=900
        )
    assert log.returncode == 0, log.stdout + log.stderr
    return json.loads(log.stdout)


@pytest.fixture(scope="module")
def compiled(request) -> dict[str, dict]:
    selected = {
        i.callspec.params["name"] for i in request.session.items if "compiled" in getattr(i, "fixturenames", ())
    }
    return compile_all(sorted(selected))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_spills(compiled, name):
    facts = compiled[name]
    assert not facts["local"]
    assert (facts["stack"], facts["spill_stores"], facts["spill_loads"]) == (0, 0, 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_aligned_tiles_move_16_bytes_at_a_time(compiled, name):
    _target, kind, *what = VARIANTS[name]
    facts = compiled[name]
    if kind == "prologue" or facts["tile"].get("PADDED"):
        return
    dtypes = STORAGE[what[0]]
    options = RULES[what[1]] if kind == "update" else {}
    lanes = (64 if "gfx" in name else 32) * facts["warps"]
    vector = 16 // max(BYTES[code] for code in (dtypes[1:2] if kind == "norm" else dtypes))
    per_thread = facts["tile"]["TILE"] // (lanes * vector)
    assert per_thread
    states = 3 if options.get("amsgrad") else 2
    loads = [dtypes[1]] if kind == "norm" else [dtypes[0], dtypes[1], *[dtypes[2]] * states]
    stores = [] if kind == "norm" else [dtypes[0], *[dtypes[2]] * states]
    if options.get("rule") == ALIGN_BLOCK and not facts["tile"]["GATE"]:
        loads += [dtypes[1], dtypes[2], *([dtypes[0]] if options.get("coupled") else [])]  # m g first
    for access, codes in (("ld", loads), ("st", stores)):
        for width, number in collections.Counter(vector * BYTES[code] for code in codes).items():
            if width >= 16 or "gfx" not in name:  # 8 bytes may be a table's word as well: at least as many
                assert facts["widths"].get(f"{access} {width}", 0) >= number * per_thread, (access, width)


@pytest.mark.parametrize("name", NVIDIA)
def test_arithmetic_is_exact(compiled, name):
    # No fused multiply-add, no approximate division or root, and subnormal numbers kept.
    import triton

    used = set(compiled[name]["arithmetic"])
    if triton.__version__.startswith("3.5."):  # older than any torch we accept brings
        used = {op.replace(".ftz", "") for op in used}
    assert not [op for op in used if op.startswith("fma") or "ftz" in op or "approx" in op or ".full." in op]
    if "update" in name and "float64" not in name:
        assert {"div.rn.f32", "sqrt.rn.f32"} <= used


def table() -> dict:
    return json.loads(TABLE.read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_registers_are_those_recorded(compiled, name):
    import triton

    recorded = table()
    if triton.__version__ != recorded["triton"]:
        pytest.skip(f"recorded for Triton {recorded['triton']}, this is {triton.__version__}")
    facts = compiled[name]
    assert [facts["registers"], facts["shared"]] == recorded["registers, shared bytes"][name]


def test_table_covers_all_variants():
    assert sorted(table()["registers, shared bytes"]) == sorted(VARIANTS)


@pytest.fixture(scope="module")
def dry_run() -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log = subprocess.run(
        [sys.executable, __file__, "--dry-run"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert log.returncode == 0, log.stdout + log.stderr
    return json.loads(log.stdout)


def test_three_launches_a_step(dry_run):
    for case, launched in dry_run["launches"].items():
        norm = ["norm_kernel"] if ", 1.0," in case else []
        assert launched == [*norm, "prologue_kernel", "update_kernel"], case


def test_sizes_do_not_compile_anew(dry_run):
    # With a norm or without; the prologue also with GradScaler and observed masses or without; the norm and the update
    # also with sizes past 2^31.
    assert dry_run["compiled"] == {"norm_kernel": 2, "prologue_kernel": 4, "update_kernel": 4}


def main() -> None:
    if "--dry-run" in sys.argv:
        print(json.dumps(dry_steps()))
    elif "--compile" in sys.argv:
        names = sys.stdin.read().splitlines()
        with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            print(json.dumps(dict(pool.map(compile_variant, names, chunksize=4))))
    elif "--write" in sys.argv:
        import triton

        found = compile_all(list(VARIANTS))
        recorded = {name: [facts["registers"], facts["shared"]] for name, facts in found.items()}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(pair)}" for name, pair in recorded.items())
        head = f'{{\n "triton": "{triton.__version__}",\n "registers, shared bytes": {{\n'
        TABLE.write_text(head + lines + "\n }\n}\n")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
