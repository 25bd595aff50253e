"""TRL's GRPOTrainer on the fused objective and a clip-aware optimizer (written against TRL 1.16)."""

from pathlib import Path

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

import fused_clip_adam as fca
from fused_clip_adam.integrations.metrics import shares
from fused_clip_adam.integrations.transformers import FusedTrainerMixin, clip_aware_optimizer
from fused_clip_adam.monitor import OvershootMonitor, require_matplotlib

# TRL's loss_type -> how our objective adds up its tokens.
AGGREGATIONS = {
    "grpo": "sequence-mean",
    "sapo": "sequence-mean",
    "luspo": "sequence-sum",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "vespo": "token-mean",
    "dr_grpo": "constant",
}

# What TRL's forward may need beside the token ids (images, mostly); absent keys are passed as None.
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class FusedGRPOTrainer(FusedTrainerMixin, GRPOTrainer):
    """GRPOTrainer with its loss replaced by `fca.policy_loss`; same gradient, plus clip statistics for the optimizer.

    TRL's forward -> `fca.policy_loss` -> `optimizer.observe(stats)` and the metrics -> the loss TRL backpropagates.

    Args:
        *args, **kwargs: GRPOTrainer's own; every `loss_type` of TRL 1.16.
        objective: an fca objective. None: what the config says: `fca.CISPO`, `fca.SAPO` or `fca.VESPO` by `loss_type`,
            else `fca.PPO` from `epsilon`, `epsilon_high` and `delta`, or `fca.GSPO` when
            `importance_sampling_level="sequence"`. With an objective given, the config's clip range is not read;
            `loss_type` still says how tokens are aggregated. Objectives that need entropies get TRL's.

    Metrics, beside TRL's `clip_ratio/{low,high,region}_mean`, `entropy` and `kl`; all per unmasked token:
        `policy/overshoot`: how far tokens have gone past the clip bound that should have stopped them. With
            D = logp - old_logp it is the mean of max(0, D - log(1 + clip_high)) where A > 0 and of
            max(0, log(1 - clip_low) - D) where A < 0. Only for objectives with `clip_low` and `clip_high`.
        `policy/kl_k3`: mean of exp(D) - 1 - D, the drift from the policy that wrote the rollouts.
        `policy/suppressed_mass`: share of the advantage mass whose gradient the clip removed.
        `policy/ess`: effective sample size of the ratios, 1 = on policy.
        `policy/nonfinite`: tokens left out because their loss was not finite.

    With an `OvershootCallback` among the callbacks, it is fed and its numbers are in the logs.

    Note:
        TRL reuses rollouts, and so clips, only if `num_iterations >= 2` or
        `steps_per_generation > gradient_accumulation_steps`. Otherwise every ratio is exactly 1.
        With `grad_clip` in the optimizer set `max_grad_norm=0` (None is a TypeError in the Trainer). What is logged is
        the optimizer's own `grad_norm`, see `FusedTrainerMixin`.

    Raises:
        ValueError: a `loss_type` or an option that this loss does not implement, by name and value. At the first step,
            as `FusedTrainerMixin`.

    Source: TRL 1.16, `GRPOTrainer._compute_loss`.
    """

    def __init__(self, *args, objective=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_supported(objective)
        self.objective = self._objective_from_config() if objective is None else objective

    def _check_supported(self, objective):
        if self.loss_type not in AGGREGATIONS:
            raise ValueError(
                f"loss_type={self.loss_type!r} is not handled by FusedGRPOTrainer; accepted: {sorted(AGGREGATIONS)}. "
                "For another objective pass objective=, for example objective=fca.CISPO() with loss_type='dapo'."
            )
        refused = {
            "entropy_coef": self._entropy_bonus_enabled and self.entropy_coef,
            "use_adaptive_entropy": self.use_adaptive_entropy,
            "router_aux_loss_coef": self.aux_loss_enabled and self.router_aux_loss_coef,
            "delta with importance_sampling_level='sequence'": (
                objective is None and self.importance_sampling_level == "sequence" and self.args.delta
            ),
            f"importance_sampling_level='sequence' with loss_type={self.loss_type!r}": (
                objective is None
                and self.importance_sampling_level == "sequence"
                and self.loss_type in ("cispo", "sapo", "vespo")
            ),
        }
        if self._reads_weights(objective):  # they enter its own weight, and TRL's masks are no importance weights
            refused["top_entropy_quantile with VESPO"] = self.top_entropy_quantile < 1.0
            refused["off_policy_mask_threshold with VESPO"] = self.off_policy_mask_threshold is not None
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name}={value!r} is not handled by FusedGRPOTrainer; turn it off or use GRPOTrainer")

    def _reads_weights(self, objective):
        return isinstance(objective, fca.VESPO) or (objective is None and self.loss_type == "vespo")

    def _objective_from_config(self):
        if self.loss_type == "cispo":
            return fca.CISPO(high=self.epsilon_high)
        if self.loss_type == "sapo":
            return fca.SAPO(self.args.sapo_temperature_pos, self.args.sapo_temperature_neg)
        if self.loss_type == "vespo":
            names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
            return fca.VESPO(*(getattr(self.args, f"vespo_{name}") for name in names))
        if self.importance_sampling_level == "sequence":
            return fca.GSPO(clip_low=self.epsilon_low, clip_high=self.epsilon_high)
        # TRL caps the unclipped ratio at delta before the minimum is taken, for both signs of the advantage.
        return fca.PPO(clip_low=self.epsilon_low, clip_high=self.epsilon_high, ratio_cap=self.args.delta)

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        logp, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            **{key: inputs.get(key) for key in FORWARD_KEYS},
        )
        old_logp = inputs.get("old_per_token_logps")
        if old_logp is None:  # TRL leaves it out when no step separates the rollout from its only use
            old_logp = logp.detach()
        ref_logp = inputs["ref_per_token_logps"] if self.beta != 0.0 else None
        # TRL weighs the KL by the ratio unless told not to. The fused loss has the plain KL only, so this one is torch.
        corrected = ref_logp is not None and self.args.use_bias_correction_kl
        token_kl = self._token_kl(logp, old_logp, ref_logp, mask) if corrected else None

        aggregation = AGGREGATIONS[self.loss_type]
        # An optimizer step sums the losses of its micro-batches; evaluation does not accumulate.
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        normalizer = None
        if self.loss_type in ("dapo", "cispo", "vespo"):  # tokens of all ranks, cut to the share of an optimizer step
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if mode == "train":
                normalizer = normalizer / self.args.steps_per_generation  # accumulation is divided out below
        elif self.loss_type == "dr_grpo":
            normalizer = float(logp.size(0) * self.max_completion_length)

        loss, stats = fca.policy_loss(
            logp,
            old_logp,
            inputs["advantages"],
            mask=mask.bool(),
            objective=self.objective,
            aggregation=aggregation,
            normalizer=normalizer,
            weights=self._policy_weights(inputs, logp, old_logp, entropies, mask),
            ref_logp=ref_logp,
            kl_coef=0.0 if token_kl is not None else self.beta,
            entropy=entropies.detach() if "entropy" in self.objective.needs else None,
        )
        if token_kl is not None:
            loss = loss + self.beta * _aggregate(token_kl, mask, aggregation, normalizer)
        if self.accelerator.num_processes > 1:
            stats.all_reduce()  # a rule that acts on the statistics must act alike on every rank
        optimizer = clip_aware_optimizer(self.optimizer)
        if mode == "train" and optimizer is not None:
            optimizer.observe(stats)
        if mode == "train":
            for callback in self._overshoot_callbacks():
                callback.observe(self.objective, stats, logp, old_logp, inputs["advantages"], mask)
        self._append_metrics(mode, stats, logp.detach(), old_logp, ref_logp, entropies, inputs["advantages"], mask)
        return loss / accumulation

    def _policy_weights(self, inputs, logp, old_logp, entropies, mask):
        """The product of TRL's optional detached factors on the policy term, [B, T], or None if there are none."""
        factors = []
        if self.top_entropy_quantile < 1.0:
            factors.append(self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile))
        if self.off_policy_mask_threshold is not None:
            factors.append(
                self.get_off_policy_mask(
                    advantages=_per_token(inputs["advantages"]),
                    per_token_logps=logp,
                    sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logp),
                    mask=mask,
                    off_policy_threshold=self.off_policy_mask_threshold,
                )
            )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(inputs["importance_sampling_ratio"])
        if not factors:
            return None
        weights = torch.ones_like(logp, requires_grad=False)
        for factor in factors:
            weights = weights * factor  # [B, T] or [B, 1]
        return weights

    def _token_kl(self, logp, old_logp, ref_logp, mask):
        """The k3 estimate of KL(policy || reference) per token, times the ratio if `use_bias_correction_kl`."""
        log_ratio = (ref_logp - logp).masked_fill(mask == 0, 0.0)  # padding may hold anything: keep it out of exp
        kl = log_ratio.exp() - log_ratio - 1
        if self.args.use_bias_correction_kl:
            by_sequence = self.importance_sampling_level == "sequence"
            kl = kl * _policy_log_ratio(logp, old_logp, mask, by_sequence).exp()
        return kl

    @torch.no_grad()
    def _append_metrics(self, mode, stats, logp, old_logp, ref_logp, entropies, advantages, mask):
        def token_sum(values):
            return values.masked_fill(mask == 0, 0.0).sum()

        sums = {"entropy": token_sum(entropies)}
        if ref_logp is not None:
            sums["kl"] = token_sum(self._token_kl(logp, old_logp, ref_logp, mask))
        if hasattr(self.objective, "clip_low") and hasattr(self.objective, "clip_high"):
            sums["policy/overshoot"] = token_sum(overshoot(logp, old_logp, advantages, mask, self.objective))
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()

        clip = stats.to_dict()
        tokens = max(clip["tokens"], 1.0)
        values = {name: total / tokens for name, total in zip(sums, totals, strict=True)}
        values["clip_ratio/low_mean"] = clip["clipped_low"] / tokens
        values["clip_ratio/high_mean"] = clip["clipped_high"] / tokens
        values["clip_ratio/region_mean"] = (clip["clipped_low"] + clip["clipped_high"]) / tokens
        values["policy/kl_k3"] = clip["kl_k3"] / tokens
        values |= {f"policy/{name}": value for name, value in shares(clip).items()}
        for name, value in values.items():
            self._metrics[mode][name].append(float(value))

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            for callback in self._overshoot_callbacks():
                logs.update(callback.numbers())
        return super().log(logs, *args, **kwargs)

    def _overshoot_callbacks(self):
        return [each for each in self.callback_handler.callbacks if isinstance(each, OvershootCallback)]


class OvershootCallback(TrainerCallback):
    """The overshoot report of a training run with FusedGRPOTrainer: `trainer.add_callback(OvershootCallback())`.

    Makes an `fca.OvershootMonitor` of the trainer's optimizer before its first step and feeds it what the loss saw;
    puts the numbers of its newest row into the logs, as `overshoot/...`; when training ends, writes `overshoot.txt`
    (the table) and `overshoot.png` (the figure) into `output_dir`. `monitor` stays readable afterwards.

    With several processes `ClipStats` are of all of them; excess, kept momentum and coast are of this one's tokens and
    parameters, and the main one writes. A run that goes on from a checkpoint begins a new report.

    Args:
        monitor: one that you made and will close; None: made here, and closed when training ends.
        **options: of the OvershootMonitor made here; `objective` is by default the trainer's, `names` the model's.

    Raises:
        TypeError: `options` beside a monitor, or not an OvershootMonitor. As OvershootMonitor at the first loss.
        ImportError: matplotlib is not installed, when training begins.
        RuntimeError: at the first step of a trainer that is no FusedGRPOTrainer: it hands nothing over.
    """

    def __init__(self, monitor=None, **options):
        if monitor is not None and not isinstance(monitor, OvershootMonitor):
            raise TypeError(f"monitor must be None or an OvershootMonitor, got {type(monitor).__name__}")
        if monitor is not None and options:
            raise TypeError(f"{sorted(options)} have no effect beside a monitor; give them to the monitor")
        self.monitor = monitor
        self._options = options
        self._owns = monitor is None
        self._optimizer = self._model = None
        self._fed = False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        require_matplotlib()  # now, and not after hours of training
        self._model, self._optimizer, self._fed = model, optimizer, False
        if self._owns:
            self.monitor = None

    def observe(self, objective, stats, logp, old_logp, advantages, mask):
        """What FusedGRPOTrainer's loss saw; it calls this."""
        if self.monitor is None:
            optimizer = self._optimizer
            while not isinstance(optimizer, torch.optim.Adam) and hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            options = {"objective": objective, "names": self._model.named_parameters(), **self._options}
            self.monitor = OvershootMonitor(optimizer, **options)
        self._fed = True
        if self.monitor.takes_log_probs:
            self.monitor.observe(stats, logp, old_logp, advantages, mask)
        else:
            self.monitor.observe(stats)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._fed:
            raise RuntimeError(
                "OvershootCallback got no statistics: accepted is FusedGRPOTrainer, which hands them over"
            )

    def numbers(self):
        """The newest row's numbers as {"overshoot/name": float}, without what was not measured."""
        row = None if self.monitor is None else self.monitor.latest()
        return {
            f"overshoot/{name}": float(value)
            for name, value in (row or {}).items()
            if name != "step" and isinstance(value, (int, float))
        }

    def on_train_end(self, args, state, control, **kwargs):
        if self.monitor is None:
            return
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "overshoot.txt").write_text(self.monitor.table() + "\n")
            if self.monitor.latest() is not None:
                self.monitor.figure(folder / "overshoot.png")
        if self._owns:
            self.monitor.close()


def overshoot(logp, old_logp, advantages, mask, objective):
    """Per token, how far the log-ratio D has gone past its clip bound in the direction of its advantage.

    max(0, D - log(1 + clip_high)) where A > 0, max(0, log(1 - clip_low) - D) where A < 0, and 0 where A = 0. The clip
    stops pushing there, so what is left is momentum and other tokens' gradients. For GSPO D is the sequence's mean.

    Args:
        logp, old_logp: [B, T] log-probabilities now and at the rollout.
        advantages: [B] or [B, T].
        mask: [B, T], 0 or False where there is no token.
        objective: one with `clip_low` and `clip_high`.

    Returns:
        [B, T], 0 where masked.
    """
    log_ratio = _policy_log_ratio(logp, old_logp, mask, by_sequence=isinstance(objective, fca.GSPO))
    if isinstance(objective, fca.GMPO):  # its bounds are of the log-ratio
        low, high = -objective.clip_low, objective.clip_high
    else:
        low, high = torch.tensor([1.0 - objective.clip_low, 1.0 + objective.clip_high]).clamp(min=0.0).log().tolist()
    advantages = _per_token(advantages)
    above = (log_ratio - high).clamp(min=0.0) * (advantages > 0)
    below = (low - log_ratio).clamp(min=0.0) * (advantages < 0)
    return (above + below).expand_as(logp).masked_fill(mask == 0, 0.0)


def _policy_log_ratio(logp, old_logp, mask, by_sequence):
    """logp - old_logp, 0 where masked: [B, T], or the sequences' means [B, 1]."""
    log_ratio = (logp - old_logp).masked_fill(mask == 0, 0.0)
    if by_sequence:
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio


def _aggregate(values, mask, aggregation, normalizer):
    """Sum [B, T] to a scalar as `fca.policy_loss` does, for a term that it does not know."""
    values = values.masked_fill(mask == 0, 0.0)
    if aggregation == "sequence-mean":
        return (values.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if aggregation == "sequence-sum":
        return values.sum(1).mean()
    return values.sum() / (mask.sum().clamp(min=1) if normalizer is None else normalizer)


def _per_token(advantages):
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
