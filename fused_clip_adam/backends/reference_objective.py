"""The ratio-clip objectives as equations, in plain torch. Same names as csrc/objective_math.h.

D = logp - old_logp, r = exp(D), A the advantage, a the aggregation weight, w the rollout weight.
A token's loss is l, g = dl / dlogp; the gradient of the whole is a w g (plus the KL term's a kl_coef dk).
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
SATURATION = {torch.float32: 2.0**127, torch.float64: 2.0**960}
TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM, CONSTANT = 0, 1, 2, 3
K1, K2, K3, K3_PLUS = 1, 2, 3, 4


def ratio(D: Tensor) -> Tensor:
    return D.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def saturate(x: Tensor, shrink: float = 1.0) -> Tensor:
    """Bounds x so that no later product or sum meets inf * 0 or inf - inf."""
    most = SATURATION[x.dtype] * shrink
    return x.clamp(-most, most)


def beyond_linear(x: Tensor, exp_x: Tensor) -> Tensor:
    """e^x - 1 - x; in float64 near 0, where float32 would keep no digit of it."""
    near = (torch.expm1(x.double()) - x.double()).to(x.dtype)
    return torch.where(x.abs() < 0.35, near, exp_x - 1 - x)


def ppo(r: Tensor, A: Tensor, low: float, high: float, dual: float, cap: float):
    """l = -min(min(r, cap) A, clip(r) A), for A < 0 also at most -dual A; g = -A r K. Returns l, g, low, high, dual."""
    clipped = r.clamp(low, high)
    loss = -torch.minimum(r.clamp(max=cap) * A, clipped * A)
    loss = torch.where(A < 0, torch.minimum(loss, -dual * A), loss)

    clipped_low = (A < 0) & (r < low)
    clipped_high = (A > 0) & (r > high)
    clipped_dual = (A < 0) & (r > dual)
    # Beyond the cap the capped branch is flat; for A < 0 the clipped one may be active and still inside its range.
    capped = (r > cap) & ~((A < 0) & (low <= r) & (r <= high))
    keep = ~(clipped_low | clipped_high | clipped_dual | capped)
    return loss, torch.where(keep, -A * r, torch.zeros_like(r)), clipped_low, clipped_high, clipped_dual


def cispo(r: Tensor, A: Tensor, logp: Tensor, low: float, high: float):
    """l = -sg(clip(r)) A logp; g = -A clip(r)."""
    pull = saturate(A * r.clamp(low, high))
    no = torch.zeros_like(r, dtype=torch.bool)
    return -pull * logp, -pull, (A < 0) & (r < low), (A > 0) & (r > high), no


def kl(x: Tensor, estimator: int):
    """Value and derivative of the KL estimate, x = logp - ref_logp."""
    if estimator == K1:
        return x, torch.ones_like(x)
    if estimator == K2:
        return 0.5 * x * x, x
    e = ratio(-x)
    return beyond_linear(-x, e), (1 - e) if estimator == K3 else x


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    ref_logp: Tensor | None,
    sequence_ids: Tensor | None,
    num_sequences: int,
    token_rule: int,
    sequence_ratio: bool,
    low: float,
    high: float,
    dual: float,
    cap: float,
    aggregation: int,
    normalizer: float,
    kl_coef: float,
    kl_estimator: int,
    want_grad: bool,
):
    """Loss, unscaled gradient, scale and statistics of [rows, cols] tokens.

    Returns:
        (loss, grad, scale, stats): 0-d; [rows, cols] with d loss / d logp = grad * scale ([0, 0] unless
        `want_grad`); 0-d; float32 [14]. Loss and gradient are float32, float64 for float64 `logp`.
    """
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    device = logp.device
    inputs = [x.to(dtype) for x in (logp, old_logp, advantages)]
    w = torch.ones_like(inputs[0]) if weights is None else weights.to(dtype)
    ref = inputs[0] if ref_logp is None else ref_logp.to(dtype)

    # A token counts if it is unmasked and everything it needs is finite; the rest becomes 0 before any arithmetic.
    unmasked = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    finite = (inputs[0] - inputs[1]).isfinite() & inputs[2].isfinite() & w.isfinite() & (ref - inputs[0]).isfinite()
    finite &= inputs[0].isfinite()
    valid = unmasked & finite
    zero = torch.zeros((), dtype=dtype, device=device)
    lp, old, A, w, ref = (torch.where(valid, x, zero) for x in (*inputs, w, ref))
    D = saturate(lp - old)
    count = valid.to(dtype)

    # Sums over sequences: a row each, or by id in the packed layout.
    rows = torch.arange(logp.shape[0], device=device).unsqueeze(1).expand(logp.shape)
    ids = rows if sequence_ids is None else sequence_ids.unsqueeze(0)

    def per_sequence(x: Tensor) -> Tensor:
        sums = torch.zeros(max(num_sequences, 1), dtype=torch.float64, device=device)
        return sums.index_add_(0, ids.reshape(-1), x.double().reshape(-1))

    length = per_sequence(count).clamp(min=1.0)
    a = (1.0 / length)[ids].to(dtype) * count if aggregation == SEQUENCE_MEAN else count

    token_ratio = ratio(D)
    r = ratio((per_sequence(D) / length)[ids].to(dtype)) if sequence_ratio else token_ratio
    if token_rule == 1:
        loss, g, clipped_low, clipped_high, clipped_dual = cispo(r, A, lp, low, high)
    else:
        loss, g, clipped_low, clipped_high, clipped_dual = ppo(r, A, low, high, dual, cap)
    mass = saturate(a * r * A.abs())
    suppressed = torch.where(g == 0, mass, zero)
    shrink = normalizer if 0 < normalizer < 1 else 1.0  # times 1 / normalizer the values must still be finite
    loss, g = saturate(a * w * saturate(loss), shrink), saturate(a * w * saturate(g), shrink)
    if sequence_ratio:
        g = (per_sequence(g) / length)[ids].to(dtype) * count
    if ref_logp is not None:
        value, slope = kl(lp - ref, kl_estimator)
        loss = saturate(loss + saturate(a * kl_coef * saturate(value)), shrink)
        g = saturate(g + saturate(a * kl_coef * saturate(slope)), shrink)

    tokens = count.double().sum()
    total = torch.tensor(normalizer, dtype=torch.float64, device=device)
    if not normalizer > 0:
        total = tokens if aggregation == TOKEN_MEAN else torch.full_like(total, float(num_sequences))
        total = total.clamp(min=1.0)
    scale = 1.0 / total

    most = torch.finfo(torch.float32).max
    has_ratio = torch.where(valid, r, zero).double()
    stats = [
        tokens,
        *((x & valid).double().sum() for x in (clipped_low, clipped_high, clipped_dual)),
        suppressed.double().sum() * scale,
        mass.double().sum() * scale,
        -D.double().sum(),
        saturate(0.5 * D * D).double().sum(),
        (count * beyond_linear(D, token_ratio)).double().sum(),
        has_ratio.sum(),
        has_ratio.square().sum(),
        torch.where(valid, r.double(), most).amin() if r.numel() else torch.full_like(tokens, most),
        has_ratio.amax() if r.numel() else torch.zeros_like(tokens),
        (unmasked & ~finite).double().sum(),
    ]
    stats = torch.stack(stats).clamp(-most, most).to(torch.float32)
    bound = torch.finfo(dtype).max
    grad = g if want_grad else g.new_empty(0, 0)
    return (loss.double().sum() * scale).clamp(-bound, bound).to(dtype), grad, scale.to(dtype), stats
