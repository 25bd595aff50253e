"""Ratio-clip objectives: what a token's loss is, and the statistics of what was clipped."""

from fused_clip_adam.objectives.advantages import SmoothedAdvantage, group_advantages, top_variance_groups
from fused_clip_adam.objectives.aspo import ASPO
from fused_clip_adam.objectives.bapo import BAPO
from fused_clip_adam.objectives.cispo import CISPO
from fused_clip_adam.objectives.covariance import ClipCov, KLCov
from fused_clip_adam.objectives.dcpo import DCPO
from fused_clip_adam.objectives.dppo import DPPOKL, DPPOTV
from fused_clip_adam.objectives.flow import GRPOGuard
from fused_clip_adam.objectives.gmpo import GMPO
from fused_clip_adam.objectives.gpg import DRO, GPG
from fused_clip_adam.objectives.gppo import AEPO, CEGPPO, GPPO
from fused_clip_adam.objectives.gspo import GSPO, LUSPO
from fused_clip_adam.objectives.logits import logp_from_logits, policy_loss_from_logits
from fused_clip_adam.objectives.losses import clip_stats, dloss_dlogp, policy_loss
from fused_clip_adam.objectives.objective import Objective
from fused_clip_adam.objectives.ppo import PPO, PPOEWMA
from fused_clip_adam.objectives.rollout import RolloutStats, rollout_weights
from fused_clip_adam.objectives.sapo import SAPO
from fused_clip_adam.objectives.stats import ClipStats
from fused_clip_adam.objectives.vespo import VESPO

__all__ = [
    "AEPO",
    "ASPO",
    "BAPO",
    "CEGPPO",
    "CISPO",
    "DCPO",
    "DPPOKL",
    "DPPOTV",
    "DRO",
    "GMPO",
    "GPG",
    "GPPO",
    "GSPO",
    "LUSPO",
    "PPO",
    "PPOEWMA",
    "SAPO",
    "VESPO",
    "ClipCov",
    "ClipStats",
    "GRPOGuard",
    "KLCov",
    "Objective",
    "RolloutStats",
    "SmoothedAdvantage",
    "clip_stats",
    "dloss_dlogp",
    "group_advantages",
    "logp_from_logits",
    "policy_loss",
    "policy_loss_from_logits",
    "rollout_weights",
    "top_variance_groups",
]
