"""Policy losses for verl on the fused objective, and an optimizer that sees what they clipped (written for verl 0.9.1).

verl imports this module by itself wherever it is imported, through the entry point in the group "verl.plugins"; from
then on its configuration takes (a path that starts with + is not in verl's own files):

    actor_rollout_ref.actor.policy_loss.loss_mode=fused_ppo                  one of `OBJECTIVES`
    actor_rollout_ref.actor.optim.optimizer_impl=fused_clip_adam.integrations.verl
    actor_rollout_ref.actor.optim.optimizer=FusedClipAdamW
    actor_rollout_ref.actor.optim.override_optimizer_config={skip_nonfinite: True}

and, for arguments of an objective that verl has no name for,

    actor_rollout_ref.actor.policy_loss._target_=fused_clip_adam.integrations.verl.FusedPolicyLossConfig
    +actor_rollout_ref.actor.policy_loss.objective={k_pos: 1.0}

A rule with arguments is written {_target_: fused_clip_adam.MomentumBrake, strength: 1.0}. verl swallows the error of a
plugin that it cannot import, and then does not know its losses; VERL_USE_EXTERNAL_MODULES, with this module's name,
shows it.

The optimizer is `handover.FusedClipAdamW`, which observes what the losses of its process clipped; a critic's is
fused_clip_adam's own. On several GPUs take actor.strategy=fsdp2: FSDP1 shows an optimizer unmarked slices; with
Megatron the losses alone can be used. `algorithm.rollout_correction.bypass_mode=true` makes verl take its own loss.

verl clips gradients itself, at `actor.optim.clip_grad`, and reads their norm on the host in every step. A `grad_clip`
of the optimizer goes with `actor.optim.clip_grad=inf`, which leaves the gradients as they are and keeps verl's
`grad_norm` and its skip of steps whose norm is not finite; what it costs is verl's two passes over the gradients.
"""

from dataclasses import dataclass, field, fields

import torch
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig, PolicyLossConfig

import fused_clip_adam as fca
from fused_clip_adam.integrations.clipping import refuse_two_clips
from fused_clip_adam.integrations.handover import FusedClipAdamW, hand_over
from fused_clip_adam.integrations.metrics import shares

__all__ = ["OBJECTIVES", "FusedClipAdamW", "FusedPolicyLossConfig", "aggregation_of", "metrics_of", "objective_of"]

# ---------------------------------------------------------------- from verl's configuration to an objective


def _clip_range(actor):
    low, high = (actor.clip_ratio if x is None else x for x in (actor.clip_ratio_low, actor.clip_ratio_high))
    return {"clip_low": low, "clip_high": high}


def _dual_clip(actor):
    return {**_clip_range(actor), "dual_clip": actor.clip_ratio_c}


def _ratio_range(actor):
    low, high = _clip_range(actor).values()
    return {"low": 1.0 - low, "high": 1.0 + high}


def _deltas(actor):
    low, high = _clip_range(actor).values()
    return {"delta_low": low, "delta_high": high, "max_ratio": actor.clip_ratio_c}


def _clip_cov(actor):
    own = actor.policy_loss
    cov = {"ratio": own.clip_cov_ratio, "cov_low": own.clip_cov_lb, "cov_high": own.clip_cov_ub}
    return {**_clip_range(actor), **cov}


OBJECTIVES = {
    "fused_ppo": (fca.PPO, _dual_clip),
    "fused_gppo": (fca.GPPO, _dual_clip),
    "fused_cegppo": (fca.CEGPPO, _dual_clip),
    "fused_dcpo": (fca.DCPO, _dual_clip),
    "fused_bapo": (fca.BAPO, lambda actor: {"dual_clip": actor.clip_ratio_c}),
    "fused_cispo": (fca.CISPO, _ratio_range),
    "fused_sapo": (fca.SAPO, lambda actor: {"tau_pos": actor.tau_pos, "tau_neg": actor.tau_neg}),
    "fused_gpg": (fca.GPG, lambda actor: {}),
    "fused_dro": (fca.DRO, lambda actor: {"beta": actor.policy_loss.dro_beta}),
    "fused_dppo_tv": (fca.DPPOTV, _deltas),
    "fused_dppo_kl": (fca.DPPOKL, _deltas),
    "fused_clip_cov": (fca.ClipCov, _clip_cov),
    "fused_kl_cov": (
        fca.KLCov,
        lambda actor: {"ratio": actor.policy_loss.kl_cov_ratio, "kappa": actor.policy_loss.ppo_kl_coef},
    ),
    "fused_gspo": (fca.GSPO, _clip_range),
    "fused_luspo": (fca.LUSPO, _clip_range),
    "fused_gmpo": (fca.GMPO, _clip_range),
    "fused_vespo": (fca.VESPO, lambda actor: {}),
}
"""`loss_mode` -> (objective, its arguments as verl's ActorConfig names them). Objectives that need what verl does not
hand to a policy loss (entropies, an averaged policy) are not here."""


@dataclass
class FusedPolicyLossConfig(PolicyLossConfig):
    """verl's `policy_loss` section with arguments for the objective, which take precedence over verl's own names.

    Args:
        objective: {argument: value} of the objective that `loss_mode` names. Every other field is verl's.

    Raises:
        ValueError: `loss_mode` names no fused loss, or its objective has no such argument.
    """

    objective: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.objective and self.loss_mode not in OBJECTIVES:
            raise ValueError(
                f"policy_loss.objective={self.objective!r} goes with a fused loss, got loss_mode={self.loss_mode!r}; "
                f"accepted: {', '.join(OBJECTIVES)}"
            )
        if self.objective:
            kind = OBJECTIVES[self.loss_mode][0]
            accepted = [each.name for each in fields(kind)]
            if unknown := sorted(set(self.objective) - set(accepted)):
                raise ValueError(
                    f"policy_loss.objective has {unknown}, which {kind.__name__} does not take; accepted: "
                    f"{', '.join(accepted) or 'nothing'}"
                )


def objective_of(loss_mode, actor):
    """The objective of a fused loss, from verl's configuration.

    Args:
        loss_mode: a key of `OBJECTIVES`.
        actor: verl's ActorConfig. Read are, where the objective has them: `clip_ratio`, `clip_ratio_low`,
            `clip_ratio_high`; `clip_ratio_c` as the dual clip (None for none) or DPPO's bound of the ratio; `tau_pos`,
            `tau_neg`; `policy_loss.{clip_cov_ratio, clip_cov_lb, clip_cov_ub, kl_cov_ratio, ppo_kl_coef, dro_beta}`;
            then `policy_loss.objective`.

    Raises:
        TypeError, ValueError: as the objective.
    """
    kind, arguments = OBJECTIVES[loss_mode]
    return kind(**{**arguments(actor), **actor.policy_loss.get("objective", {})})


# ---------------------------------------------------------------- the losses


def aggregation_of(
    loss_agg_mode, mask, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None
):
    """(`aggregation`, `normalizer`) of `fca.policy_loss` that add tokens up as verl's `agg_loss` does.

    Args:
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" or
            "seq-mean-token-mean".
        mask: [B, T], nonzero where there is a token.
        dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: verl's `global_batch_info`: numbers or None.
            Without a global count this batch's own is taken; sequences without a token do not count.

    Where no token is left the loss is 0 (verl's own is NaN).

    Raises:
        ValueError: an unknown mode; no global count beside a dp_size above 1.

    Source: verl 0.9.1, `agg_loss`.
    """
    counts = {"token-mean": ("batch_num_tokens", batch_num_tokens)}
    for name in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        counts[name] = ("global_batch_size", global_batch_size)
    if loss_agg_mode == "token-sum":
        return "constant", 1.0 / dp_size
    if loss_agg_mode not in counts:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} is unknown; accepted: token-sum, {', '.join(counts)}")
    name, count = counts[loss_agg_mode]
    if count is None:
        if dp_size > 1:
            raise ValueError(f"loss_agg_mode={loss_agg_mode!r} needs {name} in global_batch_info, as dp_size={dp_size}")
        count = (mask != 0).sum() if loss_agg_mode == "token-mean" else (mask != 0).any(-1).sum()
    # A count of 0 leaves nothing to divide, and no normalizer may be 0.
    count = count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        count = count * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    aggregation = {"token-mean": "token-mean", "seq-mean-token-mean": "sequence-mean"}
    return aggregation.get(loss_agg_mode, "sequence-sum"), count / dp_size


def metrics_of(stats):
    """Floats by verl's names, per token, and `actor/nonfinite`, the number of tokens left out; reads the device once.

    `actor/pg_clipfrac`: past the bound that stops them. `actor/pg_clipfrac_lower`: past the dual clip. `actor/ppo_kl`:
    mean of old_log_prob - log_prob, not clamped. `actor/suppressed_mass`, `actor/ess`: see `metrics.shares`.
    """
    seen = stats.to_dict()  # verl makes a float of every metric at once; one read is the least
    tokens = max(seen["tokens"], 1.0)
    return {
        "actor/pg_clipfrac": (seen["clipped_low"] + seen["clipped_high"]) / tokens,
        "actor/pg_clipfrac_lower": seen["clipped_dual"] / tokens,
        "actor/ppo_kl": seen["kl_k1"] / tokens,
        **{f"actor/{name}": value for name, value in shares(seen).items()},
    }


def _register(loss_mode):
    @register_policy_loss(loss_mode)
    def policy_loss(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        if not isinstance(config, ActorConfig):
            raise TypeError(f"{loss_mode}: config must be verl's ActorConfig, got {type(config).__name__}")
        if loss_mode == "fused_luspo" and not loss_agg_mode.startswith("seq-mean-token-sum"):
            raise ValueError(
                f"fused_luspo: loss_agg_mode={loss_agg_mode!r} makes it fused_gspo; accepted: seq-mean-token-sum, "
                "seq-mean-token-sum-norm"
            )
        _refuse_second_clip(config.optim)
        aggregation, normalizer = aggregation_of(loss_agg_mode, response_mask, **config.global_batch_info)
        loss, stats = fca.policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask=response_mask,
            objective=objective_of(loss_mode, config),
            aggregation=aggregation,
            normalizer=normalizer,
            weights=rollout_is_weights,
        )
        if loss.requires_grad:  # verl evaluates losses too
            hand_over(stats)
        return loss, metrics_of(stats)

    policy_loss.__doc__ = f"verl's policy loss {loss_mode!r}, see `OBJECTIVES`; its arguments are verl's."
    return policy_loss


def _refuse_second_clip(optim):
    """verl clips before the optimizer does; here both are known."""
    own = (optim.get("override_optimizer_config") or {}).get("grad_clip")
    if own is not None:
        refuse_two_clips(own, "actor.optim.clip_grad", optim.clip_grad, off="inf")


for _loss_mode in OBJECTIVES:
    _register(_loss_mode)
