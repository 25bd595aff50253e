"""The optimizer in a transformers Trainer (written against transformers 5.24).

Any Trainer takes it as it is, in one of two ways:

    Trainer(..., optimizers=(fca.FusedClipAdamW(model.parameters(), lr=1e-4, grad_clip=1.0), None))
    Trainer(..., optimizer_cls_and_kwargs=(fca.FusedClipAdamW, {"lr": 1e-4, "grad_clip": 1.0}))

The second keeps the Trainer's two groups: `args.weight_decay`, and 0 for biases and norms. In both, lr and betas are
those given here, not those of `args`. With `grad_clip` set, give `max_grad_norm=0` (its default is 1.0; None is a
TypeError in the Trainer), or the gradients are clipped twice. `FusedTrainerMixin` refuses that, and logs the norm.
"""

from transformers import Trainer

from fused_clip_adam.integrations.clipping import refuse_second_clip


class FusedTrainerMixin:
    """A transformers Trainer that logs the optimizer's own gradient norm: `class Mine(FusedTrainerMixin, Trainer)`.

    With `max_grad_norm=0` a Trainer still runs a clip with an infinite threshold, which multiplies every gradient by 1,
    only to log the norm. This one logs `optimizer.grad_norm`, of the step before the log, and skips that pass. For any
    subclass of Trainer, TRL's among them; with an optimizer that has no `observe` it changes nothing.

    Raises:
        ValueError: `max_grad_norm` above 0 beside a `grad_clip` that scales gradients, at the first step.
    """

    def _clip_grad_norm(self, model):
        optimizer = clip_aware_optimizer(self.optimizer)
        if optimizer is not None:
            refuse_second_clip(optimizer, "max_grad_norm", self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        # Only with max_grad_norm=0 does the Trainer come here without a norm. The optimizer is about to compute it.
        if grad_norm is None and clip_aware_optimizer(self.optimizer) is not None:
            return None  # log() adds it
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs, *args, **kwargs):
        optimizer = clip_aware_optimizer(self.optimizer)
        if "loss" in logs and "grad_norm" not in logs and optimizer is not None:
            logs["grad_norm"] = float(optimizer.grad_norm)
        return super().log(logs, *args, **kwargs)


class FusedTrainer(FusedTrainerMixin, Trainer):
    """transformers.Trainer with `FusedTrainerMixin`; all arguments are Trainer's own."""


def clip_aware_optimizer(optimizer):
    """The optimizer that has `observe`, out of accelerate's (or DeepSpeed's) wrappers; None if there is none."""
    while optimizer is not None and not hasattr(optimizer, "observe"):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
