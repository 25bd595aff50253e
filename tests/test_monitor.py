"""OvershootMonitor against numbers computed by hand, against the closed form of the coast, and without a host read."""

import contextlib
import io
import math
import sys

import pytest
import torch
from no_sync import NoSync

import fused_clip_adam as fca
from fused_clip_adam import monitor as module
from fused_clip_adam import theory
from fused_clip_adam.monitor import OvershootMonitor, kept_sums, residual_ratios

PPO = fca.PPO(0.2, 0.28)
LOW, HIGH = math.log(0.8), math.log(1.28)


def batch(seed=0, dtype=torch.float32):
    """logp, old_logp, advantages [B], mask; the masked tokens hold NaN, or ratios far beyond any bound."""
    generator = torch.Generator().manual_seed(seed)
    old_logp = -torch.rand(4, 9, generator=generator, dtype=dtype) - 0.5
    logp = old_logp + 0.4 * torch.randn(4, 9, generator=generator, dtype=dtype)
    mask = torch.rand(4, 9, generator=generator) < 0.8
    junk = torch.tensor([math.nan, 7.0, -9.0, 5.0], dtype=dtype).unsqueeze(1)
    return torch.where(mask, logp, junk), old_logp, torch.tensor([1.0, -1.5, 0.0, 2.0], dtype=dtype), mask


def tokens_of(*batches):
    """(D, A) of every unmasked token, as Python floats."""
    for logp, old_logp, advantages, mask in batches:
        for b in range(4):
            for t in range(9):
                if mask[b, t]:
                    yield logp[b, t].item() - old_logp[b, t].item(), advantages[b].item()


def one_parameter(numel=8, dtype=torch.float32, **options):
    p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, numel, dtype=dtype))
    return p, fca.FusedClipAdamW([p], **{"lr": 1e-2, **options})


def step(opt, *gradients):
    """A step with these gradients, in the order of the parameters; None for none."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype).expand(p.shape).clone()
    opt.step()


# ------------------------------------------------------------ statistics and excess


def observed(*batches, objective=PPO, advantages=True, logp=True):
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt, objective)
    for logps, old, A, mask in batches:
        stats = fca.clip_stats(logps, old, A, mask=mask, objective=objective)
        if logp:
            monitor.observe(stats, logps, old, A if advantages else None, mask)
        else:
            monitor.observe(stats)
    step(opt, 1.0)
    return monitor.latest()


def test_statistics_by_hand():
    batches = batch(0, torch.float64), batch(1, torch.float64)
    row = observed(*batches)
    tokens = list(tokens_of(*batches))
    n, ratios = len(tokens), [math.exp(D) for D, _ in tokens]
    taken = [(A > 0 and D > HIGH) or (A < 0 and D < LOW) for D, A in tokens]
    mass = [r * abs(A) for r, (_, A) in zip(ratios, tokens)]
    # The aggregation weights of the two calls differ (one over their tokens): masses are weighted, counts are not.
    counts = [len(list(tokens_of(b))) for b in batches]
    weight = [1 / counts[0]] * counts[0] + [1 / counts[1]] * counts[1]
    expected = {
        "tokens": n,
        "clip_fraction_low": sum(A < 0 and D < LOW for D, A in tokens) / n,
        "clip_fraction_high": sum(A > 0 and D > HIGH for D, A in tokens) / n,
        "suppressed_mass_fraction": sum(w * m for w, m, t in zip(weight, mass, taken) if t)
        / sum(w * m for w, m in zip(weight, mass)),
        "kl_k3": sum(math.exp(D) - 1 - D for D, _ in tokens) / n,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_ess": sum(ratios) ** 2 / (n * sum(r * r for r in ratios)),
    }
    assert expected["clip_fraction_low"] > 0 and expected["clip_fraction_high"] > 0
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name  # ClipStats is float32


@pytest.mark.parametrize("advantages", [True, False])
@pytest.mark.parametrize("objective", [PPO, fca.CISPO(high=1.2), fca.GMPO(0.3, 0.25)])
def test_excess_by_hand(objective, advantages):
    low, high = {
        fca.PPO: (LOW, HIGH),
        fca.CISPO: (-math.inf, math.log(1.2)),
        fca.GMPO: (-0.3, 0.25),
    }[type(objective)]
    batches = batch(0, torch.float64), batch(1, torch.float64)
    row = observed(*batches, objective=objective, advantages=advantages)
    tokens = list(tokens_of(*batches))
    beyond = [D - high for D, A in tokens if high < D and (A > 0 or not advantages)]
    beyond += [low - D for D, A in tokens if low > D and (A < 0 or not advantages)]
    assert 2 < len(beyond) < len(tokens)
    assert row["beyond_fraction"] == pytest.approx(len(beyond) / len(tokens), rel=1e-12)
    assert row["excess_mean"] == pytest.approx(sum(beyond) / len(beyond), rel=1e-12)
    assert row["excess_max"] == pytest.approx(max(beyond), rel=1e-12)
    assert row["excess_source"] == ("log_probs_and_advantages" if advantages else "log_probs")


def test_excess_of_sequences_by_hand():
    one = logp, old_logp, A, mask = batch(2, torch.float64)
    row = observed(one, objective=fca.GSPO(0.02, 0.03))
    beyond, tokens = [], 0
    for b in range(4):
        own = [(logp[b, t] - old_logp[b, t]).item() for t in range(9) if mask[b, t]]
        mean, tokens = sum(own) / len(own), tokens + len(own)
        excess = mean - math.log(1.03) if A[b] > 0 else math.log(0.98) - mean if A[b] < 0 else 0.0
        beyond += [excess] * len(own) if excess > 0 else []
    assert beyond
    assert row["beyond_fraction"] == pytest.approx(len(beyond) / tokens, rel=1e-12)
    assert row["excess_mean"] == pytest.approx(sum(beyond) / len(beyond), rel=1e-12)


def test_excess_of_packed_bfloat16_leaves_out_what_is_not_finite():
    logp = torch.tensor([-1.0, -1.0, math.inf, -1.0], dtype=torch.bfloat16)
    old_logp = torch.tensor([-2.0, -1.0, -1.0, 0.0], dtype=torch.bfloat16)
    A = torch.tensor([1.0, 1.0, 1.0, math.nan], dtype=torch.bfloat16)
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt)
    monitor.observe(fca.clip_stats(logp, old_logp, A), logp, old_logp, A)
    step(opt, 1.0)
    row = monitor.latest()
    assert row["beyond_fraction"] == 0.5 and row["excess_max"] == pytest.approx(1 - math.log(1.2), rel=1e-6)


def test_excess_from_ratio_extremes_says_so():
    one = batch(0)
    row = observed(one, logp=False)
    D = [D for D, _ in tokens_of(one)]
    assert row["excess_source"] == "ratio_extremes" and row["excess_mean"] is row["beyond_fraction"] is None
    assert row["excess_max"] == pytest.approx(max(max(D) - HIGH, LOW - min(D)), rel=1e-5)


@pytest.mark.parametrize("objective", [fca.SAPO(), fca.BAPO(), fca.DCPO(), fca.GMPO(), None])
def test_no_excess_without_bounds_for_the_extreme_ratios(objective):
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt, objective)
    logp, old_logp, A, mask = batch()
    monitor.observe(fca.clip_stats(logp, old_logp, A, mask=mask, objective=objective or PPO))
    step(opt, 1.0)
    row = monitor.latest()
    assert row["excess_max"] is row["excess_source"] is None and row["ratio_max"] > 1


def test_a_step_without_statistics():
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt)
    step(opt, 1.0)
    row = monitor.latest()
    assert row["step"] == 1 and row["tokens"] is row["kl_k3"] is row["ratio_min"] is row["excess_source"] is None


# ------------------------------------------------------------ kept momentum


def kept_by_hand(m, g, block):
    """(share of blocks, share of |m|) in exact Python sums of float64 products."""
    m, g = m.flatten().tolist(), g.flatten().tolist()
    kept, mass = [], 0.0
    for i in range(0, len(m), block):
        pairs = list(zip(m[i : i + block], g[i : i + block]))
        kept.append(math.fsum(a * b for a, b in pairs) > 0)
        mass += kept[-1] * math.fsum(abs(a) for a, _ in pairs)
    return sum(kept) / len(kept), mass / math.fsum(map(abs, m))


@pytest.mark.parametrize("block", [1, 4, 7, 1024, "element", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overshoot", [None, "align"])
def test_kept_momentum_by_hand(block, dtype, overshoot):
    # Two groups; a transposed tensor, whose blocks run along its rows and not along its memory; a maximised one.
    params = [torch.randn(5, 6).t(), torch.randn(37), torch.randn(3)]
    params = [torch.nn.Parameter(x.to(dtype)) for x in params]
    groups = [{"params": params[:2]}, {"params": params[2:], "maximize": True}]
    opt = fca.FusedClipAdamW(groups, overshoot=overshoot)
    monitor = OvershootMonitor(opt, block=block)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        before = [opt.state[p]["exp_avg"].clone() if p in opt.state else None for p in params]
        opt.step()
    row = monitor.latest()
    names = ["param_groups[0][0]", "param_groups[0][1]", "param_groups[1][0]"]
    kept = mass = all_blocks = all_mass = 0.0
    for name, p, m in zip(names, params, before):
        size = {"element": 1, "tensor": p.numel()}.get(block, block)
        sign = -1 if name == names[2] else 1
        expected = kept_by_hand(m.double(), sign * p.grad.double(), size)
        own = row["tensors"][name]
        assert (own["kept_blocks"], own["kept_mass"]) == pytest.approx(expected, rel=1e-6), name
        blocks, total = math.ceil(p.numel() / size), m.double().abs().sum().item()
        kept, all_blocks = kept + expected[0] * blocks, all_blocks + blocks
        mass, all_mass = mass + expected[1] * total, all_mass + total
    assert (row["kept_blocks"], row["kept_mass"]) == pytest.approx((kept / all_blocks, mass / all_mass), rel=1e-12)


@pytest.mark.parametrize("block", [1, 3, 10, 40, 97, "tensor"])
def test_chunks_do_not_show(monkeypatch, block):
    m, g = torch.randn(97, dtype=torch.float64), torch.randn(97, dtype=torch.float64)
    before = m.clone(), g.clone()
    whole = kept_sums(m, g, block)
    monkeypatch.setattr(module, "_CHUNK", 16)
    torch.testing.assert_close(kept_sums(m, g, block), whole, rtol=1e-14, atol=0)
    assert torch.equal(m, before[0]) and torch.equal(g, before[1])
    assert whole[0] < whole[1] or block == "tensor" or block == 97
    size = 97 if block == "tensor" else block
    assert (whole[0] / whole[1]).item() == pytest.approx(kept_by_hand(m, g, size)[0])


def test_kept_momentum_is_none_where_there_is_none():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = fca.FusedClipAdamW(params)
    monitor = OvershootMonitor(opt, names=zip("ab", params))
    step(opt, 1.0, 1.0)
    assert monitor.latest()["kept_blocks"] is None and monitor.latest()["tensors"]["a"]["kept_mass"] is None
    step(opt, 1.0, None)
    tensors = monitor.latest()["tensors"]
    assert tensors["a"] == {"kept_blocks": 1.0, "kept_mass": 1.0} and tensors["b"]["kept_blocks"] is None
    opt.step(lambda: None)  # the closure would make the gradient after the hook
    assert monitor.latest()["kept_blocks"] is None


# ------------------------------------------------------------ coast


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.99), (0.0, 0.9)])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_residual_ratios_are_those_of_theory(betas, eps):
    beta1, beta2 = betas
    for k, T, v_hat in [(1, 1, 1e-4), (3, 7, 2.0), (40, 1000, 1e-8), (5000, 20, 1.0)]:
        if betas[1] ** k == 0 or betas[0] ** k == 0:
            continue  # theory's own powers underflow
        v = v_hat * (1 - beta2**T) * beta2**k
        numbers = (torch.tensor([float(x)], dtype=torch.float64) for x in (k, T, v))
        now = torch.tensor(float(k + T), dtype=torch.float64)
        actual = residual_ratios(*numbers, beta1, beta2, eps, stays=False, now=now).item()
        expected = theory.residual_ratio(k, beta1, beta2, history=T, eps=eps, v_hat=v_hat)
        assert actual == pytest.approx(expected, rel=1e-9)


def test_residual_ratio_of_a_very_long_coast():
    k, T = torch.tensor([1e6], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
    actual = residual_ratios(k, T, torch.zeros(1, dtype=torch.float64), 0.9, 0.95, 1e-8, stays=False, now=(k + T)[0])
    assert actual.item() == 0.0  # and not NaN: 0.95^1e6 is below float64


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.99)])
def test_coast_of_a_real_run_is_that_of_theory(backend, betas):
    _, opt = one_parameter(16, torch.float64, betas=betas, eps=0.0, weight_decay=0.1, grad_clip=0.5, backend=backend)
    monitor = OvershootMonitor(opt)
    for _ in range(7):
        step(opt, torch.randn(16, dtype=torch.float64))
        assert monitor.latest()["coast_observed"] is None
    for k in range(1, 12):
        opt.param_groups[0]["lr"] = 1e-2 / k  # a schedule: the update is in units of lr
        step(opt, 0.0)
        row = monitor.latest()
        R = theory.residual_ratio(k, *betas, history=7)
        assert row["coast_observed"] == pytest.approx(R, rel=1e-6)
        assert row["coast_predicted"] == pytest.approx(R, rel=1e-6)
        assert row["coast_steps"] == k and row["coast_share"] == 1.0
    step(opt, 1.0)  # a gradient again: the coast is over, and the next one counts from here
    assert monitor.latest()["coast_observed"] is None and monitor.latest()["coast_share"] == 0.0
    step(opt, 0.0)
    R = theory.residual_ratio(1, *betas, history=19)
    assert monitor.latest()["coast_observed"] == pytest.approx(R, rel=1e-6)


@pytest.mark.parametrize("cls", [fca.FusedClipAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_coast_of_elements(cls, amsgrad):
    """Each row of a table coasts from its own last gradient, with an eps that matters; the other tensor never does."""
    table = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    opt = cls([table, bias], lr=1e-2, eps=1e-2, amsgrad=amsgrad)
    monitor = OvershootMonitor(opt, names=[("table", table), ("bias", bias)])
    last = {}
    for t in range(1, 10):
        g = torch.randn(4, 3, dtype=torch.float64) * torch.tensor([t <= 8, t <= 3, t % 3 == 0, False]).unsqueeze(1)
        before = table.detach().clone()
        step(opt, g, torch.randn(3, dtype=torch.float64))
        update = ((1 - 1e-2 * 1e-2) * before - table.detach()) / 1e-2
        for i in range(4):
            if bool(g[i].any()):
                last[i] = t, update[i]
    coasting = [0, 1]  # at t = 9 row 2 has a gradient; row 3 never had one
    row = monitor.latest()
    own = row["watched"]["table"]
    norms = [torch.stack([x[i] for i in coasting]).norm() for x in (update, {i: last[i][1] for i in coasting})]
    assert own["coast_observed"] == pytest.approx((norms[0] / norms[1]).item(), rel=1e-9)
    assert own["coast_predicted"] == pytest.approx(own["coast_observed"], rel=1e-9)
    assert own["coast_steps"] == pytest.approx((1 + 6) / 2)
    expected = update[coasting].abs().sum() / update.abs().sum()
    assert own["coast_share"] == pytest.approx(expected.item(), rel=1e-9)
    assert row["watched"]["bias"]["coast_observed"] is None and row["watched"]["bias"]["coast_share"] == 0.0
    assert row["coast_observed"] == own["coast_observed"] and row["coast_share"] < own["coast_share"]


def test_align_takes_the_coast_away():
    _, opt = one_parameter(8, torch.float64, overshoot="align")
    monitor = OvershootMonitor(opt)
    for g in (1.0, 1.0, 1.0, 0.0, 0.0):
        step(opt, g)
    rows = monitor.rows()
    assert [row["coast_observed"] for row in rows[3:]] == [0.0, 0.0]
    assert [row["coast_predicted"] for row in rows[3:]] == pytest.approx(
        [theory.residual_ratio(k, history=3) for k in (1, 2)], rel=1e-6
    )
    assert [row["kept_blocks"] for row in rows[1:]] == [1.0, 1.0, 0.0, 0.0]


def test_skipped_steps_do_not_count():
    _, opt = one_parameter(8, torch.float64, skip_nonfinite=True)
    monitor = OvershootMonitor(opt)
    for g in (1.0, 1.0, 0.0, math.nan, 0.0):
        step(opt, [g] * 4 + [0.0 if g != g else g] * 4)  # the skipped step has elements without a gradient
    rows = monitor.rows()
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 0]
    assert [row["coast_steps"] for row in rows] == [None, None, 1.0, None, 2.0]
    assert rows[3]["coast_share"] is None, "there was no update"
    assert rows[4]["coast_observed"] == pytest.approx(theory.residual_ratio(2, history=2), rel=1e-6)


def test_reset_counters_end_the_coast():
    _, opt = one_parameter(8, torch.float64)
    monitor = OvershootMonitor(opt)
    for g in (1.0, 1.0, 0.0):
        step(opt, g)
    assert monitor.latest()["coast_steps"] == 1.0
    opt.reset_momentum(moments=False)
    for _ in range(4):  # the step count passes the old one again
        step(opt, 0.0)
        assert monitor.latest()["coast_observed"] is None
    step(opt, 1.0)
    step(opt, 0.0)
    assert monitor.latest()["coast_steps"] == 1.0


def test_no_learning_rate_no_measure():
    _, opt = one_parameter(8, torch.float64)
    monitor = OvershootMonitor(opt)

    def row(lr, g):
        opt.param_groups[0]["lr"] = torch.tensor(lr)
        step(opt, g)
        return monitor.latest()

    row(1e-2, 1.0)
    row(0.0, 1.0)  # the update of the last gradient is not known, so neither is a coast from it
    assert row(1e-2, 0.0)["coast_observed"] is None
    row(1e-2, 1.0)
    mixed = row(0.0, 0.0)
    assert mixed["coast_observed"] is mixed["coast_steps"] is None
    assert row(1e-2, 0.0)["coast_observed"] == pytest.approx(theory.residual_ratio(2, history=4), rel=1e-5)


def test_a_step_without_learning_rate_does_not_spoil_its_row():
    _, opt = one_parameter(8, torch.float64)
    monitor = OvershootMonitor(opt, every=3)
    for lr, g in ((1e-2, 1.0), (0.0, 0.0), (1e-2, 0.0)):
        opt.param_groups[0]["lr"] = lr
        step(opt, g)
    R = theory.residual_ratio(2, history=1)
    assert monitor.latest()["coast_observed"] == pytest.approx(R, rel=1e-6)
    assert monitor.latest()["coast_share"] == pytest.approx(R / (1 + R), rel=1e-6)


def test_an_element_whose_last_update_is_not_known_is_left_out():
    _, opt = one_parameter(8, torch.float64)
    monitor = OvershootMonitor(opt)
    for lr, g in ((1e-2, [1.0] * 8), (0.0, [1.0] * 4 + [0.0] * 4), (1e-2, [0.0] * 8)):
        opt.param_groups[0]["lr"] = lr
        step(opt, g)
    assert monitor.latest()["coast_steps"] == 2.0
    assert monitor.latest()["coast_observed"] == pytest.approx(theory.residual_ratio(2, history=1), rel=1e-6)


def test_steps_counted_in_float64(monkeypatch):
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)  # as torch.set_default_dtype would
    p, opt = one_parameter(8, torch.float64)
    monitor = OvershootMonitor(opt)
    for g in (1.0, 0.0):
        step(opt, g)
    assert opt.state[p]["step"].dtype == torch.float64
    assert monitor.latest()["coast_steps"] == 1.0


def test_coast_in_a_bfloat16_parameter_with_a_closure():
    p, opt = one_parameter(8, torch.bfloat16, lr=0.5, weight_decay=0.0)
    monitor = OvershootMonitor(opt)
    for g in (1.0, 1.0, 0.0):

        def closure(g=g):
            p.grad = torch.full_like(p, g)

        opt.step(closure)
    # 3 % of an update of 0.45 on parameters of up to 2, whose steps are 2^-7 there
    assert monitor.latest()["coast_observed"] == pytest.approx(theory.residual_ratio(1, history=2), rel=3e-2)


@pytest.mark.parametrize(
    "watch, expected",
    [
        (1, ["b"]),
        (0, []),
        (8, ["a", "b", "c"]),
        (["a", "c"], ["a", "c"]),
        (lambda name, p: p.dim() == 2, ["c"]),
    ],
)
def test_watch(watch, expected):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (2,), (2, 2))]
    opt = fca.FusedClipAdamW(params)
    monitor = OvershootMonitor(opt, names=zip("abc", params), watch=watch)
    step(opt, 1.0, 1.0, 1.0)
    assert list(monitor.latest()["watched"]) == expected


def test_watching_the_smallest_is_bounded():
    params = [torch.nn.Parameter(torch.ones(n)) for n in (40_000, 3, 30_000, 20_000)]
    opt = fca.FusedClipAdamW(params)
    assert list(OvershootMonitor(opt, names=zip("abcd", params)).state_dict()["watched"]) == ["b", "c", "d"]
    assert list(OvershootMonitor(opt, names=zip("abcd", params), watch=["a", "c"]).state_dict()["watched"]) == [
        "a",
        "c",
    ]


def test_names_of_the_param_groups():
    model = torch.nn.Linear(2, 2)
    opt = fca.FusedClipAdamW(model.named_parameters())
    assert OvershootMonitor(opt).names == ["weight", "bias"]


# ------------------------------------------------------------ rows


def test_the_ring_wraps():
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt, history=3)
    size = monitor._ring.untyped_storage().nbytes()
    assert monitor.rows() == [] and monitor.latest() is None
    for t in range(1, 9):
        logp = torch.full((1, t), -1.0)
        monitor.observe(fca.clip_stats(logp, logp, torch.ones(1)))
        step(opt, 1.0 if t < 8 else 0.0)
        assert [row["step"] for row in monitor.rows()] == list(range(max(1, t - 2), t + 1))
    assert [row["tokens"] for row in monitor.rows()] == [6.0, 7.0, 8.0]
    assert [row["coast_steps"] for row in monitor.rows()] == [None, None, 1.0]
    assert [row["step"] for row in monitor.rows(2)] == [7, 8] and monitor.rows(99) == monitor.rows()
    assert monitor._ring.untyped_storage().nbytes() == size


def test_a_row_written_over_leaves_nothing():
    p, opt = one_parameter()
    monitor = OvershootMonitor(opt, history=1)
    logp = torch.full((1, 3), -1.0)
    step(opt, 1.0)
    monitor.observe(fca.clip_stats(logp, logp, torch.ones(1)), logp, logp)
    step(opt, 0.0)
    row = monitor.latest()
    assert row["kept_blocks"] == 0 and row["tokens"] == 3 and row["coast_steps"] == 1 and row["excess_max"] == 0
    p.grad = None
    opt.step(lambda: None)
    row = monitor.latest()
    assert row.pop("step") == 3 and row.pop("skipped") == 0
    assert row.pop("tensors") == {"param_groups[0][0]": {"kept_blocks": None, "kept_mass": None}}
    assert not any(row.pop("watched")["param_groups[0][0]"].values()) and not any(row.values())


def test_every_gathers_the_steps_between():
    _, opt = one_parameter(8, torch.float64, skip_nonfinite=True)
    monitor = OvershootMonitor(opt, every=3)
    for t, g in enumerate((1.0, 0.0, math.inf, 0.0, 0.0, -1.0, 1.0), start=1):
        logp = torch.full((1, t), -1.0)
        monitor.observe(fca.clip_stats(logp, logp - 0.1 * t, torch.ones(1)))
        step(opt, g)
    rows = monitor.rows()
    assert [row["step"] for row in rows] == [3, 6] and [row["tokens"] for row in rows] == [6.0, 15.0]
    assert [row["skipped"] for row in rows] == [1, 0]
    assert rows[0]["ratio_min"] == pytest.approx(math.exp(0.1)) and rows[1]["ratio_max"] == pytest.approx(math.exp(0.6))
    assert rows[1]["kept_blocks"] == 0.0, "of the row's own step, whose gradient is against the momentum"
    R = [theory.residual_ratio(k, history=1) for k in (1, 2, 3)]
    assert rows[0]["coast_observed"] == pytest.approx(R[0], rel=1e-6)
    assert rows[1]["coast_observed"] == pytest.approx(math.sqrt((R[1] ** 2 + R[2] ** 2) / 2), rel=1e-6)
    assert rows[1]["coast_steps"] == 2.5


def train(opt, monitor, gradients, first):
    for t, g in enumerate(gradients, start=first):
        one = logp, old_logp, A, mask = batch(t)
        monitor.observe(fca.clip_stats(*one[:3], mask=mask, objective=PPO), logp, old_logp, A, mask)
        step(opt, g)


@pytest.mark.parametrize("history", [100, 2])
def test_resume_is_exact(history):
    gradients = (1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    _, opt = one_parameter(8, torch.float64)
    whole = OvershootMonitor(opt, PPO, every=2, history=history)
    train(opt, whole, (*gradients, 0.0), 0)

    _, opt = one_parameter(8, torch.float64)
    first = OvershootMonitor(opt, PPO, every=2, history=history)
    train(opt, first, gradients[:5], 0)  # in the middle of a row, and of a coast
    first.close()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = OvershootMonitor(opt, PPO, every=2, history=history)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.rows() == first.rows()
    train(opt, second, (*gradients[5:], 0.0), 5)
    assert second.rows() == whole.rows() and len(second.rows()) == min(history, 4)
    assert second.rows()[-1]["coast_observed"] is not None


def test_state_dict_is_a_copy_and_fits_a_shorter_history():
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt)
    for _ in range(5):
        step(opt, 1.0)
    saved = monitor.state_dict()
    step(opt, 0.0)
    shorter = OvershootMonitor(opt, history=2)
    shorter.load_state_dict(saved)
    assert [row["step"] for row in shorter.rows()] == [4, 5]
    step(opt, 0.0)
    assert [row["step"] for row in shorter.rows()] == [5, 6]
    assert len(saved["ring"]) == 5


def test_nothing_is_read_by_the_host():
    """observe, and the hooks of a step; the step itself has its own tests."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (40, 3, 5)]
    groups = [{"params": params[:2], "lr": torch.tensor(1e-2)}, {"params": params[2:], "weight_decay": 0.0}]
    opt = fca.FusedClipAdamW(groups, overshoot="align")
    scope = contextlib.ExitStack()
    entered = []

    def enter(*_):
        entered.append(scope.enter_context(NoSync()))

    def leave(*_):
        scope.close()

    opt.register_step_pre_hook(enter)  # hooks run in the order of their registration: the monitor's are in between
    opt.register_step_post_hook(enter)
    monitor = OvershootMonitor(opt, PPO, block=7)
    opt.register_step_pre_hook(leave)
    opt.register_step_post_hook(leave)
    for t in range(3):
        one = logp, old_logp, A, mask = batch(t)
        stats = fca.clip_stats(*one[:3], mask=mask, objective=PPO)
        with NoSync():
            monitor.observe(stats, logp, old_logp, A, mask)
        step(opt, torch.randn(40), 0.0 if t else 1.0, 1.0 if t == 1 else None)
    assert len(entered) == 6 and len(monitor.rows()) == 3 and monitor.latest()["coast_observed"] is not None
    with pytest.raises(AssertionError, match="host wait"), NoSync():
        float(monitor._ring[0, 0])  # the guard sees a read


def test_training_is_the_same_bit_for_bit():
    trained = []
    for watched in (False, True):
        torch.manual_seed(1)
        p, opt = one_parameter(5000, overshoot="align", grad_clip=1.0)
        if watched:
            monitor = OvershootMonitor(opt)
        for _ in range(4):
            step(opt, torch.randn(5000))
        trained.append([p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]])
    assert all(torch.equal(a, b) for a, b in zip(*trained)) and len(monitor.rows()) == 4


def test_close_takes_the_hooks_out():
    _, opt = one_parameter()
    with OvershootMonitor(opt) as monitor:
        step(opt, 1.0)
    step(opt, 1.0)
    monitor.close()
    assert [row["step"] for row in monitor.rows()] == [1]
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


# ------------------------------------------------------------ table and figure


def reported(overshoot=None):
    """A short run with everything in it."""
    p, opt = one_parameter(64, torch.float64, overshoot=overshoot)
    q = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    opt.add_param_group({"params": [q]})
    monitor = OvershootMonitor(opt, PPO, block=8, names=[("body", p), ("head", q)])
    generator = torch.Generator().manual_seed(3)
    for t in range(40):
        one = logp, old_logp, A, mask = batch(t)
        monitor.observe(fca.clip_stats(*one[:3], mask=mask, objective=PPO), logp, old_logp, A, mask)
        g = torch.randn(64, generator=generator, dtype=torch.float64) + 0.3
        step(opt, g, 0.0 if t % 10 > 3 else 1.0)
    return monitor


def test_table():
    monitor = reported()
    lines = monitor.table().splitlines()
    rows, row = monitor.rows(), monitor.latest()
    assert "40 rows, steps 1 to 40" in lines[0] and "FusedClipAdamW, PPO(clip_low=0.2, clip_high=0.28" in lines[1]
    cells = {line[:56].strip(): line[56:].split() for line in lines[3:-1]}
    mean = sum(r["clip_fraction_low"] for r in rows) / 40
    assert cells["clipped low, share of tokens"] == [f"{row['clip_fraction_low']:.4g}", f"{mean:.4g}"]
    coasts = [r["coast_observed"] for r in rows if r["coast_observed"] is not None]
    assert 10 < len(coasts) < 40
    assert cells["coast, observed, of the last update"][1] == f"{sum(coasts) / len(coasts):.4g}"
    assert "max excess, nats (by the sign of A)" in cells
    assert lines[-1].startswith("  least momentum kept in the newest row: head 0%, body ")
    assert max(map(len, lines)) <= 100
    _, opt = one_parameter()
    assert "no step recorded" in OvershootMonitor(opt).table()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"overshoot.{suffix}"
    reported().figure(path)
    data = path.read_bytes()
    assert len(data) > 20_000
    if suffix == "svg":
        return
    from matplotlib.image import imread

    image = imread(path)
    assert data.startswith(b"\x89PNG") and image.shape[:2] == (930, 1500)
    quarters = [image[:465, :750], image[:465, 750:], image[465:, :750], image[465:, 750:]]
    for quarter in quarters:  # a curve is saturated colour, which text and grid are not
        colour = quarter[..., :3].max(-1) - quarter[..., :3].min(-1)
        assert (colour > 0.3).mean() > 2e-3


def test_figure_of_what_was_not_measured(tmp_path):
    pytest.importorskip("matplotlib")
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt, None, watch=0)
    step(opt, 1.0)
    monitor.figure(tmp_path / "empty.svg")
    assert (tmp_path / "empty.svg").stat().st_size > 5_000


def test_figure_refusals(tmp_path, monkeypatch):
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt)
    with pytest.raises(ValueError, match=r"\.png or \.svg.*gif"):
        monitor.figure(tmp_path / "overshoot.gif")
    with pytest.raises(ValueError, match="no step"):
        monitor.figure(tmp_path / "overshoot.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        monitor.figure(tmp_path / "overshoot.png")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "options, kind, match",
    [
        (dict(objective="ppo"), TypeError, "objective.*'ppo'"),
        (dict(every=0), ValueError, "every.*at least 1.*0"),
        (dict(every=1.5), TypeError, "every.*1.5"),
        (dict(history=True), TypeError, "history.*True"),
        (dict(block=0), ValueError, 'block.*"element".*0'),
        (dict(block="row"), TypeError, "block.*'row'"),
        (dict(names=3), TypeError, "names.*pairs.*3"),
        (dict(names=["p"]), TypeError, "names.*pairs"),
        (dict(names=[]), ValueError, r"names.*param_groups\[0\].*\[8\]"),
        (dict(watch=-1), ValueError, "watch.*-1"),
        (dict(watch="p"), TypeError, "watch.*'p'"),
        (dict(watch=["q"]), ValueError, r"watch.*\['q'\].*param_groups\[0\]\[0\]"),
        (dict(watch=lambda name, p: False), ValueError, "watch.*selects no"),
    ],
)
def test_constructor_refuses(options, kind, match):
    _, opt = one_parameter()
    with pytest.raises(kind, match=match):
        OvershootMonitor(opt, **options)
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_repeated_names_are_refused():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"names must differ.*'w'"):
        OvershootMonitor(fca.FusedClipAdamW(params), names=[("w", p) for p in params])


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match=r"opt must be FusedClipAdamW.*SGD.*\.optimizer"):
        OvershootMonitor(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


def test_coupled_weight_decay_has_no_coast():
    p = torch.nn.Parameter(torch.ones(4))
    opt = fca.FusedClipAdam([p], weight_decay=0.1)
    with pytest.raises(ValueError, match=r"coupled weight_decay=0\.1"):
        OvershootMonitor(opt, watch=lambda name, p: True)
    monitor = OvershootMonitor(opt)
    step(opt, 1.0)
    assert monitor.latest()["watched"] == {}


@pytest.mark.parametrize(
    "change, kind, match",
    [
        (dict(stats=torch.zeros(14)), TypeError, "stats.*ClipStats.*Tensor"),
        (dict(logp=None), ValueError, "old_logp without logp"),
        (dict(logp=None, old_logp=None), ValueError, "advantages without logp"),
        (dict(logp=None, old_logp=None, advantages=None), ValueError, "mask without logp"),
        (dict(logp=[1.0]), TypeError, "logp must be a tensor.*list"),
        (dict(logp=torch.zeros(4, 9, dtype=torch.int64)), TypeError, "logp.*int64"),
        (dict(logp=torch.zeros(4, 9, 1)), ValueError, r"logp.*\[4, 9, 1\]"),
        (dict(old_logp=None), TypeError, "old_logp.*NoneType"),
        (dict(old_logp=torch.zeros(4, 8)), ValueError, r"old_logp.*\[4, 9\].*\[4, 8\]"),
        (dict(advantages=torch.zeros(9)), ValueError, r"advantages.*\[4\].*\[9\]"),
        (dict(mask=torch.ones(4)), ValueError, r"mask.*\[4, 9\].*\[4\]"),
    ],
)
def test_observe_refuses(change, kind, match):
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt)
    logp, old_logp, A, mask = batch()
    stats = fca.clip_stats(logp, old_logp, A, mask=mask)
    good = dict(stats=stats, logp=logp, old_logp=old_logp, advantages=A, mask=mask)
    with pytest.raises(kind, match=match):
        monitor.observe(**{**good, **change})
    step(opt, 1.0)
    assert monitor.latest()["tokens"] is None, "nothing was recorded"


@pytest.mark.parametrize("objective", [fca.SAPO(), fca.GRPOGuard(0.2, 0.2), None])
def test_log_probs_without_bounds_are_refused(objective):
    _, opt = one_parameter()
    logp, old_logp, A, mask = batch()
    with pytest.raises(ValueError, match=r"logp has no effect.*stats alone"):
        OvershootMonitor(opt, objective).observe(fca.clip_stats(logp, old_logp, A, mask=mask), logp, old_logp)


def test_packed_sequences_are_refused():
    _, opt = one_parameter()
    logp = torch.zeros(5)
    stats = fca.clip_stats(logp, logp, logp)
    with pytest.raises(ValueError, match=r"\[B, T\] for GSPO.*\[5\]"):
        OvershootMonitor(opt, fca.GSPO()).observe(stats, logp, logp)


def test_calls_of_a_row_must_agree():
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt)
    logp, old_logp, A, mask = batch()
    stats = fca.clip_stats(logp, old_logp, A, mask=mask)
    monitor.observe(stats, logp, old_logp, A, mask)
    with pytest.raises(ValueError, match="no log_probs but log_probs_and_advantages"):
        monitor.observe(stats)
    step(opt, 1.0)
    assert monitor.latest()["tokens"] == mask.sum()
    monitor.observe(stats)  # the next row may differ


@pytest.mark.parametrize(
    "options, named", [(dict(every=2), "every"), (dict(block=8), "block"), (dict(watch=0), "watched")]
)
def test_load_refuses_another_monitor(options, named):
    _, opt = one_parameter()
    monitor = OvershootMonitor(opt, **options)
    step(opt, 1.0)
    step(opt, 1.0)
    other = OvershootMonitor(opt)
    with pytest.raises(ValueError, match=f"state_dict has {named}="):
        other.load_state_dict(monitor.state_dict())
    assert other.rows() == []


def test_load_refuses_other_shapes():
    _, opt = one_parameter(8)
    saved = OvershootMonitor(opt).state_dict()
    _, opt = one_parameter(9)
    with pytest.raises(ValueError, match=r"shapes \[\[8\]\]"):
        OvershootMonitor(opt).load_state_dict(saved)


@pytest.mark.parametrize("last, kind", [(0, ValueError), ("all", TypeError)])
def test_rows_refuses(last, kind):
    _, opt = one_parameter()
    with pytest.raises(kind, match="last must be"):
        OvershootMonitor(opt).rows(last)


def test_a_capture_is_refused(monkeypatch):
    p, opt = one_parameter()
    monitor = OvershootMonitor(opt)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"CUDA graph.*close\(\)"):
        step(opt, 1.0)
    assert torch.equal(p, before) and monitor.rows() == []
