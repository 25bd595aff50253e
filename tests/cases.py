"""The step's test cases as data: shapes, dtypes, rules, tolerances."""

from __future__ import annotations

import math
import os
import re

import torch

import fused_clip_adam as fca
from fused_clip_adam import backends
from fused_clip_adam.backends import cuda

SHAPES = {
    "0-d": (),
    "empty": (0,),
    "empty 2-d": (3, 0, 2),
    "one": (1,),
    "three": (3,),
    "2^k - 1": (1023,),
    "2^k": (1024,),
    "2^k + 1": (1025,),
    "matrix": (33, 65),
    "two chunks": (65536 + 17,),
}

RULES = {
    "adamw": {},
    "clip": dict(grad_clip=0.7),
    "clip lagged": dict(grad_clip=fca.GlobalNorm(0.7, lag=True)),
    "clip per tensor": dict(grad_clip=fca.PerTensorNorm(0.7)),
    "zclip": dict(grad_clip=fca.ZClip(warmup=2, max_norm=0.7)),
    "autoclip": dict(grad_clip=fca.AutoClip(60.0, history=2)),
    "adagc": dict(grad_clip=fca.AdaGC(start=1, max_norm=20.0)),
    "align": dict(overshoot="align"),
    "align 7": dict(overshoot=fca.AlignedMomentum(block=7)),
    "align 4096": dict(overshoot=fca.AlignedMomentum(block=4096)),
    "align element": dict(overshoot="align-element"),
    "cautious": dict(overshoot="cautious"),
    "grams": dict(overshoot="grams"),
    "clamp": dict(overshoot=fca.UpdateClamp(0.6)),
    "atan2": dict(overshoot=fca.UpdateClamp(1.27 * math.pi / 2, mode="atan2")),
    "brake": dict(overshoot=fca.MomentumBrake(0.7, hold_v=0.3)),
    "brake damp": dict(overshoot=fca.MomentumBrake(0.7, mode="damp")),
    "three rules": dict(overshoot=("align", fca.MomentumBrake(0.7), fca.UpdateClamp(0.6))),
    "agc": dict(grad_clip=fca.AGC(0.05)),
    "spike": dict(grad_clip=(0.7, fca.SpikeClip(2.0, start=1))),
    "update rms": dict(grad_clip=(fca.PerTensorNorm(0.7), fca.UpdateRMS())),
    "metric": dict(grad_clip=fca.InducedMetric()),
    "spam": fca.presets.spam(3, 2, 2.0),
    "spam parity": fca.presets.spam(3, 2, 2.0, parity=True),
    "stable spam": fca.presets.stable_spam(3, total_steps=9),
    "stable spam parity": fca.presets.stable_spam(3, total_steps=9, parity=True),
    "align tensor": dict(overshoot="align-tensor"),
    "align tensor lagged": dict(overshoot=fca.AlignedMomentum("tensor", lag=True)),
    "cautious rescaled": dict(overshoot=fca.Cautious(rescale=True)),
    "median": dict(overshoot=(fca.MedianMomentum(0.1), "cautious")),
    # A large eps: right after a reset an L2 term alone is divided by its own size, so that rounding decides.
    "when clipped": dict(reset=fca.WhenClipped(0.5), overshoot="brake", eps=1e-4),
    "guards and gate": dict(grad_clip=fca.AGC(0.05), reset=fca.Periodic(2, 1), overshoot="align", maximize=True),
    "amsgrad reset": dict(amsgrad=True, reset=fca.Periodic(2, 0), overshoot=fca.UpdateClamp(0.6, mode="atan2")),
    "amsgrad": dict(amsgrad=True),
    "maximize": dict(maximize=True, grad_clip=0.7, overshoot="align"),
}

CLASSES = {"AdamW": (fca.FusedClipAdamW, torch.optim.AdamW), "Adam": (fca.FusedClipAdam, torch.optim.Adam)}

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def tolerance(dtype: torch.dtype, steps: int) -> float:
    """Largest error over the largest magnitude: at most 8 roundings of half an eps a step, in the storage type."""
    return 4 * steps * EPS[dtype]


def make_params(dtype: torch.dtype, seed: int = 0, shapes=SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes.values()]


def make_grads(params: list[torch.Tensor], steps: int, seed: int = 1) -> list[list[torch.Tensor]]:
    """Gradients of every step. Every third step of every second tensor is zero, as after a full clip."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for step in range(steps):
        now = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        if step % 3 == 2:
            now = [g if i % 2 else torch.zeros_like(g) for i, g in enumerate(now)]
        grads.append(now)
    return grads


def make_stats(step: int, device="cpu") -> fca.ClipStats:
    """Statistics with a suppressed fraction that differs from step to step."""
    buffer = torch.zeros(14, device=device)
    buffer[4], buffer[5] = (step * 0.37) % 1.0, 1.0
    return fca.ClipStats(buffer)


def run(cls, params, grads, *, observe: bool = True, device="cpu", **options):
    """Trains copies of `params`; returns the optimizer and its parameters."""
    own = [p.to(device, copy=True).requires_grad_() for p in params]
    opt = cls(own, lr=0.01, weight_decay=0.1, **options)
    for step, now in enumerate(grads):
        for p, g in zip(own, now):
            p.grad = g.to(device, p.dtype, copy=True)
        if observe:
            opt.observe(make_stats(step, device))
        opt.step()
    return opt, own


def results(opt, params) -> list[torch.Tensor]:
    """Everything a step writes, in a fixed order, on the CPU."""
    out = []
    for p in params:
        out.append(p.detach().cpu())
        # What a rule remembers of a parameter, "Rule_name", is as of the last state_dict().
        out += [value.cpu() for name, value in sorted(opt.state[p].items()) if name[0].islower()]
    return out


def largest_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest |got - expected| over the largest |expected| of the same tensor."""
    worst = 0.0
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert bool(x.isfinite().all()), "a result is not finite"
        if x.numel():
            worst = max(worst, float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-30)))
    return worst


def bitwise_equal(x: list[torch.Tensor], y: list[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes() for a, b in
               zip(map(_bytes, x), map(_bytes, y), strict=True))  # fmt: skip


def _bytes(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().contiguous()
    return x.reshape(-1).view(torch.uint8) if x.numel() else x.reshape(-1).to(torch.uint8)


def assert_rounded_once(got, expected, dtype):
    """One step from the same stored values: float32 arithmetic, rounded once on the way out."""
    # float16 stores v = g^2 / 1000 below its smallest normal number with an absolute error of half of 2^-24.
    floor = 2**-25 if dtype == torch.float16 else 0.0
    for x, y in zip(got, expected, strict=True):
        error = (x.double() - y.double()).abs()
        bound = y.double().abs() * torch.finfo(x.dtype).eps + y.double().abs().amax() * 4e-7 if y.numel() else error
        assert bool((error <= bound + floor).all()), (x, y)


def test_id(value) -> str:
    """str(value) without memory addresses, which differ between the workers of pytest-xdist."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


test_id.__test__ = False  # a name for pytest, not a test


def gpu_targets() -> dict[str, str]:
    """GPU backend -> device type of its tensors, for every one that can run in this process.

    On a GPU both run there. Without one (conftest.py) they take CPU tensors: the CUDA sources as C++, Triton's
    interpreter. Both are slow then.
    """
    on_gpu = torch.cuda.is_available()
    found = {name: device for name in ("cuda",) for device in cuda.devices() if device == "cpu" or on_gpu}
    if os.environ.get("TRITON_INTERPRET") == "1":
        found["triton"] = "cpu"
    elif on_gpu and not backends._unavailable("triton"):
        found["triton"] = "cuda"
    return found
