"""A step from scores written out: weights by autograd, the gradient summed up in float64, `step()` of the reference.
The data of test_scores.py: numbers, layouts, and what must be refused.

Nothing here reads how the package does it. Lattice numbers (`lattice`) make every sum exact in float32, in any order:
with them a step from samples must have the very bits of a step from the finished gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fused_clip_adam as fca

NAN, INF = float("nan"), float("inf")

# ---------------------------------------------------------------- equations


def row_weights(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, by_sequence: bool = False, **options) -> Tensor:
    """w = d loss / d logp, by autograd through the loss in float64: one for each row of the stacks, flat."""
    wide = {name: x.double() if is_float(x) else x for name, x in options.items()}
    leaf = logp.detach().double().requires_grad_()
    loss, _ = fca.policy_loss(leaf, old_logp.double(), advantages.double(), backend="reference", **wide)
    (weights,) = torch.autograd.grad(loss, leaf)
    if not by_sequence:
        return weights.reshape(-1)
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))
    assert bool(((weights == 0) | ((weights - largest).abs() <= 1e-12 * largest.abs())).all()), "not alike in a row"
    return largest.reshape(-1)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def contract(weights: Tensor, stack: Tensor, p: Tensor) -> Tensor:
    """sum_b w_b S_b in float64, S_b of p's shape; a row of zero weight is not read."""
    used = weights != 0
    return torch.tensordot(weights[used].double(), rows_of(stack, weights, p)[used], dims=1)


def rows_of(stack: Tensor, weights: Tensor, p: Tensor) -> Tensor:
    """[B, *shape] or [B, T, *shape] -> float64 [rows, *shape]."""
    return stack.detach().double().reshape(len(weights), *p.shape)


def bounded(weights: Tensor, stacks: list[Tensor | None], params: list[Tensor], max_norm: float) -> Tensor:
    """Every w_b times min(1, max_norm / (|w_b S_b| + 1e-6)), the norm over all parameters."""
    squares = torch.zeros(len(weights), dtype=torch.float64)
    for stack, p in zip(stacks, params):
        if stack is not None:
            squares += rows_of(stack, weights, p).flatten(1).square().sum(1) if p.dim() else stack.double().square()
    used = weights != 0
    norms = weights[used].double().abs() * squares[used].sqrt()
    out = torch.zeros(len(weights), dtype=torch.float64)
    out[used] = weights[used].double() * (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return out


def largest_error(opt, params, hand, wide) -> float:
    """The largest error of the parameters, and of each state, over the largest magnitude among all parameters: in one
    element alone the samples may cancel, and roundings of the sum are as large as its terms.
    """
    pairs = {"p": list(zip(params, wide))}
    for p, q in zip(params, wide):
        assert opt.state[p].keys() == hand.state[q].keys()
        for name, value in opt.state[p].items():
            if name[0].isupper():  # what a rule remembers, as of the last state_dict()
                continue
            pairs.setdefault(name, []).append((value, hand.state[q][name]))
    worst = 0.0
    for both in pairs.values():
        got, expected = (torch.cat([x.detach().cpu().double().flatten() for x in side]) for side in zip(*both))
        assert bool(got.isfinite().all()), "a result is not finite"
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)))
    return worst


def step_by_hand(opt, params, stacks, weights, *, stats=None, max_sample_norm=None) -> None:
    """The gradient in memory, then `step()`."""
    if max_sample_norm is not None:
        weights = bounded(weights, stacks, params, max_sample_norm)
    for p, stack in zip(params, stacks):
        p.grad = None if stack is None else contract(weights, stack, p).to(p.dtype)
    if stats is not None:
        opt.observe(stats)
    opt.step()


# ---------------------------------------------------------------- data

SHAPES = ((), (5,), (7, 3), (2, 0), (33, 17))


def make_start(dtype: torch.dtype, shapes=SHAPES, seed: int = 0) -> list[Tensor]:
    """Values that bfloat16 and float16 hold exactly, so that every dtype starts at the same point."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(torch.bfloat16).to(dtype) for s in shapes]


def make_stacks(params, rows: tuple[int, ...], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Scores in bfloat16's numbers (all within float16's range), stored in `dtype`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(*rows, *p.shape, generator=generator).to(torch.bfloat16).to(dtype) for p in params]


def lattice(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/16 up to 2: exact in every dtype, and so are sums of some thousand products of two of them."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return (torch.randint(-32, 33, shape, generator=generator) / 16).to(dtype)


def poison(stack: Tensor, weights: Tensor) -> Tensor:
    """NaN and infinities in every row of zero weight."""
    rows = (weights == 0).nonzero().flatten().tolist()
    out = stack.clone(memory_format=torch.contiguous_format)
    flat = out.view(len(weights), out.numel() // max(len(weights), 1))
    for row in rows:
        flat[row] = (NAN, INF, -INF)[row % 3]
    return out


def sent(x: Any, device: str) -> Any:
    """All tensors within lists and dicts on the device, but for those on meta."""
    if isinstance(x, dict):
        return {k: sent(v, device) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [sent(v, device) for v in x]
    return x.to(device) if isinstance(x, Tensor) and x.device.type != "meta" else x


# ---------------------------------------------------------------- layouts of a stack, and of what else it lies in


def sliced(x: Tensor) -> Tensor:
    """A part of a larger tensor that holds NaN."""
    big = torch.full([n + 3 for n in x.shape], NAN, dtype=x.dtype, device=x.device)
    return big[tuple(slice(1, 1 + n) for n in x.shape)].copy_(x)


def samples_last(x: Tensor) -> Tensor:
    """Samples next to each other, as a product over a batch leaves them."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def backwards(x: Tensor) -> Tensor:
    """All dimensions in the other order in memory."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def gapped(x: Tensor) -> Tensor:
    """Every second element of a larger tensor that holds NaN."""
    return torch.full((*x.shape, 2), NAN, dtype=x.dtype, device=x.device)[..., 0].copy_(x)


def gapped_samples(x: Tensor) -> Tensor:
    """Each sample is dense; there is room between them."""
    return torch.full((2 * x.shape[0], *x.shape[1:]), NAN, dtype=x.dtype, device=x.device)[::2].copy_(x)


def misaligned(x: Tensor) -> Tensor:
    """Not at a multiple of any vector's size."""
    return torch.full((x.numel() + 1,), NAN, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


LAYOUTS = (sliced, samples_last, backwards, gapped, gapped_samples, misaligned)
ODD_MEMORY = {
    "negative bit": lambda x: torch._neg_view(-x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "copy on write": torch._lazy_clone,
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
}


# What a stack of the first parameter (p) may lie in: p itself, the next parameter q, a state of either.
OVERLAPS = {
    "the parameter": lambda opt, p, q: p.detach()[None],
    "the parameter for all samples": lambda opt, p, q: p.detach().expand(3, *p.shape),
    "another parameter": lambda opt, p, q: q.detach()[None],
    "a state": lambda opt, p, q: opt.state[p]["exp_avg"][None],
    "another's state": lambda opt, p, q: opt.state[q]["max_exp_avg_sq"][None],
    "the end of a parameter": lambda opt, p, q: torch.as_strided(p.detach(), (2, *p.shape), (1, 1), 1000),
}


# ---------------------------------------------------------------- what must be refused: change, error, words of it


def base_call() -> dict[str, Any]:
    logp = torch.tensor([-1.0, -0.5, -0.25, -2.0])
    return {
        "scores": [torch.ones(4, 5), torch.ones(4, 3, 2)],
        "logp": logp,
        "old_logp": logp - 0.1,
        "advantages": torch.tensor([1.0, -1.0, 0.5, 2.0]),
    }


def tokens(**other) -> dict[str, Any]:
    """A [4, 3] batch with rows of tokens."""
    logp = torch.full((4, 3), -0.5)
    stacks = [torch.ones(4, 3, 5), torch.ones(4, 3, 3, 2)]
    return dict(scores=stacks, logp=logp, old_logp=logp.clone(), advantages=torch.ones(4)) | other


def sequences(objective, **other) -> dict[str, Any]:
    return tokens(scores=[torch.ones(4, 5), torch.ones(4, 3, 2)], objective=objective) | other


def two_tensors(x: Tensor) -> Tensor:
    """DTensor and its like hold their memory elsewhere; torch's own two-tensor wrapper stands for them."""
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(x, x.clone())


FIVE, SIX = torch.ones(4, 5), torch.ones(4, 3, 2)
# Changes of `base_call`, or of a call of `step_from_gradients` where they are of scores alone -> error, and its words.
BAD_SCORES: dict[str, tuple[Any, type | tuple[type, ...], str]] = {
    "too few": ([FIVE], ValueError, "scores|gradients"),
    "too many": ([FIVE, SIX, FIVE], ValueError, "scores|gradients"),
    "none at all": ([], ValueError, "scores|gradients"),
    "nothing but None": ([None, None], ValueError, "scores|gradients"),
    "None": (None, TypeError, "scores|gradients"),
    "a tensor": (FIVE, TypeError, "scores|gradients"),
    "a name": ("scores", TypeError, "scores|gradients"),
    "numbers": ([1.0, 2.0], TypeError, "scores|gradients"),
    "values of a dict": ({0: FIVE, 1: SIX}.values(), TypeError, "scores|gradients"),
    "a dict of nothing": ({}, ValueError, "scores|gradients"),
    "a dict of a stranger": ({torch.ones(5): FIVE}, (ValueError, KeyError, TypeError), "scores|gradients"),
    "a dict by index": ({0: FIVE, 1: SIX}, (ValueError, KeyError, TypeError), "scores|gradients"),
    "another B in one": ([FIVE, SIX[:3]], ValueError, "scores|gradients"),
    "another shape": ([torch.ones(4, 6), SIX], ValueError, "scores|gradients"),
    "another rank": ([FIVE, torch.ones(4, 6)], ValueError, "scores|gradients"),
    "no batch": ([torch.ones(5), SIX], ValueError, "scores|gradients"),
    "transposed": ([FIVE, SIX.mT], ValueError, "scores|gradients"),
    "samples last": ([FIVE.mT, SIX], ValueError, "scores|gradients"),
    "int64": ([FIVE, SIX.long()], TypeError, "scores|gradients"),
    "bool": ([FIVE, SIX.bool()], TypeError, "scores|gradients"),
    "complex": ([FIVE, SIX.to(torch.complex64)], TypeError, "scores|gradients"),
    "float64": ([FIVE, SIX.double()], TypeError, "scores|gradients"),
    "float8": ([FIVE, SIX.to(torch.float8_e4m3fn)], TypeError, "scores|gradients"),
    "meta": ([FIVE, SIX.to("meta")], ValueError, "scores|gradients"),
    "sparse": ([FIVE, SIX.to_sparse()], TypeError, "scores|gradients"),
    "a wrapper": ([FIVE, two_tensors(SIX)], TypeError, "scores|gradients|TwoTensor"),
}
BAD_BOUNDS: dict[str, tuple[Any, type | tuple[type, ...], str]] = {
    "zero bound": (dict(max_sample_norm=0.0), ValueError, "max_sample_norm"),
    "negative bound": (dict(max_sample_norm=-1.0), ValueError, "max_sample_norm"),
    "NaN bound": (dict(max_sample_norm=NAN), ValueError, "max_sample_norm"),
    "a name for a bound": (dict(max_sample_norm="1"), TypeError, "max_sample_norm"),
    "noise without a bound": (dict(noise_multiplier=1.0), ValueError, "noise_multiplier"),
    "negative noise": (dict(max_sample_norm=1.0, noise_multiplier=-1.0), ValueError, "noise_multiplier"),
    "NaN noise": (dict(max_sample_norm=1.0, noise_multiplier=NAN), ValueError, "noise_multiplier"),
    "infinite noise": (dict(max_sample_norm=1.0, noise_multiplier=INF), ValueError, "noise_multiplier"),
    "a name for noise": (dict(max_sample_norm=1.0, noise_multiplier="1"), TypeError, "noise_multiplier"),
    "a seed for a generator": (
        dict(max_sample_norm=1.0, noise_multiplier=1.0, noise_generator=3), TypeError, "noise_generator",
    ),
}  # fmt: skip
BAD_WEIGHTS: dict[str, tuple[Any, type | tuple[type, ...], str]] = {
    "too short": (torch.ones(3), ValueError, "weights"),
    "a column": (torch.ones(4, 1), ValueError, "weights"),
    "one for all": (torch.tensor(1.0), ValueError, "weights"),
    "a number": (1.0, TypeError, "weights"),
    "a list": ([1.0] * 4, TypeError, "weights"),
    "int64": (torch.ones(4, dtype=torch.int64), TypeError, "weights"),
    "bool": (torch.ones(4, dtype=torch.bool), TypeError, "weights"),
    "complex": (torch.ones(4, dtype=torch.complex64), TypeError, "weights"),
    "meta": (torch.ones(4, device="meta"), ValueError, "weights"),
    "sparse": (torch.ones(4).to_sparse(), TypeError, "weights"),
    "a wrapper": (two_tensors(torch.ones(4)), TypeError, "weights|TwoTensor"),
}
BAD_INPUTS: dict[str, tuple[dict[str, Any], type | tuple[type, ...], str]] = {
    "short old_logp": (dict(old_logp=torch.ones(3)), ValueError, "old_logp"),
    "short advantages": (dict(advantages=torch.ones(3)), ValueError, "advantages"),
    "short mask": (dict(mask=torch.ones(3)), ValueError, "mask"),
    "short logp": (dict(logp=torch.ones(3)), ValueError, "logp|scores"),
    "all but the scores short": (
        dict(logp=torch.ones(3), old_logp=torch.ones(3), advantages=torch.ones(3)), ValueError, "scores",
    ),
    "logp of tokens, rows of samples": (
        dict(logp=torch.ones(4, 3), old_logp=torch.ones(4, 3), advantages=torch.ones(4)), ValueError, "scores",
    ),
    "logp without a dimension": (
        dict(logp=torch.tensor(0.0), old_logp=torch.tensor(0.0), advantages=torch.tensor(0.0)), ValueError, "logp",
    ),
    "int64 logp": (dict(logp=torch.ones(4, dtype=torch.int64)), TypeError, "logp"),
    "complex logp": (dict(logp=torch.ones(4, dtype=torch.complex64)), TypeError, "logp"),
    "logp on meta": (dict(logp=torch.ones(4, device="meta")), (ValueError, TypeError), "logp|meta"),
    "a list for logp": (dict(logp=[0.0] * 4), TypeError, "logp"),
    "a list for advantages": (dict(advantages=[0.0] * 4), TypeError, "advantages"),
    "a class for an objective": (dict(objective=fca.PPO), TypeError, "objective"),
    "a name for an objective": (dict(objective="ppo"), TypeError, "objective"),
    "an unknown aggregation": (dict(aggregation="mean"), ValueError, "aggregation"),
    "constant without normalizer": (dict(aggregation="constant"), ValueError, "normalizer"),
    "negative normalizer": (dict(normalizer=-1.0), ValueError, "normalizer"),
    "kl without a reference": (dict(kl_coef=0.1), ValueError, "ref_logp"),
    "NaN kl_coef": (dict(kl_coef=NAN, ref_logp=torch.zeros(4)), ValueError, "kl_coef"),
    "an unknown estimator": (dict(kl_coef=0.1, ref_logp=torch.zeros(4), kl_estimator="k4"), ValueError, "kl_estimator"),
    "what the objective does not read": (dict(entropy=torch.zeros(4)), (TypeError, ValueError), "entropy"),
    "what the objective needs": (dict(objective=fca.PPOEWMA()), (TypeError, ValueError), "ewma_logp"),
    "sequences that it needs": (dict(objective=fca.GSPO()), ValueError, "sequence_ids"),
    "an unknown option": (dict(clip=0.2), TypeError, "clip"),
    "a backend": (dict(backend="cpu"), TypeError, "backend"),
    "a closure": (dict(closure=lambda: 0.0), TypeError, "closure"),
    "rows of sequences for PPO": (sequences(fca.PPO()), ValueError, "PPO|scores"),
    "rows of sequences for GMPO": (sequences(fca.GMPO()), ValueError, "GMPO|scores"),
    "rows of sequences and of tokens": (tokens(scores=[torch.ones(4, 3, 5), SIX], objective=fca.GSPO()), ValueError,
                                        "scores"),
    "rows of sequences and a KL term": (
        sequences(fca.GSPO(), kl_coef=0.1, ref_logp=torch.zeros(4, 3)), ValueError, "kl_coef",
    ),
    "rows of sequences, advantages of tokens": (
        sequences(fca.VESPO(), advantages=torch.ones(4, 3)), ValueError, "advantages",
    ),
    "rows of packed sequences": (
        dict(logp=torch.zeros(12), old_logp=torch.zeros(12), objective=fca.GSPO(),
             sequence_ids=torch.arange(12) // 3), ValueError, "scores",
    ),
    "tokens in another order": (tokens(scores=[torch.ones(3, 4, 5), torch.ones(3, 4, 3, 2)]), ValueError, "scores"),
}  # fmt: skip
BAD_GROUPS = {
    "lr": -1.0,
    "eps": NAN,
    "weight_decay": -1.0,
    "betas": (1.0, 0.9),
    "overshoot": "coast",
    "grad_clip": "much",
    "reset": "often",
}


# ---------------------------------------------------------------- all that a step may write


def frozen(x: Any) -> Any:
    """A nested copy that compares by dtype, shape and bits."""
    if isinstance(x, Tensor):
        if x.is_sparse or x.device.type == "meta":
            return repr(x)
        bits = x.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        return str(x.dtype), tuple(x.shape), bits.view(torch.uint8).numpy().tobytes() if x.numel() else b""
    if isinstance(x, dict):
        return tuple((k, frozen(v)) for k, v in x.items())
    return tuple(map(frozen, x)) if isinstance(x, (list, tuple)) else repr(x)


def snapshot(opt, counters: bool = True) -> Any:
    """counters: with those of skipped steps and of calls, which a skipped step moves on."""
    state = opt.state_dict()
    for group in state["param_groups"] if not counters else ():
        extras = group.get("fused_clip_adam", {})
        extras.pop("steps_skipped", None)
        for memory in extras.get("memory", {}).values():
            memory.pop("steps", None)
    params = [p for group in opt.param_groups for p in group["params"]]
    return (
        frozen(state),
        frozen([(p, p.grad) for p in params]),
        frozen([opt.grad_norm, opt.step_count_skipped if counters else None]),
        len(opt.state),
    )
