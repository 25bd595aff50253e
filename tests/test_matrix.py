"""Every rule x every backend x {float32, bfloat16} x {one tensor, many, strided}, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from by_hand import TARGETS
from cases import RULES, assert_rounded_once, largest_error, make_stats, results, tolerance

import fused_clip_adam as fca
from fused_clip_adam.optimizer import _rules_of
from fused_clip_adam.rules import grad_clip, overshoot, reset

SHAPES = {"one tensor": [(37, 30)], "many": [(5,), (1, 1), (), (2049,), *[(3, 7)] * 6], "strided": [(9, 21), (4, 6)]}


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values; strided: every other row and column of a larger tensor, transposed."""
    if layout != "strided":
        return x.clone()
    rows, columns = x.shape
    view = torch.full((2 * columns, 3 * rows), float("nan"), dtype=x.dtype, device=x.device)[::2, ::3].t()
    return view.copy_(x)


def train(rule: str, layout: str, dtype, backend: str, device: str, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # the same start for both
    values = [torch.randn(s, generator=generator).to(stored).to(device, dtype) for s in SHAPES[layout]]
    params = [laid_out(x, layout).requires_grad_() for x in values]
    opt = fca.FusedClipAdamW(params, lr=0.01, weight_decay=0.1, backend=backend, **RULES[rule])
    for step in range(steps):
        for p in params:
            g = torch.randn(p.shape, generator=generator).to(stored)
            p.grad = laid_out(g.to(device, dtype), layout)
        opt.observe(make_stats(step, device))
        opt.step()
    return results(opt, params)


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_matrix_float32(backend, device, layout, rule):
    steps = 2 if (backend, device) == ("triton", "cpu") else 4
    got = train(rule, layout, torch.float32, backend, device, steps)
    expected = train(rule, layout, torch.float64, "reference", "cpu", steps)
    assert largest_error(got, expected) <= tolerance(torch.float32, steps)


@pytest.mark.parametrize("backend, device", TARGETS)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_matrix_bfloat16(backend, device, layout, rule):
    """One step from the same stored values: float32 arithmetic, rounded once."""
    dtype = torch.bfloat16
    got = train(rule, layout, dtype, backend, device, 1)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(dtype).double().requires_grad_() for s in SHAPES[layout]]
    opt = fca.FusedClipAdamW(params, lr=0.01, weight_decay=0.1, backend="reference", **RULES[rule])
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype).double()
    opt.observe(make_stats(0))
    opt.step()
    assert_rounded_once(got, results(opt, params), dtype)


def test_every_rule_is_in_the_matrix():
    used = set()
    for options in RULES.values():
        opt = fca.FusedClipAdamW([torch.nn.Parameter(torch.ones(1))], **options)
        used |= {type(rule).__name__ for rule in _rules_of(opt.param_groups[0])}
    every = {rule.__name__ for rule in (*grad_clip.RULES, *overshoot.RULES, *reset.RULES)}
    assert every - used == {"OnRollout"}, "OnRollout acts outside of the step; tests/test_resets.py has it"
