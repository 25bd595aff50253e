"""The optimizer in Lightning (written against lightning 2.6).

`configure_optimizers` returns it as any other: checkpoints, gradient accumulation, "16-mixed" and manual optimization
need nothing more. `grad_clip` clips in the step and `Trainer(gradient_clip_val=...)` before it: give one of them. With
"16-mixed" Lightning refuses `gradient_clip_val`, because the optimizer unscales gradients itself; there take
`grad_clip`. Statistics are handed over, of all ranks, by

    def training_step(self, batch, batch_idx):
        loss, stats = fca.policy_loss(self(batch), batch["old_logp"], batch["advantages"])
        observe(self.optimizers(), stats)
        return loss
"""

import torch.distributed as dist
from lightning.pytorch import Callback

from fused_clip_adam.integrations.clipping import refuse_second_clip


def observe(optimizer, stats):
    """Hands the next step what an objective clipped, in all processes.

    stats -> summed over the ranks of torch.distributed, if there are several (in place) -> `optimizer.observe(stats)`

    Args:
        optimizer: what `self.optimizers()` gives, or one of the several it gives.
        stats: `fca.ClipStats` from `fca.policy_loss` or `fca.clip_stats`.

    Raises:
        TypeError: not an optimizer that has `observe`, or not a ClipStats.
    """
    own = _unwrapped(optimizer)
    if not hasattr(own, "observe"):
        raise TypeError(
            f"optimizer must be what self.optimizers() gives for one of fca's optimizers, got {type(own).__name__}"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        stats.all_reduce()  # a rule that acts on the statistics must act alike on every rank
    own.observe(stats)


class FusedClipCallback(Callback):
    """Logs `grad_norm` (before clipping, unscaled) and `step_count_skipped` of fca's optimizers: `callbacks=[this]`.

    Both lie on the device and are logged as they are: the host reads them when a logger writes, every
    `log_every_n_steps`, and no pass over the gradients is made. With several of fca's optimizers the names end in
    `/0`, `/1`, their places in `trainer.optimizers`.

    Raises:
        ValueError: when training starts, `Trainer(gradient_clip_val=...)` beside a `grad_clip` that scales gradients.
        TypeError: when training starts, none of the optimizers is fca's.
    """

    def on_train_start(self, trainer, pl_module):
        own = _of_trainer(trainer)
        if not own:
            kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise TypeError(f"FusedClipCallback: none of the optimizers {kinds} is fca's, there is nothing to log")
        if trainer.gradient_clip_val:
            for optimizer in own.values():
                refuse_second_clip(optimizer, "gradient_clip_val", trainer.gradient_clip_val)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        own = _of_trainer(trainer)
        for at, optimizer in own.items():
            suffix = f"/{at}" if len(own) > 1 else ""
            pl_module.log(f"grad_norm{suffix}", optimizer.grad_norm)
            pl_module.log(f"step_count_skipped{suffix}", optimizer.step_count_skipped)


def _unwrapped(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


def _of_trainer(trainer):
    """fca's optimizers by their place among the trainer's."""
    return {at: own for at, own in enumerate(trainer.optimizers) if hasattr(own, "observe")}
