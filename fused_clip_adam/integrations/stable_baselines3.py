"""Stable-Baselines3's PPO with the policy loss of this package (written against Stable-Baselines3 2.9).

The optimizer alone needs nothing from here:

    PPO("MlpPolicy", env, max_grad_norm=float("inf"),
        policy_kwargs=dict(optimizer_class=fca.FusedClipAdamW, optimizer_kwargs=dict(grad_clip=0.5, weight_decay=0.0)))

`max_grad_norm=float("inf")` turns SB3's own clip off, which would otherwise clip the gradients before the optimizer
does; SB3 still takes the norm and multiplies every gradient by 1. 0 does not: it sets every gradient to zero, and None
is a TypeError. SB3 gives its default, torch.optim.Adam, eps=1e-5; another class has its own default unless
`optimizer_kwargs` says otherwise. The optimizer refuses a learning rate below 0, where a schedule such as `lambda
left: left * 1e-3` ends if the last rollout goes past `total_timesteps`; SB3's `LinearSchedule(1e-3, 0.0, 1.0)` stops
at 0.

A model saved with torch's AdamW goes on with this optimizer, its moments included, by
`PPO.load(path, env=env, custom_objects={"policy_kwargs": dict(saved_kwargs, optimizer_class=fca.FusedClipAdamW)})`.
"""

from stable_baselines3 import PPO

import fused_clip_adam as fca
from fused_clip_adam.integrations.surrogate import (
    FusedSurrogate,
    check_clip,
    check_objective,
    replaced,
    symmetric_clip,
)


class FusedPPO(PPO):
    """PPO whose policy gradient is `fca.policy_loss`'s: the same gradient, plus clip statistics for the optimizer.

    SB3's rollout -> SB3's train(), in which log-probabilities -> `fca.policy_loss` -> gradient and statistics
        -> `optimizer.observe(stats)` -> SB3's own step

    Everything but the surrogate is SB3's own code: advantages and their normalisation, value loss and its clip, entropy
    bonus, `target_kl`, gradient clip, schedules (which here end at 0 progress, where SB3's last rollout may go below,
    to a negative learning rate and clip). `optimizer.new_rollout()` is called once a rollout. The optimizer is
    the one of `policy_kwargs`, by default SB3's; with `grad_clip` in it set `max_grad_norm=float("inf")`.

    Args:
        *args, **kwargs: PPO's own.
        objective: an fca objective; None: `fca.PPO` of `clip_range`, which may be a schedule. Each sample is a
            sequence of one token. With an objective given, `clip_range` is only what `train/clip_fraction` counts.

    Logged beside SB3's own names, over all minibatches of a rollout:
        `policy/suppressed_mass`: share of the advantage mass whose gradient the clip removed.
        `policy/ess`: effective sample size of the ratios, 1 = on policy.
        `policy/nonfinite`: samples left out because their log-probability or advantage was not finite.
        `train/grad_norm`: mean norm of the gradients before the optimizer's own clip. Only for an optimizer with
            `grad_norm`; what SB3's clip has left of it, unless that is turned off.

    `save` and `load` are SB3's; the optimizer's state, with what its rules remember, is in the file. Environments and
    random generators are not.

    Raises:
        TypeError, ValueError: an `objective` that is none, or needs what SB3 does not have; a `max_grad_norm` that is
            not positive.

    Source: Stable-Baselines3 2.9, `PPO.train`.
    """

    def __init__(self, *args, objective=None, **kwargs):
        self.objective = objective  # before _setup_model, which __init__ and load() both call
        super().__init__(*args, **kwargs)

    def _setup_model(self):
        if self.objective is not None:
            check_objective(self.objective)
        super()._setup_model()
        check_clip(self.policy.optimizer, self.max_grad_norm)

    def _update_current_progress_remaining(self, num_timesteps, total_timesteps):
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def train(self):
        clip = symmetric_clip(self.clip_range(self._current_progress_remaining))
        surrogate = FusedSurrogate(self.policy.optimizer, clip if self.objective is None else self.objective)
        evaluate = self.policy.evaluate_actions
        newest = None

        def evaluate_actions(observations, actions):
            nonlocal newest
            values, logp, entropy = evaluate(observations, actions)
            if entropy is None:  # SB3 would take -logp for it, whose gradient must stay as it is
                entropy = -logp
            newest = logp.detach(), surrogate.batch.old_log_prob, self._normalized(surrogate.batch.advantages)
            return values, surrogate.attach(logp, *newest[1:], entropy), entropy

        with (
            surrogate,
            replaced(self.rollout_buffer, "get", surrogate.following(self.rollout_buffer.get)),
            replaced(self.policy, "evaluate_actions", evaluate_actions),
        ):
            super().train()

        seen = surrogate.summary()
        self.logger.record("train/policy_gradient_loss", seen["loss"])
        if self.objective is not None:  # SB3 has logged a sum with its own surrogate in it
            difference = surrogate.last_loss() - fca.policy_loss(*newest, objective=clip)[0]
            self.logger.record("train/loss", self.logger.name_to_value["train/loss"] + difference.item())
        for name in ("suppressed_mass", "ess", "nonfinite"):
            self.logger.record(f"policy/{name}", seen[name])
        if "grad_norm" in seen:
            self.logger.record("train/grad_norm", seen["grad_norm"])

    def _normalized(self, advantages):
        """As SB3 hands a minibatch's advantages to its surrogate."""
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return advantages
