"""The public functions on log-probabilities: `policy_loss`, `dloss_dlogp`, `clip_stats`.

    arguments -> [rows, cols] views of them -> backend.policy_loss (one pass: loss, gradient, statistics) -> autograd

The gradient is formed in the forward pass; the backward pass only scales it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_clip_adam import backends
from fused_clip_adam.objectives.objective import Objective, number
from fused_clip_adam.objectives.ppo import PPO
from fused_clip_adam.objectives.stats import ClipStats

AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3+")
_FLOAT32 = torch.finfo(torch.float32)
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Call(NamedTuple):
    """The arguments of backend.policy_loss, in its order but for `want_grad`."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor | None
    weights: Tensor | None
    ref_logp: Tensor | None
    sequence_ids: Tensor | None
    num_sequences: int
    token_rule: int
    sequence_ratio: bool
    low: float
    high: float
    dual: float
    cap: float
    aggregation: int
    normalizer: float
    kl_coef: float
    kl_estimator: int


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, call: _Call, run: Any, want_grad: bool):
        loss, grad, scale, stats = run(*call, want_grad)
        ctx.save_for_backward(grad, scale)
        ctx.dtype, ctx.shape = logp.dtype, logp.shape
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _grad_stats: Tensor | None):
        if grad_loss is None:
            return None, None, None, None
        grad, scale = ctx.saved_tensors
        return _finish(grad, scale, ctx.dtype, ctx.shape, grad_loss), None, None, None


def _finish(grad: Tensor, scale: Tensor, dtype: torch.dtype, shape: torch.Size, upstream: Tensor | float = 1.0):
    """upstream * scale * grad as logp's dtype and shape.

    In float16 our own part saturates; what `upstream` adds may overflow, as it must: a GradScaler lowers its scale by
    the infinities it finds.
    """
    if dtype != torch.float16:
        return (grad * (scale * upstream)).to(dtype).reshape(shape)
    most = torch.finfo(torch.float16).max
    return ((grad * scale).clamp(-most, most) * upstream).to(dtype).reshape(shape)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    objective: Objective = PPO(),
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    sequence_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ClipStats]:
    """The policy loss, differentiable with respect to `logp`, and the statistics of what was clipped.

    logp, old_logp -> D -> ratio -> clip -> loss, gradient, statistics (one pass) -> aggregation

    Args:
        logp: [B, T] or packed [N]; log-probabilities of the taken tokens under the policy being trained; float64,
            float32, bfloat16 or float16 (arithmetic in float32, float64 for float64).
        old_logp: like `logp`; under the policy that sampled. No gradient flows into it, nor into what follows.
        advantages: [B], [B, T]; packed: [N], or [S] for S sequences (where S = N they are read as per token).
        mask: like `logp`; nonzero tokens count. Masked tokens are never read into arithmetic: they may be NaN.
        objective: `PPO`, `GSPO` or `CISPO`.
        aggregation: "token-mean" (sum over tokens / tokens), "sequence-mean" (mean over sequences of the mean over
            tokens), "sequence-sum" (mean over sequences of the sum), "constant" (sum / normalizer).
        normalizer: replaces the count that the aggregation divides by (tokens, or sequences), so that micro-batches
            and ranks can share one; a number or 0-d tensor, positive; required for "constant".
        weights: like `advantages`; detached importance weights of the rollout, multiply the policy term alone.
        ref_logp: like `logp`; reference policy. Adds kl_coef times the KL estimate to each token's loss.
        kl_coef: the coefficient; with 0 `ref_logp` is not read.
        kl_estimator: "k1", "k2", "k3", or "k3+" (k3's value with k2's gradient).
        sequence_ids: int64 [N] beside packed input: the sequence of each token, from 0, in any order.
        backend: "auto", "cpu" or "reference".

    Returns:
        (loss, stats): 0-d loss, float32 (float64 for float64 input), and a `ClipStats`.

    A token with a non-finite input is treated as masked and counted in `stats.nonfinite`. D is clamped to [-20, 20]
    where it enters exp; the gradient beyond is the clamped value's. Huge finite inputs saturate at 2^127 (float64:
    2^960): nothing finite becomes NaN. With no token left the loss and its gradient are 0. `kl_k1..3` and the KL term
    are per token for every objective; `suppressed_mass` counts a token whose own ratio term is clipped flat.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an unknown name.
        RuntimeError: a backend that cannot run here.

    Source: the objectives' docstrings; KL estimators: Schulman 2020, "Approximating KL divergence".
    """
    call, run = _prepare(
        logp,
        old_logp,
        advantages,
        mask,
        objective,
        aggregation,
        normalizer,
        weights,
        ref_logp,
        kl_coef,
        kl_estimator,
        sequence_ids,
        backend,
    )
    want_grad = logp.requires_grad and torch.is_grad_enabled()
    loss, stats = _PolicyLoss.apply(logp, call, run, want_grad)
    return loss, ClipStats(stats)


def dloss_dlogp(logp: Tensor, old_logp: Tensor, advantages: Tensor, **options: Any) -> Tensor:
    """The gradient of `policy_loss` with respect to `logp`, in closed form and without autograd.

    Args:
        logp, old_logp, advantages, **options: as `policy_loss`.

    Returns:
        A tensor of `logp`'s shape and dtype.

    Raises:
        As `policy_loss`.
    """
    call, run = _prepare_options(logp, old_logp, advantages, options)
    with torch.no_grad():
        _, grad, scale, _ = run(*call, True)
        return _finish(grad, scale, logp.dtype, logp.shape)


def clip_stats(logp: Tensor, old_logp: Tensor, advantages: Tensor, **options: Any) -> ClipStats:
    """The statistics of `policy_loss` alone, for trainers that keep their own loss.

    Args:
        logp, old_logp, advantages, **options: as `policy_loss`.

    Returns:
        A `ClipStats` on `logp`'s device; no gradient is formed.

    Raises:
        As `policy_loss`.
    """
    call, run = _prepare_options(logp, old_logp, advantages, options)
    with torch.no_grad():
        return ClipStats(run(*call, False)[3])


def _prepare_options(logp: Tensor, old_logp: Tensor, advantages: Tensor, options: dict[str, Any]):
    defaults = dict(policy_loss.__kwdefaults__)
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"unexpected argument(s) {sorted(unknown)}; accepted: {sorted(defaults)}")
    return _prepare(logp, old_logp, advantages, *({**defaults, **options}[name] for name in defaults))


def _prepare(
    logp,
    old_logp,
    advantages,
    mask,
    objective,
    aggregation,
    normalizer,
    weights,
    ref_logp,
    kl_coef,
    kl_estimator,
    sequence_ids,
    backend,
):
    """Checks every argument and views it as [rows, cols]; returns the call and the backend's function."""
    _check_tensor("logp", logp)
    if logp.dim() not in (1, 2):
        raise ValueError(f"logp must be [B, T] or packed [N], got shape {list(logp.shape)}")
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective such as PPO(), got {objective!r}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown; accepted: {', '.join(AGGREGATIONS)}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={kl_estimator!r} is unknown; accepted: {', '.join(KL_ESTIMATORS)}")
    kl_coef = number("kl_coef", kl_coef)
    if not abs(kl_coef) <= _FLOAT32.max:
        raise ValueError(f"kl_coef must be finite in float32, got {kl_coef!r}")
    if kl_coef != 0 and ref_logp is None:
        raise ValueError(f"kl_coef={kl_coef!r} needs ref_logp")
    packed = logp.dim() == 1
    ids, sequences = _sequences(logp, sequence_ids, advantages, objective, aggregation)

    def like_logp(name: str, tensor: Tensor) -> Tensor:
        _check_tensor(name, tensor, logp)
        if tensor.shape != logp.shape:
            raise ValueError(f"{name} must have logp's shape {list(logp.shape)}, got {list(tensor.shape)}")
        return tensor.detach().reshape(1, -1) if packed else tensor.detach()

    def per_token(name: str, tensor: Tensor) -> Tensor:
        _check_tensor(name, tensor, logp)
        tensor = tensor.detach()
        if tensor.shape == logp.shape:
            return tensor.reshape(1, -1) if packed else tensor
        if packed and ids is not None and tensor.shape == (sequences,):
            return tensor[ids].reshape(1, -1)
        if not packed and tensor.shape == logp.shape[:1]:
            return tensor.unsqueeze(1).expand(logp.shape)
        per_sequence = ["S"] if packed else list(logp.shape[:1])
        raise ValueError(f"{name} must be {list(logp.shape)} or {per_sequence}, got {list(tensor.shape)}")

    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != logp.shape or mask.device != logp.device:
            got = f"{list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"mask must be a tensor of shape {list(logp.shape)} on {logp.device}, got {got}")
        if mask.layout != torch.strided:
            raise TypeError(f"mask must be a dense tensor, got {mask.layout}")
        mask = mask.detach() if mask.dtype == torch.bool else mask.detach() != 0
        mask = mask.reshape(1, -1) if packed else mask
    use_kl = kl_coef != 0
    call = _Call(
        logp=like_logp("logp", logp),
        old_logp=like_logp("old_logp", old_logp),
        advantages=per_token("advantages", advantages),
        mask=mask,
        weights=None if weights is None else per_token("weights", weights),
        ref_logp=like_logp("ref_logp", ref_logp) if use_kl else None,
        sequence_ids=ids,
        num_sequences=sequences,
        token_rule=objective.token_rule,
        sequence_ratio=objective.sequence_ratio,
        **dict(zip(("low", "high", "dual", "cap"), objective.bounds())),
        aggregation=AGGREGATIONS.index(aggregation),
        normalizer=_normalizer(normalizer, aggregation),
        kl_coef=kl_coef,
        kl_estimator=1 + KL_ESTIMATORS.index(kl_estimator) if use_kl else 0,
    )
    backends.check_name(backend)
    return call, backends.choose_objective(backend, logp.device.type).policy_loss


def _check_tensor(name: str, tensor: Any, logp: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATING or tensor.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense float64, float32, bfloat16 or float16 tensor, got {tensor.dtype} {tensor.layout}"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no data")
    if logp is not None and tensor.device != logp.device:
        raise ValueError(f"{name} is on {tensor.device} but logp on {logp.device}")


def _normalizer(value: float | Tensor | None, aggregation: str) -> float:
    """The number that replaces the count; 0 for none."""
    if value is None:
        if aggregation == "constant":
            raise ValueError('aggregation="constant" needs normalizer=')
        return 0.0
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {list(value.shape)}")
    count = number("normalizer", value)
    if not _FLOAT32.tiny <= count < math.inf:
        raise ValueError(f"normalizer must be positive (at least {_FLOAT32.tiny}) and finite, got {count!r}")
    return count


def _sequences(logp, sequence_ids, advantages, objective, aggregation) -> tuple[Tensor | None, int]:
    """(ids, number of sequences)."""
    if logp.dim() == 2:
        if sequence_ids is not None:
            raise ValueError("sequence_ids goes with packed [N] input; [B, T] input has one sequence per row")
        return None, logp.shape[0]
    if sequence_ids is None:
        if objective.sequence_ratio or aggregation in ("sequence-mean", "sequence-sum"):
            wanting = type(objective).__name__ if objective.sequence_ratio else f'aggregation="{aggregation}"'
            raise ValueError(f"packed input with {wanting} needs sequence_ids")
        return None, 1
    if not isinstance(sequence_ids, Tensor) or sequence_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError("sequence_ids must be an int64 or int32 tensor")
    if sequence_ids.shape != logp.shape or sequence_ids.device != logp.device:
        raise ValueError(
            f"sequence_ids must be {list(logp.shape)} on {logp.device}, got {list(sequence_ids.shape)} on "
            f"{sequence_ids.device}"
        )
    ids = sequence_ids.detach().long()
    least, most = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
    per_sequence = isinstance(advantages, Tensor) and advantages.dim() == 1 and advantages.shape != logp.shape
    sequences = advantages.shape[0] if per_sequence else most + 1
    if least < 0 or most >= sequences:
        raise ValueError(f"sequence_ids must be at least 0 and below {sequences}, got {least} to {most}")
    return ids, sequences
