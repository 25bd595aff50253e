"""The objectives' closed forms against autograd of the plain loss, at their edges, and against each other."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from cases import gpu_targets, test_id
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import (
    AGGREGATIONS,
    CLIPS_NOTHING,
    ESTIMATORS,
    EXTRAS,
    INPUTS,
    NEEDS_SEQUENCES,
    OBJECTIVES,
    ONE_OF_EACH,
    OPTIONAL,
    SEQUENCE_RATIO,
    SHARED_OVER_RANKS,
    WHOLE_BATCH,
    all_reduce_worker,
    clip_flags,
    default_aggregation,
    digest,
    dropped,
    lengths,
    make_batch,
    make_wild_batch,
    observe,
    on_device_of,
    packed,
    plain_loss,
    suppressed,
    token_loss,
    token_weight,
    wanted_by,
)

import fused_clip_adam as fca
from fused_clip_adam.backends import native
from fused_clip_adam.objectives.stats import FIELDS

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
BACKENDS = (pytest.param("cpu", marks=needs_native), "reference")
GPU_BACKENDS = tuple(gpu_targets())  # slow where they are emulated: a smaller selection of the tests
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max

# Sums of <= 100 float64 terms of size ~1 in two orders: ~100 * 1.1e-16. A wrong factor or sign is above 1e-3.
EXACT = dict(rtol=1e-12, atol=1e-12)
# One rounding to float32 of a statistic formed in float64.
STORED = dict(rtol=1.2e-7, atol=1e-12)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


on_gpu_backends = pytest.mark.parametrize("backend", GPU_BACKENDS)


def call(function, batch, **options):
    """function(**batch, **options) with what the objective reads, where the backend takes it."""
    batch = wanted_by(options.get("objective", fca.PPO()), batch)
    batch, options = on_device_of(options.get("backend", "auto"), batch, options)
    return function(**batch, **options)


def gradient(batch, **options):
    return call(fca.dloss_dlogp, batch, **options).cpu()


def statistics(batch, **options):
    return fca.ClipStats(call(fca.clip_stats, batch, **options).buffer.cpu())


def loss_and_grad(batch, factor=1.0, **options):
    """loss, d (factor loss) / d logp, stats, through backward()."""
    logp = batch["logp"].detach().clone().requires_grad_()
    loss, stats = call(fca.policy_loss, {**batch, "logp": logp}, **options)
    (factor * loss).backward()
    return loss.detach().cpu(), logp.grad, fca.ClipStats(stats.buffer.cpu())


def options_of(objective, aggregation=None, kl_coef=0.0, **more):
    """Keyword arguments; a normalizer where there must be one, no KL where there is none."""
    objective = OBJECTIVES.get(objective, objective) if isinstance(objective, str) else objective
    kl_coef = 0.0 if isinstance(objective, fca.GRPOGuard) else kl_coef
    more.setdefault("normalizer", 9.0 if aggregation == "constant" else None)
    return dict(objective=objective, aggregation=aggregation, kl_coef=kl_coef, **more)


def ordinary(rows=6, cols=13, dtype=torch.float64, seed=0):
    """A batch with nothing masked."""
    batch = make_batch(rows, cols, dtype, seed)
    del batch["mask"]
    return {name: x.nan_to_num(0.3) for name, x in batch.items()}


def same_bits(x, y):
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (x, y)))


def assert_finite(loss, grad, stats):
    assert loss.isfinite() and grad.isfinite().all() and stats.buffer.isfinite().all(), (loss, grad, stats.buffer)


# ------------------------------------------------------------------------------------------ the closed forms

BATCH = make_batch(6, 13)
PER_SEQUENCE = {**ordinary(), "advantages": ordinary()["advantages"][:, 0], "weights": ordinary()["weights"][:, 1]}
PER_SEQUENCE_BUT_WEIGHTS = {**PER_SEQUENCE, "weights": ordinary()["weights"]}  # VESPO's weights are each token's own
BARE = {n: x for n, x in ordinary().items() if n not in ("weights", *OPTIONAL)}


def assert_closed_form(batch, backend, **options):
    """Loss, backward() and dloss_dlogp are those of autograd through the plain loss; EXACT of the largest gradient."""
    logp = batch["logp"].clone().requires_grad_()
    expected = plain_loss(batch={**wanted_by(options["objective"], batch), "logp": logp}, **options)
    (wanted,) = torch.autograd.grad(expected, logp)
    loss, grad, stats = loss_and_grad(batch, factor=-1.75, backend=backend, **options)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(grad, -1.75 * wanted, **EXACT)
    torch.testing.assert_close(gradient(batch, backend=backend, **options), wanted, **EXACT)
    return stats


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_closed_form_is_autograd_of_the_plain_loss(name, aggregation, backend):
    at = list(OBJECTIVES).index(name) + AGGREGATIONS.index(aggregation)  # the KL term is the same for all objectives
    for kl_coef, estimator in ((0.0, "k3"), (0.3, ESTIMATORS[at % 4]), (-0.2, ESTIMATORS[(at + 1) % 4])):
        assert_closed_form(BATCH, backend, **options_of(name, aggregation, kl_coef, kl_estimator=estimator))
    by_sequence = PER_SEQUENCE_BUT_WEIGHTS if isinstance(OBJECTIVES[name], fca.VESPO) else PER_SEQUENCE
    for batch, normalizer in ((by_sequence, 0.25), (BARE, 7.5)):
        assert_closed_form(batch, backend, **options_of(name, aggregation, 0.3, normalizer=normalizer))


@on_gpu_backends
@pytest.mark.parametrize("name", OBJECTIVES)
def test_closed_form_on_gpu_backends(name, backend):
    at = list(OBJECTIVES).index(name)
    options = options_of(name, AGGREGATIONS[at % 4], 0.3, kl_estimator=ESTIMATORS[at // 4 % 4])
    stats = assert_closed_form(BATCH, backend, **options)
    torch.testing.assert_close(stats.buffer, statistics(BATCH, backend="reference", **options).buffer, **STORED)
    assert_closed_form(
        (PER_SEQUENCE_BUT_WEIGHTS, BARE)[at % 2], backend, **options_of(name, AGGREGATIONS[(at + 1) % 4])
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_default_aggregation(name, backend):
    assert_closed_form(BATCH, backend, **options_of(name))
    explicit = options_of(name, default_aggregation(OBJECTIVES[name]), backend=backend)
    assert same_bits(gradient(BATCH, **explicit), gradient(BATCH, **options_of(name, backend=backend)))


GOLDEN_RATIOS = (0.2, 0.7, 1.0, 1.5, 4.0)
GOLDEN = [  # objective, advantage, g at each ratio: the table of the specification
    (fca.PPO(0.2, 0.28), 1, (-0.2, -0.7, -1, 0, 0)),
    (fca.PPO(0.2, 0.28), -1, (0, 0, 1, 1.5, 4)),
    (fca.PPO(0.2, 0.28, dual_clip=3.0), -1, (0, 0, 1, 1.5, 0)),
    (fca.CISPO(0.8, 1.28), 1, (-0.8, -0.8, -1, -1.28, -1.28)),
    (fca.CISPO(0.8, 1.28), -1, (0.8, 0.8, 1, 1.28, 1.28)),
    (fca.CISPO(high=2.0), 1, (-0.2, -0.7, -1, -1.5, -2)),
    (fca.CISPO(high=2.0), -1, (0.2, 0.7, 1, 1.5, 2)),
    (fca.SAPO(), 1, (-0.1711, -0.6845, -1, -1.41, -0.7228)),
    (fca.SAPO(), -1, (0.1685, 0.6829, 1, 1.4012, 0.6304)),
    (fca.GPPO(0.2, 0.28, dual_clip=3.0), 1, (-0.2, -0.7, -1, -1.28, -1.28)),
    (fca.GPPO(0.2, 0.28, dual_clip=3.0), -1, (0.8, 0.8, 1, 1.5, 0)),
    (fca.CEGPPO(0.2, 0.28, beta_low=0.5, beta_high=1.0, dual_clip=3.0), -1, (0.4, 0.4, 1, 1.5, 0)),
    (fca.AEPO(0.2, 0.28, dual_clip=3.0), 1, (-0.2, -0.7, -1, -1.28, -1.28)),
    (fca.AEPO(0.2, 0.28, dual_clip=3.0), -1, (0, 0, 1, 1.5, 0)),
    (fca.ASPO(clip=0.2, dual_clip=3.0), 1, (-3, -1 / 0.7, -1, 0, 0)),
    (fca.ASPO(clip=0.2, dual_clip=3.0), -1, (0, 0, 1, 1.5, 3)),
    (fca.DCPO(dual_clip=10.0), 1, (-0.2, -0.7, -1, -1.5, 0)),
    (fca.DCPO(dual_clip=10.0), -1, (0, 0.7, 1, 1.5, 4)),
]


@pytest.mark.parametrize("backend", (*BACKENDS, *GPU_BACKENDS))
@pytest.mark.parametrize("objective, advantage, wanted", GOLDEN)
def test_golden_table(objective, advantage, wanted, backend):
    """Entropies are all equal: every token is of low entropy to ASPO, and AEPO's z is 0 / 0."""
    old_logp = torch.full((1, 5), math.log(0.1), dtype=torch.float64)
    logp = old_logp + torch.tensor([GOLDEN_RATIOS], dtype=torch.float64).log()
    batch = dict(logp=logp, old_logp=old_logp, advantages=torch.full_like(logp, advantage), entropy=-old_logp)
    options = dict(objective=objective, aggregation="constant", normalizer=1.0, backend=backend)
    rounded = dict(rtol=0, atol=5.1e-5) if isinstance(objective, fca.SAPO) else EXACT  # the table has four decimals
    grad = gradient(batch, **options)
    torch.testing.assert_close(grad, torch.tensor([wanted], dtype=torch.float64), **rounded)


# ------------------------------------------------------------------------------------------ the edges

# Where it lies: log-ratio on the bound, advantage for which it acts, the count that changes there.
LOW, HIGH, DUAL = (-0.25, -1.0, "clipped_low"), (0.25, 1.0, "clipped_high"), (1.1, -1.0, "clipped_dual")
CAP, LOW_CAP = (1.1, -1.0, None), (0.1, 1.0, None)
# Name -> the above; the objective whose bound is the ratio r or the log-ratio D; the share of the gradient that is left
# just past it (1: no step there).
BOUNDS = {
    "ppo low": (LOW, lambda r, D: fca.PPO(clip_low=1 - r), 0),
    "ppo high": (HIGH, lambda r, D: fca.PPO(clip_high=r - 1), 0),
    "ppo dual": (DUAL, lambda r, D: fca.PPO(dual_clip=r), 0),
    "ppo cap": (CAP, lambda r, D: fca.PPO(ratio_cap=r), 0),
    "ppo cap < high": (LOW_CAP, lambda r, D: fca.PPO(ratio_cap=r), 0),
    "gspo low": (LOW, lambda r, D: fca.GSPO(clip_low=1 - r), 0),
    "luspo high": (HIGH, lambda r, D: fca.LUSPO(clip_high=r - 1), 0),
    "cispo low": (LOW, lambda r, D: fca.CISPO(low=r), 1),
    "cispo high": (HIGH, lambda r, D: fca.CISPO(high=r), 1),
    "gmpo low": (LOW, lambda r, D: fca.GMPO(clip_low=-D), 0),
    "gmpo high": (HIGH, lambda r, D: fca.GMPO(clip_high=D), 0),
    "clip-cov low": (LOW, lambda r, D: fca.ClipCov(clip_low=1 - r), 0),
    "clip-cov high": (HIGH, lambda r, D: fca.ClipCov(clip_high=r - 1), 0),
    "gppo low": (LOW, lambda r, D: fca.GPPO(clip_low=1 - r), 1),
    "gppo high": (HIGH, lambda r, D: fca.GPPO(clip_high=r - 1), 1),
    "gppo dual": (DUAL, lambda r, D: fca.GPPO(dual_clip=r), 0),
    "ce-gppo low": (LOW, lambda r, D: fca.CEGPPO(clip_low=1 - r, beta_low=0.5), 0.5),
    "ce-gppo high": (HIGH, lambda r, D: fca.CEGPPO(clip_high=r - 1, beta_high=0.5), 0.5),
    "aepo low": (LOW, lambda r, D: fca.AEPO(clip_low=1 - r), 0),
    "aepo dual": (DUAL, lambda r, D: fca.AEPO(dual_clip=r), 0),
    "dcpo dual": (DUAL, lambda r, D: fca.DCPO(dual_clip=r), 0),
    "bapo low": (LOW, lambda r, D: fca.BAPO(low_start=r, low_max=r), 0),
    "bapo high": (HIGH, lambda r, D: fca.BAPO(high_start=r, high_max=r), 0),
    "bapo dual": (DUAL, lambda r, D: fca.BAPO(dual_clip=r), 0),
    "aspo low": (LOW, lambda r, D: fca.ASPO(clip=1 - r), 0),
    "aspo high": (HIGH, lambda r, D: fca.ASPO(clip=r - 1), 0),
    "aspo dual": (DUAL, lambda r, D: fca.ASPO(dual_clip=r), 1),
    "guard low": (LOW, lambda r, D: fca.GRPOGuard(1 - r, 0.2), 0),
    "guard high": (HIGH, lambda r, D: fca.GRPOGuard(0.2, r - 1), 0),
    "ewma low": (LOW, lambda r, D: fca.PPOEWMA(clip_low=-math.expm1(D)), 0),
    "ewma high": (HIGH, lambda r, D: fca.PPOEWMA(clip_high=math.expm1(D)), 0),
}


def next_float(x, towards):
    """The float32 beside the float32 number x."""
    return torch.nextafter(torch.tensor(x, dtype=torch.float32), torch.tensor(towards)).item()


@pytest.mark.parametrize("bound", BOUNDS)
def test_ratio_on_the_bound_keeps_its_gradient(bound, backend):
    (D, advantage, count), objective, left = BOUNDS[bound]
    for shape in ((1, 1), (1, 40)):
        logp, zero = torch.full(shape, D), torch.zeros(shape)
        batch = dict(logp=logp, old_logp=zero, advantages=torch.full(shape, advantage), entropy=zero, ewma_logp=zero)
        batch.update(mu=zero.unsqueeze(-1), mu_old=zero.unsqueeze(-1), sigma_t=1.0, dt=1.0)
        r = statistics(batch, backend=backend).ratio_max.item()  # float32, as the backend computes it
        options = dict(aggregation="constant", normalizer=1.0, backend=backend)
        # 1 - r and r - 1 are exact in float64 for r in [0.5, 4], so that the bound is r to the bit.
        on = dict(objective=objective(r, D), **options)
        inwards = math.inf if D < 0 else -math.inf
        past = dict(objective=objective(next_float(r, inwards), next_float(D, inwards)), **options)
        slope = 1 / r if bound == "aspo high" else r
        wanted = torch.full(shape, -advantage * slope)
        torch.testing.assert_close(gradient(batch, **on), wanted, rtol=1.2e-7, atol=0)  # 1 / r: one rounding
        torch.testing.assert_close(gradient(batch, **past), left * wanted, rtol=2.4e-7, atol=0)  # and r's neighbour
        if count:
            assert getattr(statistics(batch, **on), count) == 0
            assert getattr(statistics(batch, **past), count) == logp.numel()


def test_probabilities_on_the_bound_keep_their_gradient(backend):
    """DPPO's and DCPO's bounds depend on probabilities: with logp 0 and -200 these are exactly 1 and 0 in float32."""

    def slope(logp, old_logp, advantage, objective):
        batch = dict(zip(("logp", "old_logp", "advantages"), torch.tensor([[[logp]], [[old_logp]], [[advantage]]])))
        return -gradient(batch, objective=objective, backend=backend).item() / advantage

    below_one = next_float(1.0, 0.0)
    assert slope(0.0, -200.0, 1.0, fca.DPPOTV(delta_high=1.0, max_ratio=3.0)) == 3
    assert slope(0.0, -200.0, 1.0, fca.DPPOTV(delta_high=below_one)) == 0
    r = slope(-200.0, 0.0, -1.0, fca.DPPOTV(delta_low=1.0))
    assert r == pytest.approx(math.exp(-20), rel=2e-7)  # float32 exp
    assert slope(-200.0, 0.0, -1.0, fca.DPPOTV(delta_low=below_one)) == 0
    for objective in (fca.DPPOTV(delta_low=0.0, delta_high=0.0), fca.DPPOKL(delta_low=0.0, delta_high=0.0)):
        for logp, advantage in itertools.product((-200.0, -0.5, 0.0), (1.0, -1.0)):
            assert slope(logp, logp, advantage, objective) == 1  # p == q

    # q = 0: the range is [1, max(dual_clip, 10)].
    r = slope(-197.5, -200.0, 1.0, fca.DCPO(dual_clip=20.0))
    assert r == pytest.approx(math.exp(2.5), rel=2e-7)
    assert slope(-197.5, -200.0, 1.0, fca.DCPO(dual_clip=r)) == r
    assert slope(-197.5, -200.0, 1.0, fca.DCPO(dual_clip=next_float(r, 0.0))) == 0
    assert slope(-197.5, -200.0, 1.0, fca.DCPO(dual_clip=3.0)) == 0
    assert slope(-200.0, -200.0, -1.0, fca.DCPO()) == 1
    assert slope(-200.125, -200.0, -1.0, fca.DCPO()) == 0


@pytest.mark.parametrize("advantage", (1.0, -1.0))
def test_no_clip_range_keeps_ratio_one(advantage, backend):
    one, A = torch.full((2, 3), -0.7), torch.full((2, 3), advantage)
    batch = dict(logp=one, old_logp=one, advantages=A, entropy=one.square(), ewma_logp=one)
    batch.update(mu=one.unsqueeze(2), mu_old=one.unsqueeze(2), sigma_t=1.0, dt=1.0)
    tight = [cls(0.0, 0.0) for cls in (fca.PPO, fca.GSPO, fca.GMPO, fca.DPPOTV, fca.DPPOKL, fca.ClipCov, fca.GPPO)]
    tight += [fca.CISPO(1.0, 1.0), fca.CEGPPO(0.0, 0.0), fca.DCPO(0.0, 0.0), fca.BAPO(low_start=1.0, low_max=1.0)]
    tight += [fca.ASPO(0.0, 0.0), fca.AEPO(0.0, 0.0), fca.GRPOGuard(0.0, 0.0), fca.PPOEWMA(0.0, 0.0)]
    for objective in (*tight, fca.SAPO(), fca.VESPO(), fca.GPG(), fca.DRO(0.5)):
        _, grad, stats = loss_and_grad(batch, **options_of(objective, "token-mean", backend=backend))
        torch.testing.assert_close(grad, -A / 6, msg=str(objective))
        assert stats.clipped_low == stats.clipped_high == stats.suppressed_mass == 0
        assert stats.ratio_min == stats.ratio_max == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_log_ratios_are_those_of_20(dtype, backend):
    options = dict(aggregation="constant", normalizer=1.0, backend=backend)
    for D, A in itertools.product((20.0, 100.0, 6e4), (1.0, -1.0)):
        for sign, r in ((1, math.exp(20)), (-1, math.exp(-20))):
            case = [torch.tensor([x], dtype=dtype) for x in (sign * D, 0.0, A)]
            clipped = sign * A > 0
            wanted = 0.0 if clipped else min(-A * r, torch.finfo(dtype).max)
            # bfloat16 and float16 round the result once; 1e-6: exp in float32 on top.
            close = dict(rel=1e-6 + torch.finfo(dtype).eps, abs=1e-7 if dtype == torch.float16 else 0)
            assert fca.dloss_dlogp(*case, **options).item() == pytest.approx(wanted, **close)


def far_batch():
    """|D| of 20 and beyond, a row each; no two tokens alike, so that covariances have an order."""
    D = torch.tensor([20.0, -20.0, 20.5, -21.0, 100.0, -100.0, 700.0, -700.0], dtype=torch.float64).unsqueeze(1)
    batch = {name: x[:, :4].clone() for name, x in ordinary(8, 4, seed=5).items()}
    near = batch["logp"]
    batch["logp"], batch["old_logp"] = near + D.clamp(max=0.0), near - D.clamp(min=0.0)
    batch["ewma_logp"] = batch["logp"] - D / 200
    batch["ref_logp"] = batch["logp"] + D.flip(0)
    batch["old_probs"] = batch["old_logp"].exp()
    return batch


@pytest.mark.parametrize("backend", (*BACKENDS, *GPU_BACKENDS))
def test_far_log_ratios_of_every_objective(backend):
    for i, name in enumerate(ONE_OF_EACH if backend in GPU_BACKENDS else OBJECTIVES):
        options = options_of(name, ("constant", "sequence-mean")[i % 2], 0.3)
        batch = far_batch()
        logp = batch["logp"].clone().requires_grad_()
        expected = plain_loss(batch={**wanted_by(options["objective"], batch), "logp": logp}, **options)
        (wanted,) = torch.autograd.grad(expected, logp)
        loss, grad, stats = loss_and_grad(batch, backend=backend, **options)
        assert_finite(loss, grad, stats)
        torch.testing.assert_close(loss, expected.detach(), **EXACT, msg=name)
        # A sequence's term adds up tokens of either sign: EXACT of the row's largest, not of what cancellation leaves.
        assert ((grad - wanted).abs() <= 1e-12 * (1 + wanted.abs().amax(1, keepdim=True))).all(), name


def test_zero_advantage_gives_zero(backend):
    batch = {**BATCH, "advantages": torch.zeros(6)}
    for objective in OBJECTIVES.values():
        loss, grad, stats = loss_and_grad(batch, objective=objective, backend=backend)
        if not isinstance(objective, (fca.DRO, fca.KLCov)):  # these pull towards the old policy by themselves
            assert loss == 0 and not grad.any(), objective
        assert stats.total_mass == stats.clipped_low == stats.clipped_high == stats.clipped_dual == 0, objective


READ_BY_ALL = ("logp", "old_logp", "advantages", "weights", "ref_logp")


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", (*READ_BY_ALL, *EXTRAS))
def test_nonfinite_token_counts_as_masked(name, value, backend):
    bad = torch.zeros(6, 13, dtype=torch.bool)
    bad[2, 3] = bad[4, 12] = bad[5] = True
    batch = ordinary()
    where = bad.view(6, 13, *[1] * (batch[name].dim() - 2))
    broken = {**batch, name: batch[name].masked_fill(where, value)}
    readers = [x for x in OBJECTIVES.values() if isinstance(x, EXTRAS.get(name, fca.objectives.Objective))]
    for i, objective in enumerate(readers):
        if name == "ref_logp" and isinstance(objective, fca.GRPOGuard):
            continue  # has no reference KL
        options = options_of(objective, AGGREGATIONS[i % 4], 0.2, backend=backend)
        loss, grad, stats = loss_and_grad(broken, **options)
        expected, wanted, counted = loss_and_grad({**batch, "mask": ~bad}, **options)
        assert same_bits(loss, expected) and torch.equal(grad, wanted), objective
        assert stats.nonfinite == bad.sum() and counted.nonfinite == 0, objective
        assert torch.equal(stats.buffer[:-1], counted.buffer[:-1]), objective


def test_ref_logp_without_kl_is_not_read(backend):
    batch = {**BATCH, "ref_logp": torch.full((6, 13), math.nan, dtype=torch.float64)}
    assert statistics(batch, backend=backend).nonfinite == 0


def empty_cases():
    """Batches without a token that counts: everything masked and NaN, no rows, no columns, no packed tokens."""
    nan = torch.full((4, 5), math.nan)
    names = (*INPUTS[:5], *EXTRAS)
    cases = [{**dict.fromkeys(names, nan), "mask": torch.zeros(4, 5, dtype=torch.bool)}]
    for shape in ((0, 0), (0, 7), (7, 0)):
        cases.append({**dict.fromkeys(names, torch.empty(shape)), "advantages": torch.empty(shape[0])})
        del cases[-1]["weights"]
    for sequences in (0, 3):
        case = {**dict.fromkeys(names, torch.empty(0)), "advantages": torch.empty(sequences)}
        cases.append({**case, "sequence_ids": torch.empty(0, dtype=torch.int64)})
    for case in cases:
        case["mu"] = case["mu_old"] = case["logp"].unsqueeze(-1).expand(*case["logp"].shape, 3)
    return cases


def assert_nothing_left(name, backend):
    for i, case in enumerate(empty_cases()):
        for aggregation in (AGGREGATIONS[i % 4], AGGREGATIONS[(i + 1) % 4]):
            loss, grad, stats = loss_and_grad(case, **options_of(name, aggregation, 0.1, backend=backend))
            assert loss == 0 and grad.shape == case["logp"].shape and not grad.any()
            values = stats.to_dict()
            assert stats.ratio_min.item() == FLOAT32_MAX and not any(values.values()), values


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_token_left(name, backend):
    assert_nothing_left(name, backend)


@on_gpu_backends
def test_no_token_left_on_gpu_backends(backend):
    for name in ("dual", "gspo", "aspo", "bapo"):
        assert_nothing_left(name, backend)


def test_packed_without_ids_is_one_batch_of_tokens(backend):
    batch = {name: x.flatten(0, 1) for name, x in ordinary().items()}
    for name, objective in OBJECTIVES.items():
        if isinstance(objective, NEEDS_SEQUENCES):
            continue
        options = options_of(name, "token-mean", 0.1, backend=backend)
        loss, grad, _ = loss_and_grad(batch, **options)
        expected, wanted, _ = loss_and_grad(ordinary(), **options)
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(grad.view(6, 13), wanted, **EXACT)


# A token's ratio, a sequence's sum and its spread gradient, a detached weight, per-token input, per-sequence input.
SAMPLE = ("dual", "gspo", "cispo both", "vespo", "gmpo", "dcpo", "aspo", "ppo-ewma")


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 512), (2, 513), (1, 2049), (3, 4100)])
def test_shapes_around_the_tile(shape, backend):
    batch = ordinary(*shape)
    for name in SAMPLE:
        assert_closed_form(batch, backend, **options_of(name, "sequence-mean", 0.1))


@on_gpu_backends
def test_shapes_around_the_tile_on_gpu_backends(backend):
    for shape, name in zip([(1, 1), (2, 513), (1, 2049), (70, 3), (1, 7)], SAMPLE):
        assert_closed_form(ordinary(*shape), backend, **options_of(name, "sequence-mean", 0.1))


@pytest.mark.parametrize("old_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, old_dtype, backend):
    """Narrow inputs are widened exactly, so that only the arithmetic and the gradient's dtype can differ."""
    batch = ordinary(dtype=old_dtype)
    batch["logp"] = batch["logp"].to(dtype)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    wide = {name: x.to(arithmetic) for name, x in batch.items()}
    for name in (*SAMPLE, "aepo", "grpo-guard", "kl-cov"):
        options = options_of(name, "sequence-mean", 0.1, backend=backend)
        loss, grad, _ = loss_and_grad(batch, **options)
        expected, wanted, _ = loss_and_grad(wide, **options)
        assert loss.dtype == arithmetic and grad.dtype == dtype
        if old_dtype == torch.float64 and arithmetic == torch.float32:  # rounded to float32 here or there
            torch.testing.assert_close(grad, wanted.to(dtype), rtol=1e-5 + 2 * torch.finfo(dtype).eps, atol=1e-6)
        else:
            assert same_bits(loss, expected) and same_bits(grad, wanted.to(dtype)), name


HUGE = [  # logp, old_logp, advantage, weight: products that overflow, and overflow times zero
    (0.0, -20.0, -1e38, 1e38),
    (0.0, -20.0, -1e38, 0.0),
    (0.0, -2.0, 3.4e38, 1.0),
    (3e38, 3e38, 3e38, 3e38),
    (-3e38, 0.0, -3e38, -3e38),
    (1e38, -1e38, 1e38, 1e-30),
]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("normalizer", (None, 0.1, 1.2e-38, 1e30))
def test_huge_values_saturate(dtype, normalizer, backend):
    rows = HUGE * 2 + [(x, y, -A, w) for x, y, A, w in HUGE]
    logp, old_logp, A, w = torch.tensor(rows, dtype=torch.float64).T.unsqueeze(-1).to(dtype)
    if dtype == torch.float64:
        logp, old_logp, A = logp * 1e260, old_logp, A * 1e260
    together = dict(logp=logp, old_logp=old_logp, advantages=A, weights=w, ref_logp=old_logp)
    together.update({name: ordinary(len(rows), 1, dtype)[name] for name in EXTRAS})
    alone = [{name: x[i : i + 1] for name, x in together.items()} for i in range(len(HUGE))]
    kl_terms = ((0.0, "k3"), (1e-45, "k2"), (3e38, "k1"), (3e38, "k3"))
    for batch, name, (kl_coef, estimator) in itertools.product(
        (together, *alone), ("dual", "gspo", "cispo upper"), kl_terms
    ):
        options = options_of(name, "token-mean", kl_coef, kl_estimator=estimator, normalizer=normalizer)
        assert_finite(*loss_and_grad(batch, backend=backend, **options))
    for batch, (i, name) in itertools.product((together, alone[5]), enumerate(OBJECTIVES)):
        kl_coef, estimator = kl_terms[i % 4]
        options = options_of(name, None, kl_coef, kl_estimator=estimator, normalizer=normalizer)
        assert_finite(*loss_and_grad(batch, backend=backend, **options))


# ------------------------------------------------------------------------------------------ one objective each


def test_clip_cov_drops_a_random_choice(backend):
    batch = make_batch(40, 50, seed=1)
    objective = fca.ClipCov(0.2, 0.28, ratio=0.05, cov_low=0.02, cov_high=0.5)
    may_drop = dropped(objective, observe(objective, batch))
    n = int(0.05 * batch["mask"].sum())
    assert n < may_drop.sum() / 2
    without = gradient(batch, objective=fca.PPO(0.2, 0.28), backend=backend)
    choices = []
    for seed in (5, 5, 6, None):
        generator = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
        grad = gradient(batch, objective=objective, backend=backend, **generator)
        gone = (grad == 0) & (without != 0)
        assert gone.sum() == n and may_drop[gone].all()
        assert torch.equal(grad[~gone], without[~gone])
        choices.append(gone)
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2]) and not torch.equal(choices[0], choices[3])
    # No tokens to choose from; fewer than asked for; at least one.
    few = fca.ClipCov(0.2, 0.28, ratio=1e-9, cov_low=0.02, cov_high=0.5)
    assert ((gradient(batch, objective=few, backend=backend) == 0) & (without != 0)).sum() == 1
    none = fca.ClipCov(0.2, 0.28, ratio=1.0, cov_low=1e6, cov_high=1e7)
    assert torch.equal(gradient(batch, objective=none, backend=backend), without)


def test_kl_cov_holds_at_least_one_token(backend):
    batch = {**{n: x for n, x in BATCH.items() if n != "weights"}, "old_logp": BATCH["logp"] + 0.5}
    grad, plain = (
        gradient(batch, objective=x, backend=backend) for x in (fca.KLCov(1e-9, 2.0), fca.KLCov(1e-9, 1e-30))
    )
    changed = grad != plain
    cov = (batch["advantages"] - batch["advantages"][BATCH["mask"]].mean()) * (
        batch["logp"] - batch["logp"][BATCH["mask"]].mean()
    )
    assert changed.sum() == 1 and cov[changed] == cov[BATCH["mask"]].max()
    torch.testing.assert_close((grad - plain)[changed], -2.0 / BATCH["mask"].sum().double().reshape(1), **EXACT)


def test_bapo_search(backend):
    """Targets on both sides of every level of the grid."""
    used = set()
    for seed, target in itertools.product(range(3), (0.3, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 3.0)):
        objective = fca.BAPO(target=target, low_start=0.5, low_max=0.93, low_step=0.1, high_start=1.05, high_step=0.1)
        batch = make_batch(5, 11, seed=seed)
        assert_closed_form(batch, backend, **options_of(objective))
        x = observe(objective, batch)
        low, high, _ = clip_flags(objective, x)
        stats = statistics(batch, objective=objective, backend=backend)
        assert stats.clipped_low == low.sum() and stats.clipped_high == high.sum()
        used.add((int(low.sum()), int(high.sum())))
    assert len(used) >= 6


@pytest.mark.parametrize("quantile", (0.0, 0.2, 0.5, 0.8, 1.0))
def test_aspo_low_entropy_is_up_to_the_quantile(quantile, backend):
    """r = 1.3 lies between the two bounds: it keeps its gradient where the entropy is high."""
    generator = torch.Generator().manual_seed(0)
    entropy = torch.randint(5, (24, 11), generator=generator).double()  # with ties
    entropy[12:] += torch.rand(12, 11, generator=generator, dtype=torch.float64)
    mask = torch.arange(11) < torch.arange(24).remainder(12).unsqueeze(1)  # lengths 0 to 11
    zero = torch.zeros(24, 11, dtype=torch.float64)
    batch = dict(logp=zero + math.log(1.3), old_logp=zero, advantages=zero + 1, mask=mask)
    batch["entropy"] = entropy.masked_fill(~mask, math.nan)
    options = dict(objective=fca.ASPO(0.2, 0.4, quantile=quantile), backend=backend)
    wanted = torch.zeros_like(mask)
    for row in range(24):
        if mask[row].any():
            wanted[row] = mask[row] & (entropy[row] > torch.quantile(entropy[row][mask[row]], quantile))
    assert torch.equal(gradient(batch, **options) != 0, wanted)
    order = torch.randperm(int(mask.sum()), generator=generator)
    assert torch.equal(gradient(packed(batch, order), num_sequences=24, **options) != 0, wanted[mask][order])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_aepo_entropies_all_alike_or_alone(dtype, backend):
    batch = {name: x.to(dtype) for name, x in ordinary().items()}
    alike = {**batch, "entropy": torch.full_like(batch["logp"], 1.3)}
    one = {**batch, "mask": torch.zeros(6, 13, dtype=torch.bool).index_fill(1, torch.tensor(4), True).tril(4)}
    one["mask"][:-1] = False
    for case in (alike, one):
        grad = gradient(case, objective=fca.AEPO(entropy_scale=1e3), backend=backend)
        wanted = gradient(case, objective=fca.AEPO(entropy_scale=0.0), backend=backend)
        # The mean of equal numbers may be off by an ulp; over std + 1e-8 that is z ~ 1e-8 of float64's roundings.
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-6)


def test_dcpo_and_dppo_old_probabilities(backend):
    """old_probs replaces exp(old_logp) in the bounds, and only there."""
    for name in ("dcpo", "dppo-tv", "dppo-kl"):
        options = options_of(name, backend=backend)
        own = {**BATCH, "old_probs": BATCH["old_logp"].exp()}
        without = {n: x for n, x in BATCH.items() if n != "old_probs"}
        torch.testing.assert_close(gradient(own, **options), gradient(without, **options), **EXACT)
        assert not torch.equal(gradient(BATCH, **options), gradient(without, **options))
    zero = {**BATCH, "old_probs": torch.zeros_like(BATCH["logp"])}  # a number like any other: the range is [1, 10]
    stats = assert_closed_form(zero, backend, **options_of("dcpo"))
    assert stats.nonfinite == 0 and stats.tokens == BATCH["mask"].sum()


def test_dppo_certain_probabilities(backend):
    """p and q of 0 and 1, where the divergence has 0 ln 0."""
    logp, old_logp = torch.cartesian_prod(*[torch.tensor([0.0, -1e-9, -30.0, -500.0])] * 2).T.unsqueeze(1)
    for objective, A in itertools.product((fca.DPPOTV(), fca.DPPOKL()), (1.0, -1.0)):
        batch = dict(logp=logp, old_logp=old_logp, advantages=torch.full_like(logp, A))
        loss, grad, stats = loss_and_grad(batch, objective=objective, backend=backend)
        assert_finite(loss, grad, stats)
        likely, was_likely = logp > -1, old_logp > -1
        gone = (likely & ~was_likely) if A > 0 else (~likely & was_likely)
        assert torch.equal(grad == 0, gone) and stats.nonfinite == 0


def test_dual_clip_can_be_left_out(backend):
    batch = {**BATCH, "old_logp": BATCH["old_logp"] - 1.0}
    for cls in (fca.PPO, fca.GPPO, fca.CEGPPO, fca.AEPO, fca.BAPO):
        without, far = (gradient(batch, objective=cls(dual_clip=c), backend=backend) for c in (None, 1e30))
        assert torch.equal(without, far)
        assert not torch.equal(without, gradient(batch, objective=cls(dual_clip=3.0), backend=backend))


def test_vespo_weights_of_the_rollout(backend):
    """Zero and huge weights are held to [1e-8, e^20], and so is W."""
    for fill in (0.0, 1e-30, 1e30):
        batch = {**BATCH, "weights": BATCH["weights"].clone()}
        batch["weights"][2, :] = fill
        batch["weights"][3, 1] = fill
        for name in ("vespo", "vespo flat"):
            assert_closed_form(batch, backend, **options_of(name, "sequence-mean"))


GUARD = fca.GRPOGuard(0.02, 0.03)


def guard_batch(dimensions=(2, 3)):
    """Samples x of Gaussians around mu_old, and what GRPOGuard needs; logp as a mean over the dimensions."""
    batch = {name: x for name, x in ordinary(4, 7).items() if name in ("advantages", "weights")}
    batch["mask"] = make_batch(4, 7)["mask"]
    generator = torch.Generator().manual_seed(1)
    normal = lambda: torch.randn(4, 7, *dimensions, generator=generator, dtype=torch.float64)  # noqa: E731
    mu_old, sigma_t, dt = normal(), torch.linspace(0.5, 0.8, 7, dtype=torch.float64), 0.25
    s = (sigma_t * dt**0.5).view(7, *[1] * len(dimensions))
    return batch, mu_old + 0.2 * normal(), mu_old, mu_old + s * normal(), sigma_t, dt, s


@pytest.mark.parametrize("dimensions", ((2, 3), (1,)))
def test_grpo_guard_gradient_with_respect_to_mu(dimensions, backend):
    """Through logp and through the drift: -a w A r s K (x - mu_old) / (s^2 D dt), D the number of dimensions."""
    batch, mu, mu_old, x, sigma_t, dt, s = guard_batch(dimensions)
    over = tuple(range(2, mu.dim()))
    n, flat_s = math.prod(dimensions), s.flatten()

    def density(mean):
        return -((x - mean) / s).square().mean(over) / 2

    mu = mu.requires_grad_()
    inputs = dict(mu=mu, mu_old=mu_old, sigma_t=sigma_t, dt=dt, objective=GUARD, backend=backend)
    loss, _ = fca.policy_loss(density(mu), density(mu_old), **batch, **inputs)
    (grad,) = torch.autograd.grad(loss, mu)

    drift = (mu - mu_old).square().mean(over) / (2 * flat_s**2)
    r = ((density(mu) - density(mu_old) + drift) * flat_s).exp().detach()
    A, mask = batch["advantages"], batch["mask"]
    keep = ~((A > 0) & (r > 1.03)) & ~((A < 0) & (r < 0.98))
    assert 0 < (keep & mask).sum() < mask.sum()
    a = token_weight(mask, "token-mean", None) * batch["weights"] * keep
    wanted = (-a * A * r / flat_s / n / dt).view(4, 7, *[1] * len(dimensions)) * (x - mu_old)
    torch.testing.assert_close(grad, wanted, **EXACT)

    # The same packed, with NaN where masked, and sigma_t per token.
    hole = ~mask.view(4, 7, *[1] * len(dimensions))
    holes = [y.detach().masked_fill(hole, math.nan) for y in (mu, mu_old)]
    with_nan = holes[0].requires_grad_()
    loss, stats = fca.policy_loss(
        density(mu).detach(), density(mu_old), **batch, **{**inputs, "mu": with_nan, "mu_old": holes[1]}
    )
    loss.backward()
    assert with_nan.grad.isfinite().all() and not with_nan.grad[~mask].any() and stats.nonfinite == 0
    few = {name: y[mask] for name, y in batch.items() if name != "mask"}
    mu_packed = mu.detach()[mask].requires_grad_()
    inputs.update(mu=mu_packed, mu_old=mu_old[mask], sigma_t=sigma_t.expand(4, 7)[mask])
    loss, _ = fca.policy_loss(density(mu)[mask].detach(), density(mu_old)[mask], **few, **inputs)
    loss.backward()
    torch.testing.assert_close(mu_packed.grad, with_nan.grad[mask], **EXACT)


def test_grpo_guard_saturates(backend):
    """Weights over dt that pass float32's end. A gradient that passes float16's in autograd is infinite, not NaN."""
    zero = torch.zeros(2, 3)
    batch = dict(logp=zero, old_logp=zero, advantages=zero + 1e-30, weights=zero + 3e38, mu=zero.unsqueeze(2))
    batch.update(mu_old=zero.unsqueeze(2), sigma_t=1.0, dt=0.5)
    loss, grad, stats = loss_and_grad(batch, objective=GUARD, backend=backend)
    assert_finite(loss, grad, stats)
    assert stats.nonfinite == 0 and stats.tokens == 6
    batch.update(logp=zero.half(), advantages=zero + 1e9, weights=zero + 1)
    loss, grad, stats = loss_and_grad(batch, objective=GUARD, backend=backend)
    assert_finite(loss, grad.float().clamp(min=-1.0), stats)
    assert torch.equal(grad, torch.full_like(grad, -math.inf))


@pytest.mark.parametrize("normalizer", (7.5, 0.3, 1e-5))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_normalizer_as_a_tensor(normalizer, dtype, backend):
    tensor = torch.tensor(normalizer, dtype=dtype)
    for name, aggregation in (("dual", "token-mean"), ("gspo", "sequence-mean"), ("luspo", "constant")):
        options = options_of(name, aggregation, 0.1, backend=backend)
        got = loss_and_grad(BATCH, **{**options, "normalizer": tensor})
        expected = loss_and_grad(BATCH, **{**options, "normalizer": tensor.item()})
        assert same_bits(got[0], expected[0]) and same_bits(got[1], expected[1])


# ------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    "aggregation, normalizer",
    [("token-mean", None), ("sequence-mean", 11.0), ("constant", 0.7), ("sequence-sum", None)],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_statistics(name, aggregation, normalizer, backend):
    objective, mask = OBJECTIVES[name], BATCH["mask"].clone()
    old_logp = BATCH["old_logp"].clone()
    old_logp[3, 4], mask[3, 4] = math.inf, True
    batch = wanted_by(objective, {**BATCH, "old_logp": old_logp, "mask": mask})
    valid = mask & old_logp.isfinite() & BATCH["advantages"].isfinite()

    x = observe(objective, {**batch, "mask": valid})
    low, high, dual = clip_flags(objective, x)
    mass = token_weight(valid, aggregation, normalizer) * x.r * x.A.abs()
    r, D = x.r[valid], x.D[valid]
    if isinstance(objective, fca.GRPOGuard):  # logp is no token's log-probability there; the statistics' D is ln r
        D = r.log()
    wanted = {
        "tokens": valid.sum(),
        "clipped_low": low.sum(),
        "clipped_high": high.sum(),
        "clipped_dual": dual.sum(),
        "suppressed_mass": mass[suppressed(objective, x)].sum(),
        "total_mass": mass.sum(),
        "kl_k1": -D.sum(),
        "kl_k2": (D.square() / 2).sum(),
        "kl_k3": (D.exp() - 1 - D).sum(),
        "ratio_sum": r.sum(),
        "ratio_sq_sum": r.square().sum(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
        "nonfinite": (mask & ~valid).sum(),
    }
    options = dict(objective=objective, aggregation=aggregation, normalizer=normalizer, backend=backend)
    stats = statistics(batch, **options)
    assert wanted["nonfinite"] == 1 and tuple(stats.to_dict()) == FIELDS == tuple(wanted)
    for field, value in stats.to_dict().items():
        assert value == pytest.approx(wanted[field].item(), rel=STORED["rtol"], abs=STORED["atol"]), field
        assert getattr(stats, field).shape == () and getattr(stats, field).item() == value
    assert same_bits(stats.buffer, loss_and_grad(batch, **options)[2].buffer)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_statistics_add_as_batches_concatenate(aggregation, backend):
    parts = [make_batch(4, 9, seed=seed) for seed in range(3)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in INPUTS}
    options = dict(aggregation=aggregation, normalizer=31.0, backend=backend, objective=OBJECTIVES["dual"])
    each = [statistics(part, **options) for part in parts]
    before = [stats.buffer.clone() for stats in each]
    # Two more roundings to float32 than the whole batch's statistics.
    expected = statistics(whole, **options).buffer
    torch.testing.assert_close((each[0] + each[1] + each[2]).buffer, expected, rtol=4e-7, atol=1e-6)
    assert all(same_bits(stats.buffer, buffer) for stats, buffer in zip(each, before))

    nothing = statistics({**parts[0], "mask": torch.zeros(4, 9, dtype=torch.bool)}, **options)
    for merged in (each[0] + nothing, nothing + each[0]):
        assert torch.equal(merged.buffer, each[0].buffer)
    assert (nothing + nothing).to_dict() == dict.fromkeys(FIELDS, 0.0)


def test_statistics_object():
    stats = statistics(BATCH)
    for other in (stats.clone(), pickle.loads(pickle.dumps(stats)), copy.copy(stats), copy.deepcopy(stats)):
        assert other is not stats and torch.equal(other.buffer, stats.buffer)
    clone = stats.clone()
    clone.buffer.zero_()
    assert stats.tokens == BATCH["mask"].sum() and clone.tokens == 0
    full = fca.ClipStats(torch.full((len(FIELDS),), FLOAT32_MAX))
    assert (full + full).buffer.isfinite().all()
    with pytest.raises(AttributeError, match="clipped_up"):
        _ = stats.clipped_up
    with pytest.raises(TypeError):
        _ = stats + 1
    for buffer in (torch.zeros(3), torch.zeros(len(FIELDS), dtype=torch.float64)):
        with pytest.raises(ValueError, match="buffer"):
            fca.ClipStats(buffer)
    with pytest.raises(RuntimeError, match="init_process_group"):
        stats.all_reduce()


def test_statistics_all_reduce(tmp_path):
    """Of two gloo ranks; and the objectives that read the whole batch read that of all ranks."""
    batches = [wanted_by(fca.PPO(), make_batch(3, 8, torch.float32, seed)) for seed in range(2)]
    huge = torch.full((3, 8), 3e38)
    batches = [{**b, "old_logp": -huge * 0.1, "logp": huge * 0.5, "advantages": huge} for b in batches]
    batches[1]["logp"] = torch.full((3, 8), -1.0)
    args = (str(tmp_path / "store"), batches, str(tmp_path / "out"))
    torch.multiprocessing.spawn(all_reduce_worker, args, nprocs=2)
    each = [statistics(batch, normalizer=10.0) for batch in batches]
    got, grads = zip(*[torch.load(f"{args[2]}{rank}") for rank in range(2)])
    assert same_bits(*got) and got[0].isfinite().all()
    assert torch.equal(got[0], (each[0] + each[1]).buffer)
    for name in SHARED_OVER_RANKS:
        whole = gradient(make_batch(8, 9), objective=OBJECTIVES[name], normalizer=30.0)
        torch.testing.assert_close(torch.cat([grad[name] for grad in grads]), whole, **EXACT)


# ------------------------------------------------------------------------------------------ layouts

ORDER = torch.randperm(int(BATCH["mask"].sum()), generator=torch.Generator().manual_seed(3))


def assert_packed_equals_padded(name, aggregation, backend, orders=(None, ORDER)):
    """Row 0 of the batch has no token: the packed form knows it from the length of advantages [S]."""
    padded = {**BATCH, "advantages": torch.linspace(-1, 1.5, 6, dtype=torch.float64)}
    options = options_of(name, aggregation, 0.2, backend=backend)
    expected, wanted, wanted_stats = loss_and_grad(padded, **options)
    for order in orders:
        batch = packed(padded, order)
        if order is None:
            batch["sequence_ids"] = batch["sequence_ids"].int()
        loss, grad, stats = loss_and_grad(batch, **options)
        torch.testing.assert_close(loss, expected, **EXACT)
        tokens = wanted[padded["mask"]]
        torch.testing.assert_close(grad, tokens if order is None else tokens[order], **EXACT)
        torch.testing.assert_close(stats.buffer, wanted_stats.buffer, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded(name, aggregation, backend):
    assert_packed_equals_padded(name, aggregation, backend)


@on_gpu_backends
def test_packed_equals_padded_on_gpu_backends(backend):
    for i, name in enumerate(("dual", "gspo", "gmpo", "vespo", "aspo", "kl-cov")):
        assert_packed_equals_padded(name, AGGREGATIONS[i % 4], backend, orders=(ORDER,))


def test_packed_per_token_advantages(backend):
    """Without advantages [S], `num_sequences` tells of sequences that have no token."""
    padded = {**BATCH, "mask": BATCH["mask"].clone()}
    padded["mask"][4:] = False  # the last two sequences are empty
    order = torch.randperm(int(padded["mask"].sum()), generator=torch.Generator().manual_seed(3))
    for name in ("dual", *(n for n, x in OBJECTIVES.items() if isinstance(x, NEEDS_SEQUENCES))):
        for aggregation, normalizer, count in (("sequence-mean", None, 6), ("sequence-sum", 6.0, None)):
            options = dict(objective=OBJECTIVES[name], aggregation=aggregation, normalizer=normalizer, backend=backend)
            grad = gradient(packed(padded, order), num_sequences=count, **options)
            torch.testing.assert_close(grad, gradient(padded, **options)[padded["mask"]][order], **EXACT)


def relaid(x, layout):
    """x with the same values in other memory."""
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, True if x.dtype == torch.bool else math.nan)], -1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.nn.functional.pad(x, (3, 2, 1, 1))[1:-1, 3:-2]
    return x[:1].expand(x.shape)  # every row the same


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("strided", "transposed", "sliced", "expanded rows", "expanded columns"))
def test_layouts_give_the_same_bits(layout, dtype, backend):
    base = make_batch(4, 530, dtype)
    base = {name: x for name, x in base.items() if x.dim() == 2}
    if layout == "expanded rows":
        base = {name: x[3:4].expand(4, 530) for name, x in base.items()}
    elif layout == "expanded columns":
        base = {name: x[:, 3:4].expand(4, 530) for name, x in base.items()}
    else:
        base = {name: relaid(x, layout) for name, x in base.items()}
    contiguous = {name: x.contiguous() for name, x in base.items()}
    for name in SAMPLE if backend == "cpu" else ("dual", "gspo", "aspo"):
        options = options_of(name, "sequence-mean", 0.1, backend=backend)
        loss, stats = call(fca.policy_loss, base, **options)
        expected, wanted_stats = call(fca.policy_loss, contiguous, **options)
        if backend == "cpu":
            assert same_bits(loss, expected) and same_bits(stats.buffer, wanted_stats.buffer)
        else:  # torch.sum adds in the order of the memory
            torch.testing.assert_close(stats.buffer, wanted_stats.buffer, rtol=2e-7, atol=1e-6)
        assert torch.equal(gradient(base, **options), gradient(contiguous, **options)), name


@on_gpu_backends
@pytest.mark.parametrize("layout", ("strided", "transposed"))
def test_layouts_on_gpu_backends(layout, backend):
    base = wanted_by(fca.ASPO(), make_batch(3, 70, torch.bfloat16))
    for name in ("dual", "gspo", "aspo"):
        options = options_of(name, "sequence-mean", 0.1, backend=backend)
        apart = {n: relaid(x, layout) for n, x in base.items()}
        for x, y in zip(loss_and_grad(apart, **options)[:2], loss_and_grad(base, **options)[:2]):
            assert same_bits(x, y)


@pytest.mark.parametrize("stride", (2, 3))
def test_strided_packed_input(stride, backend):
    batch = packed(BATCH, ORDER)
    apart = {name: x.repeat_interleave(stride, 0)[::stride] for name, x in batch.items()}
    for name in SAMPLE:
        options = options_of(name, "sequence-mean", 0.1, backend=backend)
        assert torch.equal(gradient(apart, **options), gradient(batch, **options)), name


@pytest.mark.parametrize("backend", (*BACKENDS, *GPU_BACKENDS))
def test_rows_beyond_two_billion_elements(backend):
    """Three rows a gigaelement apart in memory that is only reserved: 32-bit offsets would wrap."""
    apart, cols = 2**30 + 7, 5
    try:
        memory = torch.empty(2 * apart + cols, dtype=torch.bfloat16, device=gpu_targets().get(backend, "cpu"))
    except RuntimeError:
        pytest.skip("this machine does not reserve 4 GiB")
    batch = wanted_by(fca.PPO(), ordinary(3, cols, torch.bfloat16))
    far = memory.as_strided((3, cols), (apart, 1)).copy_(batch["logp"])
    for name in ("dual", "gspo"):
        options = options_of(name, "sequence-mean", backend=backend)
        assert torch.equal(
            gradient({**batch, "logp": far, "old_logp": far}, **options),
            gradient({**batch, "old_logp": batch["logp"]}, **options),
        )
        assert torch.equal(
            gradient({**batch, "old_logp": far}, **options), gradient({**batch, "old_logp": batch["logp"]}, **options)
        )


@pytest.mark.parametrize("dtype", (torch.int64, torch.float32, torch.uint8, torch.bfloat16, torch.int8))
def test_mask_dtypes(dtype, backend):
    _, wanted, wanted_stats = loss_and_grad(BATCH, backend=backend)
    _, grad, stats = loss_and_grad({**BATCH, "mask": BATCH["mask"].to(dtype) * 3}, backend=backend)
    assert same_bits(grad, wanted) and same_bits(stats.buffer, wanted_stats.buffer)


# ------------------------------------------------------------------------------------------ errors

X = torch.zeros(2, 3)
N = torch.zeros(4)
IDS = torch.tensor([0, 0, 1, 1])
PACKED = dict(logp=N, old_logp=N, advantages=N)
FLOW = dict(objective=fca.GRPOGuard(0.2, 0.2), mu=X.unsqueeze(2), mu_old=X.unsqueeze(2), sigma_t=1.0, dt=0.1)
ERRORS = [  # what differs from a good call, the exception, what its message names
    (dict(logp=X[0, 0]), ValueError, "logp"),
    (dict(logp=X.unsqueeze(0)), ValueError, "logp"),
    (dict(logp=[1.0]), TypeError, "logp"),
    (dict(logp=X.long()), TypeError, "logp"),
    (dict(logp=X.to(torch.complex64)), TypeError, "logp"),
    (dict(logp=X.to_sparse()), TypeError, "logp"),
    (dict(logp=X.to("meta")), ValueError, "logp"),
    (dict(old_logp=X[:1]), ValueError, "old_logp"),
    (dict(old_logp=X.to("meta")), ValueError, "old_logp"),
    (dict(old_logp=None), TypeError, "old_logp"),
    (dict(advantages=X.T), ValueError, "advantages"),
    (dict(advantages=torch.zeros(3)), ValueError, "advantages"),
    (dict(advantages=torch.tensor(1.0)), ValueError, "advantages"),
    (dict(advantages=1.0), TypeError, "advantages"),
    (dict(advantages=X.int()), TypeError, "advantages"),
    (dict(mask=X[:1]), ValueError, "mask"),
    (dict(mask=True), (TypeError, ValueError), "mask"),
    (dict(mask=X.to("meta")), ValueError, "mask"),
    (dict(mask=X.to_sparse()), TypeError, "mask"),
    (dict(weights=torch.zeros(3)), ValueError, "weights"),
    (dict(weights=X.bool()), TypeError, "weights"),
    (dict(ref_logp=X[:, :1], kl_coef=0.1), ValueError, "ref_logp"),
    (dict(kl_coef=0.1), ValueError, "ref_logp"),
    (dict(kl_coef=math.nan, ref_logp=X), ValueError, "kl_coef"),
    (dict(kl_coef=1e39, ref_logp=X), ValueError, "kl_coef"),
    (dict(kl_coef="0.1", ref_logp=X), TypeError, "kl_coef"),
    (dict(kl_estimator="k4"), ValueError, "kl_estimator.*k3"),
    (dict(objective="ppo"), TypeError, "objective"),
    (dict(objective=fca.PPO), TypeError, "objective"),
    (dict(aggregation="mean"), ValueError, "aggregation.*token-mean"),
    (dict(aggregation="constant"), ValueError, "normalizer"),
    (dict(normalizer=0.0), ValueError, "normalizer"),
    (dict(normalizer=-1), ValueError, "normalizer"),
    (dict(normalizer=math.nan), ValueError, "normalizer"),
    (dict(normalizer=math.inf), ValueError, "normalizer"),
    (dict(normalizer=1e-40), ValueError, "normalizer"),
    (dict(normalizer=torch.ones(2)), ValueError, "normalizer"),
    (dict(normalizer="3"), TypeError, "normalizer"),
    (dict(backend="gpu"), ValueError, "backend.*reference"),
    *[(dict(backend=b), RuntimeError, f"backend.*{b}") for b in ("cuda", "triton") if gpu_targets().get(b) != "cpu"],
    (dict(sequence_ids=IDS), ValueError, "sequence_ids"),
    (dict(PACKED, sequence_ids=[0, 0, 1, 1]), TypeError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS.float()), TypeError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS[:3]), ValueError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS - 1), ValueError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS, advantages=N[:1]), ValueError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS, advantages=N[:0]), ValueError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS, weights=N[:3]), ValueError, "weights"),
    (dict(PACKED, advantages=N[:2]), ValueError, "advantages"),
    (dict(PACKED, aggregation="sequence-mean"), ValueError, "sequence_ids"),
    (dict(PACKED, objective=fca.GSPO()), ValueError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS, num_sequences=1), ValueError, "sequence_ids"),
    (dict(PACKED, sequence_ids=IDS, num_sequences=-1), ValueError, "num_sequences"),
    (dict(PACKED, sequence_ids=IDS, num_sequences=2.0), (TypeError, ValueError), "num_sequences"),
    (dict(PACKED, sequence_ids=IDS, num_sequences=3, advantages=N[:2]), ValueError, "num_sequences"),
    (dict(num_sequences=2), ValueError, "num_sequences"),
    *[(dict(PACKED, objective=x), ValueError, "sequence_ids") for x in (fca.GMPO(), fca.VESPO(), fca.LUSPO())],
    (dict(PACKED, objective=fca.ASPO(), entropy=N), ValueError, "sequence_ids"),
    (dict(objective=fca.VESPO(), weights=X[:, 0]), ValueError, "weights"),
    (dict(PACKED, objective=fca.VESPO(), sequence_ids=IDS, weights=N[:2], advantages=N[:2]), ValueError, "weights"),
    (dict(colour=X), TypeError, "colour"),
    (dict(entropy=X), ValueError, "entropy.*PPO"),
    (dict(generator=torch.Generator()), ValueError, "generator.*PPO"),
    *[(dict(objective=x), ValueError, f"{type(x).__name__} needs entropy") for x in (fca.ASPO(), fca.AEPO())],
    (dict(objective=fca.PPOEWMA()), ValueError, "PPOEWMA needs ewma_logp"),
    (dict(objective=fca.ASPO(), entropy=X[:1]), ValueError, "entropy"),
    (dict(objective=fca.AEPO(), entropy=X.int()), TypeError, "entropy"),
    (dict(objective=fca.AEPO(), entropy=1.0), TypeError, "entropy"),
    (dict(objective=fca.PPOEWMA(), ewma_logp=X.T), ValueError, "ewma_logp"),
    (dict(objective=fca.DCPO(), old_probs=X[0]), ValueError, "old_probs"),
    (dict(objective=fca.DPPOTV(), old_probs=[0.5]), TypeError, "old_probs"),
    (dict(objective=fca.DCPO(), ewma_logp=X), ValueError, "ewma_logp.*DCPO"),
    (dict(objective=fca.ClipCov(), generator=3), TypeError, "generator"),
    (dict(FLOW, kl_coef=0.1, ref_logp=X), ValueError, "kl_coef.*GRPOGuard"),
    *[({**FLOW, name: None}, ValueError, f"GRPOGuard needs {name}") for name in ("mu", "mu_old", "sigma_t", "dt")],
    ({**FLOW, "mu": X[:1]}, ValueError, "mu"),
    ({**FLOW, "mu_old": X}, ValueError, "mu_old"),
    ({**FLOW, "mu_old": FLOW["mu"].int()}, TypeError, "mu_old"),
    ({**FLOW, "sigma_t": 0.0}, ValueError, "sigma_t"),
    ({**FLOW, "sigma_t": torch.ones(4)}, ValueError, "sigma_t"),
    ({**FLOW, "dt": -0.1}, ValueError, "dt"),
    ({**FLOW, "dt": math.nan}, ValueError, "dt"),
    ({**FLOW, "dt": "1"}, TypeError, "dt"),
]
WRONG_OBJECTIVES = [
    (fca.PPO, dict(clip_low=-0.1), ValueError, "clip_low"),
    (fca.PPO, dict(clip_low=1.1), ValueError, "clip_low"),
    (fca.PPO, dict(clip_low="0.2"), TypeError, "clip_low"),
    (fca.PPO, dict(clip_high=math.nan), ValueError, "clip_high"),
    (fca.PPO, dict(clip_high=math.inf), ValueError, "clip_high"),
    (fca.PPO, dict(dual_clip=1.0), ValueError, "dual_clip"),
    (fca.PPO, dict(dual_clip=math.nan), ValueError, "dual_clip"),
    (fca.PPO, dict(ratio_cap=0.0), ValueError, "ratio_cap"),
    (fca.PPO, dict(ratio_cap="2"), TypeError, "ratio_cap"),
    (fca.GSPO, dict(clip_high=-1e-4), ValueError, "clip_high"),
    (fca.CISPO, dict(high=0.0), ValueError, "high"),
    (fca.CISPO, dict(high=math.inf), ValueError, "high"),
    (fca.CISPO, dict(high=None), TypeError, "high"),
    (fca.CISPO, dict(low=-0.1), ValueError, "low"),
    (fca.CISPO, dict(low=6.0), ValueError, "low"),
    (fca.LUSPO, dict(clip_low=1.5), ValueError, "clip_low"),
    (fca.SAPO, dict(tau_pos=0.0), ValueError, "tau_pos"),
    (fca.SAPO, dict(tau_neg=math.nan), ValueError, "tau_neg"),
    (fca.VESPO, dict(k_pos=-1.0), ValueError, "k_pos"),
    (fca.VESPO, dict(lambda_neg=0.0), ValueError, "lambda_neg"),
    (fca.VESPO, dict(lambda_pos=None), TypeError, "lambda_pos"),
    (fca.GMPO, dict(clip_low=-0.1), ValueError, "clip_low"),
    (fca.GMPO, dict(clip_high=math.inf), ValueError, "clip_high"),
    (fca.DRO, dict(beta=-1.0), ValueError, "beta"),
    (fca.DRO, dict(beta="1"), TypeError, "beta"),
    (fca.DPPOTV, dict(delta_low=-0.1), ValueError, "delta_low"),
    (fca.DPPOKL, dict(delta_high=math.nan), ValueError, "delta_high"),
    (fca.DPPOKL, dict(max_ratio=0.0), ValueError, "max_ratio"),
    (fca.ClipCov, dict(clip_low=2.0), ValueError, "clip_low"),
    (fca.ClipCov, dict(ratio=0.0), ValueError, "ratio"),
    (fca.ClipCov, dict(ratio=1.1), ValueError, "ratio"),
    (fca.ClipCov, dict(cov_low=6.0), ValueError, "cov_low"),
    (fca.KLCov, dict(ratio=-1.0), ValueError, "ratio"),
    (fca.KLCov, dict(kappa=math.inf), ValueError, "kappa"),
    (fca.GPPO, dict(clip_low=-1.0), ValueError, "clip_low"),
    (fca.GPPO, dict(dual_clip=0.5), ValueError, "dual_clip"),
    (fca.CEGPPO, dict(beta_low=-0.5), ValueError, "beta_low"),
    (fca.CEGPPO, dict(beta_high=math.nan), ValueError, "beta_high"),
    (fca.DCPO, dict(clip_high=-0.1), ValueError, "clip_high"),
    (fca.DCPO, dict(dual_clip=1.0), ValueError, "dual_clip"),
    (fca.BAPO, dict(target=math.nan), ValueError, "target"),
    (fca.BAPO, dict(low_start=0.9), ValueError, "low_max"),
    (fca.BAPO, dict(high_step=0.0), ValueError, "high_step"),
    (fca.BAPO, dict(high_step=1e-3), ValueError, "high_step"),
    (fca.BAPO, dict(dual_clip=1.0), ValueError, "dual_clip"),
    (fca.ASPO, dict(clip=1.5), ValueError, "clip"),
    (fca.ASPO, dict(clip_high_entropy=-0.5), ValueError, "clip_high_entropy"),
    (fca.ASPO, dict(quantile=1.5), ValueError, "quantile"),
    (fca.ASPO, dict(dual_clip="3"), TypeError, "dual_clip"),
    (fca.AEPO, dict(entropy_scale=math.inf), ValueError, "entropy_scale"),
    (fca.AEPO, dict(dual_clip="3"), TypeError, "dual_clip"),
    (fca.GRPOGuard, dict(clip_low=-0.1, clip_high=0.1), ValueError, "clip_low"),
    (fca.PPOEWMA, dict(clip_low=1.5), ValueError, "clip_low"),
    (fca.PPOEWMA, dict(max_ratio=-1.0), ValueError, "max_ratio"),
]


@pytest.mark.parametrize("function", (fca.policy_loss, fca.dloss_dlogp, fca.clip_stats))
@pytest.mark.parametrize("change, error, match", ERRORS, ids=test_id)
def test_wrong_arguments(change, error, match, function):
    with pytest.raises(error, match=match):
        function(**{**dict(logp=X, old_logp=X, advantages=X), **change})


@pytest.mark.parametrize("cls, fields, error, match", WRONG_OBJECTIVES, ids=test_id)
def test_wrong_objectives(cls, fields, error, match):
    with pytest.raises(error, match=f"{cls.__name__}: {match}"):
        cls(**fields)


def test_inputs_are_unchanged(backend):
    for name, objective in OBJECTIVES.items():
        batch = wanted_by(objective, make_batch(4, 530, torch.float32))
        before = {n: (x.clone(), x._version) for n, x in batch.items()}
        loss_and_grad(batch, backend=backend, **options_of(name, None, 0.1))
        gradient(batch, backend=backend, **options_of(name, None, 0.1))
        for n, (copied, version) in before.items():
            assert same_bits(batch[n], copied) and batch[n]._version == version


# ------------------------------------------------------------------------------------------ random input

MILD = (0.0, 20.0, -20.0, 100.0, -100.0, 1e-20, math.inf, -math.inf, math.nan)  # no product of two overflows float32


def valid_tokens(objective, batch, use_kl):
    """Unmasked tokens whose every input is finite, D and logp - ref_logp in the arithmetic type."""
    T = torch.float64 if batch["logp"].dtype == torch.float64 else torch.float32
    logp, old_logp, ref_logp = (batch[name].to(T) for name in ("logp", "old_logp", "ref_logp"))
    finite = batch["mask"] & logp.isfinite() & (logp - old_logp).isfinite()
    finite &= (logp - ref_logp).isfinite() | torch.tensor(not use_kl)
    for name in ("advantages", "weights", *(n for n, readers in EXTRAS.items() if isinstance(objective, readers))):
        good = batch[name].isfinite()
        finite &= good if good.dim() == 2 else good.all(2)
    return finite & (batch["weights"] >= 0) if isinstance(objective, fca.VESPO) else finite


def assert_within_rounding(batch, backends, **options):
    """The results lie within what float64's reference gives for log-ratios 32 eps around the given ones.

    32 eps: exp's error (2 ulp), and D's own rounding, which at |D| = 20 is 10 eps of the ratio. A token whose ratio
    lies that close to a bound may be clipped or not. On top, 32 eps of the terms that a gradient or a loss adds up.
    """
    objective, dtype = options["objective"], batch["logp"].dtype
    T = torch.float64 if dtype == torch.float64 else torch.float32
    eps, out = torch.finfo(T).eps, torch.finfo(dtype)
    mask = valid_tokens(objective, batch, options["kl_coef"] != 0)
    if isinstance(objective, fca.KLCov) and mask.sum() == 2:
        return  # their covariances are equal: either may be the largest
    wide = {n: x if n == "mask" else x.to(T).double() for n, x in wanted_by(objective, batch).items()}
    wide = {
        n: x if n == "mask" else torch.where(mask if x.dim() == 2 else mask.unsqueeze(2), x, 0.0)
        for n, x in wide.items()
    }
    D = (wide["logp"].to(T) - wide["old_logp"].to(T)).double()
    wide.update(mask=mask, old_logp=wide["logp"] - D)
    shift = torch.full((mask.shape[0], 1), 32 * eps, dtype=torch.float64)
    by_sequence = isinstance(objective, (*SEQUENCE_RATIO, fca.GMPO))
    if by_sequence:  # a mean of huge terms is as uncertain as their order
        shift += 8 * 2**-52 * D.abs().sum(1, keepdim=True) / lengths(mask)

    def reference(sign, **changes):
        again = {**options, **changes, "backend": "reference"}
        if isinstance(objective, fca.ClipCov):
            again["generator"] = torch.Generator().manual_seed(0)
        return loss_and_grad({**wide, "logp": wide["logp"] + sign * shift}, **again)

    cases = [reference(sign) for sign in (0, -1, 1)]
    x = observe(objective, wide)
    a = token_weight(mask, options["aggregation"] or default_aggregation(objective), options["normalizer"])
    terms = reference(0, kl_coef=0.0)[1].abs()
    if by_sequence:
        terms = ((a * x.w.abs() * x.A.abs() * x.r).sum(1, keepdim=True) / lengths(mask)).expand(mask.shape)
    elif isinstance(objective, fca.DRO):
        terms = a * x.w.abs() * (x.A.abs() + objective.beta * D.abs())
    elif isinstance(objective, fca.KLCov):
        terms = a * x.w.abs() * (x.A.abs() * x.r + objective.kappa)
    d = x.ref_logp - x.logp if options["kl_coef"] else torch.zeros_like(D)
    kl = options["kl_coef"] * a * (1 + d.clamp(-20, 20).exp() + d.abs())
    terms = terms + kl
    loss = token_loss(objective, x).abs() + ((x.A * x.logp).abs() if isinstance(objective, fca.DRO) else 0.0)
    summed = (a * x.w.abs() * loss + kl * (1 + d.abs())).sum()

    def check(value, wanted, slack):
        low, high = torch.stack(wanted).amin(0), torch.stack(wanted).amax(0)
        beyond = torch.maximum(low - value, value - high)
        wrong = ~(beyond <= slack)
        assert not wrong.any(), [y[wrong][:3].tolist() for y in (value, low, high, beyond)]

    # Where float32 has saturated, or an intermediate has underflowed, float64 goes on; float16 stops at its largest.
    size = x.A.abs() * (1 + x.r) + (D.abs() if isinstance(objective, (fca.DRO, fca.KLCov)) else 0.0)
    size = size.amax(1, keepdim=True).expand(size.shape) if by_sequence and size.numel() else size
    most = torch.finfo(T).max / 1e6
    unsure = (torch.maximum(size, terms) > most) | (shift > 1e-3)
    least = 4 * out.tiny * out.eps + 4 * torch.finfo(T).tiny * eps * (1 + a * x.w.abs()) * (1 + x.r)
    losses, grads, every = zip(*cases)
    grads = [g.clamp(-out.max, out.max) for g in grads]
    grad_slack = (32 * eps * terms + out.eps * grads[0].abs() + least).masked_fill(unsure, math.inf)
    sure = summed <= most and not (unsure & mask).any()
    loss_slack = 32 * eps * summed + 4 * eps * losses[0].abs() + least.sum() if sure else math.inf
    # Underflow is a matter of the type: rules that clip nothing have suppressed mass where their gradient underflows.
    sums = FIELDS[5 if isinstance(objective, CLIPS_NOTHING) else 4 : 6] + FIELDS[9:13]

    for backend in backends:
        loss, grad, stats = loss_and_grad(batch, backend=backend, **options)
        if isinstance(objective, fca.GRPOGuard):  # passes float16's end on its way through autograd, as documented
            grad = grad.clamp(-out.max, out.max)
        assert_finite(loss, grad, stats)
        check(grad.double(), grads, grad_slack)
        check(loss.double(), losses, loss_slack)
        assert stats.tokens == mask.sum() and stats.nonfinite == (batch["mask"] & ~mask).sum()
        if (shift > 1e-3).any():
            continue
        for field in (*FIELDS[1:4], *sums):
            wanted = [getattr(x, field) for x in every]
            slack = 1e-5 * wanted[0] + 1e-37 if wanted[0] < FLOAT32_MAX / 1e6 else math.inf
            check(getattr(stats, field), wanted, slack if field in sums else 0.0)


WILD = dict(
    shape=st.tuples(st.integers(0, 5), st.sampled_from((0, 1, 2, 7, 31, 64, 511, 513))),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(OBJECTIVES)),
    aggregation=st.sampled_from(AGGREGATIONS),
    kl=st.sampled_from(((0.0, "k3"), *((0.3, estimator) for estimator in ESTIMATORS))),
    share=st.sampled_from((0.0, 0.02, 0.3)),
    layout=st.sampled_from(("as is", "strided", "transposed")),
    seed=st.integers(0, 2**20),
)


def wild_case(shape, dtype, name, aggregation, kl, share, layout, seed):
    objective = OBJECTIVES[name]
    extremes = (MILD,) if isinstance(objective, WHOLE_BATCH) else ()
    batch = make_wild_batch(*shape, dtype, seed, share, *extremes)
    batch = {n: x if layout == "as is" else relaid(x, layout) for n, x in batch.items()}
    return batch, options_of(name, aggregation, kl[0], kl_estimator=kl[1])


@needs_native
@settings(max_examples=200)
@given(**WILD)
def test_wild_batches(**case):
    batch, options = wild_case(**case)
    assert_within_rounding(batch, ("cpu", "reference"), **options)


@on_gpu_backends
@pytest.mark.parametrize("name", OBJECTIVES)
def test_wild_batches_on_gpu_backends(name, backend):
    at = list(OBJECTIVES).index(name)
    kl = (0.3, ESTIMATORS[at % 4])
    for shape, dtype, share in (
        ((3, 41), torch.float32, 0.1),
        ((2, 150), (torch.bfloat16, torch.float16)[at % 2], 0.02),
    ):
        batch, options = wild_case(shape, dtype, name, AGGREGATIONS[at % 4], kl, share, "as is", at)
        assert_within_rounding(batch, (backend,), **options)


# ------------------------------------------------------------------------------------------ the same bits


@needs_native
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_runs_and_threads_give_the_same_bits(name):
    options = options_of(name, "sequence-mean", 0.1, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for shape in ((3, 9000), (300, 41)):
            batch = make_wild_batch(*shape, torch.float32, 0, share=0.02)
            torch.set_num_threads(1)
            loss, grad, stats = loss_and_grad(batch, **options)
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                again, grad_again, stats_again = loss_and_grad(batch, **options)
                assert same_bits(loss, again) and same_bits(grad, grad_again)
                assert same_bits(stats.buffer, stats_again.buffer)
    finally:
        torch.set_num_threads(threads)


@on_gpu_backends
@pytest.mark.parametrize("name", ("dual", "gmpo"))
def test_runs_on_gpu_backends_give_the_same_bits(name, backend):
    batch = make_wild_batch(2, 1300, torch.float32, 0, share=0.02)
    loss, grad, stats = loss_and_grad(batch, **options_of(name, "sequence-mean", 0.1, backend=backend))
    again, grad_again, stats_again = loss_and_grad(batch, **options_of(name, "sequence-mean", 0.1, backend=backend))
    assert same_bits(loss, again) and same_bits(grad, grad_again) and same_bits(stats.buffer, stats_again.buffer)


@needs_native
@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_instruction_sets_give_the_same_bits(isa):
    if isa == "avx2" and native.capability() == "baseline":
        pytest.skip("this CPU has no AVX2")
    here = pathlib.Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "FUSED_CLIP_ADAM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(paths)}
    code = "import objective_cases; print(objective_cases.digest())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [isa, digest().split()[1]]


# ------------------------------------------------------------------------------------------ autograd


def test_only_logp_gets_a_gradient(backend):
    for name, objective in OBJECTIVES.items():
        batch = {n: x if n == "mask" else x.clone().requires_grad_() for n, x in BATCH.items()}
        loss, stats = call(fca.policy_loss, batch, **options_of(name, None, 0.1, backend=backend))
        assert not stats.buffer.requires_grad
        loss.backward()
        differentiable = {"logp", "mu"} if isinstance(objective, fca.GRPOGuard) else {"logp"}
        assert {n for n, x in batch.items() if x.grad is not None} == differentiable, name


def test_double_backward_raises(backend):
    logp = BATCH["logp"].clone().requires_grad_()
    loss, _ = call(fca.policy_loss, {**BATCH, "logp": logp}, backend=backend)
    (grad,) = torch.autograd.grad(loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
    factor = torch.tensor(2.0, requires_grad=True)
    loss, _ = call(fca.policy_loss, {**BATCH, "logp": logp}, backend=backend)
    (grad,) = torch.autograd.grad(factor * loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


def test_backward_twice_through_a_retained_graph(backend):
    logp = BATCH["logp"].clone().requires_grad_()
    loss, _ = call(fca.policy_loss, {**BATCH, "logp": logp}, backend=backend)
    first, second = (torch.autograd.grad(loss, logp, retain_graph=True)[0] for _ in range(2))
    assert same_bits(first, second)


def test_without_grad(backend):
    logp = BATCH["logp"].clone().requires_grad_()
    expected, wanted, wanted_stats = loss_and_grad(BATCH, backend=backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss, stats = call(fca.policy_loss, {**BATCH, "logp": logp}, backend=backend)
            grad = gradient({**BATCH, "logp": logp}, backend=backend)
        assert not loss.requires_grad and not grad.requires_grad
        assert same_bits(loss, expected) and same_bits(grad, wanted)
        assert same_bits(stats.buffer, wanted_stats.buffer)
    assert not gradient({**BATCH, "logp": logp}, backend=backend).requires_grad


def test_logp_inside_a_graph(backend):
    """logp as a trainer has it: gathered from a log-softmax, and sliced."""
    logits = torch.randn(6, 14, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (6, 14, 1))

    def grad_of(function):
        logp = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)[:, 1:]
        return torch.autograd.grad(function({**BATCH, "logp": logp}), logits)[0]

    grad = grad_of(lambda batch: 3 * call(fca.policy_loss, batch, backend=backend)[0] + 1)
    torch.testing.assert_close(grad, grad_of(lambda batch: 3 * plain_loss(fca.PPO(), batch)), **EXACT)


# The others stop a gradient: not a derivative.
@pytest.mark.parametrize(
    "name", ("dual", "cap < high", "gspo", "sapo", "gmpo", "gpg", "dro", "kl-cov", "dcpo", "grpo-guard")
)
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_gradcheck(name, estimator, backend):
    batch = make_batch(3, 4, seed=2)
    options = options_of(name, "sequence-mean", 0.3, kl_estimator=estimator, backend=backend)

    def loss(logp):
        return call(fca.policy_loss, {**batch, "logp": logp}, **options)[0]

    assert torch.autograd.gradcheck(loss, batch["logp"].requires_grad_())


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_float16_overflow_of_a_grad_scaler_is_seen(backend):
    # Our own gradient saturates; the scaler's factor must be able to overflow, or it would never be lowered.
    logp = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    loss, _ = fca.policy_loss(logp, torch.zeros(1, 2), torch.full((1, 2), 6e4), backend=backend)
    (loss * 2.0**16).backward()
    assert bool(logp.grad.isinf().all())
    logp.grad = None
    loss, _ = fca.policy_loss(logp, torch.zeros(1, 2), torch.full((1, 2), 1e9), backend=backend)
    loss.backward()
    assert bool(logp.grad.isfinite().all())
