"""Every method against its own published steps, written out one number at a time, on every backend there is here."""

from __future__ import annotations

import math
from collections.abc import Callable

import by_hand as hand
import pytest
import torch
from by_hand import EVERYWHERE, HOSTS, TARGETS
from cases import bitwise_equal, largest_error, make_grads, results, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_clip_adam as fca

LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.999, 1e-8, 0.1
SHAPES = {"vector": (301,), "matrix": (7, 5), "scalar": ()}

# ---------------------------------------------------------------- the update of one number, from bias-corrected moments


def clamped(bound: float) -> Callable[..., float]:
    return lambda m_hat, v_hat, m, g: max(-bound, min(bound, m_hat / (math.sqrt(v_hat) + EPS)))


def grams(m_hat: float, v_hat: float, m: float, g: float) -> float:
    size = abs(m_hat / (math.sqrt(v_hat) + EPS))
    return size if g > 0 else -size if g < 0 else 0.0


def cautious(m_hat: float, v_hat: float, m: float, g: float) -> float:
    return m_hat / (math.sqrt(v_hat) + EPS) if m * g > 0 else 0.0


def atan2(m_hat: float, v_hat: float, m: float, g: float) -> float:
    return 1.27 * math.atan2(m_hat, math.sqrt(v_hat))


METHODS = {  # the rule, and its update from (m / W1, v / W2, m, g)
    "C-AdamW": (fca.Cautious(), cautious),
    "Grams": (fca.Grams(), grams),
    "clamp": (fca.UpdateClamp(0.4), clamped(0.4)),
    "Adam-atan2": (fca.UpdateClamp(1.27 * math.pi / 2, mode="atan2"), atan2),
    "Grams, clamped": (
        (fca.Grams(), fca.UpdateClamp(0.4)),
        lambda *x: max(-0.4, min(0.4, grams(*x))),
    ),
    "C-AdamW, clamped": (
        (fca.UpdateClamp(0.4), fca.Cautious()),
        lambda *x: max(-0.4, min(0.4, cautious(*x))),
    ),
}


def by_hand(start: torch.Tensor, grads: list[torch.Tensor], update: Callable[..., float]) -> torch.Tensor:
    """AdamW with decoupled decay, number by number, in Python floats."""
    out = []
    columns = zip(start.double().reshape(-1).tolist(), *(g.double().reshape(-1).tolist() for g in grads))
    for p, *own in columns:
        m = v = 0.0
        for step, g in enumerate(own, start=1):
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g * g
            p = p * (1 - LR * DECAY) - LR * update(m / (1 - BETA1**step), v / (1 - BETA2**step), m, g)
        out.append(p)
    return torch.tensor(out, dtype=torch.float64).reshape(start.shape)


def train(backend: str, device: str, start, grads, overshoot) -> list[torch.Tensor]:
    params = [p.to(device, copy=True).requires_grad_() for p in start]
    opt = fca.FusedClipAdamW(params, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, overshoot=overshoot,
                             backend=backend)  # fmt: skip
    for now in grads:
        for p, g in zip(params, now):
            p.grad = g.to(device, p.dtype, copy=True)
        opt.step()
    return [p.detach().cpu() for p in params]


def make_start(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES.values()]


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_method_is_its_published_steps(backend, device, name, dtype):
    rule, update = METHODS[name]
    start, steps = make_start(dtype), 1 if dtype == torch.bfloat16 else 6
    grads = make_grads(start, steps)
    got = train(backend, device, start, grads, rule)
    expected = [by_hand(p, [now[i] for now in grads], update) for i, p in enumerate(start)]
    # float64: 1e-14 is 45 roundings. bfloat16: one step, which rounds its moments before and its result once.
    allowed = {torch.float64: 1e-14, torch.float32: tolerance(dtype, steps), torch.bfloat16: tolerance(dtype, 1)}
    assert largest_error(got, expected) <= allowed[dtype]


# ---------------------------------------------------------------- what the rules promise


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("mode", ("clip", "atan2"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_no_element_moves_further_than_the_bound(backend, device, mode, dtype):
    # Gradients that explode make u = (1 - beta1) / sqrt(1 - beta2), 3.2, without it; here huge, subnormal, 0.
    sizes = torch.tensor([0.0, 1e-40, 1e-30, 1e-12, 1.0, 1e9, 1e18], dtype=torch.float64)
    start = torch.zeros(sizes.numel(), dtype=dtype)
    quiet, loud = (sizes * 1e-6).to(dtype), sizes.to(dtype)
    params = [start.to(device, copy=True).requires_grad_()]
    rule = fca.UpdateClamp(0.5, mode=mode)
    opt = fca.FusedClipAdamW(params, lr=1.0, weight_decay=0.0, overshoot=rule, backend=backend)
    for g in (*[quiet] * 20, loud, -loud, loud):
        with torch.no_grad():
            params[0].zero_()
        params[0].grad = g.to(device, copy=True)
        opt.step()
        moved = params[0].detach().cpu().double().abs()
        assert bool((moved <= 0.5 * (1 + torch.finfo(dtype).eps)).all()) and bool(moved.isfinite().all())
        assert float(moved[0]) == 0.0
    assert float(moved[4]) > 0.05  # and moves


@pytest.mark.parametrize("backend, device", TARGETS)
def test_atan2_does_not_see_the_size_of_the_gradients(backend, device):
    """Powers of two change no digit, so the updates are the same bits; AdamW's eps would show below 1e-8."""
    start = make_start(torch.float32)
    grads = make_grads(start, 5)
    rule = fca.UpdateClamp(1.0, mode="atan2")
    expected = train(backend, device, start, grads, rule)
    for power in (-40, 30):
        scaled = [[g * 2.0**power for g in now] for now in grads]
        for x, y in zip(train(backend, device, start, scaled, rule), expected):
            assert torch.equal(x, y), power


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("dtype, bound", ((torch.float64, 8e-16), (torch.float32, 4e-7)))
def test_arc_tangent_everywhere(backend, device, dtype, bound):
    """A zero gradient with beta = 1/2 and step 1 leaves m / W1 and v / W2 as they were: u = atan2(m, sqrt(v))."""
    ratios = torch.cat([torch.logspace(-18, 18, 4001, dtype=torch.float64), torch.linspace(0.3, 3.0, 4001).double()])
    ratios = torch.cat([ratios, -ratios, torch.tensor([0.0, 0.66, 1.0, 1 / 0.66], dtype=torch.float64)]).to(dtype)
    p = torch.zeros_like(ratios).to(device).requires_grad_()
    p.grad = torch.zeros_like(p)
    rule = fca.UpdateClamp(math.pi / 2, mode="atan2")
    opt = fca.FusedClipAdamW([p], lr=1.0, betas=(0.5, 0.5), weight_decay=0.0, overshoot=rule, backend=backend)
    moments = {"exp_avg": ratios.to(device, copy=True), "exp_avg_sq": torch.ones_like(p, requires_grad=False)}
    opt.state[p] = {"step": torch.zeros((), device=device), **moments}
    opt.step()
    expected = torch.atan2(ratios.double(), torch.ones(()))
    error = (-p.detach().cpu().double() - expected).abs()
    # Three roundings beside the arc tangent's own.
    assert bool((error <= bound * expected.abs()).all()), float((error / expected.abs()).nan_to_num().max())


# ---------------------------------------------------------------- rules together


def test_one_rule_for_each_part_of_an_update():
    p = torch.nn.Parameter(torch.zeros(3))
    make = lambda overshoot: fca.FusedClipAdamW([p], overshoot=overshoot)  # noqa: E731
    opt = make(["align", fca.MomentumBrake(), fca.UpdateClamp(2.0)])
    assert opt.param_groups[0]["overshoot"] == (fca.AlignedMomentum(), fca.MomentumBrake(), fca.UpdateClamp(2.0))
    assert make(("cautious",)).param_groups[0]["overshoot"] == fca.Cautious()
    for pair, part in (
        (("align", "cautious"), "direction"),
        (("grams", fca.UpdateClamp(mode="atan2")), "direction"),
        ((fca.UpdateClamp(), fca.UpdateClamp(mode="atan2")), "size"),
        (("brake", ("align", "brake")), "momentum"),
    ):
        with pytest.raises(ValueError, match=f"both shape the {part}"):
            make(pair)
    with pytest.raises(TypeError, match="tuple"):
        make(("align", 1.0))


@pytest.mark.parametrize("backend, device", TARGETS)
def test_rules_together_are_their_equations_together(backend, device):
    """Align without a brake's effect, and with a bound that nothing reaches, is align: to the bit."""
    start = make_start(torch.float32)
    grads = make_grads(start, 4)
    alone = train(backend, device, start, grads, "align")
    together = train(backend, device, start, grads, ("align", fca.UpdateClamp(1e30)))
    assert all(map(torch.equal, together, alone))


# ---------------------------------------------------------------- against the specification, with moments


SPIKE = fca.SpikeClip(theta=3.0, start=2)
BY_TENSOR, LAGGED = fca.AlignedMomentum(block="tensor"), fca.AlignedMomentum(block="tensor", lag=True)
RESCALED = fca.Cautious(rescale=True)
spike, row_clip = (3.0, 2, False), (0.05, 1e-3)


def stable(total_steps: int | None = None) -> tuple:
    return (0.7, 0.9, 0.999, 1e-8, total_steps, False)


FORMS = dict(eps_before_correction=True, decay_after_update=True, eps=0.1)
OVERSHOOT = {  # keywords of the optimizer, and of hand.ByHand
    "AdamW": ({}, {}),
    "AdamW in SPAM's form": (FORMS, FORMS),
    "align 7": (dict(overshoot=fca.AlignedMomentum(block=7)), dict(align=7)),
    "align element": (dict(overshoot="align-element"), dict(align="element")),
    "align tensor": (dict(overshoot="align-tensor"), dict(align="tensor")),
    "align tensor, lagged": (dict(overshoot=LAGGED), dict(align="lag")),
    "C-AdamW": (dict(overshoot="cautious"), dict(cautious=True)),
    "C-AdamW, rescaled": (dict(overshoot=RESCALED), dict(rescale=True)),
    "Grams": (dict(overshoot="grams"), dict(grams=True)),
    "median momentum": (dict(overshoot=fca.MedianMomentum(0.2)), dict(median=0.2)),
    "brake": (dict(overshoot=fca.MomentumBrake(0.7, hold_v=0.3)), dict(brake=(0.7, "renormalise", 0.3))),
    "damp": (dict(overshoot=fca.MomentumBrake(0.7, mode="damp")), dict(brake=(0.7, "damp", 0.0))),
}

TOGETHER = {
    "align tensor, brake, clamp": (
        dict(overshoot=(BY_TENSOR, fca.MomentumBrake(0.7, hold_v=0.3), fca.UpdateClamp(0.6))),
        dict(align="tensor", brake=(0.7, "renormalise", 0.3), clamp=0.6),
    ),
    "C-AdamW, rescaled, brake": (
        dict(overshoot=(RESCALED, fca.MomentumBrake(0.7))),
        dict(rescale=True, brake=(0.7, "renormalise", 0.0)),
    ),
    "C-AdamW, rescaled, median": (
        dict(overshoot=(RESCALED, fca.MedianMomentum(0.2))),
        dict(rescale=True, median=0.2),
    ),
    "C-AdamW, median, clamp": (
        dict(overshoot=("cautious", fca.MedianMomentum(0.2), fca.UpdateClamp(0.6))),
        dict(cautious=True, median=0.2, clamp=0.6),
    ),
    "C-AdamW, rescaled, spikes": (dict(overshoot=RESCALED, grad_clip=SPIKE), dict(rescale=True, spike=spike)),
    "C-AdamW, rescaled, AGC": (dict(overshoot=RESCALED, grad_clip=fca.AGC(0.05)), dict(rescale=True, agc=row_clip)),
    "align tensor, spikes": (dict(overshoot=BY_TENSOR, grad_clip=SPIKE), dict(align="tensor", spike=spike)),
    "align 7, spikes": (
        dict(overshoot=fca.AlignedMomentum(block=7), grad_clip=SPIKE),
        dict(align=7, spike=spike),
    ),
    "align tensor, AGC": (dict(overshoot=BY_TENSOR, grad_clip=fca.AGC(0.05)), dict(align="tensor", agc=row_clip)),
    "align lagged, AGC": (dict(overshoot=LAGGED, grad_clip=fca.AGC(0.05)), dict(align="lag", agc=row_clip)),
    "align lagged, norm, amsgrad": (
        dict(overshoot=LAGGED, grad_clip=1.0, amsgrad=True),
        dict(align="lag", max_norm=1.0, amsgrad=True),
    ),
    "align 7, AdaClip and AdaGN": (
        dict(overshoot=fca.AlignedMomentum(block=7), grad_clip=fca.StableSpamClip()),
        dict(align=7, stable=stable()),
    ),
    "align tensor, AdaClip and AdaGN": (
        dict(overshoot=BY_TENSOR, grad_clip=fca.StableSpamClip()),
        dict(align="tensor", stable=stable()),
    ),
    "brake, AdaClip and AdaGN over 20 steps": (
        dict(overshoot=fca.MomentumBrake(0.7), grad_clip=fca.StableSpamClip(total_steps=20)),
        dict(brake=(0.7, "renormalise", 0.0), stable=stable(20)),
    ),
    "damp, AdaClip and AdaGN over 20 steps": (
        dict(overshoot=fca.MomentumBrake(0.7, mode="damp"), grad_clip=fca.StableSpamClip(total_steps=20)),
        dict(brake=(0.7, "damp", 0.0), stable=stable(20)),
    ),
    "C-AdamW, StableAdamW": (dict(overshoot=RESCALED, grad_clip=fca.UpdateRMS()), dict(rescale=True, update_rms=True)),
    "Adam, align tensor, AGC": (
        dict(overshoot=BY_TENSOR, grad_clip=fca.AGC(0.05)),
        dict(coupled=True, align="tensor", agc=row_clip),
    ),
    "Adam, C-AdamW, rescaled, StableAdamW": (
        dict(overshoot=RESCALED, grad_clip=(1.0, fca.UpdateRMS())),
        dict(coupled=True, rescale=True, max_norm=1.0, update_rms=True),
    ),
    "Adam, align lagged, AdaClip and AdaGN": (
        dict(overshoot=LAGGED, grad_clip=(fca.StableSpamClip(), fca.InducedMetric())),
        dict(coupled=True, align="lag", stable=stable(), metric=(0.1, 0.1)),
    ),
    "maximize, lagged, StableAdamW": (
        dict(overshoot=LAGGED, grad_clip=fca.UpdateRMS(), maximize=True),
        dict(align="lag", update_rms=True, maximize=True),
    ),
}


@pytest.mark.parametrize("backend, device, dtype", EVERYWHERE)
@pytest.mark.parametrize("name", (*OVERSHOOT, *TOGETHER))
def test_update_is_the_specifications(backend, device, dtype, name):
    options, by_hand = {**OVERSHOOT, **TOGETHER}[name]
    hand.compare(backend, device, dtype, options, by_hand, observe="brake" in by_hand)


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("name", OVERSHOOT)
def test_parameters_wait_for_their_gradients(backend, device, name):
    options, by_hand = OVERSHOOT[name]
    hand.compare(backend, device, torch.float64, options, by_hand, observe="brake" in by_hand, missing=True)


@pytest.mark.parametrize("backend, device", HOSTS)
@settings(max_examples=8)
@given(data=st.data())
def test_random_combinations_are_the_specifications(backend, device, data):
    """One rule, or none, of every part, in any order, with any reset."""
    draw = lambda cases: data.draw(st.sampled_from([({}, {}), *cases]))  # noqa: E731
    clips = [draw(cases) for cases in CLIP_PARTS]
    shapes = [draw(cases) for cases in OVERSHOOT_PARTS]
    by_hand = {k: v for _, own in (*clips, *shapes) for k, v in own.items()}
    options: dict = {"grad_clip": tuple(rule for rule, _ in clips if rule)}
    options["overshoot"] = tuple(data.draw(st.permutations([rule for rule, _ in shapes if rule])))
    if data.draw(st.booleans()):
        moments, counters = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
        options["reset"] = fca.Periodic(every=5, warmup=3, moments=moments, counters=counters)
        by_hand["periodic"] = (5, 3, moments, counters, False)
    for name in ("amsgrad", "maximize", "eps_before_correction", "decay_after_update"):
        # What a norm of the update is made of under these is not specified.
        if data.draw(st.booleans()) and not (name in ("amsgrad", "eps_before_correction") and SIZED & set(by_hand)):
            options[name] = by_hand[name] = True
    # Gates and masks of a thousand elements would differ by a sign of a rounding; those here do not.
    hand.compare(backend, device, torch.float64, options, by_hand, observe=True)


SIZED = {"update_rms", "metric"}
CLIP_PARTS = (
    [(1.0, dict(max_norm=1.0)), (fca.AGC(0.05), dict(agc=row_clip)), (fca.StableSpamClip(), dict(stable=stable()))],
    [(SPIKE, dict(spike=spike))],
    [(fca.UpdateRMS(), dict(update_rms=True)), (fca.InducedMetric(), dict(metric=(0.1, 0.1)))],
)
OVERSHOOT_PARTS = (
    [("brake", dict(brake=(0.5, "renormalise", 0.0)))],
    [
        ("cautious", dict(cautious=True)),
        ("grams", dict(grams=True)),
        (BY_TENSOR, dict(align="tensor")),
        (fca.AlignedMomentum(block=7), dict(align=7)),
    ],
    [(fca.UpdateClamp(0.6), dict(clamp=0.6))],
)


# ---------------------------------------------------------------- the coast after a full clip


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize(
    "rule", ("cautious", RESCALED, "grams", "align-element", "align-tensor", "align", fca.AlignedMomentum(block=7))
)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_zero_gradients_do_not_move_anything(backend, device, rule, dtype):
    """Exactly, whatever the momentum: whole tensors, and, of rules that see less, blocks of 7 in one that does move."""
    params = [p.to(device, copy=True).requires_grad_() for p in hand.make_start(dtype)]
    opt = fca.FusedClipAdamW(params, lr=0.1, weight_decay=0.0, overshoot=rule, backend=backend)
    for now in hand.make_grads(dtype, 3):
        hand.give(params, now)
        opt.step()
    before = [p.detach().clone() for p in params]
    hand.give(params, [torch.zeros_like(p) for p in params])
    opt.step()
    assert all(map(torch.equal, params, before))
    assert all(bool((opt.state[p]["exp_avg"] != 0).all()) for p in params), "nothing would have moved anyway"

    if rule in ("align", "align-tensor"):  # the whole tensor shares a gate
        return
    grads = [torch.zeros_like(p) for p in params]
    grads[0][:7] = opt.state[params[0]]["exp_avg"][:7]  # agrees with the momentum
    hand.give(params, grads)
    opt.step()
    assert bool((params[0][:7] != before[0][:7]).all()) and torch.equal(params[0][7:], before[0][7:])


@pytest.mark.parametrize("backend, device", TARGETS)
def test_lagged_gate_shuts_one_step_late(backend, device):
    """Gradients 1, 1, -1, -1: m g turns negative in step 3, so step 4 is the first without the old momentum."""
    p = torch.zeros(5, dtype=torch.float64, device=device).requires_grad_()
    opt = fca.FusedClipAdamW([p], lr=1.0, weight_decay=0.0, eps=0.0, overshoot=LAGGED, backend=backend)
    m = v = 0.0
    for t, (g, k) in enumerate(((1.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (-1.0, 0.0)), start=1):
        before = float(p.detach()[0])
        hand.give([p], [torch.full_like(p, g)])
        opt.step()
        d = k * 0.9 * m + 0.1 * g
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = d / (1 - 0.9**t) / math.sqrt(v / (1 - 0.999**t))
        assert float(p[0]) - before == pytest.approx(-u, rel=1e-12), f"step {t}"


# ---------------------------------------------------------------- groups, dtypes, threads


GROUPS = {  # each would be another run's whole optimizer
    "spikes": dict(grad_clip=SPIKE),
    "AdaClip and AdaGN": dict(grad_clip=fca.StableSpamClip(total_steps=20)),
    "AGC": dict(grad_clip=fca.AGC(0.05)),
    "StableAdamW": dict(grad_clip=fca.UpdateRMS()),
    "lagged": dict(overshoot=LAGGED),
    "rescaled": dict(overshoot=RESCALED),
    "median": dict(overshoot=fca.MedianMomentum(0.2)),
    "periodic": dict(reset=fca.Periodic(every=4, warmup=2)),
    "when clipped": dict(reset=fca.WhenClipped(0.5)),
    "late": dict(reset=fca.Periodic(every=3, warmup=0, late=True), amsgrad=True),
    "plain": {},
}
ORDER = (torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float64)  # within one group


def train_groups(backend: str, device: str, groups: list[dict], alone: int | None = None) -> list[list]:
    """Every group over tensors of its own, of ORDER's dtypes; returns what a step writes, by group."""
    params, options = [], []
    for index, own in enumerate(groups):
        start = [p.to(dtype) for p, dtype in zip(hand.make_start(seed=index), ORDER)]
        params.append([p.to(device).requires_grad_() for p in start])
        if alone in (None, index):
            options.append({"params": params[-1], **own})
    opt = fca.FusedClipAdamW(options, lr=0.1, backend=backend)
    for at in range(8):
        for index, own in enumerate(params):
            grads = hand.make_grads(seed=10 + index)[at]
            hand.give(own, [None if (at + i + index) % 4 == 1 else g.to(p.dtype)
                            for i, (p, g) in enumerate(zip(own, grads))])  # fmt: skip
        opt.observe(hand.observed(hand.suppressed(at), device))
        opt.step()
    return [results(opt, own) for own in params]


@pytest.mark.parametrize("backend, device", TARGETS)
def test_groups_side_by_side_are_each_alone(backend, device):
    """Bit for bit, with parameters of several dtypes in turn, some of which have no gradient in some steps."""
    together = train_groups(backend, device, list(GROUPS.values()))
    for index, name in enumerate(GROUPS):
        alone = train_groups(backend, device, list(GROUPS.values()), alone=index)
        assert bitwise_equal(together[index], alone[index]), name


BY_TENSORS = {
    "AdaClip and AdaGN": (dict(grad_clip=fca.StableSpamClip()), dict(stable=stable())),
    "AGC, StableAdamW": (dict(grad_clip=(fca.AGC(0.05), fca.UpdateRMS())), dict(agc=row_clip, update_rms=True)),
    "StableAdamW": (dict(grad_clip=fca.UpdateRMS()), dict(update_rms=True)),
    "AGC": (dict(grad_clip=fca.AGC(0.05)), dict(agc=row_clip)),
    "lagged": (dict(overshoot=LAGGED), dict(align="lag")),
    "align tensor": (dict(overshoot=BY_TENSOR), dict(align="tensor")),
    "rescaled": (dict(overshoot=RESCALED), dict(rescale=True)),
}


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("name", BY_TENSORS)
def test_rule_of_a_tensor_finds_it_among_dtypes(backend, device, name):
    """Kernels see one dtype after the other, and only tensors with a gradient; rules see the order of the group."""
    options, by_hand = BY_TENSORS[name]
    start, steps = [p.to(dtype) for p, dtype in zip(hand.make_start(), ORDER)], 8
    params = [p.to(device, copy=True).requires_grad_() for p in start]
    opt = fca.FusedClipAdamW(params, lr=0.1, weight_decay=0.1, backend=backend, **options)
    expected = hand.ByHand([p.double().numpy() for p in start], **by_hand)
    for at, now in enumerate(hand.make_grads(steps=steps)):
        own = [None if (at + i) % 4 == 1 else g.to(dtype) for i, (g, dtype) in enumerate(zip(now, ORDER))]
        hand.give(params, own)
        opt.step()
        expected.step([None if g is None else g.double().numpy() for g in own])
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, tolerance(torch.float32, steps))):
        for i, p in enumerate(params):
            if p.dtype == dtype:
                assert largest_error([p.detach().cpu()], [torch.as_tensor(expected.p[i])]) <= bound, (i, dtype)


@pytest.mark.parametrize("backend, device", HOSTS)
def test_metric_is_of_all_gradients(backend, device):
    """A group without the rule counts in the sum, and is not scaled by it."""
    start, grads = hand.make_start(), hand.make_grads(steps=5)
    params = [p.clone().requires_grad_() for p in start]
    groups = [{"params": params[:2], "grad_clip": fca.InducedMetric()}, {"params": params[2:], "lr": 0.2}]
    opt = fca.FusedClipAdamW(groups, lr=0.1, weight_decay=0.1, backend=backend)
    whole = hand.ByHand([p.numpy() for p in start], metric=(0.1, 0.1))
    plain = hand.ByHand([p.numpy() for p in start], lr=0.2)
    for now in grads:
        hand.give(params, now)
        opt.step()
        for by_hand in (whole, plain):
            by_hand.step([g.numpy() for g in now])
    expected = [torch.as_tensor(x) for x in (*whole.p[:2], *plain.p[2:])]
    assert largest_error([p.detach() for p in params], expected) <= 1e-14


@pytest.mark.parametrize("backend, device", [target for target in HOSTS if target[0] == "cpu"])
@pytest.mark.parametrize("name", (*OVERSHOOT, *TOGETHER))
def test_runs_are_bitwise_repeatable_on_any_number_of_threads(backend, device, name):
    shapes, (options, _) = ((70_001,), (257, 300), ()), {**OVERSHOOT, **TOGETHER}[name]

    def train(threads: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = [p.requires_grad_() for p in hand.make_start(torch.float32, shapes)]
            opt = fca.FusedClipAdamW(params, lr=0.1, backend=backend, **options)
            for at, now in enumerate(hand.make_grads(torch.float32, 3, shapes)):
                hand.give(params, now)
                opt.observe(hand.observed(hand.suppressed(at), device))
                opt.step()
            return results(opt, params)
        finally:
            torch.set_num_threads(before)

    first = train(1)
    assert bitwise_equal(train(1), first) and bitwise_equal(train(2), first)
