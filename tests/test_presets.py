"""Published methods: their numbers as published, their known faults, and that the defaults are free of those."""

from __future__ import annotations

import math

import by_hand as hand
import numpy as np
import pytest
import torch
from by_hand import EVERYWHERE, HOSTS, TARGETS
from cases import largest_error, tolerance

import fused_clip_adam as fca
from fused_clip_adam import presets

SPIKE = (3.0, 2, False)


def spam(parity: bool) -> tuple[dict, dict]:
    """With numbers that let everything happen within a few steps."""
    options = {**presets.spam(5, 3, parity=parity), "grad_clip": fca.SpikeClip(3.0, 2, freeze_zero=parity)}
    by_hand = dict(eps=1e-6, eps_before_correction=True, decay_after_update=True)
    return options, {**by_hand, "spike": (3.0, 2, parity), "periodic": (5, 3, True, not parity, False)}


def stable_spam(parity: bool, total_steps: int | None) -> tuple[dict, dict]:
    by_hand = dict(stable=(0.7, 0.9, 0.999, 1e-8, total_steps, parity), periodic=(5, 0, True, True, parity))
    return presets.stable_spam(5, total_steps, parity=parity), by_hand


PRESETS = {  # keywords of the optimizer, and of hand.ByHand
    "SPAM": spam(False),
    "SPAM, as published": spam(True),
    "SPAM, clamped": ({**spam(False)[0], "overshoot": fca.UpdateClamp(0.6)}, {**spam(False)[1], "clamp": 0.6}),
    "Stable-SPAM": stable_spam(False, None),
    "Stable-SPAM, as published": stable_spam(True, None),
    "Stable-SPAM over 20 steps": stable_spam(False, 20),
    "Stable-SPAM over 20 steps, as published": stable_spam(True, 20),
    "StableAdamW": (presets.stable_adamw(), dict(betas=(0.9, 0.99), eps=1e-6, update_rms=True)),
    "AGC": (presets.agc(), dict(agc=(0.01, 1e-3))),
    "C-AdamW": (presets.cautious(), dict(cautious=True)),
    "C-AdamW, as published": (presets.cautious(parity=True), dict(rescale=True)),
}


@pytest.mark.parametrize("backend, device, dtype", EVERYWHERE)
@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_specifications(backend, device, dtype, name):
    hand.compare(backend, device, dtype, *PRESETS[name])


def test_presets_have_the_published_numbers():
    """Those a run of a few steps does not show."""
    assert presets.spam()["grad_clip"] == fca.SpikeClip(theta=5000.0, start=20, freeze_zero=False)
    assert presets.spam()["reset"] == fca.Periodic(every=500, warmup=150, moments=True, counters=True, late=False)
    assert presets.spam()["betas"] == (0.9, 0.999) and presets.spam()["eps"] == 1e-6
    clip = fca.StableSpamClip(gamma1=0.7, gamma2=0.9, theta=0.999, total_steps=None, shared_counter=False)
    assert presets.stable_spam()["grad_clip"] == clip
    assert presets.stable_spam()["reset"] == fca.Periodic(every=1000, warmup=0)
    assert presets.adam_rel() == {"reset": fca.OnRollout(moments=False, counters=True)}
    assert presets.autoclip() == {"grad_clip": fca.AutoClip(percentile=10.0, history=None)}
    zclip = fca.ZClip(alpha=0.97, z_threshold=2.5, max_norm=1.0, warmup=25, mode="adaptive", clip_factor=1.0, eps=1e-6)
    assert presets.zclip() == {"grad_clip": zclip}
    assert presets.zclip(mode="mean") == {"grad_clip": fca.ZClip(mode="mean")}
    assert presets.adagc() == {"grad_clip": fca.AdaGC(ratio=1.04, beta=0.99, start=100, eps=1e-8)}
    assert presets.componentwise_clip(0.5) == {"grad_clip": fca.PerTensorNorm(0.5)}
    assert fca.InducedMetric() == fca.InducedMetric(xi=0.1, beta=0.1)


@pytest.mark.parametrize("name", presets.__all__)
def test_every_preset_trains(name):
    p = torch.ones(5, 4, requires_grad=True)
    opt = fca.FusedClipAdamW([p], lr=0.03, **getattr(presets, name)())
    for _ in range(100):
        opt.zero_grad()
        p.square().sum().backward()
        opt.step()
        opt.new_rollout()
    assert float(p.detach().abs().max()) < 0.9


# ---------------------------------------------------------------- golden numbers


def moves(backend: str, options: dict, grads, numel: int = 1) -> np.ndarray:
    """What each step, with lr 1 and no decay, subtracts from every element: [steps, numel]."""
    p = torch.zeros(numel, dtype=torch.float64).requires_grad_()
    opt = fca.FusedClipAdamW([p], lr=1.0, weight_decay=0.0, backend=backend, **options)
    out = []
    for g in grads:
        with torch.no_grad():
            p.zero_()
        p.grad = torch.as_tensor(g, dtype=torch.float64).expand(numel).clone()
        opt.step()
        out.append(-p.detach().numpy().copy())
    return np.array(out)


@pytest.mark.parametrize("backend, device", HOSTS)
def test_spam_as_published_overshoots_after_a_reset(backend, device):
    """1.87 lr, 138 steps after the reset in step 500, and the default never goes beyond 1."""
    u = moves(backend, presets.spam(parity=True), [1.0] * 700)[:, 0]
    assert int(u.argmax()) + 1 == 500 + 138 and u.max() == pytest.approx(1.872, abs=5e-4)
    assert u[:499].max() <= 1.0
    u = moves(backend, presets.spam(), [1.0] * 700)[:, 0]
    assert u.max() <= 1.0 + 1e-12 and u[499] == pytest.approx(0.01, rel=1e-3) and u[660] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("backend, device", HOSTS)
def test_spam_as_published_freezes_what_had_no_gradient(backend, device):
    """Element 1 sees its first gradient 25 steps after a reset: v = 0, and theta v = 0 is all that it may be."""
    grads = [np.array([1.0, 1.0 if not 40 <= t < 65 else 0.0]) for t in range(1, 100)]
    frozen = moves(backend, presets.spam(40, 0, parity=True), grads, 2)
    free = moves(backend, presets.spam(40, 0), grads, 2)
    assert (frozen[64:79, 1] == 0).all() and (frozen[79:, 1] > 0.01).all()  # until the next reset, in step 80
    assert (free[64:, 1] > 0.1).all() and (frozen[39:, 0] > 0.1).all()


@pytest.mark.parametrize("backend, device", HOSTS)
def test_spam_clips_spikes_from_step_20_and_20_steps_after_a_reset(backend, device):
    """The first moment shows what is left of a spike of 1e4: sqrt(5000 v), v = 1 - .999^k."""
    for at, clipped in ((19, False), (20, True), (59, False), (60, True)):
        p = torch.zeros(1, dtype=torch.float64).requires_grad_()
        opt = fca.FusedClipAdamW([p], backend=backend, **presets.spam(40, 0))
        for t in range(1, at + 1):
            before = float(opt.state[p]["exp_avg"]) if t > 1 else 0.0
            p.grad = torch.full_like(p, -1e4 if t == at else -1.0)
            opt.step()
        left = (float(opt.state[p]["exp_avg"]) - 0.9 * before) / 0.1
        seen = at - 1 if at < 40 else at - 40
        assert left == pytest.approx(-math.sqrt(5000 * (1 - 0.999**seen)) if clipped else -1e4, rel=1e-9), at


@pytest.mark.parametrize("backend, device", HOSTS)
def test_stable_spam_as_published_updates_with_old_moments(backend, device):
    u = moves(backend, presets.stable_spam(500, parity=True), [1.0] * 503)[499:, 0]
    assert u == pytest.approx([0.504, 0.744, 0.856, 0.906], abs=5e-4)
    u = moves(backend, presets.stable_spam(500), [1.0] * 503)[:, 0]
    # AdaGN's c is 1 while the norm stays, so every update is.
    assert u == pytest.approx(np.ones(503), abs=1e-6)


@pytest.mark.parametrize("backend, device", HOSTS)
@pytest.mark.parametrize("parity, passes", ((True, 116.68), (False, 6.898)))
def test_stable_spam_as_published_lets_a_spike_pass(backend, device, parity, passes):
    """Gradients of 1, gap 50, one element of 300 in step 52: two steps after a reset, whose counter is at 3.

    M = .999 (1 - .999^51) + .001 300 = .34970, and tau is M / (1 - .999^3) = 116.7, or M / (1 - .999^52) = 6.9 where
    AdaClip has a counter of its own. AdaGN scales all elements alike: the ratio of the two in g is tau.
    """
    p = torch.zeros(2, dtype=torch.float64).requires_grad_()
    opt = fca.FusedClipAdamW([p], backend=backend, **presets.stable_spam(50, parity=parity))
    for t in range(1, 53):
        before = opt.state[p]["exp_avg"].clone() if t > 1 else torch.zeros(2)
        p.grad = torch.tensor([1.0, 300.0 if t == 52 else 1.0], dtype=torch.float64)
        opt.step()
    g = opt.state[p]["exp_avg"] - 0.9 * before
    M = 0.999 * (1 - 0.999**51) + 0.001 * 300
    assert float(g[1] / g[0]) == pytest.approx(M / (1 - 0.999 ** (3 if parity else 52)), rel=1e-10)
    assert float(g[1] / g[0]) == pytest.approx(passes, rel=1e-3)


@pytest.mark.parametrize("backend, device", TARGETS)
def test_rescaled_mask_multiplies_what_little_there_is(backend, device):
    """1% of the gradients are not zero: kappa = 100, and no more than 1,000 however few there are."""
    for numel, some, kappa in ((1000, 10, 100.0), (4000, 1, 1000.0), (1000, 1000, 1.0), (1000, 0, None)):
        g = torch.zeros(numel, dtype=torch.float64, device=device)
        g[:some] = 1.0
        for parity in (False, True):
            p = torch.zeros_like(g).requires_grad_()
            options = dict(lr=1.0, weight_decay=0.0, eps=0.0 if some == numel else 1e-12, backend=backend)
            opt = fca.FusedClipAdamW([p], **options, **presets.cautious(parity=parity))
            hand.give([p], [g])
            opt.step()
            assert bool((p[some:] == 0).all())
            assert p[:some].tolist() == pytest.approx([-(kappa or 0.0) if parity else -1.0] * some, rel=1e-9)


# ---------------------------------------------------------------- FAdam


FADAM = {  # keywords of both
    "defaults": {},
    "other numbers": dict(betas=(0.8, 0.95), eps=0.05, weight_decay=0.3, clip=0.5),
    "a large clip": dict(clip=3.0, weight_decay=0.02),
    "clipped first": dict(grad_clip=0.3),
    "maximize": dict(maximize=True),
}


def as_by_hand(options: dict) -> dict:
    names = {"weight_decay": "decay", "grad_clip": "max_norm"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("backend, device, dtype", EVERYWHERE)
@pytest.mark.parametrize("name", FADAM)
@pytest.mark.parametrize("shape", ((61,), (7, 5), (1,)))
def test_fadam_is_its_published_steps(backend, device, dtype, name, shape):
    """One tensor at a time, since the global norm is then its own. No zero steps: base = eps makes p / base of them."""
    steps = 6
    (start,) = hand.make_start(dtype, (shape,))
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(shape, generator=generator).to(dtype) * (30.0 if at == 3 else 1.0) for at in range(steps)]
    if shape != (1,):
        grads[2].view(-1)[::2] = 0.0  # of single elements, f fades
    p = start.to(device, copy=True).requires_grad_()
    narrow = dtype == torch.bfloat16
    state_dtype = torch.float32 if narrow else None
    opt = fca.FusedFAdam([p], lr=0.1, backend=backend, state_dtype=state_dtype, **FADAM[name])
    # float64: 1 - beta2^2 = 2e-3 has lost nine bits, and its half unit is 5.5e-14 of f in step 2.
    bound = {torch.float64: 6e-14, torch.float32: tolerance(dtype, steps), torch.bfloat16: tolerance(dtype, 1)}[dtype]
    errors = hand.Errors()
    for at in range(1, steps + 1):
        hand.give([p], [grads[at - 1]])
        opt.step()
        wanted = hand.fadam(start.double().numpy(), [g.double().numpy() for g in grads[:at]], **as_by_hand(FADAM[name]))
        got = (p, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"])
        for key, x, y in zip("pmf", got, wanted):
            errors.add(key, x, y)
        assert errors.worst <= bound, f"step {at}: {errors.worst:.2e} > {bound:.2e}"


@pytest.mark.parametrize("backend, device", TARGETS)
def test_fadam_of_several_tensors_is_each_alone(backend, device):
    start, grads = hand.make_start(), hand.make_grads(steps=3)
    params = [p.to(device, copy=True).requires_grad_() for p in start]
    opt = fca.FusedFAdam(params, lr=0.1, backend=backend)
    for now in grads:
        hand.give(params, now)
        opt.step()
    for i, p in enumerate(params):
        expected, _, _ = hand.fadam(start[i].numpy(), [now[i].numpy() for now in grads])
        assert largest_error([p.detach().cpu()], [torch.as_tensor(expected)]) <= 6e-14


@pytest.mark.parametrize("backend, device", TARGETS)
def test_fadam_resets_and_skips(backend, device):
    """The first step after a reset takes f = g^2 whole. One that is not finite, or found_inf, changes nothing."""
    p = torch.ones(4, dtype=torch.float64, device=device).requires_grad_()
    opt = fca.FusedFAdam([p], reset=fca.OnRollout(moments=True), skip_nonfinite=True, backend=backend)
    for now in (1.0, 2.0):
        hand.give([p], [torch.full_like(p, now)])
        opt.step()
    before = [p.detach().clone(), *(x.clone() for x in opt.state[p].values())]
    hand.give([p], [torch.full_like(p, math.nan)])
    opt.step()
    hand.give([p], [torch.full_like(p, 1.0)])
    opt.found_inf = torch.ones((), device=device)
    opt.step()
    del opt.found_inf
    assert all(map(torch.equal, before, [p, *opt.state[p].values()]))
    opt.new_rollout()
    hand.give([p], [torch.full_like(p, 3.0)])
    opt.step()
    assert opt.state[p]["exp_avg_sq"].tolist() == pytest.approx([9.0] * 4, rel=1e-15)
    assert float(opt.step_count_skipped) == 2


@pytest.mark.parametrize("backend, device", TARGETS)
def test_fadam_does_not_see_the_loss_scale(backend, device):
    out = []
    for power in (1.0, 2.0**12):
        params = [p.to(device).requires_grad_() for p in hand.make_start()]
        opt = fca.FusedFAdam(params, lr=0.1, eps=0.1, grad_clip=2.0, backend=backend)
        opt.grad_scale = torch.full((), power, device=device)
        for now in hand.make_grads(steps=3):
            hand.give(params, [g * power for g in now])
            opt.step()
        out.append([p.detach() for p in params])
    assert all(torch.allclose(x, y, rtol=1e-13, atol=0) for x, y in zip(*out))


def test_fadam_resumes_and_is_itself_again(tmp_path):
    params, own = ([p.requires_grad_() for p in hand.make_start()] for _ in range(2))
    opt, other = fca.FusedFAdam(params, lr=0.1, clip=0.5), fca.FusedFAdam(own, lr=0.3)
    grads = hand.make_grads(steps=4)
    for now in grads[:2]:
        hand.give(params, now)
        opt.step()
    torch.save(opt.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    with torch.no_grad():
        for p, q in zip(own, params):
            p.copy_(q)
    for now in grads[2:]:
        for o in (opt, other):
            hand.give(o.param_groups[0]["params"], now)
            o.step()
    assert all(map(torch.equal, params, own))


# ---------------------------------------------------------------- refused, and nothing has been changed


NAN, INF = float("nan"), float("inf")
NUMBERS = {
    "AGC, clipping 0": (lambda: fca.AGC(0.0), "clipping"),
    "AGC, eps 0": (lambda: fca.AGC(eps=0.0), "eps"),
    "AGC, NaN": (lambda: fca.AGC(NAN), "clipping"),
    "AGC, True": (lambda: fca.AGC(True), "clipping"),
    "SpikeClip, theta": (lambda: fca.SpikeClip(theta=-1.0), "theta"),
    "SpikeClip, infinite theta": (lambda: fca.SpikeClip(theta=INF), "theta"),
    "SpikeClip, start": (lambda: fca.SpikeClip(start=-1), "start"),
    "SpikeClip, half a step": (lambda: fca.SpikeClip(start=0.5), "start"),
    "SpikeClip, freeze_zero": (lambda: fca.SpikeClip(freeze_zero=1), "freeze_zero"),
    "StableSpamClip, gamma1": (lambda: fca.StableSpamClip(gamma1=1.0), "gamma1"),
    "StableSpamClip, gamma2": (lambda: fca.StableSpamClip(gamma2=-0.1), "gamma2"),
    "StableSpamClip, theta": (lambda: fca.StableSpamClip(theta=NAN), "theta"),
    "StableSpamClip, eps": (lambda: fca.StableSpamClip(eps=-1e-8), "eps"),
    "StableSpamClip, total_steps": (lambda: fca.StableSpamClip(total_steps=0), "total_steps"),
    "StableSpamClip, shared_counter": (lambda: fca.StableSpamClip(shared_counter="yes"), "shared_counter"),
    "InducedMetric, xi": (lambda: fca.InducedMetric(xi=0.0), "xi"),
    "InducedMetric, beta": (lambda: fca.InducedMetric(beta=1.0), "beta"),
    "align, lag without tensor": (lambda: fca.AlignedMomentum(block=1024, lag=True), "lag"),
    "align, lag": (lambda: fca.AlignedMomentum(block="tensor", lag=1), "lag"),
    "Cautious": (lambda: fca.Cautious(rescale=1.0), "rescale"),
    "MedianMomentum, 0": (lambda: fca.MedianMomentum(0.0), "tau"),
    "MedianMomentum, infinite": (lambda: fca.MedianMomentum(INF), "tau"),
    "Periodic, every": (lambda: fca.Periodic(every=0), "every"),
    "Periodic, every 1.5": (lambda: fca.Periodic(every=1.5), "every"),
    "Periodic, warmup": (lambda: fca.Periodic(warmup=-1), "warmup"),
    "Periodic, late": (lambda: fca.Periodic(late=0), "late"),
    "Periodic, nothing": (lambda: fca.Periodic(moments=False, counters=False), "moments"),
    "Periodic, moments": (lambda: fca.Periodic(moments=1), "moments"),
    "WhenClipped": (lambda: fca.WhenClipped(1.5), "threshold"),
    "WhenClipped, NaN": (lambda: fca.WhenClipped(NAN), "threshold"),
    "WhenClipped, nothing": (lambda: fca.WhenClipped(0.5, False, False), "moments"),
    "presets.spam": (lambda: presets.spam(every=0), "every"),
    "presets.stable_spam": (lambda: presets.stable_spam(total_steps=-5), "total_steps"),
    "FusedFAdam, clip": (lambda: fca.FusedFAdam([torch.ones(2, requires_grad=True)], clip=0.0), "clip"),
    "FusedFAdam, weight_decay": (
        lambda: fca.FusedFAdam([torch.ones(2, requires_grad=True)], weight_decay=-1.0),
        "decay",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused(name):
    make, said = NUMBERS[name]
    with pytest.raises((ValueError, TypeError), match=said):
        make()


MEDIAN, RMS = fca.MedianMomentum(0.1), fca.UpdateRMS()
FORBIDDEN = {  # keyword, value, the error
    "two rules of the gradient": ("grad_clip", (1.0, fca.AGC()), "gradient"),
    "two more": ("grad_clip", (fca.StableSpamClip(), fca.ZClip()), "gradient"),
    "two rules of elements": ("grad_clip", (fca.SpikeClip(), fca.SpikeClip(10.0)), "element"),
    "two rules of the update": ("grad_clip", (1.0, RMS, fca.InducedMetric()), "update"),
    "a name among clip rules": ("grad_clip", (1.0, "agc"), "grad_clip"),
    "median and align": ("overshoot", (MEDIAN, "align"), "beta1"),
    "align by tensor and median": ("overshoot", ("align-tensor", MEDIAN), "beta1"),
    "median and brake": ("overshoot", (MEDIAN, "brake"), "momentum"),
    "rescaled and clamped": ("overshoot", (fca.Cautious(rescale=True), fca.UpdateClamp(1.0)), "size"),
    "rescaled and aligned": ("overshoot", ("align", fca.Cautious(rescale=True)), "direction"),
    "a clip rule for a reset": ("reset", fca.SpikeClip(), "reset"),
    "two resets": ("reset", (fca.Periodic(), fca.OnRollout()), "reset"),
    "a reset for a clip": ("grad_clip", fca.Periodic(), "grad_clip"),
    "a number for a form": ("eps_before_correction", 1, "eps_before_correction"),
    "a name for a form": ("decay_after_update", "yes", "decay_after_update"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_rules_that_do_not_go_together_are_refused(name):
    """At construction, and in the step where a scheduler has set them: nothing has been changed then."""
    key, value, said = FORBIDDEN[name]
    p = torch.ones(3, requires_grad=True)
    with pytest.raises((ValueError, TypeError), match=said):
        fca.FusedClipAdamW([p], **{key: value})
    if key not in ("grad_clip", "overshoot", "reset"):
        return
    opt = fca.FusedClipAdamW([p], grad_clip=fca.SpikeClip(), reset=fca.Periodic())
    p.grad = torch.ones(3)
    opt.step()
    before = [p.detach().clone(), *(x.clone() for x in opt.state[p].values())]
    remembered = {k: v.clone() for own in opt._memory[0].values() for k, v in own["tensors"].items()}
    opt.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError), match=said):
        opt.step()
    assert all(map(torch.equal, before, [p, *opt.state[p].values()]))
    now = {k: v for own in opt._memory[0].values() for k, v in own["tensors"].items()}
    assert all(torch.equal(now[k], remembered[k]) for k in remembered)


@pytest.mark.parametrize(
    "group",
    (
        dict(grad_clip=fca.AGC()),
        dict(grad_clip=fca.SpikeClip()),
        dict(grad_clip=fca.StableSpamClip()),
        dict(grad_clip=(1.0, RMS)),
        dict(grad_clip=fca.InducedMetric()),
        dict(overshoot="cautious"),
        dict(overshoot=None),
        dict(amsgrad=True),
    ),
    ids=str,
)
def test_fadam_refuses_rules_of_another_update(group):
    p = torch.ones(3, requires_grad=True)
    opt = fca.FusedFAdam([p])
    p.grad = torch.ones(3)
    opt.step()
    before = [p.detach().clone(), *(x.clone() for x in opt.state[p].values())]
    opt.param_groups[0].update(group)
    with pytest.raises(ValueError, match="FusedFAdam"):
        opt.step()
    assert all(map(torch.equal, before, [p, *opt.state[p].values()]))
