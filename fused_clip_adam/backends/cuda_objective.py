"""The compiled CUDA kernels of the objective: makes the tensors they write, then launches them.

Arguments and results are described in reference_objective.py. Nothing here waits for the device or reads from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_clip_adam.backends import cuda
from fused_clip_adam.backends.reference_objective import NEEDS_SEQUENCE, SEQUENCE_MEAN

__all__ = ["bound_sums", "logits_backward", "logits_forward", "policy_loss"]

_SUMS = 15
"""What a block of token_kernel leaves: the statistics and the loss."""
_STATS, _SEQUENCE_NUMBERS = 14, 3
_BLOCKS, _BLOCK_TOKENS = 1024, 512
"""Blocks that fill any device while their sums are still few, and the tokens below which one more is no gain."""


def _blocks(tokens: int) -> int:
    """A function of the number of tokens alone, so that sums are taken in the same order on every device."""
    return max(1, min(_BLOCKS, -(-tokens // _BLOCK_TOKENS)))


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches, three where something is gathered from sequences first."""
    dtype, device = _arithmetic(logp), logp.device
    empty = torch.empty(0, 0, dtype=dtype, device=device)
    # Contiguous, whatever the strides of logp: empty_like would keep them.
    grad = torch.empty(logp.shape, dtype=dtype, device=device) if want_grad else empty
    grad_entropy = empty
    if want_grad and entropy is not None:
        grad_entropy = torch.empty(logp.shape, dtype=dtype, device=device)
    loss, scale = torch.empty(2, dtype=dtype, device=device).unbind()
    stats = torch.empty(_STATS, dtype=torch.float32, device=device)
    gathers = aggregation == SEQUENCE_MEAN or rule in NEEDS_SEQUENCE
    sequences = torch.empty(num_sequences * gathers, _SEQUENCE_NUMBERS, dtype=torch.float64, device=device)
    partials = torch.empty(_SUMS, _blocks(logp.numel()), dtype=torch.float64, device=device)
    _policy_loss(
        logp,
        old_logp,
        advantages,
        mask,
        weights,
        aux,
        ref_logp,
        entropy,
        sequence_ids,
        sequence_order,
        sequence_offsets,
        num_sequences,
        rule,
        scalars,
        bounds,
        aggregation,
        normalizer,
        normalizer_tensor,
        kl_coef,
        kl_estimator,
        entropy_coef,
        loss,
        grad,
        grad_entropy,
        scale,
        stats,
        sequences,
        partials,
    )
    return loss, grad, grad_entropy, scale, stats


def bound_sums(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None, lows: list[float], highs: list[float]
) -> Tensor:
    """Two launches."""
    levels = len(lows) + len(highs)
    partials = torch.empty(levels, _blocks(logp.numel()), dtype=torch.float64, device=logp.device)
    out = torch.empty(levels, dtype=torch.float64, device=logp.device)
    _bound_sums(logp, old_logp, advantages, mask, lows, highs, partials, out)
    return out


def logits_forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, inv_temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, which reads the logits once."""
    numbers = torch.empty(3 + want_entropy, *tokens.shape, dtype=_arithmetic(logits), device=logits.device)
    softmax, logp, *entropy = numbers[:2], *numbers[2:]
    _logits_forward(logits, tokens, mask, inv_temperature, logp, entropy[0] if want_entropy else None, softmax)
    return logp, entropy[0] if want_entropy else numbers[:0, 0], softmax


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
    """One launch, which reads the logits once and writes `out` once."""
    _logits_backward(logits, tokens, softmax, entropy, grad_logp, grad_entropy, inv_temperature, out)


if not cuda.unavailable():
    _policy_loss = torch.ops.fused_clip_adam.cuda_policy_loss.default
    _bound_sums = torch.ops.fused_clip_adam.cuda_bound_sums.default
    _logits_forward = torch.ops.fused_clip_adam.cuda_logits_forward.default
    _logits_backward = torch.ops.fused_clip_adam.cuda_logits_backward.default
