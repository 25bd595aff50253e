"""What goes wrong with a trainer that clips gradients too: they are clipped twice. No trainer is imported here."""

import math
from typing import Any

from torch.optim import Optimizer

from fused_clip_adam.rules import as_grad_clip, grad_clip_rules


def refuse_second_clip(optimizer: Optimizer, argument: str, value: float, off: str = "0") -> None:
    """Raises where a trainer is about to clip what the optimizer has a `grad_clip` for.

    The trainer's clip would come first and hide the norms from the rule and from `grad_norm`. Rules that act on single
    elements or on the update (`SpikeClip`, `UpdateRMS`, `InducedMetric`) go with any clip.

    Args:
        optimizer: one of fca's; any other has no `grad_clip` and passes.
        argument, value: the trainer's own, such as "max_grad_norm" and 1.0; an infinite one clips nothing and passes.
        off: what turns the trainer's clip off.

    Raises:
        ValueError: names both.
    """
    for group in optimizer.param_groups:
        refuse_two_clips(group.get("grad_clip"), argument, value, off)


def refuse_two_clips(grad_clip: Any, argument: str, value: float, off: str) -> None:
    """The same for an optimizer that is not made yet; `grad_clip`: as it will be given."""
    for rule in grad_clip_rules(as_grad_clip(grad_clip)):
        if "gradient" in rule.parts and value < math.inf:
            raise ValueError(
                f"{argument}={value!r} clips gradients that the optimizer's grad_clip={rule} is to clip; accepted: "
                f"{argument}={off} with grad_clip, or {argument} with grad_clip=None"
            )
