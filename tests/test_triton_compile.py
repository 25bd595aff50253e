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
pytestmark = pytest.mark.xdist_group("triton_compile")  # one worker compiles for all

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("registers_triton.json")

F64, F32, BF16, F16 = range(4)  # enum DType of csrc/table.h
STORAGE = {
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16),
    "bfloat16, float32 states": (BF16, BF16, F32),
    "float64": (F64, F64, F64),
    "float32, bfloat16 scores": (F32, BF16, F32),
    "bfloat16, float32 scores": (BF16, F32, BF16),
}
"""Types of parameter, gradient and states."""
BYTES = (8, 4, 2, 2)
AT_ONCE = 4  # samples whose loads are in flight together
ALIGN_BLOCK, ALIGN_ELEMENT, CAUTIOUS, GRAMS, ATAN2, FADAM = range(1, 7)
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
    "Grams": {"rule": GRAMS},
    "atan2": {"rule": ATAN2},
    "align 1024 with everything": dict(
        rule=ALIGN_BLOCK, block=1024, gather=True, amsgrad=True, coupled=True, strided=True
    ),
    "align 4096 with everything": dict(
        rule=ALIGN_BLOCK, block=4096, gather=True, amsgrad=True, coupled=True, strided=True
    ),
    "FAdam": {"rule": FADAM},
    "guarded": {"guarded": True},
    "guarded, output rows": {"guarded": True, "units": True},
    "guarded, m g": {"guarded": True, "dots": True},
    "guarded, m g with everything": dict(
        gather=True, amsgrad=True, coupled=True, strided=True, guarded=True, units=True, dots=True
    ),
    "guarded, align 1024 with everything": dict(
        rule=ALIGN_BLOCK,
        block=1024,
        gather=True,
        amsgrad=True,
        coupled=True,
        strided=True,
        guarded=True,
        units=True,
    ),
    "guarded, align 4096 with everything": dict(
        rule=ALIGN_BLOCK,
        block=4096,
        gather=True,
        amsgrad=True,
        coupled=True,
        strided=True,
        guarded=True,
        units=True,
    ),
    "samples": {"samples": 1},
    "samples gather the norm": {"samples": 1, "gather": True},
    "samples, align 1024": {"samples": 1, "rule": ALIGN_BLOCK, "block": 1024},
    "samples, align 4096": {"samples": 1, "rule": ALIGN_BLOCK, "block": 4096},
    "samples, noise": {"samples": 2},
    "samples, noise, m g with everything": dict(
        samples=2, gather=True, amsgrad=True, coupled=True, strided=True, guarded=True, units=True, dots=True
    ),
    "samples, noise, align 4096 with everything": dict(
        samples=2,
        rule=ALIGN_BLOCK,
        block=4096,
        gather=True,
        amsgrad=True,
        coupled=True,
        strided=True,
        guarded=True,
        units=True,
    ),
}
REDUCTIONS = {
    "squares and maximum": dict(kind=0),
    "m g": dict(kind=1),
    "m g, spikes, output rows": dict(kind=1, spiked=True, units=True),
    "agreement, L2": dict(kind=2, coupled=True),
    "RMS": dict(kind=3),
    "metric": dict(kind=4),
    "FAdam": dict(kind=6),
    "squares and maximum, samples": dict(kind=0, samples=1),
    "m g, output rows, samples, noise": dict(kind=1, units=True, samples=2),
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FEW_RULES = ("adamw", "gathers the norm", "align 1024", "guarded", "guarded, output rows", "samples", "samples, noise")
RARE_RULES = (  # of float64
    "adamw",
    "gathers the norm",
    "amsgrad",
    "samples",
    *(rule for rule in RULES if rule.endswith("with everything")),
)
FEW_REDUCTIONS = ("squares and maximum", "RMS")
FEW_STORAGE = ("float32", "bfloat16")
CALLS = {
    "PPO with everything": dict(rule=0, inputs=True, aggregation=1),
    "DCPO": dict(rule=8, aux=True),
    "GSPO, packed": dict(rule=14, packed=True, inputs=True),
    "GSPO, float64, short rows": dict(rule=14, dtype="float64", inputs=True, cols=33),
    "bounds of BAPO": dict(levels=22),
}
PASSES = {
    "PPO with everything": ("token_kernel", "finish_kernel"),
    "DCPO": ("token_kernel",),
    "GSPO, packed": ("sequence_kernel",),
    "GSPO, float64, short rows": ("sequence_kernel", "token_kernel"),
    "bounds of BAPO": ("level_kernel", "fold_kernel"),
}
"""Kernels of an objective's calls, of which each launches several."""
FEW_PASSES = {"PPO with everything": ("token_kernel",)}


def rules_of(storage: str) -> list[str]:
    if storage.endswith("scores"):
        return [rule for rule, options in RULES.items() if "samples" in options]
    return list(RARE_RULES if storage == "float64" else RULES)


def variants() -> dict[str, tuple]:
    """ "target: kernel" -> (target, kernel, its particulars): everything for sm_90, the commonest for the others."""
    out = {}
    for target in TARGETS:
        everything = target == "sm_90"
        for storage in STORAGE if everything else FEW_STORAGE:
            for rule in rules_of(storage) if everything else FEW_RULES:
                out[f"{target}: update, {storage}, {rule}"] = (target, "update", storage, rule)
        for storage in ("float32", "bfloat16", "float64") if everything else FEW_STORAGE:
            out[f"{target}: norm, {storage}"] = (target, "norm", storage)
            for reduction in REDUCTIONS if everything else FEW_REDUCTIONS:
                out[f"{target}: reduce, {storage}, {reduction}"] = (target, "reduce", storage, reduction)
            out[f"{target}: units, {storage}"] = (target, "units", storage)
            for kind in ("norm", "units") if everything else ():
                out[f"{target}: {kind}, {storage}, samples"] = (target, kind, storage, "samples")
        out[f"{target}: prologue"] = (target, "prologue")
        for storage in ("float32", "bfloat16", "float64") if everything else ("bfloat16",):
            for kind in ("logits_forward", "logits_backward"):
                out[f"{target}: {kind}, {storage}"] = (target, kind, storage)
        if everything:
            out[f"{target}: logits_forward, odd rows"] = (target, "logits_forward, odd rows", "bfloat16")
        for name, kernels in (PASSES if everything else FEW_PASSES).items():
            for kernel in kernels:
                out[f"{target}: {kernel}, {name}"] = (target, kernel, name)
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
    "group_signals_ptr": "*fp64",
    "pairs_ptr": "*fp64",
    "starts_ptr": "*i64",
    "chunks_ptr": "*i64",
    "out_ptr": "*fp64",
    "unit_factors_ptr": "*fp64",
    "unit_starts_ptr": "*i64",
    "dots_ptr": "*fp64",
    "weights_ptr": "*fp64",
    "seed_ptr": "*i64",
    "noise": "fp64",
}


def compile_variant(name: str) -> tuple[str, dict]:
    """(name, what the compiler made of it). Takes the constants from the launches' own functions."""
    import triton
    from triton.compiler import ASTSource

    target, kind, *what = VARIANTS[name]
    lanes = 64 if target == "gfx942" else 32  # as under a torch for ROCm, or for CUDA
    if kind in ("update", "norm", "prologue", "reduce", "units"):
        kernel, signature, constants, chosen = step_launch(kind, what, lanes)
    else:
        kernel, signature, constants, chosen = objective_launch(kind, what[0], lanes)
    tile = {p.name: constants[p.num,] for p in kernel.params if p.name in ("TILE", "PADDED", "GATE")}
    if target == "gfx942":
        chosen.pop("maxnreg", None)
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=gpu_target(target), options=chosen)
    facts = read_gcn(compiled) if target == "gfx942" else read_ptx(compiled, target, chosen)
    return name, {**facts, "tile": tile, "warps": chosen["num_warps"]}


def step_launch(kind: str, what: list, lanes: int) -> tuple:
    """(kernel, signature, constants, options) of a step's launch."""
    from fused_clip_adam.backends import triton_step
    from fused_clip_adam.backends.device_table import Launch, UnitLaunch, Units

    seen = []
    # The launch functions state constants and options; catch them instead of launching.
    triton_step.launch_kernel = lambda kernel, grid, device, *arguments, **options: seen.append((kernel, options))
    triton_step._THREADS, triton_step._TAIL = lanes * triton_step._WARPS, 2 * lanes * triton_step._WARPS
    tensor = types.SimpleNamespace(numel=lambda: 5)
    dtypes = STORAGE[what[0]] if what else (F32,) * 3
    options = RULES[what[1]] if kind == "update" else REDUCTIONS[what[1]] if kind == "reduce" else {}
    samples = options.get("samples", len(what[1:]) if kind in ("norm", "units") else 0)
    launch = Launch(0, dtypes, 0, 1, 4096, 4096, options.get("strided", False))
    placed = types.SimpleNamespace(
        **dict.fromkeys(("fixed", "fresh", "partials", "pairs", "scalars", "finished"), tensor),
        device="cpu",
        launches=[launch],
        rows=1,
        chunks_at=0,
        samples=types.SimpleNamespace(count=1, weights=tensor, seed=tensor if samples == 2 else None, noise=0.0)
        if samples
        else None,
        units=lambda: Units(tensor, [1], tensor, [[UnitLaunch(dtypes, 0, 1)]]),
    )
    if kind == "norm" and samples:
        triton_step.sample_square_sums(placed)
    elif kind == "norm":
        triton_step.grad_square_sums(placed)
    elif kind == "prologue":
        triton_step.prologue(placed, *[tensor] * 7, True)
    elif kind == "reduce":
        triton_step.rows_of_pairs = lambda *_: None
        flags = (options.get("coupled", False), options.get("spiked", False), tensor if options.get("units") else None)
        triton_step.reduce(placed, tensor, 0, 0, options["kind"], *flags)
    elif kind == "units":
        triton_step.unit_sums(placed, 0)
    else:
        triton_step.update_(
            placed,
            tensor,
            0,
            0,
            options.get("coupled", False),
            options.get("amsgrad", False),
            options.get("rule", 0),
            options.get("block", 1),
            options.get("guarded", False),
            *(tensor if options.get(name) else None for name in ("units", "dots", "gather")),
        )
    ((kernel, chosen),) = seen
    signature = {p.name: "constexpr" if p.is_constexpr else POINTERS.get(p.name, "i32") for p in kernel.params}
    constants = {(p.num,): chosen.pop(p.name) for p in kernel.params if p.is_constexpr}
    return kernel, signature, constants, chosen


def call_pass(
    rule: int = 0,
    inputs: bool = False,
    aux: bool = False,
    packed: bool = False,
    dtype: str = "float32",
    cols: int = 2048,
    aggregation: int = 0,
    levels: int = 0,
) -> None:
    """policy_loss or, with levels, bound_sums, on tensors that hold nothing."""
    import torch

    from fused_clip_adam.backends import triton_objective

    x = torch.empty(1 if packed else 4, cols, dtype=getattr(torch, dtype), device="meta")
    mask, optional = x.bool(), x if inputs else None
    if levels:
        triton_objective.bound_sums(x, x, x, mask, [0.5] * 5, [1.5] * (levels - 5))
        return
    index = torch.empty(cols, dtype=torch.int64, device="meta") if packed else None
    triton_objective.policy_loss(
        *(x, x, x, mask, optional, x if aux else None, optional, optional, index, index, index, 4),
        *(rule, [0.5] * 8, None, aggregation, 0.0, None, 0.1, 3 if inputs else 0, 0.1 if inputs else 0.0, True),
    )


def call_logits(kind: str, dtype: str, V: int = 151_936) -> None:
    import torch

    from fused_clip_adam.backends import triton_logits

    logits = torch.empty(2, 3, V, dtype=getattr(torch, dtype), device="meta")
    tokens = torch.empty(2, 3, dtype=torch.int64, device="meta")
    x = torch.empty(2, 3, dtype=torch.float64 if dtype == "float64" else torch.float32, device="meta")
    if kind == "logits_forward":
        triton_logits.logits_forward(logits, tokens, tokens.bool(), 1.0, True)
    else:
        triton_logits.logits_backward(logits, tokens, x.expand(2, 2, 3), x, x, x, 1.0, logits)


def objective_launch(kind: str, what: str, lanes: int) -> tuple:
    """(kernel, signature, constants, options) of a launch of an objective."""
    import torch

    from fused_clip_adam.backends import triton_logits, triton_objective

    seen = []

    def catch(kernel, grid, device, *arguments, **options):
        seen.append((kernel, arguments, options))

    triton_objective.launch_kernel = triton_logits.launch_kernel = catch
    triton_logits._LANES = lanes
    if kind.startswith("logits"):
        call_logits(kind.partition(",")[0], what, 151_935 if "odd" in kind else 151_936)
        ((kernel, arguments, chosen),) = seen
    else:
        call_pass(**CALLS[what])
        ((kernel, arguments, chosen),) = [launch for launch in seen if launch[0].fn.__name__ == kind]

    def type_of(parameter, argument) -> str | tuple:
        if argument is None:
            return "constexpr"
        if isinstance(argument, tuple):
            return ("fp32",) * len(argument)
        return "*" + NAMES[argument.dtype] if isinstance(argument, torch.Tensor) else parameter.annotation_type

    NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    NAMES |= {torch.int64: "i64", torch.uint8: "u8"}
    given = dict(zip((p.name for p in kernel.params), arguments))
    signature = {p.name: type_of(p, given.get(p.name)) for p in kernel.params}
    constants = {(p.num,): chosen.pop(p.name, None) for p in kernel.params if signature[p.name] == "constexpr"}
    return kernel, signature, constants, chosen


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
    cases += [(n, clip, None) for n in (16, 17, 100_003) for clip in (fca.UpdateRMS(), fca.AGC())]
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
    for count, elements in ((1, 16), (5, 17), (33, 5000)):
        opt = fca.FusedClipAdamW([torch.nn.Parameter(torch.zeros(elements))], backend="triton")
        for noise in (0.0, 0.5):
            driver.launched.clear()
            opt.step_from_gradients([torch.zeros(count, elements)], max_sample_norm=1.0, noise_multiplier=noise)
            launches[f"{elements}, {count} samples, {noise}"] = list(driver.launched)
    compiled = {}
    for name in ("norm_kernel", "prologue_kernel", "update_kernel", "reduce_kernel", "unit_kernel"):
        (cache, *_), *_ = getattr(triton_step, name).device_caches.values()
        compiled[name] = len(cache)
    return {"launches": launches, "compiled": compiled, **dry_objectives()}


def dry_objectives() -> dict:
    """Calls the objective's functions; returns the kernels of each call and how many compilations they ask for.

    Nothing is compiled: Triton asks its hook before each, and does not go on where that returns True.
    """
    import torch
    import triton

    from fused_clip_adam.backends import triton_logits, triton_objective

    asked = []

    def hook(key: str, fn, **_: object) -> bool:
        asked.append((fn.name.rpartition(".")[2], key))
        return True

    triton.knobs.runtime.jit_cache_hook = hook
    launches = {}
    for rows, cols in ((1, 16), (3, 17), (33, 600), (2, 100_001)):
        for k in range(2):  # values and alignments
            x = torch.empty(rows, cols + k)[:, k:]
            for rule, aggregation in ((0, 0), (0, 1), (14, 2)):
                asked_before = len(asked)
                triton_objective.policy_loss(
                    *(x, x, x, None, None, None, None, None, None, None, None, rows),
                    *(rule, [k] * 8, None, aggregation, k, None, float(k), 0, 0.0, True),
                )
                launches[f"{rows}, {cols}, {k}, {rule}, {aggregation}"] = [name for name, _ in asked[asked_before:]]
            triton_objective.bound_sums(x, x, x, None, [k + 0.5], [k + 1.0])
    for rows, V in ((1, 151_936), (70_000, 40_001), (3, 151_935)):
        # Expanded: as many rows as one likes in the memory of one.
        logits = torch.empty(V + 3, dtype=torch.bfloat16)[rows % 4 :][:V].expand(rows, 1, V)
        tokens, x = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, 1)
        for scale in (1.0, 0.7):
            triton_logits.logits_forward(logits, tokens, None, scale, True)
            triton_logits.logits_backward(logits, tokens, x.expand(2, rows, 1), x, x, None, scale, logits)
    keys = collections.Counter(name for name, _ in set(asked))
    return {"objective_launches": launches, "objective_compiled": keys}


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


def check_reduction(facts: dict, reduction: str) -> None:
    """Every stream in accesses of 16 bytes, four a thread where it is alone, else two."""
    options = REDUCTIONS[reduction]
    kind, coupled, spiked = options["kind"], options.get("coupled", False), options.get("spiked", False)
    momentum = kind in (1, 2)
    streams = (
        (AT_ONCE if "samples" in options else 1)
        + (coupled or kind == 6)
        + momentum
        + (kind in (3, 4, 6) or (spiked and momentum))
    )
    assert facts["widths"]["ld 16"] >= (4 if streams == 1 else 2 * streams)


@pytest.mark.parametrize("name", VARIANTS)
def test_aligned_tiles_move_16_bytes_at_a_time(compiled, name):
    _target, kind, *what = VARIANTS[name]
    facts = compiled[name]
    if kind == "logits_forward, odd rows":
        assert not any(width.startswith("ld") and int(width[3:]) > 8 for width in facts["widths"])  # 8: a token
    if kind in ("logits_forward", "logits_backward"):
        lanes = (64 if "gfx" in name else 32) * facts["warps"]
        accesses = facts["tile"]["TILE"] // lanes
        assert facts["widths"]["ld 16"] == accesses
        if kind == "logits_backward":
            assert facts["widths"]["st 16"] == 2 * accesses  # zeros have a loop of their own
        return
    if kind == "units":
        # Gradient and parameter, of output rows that share a tile or are alone: 8 elements a thread.
        assert facts["widths"]["ld 16"] >= 2 * (1 + AT_ONCE ** len(what[1:])) * 8 * BYTES[STORAGE[what[0]][0]] // 16
        return
    if kind == "reduce":
        check_reduction(facts, what[1])
        return
    if kind not in ("update", "norm") or facts["tile"].get("PADDED"):
        return
    dtypes = STORAGE[what[0]]
    options = RULES[what[1]] if kind == "update" else {}
    lanes = (64 if "gfx" in name else 32) * facts["warps"]
    vector = 16 // max(BYTES[code] for code in (dtypes[1:2] if kind == "norm" else dtypes))
    per_thread = facts["tile"]["TILE"] // (lanes * vector)
    assert per_thread
    states = 3 if options.get("amsgrad") else 2
    grads = [dtypes[1]] * (AT_ONCE if "samples" in options else 1)
    loads = grads if kind == "norm" else [dtypes[0], *grads, *[dtypes[2]] * states]
    stores = [] if kind == "norm" else [dtypes[0], *[dtypes[2]] * states]
    if options.get("rule") == ALIGN_BLOCK and not facts["tile"]["GATE"]:
        loads += [*grads, dtypes[2], *([dtypes[0]] if options.get("coupled") else [])]  # m g first
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
        norm = ["norm_kernel"] if ", 1.0," in case or "samples" in case else []
        sums = ["reduce_kernel"] if "UpdateRMS" in case else ["unit_kernel"] if "AGC" in case else []
        assert launched == [*norm, "prologue_kernel", *sums, "update_kernel"], case


def test_sizes_do_not_compile_anew(dry_run):
    # With a norm or without; the prologue also with GradScaler and observed masses or without; the norm and the update
    # also with sizes past 2^31; the update also with output rows. Of samples the norm, the prologue with a found_inf of
    # float64, and the update with noise or without.
    assert dry_run["compiled"] == {
        "norm_kernel": 3,
        "prologue_kernel": 5,
        "update_kernel": 7,
        "reduce_kernel": 1,
        "unit_kernel": 1,
    }


def test_launches_of_an_objective(dry_run):
    for case, launched in dry_run["objective_launches"].items():
        sequences = [] if case.endswith("0, 0") else ["sequence_kernel"]
        assert launched == [*sequences, "token_kernel", "finish_kernel"], case


def test_sizes_and_scalars_of_an_objective_do_not_compile_anew(dry_run):
    # Tokens: rows shorter than a tile, or not, times three calls. Logits: every row at a multiple of 16 bytes, or not.
    assert dry_run["objective_compiled"] == {
        "sequence_kernel": 2,
        "token_kernel": 6,
        "finish_kernel": 3,
        "level_kernel": 2,
        "fold_kernel": 1,
        "forward_kernel": 2,
        "backward_kernel": 1,
    }


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
