"""FusedClipAdamW and FusedClipAdam: torch's AdamW and Adam with gradient clipping and overshoot rules in one pass.

`step()` reads top-down as three phases:

    batches  ->  1 norm  ->  2 prologue (every scalar, on the device)  ->  3 update (one pass over memory)

Rules that the prologue kernel does not know change the scalars between 2 and 3, see rules/rule.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_clip_adam import backends
from fused_clip_adam.backends.scalars import GROUP_SIGNALS
from fused_clip_adam.batches import Batch, attach_states, collect
from fused_clip_adam.distributed import Ranks, Spread, group_name, is_spread, local, moved
from fused_clip_adam.group_step import GroupStep, Layout, Part, StepFacts, layout, over_everything
from fused_clip_adam.in_backward import BackwardStep, Portion
from fused_clip_adam.objectives.losses import check_logp, check_tensor, policy_loss
from fused_clip_adam.objectives.objective import Objective
from fused_clip_adam.objectives.ppo import PPO
from fused_clip_adam.objectives.stats import ClipStats
from fused_clip_adam.offload import HOST, Offloaded, check_offload, check_reach, is_away
from fused_clip_adam.rules import (
    AlignedMomentum,
    AutoClip,
    GlobalNorm,
    MomentumBrake,
    OnRollout,
    Rule,
    SpikeClip,
    UpdateClamp,
    as_grad_clip,
    as_overshoot,
    as_reset,
    from_plain,
    grad_clip_rules,
    overshoot_rules,
    to_plain,
)
from fused_clip_adam.rules.overshoot import FisherUpdate
from fused_clip_adam.rules.plain import KEYS as RULE_KEYS
from fused_clip_adam.rules.plain import is_plain
from fused_clip_adam.samples import Samples, in_order, noise_of, sample_factors, score_weights, stacks_of

_AS_RULE = {"grad_clip": as_grad_clip, "overshoot": as_overshoot, "reset": as_reset}
_FORM_KEYS = ("eps_before_correction", "decay_after_update")
"""Group keys that some published methods need; only in groups where they are True."""
_EXTRA_KEY = "fused_clip_adam"
"""Where state_dict() keeps what belongs to no parameter: an entry of every param group, which torch ignores."""

_EXTRAS_DOC = """
    Keyword Args:
        grad_clip: None, a positive float (global L2 norm), a `GradClip` rule, or a tuple of rules that shape different
            parts of a step, such as (1.0, SpikeClip()). Gradients are scaled as they are read; `.grad` is never
            written. What a rule remembers is in the state dict.
        overshoot: None, "align", "align-element", "align-tensor", "cautious", "grams", "brake", an `Overshoot` rule, or
            a tuple of rules that shape different parts of an update, such as ("align", UpdateClamp(1.0)).
        reset: None or a `Reset` rule.
        eps_before_correction: adds eps before bias correction, sqrt(v) + eps, as some published methods do.
        decay_after_update: decoupled weight decay multiplies the updated parameter instead of the old one.
        state_dtype: None keeps the moments in the parameter's dtype, as torch does; torch.float32 keeps them in
            float32.
        skip_nonfinite: True makes a step whose gradient norm is not finite change nothing.
        backend: "auto", "cpu" (native kernels), "cuda" (native kernels), "triton" or "reference" (plain torch
            operations, any device). "auto" takes the native kernels of the parameters' device, else Triton on a GPU.
        offload: None, or "cpu": moments, step and the update are the host's, for parameters on a CUDA device, which
            keeps parameters and gradients only; for trainers that share the GPU with a rollout engine. Gradients and
            parameters come down and parameters go up in buckets of 32 MiB or one tensor, overlapped with the kernels
            ("auto", "cpu" or "reference"); the next forward pass sees them, and the host waits for the device once a
            step. Pinned staging memory: two buckets; where a rule reads gradients before the update (a norm is
            enough), all of them and three buckets' parameters. `grad_norm` and `step_count_skipped` are on the CPU.
            Takes the step of the CPU, bit for bit, but for the last bit of a norm that the update gathers. Parameters
            on the CPU take the ordinary step.
        shard_group: None, or the ProcessGroup (or DeviceMesh of one dimension) whose ranks hold other parameters of the
            same model: ZeroRedundancyOptimizer, pipeline stages. Norms over all gradients, `skip_nonfinite` and
            `found_inf` are then over all of its ranks, each of which must take every step. DTensors need none; beside
            them it has one rank of each shard.
        data_group: None, or the group whose ranks have seen other data: what they `observe` is added up. None with
            DTensors: their mesh; with plain parameters: each rank acts on its own.

    `grad_clip`, `overshoot`, `reset`, the two forms and the numbers may also be set per param group, and changed
    between steps.

    State, per parameter: `step`, `exp_avg`, `exp_avg_sq`, with amsgrad `max_exp_avg_sq`, as torch; `bias_weights`
    (float64 [2], the running bias corrections) only under a rule that varies a beta (`MomentumBrake`,
    `StableSpamClip(total_steps=...)`); and what a rule remembers of a parameter, as of the last `state_dict()`.

    Raises:
        ValueError, TypeError: a hyper-parameter or rule out of range, an unknown name, complex parameters.
        RuntimeError: a backend that cannot run here; torch's own refusals.
        From `step()`: sparse, complex, meta, mismatched or self-overlapping tensors, parameters that share memory;
        nothing has been changed then.

    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), Kingma & Ba 2015 (arXiv 1412.6980); the rules' docstrings.
"""


@dataclasses.dataclass
class Books:
    """Numbers of the whole optimizer. An object, so that a wrapper with a copy of the optimizer's attributes, such as
    Lightning's, still keeps the same ones.
    """

    grad_square_sum: Tensor = dataclasses.field(default_factory=lambda: _zero(torch.float64))  # of the last step
    steps_skipped: Tensor = dataclasses.field(default_factory=lambda: _zero(torch.int64))
    observed: Tensor | None = None  # float32 [2], since the last step


class _FusedClip:
    """What FusedClipAdamW and FusedClipAdam add to torch's classes."""

    # GradScaler hands unscaling and the skip of an overflowed step to the kernel (grad_scale, found_inf).
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        grad_clip=None,
        overshoot=None,
        reset=None,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        offload: str | None = None,
        shard_group: Any = None,
        data_group: Any = None,
        eps_before_correction: bool = False,
        decay_after_update: bool = False,
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype must be None or torch.float32, got {state_dtype!r}")
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be a bool, got {skip_nonfinite!r}")
        forms = {"eps_before_correction": eps_before_correction, "decay_after_update": decay_after_update}
        for name, value in forms.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        self.backend = backends.check_name(backend)
        self.offload = check_offload(offload, backend, capturable, differentiable)
        self.state_dtype = state_dtype
        self.skip_nonfinite = skip_nonfinite
        groups = {"shard_group": shard_group, "data_group": data_group}
        self._group_names = {name: group_name(name, group) for name, group in groups.items()}
        self._ranks: Ranks | None = None
        self._offloaded = Offloaded()
        self._backward_step: BackwardStep | None = None
        rules = {"grad_clip": grad_clip, "overshoot": overshoot, "reset": reset}
        self._default_rules = {key: _AS_RULE[key](value) for key, value in rules.items() if value is not None}
        self._default_forms = {name: True for name, value in forms.items() if value}
        self._books = Books()
        self._memory: dict[int, dict[str, Any]] = {}  # by group, and name of a rule: what it remembers
        self._kept: dict[torch.device, Any] = {}  # what `place` made for a device, for the next step
        self._layouts: dict[tuple[torch.device, int], Layout] = {}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(self._default_rules)
        self.defaults.update(self._default_forms)

    # ------------------------------------------------------------ the step

    @torch.compiler.disable  # the kernels read addresses, which a traced tensor has none of: one graph break
    def step(self, closure: Callable[[], Any] | None = None):
        """One optimization step: clip, moments, correction and write-back.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError, RuntimeError: see the class; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["differentiable"]:
            self._differentiable_step()
            return loss
        with torch.no_grad():
            if self._backward_step is not None:
                self._backward_step._finish()
            else:
                self._step()
        return loss

    @torch.compiler.disable
    @torch.optim.Optimizer.profile_hook_step  # as torch does around `step`: hooks, and a name in a profile
    def step_from_scores(
        self,
        scores: Sequence[Tensor | None] | dict[Tensor, Tensor],
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        *,
        mask: Tensor | None = None,
        objective: Objective = PPO(),
        aggregation: str | None = None,
        max_sample_norm: float | None = None,
        noise_multiplier: float = 0.0,
        noise_generator: torch.Generator | None = None,
        **options: Any,
    ) -> ClipStats:
        """One step from per-sample scores: ratio clip, policy gradient, moments and correction in one pass over memory.

        logp, old_logp, advantages -> w = d loss / d logp -> g = sum_b w_b S_b (in registers) -> moments -> write-back

        The policy gradient is never in memory, and `.grad` is neither read nor written. Equal to
        `policy_loss(...).backward()` and `step()`, where S_b is d logp_b / d parameter. A sample whose weight is 0,
        because it is clipped or masked, is not even read.

        Args:
            scores: for every parameter, in the order of the param groups, a tensor [B, *its shape] of d logp_b /
                d parameter (`per_sample_scores` makes them; `torch.func.vmap(grad(...))`), float32, bfloat16 or
                float16 (float64 or float32 for a float64 parameter), on its device; None for a parameter that stays as
                it is. Or a dict by parameter. With logp [B, T]: [B, T, *shape] of single tokens; or [B, *shape], the
                sum of a sequence's token scores, for objectives that weigh all tokens of a sequence alike (GSPO,
                LUSPO, VESPO).
            logp, old_logp, advantages, mask, objective, aggregation: as `policy_loss`. logp and old_logp are values:
                no graph is needed.
            max_sample_norm: bounds the norm, over all parameters, of every sample's share w_b S_b of the gradient:
                times min(1, max_sample_norm / (norm + 1e-6)), NaN where the norm is not finite. One more pass over the
                scores. None: no bound.
            noise_multiplier: adds normal noise of standard deviation noise_multiplier * max_sample_norm to every
                element of the gradient, made where it is added.
            noise_generator: seeds the noise, one number a step; None: torch's default generator of the device. A seed
                gives the same noise, to a few roundings, on every backend and in every memory layout.
            **options: every other keyword of `policy_loss` but `backend`, which is the optimizer's.

        Returns:
            The objective's `ClipStats`, also handed to `observe` for this step.

        With no sample left (B = 0, all masked or not finite) nothing changes but `step_count_skipped`, and `tokens` of
        the statistics is 0. Rules that need the gradient's norm, or other sums, before the update read the scores once
        more for each.

        `max_sample_norm` with noise is the mechanism of DP-SGD on whatever a row is: one row changes the sum by at most
        max_sample_norm. It is no privacy guarantee by itself. The weights must not depend on other rows (advantages
        normalised over a batch or group, and counts that divide the loss, do), rows must be drawn as an accountant
        assumes, which is not done here, and the statistics, norms and rules that look at a batch are not noised. The
        noise is a counter-based generator's, in floating point: not a cryptographic one.

        Raises:
            TypeError, ValueError: scores that do not fit the parameters or each other, arguments out of range, as
                `policy_loss`. RuntimeError: differentiable=True, as `step()`. Nothing has been changed then.

        Source: the objectives'; Abadi et al. 2016 (arXiv 1607.00133) for `max_sample_norm` and noise.
        """
        call = {**policy_loss.__kwdefaults__, "mask": mask, "objective": objective, "aggregation": aggregation}
        if unknown := options.keys() - (call.keys() - {"backend"}):
            raise TypeError(f"unexpected argument(s) {sorted(unknown)}; accepted: policy_loss's but backend")
        call.update(options)
        call["backend"] = self.backend
        check_logp(logp)
        params = self._all_params()
        given = in_order("scores", scores, params)
        one_a_sequence = any(own is not None and own.dim() == p.dim() + 1 for p, own in zip(params, given))
        by_sequence = logp.dim() == 2 and one_a_sequence
        stacks = stacks_of("scores", given, params, tuple(logp.shape[: 1 if by_sequence else None]))
        bounds = noise_of(max_sample_norm, noise_multiplier, noise_generator)
        weights, stats = score_weights(logp, old_logp, advantages, call, by_sequence)
        self._step_from_samples(Samples(stacks, weights.numel(), weights, stats.tokens == 0, _mass(stats), **bounds))
        return stats

    @torch.compiler.disable
    @torch.optim.Optimizer.profile_hook_step
    def step_from_gradients(
        self,
        gradients: Sequence[Tensor | None] | dict[Tensor, Tensor],
        weights: Tensor | None = None,
        *,
        max_sample_norm: float | None = None,
        noise_multiplier: float = 0.0,
        noise_generator: torch.Generator | None = None,
    ) -> None:
        """One step from the gradients of whole micro-batches: weighed, clipped or dropped at step time, never summed.

        g = sum_b weights_b G_b (in registers) -> moments -> write-back

        Args:
            gradients: for every parameter, in the order of the param groups, a tensor [B, *its shape], B the number of
                micro-batches (`MicroBatchGradients` gathers them), dtypes as of `step_from_scores`; None for a
                parameter that stays as it is. Or a dict by parameter.
            weights: [B], on the device of the parameters; any floating dtype. 0 drops a micro-batch: it is not read,
                so it may hold NaN. None: 1 / B each, the mean. For ratio-clipped weights of micro-batches see
                `step_from_scores`, with advantages of -1 and a micro-batch's log-probability as `logp`.
            max_sample_norm, noise_multiplier, noise_generator: as of `step_from_scores`; a sample is a micro-batch.

        With every weight 0 nothing changes but `step_count_skipped`.

        Raises:
            As `step_from_scores`. Nothing has been changed then.
        """
        params = self._all_params()
        given = in_order("gradients", gradients, params)
        p, first = next((p, own) for p, own in zip(params, given) if own is not None)
        if first.dim() == 0:
            raise ValueError(f"gradients must be [B, *shape of their parameter], got [] for one of {list(p.shape)}")
        count = first.shape[0]
        stacks = stacks_of("gradients", given, params, (count,))
        bounds = noise_of(max_sample_norm, noise_multiplier, noise_generator)
        if weights is None:
            weights = torch.full((count,), 1.0 / max(count, 1), dtype=torch.float64, device=first.device)
        check_tensor("weights", weights)
        if is_traceable_wrapper_subclass(weights):
            raise TypeError(f"weights must be a plain tensor, got {type(weights).__name__}")
        if weights.shape != (count,) or weights.device != first.device:
            raise ValueError(
                f"weights must be [{count}] on {first.device}, got {list(weights.shape)} on {weights.device}"
            )
        with torch.no_grad():
            weights = weights.detach().double().contiguous()
            none = ~(weights != 0).any()
        self._step_from_samples(Samples(stacks, count, weights, none, **bounds))

    def _all_params(self) -> list[Tensor]:
        if self.defaults["differentiable"]:
            raise RuntimeError("differentiable=True goes with step() only: nothing here is seen by autograd")
        if self._backward_step is not None:
            raise RuntimeError("step_in_backward is on, which makes the gradients itself; remove() it first")
        params = [p for group in self.param_groups for p in group["params"]]
        if self.offload is not None and any(is_away(p.device) for p in params):
            raise TypeError(
                f'offload="{self.offload}" goes with step() only: samples would cross to the host one by one; form the '
                "gradient and call step()"
            )
        if self._group_names["shard_group"] is not None or any(is_spread(p) for p in params):
            raise TypeError(
                "samples go with whole parameters only, not with DTensors or shard_group: a rank's loss of a part is "
                "none; form the gradient and call step()"
            )
        return params

    def _step_from_samples(self, samples: Samples) -> None:
        with torch.no_grad():
            self._step(samples)
        self._opt_called = True  # schedulers ask whether a step was taken before theirs

    def _step(self, samples: Samples | None = None, portion: Portion | None = None) -> None:
        """`samples`: what the gradients are made of, in the place of `.grad`. `portion`: not all of them at once."""
        for index, group in enumerate(self.param_groups):
            self._check_group(index, group)
        given = samples.stacks if samples is not None else None if portion is None else portion.gradients
        batches = collect(self.param_groups, given, stacked=samples is not None)
        ranks = self._ranks_of(batches, portion)
        if not batches and (ranks is None or portion is not None):
            return
        self._check_capture()
        all_rules = [rule for group in self.param_groups for rule in _rules_of(group)]
        skips = self.skip_nonfinite if portion is None else portion.skip_nonfinite
        needs_norm = skips or any(
            rule.needs_norm and (portion is None or not rule.needs_total_only) for rule in all_rules
        )
        needs_max = any(rule.needs_max for rule in all_rules)
        reads_twice = needs_norm or any("grad" in rule.extra_reads for rule in all_rules)
        parts = self._parts(batches, ranks, portion, reads_twice)
        rules = self._acting_rules(parts, ranks)
        observed, found_inf = self._books.observed, getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        if portion is not None:
            observed, found_inf, grad_scale = portion.observed, None, portion.grad_scale
        if samples is not None:
            observed = _sum_of(observed, samples.observed)
            found_inf = samples.skip.double() if found_inf is None else found_inf.double() + samples.skip
            for part in parts:
                part.samples = samples.on(part.device)
        added: list[tuple[dict, Any]] = []
        try:
            # Everything is checked here; nothing has been changed yet.
            tables = [[self._table(batch, part, added) for batch in part.batches] for part in parts]
            for part, own_tables in zip(parts, tables):
                self._place(part, own_tables)
            if samples is not None:
                seed = samples.drawn_seed()
                for at, part in enumerate(parts):  # the noise of two devices is not the same
                    part.samples.seed = None if seed is None else moved(seed + at, part.device)
                if samples.max_sample_norm is not None:
                    _bound_samples(parts, samples.max_sample_norm)
            if ranks is not None:  # what one rank has seen, all act on
                if found_inf is not None:
                    found_inf = ranks.anywhere(_as_tensor(found_inf, parts[0].device))
                if any(rule.needs_observed for rule in all_rules) and (portion is None or portion.is_first):
                    observed = ranks.of_all_data(observed, parts[0].device)
                    if portion is not None:
                        portion.observed = observed

            # 1 norm: only where a rule needs this step's norm before the update; otherwise the update gathers it.
            square_sums: list[Tensor | None] = [None] * len(parts)
            if needs_norm:
                for part in parts:
                    if not part.batches:
                        continue
                    if needs_max or samples is not None:
                        part.sum_by_tensor()
                    else:
                        part.square_sums = part.backend.grad_square_sums(part.placed)
                square_sums = [part.square_sums for part in parts]
                if len(parts) > 1 or ranks is not None:
                    square_sums = _everywhere(parts, ranks, Part.sum_by_spread)
            facts = self._facts(parts, ranks, square_sums[0], rules, grad_scale, found_inf, observed)
            steps = self._group_steps(facts, rules, portion)
            if portion is not None:
                facts.norm, facts.previous = portion.previous.sqrt().to(parts[0].device), True
                portion.begin(self._memory, rules)
            signals = self._signals(steps, rules)

            # 2 prologue
            for part, sums in zip(parts, square_sums):
                part.scalars = part.backend.prologue(
                    part.placed,
                    None if signals is None else moved(signals, part.device),
                    sums,
                    _as_tensor(grad_scale, part.device),
                    _as_tensor(found_inf, part.device),
                    _as_tensor(observed, part.device),
                    part.grad_square_sum,
                    part.steps_skipped,
                    skips,
                )
        except Exception:
            for owner, key in reversed(added):
                del owner[key]
            raise
        if portion is None:
            self._books.observed = None
        if rules:
            facts.live = (
                parts[0].scalars[0, 0] == 0
                if parts[0].batches
                else _not_skipped(parts[0].device, found_inf, facts.norm if skips else None)
            )
        self._for_each(steps, rules, lambda rule, step: rule.apply(step))

        # 3 update
        for part in parts:
            self._update(part, gather=not needs_norm)
        if not needs_norm and (len(parts) > 1 or ranks is not None or portion is not None):
            for part, total in zip(parts, _everywhere(parts, ranks, lambda part: list(part.gathered.items()))):
                part.grad_square_sum += total[0]
        square_sum = parts[0].grad_square_sum
        for index, step in steps.items():
            idle = not batches or self._lr_is_zero(index, step)  # nor have other ranks a gradient, if the sum is 0
            step.informative = step.live & ~((square_sum == 0) & idle)
        self._for_each(steps, rules, lambda rule, step: rule.after(step))
        if portion is not None:
            portion.end(square_sum, parts[0].steps_skipped)

    def _update(self, part: Part, gather: bool) -> None:
        """The update of every batch of a device. `gather`: also the norm of this step's gradients."""
        firsts = part.firsts
        if any(rule.needs_dots for batch in part.batches for rule in _rules_of(self.param_groups[batch.group])):
            part.dots = part.backend.new_dots(part.placed, part.rows)
        for at, batch in enumerate(part.batches):
            group = self.param_groups[batch.group]
            rules = _rules_of(group)
            part.backend.update_(
                part.placed,
                part.scalars,
                at,
                firsts[at],
                part.coupled[at],
                group["amsgrad"],
                sum(getattr(rule, "kernel_code", 0) for rule in rules),  # of all at most one has any
                _block(group),
                any(rule.guarded for rule in rules),
                part.unit_factors.get(at),
                part.dots if any(rule.needs_dots for rule in rules) else None,
                part.gathered[batch.spread] if gather else None,
            )
            # Raw writes do not tell autograd: a graph that saved an old parameter must notice.
            torch.autograd.graph.increment_version(batch.params)
            if batch.spread is not None:
                torch.autograd.graph.increment_version(batch.owners)

    # ------------------------------------------------------------ what the rules do in a step

    def _acting_rules(self, parts: list[Part], ranks: Ranks | None) -> list[tuple[int, Rule]]:
        """(group, rule) of every rule that has something to do, in the order in which it is done.

        Raises:
            RuntimeError: a rule per tensor, and parameters on several devices.
        """
        if ranks is None:
            present = {batch.group for part in parts for batch in part.batches}
        else:  # on every rank the same, whichever has a gradient
            present = set(range(len(self.param_groups)))
        own = [(index, rule) for index in sorted(present) for rule in _rules_of(self.param_groups[index])]
        for _, rule in own:
            if rule.per_tensor and len(parts) > 1:
                raise RuntimeError(f"{type(rule).__name__} is a rule per tensor and needs all parameters on one device")
        return sorted((each for each in own if each[1].acts), key=lambda each: each[1].stage)

    def _facts(
        self,
        parts: list[Part],
        ranks: Ranks | None,
        square_sums: Tensor | None,
        rules: list[tuple[int, Rule]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        observed: Tensor | None,
    ) -> StepFacts:
        """`square_sums`: of all devices, on the first."""
        facts = StepFacts(parts, ranks)
        if not rules:
            return facts
        device = parts[0].device
        scale = _as_tensor(grad_scale, device)
        found_inf = _as_tensor(found_inf, device)
        if scale is not None:
            facts.unscale = 1.0 / scale.double().reshape(()).abs()
        if square_sums is not None:
            facts.norm = square_sums.sum().sqrt() * facts.unscale
            facts.usable = facts.norm.isfinite() & (facts.norm > 0)
            if found_inf is not None:
                facts.usable = facts.usable & (found_inf.reshape(()) == 0)
        facts.suppressed = torch.zeros((), dtype=torch.float64, device=device)
        if observed is not None:
            suppressed, total = moved(observed, device).double().unbind()
            facts.suppressed = (suppressed / total).nan_to_num(0.0, 1.0, 0.0)
        return facts

    def _group_steps(
        self, facts: StepFacts, rules: list[tuple[int, Rule]], portion: Portion | None
    ) -> dict[int, GroupStep]:
        def layout_of(part: Part, at: int) -> Layout:
            key = (part.device, at)
            self._layouts[key] = layout(part.batches[at], self._layouts.get(key))
            return self._layouts[key]

        steps = {
            index: GroupStep(facts, index, self.param_groups[index], layout_of)
            for index in dict.fromkeys(index for index, _ in rules)
        }
        for index, step in steps.items():
            own = {type(rule).__name__: rule for rule in _rules_of(self.param_groups[index])}
            kept = self._memory.setdefault(index, {})
            for name in set(kept) - set(own):
                del kept[name]
            for name, rule in own.items():
                if portion is None or name not in portion.remembered(index):
                    self._remember(kept, name, rule, step.tensors, facts.parts[0].device)
        return steps

    def _for_each(self, steps: dict[int, GroupStep], rules: list[tuple[int, Rule]], call: Callable) -> None:
        for index, rule in rules:
            steps[index].memory = self._memory[index].get(type(rule).__name__, {}).get("tensors", {})
            steps[index].rule = rule
            call(rule, steps[index])

    def _signals(self, steps: dict[int, GroupStep], rules: list[tuple[int, Rule]]) -> Tensor | None:
        """The prologue's `group_signals`: float64 [groups, 3] on the first device, None where no rule has any."""
        columns: dict[tuple[int, str], Tensor] = {}

        def collect_signals(rule: Rule, step: GroupStep) -> None:
            columns.update({(step.index, name): value for name, value in rule.signals(step).items()})

        self._for_each(steps, rules, collect_signals)
        for index, step in steps.items():
            forget = columns.get((index, "forget"))
            step.reset = torch.zeros((), dtype=torch.bool, device=step.device) if forget is None else forget != 0
        if not columns:
            return None
        device = next(iter(columns.values())).device
        defaults = {"forget": 0.0, "restart": 0.0, "beta1_factor": 1.0}
        constant = {name: torch.full((), value, dtype=torch.float64, device=device) for name, value in defaults.items()}
        flat = [
            columns.get((index, name), constant[name]).double()
            for index in range(len(self.param_groups))
            for name in GROUP_SIGNALS
        ]
        return torch.stack(flat).reshape(-1, len(GROUP_SIGNALS))

    def _lr_is_zero(self, index: int, step: GroupStep) -> Tensor | bool:
        lr = self.param_groups[index]["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return moved(lr.detach(), step.device).reshape(()) == 0
        return float(lr) == 0.0

    @staticmethod
    def _remember(kept: dict[str, Any], name: str, rule: Rule, tensors: int, device: torch.device) -> None:
        """Makes or moves what a rule remembers: new where the sizes of it have changed."""
        wanted = rule.memory(tensors)
        if not wanted:
            return
        grows = hasattr(rule, "grown")
        own = kept.get(name, {}).get("tensors", {})
        sizes = {key: tuple(own[key].shape) for key in own}
        if any(
            sizes.get(key) != shape and not (grows and shape and key in sizes) for key, (shape, _) in wanted.items()
        ):
            own = {
                key: torch.full(shape, first, dtype=torch.float64, device=device)
                for key, (shape, first) in wanted.items()
            }
            kept[name] = {"steps": 0, "tensors": own}
        own = {key: moved(tensor, device) for key, tensor in own.items()}
        if grows:
            own = rule.grown(own, kept[name]["steps"])
        kept[name] = {"steps": kept[name]["steps"] + 1, "tensors": own}

    # ------------------------------------------------------------ devices, tables, states

    def _ranks_of(self, batches: list[Batch], portion: Portion | None) -> Ranks | None:
        """None where nothing is shared out over ranks."""
        groups = self._group_names
        if not any(groups.values()) and all(batch.spread is None for batch in batches):
            # Where some have no gradient here, another rank may have one of theirs, and wait for this one.
            missing = sum(len(group["params"]) for group in self.param_groups) - sum(len(b.params) for b in batches)
            if portion is not None or not missing:
                return None
            if not any(is_spread(p) for group in self.param_groups for p in group["params"]):
                return None
        if self._ranks is None or not self._ranks.is_of(self.param_groups):
            on_host = self.offload is not None
            self._ranks = Ranks(self.param_groups, groups["shard_group"], groups["data_group"], on_host)
        return self._ranks

    def _parts(
        self, batches: list[Batch], ranks: Ranks | None, portion: Portion | None, reads_twice: bool
    ) -> list[Part]:
        """The batches by device, each with the backend that runs there and what the device keeps between steps.

        `reads_twice`: gradients are read before the update, too.
        """
        parts: dict[torch.device, Part] = {}
        offloaded = self.offload is not None and self._offloaded_by(batches, reads_twice)
        for batch in batches:
            if offloaded:
                batch.device = HOST
            part = parts.get(batch.device)
            if part is None:
                backend = offloaded or backends.choose_step(self.backend, batch.device.type)
                parts[batch.device] = part = Part(batch.device, backend)
            part.batches.append(batch)
            group = self.param_groups[batch.group]
            part.coupled.append(_is_coupled(group))
            part.spiked.append(_find(group, SpikeClip) is not None)
        if not parts:  # other ranks have gradients: this one keeps the books with them
            p = next((p for group in self.param_groups for p in group["params"]), self._books.grad_square_sum)
            device = self._home(local(p))
            parts[device] = Part(device, backends.choose_step("reference", device.type))
        first, *others = parts.values()
        self._books.grad_square_sum = first.grad_square_sum = moved(self._books.grad_square_sum, first.device)
        self._books.steps_skipped = first.steps_skipped = moved(self._books.steps_skipped, first.device)
        for part in parts.values() if portion is not None else others:  # they decide alike; the first keeps the books
            part.grad_square_sum = self._books.grad_square_sum.to(part.device, copy=True)
            part.steps_skipped = torch.zeros_like(self._books.steps_skipped, device=part.device)
            part.previous_norm = portion is not None
        for part in parts.values():
            for batch in part.batches:
                if others or ranks is not None or portion is not None:
                    part.gathered.setdefault(batch.spread, torch.zeros_like(part.grad_square_sum))
                else:
                    part.gathered[None] = part.grad_square_sum
        return list(parts.values())

    def _offloaded_by(self, batches: list[Batch], reads_twice: bool) -> Offloaded | None:
        """What steps tensors of other devices on the host, ready for a step; None where all are the host's.

        Raises:
            RuntimeError: a device that it does not reach.
        """
        for batch in batches:
            check_reach(f'param_groups[{batch.group}]["params"][{batch.positions[0]}]', batch.device)
        if not any(is_away(batch.device) for batch in batches):
            return None
        return self._offloaded.use(backends.choose_step(self.backend, HOST.type), keeps_gradients=reads_twice)

    def _place(self, part: Part, tables: list) -> None:
        groups = [self.param_groups[batch.group] for batch in part.batches]
        blocks = [_block(group) for group in groups]
        capturable = any(group["capturable"] for group in groups)
        kept = self._kept.get(part.device)
        part.placed = part.backend.place(
            tables, self._group_scalars(part), blocks, kept, part.device, capturable, part.samples
        )
        if part.on_device:  # the host's tables are made anew each step, and the reference's hold the gradients
            self._kept[part.device] = part.placed

    def _table(self, batch: Batch, part: Part, added: list[tuple[dict, Any]]) -> Any:
        """A batch's table, its states attached; notes in `added` what is new."""
        group = self.param_groups[batch.group]
        attach_states(
            batch,
            self.state,
            group["amsgrad"],
            any(rule.weighs for rule in _rules_of(group)),
            part.on_device,
            lambda p: self._new_state(p, group, part.on_device),
            added,
        )
        for i, weights in enumerate(batch.bias_weights):
            if weights is None:
                step = batch.steps[i].detach().double()
                own = self.state[batch.owners[i]]
                own["bias_weights"] = torch.stack([1 - float(beta) ** step for beta in group["betas"]]).to(batch.device)
                added.append((own, "bias_weights"))
                batch.bias_weights[i] = own["bias_weights"]
        return part.backend.tensor_table(*batch.tensors(), -1 if part.samples is None else part.samples.count)

    def _home(self, p: Tensor) -> torch.device:
        """Where a parameter's moments are."""
        return p.device if self.offload is None else HOST

    def _new_state(self, p: Tensor, group: dict[str, Any], on_device: bool) -> dict[str, Any]:
        # The GPU kernels advance the step themselves, so that a skipped step needs no host read.
        on_device = on_device or group["capturable"] or group["fused"]
        step_dtype = torch.float32 if group["fused"] or torch.get_default_dtype() != torch.float64 else torch.float64
        home = self._home(p)
        state = {"step": torch.zeros((), dtype=step_dtype, device=home if on_device else "cpu")}
        for name in ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ()):
            state[name] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format, device=home)
        for rule in _rules_of(group):  # see state_dict
            for name in rule.of_parameters():
                first = rule.memory(1)[name][1]
                state[f"{type(rule).__name__}_{name}"] = torch.tensor(first, dtype=torch.float64, device="cpu")
        return state

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        """Raises:
        ValueError: a number is negative or NaN, or a beta is not below 1. A learning rate on a device is not read.
        """
        for name in ("lr", "eps", "weight_decay"):
            value = group[name]
            if name == "lr" and isinstance(value, Tensor) and value.device.type != "cpu":
                continue
            if not float(value) >= 0.0:
                raise ValueError(f'param_groups[{index}]["{name}"] must be at least 0, got {value!r}')
        beta1, beta2 = (float(beta) for beta in group["betas"])
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError(f'param_groups[{index}]["betas"] must lie in [0, 1), got {(beta1, beta2)!r}')
        if group["differentiable"]:
            raise ValueError(f"param_groups[{index}]: differentiable is set for the whole optimizer, not per group")
        if self.offload is not None and group["capturable"]:  # of this group alone, or of a state dict
            raise ValueError(f'param_groups[{index}]["capturable"] must be False with offload="{self.offload}"')
        for key in RULE_KEYS:  # a scheduler or a user may have set a short name between steps
            if group.get(key) is not None:
                group[key] = _AS_RULE[key](group[key])

    def _check_capture(self) -> None:
        """Raises:
        RuntimeError: a CUDA graph is being captured and a group is not capturable, or what its rule remembers grows.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            if self.offload is not None:
                raise RuntimeError(f'a CUDA graph is being captured; with offload="{self.offload}" the host steps')
            for index, group in enumerate(self.param_groups):
                if not group["capturable"]:
                    raise RuntimeError(
                        f"a CUDA graph is being captured, but param_groups[{index}] has capturable=False; construct "
                        f"{type(self).__name__} with capturable=True"
                    )
                clip = _find(group, AutoClip)
                if clip is not None and clip.history is None:
                    raise RuntimeError(
                        f"a CUDA graph is being captured, but the history of param_groups[{index}]'s AutoClip grows "
                        "with training; give it a length: AutoClip(history=1000)"
                    )

    def _group_scalars(self, part: Part) -> Tensor:
        """The prologue's `group_scalars` (struct GroupScalars of csrc/update_math.h), on the host."""
        rows, addresses = [], []
        for group in self.param_groups:
            lr, clip = group["lr"], _find(group, GlobalNorm)
            brake, clamp = _find(group, MomentumBrake), _find(group, UpdateClamp)
            beta1, beta2 = group["betas"]
            address = (0, 0)
            if part.on_device and isinstance(lr, Tensor) and lr.device.type != "cpu":
                # The kernel reads it where it is: no host sync, and a captured graph sees it change.
                lr = part.keep(lr.detach().to(part.device))
                lr = lr if lr.dtype in (torch.float32, torch.float64) else part.keep(lr.double())
                address, lr = (lr.data_ptr(), int(lr.dtype == torch.float64)), 0.0
            rows.append(
                [
                    float(beta1),
                    float(beta2),
                    clip.max_norm if clip else -1.0,
                    float(clip is not None and (clip.lag or part.previous_norm)),
                    -1.0 if group["maximize"] else 1.0,
                    float(brake.brake_code) if brake else 0.0,
                    brake.strength if brake else 0.0,
                    brake.hold_v if brake else 0.0,
                    float(lr),
                    float(group["eps"]),
                    float(group["weight_decay"]),
                    float(_is_coupled(group)),
                    *(float(bool(group.get(name))) for name in _FORM_KEYS),
                    clamp.max_update if clamp else math.inf,
                    0.0,
                    0.0,
                ]
            )
            addresses.append(address)
        out = torch.tensor(rows, dtype=torch.float64, device="cpu")
        if any(address for address, _ in addresses):
            out.view(torch.int64)[:, -2:] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return out

    def _differentiable_step(self) -> None:
        """torch's own differentiable update: autograd has to see every operation, so there is nothing to fuse."""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise RuntimeError("differentiable=True does not go with a GradScaler")
        for group in self.param_groups:
            lists: tuple[list, ...] = ([], [], [], [], [], [])
            has_complex = self._init_group(group, *lists)
            beta1, beta2 = group["betas"]
            torch_adam(
                *lists,
                has_complex=has_complex,
                beta1=beta1,
                beta2=beta2,
                **{k: group[k] for k in ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable")},
                differentiable=True,
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )

    # ------------------------------------------------------------ what the extras offer

    @property
    def grad_norm(self) -> Tensor:
        """The last step's global gradient norm before clipping, after unscaling: float32, 0-d, where the step is taken.

        0 before the first step. Reading it costs no pass over memory and no host sync.
        """
        return self._books.grad_square_sum.sqrt().to(torch.float32)

    @property
    def step_count_skipped(self) -> Tensor:
        """Steps skipped so far because of `skip_nonfinite` or a GradScaler's `found_inf`: int64, 0-d."""
        return self._books.steps_skipped

    def observe(self, stats: ClipStats) -> None:
        """Hands the next step what an objective clipped; several calls before one step add up.

        Args:
            stats: from `policy_loss` or `clip_stats`. Only rules that need it (`MomentumBrake`) read it.

        Raises:
            TypeError: not a ClipStats.
        """
        if not isinstance(stats, ClipStats):
            raise TypeError(f"observe expects a ClipStats, got {type(stats).__name__}")
        if self._backward_step is not None:
            self._backward_step._check_observe()
        self._books.observed = _sum_of(self._books.observed, _mass(stats))

    @torch.no_grad()
    def reset_momentum(self, moments: bool = True, counters: bool = True) -> None:
        """Forgets now, on the device, for every parameter.

        Args:
            moments: zero `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq`.
            counters: zero `step` and `bias_weights`, so that bias correction starts anew.

        Raises:
            ValueError: neither is asked for.
        """
        if not (moments or counters):
            raise ValueError("reset_momentum: at least one of moments and counters must be True")
        for index, group in enumerate(self.param_groups):
            self._reset_group(index, group, moments, counters)

    @torch.no_grad()
    def new_rollout(self) -> None:
        """Marks the start of a new batch of rollouts: groups with an `OnRollout` rule reset as it says."""
        for index, group in enumerate(self.param_groups):
            rule = as_reset(group.get("reset"))
            if isinstance(rule, OnRollout):
                self._reset_group(index, group, rule.moments, rule.counters)

    def _reset_group(self, index: int, group: dict[str, Any], moments: bool, counters: bool) -> None:
        if moments:  # for rules that wait some steps after a reset
            for rule in self._memory.get(index, {}).values():
                if "since" in rule["tensors"]:
                    rule["tensors"]["since"].fill_(-1.0)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if moments else ()
        names += ("step", "bias_weights") if counters else ()
        for p in group["params"]:
            own = self.state.get(p, {})
            for name in names:
                if name in own:
                    own[name].zero_()

    # ------------------------------------------------------------ groups, state dicts, pickling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may set its own `grad_clip`, `overshoot` and `reset`.

        Raises:
            TypeError, ValueError: complex parameters, an unknown rule, or a rule beside differentiable=True.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        if name := next((name for name in self._group_names if param_group.get(name) is not None), None):
            raise TypeError(
                f"{name} belongs to the optimizer, not to a param group, where ZeroRedundancyOptimizer puts its "
                f"keyword arguments; give it optimizer_class=functools.partial({type(self).__name__}, {name}=...)"
            )
        rules = {**self._default_rules, **{key: param_group[key] for key in RULE_KEYS if key in param_group}}
        rules = {key: _AS_RULE[key](value) for key, value in rules.items()}
        differentiable = param_group.get("differentiable", self.defaults["differentiable"])
        if differentiable and (any(rule is not None for rule in rules.values()) or self.skip_nonfinite):
            raise ValueError(
                "differentiable=True runs torch's own update and goes with none of grad_clip, overshoot, reset, "
                "skip_nonfinite"
            )
        params = param_group.get("params")
        if isinstance(params, Tensor):
            params = [params]
        elif params is not None and not isinstance(params, set):  # torch refuses sets: they have no order
            params = list(params)
        for p in params or ():
            p = p[1] if isinstance(p, tuple) else p
            if isinstance(p, Tensor) and p.is_complex():
                raise TypeError(f"{type(self).__name__} does not support complex parameters, got {p.dtype}")
        param_group["params"] = params
        param_group.update({key: rule for key, rule in rules.items() if rule is not None})
        if self.skip_nonfinite or any(rule is not None for rule in rules.values()):
            param_group[_EXTRA_KEY] = {}  # filled in by state_dict
        for name, value in self._default_forms.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Rules appear as plain dicts, so that `torch.load(weights_only=True)` and torch.optim read it.

        What a rule remembers is in its group's entry "fused_clip_adam" (float64 tensors, of which this is a copy; text
        where it grows); what it remembers of a parameter, in the parameter's own state, named "Rule_name" and as of
        this call: so that a checkpoint fits an optimizer with other groups or another share of the parameters. With
        such a rule the host waits for the device here. `bias_weights` are followed by the step they belong to.

        What was handed to `observe` since the last step is of this rank: save after a step where ranks share a file.
        """
        live = self.param_groups
        kept = self.skip_nonfinite or any(group.get(key) is not None for group in live for key in RULE_KEYS)
        for index, group in enumerate(live if kept else ()):
            group.setdefault(_EXTRA_KEY, {})  # torch.distributed.checkpoint saves the keys that are there
            for name, value in self._remembered(index):
                for p, own in zip(group["params"], value.cpu().unbind()):
                    if p in self.state:
                        self.state[p][name] = own.clone()
        out = super().state_dict()
        for key, own in out["state"].items():
            if "bias_weights" in own:
                out["state"][key] = {**own, "bias_weights": _with_step(own["bias_weights"], own["step"])}
        for index, group in enumerate(out["param_groups"] if kept else ()):
            for key in RULE_KEYS:
                if group.get(key) is not None:
                    group[key] = to_plain(_AS_RULE[key](group[key]))
            group[_EXTRA_KEY] = {"memory": self._memory_of_group(index), **self._of_all_groups()}
        return out

    def _of_all_groups(self) -> dict[str, Tensor]:
        """In the entry of each, so that a group that is saved or found without the others has it."""
        observed = torch.zeros(2) if self._books.observed is None else self._books.observed  # of one shape in any state
        return {
            "grad_square_sum": self._books.grad_square_sum.clone(),
            "steps_skipped": self._books.steps_skipped.clone(),
            "observed": observed.to(self._state_device(), copy=True),
        }

    def _state_device(self) -> torch.device:
        """Where the moments are. torch's set_optimizer_state_dict takes whole tensors of one device only."""
        return next((own["exp_avg"].device for own in self.state.values() if "exp_avg" in own), torch.device("cpu"))

    def _remembered(self, index: int) -> list[tuple[str, Tensor]]:
        """What the rules of a group remember of every parameter: (name in its state, float64 [parameters])."""
        memory = self._memory.get(index, {})
        return [
            (f"{type(rule).__name__}_{name}", memory[type(rule).__name__]["tensors"][name])
            for rule in _rules_of(self.param_groups[index])
            if type(rule).__name__ in memory
            for name in rule.of_parameters()
        ]

    def _memory_of_group(self, index: int) -> dict[str, Any]:
        """A copy of what the rules of a group remember beside `_remembered`."""
        out: dict[str, Any] = {}
        for rule in _rules_of(self.param_groups[index]):
            own = self._memory.get(index, {}).get(type(rule).__name__)
            if own is not None:
                tensors = {k: v for k, v in own["tensors"].items() if k not in rule.of_parameters()}
                # Text where the length grows: torch.distributed.checkpoint loads into tensors of the same shape only,
                # and into a list item by item, whatever the lengths.
                copied = {
                    k: json.dumps(v.tolist())
                    if hasattr(rule, "grown") and v.dim()
                    else v.to(self._state_device() if v.dim() else v.device, copy=True)
                    for k, v in tensors.items()
                }
                out[type(rule).__name__] = {"steps": own["steps"], "tensors": copied}
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from our state dict or torch's. Loaded tensors are copied: nothing is shared with `state_dict`.

        A rule the saved groups do not name stays as constructed.

        Raises:
            ValueError: groups or parameters differ in number, or a saved rule is unknown; nothing has been changed.
        """
        loaded: dict[str, Any] = {}

        # Runs after the user's pre-hooks, before anything is changed.
        def parse(_, final: dict[str, Any]) -> dict[str, Any] | None:
            loaded["state"] = final["state"]
            loaded["groups"] = [list(g["params"]) for g in final["param_groups"]]
            loaded["rules"] = [
                {k: from_plain(k, g[k]) if is_plain(g[k]) else _AS_RULE[k](g[k]) for k in RULE_KEYS if k in g}
                for g in final["param_groups"]
            ]
            if self.offload is not None:
                return {**final, "state": self._without_tensors(final)}
            return None

        constructed = [{key: g[key] for key in RULE_KEYS + _FORM_KEYS if key in g} for g in self.param_groups]
        hook = self.register_load_state_dict_pre_hook(parse)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        extras = [group.pop(_EXTRA_KEY, None) for group in self.param_groups]
        for group, rules, before, ids in zip(self.param_groups, loaded["rules"], constructed, loaded["groups"]):
            group.update({**before, **{key: group[key] for key in _FORM_KEYS if key in group}, **rules})
            for p, saved_id in zip(group["params"], ids):
                saved = loaded["state"].get(saved_id, {})
                own = self.state.get(p, {})
                if self.offload is not None and p in self.state:
                    own.update({name: value for name, value in saved.items() if name not in own})
                for name, value in own.items():
                    if isinstance(value, Tensor):
                        own[name] = self._copy_loaded(name, value, saved.get(name, value), p)
                if "bias_weights" in own:
                    own["bias_weights"] = _at_step(own["bias_weights"], own["step"], group["betas"])
        for index, (group, extra, ids) in enumerate(zip(self.param_groups, extras, loaded["groups"])):
            if extra is None:  # torch's
                continue
            group[_EXTRA_KEY] = {}
            memory = extra.get("memory", {})  # an empty dict is lost where torch flattens a state dict
            self._memory[index] = self._loaded_memory(group, memory, [loaded["state"].get(i, {}) for i in ids])
            if "observed" in extra:
                self._books.grad_square_sum = extra["grad_square_sum"].clone()
                self._books.steps_skipped = extra["steps_skipped"].clone()
                self._books.observed = extra["observed"].clone()

    @staticmethod
    def _without_tensors(state_dict: dict[str, Any]) -> dict[Any, Any]:
        """A state dict's states without those that torch would copy to the parameter's device."""
        ids = {saved_id for group in state_dict["param_groups"] for saved_id in group["params"]}
        return {
            key: {} if key in ids and isinstance(own.get("step"), Tensor) else own
            for key, own in state_dict["state"].items()
        }

    @staticmethod
    def _loaded_memory(group: dict[str, Any], saved: dict[str, Any], states: list[dict[str, Any]]) -> dict[str, Any]:
        """What the rules of a group remember, from the group's saved entry and its parameters' saved states."""
        memory: dict[str, Any] = {}
        for rule in _rules_of(group):
            name = type(rule).__name__
            if name not in saved:
                continue
            tensors = {
                key: torch.as_tensor(json.loads(own) if isinstance(own, str) else own, dtype=torch.float64).clone()
                for key, own in saved[name].get("tensors", {}).items()
            }
            for key in rule.of_parameters():
                first = rule.memory(1)[key][1]
                values = [float(state.get(f"{name}_{key}", first)) for state in states]
                tensors[key] = torch.tensor(values, dtype=torch.float64, device="cpu")
            memory[name] = {"steps": int(saved[name]["steps"]), "tensors": tensors}
        return memory

    def _copy_loaded(self, name: str, value: Tensor, saved: Any, p: Tensor) -> Tensor:
        # torch casts every floating state to the parameter's dtype; ours may be wider.
        if isinstance(saved, Tensor):
            if name == "bias_weights":
                return saved.to(self._home(p), torch.float64, copy=True)
            if name not in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):  # what a rule remembers, see state_dict
                return saved.to("cpu", torch.float64, copy=True)
            if name != "step" and (self.state_dtype is not None or self.offload is not None):
                return saved.to(self._home(p), self.state_dtype or p.dtype, copy=True)
        return value.clone() if self.offload is None else value.to(HOST, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept, self._layouts, self._ranks = {}, {}, None  # addresses of this process
        self._offloaded = Offloaded()
        self._backward_step = None  # its hooks are on the parameters that this is a copy of
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        names = ("backend", "state_dtype", "skip_nonfinite", "_default_rules", "_default_forms", "_books")
        names += ("offload", "_memory", "_group_names")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}


class FusedClipAdamW(_FusedClip, torch.optim.AdamW):
    __doc__ = (
        """torch.optim.AdamW with unscale, clip, moments, correction and write-back in one pass over memory.

    gradients -> norm (only if a rule needs it) -> prologue -> update

    With every extra off it is torch.optim.AdamW: same defaults, state, param_groups and state_dict. `foreach` and
    `fused` are accepted and change nothing but where `step` lives, as in torch; `differentiable=True` runs torch's
    own update.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as
            torch.optim.AdamW; weight decay is decoupled, default 1e-2.
"""
        + _EXTRAS_DOC
    )

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, **options):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class FusedClipAdam(_FusedClip, torch.optim.Adam):
    __doc__ = (
        """torch.optim.Adam (weight decay as an L2 term of the gradient, default 0) with the extras of FusedClipAdamW.

    The L2 term is added after clipping, as where `clip_grad_norm_` precedes torch.optim.Adam.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as
            torch.optim.Adam.
"""
        + _EXTRAS_DOC
    )


class FusedFAdam(_FusedClip, torch.optim.AdamW):
    """FAdam: Adam as natural gradient descent, with clipped natural gradient and natural weight decay, in fused passes.

    f = b f + (1 - b) g^2,  b = beta2 (1 - beta2^(t-1)) / (1 - beta2^t)
    base = sqrt(f) + eps max(1, rms g) ;  h = clipped(g / base) ;  m = beta1 m + (1 - beta1) h
    p -= lr (m + weight_decay clipped(p / base)),  clipped(x) = x clip / max(1, rms x)

    rms is over each tensor. The order of operations is not AdamW's, so this is a class of its own; states keep torch's
    names, `exp_avg` (m) and `exp_avg_sq` (f). Three passes, 44 bytes an element in float32: the sums over h and
    p / base need the sum over g, and the update needs both.

    Args:
        params, lr, betas, eps, maximize, capturable: as torch.optim.AdamW. weight_decay: at least 0.
        clip: of the natural gradient and of the natural weight decay, in units of their rms; positive.

    Keyword Args:
        grad_clip, reset, state_dtype, skip_nonfinite, backend, offload, shard_group, data_group: as `FusedClipAdamW`.

    Raises:
        ValueError, TypeError, RuntimeError: as `FusedClipAdamW`.

    Source: Hwang 2024 (arXiv 2405.12807) and its published code.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        grad_clip=None,
        reset=None,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        offload: str | None = None,
        shard_group: Any = None,
        data_group: Any = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            capturable=capturable,
            grad_clip=grad_clip,
            overshoot=FisherUpdate(clip),
            reset=reset,
            state_dtype=state_dtype,
            skip_nonfinite=skip_nonfinite,
            backend=backend,
            offload=offload,
            shard_group=shard_group,
            data_group=data_group,
        )

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        super()._check_group(index, group)
        rules = _rules_of(group)
        if not any(isinstance(rule, FisherUpdate) for rule in rules):
            raise ValueError(f"param_groups[{index}]: FusedFAdam has an update of its own; overshoot cannot be changed")
        for rule in rules:
            if rule.guarded or rule.stage == 1 or rule.weighs:
                raise ValueError(f"param_groups[{index}]: {rule} does not go with FusedFAdam's update")
        if group["amsgrad"]:
            raise ValueError(f"param_groups[{index}]: FusedFAdam has no amsgrad")


def _rules_of(group: dict[str, Any]) -> tuple[Rule, ...]:
    """Every rule of a group: of clipping, of resets, of overshoot."""
    reset = group.get("reset")
    return (
        *grad_clip_rules(group.get("grad_clip")),
        *(() if reset is None else (reset,)),
        *overshoot_rules(group.get("overshoot")),
    )


def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device="cpu")


def _with_step(weights: Tensor, step: Tensor) -> Tensor:
    """`bias_weights` as saved: float64 [3], W1, W2 and the step."""
    return torch.cat([weights, step.detach().to(weights.device, torch.float64).reshape(1)])


def _at_step(saved: Tensor, step: Tensor, betas: Sequence[float | Tensor]) -> Tensor:
    """`bias_weights` as used, float64 [2]: those saved, or 1 - beta^step where they belong to another step.

    torch.distributed.checkpoint takes a step to make a state, and leaves what a checkpoint of torch's AdamW has not.
    """
    now = step.detach().to(saved.device, torch.float64).reshape(())
    plain = torch.stack([1 - float(beta) ** now for beta in betas])
    return torch.where(saved[2] == now, saved[:2], plain)


def _find(group: dict[str, Any], kind: type) -> Any:
    """The group's rule of a kind, or None."""
    return next((rule for rule in _rules_of(group) if isinstance(rule, kind)), None)


def _is_coupled(group: dict[str, Any]) -> bool:
    """Whether weight decay enters through the gradient: Adam's, and not zero."""
    return not group["decoupled_weight_decay"] and float(group["weight_decay"]) != 0.0


def _block(group: dict[str, Any]) -> int:
    """Elements that share one gate; 1 where nothing is shared."""
    rule = _find(group, AlignedMomentum)
    return rule.block if rule is not None and isinstance(rule.block, int) else 1


def _mass(stats: ClipStats) -> Tensor:
    """What the next step makes of statistics: float32 [2], suppressed and total mass."""
    return torch.stack([stats.suppressed_mass, stats.total_mass]).detach()


def _sum_of(mass: Tensor | None, more: Tensor | None) -> Tensor | None:
    if mass is None or more is None:
        return more if mass is None else mass
    return mass + more.to(mass.device)


def _bound_samples(parts: list[Part], max_sample_norm: float) -> None:
    """Lowers the weights of samples whose share of the gradient is longer than `max_sample_norm`, on every device."""
    sums = [part.backend.sample_square_sums(part.placed) for part in parts]
    for part in parts:
        total = sum(moved(own, part.device) for own in sums)
        part.samples.weights.mul_(sample_factors(total, part.samples.weights, max_sample_norm))


def _everywhere(
    parts: list[Part], ranks: Ranks | None, by_spread: Callable[[Part], list[tuple[Spread | None, Tensor]]]
) -> list[Tensor]:
    """The sum over all devices and ranks, on every device: float64 [1]."""
    total = over_everything([own for part in parts for own in by_spread(part)], ranks, parts[0].device)
    return [moved(total.reshape(1), part.device) for part in parts]


def _not_skipped(device: torch.device, found_inf: Tensor | None, norm: Tensor | None) -> Tensor:
    """What the prologue makes of a step, where no tensor here has scalars that tell: bool 0-d.

    Args:
        norm: where one that is not finite skips the step.
    """
    live = torch.ones((), dtype=torch.bool, device=device) if found_inf is None else found_inf.reshape(()) == 0
    return live if norm is None else live & norm.isfinite()


def _as_tensor(value: Any, device: torch.device) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return None if value is None else moved(value.detach(), device)
    return torch.full((), float(value), dtype=torch.float64, device=device)
