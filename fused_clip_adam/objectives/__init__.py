"""Ratio-clip objectives: what a token's loss is, and the statistics of what was clipped."""

from fused_clip_adam.objectives.cispo import CISPO
from fused_clip_adam.objectives.gspo import GSPO
from fused_clip_adam.objectives.losses import clip_stats, dloss_dlogp, policy_loss
from fused_clip_adam.objectives.objective import Objective
from fused_clip_adam.objectives.ppo import PPO
from fused_clip_adam.objectives.stats import ClipStats

__all__ = ["CISPO", "GSPO", "PPO", "ClipStats", "Objective", "clip_stats", "dloss_dlogp", "policy_loss"]
