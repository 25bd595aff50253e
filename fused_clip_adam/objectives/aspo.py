"""ASPO: gains are weighted by the inverse ratio, and tokens of high entropy have a wider clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Inputs, Objective, between, clip_range, dual_bound, scalars


@dataclass(frozen=True)
class ASPO(Objective):
    """With e = clip on low-entropy tokens (entropy at most the sequence's `quantile`), else clip_high_entropy:
    A >= 0: the gradient is -A min(1 / r, dual_clip), 0 where r > 1 + e; the loss -A / min(r, 1 + e), or -dual_clip A
    logp where 1 / r > dual_clip. A < 0: -A min(r, dual_clip), 0 where r < 1 - e; the loss -A max(r, 1 - e), or
    -dual_clip A logp where r > dual_clip.

    Needs `entropy=`: like logp; `policy_loss_from_logits` supplies its own. Needs [B, T] input, or packed input with
    `sequence_ids`.

    Args:
        clip, clip_high_entropy: distances of the bounds from 1. dual_clip: c > 1. quantile: share of a sequence's
            tokens that count as low-entropy (linear interpolation). Defaults: the official code's (whose variable named
            for the high-entropy tokens is true for the low ones).

    Raises:
        ValueError: a bound out of range.

    Source: ASPO (arXiv 2510.06062) and the code of Archer2.0.
    """

    clip: float = 0.2
    clip_high_entropy: float = 0.4
    dual_clip: float = 3.0
    quantile: float = 0.8
    rule = rules.ASPO
    needs = ("entropy",)
    by_sequence = True

    def __post_init__(self) -> None:
        for name in ("clip", "clip_high_entropy"):
            clip_range(f"ASPO: {name}", getattr(self, name), getattr(self, name))
        dual_bound("ASPO", self.dual_clip)
        if not between("ASPO: quantile", self.quantile, -1.0, 1.0) >= 0.0:
            raise ValueError(f"ASPO: quantile must be in [0, 1], got {self.quantile!r}")

    def scalars(self) -> tuple[float, ...]:
        return scalars(dual=self.dual_clip, a=self.clip, b=self.clip_high_entropy)

    def prepare(self, inputs: Inputs) -> Inputs:
        valid = inputs.counted()
        limit = sequence_quantile(inputs.entropy, valid, inputs, self.quantile)
        low = (inputs.entropy <= limit).float()
        return inputs.replace(aux=torch.where(inputs.entropy.isfinite(), low, torch.nan))


def sequence_quantile(x: Tensor, valid: Tensor, inputs: Inputs, q: float) -> Tensor:
    """The q-quantile of the valid x of each token's sequence, [rows, cols] or [rows, 1]; NaN where it has none."""
    x = torch.where(valid, x.to(inputs.dtype), torch.inf)
    if inputs.sequences.ids is None:
        ordered = x.sort(1).values
        position = q * (valid.sum(1, keepdim=True).double() - 1)
        start = torch.zeros_like(position)
        ends = ordered
    else:
        ids, order, offsets = inputs.sequences.ids, inputs.sequences.order, inputs.sequences.offsets
        by_value = x[0].argsort(stable=True)
        ends = x[0][by_value[ids[by_value].argsort(stable=True)]].unsqueeze(0)
        sums = torch.cat([torch.zeros(1, dtype=torch.long, device=x.device), valid[0][order].long().cumsum(0)])
        length = sums[offsets[1:]] - sums[offsets[:-1]]
        position, start = q * (length[ids].double().unsqueeze(0) - 1), offsets[ids].double().unsqueeze(0)
    last = max(x.shape[1] - 1, 0)
    below = position.clamp(min=0).floor()
    if x.numel() == 0:
        return x
    at = [(start + k).long().clamp(max=last) for k in (below, position.clamp(min=0).ceil())]
    low, high = (ends.gather(1, k) for k in at)
    between = torch.where(high.isfinite(), low + (high - low) * (position - below).to(low), low)
    return torch.where(position < 0, torch.nan, between)
