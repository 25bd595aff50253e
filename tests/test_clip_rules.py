"""Clip rules against their published steps, written out in Python floats; what they remember and what they must not."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from cases import gpu_targets, tolerance
from no_sync import NoSync

import fused_clip_adam as fca
from fused_clip_adam.backends import native

TARGETS = [("reference", "cpu"), *([] if native.unavailable() else [("cpu", "cpu")]), *gpu_targets().items()]
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


# ---------------------------------------------------------------- what must not be remembered


def memory(opt) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in opt._clip_memory[0]["tensors"].items()}


REMEMBERING = [name for name, rule in RULES.items() if rule.memory(1)]


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("why", ("zero gradients and lr 0", "not finite", "found_inf"))
@pytest.mark.parametrize("after", (2, 9))
def test_step_without_information_changes_no_statistics(backend, device, name, why, after):
    """torch.distributed.checkpoint creates states by a step with zero gradients and lr = 0."""
    opt, params = make(backend, device, RULES[name], skip_nonfinite=True)
    twin, own = make(backend, device, RULES[name], skip_nonfinite=True)
    grads = make_grads()
    for now in grads[:after]:
        step(opt, params, now)
        step(twin, own, now)
    before, lr = memory(opt), opt.param_groups[0]["lr"]
    if why == "found_inf":
        opt.found_inf = torch.ones((), device=device)
        step(opt, params, grads[after])
        del opt.found_inf
    else:
        opt.param_groups[0]["lr"] = 0.0
        step(opt, params, [g * (math.nan if why == "not finite" else 0.0) for g in grads[after]])
        opt.param_groups[0]["lr"] = lr
    now = memory(opt)
    assert all(torch.equal(now[key], before[key]) for key in before)
    step(opt, params, grads[after])
    step(twin, own, grads[after])
    now, then = memory(opt), memory(twin)
    assert all(torch.equal(now[key], then[key]) for key in now)


@pytest.mark.parametrize("name", RULES)
def test_rules_never_read_the_device(name):
    rule = RULES[name]
    own = {key: torch.full(shape, first, dtype=torch.float64) for key, (shape, first) in rule.memory(3).items()}
    norms = torch.rand(3, dtype=torch.float64)
    with NoSync():
        for _ in range(8):
            rule.factors(norms.norm(), norms, own, torch.ones((), dtype=torch.bool))


# ---------------------------------------------------------------- state, scaling, groups


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("cut", (3, 8))
def test_resuming_is_going_on(backend, device, name, cut):
    grads = make_grads()
    opt, params = make(backend, device, RULES[name])
    for now in grads[:cut]:
        step(opt, params, now)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other, own = make(backend, device, RULES[name])
    with torch.no_grad():
        for p, q in zip(own, params):
            p.copy_(q)
    other.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(opt)
    for now in grads[cut:]:
        for o in (opt, other, twin):
            step(o, o.param_groups[0]["params"], now)
    for p, q, r in zip(params, own, twin.param_groups[0]["params"]):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert all(torch.equal(memory(opt)[key], memory(other)[key]) for key in memory(opt))
    torch.optim.AdamW(own, lr=0.01).load_state_dict(opt.state_dict())  # torch ignores what it does not know


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("name", RULES)
def test_norms_are_of_unscaled_gradients(backend, device, name):
    opt, params = make(backend, device, RULES[name])
    scaled, own = make(backend, device, RULES[name])
    for now in make_grads():
        step(opt, params, now)
        scaled.grad_scale = torch.full((), 2.0**10, dtype=torch.float32, device=device)
        step(scaled, own, [g * 2.0**10 for g in now])
    for x, y in zip(moments(scaled, own), moments(opt, params)):
        assert torch.allclose(x, y, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend, device", TARGETS)
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
    kept = memory(opt)
    assert kept["norms"].numel() == 1024 and float(kept["count"]) == 600
    assert kept["norms"][:600].tolist() == pytest.approx(seen, rel=1e-14)


def test_another_rule_starts_anew():
    opt, params = make("reference", "cpu", fca.ZClip(warmup=2))
    for now in make_grads()[:4]:
        step(opt, params, now)
    opt.param_groups[0]["grad_clip"] = fca.AutoClip(history=3)
    step(opt, params, make_grads()[4])
    assert float(memory(opt)["count"]) == 1
    opt.param_groups[0]["grad_clip"] = 1.0
    step(opt, params, make_grads()[5])
    assert float(opt.grad_norm) == pytest.approx(norms_of(make_grads()[5])[0], rel=1e-6)
