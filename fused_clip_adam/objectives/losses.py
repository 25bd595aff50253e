"""The public functions on log-probabilities: `policy_loss`, `dloss_dlogp`, `clip_stats`.

    arguments -> [rows, cols] views of them -> objective.prepare (what the whole batch must tell first)
        -> backend.policy_loss (one pass: loss, gradient, statistics) -> autograd

The gradient is formed in the forward pass; the backward pass only scales it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_clip_adam import backends
from fused_clip_adam.objectives.objective import Inputs, Objective, Sequences, number
from fused_clip_adam.objectives.ppo import PPO
from fused_clip_adam.objectives.stats import ClipStats

AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3+")
PER_TOKEN_INPUTS = ("entropy", "old_probs", "ewma_logp")
FLOW_INPUTS = ("mu", "mu_old", "sigma_t", "dt")
OBJECTIVE_INPUTS = (*PER_TOKEN_INPUTS, *FLOW_INPUTS, "generator", "process_group")
_FLOAT32 = torch.finfo(torch.float32)
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor | None, call: tuple, run: Any, want_grad: bool):
        loss, grad, grad_entropy, scale, stats = run(*call, want_grad)
        ctx.save_for_backward(grad, grad_entropy, scale)
        ctx.dtype, ctx.shape = logp.dtype, logp.shape
        ctx.entropy_dtype = None if entropy is None or not entropy.requires_grad else entropy.dtype
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _grad_stats: Tensor | None):
        if grad_loss is None:
            return None, None, None, None, None
        grad, grad_entropy, scale = ctx.saved_tensors
        to_logp = _finish(grad, scale, ctx.dtype, ctx.shape, grad_loss)
        if ctx.entropy_dtype is None:
            return to_logp, None, None, None, None
        return to_logp, _finish(grad_entropy, scale, ctx.entropy_dtype, ctx.shape, grad_loss), None, None, None


def _finish(grad: Tensor, scale: Tensor, dtype: torch.dtype, shape: torch.Size, upstream: Tensor | float = 1.0):
    """upstream * scale * grad as logp's dtype and shape; `grad` itself where the host can see that the factor is 1.

    In float16 our own part saturates; what `upstream` adds may overflow, as it must: a GradScaler lowers its scale by
    the infinities it finds.
    """
    factor = scale * upstream
    if dtype == torch.float16:
        most = torch.finfo(torch.float16).max
        grad, factor = (grad * scale).clamp(-most, most), upstream
    if grad.device.type != "cpu" or float(factor) != 1.0:
        grad = grad * factor
    return grad.to(dtype).reshape(shape)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    objective: Objective = PPO(),
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    entropy: Tensor | None = None,
    old_probs: Tensor | None = None,
    ewma_logp: Tensor | None = None,
    mu: Tensor | None = None,
    mu_old: Tensor | None = None,
    sigma_t: float | Tensor | None = None,
    dt: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    process_group: Any = None,
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
        objective: one of fca's objectives; its docstring gives equation, source and defaults.
        aggregation: "token-mean" (sum over tokens / tokens), "sequence-mean" (mean over sequences of the mean over
            tokens), "sequence-sum" (mean over sequences of the sum), "constant" (sum / normalizer). None: the
            objective's own, which is "token-mean" but for `LUSPO` ("sequence-sum") and `GMPO` ("sequence-mean").
        normalizer: replaces the count that the aggregation divides by (tokens, or sequences), so that micro-batches
            and ranks can share one; a number or 0-d tensor, positive; required for "constant". A tensor on a GPU is not
            read by the host, and so not checked.
        weights: like `advantages`; detached importance weights of the rollout, multiply the policy term alone
            (`rollout_weights` makes them; `VESPO` reads them into its own weight).
        ref_logp: like `logp`; reference policy. Adds kl_coef times the KL estimate to each token's loss.
        kl_coef: the coefficient; with 0 `ref_logp` is not read.
        kl_estimator: "k1", "k2", "k3", or "k3+" (k3's value with k2's gradient).
        sequence_ids: int64 [N] beside packed input: the sequence of each token, from 0, in any order.
        num_sequences: packed: how many sequences there are. None: as many as `advantages` has, or the largest id + 1.
        entropy: like `logp`; for `ASPO` and `AEPO`. old_probs: like `logp`; optional for `DCPO`, `DPPOTV`, `DPPOKL`.
        ewma_logp: like `logp`; for `PPOEWMA`. mu, mu_old, sigma_t, dt: for `GRPOGuard`.
        generator: optional for `ClipCov`. process_group: optional for `BAPO` and `AEPO`: ranks that share statistics.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (loss, stats): 0-d loss, float32 (float64 for float64 input), and a `ClipStats`.

    A token with a non-finite input is treated as masked and counted in `stats.nonfinite`. D is clamped to [-20, 20]
    where it enters exp; the gradient beyond is the clamped value's. Huge finite inputs saturate at 2^127 (float64:
    2^960): nothing finite becomes NaN. With no token left the loss and its gradient are 0. `kl_k1..3` and the KL term
    are per token for every objective; `suppressed_mass` counts a token whose own ratio term is clipped flat.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, an unknown name, an input that the
            objective needs and did not get, or got and does not read.
        RuntimeError: a backend that cannot run here.

    Source: the objectives' docstrings; KL estimators: Schulman 2020, "Approximating KL divergence".
    """
    options = {name: value for name, value in locals().items() if name not in ("logp", "old_logp", "advantages")}
    return run_policy_loss(logp, old_logp, advantages, options)


def run_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    options: dict[str, Any],
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, ClipStats]:
    """`policy_loss` with the bonus entropy_coef * `entropy` [B, T] subtracted from each token's loss."""
    inputs, call, run = prepare(logp, old_logp, advantages, options, entropy, entropy_coef)
    differentiable = inputs.logp.requires_grad or (entropy is not None and entropy.requires_grad)
    want_grad = differentiable and torch.is_grad_enabled()
    bonus = entropy.reshape(inputs.logp.shape) if entropy_coef else None
    loss, stats = _PolicyLoss.apply(inputs.logp, bonus, call, run, want_grad)
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
    with torch.no_grad():
        inputs, call, run = prepare(logp, old_logp, advantages, _with_defaults(options))
        _, grad, _, scale, _ = run(*call, True)
        grad = grad if inputs.slope is None else grad * inputs.slope
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
    with torch.no_grad():
        _, call, run = prepare(logp, old_logp, advantages, _with_defaults(options))
        return ClipStats(run(*call, False)[4])


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    defaults = policy_loss.__kwdefaults__
    if unknown := options.keys() - defaults.keys():
        raise TypeError(f"unexpected argument(s) {sorted(unknown)}; accepted: {sorted(defaults)}")
    return {**defaults, **options}


def prepare(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    options: dict[str, Any],
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Inputs, tuple, Any]:
    """Checks every argument and views it as [rows, cols].

    Args:
        options: every keyword of `policy_loss`. entropy, entropy_coef: of the entropy bonus.

    Returns:
        (inputs, call, run): what the objective prepared, run(*call, want_grad) the backend's policy_loss.
    """
    objective, kl_coef, kl_estimator = options["objective"], options["kl_coef"], options["kl_estimator"]
    aggregation, normalizer = options["aggregation"], options["normalizer"]
    check_logp(logp)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective such as PPO(), got {objective!r}")
    aggregation = objective.default_aggregation if aggregation is None else aggregation
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown; accepted: {', '.join(AGGREGATIONS)}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={kl_estimator!r} is unknown; accepted: {', '.join(KL_ESTIMATORS)}")
    kl_coef = number("kl_coef", kl_coef)
    if not abs(kl_coef) <= _FLOAT32.max:
        raise ValueError(f"kl_coef must be finite in float32, got {kl_coef!r}")
    use_kl = kl_coef != 0
    if use_kl and options["ref_logp"] is None:
        raise ValueError(f"kl_coef={kl_coef!r} needs ref_logp")
    if use_kl and "mu" in objective.needs:
        raise ValueError(f"kl_coef={kl_coef!r}: {type(objective).__name__} has no reference KL; accepted: 0")
    _check_objective_inputs(objective, options)

    packed = logp.dim() == 1
    sequences = _sequences(logp, advantages, objective, aggregation, options)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1) if packed else tensor

    def like_logp(name: str, tensor: Tensor) -> Tensor:
        check_tensor(name, tensor, logp)
        if tensor.shape != logp.shape:
            raise ValueError(f"{name} must have logp's shape {list(logp.shape)}, got {list(tensor.shape)}")
        return rows(tensor.detach())

    def per_token(name: str, tensor: Tensor) -> Tensor:
        check_tensor(name, tensor, logp)
        tensor = tensor.detach()
        if tensor.shape == logp.shape:
            return rows(tensor)
        if packed and sequences.ids is not None and tensor.shape == (sequences.count,):
            return tensor[sequences.ids].reshape(1, -1)
        if not packed and tensor.shape == logp.shape[:1]:
            return tensor.unsqueeze(1).expand(logp.shape)
        per_sequence = ["S"] if packed else list(logp.shape[:1])
        raise ValueError(f"{name} must be {list(logp.shape)} or {per_sequence}, got {list(tensor.shape)}")

    def optional(check: Any, name: str) -> Tensor | None:
        return None if options[name] is None else check(name, options[name])

    mask = options["mask"]
    if mask is not None:
        check_mask(mask, logp)
        mask = rows(mask.detach() if mask.dtype == torch.bool else mask.detach() != 0)
    backends.check_name(options["backend"])
    backend = backends.choose_objective(options["backend"], logp.device.type)
    number_, tensor_ = _normalizer(normalizer, aggregation, logp.device)
    if number_ == 0 and tensor_ is None and aggregation in ("sequence-mean", "sequence-sum"):
        tensor_ = None if sequences.distinct is None else sequences.distinct.double()

    inputs = objective.prepare(
        Inputs(
            logp=rows(logp),
            old_logp=like_logp("old_logp", old_logp),
            advantages=per_token("advantages", advantages),
            mask=mask,
            weights=optional(like_logp if objective.weights_per_token else per_token, "weights"),
            ref_logp=like_logp("ref_logp", options["ref_logp"]) if use_kl else None,
            **{name: optional(like_logp, name) for name in PER_TOKEN_INPUTS},
            sequences=sequences,
            generator=options["generator"],
            process_group=options["process_group"],
            flow=_flow(logp, options) if "mu" in objective.needs else {},
            backend=backend,
        )
    )
    needs_sequences = objective.needs_sequences or aggregation == "sequence-mean"
    order = sequences if needs_sequences else Sequences(sequences.count)
    call = (
        inputs.logp.detach(),
        inputs.old_logp,
        inputs.advantages,
        inputs.mask,
        inputs.weights,
        inputs.aux,
        inputs.ref_logp,
        rows(entropy.detach()) if entropy_coef else None,
        order.ids,
        order.order,
        order.offsets,
        sequences.count,
        objective.rule,
        list(objective.scalars()),
        inputs.bounds,
        AGGREGATIONS.index(aggregation),
        number_,
        tensor_,
        kl_coef,
        1 + KL_ESTIMATORS.index(kl_estimator) if use_kl else 0,
        float(entropy_coef),
    )
    return inputs, call, backend.policy_loss


# ---------------------------------------------------------------- checks


def check_tensor(name: str, tensor: Any, logp: Tensor | None = None, like: str = "logp") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATING or tensor.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense float64, float32, bfloat16 or float16 tensor, got {tensor.dtype} {tensor.layout}"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no data")
    if logp is not None and tensor.device != logp.device:
        raise ValueError(f"{name} is on {tensor.device} but {like} on {logp.device}")


def check_logp(logp: Any) -> None:
    check_tensor("logp", logp)
    if logp.dim() not in (1, 2):
        raise ValueError(f"logp must be [B, T] or packed [N], got shape {list(logp.shape)}")


def check_mask(mask: Any, logp: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.shape != logp.shape or mask.device != logp.device:
        got = f"{list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"mask must be a tensor of shape {list(logp.shape)} on {logp.device}, got {got}")
    if mask.layout != torch.strided:
        raise TypeError(f"mask must be a dense tensor, got {mask.layout}")


def _check_objective_inputs(objective: Objective, options: dict[str, Any]) -> None:
    """What the objective needs is there, and nothing that it would ignore."""
    kind = type(objective).__name__
    for name in objective.needs:
        if options[name] is None:
            raise ValueError(f"objective={kind} needs {name}=")
    for name in OBJECTIVE_INPUTS:
        if options[name] is not None and name not in (*objective.needs, *objective.accepts):
            raise ValueError(f"{name}= is not read by objective={kind}")
    generator = options["generator"]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def _flow(logp: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """mu and mu_old as [rows, cols, dimensions], sigma_t and dt as tensors that broadcast to [rows, cols]."""
    shape = (1, *logp.shape) if logp.dim() == 1 else tuple(logp.shape)
    flow = {}
    for name in ("mu", "mu_old"):
        x = options[name]
        check_tensor(name, x, logp)
        if x.shape[: logp.dim()] != logp.shape or x.shape != options["mu"].shape:
            raise ValueError(f"{name} must be {list(logp.shape)} and mu's dimensions after it, got {list(x.shape)}")
        flow[name] = (x if name == "mu" else x.detach()).reshape(*shape, math.prod(x.shape[logp.dim() :]))
    for name in ("sigma_t", "dt"):
        x = options[name]
        if isinstance(x, Tensor):
            check_tensor(name, x, logp)
        elif not 0.0 < number(name, x) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {x!r}")
        else:
            x = torch.full((), float(x), dtype=torch.float64, device=logp.device)
        try:
            flow[name] = x.detach().broadcast_to(logp.shape).reshape(shape)
        except RuntimeError:
            raise ValueError(f"{name} must broadcast to {list(logp.shape)}, got {list(x.shape)}") from None
    return flow


def _normalizer(value: float | Tensor | None, aggregation: str, device: torch.device) -> tuple[float, Tensor | None]:
    """(number, tensor) that replaces the count: the tensor where the host must not read it; (0, None) for none."""
    if value is None:
        if aggregation == "constant":
            raise ValueError('aggregation="constant" needs normalizer=')
        return 0.0, None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {list(value.shape)}")
        if value.device.type != "cpu" and value.device == device:
            return 0.0, value.detach().reshape(()).double()
    count = number("normalizer", value)
    if not _FLOAT32.tiny <= count < math.inf:
        raise ValueError(f"normalizer must be positive (at least {_FLOAT32.tiny}) and finite, got {count!r}")
    return count, None


def _sequences(
    logp: Tensor, advantages: Any, objective: Objective, aggregation: str, options: dict[str, Any]
) -> Sequences:
    ids, count = options["sequence_ids"], options["num_sequences"]
    if logp.dim() == 2:
        for name in ("sequence_ids", "num_sequences"):
            if options[name] is not None:
                raise ValueError(f"{name} goes with packed [N] input; [B, T] input has one sequence per row")
        return Sequences(logp.shape[0])
    if ids is None:
        if objective.needs_sequences or aggregation in ("sequence-mean", "sequence-sum"):
            wanting = type(objective).__name__ if objective.needs_sequences else f'aggregation="{aggregation}"'
            raise ValueError(f"packed input with {wanting} needs sequence_ids")
        return Sequences(1)
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError("sequence_ids must be an int64 or int32 tensor")
    if ids.shape != logp.shape or ids.device != logp.device:
        raise ValueError(
            f"sequence_ids must be {list(logp.shape)} on {logp.device}, got {list(ids.shape)} on {ids.device}"
        )
    ids = ids.detach().long()
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"num_sequences must be an int of at least 0, got {count!r}")
    if isinstance(advantages, Tensor) and advantages.dim() == 1 and advantages.shape != logp.shape:
        if count not in (None, advantages.shape[0]):
            raise ValueError(f"num_sequences={count} but advantages has {advantages.shape[0]} sequences")
        count = advantages.shape[0]
    distinct = None
    if logp.device.type == "cpu":
        least, most = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
        count = most + 1 if count is None else count
        if least < 0 or most >= count:
            raise ValueError(f"sequence_ids must be at least 0 and below {count}, got {least} to {most}")
        in_order = bool((ids[1:] >= ids[:-1]).all())
    else:  # nothing is read back: a wrong id stops the device, and without a count the tokens bound it
        if count is None:
            count = ids.numel()
            distinct = ids.max() + 1 if count else None
        torch._assert_async(((ids >= 0) & (ids < count)).all())
        in_order = False
    wanted = objective.needs_sequences or aggregation == "sequence-mean"
    if not wanted:
        return Sequences(count, ids, distinct=distinct)
    order = torch.arange(len(ids), device=ids.device) if in_order else ids.argsort(stable=True)
    offsets = torch.searchsorted(ids if in_order else ids[order], torch.arange(count + 1, device=ids.device))
    return Sequences(count, ids, order, offsets, distinct)
