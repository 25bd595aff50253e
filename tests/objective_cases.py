"""The objectives' test cases as data: objectives, batches, and the loss column of the specification in plain torch."""

from __future__ import annotations

import functools
import hashlib
import math
from types import SimpleNamespace
from typing import Any

import torch
from cases import gpu_targets
from torch import Tensor

import fused_clip_adam as fca
from fused_clip_adam.backends import native

OBJECTIVES = {
    "ppo": fca.PPO(),
    "clip-higher": fca.PPO(0.2, 0.28),
    "dual": fca.PPO(0.2, 0.28, dual_clip=3.0),
    "cap < high": fca.PPO(0.2, 0.28, ratio_cap=1.1),
    "cap > high": fca.PPO(0.2, 0.28, ratio_cap=2.0),
    "cap < low": fca.PPO(0.2, 0.28, ratio_cap=0.6),
    "dual and cap": fca.PPO(0.2, 0.28, dual_clip=1.5, ratio_cap=2.5),
    "dual < high": fca.PPO(0.2, 0.9, dual_clip=1.3, ratio_cap=1.6),
    "gspo": fca.GSPO(0.1, 0.15),
    "luspo": fca.LUSPO(0.15, 0.1),
    "cispo upper": fca.CISPO(high=2.0),
    "cispo both": fca.CISPO(low=0.8, high=1.28),
    "sapo": fca.SAPO(),
    "sapo steep": fca.SAPO(tau_pos=0.5, tau_neg=2.5),
    "vespo": fca.VESPO(),
    "vespo flat": fca.VESPO(k_pos=0.5, lambda_pos=0.4, k_neg=1.0, lambda_neg=0.3),
    "gmpo": fca.GMPO(),
    "gmpo narrow": fca.GMPO(0.1, 0.2),
    "gpg": fca.GPG(),
    "dro": fca.DRO(0.3),
    "dppo-tv": fca.DPPOTV(0.05, 0.08, max_ratio=1.5),
    "dppo-kl": fca.DPPOKL(0.02, 0.03, max_ratio=1.5),
    "clip-cov": fca.ClipCov(0.2, 0.28, ratio=1.0, cov_low=0.01, cov_high=0.3),  # ratio 1: no choice is left to chance
    "kl-cov": fca.KLCov(0.2, 0.7),
    "gppo": fca.GPPO(),
    "ce-gppo": fca.CEGPPO(0.2, 0.28, beta_low=0.25, beta_high=0.75, dual_clip=1.9),
    "dcpo": fca.DCPO(),
    "dcpo dual": fca.DCPO(0.1, 0.15, dual_clip=1.5),
    "bapo": fca.BAPO(),
    "bapo at once": fca.BAPO(target=1e-3),
    "bapo to the end": fca.BAPO(target=1e3, high_max=1.6, high_step=0.07, dual_clip=1.9),
    "aspo": fca.ASPO(),
    "aspo median": fca.ASPO(0.1, 0.3, dual_clip=1.5, quantile=0.5),
    "aepo": fca.AEPO(),
    "aepo strong": fca.AEPO(0.2, 0.1, dual_clip=1.5, entropy_scale=0.5),
    "grpo-guard": fca.GRPOGuard(0.2, 0.28),
    "ppo-ewma": fca.PPOEWMA(),
    "ppo-ewma cap": fca.PPOEWMA(0.1, 0.15, max_ratio=1.5),
}
ONE_OF_EACH = tuple({type(objective): name for name, objective in OBJECTIVES.items()}.values())
SEQUENCE_RATIO = (fca.GSPO, fca.LUSPO)
NEEDS_SEQUENCES = (*SEQUENCE_RATIO, fca.GMPO, fca.VESPO, fca.ASPO)
WHOLE_BATCH = (fca.ClipCov, fca.KLCov, fca.BAPO, fca.AEPO)  # what happens to a token depends on all others
CLIPS_NOTHING = (fca.SAPO, fca.GPG, fca.DRO, fca.KLCov, fca.VESPO)
AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum", "constant")
ESTIMATORS = ("k1", "k2", "k3", "k3+")

INPUTS = ("logp", "old_logp", "advantages", "weights", "ref_logp", "mask")
EXTRAS = {  # what one objective takes beyond INPUTS
    "entropy": (fca.ASPO, fca.AEPO),
    "ewma_logp": (fca.PPOEWMA,),
    "old_probs": (fca.DCPO, fca.DPPOTV),
    **dict.fromkeys(("mu", "mu_old", "sigma_t", "dt"), (fca.GRPOGuard,)),
}
OPTIONAL = ("old_probs",)
SHARED_OVER_RANKS = ("bapo", "aepo strong")  # these read the whole batch: `process_group=` makes it that of all ranks

# Where trainers fail: ends of exp's clamp, ends of float32, what is not a number, and exact zeros.
EXTREMES = (0.0, -0.0, 20.0, -20.0, 100.0, -100.0, 1e-20, 1e38, -1e38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan)


def on_device_of(backend: str, *values: Any) -> Any:
    """The values with their tensors where the backend takes them; a dict becomes a new dict."""
    device = gpu_targets()[backend] if backend in ("cuda", "triton") else "cpu"

    def move(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: move(y) for name, y in x.items()}
        return x.to(device) if isinstance(x, Tensor) and x.device.type != device else x

    moved = tuple(move(x) for x in values)
    return moved if len(moved) > 1 else moved[0]


def wanted_by(objective: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without what other objectives need."""
    return {n: x for n, x in batch.items() if n not in EXTRAS or isinstance(objective, EXTRAS[n])}


def make_batch(rows: int, cols: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Every input of every objective. Row 0 is fully masked and masked tokens hold NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(rows, cols, *shape, generator=generator, dtype=torch.float64)

    logp = (-1.0 + normal(0.3)).clamp(max=-0.01)
    old_logp = (logp - normal(0.6)).clamp(max=-0.01)
    mu = normal(1.0, 3)
    batch = {
        "logp": logp,
        "old_logp": old_logp,
        "advantages": normal(1.0),
        "weights": normal(0.3).exp(),
        "ref_logp": logp - normal(0.5),
        "entropy": normal(1.0).abs(),
        "ewma_logp": logp - normal(0.3),
        "old_probs": (old_logp + normal(0.2)).clamp(max=-0.01).exp(),
        "mu": mu,
        "mu_old": mu + normal(0.3, 3),
        "sigma_t": 0.7 + normal(0.1).abs(),
        "dt": 0.8 + normal(0.1).abs(),
    }
    batch = {name: x.to(dtype) for name, x in batch.items()}
    batch["mask"] = torch.rand(rows, cols, generator=generator) < 0.7
    batch["mask"][:1] = rows == 1
    for name, x in batch.items():
        if name not in ("logp", "mask"):
            x[~batch["mask"]] = math.nan
    return batch


def make_wild_batch(
    rows: int, cols: int, dtype: torch.dtype, seed: int, share: float, extremes: tuple[float, ...] = EXTREMES
) -> dict[str, Tensor]:
    """A batch without hidden NaN whose inputs, but for `share` of them, are ordinary; the rest are extremes."""
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch(rows, cols, torch.float64, seed)
    palettes = dict.fromkeys((*INPUTS[:5], "ewma_logp"), extremes)
    palettes["entropy"] = (0.0, math.nan, math.inf)
    palettes["old_probs"] = (0.0, 1.0, 1e-30, math.nan)
    palettes["mu"] = palettes["mu_old"] = (math.nan, -math.inf)
    for name, x in batch.items():
        if name == "mask":
            continue
        palette = torch.tensor(palettes.get(name, (0.5,)), dtype=torch.float64)
        wild = palette[torch.randint(len(palette), x.shape, generator=generator)]
        use_wild = torch.rand(x.shape, generator=generator) < share
        batch[name] = torch.where(use_wild, wild, x.nan_to_num(0.3)).to(dtype)
    return batch


# ---------------------------------------------------------------- the specification's table, column `l`


def clamped_exp(x: Tensor) -> Tensor:
    """exp of x held to [-20, 20]; its derivative is its value everywhere, as documented."""
    return x.detach().clamp(-20, 20).exp() * (1 + (x - x.detach()))


def lengths(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).clamp(min=1).double()


def observe(objective: Any, batch: dict[str, Tensor]) -> SimpleNamespace:
    """What the table's equations speak of, masked tokens set to 0: logp, old_logp, D, r, A, w and the extra inputs."""
    logp = batch["logp"]
    mask = batch.get("mask", torch.ones(logp.shape, dtype=torch.bool))
    x = SimpleNamespace(mask=mask, logp=torch.where(mask, logp, 0.0))
    for name in (*INPUTS[1:5], *EXTRAS):
        value = batch.get(name, torch.full_like(logp, float(name == "weights")))
        value = value.unsqueeze(1).expand(logp.shape) if value.dim() == 1 else value
        visible = mask.view(*mask.shape, *[1] * (value.dim() - 2))
        setattr(
            x, name, torch.where(visible, value, 0.0).detach() if name != "mu" else torch.where(visible, value, 0.0)
        )
    x.A, x.w = x.advantages, x.weights
    x.D = torch.where(mask, x.logp - x.old_logp, 0.0)
    x.q = x.old_probs if "old_probs" in batch else x.old_logp.exp()
    log_ratio = x.D
    if isinstance(objective, SEQUENCE_RATIO):
        log_ratio = (x.D.sum(1, keepdim=True) / lengths(mask)).expand(x.D.shape)
    elif isinstance(objective, fca.GRPOGuard):
        s = torch.where(mask, x.sigma_t * x.dt.sqrt(), 1.0)
        log_ratio = (x.D + (x.mu - x.mu_old).square().mean(-1) / (2 * s.square())) * s
    elif isinstance(objective, fca.AEPO):
        H = x.entropy[mask]
        z = (x.entropy - H.mean()) / ((H - H.mean()).square().mean().sqrt() + 1e-8)
        x.A = torch.where(mask, x.A * (1 + objective.entropy_scale * z), 0.0)
    elif isinstance(objective, fca.VESPO):
        x.log_is, x.w = torch.where(mask, x.weights.log().clamp(math.log(1e-8), 20), 0.0), torch.ones_like(x.w)
    elif isinstance(objective, fca.GMPO):
        clipped = torch.where(x.A > 0, x.D.clamp(max=objective.clip_high), x.D.clamp(min=-objective.clip_low))
        clipped = torch.where(mask & (x.A != 0), clipped, 0.0)
        log_ratio = (clipped.sum(1, keepdim=True) / lengths(mask)).expand(x.D.shape)
    x.r = clamped_exp(log_ratio)
    return x


def clip_range(objective: Any, x: SimpleNamespace) -> tuple[Any, Any]:
    """The bounds of the ratio: numbers, or one per token."""
    if isinstance(objective, fca.CISPO):
        return objective.low or 0.0, objective.high
    if isinstance(objective, fca.DCPO):
        lowest = 0.5 + 0.5 * (1 - 4 * objective.clip_low / x.q).clamp(min=0).sqrt()
        highest = 0.5 + 0.5 * (1 + 4 * objective.clip_high / x.q).sqrt()
        return lowest.where(x.q > 0, 1.0), highest.clamp(max=max(objective.dual_clip, 10.0))
    if isinstance(objective, fca.BAPO):
        return bapo_range(objective, x)
    if isinstance(objective, fca.ASPO):
        is_low = torch.zeros_like(x.mask)
        for row, entropy, mask in zip(is_low, x.entropy, x.mask):
            if mask.any():
                row |= entropy <= torch.quantile(entropy[mask], objective.quantile)
        e = torch.where(is_low, objective.clip, objective.clip_high_entropy * torch.ones_like(x.A))
        return 1 - e, 1 + e
    return 1 - objective.clip_low, 1 + objective.clip_high


def bapo_range(objective: fca.BAPO, x: SimpleNamespace) -> tuple[float, float]:
    """The published loop."""
    r, A = x.r.detach()[x.mask], x.A[x.mask]
    gain, harm = A >= 0, A < 0
    low, high = objective.low_start, objective.high_start
    while True:
        positive = (r.clamp(max=high) * A)[gain].sum()
        negative = (r.clamp(min=low) * A.abs())[harm].sum()
        if positive / (negative + 1e-8) >= objective.target:
            return low, high
        if low < objective.low_max - 1e-9:
            low = min(low + objective.low_step, objective.low_max)
        elif high < objective.high_max - 1e-9:
            high = min(high + objective.high_step, objective.high_max)
        else:
            return low, high


def covariance(x: SimpleNamespace) -> Tensor:
    """Per token, NaN where masked."""
    A, logp = x.A, x.logp.detach()
    cov = (A - A[x.mask].mean()) * (logp - logp[x.mask].mean())
    return torch.where(x.mask, cov, math.nan)


def kept(objective: Any, x: SimpleNamespace) -> Tensor:
    """DPPO: the tokens whose probability has not moved too far in the direction of the advantage."""
    p, q, gain = x.logp.detach().exp(), x.q, x.A > 0
    if not isinstance(objective, fca.DPPOKL):
        return torch.where(gain, p - q <= objective.delta_high, p - q >= -objective.delta_low)
    divergence = q * (q.log() - p.log()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    return torch.where(
        gain, (divergence <= objective.delta_high) | (p <= q), (divergence <= objective.delta_low) | (p >= q)
    )


def ppo_loss(r: Tensor, A: Tensor, low: Any, high: Any, dual: float | None, cap: float | None = None) -> Tensor:
    low, high = (torch.as_tensor(bound, dtype=r.dtype, device=r.device) for bound in (low, high))
    free = r if cap is None else r.clamp(max=cap)
    loss = -torch.minimum(free * A, r.clamp(low, high) * A)
    return loss if dual is None else torch.where(A < 0, torch.minimum(loss, -dual * A), loss)


def token_loss(objective: Any, x: SimpleNamespace) -> Tensor:
    """The column `l`, with autograd and without a closed form; what is detached there is detached here."""
    A, D, r, logp = x.A, x.D, x.r, x.logp
    gain, harm, mask, one = A > 0, A < 0, x.mask, torch.ones_like(x.A)
    if isinstance(objective, fca.CISPO):
        return -r.clamp(*clip_range(objective, x)).detach() * A * logp
    if isinstance(objective, fca.SAPO):
        tau = torch.where(gain, objective.tau_pos, objective.tau_neg * one)
        return -A * (4 / tau) * torch.sigmoid(tau * (r - 1))
    if isinstance(objective, fca.VESPO):
        log_w = (D.clamp(-20, 20) + x.log_is).sum(1, keepdim=True).clamp(math.log(1e-8), 20).detach()
        k = torch.where(harm, objective.k_neg, objective.k_pos * one)
        lam = torch.where(harm, objective.lambda_neg, objective.lambda_pos * one)
        return -lam.exp() * log_w.exp() ** k * (-lam * log_w.exp()).exp() * A * logp
    if isinstance(objective, fca.GPG):
        return -A * logp
    if isinstance(objective, fca.GMPO):
        return -A * r
    if isinstance(objective, fca.DRO):
        return -(A * logp - objective.beta / 2 * D.square())
    if isinstance(objective, fca.DPPOTV):
        return -A * r.clamp(max=objective.max_ratio).detach() * logp * kept(objective, x)
    if isinstance(objective, fca.ClipCov):
        loss = ppo_loss(r, A, *clip_range(objective, x), None)
        return torch.where(dropped(objective, x), 0.0, loss)
    if isinstance(objective, fca.KLCov):
        cov = covariance(x).nan_to_num(nan=-math.inf)
        chosen = torch.zeros(mask.numel())
        chosen[cov.flatten().topk(min(max(1, int(objective.ratio * mask.sum())), int(mask.sum()))).indices] = 1.0
        return -A * r + objective.kappa * D.abs() * chosen.reshape(mask.shape)
    if isinstance(objective, (fca.GPPO, fca.CEGPPO, fca.AEPO)):
        low, high = clip_range(objective, x)
        follow = r / r.detach()  # 1, and moves with logp
        at_low, at_high = low * (follow if not isinstance(objective, fca.AEPO) else 1.0), high * follow
        if isinstance(objective, fca.CEGPPO):
            at_low, at_high = objective.beta_low * at_low, objective.beta_high * at_high
        held = torch.where(harm & (r < low), at_low, torch.where(gain & (r > high), at_high, r))
        return -A * torch.where(harm & (r > objective.dual_clip), objective.dual_clip, held)
    if isinstance(objective, fca.ASPO):
        low, high = clip_range(objective, x)
        flipped = r / r.detach().square()  # 1 / r, but grows with logp
        loss = torch.where(harm, -A * torch.maximum(r, low), -A * torch.where(r > high, 1 / high, flipped))
        beyond = torch.where(harm, r, 1 / r) > objective.dual_clip
        return torch.where(beyond, -objective.dual_clip * A * logp, loss)
    if isinstance(objective, fca.PPOEWMA):
        rho = clamped_exp(logp - x.ewma_logp).detach()
        flat = (gain & (rho > 1 + objective.clip_high)) | (harm & (rho < 1 - objective.clip_low))
        weight = r.clamp(max=objective.max_ratio).detach() * r / r.detach()
        return -A * torch.where(flat, weight.detach(), weight)
    loss = ppo_loss(
        r, A, *clip_range(objective, x), getattr(objective, "dual_clip", None), getattr(objective, "ratio_cap", None)
    )
    return loss / x.dt.where(mask, 1.0) if isinstance(objective, fca.GRPOGuard) else loss


def dropped(objective: fca.ClipCov, x: SimpleNamespace) -> Tensor:
    """Every token that ClipCov may drop: of middling covariance and not clipped by PPO."""
    low, high, _ = clip_flags(objective, x)
    cov = covariance(x)
    return (cov > objective.cov_low) & (cov < objective.cov_high) & ~low & ~high


def clip_flags(objective: Any, x: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """What `clipped_low`, `clipped_high` and `clipped_dual` count."""
    gain, harm, r, none = x.A > 0, x.A < 0, x.r, torch.zeros_like(x.mask)
    if isinstance(objective, CLIPS_NOTHING):
        return none, none, none
    if isinstance(objective, fca.DPPOTV):
        return harm & ~kept(objective, x), gain & ~kept(objective, x), none
    if isinstance(objective, fca.GMPO):
        change = x.D
        return harm & (change < -objective.clip_low), gain & (change > objective.clip_high), none
    if isinstance(objective, fca.PPOEWMA):
        r = (x.logp - x.ewma_logp).exp()
    low, high = clip_range(objective, x)
    dual = getattr(objective, "dual_clip", None)
    return harm & (r < low), gain & (r > high), none if dual is None else harm & (x.r > dual)


def suppressed(objective: Any, x: SimpleNamespace) -> Tensor:
    """The tokens whose own term has no slope in their own log-ratio (a sequence's ratio taken as the token's own)."""
    if isinstance(objective, fca.GMPO):
        low, high, _ = clip_flags(objective, x)
        return low | high
    leaf = torch.zeros_like(x.D, requires_grad=True)
    moved = SimpleNamespace(**vars(x))
    moved.logp, moved.D, moved.r = x.logp.detach() + leaf, x.D.detach() + leaf, x.r.detach() * leaf.exp()
    (slope,) = torch.autograd.grad(token_loss(objective, moved).sum(), leaf)
    return slope == 0


def token_kl(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    d = ref_logp - logp
    k2, k3 = d.square() / 2, clamped_exp(d) - d - 1
    return {"k1": -d, "k2": k2, "k3": k3, "k3+": k3.detach() + k2 - k2.detach()}[estimator]


def default_aggregation(objective: Any) -> str:
    return {fca.LUSPO: "sequence-sum", fca.GMPO: "sequence-mean"}.get(type(objective), "token-mean")


def token_weight(mask: Tensor, aggregation: str, normalizer: float | None) -> Tensor:
    """`a` of every token, from the table of aggregations."""
    count = mask.sum().clamp(min=1) if aggregation == "token-mean" else max(mask.shape[0], 1)
    a = mask.double() / (normalizer or count)
    return a / lengths(mask) if aggregation == "sequence-mean" else a


def plain_loss(
    objective: Any,
    batch: dict[str, Tensor],
    aggregation: str | None = None,
    normalizer: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> Tensor:
    """The whole loss of a [B, T] batch, differentiable with respect to batch["logp"] (GRPOGuard: and batch["mu"]) and
    to `entropy`, the tokens' entropy of a bonus."""
    x = observe(objective, batch)
    loss = x.w * token_loss(objective, x)
    if kl_coef:
        loss = loss + kl_coef * token_kl(x.logp, x.ref_logp, kl_estimator)
    if entropy is not None:
        loss = loss - entropy_coef * entropy
    a = token_weight(x.mask, aggregation or default_aggregation(objective), normalizer)
    return (a * torch.where(x.mask, loss, 0.0)).sum()


# ---------------------------------------------------------------- layouts and processes


def packed(batch: dict[str, Tensor], order: Tensor | None = None) -> dict[str, Tensor]:
    """The unmasked tokens of a [B, T] batch as [N] with `sequence_ids`, in `order`."""
    mask = batch["mask"]
    order = torch.arange(int(mask.sum())) if order is None else order
    rows = torch.arange(mask.shape[0]).unsqueeze(1).expand(mask.shape)
    out = {name: x if x.dim() == 1 else x[mask][order] for name, x in batch.items() if name != "mask"}
    return {**out, "sequence_ids": rows[mask][order]}


@functools.cache
def digest() -> str:
    """The instruction set in use, and a hash of every bit the cpu backend gives on ordinary and wild batches."""
    hasher = hashlib.sha256()

    def add(*tensors: Tensor) -> None:
        for x in tensors:
            hasher.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    for seed, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        for batch, names in (
            (make_batch(3, 531, dtype, seed), OBJECTIVES),
            (make_wild_batch(3, 531, dtype, seed, share=0.1), ONE_OF_EACH),
        ):
            for objective in map(OBJECTIVES.get, names):
                options = dict(objective=objective, backend="cpu", aggregation="sequence-mean")
                options["kl_coef"] = 0.0 if isinstance(objective, fca.GRPOGuard) else 0.1
                inputs = wanted_by(objective, batch)
                inputs["logp"] = inputs["logp"].clone().requires_grad_()
                loss, stats = fca.policy_loss(**inputs, **options)
                loss.backward()
                add(loss, stats.buffer, inputs["logp"].grad)
        for vocabulary in (3, 1043):
            batch = make_logits_batch(3, 5, vocabulary, dtype, seed)
            logits = batch["logits"].requires_grad_()
            loss, stats = fca.policy_loss_from_logits(**batch, temperature=0.7, entropy_coef=0.1, backend="cpu")
            loss.backward()
            add(loss, stats.buffer, logits.grad)
    return f"{native.capability()} {hasher.hexdigest()}"


def make_logits_batch(
    rows: int, cols: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 3.0
) -> dict[str, Tensor]:
    """Logits and tokens in the place of logp; masked tokens have NaN logits and the label -100."""
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch(rows, cols, torch.float64, seed)
    logits = spread * torch.randn(rows, cols, vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (rows, cols), generator=generator)
    new = logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    shift = new - batch["logp"]  # so that the ratios are make_batch's
    mask = batch["mask"]
    out = {name: batch[name] for name in ("advantages", "weights", "mask")}
    out.update({name: batch[name] + shift for name in ("old_logp", "ref_logp")})
    out = {name: x if name == "mask" else x.to(torch.promote_types(dtype, torch.float32)) for name, x in out.items()}
    logits = logits.masked_fill_(~mask.unsqueeze(-1), math.nan).to(dtype)
    return {"logits": logits, "tokens": tokens.masked_fill(~mask, -100), **out}


def all_reduce_worker(rank: int, store: str, batches: list[dict[str, Tensor]], out: str) -> None:
    """One of two gloo ranks: its batch's statistics, merged, to a file."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(batches))
    stats = fca.clip_stats(**wanted_by(fca.PPO(), batches[rank]), normalizer=10.0)
    assert stats.all_reduce() is stats
    grads = {}
    for name in SHARED_OVER_RANKS:
        part = wanted_by(OBJECTIVES[name], make_batch(8, 9))
        part = {n: x[4 * rank : 4 * rank + 4] for n, x in part.items()}
        options = dict(objective=OBJECTIVES[name], normalizer=30.0, process_group=dist.group.WORLD)
        grads[name] = fca.dloss_dlogp(**part, **options)
    torch.save((stats.buffer, grads), f"{out}{rank}")
    dist.destroy_process_group()
