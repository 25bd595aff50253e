"""VESPO: a smooth weight from the whole sequence's importance ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Inputs, Objective, at_least_zero, between, scalars


@dataclass(frozen=True)
class VESPO(Objective):
    """loss = -stop_gradient(phi) A logp; the gradient is -phi A. phi = e^lambda W^k e^(-lambda W), which is 1 at W = 1;
    ln W = the sum over the sequence of clip(logp - old_logp, -20, 20) + ln(weights), within [ln 1e-8, 20].

    `weights` are the rollout's importance weights per token (`rollout_weights` in a token mode): they enter W, each
    within [1e-8, e^20], and do not multiply the loss. Weights per sequence are refused, as by TRL: W is their product.
    Needs [B, T] input, or packed input with `sequence_ids`.

    Args:
        k_pos, lambda_pos: where A >= 0. k_neg, lambda_neg: where A < 0. Defaults: TRL's.

    Raises:
        ValueError: a k negative, a lambda not positive.

    Source: VESPO (arXiv 2602.10693), as in TRL.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    rule = rules.VESPO
    weighs_by_sequence = True
    weights_per_token = True

    def __post_init__(self) -> None:
        for name in ("k_pos", "k_neg"):
            at_least_zero(f"VESPO: {name}", getattr(self, name))
        for name in ("lambda_pos", "lambda_neg"):
            between(f"VESPO: {name}", getattr(self, name), 0.0)

    def scalars(self) -> tuple[float, ...]:
        return scalars(a=self.k_pos, b=self.lambda_pos, c=self.k_neg, d=self.lambda_neg)

    def prepare(self, inputs: Inputs) -> Inputs:
        if inputs.weights is None:
            return inputs
        exact = inputs.weights.to(torch.float64 if inputs.logp.dtype == torch.float64 else torch.float32)
        log_weights = exact.log().clamp(math.log(1e-8), rules.MAX_LOG_RATIO)
        return inputs.replace(aux=torch.where(exact.isfinite(), log_weights, torch.nan), weights=None)
