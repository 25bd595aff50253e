"""Rollout weights against a loop over Python floats, against TRL's and verl's equations, and packed against padded."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from cases import test_id
from hypothesis import given
from hypothesis import strategies as st
from no_sync import NoSync

import fused_clip_adam as fca

MODES = ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max
FIELDS = fca.RolloutStats.fields

# exp of a float64 sum of <= 20 terms below 100: the sum's rounding, 20 * 1e-14, is the ratio's relative error.
EXACT = dict(rtol=1e-11, atol=1e-13)
STORED = dict(rel=1.2e-7, abs=1e-12)  # one rounding to float32


def make(rows=5, cols=7, dtype=torch.float64, seed=0, scale=0.3):
    """logp, rollout_logp, mask; row 0 is fully masked, masked tokens hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, cols, generator=generator, dtype=torch.float64) * 3
    rollout = logp + scale * torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, cols, generator=generator) < 0.7
    mask[:1] = rows == 1
    return (*(x.masked_fill(~mask, math.nan).to(dtype) for x in (logp, rollout)), mask)


def loop(logp, rollout, mask, mode, low, high):
    """(weights, statistics) of rows of Python floats, as the docstring reads."""
    low, high = low or 0.0, math.inf if high is None else high
    weights, stats = [], dict.fromkeys(FIELDS, 0.0)
    stats["ratio_min"] = FLOAT32_MAX
    for row_logp, row_rollout, row_mask in zip(logp, rollout, mask):
        D = []
        for x, y, m in zip(row_logp, row_rollout, row_mask):
            d = x - y if m else 0.0
            if m and math.isfinite(d):
                stats["kl_k1"] -= d
                stats["kl_k3"] += math.expm1(min(max(d, -20.0), 20.0)) - d
            stats["nonfinite"] += m and not math.isfinite(d)
            D.append(0.0 if math.isnan(d) else min(max(d, -1e200), 1e200))
        out = []
        for d, m in zip(D, row_mask):
            r = math.exp(min(max(math.fsum(D) if mode.startswith("sequence") else d, -20.0), 20.0))
            inside = low <= r <= high
            w = min(max(r, low), high) if mode.endswith("truncate") else r * inside
            out.append(w if m else 0.0)
            if m:
                stats["tokens"] += 1
                stats["clipped_low"] += r < low
                stats["clipped_high"] += r > high
                stats["weight_sum"] += w
                stats["weight_sq_sum"] += w * w
                stats["ratio_min"], stats["ratio_max"] = min(stats["ratio_min"], r), max(stats["ratio_max"], r)
        weights.append(out)
    return weights, {name: min(max(float(x), -FLOAT32_MAX), FLOAT32_MAX) for name, x in stats.items()}


def packed(logp, rollout, mask, order=None):
    """The unmasked tokens as [N], with ids that are neither dense nor sorted."""
    order = torch.arange(int(mask.sum())) if order is None else order
    ids = (100 - 7 * torch.arange(mask.shape[0])).unsqueeze(1).expand(mask.shape)
    return tuple(x[mask][order] for x in (logp, rollout, ids))


def assert_stats(stats, wanted):
    got = stats.to_dict()
    assert tuple(got) == tuple(wanted) == FIELDS
    for name, value in wanted.items():
        value = 0.0 if name == "ratio_min" and not wanted["tokens"] else value
        assert got[name] == pytest.approx(value, **STORED), name
        assert getattr(stats, name).shape == ()


WILD = (0.0, -100.0, -1e3, 50.0, math.inf, -math.inf, math.nan)
floats = st.one_of(st.floats(-5, 0), st.sampled_from(WILD))


@st.composite
def batches(draw):
    rows, cols = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    matrix = [st.lists(x, min_size=cols, max_size=cols) for x in (floats, floats, st.booleans())]
    return [draw(st.lists(x, min_size=rows, max_size=rows)) for x in matrix], (rows, cols)


BOUNDS = ((None, 2.0), (0.5, 2.0), (None, None), (0.5, None), (0.0, 1.0), (1.0, 1.0), (None, math.inf), (2.0, 3.0))


@given(batches(), st.sampled_from(MODES), st.sampled_from(BOUNDS))
def test_weights_are_the_loop(batch, mode, bounds):
    (logp, rollout, mask), shape = batch
    tensors = [torch.tensor(x, dtype=torch.float64).reshape(shape) for x in (logp, rollout)]
    flags = torch.tensor(mask, dtype=torch.bool).reshape(shape)
    low, high = bounds
    w, stats = fca.rollout_weights(*tensors, mask=flags, mode=mode, low=low, high=high)
    weights, wanted = loop(logp, rollout, mask, mode, low, high)
    torch.testing.assert_close(w, torch.tensor(weights, dtype=torch.float64).reshape(shape), **EXACT)
    assert_stats(stats, wanted)
    assert stats.buffer.isfinite().all() and w.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded(mode):
    batch = make()
    logp, rollout, mask = batch
    tokens = int(mask.sum())
    shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    for (low, high), order in itertools.product(BOUNDS, (None, shuffled)):
        options = dict(mode=mode, low=low, high=high)
        w, stats = fca.rollout_weights(logp, rollout, mask=mask, **options)
        x, y, ids = packed(*batch, order)
        got, got_stats = fca.rollout_weights(x, y, sequence_ids=ids, **options)
        torch.testing.assert_close(got, w[mask] if order is None else w[mask][order], **EXACT)
        torch.testing.assert_close(got_stats.buffer, stats.buffer, rtol=1.2e-7, atol=0)
        again, _ = fca.rollout_weights(x, y, sequence_ids=ids.int(), **options)
        assert torch.equal(got, again)


def test_packed_tokens_need_no_ids():
    logp, rollout, mask = make()
    for mode in MODES[:2]:
        w, _ = fca.rollout_weights(logp[mask], rollout[mask], mode=mode)
        assert torch.equal(w, fca.rollout_weights(logp, rollout, mask=mask, mode=mode)[0][mask])
    with pytest.raises(ValueError, match=r"sequence-mask.*sequence_ids"):
        fca.rollout_weights(logp[mask], rollout[mask], mode="sequence-mask")


@pytest.mark.parametrize("mode", MODES)
def test_equations_of_trl(mode):
    """exp of the masked difference, NaN as 0, summed over the sequence or not; then clamped, or 0 outside."""
    logp, rollout, mask = make(scale=1.0)
    rollout[2, torch.nonzero(mask[2])[0]] = math.nan
    zeroed = torch.where(mask, logp - rollout, 0.0)
    zeroed = torch.where(zeroed.isnan(), 0.0, zeroed)
    for low, high in ((None, 3.0), (0.4, 3.0), (0.4, None)):
        ratio = (zeroed.sum(1, keepdim=True) if mode.startswith("sequence") else zeroed).exp()
        if mode.endswith("truncate"):
            wanted = ratio.clamp(low, high)
        else:
            wanted = ratio * (ratio >= (low or 0)) * (ratio <= (high or math.inf))
        w, stats = fca.rollout_weights(logp, rollout, mask=mask, mode=mode, low=low, high=high)
        torch.testing.assert_close(w, wanted.expand(mask.shape) * mask, **EXACT)
        assert stats.nonfinite == 1


def test_equations_of_verl():
    """Log-ratio held to +-20, a single bound truncates, two mask; padding gets 0."""
    logp, rollout, mask = make(scale=8.0)
    clean = torch.where(mask, logp - rollout, 0.0)
    for level, x in (("token", clean), ("sequence", clean.sum(1, keepdim=True).expand(mask.shape))):
        raw = x.clamp(-20, 20).exp() * mask
        w, _ = fca.rollout_weights(logp, rollout, mask=mask, mode=f"{level}-truncate", high=2.0)
        torch.testing.assert_close(w, raw.clamp(max=2.0), **EXACT)
        w, _ = fca.rollout_weights(logp, rollout, mask=mask, mode=f"{level}-mask", low=0.5, high=2.0)
        torch.testing.assert_close(w, raw * (raw >= 0.5) * (raw <= 2.0), **EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_engine_did_not_report_counts_as_agreed(mode):
    logp, rollout, mask = make()
    holes = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.3)
    for x, y in ((logp, rollout.masked_fill(holes, math.nan)), (logp.masked_fill(holes, math.nan), rollout)):
        w, stats = fca.rollout_weights(x, y, mask=mask, mode=mode)
        wanted, _ = fca.rollout_weights(logp, torch.where(holes, logp, rollout), mask=mask, mode=mode)
        assert torch.equal(w, wanted) and stats.nonfinite == holes.sum() > 0
        if mode.startswith("token"):
            assert (w[holes] == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_infinite_ratios_are_beyond_any_bound(mode):
    logp = torch.zeros(2, 2, dtype=torch.float64)
    for value, weight in ((-math.inf, 3.0), (math.inf, 0.5)):
        rollout = torch.tensor([[value, value], [0.0, 0.0]], dtype=torch.float64)
        w, stats = fca.rollout_weights(logp, rollout, mode=mode, low=0.5, high=3.0)
        assert w.tolist() == [[weight if mode.endswith("truncate") else 0.0] * 2, [1.0] * 2]
        assert stats.nonfinite == 2 and stats.clipped_low + stats.clipped_high == 2 and stats.kl_k3 == 0
    # Of both signs: partial sums of a row, however they are formed, must not become inf and -inf.
    rollout = torch.tensor([math.inf, -math.inf]).repeat(64).expand(2, 128)
    for both in (rollout, rollout.sort().values):
        assert fca.rollout_weights(torch.zeros(2, 128), both, mode=mode)[0].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_bounds_are_inclusive(mode):
    for D, low, high in ((math.log(2.0), None, math.exp(math.log(2.0))), (math.log(0.5), math.exp(math.log(0.5)), 2.0)):
        logp, zero = torch.tensor([[D]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        w, stats = fca.rollout_weights(logp, zero, mode=mode, low=low, high=high)
        assert w.item() == math.exp(D) and stats.clipped_low == stats.clipped_high == 0
        if low is None:
            beyond = dict(high=math.nextafter(high, 0.0))
        else:
            beyond = dict(low=math.nextafter(low, math.inf))
        w, stats = fca.rollout_weights(logp, zero, mode=mode, **beyond)
        assert stats.clipped_low + stats.clipped_high == 1
        assert w.item() == (0.0 if mode.endswith("mask") else next(iter(beyond.values())))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rollout_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, rollout_dtype, mode):
    """Narrow inputs are widened exactly; weights are float32, or float64 for float64 logp: rounded once."""
    logp, rollout, mask = make()
    logp, rollout = logp.to(dtype), rollout.to(rollout_dtype)
    w, stats = fca.rollout_weights(logp, rollout, mask=mask, mode=mode, low=0.5)
    wide, wide_stats = fca.rollout_weights(logp.double(), rollout.double(), mask=mask, mode=mode, low=0.5)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    assert w.dtype == out and torch.equal(w, wide.to(out))
    # The sums of weights are those of the weights given.
    torch.testing.assert_close(stats.buffer, wide_stats.buffer, rtol=3e-7, atol=1e-7)


def test_k3_keeps_its_digits_where_the_policies_agree():
    for D in torch.logspace(-6, -4, 20, dtype=torch.float64).tolist():
        x = torch.tensor([[D]], dtype=torch.float64)
        _, stats = fca.rollout_weights(torch.zeros_like(x), x)
        assert stats.kl_k3.item() == pytest.approx(D * D / 2 - D**3 / 6, rel=1e-6, abs=0)  # e^-D - 1 + D


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_huge_values_stay_finite(dtype):
    most = torch.finfo(dtype).max
    logp = torch.tensor([[most, -most, 0.0], [most, most, most], [-most, 1.0, 1e-30]], dtype=dtype)
    for rollout, mode in itertools.product((-logp, logp.flip(0), torch.zeros_like(logp)), MODES):
        w, stats = fca.rollout_weights(logp, rollout, mode=mode, high=None)
        assert w.isfinite().all() and stats.buffer.isfinite().all()
        assert w.max() <= math.exp(20) * (1 + 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_no_token_left(mode):
    nan = torch.full((3, 4), math.nan)
    cases = [dict(logp=nan, rollout_logp=nan, mask=torch.zeros(3, 4))]
    cases += [dict(logp=torch.empty(s), rollout_logp=torch.empty(s)) for s in ((0, 0), (0, 3), (3, 0))]
    none = torch.empty(0)
    cases.append(dict(logp=none, rollout_logp=none, sequence_ids=torch.empty(0, dtype=torch.int64)))
    for case in cases:
        w, stats = fca.rollout_weights(**case, mode=mode)
        assert w.shape == case["logp"].shape and not w.any()
        assert stats.ratio_min == FLOAT32_MAX and not any(stats.to_dict().values())


def test_masks_of_any_dtype_and_strided_input():
    logp, rollout, mask = make()
    wanted, stats = fca.rollout_weights(logp, rollout, mask=mask, mode="sequence-mask")
    for other in (mask.int(), mask.float() * 0.5, mask.t().contiguous().t()):
        w, again = fca.rollout_weights(
            logp.t().contiguous().t(), rollout.repeat(1, 2)[:, :7], mask=other, mode="sequence-mask"
        )
        assert torch.equal(w, wanted) and torch.equal(stats.buffer, again.buffer)


# ------------------------------------------------------------------------------------------ as policy_loss's weights


def loss_and_grad(logp, **options):
    leaf = logp.detach().clone().requires_grad_()
    loss, _ = fca.policy_loss(leaf, backend="reference", **options)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("mode", MODES)
def test_as_weights_of_policy_loss(mode):
    """logp = old_logp = what the weights were formed from: the gradient is -a w A."""
    logp, rollout, mask = make()
    A = torch.linspace(-1, 1.5, 5, dtype=torch.float64)
    w, stats = fca.rollout_weights(logp, rollout, mask=mask, mode=mode)
    _, grad = loss_and_grad(logp, old_logp=logp, advantages=A, mask=mask, weights=w)
    torch.testing.assert_close(grad, -w * A.unsqueeze(1) / mask.sum(), **EXACT)
    # Without the mask the masked tokens count, and only that.
    clean = logp.nan_to_num(0.0)
    _, unmasked = loss_and_grad(clean, old_logp=clean, advantages=A, weights=w)
    torch.testing.assert_close(unmasked * mask.numel(), grad * mask.sum(), **EXACT)
    x, y, ids = packed(logp, rollout, mask)
    packed_w, _ = fca.rollout_weights(x, y, mode=mode, sequence_ids=ids)
    rows = (100 - ids) // 7
    _, got = loss_and_grad(x, old_logp=x, advantages=A, weights=packed_w, sequence_ids=rows)
    torch.testing.assert_close(got, grad[mask], **EXACT)
    assert stats.weight_sum.item() == pytest.approx(w.sum().item(), rel=1e-6)


# ------------------------------------------------------------------------------------------ statistics


def test_statistics_add_as_batches_concatenate():
    parts = [make(seed=seed) for seed in range(3)]
    options = dict(mode="sequence-mask", low=0.5)
    each = [fca.rollout_weights(x, y, mask=m, **options)[1] for x, y, m in parts]
    x, y, m = (torch.cat(t) for t in zip(*parts))
    whole = fca.rollout_weights(x, y, mask=m, **options)[1]
    torch.testing.assert_close((each[0] + each[1] + each[2]).buffer, whole.buffer, rtol=4e-7, atol=1e-6)
    nothing = fca.rollout_weights(x, y, mask=torch.zeros_like(m), **options)[1]
    for merged in (each[0] + nothing, nothing + each[0]):
        assert torch.equal(merged.buffer, each[0].buffer)


def test_statistics_object():
    x, y, m = make()
    _, stats = fca.rollout_weights(x, y, mask=m)
    for other in (stats.clone(), pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)):
        assert isinstance(other, fca.RolloutStats) and torch.equal(other.buffer, stats.buffer)
    assert "RolloutStats" in repr(stats)
    with pytest.raises(AttributeError, match=r"RolloutStats.*weight_mean.*weight_sum"):
        _ = stats.weight_mean
    with pytest.raises(TypeError):
        _ = stats + fca.clip_stats(x, y, x[:, 0], mask=m, backend="reference")
    with pytest.raises(ValueError, match=r"RolloutStats: buffer must be float32 \[10\]"):
        fca.RolloutStats(torch.zeros(14))
    with pytest.raises(RuntimeError, match=r"RolloutStats.all_reduce.*init_process_group"):
        stats.all_reduce()


def reduce_worker(rank, store, batches, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(batches))
    x, y, m = batches[rank]
    stats = fca.rollout_weights(x, y, mask=m, high=None)[1]
    assert stats.all_reduce() is stats
    torch.save(stats.buffer, f"{out}{rank}")
    dist.destroy_process_group()


def test_statistics_all_reduce(tmp_path):
    batches = [make(seed=seed, scale=9.0) for seed in range(2)]
    args = (str(tmp_path / "store"), batches, str(tmp_path / "out"))
    torch.multiprocessing.spawn(reduce_worker, args, nprocs=2)
    each = [fca.rollout_weights(x, y, mask=m, high=None)[1] for x, y, m in batches]
    got = [torch.load(f"{args[2]}{rank}") for rank in range(2)]
    assert torch.equal(*got) and torch.equal(got[0], (each[0] + each[1]).buffer)


# ------------------------------------------------------------------------------------------ host, autograd, errors


def test_nothing_is_read_by_the_host():
    x, y, m = make()
    flat = packed(x, y, m)
    with NoSync():
        for mode in MODES:
            _, stats = fca.rollout_weights(x, y, mask=m, mode=mode, low=0.1)
            _, more = fca.rollout_weights(flat[0], flat[1], mode=mode, sequence_ids=flat[2])
            _ = stats + more
    with pytest.raises(AssertionError, match="host"), NoSync():
        _ = stats.tokens.item()


def test_no_gradient_and_no_change_of_the_inputs():
    x, y, m = make()
    before = [(t.clone(), t._version) for t in (x, y, m)]
    w, stats = fca.rollout_weights(x.requires_grad_(), y.requires_grad_(), mask=m)
    assert not w.requires_grad and not stats.buffer.requires_grad
    for tensor, (copied, version) in zip((x, y, m), before):
        assert torch.equal(tensor.detach().nan_to_num(9.0), copied.nan_to_num(9.0)) and tensor._version == version


X = torch.zeros(2, 3)
FLAT, IDS = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
ERRORS = [
    (dict(logp=[0.0]), TypeError, "logp"),
    (dict(logp=X.int()), TypeError, "logp"),
    (dict(logp=torch.zeros(1, 2, 3), rollout_logp=torch.zeros(1, 2, 3)), ValueError, "logp"),
    (dict(logp=X.to("meta")), ValueError, "logp"),
    (dict(rollout_logp=None), TypeError, "rollout_logp"),
    (dict(rollout_logp=X[:1]), ValueError, "rollout_logp"),
    (dict(rollout_logp=X.to_sparse()), TypeError, "rollout_logp"),
    (dict(rollout_logp=X.to("meta")), ValueError, "rollout_logp"),
    (dict(mask=X[:1]), ValueError, "mask"),
    (dict(mask=[1]), ValueError, "mask"),
    (dict(mask=X.to_sparse()), TypeError, "mask"),
    (dict(mode="token_truncate"), ValueError, "mode='token_truncate'.*token-truncate"),
    (dict(mode="sequence"), ValueError, "mode.*sequence-mask"),
    (dict(low=-0.1), ValueError, "low"),
    (dict(low=3.0), ValueError, "high must be None or positive and at least low"),
    (dict(low=math.inf, high=None), ValueError, "low"),
    (dict(low=math.nan), ValueError, "low"),
    (dict(low="0.5"), TypeError, "low"),
    (dict(high=0.0), ValueError, "high"),
    (dict(high=-1.0), ValueError, "high"),
    (dict(high=math.nan), ValueError, "high"),
    (dict(high="2"), TypeError, "high"),
    (dict(sequence_ids=IDS), ValueError, "sequence_ids"),
    (dict(logp=FLAT, rollout_logp=FLAT, sequence_ids=IDS[:5]), ValueError, "sequence_ids"),
    (dict(logp=FLAT, rollout_logp=FLAT, sequence_ids=FLAT), TypeError, "sequence_ids"),
    (dict(logp=FLAT, rollout_logp=FLAT, mode="sequence-truncate"), ValueError, "sequence_ids"),
]


@pytest.mark.parametrize("change, error, match", ERRORS, ids=test_id)
def test_wrong_arguments(change, error, match):
    with pytest.raises(error, match=match):
        fca.rollout_weights(**{**dict(logp=X, rollout_logp=X), **change})
