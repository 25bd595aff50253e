"""Puts `policy_loss` in the place of a trainer's own PPO surrogate where the trainer has no hook for its loss.

    trainer's log-probabilities -> `attach` -> the same numbers, but their gradient is policy_loss's
        -> trainer's own loss and backward -> `optimizer.observe(stats)` -> trainer's own optimizer step

No trainer is imported here; stable_baselines3.py and rsl_rl.py use it.
"""

from contextlib import contextmanager

import torch

import fused_clip_adam as fca
from fused_clip_adam.integrations.clipping import refuse_second_clip
from fused_clip_adam.integrations.metrics import shares

# What the trainers here can hand to an objective beside log-probabilities and advantages.
AVAILABLE_INPUTS = ("entropy",)


class FusedSurrogate:
    """For the `with` block around a trainer's update of one rollout: the policy's gradient is `policy_loss`'s.

    Entering calls `optimizer.new_rollout()`. A minibatch's statistics go to `optimizer.observe` right before the step
    that its gradient leads to, and so not at all if the trainer stops before that step. Both only where the optimizer
    has them.

    Args:
        optimizer: the torch optimizer that the trainer steps.
        objective: an fca objective that `check_objective` accepts; each sample is a sequence of one token.
        reduce: merges statistics over the ranks of the default process group, so that rules act alike on each.

    The trainer must multiply its surrogate by 1, as it is where the surrogate is a mean over the minibatch: whatever
    gradient it sends into the log-probabilities is replaced.

    Raises:
        RuntimeError: from the optimizer's step, if no gradient of `attach` was made for it; nothing is changed then.
            From `summary`, if `attach` was never called.
    """

    def __init__(self, optimizer, objective, *, reduce=False):
        self.optimizer = optimizer
        self.objective = objective
        self.reduce = reduce
        self.batch = None
        self.stats = None
        self._losses, self._grad_norms = [], []
        self._arrived = []  # statistics of minibatches whose gradient has been made since the last step
        self._hooks = []
        self._depth = 0  # a subclass whose step() calls its parent's runs torch's hooks once for each

    def __enter__(self):
        if hasattr(self.optimizer, "new_rollout"):
            self.optimizer.new_rollout()
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def following(self, generator):
        """`generator`, a function that makes the trainer's minibatches; the newest is then `batch` here."""

        def batches(*args, **kwargs):
            for batch in generator(*args, **kwargs):
                self.batch = batch
                yield batch

        return batches

    def attach(self, logp, old_logp, advantages, entropy=None):
        """`logp` with the gradient of the objective's mean loss in the place of whatever the trainer sends into it.

        Args:
            logp: any shape, floating; log-probabilities of the minibatch's actions, of the trainer's graph.
            old_logp, advantages: as many elements in the same order; no gradient flows into them.
            entropy: like `logp`; read only by objectives that need it.

        Raises:
            As `policy_loss`.
        """
        column = (-1, 1)  # every sample a sequence of its own: token and sequence objectives are then both defined
        loss, stats = fca.policy_loss(
            logp.reshape(column),
            old_logp.reshape(column),
            advantages.reshape(column),
            objective=self.objective,
            entropy=entropy.detach().reshape(column) if "entropy" in self.objective.needs else None,
        )
        if self.reduce:
            stats.all_reduce()
        self.stats = stats if self.stats is None else self.stats + stats
        self._losses.append(loss.detach())
        return _ReplaceGradient.apply(logp, loss, lambda: self._arrived.append(stats))

    def _before_step(self, optimizer, args, kwargs):
        self._depth += 1
        if self._depth > 1:
            return
        if not self._arrived:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called in the trainer's update without a policy gradient: the "
                "update is not built like that of the version which this integration was written against"
            )
        if hasattr(optimizer, "observe"):
            for stats in self._arrived:
                optimizer.observe(stats)
        self._arrived.clear()

    def _after_step(self, optimizer, args, kwargs):
        self._depth -= 1
        if self._depth == 0 and hasattr(optimizer, "grad_norm"):
            self._grad_norms.append(optimizer.grad_norm)

    def last_loss(self):
        """The newest minibatch's loss, a 0-d tensor."""
        return self._losses[-1]

    def summary(self):
        """{name: float} over all minibatches; the only method that reads the device.

        `loss`: mean of the minibatches' losses. Those of `metrics.shares`; a token is a sample. `grad_norm`: mean of
        the steps' `optimizer.grad_norm`, only where the optimizer has it and made a step.

        Raises:
            RuntimeError: `attach` was never called.
        """
        if self.stats is None:
            raise RuntimeError(
                "the trainer's update asked for no log-probabilities: the update is not built like that of the version "
                "which this integration was written against"
            )
        values = {"loss": _mean(self._losses), **shares(self.stats.to_dict())}
        if self._grad_norms:
            values["grad_norm"] = _mean(self._grad_norms)
        return values


class _ReplaceGradient(torch.autograd.Function):
    """The value of `logp`; backward sends 1 into `loss` and nothing else anywhere, and calls `arrived`."""

    @staticmethod
    def forward(ctx, logp, loss, arrived):
        ctx.arrived = arrived
        ctx.save_for_backward(torch.ones_like(loss))
        return logp.view_as(logp)

    @staticmethod
    def backward(ctx, grad):
        ctx.arrived()
        (one,) = ctx.saved_tensors
        return None, one, None


def check_objective(objective):
    """Refuses what `FusedSurrogate` cannot compute.

    Raises:
        TypeError: not an fca objective.
        ValueError: an objective that needs an input which these trainers do not have.
    """
    if not isinstance(objective, fca.Objective):
        raise TypeError(f"objective must be None or an Objective such as PPO(), got {objective!r}")
    missing = [name for name in objective.needs if name not in AVAILABLE_INPUTS]
    if missing:
        raise ValueError(
            f"objective={type(objective).__name__} needs {', '.join(missing)}, which this trainer does not have; "
            f"accepted: objectives that need nothing, or {', '.join(AVAILABLE_INPUTS)}"
        )


def check_clip(optimizer, max_grad_norm):
    """Refuses a `max_grad_norm` that zeroes every gradient, or clips before a `grad_clip`: see `refuse_second_clip`.

    Raises:
        TypeError, ValueError: names max_grad_norm, its value and what is accepted.
    """
    accepted = "accepted: a positive number, float('inf') for no clip"
    if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, (int, float)):
        raise TypeError(f"max_grad_norm must be a number, got {max_grad_norm!r}; {accepted}")
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm!r} would set every gradient to zero or NaN; {accepted}")
    refuse_second_clip(optimizer, "max_grad_norm", max_grad_norm, off="float('inf')")


def symmetric_clip(clip):
    """The objective of a trainer with one clip number: ratios end at 1 - clip and 1 + clip.

    Raises:
        ValueError: negative, or not finite.
    """
    return fca.PPO(min(clip, 1.0), clip)  # a ratio is positive: a lower bound below 0 never acts


@contextmanager
def replaced(owner, name, value):
    """`owner.name` is `value` inside of the block, for this one object."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _mean(tensors):
    return float(torch.stack(tensors).mean())
