"""A step's gradient as a weighted sum over samples that no one writes down: what `step_from_scores` hands the kernels.

    scores, log-probabilities -> checks -> weights (d loss / d logp, on the device) -> Samples -> optimizer._step

The kernels form g = sum_b w_b S_b (+ noise) where they would read a gradient, see csrc/samples.h.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_clip_adam.batches import FLOATING
from fused_clip_adam.distributed import moved
from fused_clip_adam.objectives import losses
from fused_clip_adam.objectives.objective import number
from fused_clip_adam.objectives.stats import ClipStats


@dataclasses.dataclass
class Samples:
    """Stacks of samples, one for each parameter that is to move, and what makes a gradient of them."""

    stacks: dict[Tensor, Tensor]  # by parameter: [count, *its shape]
    count: int
    weights: Tensor  # float64 [count]; a sample of weight 0 is not read
    skip: Tensor  # bool 0-d: no sample counts, so that the step changes nothing
    observed: Tensor | None = None  # float32 [2]: suppressed and total mass
    max_sample_norm: float | None = None
    noise: float = 0.0  # standard deviation, of every element of the gradient
    generator: torch.Generator | None = None  # of the noise's seed; None: the device's own

    def on(self, device: torch.device) -> PlacedSamples:
        """What the kernels of a device read, but for the noise's seed."""
        return PlacedSamples(self.count, moved(self.weights, device).clone(), None, self.noise)

    def drawn_seed(self) -> Tensor | None:
        """int64 [1] where there is noise. Advances the generator: call it when nothing can be refused any more."""
        if self.noise == 0.0:
            return None
        device = self.weights.device if self.generator is None else self.generator.device
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=self.generator)


@dataclasses.dataclass
class PlacedSamples:
    """Of one device. `weights` are its own: `max_sample_norm` changes them there."""

    count: int
    weights: Tensor
    seed: Tensor | None
    noise: float


def in_order(name: str, stacks: Any, params: list[Tensor]) -> list[Tensor | None]:
    """A stack or None for every parameter, at least one stack.

    Args:
        name: of the argument, for messages. stacks: one for each parameter, or by parameter.

    Raises:
        TypeError: neither, or what is in it is no plain tensor. ValueError: of another length, or nothing in it.
    """
    if isinstance(stacks, dict):
        known = {id(p) for p in params}
        if any(id(p) not in known for p in stacks):
            raise ValueError(f"{name} has a key that is no parameter of this optimizer")
        stacks = [stacks.get(p) for p in params]
    if isinstance(stacks, (Tensor, str)) or not isinstance(stacks, Sequence):
        raise TypeError(f"{name} must be a list with a tensor for each parameter, or a dict by parameter")
    if len(stacks) != len(params):
        raise ValueError(f"{name} has {len(stacks)} entries, but the optimizer {len(params)} parameters")
    for i, stack in enumerate(stacks):
        if stack is not None and (not isinstance(stack, Tensor) or is_traceable_wrapper_subclass(stack)):
            raise TypeError(f"{name}[{i}] must be a plain tensor or None, got {type(stack).__name__}")
    if all(stack is None for stack in stacks):
        raise ValueError(f"{name} must hold a tensor for at least one parameter")
    return list(stacks)


def stacks_of(
    name: str, stacks: list[Tensor | None], params: list[Tensor], leading: tuple[int, ...]
) -> dict[Tensor, Tensor]:
    """By parameter, its stack as [samples, *shape].

    Args:
        name: of the argument, for messages. stacks: of `in_order`. leading: the dimensions of a stack before its
            parameter's; they become one.

    Raises:
        TypeError, ValueError: names what does not fit.
    """
    out = {}
    for i, (p, stack) in enumerate(zip(params, stacks)):
        if stack is None:
            continue
        if tuple(stack.shape) != (*leading, *p.shape):
            raise ValueError(f"{name}[{i}] must be {[*leading, *p.shape]}, got {list(stack.shape)}")
        if stack.layout is not torch.strided:
            raise TypeError(f"{name}[{i}] has layout {stack.layout}; accepted: dense (torch.strided)")
        if p.dtype not in FLOATING:
            raise TypeError(f"parameter {i} is {p.dtype}; accepted: float64, float32, bfloat16, float16")
        wide = (torch.float64, torch.float32) if p.dtype == torch.float64 else FLOATING[1:]
        if stack.dtype not in wide:
            accepted = ", ".join(str(dtype) for dtype in wide)
            raise TypeError(f"{name}[{i}] is {stack.dtype}; accepted for a {p.dtype} parameter: {accepted}")
        if stack.device.type == "meta" or p.device.type == "meta":
            raise ValueError(f"{name}[{i}] or its parameter is on the meta device and holds no data")
        if stack.device != p.device:
            raise ValueError(f"{name}[{i}] is on {stack.device} but its parameter on {p.device}")
        try:
            out[p] = stack.detach().view(math.prod(leading), *p.shape)
        except RuntimeError:
            raise ValueError(
                f"{name}[{i}]: its first {len(leading)} dimensions cannot be viewed as one; pass it .contiguous()"
            ) from None
    return out


def score_weights(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, options: dict[str, Any], by_sequence: bool
) -> tuple[Tensor, ClipStats]:
    """(d loss / d logp as float64 [rows], statistics), on the device and without autograd.

    Args:
        options: keywords of `policy_loss`. by_sequence: a row is a sequence of [B, T] log-probabilities.

    Raises:
        TypeError, ValueError, RuntimeError: as `policy_loss`; an objective or input that weighs tokens of one sequence
            differently, where a row is a sequence.
    """
    if by_sequence:
        _check_by_sequence(advantages, options)
    with torch.no_grad():
        inputs, call, run = losses.prepare(logp, old_logp, advantages, options)
        _, grad, _, scale, stats = run(*call, True)
        weights = (grad * scale if inputs.slope is None else grad * scale * inputs.slope).double().reshape(logp.shape)
        if by_sequence:  # the tokens that count share one weight, the others have none
            most = weights.abs().argmax(dim=1, keepdim=True) if logp.shape[1] else None
            weights = weights.new_zeros(logp.shape[0]) if most is None else weights.gather(1, most).squeeze(1)
    return weights.reshape(-1).contiguous(), ClipStats(stats)


def _check_by_sequence(advantages: Tensor, options: dict[str, Any]) -> None:
    objective = options["objective"]
    if not getattr(objective, "weighs_by_sequence", False):
        raise ValueError(
            f"scores with one row a sequence need an objective whose gradient is the same for all of its tokens (GSPO, "
            f"LUSPO, VESPO), got {objective!r}; pass scores of single tokens, [B, T, *shape]"
        )
    if options["kl_coef"]:
        raise ValueError("kl_coef: the KL term differs from token to token; it needs scores of single tokens")
    if isinstance(advantages, Tensor) and advantages.dim() != 1:
        raise ValueError(f"advantages must be [B] where a row is a sequence, got {list(advantages.shape)}")


def noise_of(
    max_sample_norm: float | None, noise_multiplier: float, generator: torch.Generator | None
) -> dict[str, Any]:
    """The arguments of `Samples` that bound samples and add noise.

    Raises:
        TypeError, ValueError: not numbers, out of range, or noise without the bound that it is measured by.
    """
    if max_sample_norm is not None:
        max_sample_norm = number("max_sample_norm", max_sample_norm)
        if not 0.0 < max_sample_norm < math.inf:
            raise ValueError(f"max_sample_norm must be positive and finite, got {max_sample_norm!r}")
    noise_multiplier = number("noise_multiplier", noise_multiplier)
    if not 0.0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be at least 0 and finite, got {noise_multiplier!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"noise_generator must be a torch.Generator, got {type(generator).__name__}")
    if noise_multiplier != 0.0 and max_sample_norm is None:
        raise ValueError("noise_multiplier counts in units of max_sample_norm, which is None")
    noise = noise_multiplier * max_sample_norm if noise_multiplier else 0.0
    return {"max_sample_norm": max_sample_norm, "noise": noise, "generator": generator}


def sample_factors(square_sums: Tensor, weights: Tensor, max_sample_norm: float) -> Tensor:
    """min(1, max_sample_norm / (|w_b| |S_b| + 1e-6)), as clip_grad_norm_ has it; NaN where the norm is not finite."""
    norms = square_sums.sqrt() * weights.abs()
    return torch.where(norms.isfinite(), (max_sample_norm / (norms + 1e-6)).clamp(max=1.0), torch.nan)
