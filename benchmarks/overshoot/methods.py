"""Every method of the study: plain AdamW, what else one would try, controls, and the corrections of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_clip_adam as fca
from benchmarks.overshoot.tasks import Setting
from fused_clip_adam.objectives.stats import ClipStats

BETAS, EPS, GRAD_CLIP = (0.9, 0.999), 1e-8, 1.0
BLOCK = 1024  # of `align`, and of the controls that borrow its gate


@dataclass(frozen=True)
class Method:
    """What is compared.

    Args:
        name, group: for tables; groups are "plain", "known", "control", "correction".
        options: of `FusedClipAdamW`, of the task's setting.
        decays: the learning rate falls linearly to 0 over the run.
        kl_stop: leaves a batch where the mean k3 of a minibatch exceeds the task's bound.
        gate: what a control does to the momentum: `_shuffled`, `_averaged`; None: nothing.
        controls: the method that this one is the control of.
    """

    name: str
    group: str
    options: Callable[[Setting], dict[str, Any]] = field(default=lambda setting: {})
    decays: bool = False
    kl_stop: bool = False
    gate: Callable[[list[Tensor], torch.Generator], list[Tensor]] | None = None
    controls: str | None = None

    def build(self, params: Iterable[Tensor], lr: float, setting: Setting, seed: int) -> Optimizer:
        return Optimizer(list(params), lr, self.options(setting), self.gate, seed)


class Optimizer:
    """`FusedClipAdamW` with the study's settings, and the controls' gates over it.

    A gate k turns the emitted direction m' into k a m + b g, as `AlignedMomentum` does inside its kernel. Here it is
    done after a plain step, which has made p - lr u: the part (1 - k) beta1 m of u is added back.

    kept: mean over steps of the share of elements with k = 1 of align's gate; None without a gate.
    """

    def __init__(self, params: list[Tensor], lr: float, options: dict[str, Any], gate, seed: int):
        settings = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0, "grad_clip": GRAD_CLIP, "backend": "cpu"}
        self.fused = fca.FusedClipAdamW(params, lr=lr, **{**settings, **options})
        self.params, self.gate = params, gate
        self.random = torch.Generator().manual_seed(4 * 10**6 + seed)
        self._kept, self._steps = 0.0, 0

    @property
    def kept(self) -> float | None:
        return self._kept / self._steps if self.gate is not None and self._steps else None

    def set_lr(self, lr: float) -> None:
        for group in self.fused.param_groups:
            group["lr"] = lr

    def new_rollout(self) -> None:
        self.fused.new_rollout()

    def step(self, loss: Tensor, stats: ClipStats) -> None:
        self.fused.zero_grad()
        loss.backward()
        self.fused.observe(stats)
        if self.gate is None:
            self.fused.step()
        else:
            self._gated_step()

    @torch.no_grad()
    def _gated_step(self) -> None:
        if not self.fused.state:  # no momentum yet: k is 1
            self.fused.step()
            return
        moments = [self.fused.state[p]["exp_avg"].clone() for p in self.params]
        aligned = [gate_of_align(m, p.grad) for m, p in zip(moments, self.params)]
        elements = sum(p.numel() for p in self.params)
        self._kept += sum(float(k.sum()) for k in aligned) / elements
        self._steps += 1
        gates = self.gate(aligned, self.random)
        self.fused.step()
        (group,) = self.fused.param_groups
        beta1, beta2 = group["betas"]
        for p, m, k in zip(self.params, moments, gates):
            state = self.fused.state[p]
            t = float(state["step"])
            denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
            p += group["lr"] * (1 - k.view_as(p)) * beta1 * m / (1 - beta1**t) / denominator


def gate_of_align(m: Tensor, g: Tensor) -> Tensor:
    """k of every element, [numel]: 1 where the sum of m g over its block is positive, or m is all zero; else 0."""
    products = (m.double() * g.double()).flatten()
    blocks = products.split(BLOCK)
    keep = [float(block.sum() > 0 or not part.any()) for block, part in zip(blocks, m.flatten().split(BLOCK))]
    return torch.cat([torch.full((len(block),), k) for block, k in zip(blocks, keep)])


def _shuffled(aligned: list[Tensor], random: torch.Generator) -> list[Tensor]:
    """align's own gate dealt out to the blocks of the model at random: as many are kept, but others.

    Blocks of one length change places with one another only, so that as many elements are kept too.
    """
    blocks = [block for k in aligned for block in k.split(BLOCK)]
    dealt = [0.0] * len(blocks)
    for length in {len(block) for block in blocks}:
        places = [i for i, block in enumerate(blocks) if len(block) == length]
        for i, j in zip(places, torch.randperm(len(places), generator=random).tolist()):
            dealt[i] = float(blocks[places[j]][0])
    values = iter([torch.full_like(block, k) for block, k in zip(blocks, dealt)])
    return [torch.cat([next(values) for _ in k.split(BLOCK)]) for k in aligned]


def _averaged(aligned: list[Tensor], random: torch.Generator) -> list[Tensor]:
    """The share that align would keep, of every element: mere shrinkage of the momentum."""
    kept = sum(float(k.sum()) for k in aligned) / sum(k.numel() for k in aligned)
    return [torch.full_like(k, kept) for k in aligned]


def _rule(name: str, rule: Any, **options: Any) -> Method:
    return Method(name, "correction", lambda setting: {"overshoot": rule, **options})


METHODS = {
    method.name: method
    for method in (
        Method("AdamW", "plain"),
        Method("lr decay", "known", decays=True),
        Method("KL stop", "known", kl_stop=True),
        Method("beta1 = 0.5", "known", lambda setting: {"betas": (0.5, 0.999)}),
        Method("beta1 = 0", "known", lambda setting: {"betas": (0.0, 0.999)}),
        Method("random gate", "control", gate=_shuffled, controls="align"),
        Method("scaled momentum", "control", gate=_averaged, controls="align"),
        _rule("align", fca.AlignedMomentum(BLOCK)),
        _rule("align element", fca.AlignedMomentum("element")),
        _rule("align tensor", fca.AlignedMomentum("tensor")),
        _rule("align tensor, lagged", fca.AlignedMomentum("tensor", lag=True)),
        _rule("cautious", fca.Cautious()),
        _rule("cautious, rescaled", fca.Cautious(rescale=True)),
        _rule("Grams", fca.Grams()),
        _rule("clamp", fca.UpdateClamp(1.0)),
        _rule("atan2", fca.UpdateClamp(2.0, mode="atan2")),  # the published constant, 1.27 = 2 (2 / pi)
        _rule("brake", fca.MomentumBrake(0.5)),
        _rule("brake, full, damped", fca.MomentumBrake(1.0, mode="damp")),
        Method("median momentum", "correction", lambda s: {"overshoot": fca.MedianMomentum(s.tau)}),
        Method("local time", "correction", lambda s: {"reset": fca.OnRollout()}),
        Method("reset on rollout", "correction", lambda s: {"reset": fca.OnRollout(moments=True)}),
        Method("reset when clipped", "correction", lambda s: {"reset": fca.WhenClipped(0.2)}),
        Method(
            "periodic reset",
            "correction",
            lambda s: {"reset": fca.Periodic(4 * s.steps_per_rollout, s.steps_per_rollout)},
        ),
        Method("align, lr decay", "correction", lambda s: {"overshoot": fca.AlignedMomentum(BLOCK)}, decays=True),
    )
}
