"""step_from_scores and step_from_gradients against the gradient in memory and `step()`, see scores_by_hand.py.

Two oracles. Lattice numbers sum up without a rounding, so that a step from samples must have the bits of the same
backend's `step()`: most tests. Real objectives run against the reference in float64, weights by autograd.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import os
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from by_hand import HOSTS
from cases import EPS, RULES, assert_rounded_once, bitwise_equal, gpu_targets, make_stats, tolerance
from cases import SHAPES as ALL_SHAPES
from cases import results as plain_results
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import AGGREGATIONS, ESTIMATORS, OBJECTIVES, make_batch, packed, wanted_by
from scores_by_hand import (
    BAD_BOUNDS,
    BAD_GROUPS,
    BAD_INPUTS,
    BAD_SCORES,
    BAD_WEIGHTS,
    FIVE,
    INF,
    LAYOUTS,
    NAN,
    ODD_MEMORY,
    OVERLAPS,
    SHAPES,
    SIX,
    backwards,
    base_call,
    bounded,
    contract,
    frozen,
    gapped,
    largest_error,
    lattice,
    make_stacks,
    make_start,
    poison,
    row_weights,
    sent,
    sliced,
    snapshot,
    step_by_hand,
    tokens,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fused_clip_adam as fca
from fused_clip_adam.backends import native

# Under Triton's interpreter this would take a minute: tests/test_samples_triton.py is for that.
TARGETS = [*HOSTS, *(target for target in gpu_targets().items() if target != ("triton", "cpu"))]
on_targets = pytest.mark.parametrize("backend, device", TARGETS)
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
CLASSES = (fca.FusedClipAdamW, fca.FusedClipAdam, fca.FusedFAdam)

RULES_OF_FADAM = ("adamw", "clip", "clip lagged", "clip per tensor", "zclip", "autoclip", "adagc")


def options_of(rule: str) -> dict[str, Any]:
    return {"lr": 0.01, "weight_decay": 0.1, **RULES[rule]}


def build(cls, values: list[Tensor], backend: str, device: str, **options):
    params = [x.to(device, copy=True).requires_grad_() for x in values]
    return cls(params, backend=backend, **options), params


def results(opt, params) -> list[Tensor]:
    """Everything a step writes."""
    return [*plain_results(opt, params), opt.grad_norm.cpu(), opt.step_count_skipped.cpu()]


def exact_rows(params, rows: int, step: int, dtype: torch.dtype, zeros: float = 0.3) -> tuple[list[Tensor], Tensor]:
    """Lattice stacks and weights, some of them zero: their sums have no rounding."""
    stacks = [lattice(rows, *p.shape, seed=100 * step + i, dtype=dtype) for i, p in enumerate(params)]
    weights = lattice(rows, seed=100 * step + 99)
    generator = torch.Generator().manual_seed(step)
    weights[torch.rand(rows, generator=generator) < zeros] = 0.0
    if rows and not weights.any():
        weights[-1] = 0.5
    return stacks, weights


def finished_step(opt, params, stacks, weights, stats=None) -> None:
    """The same backend's `step()` on the exact sums, in float32 where the parameter is narrower."""
    for p, stack in zip(params, stacks):
        p.grad_dtype = None
        dtype = torch.promote_types(p.dtype, F32)
        p.grad = None if stack is None else contract(weights.cpu(), stack.cpu(), p).to(p.device, dtype)
    if stats is not None:
        opt.observe(stats)
    opt.step()


# ---------------------------------------------------------------- exact sums: the bits of step()


def assert_bits_of_step(cls, values, backend, device, *, rows=6, steps=3, stack_dtype=None, lay=None, **options):
    """`lay`: (stack) -> the same values elsewhere in memory."""
    (ours, own), (theirs, other) = (build(cls, values, backend, device, **options) for _ in range(2))
    moved = [p.detach().clone() for p in own]
    for step in range(steps):
        dtype = stack_dtype or torch.promote_types(values[0].dtype, F32)
        stacks, weights = exact_rows(own, rows, step, dtype)
        given = sent([poison(x, weights) for x in stacks], device)
        given = given if lay is None else [lay(x) for x in given]
        before = frozen(given)
        ours.observe(make_stats(step, device))
        ours.step_from_gradients(given, weights.to(device))
        assert frozen(given) == before, "scores are read, never written"
        finished_step(theirs, other, stacks, weights, make_stats(step, device))
        assert bitwise_equal(results(ours, own), results(theirs, other)), f"step {step}"
    assert any(not torch.equal(p, q) for p, q in zip(own, moved))


@on_targets
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_sums_give_the_bits_of_step(backend, device, dtype, rule):
    shapes = ALL_SHAPES.values() if dtype == F32 and (backend, device) != ("triton", "cpu") else SHAPES
    for state_dtype in (None, F32) if dtype in (BF16, F16) else (None,):
        options = options_of(rule) | dict(state_dtype=state_dtype)
        assert_bits_of_step(fca.FusedClipAdamW, make_start(dtype, shapes), backend, device, **options)


@on_targets
@pytest.mark.parametrize(
    "cls, rule",
    [(fca.FusedFAdam, rule) for rule in RULES_OF_FADAM]
    + [(fca.FusedClipAdam, rule) for rule in ("adamw", "clip", "align", "when clipped", "spam", "maximize")],
)
def test_other_classes_give_the_bits_of_step(backend, device, cls, rule):
    for dtype in (F32, BF16):
        assert_bits_of_step(cls, make_start(dtype), backend, device, **options_of(rule))


BATCH_SIZES = (1, 2, 7, 64, 1000)


@on_targets
@pytest.mark.parametrize("rows", BATCH_SIZES)
def test_any_number_of_samples(backend, device, rows):
    for dtype, stack_dtype in ((F64, F64), (F32, F16), (BF16, BF16)):
        options = dict(stack_dtype=stack_dtype, rows=rows, grad_clip=0.7, overshoot="align")
        assert_bits_of_step(fca.FusedClipAdamW, make_start(dtype), backend, device, **options)


def without_lr(backend, device, dtype=F64, values=None, **options):
    """An optimizer whose `exp_avg` is the gradient it was given, and whose parameters stay where they are."""
    values = [torch.zeros(5, dtype=dtype), torch.zeros(4, 3, dtype=dtype)] if values is None else values
    return build(fca.FusedClipAdamW, values, backend, device, lr=0.0, betas=(0.0, 0.0), **options)


def formed(opt, params) -> list[Tensor]:
    return [opt.state[p]["exp_avg"].clone().cpu() for p in params]


STORED = [(p, state, stack) for p in DTYPES for state in (None, F32) for stack in DTYPES
          if (stack == F64 and p == F64) or (stack != F64 and (p != F64 or stack == F32))]  # fmt: skip


@on_targets
@pytest.mark.parametrize("dtype, state_dtype, stack_dtype", STORED, ids=str)
def test_the_sum_is_the_gradient_in_every_dtype(backend, device, dtype, state_dtype, stack_dtype):
    """A sum of B products in the arithmetic's precision is off by at most (B + 1) half units of sum |w S|, whatever its
    order (Higham, Accuracy and Stability, 3.1; one more for w itself); then it is stored once.
    """
    wide = F64 if dtype == F64 else F32
    for rows in BATCH_SIZES:
        opt, params = without_lr(backend, device, values=make_start(dtype), state_dtype=state_dtype)
        stacks = make_stacks(params, (rows,), rows, stack_dtype)
        weights = torch.randn(rows, dtype=F64)
        opt.step_from_gradients(sent(stacks, device), weights.to(device))
        for p, stack, g in zip(params, stacks, formed(opt, params)):
            exact, most = contract(weights, stack, p), contract(weights.abs(), stack.abs(), p)
            floor = 2.0**-25 if g.dtype == F16 else 0.0  # half of float16's smallest number
            bound = (rows + 1) * EPS[wide] / 2 * most + exact.abs() * EPS[g.dtype] + floor
            assert bool(((g.double() - exact).abs() <= bound).all()), rows


@on_targets
def test_weights_of_every_dtype_and_the_default(backend, device):
    start = make_start(F32)
    stacks, weights = exact_rows(start, 8, 0, F32)
    expected = None
    for dtype in DTYPES:
        opt, params = build(fca.FusedClipAdamW, start, backend, device)
        opt.step_from_gradients(sent(stacks, device), weights.to(device, dtype))
        expected = expected or results(opt, params)
        assert bitwise_equal(results(opt, params), expected)
    for weights in (None, torch.full((8,), 0.125, device=device)):  # None: the mean; 1 / 8 is exact
        opt, params = build(fca.FusedClipAdamW, start, backend, device)
        opt.step_from_gradients(sent(stacks, device), weights)
        means = results(opt, params)
        other, others = build(fca.FusedClipAdamW, start, backend, device)
        finished_step(other, others, stacks, torch.full((8,), 0.125))
        assert bitwise_equal(means, results(other, others))


# ---------------------------------------------------------------- objectives: the loss, backward and step()


def assert_backward_and_step(cls, backend, device, dtype, calls, **options):
    """`calls`: (stacks, keywords of `policy_loss`, whether rows are of sequences), one a step.

    Two steps more than the table's: 16 roundings for g, which v has twice: 3 or 4 in a weight, and a sum of some 36
    products, whose roundings are a random walk of 6 half units of a term.
    """
    start = make_start(dtype)
    opt, params = build(cls, start, backend, device, **options)
    hand, wide = build(cls, [x.double() for x in start], "reference", "cpu", **options)
    for step, (stacks, call, by_sequence) in enumerate(calls):
        weights = row_weights(**call, by_sequence=by_sequence)
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()}
        stats = opt.step_from_scores(sent([poison(x, weights) for x in stacks], device), **moved)
        expected = fca.clip_stats(**moved, backend=backend)
        assert frozen(stats.buffer) == frozen(expected.buffer), "the statistics of this call"
        assert float(stats.tokens) > 0 and bool(weights.any()), "a case that shows nothing"
        step_by_hand(hand, wide, stacks, weights, stats=fca.ClipStats(expected.buffer.cpu()))
        assert largest_error(opt, params, hand, wide) <= tolerance(dtype, step + 1 + 2), f"step {step}"
        assert float(opt.grad_norm) == pytest.approx(float(hand.grad_norm), rel=1e-5 if dtype == F32 else 1e-6)


def token_calls(objective, dtype, steps: int, rows=(4, 9), change=lambda inputs: inputs, **options):
    """Batches whose masked tokens hold NaN, and stacks of single tokens."""
    for step in range(steps):
        inputs = change(wanted_by(objective, make_batch(*rows, dtype, step)))
        stacks = make_stacks(make_start(dtype), inputs["logp"].shape, step, dtype)
        yield stacks, {**inputs, "objective": objective, **options}, False


PAIRS = [(name, list(RULES)[(2 * i + j) % len(RULES)]) for i, name in enumerate(OBJECTIVES) for j in range(2)]


@on_targets
@pytest.mark.parametrize("objective, rule", PAIRS)
@pytest.mark.parametrize("dtype", (F64, F32))
def test_every_objective(backend, device, dtype, objective, rule):
    calls = token_calls(OBJECTIVES[objective], dtype, steps=4)
    assert_backward_and_step(fca.FusedClipAdamW, backend, device, dtype, calls, **options_of(rule))


@on_targets
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", (F64, F32))
def test_every_rule_with_ppo(backend, device, dtype, rule):
    objective = fca.PPO(0.2, 0.28, dual_clip=3.0)
    for cls in CLASSES[1 : 2 + (rule in RULES_OF_FADAM)]:
        calls = token_calls(objective, dtype, steps=3)
        assert_backward_and_step(cls, backend, device, dtype, calls, **options_of(rule))


def test_every_objective_and_rule_is_asked_for():
    classes = [x for x in map(vars(fca).get, fca.__all__) if isinstance(x, type) and issubclass(x, fca.Objective)]
    assert {type(OBJECTIVES[name]) for name, _ in PAIRS} == set(classes) - {fca.Objective}
    assert {rule for _, rule in PAIRS} == set(RULES)


def per_sequence(inputs: dict[str, Any]) -> dict[str, Any]:
    """Advantages of whole sequences."""
    return {**inputs, "advantages": torch.tensor([0.7, -1.1, 0.4, -0.3], dtype=inputs["logp"].dtype)}


def float_mask(inputs):
    return {**inputs, "mask": inputs["mask"].to(F32)}


def unmasked(inputs):
    """What was masked is not finite now: the same tokens are left out."""
    return {name: x for name, x in inputs.items() if name != "mask"}


def plain(inputs):
    """Neither mask nor weights, every token there."""
    return {name: x.nan_to_num(0.25) for name, x in inputs.items() if name not in ("mask", "weights")}


CHANGES = (per_sequence, float_mask, unmasked, plain)
MANNERS = {
    **{name: (None, dict(aggregation=name, normalizer=23.0 if name == "constant" else None)) for name in AGGREGATIONS},
    **{f"{name} of 17": (None, dict(aggregation=name, normalizer=torch.tensor(17.0))) for name in AGGREGATIONS},
    **{name: (None, dict(kl_coef=0.3, kl_estimator=name)) for name in ESTIMATORS},
    **{change.__name__: (change, {}) for change in CHANGES},
}


@on_targets
@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("objective", (fca.PPO(0.2, 0.28), fca.GMPO()))
def test_every_manner_of_the_loss(backend, device, objective, manner):
    change, options = MANNERS[manner]
    for dtype in (F64, F32):
        calls = token_calls(objective, dtype, 3, change=change or (lambda inputs: inputs), **options)
        assert_backward_and_step(fca.FusedClipAdamW, backend, device, dtype, calls, overshoot=fca.MomentumBrake(0.7))


def sequence_calls(objective, dtype, steps: int, **options):
    """One row a sequence: the sum of its unmasked tokens' scores."""
    for stacks, call, _ in token_calls(objective, dtype, steps, change=per_sequence, **options):
        mask = call["mask"]
        summed = [(x.double() * mask.reshape(*mask.shape, *[1] * (x.dim() - 2))).sum(1).to(dtype) for x in stacks]
        yield summed, call, True


@on_targets
@pytest.mark.parametrize("aggregation", (None, "sequence-mean"))
@pytest.mark.parametrize("objective", (fca.GSPO(0.1, 0.15), fca.LUSPO(0.15, 0.1), fca.VESPO(0.5, 0.4, 1.0, 0.3)))
def test_one_row_a_sequence(backend, device, objective, aggregation):
    for dtype in (F64, F32):
        calls = sequence_calls(objective, dtype, steps=4, aggregation=aggregation)
        assert_backward_and_step(fca.FusedClipAdamW, backend, device, dtype, calls, grad_clip=0.7, overshoot="align")


def packed_calls(objective, dtype, steps: int):
    for step in range(steps):
        inputs = wanted_by(objective, make_batch(4, 9, dtype, step))
        order = torch.randperm(int(inputs["mask"].sum()), generator=torch.Generator().manual_seed(step))
        inputs = packed(inputs, order)
        stacks = make_stacks(make_start(dtype), inputs["logp"].shape, step, dtype)
        yield stacks, {**inputs, "num_sequences": 4, "objective": objective}, False


@on_targets
@pytest.mark.parametrize("objective", (fca.PPO(), fca.GSPO(0.1, 0.15), fca.GMPO(), fca.VESPO(0.5, 0.4), fca.ASPO()))
def test_packed_tokens(backend, device, objective):
    for dtype in (F64, F32):
        calls = packed_calls(objective, dtype, steps=3)
        assert_backward_and_step(fca.FusedClipAdamW, backend, device, dtype, calls, grad_clip=0.7)


@on_targets
@pytest.mark.parametrize("objective", (fca.PPO(), fca.CISPO(high=2.0), fca.DRO(0.3)))
def test_one_dimension_without_sequences(backend, device, objective):
    """The contract's first line: logp [B], one row each."""

    def flat(inputs):
        return {name: x.flatten() for name, x in inputs.items()}

    for dtype in (F64, F32):
        calls = token_calls(objective, dtype, 3, rows=(1, 40), change=flat)
        assert_backward_and_step(fca.FusedClipAdamW, backend, device, dtype, calls)


@on_targets
def test_logp_narrower_and_wider_than_the_scores(backend, device):
    # A ratio of one is exact in every dtype, and so are advantages on the lattice over a normalizer of 8.
    expected = None
    for dtype in DTYPES:
        opt, params = build(fca.FusedClipAdamW, make_start(F32), backend, device)
        logp, advantages = torch.full((6,), -0.5, dtype=dtype, device=device), lattice(6, seed=5, dtype=dtype)
        stacks, _ = exact_rows(params, 6, 0, F32)
        options = dict(aggregation="constant", normalizer=8.0)
        opt.step_from_scores(sent(stacks, device), logp, logp, advantages.to(device), **options)
        expected = expected or results(opt, params)
        assert bitwise_equal(results(opt, params), expected)
    other, others = build(fca.FusedClipAdamW, make_start(F32), backend, device)
    finished_step(other, others, stacks, -advantages / 8)
    assert bitwise_equal(expected, results(other, others))


@on_targets
def test_tokens_drawn_by_a_generator(backend, device):
    """ClipCov leaves out a random tenth: of the tokens that `policy_loss` with the same generator does."""
    objective = fca.ClipCov(0.2, 0.28, ratio=0.1, cov_low=0.001, cov_high=3.0)
    gradients = set()
    for seed in range(3):
        generators = [torch.Generator(device).manual_seed(seed) for _ in range(2)]
        inputs = {n: x.to(device) for n, x in wanted_by(objective, make_batch(6, 9, F64)).items()}
        leaf = inputs["logp"].clone().requires_grad_()
        loss, _ = fca.policy_loss(
            leaf, **{n: x for n, x in inputs.items() if n != "logp"}, objective=objective, backend=backend,
            generator=generators[0],
        )  # fmt: skip
        loss.backward()
        opt, params = without_lr(backend, device)
        stacks = make_stacks(params, (6, 9), 0, F64)
        opt.step_from_scores(sent(stacks, device), **inputs, objective=objective, generator=generators[1])
        for p, stack, g in zip(params, stacks, formed(opt, params)):
            torch.testing.assert_close(g, contract(leaf.grad.cpu().flatten(), stack, p), rtol=1e-13, atol=1e-14)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        gradients.add(frozen(formed(opt, params)))
    assert len(gradients) > 1, "a choice that no seed changes"


@on_targets
def test_micro_batches_share_a_normalizer(backend, device):
    """One step from a batch's tokens is one step from the gradients of its parts, all over the same count."""
    parts = [wanted_by(fca.PPO(), make_batch(4, 6, F64, seed)) for seed in range(3)]
    count = sum(int(part["mask"].sum()) for part in parts)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    start = make_start(F64)
    stacks = make_stacks(start, (12, 6), 0, F64)
    (a, own), (b, other) = (build(fca.FusedClipAdamW, start, backend, device, grad_clip=0.7) for _ in range(2))
    a.step_from_scores(sent(stacks, device), **{n: x.to(device) for n, x in whole.items()})
    gathered = []
    for part, first in zip(parts, (0, 4, 8)):
        weights = row_weights(**part, normalizer=float(count))
        gathered.append([contract(weights, x[first : first + 4], p) for x, p in zip(stacks, start)])
    b.step_from_gradients(sent([torch.stack(x) for x in zip(*gathered)], device), torch.ones(3, device=device))
    assert largest_error(a, own, b, other) <= tolerance(F64, 1)


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@on_targets
def test_a_network_trained_by_torch_func(backend, device):
    """PPO on a real network: five epochs over a batch, `vmap(grad)` here, `loss.backward()` and torch.optim there."""
    from torch.func import functional_call, grad, vmap

    torch.manual_seed(0)
    ours = Policy().double().to(device)
    theirs = copy.deepcopy(ours)
    x, action = torch.randn(24, 4, dtype=F64, device=device), torch.randint(3, (24,), device=device)
    advantages = torch.randn(24, dtype=F64, device=device)

    def logp(params, x, action):
        return functional_call(ours, params, (x,)).log_softmax(-1).gather(-1, action[..., None])[..., 0]

    old = logp(dict(ours.named_parameters()), x, action).detach()
    a = fca.FusedClipAdamW(ours.parameters(), lr=0.03, backend=backend)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.03)
    clipped = 0.0
    for _ in range(5):
        detached = {name: p.detach() for name, p in ours.named_parameters()}
        scores = vmap(grad(logp), in_dims=(None, 0, 0))(detached, x, action)
        now = logp(detached, x, action)
        stats = a.step_from_scores([scores[name] for name, _ in ours.named_parameters()], now, old, advantages)
        clipped += float(stats.clipped_low + stats.clipped_high)

        b.zero_grad()
        now = theirs(x).log_softmax(-1).gather(-1, action[:, None])[:, 0]
        ratio = (now - old).exp()
        (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()).backward()
        b.step()
    assert clipped > 5, "a ratio clip that never acts shows nothing"
    # 5 steps of at most some hundred roundings through the network; a wrong weight moves a parameter by 1e-2.
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@on_targets
def test_a_fully_clipped_batch_is_a_step_of_zero_gradient(backend, device):
    """Tokens were there: moments decay and the counter counts, as `step()` on a zero gradient does."""
    (a, own), (b, other) = (build(fca.FusedClipAdamW, make_start(F32), backend, device) for _ in range(2))
    for opt, params in ((a, own), (b, other)):
        stacks, weights = exact_rows(params, 4, 0, F32)
        finished_step(opt, params, stacks, weights)
    ones = torch.ones(4, device=device)
    stats = a.step_from_scores([torch.full((4, *p.shape), NAN, device=device) for p in own], ones, 0 * ones, ones)
    assert float(stats.clipped_high) == 4
    for p in other:
        p.grad = torch.zeros_like(p)
    b.step()
    assert bitwise_equal(results(a, own), results(b, other))


# ---------------------------------------------------------------- memory


LAID_OUT = ((5,), (7, 3), (33, 17), (2, 3, 4), (), (65536 + 17,))


def small(backend, device, shapes=LAID_OUT):
    """Without the long tensor under Triton's interpreter."""
    return [s for s in shapes if math.prod(s) < 10_000 or (backend, device) != ("triton", "cpu")]


@on_targets
@pytest.mark.parametrize("lay", LAYOUTS)
def test_layouts_of_a_stack(backend, device, lay):
    for dtype, rule in ((F32, "adamw"), (F32, "clip"), (F32, "align 7"), (BF16, "adamw"), (F64, "agc")):
        start, options = make_start(dtype, small(backend, device)), options_of(rule)
        assert_bits_of_step(fca.FusedClipAdamW, start, backend, device, steps=2, lay=lay, **options)


@on_targets
@pytest.mark.parametrize("lay", (None, *LAYOUTS))
@pytest.mark.parametrize("lay_parameter", (backwards, gapped, sliced))
def test_layouts_of_a_parameter(backend, device, lay_parameter, lay):
    """Strided parameters and their states, against dense ones: rules without a sum over elements have the same bits."""
    for dtype, rule in ((F32, "align 7"), (BF16, "cautious"), (F64, "adamw")):
        start, shapes = make_start(dtype, LAID_OUT[:-1]), LAID_OUT[:-1]
        strided = [lay_parameter(x.to(device, copy=True)).requires_grad_() for x in start]
        assert any(not p.is_contiguous() for p in strided)
        options = options_of(rule)
        ours = fca.FusedClipAdamW(strided, backend=backend, **options)
        theirs, dense = build(fca.FusedClipAdamW, start, backend, device, **options)
        for step in range(3):
            stacks, weights = exact_rows(start, 6, step, torch.promote_types(dtype, F32))
            given = sent([poison(x, weights) for x in stacks], device)
            ours.step_from_gradients([x if lay is None else lay(x) for x in given], weights.to(device))
            theirs.step_from_gradients(given, weights.to(device))
        # `grad_norm` is a sum over elements: in another order, rounded to float32 at the end.
        assert bitwise_equal(plain_results(ours, strided), plain_results(theirs, dense)), (dtype, shapes)
        for p, whole in zip(strided, (x._base for x in strided)):
            if whole is not None and lay_parameter is not backwards:
                assert int(whole.isnan().sum()) == whole.numel() - p.numel(), "memory around a parameter was written"


@on_targets
@pytest.mark.parametrize("lay", LAYOUTS)
def test_layouts_of_rows_of_tokens(backend, device, lay):
    """[B, T] rows are read as one dimension where memory allows it; where not, the error says what to do."""
    options = dict(aggregation="constant", normalizer=8.0)
    logp, advantages = torch.full((2, 3), -0.5, device=device), lattice(2, 3, seed=1).to(device)
    outcomes = set()
    for shape in SHAPES:
        stack = lattice(2, 3, *shape, seed=0).to(device)
        (a, own), (b, other) = (build(fca.FusedClipAdamW, [torch.ones(shape)], backend, device) for _ in range(2))
        before = snapshot(a)
        try:
            a.step_from_scores([lay(stack)], logp, logp, advantages, **options)
        except ValueError as error:
            assert "contiguous" in str(error) and snapshot(a) == before
            outcomes.add("refused")
            continue
        finished_step(b, other, [stack], -advantages.cpu().flatten() / 8)
        assert bitwise_equal(results(a, own), results(b, other))
        outcomes.add("right")
    assert "right" in outcomes


@on_targets
@pytest.mark.parametrize("which", ("samples", "elements", "both"))
def test_expanded_stacks(backend, device, which):
    start = make_start(F32)
    (a, own), (b, other) = (build(fca.FusedClipAdamW, start, backend, device) for _ in range(2))
    for step in range(2):
        stacks, weights = exact_rows(start, 6, step, F32)
        if which != "elements":
            stacks = [x[:1].expand(x.shape) for x in stacks]
        if which != "samples":
            stacks = [x[..., :1].expand(x.shape) if x.dim() > 1 else x for x in stacks]
        a.step_from_gradients(sent(stacks, device), weights.to(device))
        finished_step(b, other, stacks, weights)
    assert bitwise_equal(results(a, own), results(b, other))


@on_targets
def test_dictionaries_and_missing_entries(backend, device):
    """None, or no entry, leaves a parameter and its state as they are, as no gradient does."""
    start = make_start(F32)
    made = [build(fca.FusedClipAdamW, start, backend, device, grad_clip=0.7) for _ in range(3)]
    (a, listed), (b, by_name), (c, other) = made
    for step, missing in enumerate((set(), {0, 2}, {1}, {4})):
        stacks, weights = exact_rows(start, 5, step, F32)
        stacks = [None if i in missing else x for i, x in enumerate(stacks)]
        before = frozen([(listed[i], a.state.get(listed[i])) for i in missing])
        a.step_from_gradients(sent(stacks, device), weights.to(device))
        assert frozen([(listed[i], a.state.get(listed[i])) for i in missing]) == before
        backwards = [(p, x.to(device)) for p, x in zip(by_name, stacks) if x is not None][::-1]
        b.step_from_gradients(dict(backwards), weights.to(device))
        finished_step(c, other, stacks, weights)
        for opt, params in made[:2]:
            assert bitwise_equal(results(opt, params), results(c, other)), step
    d, params = build(fca.FusedClipAdamW, start, backend, device)
    d.step_from_gradients(sent([*stacks[:4], None], device), weights.to(device))
    assert params[4] not in d.state or not d.state[params[4]]["exp_avg"].any()


@on_targets
def test_groups_of_their_own_rules(backend, device):
    start = make_start(F32)
    groups = (dict(lr=0.1, overshoot="align", grad_clip=0.5), dict(lr=0.01, weight_decay=0.3, overshoot="brake"), {})
    made = []
    for _ in range(2):
        params = [x.to(device, copy=True).requires_grad_() for x in start]
        parts = (params[:2], params[2:4], params[4:])
        listed = [{"params": part, **group} for part, group in zip(parts, groups)]
        opt = fca.FusedClipAdamW(listed[:2], backend=backend)
        opt.add_param_group(listed[2])
        made.append((opt, params))
    (a, own), (b, other) = made
    for step in range(3):
        stacks, weights = exact_rows(start, 5, step, F32)
        a.observe(make_stats(step, device))
        a.step_from_gradients(sent(stacks, device), weights.to(device))
        finished_step(b, other, stacks, weights, make_stats(step, device))
    assert bitwise_equal(results(a, own), results(b, other))


@on_targets
def test_parameters_of_several_dtypes(backend, device):
    start = [x for dtype in DTYPES for x in make_start(dtype, ((5,), (3, 2)), seed=dtype.itemsize)]
    (a, own), (b, other) = (build(fca.FusedClipAdamW, start, backend, device, grad_clip=0.7) for _ in range(2))
    for step in range(3):
        stacks, weights = exact_rows(start, 5, step, F32)
        narrow = [x.to((F32, BF16, F16)[i % 3]) if p.dtype != F64 else x for i, (x, p) in enumerate(zip(stacks, start))]
        a.step_from_gradients(sent(narrow, device), weights.to(device))
        finished_step(b, other, stacks, weights)
    assert bitwise_equal(results(a, own), results(b, other))


@on_targets
def test_gradients_inputs_and_the_rest_of_memory_stay(backend, device):
    """`.grad` is neither read nor written, inputs are values, and a graph that hangs on them is left alone."""
    opt, params = build(fca.FusedClipAdamW, make_start(F32), backend, device)
    for p in params:
        p.grad = torch.full_like(p, NAN)
    kept = [p.grad for p in params]
    stacks, weights = exact_rows(params, 6, 0, F32)
    logp = torch.linspace(-1, -0.5, 6, device=device, requires_grad=True)
    inputs = [logp, logp.detach() - 0.1, torch.linspace(-1, 1, 6, device=device, requires_grad=True)]
    given = [x.requires_grad_() for x in sent(stacks, device)]
    weights = weights.to(device).requires_grad_()
    before = frozen([kept, inputs, given, weights])
    versions = [x._version for x in (*kept, *inputs, *given, weights)]
    opt.step_from_scores(given, *inputs, max_sample_norm=0.5)
    opt.step_from_gradients(given, weights, max_sample_norm=0.5)
    assert frozen([kept, inputs, given, weights]) == before
    assert [x._version for x in (*kept, *inputs, *given, weights)] == versions
    assert all(p.grad is g for p, g in zip(params, kept))
    assert all(x.grad is None for x in (*inputs[::2], *given, weights))
    assert all(bool(p.isfinite().all()) and not p.grad_fn for p in params)


@on_targets
@pytest.mark.parametrize("kind", ODD_MEMORY)
def test_odd_memory_is_right_or_refused(backend, device, kind):
    start = make_start(F32)
    (a, own), (b, other) = (build(fca.FusedClipAdamW, start, backend, device) for _ in range(2))
    stacks, weights = exact_rows(start, 6, 0, F32)
    odd = [ODD_MEMORY[kind](x) for x in sent(stacks, device)]
    before = snapshot(a)
    try:
        a.step_from_gradients(odd, weights.to(device))
    except (TypeError, ValueError, RuntimeError):
        assert snapshot(a) == before
        return
    finished_step(b, other, [x.cpu().clone() for x in odd], weights)
    assert bitwise_equal(results(a, own), results(b, other))


# ---------------------------------------------------------------- nothing left of a batch


def nothing_left(opt, params, device: str, kind: str):
    """A call that leaves no sample; its statistics, if it has any."""
    rows = 0 if kind.endswith("no rows") else 4
    stacks = [torch.full((rows, *p.shape), NAN, dtype=torch.promote_types(p.dtype, F32), device=device) for p in params]
    ones = torch.ones(rows, device=device)
    noise = dict(max_sample_norm=1.0, noise_multiplier=1.0) if kind.startswith("noise") else {}
    if "gradients" in kind:
        return opt.step_from_gradients(stacks, None if rows == 0 else 0 * ones, **noise)
    logp = {"nan": NAN * ones, "inf": -INF * ones}.get(kind.split()[-1], -ones)
    mask = torch.zeros(rows, dtype=torch.bool, device=device) if "masked" in kind else None
    return opt.step_from_scores(stacks, logp, logp, ones, mask=mask, **noise)


NOTHING = ("no rows", "masked", "nan", "inf", "gradients, no rows", "gradients, zero weights")


@on_targets
@pytest.mark.parametrize("rule", RULES)
def test_nothing_left_changes_nothing(backend, device, rule):
    """Neither what is seen (parameters, states, memories of the rules, norm) nor what comes after."""
    options = options_of(rule)
    (a, own), (b, other) = (build(fca.FusedClipAdamW, make_start(F32), backend, device, **options) for _ in range(2))
    for step in range(5):
        kinds = [f"{noise}{kind}" for kind in NOTHING for noise in ("", "noise, ")] if step in (2, 3) else []
        for kind in kinds:
            before, skipped = snapshot(a, counters=False), int(a.step_count_skipped)
            stats = nothing_left(a, own, device, kind)
            assert snapshot(a, counters=False) == before, kind
            assert int(a.step_count_skipped) == skipped + 1
            assert stats is None or (float(stats.tokens) == 0 and float(stats.total_mass) == 0)
            assert stats is None or float(stats.nonfinite) == (4 if kind.split()[-1] in ("nan", "inf") else 0)
        for opt, params in ((a, own), (b, other)):
            stacks, weights = exact_rows(params, 6, step, F32)
            opt.observe(make_stats(step, device))
            opt.step_from_gradients(sent(stacks, device), weights.to(device))
    assert bitwise_equal(results(a, own)[:-1], results(b, other)[:-1])
    assert int(b.step_count_skipped) == 0


@on_targets
@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_left_of_the_first_batch(backend, device, cls, kind):
    """Before any step, so that states are new: they are there as after none, or not there."""
    a, own = build(cls, make_start(BF16), backend, device)
    nothing_left(a, own, device, kind)
    assert bitwise_equal([p.detach().cpu() for p in own], make_start(BF16))
    assert all(not x.any() for state in a.state.values() for x in state.values())
    assert int(a.step_count_skipped) == 1 and float(a.grad_norm) == 0.0
    b, other = build(cls, make_start(BF16), backend, device)
    for opt, params in ((a, own), (b, other)):
        stacks, weights = exact_rows(params, 6, 0, F32)
        opt.step_from_gradients(sent(stacks, device), weights.to(device))
    assert bitwise_equal(results(a, own)[:-1], results(b, other)[:-1])


# ---------------------------------------------------------------- max_sample_norm


@on_targets
@pytest.mark.parametrize("rule", RULES)
def test_bounded_samples_equal_a_clip_by_hand(backend, device, rule):
    """Several parameters share a sample's norm; rows of zero weight hold NaN; None takes no part.

    float64: 8 roundings more a step, those of the norm and of the factor.
    """
    for dtype in (F64, F32):
        options = options_of(rule)
        opt, params = build(fca.FusedClipAdamW, make_start(dtype), backend, device, **options)
        hand, wide = build(fca.FusedClipAdamW, make_start(F64), "reference", "cpu", **options)
        for step in range(3):
            stacks = make_stacks(params, (9,), step, dtype)
            stacks[step % 2] = stacks[step % 2] if step else None
            weights = torch.linspace(-1, 1, 9, dtype=F64).roll(step) ** 3  # the middle one is 0
            bound = 5.0
            ratios = bounded(weights, stacks, params, bound) / weights
            assert 2 <= int((ratios < 1).sum()) <= 6, "some samples on both sides"
            stats = make_stats(step)
            opt.observe(make_stats(step, device))
            given = [None if x is None else poison(x, weights).to(device) for x in stacks]
            opt.step_from_gradients(given, weights.to(device), max_sample_norm=bound)
            step_by_hand(hand, wide, stacks, weights, stats=stats, max_sample_norm=bound)
        assert largest_error(opt, params, hand, wide) <= 2 * tolerance(dtype, 3)


@on_targets
@pytest.mark.parametrize("dtype, stack_dtype", ((F64, F64), (F32, F32), (F32, BF16), (BF16, F16)))
def test_samples_within_the_bound_keep_their_bits(backend, device, dtype, stack_dtype):
    """Sample b alone fills part b of the parameter: what is not too long is as without a bound, the rest is shorter."""
    rows, part = 6, 40
    stack = torch.zeros(rows, rows, part)
    stack[range(rows), range(rows)] = torch.randn(rows, part, generator=torch.Generator().manual_seed(0))
    norms = stack.flatten(1).norm(dim=1)
    weights = 3.0 / norms  # lengths of 3, but for the two that follow
    weights[1], weights[4] = 3.1 / norms[1], -7.0 / norms[4]
    got = []
    for bound in (None, 1e30, 3.05):
        values = [torch.zeros(rows, part, dtype=dtype)]
        opt, params = without_lr(backend, device, values=values, state_dtype=None if dtype == F64 else F32)
        stacks = [stack.to(device, stack_dtype)]
        opt.step_from_gradients(stacks, weights.to(device), max_sample_norm=bound)
        got.append(formed(opt, params)[0])
    assert bitwise_equal([got[0]], [got[1]])
    within = [0, 2, 3, 5]
    assert bitwise_equal([got[2][within]], [got[0][within]])
    # 3.05 times 1 - 1e-6 / norm, and 40 roundings of the stack's type in the norm.
    assert got[2][[1, 4]].norm(dim=1).tolist() == pytest.approx([3.05, 3.05], rel=1e-6 + 0.5 * EPS[stack_dtype])


@on_targets
def test_one_sample_moves_the_sum_by_no_more_than_the_bound(backend, device):
    """The sensitivity that noise is measured by, for every sample left out, of ordinary, huge and zero length."""
    stacks = make_stacks(make_start(F64), (8,), 0, F64)
    for stack in stacks:
        stack[2] *= 1e150
        stack[3] = 0.0
        stack[4] *= 1e-150
    weights = torch.linspace(-2, 3, 8, dtype=F64)

    def summed(weights):
        opt, params = without_lr(backend, device, values=make_start(F64))
        opt.step_from_gradients(sent(stacks, device), weights.to(device), max_sample_norm=1.5)
        return torch.cat([g.flatten() for g in formed(opt, params)])

    whole, moved = summed(weights), []
    for left_out in range(8):
        fewer = weights.clone()
        fewer[left_out] = 0.0
        moved.append(float((whole - summed(fewer)).norm()))
    assert max(moved) <= 1.5 * (1 + 1e-14)  # cancellation of sums up to 12 apart from it is 1e-15
    assert moved[3] <= 1e-15 and moved[2] > 1.4999, "the longest sample is cut to the bound, not dropped"


@on_targets
def test_a_sample_too_long_for_float32_is_cut_to_the_bound(backend, device):
    """Norms whose squares overflow float32, over elements and over parameters."""
    opt, params = without_lr(backend, device, F32)
    stacks = [torch.full((2, *p.shape), 1e30, device=device) for p in params]
    opt.step_from_gradients(stacks, torch.tensor([1.0, 0.0], device=device), max_sample_norm=2.0)
    # 17 equal elements of norm 2; float32 stores each with half a unit, the factor with another few.
    assert torch.cat([g.flatten() for g in formed(opt, params)]).tolist() == pytest.approx([2 / 17**0.5] * 17, rel=1e-6)


# ---------------------------------------------------------------- noise

LONG = (150_000, 2**16 + 3)


def noise(backend, device, generator, dtype=F32, steps: int = 1, shapes=LONG, **options) -> list[list[Tensor]]:
    """The gradients of steps whose samples are all zero, over their standard deviation of 0.6."""
    values = [torch.zeros(s, dtype=dtype) for s in shapes]
    opt, params = without_lr(backend, device, values=values, **options)
    out = []
    for _ in range(steps):
        stacks = [torch.zeros(1, device=device, dtype=p.dtype).expand(3, *p.shape) for p in params]
        weights = torch.ones(3, device=device)
        opt.step_from_gradients(
            stacks, weights, max_sample_norm=3.0, noise_multiplier=0.2, noise_generator=generator
        )  # fmt: skip
        out.append([g.double() / 0.6 for g in formed(opt, params)])
    return out


def seeded(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def distance_from_normal(x: Tensor) -> float:
    """Kolmogorov and Smirnov's, times sqrt(n)."""
    n = x.numel()
    cdf = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    ranks = torch.arange(n + 1, dtype=F64) / n
    return math.sqrt(n) * float(torch.maximum((ranks[1:] - cdf).max(), (cdf - ranks[:-1]).max()))


@on_targets
@pytest.mark.parametrize("dtype", (F64, F32))
def test_noise_is_normal(backend, device, dtype):
    """Fixed seeds; bounds of five standard errors of each moment, and of one in a thousand for the distance."""
    for x in noise(backend, device, seeded(device, 1), dtype)[0]:
        n = x.numel()
        moments = [float(x.pow(k).mean()) for k in (1, 2, 3, 4)]
        errors = [math.sqrt(v / n) for v in (1, 2, 15, 96)]  # of the mean of x^k: E x^2k - (E x^k)^2
        for moment, expected, error in zip(moments, (0, 1, 0, 3), errors):
            assert abs(moment - expected) <= 5 * error
        assert distance_from_normal(x) <= 1.95
        assert 4.0 < float(x.abs().max()) < 6.5  # tails are there: 1 - (1 - 6e-5)^n is 0.98 at least
        assert x.unique().numel() > 0.99 * n, "values that repeat are no noise"


def correlation(x: Tensor, y: Tensor) -> float:
    """In standard errors."""
    return abs(float((x * y).mean())) * math.sqrt(x.numel())


@on_targets
def test_noise_is_independent(backend, device):
    """Of its neighbours, of itself in other tensors, chunks, steps and under other seeds, and of no sign."""
    (first, short), (second, _) = noise(backend, device, seeded(device, 1), steps=2)
    ((other, _),) = noise(backend, device, seeded(device, 2))
    n = short.numel()
    pairs = {f"lag {k}": (first[:-k], first[k:]) for k in (1, 2, 3, 4, 8, 16, 256, 1024, 2**16)}
    pairs |= {"tensors": (first[:n], short), "steps": (first, second), "seeds": (first, other)}
    for name, (x, y) in pairs.items():
        assert correlation(x, y) <= 5 and correlation(x.square() - 1, y.square() - 1) <= 5 * 2, name
        assert not torch.equal(x, y)


@on_targets
def test_noise_repeats_with_the_generator(backend, device):
    shapes = ((7, 3), (11,))
    draw = functools.partial(noise, backend, device, shapes=shapes)
    generator = seeded(device, 5)
    state = generator.get_state()
    a = draw(generator, steps=2)
    assert not torch.equal(a[0][1], a[1][1]), "a generator moves on"
    assert not torch.equal(generator.get_state(), state)
    generator.set_state(state)
    assert frozen(draw(generator, steps=2)) == frozen(a)
    assert frozen(draw(seeded(device, 6), steps=2)) != frozen(a)
    default = torch.cuda.default_generators[0] if device == "cuda" else torch.default_generator
    default.manual_seed(5)
    assert frozen(draw(None, steps=2)) == frozen(a), "None is the device's default generator"
    assert frozen(draw(None, steps=2)) != frozen(a)


@on_targets
def test_no_noise_draws_no_number(backend, device):
    default = torch.cuda.default_generators[0] if device == "cuda" else torch.default_generator
    generator = seeded(device, 5)
    before = default.get_state(), generator.get_state()
    opt, params = build(fca.FusedClipAdamW, make_start(F32), backend, device)
    stacks, weights = exact_rows(params, 3, 0, F32)
    opt.step_from_gradients(sent(stacks, device), weights.to(device), max_sample_norm=1.0, noise_generator=generator)
    assert torch.equal(default.get_state(), before[0]) and torch.equal(generator.get_state(), before[1])


@on_targets
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_sees_the_same_noise(backend, device, rule):
    """clip(w S) + noise as one gradient, whatever passes over the scores a rule takes; the norm is that of the sum.

    float64; twice the table's roundings, for the samples' norms and factors.
    """
    start = make_start(F64)
    options = options_of(rule)
    opt, params = build(fca.FusedClipAdamW, start, backend, device, **options)
    hand, wide = build(fca.FusedClipAdamW, start, "reference", "cpu", **options)
    generators = seeded(device, 3), seeded(device, 3)
    for step, drawn in enumerate(noise(backend, device, generators[0], F64, steps=3, shapes=SHAPES)):
        stacks, weights = make_stacks(start, (4,), step, F64), torch.tensor([1.0, -0.5, 2.0, 0.0], dtype=F64)
        opt.observe(make_stats(step, device))
        opt.step_from_gradients(
            sent(stacks, device), weights.to(device), max_sample_norm=3.0, noise_multiplier=0.2,
            noise_generator=generators[1],
        )  # fmt: skip
        clipped = bounded(weights, stacks, start, 3.0)
        for p, stack, x in zip(wide, stacks, drawn):
            p.grad = contract(clipped, stack, p) + 0.6 * x
        hand.observe(make_stats(step))
        hand.step()
        assert float(opt.grad_norm) == pytest.approx(float(hand.grad_norm), rel=1e-6)
    assert largest_error(opt, params, hand, wide) <= 2 * tolerance(F64, 3)


@on_targets
def test_a_fully_clipped_batch_is_noised(backend, device):
    """Whether a token was clipped must not show in whether there is noise."""
    opt, params = without_lr(backend, device)
    ones = torch.ones(4, device=device)
    stacks = [torch.full((4, *p.shape), NAN, dtype=p.dtype, device=device) for p in params]
    opt.step_from_scores(stacks, ones, 0 * ones, ones, max_sample_norm=3.0, noise_multiplier=0.2,
                         noise_generator=seeded(device, 1))  # fmt: skip
    ((first, second),) = noise(backend, device, seeded(device, 1), F64, shapes=((5,), (4, 3)))
    assert bitwise_equal([x / 0.6 for x in formed(opt, params)], [first, second])


# ---------------------------------------------------------------- refused, and nothing has been changed


@contextlib.contextmanager
def refused(opt, error, words: str, *generators):
    before = snapshot(opt), frozen([g.get_state() for g in (torch.default_generator, *generators)])
    versions = [p._version for group in opt.param_groups for p in group["params"]]
    with pytest.raises(error, match=words) as caught:
        yield
    assert len(str(caught.value)) > 20, "an error says what is accepted"
    assert (snapshot(opt), frozen([g.get_state() for g in (torch.default_generator, *generators)])) == before
    assert [p._version for group in opt.param_groups for p in group["params"]] == versions


def trained(backend: str, device: str, **options):
    """One healthy step, and statistics that wait for the next: there is something to damage."""
    params = [torch.ones(5), torch.ones(3, 2)]
    options = (
        dict(grad_clip=fca.AutoClip(), overshoot=fca.MomentumBrake(0.7), amsgrad=True, reset=fca.Periodic(9, 1))
        | options
    )
    opt, params = build(fca.FusedClipAdamW, params, backend, device, **options)
    opt.step_from_gradients([FIVE.to(device), SIX.to(device)])
    opt.observe(make_stats(2, device))
    return opt, params


@on_targets
@pytest.mark.parametrize("case", BAD_SCORES)
def test_scores_are_refused(backend, device, case):
    bad, error, words = BAD_SCORES[case]
    opt, _ = trained(backend, device)
    call = sent({**base_call(), "scores": bad}, device)
    with refused(opt, error, words):
        opt.step_from_scores(**call)
    with refused(opt, error, words):  # rows of sequences
        opt.step_from_scores(**{**sent(tokens(objective=fca.GSPO()), device), "scores": call["scores"]})
    with refused(opt, error, words):
        opt.step_from_gradients(call["scores"], torch.ones(4, device=device))
    with refused(opt, error, words):
        opt.step_from_gradients(call["scores"])


@on_targets
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_are_refused(backend, device, case):
    changes, error, words = BAD_INPUTS[case]
    opt, _ = trained(backend, device)
    with refused(opt, error, words):
        opt.step_from_scores(**sent(base_call() | changes, device))


@on_targets
@pytest.mark.parametrize("case", BAD_BOUNDS)
def test_bounds_are_refused(backend, device, case):
    bad, error, words = BAD_BOUNDS[case]
    opt, _ = trained(backend, device)
    generator, call = seeded(device, 1), sent(base_call(), device)
    options = {"noise_generator": generator, **bad}
    with refused(opt, error, words, generator):
        opt.step_from_scores(**call, **options)
    with refused(opt, error, words, generator):
        opt.step_from_gradients(call["scores"], **options)


@on_targets
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_are_refused(backend, device, case):
    bad, error, words = BAD_WEIGHTS[case]
    opt, _ = trained(backend, device)
    generator = seeded(device, 1)
    options = dict(max_sample_norm=1.0, noise_multiplier=1.0, noise_generator=generator)
    with refused(opt, error, words, generator):
        opt.step_from_gradients(sent([FIVE, SIX], device), sent(bad, device), **options)


@on_targets
@pytest.mark.parametrize("key", BAD_GROUPS)
def test_settings_of_a_group_are_refused(backend, device, key):
    opt, _ = trained(backend, device)
    opt.add_param_group({"params": [torch.ones(2, device=device, requires_grad=True)]})
    generator, group, stacks = seeded(device, 1), opt.param_groups[0], [FIVE, SIX, torch.ones(4, 2)]
    options = dict(max_sample_norm=1.0, noise_multiplier=1.0, noise_generator=generator)
    with refused(opt, (TypeError, ValueError), key, generator):
        good, group[key] = group[key], BAD_GROUPS[key]
        try:
            opt.step_from_gradients(sent(stacks, device), **options)
        finally:
            group[key] = good  # a state dict of the bad value is refused too


@on_targets
def test_differentiable_is_refused(backend, device):
    opt, _ = build(fca.FusedClipAdamW, [torch.ones(5)], backend, device, differentiable=True)
    ones = torch.ones(4, device=device)
    with refused(opt, RuntimeError, "differentiable"):
        opt.step_from_scores([FIVE.to(device)], ones, ones, ones)
    with refused(opt, RuntimeError, "differentiable"):
        opt.step_from_gradients([FIVE.to(device)])


def intertwined(backend: str, device: str):
    """p and q of 70000 elements in one storage with room after them, and a step behind."""
    storage = torch.linspace(-1, 1, 300_000).to(device)
    p, q = (storage[a : a + 70_000].requires_grad_() for a in (0, 70_000))
    opt = fca.FusedClipAdamW([p, q], backend=backend, amsgrad=True)
    opt.step_from_gradients([torch.ones(2, 70_000, device=device), torch.ones(2, 70_000, device=device)])
    return storage, opt, p, q


@on_targets
@pytest.mark.parametrize("case", OVERLAPS)
@pytest.mark.parametrize("second", (False, True))
def test_stacks_in_what_the_step_writes(backend, device, case, second):
    """Refused by the kernels; the reference may also do right by them: as of a copy."""
    _, opt, p, q = intertwined(backend, device)
    owner, next_one = (q, p) if second else (p, q)
    stack = OVERLAPS[case](opt, owner, next_one)
    stacks = [torch.ones(len(stack), 70_000, device=device) for _ in range(2)]
    stacks[second] = stack
    if backend != "reference":
        with refused(opt, (RuntimeError, ValueError), "memory"):
            opt.step_from_gradients(stacks)
        return
    _, other, *others = intertwined(backend, device)
    other.step_from_gradients([x.clone() for x in stacks])
    before = snapshot(opt)
    try:
        opt.step_from_gradients(stacks)
    except (RuntimeError, ValueError):
        assert snapshot(opt) == before
    else:
        assert bitwise_equal(results(opt, [p, q]), results(other, others))


@on_targets
def test_stacks_beside_the_parameters_are_right(backend, device):
    """Disjoint parts of one storage, and one stack for two parameters."""
    storage, opt, p, q = intertwined(backend, device)
    _, other, *others = intertwined(backend, device)
    stack = storage[140_000:280_000].view(2, 70_000)
    opt.step_from_gradients([stack, stack])
    other.step_from_gradients([stack.clone(), stack.clone()])
    assert bitwise_equal(results(opt, [p, q]), results(other, others))


@on_targets
@pytest.mark.parametrize("dtype", (F64, F32))
def test_weights_in_a_parameter_are_right_or_refused(backend, device, dtype):
    """Read before anything is written, or refused; also strided and expanded ones."""
    start = [torch.linspace(-1, 1, 70_000, dtype=dtype)]
    (a, own), (b, other) = (build(fca.FusedClipAdamW, start, backend, device, lr=0.5) for _ in range(2))
    stack = torch.ones(3, 70_000, dtype=dtype, device=device)
    for pick in (lambda p: p[:3], lambda p: p[::20_000][:3], lambda p: p[-1:].expand(3)):
        before = snapshot(a)
        copied = pick(own[0].detach()).clone()
        try:
            a.step_from_gradients([stack], pick(own[0].detach()))
        except (RuntimeError, ValueError):
            assert snapshot(a) == before
            continue
        b.step_from_gradients([stack], copied)
        assert bitwise_equal(results(a, own), results(b, other))


# ---------------------------------------------------------------- an optimizer like any other


def test_a_scheduler_sees_a_step():
    for name in ("step_from_scores", "step_from_gradients"):
        opt = fca.FusedClipAdamW([Parameter(torch.ones(5))], lr=1.0)
        scheduler = lr_scheduler.StepLR(opt, 1, gamma=0.5)
        ones = torch.ones(4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for at in range(3):
                getattr(opt, name)(*([FIVE], ones, ones, ones)[: 4 if name == "step_from_scores" else 1])
                scheduler.step()
                assert opt.param_groups[0]["lr"] == 0.5 ** (at + 1)


def test_hooks_run_around_the_step():
    p = Parameter(torch.ones(5))
    opt = fca.FusedClipAdamW([p])
    seen = []

    def note(name):
        return lambda *args: seen.append((name, args[0] is opt, p[0].item()))

    handles = [
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        opt.step_from_gradients([FIVE])
        ones = torch.ones(4)
        opt.step_from_scores([FIVE], ones, ones, -ones)
        values = [1.0, p[0].item()]
    finally:
        for handle in handles:
            handle.remove()
    opt.step_from_gradients([FIVE])
    assert [name for name, *_ in seen] == ["global pre", "pre", "post", "global post"] * 2
    assert all(own for _, own, _ in seen)
    assert [x for *_, x in seen][:2] == [1.0, 1.0] and [x for *_, x in seen][-2:] == values[1:] * 2
    assert seen[2][2] == seen[4][2] not in (1.0, values[1])


def everything(opt) -> Any:
    return snapshot(opt), float(opt.grad_norm)


def go_on(opt, steps, backend, device) -> None:
    """step_from_gradients, step_from_scores with noise, and step() in turn."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for at in steps:
        stacks, weights = exact_rows(params, 6, at, torch.promote_types(params[0].dtype, F32))
        stacks, weights = sent(stacks, device), weights.to(device)
        opt.observe(make_stats(at, device))
        if at % 3 == 0:
            opt.step_from_gradients(stacks, weights)
        elif at % 3 == 1:
            logp = torch.linspace(-0.7, 0.3, 6, device=device)
            opt.step_from_scores(stacks, logp, 0 * logp, weights, max_sample_norm=1.0, noise_multiplier=0.5,
                                 noise_generator=seeded(device, at))  # fmt: skip
        else:
            finished_step(opt, params, stacks, weights)
            opt.zero_grad()


def through_a_file(opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@on_targets
@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_resumes_exactly(backend, device, rule):
    for dtype in (F32, BF16):
        options = options_of(rule)
        opt, params = build(fca.FusedClipAdamW, make_start(dtype), backend, device, **options)
        go_on(opt, range(4), backend, device)
        opt.observe(make_stats(1, device))
        other, _ = build(fca.FusedClipAdamW, [p.detach() for p in params], backend, device, **options)
        other.load_state_dict(through_a_file(opt))
        for o in (opt, other):
            go_on(o, range(4, 8), backend, device)
        first, second = (list(o.state_dict()["state"].values()) for o in (opt, other))
        assert frozen(first) == frozen(second)
        for p, q in zip(params, other.param_groups[0]["params"]):
            assert bitwise_equal([p.detach()], [q.detach()])


@on_targets
def test_copies_go_on_alike(backend, device):
    opt, _ = build(fca.FusedClipAdamW, make_start(F32), backend, device, grad_clip=fca.ZClip(warmup=2))
    go_on(opt, range(3), backend, device)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        twin = copy.deepcopy(opt)
        go_on(twin, range(3, 6), backend, device)
        go_on(other, range(3, 6), backend, device)
        assert everything(other) == everything(twin)


@on_targets
@pytest.mark.parametrize(
    "rule", ("adamw", "clip lagged", "zclip", "align tensor lagged", "brake", "spam", "stable spam")
)
def test_steps_of_both_kinds_mix(backend, device, rule):
    """Which kind a step is of leaves no trace: not in what a rule remembers, nor in states made by the other."""
    for first in (0, 1):
        options = options_of(rule)
        (a, own), (b, other) = (build(fca.FusedClipAdamW, make_start(F32), backend, device, **options) for _ in "ab")
        for step in range(6):
            stacks, weights = exact_rows(own, 6, step, F32)
            if step % 2 == first:
                a.observe(make_stats(step, device))
                a.step_from_gradients(sent(stacks, device), weights.to(device))
            else:
                finished_step(a, own, stacks, weights, make_stats(step, device))
            finished_step(b, other, stacks, weights, make_stats(step, device))
            assert bitwise_equal(results(a, own), results(b, other)), step


BRAKES = {"renormalise": fca.MomentumBrake(0.7, hold_v=0.3), "damp": fca.MomentumBrake(0.7, mode="damp")}


@on_targets
@pytest.mark.parametrize("rule", (*BRAKES.values(), fca.WhenClipped(0.5)), ids=(*BRAKES, "when clipped"))
def test_statistics_of_the_call_and_of_earlier_ones_are_used_once(backend, device, rule):
    options = dict(reset=rule) if isinstance(rule, fca.WhenClipped) else dict(overshoot=rule)
    (a, own), (b, other), (c, blind) = (
        build(fca.FusedClipAdamW, make_start(F32), backend, device, eps=1e-4, **options) for _ in range(3)
    )
    logp = torch.tensor([0.0, 0.0, 0.5, 0.0], device=device)  # the third is clipped, the rest are at a ratio of one
    advantages = torch.tensor([0.25, -0.5, 1.0, 0.5], device=device)
    weights = -advantages.cpu() / 4 * torch.tensor([1.0, 1.0, 0.0, 1.0])
    shares = []
    for step in range(5):
        stacks, _ = exact_rows(own, 4, step, F32)
        earlier = [make_stats(at, device) for at in range(1, 1 + step % 3)]
        for stats in earlier:
            a.observe(stats)
        if step == 4:  # nothing of this call, nothing is left of earlier ones
            a.step_from_gradients(sent(stacks, device), weights.to(device))
            of_call = []
        else:
            of_call = [a.step_from_scores(sent(stacks, device), logp, 0 * logp, advantages)]
            shares.append(float(of_call[0].suppressed_mass / of_call[0].total_mass))
        for stats in (*earlier, *of_call):
            b.observe(stats)
        finished_step(b, other, stacks, weights)
        finished_step(c, blind, stacks, weights)
        assert bitwise_equal(results(a, own), results(b, other)), step
    assert shares[0] == pytest.approx(math.exp(0.5) / (math.exp(0.5) + 1.25), rel=1e-6)
    assert not bitwise_equal(results(a, own), results(c, blind)), "statistics without an effect show nothing"


@on_targets
@pytest.mark.parametrize("lr", (0.01, torch.tensor(0.01), torch.tensor(0.01, dtype=F64)), ids=("float", "f32", "f64"))
@pytest.mark.parametrize("capturable", (False, True))
def test_learning_rates_as_tensors_and_capturable(backend, device, lr, capturable):
    options = dict(capturable=capturable, grad_clip=0.7, overshoot="brake", reset=fca.Periodic(2, 1))
    if capturable and device == "cuda" and isinstance(lr, Tensor):
        lr = lr.to(device)
    made = [build(fca.FusedClipAdamW, make_start(F32), backend, device, lr=copy.copy(lr), **options) for _ in "ab"]
    (a, own), (b, other) = made
    for step in range(4):
        for opt, _ in made:
            now = opt.param_groups[0]["lr"]
            opt.param_groups[0]["lr"] = now.mul_(0.5) if isinstance(now, Tensor) else now * 0.5
        stacks, weights = exact_rows(own, 6, step, F32)
        a.step_from_gradients(sent(stacks, device), weights.to(device))
        finished_step(b, other, stacks, weights)
    assert bitwise_equal(results(a, own), results(b, other))


@on_targets
@pytest.mark.parametrize("value", (NAN, INF, -INF))
@pytest.mark.parametrize("rule", ("adamw", "autoclip", "brake", "spam"))
def test_a_score_that_is_not_finite(backend, device, rule, value):
    """In a row that counts: as a gradient that is not finite, skipped if asked for, let through if not."""
    for skip in (True, False):
        options = options_of(rule) | dict(skip_nonfinite=skip)
        (a, own), (b, other) = (build(fca.FusedClipAdamW, make_start(F32), backend, device, **options) for _ in "ab")
        for step in range(3):
            stacks, weights = exact_rows(own, 6, step, F32, zeros=0.0)
            if step == 1:
                weights[2] = 0.5
                stacks[1][2, 3] = value
                before = frozen([own, list(a.state.values())])
            a.step_from_gradients(sent(stacks, device), weights.to(device))
            if step == 1:
                assert (frozen([own, list(a.state.values())]) == before) == skip
            finished_step(b, other, stacks, weights)
        assert int(a.step_count_skipped) == int(b.step_count_skipped) == int(skip)
        for x, y in zip(results(a, own), results(b, other)):
            assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0))
        assert bool(own[1].isfinite().all()) == skip


@on_targets
def test_the_norm_is_of_the_formed_gradient(backend, device):
    for options in ({}, dict(grad_clip=0.1), dict(overshoot="align-tensor"), dict(grad_clip=fca.UpdateRMS())):
        opt, params = build(fca.FusedClipAdamW, make_start(F32), backend, device, betas=(0.0, 0.0), **options)
        for step in range(2):
            stacks, weights = exact_rows(params, 6, step, F32)
            opt.step_from_gradients(sent(stacks, device), weights.to(device))
            expected = math.sqrt(sum(float(contract(weights, x, p).square().sum()) for x, p in zip(stacks, params)))
            assert float(opt.grad_norm) == pytest.approx(expected, rel=2**-23)  # stored in float32


@on_targets
def test_autograd_notices_the_step(backend, device):
    """As after `step()`: a graph that saved a parameter must not be used any more."""
    made = [build(fca.FusedClipAdamW, make_start(F32), backend, device) for _ in "ab"]
    graph = (made[0][1][2] ** 2).sum()
    before = [p._version for p in made[0][1]]
    stacks, weights = exact_rows(made[0][1], 6, 0, F32)
    made[0][0].step_from_gradients(sent(stacks, device), weights.to(device))
    finished_step(*made[1], stacks, weights)
    assert [p._version for p in made[0][1]] == [p._version for p in made[1][1]]
    assert all(p._version > version for p, version in zip(made[0][1], before) if p.numel())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


# ---------------------------------------------------------------- the same bits everywhere


def all_bytes() -> bytes:
    """Steps from samples of every rule, of several sizes and dtypes, bounded and noised."""
    out = []
    shapes = ((), (5,), (33, 17), (65536 + 17,))
    for dtype in DTYPES:
        for i, rule in enumerate(RULES):
            values = make_start(dtype, shapes if i % 8 == 0 else shapes[:3])
            opt, params = build(fca.FusedClipAdamW, values, "cpu", "cpu", **options_of(rule))
            for step in range(2):
                inputs = wanted_by(fca.PPO(), make_batch(3, 2, F32, step))
                stacks = make_stacks(params, (3, 2), step, F32 if dtype == F64 else (dtype, F32)[step % 2])
                extra = dict(max_sample_norm=1.5, noise_multiplier=0.1 * step, noise_generator=seeded("cpu", step))
                opt.step_from_scores(stacks, **inputs, **(extra if step else {}))
            out += [frozen(x)[2] for x in results(opt, params)]
    return b"".join(out)


def process_of_bytes(path, threads: int, isa: str) -> subprocess.Popen:
    here = os.path.dirname(__file__)
    paths = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    program = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2])); import test_scores; "
        "open(sys.argv[1], 'wb').write(test_scores.all_bytes())"
    )
    environment = {**os.environ, "PYTHONPATH": paths, "FUSED_CLIP_ADAM_CPU_ISA": isa}
    return subprocess.Popen([sys.executable, "-c", program, str(path), str(threads)], env=environment)


@needs_native
def test_same_bytes_for_every_thread_count_and_instruction_set(tmp_path):
    """Other processes run another instruction set, on another number of threads than this one."""
    others = [(1, "baseline"), (2, "avx2")]
    started = [process_of_bytes(tmp_path / isa, threads, isa) for threads, isa in others]
    expected = all_bytes()
    assert len(expected) > 1e6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads)
        assert all_bytes() == expected
    finally:
        torch.set_num_threads(threads)
    for process, (threads, isa) in zip(started, others):
        assert process.wait(timeout=300) == 0
        assert (tmp_path / isa).read_bytes() == expected, (threads, isa)


@on_targets
@pytest.mark.parametrize("rule", ("clip", "align", "stable spam", "metric"))
def test_runs_are_bitwise_repeatable(backend, device, rule):
    seen = set()
    for _ in range(2):
        options = options_of(rule)
        opt, params = build(fca.FusedClipAdamW, make_start(F32), backend, device, **options)
        for step in range(3):
            stacks, weights = make_stacks(params, (7,), step, F32), torch.linspace(-1, 1, 7)
            opt.step_from_gradients(sent(stacks, device), weights.to(device), max_sample_norm=2.0, noise_multiplier=0.1,
                                    noise_generator=seeded(device, step))  # fmt: skip
        seen.add(frozen(results(opt, params)))
    assert len(seen) == 1


# ---------------------------------------------------------------- any of it


def dense(x: Tensor) -> Tensor:
    return x


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shapes = st.sampled_from(((), (0,), (1,), (5,), (1030,), (3, 4), (1, 7), (33, 40), (2, 0, 3), (2, 3, 4)))
    count = draw(st.integers(1, 3))
    cls = draw(st.sampled_from(CLASSES))
    rows = draw(st.one_of(st.integers(0, 9), st.sampled_from((31, 64, 200))))
    return dict(
        cls=cls,
        dtype=dtype,
        state_dtype=draw(st.sampled_from((None, F32))),
        stack_dtype=draw(st.sampled_from((F64, F32) if dtype == F64 else (F32, BF16, F16))),
        shapes=[draw(shapes) for _ in range(count)],
        lay_stacks=[draw(st.sampled_from((dense, *LAYOUTS))) for _ in range(count)],
        lay_params=[draw(st.sampled_from((dense, backwards, gapped, sliced))) for _ in range(count)],
        missing=draw(st.sampled_from((None, *range(count)))),
        rows=rows,
        zeros=draw(st.sampled_from((0.0, 0.3, 0.9))),
        rule=draw(st.sampled_from(RULES_OF_FADAM if cls is fca.FusedFAdam else tuple(RULES))),
        scores=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@needs_native
@settings(max_examples=250)
@given(cases())
def test_any_shape_dtype_layout_and_rule(case):
    """One step on the CPU from numbers that sum up exactly: rounded once from the reference in float64."""
    cls, dtype, rows = case["cls"], case["dtype"], case["rows"]
    options = options_of(case["rule"])
    start = make_start(dtype, case["shapes"], seed=case["seed"])
    params = [lay(x.clone()).requires_grad_() for lay, x in zip(case["lay_params"], start)]
    opt = cls(params, backend="cpu", state_dtype=case["state_dtype"], **options)
    hand, wide = build(cls, [x.double() for x in start], "reference", "cpu", **options)
    stacks, weights = exact_rows(start, rows, case["seed"], case["stack_dtype"], case["zeros"])
    if len(stacks) > 1 and case["missing"] is not None:
        stacks[case["missing"]] = None
    given = [None if x is None else lay(poison(x, weights)) for lay, x in zip(case["lay_stacks"], stacks)]
    if case["scores"]:
        logp = torch.full((rows,), -0.5)
        stats = opt.step_from_scores(given, logp, logp, -8 * weights, aggregation="constant", normalizer=8.0)
        assert float(stats.tokens) == rows
        left = rows > 0
    else:
        opt.step_from_gradients(given, weights)
        stats, left = None, rows > 0
    if not left:
        assert int(opt.step_count_skipped) == 1
        assert frozen(params) == frozen(start)
        return
    step_by_hand(hand, wide, stacks, weights, stats=stats)
    with_state = [(p, q) for p, q, x in zip(params, wide, stacks) if x is not None]
    got = plain_results(opt, [p for p, _ in with_state])
    expected = plain_results(hand, [q for _, q in with_state])
    assert_rounded_once(got, expected, dtype)
    for p, x in zip(params, start):
        assert p in opt.state or frozen(p) == frozen(x)
