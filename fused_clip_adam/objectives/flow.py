"""GRPO-Guard: the clip for flow-matching policies, whose log-ratio drifts with the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Inputs, Objective, clip_range, scalars


@dataclass(frozen=True)
class GRPOGuard(Objective):
    """PPO / dt with r = exp((D + b) s), s = sigma_t sqrt(dt), b = mean |mu - mu_old|^2 / (2 s^2): b takes the drift out
    of the log-ratio D of two Gaussians with the means mu and mu_old.

    With logp = -mean |x - mu|^2 / (2 s^2) the gradient with respect to mu is -A r s K (x - mu_old) / (s^2 n dt) over n
    dimensions; it flows through `logp` and `mu` by autograd. `dloss_dlogp` gives its part through logp.

    Needs `mu=`, `mu_old=`: logp's shape and any number of dimensions after it, over which the mean is taken;
    `sigma_t=`, `dt=`: positive numbers or tensors that broadcast to logp's shape. A reference KL is not offered: logp
    here is not the log-probability of a token. The gradient of a float16 logp can overflow
    to infinity, as in any autograd graph.

    Args:
        clip_low, clip_high: distances of the bounds from 1; small, and the field has no common default.

    Raises:
        ValueError: a bound out of range.

    Source: GRPO-Guard (arXiv 2510.22319).
    """

    clip_low: float
    clip_high: float
    rule = rules.PPO
    needs = ("mu", "mu_old", "sigma_t", "dt")

    def __post_init__(self) -> None:
        clip_range("GRPOGuard", self.clip_low, self.clip_high)

    def scalars(self) -> tuple[float, ...]:
        return scalars(*clip_range("GRPOGuard", self.clip_low, self.clip_high))

    def prepare(self, inputs: Inputs) -> Inputs:
        dtype = torch.promote_types(inputs.logp.dtype, torch.float32)
        mu, mu_old, sigma_t, dt = (inputs.flow[name].to(dtype) for name in self.needs)
        steps = (sigma_t.isfinite() & dt.isfinite() & (sigma_t > 0) & (dt > 0)).broadcast_to(inputs.logp.shape)
        each = (mu.isfinite() & mu_old.isfinite()).flatten(2).all(2)
        valid = inputs.counted() & steps & each
        # What is left out is 1 or 0 before any arithmetic, so that no NaN enters the graph.
        sigma_t, dt = (torch.where(valid, x, 1.0) for x in (sigma_t, dt))
        logp, old_logp = (torch.where(valid, x.to(dtype), 0.0) for x in (inputs.logp, inputs.old_logp))
        move = torch.where(valid.unsqueeze(2), mu.flatten(2), 0.0) - torch.where(
            valid.unsqueeze(2), mu_old.flatten(2), 0.0
        )
        s = sigma_t * dt.sqrt()
        shifted = (logp - old_logp + move.square().mean(2) / (2 * s * s)) * s
        weights = 1.0 / dt if inputs.weights is None else inputs.weights.to(dtype) / dt
        if inputs.weights is not None:  # a quotient that overflows is no reason to leave the token out
            weights = torch.where(inputs.weights.isfinite(), rules.saturate(weights), weights)
        return inputs.replace(
            logp=torch.where(valid, shifted, torch.nan),
            old_logp=torch.zeros_like(logp),
            weights=weights,
            slope=s,
        )
