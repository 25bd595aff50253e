"""The optimizers under comparison: ours and each peer at its best setting, all doing the same AdamW step.

A builder takes parameters whose `.grad` is set and returns a callable that does one step: clipping to
`work.max_norm` where that is given, then the update.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from benchmarks.harness import alternate

Params = list[torch.nn.Parameter]
Step = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What one step does, and where.

    Args:
        norm_foreach: how torch takes norms; `faster_norm_foreach` finds the better.
        state_dtype: of the moments; None: the parameters'.
        states: per parameter the moments that every candidate uses in turn (exp_avg, exp_avg_sq and, for amsgrad,
            max_exp_avg_sq): a GPU does not hold a set for each. None: each has its own.
    """

    max_norm: float | None = None
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    norm_foreach: bool = True
    state_dtype: torch.dtype | None = None
    states: list[tuple[torch.Tensor, ...]] | None = None

    @property
    def adamw(self) -> dict:
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


def ours(params: Params, work: Work, backend: str = "cpu") -> Step:
    """fused_clip_adam: norm and update in one call, the gradient read and never written."""
    import fused_clip_adam as fca

    options = {"grad_clip": work.max_norm, "state_dtype": work.state_dtype, "backend": backend}
    return share_states(fca.FusedClipAdamW(params, **work.adamw, **options), params, work).step


def torch_fused(params: Params, work: Work) -> Step:
    """`clip_grad_norm_`, then AdamW(fused=True)."""
    optimizer = share_states(torch.optim.AdamW(params, **work.adamw, fused=True), params, work)
    return clip_then(optimizer.step, params, work)


def torch_foreach(params: Params, work: Work) -> Step:
    """`clip_grad_norm_`, then AdamW(foreach=True), which reads its step counts on the host."""
    optimizer = share_states(torch.optim.AdamW(params, **work.adamw, foreach=True), params, work, "cpu")
    return clip_then(optimizer.step, params, work)


def torch_for_loop(params: Params, work: Work) -> Step:
    """`clip_grad_norm_`, then AdamW with a Python loop over tensors."""
    return clip_then(torch.optim.AdamW(params, **work.adamw, foreach=False, fused=False).step, params, work)


def torch_grad_scale(params: Params, work: Work) -> Step:
    """AdamW(fused=True) made to clip: the attribute it unscales by is set to norm / max_norm, at least 1.

    Saves `clip_grad_norm_`'s pass that scales the gradients; the step itself still writes them back scaled.
    """
    if work.max_norm is None:
        raise ValueError("the grad_scale peer clips: it needs work.max_norm")
    optimizer = share_states(torch.optim.AdamW(params, **work.adamw, fused=True), params, work)

    def step() -> None:
        norm = get_total_norm([p.grad for p in params], foreach=work.norm_foreach)
        optimizer.grad_scale = torch.clamp((norm + 1e-6) / work.max_norm, min=1.0).float()
        optimizer.step()

    return step


def share_states(
    optimizer: torch.optim.Optimizer, params: Params, work: Work, steps_on: str | None = None
) -> torch.optim.Optimizer:
    """`optimizer` with the moments of `work.states` and step counts of its own, on the parameters' device."""
    if work.states is not None:
        for p, moments in zip(params, work.states, strict=True):
            named = zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moments, strict=False)
            optimizer.state[p] = {"step": torch.zeros((), device=steps_on or p.device), **dict(named)}
    return optimizer


@dataclass(frozen=True)
class Package:
    """An AdamW of another package, put behind `clip_grad_norm_`; its moments are its own.

    Args:
        module, optimizer: its class.
        states: the dtypes of moments it keeps: "param", those of its parameters; "float32"; "8-bit".
        cpu, cuda: options that may be its best there; of several the fastest is taken (`at_best`). None at all: it does
            not run there.
        one_pass_on: the devices where its step moves each array once, so that its bytes are known.
        compiles: "once" or "for every shape", seconds to a minute each time; None: never, or nothing to speak of.
        other_work: in what its step is another than AdamW's; None: in nothing.
    """

    module: str
    optimizer: str
    states: str = "param"
    cpu: tuple[dict, ...] = ()
    cuda: tuple[dict, ...] = ()
    one_pass_on: tuple[str, ...] = ()
    compiles: str | None = None
    other_work: str | None = None

    def settings(self, device: str) -> tuple[dict, ...]:
        return {"cpu": self.cpu, "cuda": self.cuda}[device]

    def build(self, params: Params, work: Work, **options) -> Step:
        cls = getattr(importlib.import_module(self.module), self.optimizer)
        return clip_then(cls(params, **work.adamw, **options).step, params, work)


EIGHT_BITS = "moments of 8 bits and a scale for every {}: {:.2f} bytes an element, where float32 takes 8"
PACKAGES = {
    "DeepSpeedCPUAdam": Package(
        "deepspeed.ops.adam",
        "DeepSpeedCPUAdam",
        cpu=({"adamw_mode": True, "fp32_optimizer_states": False},),
        one_pass_on=("cpu",),
        compiles="once",
    ),
    # On a CPU it has no kernel of its own: foreach or a loop, whichever is faster.
    "optimi": Package(
        "optimi",
        "AdamW",
        cpu=tuple({"triton": False, "foreach": foreach, "kahan_sum": False} for foreach in (True, False)),
        cuda=({"triton": True, "kahan_sum": False},),
        one_pass_on=("cuda",),
    ),
    # Its AdamW with moments that are not quantized: the same compiled function as its others.
    "torchao": Package(
        "torchao.optim", "_AdamW", cpu=({},), cuda=({},), one_pass_on=("cpu", "cuda"), compiles="for every shape"
    ),
    "flashoptim": Package(
        "flashoptim",
        "FlashAdamW",
        cpu=({"quantize": False, "master_weight_bits": None, "fused": False},),  # its kernels are Triton's
        cuda=({"quantize": False, "master_weight_bits": None, "fused": True},),
        one_pass_on=("cuda",),
    ),
    "bitsandbytes": Package(
        "bitsandbytes.optim",
        "AdamW",
        states="float32",
        cpu=({"optim_bits": 32},),
        cuda=({"optim_bits": 32},),
        one_pass_on=("cuda",),
    ),
    "apex": Package(
        "apex.optimizers", "FusedAdam", states="float32", cuda=({"adam_w_mode": True},), one_pass_on=("cuda",)
    ),
    "TransformerEngine": Package(
        "transformer_engine.pytorch.optimizers",
        "FusedAdam",
        states="float32",
        cuda=({"adam_w_mode": True},),
        one_pass_on=("cuda",),
    ),
    "torchao, 8-bit moments": Package(
        "torchao.optim",
        "AdamW8bit",
        states="8-bit",
        cpu=({},),
        cuda=({},),
        compiles="for every shape",
        other_work=EIGHT_BITS.format(256, 2 + 8 / 256),
    ),
    "bitsandbytes, 8-bit moments": Package(
        "bitsandbytes.optim",
        "AdamW8bit",
        states="8-bit",
        cpu=({},),
        cuda=({},),
        other_work=EIGHT_BITS.format(256, 2 + 8 / 256),
    ),
    "flashoptim, 8-bit moments": Package(
        "flashoptim",
        "FlashAdamW",
        states="8-bit",
        cuda=({"master_weight_bits": None},),
        other_work=EIGHT_BITS.format(32, 2 + 4 / 32),
    ),
}
LIGER = "Liger"  # a loss; benchmarks/gpu_peers.py builds it
GPU_ONLY = "runs on a GPU only"


@dataclass(frozen=True)
class Peer:
    """How a candidate is built, what it does to memory and what it comes from.

    Args:
        traffic, traffic_with_clip: keys of `harness.ARRAY_PASSES`, None where no closed count is claimed.
        only_with_clip: without a clip there is nothing to it.
        states: "any", or the only dtypes of moments it keeps: as `Package.states`.
        package: None for torch's and ours.
    """

    build: Callable[[Params, Work], Step]
    traffic: str | None = None
    traffic_with_clip: str | None = None
    only_with_clip: bool = False
    states: str = "any"
    package: Package | None = None

    @property
    def other_work(self) -> str | None:
        return self.package and self.package.other_work


def from_package(package: Package, device: str) -> Peer:
    """The package's optimizer as a candidate, under the first of its settings there."""
    known = device in package.one_pass_on
    return Peer(
        functools.partial(package.build, **next(iter(package.settings(device)), {})),
        "update" if known else None,
        "norm, scale, update" if known else None,
        states=package.states,
        package=package,
    )


PEERS = {
    "ours": Peer(ours, "update", "norm, update"),
    "torch fused": Peer(torch_fused, "update", "norm, scale, update", states="param"),
    "torch fused, grad_scale": Peer(
        torch_grad_scale, None, "norm, update writing g", only_with_clip=True, states="param"
    ),
    "torch foreach": Peer(torch_foreach, states="param"),  # an array pass for each arithmetic operation
    "torch for-loop": Peer(torch_for_loop, states="param"),
    **{name: from_package(package, "cpu") for name, package in PACKAGES.items()},
}


def fits(peer: Peer, dtype: torch.dtype, state_dtype: torch.dtype | None, max_norm: float | None) -> bool:
    """Whether a candidate does the work of a case at all, with moments of 8 bits where it has no others."""
    if peer.only_with_clip and max_norm is None:
        return False
    wanted = state_dtype or dtype
    return {"any": True, "8-bit": True, "param": wanted == dtype, "float32": wanted == torch.float32}[peer.states]


@functools.cache
def unavailable_reason(name: str, device: str = "cpu") -> str | None:
    """Why a package's optimizer cannot run on a device, or None. One that compiles does so now: seconds to a minute.

    Without the text of what is raised: compilers and loaders quote machine paths.
    """
    if (package := PACKAGES.get(name)) is None:
        return None
    if not package.settings(device):
        return GPU_ONLY if device == "cpu" else "runs on a CPU only"
    # A compilation looks for ninja on PATH, where an interpreter called by its path has put nothing.
    scripts = str(Path(sys.executable).parent)
    if package.compiles and scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]
    try:
        importlib.import_module(package.module)
    except Exception as error:  # an extension built for another torch fails in ways of its own
        return f"not importable ({type(error).__name__})"
    try:
        probe = torch.nn.Parameter(torch.ones(8, device=device))
        probe.grad = torch.ones_like(probe)
        package.build([probe], Work(), **package.settings(device)[0])()
    except Exception as error:
        return f"importable, but its step did not build or run ({type(error).__name__})"
    return None


MOST_SHAPES = 4


def too_many_shapes(name: str, shapes: list[tuple[int, ...]]) -> str | None:
    """Why a package that compiles a kernel for every shape is not waited for, or None."""
    package, different = PACKAGES.get(name), len(set(shapes))
    if package is None or package.compiles != "for every shape" or different <= MOST_SHAPES:
        return None
    return f"left out: compiles for every shape, and here are {different}"


def at_best(
    peer: Peer, device: str, make_params: Callable[[], Params], work: Work, rounds: int = 3, **how
) -> tuple[Peer, dict]:
    """The candidate under the fastest of its package's settings on these parameters, and that setting.

    `how`: as `alternate`'s.
    """
    settings = () if peer.package is None else peer.package.settings(device)
    if len(settings) < 2:
        return peer, next(iter(settings), {})
    builders = {str(options): functools.partial(peer.package.build, **options) for options in settings}
    steps = {name: build(make_params(), work) for name, build in builders.items()}
    measured = alternate(steps, rounds, warmup=1, baseline=next(iter(steps)), **how)
    best = min(settings, key=lambda options: measured.time(str(options)).p50)
    return replace(peer, build=builders[str(best)]), best


def faster_norm_foreach(params: Params, rounds: int = 5, **how) -> bool:
    """Whether `clip_grad_norm_` is faster with foreach=True on these gradients; all peers get the faster.

    `how`: as `alternate`'s, where the clock or the judge of a round is another.
    """
    settings = {
        str(foreach): functools.partial(clip_grad_norm_, params, 1.0, foreach=foreach) for foreach in (True, False)
    }
    measured = alternate(settings, rounds, baseline="True", **how)
    return measured.time("True").p50 <= measured.time("False").p50


# Norm of the difference from float64 over the norm of the update itself. float32 rounds p to 2^-24 of its
# size, bfloat16 to 2^-9, and an update of five steps is about a quarter of p here; torch's unfused bfloat16
# rounds every intermediate as well (seen: 0.11; fused: 0.03). torchao and flashoptim take beta^step in float32 (seen:
# 7e-6). A step without the decay deviates by 0.35, without the clip by 0.56, without the bias correction by 3.3.
SAME_WORK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.15}
# Seen: 0.009 in float32. A code of 8 bits is off by at most 2^-8 of its block's largest moment, more among small ones.
EIGHT_BIT_TOLERANCE = 0.02


def check_same_work(
    names: list[str],
    dtype: torch.dtype,
    max_norm: float | None,
    *,
    peers: Mapping[str, Peer] = PEERS,
    device: str = "cpu",
    state_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Runs five steps of every peer on a small case and compares with torch's loop in float64 on the CPU.

    Every other gradient is longer than `max_norm`, so clipping acts and does not act.

    Returns:
        name -> relative deviation of the total update.

    Raises:
        AssertionError: a peer deviates by more than `SAME_WORK_TOLERANCE`, or with moments of 8 bits by more than
            `EIGHT_BIT_TOLERANCE`: it does other work than it says, and no time of it counts.
    """
    work = Work(max_norm=max_norm, lr=1e-2, weight_decay=1.0, state_dtype=state_dtype)
    shapes = [(1000,), (37, 5), (1,), (64, 33), (64, 128)]  # the last is large enough for moments of 8 bits
    generator = torch.Generator().manual_seed(0)
    start = [(0.2 * torch.randn(s, generator=generator)).to(dtype) for s in shapes]
    scales = [0.01, 1.0, 0.02, 3.0, 0.005]
    grads = [[(scale * torch.randn(s, generator=generator)).to(dtype) for s in shapes] for scale in scales]

    def run(build: Callable[[Params, Work], Step], as_dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        params = [torch.nn.Parameter(p.to(device, as_dtype, copy=True)) for p in start]
        for p in params:
            p.grad = torch.zeros_like(p)
        step = build(params, work)
        for now in grads:
            for p, g in zip(params, now, strict=True):
                p.grad.copy_(g)
            step()
        return torch.cat([p.detach().cpu().double().flatten() for p in params])

    expected = run(torch_for_loop, torch.float64)
    update = expected - torch.cat([p.double().flatten() for p in start])
    deviations = {}
    for name in names:
        error = run(peers[name].build, dtype, device) - expected
        deviations[name] = float(error.norm() / update.norm())
        allowed = SAME_WORK_TOLERANCE[dtype]
        if peers[name].states == "8-bit":
            allowed = max(allowed, EIGHT_BIT_TOLERANCE)
        assert deviations[name] <= allowed, f"{name} does other work: off by {deviations[name]:.1e} > {allowed:.0e}"
    return deviations


def clip_then(step: Step, params: Params, work: Work) -> Step:
    if work.max_norm is None:
        return step

    def clip_and_step() -> None:
        clip_grad_norm_(params, work.max_norm, foreach=work.norm_foreach)
        step()

    return clip_and_step
