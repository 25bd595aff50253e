"""The ratio-clip objectives as equations, in plain torch. Same names as csrc/objective_math.h.

    [sequence numbers] -> token equations -> aggregation -> loss, gradient, statistics

D = logp - old_logp, r = exp(D), A the advantage, a the aggregation weight, w the rollout weight.
A token's loss is l, g = dl / dlogp; the gradient of the whole is a w g (plus the KL term's a kl_coef dk).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
SATURATION = {torch.float32: 2.0**127, torch.float64: 2.0**960}
TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM, CONSTANT = 0, 1, 2, 3
K1, K2, K3, K3_PLUS = 1, 2, 3, 4
(
    PPO,
    CISPO,
    SAPO,
    GPG,
    DRO,
    DPPO_TV,
    DPPO_KL,
    GPPO,
    DCPO,
    ASPO,
    PPO_EWMA,
    KL_COV,
    CLIP_COV,
    VESPO,
    GSPO,
    GMPO,
) = range(16)
SEQUENCE_RATIO = (GSPO, GMPO)
NEEDS_SEQUENCE = (GSPO, GMPO, VESPO)


def ratio(D: Tensor) -> Tensor:
    return D.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def probability(log_p: Tensor) -> Tensor:
    return log_p.clamp(-80, 0).exp()


def saturate(x: Tensor, shrink: float | Tensor = 1.0) -> Tensor:
    """Bounds x so that no later product or sum meets inf * 0 or inf - inf."""
    most = SATURATION[x.dtype] * shrink
    return x.clamp(-most, most)


def pick(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers, in the precision of `like` (torch.where would take them for float32)."""
    return torch.full_like(like, no).masked_fill(condition, yes)


def beyond_linear(x: Tensor, exp_x: Tensor) -> Tensor:
    """e^x - 1 - x; in float64 near 0, where float32 would keep no digit of it."""
    near = (torch.expm1(x.double()) - x.double()).to(x.dtype)
    return torch.where(x.abs() < 0.35, near, exp_x - 1 - x)


class RuleScalars(NamedTuple):
    """Absent bounds are infinite (low: 0). a to d: see the rules."""

    low: float | Tensor
    high: float | Tensor
    dual: float
    cap: float
    a: float
    b: float
    c: float
    d: float


class TokenInput(NamedTuple):
    """What a rule may read: `aux` is its own per-token input, `s` a number of the token's sequence."""

    r: Tensor
    D: Tensor
    A: Tensor
    logp: Tensor
    aux: Tensor
    s: Tensor


class Token(NamedTuple):
    """`keep`: False where the sequence's gradient does not reach the token (GMPO); None for all True."""

    loss: Tensor
    grad: Tensor
    clipped_low: Tensor | bool = False
    clipped_high: Tensor | bool = False
    clipped_dual: Tensor | bool = False
    keep: Tensor | None = None


def ppo(r: Tensor, A: Tensor, low, high, dual: float, cap: float) -> Token:
    """l = -min(min(r, cap) A, clip(r) A), for A < 0 also at most -dual A; g = -A r K."""
    clipped = r.clamp(low, high) if isinstance(low, float) else torch.minimum(torch.maximum(r, low), high)
    loss = -torch.minimum(r.clamp(max=cap) * A, clipped * A)
    loss = torch.where(A < 0, torch.minimum(loss, -dual * A), loss)

    clipped_low = (A < 0) & (r < low)
    clipped_high = (A > 0) & (r > high)
    clipped_dual = (A < 0) & (r > dual)
    # Beyond the cap the capped branch is flat; for A < 0 the clipped one may be active and still inside its range.
    capped = (r > cap) & ~((A < 0) & (low <= r) & (r <= high))
    flat = clipped_low | clipped_high | clipped_dual | capped
    return Token(loss, (-A * r).masked_fill(flat, 0.0), clipped_low, clipped_high, clipped_dual)


def cispo(r: Tensor, A: Tensor, logp: Tensor, p: RuleScalars) -> Token:
    """l = -sg(clip(r)) A logp; g = -A clip(r)."""
    pull = saturate(A * r.clamp(p.low, p.high))
    return Token(-pull * logp, -pull, (A < 0) & (r < p.low), (A > 0) & (r > p.high))


def sapo(r: Tensor, A: Tensor, p: RuleScalars) -> Token:
    """tau = a where A > 0, else b; x = tau (r - 1); l = -A 4 / tau sigmoid(x); g = -4 A r sigmoid(x) sigmoid(-x)."""
    tau = pick(A > 0, p.a, p.b, r)
    x = (tau * (r - 1)).clamp(-80, 80)
    return Token(-A * (4 / tau * x.sigmoid()), -A * (4 * r * (x.sigmoid() * (-x).sigmoid())))


def gpg(A: Tensor, logp: Tensor) -> Token:
    """l = -A logp; g = -A."""
    return Token(-saturate(A) * logp, -A)


def dro(D: Tensor, A: Tensor, logp: Tensor, p: RuleScalars) -> Token:
    """l = -(A logp - a / 2 D^2); g = -A + a D."""
    return Token(saturate(0.5 * p.a * D * D) - saturate(saturate(A) * logp), p.a * D - A)


def dppo(r: Tensor, A: Tensor, logp: Tensor, log_q: Tensor, p: RuleScalars, rule: int) -> Token:
    """l = -A sg(min(r, cap)) logp keep; g = -A min(r, cap) keep; keep by total variation or Bernoulli KL."""
    new_p, old_p = probability(logp), probability(log_q)
    if rule == DPPO_TV:
        above, below = new_p - old_p > p.high, new_p - old_p < -p.low
    else:
        rest = (1 - old_p + 1e-8) / (1 - new_p + 1e-8)
        divergence = old_p * (log_q - logp).clamp(-80, 80) + (1 - old_p) * rest.log()
        above, below = (divergence > p.high) & (new_p > old_p), (divergence > p.low) & (new_p < old_p)
    high, low = (A > 0) & above, (A <= 0) & below
    pull = saturate(A * r.clamp(max=p.cap)).masked_fill(high | low, 0.0)
    return Token(-pull * logp, -pull, (A < 0) & low, high)


def gppo(r: Tensor, A: Tensor, p: RuleScalars) -> Token:
    """PPO with dual clip; A < 0, r < low: l = -c low A, g = -a low A; A > 0, r > high: l = -d high A, g = -b high A."""
    low, high, dual = (A < 0) & (r < p.low), (A > 0) & (r > p.high), (A < 0) & (r > p.dual)
    value = torch.where(dual, p.dual, r).masked_fill(high, p.d * p.high).masked_fill(low, p.c * p.low)
    slope = r.masked_fill(dual, 0.0).masked_fill(high, p.b * p.high).masked_fill(low, p.a * p.low)
    return Token(-A * value, -A * slope, low, high, dual)


def dcpo(r: Tensor, A: Tensor, log_q: Tensor, p: RuleScalars) -> Token:
    """PPO, low = 1/2 + 1/2 sqrt(max(0, 1 - 4 a / q)), 1 at q = 0; high = min(1/2 + 1/2 sqrt(1 + 4 b / q), c)."""
    q = probability(log_q)
    none = log_q < -103
    low = (0.5 + 0.5 * (1 - 4 * p.a / q).clamp(min=0).sqrt()).masked_fill(none, 1.0)
    high = (0.5 + 0.5 * (1 + 4 * p.b / q).sqrt()).clamp(max=p.c).masked_fill(none, p.c)
    return ppo(r, A, low, high, p.dual, p.cap)


def aspo(r: Tensor, A: Tensor, logp: Tensor, aux: Tensor, p: RuleScalars) -> Token:
    """e = a where aux, else b; A >= 0: PPO on 1 / r; A < 0: PPO; beyond `dual` the weight is held there."""
    e = pick(aux != 0, p.a, p.b, r)
    harm = A < 0
    low, high = harm & (r < 1 - e), ~harm & (r > 1 + e)
    weight = torch.where(harm, r, 1 / r)
    clipped = torch.where(harm, torch.maximum(r, 1 - e), 1 / torch.minimum(r, 1 + e))
    dual = weight > p.dual
    loss = torch.where(dual, -saturate(p.dual * A) * logp, -A * clipped)
    grad = (-A * torch.where(dual, p.dual, weight)).masked_fill(low | high, 0.0)
    return Token(loss, grad, low, high & (A > 0), harm & dual)


def ppo_ewma(r: Tensor, A: Tensor, logp: Tensor, aux: Tensor, p: RuleScalars) -> Token:
    """l = -A min(r, cap); g = that, 0 where the ratio to the averaged policy (aux) is past its bounds (logarithms)."""
    rho = logp - aux
    low, high = (A < 0) & (rho < p.low), (A > 0) & (rho > p.high)
    loss = -A * r.clamp(max=p.cap)
    return Token(loss, loss.masked_fill(low | high, 0.0), low, high)


def kl_cov(r: Tensor, D: Tensor, A: Tensor, aux: Tensor, p: RuleScalars) -> Token:
    """l = -A r + a |D|; g = -A r + a sgn D; the second terms where aux."""
    kappa = pick(aux != 0, p.a, 0.0, r)
    pull = saturate(A * r)
    return Token(kappa * D.abs() - pull, kappa * D.sign() - pull)


def vespo(s: Tensor, A: Tensor, logp: Tensor, p: RuleScalars) -> Token:
    """ln W = clip(s, ln 1e-8, 20); phi = e^lambda W^k e^(-lambda W); l = -sg(phi) A logp; g = -phi A."""
    log_w = s.clamp(math.log(1e-8), 20)
    k, lam = pick(A < 0, p.c, p.a, s), pick(A < 0, p.d, p.b, s)
    log_phi = lam + k * log_w - lam * log_w.exp()
    phi = log_phi.clamp(-80, 80).exp().masked_fill(log_phi < -80, 0.0)
    pull = saturate(A * phi)
    return Token(-pull * logp, -pull)


def gmpo(r: Tensor, D: Tensor, A: Tensor, p: RuleScalars) -> Token:
    """l = -A s, s = exp of the sequence's mean of c; the gradient reaches the tokens whose D is not clipped."""
    low, high = (A < 0) & (p.low > D), (A > 0) & (p.high < D)
    return Token(-A * r, -A * r, low, high, keep=(A != 0) & ~low & ~high)


def sequence_term(rule: int, D: Tensor, A: Tensor, aux: Tensor, p: RuleScalars) -> Tensor:
    """What a sequence sums over its tokens. GSPO, GMPO: its mean is the log of the ratio. VESPO: aux is log w."""
    if rule == VESPO:
        return D.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) + aux
    if rule == GMPO:
        return torch.where(A > 0, D.clamp(max=p.high), torch.where(A < 0, D.clamp(min=p.low), 0.0))
    return D


def token(rule: int, t: TokenInput, p: RuleScalars) -> Token:
    if rule == CISPO:
        return cispo(t.r, t.A, t.logp, p)
    if rule == SAPO:
        return sapo(t.r, t.A, p)
    if rule == GPG:
        return gpg(t.A, t.logp)
    if rule == DRO:
        return dro(t.D, t.A, t.logp, p)
    if rule in (DPPO_TV, DPPO_KL):
        return dppo(t.r, t.A, t.logp, t.aux, p, rule)
    if rule == GPPO:
        return gppo(t.r, t.A, p)
    if rule == DCPO:
        return dcpo(t.r, t.A, t.aux, p)
    if rule == ASPO:
        return aspo(t.r, t.A, t.logp, t.aux, p)
    if rule == PPO_EWMA:
        return ppo_ewma(t.r, t.A, t.logp, t.aux, p)
    if rule == KL_COV:
        return kl_cov(t.r, t.D, t.A, t.aux, p)
    if rule == VESPO:
        return vespo(t.s, t.A, t.logp, p)
    if rule == GMPO:
        return gmpo(t.r, t.D, t.A, p)
    out = ppo(t.r, t.A, p.low, p.high, p.dual, p.cap)
    if rule == CLIP_COV:  # PPO whose tokens with aux are dropped
        dropped = t.aux != 0
        out = out._replace(loss=out.loss.masked_fill(dropped, 0.0), grad=out.grad.masked_fill(dropped, 0.0))
    return out


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
    aux: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    sequence_ids: Tensor | None,
    sequence_order: Tensor | None,
    sequence_offsets: Tensor | None,
    num_sequences: int,
    rule: int,
    scalars: list[float],
    bounds: Tensor | None,
    aggregation: int,
    normalizer: float,
    normalizer_tensor: Tensor | None,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    want_grad: bool,
):
    """Loss, unscaled gradients, scale and statistics of [rows, cols] tokens.

    A row is a sequence; packed input is one row whose tokens belong to the sequences `sequence_ids` (and
    `sequence_order`, `sequence_offsets`, which this backend does not need: the tokens sorted by sequence, and where
    each sequence starts in that order). `bounds` replaces the low and high of `scalars`, `normalizer_tensor` replaces
    `normalizer` (0: the count of tokens or sequences).

    Returns:
        (loss, grad, grad_entropy, scale, stats): 0-d; [rows, cols] with d loss / d logp = grad * scale ([0, 0] unless
        `want_grad`); the same for d loss / d entropy ([0, 0] also without `entropy`); 0-d; float32 [14]. All but stats
        are float32, float64 for float64 `logp`.
    """
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    device = logp.device
    p = RuleScalars(*scalars)
    if bounds is not None:
        p = p._replace(low=bounds[0].to(dtype), high=bounds[1].to(dtype))

    # A token counts if it is unmasked and everything it needs is finite; the rest becomes 0 before any arithmetic.
    given = [logp, old_logp, advantages, weights, aux, logp if ref_logp is None else ref_logp, entropy]
    lp, old, A, w, aux, ref, H = (None if x is None else x.to(dtype) for x in given)
    unmasked = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    finite = (lp - old).isfinite() & A.isfinite() & (ref - lp).isfinite() & lp.isfinite()
    for x in (w, aux, H):
        finite = finite if x is None else finite & x.isfinite()
    valid = unmasked & finite
    zero = torch.zeros((), dtype=dtype, device=device)
    lp, old, A, ref = (torch.where(valid, x, zero) for x in (lp, old, A, ref))
    w = valid.to(dtype) if w is None else torch.where(valid, w, zero)
    aux, H = (torch.zeros_like(lp) if x is None else torch.where(valid, x, zero) for x in (aux, H))
    D = saturate(lp - old)
    count = valid.to(dtype)

    # Sums over sequences: a row each, or by id in the packed layout.
    rows = torch.arange(logp.shape[0], device=device).unsqueeze(1).expand(logp.shape)
    ids = rows if sequence_ids is None else sequence_ids.unsqueeze(0)

    def per_sequence(x: Tensor) -> Tensor:
        sums = torch.zeros(max(num_sequences, 1), dtype=torch.float64, device=device)
        return sums.index_add_(0, ids.reshape(-1), x.double().reshape(-1))

    total = torch.tensor(normalizer, dtype=torch.float64, device=device)
    if normalizer_tensor is not None:
        total = normalizer_tensor.double()
    elif not normalizer > 0:
        total = count.double().sum() if aggregation == TOKEN_MEAN else torch.full_like(total, float(num_sequences))
        total = total.clamp(min=1.0)
    scale = 1.0 / total
    shrink = total.clamp(max=1.0).to(dtype)  # times 1 / normalizer the values must still be finite

    a, s = count, torch.zeros_like(D)
    if aggregation == SEQUENCE_MEAN or rule in NEEDS_SEQUENCE:
        length = per_sequence(count).clamp(min=1.0)
        s = per_sequence(torch.where(valid, sequence_term(rule, D, A, aux, p), zero))
        s = (s if rule == VESPO else s / length)[ids].to(dtype)
        a = (1.0 / length)[ids].to(dtype) * count if aggregation == SEQUENCE_MEAN else count

    token_ratio = ratio(D)
    r = ratio(s) if rule in SEQUENCE_RATIO else token_ratio
    t = token(rule, TokenInput(r, D, A, lp, aux, s), p)
    keep = torch.ones_like(valid) if t.keep is None else t.keep
    mass = saturate(a * r * A.abs())
    suppressed = torch.where((t.grad == 0) | ~keep, mass, zero)
    loss, g = saturate(a * w * saturate(t.loss), shrink), saturate(a * w * saturate(t.grad), shrink)
    if rule in SEQUENCE_RATIO:
        g = (per_sequence(g) / length)[ids].to(dtype) * count * keep
    if ref_logp is not None:
        value, slope = kl(lp - ref, kl_estimator)
        loss = saturate(loss + saturate(a * kl_coef * saturate(value)), shrink)
        g = saturate(g + saturate(a * kl_coef * saturate(slope)), shrink)
    grad_entropy = -entropy_coef * a
    if entropy is not None:
        loss = saturate(loss + saturate(grad_entropy * saturate(H)), shrink)

    most = torch.finfo(torch.float32).max
    has_ratio = torch.where(valid, r, zero).double()
    tokens = count.double().sum()
    stats = [
        tokens,
        *((x & valid).double().sum() for x in (t.clipped_low, t.clipped_high, t.clipped_dual)),
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
    none = g.new_empty(0, 0)
    loss = (loss.double().sum() * scale).clamp(-bound, bound).to(dtype)
    with_entropy = want_grad and entropy is not None
    return loss, g if want_grad else none, grad_entropy if with_entropy else none, scale.to(dtype), stats


def bound_sums(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    lows: list[float],
    highs: list[float],
) -> Tensor:
    """BAPO's balance at each candidate bound: float64 [len(lows) + len(highs)].

    For each low: the sum over A < 0 of max(r, low) |A|; for each high: the sum over A >= 0 of min(r, high) A; over
    unmasked tokens with finite D and A.
    """
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    D, A = logp.to(dtype) - old_logp.to(dtype), advantages.to(dtype)
    valid = D.isfinite() & A.isfinite()
    valid = valid if mask is None else valid & mask
    D, A = (torch.where(valid, x, 0.0) for x in (D, A))
    r, gain, loss = ratio(D), A.clamp(min=0.0), (-A).clamp(min=0.0)
    sums = [(saturate(r.clamp(min=low) * loss)).double().sum() for low in lows]
    sums += [(saturate(r.clamp(max=high) * gain)).double().sum() for high in highs]
    return torch.stack(sums)


# ---------------------------------------------------------------- from logits


def logits_forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, inv_temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each row's token and entropy of each row of [B, T, V] logits.

    z = x inv_temperature; m = max z; S = sum exp(z - m); logp = z_y - m - log S;
    entropy = log S - sum (z - m) exp(z - m) / S

    Returns:
        (logp, entropy, softmax): [B, T], [B, T] (of no size unless wanted), [2, B, T] (what this backend's
        `logits_backward` needs of a row: here m and log S); float32, float64 for float64 logits. 0 where
        masked; NaN where the row has no softmax or the token is not in [0, V). `softmax` is NaN in both cases.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    unmasked = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    known = (tokens >= 0) & (tokens < logits.shape[-1])
    z = torch.where(unmasked.unsqueeze(-1), logits.to(dtype), 0.0) * inv_temperature
    m = z.amax(-1)
    shifted = z - m.unsqueeze(-1)
    e = shifted.exp()
    S = e.sum(-1, dtype=torch.float64)
    at_token = shifted.gather(-1, torch.where(known, tokens, 0).unsqueeze(-1)).squeeze(-1)
    # A row that holds NaN, +inf or nothing but -inf has NaN in S.
    logp = torch.where(known, at_token.double() - S.log(), torch.nan)
    logp = torch.where(unmasked & S.isnan(), torch.nan, logp).to(dtype)
    softmax = torch.stack([m.double(), S.log()]).to(dtype)
    # Without a softmax a row has no gradient, whatever comes from above.
    softmax = softmax.masked_fill(~unmasked | logp.isnan(), torch.nan)
    entropy = logp.new_empty(0, 0)
    if want_entropy:
        moment = torch.where(e == 0, 0.0, shifted * e).sum(-1, dtype=torch.float64)
        entropy = torch.where(logp.isnan(), torch.nan, S.log() - moment / S).to(dtype).masked_fill(~unmasked, 0.0)
    return logp.masked_fill(~unmasked, 0.0), entropy, softmax


def logits_backward(
    logits: Tensor,
    tokens: Tensor,
    softmax: Tensor,
    entropy: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    inv_temperature: float,
    out: Tensor,
) -> None:
    """Writes d loss / d logits to `out`, which may be `logits` itself.

    d_v = inv_temperature (g ([v = y] - p_v) - h p_v (log p_v + H)), g and h the gradients of logp and entropy; 0 in
    rows where both are 0 or the softmax is not finite.
    """
    dtype = softmax.dtype
    g, h = grad_logp, torch.zeros_like(grad_logp) if grad_entropy is None else grad_entropy
    used = ((g != 0) | (h != 0)) & softmax.isfinite().all(0)
    H = torch.zeros_like(g) if grad_entropy is None else entropy
    g, h, H = (torch.where(used, x, 0.0).unsqueeze(-1) for x in (g, h, H))
    m, log_S = torch.where(used, softmax, 0.0).unsqueeze(-1)
    log_p = torch.where(used.unsqueeze(-1), logits.to(dtype), 0.0) * inv_temperature - m - log_S
    p = log_p.exp()
    d = -g * p - h * torch.where(p == 0, 0.0, p * (log_p + H))  # p log p is 0 at p = 0
    known = (tokens >= 0) & (tokens < logits.shape[-1])
    d.scatter_add_(-1, torch.where(known, tokens, 0).unsqueeze(-1), torch.where(known.unsqueeze(-1), g, 0.0))
    out.copy_(torch.where(used.unsqueeze(-1), d * inv_temperature, 0.0))
