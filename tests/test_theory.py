"""Closed forms against their published values, against the recurrences, and against runs of the optimizer."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fused_clip_adam as fca
from fused_clip_adam import theory

# betas, total coast, R_5: arXiv 2601.05002 at T -> infinity, eps = 0.
PUBLISHED = [
    ((0.9, 0.999), 9.045, 0.5920),
    ((0.9, 0.95), 12.052, 0.6713),
    ((0.9, 0.99), 9.475, 0.6055),
    ((0.95, 0.999), 19.192, 0.7757),
]
MODES = ("renormalise", "damp")
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


@st.composite
def brakes(draw):
    """strength, mode and hold_v of a `MomentumBrake`, and masses whose quotient is c: what a run is told."""
    brake = {
        "strength": draw(st.floats(0.0, 1.0)),
        "mode": draw(st.sampled_from(MODES)),
        "hold_v": draw(st.sampled_from((0.0, 0.3, 0.9))),
    }
    total = draw(st.integers(1, 8))
    return brake, draw(st.integers(0, total)), total


@st.composite
def betas_(draw, coast_ends=False):
    beta2 = draw(st.floats(0.5, 0.999))
    return draw(st.floats(0.0, math.sqrt(beta2) - 0.1 if coast_ends else 0.98)), beta2


def clip_stats(suppressed: float, total: float) -> fca.ClipStats:
    buffer = torch.zeros(14)
    buffer[4], buffer[5] = suppressed, total
    return fca.ClipStats(buffer)


class Run:
    """T random gradients, then zeros while the optimizer sees suppressed / total.

    `updates`: of every step from T on, over that of T. `distance`: how far the parameter then is, in the same unit.
    """

    def __init__(self, T, k, betas, eps, brake, suppressed, total, dtype, backend, seed=0):
        generator = torch.Generator().manual_seed(seed)
        p = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        rule = None if brake is None else fca.MomentumBrake(**brake)
        opt = fca.FusedClipAdamW([p], lr=1.0, betas=betas, eps=eps, weight_decay=0.0, overshoot=rule, backend=backend)
        updates = []
        for t in range(T + k):
            with torch.no_grad():
                p.zero_()  # before each step, so that an update is read off without cancellation
            # Of one sign: a last update near 0 would be known to few digits.
            p.grad = torch.rand(1, generator=generator).to(dtype) + 0.1 if t < T else torch.zeros_like(p)
            if t >= T:
                opt.observe(clip_stats(suppressed, total))
            opt.step()
            updates.append(-float(p.detach()))
            if t == T - 1:
                self.v_hat = float(opt.state[p]["exp_avg_sq"]) / (1 - betas[1] ** T)
        self.updates = [update / updates[T - 1] for update in updates[T - 1 :]]
        self.distance = math.fsum(self.updates[1:])


def recurrence(k, beta1, beta2, T, eps, v_hat, strength, c, mode, hold_v):
    """R_k step by step, as the update writes it: m, v, W1, W2 from a state after T steps."""
    W1, W2 = 1 - beta1**T, 1 - beta2**T
    m, v = 0.7 * W1, v_hat * W2

    def update():
        return m / W1 / (math.sqrt(v) / math.sqrt(W2) + eps)

    first = update()
    a = beta1 * (1 - strength * c)
    v_weight = (1 - beta2) * (1 - hold_v * c)
    for _ in range(k):
        m, v = a * m, (1 - v_weight) * v
        W1 = a * W1 + (1 - a) if mode == "renormalise" else beta1 * W1 + (1 - beta1)
        W2 = (1 - v_weight) * W2 + v_weight
    return update() / first


# ---------------------------------------------------------------- the residual of one step


@given(
    k=st.integers(0, 60),
    betas=betas_(),
    T=st.integers(1, 50),
    eps=st.sampled_from((0.0, 1e-8, 1e-2, 3.0)),
    v_hat=st.floats(1e-6, 1e3),
    brake=brakes(),
)
def test_residual_is_that_of_the_recurrence(k, betas, T, eps, v_hat, brake):
    brake, suppressed, total = brake
    c = suppressed / total
    got = theory.residual_ratio(k, *betas, history=T, eps=eps, v_hat=v_hat, c=c, **brake)
    assert got == pytest.approx(recurrence(k, *betas, T, eps, v_hat, c=c, **brake), rel=1e-12, abs=1e-290)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("dtype", BOUNDS)
@settings(max_examples=40)
@given(
    T=st.integers(1, 12),
    k=st.integers(1, 40),
    betas=betas_(),
    eps=st.sampled_from((0.0, 1e-8, 1e-2)),
    brake=st.none() | brakes(),
    seed=st.integers(0, 999),
)
def test_residual_is_that_of_a_run(backend, dtype, T, k, betas, eps, brake, seed):
    brake, suppressed, total = brake or (None, 1, 1)
    run = Run(T, k, betas, eps, brake, suppressed, total, dtype, backend, seed)
    numbers = dict(history=T, eps=eps, v_hat=run.v_hat, **({} if brake is None else dict(brake, c=suppressed / total)))
    expected = [theory.residual_ratio(j, *betas, **numbers) for j in range(k + 1)]
    # In float32 a strong brake soon leaves moments below the normal numbers, which have fewer digits.
    smallest = 1e-30 if dtype == torch.float32 else 1e-290
    assert run.updates == pytest.approx(expected, rel=BOUNDS[dtype], abs=smallest)
    assert run.distance == pytest.approx(theory.coast_after(k, *betas, **numbers), rel=BOUNDS[dtype], abs=smallest)


def test_a_brake_needs_suppression_and_strength():
    plain = theory.residual_ratio(4, history=9)
    assert theory.residual_ratio(4, history=9, strength=0.7, c=0.0) == plain
    assert theory.residual_ratio(4, history=9, strength=0.0, c=0.5) == plain
    assert theory.residual_ratio(4, history=9, strength=0.7, c=0.5) < 0.5 * plain
    assert theory.residual_ratio(1, history=9, strength=1.0) == 0.0
    # A held second moment is a larger divisor. "renormalise" takes W1 to 1 sooner, and so divides by more than "damp".
    assert theory.residual_ratio(4, history=9, hold_v=0.9) < plain
    renormalise, damp = (theory.residual_ratio(4, history=2, strength=0.5, mode=mode) for mode in MODES)
    assert renormalise < damp


def test_finite_history_tends_to_the_infinite_one():
    assert theory.residual_ratio(3, history=1e5) == pytest.approx(theory.residual_ratio(3), rel=1e-12)
    assert theory.residual_ratio(0, history=4) == 1.0
    brake = dict(strength=0.5, c=0.8, hold_v=0.5)
    a, b = 0.9 * (1 - 0.4), 1 - 0.001 * (1 - 0.4)
    for mode in MODES:
        assert theory.residual_ratio(6, mode=mode, **brake) == pytest.approx((a / math.sqrt(b)) ** 6, rel=1e-12)


def test_a_residual_too_small_for_a_power_of_beta2_is_exact():
    # beta2^400 underflows; (beta1 / sqrt(beta2))^400 does not.
    assert theory.residual_ratio(400, 0.5, 0.1) == pytest.approx((0.5 / math.sqrt(0.1)) ** 400, rel=1e-12)


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("betas, coast, fifth", PUBLISHED)
def test_published_values(betas, coast, fifth):
    assert theory.total_coast(*betas) == pytest.approx(coast, abs=5e-4)  # printed with three decimals
    assert theory.residual_ratio(5, *betas) == pytest.approx(fifth, abs=5e-5)
    assert theory.coast_after(3000, *betas) == pytest.approx(theory.total_coast(*betas), rel=1e-9)


@settings(max_examples=40)
@given(
    betas=betas_(),
    T=st.integers(1, 50) | st.just(math.inf),
    eps=st.sampled_from((0.0, 1e-8, 1e-2)),
    v_hat=st.floats(1e-4, 1e2),
    brake=brakes(),
)
def test_total_coast_is_the_whole_sum(betas, T, eps, v_hat, brake):
    brake, suppressed, total = brake
    numbers = dict(history=T, eps=eps, v_hat=v_hat, c=suppressed / total, **brake)
    a = betas[0] * (1 - brake["strength"] * suppressed / total)
    assume(eps > 0 or a < 0.98 * math.sqrt(betas[1]))
    # 4000 terms: the rest is below 0.98^4000 / 0.02 of the sum; with eps, momentum alone falls as 0.98^k, from up to
    # sqrt(v_hat) / eps.
    expected = theory.coast_after(4000, *betas, **numbers)
    assert theory.total_coast(*betas, **numbers) == pytest.approx(expected, rel=1e-13)


def test_a_coast_that_grows_first_ends_with_eps():
    # beta1 > sqrt(beta2): updates grow until the second moment has fallen to eps. Without eps they never end.
    with pytest.raises(ValueError, match="never ends"):
        theory.total_coast(0.9, 0.5, history=3)
    total = theory.total_coast(0.9, 0.5, history=3, eps=1e-8)
    assert total == pytest.approx(theory.coast_after(2000, 0.9, 0.5, history=3, eps=1e-8), rel=1e-13)
    assert total > 1e5


# ---------------------------------------------------------------- the strength a budget needs


@settings(max_examples=40)
@given(budget=st.floats(0.05, 20.0), betas=betas_(), c=st.floats(0.1, 1.0), mode=st.sampled_from(MODES),
       hold_v=st.sampled_from((0.0, 0.5)), T=st.sampled_from((1, 3, 30, math.inf)),
       eps=st.sampled_from((0.0, 1e-3)))  # fmt: skip
def test_required_strength_is_the_smallest(budget, betas, c, mode, hold_v, T, eps):
    numbers = dict(history=T, eps=eps, v_hat=0.3, c=c, mode=mode, hold_v=hold_v)

    def coast(strength):
        try:
            return theory.total_coast(*betas, strength=strength, **numbers)
        except ValueError:
            return math.inf

    try:
        strength = theory.required_strength(budget, *betas, **numbers)
    except ValueError as error:
        least = coast(1.0)
        assert least > budget and (f"{least:.6g}" in str(error))
        return
    assert 0.0 <= strength <= 1.0
    assert coast(strength) <= budget * (1 + 1e-12)
    assert strength == 0.0 or coast(strength - 1e-6) > budget


@pytest.mark.parametrize("mode", MODES)
def test_bisection_meets_the_closed_form(mode):
    # After 3000 steps beta1^T and beta2^T are below float64's resolution, but not 0: this is not the closed form.
    numbers = dict(c=0.7, mode=mode, hold_v=0.4)
    exact = theory.required_strength(1.5, 0.9, 0.95, **numbers)
    assert 0.1 < exact < 0.9
    assert theory.required_strength(1.5, 0.9, 0.95, history=3000, **numbers) == pytest.approx(exact, rel=1e-12)
    a = 0.9 * (1 - exact * 0.7)
    b = 1 - 0.05 * (1 - 0.4 * 0.7)
    assert a / (math.sqrt(b) - a) == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@settings(max_examples=15)
@given(budget=st.floats(0.1, 6.0), betas=betas_(coast_ends=True), T=st.integers(1, 12),
       mode=st.sampled_from(MODES), hold_v=st.sampled_from((0.0, 0.5)),
       suppressed=st.integers(3, 4), seed=st.integers(0, 99))  # fmt: skip
def test_a_run_keeps_within_the_budget(backend, budget, betas, T, mode, hold_v, suppressed, seed):
    numbers = dict(history=T, c=suppressed / 4, mode=mode, hold_v=hold_v)
    least = theory.total_coast(*betas, strength=1.0, **numbers)
    assume(least < budget)
    strength = theory.required_strength(budget, *betas, **numbers)
    k = 300  # 0.9^300 is 2e-14: what is left does not count at 1e-9

    def coast(strength):
        brake = dict(strength=strength, mode=mode, hold_v=hold_v)
        return Run(T, k, betas, 0.0, brake, suppressed, 4, torch.float64, backend, seed).distance

    assert coast(strength) <= budget * (1 + 1e-9)
    if strength > 0.0:
        assert coast(strength) == pytest.approx(budget, rel=1e-9)
        assert coast(strength * 0.999) > budget


def test_required_strength_at_the_ends():
    assert theory.required_strength(9.1) == 0.0  # plain AdamW coasts 9.045 updates
    assert theory.required_strength(0.0) == 1.0
    assert theory.required_strength(2.0) == pytest.approx((1 - math.sqrt(0.999) * 2 / 3 / 0.9), rel=1e-12)
    assert theory.required_strength(0.0, 0.0) == 0.0  # without momentum nothing coasts
    with pytest.raises(ValueError, match=r"still coasts 9\.04524 updates"):
        theory.required_strength(1.0, c=0.0)
    with pytest.raises(ValueError, match="still coasts inf updates"):
        theory.required_strength(1.0, 0.9, 0.5, c=0.0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, match",
    (
        (dict(k=-1), "k must"),
        (dict(k=math.nan), "k must"),
        (dict(k=1, history=0), "history"),
        (dict(k=1, history=math.nan), "history"),
        (dict(k=1, beta1=1.0), "beta1"),
        (dict(k=1, beta2=-0.1), "beta2"),
        (dict(k=1, eps=-1e-8), "eps"),
        (dict(k=1, v_hat=math.inf), "v_hat"),
        (dict(k=1, c=1.1), "c must"),
        (dict(k=1, strength=1.1), "strength"),
        (dict(k=1, hold_v=1.0), "hold_v"),
        (dict(k=1, mode="renormalize"), "mode"),
        (dict(k=1, beta2=0.0), "beta2=0"),
    ),
)
def test_refusals(arguments, match):
    for function in (theory.residual_ratio, theory.coast_after):
        with pytest.raises(ValueError, match=match):
            function(**arguments)


@pytest.mark.parametrize("betas", ((0.99, 0.9), (1.0, 0.999), (0.5, 1.0)))
def test_coast_without_end_is_refused(betas):
    with pytest.raises(ValueError, match="beta1"):
        theory.total_coast(*betas)


@pytest.mark.parametrize("budget", (-0.1, math.inf, math.nan))
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="budget"):
        theory.required_strength(budget)


def test_no_second_moment_is_fine_with_eps():
    # beta2 = 0: without a gradient u = m / eps.
    expected = 0.9 * (0.5 + 0.1) / 0.1
    assert theory.residual_ratio(1, beta2=0.0, eps=0.1, v_hat=0.25) == pytest.approx(expected, rel=1e-12)
    assert theory.total_coast(beta2=0.0, eps=0.1, v_hat=0.25) == pytest.approx(expected * 10, rel=1e-12)
