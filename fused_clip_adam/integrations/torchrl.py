"""torchrl's ClipPPOLoss on the fused objectives (written against torchrl 0.14).

The optimizer needs nothing of this: it takes `loss_module.parameters()` as any other does. The loss module keeps the
statistics of what it clipped, and one line of the training loop hands them over:

    losses = loss_module(batch)
    (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
    optimizer.observe(loss_module.stats)
    optimizer.step()

In a loop that one does not write, such as that of torchrl's Trainer, a hook of the loss module does it:

    loss_module.register_forward_hook(lambda module, inputs, losses: optimizer.observe(module.stats))

With `grad_clip` in the optimizer leave the Trainer's `clip_norm` at None, or the gradients are clipped twice.
"""

import torch
from tensordict import is_tensor_collection
from tensordict.nn import dispatch
from torchrl.objectives import ClipPPOLoss

import fused_clip_adam as fca
from fused_clip_adam.integrations.surrogate import check_objective


class FusedClipPPOLoss(ClipPPOLoss):
    """ClipPPOLoss with its objective replaced by `fca.policy_loss`; same outputs, plus clip statistics in `stats`.

    torchrl's forward (advantage, log-ratio, entropy, critic, metrics) -> `fca.policy_loss` -> `loss_objective`, `stats`

    Args:
        *args, **kwargs: ClipPPOLoss's own, with `reduction` "mean" or "sum". The masks that torchrl reads
            (`loss_mask_key`) are applied; `delay_actor` and `max_importance_ratio` enter as detached weights.
        objective: an fca objective. None: `fca.PPO` with the bounds of `clip_epsilon`, which may be scheduled. With an
            objective given `clip_epsilon` is not read, and accepted only for `clip_value=True`. Entropies that an
            objective needs are the distribution's. Objectives of whole sequences (`fca.GSPO`) take batches [B, T], one
            trajectory a row. With `reduction="mean"` the aggregation is the objective's own.

    Attributes:
        objective: of the next call; may be set.
        stats: `fca.ClipStats` of the last call, None before the first. With several processes: `stats.all_reduce()`
            before `optimizer.observe(stats)`.

    Outputs are ClipPPOLoss's; with an objective given `clip_fraction` is the share of samples that it clipped.

    Raises:
        TypeError: not an fca objective.
        ValueError: another reduction, a clip range that `fca.PPO` does not take, `clip_epsilon` beside an objective, an
            objective that needs what torchrl does not have. At a call: a batch that is not [B, T], for sequences.
        AttributeError: setting a `clip_epsilon` that is not read.

    Source: torchrl 0.14, `ClipPPOLoss.forward`.
    """

    def __init__(self, *args, objective=None, **kwargs):
        if objective is not None:
            check_objective(objective)
        if objective is not None and "clip_epsilon" in kwargs and kwargs.get("clip_value") is not True:
            raise ValueError(
                f"clip_epsilon={kwargs['clip_epsilon']!r} is not read beside objective={objective}; accepted: bounds "
                "in the objective, or clip_epsilon with clip_value=True"
            )
        super().__init__(*args, **kwargs)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={self.reduction!r} is not handled by FusedClipPPOLoss; accepted: mean, sum")
        self.stats = None
        self._given, self._from_bounds, self._found = objective, None, {}
        _ = self.objective  # refuses a clip range now, not at the first call

    @property
    def objective(self):
        if self._given is not None:
            return self._given
        names = ("clip_epsilon_low", "clip_epsilon_high") if self._asymmetric_clip else ("clip_epsilon",) * 2
        bounds = [self._buffers[name] for name in names]
        # Reading a bound makes the host wait for a GPU: done only where one was changed in place, or replaced.
        seen = [(id(bound), bound._version) for bound in bounds]
        if self._from_bounds is None or self._from_bounds[0] != seen:
            self._from_bounds = seen, fca.PPO(*(float(bound) for bound in bounds)), bounds
        return self._from_bounds[1]

    @objective.setter
    def objective(self, value):
        if value is not None:
            check_objective(value)
        self._given = value

    def __setattr__(self, name, value):
        if name in self._CLIP_EPSILON_BUFFER_NAMES and self.__dict__.get("_given") is not None:
            raise AttributeError(f"{name}={value!r} is not read beside objective={self._given}; set objective instead")
        super().__setattr__(name, value)

    # What ClipPPOLoss.forward passes through on its way is kept for ours.

    def _maybe_normalize_advantage(self, *args, **kwargs):
        self._found["advantage"] = super()._maybe_normalize_advantage(*args, **kwargs)
        return self._found["advantage"]

    def _get_cur_log_prob(self, tensordict, params=None):
        found = super()._get_cur_log_prob(tensordict, params)
        if params is None:
            self._found["logp"] = found[0]
        return found

    def _log_weight(self, tensordict, adv_shape):
        found = super()._log_weight(tensordict, adv_shape)
        self._found["tensordict"] = tensordict
        self._found["log_weight"], self._found["distribution"], _, self._found["log_is_weight"] = found
        return found

    @dispatch
    def forward(self, tensordict):
        try:
            losses = super().forward(tensordict)
            loss, self.stats = self._policy_loss(**self._found)
        finally:
            self._found = {}  # it holds the graph
        losses.set("loss_objective", loss)
        if self._given is not None:
            clipped = self.stats.clipped_low + self.stats.clipped_high
            losses.set("clip_fraction", clipped / self.stats.tokens.clamp(min=1.0))
        return losses

    def _policy_loss(self, advantage, logp, tensordict, log_weight, distribution, log_is_weight):
        """`log_weight` is logp minus the log-probability that the clip compares with; both of them [*batch, 1]."""
        objective = self.objective
        if advantage.dim() < log_weight.dim():  # one for all the tokens of an action
            lead, tokens = advantage.shape[:-1], log_weight.dim() - advantage.dim()
            advantage = advantage.reshape(*lead, *(1,) * tokens, advantage.shape[-1])
        shape = torch.broadcast_shapes(advantage.shape, log_weight.shape)
        in_rows = len(shape) == 3 and shape[-1] == 1
        sequences = objective.needs_sequences or (
            self.reduction == "mean" and objective.default_aggregation != "token-mean"
        )
        if sequences and not in_rows:
            raise ValueError(
                f"objective={objective} weighs whole sequences; accepted: a batch [B, T], one trajectory a row, got "
                f"{list(shape[:-1])}"
            )

        def laid_out(x):
            return x.expand(shape).squeeze(-1) if in_rows else x.expand(shape).reshape(-1)

        mask = None
        for key in self._loss_mask_keys():
            own = tensordict.get(key, default=None)
            if own is not None:
                own = self._expand_loss_mask(own, log_weight)
                mask = own if mask is None else mask & own
        logp = _summed(logp).reshape(log_weight.shape)
        entropy = None
        if "entropy" in objective.needs:
            entropy = _summed(self._get_entropy(distribution, adv_shape=tensordict.shape)).detach()
            entropy = laid_out(entropy.reshape(log_weight.shape))
        return fca.policy_loss(
            laid_out(logp),
            laid_out((logp - log_weight).detach()),
            laid_out(advantage.detach()),
            mask=None if mask is None else laid_out(mask),
            objective=objective,
            aggregation=None if self.reduction == "mean" else "constant",
            normalizer=None if self.reduction == "mean" else 1.0,
            weights=None if log_is_weight is None else laid_out(log_is_weight.detach().exp()),
            entropy=entropy,
        )


def _summed(logp):
    """The heads of a composite action are one action."""
    return logp.sum(dim="feature", reduce=True) if is_tensor_collection(logp) else logp
