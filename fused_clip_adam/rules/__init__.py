"""Rules: small frozen dataclasses that say what a step should do; a rule knows its scalars, not how a kernel runs."""

from fused_clip_adam.rules.grad_clip import AdaGC, AutoClip, GlobalNorm, GradClip, PerTensorNorm, ZClip, as_grad_clip
from fused_clip_adam.rules.overshoot import (
    AlignedMomentum,
    Cautious,
    Grams,
    MomentumBrake,
    Overshoot,
    UpdateClamp,
    as_overshoot,
    overshoot_rules,
)
from fused_clip_adam.rules.plain import from_plain, to_plain
from fused_clip_adam.rules.reset import OnRollout, Reset, as_reset

__all__ = [
    "AdaGC",
    "AlignedMomentum",
    "AutoClip",
    "Cautious",
    "GlobalNorm",
    "GradClip",
    "Grams",
    "MomentumBrake",
    "OnRollout",
    "Overshoot",
    "PerTensorNorm",
    "Reset",
    "UpdateClamp",
    "ZClip",
    "as_grad_clip",
    "as_overshoot",
    "as_reset",
    "from_plain",
    "overshoot_rules",
    "to_plain",
]
