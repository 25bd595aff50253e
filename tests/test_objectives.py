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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from objective_cases import (
    AGGREGATIONS,
    ESTIMATORS,
    INPUTS,
    OBJECTIVES,
    all_reduce_worker,
    digest,
    lengths,
    make_batch,
    make_wild_batch,
    packed,
    plain_loss,
    ratios,
    token_loss,
    token_weight,
)

import fused_clip_adam as fca
from fused_clip_adam.backends import native
from fused_clip_adam.objectives.stats import FIELDS

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
BACKENDS = (pytest.param("cpu", marks=needs_native), "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max

# Sums of <= 100 float64 terms of size ~1 in two orders: ~100 * 1.1e-16. A wrong factor or sign is above 1e-3.
EXACT = dict(rtol=1e-12, atol=1e-12)
# One rounding to float32 of a statistic formed in float64.
STORED = dict(rtol=1.2e-7, atol=1e-12)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def loss_and_grad(batch, factor=1.0, **options):
    """loss, d (factor loss) / d logp, stats, through backward()."""
    logp = batch["logp"].detach().clone().requires_grad_()
    loss, stats = fca.policy_loss(**{**batch, "logp": logp}, **options)
    (factor * loss).backward()
    return loss.detach(), logp.grad, stats


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
VARIANTS = {
    "all inputs": BATCH,
    "per sequence": PER_SEQUENCE,
    "bare": {name: ordinary()[name] for name in ("logp", "old_logp", "advantages", "ref_logp")},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_closed_form_is_autograd_of_the_plain_loss(name, aggregation, variant, backend):
    batch = VARIANTS[variant]
    normalizers = (7.5,) if aggregation == "constant" else (None, 0.25)
    kl_terms = [(0.0, "k3"), *((0.3, e) for e in ESTIMATORS)] if variant == "all inputs" else [(0.3, "k3")]
    for normalizer, (kl_coef, estimator) in itertools.product(normalizers, kl_terms):
        options = dict(objective=OBJECTIVES[name], aggregation=aggregation, normalizer=normalizer)
        options.update(kl_coef=kl_coef, kl_estimator=estimator)
        logp = batch["logp"].clone().requires_grad_()
        expected = plain_loss(batch={**batch, "logp": logp}, **options)
        (wanted,) = torch.autograd.grad(expected, logp)

        loss, grad, _ = loss_and_grad(batch, factor=-1.75, backend=backend, **options)
        torch.testing.assert_close(loss, expected.detach(), **EXACT)
        torch.testing.assert_close(grad, -1.75 * wanted, **EXACT)
        torch.testing.assert_close(fca.dloss_dlogp(**batch, backend=backend, **options), wanted, **EXACT)


GOLDEN_RATIOS = (0.2, 0.7, 1.0, 1.5, 4.0)
GOLDEN = [  # objective, advantage, g at each ratio: the table of the specification
    (fca.PPO(0.2, 0.28), 1, (-0.2, -0.7, -1, 0, 0)),
    (fca.PPO(0.2, 0.28), -1, (0, 0, 1, 1.5, 4)),
    (fca.PPO(0.2, 0.28, dual_clip=3.0), -1, (0, 0, 1, 1.5, 0)),
    (fca.CISPO(0.8, 1.28), 1, (-0.8, -0.8, -1, -1.28, -1.28)),
    (fca.CISPO(0.8, 1.28), -1, (0.8, 0.8, 1, 1.28, 1.28)),
    (fca.CISPO(high=2.0), 1, (-0.2, -0.7, -1, -1.5, -2)),
    (fca.CISPO(high=2.0), -1, (0.2, 0.7, 1, 1.5, 2)),
]


@pytest.mark.parametrize("objective, advantage, wanted", GOLDEN)
def test_golden_table(objective, advantage, wanted, backend):
    logp = torch.tensor(GOLDEN_RATIOS, dtype=torch.float64).log()
    zero, A = torch.zeros_like(logp), torch.full_like(logp, advantage)
    options = dict(objective=objective, aggregation="constant", normalizer=1.0, backend=backend)
    grad = fca.dloss_dlogp(logp, zero, A, **options)
    torch.testing.assert_close(grad, torch.tensor(wanted, dtype=torch.float64), **EXACT)


# ------------------------------------------------------------------------------------------ the edges

# Which bound, the log-ratio that meets it, the advantage for which it acts, and the objective that puts it at r.
BOUNDS = {
    "low": (-0.25, -1.0, lambda r: fca.PPO(clip_low=1 - r)),
    "high": (0.25, 1.0, lambda r: fca.PPO(clip_high=r - 1)),
    "dual": (1.1, -1.0, lambda r: fca.PPO(dual_clip=r)),
    "cap": (1.1, -1.0, lambda r: fca.PPO(ratio_cap=r)),
    "cap < high": (0.1, 1.0, lambda r: fca.PPO(ratio_cap=r)),
}


@pytest.mark.parametrize("shape", [(1, 1), (1, 40)])
@pytest.mark.parametrize("bound", BOUNDS)
def test_ratio_on_the_bound_keeps_its_gradient(bound, shape, backend):
    D, advantage, objective = BOUNDS[bound]
    logp, old_logp, A = (torch.full(shape, x) for x in (D, 0.0, advantage))
    r = fca.clip_stats(logp, old_logp, A, backend=backend).ratio_max  # float32, as the backend computes it
    beyond = torch.nextafter(r, torch.tensor(math.inf if bound == "low" else 0.0))  # one ulp: r is past it
    options = dict(aggregation="constant", normalizer=1.0, backend=backend)
    # 1 - r and r - 1 are exact in float64 for r in [0.5, 4], so that the bound is r to the bit.
    on = fca.dloss_dlogp(logp, old_logp, A, objective=objective(r.item()), **options)
    assert torch.equal(on, -A * r)
    past = fca.dloss_dlogp(logp, old_logp, A, objective=objective(beyond.item()), **options)
    assert torch.equal(past, torch.zeros(shape))


@pytest.mark.parametrize("advantage", (1.0, -1.0))
def test_no_clip_range_keeps_ratio_one(advantage, backend):
    one, A = torch.full((2, 3), -0.7), torch.full((2, 3), advantage)
    for objective in (fca.PPO(0.0, 0.0), fca.GSPO(0.0, 0.0), fca.CISPO(1.0, 1.0)):
        _, grad, stats = loss_and_grad(dict(logp=one, old_logp=one, advantages=A), objective=objective, backend=backend)
        torch.testing.assert_close(grad, -A / 6)
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


def test_zero_advantage_gives_zero(backend):
    batch = {**BATCH, "advantages": torch.zeros(6)}
    for objective in OBJECTIVES.values():
        loss, grad, stats = loss_and_grad(batch, objective=objective, backend=backend)
        assert loss == 0 and not grad.any()
        assert stats.total_mass == stats.clipped_low == stats.clipped_high == stats.clipped_dual == 0


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", ("logp", "old_logp", "advantages", "weights", "ref_logp"))
def test_nonfinite_token_counts_as_masked(name, value, backend):
    bad = torch.zeros(6, 13, dtype=torch.bool)
    bad[2, 3] = bad[4, 12] = bad[5] = True
    batch = ordinary()
    broken = {**batch, name: batch[name].masked_fill(bad, value)}
    for objective, aggregation in itertools.product(OBJECTIVES.values(), AGGREGATIONS):
        options = dict(objective=objective, aggregation=aggregation, kl_coef=0.2, backend=backend)
        options["normalizer"] = 9.0 if aggregation == "constant" else None
        loss, grad, stats = loss_and_grad(broken, **options)
        expected, wanted, counted = loss_and_grad({**batch, "mask": ~bad}, **options)
        assert same_bits(loss, expected) and torch.equal(grad, wanted)
        assert stats.nonfinite == bad.sum() and counted.nonfinite == 0
        assert torch.equal(stats.buffer[:-1], counted.buffer[:-1])


def test_ref_logp_without_kl_is_not_read(backend):
    batch = {**BATCH, "ref_logp": torch.full((6, 13), math.nan, dtype=torch.float64)}
    assert fca.clip_stats(**batch, backend=backend).nonfinite == 0


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_no_token_left(objective, backend):
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    nan = torch.full((4, 5), math.nan)
    cases = [dict(logp=nan, old_logp=nan, advantages=nan, mask=nothing, ref_logp=nan, weights=nan)]
    for shape in ((0, 0), (0, 7), (7, 0)):
        empty = torch.empty(shape)
        cases.append(dict(logp=empty, old_logp=empty, advantages=torch.empty(shape[0]), ref_logp=empty))
    no_ids = torch.empty(0, dtype=torch.int64)
    for sequences in (0, 3):
        empty = torch.empty(0)
        cases.append(dict(logp=empty, old_logp=empty, advantages=torch.empty(sequences), sequence_ids=no_ids))
        cases[-1]["ref_logp"] = empty
    for case, aggregation in itertools.product(cases, AGGREGATIONS):
        options = dict(objective=objective, aggregation=aggregation, kl_coef=0.1, backend=backend)
        options["normalizer"] = 2.0 if aggregation == "constant" else None
        loss, grad, stats = loss_and_grad(case, **options)
        assert loss == 0 and grad.shape == case["logp"].shape and not grad.any()
        values = stats.to_dict()
        assert stats.ratio_min.item() == FLOAT32_MAX and not any(values.values()), values


def test_packed_without_ids_is_one_batch_of_tokens(backend):
    batch = {name: x.reshape(-1) for name, x in ordinary().items()}
    loss, grad, _ = loss_and_grad(batch, kl_coef=0.1, backend=backend)
    expected, wanted, _ = loss_and_grad(ordinary(), kl_coef=0.1, backend=backend)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(grad.view(6, 13), wanted, **EXACT)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 512), (2, 513), (1, 2049), (3, 4100)])
def test_shapes_around_the_tile(shape, backend):
    batch = ordinary(*shape)
    for name in ("dual", "gspo", "cispo both"):
        options = dict(objective=OBJECTIVES[name], aggregation="sequence-mean", kl_coef=0.1)
        logp = batch["logp"].clone().requires_grad_()
        expected = plain_loss(batch={**batch, "logp": logp}, **options)
        (wanted,) = torch.autograd.grad(expected, logp)
        loss, grad, _ = loss_and_grad(batch, backend=backend, **options)
        torch.testing.assert_close(loss, expected.detach(), **EXACT)
        torch.testing.assert_close(grad, wanted, **EXACT)


@pytest.mark.parametrize("old_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, old_dtype, backend):
    """Narrow inputs are widened exactly, so that only the arithmetic and the gradient's dtype can differ."""
    batch = ordinary(dtype=old_dtype)
    batch["logp"] = batch["logp"].to(dtype)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    wide = {name: x.to(arithmetic) for name, x in batch.items()}
    for name in ("dual", "gspo", "cispo both"):
        options = dict(objective=OBJECTIVES[name], kl_coef=0.1, backend=backend)
        loss, grad, _ = loss_and_grad(batch, **options)
        expected, wanted, _ = loss_and_grad(wide, **options)
        assert loss.dtype == arithmetic and grad.dtype == dtype
        assert same_bits(loss, expected) and same_bits(grad, wanted.to(dtype))


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
    alone = [{name: x[i : i + 1] for name, x in together.items()} for i in range(len(HUGE))]
    kl_terms = ((0.0, "k3"), (1e-45, "k2"), (3e38, "k1"), (3e38, "k3"))
    for batch, name, (kl_coef, estimator) in itertools.product(
        (together, *alone), ("dual", "gspo", "cispo upper"), kl_terms
    ):
        options = dict(objective=OBJECTIVES[name], normalizer=normalizer, kl_estimator=estimator, backend=backend)
        assert_finite(*loss_and_grad(batch, kl_coef=kl_coef, **options))


# ------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("aggregation, normalizer", [(a, n) for a in AGGREGATIONS for n in (None, 11.0)][:-2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_statistics(name, aggregation, normalizer, backend):
    objective, mask = OBJECTIVES[name], BATCH["mask"]
    bad = BATCH["old_logp"].clone()
    bad[3, 4], mask = math.inf, mask.clone().index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(True))
    batch = {**BATCH, "old_logp": bad, "mask": mask}
    valid = mask & bad.isfinite() & BATCH["advantages"].isfinite()

    D, A = (batch["logp"] - bad)[valid], batch["advantages"][valid]
    r = ratios(objective, batch["logp"], torch.where(valid, bad, 0.0), valid)[valid]
    suppressed = torch.zeros_like(A, dtype=torch.bool)
    if not isinstance(objective, fca.CISPO):  # CISPO suppresses nothing; else: the loss does not move with the ratio
        leaf = r.clone().requires_grad_()
        (slope,) = torch.autograd.grad(token_loss(objective, leaf, A, None).sum(), leaf)
        suppressed = slope == 0
    low, high, dual, _ = objective.bounds()
    mass = token_weight(valid, aggregation, normalizer)[valid] * r * A.abs()
    wanted = {
        "tokens": valid.sum(),
        "clipped_low": ((A < 0) & (r < low)).sum(),
        "clipped_high": ((A > 0) & (r > high)).sum(),
        "clipped_dual": ((A < 0) & (r > dual)).sum(),
        "suppressed_mass": mass[suppressed].sum(),
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
    stats = fca.clip_stats(**batch, **options)
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
    each = [fca.clip_stats(**part, **options) for part in parts]
    before = [stats.buffer.clone() for stats in each]
    # Two more roundings to float32 than the whole batch's statistics.
    expected = fca.clip_stats(**whole, **options).buffer
    torch.testing.assert_close((each[0] + each[1] + each[2]).buffer, expected, rtol=4e-7, atol=1e-6)
    assert all(same_bits(stats.buffer, buffer) for stats, buffer in zip(each, before))

    nothing = fca.clip_stats(**{**parts[0], "mask": torch.zeros(4, 9, dtype=torch.bool)}, **options)
    for merged in (each[0] + nothing, nothing + each[0]):
        assert torch.equal(merged.buffer, each[0].buffer)
    assert (nothing + nothing).to_dict() == dict.fromkeys(FIELDS, 0.0)


def test_statistics_object():
    stats = fca.clip_stats(**BATCH)
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
    batches = [make_batch(3, 8, torch.float32, seed) for seed in range(2)]
    huge = torch.full((3, 8), 3e38)
    batches = [{**b, "old_logp": -huge * 0.1, "logp": huge * 0.5, "advantages": huge} for b in batches]
    batches[1]["logp"] = torch.full((3, 8), -1.0)
    args = (str(tmp_path / "store"), batches, str(tmp_path / "out"))
    torch.multiprocessing.spawn(all_reduce_worker, args, nprocs=2)
    each = [fca.clip_stats(**batch, normalizer=10.0) for batch in batches]
    got = [torch.load(f"{args[2]}{rank}") for rank in range(2)]
    assert same_bits(*got) and got[0].isfinite().all()
    assert torch.equal(got[0], (each[0] + each[1]).buffer)


# ------------------------------------------------------------------------------------------ layouts

ORDER = torch.randperm(int(BATCH["mask"].sum()), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded(name, aggregation, backend):
    """Row 0 of the batch has no token: the packed form knows it from the length of advantages [S]."""
    padded = {**BATCH, "advantages": torch.linspace(-1, 1.5, 6, dtype=torch.float64)}
    options = dict(objective=OBJECTIVES[name], aggregation=aggregation, kl_coef=0.2, backend=backend)
    options["normalizer"] = 9.0 if aggregation == "constant" else None
    expected, wanted, wanted_stats = loss_and_grad(padded, **options)
    for order, ids in itertools.product((None, ORDER), (torch.int64, torch.int32)):
        batch = packed(padded, order)
        batch["sequence_ids"] = batch["sequence_ids"].to(ids)
        loss, grad, stats = loss_and_grad(batch, **options)
        torch.testing.assert_close(loss, expected, **EXACT)
        tokens = wanted[padded["mask"]]
        torch.testing.assert_close(grad, tokens if order is None else tokens[order], **EXACT)
        torch.testing.assert_close(stats.buffer, wanted_stats.buffer, rtol=1.2e-7, atol=0)


def test_packed_per_token_advantages(backend):
    batch, options = packed(BATCH, ORDER), dict(objective=OBJECTIVES["gspo"], normalizer=6.0, backend=backend)
    _, grad, _ = loss_and_grad(batch, aggregation="sequence-mean", **options)
    _, wanted, _ = loss_and_grad(BATCH, aggregation="sequence-mean", **options)
    torch.testing.assert_close(grad, wanted[BATCH["mask"]][ORDER], **EXACT)


def relaid(x, layout):
    """x with the same values in other memory."""
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, True if x.dtype == torch.bool else math.nan)], -1)[..., 0]
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":
        return torch.nn.functional.pad(x, (3, 2, 1, 1))[1:-1, 3:-2]
    return x[:1].expand(x.shape)  # every row the same


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("strided", "transposed", "sliced", "expanded rows", "expanded columns"))
def test_layouts_give_the_same_bits(layout, dtype, backend):
    base = make_batch(5, 700, dtype)
    if layout == "expanded rows":
        base = {name: x[3:4].expand(5, 700) for name, x in base.items()}
    elif layout == "expanded columns":
        base = {name: x[:, 3:4].expand(5, 700) for name, x in base.items()}
    else:
        base = {name: relaid(x, layout) for name, x in base.items()}
    contiguous = {name: x.contiguous() for name, x in base.items()}
    for name in ("dual", "gspo", "cispo both"):
        options = dict(objective=OBJECTIVES[name], aggregation="sequence-mean", kl_coef=0.1, backend=backend)
        loss, stats = fca.policy_loss(**base, **options)
        expected, wanted_stats = fca.policy_loss(**contiguous, **options)
        if backend == "cpu":
            assert same_bits(loss, expected) and same_bits(stats.buffer, wanted_stats.buffer)
        else:  # torch.sum adds in the order of the memory
            torch.testing.assert_close(stats.buffer, wanted_stats.buffer, rtol=2e-7, atol=1e-6)
        grad, wanted = fca.dloss_dlogp(**base, **options), fca.dloss_dlogp(**contiguous, **options)
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("stride", (2, 3))
def test_strided_packed_input(stride, backend):
    batch = packed(BATCH, ORDER)
    apart = {name: x.repeat_interleave(stride)[::stride] for name, x in batch.items()}
    options = dict(objective=OBJECTIVES["gspo"], aggregation="sequence-mean", kl_coef=0.1, backend=backend)
    assert torch.equal(fca.dloss_dlogp(**apart, **options), fca.dloss_dlogp(**batch, **options))


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
    (dict(backend="cuda"), RuntimeError, "backend.*cuda"),
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
    (dict(entropy=X), TypeError, "entropy"),
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
]


@pytest.mark.parametrize("function", (fca.policy_loss, fca.dloss_dlogp, fca.clip_stats))
@pytest.mark.parametrize("change, error, match", ERRORS, ids=str)
def test_wrong_arguments(change, error, match, function):
    with pytest.raises(error, match=match):
        function(**{**dict(logp=X, old_logp=X, advantages=X), **change})


@pytest.mark.parametrize("cls, fields, error, match", WRONG_OBJECTIVES, ids=str)
def test_wrong_objectives(cls, fields, error, match):
    with pytest.raises(error, match=f"{cls.__name__}: {match}"):
        cls(**fields)


def test_inputs_are_unchanged(backend):
    for objective in OBJECTIVES.values():
        batch = make_batch(6, 700, torch.float32)
        before = {name: (x.clone(), x._version) for name, x in batch.items()}
        loss_and_grad(batch, objective=objective, kl_coef=0.1, backend=backend)
        fca.dloss_dlogp(**batch, objective=objective, kl_coef=0.1, backend=backend)
        for name, (copied, version) in before.items():
            assert same_bits(batch[name], copied) and batch[name]._version == version


# ------------------------------------------------------------------------------------------ random input


def scales(objective, batch, aggregation, kl_coef):
    """Per token, in float64: the size of the terms that the gradient and the loss add up; and the ratios."""
    wide = torch.float64 if batch["logp"].dtype == torch.float64 else torch.float32
    logp, old_logp, A, w, ref_logp = (batch[name].to(wide) for name in INPUTS[:5])
    x = (logp - ref_logp).double()
    finite = (logp - old_logp + (A - A) + (w - w)).isfinite() & x.isfinite()
    mask = batch["mask"] & finite & logp.isfinite()
    logp, old_logp, A, w, x = (torch.where(mask, y, 0.0) for y in (logp, old_logp, A, w, x))
    r = ratios(objective, logp, old_logp, mask).double()
    a = token_weight(mask, aggregation, 3.0 if aggregation == "constant" else None)
    top = r.clamp(objective.low or 0.0, objective.high) if isinstance(objective, fca.CISPO) else r
    grad = a * w.abs().double() * A.abs().double() * top
    loss = a * w.abs().double() * A.abs().double() * torch.maximum(top, torch.tensor(2.0))
    if isinstance(objective, fca.CISPO):
        loss = grad * logp.abs().double()
    if objective.sequence_ratio:
        grad = (grad.sum(1, keepdim=True) / lengths(mask)).expand(grad.shape)
    kl = kl_coef * a * (1 + (-x).clamp(-20, 20).exp() + x.abs())
    return grad + kl, (loss + kl * (1 + x.abs())).sum(), r[mask]


@needs_native
@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(0, 5), st.sampled_from((0, 1, 2, 7, 31, 64, 511, 513))),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(OBJECTIVES)),
    aggregation=st.sampled_from(AGGREGATIONS),
    kl=st.sampled_from(((0.0, "k3"), *((0.3, estimator) for estimator in ESTIMATORS))),
    share=st.sampled_from((0.0, 0.02, 0.3)),
    layout=st.sampled_from(("as is", "strided", "transposed")),
    seed=st.integers(0, 2**20),
)
def test_backends_agree(shape, dtype, name, aggregation, kl, share, layout, seed):
    batch = make_wild_batch(*shape, dtype, seed, share)
    batch = {n: x if layout == "as is" else relaid(x, layout) for n, x in batch.items()}
    objective = OBJECTIVES[name]
    options = dict(objective=objective, aggregation=aggregation, kl_coef=kl[0], kl_estimator=kl[1])
    options["normalizer"] = 3.0 if aggregation == "constant" else None
    cpu, reference = (loss_and_grad(batch, backend=backend, **options) for backend in ("cpu", "reference"))
    assert_finite(*cpu)
    assert_finite(*reference)
    if not kl[0]:
        batch["ref_logp"] = batch["logp"]

    # Both take the same products in the same order; they differ in exp (2 ulp each), in GSPO's mean (one ulp at 20 is
    # 16 eps of the ratio), in the order of float64 sums, and in one rounding to logp's dtype.
    eps = torch.finfo(cpu[0].dtype).eps
    grad_scale, loss_scale, r = scales(objective, batch, aggregation, kl[0])
    bounds = [b for b in objective.bounds() if 0 < b < math.inf]
    assume(all(((r / b - 1).abs() > 32 * eps).all() for b in bounds))  # else the two may clip differently, rightly
    out = torch.finfo(dtype)
    least = 4 * out.smallest_normal * out.eps  # steps of the subnormal grid
    allowed = (32 * eps + out.eps) * grad_scale.nan_to_num(nan=math.inf) + least
    assert ((cpu[1].double() - reference[1].double()).abs() <= allowed).all()
    assert (cpu[0] - reference[0]).abs().double() <= 32 * eps * loss_scale.nan_to_num(nan=math.inf) + least
    for field in ("tokens", "clipped_low", "clipped_high", "clipped_dual", "nonfinite"):
        assert getattr(cpu[2], field) == getattr(reference[2], field), field
    for field in ("suppressed_mass", "total_mass", "ratio_sum", "ratio_sq_sum", "ratio_min", "ratio_max"):
        torch.testing.assert_close(getattr(cpu[2], field), getattr(reference[2], field), rtol=1e-5, atol=1e-37)


# ------------------------------------------------------------------------------------------ the same bits


@needs_native
@pytest.mark.parametrize("name", ("dual", "gspo", "cispo both"))
def test_runs_and_threads_give_the_same_bits(name):
    options = dict(objective=OBJECTIVES[name], aggregation="sequence-mean", kl_coef=0.1, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for shape in ((3, 30000), (300, 101)):
            batch = make_wild_batch(*shape, torch.float32, 0, share=0.02)
            torch.set_num_threads(1)
            loss, grad, stats = loss_and_grad(batch, **options)
            for count in (1, 2, 2, 4):
                torch.set_num_threads(count)
                again, grad_again, stats_again = loss_and_grad(batch, **options)
                assert same_bits(loss, again) and same_bits(grad, grad_again)
                assert same_bits(stats.buffer, stats_again.buffer)
    finally:
        torch.set_num_threads(threads)


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
    batch = {name: x if name == "mask" else x.clone().requires_grad_() for name, x in BATCH.items()}
    loss, stats = fca.policy_loss(**batch, kl_coef=0.1, backend=backend)
    assert not stats.buffer.requires_grad
    loss.backward()
    assert batch["logp"].grad is not None
    assert all(batch[name].grad is None for name in ("old_logp", "advantages", "weights", "ref_logp"))


def test_double_backward_raises(backend):
    logp = BATCH["logp"].clone().requires_grad_()
    loss, _ = fca.policy_loss(**{**BATCH, "logp": logp}, backend=backend)
    (grad,) = torch.autograd.grad(loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
    factor = torch.tensor(2.0, requires_grad=True)
    loss, _ = fca.policy_loss(**{**BATCH, "logp": logp}, backend=backend)
    (grad,) = torch.autograd.grad(factor * loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


def test_backward_twice_through_a_retained_graph(backend):
    logp = BATCH["logp"].clone().requires_grad_()
    loss, _ = fca.policy_loss(**{**BATCH, "logp": logp}, backend=backend)
    first, second = (torch.autograd.grad(loss, logp, retain_graph=True)[0] for _ in range(2))
    assert same_bits(first, second)


def test_without_grad(backend):
    logp = BATCH["logp"].clone().requires_grad_()
    expected, wanted, wanted_stats = loss_and_grad(BATCH, backend=backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss, stats = fca.policy_loss(**{**BATCH, "logp": logp}, backend=backend)
            grad = fca.dloss_dlogp(**{**BATCH, "logp": logp}, backend=backend)
        assert not loss.requires_grad and not grad.requires_grad
        assert same_bits(loss, expected) and same_bits(grad, wanted)
        assert same_bits(stats.buffer, wanted_stats.buffer)
    assert not fca.dloss_dlogp(**{**BATCH, "logp": logp}, backend=backend).requires_grad


def test_logp_inside_a_graph(backend):
    """logp as a trainer has it: gathered from a log-softmax, and sliced."""
    logits = torch.randn(6, 14, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (6, 14, 1))

    def grad_of(function):
        logp = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)[:, 1:]
        return torch.autograd.grad(function({**BATCH, "logp": logp}), logits)[0]

    grad = grad_of(lambda batch: 3 * fca.policy_loss(**batch, backend=backend)[0] + 1)
    torch.testing.assert_close(grad, grad_of(lambda batch: 3 * plain_loss(fca.PPO(), batch)), **EXACT)


@pytest.mark.parametrize("name", ("dual", "cap < high", "gspo"))  # the others stop a gradient: not a derivative
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_gradcheck(name, estimator, backend):
    batch = make_batch(3, 4, seed=2)
    options = dict(objective=OBJECTIVES[name], aggregation="sequence-mean", kl_coef=0.3, kl_estimator=estimator)

    def loss(logp):
        return fca.policy_loss(**{**batch, "logp": logp}, backend=backend, **options)[0]

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
