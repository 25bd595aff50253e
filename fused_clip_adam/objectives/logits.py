"""The public functions on logits: `policy_loss_from_logits` and `logp_from_logits`.

    logits -> log-probability of the token, entropy (one read of the logits) -> policy_loss on [B, T]
        -> d loss / d logits (one read and one write, over the logits themselves if asked)

What is [B, T] in between is a vocabulary smaller than the logits and costs nothing beside them. Rows that a mask or a
clip takes out are not read.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_clip_adam import backends
from fused_clip_adam.objectives.losses import check_mask, check_tensor, policy_loss, run_policy_loss
from fused_clip_adam.objectives.objective import Objective, between, number
from fused_clip_adam.objectives.ppo import PPO
from fused_clip_adam.objectives.stats import ClipStats


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Beside the tensors of a call. scale: 1 / temperature. run: the backend's module."""

    scale: float
    inplace: bool
    want_entropy: bool
    run: ModuleType


class _LogpFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, mask: Tensor | None, settings: _Settings):
        logp, entropy, softmax = settings.run.logits_forward(
            logits.detach(), tokens, mask, settings.scale, settings.want_entropy
        )
        ctx.save_for_backward(logits, tokens, softmax, entropy)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None):
        logits, tokens, softmax, entropy = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None
        grad_logp = torch.zeros_like(entropy) if grad_logp is None else grad_logp
        values, settings = logits.detach(), ctx.settings
        out = values if settings.inplace else torch.empty_like(values)
        settings.run.logits_backward(values, tokens, softmax, entropy, grad_logp, grad_entropy, settings.scale, out)
        if (
            settings.inplace
        ):  # whoever else saved the logits, this node in a second backward too, is told that they are gone
            torch.autograd.graph.increment_version([values])
        return out, None, None, None


def logp_from_logits(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the taken tokens and entropies of the rows, without a second [B, T, V] buffer.

    logits / temperature -> softmax of each row (one read) -> logp, entropy; both differentiable with respect to logits.

    Args:
        logits: [B, T, V] or packed [N, V]; float64, float32, bfloat16 or float16 (arithmetic in float32, float64 for
            float64). Any strides but 1 in V: a slice logits[:, :-1] is not copied. Any number of rows and any V.
        tokens: int64 or int32 [B, T] or [N].
        mask: like `tokens`; where zero, the row of logits is not read and both results are 0.
        temperature: positive; the logits are divided by it.
        inplace_backward: write d loss / d logits over the logits in the backward pass, which then needs no memory of
            its own. The logits must not be used after it, and a second backward raises.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (logp, entropy), [B, T] or [N], float32 (float64 for float64 logits). Logits of -inf have probability 0. Both
        are NaN in a row that holds NaN, +inf or nothing but -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; on the CPU also an unmasked token
            outside [0, V) (on a GPU, which is not read back, its results are NaN).
        RuntimeError: a backend that cannot run here.

    Source: softmax in one pass: Milakov and Gimelshein 2018 (arXiv 1805.02867), Algorithm 3.
    """
    return _logp_from_logits(logits, tokens, mask, temperature, inplace_backward, backend, want_entropy=True)


def _logp_from_logits(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    inplace_backward: bool,
    backend: str,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """`logp_from_logits`, whose entropy, a third of the arithmetic, has no size where nobody wants it."""
    mask, scale, run = _check_logits(logits, tokens, mask, temperature, inplace_backward, backend)
    packed = logits.dim() == 2
    rows = [x.unsqueeze(0) if packed and x is not None else x for x in (logits, tokens.detach().long(), mask)]
    logp, entropy = _LogpFromLogits.apply(*rows, _Settings(scale, inplace_backward, want_entropy, run))
    if not packed:
        return logp, entropy
    return logp.squeeze(0), entropy.squeeze(0) if want_entropy else entropy


def policy_loss_from_logits(
    logits: Tensor,
    tokens: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    inplace_backward: bool = False,
    mask: Tensor | None = None,
    objective: Objective = PPO(),
    entropy: Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, ClipStats]:
    """`policy_loss` from logits: log-softmax, entropy bonus, ratio, clip and KL without a second [B, T, V] buffer.

    logits -> logp, entropy (one read) -> policy_loss - entropy_coef * entropy -> d loss / d logits (one read, one
    write)

    Args:
        logits, tokens, mask, temperature, inplace_backward, backend: as `logp_from_logits`.
        old_logp: as `policy_loss`; None: the log-probabilities themselves, as in the first pass over a rollout.
        advantages: as `policy_loss`.
        entropy_coef: c; the loss gets -c times each token's entropy, aggregated like the policy term.
        objective: as `policy_loss`. `ASPO` and `AEPO` read the entropy of these logits, detached, unless `entropy=` is
            given.
        **options: the other keywords of `policy_loss`.

    Returns:
        (loss, stats), as `policy_loss`. A row without a softmax counts in `stats.nonfinite` and has a gradient of 0,
        and so has a masked row, whatever it holds.

    Raises:
        As `logp_from_logits` and `policy_loss`.

    Source: as `logp_from_logits` and the objective's docstring.
    """
    if unknown := options.keys() - policy_loss.__kwdefaults__.keys():
        raise TypeError(f"unexpected argument(s) {sorted(unknown)}; accepted: {sorted(policy_loss.__kwdefaults__)}")
    entropy_coef = number("entropy_coef", entropy_coef)
    if not abs(entropy_coef) <= torch.finfo(torch.float32).max:
        raise ValueError(f"entropy_coef must be finite in float32, got {entropy_coef!r}")
    by_objective = entropy is None and "entropy" in getattr(objective, "needs", ())
    logp, own_entropy = _logp_from_logits(
        logits, tokens, mask, temperature, inplace_backward, backend, want_entropy=by_objective or entropy_coef != 0
    )
    if by_objective:
        entropy = own_entropy.detach()
    options = {**policy_loss.__kwdefaults__, **options}
    options.update(mask=mask, objective=objective, entropy=entropy, backend=backend)
    old_logp = logp.detach() if old_logp is None else old_logp
    bonus = own_entropy if entropy_coef != 0 else None
    return run_policy_loss(logp, old_logp, advantages, options, bonus, entropy_coef)


def _check_logits(
    logits: Any, tokens: Any, mask: Any, temperature: Any, inplace_backward: Any, backend: str
) -> tuple[Tensor | None, float, ModuleType]:
    """(mask as bool, 1 / temperature, the backend's module)."""
    check_tensor("logits", logits)
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [B, T, V] or packed [N, V] with V > 0, got shape {list(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"logits must have stride 1 in V, got strides {list(logits.stride())}; pass a contiguous tensor"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride())) and inplace_backward:
        raise ValueError("inplace_backward=True needs logits with memory of their own in every row, got expanded ones")
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 or int32 tensor, got {got}")
    if tokens.shape != logits.shape[:-1] or tokens.device != logits.device:
        raise ValueError(
            f"tokens must be {list(logits.shape[:-1])} on {logits.device}, got {list(tokens.shape)} on {tokens.device}"
        )
    scale = 1.0 / between("temperature", temperature, 0.0)
    if not torch.finfo(torch.float32).tiny <= scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"temperature must have a reciprocal that is normal in float32, got {temperature!r}")
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward must be True or False, got {inplace_backward!r}")
    if mask is not None:
        check_mask(mask, tokens)
        mask = mask.detach() if mask.dtype == torch.bool else mask.detach() != 0
    backends.check_name(backend)
    run = backends.choose_objective(backend, logits.device.type)
    if logits.device.type == "cpu":
        outside = (tokens < 0) | (tokens >= logits.shape[-1])
        outside = outside if mask is None else outside & mask
        if bool(outside.any()):
            at = outside.nonzero()[0].tolist()
            raise ValueError(
                f"tokens{at} is {int(tokens[tuple(at)])}; accepted where unmasked: 0 to {logits.shape[-1] - 1}"
            )
    return mask, scale, run
