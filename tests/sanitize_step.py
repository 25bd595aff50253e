"""A handful of steps over rules, dtypes and layouts, for compute-sanitizer: small, and compared with the reference.

    PYTHONPATH=. compute-sanitizer --tool memcheck python3 tests/sanitize_step.py
    PYTHONPATH=. python3 tests/sanitize_step.py --device cpu     # under an emulated library or TRITON_INTERPRET=1

Cases come in an order that touches every rule, dtype and layout early, so that a short time still covers them.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time

import torch
from cases import RULES, largest_error, make_stats, tolerance

import fused_clip_adam as fca

STEPS = 2
SHAPES = ((1,), (1023,), (33, 65), (4096 + 17,))  # a tail, less than a run, more than a chunk
DTYPES = {  # parameter, gradient, moments (None: the parameter's)
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "bfloat16, float32 moments": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float16, float32 moments": (torch.float16, torch.float16, torch.float32),
    "bfloat16, float32 gradients and moments": (torch.bfloat16, torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64, None),
}


def _aligned(x: torch.Tensor, gap: int) -> torch.Tensor:
    return x.clone()


def _shifted(x: torch.Tensor, gap: int) -> torch.Tensor:
    """A view that starts `gap` elements into its memory: parameter and gradient off a 16-byte boundary."""
    memory = torch.zeros(x.numel() + gap, dtype=x.dtype, device=x.device)
    memory[gap:].copy_(x.reshape(-1))
    return memory[gap:].view(x.shape)


def _transposed(x: torch.Tensor, gap: int) -> torch.Tensor:
    return x.t().contiguous().t() if x.dim() == 2 else x.clone()


# (parameter, gradient); the gaps differ or agree, so that runs of 16 bytes fit or do not.
LAYOUTS = {
    "aligned": (_aligned, _aligned, (0, 0)),
    "misaligned alike": (_shifted, _shifted, (1, 1)),
    "misaligned apart": (_shifted, _shifted, (1, 3)),
    "parameter transposed": (_transposed, _aligned, (0, 0)),
}


def all_cases() -> list[tuple[str, str, str]]:
    """(rule, dtypes, layout): first every rule, dtype and layout once, then the other combinations, mixed."""
    lists = [list(RULES), list(DTYPES), list(LAYOUTS)]
    first = [tuple(own[i % len(own)] for own in lists) for i in range(max(map(len, lists)))]
    rest = list(itertools.product(*lists))
    random.Random(0).shuffle(rest)
    return list(dict.fromkeys([*first, *rest]))


def train(backend: str, device: str, rule: str, dtypes: str, layout: str) -> list[torch.Tensor]:
    """Parameters after `STEPS` steps."""
    param, grad, state = DTYPES[dtypes]
    as_param, as_grad, (gap, grad_gap) = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape, dtype: torch.randn(shape, generator=generator).to(dtype).to(device)  # noqa: E731
    params = [torch.nn.Parameter(as_param(draw(shape, param), gap)) for shape in SHAPES]
    for p in params:
        if grad != param:
            p.grad_dtype = grad
    opt = fca.FusedClipAdamW(params, lr=0.01, weight_decay=0.1, state_dtype=state, backend=backend, **RULES[rule])
    for step in range(STEPS):
        for p, shape in zip(params, SHAPES):
            p.grad = as_grad(draw(shape, grad), grad_gap)
        opt.observe(make_stats(step))
        opt.step()
    return [p.detach().cpu() for p in params]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--budget-s", type=float, default=60.0, help="no further case is begun after these seconds")
    options = parser.parse_args(arguments)
    begin, cases, done = time.monotonic(), all_cases(), 0
    for rule, dtypes, layout in cases:
        if time.monotonic() - begin > options.budget_s:
            break
        got = train(options.backend, options.device, rule, dtypes, layout)
        expected = train("reference", "cpu", rule, dtypes, layout)
        # Two storage roundings where a compiler may order sums of a norm differently; a wrong element is far off.
        error, allowed = largest_error(got, expected), 4 * tolerance(DTYPES[dtypes][0], STEPS)
        if error > allowed:
            print(f"sanitize_step: {rule}, {dtypes}, {layout}: off by {error:.1e} > {allowed:.0e}", flush=True)
            return 1
        done += 1
        if done % 10 == 0:
            print(f"{done} of {len(cases)}: {rule}, {dtypes}, {layout}", flush=True)
    print(f"sanitize_step: {done} cases of {len(cases)} agree with the reference", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
