"""The objectives' test cases as data: objectives, batches, and the loss column of the specification in plain torch."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
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
    "cispo upper": fca.CISPO(high=2.0),
    "cispo both": fca.CISPO(low=0.8, high=1.28),
}
AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum", "constant")
ESTIMATORS = ("k1", "k2", "k3", "k3+")

# Where trainers fail: ends of exp's clamp, ends of float32, what is not a number, and exact zeros.
EXTREMES = (0.0, -0.0, 20.0, -20.0, 100.0, -100.0, 1e-20, 1e38, -1e38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan)

INPUTS = ("logp", "old_logp", "advantages", "weights", "ref_logp", "mask")


def make_batch(rows: int, cols: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Every per-token input. Row 0 is fully masked and masked tokens hold NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, cols, generator=generator, dtype=torch.float64)

    logp = -1.0 + normal(0.3)
    batch = {
        "logp": logp,
        "old_logp": logp - normal(0.6),
        "advantages": normal(1.0),
        "weights": normal(0.3).exp(),
        "ref_logp": logp - normal(0.5),
    }
    batch = {name: x.to(dtype) for name, x in batch.items()}
    batch["mask"] = torch.rand(rows, cols, generator=generator) < 0.7
    batch["mask"][:1] = rows == 1
    for name in ("old_logp", "advantages", "weights", "ref_logp"):
        batch[name] = batch[name].masked_fill(~batch["mask"], math.nan)
    return batch


def make_wild_batch(rows: int, cols: int, dtype: torch.dtype, seed: int, share: float) -> dict[str, Tensor]:
    """A batch without hidden NaN whose inputs, but for `share` of them, are ordinary; the rest are EXTREMES."""
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch(rows, cols, torch.float64, seed)
    palette = torch.tensor(EXTREMES, dtype=torch.float64)
    for name in ("logp", "old_logp", "advantages", "weights", "ref_logp"):
        wild = palette[torch.randint(len(palette), (rows, cols), generator=generator)]
        use_wild = torch.rand(rows, cols, generator=generator) < share
        batch[name] = torch.where(use_wild, wild, batch[name].nan_to_num(0.3)).to(dtype)
    return batch


def token_loss(objective: Any, r: Tensor, A: Tensor, logp: Tensor) -> Tensor:
    """The column `l` of the specification's table, with autograd and without a closed form."""
    if isinstance(objective, fca.CISPO):
        return -r.clamp(objective.low or 0.0, objective.high).detach() * A * logp
    cap, dual = getattr(objective, "ratio_cap", None), getattr(objective, "dual_clip", None)
    free = r if cap is None else r.clamp(max=cap)
    loss = -torch.minimum(free * A, r.clamp(1 - objective.clip_low, 1 + objective.clip_high) * A)
    return loss if dual is None else torch.where(A < 0, torch.minimum(loss, -dual * A), loss)


def token_kl(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    d = ref_logp - logp
    k2, k3 = d.square() / 2, d.exp() - d - 1
    return {"k1": -d, "k2": k2, "k3": k3, "k3+": k3.detach() + k2 - k2.detach()}[estimator]


def lengths(mask: Tensor) -> Tensor:
    return mask.sum(1, keepdim=True).clamp(min=1).double()


def token_weight(mask: Tensor, aggregation: str, normalizer: float | None) -> Tensor:
    """`a` of every token, from the table of aggregations."""
    count = mask.sum().clamp(min=1) if aggregation == "token-mean" else mask.shape[0]
    a = mask.double() / (normalizer or count)
    return a / lengths(mask) if aggregation == "sequence-mean" else a


def ratios(objective: Any, logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """The ratio the objective clips; exp's argument is held to [-20, 20], as documented."""
    D = torch.where(mask, logp - old_logp, 0.0)
    if objective.sequence_ratio:
        D = (D.sum(1, keepdim=True) / lengths(mask)).expand(D.shape)
    return D.clamp(-20, 20).exp()


def plain_loss(
    objective: Any,
    batch: dict[str, Tensor],
    aggregation: str = "token-mean",
    normalizer: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> Tensor:
    """The whole loss of a [B, T] batch, differentiable with respect to batch["logp"]."""
    logp = batch["logp"]
    mask = batch.get("mask", torch.ones(logp.shape, dtype=torch.bool))

    def clean(name: str, default: float) -> Tensor:
        x = batch.get(name, torch.full_like(logp, default))
        x = x.unsqueeze(1).expand(logp.shape) if x.dim() == 1 else x
        return torch.where(mask, x, 0.0).detach()

    old_logp, A, w, ref_logp = (clean(n, d) for n, d in zip(INPUTS[1:], (0.0, 0.0, 1.0, 0.0)))
    loss = w * token_loss(objective, ratios(objective, logp, old_logp, mask), A, logp)
    if kl_coef:
        loss = loss + kl_coef * token_kl(logp, ref_logp, kl_estimator)
    return (token_weight(mask, aggregation, normalizer) * torch.where(mask, loss, 0.0)).sum()


def packed(batch: dict[str, Tensor], order: Tensor | None = None) -> dict[str, Tensor]:
    """The unmasked tokens of a [B, T] batch as [N] with `sequence_ids`, in `order`."""
    mask = batch["mask"]
    order = torch.arange(int(mask.sum())) if order is None else order
    rows = torch.arange(mask.shape[0]).unsqueeze(1).expand(mask.shape)
    out = {name: batch[name][mask][order] for name in INPUTS if name in batch and batch[name].dim() == 2}
    del out["mask"]
    out.update({name: x for name, x in batch.items() if x.dim() == 1})
    return {**out, "sequence_ids": rows[mask][order]}


def digest() -> str:
    """The instruction set in use, and a hash of every bit the cpu backend gives on ordinary and wild batches."""
    hasher = hashlib.sha256()
    for seed, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        for make in (make_batch, lambda *args: make_wild_batch(*args, share=0.1)):
            batch = make(5, 1543, dtype, seed)
            for objective in OBJECTIVES.values():
                options = dict(objective=objective, backend="cpu", kl_coef=0.1, aggregation="sequence-mean")
                loss, stats = fca.policy_loss(**batch, **options)
                for x in (loss, stats.buffer, fca.dloss_dlogp(**batch, **options)):
                    hasher.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{native.capability()} {hasher.hexdigest()}"


def all_reduce_worker(rank: int, store: str, batches: list[dict[str, Tensor]], out: str) -> None:
    """One of two gloo ranks: its batch's statistics, merged, to a file."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(batches))
    stats = fca.clip_stats(**batches[rank], normalizer=10.0)
    assert stats.all_reduce() is stats
    torch.save(stats.buffer, f"{out}{rank}")
    dist.destroy_process_group()
