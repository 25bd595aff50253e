"""Closed forms: how far Adam's momentum carries a parameter after its gradient has become zero, and bytes moved.

Source: arXiv 2601.05002, App. D.2 (with k counted from the last non-zero gradient), generalised to finite T and eps.
"""

from __future__ import annotations

import math


def residual_ratio(
    k: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    history: float = math.inf,
    eps: float = 0.0,
    v_hat: float = 1.0,
) -> float:
    """R_k: the update k >= 0 steps after the gradient became exactly zero, over the last update before.

    R_k = A_k (sqrt(v_hat) + eps) / (sqrt(v_hat B_k) + eps),
    A_k = beta1^k (1 - beta1^T) / (1 - beta1^(T+k)), B_k likewise with beta2.

    Args:
        history: T, the gradient steps before; infinite for a long run.
        eps: the optimizer's eps; at 0 the result does not depend on `v_hat` or on what the gradients were.
        v_hat: the bias-corrected second moment at step T.

    Raises:
        ValueError: k < 0, history < 1, or a beta outside [0, 1).
    """
    if k < 0 or history < 1:
        raise ValueError(f"k must be at least 0 and history at least 1, got {k!r} and {history!r}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {beta!r}")

    def decay(beta: float) -> float:
        return beta**k * (1 - beta**history) / (1 - beta ** (history + k))

    return decay(beta1) * (math.sqrt(v_hat) + eps) / (math.sqrt(v_hat * decay(beta2)) + eps)


def total_coast(beta1: float = 0.9, beta2: float = 0.999) -> float:
    """Sum of R_k over k >= 1, long history, eps = 0: beta1 / (sqrt(beta2) - beta1), in units of the last update.

    Raises:
        ValueError: beta1^2 >= beta2, where the coast never ends.
    """
    if not 0.0 <= beta1 < 1.0 or not 0.0 <= beta2 < 1.0 or beta1 * beta1 >= beta2:
        raise ValueError(f"needs 0 <= beta1 < sqrt(beta2) < 1, got betas {(beta1, beta2)!r}")
    return beta1 / (math.sqrt(beta2) - beta1)


def bytes_per_element(
    param: int = 4, grad: int = 4, state: int = 4, *, norm: bool = False, amsgrad: bool = False
) -> int:
    """Bytes a step must move per parameter element, reading and writing, at the given storage widths.

    Reads p, g, m, v and writes p, m, v; a norm of this step's gradients reads g once more; amsgrad adds a state.
    """
    return 2 * param + grad + 4 * state + (grad if norm else 0) + (2 * state if amsgrad else 0)
