"""FusedClipAdamW and FusedClipAdam: torch's AdamW and Adam with gradient clipping and overshoot rules in one pass.

`step()` reads top-down as three phases:

    batches  ->  1 norm  ->  2 prologue (every scalar, on the device)  ->  3 update (one pass over memory)

Clip rules that remember norms turn them into factors between 1 and 2, see rules/grad_clip.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from fused_clip_adam import backends
from fused_clip_adam.batches import Batch, attach_states, collect
from fused_clip_adam.objectives.stats import ClipStats
from fused_clip_adam.rules import (
    AlignedMomentum,
    AutoClip,
    GradClip,
    MomentumBrake,
    OnRollout,
    UpdateClamp,
    as_grad_clip,
    as_overshoot,
    as_reset,
    from_plain,
    overshoot_rules,
    to_plain,
)
from fused_clip_adam.rules.plain import KEYS as RULE_KEYS
from fused_clip_adam.rules.plain import is_plain

_AS_RULE = {"grad_clip": as_grad_clip, "overshoot": as_overshoot, "reset": as_reset}
_EXTRA_KEY = "fused_clip_adam"
"""Where state_dict() keeps what belongs to no parameter: an entry of the first param group, which torch ignores."""

_EXTRAS_DOC = """
    Keyword Args:
        grad_clip: None, a positive float (global L2 norm) or a `GradClip` rule. Gradients are scaled as they are
            read; `.grad` is never written. What a rule remembers is in the state dict.
        overshoot: None, "align", "align-element", "cautious", "grams", "brake", an `Overshoot` rule, or a tuple of
            rules that shape different parts of an update, such as ("align", UpdateClamp(1.0)).
        reset: None or a `Reset` rule.
        state_dtype: None keeps the moments in the parameter's dtype, as torch does; torch.float32 keeps them in
            float32.
        skip_nonfinite: True makes a step whose gradient norm is not finite change nothing.
        backend: "auto", "cpu" (native kernels), "cuda" (native kernels), "triton" or "reference" (plain torch
            operations, any device). "auto" takes the native kernels of the parameters' device, else Triton on a GPU.

    `grad_clip`, `overshoot`, `reset` and the numbers may also be set per param group, and changed between steps.

    State, per parameter: `step`, `exp_avg`, `exp_avg_sq`, with amsgrad `max_exp_avg_sq`, as torch; `bias_weights`
    (float64 [2], the running bias corrections) only under `MomentumBrake`.

    Raises:
        ValueError, TypeError: a hyper-parameter or rule out of range, an unknown name, complex parameters.
        RuntimeError: a backend that cannot run here; torch's own refusals.
        From `step()`: sparse, complex, meta, mismatched or self-overlapping tensors, parameters that share memory;
        nothing has been changed then.

    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), Kingma & Ba 2015 (arXiv 1412.6980); the rules' docstrings.
"""


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
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype must be None or torch.float32, got {state_dtype!r}")
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be a bool, got {skip_nonfinite!r}")
        self.backend = backends.check_name(backend)
        self.state_dtype = state_dtype
        self.skip_nonfinite = skip_nonfinite
        rules = {"grad_clip": grad_clip, "overshoot": overshoot, "reset": reset}
        self._default_rules = {key: _AS_RULE[key](value) for key, value in rules.items() if value is not None}
        self._grad_square_sum = torch.zeros((), dtype=torch.float64, device="cpu")
        self._steps_skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        self._observed: Tensor | None = None
        self._clip_memory: dict[int, dict[str, Any]] = {}  # of each group's clip rule: its name, steps, tensors
        self._kept: dict[torch.device, Any] = {}  # what `place` made for a device, for the next step
        self._positions: dict[int, tuple[list[int], Tensor]] = {}
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
            self._step()
        return loss

    def _step(self) -> None:
        for index, group in enumerate(self.param_groups):
            self._check_group(index, group)
        batches = collect(self.param_groups)
        if not batches:
            return
        self._check_capture()
        parts = self._parts(batches)
        clips = [group.get("grad_clip") for group in self.param_groups]
        needs_norm = self.skip_nonfinite or any(clip is not None and not clip.lag for clip in clips)
        added: list[tuple[dict, Any]] = []
        try:
            # Everything is checked here; nothing has been changed yet.
            tables = [[self._table(batch, part, added) for batch in part.batches] for part in parts]
            for part, own_tables in zip(parts, tables):
                part.place(own_tables, self._group_scalars(part), self.param_groups)

            # 1 norm: only where a rule needs this step's norm before the update; otherwise the update gathers it.
            square_sums: list[Tensor | None] = [None] * len(parts)
            factors: list[Tensor | None] = [None] * len(parts)
            if needs_norm:
                own_sums = [part.backend.grad_square_sums(part.placed) for part in parts]
                square_sums = _everywhere(own_sums)
                if not all(clip is None or clip.in_prologue for clip in clips):
                    factors = self._clip_factors(parts, own_sums, square_sums[0])

            # 2 prologue
            for part, sums, own_factors in zip(parts, square_sums, factors):
                part.control = part.backend.prologue(
                    part.placed,
                    sums,
                    _as_tensor(getattr(self, "grad_scale", None), part.device),
                    _as_tensor(getattr(self, "found_inf", None), part.device),
                    _as_tensor(self._observed, part.device),
                    part.grad_square_sum,
                    part.steps_skipped,
                    self.skip_nonfinite,
                    own_factors,
                )
        except Exception:
            for owner, key in reversed(added):
                del owner[key]
            raise
        self._observed = None

        # 3 update
        gathered = None if needs_norm else [part.gathered for part in parts]
        for i, part in enumerate(parts):
            for j, batch in enumerate(part.batches):
                group = self.param_groups[batch.group]
                part.backend.update_(
                    part.placed,
                    part.control,
                    j,
                    _is_coupled(group),
                    group["amsgrad"],
                    _kernel_code(group),
                    _block(group),
                    None if gathered is None else gathered[i],
                )
                # Raw writes do not tell autograd: a graph that saved an old parameter must notice.
                torch.autograd.graph.increment_version(batch.params)
        if gathered is not None and len(parts) > 1:
            for part, sums in zip(parts, _everywhere([own.reshape(1) for own in gathered])):
                part.grad_square_sum += sums.sum()

    def _parts(self, batches: list[Batch]) -> list[_Part]:
        """The batches by device, each with the backend that runs there and what the device keeps between steps."""
        parts: dict[torch.device, _Part] = {}
        for batch in batches:
            part = parts.get(batch.device)
            if part is None:
                backend = backends.choose_step(self.backend, batch.device.type)
                parts[batch.device] = part = _Part(batch.device, backend, self._kept)
            part.batches.append(batch)
        first, *others = parts.values()
        self._grad_square_sum = first.grad_square_sum = _moved(self._grad_square_sum, first.device)
        self._steps_skipped = first.steps_skipped = _moved(self._steps_skipped, first.device)
        first.gathered = first.grad_square_sum
        for part in others:  # they decide alike; the first device keeps the books
            part.grad_square_sum = self._grad_square_sum.to(part.device, copy=True)
            part.steps_skipped = self._steps_skipped.to(part.device, copy=True)
        if others:
            for part in parts.values():
                part.gathered = torch.zeros_like(part.grad_square_sum)
        return list(parts.values())

    def _clip_factors(self, parts: list[_Part], own_sums: list[Tensor], all_sums: Tensor) -> list[Tensor]:
        """By device, the factor of every tensor's gradient under the groups' clip rules: float64 [rows].

        Args:
            own_sums: by device, sums of squares of raw gradients. all_sums: of all devices, on the first.
        """
        first = parts[0]
        scale = _as_tensor(getattr(self, "grad_scale", None), first.device)
        found_inf = _as_tensor(getattr(self, "found_inf", None), first.device)
        unscale = 1.0 if scale is None else 1.0 / scale.double().reshape(()).abs()
        norm = all_sums.sum().sqrt() * unscale
        usable = norm.isfinite() & (norm > 0)
        if found_inf is not None:
            usable = usable & (found_inf.reshape(()) == 0)

        norms: list[list[Tensor]] = []  # by device and batch, of every tensor; only where a rule reads them
        if any(_clip_of(self.param_groups, batch).per_tensor for part in parts for batch in part.batches):
            if len(parts) > 1:
                raise RuntimeError("a clip rule per tensor (PerTensorNorm, AdaGC) needs all parameters on one device")
            sums = first.backend.tensor_square_sums(first.placed, own_sums[0]).sqrt() * unscale
            norms = [list(sums.split([len(batch.params) for batch in first.batches]))]

        by_group: dict[int, Tensor] = {}
        for index, group in enumerate(self.param_groups):
            clip = group.get("grad_clip")
            if clip is None or clip.in_prologue:
                continue
            of_group = torch.full((len(group["params"]),), math.nan, dtype=torch.float64, device=first.device)
            for at, (batch, own) in enumerate(zip(first.batches, norms[0] if norms else ())):
                if batch.group == index:
                    of_group.index_copy_(0, self._positions_of(batch, at), own)
            memory = self._memory_of(index, clip, len(group["params"]), first.device)
            by_group[index] = clip.factors(norm, of_group, memory, usable)
        out = []
        for part in parts:
            rows = []
            for at, batch in enumerate(part.batches):
                own = by_group.get(batch.group)
                if own is None:
                    own = torch.ones((), dtype=torch.float64, device=part.device)
                own = own.to(part.device, non_blocking=True)
                of_tensors = own.index_select(0, self._positions_of(batch, at)) if own.dim() else None
                rows.append(own.expand(len(batch.params)) if of_tensors is None else of_tensors)
            out.append(torch.cat(rows))
        return out

    def _positions_of(self, batch: Batch, at: int) -> Tensor:
        """Where in its group the tensors of the `at`-th batch are: int64, on the device, uploaded when it changes."""
        kept = self._positions.get(at)
        if kept is None or kept[0] != batch.positions or kept[1].device != batch.device:
            tensor = _moved(torch.tensor(batch.positions, dtype=torch.int64, device="cpu"), batch.device)
            self._positions[at] = kept = (batch.positions, tensor)
        return kept[1]

    def _memory_of(self, index: int, clip: GradClip, tensors: int, device: torch.device) -> dict[str, Tensor]:
        """What a group's clip rule remembers, on the device; new where the rule or a size of it has changed."""
        wanted = clip.memory(tensors)
        kept = self._clip_memory.get(index, {})
        own = kept.get("tensors", {})
        grows = hasattr(clip, "grown")
        sizes = {name: tuple(own[name].shape) for name in own}
        if kept.get("rule") != type(clip).__name__ or any(
            sizes.get(name) != shape and not (grows and len(shape)) for name, (shape, _) in wanted.items()
        ):
            own = {
                name: torch.full(shape, first, dtype=torch.float64, device=device)
                for name, (shape, first) in wanted.items()
            }
            kept = self._clip_memory[index] = {"rule": type(clip).__name__, "steps": 0, "tensors": own}
        own = {name: _moved(tensor, device) for name, tensor in own.items()}
        if grows:
            own = clip.grown(own, kept["steps"])
        kept["tensors"], kept["steps"] = own, kept["steps"] + 1
        return own

    def _table(self, batch: Batch, part: _Part, added: list[tuple[dict, Any]]) -> Any:
        """A batch's table, its states attached; notes in `added` what is new."""
        group = self.param_groups[batch.group]
        attach_states(
            batch,
            self.state,
            group["amsgrad"],
            _find(group, MomentumBrake) is not None,
            part.on_device,
            lambda p: self._new_state(p, group, part.on_device),
            added,
        )
        for i, weights in enumerate(batch.bias_weights):
            if weights is None:
                step = batch.steps[i].detach().double()
                own = self.state[batch.params[i]]
                own["bias_weights"] = torch.stack([1 - float(beta) ** step for beta in group["betas"]]).to(batch.device)
                added.append((own, "bias_weights"))
                batch.bias_weights[i] = own["bias_weights"]
        return part.backend.tensor_table(*batch.tensors())

    def _new_state(self, p: Tensor, group: dict[str, Any], on_device: bool) -> dict[str, Any]:
        # The GPU kernels advance the step themselves, so that a skipped step needs no host read.
        on_device = on_device or group["capturable"] or group["fused"]
        step_dtype = torch.float32 if group["fused"] or torch.get_default_dtype() != torch.float64 else torch.float64
        state = {"step": torch.zeros((), dtype=step_dtype, device=p.device if on_device else "cpu")}
        for name in ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ()):
            state[name] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format)
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
        for key in RULE_KEYS:  # a scheduler or a user may have set a short name between steps
            if group.get(key) is not None:
                group[key] = _AS_RULE[key](group[key])

    def _check_capture(self) -> None:
        """Raises:
        RuntimeError: a CUDA graph is being captured and a group is not capturable, or what its rule remembers grows.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            for index, group in enumerate(self.param_groups):
                if not group["capturable"]:
                    raise RuntimeError(
                        f"a CUDA graph is being captured, but param_groups[{index}] has capturable=False; construct "
                        f"{type(self).__name__} with capturable=True"
                    )
                if isinstance(group.get("grad_clip"), AutoClip) and group["grad_clip"].history is None:
                    raise RuntimeError(
                        f"a CUDA graph is being captured, but the history of param_groups[{index}]'s AutoClip grows "
                        "with training; give it a length: AutoClip(history=1000)"
                    )

    def _group_scalars(self, part: _Part) -> Tensor:
        """The prologue's `group_scalars` (struct GroupScalars of csrc/update_math.h), on the host."""
        rows, addresses = [], []
        for group in self.param_groups:
            clip, lr = group.get("grad_clip"), group["lr"]
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
                    clip.max_norm if clip is not None and clip.in_prologue else -1.0,
                    float(clip is not None and clip.lag),
                    -1.0 if group["maximize"] else 1.0,
                    float(brake.brake_code) if brake else 0.0,
                    brake.strength if brake else 0.0,
                    brake.hold_v if brake else 0.0,
                    float(lr),
                    float(group["eps"]),
                    float(group["weight_decay"]),
                    float(_is_coupled(group)),
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
        """The last step's global gradient norm before clipping, after unscaling: float32, 0-d, on the device.

        0 before the first step. Reading it costs no pass over memory and no host sync.
        """
        return self._grad_square_sum.sqrt().to(torch.float32)

    @property
    def step_count_skipped(self) -> Tensor:
        """Steps skipped so far because of `skip_nonfinite` or a GradScaler's `found_inf`: int64, 0-d."""
        return self._steps_skipped

    def observe(self, stats: ClipStats) -> None:
        """Hands the next step what an objective clipped; several calls before one step add up.

        Args:
            stats: from `policy_loss` or `clip_stats`. Only rules that need it (`MomentumBrake`) read it.

        Raises:
            TypeError: not a ClipStats.
        """
        if not isinstance(stats, ClipStats):
            raise TypeError(f"observe expects a ClipStats, got {type(stats).__name__}")
        mass = torch.stack([stats.suppressed_mass, stats.total_mass]).detach()
        self._observed = mass if self._observed is None else self._observed + mass.to(self._observed.device)

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
        for group in self.param_groups:
            self._reset_group(group, moments, counters)

    @torch.no_grad()
    def new_rollout(self) -> None:
        """Marks the start of a new batch of rollouts: groups with an `OnRollout` rule reset as it says."""
        for group in self.param_groups:
            rule = as_reset(group.get("reset"))
            if isinstance(rule, OnRollout):
                self._reset_group(group, rule.moments, rule.counters)

    def _reset_group(self, group: dict[str, Any], moments: bool, counters: bool) -> None:
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
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Rules appear as plain dicts, so that `torch.load(weights_only=True)` and torch.optim read it."""
        out = super().state_dict()
        has_rules = False
        for group in out["param_groups"]:
            for key in RULE_KEYS:
                if group.get(key) is not None:
                    group[key] = to_plain(_AS_RULE[key](group[key]))
                    has_rules = True
        if has_rules or self.skip_nonfinite:
            out["param_groups"][0][_EXTRA_KEY] = {
                "grad_square_sum": self._grad_square_sum.clone(),
                "steps_skipped": self._steps_skipped.clone(),
                "observed": None if self._observed is None else self._observed.clone(),
                "clip_memory": _copied_memory(self._clip_memory),
            }
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, from our state dict or torch's. Loaded tensors are copied: nothing is shared with `state_dict`.

        A rule the saved groups do not name stays as constructed.

        Raises:
            ValueError: groups or parameters differ in number, or a saved rule is unknown; nothing has been changed.
        """
        loaded: dict[str, Any] = {}

        def parse(_, final: dict[str, Any]) -> None:  # runs after the user's pre-hooks, before anything is changed
            loaded["state"] = final["state"]
            loaded["groups"] = [list(g["params"]) for g in final["param_groups"]]
            loaded["rules"] = [
                {k: from_plain(k, g[k]) if is_plain(g[k]) else _AS_RULE[k](g[k]) for k in RULE_KEYS if k in g}
                for g in final["param_groups"]
            ]

        constructed = [{key: g[key] for key in RULE_KEYS if key in g} for g in self.param_groups]
        hook = self.register_load_state_dict_pre_hook(parse)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        extra = None
        for group, rules, before, ids in zip(self.param_groups, loaded["rules"], constructed, loaded["groups"]):
            extra = group.pop(_EXTRA_KEY, extra)
            group.update({**before, **rules})
            for p, saved_id in zip(group["params"], ids):
                saved = loaded["state"].get(saved_id, {})
                own = self.state.get(p, {})
                for name, value in own.items():
                    if isinstance(value, Tensor):
                        own[name] = self._copy_loaded(name, value, saved.get(name, value), p)
        if extra is not None:
            self._grad_square_sum = extra["grad_square_sum"].clone()
            self._steps_skipped = extra["steps_skipped"].clone()
            self._observed = None if extra["observed"] is None else extra["observed"].clone()
            self._clip_memory = _copied_memory(extra.get("clip_memory", {}))

    def _copy_loaded(self, name: str, value: Tensor, saved: Any, p: Tensor) -> Tensor:
        # torch casts every floating state to the parameter's dtype; ours may be wider.
        if not isinstance(saved, Tensor):
            return value.clone()
        if name == "bias_weights":
            return saved.to(p.device, torch.float64, copy=True)
        if name != "step" and self.state_dtype is not None:
            return saved.to(p.device, self.state_dtype, copy=True)
        return value.clone()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept, self._positions = {}, {}  # addresses of this process
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        names = ("backend", "state_dtype", "skip_nonfinite", "_default_rules", "_grad_square_sum", "_steps_skipped")
        names += ("_observed", "_clip_memory")
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


@dataclasses.dataclass
class _Part:
    """One device's share of a step."""

    device: torch.device
    backend: Any
    kept: dict[torch.device, Any]  # of all devices
    batches: list[Batch] = dataclasses.field(default_factory=list)
    grad_square_sum: Any = None
    steps_skipped: Any = None
    gathered: Any = None  # what the update pass adds its gradients' squares to
    placed: Any = None
    control: Any = None
    held: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def on_device(self) -> bool:
        return getattr(self.backend, "ON_DEVICE", False)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself, alive until the step's kernels have been launched."""
        self.held.append(tensor)
        return tensor

    def place(self, tables: list, group_scalars: Tensor, param_groups: list[dict[str, Any]]) -> None:
        groups = [param_groups[batch.group] for batch in self.batches]
        blocks = [_block(group) for group in groups]
        capturable = any(group["capturable"] for group in groups)
        self.placed = self.backend.place(
            tables, group_scalars, blocks, self.kept.get(self.device), self.device, capturable
        )
        if self.on_device:  # the host's tables are made anew each step, and the reference's hold the gradients
            self.kept[self.device] = self.placed


def _clip_of(param_groups: list[dict[str, Any]], batch: Batch) -> GradClip:
    return param_groups[batch.group].get("grad_clip") or GradClip()


def _copied_memory(memory: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {
        index: {**own, "tensors": {name: tensor.clone() for name, tensor in own["tensors"].items()}}
        for index, own in memory.items()
    }


def _is_coupled(group: dict[str, Any]) -> bool:
    """Whether weight decay enters through the gradient: Adam's, and not zero."""
    return not group["decoupled_weight_decay"] and float(group["weight_decay"]) != 0.0


def _find(group: dict[str, Any], kind: type) -> Any:
    """The group's overshoot rule of a kind, or None."""
    return next((rule for rule in overshoot_rules(group.get("overshoot")) if isinstance(rule, kind)), None)


def _kernel_code(group: dict[str, Any]) -> int:
    return sum(rule.kernel_code for rule in overshoot_rules(group.get("overshoot")))  # of all at most one has any


def _block(group: dict[str, Any]) -> int:
    """Elements that share one gate; 1 where nothing is shared."""
    rule = _find(group, AlignedMomentum)
    return 1 if rule is None or rule.block == "element" else rule.block


def _everywhere(parts: list[Tensor]) -> list[Tensor]:
    """Each device's float64 [n] sums -> on every device, all of them. One device keeps its own as they are."""
    if len(parts) == 1:
        return parts
    sums = [part.sum() for part in parts]
    return [torch.stack([own.to(part.device, non_blocking=True) for own in sums]) for part in parts]


def _as_tensor(value: Any, device: torch.device) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return None if value is None else _moved(value.detach(), device)
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for the copy."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
