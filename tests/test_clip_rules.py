"""Clip rules against their published steps, written out in Python floats; what they remember and what they must not."""

from __future__ import annotations

import copy
import io
import math
import pickle
import types

import by_hand as hand
import numpy as np
import pytest
import torch
from by_hand import EVERYWHERE, FAST_TARGETS, TARGETS
from cases import tolerance
from no_sync import NoSync

import fused_clip_adam as fca
from fused_clip_adam import backends
from fused_clip_adam.backends import scalars

SHAPES = ((40,), (7, 5), ())
STEPS = 12


def make_grads(seed: int = 0) -> list[list[torch.Tensor]]:
    """Gradients whose norms wander; spikes at steps 7 and 10, of one tensor and of all."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for step in range(STEPS):
        size = 0.1 * (1.0 + 0.3 * math.sin(step)) * (25.0 if step == 10 else 1.0)
        now = [size * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
        if step == 7:
            now[1] *= 40.0
        out.append(now)
    return out


# ---------------------------------------------------------------- the rules, by hand: (norm, norms) -> factor of each


class ByHand:
    def __init__(self, rule):
        self.rule, self.history, self.mean, self.variance = rule, [], None, None
        self.gamma, self.step = [math.inf] * len(SHAPES), 0

    def __call__(self, norm: float, norms: list[float]) -> list[float]:
        factor = getattr(self, type(self.rule).__name__)(norm, norms)
        self.step += 1
        return factor if isinstance(factor, list) else [factor] * len(norms)

    def PerTensorNorm(self, norm, norms):
        return [min(1.0, self.rule.max_norm / (n + 1e-6)) for n in norms]

    def AutoClip(self, norm, norms):
        self.history.append(norm)
        kept = self.history if self.rule.history is None else self.history[-self.rule.history :]
        return min(1.0, float(np.percentile(kept, self.rule.percentile)) / (norm + 1e-6))

    def ZClip(self, norm, norms):
        rule, most = self.rule, math.inf if self.rule.max_norm is None else self.rule.max_norm
        if self.mean is None:
            self.history.append(norm)
            if len(self.history) == rule.warmup:
                self.mean, self.variance = float(np.mean(self.history)), float(np.var(self.history))
            return most / (norm + 1e-6) if norm > most else 1.0
        sigma = math.sqrt(self.variance)
        z = (norm - self.mean) / (sigma + rule.eps)
        taken = norm
        if z > rule.z_threshold:
            taken = {
                "adaptive": rule.clip_factor * (self.mean + rule.z_threshold * sigma / (z / rule.z_threshold)),
                "mean": self.mean,
                "percentile": self.mean + rule.z_threshold * sigma,
            }[rule.mode]
        self.mean = rule.alpha * self.mean + (1 - rule.alpha) * taken
        self.variance = rule.alpha * self.variance + (1 - rule.alpha) * (taken - self.mean) ** 2
        effective = min(taken, most)
        return effective / (norm + 1e-6) if norm > effective else 1.0

    def AdaGC(self, norm, norms):
        rule = self.rule
        if self.step < rule.start:
            self.gamma = [min(gamma, n) for gamma, n in zip(self.gamma, norms)]
            return [min(1.0, rule.max_norm / (norm + rule.eps))] * len(norms)
        out = []
        for i, n in enumerate(norms):
            limit = rule.ratio * self.gamma[i]
            out.append(limit / (n + rule.eps) if n > limit else 1.0)
            self.gamma[i] = rule.beta * self.gamma[i] + (1 - rule.beta) * min(n, limit)
        return out


RULES = {
    "per tensor": fca.PerTensorNorm(0.5),
    "AutoClip": fca.AutoClip(),
    "AutoClip of 4, median": fca.AutoClip(50.0, history=4),
    "ZClip": fca.ZClip(warmup=5),
    "ZClip, to the mean": fca.ZClip(warmup=5, mode="mean", max_norm=None, alpha=0.9),
    "ZClip, to the threshold": fca.ZClip(warmup=1, mode="percentile", z_threshold=1.0, max_norm=0.9),
    "AdaGC": fca.AdaGC(start=4, max_norm=0.9),
}


def norms_of(grads: list[torch.Tensor]) -> tuple[float, list[float]]:
    squares = [math.fsum(float(x) ** 2 for x in g.reshape(-1).tolist()) for g in grads]
    return math.sqrt(math.fsum(squares)), [math.sqrt(x) for x in squares]


def make(backend: str, device: str, clip, dtype=torch.float64, **options):
    params = [torch.zeros(s, dtype=dtype, device=device).requires_grad_() for s in SHAPES]
    return fca.FusedClipAdamW(params, lr=0.01, grad_clip=clip, backend=backend, **options), params


def step(opt, params, grads, factors=None) -> None:
    for i, (p, g) in enumerate(zip(params, grads)):
        p.grad = (g if factors is None else g * factors[i]).to(p.device, p.dtype)
    opt.step()


def moments(opt, params) -> list[torch.Tensor]:
    return [opt.state[p]["exp_avg"].to("cpu", torch.float64, copy=True) for p in params]


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype, bound", ((torch.float64, 1e-13), (torch.float32, tolerance(torch.float32, STEPS))))
def test_rule_is_its_published_steps(backend, device, name, dtype, bound):
    """The first moment is linear in what the update reads of the gradients, so it shows every factor."""
    opt, params = make(backend, device, RULES[name], dtype)
    plain, own = make("reference", "cpu", None)
    by_hand, scaled, sizes = ByHand(RULES[name]), 0, [0.0] * len(SHAPES)
    for grads in make_grads():
        factors = by_hand(*norms_of(grads))
        scaled += any(factor != 1.0 for factor in factors)
        step(opt, params, grads)
        step(plain, own, grads, factors)
        for i, (x, y) in enumerate(zip(moments(opt, params), moments(plain, own))):
            sizes[i] = max(sizes[i], float(y.abs().amax()))  # roundings of a large moment outlive it
            assert bool(((x - y).abs() <= bound * sizes[i]).all())
    assert scaled >= 2, "a test in which nothing was clipped shows nothing"


@pytest.mark.parametrize("backend, device", TARGETS)
def test_spike_of_one_tensor_is_that_tensors(backend, device):
    opt, params = make(backend, device, fca.AdaGC(start=2, max_norm=100.0))
    grads = make_grads()
    for now in grads[:7]:
        step(opt, params, now)
    before = moments(opt, params)
    step(opt, params, grads[7])
    factors = [float(((x - 0.9 * y) / (0.1 * g)).mean()) for x, y, g in zip(moments(opt, params), before, grads[7])]
    assert factors[1] < 0.1 and min(factors[0], factors[2]) > 0.3, factors


# ---------------------------------------------------------------- rules that see more than norms, by hand


SPIKE = fca.SpikeClip(theta=3.0, start=2)


def stable(total_steps: int | None = None, **changed: float) -> tuple:
    own = {"gamma1": 0.7, "gamma2": 0.9, "theta": 0.999, "eps": 1e-8, **changed}
    return (*own.values(), total_steps, False)


SPECIFIED = {  # grad_clip, more keywords of the optimizer, and of hand.ByHand
    "AGC": (fca.AGC(), {}, dict(agc=(0.01, 1e-3))),
    "AGC of tiny rows": (fca.AGC(0.2, eps=30.0), {}, dict(agc=(0.2, 30.0))),
    "AGC, maximize": (fca.AGC(0.05), dict(maximize=True), dict(agc=(0.05, 1e-3), maximize=True)),
    "spikes": (SPIKE, {}, dict(spike=(3.0, 2, False))),
    "spikes, from the first step": (fca.SpikeClip(theta=1.0, start=0), {}, dict(spike=(1.0, 0, False))),
    "spikes, frozen": (fca.SpikeClip(theta=3.0, start=2, freeze_zero=True), {}, dict(spike=(3.0, 2, True))),
    "AdaClip and AdaGN": (fca.StableSpamClip(), {}, dict(stable=stable())),
    "AdaClip and AdaGN over 20 steps": (fca.StableSpamClip(total_steps=20), {}, dict(stable=stable(20))),
    "AdaClip and AdaGN, other numbers": (
        fca.StableSpamClip(gamma1=0.5, gamma2=0.8, theta=0.6, eps=1e-2),
        {},
        dict(stable=stable(gamma1=0.5, gamma2=0.8, theta=0.6, eps=1e-2)),
    ),
    "StableAdamW": (fca.UpdateRMS(), {}, dict(update_rms=True)),
    "StableAdamW, its eps": (fca.UpdateRMS(), dict(eps=0.5), dict(update_rms=True, eps=0.5)),
    "StableAdamW, late decay": (
        fca.UpdateRMS(),
        dict(decay_after_update=True),
        dict(update_rms=True, decay_after_update=True),
    ),
    "induced metric": (fca.InducedMetric(), {}, dict(metric=(0.1, 0.1))),
    "induced metric, slow": (fca.InducedMetric(xi=0.01, beta=0.9), dict(eps=0.1), dict(metric=(0.01, 0.9), eps=0.1)),
    "norm, spikes": ((1.0, SPIKE), {}, dict(max_norm=1.0, spike=(3.0, 2, False))),
    "norm, StableAdamW": ((1.0, fca.UpdateRMS()), {}, dict(max_norm=1.0, update_rms=True)),
    "norm, spikes, StableAdamW": (
        (1.0, SPIKE, fca.UpdateRMS()),
        {},
        dict(max_norm=1.0, spike=(3.0, 2, False), update_rms=True),
    ),
    "spikes, induced metric": ((SPIKE, fca.InducedMetric()), {}, dict(spike=(3.0, 2, False), metric=(0.1, 0.1))),
    "AGC, spikes": ((fca.AGC(0.05), SPIKE), {}, dict(agc=(0.05, 1e-3), spike=(3.0, 2, False))),
    "AGC, StableAdamW": ((fca.AGC(0.05), fca.UpdateRMS()), {}, dict(agc=(0.05, 1e-3), update_rms=True)),
    "AGC, induced metric": ((fca.InducedMetric(), fca.AGC(0.05)), {}, dict(agc=(0.05, 1e-3), metric=(0.1, 0.1))),
    "AdaClip and AdaGN, StableAdamW": (
        (fca.StableSpamClip(), fca.UpdateRMS()),
        {},
        dict(stable=stable(), update_rms=True),
    ),
    "AdaClip and AdaGN, spikes": ((fca.StableSpamClip(), SPIKE), {}, dict(stable=stable(), spike=(3.0, 2, False))),
}


@pytest.mark.parametrize("backend, device, dtype", EVERYWHERE)
@pytest.mark.parametrize("name", SPECIFIED)
def test_rule_is_the_specifications(backend, device, dtype, name):
    clip, options, by_hand = SPECIFIED[name]
    hand.compare(backend, device, dtype, dict(grad_clip=clip, **options), by_hand)


@pytest.mark.parametrize("backend, device", FAST_TARGETS)
@pytest.mark.parametrize("name", [name for name in SPECIFIED if "," not in name])
def test_parameters_wait_for_their_gradients(backend, device, name):
    """What is remembered of one, its count included, is as it was."""
    clip, options, by_hand = SPECIFIED[name]
    hand.compare(backend, device, torch.float64, dict(grad_clip=clip, **options), by_hand, missing=True)


@pytest.mark.parametrize("backend, device", TARGETS)
def test_rows_that_start_at_zero_can_move(backend, device):
    """AGC: |w| counts as eps. Row 1's gradient is small enough as it is; row 2 is zero, row 3 is tiny."""
    p = torch.zeros(4, 2, dtype=torch.float64, device=device).requires_grad_()
    opt = fca.FusedClipAdamW([p], lr=0.0, grad_clip=fca.AGC(0.5, eps=0.2), backend=backend)
    hand.give([p], [torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0], [1e-9, 0.0]], dtype=torch.float64)])
    opt.step()
    expected = torch.tensor([[0.06, 0.08], [0.03, 0.04], [0.0, 0.0], [1e-9, 0.0]], dtype=torch.float64)
    assert torch.allclose(opt.state[p]["exp_avg"].cpu(), 0.1 * expected, rtol=1e-14, atol=0)


# ---------------------------------------------------------------- what must not be remembered


def memory(opt) -> dict[tuple[str, str], torch.Tensor]:
    """What the rules of the first group remember."""
    return {
        (name, key): tensor.clone() for name, own in opt._memory[0].items() for key, tensor in own["tensors"].items()
    }


def equal(x: dict, y: dict) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


MORE = {  # of all kinds: keywords of the optimizer
    "spikes": dict(grad_clip=SPIKE),
    "AdaClip and AdaGN": dict(grad_clip=fca.StableSpamClip(total_steps=20)),
    "induced metric": dict(grad_clip=fca.InducedMetric()),
    "lagged gate": dict(overshoot=fca.AlignedMomentum(block="tensor", lag=True)),
    "periodic": dict(reset=fca.Periodic(every=3, warmup=2)),
    "SPAM": fca.presets.spam(3, 2),
    "many": dict(
        grad_clip=(fca.StableSpamClip(shared_counter=True), SPIKE, fca.InducedMetric()),
        overshoot=fca.AlignedMomentum(block="tensor", lag=True),
        reset=fca.Periodic(every=3, warmup=0, late=True),
    ),
}
FORGETFUL = {
    "AGC": dict(grad_clip=fca.AGC(0.05)),
    "StableAdamW": dict(grad_clip=fca.UpdateRMS()),
    "C-AdamW, rescaled": dict(overshoot=fca.Cautious(rescale=True)),
    "align tensor": dict(overshoot="align-tensor"),
    "median momentum": dict(overshoot=fca.MedianMomentum(0.03)),
    "when clipped": dict(reset=fca.WhenClipped(0.5)),
}
REMEMBERING = {**{name: dict(grad_clip=rule) for name, rule in RULES.items() if rule.memory(1)}, **MORE}
EVERY = {**{name: dict(grad_clip=rule) for name, rule in RULES.items()}, **MORE, **FORGETFUL}


def make_with(backend: str, device: str, options: dict, **more):
    return make(backend, device, options.get("grad_clip"),
                **{k: v for k, v in options.items() if k != "grad_clip"}, **more)  # fmt: skip


@pytest.mark.parametrize("backend, device", FAST_TARGETS)
@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("why", ("zero gradients and lr 0", "not finite", "found_inf"))
@pytest.mark.parametrize("after", (0, 2, 9))
def test_step_without_information_changes_no_statistics(backend, device, name, why, after):
    """torch.distributed.checkpoint creates states by a step with zero gradients and lr = 0."""
    options = REMEMBERING[name]
    opt, params = make_with(backend, device, options, skip_nonfinite=True)
    twin, own = make_with(backend, device, options, skip_nonfinite=True)
    grads = make_grads()
    for now in grads[:after]:
        step(opt, params, now)
        step(twin, own, now)
    # The first step makes the memory.
    rules = [r for key in ("grad_clip", "reset", "overshoot") for r in (options.get(key),) if r is not None]
    rules = [r for each in rules for r in (each if isinstance(each, tuple) else (each,))]
    fresh = {(type(rule).__name__, key): torch.full(shape, first, dtype=torch.float64, device=device)
             for rule in rules for key, (shape, first) in rule.memory(len(SHAPES)).items()}  # fmt: skip
    before, lr = memory(opt) if after else fresh, opt.param_groups[0]["lr"]
    if why == "found_inf":
        opt.found_inf = torch.ones((), device=device)
        step(opt, params, grads[after])
        del opt.found_inf
    else:
        opt.param_groups[0]["lr"] = 0.0
        step(opt, params, [g * (math.nan if why == "not finite" else 0.0) for g in grads[after]])
        opt.param_groups[0]["lr"] = lr
    assert equal(memory(opt), before)
    step(opt, params, grads[after])
    step(twin, own, grads[after])
    if why != "zero gradients and lr 0":  # which fades the moments, and what the rules make of them
        assert all(map(torch.equal, params, own)) and all(map(torch.equal, moments(opt, params), moments(twin, own)))
        assert equal(memory(opt), memory(twin))
    elif not {"induced metric", "many"} & {name}:
        assert equal(memory(opt), memory(twin))
    assert not equal(memory(opt), before) or name == "lagged gate"  # whose gate may stay as it is


@pytest.mark.parametrize("backend, device", FAST_TARGETS)
def test_checkpoint_step_leaves_what_a_fresh_optimizer_has(backend, device):
    """All that torch.distributed.checkpoint's first step may leave is zero moments, and a count that it overwrites."""
    opt, params = make_with(backend, device, MORE["many"])
    opt.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    step(opt, params, [torch.zeros(s, dtype=torch.float64) for s in SHAPES])
    assert all(map(torch.equal, params, before)) and not any(bool(m.any()) for m in moments(opt, params))


# ---------------------------------------------------------------- no host read


class NoHost(types.ModuleType):
    """A backend whose numbers lie on a device: nothing in it, or around it, may read one."""

    ON_DEVICE = True

    def tensor_table(self, params, *rest):
        return params

    def place(self, tables, group_scalars, blocks, kept, device, capturable, samples=None):
        return tables

    def grad_square_sums(self, tables):
        return torch.rand(sum(map(len, tables)), dtype=torch.float64)

    def prologue(self, tables, group_signals, *rest):
        return torch.rand(sum(map(len, tables)), scalars.WIDTH, dtype=torch.float64)

    def by_tensor(self, tables, sums):
        return sums

    def new_dots(self, tables, rows):
        return torch.rand(rows, dtype=torch.float64)

    def reduce(self, tables, values, batch, first, kind, *options):
        return torch.rand(len(tables[batch]), 2, dtype=torch.float64)

    def sample_square_sums(self, tables):
        return torch.rand(3, dtype=torch.float64)

    def unit_sums(self, tables, batch):
        rows = sum((p.shape[0] if p.dim() > 1 else 1) if p.numel() else 0 for p in tables[batch])
        return torch.rand(rows, 2, dtype=torch.float64)

    def update_(self, tables, values, *rest):
        self.updated = values


@pytest.mark.parametrize("name", (*EVERY, "FAdam"))
def test_step_never_reads_the_device(name, monkeypatch):
    backend = NoHost("no_host")
    monkeypatch.setattr(backends, "choose_step", lambda *_: backend)
    params = [torch.zeros(s, dtype=d).requires_grad_() for s in SHAPES for d in (torch.float64, torch.float32)]
    made = fca.FusedFAdam(params) if name == "FAdam" else fca.FusedClipAdamW(params, skip_nonfinite=True, **EVERY[name])
    made.observe(hand.observed(0.5, "cpu"))
    made.grad_scale, made.found_inf = torch.full((), 4.0), torch.zeros(())
    with NoSync():
        for at in range(6):
            for i, p in enumerate(params):
                p.grad = None if (at + i) % 4 == 3 else torch.ones_like(p)
            made.step()
    assert not bool(backend.updated.isnan().any())
    with pytest.raises(AssertionError, match="host wait"), NoSync():
        float(backend.updated[0, 0])


@pytest.mark.parametrize("name", ("AGC", "AutoClip", None))
def test_step_from_scores_never_reads_the_device(name, monkeypatch):
    monkeypatch.setattr(backends, "choose_step", lambda *_: NoHost("no_host"))
    p = torch.zeros(4, 5).requires_grad_()
    made = fca.FusedClipAdamW([p], **(EVERY[name] if name else {}))
    scores, logp, generator = torch.rand(3, 4, 5), torch.zeros(3), torch.Generator().manual_seed(0)
    noise = dict(max_sample_norm=1.0, noise_multiplier=1.0, noise_generator=generator)
    with NoSync():
        for _ in range(2):
            made.step_from_scores([scores], logp, logp, torch.ones(3), mask=logp == 0, **noise)
            made.step_from_gradients([scores], torch.rand(3), **noise)


# ---------------------------------------------------------------- state, scaling, groups


@pytest.mark.parametrize("backend, device", FAST_TARGETS)
@pytest.mark.parametrize("name", (*REMEMBERING, "C-AdamW, rescaled"))
@pytest.mark.parametrize("cut", (3, 8))
def test_resuming_is_going_on(backend, device, name, cut):
    grads = make_grads()
    opt, params = make_with(backend, device, EVERY[name])
    for now in grads[:cut]:
        step(opt, params, now)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other, own = make(backend, device, None)  # the rules come with the state
    with torch.no_grad():
        for p, q in zip(own, params):
            p.copy_(q)
    other.load_state_dict(torch.load(file, weights_only=True))
    twins = [other, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    for now in grads[cut:]:
        for o in (opt, *twins):
            step(o, o.param_groups[0]["params"], now)
    for twin in twins:
        assert twin.param_groups[0]["params"][0] is not params[0]
        assert all(map(torch.equal, params, twin.param_groups[0]["params"]))
        assert equal(memory(opt), memory(twin))
    torch.optim.AdamW(own, lr=0.01).load_state_dict(opt.state_dict())  # torch ignores what it does not know


@pytest.mark.parametrize("backend, device", FAST_TARGETS)
@pytest.mark.parametrize("name", EVERY)
def test_rules_see_unscaled_gradients(backend, device, name):
    opt, params = make_with(backend, device, EVERY[name])
    scaled, own = make_with(backend, device, EVERY[name])
    for at, now in enumerate(make_grads()):
        for o in (opt, scaled):
            o.observe(hand.observed(hand.suppressed(at), device))
        step(opt, params, now)
        power = 2.0 ** (10 - 3 * at)
        scaled.grad_scale = torch.full((), power, dtype=torch.float32, device=device)
        step(scaled, own, [g * power for g in now])
    for x, y in zip((*moments(scaled, own), *own), (*moments(opt, params), *params)):
        assert torch.allclose(x, y, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend, device", FAST_TARGETS)
def test_groups_have_their_own_rules_and_parameters_without_gradients_wait(backend, device):
    """Each group as in an optimizer where all groups have its rule; a group without a rule is not scaled."""
    grads = make_grads()
    rules = (fca.ZClip(warmup=3, max_norm=0.8), fca.AdaGC(start=3), None)

    def train(own_rules):
        params = [torch.zeros(s, dtype=torch.float64, device=device).requires_grad_() for s in SHAPES for _ in range(2)]
        groups = [{"params": params[2 * i : 2 * i + 2], "grad_clip": rule} for i, rule in enumerate(own_rules)]
        opt = fca.FusedClipAdamW(groups, lr=0.01, backend=backend)
        for at, now in enumerate(grads):
            for i, p in enumerate(params):
                g = now[i // 2] * (1 + i % 2)
                p.grad = None if i == 2 and at % 3 == 1 else g.to(device, copy=True)
            opt.step()
        return params

    mixed = train(rules)
    for i, rule in enumerate(rules):
        alone = train((rule,) * 3)
        for p, q in zip(mixed[2 * i : 2 * i + 2], alone[2 * i : 2 * i + 2]):
            assert torch.equal(p, q), rule


def test_long_history_grows_without_forgetting():
    rule = fca.AutoClip(50.0)
    opt, params = make("reference", "cpu", rule)
    seen = []
    for at in range(600):
        grads = [torch.full(s, 1.0 + (at * 37 % 101), dtype=torch.float64) for s in SHAPES]
        seen.append(norms_of(grads)[0])
        step(opt, params, grads)
    kept = {key: tensor for (_, key), tensor in memory(opt).items()}
    assert kept["norms"].numel() == 1024 and float(kept["count"]) == 600
    assert kept["norms"][:600].tolist() == pytest.approx(seen, rel=1e-14)


def test_another_rule_starts_anew():
    opt, params = make("reference", "cpu", fca.ZClip(warmup=2))
    for now in make_grads()[:4]:
        step(opt, params, now)
    opt.param_groups[0]["grad_clip"] = fca.AutoClip(history=3)
    step(opt, params, make_grads()[4])
    assert float(memory(opt)["AutoClip", "count"]) == 1
    opt.param_groups[0]["grad_clip"] = 1.0
    step(opt, params, make_grads()[5])
    assert float(opt.grad_norm) == pytest.approx(norms_of(make_grads()[5])[0], rel=1e-6)
