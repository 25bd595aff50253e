"""The reference backend: the executable specification, in plain torch, on any device and in float64 if asked."""

from fused_clip_adam.backends.reference_objective import bound_sums, logits_backward, logits_forward, policy_loss
from fused_clip_adam.backends.reference_step import (
    by_tensor,
    grad_square_sums,
    new_dots,
    place,
    prologue,
    reduce,
    sample_square_sums,
    tensor_table,
    unit_sums,
    update_,
)

__all__ = [
    "bound_sums",
    "grad_square_sums",
    "logits_backward",
    "logits_forward",
    "place",
    "policy_loss",
    "new_dots",
    "prologue",
    "reduce",
    "sample_square_sums",
    "by_tensor",
    "tensor_table",
    "unit_sums",
    "update_",
]
