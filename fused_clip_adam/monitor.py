"""OvershootMonitor: how far a policy goes past its clip, and what Adam's momentum has to do with it.

    observe(stats, log-probs)  ->  what was clipped, excess  |
    before a step: m and g     ->  kept momentum             |->  a row of a ring on the device  ->  rows(), figure()
    after a step: p, g and v   ->  coast                     |

Only rows(), latest(), table() and figure() read the device.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.distributed import local, moved
from fused_clip_adam.objectives.cispo import CISPO
from fused_clip_adam.objectives.dcpo import DCPO
from fused_clip_adam.objectives.flow import GRPOGuard
from fused_clip_adam.objectives.gmpo import GMPO
from fused_clip_adam.objectives.losses import check_mask, check_tensor
from fused_clip_adam.objectives.objective import Objective
from fused_clip_adam.objectives.ppo import PPO, PPOEWMA
from fused_clip_adam.objectives.stats import FIELDS, ClipStats

COLUMNS = (
    "step",
    *FIELDS,
    "source",
    "excess_tokens",
    "beyond",
    "excess_sum",
    "excess_max",
    "kept_blocks",
    "kept_mass",
    "skipped",
)
"""What the ring holds of a row: sums, so that nothing is lost before the host divides."""

COAST_COLUMNS = ("elements", "steps", "update_sq", "predicted_sq", "reference_sq", "coasting_abs", "all_abs")
"""Sums over the coasting elements of a watched tensor; the last over all its elements."""

SOURCES = (None, "log_probs", "log_probs_and_advantages", "ratio_extremes")
"""Where the excess beyond the bounds comes from; the last is never stored, rows() forms it."""

_CHUNK = 1 << 20
"""Elements of a tensor that are in float64 at a time, 16 times as many on a GPU, where launches cost more than caches
gain: 16 MB, or 256 MB, of extra memory."""

_WATCHED = 1 << 16
"""Elements of all tensors that `watch=n` takes at most: coast reads them every step."""


class _Bounds(NamedTuple):
    """Bounds of the log-ratio."""

    low: float
    high: float
    by_sequence: bool = False
    log_probs: bool = True  # the log-ratio is formed from logp and old_logp alone
    extremes: bool = True  # ratio_min and ratio_max of ClipStats are of the ratio that the bounds are for


class OvershootMonitor:
    """Records, from training, what was clipped, how far ratios lie beyond the clip, how much of Adam's momentum still
    agrees with the gradient, and how far parameters coast whose gradient has become zero.

    Hooks itself into `opt.step()`; `close()`, or leaving a `with` block, takes it out again. While it records, nothing
    is read by the host and no gradient, parameter or state is changed. A row is written every `every` steps and covers
    the steps since the row before; only its kept momentum is of its own step. Of DTensors it measures what this rank
    has.

    A row, as `rows()` gives it (None: not measured, or a quotient with nothing below the line):

    - `step`: calls of `opt.step()` since the monitor began; `skipped`: steps of the row that changed nothing
      (`skip_nonfinite`, `found_inf`).
    - From `ClipStats`, shares of `tokens`: `clip_fraction_low`, `clip_fraction_high`; `suppressed_mass_fraction` =
      suppressed_mass / total_mass; `kl_k3`, per token; `ratio_min`, `ratio_max`; `ratio_ess`, the effective sample size
      over the tokens, 1 where all ratios are equal.
    - Excess, in nats, with D = logp - old_logp (for GSPO the sequence's mean) and the objective's bounds
      log(1 - clip_low), log(1 + clip_high): `beyond_fraction`, the share of tokens beyond a bound; `excess_mean`,
      `excess_max`, how far D lies beyond it, over these tokens. `excess_source` says from what:
      "log_probs_and_advantages": beyond is above the upper bound where A > 0 and below the lower one where A < 0, the
      tokens whose gradient the clip took. "log_probs": beyond either bound. "ratio_extremes": no log-probabilities
      were handed over; `excess_max` is that of ratio_max or ratio_min, whatever the advantage, at most 20 minus the
      bound (where ratios end), and the other two are None.
    - Momentum that block alignment would keep (`AlignedMomentum`), whatever rule the optimizer has: `kept_blocks`, the
      share of blocks with sum m g > 0, m the old `exp_avg`, summed in float64; `kept_mass`, the share of sum |m| in
      them. Of all tensors, and of each in `tensors`. g is `.grad` (its negative under maximize) without an L2 term. Not
      measured in a tensor's first step, or where `step` is given a closure, which makes the gradient too late.
    - Coast, over all watched tensors, and of each in `watched`. An element coasts where its gradient is exactly zero
      and was not in an earlier step T that the monitor saw. Its update is u = ((1 - lr weight_decay) p - p') / lr.
      `coast_observed` = norm of u over norm of u_T, the elements' last updates with a gradient; `coast_predicted` =
      the same with R_k u_T in the place of u, R_k of `theory.residual_ratio` for the element's own k, T, eps and
      second moment: what plain AdamW does from there (under amsgrad with a second moment that stays). `coast_steps`:
      mean of k; `coast_share`: sum of |u| over the coasting elements over that of all: how much of the update is
      nothing but old momentum.

    u is read from the parameters, so it is as exact as they are: about 1e-7 |p| / (lr |u|) relative in float32; in
    bfloat16 an update below half a step of p is not seen at all.

    Args:
        opt: FusedClipAdamW, FusedClipAdam, torch.optim.AdamW or Adam. Groups added later are not measured.
        objective: gives the bounds. None, or an objective without fixed bounds (`SAPO`, `BAPO`, `DCPO`, ...): no
            excess. `CISPO`: bounds of its weight; `GMPO`: its own, in log space.
        every: steps a row. A row's step reads every m and g once more, in chunks, in float64, which on a
            CPU takes longer than the step itself.
        block: elements of a block (row-major from a tensor's start): an int, "element" or "tensor".
        history: rows kept; older ones are overwritten. Memory: 8 bytes a row and parameter tensor, 56 a row and watched
            tensor, about 180 a row besides, on the device of the first parameter.
        names: (name, parameter) pairs such as model.named_parameters(); None: the names of the param groups, or
            their positions.
        watch: whose coast is measured: an int n (the n smallest tensors, as far as they have 65,536 elements together;
            0: none), names, or a function of (name, parameter), such as an embedding's, whose rows are often without a
            gradient. A watched tensor costs every step, whatever `every`, about 50 small torch operations on it, and
            12 bytes an element and a copy.

    Raises:
        TypeError: `opt` is no Adam (unwrap accelerate's by .optimizer), or an argument of the wrong type.
        ValueError: a number out of range, unknown or missing names, or a watched tensor under coupled weight decay
            (Adam's), where no gradient is zero.
        RuntimeError: from `step()`, while a CUDA graph is being captured.

    Source: arXiv 2601.05002, App. D.2 (coast); k3: Schulman 2020, "Approximating KL divergence".
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        objective: Objective | None = PPO(),
        *,
        every: int = 1,
        block: int | str = 1024,
        history: int = 10_000,
        names: Iterable[tuple[str, Tensor]] | None = None,
        watch: int | Sequence[str] | Callable[[str, Tensor], bool] = 8,
    ) -> None:
        if not isinstance(opt, torch.optim.Adam):
            raise TypeError(
                f"opt must be FusedClipAdamW, FusedClipAdam, torch.optim.AdamW or Adam, got {type(opt).__name__}; "
                "accelerate's wrapper has it as .optimizer"
            )
        if objective is not None and not isinstance(objective, Objective):
            raise TypeError(f"objective must be None or an Objective such as PPO(), got {objective!r}")
        _at_least_one("every", every)
        _at_least_one("history", history)
        if block not in ("element", "tensor"):
            _at_least_one("block", block, ' or "element" or "tensor"')
        self.opt, self.objective = opt, objective
        self.every, self.block, self.history = every, block, history
        self.names = _names(opt, names)
        self._params = [(p, group) for group in opt.param_groups for p in group["params"]]
        self._watched = self._select(watch)
        self._bounds = _log_bounds(objective)
        self.device = self._params[0][0].device

        self._steps = self._count = 0
        options = dict(device=self.device, dtype=torch.float64)
        self._ring = torch.full((history, len(COLUMNS)), math.nan, **options)
        self._kept = torch.full((history, len(self.names), 2), math.nan, device=self.device)
        self._coast = torch.full((history, len(self._watched), len(COAST_COLUMNS)), math.nan, **options)
        self._memory = [_Memory.of(local(self._params[i][0])) for i in self._watched]
        self._start_row()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # of watched tensors: parameter and step before a step
        self._new_kept: tuple[Tensor, Tensor] | None = None
        self._skipped_before: Tensor | None = None
        self._hooks = [opt.register_step_pre_hook(self._pre), opt.register_step_post_hook(self._post)]

    # ------------------------------------------------------------ recording

    @torch.no_grad()
    def observe(
        self,
        stats: ClipStats,
        logp: Tensor | None = None,
        old_logp: Tensor | None = None,
        advantages: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Hands over what an objective clipped; several calls before a row (micro-batches, steps) add up.

        Args:
            stats: from `policy_loss` or `clip_stats`.
            logp: [B, T] or packed [N], floating; optional, for the excess. Detached here.
            old_logp: like `logp`; of the policy that the clip compares with (for PPOEWMA that is `ewma_logp`).
            advantages: [B] or like `logp`; optional, then the excess heeds their signs.
            mask: like `logp`; optional, nonzero tokens count. Non-finite tokens do not count either.

        Raises:
            TypeError: not a ClipStats, or tensors that are none, or of another dtype.
            ValueError: shapes or devices that do not fit; log-probabilities for an objective whose bounds are not fixed
                or not for exp(logp - old_logp); arguments without `logp`; calls of one row that differ in what they
                hand over. Nothing has been recorded then.
        """
        if not isinstance(stats, ClipStats):
            raise TypeError(f"stats must be a ClipStats, got {type(stats).__name__}")
        source = 0 if logp is None else 1 if advantages is None else 2
        if logp is None:
            for name, value in (("old_logp", old_logp), ("advantages", advantages), ("mask", mask)):
                if value is not None:
                    raise ValueError(f"{name} without logp has no effect; give logp and old_logp too")
        else:
            self._check_log_probs(logp, old_logp, advantages, mask)
        if self._stats is not None and source != self._source:
            raise ValueError(
                f"observe was given {SOURCES[source] or 'no log_probs'} but {SOURCES[self._source] or 'no log_probs'} "
                "before, in the same row; hand over the same each time"
            )
        excess = None if logp is None else moved(self._excess_of(logp, old_logp, advantages, mask), self.device)
        self._source = source
        self._stats = _merge_stats(self._stats, moved(stats.buffer.detach(), self.device).double())
        if excess is not None:
            self._excess = excess if self._excess is None else _merge_excess(self._excess, excess)

    @property
    def takes_log_probs(self) -> bool:
        """Whether `observe` takes log-probabilities: the objective has fixed bounds for exp(logp - old_logp)."""
        return self._bounds is not None and self._bounds.log_probs

    def _check_log_probs(self, logp: Tensor, old_logp: Any, advantages: Any, mask: Any) -> None:
        kind = type(self.objective).__name__
        if not self.takes_log_probs:
            raise ValueError(
                f"logp has no effect with objective={kind}: it has no fixed bounds for exp(logp - old_logp); "
                "hand over stats alone"
            )
        check_tensor("logp", logp)
        if logp.dim() not in (1, 2):
            raise ValueError(f"logp must be [B, T] or packed [N], got shape {list(logp.shape)}")
        if self._bounds.by_sequence and logp.dim() != 2:
            raise ValueError(f"logp must be [B, T] for {kind}, whose ratio is a sequence's; got {list(logp.shape)}")
        check_tensor("old_logp", old_logp, logp)
        if old_logp.shape != logp.shape:
            raise ValueError(f"old_logp must have logp's shape {list(logp.shape)}, got {list(old_logp.shape)}")
        if advantages is not None:
            check_tensor("advantages", advantages, logp)
            if advantages.shape not in (logp.shape, logp.shape[:1]):
                raise ValueError(
                    f"advantages must be {list(logp.shape)} or {list(logp.shape[:1])}, got {list(advantages.shape)}"
                )
        if mask is not None:
            check_mask(mask, logp)

    def _excess_of(self, logp: Tensor, old_logp: Tensor, advantages: Tensor | None, mask: Tensor | None) -> Tensor:
        """float64 [4]: tokens, tokens beyond a bound, and the sum and maximum of how far."""
        dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
        D = logp.detach().to(dtype) - old_logp.detach().to(dtype)
        valid = D.isfinite()
        if advantages is not None:
            advantages = advantages.unsqueeze(1) if advantages.dim() < logp.dim() else advantages
            valid = valid & advantages.isfinite()
        if mask is not None:
            valid = valid & (mask != 0)
        D = torch.where(valid, D, 0.0)  # a masked token may hold anything
        low, high, by_sequence = self._bounds[:3]
        if by_sequence:
            D = (D.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)).expand_as(D)
        above, below = (D - high).clamp(min=0.0), (low - D).clamp(min=0.0)
        if advantages is not None:
            above, below = above * (advantages > 0), below * (advantages < 0)
        excess = torch.where(valid, above + below, 0.0).double()
        most = excess.amax() if excess.numel() else excess.new_zeros(())
        return torch.stack([valid.sum().double(), (excess > 0).sum().double(), excess.sum(), most])

    @torch.compiler.disable
    @torch.no_grad()
    def _pre(self, opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "OvershootMonitor cannot record while a CUDA graph is being captured: a replay would not run its "
                "Python; close() it before the capture"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        self._new_kept = None
        if closure is None and (self._steps + 1) % self.every == 0:
            self._new_kept = self._kept_momentum()
        self._before.clear()
        for at, index in enumerate(self._watched):
            p, _ = self._params[index]
            if p.grad is not None or closure is not None:
                step = self.opt.state.get(p, {}).get("step")
                step = torch.zeros((), device=p.device) if step is None else moved(step, p.device)
                step = step.to(torch.float64, copy=True)  # the optimizer counts in place
                self._before[at] = (local(p.detach()).clone(), step)
        skipped = getattr(opt, "step_count_skipped", None)
        self._skipped_before = None if skipped is None else moved(skipped, self.device).double()

    @torch.compiler.disable
    @torch.no_grad()
    def _post(self, opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._steps += 1
        for at, (before, step) in self._before.items():
            sums = self._coast_of(at, before, step)
            if sums is not None:
                sums = moved(sums, self.device)
                self._sums[at] = sums if self._sums[at] is None else self._sums[at] + sums
        self._before.clear()
        if self._skipped_before is not None:
            now = moved(opt.step_count_skipped, self.device).double()
            self._skipped = now - self._skipped_before + (0.0 if self._skipped is None else self._skipped)
        if self._steps % self.every == 0:
            self._write_row()

    def _start_row(self) -> None:
        self._stats: Tensor | None = None  # float64, the order of FIELDS
        self._source = 0
        self._excess: Tensor | None = None
        self._sums: list[Tensor | None] = [None] * len(self._watched)
        self._skipped: Tensor | None = None

    def _write_row(self) -> None:
        at = self._count % self.history
        row = self._ring[at].fill_(math.nan)
        row[0].fill_(self._steps)
        column = 1 + len(FIELDS)
        if self._stats is not None:
            row[1:column].copy_(self._stats)
            row[column].fill_(self._source)
        if self._excess is not None:
            row[column + 1 : column + 5].copy_(self._excess)
        if self._skipped is not None:
            row[-1].copy_(self._skipped)
        self._kept[at].fill_(math.nan)
        if self._new_kept is not None:
            by_tensor, total = self._new_kept
            self._kept[at].copy_(by_tensor)
            row[-3:-1].copy_(total)
        self._coast[at].fill_(math.nan)
        for i, sums in enumerate(self._sums):
            if sums is not None:
                self._coast[at, i].copy_(sums)
        self._count += 1
        self._start_row()

    def _kept_momentum(self) -> tuple[Tensor, Tensor]:
        """Shares of blocks and of |m| that alignment keeps: float32 [tensors, 2], NaN where unknown, and [2] of all."""
        unknown = torch.full((4,), math.nan, dtype=torch.float64, device=self.device)
        each = []
        for p, group in self._params:
            m = self.opt.state.get(p, {}).get("exp_avg")
            if m is None or p.grad is None or local(p).numel() == 0:
                each.append(unknown)
            else:
                sign = -1.0 if group["maximize"] else 1.0
                m = local(m.detach()).to(p.device)  # with offload="cpu" it is on the host
                sums = kept_sums(m, local(p.grad.detach()), self.block, sign)
                each.append(moved(sums, self.device))
        table = torch.stack(each)
        total = table.nansum(0)
        return (table[:, 0::2] / table[:, 1::2]).float(), total[0::2] / total[1::2]

    def _coast_of(self, at: int, before: Tensor, step_before: Tensor) -> Tensor | None:
        """What a step did to a watched tensor: float64 [7], see COAST_COLUMNS; notes its new references."""
        index = self._watched[at]
        p, group = self._params[index]
        own = self.opt.state.get(p)
        if p.grad is None or not own or _is_coupled(group):
            return None
        memory, p, g = self._memory[at], local(p.detach()), local(p.grad.detach())
        step = moved(own["step"], p.device).double()
        stepped = step > step_before
        # Counters that were reset, or loaded, say nothing about the gradients the references are of.
        last = torch.where(step_before == memory.step, memory.last.double(), 0.0)
        lr = group["lr"]
        lr = moved(lr.detach(), p.device).double() if isinstance(lr, Tensor) else lr
        update = ((1 - lr * group["weight_decay"]) * before.double() - p.double()) / lr

        has_gradient, measured = g != 0, update.isfinite()  # with lr = 0 nothing is
        coasting = ~has_gradient & (last > 0) & stepped & measured
        beta1, beta2 = (float(beta) for beta in group["betas"])
        v_used = local((own["max_exp_avg_sq"] if group["amsgrad"] else own["exp_avg_sq"]).detach()).to(p.device)
        k = step - last
        ratio = residual_ratios(k, last, v_used.double(), beta1, beta2, group["eps"], stays=group["amsgrad"], now=step)

        def total(values: Tensor) -> Tensor:
            return torch.where(coasting, values, 0.0).sum()

        sums = torch.stack(
            [
                coasting.sum().double(),
                total(k),
                total(update.square()),
                total((ratio * memory.update).square()),
                total(memory.update.square()),
                total(update.abs()),
                torch.where(measured & stepped, update.abs(), 0.0).sum(),
            ]
        )
        fresh = has_gradient & stepped
        memory.update.copy_(torch.where(fresh, update, memory.update))
        memory.last.copy_(torch.where(fresh, torch.where(measured, step, 0.0), last))
        memory.step.copy_(step)
        return sums

    # ------------------------------------------------------------ reading

    def rows(self, last: int | None = None) -> list[dict[str, Any]]:
        """The recorded rows, oldest first: Python numbers and None; see the class. Reads the device.

        Args:
            last: only so many of the newest; None: all that the ring holds.

        Raises:
            TypeError, ValueError: `last` is not an int of at least 1.
        """
        return self._rows(last, tensors=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest row, or None before the first. Reads the device."""
        rows = self._rows(1, tensors=True)
        return rows[0] if rows else None

    def _rows(self, last: int | None, tensors: bool) -> list[dict[str, Any]]:
        if last is not None:
            _at_least_one("last", last)
        count = min(self._count, self.history, last or self.history)
        rings = [self._ring, self._coast] + ([self._kept] if tensors else [])
        ring, coast, *kept = (_newest(each, self._count, count).tolist() for each in rings)
        return [self._row(ring[i], coast[i], kept[0][i] if tensors else None) for i in range(count)]

    def _row(self, values: list[float], coast: list[list[float]], kept: list[list[float]] | None) -> dict[str, Any]:
        x = dict(zip(COLUMNS, values))
        tokens = x["tokens"]
        has_tokens = tokens > 0  # False for NaN too
        row: dict[str, Any] = {
            "step": int(x["step"]),
            "skipped": None if math.isnan(x["skipped"]) else int(x["skipped"]),
            "tokens": _number(tokens),
            "clip_fraction_low": _share(x["clipped_low"], tokens),
            "clip_fraction_high": _share(x["clipped_high"], tokens),
            "suppressed_mass_fraction": _share(x["suppressed_mass"], x["total_mass"]),
            "kl_k3": _share(x["kl_k3"], tokens),
            "ratio_min": _number(x["ratio_min"]) if has_tokens else None,
            "ratio_max": _number(x["ratio_max"]) if has_tokens else None,
            "ratio_ess": _share(x["ratio_sum"] ** 2, x["ratio_sq_sum"] * tokens),
            "beyond_fraction": _share(x["beyond"], x["excess_tokens"]),
            "excess_mean": _share(x["excess_sum"], x["beyond"]),
            "excess_max": _number(x["excess_max"]),
            "excess_source": None if math.isnan(x["source"]) else SOURCES[int(x["source"])],
        }
        bounds = self._bounds
        if row["excess_source"] is None and has_tokens and bounds is not None and bounds.extremes:
            least, most = _log(x["ratio_min"]), _log(x["ratio_max"])
            row["excess_max"] = max(most - bounds.high, bounds.low - least, 0.0)
            row["excess_source"] = "ratio_extremes"
        row["kept_blocks"], row["kept_mass"] = _number(x["kept_blocks"]), _number(x["kept_mass"])
        known = [each for each in coast if not math.isnan(each[0])]
        row.update(_coast_numbers([math.fsum(column) for column in zip(*known)] if known else None))
        if kept is not None:
            pairs = (map(_number, pair) for pair in kept)
            row["tensors"] = {n: dict(zip(("kept_blocks", "kept_mass"), pair)) for n, pair in zip(self.names, pairs)}
            row["watched"] = {
                self.names[i]: _coast_numbers(None if math.isnan(each[0]) else each)
                for i, each in zip(self._watched, coast)
            }
        return row

    def table(self) -> str:
        """A short text: each number of the newest row beside its mean over the rows kept. Reads the device.

        A mean is over the rows in which the number was measured.
        """
        rows = self._rows(None, tensors=False)
        if not rows:
            return "Overshoot report: no step recorded yet"
        newest = self.latest()
        lines = [
            f"Overshoot report: {len(rows)} rows, steps {rows[0]['step']} to {newest['step']}",
            f"  {self._title()}",
            f"  {'':<54}{'newest':>10}{'mean':>10}",
        ]
        for name, text in self._labels(newest["excess_source"]).items():
            known = [row[name] for row in rows if row[name] is not None]
            mean = statistics.fmean(known) if known else None
            lines.append(f"  {text:<54}{_short(newest[name]):>10}{_short(mean):>10}")
        least = [(own["kept_mass"], name) for name, own in newest["tensors"].items() if own["kept_mass"] is not None]
        if len(least) > 1:
            named = ", ".join(f"{name} {mass:.0%}" for mass, name in sorted(least)[:3])
            lines.append(f"  least momentum kept in the newest row: {named}")
        return "\n".join(lines)

    def _title(self) -> str:
        return f"{type(self.opt).__name__}, {self.objective or 'no objective'}"

    def _labels(self, source: str | None) -> dict[str, str]:
        beyond = {
            None: "not measured",
            "log_probs": "either sign of A",
            "log_probs_and_advantages": "by the sign of A",
            "ratio_extremes": "from the extreme ratios alone",
        }[source]
        blocks = f"blocks of {self.block}" if isinstance(self.block, int) else f"by {self.block}"
        return {
            "clip_fraction_low": "clipped low, share of tokens",
            "clip_fraction_high": "clipped high, share of tokens",
            "suppressed_mass_fraction": "suppressed share of the advantage mass",
            "kl_k3": "KL (k3) from the old policy, nats per token",
            "ratio_min": "least ratio",
            "ratio_max": "greatest ratio",
            "ratio_ess": "effective sample size of the ratios, share",
            "beyond_fraction": "tokens beyond the bound, share",
            "excess_mean": "mean excess beyond it, nats",
            "excess_max": f"max excess, nats ({beyond})",
            "kept_blocks": f"momentum that agrees, share of {blocks}",
            "kept_mass": "the same, share of |m|",
            "coast_observed": "coast, observed, of the last update",
            "coast_predicted": "coast, predicted for AdamW",
            "coast_share": "coasting share of the watched tensors' update",
            "skipped": "skipped steps",
        }

    def figure(self, path: str | Path) -> None:
        """Draws the rows over the steps into a .png or .svg: clipping, excess, kept momentum, coast. Reads the device.

        Raises:
            ImportError: matplotlib is not installed (pip install matplotlib).
            ValueError: another suffix, or nothing recorded yet.
        """
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise ValueError(f"path must end in .png or .svg, got {str(path)!r}")
        require_matplotlib()
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        rows = self._rows(None, tensors=False)
        if not rows:
            raise ValueError("figure: no step has been recorded yet; accepted: after a row (see every=)")
        ink, grey, blue, red, teal, gold = "#22303c", "#9aa5b1", "#2f6db5", "#c8553d", "#1d8a7a", "#b8860b"
        panels = [
            (
                "Clipped tokens and suppressed mass",
                [
                    ("clip_fraction_low", "clipped low", red, "-"),
                    ("clip_fraction_high", "clipped high", blue, "-"),
                    ("suppressed_mass_fraction", "suppressed mass", gold, "-"),
                ],
            ),
            (
                "Log-ratio beyond the clip bound, nats",
                [("excess_mean", "mean of tokens beyond", gold, "-"), ("excess_max", "maximum", red, "-")],
            ),
            (
                "Momentum that agrees with the gradient",
                [("kept_blocks", "share of blocks", blue, "-"), ("kept_mass", "share of |m|", teal, "-")],
            ),
            (
                "Coast: update without a gradient / last with one",
                [("coast_observed", "observed", red, "-"), ("coast_predicted", "predicted, AdamW", ink, "--")],
            ),
        ]
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        steps = [row["step"] for row in rows]
        thin = len(rows) > 200
        for axis, (title, curves) in zip(axes.flat, panels, strict=True):
            axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=ink)
            most = 0.0
            for name, label, color, style in curves:
                values = [math.nan if row[name] is None else row[name] for row in rows]  # a gap, not a line across it
                most = max([most, *(value for value in values if math.isfinite(value))])
                # What lies under a dashed curve is wider, so that both show where they agree.
                under = style == "-" and curves[-1][3] == "--"
                width, size = (3.5, 6.5) if under else (0.8 if thin else 1.4, 2.5)
                marker = None if thin and all(map(math.isfinite, values)) else "o"  # between gaps a line may be no line
                axis.plot(steps, values, style, color=color, linewidth=width, marker=marker, ms=size, label=label)
            if any(row[name] is not None for row in rows for name, *_ in curves):
                axis.legend(frameon=False, loc="upper left", ncols=len(curves), fontsize=9)
            else:
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color=grey)
            axis.set_ylim(0, 1.2 * most or 1.0)  # the legend is above the curves
            axis.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
            axis.grid(color="#e6eaee")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(grey)
            axis.tick_params(colors=ink)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (axes[0, 0], axes[1, 0], axes[1, 1]):
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        for axis in axes[1]:
            axis.set_xlabel("optimizer step", color=ink)
        figure.suptitle(f"Overshoot report: {self._title()}\n", fontsize=11, color=ink)
        figure.savefig(path, dpi=150)

    # ------------------------------------------------------------ life

    def close(self) -> None:
        """Takes the hooks out of the optimizer; what was recorded stays readable. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> OvershootMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OvershootMonitor({type(self.opt).__name__}, {self.objective}, every={self.every}, rows={self._count})"

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, the row begun and the references of the coast: tensors (copies), numbers and names, which
        torch.load(weights_only=True) reads."""
        count = min(self._count, self.history)
        return {
            "names": list(self.names),
            "watched": [self.names[i] for i in self._watched],
            "every": self.every,
            "block": self.block,
            "steps": self._steps,
            "ring": _newest(self._ring, self._count, count).clone(),
            "kept": _newest(self._kept, self._count, count).clone(),
            "coast": _newest(self._coast, self._count, count).clone(),
            "memory": [{n: x.clone() for n, x in memory._asdict().items()} for memory in self._memory],
            "row": {
                "source": self._source,
                **{name: _copy(getattr(self, f"_{name}")) for name in ("stats", "excess", "skipped")},
                "sums": [_copy(x) for x in self._sums],
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict()` was taken; a shorter `history` keeps the newest rows. Tensors are copied.

        Raises:
            ValueError: other parameters, watched tensors, `every` or `block`; nothing has been changed then.
        """
        own = {
            "names": list(self.names),
            "watched": [self.names[i] for i in self._watched],
            "every": self.every,
            "block": self.block,
        }
        for name, value in own.items():
            if state_dict[name] != value:
                raise ValueError(f"state_dict has {name}={state_dict[name]!r}, this monitor {value!r}; they must agree")
        shapes = [list(memory["update"].shape) for memory in state_dict["memory"]]
        if shapes != [list(memory.update.shape) for memory in self._memory]:
            raise ValueError(f"state_dict is of watched tensors of the shapes {shapes}, which are not this monitor's")
        row = state_dict["row"]
        count = min(len(state_dict["ring"]), self.history)
        for ring, name in ((self._ring, "ring"), (self._kept, "kept"), (self._coast, "coast")):
            ring.fill_(math.nan)
            ring[:count].copy_(state_dict[name][len(state_dict[name]) - count :])
        self._count, self._steps = count, state_dict["steps"]
        for memory, saved in zip(self._memory, state_dict["memory"]):
            for name, tensor in memory._asdict().items():
                tensor.copy_(saved[name])
        self._source = row["source"]
        for name in ("stats", "excess", "skipped"):
            setattr(self, f"_{name}", _copy(row[name], self.device))
        self._sums = [_copy(x, self.device) for x in row["sums"]]

    def _select(self, watch: Any) -> list[int]:
        """Positions of the watched tensors."""
        coupled = [_is_coupled(group) for _, group in self._params]
        if isinstance(watch, bool) or not (isinstance(watch, (int, list, tuple, set)) or callable(watch)):
            raise TypeError(f"watch must be an int, names or a function of (name, parameter), got {watch!r}")
        if isinstance(watch, int):
            if watch < 0:
                raise ValueError(f"watch must be at least 0, names or a function of (name, parameter), got {watch!r}")
            open_ = [i for i, (p, _) in enumerate(self._params) if not coupled[i] and p.numel()]
            chosen, elements = [], 0
            for i in sorted(open_, key=lambda i: self._params[i][0].numel())[:watch]:
                elements += self._params[i][0].numel()
                if elements <= _WATCHED:
                    chosen.append(i)
            return sorted(chosen)
        if callable(watch):
            chosen = [i for i, name in enumerate(self.names) if watch(name, self._params[i][0])]
        else:
            if unknown := [name for name in watch if name not in self.names]:
                raise ValueError(f"watch names no parameters: {unknown!r}; accepted: names such as {self.names[:5]!r}")
            chosen = [i for i, name in enumerate(self.names) if name in watch]
        if not chosen:
            raise ValueError(f"watch={watch!r} selects no parameter; accepted: 0 for none")
        for i in chosen:
            if coupled[i]:
                raise ValueError(
                    f"watch selects {self.names[i]!r}, whose group has coupled weight_decay="
                    f"{self._params[i][1]['weight_decay']!r}: it gives every element a gradient; accepted: decoupled, "
                    "or 0"
                )
        return chosen


class _Memory(NamedTuple):
    """Of a watched tensor. update: float64, each element's last update with a gradient; last: float32, the `step` of
    it, 0 for none; step: float64 0-d, the tensor's `step` when last seen."""

    update: Tensor
    last: Tensor
    step: Tensor

    @staticmethod
    def of(p: Tensor) -> _Memory:
        zeros = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
        return _Memory(zeros, zeros.float(), torch.zeros((), dtype=torch.float64, device=p.device))


def kept_sums(m: Tensor, g: Tensor, block: int | str, sign: float = 1.0) -> Tensor:
    """What block alignment would keep of a tensor's momentum: float64 [4] on its device.

    Args:
        m: old `exp_avg`, any shape and floating dtype; not empty. g: the gradient, its shape. block: as
            OvershootMonitor. sign: -1.0 where g is to be ascended.

    Returns:
        kept blocks, blocks, sum |m| of the kept blocks, sum |m|. A block is kept where sum m g > 0, in float64.
    """
    m, g = m.reshape(-1), g.reshape(-1)
    n = m.numel()
    block = {"element": 1, "tensor": n}.get(block, block)
    block = min(block, n)
    chunk = _CHUNK if m.device.type == "cpu" else 16 * _CHUNK
    parts = []
    if block > chunk:  # a block at a time, in pieces
        for i in range(0, n, block):
            pieces = zip(m[i : i + block].split(chunk), g[i : i + block].split(chunk))
            parts.append(sum(_agreement(a, b, a.numel()) for a, b in pieces))
    else:
        span = chunk // block * block
        for i in range(0, n, span):
            # Whole blocks as rows; the rest of the tensor is a block of its own.
            a, b = m[i : i + span], g[i : i + span]
            whole = a.numel() // block * block
            parts.append(_agreement(a[:whole], b[:whole], block))
            if whole < a.numel():
                parts.append(_agreement(a[whole:], b[whole:], a.numel() - whole))
    agreement, mass = torch.cat(parts, dim=1)
    kept = agreement * sign > 0
    blocks = torch.full((), kept.numel(), dtype=torch.float64, device=m.device)
    return torch.stack([kept.sum().double(), blocks, torch.where(kept, mass, 0.0).sum(), mass.sum()])


def _agreement(m: Tensor, g: Tensor, block: int) -> Tensor:
    """sum m g and sum |m| of each block of two 1-d tensors of whole blocks: float64 [2, blocks]."""
    m, products = (x.to(torch.float64, copy=True).view(-1, block) for x in (m, g))  # copies: the rest is in place
    products.mul_(m)
    return torch.stack([products.sum(1), m.abs_().sum(1)])


def residual_ratios(
    k: Tensor, T: Tensor, v: Tensor, beta1: float, beta2: float, eps: float, *, stays: bool, now: Tensor
) -> Tensor:
    """`theory.residual_ratio` by element, from the second moment as it is k steps after T: float64.

    Args:
        k, T: float64 tensors; where T is 0 the result has no meaning. now: T + k, 0-d.
        v: float64, `exp_avg_sq` after step T + k, or `max_exp_avg_sq` with `stays`, which does not decay.
    """

    def log_decay(beta: float, power: bool) -> Tensor:
        log_beta = math.log(beta) if beta > 0.0 else -math.inf
        faded = k * log_beta if power else 0.0
        return faded + torch.log(-torch.expm1(T * log_beta)) - torch.log(-torch.expm1(now * log_beta))

    log_A, log_root_B = log_decay(beta1, True), 0.5 * log_decay(beta2, not stays)
    size = (v / -torch.expm1(now * (math.log(beta2) if beta2 > 0.0 else -math.inf))).sqrt()
    # R = A (s_T + eps) / (s_T sqrt(B) + eps), and s_T sqrt(B) is the size now. In logarithms: beta2^k may underflow.
    return (torch.exp(log_A - log_root_B) * size + torch.exp(log_A) * eps) / (size + eps)


def require_matplotlib() -> None:
    """Raises:
    ImportError: matplotlib is not installed, with what to do.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the overshoot figure needs matplotlib: pip install matplotlib") from error


def _log_bounds(objective: Objective | None) -> _Bounds | None:
    """The bounds of an objective's log-ratio; None where it has none that hold for every token."""
    if isinstance(objective, CISPO):
        return _Bounds(_log(objective.low or 0.0), math.log(objective.high))
    if isinstance(objective, DCPO) or not (hasattr(objective, "clip_low") and hasattr(objective, "clip_high")):
        return None
    low, high = float(objective.clip_low), float(objective.clip_high)
    if isinstance(objective, GMPO):  # its statistics hold sequences' ratios, its bounds are for tokens
        return _Bounds(-low, high, extremes=False)
    return _Bounds(
        math.log1p(-low) if low < 1.0 else -math.inf,
        math.log1p(high),
        by_sequence=objective.rule in rules.SEQUENCE_RATIO,
        log_probs=not isinstance(objective, GRPOGuard),  # its ratio is of the means too
        extremes=not isinstance(objective, PPOEWMA),  # its statistics hold the ratio to the old policy
    )


def _names(opt: torch.optim.Optimizer, names: Any) -> list[str]:
    """A name for every parameter, in group order."""
    given: dict[int, str] = {}
    if names is not None:
        try:
            pairs = [(name, p) for name, p in names]
            good = all(isinstance(name, str) and isinstance(p, Tensor) for name, p in pairs)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise TypeError(f"names must be (name, parameter) pairs such as model.named_parameters(), got {names!r}")
        given = {id(p): name for name, p in pairs}
    out = []
    for i, group in enumerate(opt.param_groups):
        own = group.get("param_names") or [f"param_groups[{i}][{j}]" for j in range(len(group["params"]))]
        for j, p in enumerate(group["params"]):
            if names is not None and id(p) not in given:
                raise ValueError(f"names has no name for param_groups[{i}]['params'][{j}], shape {list(p.shape)}")
            out.append(given.get(id(p), own[j]))
    if repeated := [name for name, times in Counter(out).items() if times > 1]:
        raise ValueError(f"names must differ, got twice or more: {repeated!r}")
    return out


def _is_coupled(group: dict[str, Any]) -> bool:
    """Whether weight decay enters through the gradient: Adam's, and not zero."""
    return not group["decoupled_weight_decay"] and float(group["weight_decay"]) != 0.0


def _at_least_one(name: str, value: Any, besides: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least 1{besides}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an int of at least 1{besides}, got {value!r}")


def _copy(tensor: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(device or tensor.device, copy=True)


_LEAST, _MOST = FIELDS.index("ratio_min"), FIELDS.index("ratio_max")


def _merge_stats(old: Tensor | None, new: Tensor) -> Tensor:
    """Sums add, ratio_min and ratio_max merge; float64, so that counts stay exact over many batches."""
    if old is None:
        return new
    merged = old + new
    merged[_LEAST] = torch.minimum(old[_LEAST], new[_LEAST])
    merged[_MOST] = torch.maximum(old[_MOST], new[_MOST])
    return merged


def _merge_excess(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old[:3] + new[:3], torch.maximum(old[3:], new[3:])])


def _newest(ring: Tensor, written: int, count: int) -> Tensor:
    """The `count` rows written last, oldest first."""
    end = written % len(ring) if written else 0
    start = end - count
    return ring[start:end] if start >= 0 else torch.cat([ring[len(ring) + start :], ring[:end]])


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _share(part: float, whole: float) -> float | None:
    return _number(part / whole) if whole > 0 else None


def _coast_numbers(sums: list[float] | None) -> dict[str, float | None]:
    x = dict(zip(COAST_COLUMNS, sums or [math.nan] * len(COAST_COLUMNS)))
    observed, predicted = (_share(x[name], x["reference_sq"]) for name in ("update_sq", "predicted_sq"))
    return {
        "coast_observed": None if observed is None else math.sqrt(observed),
        "coast_predicted": None if predicted is None else math.sqrt(predicted),
        "coast_steps": _share(x["steps"], x["elements"]),
        "coast_share": _share(x["coasting_abs"], x["all_abs"]),
    }


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
