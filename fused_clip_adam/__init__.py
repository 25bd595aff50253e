"""fused_clip_adam: PPO-ratio clipping, AdamW and overshoot corrections, fused into single passes over memory."""

from fused_clip_adam import theory
from fused_clip_adam._version import __version__
from fused_clip_adam.objectives import CISPO, GSPO, PPO, ClipStats, clip_stats, dloss_dlogp, policy_loss
from fused_clip_adam.optimizer import FusedClipAdam, FusedClipAdamW
from fused_clip_adam.rules import AlignedMomentum, Cautious, GlobalNorm, MomentumBrake, OnRollout

__all__ = [
    "CISPO",
    "GSPO",
    "PPO",
    "AlignedMomentum",
    "Cautious",
    "ClipStats",
    "FusedClipAdam",
    "FusedClipAdamW",
    "GlobalNorm",
    "MomentumBrake",
    "OnRollout",
    "__version__",
    "clip_stats",
    "dloss_dlogp",
    "policy_loss",
    "theory",
]
