"""Clip-Cov and KL-Cov: the few tokens whose advantage and log-probability move together are held back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Inputs, Objective, between, clip_range, number, scalars


def covariance(inputs: Inputs, valid: Tensor) -> Tensor:
    """(A - mean A) (logp - mean logp) over the valid tokens, [rows, cols]; 0 elsewhere."""
    tokens = valid.sum(dtype=torch.float64).clamp(min=1.0)
    away = []
    for x in (inputs.advantages, inputs.logp.detach()):
        x = torch.where(valid, x, 0.0).to(inputs.dtype)
        away.append(x - (x.sum(dtype=torch.float64) / tokens).to(x))
    return torch.where(valid, away[0] * away[1], 0.0)


def first(key: Tensor, valid: Tensor, share: float) -> Tensor:
    """True for the max(1, int(share N)) tokens of the least key, N the number of valid tokens; on the device."""
    n = (share * valid.sum(dtype=torch.float64)).floor().clamp(min=1.0)
    most = min(max(1, int(share * key.numel())), key.numel())  # n is known to the device alone, but not above this
    order = key.reshape(-1).topk(most, largest=False).indices
    chosen = torch.zeros(key.numel(), dtype=torch.bool, device=key.device)
    return chosen.scatter_(0, order, torch.arange(most, device=key.device) < n).view_as(key)


@dataclass(frozen=True)
class ClipCov(Objective):
    """PPO with max(1, int(ratio N)) of the N tokens left out: a random choice of those whose covariance
    (A - mean A) (logp - mean logp) lies in (cov_low, cov_high) and that PPO does not clip already. A token left out has
    no loss and no gradient and counts in `suppressed_mass`.

    `generator=` (optional): a torch.Generator on the tensors' device, for a choice that can be repeated.

    Args:
        clip_low, clip_high: distances of the bounds from 1. ratio, cov_low, cov_high: see above. Defaults: verl's.

    Raises:
        ValueError: a number out of range.

    Source: Cui et al. 2025, "The entropy mechanism of reinforcement learning" (arXiv 2505.22617), as in
    verl.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    rule = rules.CLIP_COV
    accepts = ("generator",)

    def __post_init__(self) -> None:
        clip_range("ClipCov", self.clip_low, self.clip_high)
        between("ClipCov: ratio", self.ratio, 0.0, 1.0)
        if not number("ClipCov: cov_low", self.cov_low) < number("ClipCov: cov_high", self.cov_high):
            raise ValueError(f"ClipCov: cov_low must be below cov_high, got {self.cov_low!r} and {self.cov_high!r}")

    def scalars(self) -> tuple[float, ...]:
        return scalars(*clip_range("ClipCov", self.clip_low, self.clip_high))

    def prepare(self, inputs: Inputs) -> Inputs:
        valid = inputs.counted()
        cov, r, A = covariance(inputs, valid), inputs.ratio(valid), inputs.advantages
        low, high = clip_range("ClipCov", self.clip_low, self.clip_high)
        clipped = ((A > 0) & (r > high)) | ((A < 0) & (r < low))
        open_ = valid & (cov > self.cov_low) & (cov < self.cov_high) & ~clipped
        key = torch.rand(cov.shape, dtype=torch.float64, device=cov.device, generator=inputs.generator)
        chosen = open_ & first(torch.where(open_, key, 2.0), valid, self.ratio)
        return inputs.replace(aux=chosen.float())


@dataclass(frozen=True)
class KLCov(Objective):
    """loss = -A r without a clip; the max(1, int(ratio N)) of the N tokens with the largest covariance
    (A - mean A) (logp - mean logp) get + kappa |D|, and the gradient -A r + kappa sgn D.

    Args:
        ratio: share of the tokens. kappa: weight of |D|. Defaults: those of verl's function.

    Raises:
        ValueError: a number out of range.

    Source: Cui et al. 2025 (arXiv 2505.22617), as in verl.
    """

    ratio: float = 2e-4
    kappa: float = 1.0
    rule = rules.KL_COV

    def __post_init__(self) -> None:
        between("KLCov: ratio", self.ratio, 0.0, 1.0)
        between("KLCov: kappa", self.kappa, 0.0)

    def scalars(self) -> tuple[float, ...]:
        return scalars(a=self.kappa)

    def prepare(self, inputs: Inputs) -> Inputs:
        valid = inputs.counted()
        key = torch.where(valid, -covariance(inputs, valid), torch.inf)
        return inputs.replace(aux=(valid & first(key, valid, self.ratio)).float())
