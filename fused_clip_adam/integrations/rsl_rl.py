"""rsl-rl's PPO with the policy loss and an optimizer of this package (written against rsl-rl 5.5).

    train_cfg["algorithm"] = {
        "class_name": "fused_clip_adam.integrations.rsl_rl:FusedPPO",
        "optimizer": "fused_clip_adam:FusedClipAdamW",
        "optimizer_kwargs": {"grad_clip": 1.0},
        "max_grad_norm": float("inf"),
        ...  # PPO's own
    }

rsl-rl's own PPO takes only the names of four torch optimizers, so that the optimizer alone needs this class as well.
"""

from contextlib import ExitStack

from rsl_rl.algorithms import PPO
from rsl_rl.utils import resolve_callable, resolve_class, resolve_optimizer

from fused_clip_adam.integrations.surrogate import (
    FusedSurrogate,
    check_clip,
    check_objective,
    replaced,
    symmetric_clip,
)

GENERATORS = ("mini_batch_generator", "recurrent_mini_batch_generator")


class FusedPPO(PPO):
    """PPO whose policy gradient is `fca.policy_loss`'s: the same gradient, plus clip statistics for the optimizer.

    rsl-rl's rollout -> rsl-rl's update(), in which log-probabilities -> `fca.policy_loss` -> gradient and statistics
        -> `optimizer.observe(stats)` -> rsl-rl's own step

    Everything but the surrogate is rsl-rl's own code: advantages, value loss, entropy bonus, adaptive learning rate,
    mixed precision, recurrent models, symmetry, RND, several processes (statistics are then of all of them).
    `optimizer.new_rollout()` is called once an update.

    Args:
        actor, critic, storage, **options: PPO's own.
        optimizer: "module:Class" or a class, called with the parameters of actor and critic, `lr` and what follows; or
            one of rsl-rl's names, "adam" for example. Default: PPO's own equation, Adam without weight decay.
        optimizer_kwargs: dict of keyword arguments for the optimizer. With `grad_clip` in it set
            `max_grad_norm=float("inf")`. rsl-rl clips actor and critic each by its own norm, `grad_clip` both by one.
        objective: an fca objective, or a dict of "class_name" ("fused_clip_adam:CISPO") and its arguments; None:
            `fca.PPO` of `clip_param`. Each sample is a sequence of one token. With an objective given, `clip_param` is
            only the value loss's.

    Logged beside rsl-rl's own, all of them as `Loss/...`:
        `suppressed_mass`: share of the advantage mass whose gradient the clip removed.
        `ess`: effective sample size of the ratios, 1 = on policy.
        `nonfinite`: samples left out because their log-probability or advantage was not finite.
        `grad_norm`: mean norm of the gradients before the optimizer's own clip. Only for an optimizer with `grad_norm`;
            what rsl-rl's clip has left of it, unless that is turned off.

    Checkpoints are the runner's; the optimizer's state, with what its rules remember, is in the file. Environments and
    random generators are not.

    Raises:
        TypeError, ValueError: an optimizer, `max_grad_norm` or objective that is none, an objective that needs what
            rsl-rl does not have, or two clips.

    Source: rsl-rl 5.5, `PPO.update`.
    """

    def __init__(
        self,
        actor,
        critic,
        storage,
        *,
        optimizer="fused_clip_adam:FusedClipAdam",
        optimizer_kwargs=None,
        objective=None,
        **options,
    ):
        if isinstance(objective, dict):
            objective_class, arguments = resolve_class(objective)
            objective = objective_class(**arguments)
        if objective is not None:
            check_objective(objective)
        qualified = not isinstance(optimizer, str) or ":" in optimizer or "." in optimizer
        optimizer_class = resolve_callable(optimizer) if qualified else resolve_optimizer(optimizer)
        super().__init__(actor, critic, storage, **options)
        self.objective = objective
        # A layer that actor and critic share is in this list twice, and must be stepped once.
        params = dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"])
        self.optimizer = optimizer_class(list(params), lr=self.learning_rate, **(optimizer_kwargs or {}))
        check_clip(self.optimizer, self.max_grad_norm)

    def update(self):
        objective = symmetric_clip(self.clip_param) if self.objective is None else self.objective
        surrogate = FusedSurrogate(self.optimizer, objective, reduce=self.is_multi_gpu)
        actor = self._raw_actor  # the one whose method a compiled actor calls
        log_prob = actor.get_output_log_prob

        def get_output_log_prob(actions):
            batch = surrogate.batch  # rsl-rl has normalised and augmented it in place by now
            entropy = actor.output_entropy if "entropy" in objective.needs else None
            return surrogate.attach(log_prob(actions), batch.old_actions_log_prob, batch.advantages, entropy)

        with ExitStack() as stack:
            stack.enter_context(surrogate)
            for name in GENERATORS:
                following = surrogate.following(getattr(self.storage, name))
                stack.enter_context(replaced(self.storage, name, following))
            stack.enter_context(replaced(actor, "get_output_log_prob", get_output_log_prob))
            losses = super().update()

        seen = surrogate.summary()
        return {**losses, "surrogate": seen.pop("loss"), **seen}
