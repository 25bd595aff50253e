"""Rules: small frozen dataclasses that say what a step should do; a rule knows its scalars, not how a kernel runs."""

from fused_clip_adam.rules.grad_clip import (
    AGC,
    AdaGC,
    AutoClip,
    GlobalNorm,
    GradClip,
    InducedMetric,
    PerTensorNorm,
    SpikeClip,
    StableSpamClip,
    UpdateRMS,
    ZClip,
    as_grad_clip,
    grad_clip_rules,
)
from fused_clip_adam.rules.overshoot import (
    AlignedMomentum,
    Cautious,
    Grams,
    MedianMomentum,
    MomentumBrake,
    Overshoot,
    UpdateClamp,
    as_overshoot,
    overshoot_rules,
)
from fused_clip_adam.rules.plain import from_plain, to_plain
from fused_clip_adam.rules.reset import OnRollout, Periodic, Reset, WhenClipped, as_reset
from fused_clip_adam.rules.rule import Rule

__all__ = [
    "AGC",
    "AdaGC",
    "AlignedMomentum",
    "AutoClip",
    "Cautious",
    "GlobalNorm",
    "GradClip",
    "Grams",
    "InducedMetric",
    "MedianMomentum",
    "MomentumBrake",
    "OnRollout",
    "Overshoot",
    "Periodic",
    "PerTensorNorm",
    "Reset",
    "Rule",
    "SpikeClip",
    "StableSpamClip",
    "UpdateClamp",
    "UpdateRMS",
    "WhenClipped",
    "ZClip",
    "as_grad_clip",
    "as_overshoot",
    "as_reset",
    "from_plain",
    "grad_clip_rules",
    "overshoot_rules",
    "to_plain",
]
