"""step_in_backward: parameters are updated, and their gradients freed, while backward() runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_clip_adam.rules import as_grad_clip, grad_clip_rules
from fused_clip_adam.rules.rule import Rule, count

if TYPE_CHECKING:
    from fused_clip_adam.optimizer import _FusedClip


class Portion:
    """A step that is taken tensors by tensors: what its portions have in common, and what they add up to.

    Every portion finds the rules' memory as the step before has left it, but for what a rule remembers of single
    parameters, each of which is in one portion. What portions change of the rest they change alike, once.
    """

    def __init__(
        self, previous: Tensor, observed: Tensor | None, grad_scale: Tensor | None, skip_nonfinite: bool
    ) -> None:
        self.previous = previous.clone()  # float64 0-d: the square of the last step's norm
        self.observed = observed
        self.grad_scale = grad_scale
        self.skip_nonfinite = skip_nonfinite
        self.gradients: dict[Tensor, Tensor] = {}
        self.done: set[Tensor] = set()
        self.is_first = True
        self.square_sum: Tensor | None = None
        self.skipped: Tensor | None = None
        self._memory: dict[tuple[int, str], list[tuple[Tensor, Tensor, Tensor]]] = {}  # (itself, before, after)

    def remembered(self, index: int) -> set[str]:
        """Names of a group's rules whose memory is at hand."""
        return {name for group, name in self._memory if group == index}

    def begin(self, memory: dict[int, dict[str, Any]], rules: list[tuple[int, Rule]]) -> None:
        for index, rule in rules:
            key = (index, type(rule).__name__)
            own = memory[index].get(key[1], {}).get("tensors", {})
            if key not in self._memory:
                shared = [own[name] for name in own.keys() - rule.of_parameters()]
                self._memory[key] = [(tensor, tensor.clone(), tensor.clone()) for tensor in shared]
            for tensor, before, _ in self._memory[key]:
                tensor.copy_(before)

    def end(self, square_sum: Tensor, skipped: Tensor) -> None:
        for of_rule in self._memory.values():
            for tensor, before, after in of_rule:
                after.copy_(torch.where(tensor != before, tensor, after))
        first = self.square_sum is None
        self.square_sum = square_sum if first else self.square_sum + square_sum.to(self.square_sum.device)
        self.skipped = skipped if first else self.skipped + skipped.to(self.skipped.device)
        self.is_first = False

    def close(self) -> None:
        """The memory is that after the step."""
        for of_rule in self._memory.values():
            for tensor, _, after in of_rule:
                tensor.copy_(after)


class BackwardStep:
    """What `step_in_backward` returns. `remove()`, or leaving a `with` block, turns it off."""

    def __init__(
        self,
        optimizer: _FusedClip,
        bucket_bytes: int,
        accumulation_steps: int,
        previous_norm: bool,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.optimizer = optimizer
        self.previous_norm = previous_norm
        self.bucket_bytes = bucket_bytes
        self.accumulation_steps = accumulation_steps
        self.scaler = scaler
        self._lock = threading.Lock()  # autograd has a thread for every device
        self._portion: Portion | None = None
        self._backwards: dict[Tensor, int] = {}  # since the last step
        self._waiting: dict[Tensor, int] = {}  # bytes
        optimizer._backward_step = self
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]

    def remove(self) -> None:
        """Takes the hooks off. The optimizer steps as usual again.

        Raises:
            RuntimeError: between a backward() and its step(), where part of a step has been taken.
        """
        if self._portion is not None or self._waiting:
            raise RuntimeError("remove() between backward() and step(): a part of the step has been taken; call step()")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.optimizer._backward_step is self:
            self.optimizer._backward_step = None

    def __enter__(self) -> BackwardStep:
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self.remove()

    @torch.compiler.disable
    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        with self._lock:
            if p in self._waiting or (self._portion is not None and p in self._portion.done):
                raise RuntimeError(
                    f"a second gradient of a parameter of shape {list(p.shape)} before step(): give step_in_backward "
                    "accumulation_steps, or call step() after each backward(). Its first gradient has been used"
                )
            self._backwards[p] = self._backwards.get(p, 0) + 1
            if self._backwards[p] < self.accumulation_steps:
                return
            # Of the whole tensor, where it is cut up: every rank must close its buckets at the same place.
            self._waiting[p] = p.numel() * p.grad.element_size()
            if sum(self._waiting.values()) >= self.bucket_bytes:
                self._flush(list(self._waiting))

    def _flush(self, params: list[Tensor]) -> None:
        opt = self.optimizer
        self._waiting.clear()
        if self._portion is None:
            _check_rules(opt, self.previous_norm)  # a scheduler may have changed them
            scaled = self.scaler is not None and self.scaler.is_enabled()
            scale = self.scaler._get_scale_async() if scaled else None
            self._portion = Portion(
                opt._books.grad_square_sum, opt._books.observed, scale, opt.skip_nonfinite or scaled
            )
        portion = self._portion
        portion.gradients = {p: p.grad for p in params}
        try:
            opt._step(portion=portion)
        except Exception:  # refused: nothing has been changed, and step() may be called again
            self._portion = None if portion.square_sum is None else portion
            raise
        finally:
            portion.gradients = {}
        portion.done.update(params)
        for p in params:
            p.grad = None

    def _finish(self) -> None:
        """The optimizer's step(): what is left, and the books."""
        opt = self.optimizer
        if getattr(opt, "grad_scale", None) is not None and self.scaler is None:
            raise RuntimeError(
                "a GradScaler steps this optimizer: give it to step_in_backward(scaler=), which unscales"
            )
        with self._lock:
            # Waiting, or fewer backward passes than accumulation_steps have reached them.
            left = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
            if left:
                self._flush(left)
            self._backwards.clear()
            portion, self._portion = self._portion, None
        if portion is None or portion.square_sum is None:
            return
        portion.close()
        books = opt._books
        books.observed = None
        skipped = portion.skipped.to(books.steps_skipped.device) > 0
        books.steps_skipped += skipped
        books.grad_square_sum.copy_(portion.square_sum)
        if portion.grad_scale is not None:  # so that the scaler's update() lowers the scale
            found = skipped.to(torch.float32)
            self.scaler._per_optimizer_states[id(opt)]["found_inf_per_device"] = {found.device: found}

    def _check_observe(self) -> None:
        if self._portion is not None:
            raise RuntimeError(
                "observe() must come before backward() under step_in_backward: a part of this step has been taken"
            )


def step_in_backward(
    model: nn.Module,
    optimizer: _FusedClip,
    *,
    bucket_bytes: int = 32 * 2**20,
    accumulation_steps: int = 1,
    previous_norm: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> BackwardStep:
    """Updates parameters while backward() runs, and frees each gradient as soon as it has been used.

    gradient of a parameter is complete -> waits until `bucket_bytes` have gathered -> norm, update -> `.grad` = None

    The training loop stays as it is: `loss.backward(); opt.step()`; `step()` takes what is left and counts the step.
    At most about one bucket of gradients is alive beside the largest tensor's. The result is that of the ordinary step,
    bit for bit, under every rule that looks at single tensors, rows or elements (`PerTensorNorm`, `AGC`, `SpikeClip`,
    `StableSpamClip`, `UpdateRMS`, all overshoot and reset rules) and `GlobalNorm(lag=True)`. `observe()` must come
    before backward().

    What cannot be known before the last gradient:

    - This step's norm over all gradients. Rules that read it (`GlobalNorm`, `AutoClip`, `ZClip`, and `AdaGC` in its
      first `start` steps) are refused unless `previous_norm=True` gives them that of the step before; in the first step
      they do not scale. `InducedMetric` sums over all gradients, and is refused.
    - Whether a later gradient is not finite. Under `skip_nonfinite`, or a GradScaler, the tensors of the bucket with
      such a gradient are left out together; those updated before it stay updated. `step_count_skipped` counts the step.

    Args:
        model: the parameters of `optimizer` are its own. With FSDP2, after `fully_shard`. Not DistributedDataParallel,
            which reduces gradients after they have appeared.
        optimizer: FusedClipAdamW, FusedClipAdam or FusedFAdam. Groups added later are stepped by `step()` only.
        bucket_bytes: gradients are used in portions of at least so many bytes; 0: each by itself. Many small ones cost
            launches.
        accumulation_steps: backward passes of a step; gradients are used in the last of them, and alive until then.
        previous_norm: see above.
        scaler: the torch.amp.GradScaler whose `scale(loss)` is differentiated, and whose `step(optimizer)` and
            `update()` follow. Do not call its `unscale_`.

    Returns:
        A handle with `remove()`, also a context manager.

    Raises:
        TypeError, ValueError: an argument out of range, a rule that needs all gradients, DistributedDataParallel,
            shard_group, differentiable=True, parameters that are not the model's.
        RuntimeError: the optimizer steps in backward already. From backward(): a parameter's second gradient before
            step(); what `step()` raises.

    Source: this project; for the hooks torch's tutorial on fusing the optimizer step into the backward pass.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not hasattr(optimizer, "_backward_step"):
        raise TypeError(f"optimizer must be one of fused_clip_adam, got {type(optimizer).__name__}")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise TypeError("model is DistributedDataParallel, which reduces gradients after the hooks; use fully_shard")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be None or a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not isinstance(previous_norm, bool):
        raise TypeError(f"previous_norm must be a bool, got {previous_norm!r}")
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 0:
        raise ValueError(f"bucket_bytes must be an int of at least 0, got {bucket_bytes!r}")
    count("step_in_backward", "accumulation_steps", accumulation_steps)
    if optimizer._backward_step is not None:
        raise RuntimeError("this optimizer steps in backward already; remove() the other handle first")
    if optimizer.defaults["differentiable"]:
        raise ValueError("differentiable=True goes with an ordinary step() only")
    if optimizer._group_names["shard_group"] is not None:
        raise ValueError("shard_group goes with an ordinary step() only: other parameters make other portions")
    own = set(model.parameters())
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if p not in own:
                raise ValueError(f'param_groups[{index}]["params"][{position}] is no parameter of the model')
    _check_rules(optimizer, previous_norm)
    return BackwardStep(optimizer, bucket_bytes, accumulation_steps, previous_norm, scaler)


def _check_rules(optimizer: _FusedClip, previous_norm: bool) -> None:
    for index, group in enumerate(optimizer.param_groups):
        rules = grad_clip_rules(as_grad_clip(group.get("grad_clip")))
        refuse_rules_over_all(f"param_groups[{index}]", rules, previous_norm)


def refuse_rules_over_all(where: str, rules: Iterable[Rule], previous_norm: bool) -> None:
    """Raises:
    ValueError: a clip rule that needs all gradients of a step; names it and `where`.
    """
    for rule in rules:
        if rule.sums_all:
            raise ValueError(f"{where}: {rule} needs the gradients of all tensors at once")
        if rule.of_all and rule.needs_norm and not previous_norm:
            raise ValueError(
                f"{where}: {rule} needs this step's norm, which is not known before the last gradient; "
                "previous_norm=True takes that of the step before"
            )
