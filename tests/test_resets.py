"""Resets against the specification, with every kind of rule that has to notice one."""

from __future__ import annotations

import math

import by_hand as hand
import pytest
import torch
from by_hand import EVERYWHERE, HOSTS, TARGETS
from cases import bitwise_equal, results

import fused_clip_adam as fca

PERIODIC = fca.Periodic(every=5, warmup=3)
SPIKE = fca.SpikeClip(theta=3.0, start=2)
LAGGED = fca.AlignedMomentum(block="tensor", lag=True)
periodic, spike = (5, 3, True, True, False), (3.0, 2, False)

RESETS = {  # keywords of the optimizer, and of hand.ByHand
    "periodic": (dict(reset=PERIODIC), dict(periodic=periodic)),
    "every step": (dict(reset=fca.Periodic(every=1, warmup=2)), dict(periodic=(1, 2, True, True, False))),
    "a warm-up that is cut off": (
        dict(reset=fca.Periodic(every=4, warmup=9)),
        dict(periodic=(4, 9, True, True, False)),
    ),
    "moments": (dict(reset=fca.Periodic(every=5, warmup=3, counters=False)), dict(periodic=(5, 3, True, False, False))),
    "counters": (dict(reset=fca.Periodic(every=5, warmup=0, moments=False)), dict(periodic=(5, 0, False, True, False))),
    "late": (dict(reset=fca.Periodic(every=5, warmup=3, late=True)), dict(periodic=(5, 3, True, True, True))),
    "when clipped": (dict(reset=fca.WhenClipped(0.3)), dict(when_clipped=(0.3, True, True))),
    "when clipped, at the threshold": (dict(reset=fca.WhenClipped(0.625)), dict(when_clipped=(0.625, True, True))),
    "when clipped, never": (dict(reset=fca.WhenClipped(1.0)), dict(when_clipped=(1.0, True, True))),
    "when clipped, counters": (dict(reset=fca.WhenClipped(0.0, moments=False)), dict(when_clipped=(0.0, False, True))),
}

TOGETHER = {
    "amsgrad": (dict(reset=PERIODIC, amsgrad=True), dict(periodic=periodic, amsgrad=True)),
    "late, amsgrad": (
        dict(reset=fca.Periodic(every=5, warmup=0, late=True), amsgrad=True),
        dict(periodic=(5, 0, True, True, True), amsgrad=True),
    ),
    "align tensor": (dict(reset=PERIODIC, overshoot="align-tensor"), dict(periodic=periodic, align="tensor")),
    "align lagged": (dict(reset=PERIODIC, overshoot=LAGGED), dict(periodic=periodic, align="lag")),
    "align 7": (dict(reset=PERIODIC, overshoot=fca.AlignedMomentum(block=7)), dict(periodic=periodic, align=7)),
    "C-AdamW, rescaled": (
        dict(reset=PERIODIC, overshoot=fca.Cautious(rescale=True)),
        dict(periodic=periodic, rescale=True),
    ),
    "median": (dict(reset=PERIODIC, overshoot=fca.MedianMomentum(0.2)), dict(periodic=periodic, median=0.2)),
    "brake": (
        dict(reset=PERIODIC, overshoot=fca.MomentumBrake(0.7, hold_v=0.3)),
        dict(periodic=periodic, brake=(0.7, "renormalise", 0.3)),
    ),
    "damp": (
        dict(reset=fca.Periodic(every=5, warmup=0, moments=False), overshoot=fca.MomentumBrake(0.7, mode="damp")),
        dict(periodic=(5, 0, False, True, False), brake=(0.7, "damp", 0.0)),
    ),
    "StableAdamW": (dict(reset=PERIODIC, grad_clip=fca.UpdateRMS()), dict(periodic=periodic, update_rms=True)),
    "induced metric": (
        dict(reset=PERIODIC, grad_clip=fca.InducedMetric()),
        dict(periodic=periodic, metric=(0.1, 0.1)),
    ),
    "norm and spikes": (
        dict(reset=PERIODIC, grad_clip=(1.0, SPIKE)),
        dict(periodic=periodic, max_norm=1.0, spike=spike),
    ),
    "spikes, when clipped": (
        dict(reset=fca.WhenClipped(0.7), grad_clip=SPIKE),
        dict(when_clipped=(0.7, True, True), spike=spike),
    ),
    "spikes, counters when clipped": (  # v is kept, and the rule has no reason to wait
        dict(reset=fca.WhenClipped(0.3, moments=False), grad_clip=SPIKE),
        dict(when_clipped=(0.3, False, True), spike=spike),
    ),
    "brake, when clipped": (
        dict(reset=fca.WhenClipped(0.7), overshoot=("brake", fca.UpdateClamp(0.5))),
        dict(when_clipped=(0.7, True, True), brake=(0.5, "renormalise", 0.0), clamp=0.5),
    ),
}


@pytest.mark.parametrize("backend, device, dtype", EVERYWHERE)
@pytest.mark.parametrize("name", (*RESETS, *TOGETHER))
def test_reset_is_the_specifications(backend, device, dtype, name):
    options, by_hand = {**RESETS, **TOGETHER}[name]
    hand.compare(backend, device, dtype, options, by_hand, observe="when" in name or "brake" in by_hand)


ROLLOUTS = {  # the rule, what it resets, more keywords of the optimizer and of hand.ByHand
    "Adam-Rel": (fca.presets.adam_rel()["reset"], (False, True), {}, {}),
    "Asadi et al.": (fca.OnRollout(moments=True), (True, True), {}, {}),
    "moments": (fca.OnRollout(moments=True, counters=False), (True, False), dict(amsgrad=True), dict(amsgrad=True)),
    "Adam-Rel, brake": (
        fca.OnRollout(),
        (False, True),
        dict(overshoot=fca.MomentumBrake(0.7)),
        dict(brake=(0.7, "renormalise", 0.0)),
    ),
    "Asadi et al., spikes": (fca.OnRollout(moments=True), (True, True), dict(grad_clip=SPIKE), dict(spike=spike)),
    "Adam-Rel, spikes": (fca.OnRollout(), (False, True), dict(grad_clip=SPIKE), dict(spike=spike)),
}


@pytest.mark.parametrize("backend, device, dtype", EVERYWHERE)
@pytest.mark.parametrize("name", ROLLOUTS)
def test_new_rollout_is_the_specifications(backend, device, dtype, name):
    rule, forgotten, options, by_hand = ROLLOUTS[name]
    observe = "brake" in by_hand
    hand.compare(
        backend, device, dtype, dict(reset=rule, **options), by_hand, observe=observe, rollouts=(4, *forgotten)
    )


@pytest.mark.parametrize("backend, device", TARGETS)
def test_update_grows_back_over_the_warmup(backend, device):
    """One number a step: gradients of 1 make u = 1, so what moves is phi; decay is not scaled by it."""
    p = torch.zeros(3, dtype=torch.float64, device=device).requires_grad_()
    rule = fca.Periodic(every=6, warmup=4)
    opt = fca.FusedClipAdamW([p], lr=0.5, eps=0.0, weight_decay=0.2, reset=rule, backend=backend)
    for t in range(1, 15):
        with torch.no_grad():
            p.fill_(1.0)
        hand.give([p], [torch.ones_like(p)])
        opt.step()
        s = t % 6 if t >= 6 else math.inf
        phi = 1 - 0.99 * (1 + math.cos(math.pi * s / 5)) / 2 if s < 4 else 1.0
        assert p.tolist() == pytest.approx([1 - 0.5 * 0.2 - 0.5 * phi] * 3, rel=1e-13), f"step {t}"


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("why", ("found_inf", "not finite", "zero gradients and lr 0"))
def test_step_that_is_none_does_not_count(backend, device, why):
    """The reset is due in the third step that is one, whether the skipped come before it or in its place."""
    p = torch.ones(3, dtype=torch.float64, device=device).requires_grad_()
    opt = fca.FusedClipAdamW([p], reset=fca.Periodic(every=3, warmup=0), skip_nonfinite=True, backend=backend)
    for real in range(1, 8):
        for _ in range(2):
            lr, size = opt.param_groups[0]["lr"], 1.0
            if why == "found_inf":
                opt.found_inf = torch.ones((), device=device)
            elif why == "not finite":
                size = math.inf
            else:
                size = opt.param_groups[0]["lr"] = 0.0
            hand.give([p], [torch.full_like(p, size)])
            opt.step()
            opt.found_inf = torch.zeros((), device=device)
            opt.param_groups[0]["lr"] = lr
        hand.give([p], [torch.ones_like(p)])
        opt.step()
        was_reset = float(opt.state[p]["step"]) == 1 + 2 * (real == 1) * (why == "zero gradients and lr 0")
        assert was_reset == (real in (1, 3, 6)), real
        assert (abs(float(opt.state[p]["exp_avg"][0]) - 0.1) < 1e-15) == (real in (1, 3, 6)), real


@pytest.mark.parametrize("backend, device", TARGETS)
def test_nothing_observed_resets_nothing(backend, device):
    """And what was observed counts for one step."""
    params = [p.to(device).requires_grad_() for p in hand.make_start()]
    opt = fca.FusedClipAdamW(params, reset=fca.WhenClipped(0.0), backend=backend)
    counts = []
    for at, now in enumerate(hand.make_grads(steps=5)):
        if at in (2, 3):
            opt.observe(hand.observed(0.0 if at == 2 else 1e-3, device))
        hand.give(params, now)
        opt.step()
        counts.append(float(opt.state[params[0]]["step"]))
    assert counts == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("backend, device", TARGETS)
def test_micro_batches_reset_by_their_sum(backend, device):
    """1 of 1 and 0 of 3 are a quarter of the mass: c = 1 / 4, not 1 and not a mean of shares."""
    for threshold, expected in ((0.24, 1), (0.26, 2)):
        p = torch.ones(3, device=device).requires_grad_()
        opt = fca.FusedClipAdamW([p], reset=fca.WhenClipped(threshold), backend=backend)
        for at in range(2):
            for suppressed, total in ((1.0, 1.0), (0.0, 3.0)) if at else ():
                buffer = torch.zeros(14, device=device)
                buffer[4], buffer[5] = suppressed, total
                opt.observe(fca.ClipStats(buffer))
            hand.give([p], [torch.ones_like(p)])
            opt.step()
        assert float(opt.state[p]["step"]) == expected


@pytest.mark.parametrize("backend, device", HOSTS)
def test_scheduled_and_called_resets_are_the_same(backend, device):
    """`reset_momentum()` before step 3 is `Periodic` in step 3, to the bit; spikes wait after both."""
    start, grads = hand.make_start(torch.float32), hand.make_grads(torch.float32, 5)
    out = []
    for rule in (fca.Periodic(every=3, warmup=0), None):
        params = [p.clone().requires_grad_() for p in start]
        opt = fca.FusedClipAdamW(params, lr=0.1, grad_clip=SPIKE, reset=rule, backend=backend)
        for at, now in enumerate(grads):
            if rule is None and at == 2:
                opt.reset_momentum()
            hand.give(params, now)
            opt.step()
        out.append(results(opt, params))
    assert bitwise_equal(*out)
