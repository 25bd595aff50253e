"""The update of the specification, one line after the other, in float64 NumPy: what tests compare the package with.

`ByHand` and `fadam` read nothing of the package. Every keyword is a method of the literature, or of this project, that
changes one line; the order of the lines is the specification's. `compare` runs both side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import gpu_targets, tolerance

import fused_clip_adam as fca
from fused_clip_adam.backends import native

HOSTS = [("reference", "cpu"), *([] if native.unavailable() else [("cpu", "cpu")])]
TARGETS = [*HOSTS, *gpu_targets().items()]
FAST_TARGETS = [target for target in TARGETS if target != ("triton", "cpu")]
"""Without Triton's interpreter: for what a rule does in torch, whatever the kernels."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# A GPU's kernels run emulated, slowly, where there is none: one dtype shows the method, test_gpu_backends the others.
EVERYWHERE = [(*target, dtype) for target in HOSTS for dtype in DTYPES]
EVERYWHERE += [(*target, torch.float64) for target in gpu_targets().items()]
EVERYWHERE = [pytest.param(*case, id="-".join(map(str, case)).replace("torch.", "")) for case in EVERYWHERE]


def _norm(*arrays: np.ndarray) -> float:
    return math.sqrt(math.fsum(x * x for array in arrays for x in array.reshape(-1).tolist()))


def _mean(array: np.ndarray) -> float:
    return math.fsum(array.reshape(-1).tolist()) / array.size


def _sum(array: np.ndarray) -> float:
    return math.fsum(array.reshape(-1).tolist())


def agc(g: np.ndarray, w: np.ndarray, clipping: float, eps: float) -> np.ndarray:
    """|g_r| > lam max(|w_r|, eps): g_r *= lam max(|w_r|, eps) / max(|g_r|, 1e-6); a vector is one row."""
    if g.ndim < 2:
        most, size = clipping * max(_norm(w), eps), _norm(g)
        return g * (most / max(size, 1e-6)) if size > most else g
    return np.stack([agc(row.reshape(-1), own.reshape(-1), clipping, eps).reshape(row.shape) for row, own in zip(g, w)])


class ByHand:
    """One optimizer over all `start` tensors.

    spike: theta, start, freeze_zero. stable: gamma1, gamma2, theta, eps, total_steps, shared. periodic: every, warmup,
    moments, counters, late. metric: xi, beta. brake: strength, mode, hold_v. align: "element", "tensor", "lag" or a
    number of elements. store: rounds a parameter after each step, as its dtype would.
    """

    def __init__(
        self,
        start,
        *,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.1,
        coupled: bool = False,
        maximize: bool = False,
        amsgrad: bool = False,
        eps_before_correction: bool = False,
        decay_after_update: bool = False,
        max_norm: float | None = None,
        agc: tuple[float, float] | None = None,
        spike: tuple[float, int, bool] | None = None,
        stable: tuple[float, float, float, float, int | None, bool] | None = None,
        update_rms: bool = False,
        metric: tuple[float, float] | None = None,
        periodic: tuple[int, int, bool, bool, bool] | None = None,
        when_clipped: tuple[float, bool, bool] | None = None,
        align: str | int | None = None,
        cautious: bool = False,
        rescale: bool = False,
        grams: bool = False,
        median: float | None = None,
        clamp: float | None = None,
        brake: tuple[float, str, float] | None = None,
        store: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    ) -> None:
        vars(self).update({name: value for name, value in locals().items() if name not in ("self", "start")})
        self.p = [np.array(x, dtype=np.float64) for x in start]
        self.m = [np.zeros_like(x) for x in self.p]
        self.v = [np.zeros_like(x) for x in self.p]
        self.v_max = [np.zeros_like(x) for x in self.p]
        n = len(self.p)
        self.t, self.W1, self.W2 = [0] * n, [0.0] * n, [0.0] * n
        self.now = 0
        self.since, self.since_moments = math.inf, math.inf  # steps since a reset, 0 in the one that resets
        self.M, self.A, self.B, self.A_power, self.count = [0.0] * n, [0.0] * n, [0.0] * n, [1.0] * n, [0] * n
        self.k = [1.0] * n  # of align with lag
        self.ema, self.ema_count = 0.0, 0

    def forget(self, moments: bool, counters: bool, i: int | None = None) -> None:
        """Between two steps, of all tensors, or in a step, of tensor i."""
        if i is None and moments:
            self.since_moments = -1
        for j in range(len(self.p)) if i is None else (i,):
            if moments:
                self.m[j], self.v[j], self.v_max[j] = (np.zeros_like(self.p[j]) for _ in range(3))
            if counters:
                self.t[j], self.W1[j], self.W2[j] = 0, 0.0, 0.0

    # ------------------------------------------------------------ what is done to the gradient

    def scaled(self, g: dict[int, np.ndarray], sc: float) -> dict[int, np.ndarray]:
        if self.max_norm is not None:
            S = min(1.0, self.max_norm / (_norm(*g.values()) + 1e-6))
            g = {i: S * x for i, x in g.items()}
        if self.agc is not None:
            g = {i: agc(x, self.p[i], *self.agc) for i, x in g.items()}
        if self.stable is not None:
            g = {i: self.stable_spam(i, x, sc) for i, x in g.items()}
        return g

    def stable_spam(self, i: int, g: np.ndarray, sc: float) -> np.ndarray:
        """AdaClip, then AdaGN."""
        gamma1, gamma2, theta, eps, _, shared = self.stable
        gmax = float(np.max(np.abs(g)))
        if gmax == 0.0:  # has no direction to scale, and says nothing about sizes
            return g
        self.count[i] += 1
        step = self.count[i]
        self.M[i] = theta * self.M[i] + (1 - theta) * gmax
        tau = self.M[i] / (1 - theta**step)
        g = np.where(np.abs(g) > tau, g * (tau / gmax), g)
        n = _norm(g)
        self.A[i] = gamma1 * sc * self.A[i] + (1 - gamma1 * sc) * n
        self.A_power[i] *= gamma1 * sc
        self.B[i] = gamma2 * self.B[i] + (1 - gamma2) * n * n
        weight = 1 - (gamma1 * sc) ** step if shared else 1 - self.A_power[i]
        c = self.A[i] / weight / (math.sqrt(self.B[i] / (1 - gamma2**step)) + eps)
        return g * (c / n)

    def spiked(self, i: int, g: np.ndarray) -> np.ndarray:
        if self.spike is None:
            return g
        theta, start, freeze_zero = self.spike
        if self.now < start or self.since_moments < start:
            return g
        most = np.sqrt(theta * self.v[i])
        return np.where((g * g > theta * self.v[i]) & (freeze_zero | (self.v[i] > 0)), np.sign(g) * most, g)

    # ------------------------------------------------------------ momentum and direction

    def gate(self, i: int, g: np.ndarray):
        """k, from the old momentum."""
        dot = self.m[i] * g
        if self.align == "element":
            return (dot > 0) * 1.0
        if isinstance(self.align, int):
            flat, k = dot.reshape(-1), np.zeros(dot.size)
            for first in range(0, dot.size, self.align):
                k[first : first + self.align] = _sum(flat[first : first + self.align]) > 0
            return k.reshape(dot.shape)
        now = 1.0 if not self.m[i].any() or _sum(dot) > 0 else 0.0
        if self.align == "lag":
            now, self.k[i] = self.k[i], now
        return now

    # ------------------------------------------------------------ the step

    def step(self, grads, c: float = 0.0) -> None:
        """grads: arrays, or None where a parameter has no gradient. c: the suppressed share of the policy gradient."""
        self.now += 1
        self.since += 1
        self.since_moments += 1
        sign = -1.0 if self.maximize else 1.0
        g = {i: sign * np.asarray(x, dtype=np.float64) for i, x in enumerate(grads) if x is not None}

        due, moments, counters, late = False, False, False, False
        if self.periodic is not None:
            every, _, moments, counters, late = self.periodic
            due = self.now % every == 0
        if self.when_clipped is not None:
            threshold, moments, counters = self.when_clipped
            due = c > threshold
        if due:
            self.since = 0
            self.since_moments = 0 if moments else self.since_moments
        total = self.stable[4] if self.stable is not None else None
        sc = 1.0 if total is None else 0.5 + 0.25 * (1 + math.cos(math.pi * self.now / (total + 1)))

        g = self.scaled(g, sc)
        if self.coupled:
            g = {i: x + self.decay * self.p[i] for i, x in g.items()}
        if due:
            for i in g:
                self.forget(moments and not late, counters, i)
                if self.stable is not None and self.stable[5]:
                    self.count[i] = 1  # the counter of the moments, which are in their first step
        d = {}
        for i in g:
            g[i] = self.spiked(i, g[i])
            a, b2_weight = self.betas[0] * sc, 1 - self.betas[1]
            b = w1_weight = 1 - a
            self.t[i] += 1
            if self.brake is not None:
                strength, mode, hold_v = self.brake
                a *= 1 - strength * c
                b2_weight *= 1 - hold_v * c
                if mode == "renormalise":
                    b = w1_weight = 1 - a
            self.W1[i] = (1 - w1_weight) * self.W1[i] + w1_weight
            self.W2[i] = (1 - b2_weight) * self.W2[i] + b2_weight
            if self.brake is None:  # the same, with fewer roundings
                self.W2[i] = 1 - self.betas[1] ** self.t[i]
                if total is None or self.stable[5]:
                    self.W1[i] = 1 - a ** self.t[i]
            m_new = a * self.m[i] + b * g[i]
            if self.median is not None:
                m_new = self.m[i] + np.clip(g[i] - self.m[i], -self.median, self.median)
            d[i] = m_new
            if self.align is not None:
                d[i] = self.gate(i, g[i]) * a * self.m[i] + b * g[i]
            self.m[i] = m_new
            self.v[i] = (1 - b2_weight) * self.v[i] + b2_weight * g[i] * g[i]
            self.v_max[i] = np.maximum(self.v_max[i], self.v[i])

        phi = 1.0
        if self.periodic is not None and self.since < self.periodic[1]:
            phi = 1 - 0.99 * (1 + math.cos(math.pi * self.since / (self.periodic[1] + 1))) / 2
        if self.metric is not None:
            xi, beta = self.metric
            trace = xi * math.fsum(_sum(g[i] ** 2 / (np.sqrt(self.v[i] / self.W2[i]) + self.eps)) for i in g)
            if trace > 0:
                self.ema = beta * self.ema + (1 - beta) * trace
                self.ema_count += 1
            phi *= 1 / (1 + abs(self.ema / (1 - beta ** max(self.ema_count, 1))))

        for i in g:
            used = self.v_max[i] if self.amsgrad else self.v[i]
            W1 = 1.0 if self.median is not None else self.W1[i]
            if self.eps_before_correction:
                u = d[i] / W1 * math.sqrt(self.W2[i]) / (np.sqrt(used) + self.eps)
            else:
                u = d[i] / W1 / (np.sqrt(used / self.W2[i]) + self.eps)
            if self.clamp is not None:
                u = np.clip(u, -self.clamp, self.clamp)
            if self.cautious or self.rescale:
                mask = self.m[i] * g[i] > 0
                u = np.where(mask, u, 0.0) * (1 / max(_mean(mask * 1.0), 1e-3) if self.rescale else 1.0)
            if self.grams:
                u = np.sign(g[i]) * np.abs(u)
            lr = self.lr
            if self.update_rms:
                rms = math.sqrt(_mean(g[i] ** 2 / np.maximum(self.v[i] / self.W2[i], self.eps**2)))
                lr = lr / max(1.0, rms)
            shrink = 1.0 if self.coupled else 1 - lr * self.decay
            if self.decay_after_update:
                p = (self.p[i] - lr * phi * u) * shrink
            else:
                p = self.p[i] * shrink - lr * phi * u
            self.p[i] = self.store(p)
            if due and moments and late:
                self.forget(True, False, i)


def fadam(start, steps, *, lr=0.1, betas=(0.9, 0.999), eps=1e-8, decay=0.1, clip=1.0, max_norm=None, maximize=False):
    """FAdam, from its published steps (p = 1/2): the parameter, m and f after the gradients of one tensor."""
    p = np.array(start, dtype=np.float64)
    m, f = np.zeros_like(p), np.zeros_like(p)
    beta1, beta2 = betas

    def clipped(x):
        return x / (max(1.0, math.sqrt(_mean(x * x))) / clip)

    for t, g in enumerate(steps, start=1):
        g = -np.asarray(g, dtype=np.float64) if maximize else np.asarray(g, dtype=np.float64)
        if max_norm is not None:
            g = g * min(1.0, max_norm / (_norm(g) + 1e-6))
        b2hat = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        f = b2hat * f + (1 - b2hat) * g * g
        base = np.sqrt(f) + eps * max(1.0, math.sqrt(_mean(g * g)))
        m = beta1 * m + (1 - beta1) * clipped(g / base)
        p = p - lr * (m + decay * clipped(p / base))
    return p, m, f


# ---------------------------------------------------------------- side by side


SHAPES = ((61,), (7, 5), (3, 2, 4), (), (1,))
STEPS = 12


def make_start(dtype: torch.dtype = torch.float64, shapes=SHAPES, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_grads(dtype: torch.dtype = torch.float64, steps: int = STEPS, shapes=SHAPES, seed: int = 1):
    """Gradients that turn round (step 6), with spikes of single elements (7), zero tensors (4, 9), zero steps (9)."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for step in range(1, steps + 1):
        now = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        if step == 6:
            now = [-3 * g.abs() for g in now]
        if step == 7:
            for factor, g in zip((400.0, 50.0), now):
                g.view(-1)[g.numel() // 3] *= factor
        if step % 5 == 4:
            now = [g if i % 2 and step != 9 else torch.zeros_like(g) for i, g in enumerate(now)]
        out.append([g.to(dtype) for g in now])
    return out


def suppressed(step: int) -> float:
    """A share of the policy gradient that float32 holds exactly."""
    return (0.25, 0.0, 1.0, 0.625)[step % 4]


def observed(c: float, device: str) -> fca.ClipStats:
    buffer = torch.zeros(14, device=device)
    buffer[4], buffer[5] = c, 1.0  # suppressed and total mass
    return fca.ClipStats(buffer)


def give(params, grads) -> None:
    for p, g in zip(params, grads):
        p.grad = None if g is None else g.to(p.device, copy=True)


class Errors:
    """The largest error of each kind of number, over the largest magnitude it has had: roundings outlive those."""

    def __init__(self) -> None:
        self.sizes: dict = {}
        self.worst = 0.0

    def add(self, key, got: torch.Tensor, expected: np.ndarray) -> None:
        wanted = torch.as_tensor(np.asarray(expected))
        assert got.shape == wanted.shape and bool(got.isfinite().all())
        self.sizes[key] = max(self.sizes.get(key, 1e-30), float(wanted.abs().max()))
        self.worst = max(self.worst, float((got.detach().cpu().double() - wanted).abs().max()) / self.sizes[key])


def compare(backend, device, dtype, options: dict, by_hand: dict, *, steps=STEPS, observe=False, missing=False,
            rollouts: tuple[int, bool, bool] | None = None) -> None:  # fmt: skip
    """Trains with the package and by hand, and compares parameters and moments after every step.

    float64: 1.5e-14 of the largest magnitude a number has had, 70 roundings: most are those of 1 - beta^t, here by a
    power that cancels, under Triton by a series that does not. float32: see `tolerance`. bfloat16
    keeps its moments in float32, and by hand rounds the parameters after every step too: within two units of it.

    missing: some parameters have no gradient in some steps. rollouts: every so many steps `new_rollout` forgets
    (moments, counters).
    """
    start, grads = make_start(dtype), make_grads(dtype, steps)
    narrow = dtype == torch.bfloat16
    params = [p.to(device, copy=True).requires_grad_() for p in start]
    options = {"lr": 0.1, "weight_decay": 0.1, "backend": backend, **options}
    store = (lambda x: torch.as_tensor(x).to(dtype).double().numpy()) if narrow else (lambda x: x)
    hand = ByHand([p.double().numpy() for p in start], store=store, **by_hand)
    cls = fca.FusedClipAdam if hand.coupled else fca.FusedClipAdamW
    opt = cls(params, state_dtype=torch.float32 if narrow else None, **options)
    errors = Errors()
    bound = {torch.float64: 1.5e-14, torch.float32: tolerance(dtype, steps), torch.bfloat16: tolerance(dtype, 1) / 2}[
        dtype
    ]
    for at, now in enumerate(grads):
        now = [None if missing and (at + i) % 4 == 1 else g for i, g in enumerate(now)]
        if rollouts is not None and at and at % rollouts[0] == 0:
            opt.new_rollout()
            hand.forget(*rollouts[1:])
        if observe:
            opt.observe(observed(suppressed(at), device))
        give(params, now)
        opt.step()
        hand.step([None if g is None else g.double().numpy() for g in now], suppressed(at) if observe else 0.0)
        for i, p in enumerate(params):
            if now[i] is not None:
                errors.add((i, "p"), p, hand.p[i])
                errors.add((i, "m"), opt.state[p]["exp_avg"], hand.m[i])
                errors.add((i, "v"), opt.state[p]["exp_avg_sq"], hand.v[i])
                if hand.amsgrad:
                    errors.add((i, "v_max"), opt.state[p]["max_exp_avg_sq"], hand.v_max[i])
        assert errors.worst <= bound, f"step {at + 1}: {errors.worst:.2e} > {bound:.2e}"
    moved = max(float((p.detach().cpu().double() - q.double()).abs().max()) for p, q in zip(params, start))
    assert moved > 0.05, "parameters that stay where they are show nothing"
