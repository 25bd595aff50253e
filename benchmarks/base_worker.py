"""One version of the package in a process of its own: builds a case, runs a call when told, says how long it took.

Two versions register the same torch operations, so that one process cannot hold both. `benchmarks/base.py` starts one
such process for each, with the version first on PYTHONPATH, and speaks with it in lines of JSON. Only names that the
package has had since its first commits are used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

MAX_NORM = 1.0
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


class Built(NamedTuple):
    """A case: `before` is not timed, `sample` reads a few hundred numbers of what the last call gave."""

    call: Callable[[], object]
    before: Callable[[], object]
    sample: Callable[[], torch.Tensor]


def build_step(shapes: list[list[int]], dtype: str, max_norm: float | None) -> Built:
    """FusedClipAdamW on tensors of these shapes; its sample is how far the parameters went."""
    import fused_clip_adam as fca

    generator = torch.Generator().manual_seed(0)
    as_dtype = getattr(torch, dtype)
    gradients = [torch.randn(shape, generator=generator).to(as_dtype) for shape in shapes]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).mul_(0.02).to(as_dtype)) for s in shapes]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    start = [_some(p).clone() for p in params]
    optimizer = fca.FusedClipAdamW(params, lr=1e-2, weight_decay=0.1, grad_clip=max_norm, backend="cpu")

    def put_back_gradients() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad.copy_(g)  # as after a backward pass, they are found just written

    def sample() -> torch.Tensor:
        return torch.cat([_some(p) - before for p, before in zip(params, start, strict=True)])

    return Built(optimizer.step, put_back_gradients, sample)


def build_objective(shape: list[int]) -> Built:
    """`policy_loss` under PPO, forward and backward; its sample is the gradient."""
    import fused_clip_adam as fca

    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(shape, generator=generator).abs().neg().requires_grad_()
    old_logp = logp.detach() + 0.2 * torch.randn(shape, generator=generator)
    advantages = torch.randn((shape[0], 1), generator=generator).expand(shape)
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
    mask = torch.arange(shape[1]) < lengths
    objective = fca.PPO(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    def call() -> None:
        logp.grad = None
        fca.policy_loss(logp, old_logp, advantages, mask=mask, objective=objective, backend="cpu")[0].backward()

    return Built(call, lambda: None, lambda: _some(logp.grad))


def build_logits(rows: int, vocabulary: int) -> Built:
    """`policy_loss_from_logits` under PPO, forward and backward in place; its sample is the gradient."""
    import fused_clip_adam as fca

    loss_of = fca.policy_loss_from_logits  # before the memory is taken: a version may not have it
    generator = torch.Generator().manual_seed(0)
    original = torch.randn((1, rows, vocabulary), generator=generator)
    logits = original.clone().requires_grad_()
    tokens = torch.randint(vocabulary, (1, rows), generator=generator)
    old_logp = torch.stack([row.log_softmax(-1)[token] for row, token in zip(original[0], tokens[0])]).unsqueeze(0)
    advantages = torch.randn((1, rows), generator=generator)
    objective = fca.PPO(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    def put_back_logits() -> None:
        logits.grad = None
        with torch.no_grad():
            logits.copy_(original)

    how = dict(objective=objective, inplace_backward=True, backend="cpu")

    def call() -> None:
        loss_of(logits, tokens, old_logp, advantages, **how)[0].backward()

    return Built(call, put_back_logits, lambda: _some(logits.grad))


BUILDERS: dict[str, Callable[..., Built]] = {
    "step": build_step,
    "objective": build_objective,
    "logits": build_logits,
}


def _some(x: torch.Tensor, at_most: int = 256) -> torch.Tensor:
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // at_most)][:at_most].double()


class Worker:
    """Answers the requests of `benchmarks/base.py`, one JSON object each; a failure is an answer, too."""

    def __init__(self):
        self.built: Built | None = None

    def answer(self, request: dict) -> dict:
        try:
            return getattr(self, f"on_{request.pop('do')}")(**request)
        except Exception as error:  # a name, an argument or a dtype that this version lacks: whatever it raises
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}

    def on_version(self) -> dict:
        import fused_clip_adam as fca

        return {"folder": str(Path(fca.__file__).parent.parent), "version": fca.__version__, "torch": torch.__version__}

    def on_build(self, kind: str, options: dict) -> dict:
        self.built = None  # its memory first
        self.built = BUILDERS[kind](**options)
        self.on_run()
        return {"sample": self.built.sample().tolist()}

    def on_run(self) -> dict:
        self.built.before()
        start = time.perf_counter()
        self.built.call()
        return {"seconds": time.perf_counter() - start}

    def on_drop(self) -> dict:
        self.built = None
        return {}


def requests() -> Iterator[dict]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    # What libraries print must not get between the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        worker = Worker()
        for request in requests():
            answers.write(json.dumps(worker.answer(request)) + "\n")
            answers.flush()


if __name__ == "__main__":
    del sys.path[0]  # this folder: its module names are not for others to find
    main()
