"""Published methods as keyword arguments of FusedClipAdamW: `FusedClipAdamW(params, **presets.spam())`.

Where the published code has a known fault, `parity=True` gives the method as published and the default is free of it.
What is not named here (`lr`, `weight_decay`, and `betas` and `eps` unless listed) stays yours; keywords of a preset can
be changed before they are passed on.
"""

from __future__ import annotations

import math
from typing import Any

from fused_clip_adam.rules import (
    AGC,
    AdaGC,
    AutoClip,
    Cautious,
    OnRollout,
    Periodic,
    PerTensorNorm,
    SpikeClip,
    StableSpamClip,
    UpdateClamp,
    UpdateRMS,
    ZClip,
)

__all__ = [
    "adagc",
    "adam_atan2",
    "adam_rel",
    "agc",
    "autoclip",
    "cautious",
    "componentwise_clip",
    "spam",
    "stable_adamw",
    "stable_spam",
    "zclip",
]


def spam(every: int = 500, warmup: int = 150, theta: float = 5000.0, *, parity: bool = False) -> dict[str, Any]:
    """SPAM: spikes clipped, moments reset every `every` steps, `warmup` steps to grow back (arXiv 2501.06842).

    Args:
        every, warmup: in steps. theta: of the spike clip.
        parity: as published: the step count is not reset, so that updates peak at 1.87 lr some 138 steps after the
            first reset, higher after later ones, and an element whose second moment is 0 (no gradient since the reset)
            is frozen until the next. The default resets the count too and clips only where the second moment is not 0.

    eps is added before bias correction, weight decay follows the update; betas (0.9, 0.999), eps 1e-6.
    """
    return {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "grad_clip": SpikeClip(theta=theta, freeze_zero=parity),
        "reset": Periodic(every=every, warmup=warmup, counters=not parity),
        "eps_before_correction": True,
        "decay_after_update": True,
    }


def stable_spam(every: int = 1000, total_steps: int | None = None, *, parity: bool = False) -> dict[str, Any]:
    """Stable-SPAM: AdaClip and AdaGN for every tensor, moments reset every `every` steps (arXiv 2502.17055).

    Args:
        every: in steps. total_steps: over which gamma1 and beta1 fall to half, None: they stay.
        parity: as published: the step that resets still updates with the old moments, and the averages of AdaClip and
            AdaGN share the optimizer's step count, so that a spike right after a reset passes almost whole. The default
            resets before the update, and each average has a count of its own.
    """
    return {
        "grad_clip": StableSpamClip(total_steps=total_steps, shared_counter=parity),
        "reset": Periodic(every=every, warmup=0, late=parity),
    }


def stable_adamw() -> dict[str, Any]:
    """StableAdamW: the learning rate of a tensor is divided by max(1, RMS of its update) (arXiv 2304.13013).

    betas (0.9, 0.99), eps 1e-6.
    """
    return {"betas": (0.9, 0.99), "eps": 1e-6, "grad_clip": UpdateRMS()}


def zclip(**options: Any) -> dict[str, Any]:
    """ZClip: the global norm clipped by its z-score (arXiv 2504.02507). `options`: of `ZClip`."""
    return {"grad_clip": ZClip(**options)}


def adagc(**options: Any) -> dict[str, Any]:
    """AdaGC: a tensor's norm clipped at a multiple of its moving average (arXiv 2502.11034). `options`: of `AdaGC`."""
    return {"grad_clip": AdaGC(**options)}


def autoclip(percentile: float = 10.0, history: int | None = None) -> dict[str, Any]:
    """AutoClip: the global norm clipped at a percentile of those seen (arXiv 2007.14469)."""
    return {"grad_clip": AutoClip(percentile, history)}


def agc(clipping: float = 0.01, eps: float = 1e-3) -> dict[str, Any]:
    """Adaptive gradient clipping by output row (arXiv 2102.06171)."""
    return {"grad_clip": AGC(clipping, eps)}


def cautious(*, parity: bool = False) -> dict[str, Any]:
    """C-AdamW (arXiv 2411.16085).

    Args:
        parity: as published: the mask is divided by its mean, which multiplies the step by up to 1,000 where few
            gradients agree. The default does not rescale.
    """
    return {"overshoot": Cautious(rescale=parity)}


def adam_rel() -> dict[str, Any]:
    """Adam-Rel: local time, the step count restarts at every `opt.new_rollout()` (arXiv 2412.17113)."""
    return {"reset": OnRollout(moments=False, counters=True)}


def adam_atan2() -> dict[str, Any]:
    """Adam-atan2 with the published 1.27: no eps, no change where all gradients are scaled (arXiv 2407.05872)."""
    return {"overshoot": UpdateClamp(1.27 * math.pi / 2, mode="atan2")}


def componentwise_clip(max_norm: float = 1.0) -> dict[str, Any]:
    """Every tensor's gradient clipped to a norm of its own."""
    return {"grad_clip": PerTensorNorm(max_norm)}
