"""Importance weights between the policy that was trained from and the engine that sampled the tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_clip_adam.backends.reference_objective import MAX_LOG_RATIO, saturate
from fused_clip_adam.objectives.groups import Groups, arithmetic, check_ids
from fused_clip_adam.objectives.losses import check_mask, check_tensor
from fused_clip_adam.objectives.objective import number
from fused_clip_adam.objectives.stats import DeviceStats

MODES = ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask")


class RolloutStats(DeviceStats):
    """Statistics of one or several calls of `rollout_weights`; each name of `fields` is a 0-d view of the buffer.

    D = logp - rollout_logp, r the ratio that the bounds test (the sequence's in the sequence modes, at each of its
    tokens), w the weight, over unmasked tokens:

    - `tokens`; `nonfinite`: those of them whose D is not finite.
    - `clipped_low`, `clipped_high`: r below `low`, above `high`: truncated or masked.
    - `weight_sum`, `weight_sq_sum`: of w; mean weight = weight_sum / tokens, effective sample size
      = weight_sum^2 / weight_sq_sum.
    - `ratio_min`, `ratio_max`: of r, before the bounds. With no token float32's largest number and 0.
    - `kl_k1` = sum -D, `kl_k3` = sum exp(D) - 1 - D over tokens of finite D: estimates of KL(rollout, logp), the
      mismatch of the two, times (tokens - nonfinite).

    Counts are float32: exact up to 2^24 tokens, values saturate at float32's largest number and are never NaN.

    Args:
        buffer: float32 [10] in the order of `fields`.

    Raises:
        ValueError: another shape or dtype.
    """

    __slots__ = ()
    fields = (
        "tokens",
        "clipped_low",
        "clipped_high",
        "weight_sum",
        "weight_sq_sum",
        "ratio_min",
        "ratio_max",
        "kl_k1",
        "kl_k3",
        "nonfinite",
    )


@torch.no_grad()
def rollout_weights(
    logp: Tensor,
    rollout_logp: Tensor,
    *,
    mask: Tensor | None = None,
    mode: str = "token-truncate",
    low: float | None = None,
    high: float | None = 2.0,
    sequence_ids: Tensor | None = None,
) -> tuple[Tensor, RolloutStats]:
    """Weights that correct for an inference engine whose probabilities differ from the trainer's: `weights` of
    `policy_loss`.

    logp - rollout_logp -> D -> (sum over the sequence) -> r = exp(clip(., -20, 20)) -> bounds -> w

    Args:
        logp: [B, T] or packed [N]; log-probabilities of the sampled tokens as the trainer computes them for the policy
            that sampled (`old_logp` of `policy_loss`); float64, float32, bfloat16 or float16, arithmetic in float64.
        rollout_logp: like `logp`; as the engine that sampled reported them. NaN: not reported.
        mask: like `logp`; nonzero tokens count. Masked tokens are never read into arithmetic.
        mode: "token-truncate": w = clip(r, low, high); "token-mask": w = r within [low, high], else 0 (IcePop);
            "sequence-truncate", "sequence-mask": the same with a sequence's product of ratios as r of all its tokens.
        low, high: bounds of the ratio itself, inclusive; None for none, which leaves r's own [e^-20, e^20].
        sequence_ids: int64 or int32 [N] beside packed input, needed in the sequence modes: equal ids, one sequence.

    Returns:
        (weights, stats): weights like `logp` in float32 (float64 for float64 `logp`), and a `RolloutStats`. Nothing is
        read by the host.

    Defaults elsewhere: verl "token-truncate" and 2, TRL "sequence-mask" and 3 (as "sequence_mask").

    A token whose D is NaN counts as D = 0 and is counted in `stats.nonfinite`; an infinite D as beyond any bound.
    Masked tokens get 0: `policy_loss` does not read them where it is given the same mask, and without one they add
    nothing to its policy term (to its count of tokens they would).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, or an unknown mode.

    Source: truncated weights: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; masked ones: Zhao et al. 2025, IcePop ("Small leak can sink a great ship").
    """
    check_tensor("logp", logp)
    check_tensor("rollout_logp", rollout_logp, logp)
    if logp.dim() not in (1, 2):
        raise ValueError(f"logp must be [B, T] or packed [N], got shape {list(logp.shape)}")
    if rollout_logp.shape != logp.shape:
        raise ValueError(f"rollout_logp must have logp's shape {list(logp.shape)}, got {list(rollout_logp.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; accepted: {', '.join(MODES)}")
    least = 0.0 if low is None else number("low", low)
    most = math.inf if high is None else number("high", high)
    if not 0.0 <= least < math.inf:
        raise ValueError(f"low must be None or at least 0 and finite, got {low!r}")
    if not (most > 0.0 and most >= least):
        raise ValueError(f"high must be None or positive and at least low = {least!r}, got {high!r}")
    if mask is not None:
        check_mask(mask, logp)
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask != 0
    groups = _sequences(logp, sequence_ids, mode)

    D = torch.where(mask, logp.double() - rollout_logp.double(), 0.0)
    finite = D.isfinite()
    D = saturate(D.nan_to_num(nan=0.0))  # infinite log-ratios are summed as 2^960
    log_ratio = D if groups is None else groups.spread(groups.reduce(D.reshape(-1), "sum")).reshape(D.shape)
    r = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    below, above = mask & (r < least), mask & (r > most)
    w = r.clamp(least, most) if mode.endswith("truncate") else torch.where(below | above, 0.0, r)
    w = torch.where(mask, w, 0.0).to(arithmetic(logp))

    counted = torch.where(finite, D, 0.0)  # expm1 keeps k3's digits near 0, float64 those of the difference
    k3 = counted.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1() - counted
    largest = torch.finfo(torch.float32).max
    r_min, r_max = torch.where(mask, r, largest), torch.where(mask, r, 0.0)
    sums = (mask, below, above, w, w.double().square(), r_min, r_max, -counted, k3, ~finite)
    values = {name: x.sum(dtype=torch.float64) for name, x in zip(RolloutStats.fields, sums)}
    if r.numel():
        values["ratio_min"], values["ratio_max"] = r_min.amin(), r_max.amax()
    else:
        values["ratio_min"] = values["ratio_min"] + largest
    return w, RolloutStats(torch.stack(list(values.values())).clamp(-largest, largest).float())


def _sequences(logp: Tensor, sequence_ids: Tensor | None, mode: str) -> Groups | None:
    """The sequences, where the mode asks for them."""
    if logp.dim() == 2 and sequence_ids is not None:
        raise ValueError("sequence_ids goes with packed [N] input; [B, T] input has one sequence per row")
    if sequence_ids is not None:
        sequence_ids = check_ids("sequence_ids", sequence_ids, logp)
    if mode.startswith("token"):
        return None
    if logp.dim() == 1 and sequence_ids is None:
        raise ValueError(f'packed input with mode="{mode}" needs sequence_ids')
    size = logp.shape[1] if logp.dim() == 2 else 0
    return Groups(logp.numel(), size=size, ids=sequence_ids, device=logp.device)
