"""From a loss to an optimizer that a trainer builds apart, from its configuration, so that neither knows the other.

    loss of each micro-batch -> `hand_over(stats)`, added up in this process -> `FusedClipAdamW.step()` observes them

No trainer is imported here.
"""

import torch.distributed as dist

import fused_clip_adam as fca
from fused_clip_adam.rules import grad_clip_rules, overshoot_rules

_seen = []  # at most one ClipStats: of all losses in this process since zero_grad() or the last step that took them


def hand_over(stats):
    """Gives the statistics of a loss that is about to be differentiated to this process's next `FusedClipAdamW` step.

    Args:
        stats: a `ClipStats`; those of several calls add up.
    """
    _seen[:] = [sum(_seen, stats)]


class FusedClipAdamW(fca.FusedClipAdamW):
    """`fca.FusedClipAdamW` that observes what was handed over since the last `zero_grad()` or step.

    `zero_grad()` drops statistics with the gradients, so that a step which a trainer skips takes none along. With
    torch.distributed initialised they are of all ranks: `data_group` is the default group.

    For the policy. A critic's optimizer in the same process is `fca.FusedClipAdamW`: this one would take the policy's
    statistics, were it stepped between the policy's losses and its step.

    Args:
        params, *args, **options: as `fca.FusedClipAdamW`.

    Raises:
        ValueError: as `fca.FusedClipAdamW`; `reset=OnRollout(...)`, as nobody calls `new_rollout()`; with FSDP1 on
            several ranks, `skip_nonfinite` and rules that sum over gradients, of which a rank then sees a slice that
            does not say what it is one of. FSDP2 has neither limit.
    """

    def __init__(self, params, *args, **options):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several:
            options.setdefault("data_group", dist.group.WORLD)
        super().__init__(params, *args, **options)
        for group in self.param_groups:
            if isinstance(group.get("reset"), fca.OnRollout):
                raise ValueError(
                    f"reset={group['reset']} would never act: the trainer does not call new_rollout(); accepted: None, "
                    "Periodic, WhenClipped"
                )
            if several and any(getattr(p, "_fsdp_flattened", False) for p in group["params"]):
                self._refuse_sums(group)

    def _refuse_sums(self, group):
        rules = (*grad_clip_rules(group.get("grad_clip")), *overshoot_rules(group.get("overshoot")))
        summing = [
            str(rule)
            for rule in rules
            if "gradient" in rule.parts or rule.per_tensor or rule.needs_norm or rule.extra_reads or rule.needs_dots
        ]
        if self.skip_nonfinite:
            summing.append("skip_nonfinite=True")
        if summing:
            raise ValueError(
                f"{', '.join(summing)}: FSDP1 shows a rank a slice of the gradients only; accepted: FSDP2, or rules of "
                "single elements and blocks beside the trainer's own clip"
            )

    def zero_grad(self, set_to_none=True):
        _seen.clear()
        super().zero_grad(set_to_none)

    # Not in `step`: torch wraps that of every class, and hooks would run for this one and again for the inherited one.
    def _step(self, samples=None, portion=None):
        if _seen and portion is not None:
            raise RuntimeError("statistics are handed over at step(), too late for step_in_backward; observe() them")
        if _seen:
            self.observe(_seen.pop())
        super()._step(samples, portion)
