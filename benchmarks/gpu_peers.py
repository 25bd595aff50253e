"""The candidates on a GPU: ours by backend, torch's by peers.py, and whatever other package can be imported.

A builder is that of peers.py: parameters whose `.grad` is set and a `Work` -> a callable that does one step.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.peers import (
    Params,
    Step,
    Work,
    clip_then,
    ours,
    share_states,
    torch_foreach,
    torch_fused,
    torch_grad_scale,
)

CUDA, TRITON = "ours, cuda", "ours, triton"
FUSED, TRICK, FOREACH = "torch fused", "torch fused, grad_scale", "torch foreach"
MASTERS = "torch fused, float32 copies"


def torch_fused_masters(params: Params, work: Work) -> Step:
    """What bfloat16 parameters with float32 moments take with torch: gradients copied to float32, AdamW(fused) on
    float32 copies of the parameters, those copied back. The copies keep what bfloat16 drops, for 8 bytes an element.
    """
    masters: Params = []
    steps: list[Step] = []

    def make() -> None:  # from the parameters of the first step, which may be filled after this builder ran
        masters.extend(torch.nn.Parameter(p.detach().float()) for p in params)
        for p in masters:
            p.grad = torch.empty_like(p)
        steps.append(share_states(torch.optim.AdamW(masters, **work.adamw, fused=True), masters, work).step)

    @torch.no_grad()
    def step() -> None:
        if not steps:
            make()
        torch._foreach_copy_([p.grad for p in masters], [p.grad for p in params])
        steps[0]()
        torch._foreach_copy_(list(params), masters)

    return clip_then(step, params, work)


def _package(module: str, name: str, options: dict) -> Callable[[Params, Work], Step]:
    """A builder for a package's optimizer class, behind `clip_grad_norm_`; its moments are its own."""

    def build(params: Params, work: Work) -> Step:
        cls = getattr(importlib.import_module(module), name)
        return clip_then(cls(params, **work.adamw, **options).step, params, work)

    return build


@dataclass(frozen=True)
class GpuPeer:
    """A builder and what it does to memory.

    Args:
        passes: a key of `EXTRA_GRAD_PASSES`, with and without clip; None where no closed count is claimed.
        states: "any", or the only dtypes of moments it keeps: "float32" or "param".
        needs: the package it comes from.
    """

    build: Callable[[Params, Work], Step]
    passes: str | None = None
    passes_with_clip: str | None = None
    only_with_clip: bool = False
    states: str = "any"
    needs: str | None = None


def _other(package: str, module: str, name: str, states: str, **options) -> GpuPeer:
    build = _package(module, name, options)
    return GpuPeer(build, "update", "norm, scale, update", states=states, needs=package)


PEERS = {
    CUDA: GpuPeer(functools.partial(ours, backend="cuda"), "update", "norm, update"),
    TRITON: GpuPeer(functools.partial(ours, backend="triton"), "update", "norm, update"),
    FUSED: GpuPeer(torch_fused, "update", "norm, scale, update", states="param"),
    TRICK: GpuPeer(torch_grad_scale, None, "norm, update writing g", only_with_clip=True, states="param"),
    FOREACH: GpuPeer(torch_foreach, states="param"),  # an array pass for each arithmetic operation
    MASTERS: GpuPeer(torch_fused_masters, states="float32"),
    "bitsandbytes": _other("bitsandbytes", "bitsandbytes.optim", "AdamW", "float32", optim_bits=32),
    "apex": _other("apex", "apex.optimizers", "FusedAdam", "float32", adam_w_mode=True),
    "TransformerEngine": _other(
        "transformer_engine", "transformer_engine.pytorch.optimizers", "FusedAdam", "float32", adam_w_mode=True
    ),
    "optimi": _other("optimi", "optimi", "AdamW", "param", triton=True, kahan_sum=False),
}
OURS = {CUDA: "cuda", TRITON: "triton"}

# Reads plus writes of the gradient beyond the update's one read.
EXTRA_GRAD_PASSES = {"update": 0, "norm, update": 1, "norm, update writing g": 2, "norm, scale, update": 3}


def moved_bytes(
    passes: str, elements: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype, moments: int = 2
) -> int:
    """Bytes of a step: p read and written, every moment read and written, g read and what `passes` adds.

    float32: 28 an element for "update", 32 for "norm, update", 36 for "norm, update writing g", 40 for
    "norm, scale, update", as `harness.bytes_per_element`; 8 more with amsgrad's third moment.
    """
    grads = 1 + EXTRA_GRAD_PASSES[passes]
    return elements * (2 * param.itemsize + grads * grad.itemsize + 2 * moments * state.itemsize)


@functools.cache
def unavailable_reason(name: str, device: str) -> str | None:
    """Why a candidate cannot run on a device, or None. Short: sentences of other packages quote machine paths."""
    if (backend := OURS.get(name)) is not None:
        from fused_clip_adam import backends

        try:
            backends.check_name(backend)
            backends.choose_step(backend, device)
        except Exception as error:
            return str(error)
        return None
    package = PEERS[name].needs
    if package is None:
        return None
    if device != "cuda":
        return "runs on a GPU only"
    try:
        importlib.import_module(package)
    except Exception as error:  # an extension built for another torch fails in ways of its own
        return f"not importable ({type(error).__name__})"
    return None


def fits(name: str, dtype: torch.dtype, state_dtype: torch.dtype | None, max_norm: float | None) -> bool:
    """Whether a candidate does the work of a case at all."""
    peer = PEERS[name]
    if peer.only_with_clip and max_norm is None:
        return False
    if name == MASTERS:
        return dtype != torch.float32 and state_dtype == torch.float32
    if peer.states == "param":
        return state_dtype in (None, dtype)
    return peer.states == "any" or (state_dtype or dtype) == torch.float32


# ---------------------------------------------------------------- our rules


def rules() -> dict[str, dict]:
    """Every rule by name: options of FusedClipAdamW; "plain" is what the others are compared with."""
    import fused_clip_adam as fca

    return {
        "plain": {},
        "align": {"overshoot": fca.AlignedMomentum()},
        "align element": {"overshoot": fca.AlignedMomentum(block="element")},
        "cautious": {"overshoot": fca.Cautious()},
        "brake": {"overshoot": fca.MomentumBrake()},
        "lagged clip": {"grad_clip": fca.GlobalNorm(1.0, lag=True)},
        "amsgrad": {"amsgrad": True},
    }


def build_rule(params: Params, work: Work, backend: str, options: dict) -> Step:
    """A step under a rule. The brake is told, each time, what an objective clipped: without, it does nothing."""
    import fused_clip_adam as fca

    if not options.get("amsgrad"):
        work = replace(work, states=[moments[:2] for moments in work.states])
    optimizer = fca.FusedClipAdamW(params, **work.adamw, backend=backend, **options)
    share_states(optimizer, params, work)
    if not isinstance(options.get("overshoot"), fca.MomentumBrake):
        return optimizer.step
    device = params[0].device
    logp = torch.linspace(-2.0, -0.5, 64, device=device).reshape(4, 16)
    stats = fca.clip_stats(logp, logp.flip(1), torch.ones(4, device=device), backend="reference")

    def step() -> None:
        optimizer.observe(stats)
        optimizer.step()

    return step
