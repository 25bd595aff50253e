"""Every method against its own published steps, written out one number at a time, on every backend there is here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import gpu_targets, largest_error, make_grads, tolerance

import fused_clip_adam as fca
from fused_clip_adam.backends import native

LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.999, 1e-8, 0.1
TARGETS = [("reference", "cpu"), *([] if native.unavailable() else [("cpu", "cpu")]), *gpu_targets().items()]
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
