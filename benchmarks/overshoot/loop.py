"""One run of the study: rollouts -> epochs of minibatches under the PPO clip -> what came of it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_clip_adam as fca
from benchmarks.overshoot.methods import Method
from benchmarks.overshoot.tasks import TASKS, Rollout

CLIP = 0.2
OBJECTIVE = fca.PPO(CLIP, CLIP)
CURVE_POINTS = 10
"""A run's learning curve is kept as this many means."""


@dataclass(frozen=True)
class Record:
    """What a run measured.

    Args:
        auc: mean over batches of the reward they earned: the area under the learning curve.
        final: the same over the last tenth of the batches.
        held_out: of the trained policy, on what it was not trained on.
        overshoot: after the last epoch on a batch, how far the log-ratio lies beyond the clip bound that its advantage
            looks to, per token, in nats; mean over batches.
        kl: k3 from the policy that acted, per token, then; mean over batches.
        clipped: share of tokens whose gradient the clip takes, then.
        kept: share of elements whose momentum the gate kept, mean over steps; None: no gate of the study's own.
        curve: the reward, in `CURVE_POINTS` means.
        steps: optimizer steps taken.
        failed: the weights ceased to be finite; from then on the policy earned the task's worst.
        cpu_s: seconds of processor time.
    """

    auc: float
    final: float
    held_out: float
    overshoot: float
    kl: float
    clipped: float
    kept: float | None
    curve: list[float]
    steps: int
    failed: bool
    cpu_s: float


def run(task_name: str, method: Method, lr: float, seed: int, shorten: int = 1) -> Record:
    """Trains one policy.

    Args:
        task_name: a key of `TASKS`.
        method: the optimizer and what goes with it.
        lr: its learning rate, where it decays the first one.
        seed: of the task.
        shorten: a `shorten`-th of the task's batches, for a trial.
    """
    torch.set_num_threads(1)
    start = time.process_time()
    task = TASKS[task_name](seed)
    setting = task.setting
    batches = max(2, setting.rollouts // shorten)
    optimizer = method.build(task.policy.parameters(), lr, setting, seed)
    order = torch.Generator().manual_seed(3 * 10**6 + seed)
    rewards, measured, steps, failed = [], [], 0, False
    for batch in range(batches):
        if method.decays:
            optimizer.set_lr(lr * (1 - batch / batches))
        rollout = task.collect()
        rewards.append(rollout.reward)
        steps += _improve(task, rollout, method, optimizer, order)
        if failed := not all(bool(p.isfinite().all()) for p in task.policy.parameters()):
            break
        measured.append(_measure(task, rollout))
    rewards += [0.0] * (batches - len(rewards))
    overshoot, kl, clipped = (statistics.fmean(column) for column in zip(*measured)) if measured else (math.nan,) * 3
    return Record(
        auc=statistics.fmean(rewards),
        final=statistics.fmean(rewards[-max(1, batches // 10) :]),
        held_out=0.0 if failed else task.held_out(),
        overshoot=overshoot,
        kl=kl,
        clipped=clipped,
        kept=optimizer.kept,
        curve=_means(rewards, CURVE_POINTS),
        steps=steps,
        failed=failed,
        cpu_s=time.process_time() - start,
    )


def _improve(task, rollout: Rollout, method: Method, optimizer, order: torch.Generator) -> int:
    """Epochs over a batch; returns the steps taken. "KL stop" leaves where the minibatch before went too far."""
    optimizer.new_rollout()
    samples, steps = len(rollout.advantages), 0
    for _ in range(task.setting.epochs):
        for rows in torch.randperm(samples, generator=order).split(samples // task.setting.minibatches):
            mask = None if rollout.mask is None else rollout.mask[rows]
            logp = task.log_prob(*(x[rows] for x in rollout.inputs))
            loss, stats = fca.policy_loss(
                logp, rollout.old_logp[rows], rollout.advantages[rows], mask=mask, objective=OBJECTIVE
            )
            if method.kl_stop and float(stats.kl_k3 / stats.tokens) > task.setting.kl_stop:
                return steps
            optimizer.step(loss, stats)
            steps += 1
            if rollout.targets is not None:
                task.learn_value(rollout, rows)
    return steps


@torch.no_grad()
def _measure(task, rollout: Rollout) -> tuple[float, float, float]:
    """(overshoot, k3, share of clipped tokens), per token of the batch."""
    D = task.log_prob(*rollout.inputs) - rollout.old_logp
    A = rollout.advantages if D.dim() == 1 else rollout.advantages[:, None].expand_as(D)
    beyond = excess(D, A)
    counts = torch.ones_like(D, dtype=torch.bool) if rollout.mask is None else rollout.mask
    k3 = D.exp() - 1 - D
    return tuple(float(x[counts].double().mean()) for x in (beyond, k3, (beyond > 0).float()))


def excess(D: Tensor, A: Tensor) -> Tensor:
    """How far log-ratios D lie beyond the bound their advantages A look to, where the clip takes the gradient."""
    high, low = math.log1p(CLIP), math.log1p(-CLIP)
    return torch.where(A > 0, (D - high).clamp(min=0), torch.where(A < 0, (low - D).clamp(min=0), 0.0))


def _means(values: list[float], points: int) -> list[float]:
    """`values` in `points` consecutive means, as nearly equal in length as can be."""
    edges = [round(i * len(values) / points) for i in range(points + 1)]
    return [round(statistics.fmean(values[a:b]), 4) for a, b in itertools.pairwise(edges) if b > a]
