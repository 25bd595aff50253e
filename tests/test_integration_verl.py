"""The verl plugin against verl's own losses, and in verl's own FSDP2 engine, which here runs on the CPU."""

import inspect
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
pytest.importorskip("verl", reason="verl is not installed: make trainers")

import verl.plugin.platform.platform_manager as platforms
from verl.plugin.platform.platform_cuda import PlatformCUDA


class OnTheCPU(PlatformCUDA):
    """What verl asks of a device; it has none of a CPU. Set before its engines are imported: they ask at once."""

    device_name, device_module = "cpu", torch.cpu

    def is_available(self):
        return False  # whatever of an accelerator is optional, its random numbers for one, verl then leaves out

    def current_device(self):
        return "cpu"

    def communication_backend_name(self):
        return "gloo"

    def empty_cache(self):
        pass

    def synchronize(self, device_index=None):
        pass


platforms.set_platform(OnTheCPU())

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import InstantiationException  # noqa: E402
from ranks import worlds  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.trainer.config import AlgoConfig, CheckpointConfig  # noqa: E402
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    build_optimizer,
)
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import left_right_2_no_padding  # noqa: E402

import fused_clip_adam as fca  # noqa: E402
from fused_clip_adam.integrations import handover  # noqa: E402
from fused_clip_adam.integrations import verl as plugin  # noqa: E402
from fused_clip_adam.integrations.verl import FusedPolicyLossConfig  # noqa: E402

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "examples"))
import verl_policy_update  # noqa: E402

PLUGIN = "fused_clip_adam.integrations.verl"
# Both sides are sums of the same <= 54 terms in another order, which in float64 differ by a few 1e-16 of the largest;
# verl divides by counts + 1e-8 in float32, which is exact. What must be told apart (a sign, a count, a clipped token)
# is above 1e-2.
EXACT = 1e-12
# The statistics are float32 sums of <= 54 terms.
FLOAT32_SUMS = 1e-5


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handover._seen.clear()
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- the losses


def actor_config(loss_mode="fused_ppo", objective=None, info=None, policy_loss=None, **options):
    section = {"loss_mode": loss_mode, "objective": objective or {}, **(policy_loss or {})}
    options.setdefault("optim", FSDPOptimizerConfig())
    options = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4, **options}
    config = FSDPActorConfig(policy_loss=FusedPolicyLossConfig(**section), **options)
    config.global_batch_info.update(info or {})
    return config


def make_batch(dtype=torch.float64, spread=0.7, per_sequence=False):
    """[6, 9]: log-ratios of standard deviation `spread`, so that every clip acts; one row without a token."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(9) < torch.tensor([9, 4, 1, 0, 7, 9])[:, None]
    mask[0, 3:5] = False  # tokens of a tool
    old = noise(6, 9) - 2.5
    advantages = noise(6, 1).expand(6, 9) if per_sequence else noise(6, 9)
    batch = {"old_log_prob": old, "log_prob": old + spread * noise(6, 9), "advantages": advantages.contiguous()}
    return {**{name: value.to(dtype) for name, value in batch.items()}, "response_mask": mask}


def weights_of(batch, per_sequence=False):
    weights = torch.linspace(0.3, 1.9, batch["log_prob"].numel(), dtype=batch["log_prob"].dtype)
    weights = weights.view_as(batch["log_prob"])
    return weights[:, :1].expand_as(weights) if per_sequence else weights


def evaluate(loss_mode, batch, config, weights=None):
    """(loss, gradient with respect to log_prob, metrics) as verl calls a policy loss."""
    log_prob = batch["log_prob"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(loss_mode)(
        **{**batch, "log_prob": log_prob},
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


def assert_same(ours, theirs, tolerance=EXACT):
    """Loss and gradient on the gradient's scale: the loss itself may cancel to near 0."""
    scale = float(theirs[1].abs().max())
    assert scale > 0, "the case tests nothing: verl's own gradient is 0"
    for mine, reference in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * scale)


MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
INFOS = {
    "its own counts": {},
    "global counts": {"dp_size": 2, "batch_num_tokens": 97, "global_batch_size": 12, "loss_scale_factor": None},
    "scaled": {"dp_size": 1, "batch_num_tokens": 40, "global_batch_size": 8, "loss_scale_factor": 32},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("mode", MODES)
def test_ppo_is_verls_vanilla(mode, info, weighted):
    batch = make_batch()
    config = actor_config(
        loss_agg_mode=mode, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.5, info=INFOS[info]
    )
    weights = weights_of(batch) if weighted else None
    theirs = evaluate("vanilla", batch, config, weights)
    ours = evaluate("fused_ppo", batch, config, weights)
    assert_same(ours, theirs)
    for name, value in theirs[2].items():
        assert value != 0, f"{name}: the case tests nothing"
        assert ours[2][name] == pytest.approx(value, rel=FLOAT32_SUMS), name
    assert 0 < ours[2]["actor/suppressed_mass"] < 1 and 0 < ours[2]["actor/ess"] < 1


def test_ppo_is_verls_vanilla_in_float32():
    batch = make_batch(torch.float32)
    config = actor_config(loss_agg_mode="seq-mean-token-mean", clip_ratio_c=1.5)
    # 54 terms in another order: some 1e-7 of the largest each.
    assert_same(evaluate("fused_ppo", batch, config), evaluate("vanilla", batch, config), tolerance=2e-6)


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("mode", MODES)
def test_gspo_is_verls_gspo(mode, info):
    """Where advantages and weights are a sequence's, as GRPO's are: there verl's straight-through form is exact."""
    batch = make_batch(per_sequence=True)
    config = actor_config(loss_agg_mode=mode, clip_ratio_low=0.1, clip_ratio_high=0.15, info=INFOS[info])
    weights = weights_of(batch, per_sequence=True)
    theirs, ours = evaluate("gspo", batch, config, weights), evaluate("fused_gspo", batch, config, weights)
    assert_same(ours, theirs)
    assert 0 < theirs[2]["actor/pg_clipfrac"] < 1
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=FLOAT32_SUMS), name


# verl's name, its options, and whether its metrics mean what ours do. SAPO and GMPO: verl has one aggregation for them.
VERLS_OWN = {
    "fused_sapo": ("sapo", {"tau_pos": 1.5, "tau_neg": 2.0, "loss_agg_mode": "seq-mean-token-mean"}, True),
    "fused_cispo": ("cispo", {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4}, False),
    "fused_gpg": ("gpg", {}, True),
    "fused_dro": ("dro", {"policy_loss": {"dro_beta": 0.3}}, True),
    "fused_dppo_tv": ("dppo_tv", {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "clip_ratio_c": 1.5}, False),
    "fused_dppo_kl": ("dppo_kl", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.5}, False),
    # With a share of 1 every token between the bounds is left out, and nothing is drawn.
    "fused_clip_cov": ("clip_cov", {"policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1}}, False),
    "fused_kl_cov": ("kl_cov", {"policy_loss": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}}, False),
    "fused_gmpo": ("geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3}, False),
}


@pytest.mark.parametrize("loss_mode", VERLS_OWN)
def test_other_losses_are_verls(loss_mode):
    name, options, same_metrics = VERLS_OWN[loss_mode]
    batch = make_batch(per_sequence=loss_mode == "fused_gmpo")
    if loss_mode == "fused_gmpo":  # verl divides by all rows, also those without a token
        batch = {name: value[batch["response_mask"].any(1)] for name, value in batch.items()}
        options = {**options, "loss_agg_mode": "seq-mean-token-mean"}
    config = actor_config(loss_mode, **options)
    theirs, ours = evaluate(name, batch, config), evaluate(loss_mode, batch, config)
    # verl's DPPO adds 1e-8 inside of a logarithm; kept tokens are the same, and nothing else depends on it.
    assert_same(ours, theirs)
    if same_metrics:
        for metric, value in theirs[2].items():
            assert ours[2][metric] == pytest.approx(value, rel=FLOAT32_SUMS), metric


@pytest.mark.parametrize(
    "loss_mode, mode",
    [
        ("fused_sapo", "seq-mean-token-mean"),
        *(
            (loss_mode, mode)
            for loss_mode in ("fused_cispo", "fused_gpg", "fused_dro", "fused_dppo_tv")
            for mode in MODES
        ),
    ],
)
def test_weights_and_counts_of_other_losses_are_verls(loss_mode, mode):
    name, options, _ = VERLS_OWN[loss_mode]
    batch = make_batch()
    config = actor_config(loss_mode, info=INFOS["global counts"], **{**options, "loss_agg_mode": mode})
    weights = weights_of(batch)
    assert_same(evaluate(loss_mode, batch, config, weights), evaluate(name, batch, config, weights))


# Objectives that verl has not: (arguments by configuration, the objective they must make).
OURS_ALONE = {
    "fused_gppo": ({"clip_ratio_high": 0.28}, fca.GPPO(0.2, 0.28, 3.0)),
    "fused_cegppo": ({"objective": {"beta_low": 0.5}}, fca.CEGPPO(0.2, 0.2, 3.0, beta_low=0.5)),
    "fused_dcpo": ({"objective": {"dual_clip": 10.0}}, fca.DCPO(0.2, 0.2, 10.0)),
    "fused_bapo": ({"clip_ratio_c": 2.0, "objective": {"target": 0.4}}, fca.BAPO(target=0.4, dual_clip=2.0)),
    "fused_luspo": ({"loss_agg_mode": "seq-mean-token-sum"}, fca.LUSPO(0.2, 0.2)),
    "fused_vespo": ({"objective": {"k_pos": 1.0, "lambda_neg": 1.5}}, fca.VESPO(1.0, 3.0, 3.0, 1.5)),
}


@pytest.mark.parametrize("loss_mode", OURS_ALONE)
def test_losses_that_verl_has_not(loss_mode):
    options, objective = OURS_ALONE[loss_mode]
    batch = make_batch(spread=0.3)
    config = actor_config(loss_mode, info=INFOS["global counts"], **options)
    weights = weights_of(batch)
    ours = evaluate(loss_mode, batch, config, weights)
    log_prob = batch["log_prob"].clone().requires_grad_()
    by_sequence = config.loss_agg_mode != "token-mean"
    loss, _ = fca.policy_loss(
        log_prob,
        batch["old_log_prob"],
        batch["advantages"],
        mask=batch["response_mask"],
        objective=objective,
        aggregation="sequence-sum" if by_sequence else "token-mean",
        normalizer=12 / 2 if by_sequence else 97 / 2,
        weights=weights,
    )
    loss.backward()
    assert_same(ours, (loss.detach(), log_prob.grad))


def test_every_loss_is_compared_and_registered():
    compared = {"fused_ppo", "fused_gspo", *VERLS_OWN, *OURS_ALONE}
    assert compared == set(plugin.OBJECTIVES) and compared <= set(POLICY_LOSS_REGISTRY)


def test_clip_range_falls_back_to_clip_ratio():
    config = actor_config(clip_ratio=0.3, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=None)
    assert plugin.objective_of("fused_ppo", config) == fca.PPO(0.3, 0.3, dual_clip=None)


@pytest.mark.parametrize("mode", MODES)
def test_batch_without_a_token_is_zero(mode):
    batch = make_batch()
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    for info in ({}, {"batch_num_tokens": 0, "global_batch_size": 0}):
        loss, grad, metrics = evaluate("fused_ppo", batch, actor_config(loss_agg_mode=mode, info=info))
        assert loss == 0 and not grad.any() and metrics["actor/nonfinite"] == 0


def test_nonfinite_tokens_are_left_out_and_counted():
    batch, config = make_batch(), actor_config()
    batch["log_prob"][~batch["response_mask"]] = torch.nan  # padding may hold anything
    _, whole, metrics = evaluate("fused_ppo", batch, config)
    assert whole.isfinite().all() and metrics["actor/nonfinite"] == 0
    batch["log_prob"][0, 0] = torch.nan
    _, grad, metrics = evaluate("fused_ppo", batch, config)
    assert grad.isfinite().all() and grad[0, 0] == 0 and metrics["actor/nonfinite"] == 1


# ---------------------------------------------------------------- what is refused


def call(loss_mode="fused_ppo", config=None, **options):
    config = actor_config(loss_mode, **options) if config is None else config
    return evaluate(loss_mode, make_batch(), config)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"clip_ratio_c": 0.9}, "dual_clip.*0.9"),
        ({"loss_mode": "fused_dro"}, "beta.*None"),
        ({"loss_mode": "fused_luspo"}, "fused_luspo.*'token-mean'.*seq-mean-token-sum"),
        ({"info": {"dp_size": 2}}, "'token-mean' needs batch_num_tokens.*dp_size=2"),
        ({"info": {"dp_size": 2}, "loss_agg_mode": "seq-mean-token-mean"}, "needs global_batch_size"),
        ({"loss_mode": "fused_vespo", "objective": {"k": 1.0}}, r"\['k'\].*VESPO.*k_pos"),
        ({"loss_mode": "vanilla", "objective": {"k": 1.0}}, "'vanilla'.*accepted: fused_ppo"),
        (
            {"optim": FSDPOptimizerConfig(clip_grad=0.5, override_optimizer_config={"grad_clip": 1.0})},
            "clip_grad=0.5.*GlobalNorm.*clip_grad=inf",
        ),
    ],
)
def test_refuses(options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        call(**options)


def test_refuses_an_unknown_aggregation():
    with pytest.raises(ValueError, match="'batch-mean' is unknown; accepted: token-sum, token-mean"):
        plugin.aggregation_of("batch-mean", make_batch()["response_mask"])


@pytest.mark.parametrize("config", [AlgoConfig(), {"clip_ratio": 0.2}])
def test_refuses_another_configuration(config):
    loss = get_policy_loss_fn("fused_ppo")
    with pytest.raises(TypeError, match=f"ActorConfig, got {type(config).__name__}"):
        loss(**make_batch(), config=config)


def test_element_rules_go_with_verls_clip():
    call(optim=FSDPOptimizerConfig(clip_grad=0.5, override_optimizer_config={"grad_clip": fca.SpikeClip()}))


def test_optimizer_refuses_a_rule_that_nobody_calls():
    with pytest.raises(ValueError, match=r"OnRollout.*new_rollout\(\).*Periodic"):
        plugin.FusedClipAdamW([torch.nn.Parameter(torch.zeros(3))], reset=fca.OnRollout())


# ---------------------------------------------------------------- how verl finds the plugin


@pytest.mark.parametrize("how", ["entry point", "VERL_USE_EXTERNAL_MODULES", "imported before verl"])
def test_verl_finds_the_losses(tmp_path, how):
    """In a fresh process, as a worker's is. The entry point is in a distribution of its own, read as any other."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    if how == "VERL_USE_EXTERNAL_MODULES":
        environment |= {"VERL_USE_EXTERNAL_MODULES": PLUGIN, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    else:
        folder = tmp_path / "of_a_test-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: of-a-test\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[verl.plugins]\nfused_clip_adam = {PLUGIN}\n")
    first = PLUGIN if how == "imported before verl" else "verl"
    code = f"import {first}\nfrom verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r\nprint(*r)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert set(plugin.OBJECTIVES) <= set(ran.stdout.split())


def composed(*overrides):
    """verl's ActorConfig of its own configuration files and a command line's overrides."""
    overrides = [f"actor_rollout_ref.actor.{override}" for override in overrides]
    plus = [override.replace("actor_rollout_ref.actor.+", "+actor_rollout_ref.actor.") for override in overrides]
    folder = os.path.join(os.path.dirname(inspect.getfile(platforms)), os.pardir, os.pardir, "trainer", "config")
    with initialize_config_dir(os.path.abspath(folder), version_base=None):
        config = compose("ppo_trainer", ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", *plus])
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_command_line_makes_loss_and_optimizer():
    actor = composed(
        "policy_loss.loss_mode=fused_vespo",
        f"policy_loss._target_={PLUGIN}.FusedPolicyLossConfig",
        "+policy_loss.objective={k_pos: 1.0}",
        f"optim.optimizer_impl={PLUGIN}",
        "optim.optimizer=FusedClipAdamW",
        "optim.betas=[0.8,0.95]",
        "optim.weight_decay=0.25",
        "optim.clip_grad=inf",
        "optim.override_optimizer_config={eps: 1e-6, grad_clip: 1.0, "
        "overshoot: {_target_: fused_clip_adam.MomentumBrake, strength: 1.0}}",
    )
    assert plugin.objective_of("fused_vespo", actor) == fca.VESPO(k_pos=1.0)
    assert evaluate("fused_vespo", make_batch(spread=0.2), actor)[1].any()
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(3))], actor.optim)
    assert type(optimizer) is plugin.FusedClipAdamW
    expected = {"betas": [0.8, 0.95], "weight_decay": 0.25, "eps": 1e-6, "lr": actor.optim.lr}
    expected |= {"grad_clip": fca.GlobalNorm(1.0), "overshoot": fca.MomentumBrake(1.0)}
    group = optimizer.param_groups[0]
    assert {name: list(group[name]) if name == "betas" else group[name] for name in expected} == expected


def test_command_line_names_a_wrong_argument():
    with pytest.raises(InstantiationException, match=r"\['tau'\].*VESPO"):
        composed(
            "policy_loss.loss_mode=fused_vespo",
            f"policy_loss._target_={PLUGIN}.FusedPolicyLossConfig",
            "+policy_loss.objective={tau: 1.0}",
        )


# ---------------------------------------------------------------- in verl's engine


OURS = {"optimizer_impl": PLUGIN, "optimizer": "FusedClipAdamW"}
TORCHS = {"optimizer_impl": "torch.optim", "optimizer": "AdamW"}
LR = 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy on the disk, where verl reads it, and a process group of this process alone."""
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    yield folder
    dist.destroy_process_group()


def save_policy(folder):
    import grpo_task

    torch.manual_seed(0)
    tokenizer = grpo_task.make_tokenizer()
    grpo_task.make_model(tokenizer, hidden_size=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_engine(folder, optim, clip_grad=1.0, **override):
    """verl's engine for FSDP2 with a tiny Qwen2, as its workers build it."""
    model = HFModelConfig(
        path=str(folder),
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )
    float32 = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    settings = FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, mixed_precision=float32)
    optim = FSDPOptimizerConfig(
        lr=LR, total_training_steps=100, clip_grad=clip_grad, override_optimizer_config=override or None, **optim
    )
    engine = FSDPEngineWithLMHead(model, settings, optim, CheckpointConfig())
    engine.initialize()
    return engine


def mini_batch(seed, rows=slice(None), **options):
    """8 sequences as verl's trainer hands them to a worker; `rows`: those of a rank."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = (torch.randint(3, 13, (8, length), generator=generator) for length in (7, 8))
    mask = (torch.arange(8) < torch.randint(1, 9, (8, 1), generator=generator)).long()
    data = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": torch.cat([prompts, responses], 1),
        "attention_mask": torch.cat([torch.ones_like(prompts), mask], 1),
        "response_mask": mask,
        "position_ids": torch.arange(15).expand(8, -1).contiguous(),
        "advantages": torch.randn(8, 1, generator=generator).expand(8, 8) * mask,
        # The policy is near to uniform over 13 tokens: these ratios spread around 1.
        "old_log_probs": (-2.56 + 0.5 * torch.randn(8, 8, generator=generator)) * mask,
    }
    data = {name: value[rows] for name, value in data.items()}
    data = left_right_2_no_padding(TensorDict(data, batch_size=len(data["prompts"])))
    options = {"micro_batch_size_per_gpu": 4, "calculate_entropy": False, **options}
    tensordict_utils.assign_non_tensor(
        data, use_dynamic_bsz=False, global_batch_size=8, temperature=1.0, use_remove_padding=False, **options
    )
    return data


def train(engine, seeds, loss_mode="fused_ppo", rows=slice(None), entropy_coeff=0.0, **options):
    """Mini-batches through the engine, each an optimizer step of two micro-batches; verl's outputs."""
    config = actor_config(loss_mode, optim=engine.optimizer_config, entropy_coeff=entropy_coeff)
    outputs = []
    with engine.train_mode():
        for seed in seeds:
            data = mini_batch(seed, rows, calculate_entropy=entropy_coeff > 0, **options)
            outputs.append(engine.train_batch(data, partial(ppo_loss, config=config)))
    return outputs


def weights(engine):
    return torch.cat([p.detach().full_tensor().flatten() for p in engine.module.parameters()])


def grad_norms(outputs):
    return [output["metrics"]["grad_norm"] for output in outputs]


# Two implementations of four float32 steps: Adam divides by sqrt(v), so that rounding of a small gradient can move a
# weight by a visible part of lr = 1e-2; 4 steps move weights by up to 4e-2. Without the clip, or with another one,
# weights differ by more than 1e-3.
SAME_STEPS = 2e-5


@pytest.mark.parametrize("clip", ["verl's clip", "the optimizer's clip"])
def test_engine_trains_as_with_verls_loss_and_torchs_adamw(folder, clip):
    """The entropy bonus is subtracted from our loss in place, as verl does it."""
    theirs = make_engine(folder, TORCHS, clip_grad=0.05)
    if clip == "verl's clip":
        ours = make_engine(folder, OURS, clip_grad=0.05)
    else:
        ours = make_engine(folder, OURS, clip_grad=float("inf"), grad_clip=0.05)
    expected = train(theirs, range(4), "vanilla", entropy_coeff=0.01)
    outputs = train(ours, range(4), entropy_coeff=0.01)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=SAME_STEPS)
    assert grad_norms(outputs) == pytest.approx(grad_norms(expected), rel=1e-4)
    assert min(grad_norms(outputs)) > 0.1, "the clip must act"
    mine, reference = ([own["metrics"]["actor/pg_clipfrac"].aggregate() for own in x] for x in (outputs, expected))
    assert mine == pytest.approx(reference, rel=1e-4) and min(mine) > 0
    unclipped = make_engine(folder, OURS, clip_grad=float("inf"))
    train(unclipped, range(4), entropy_coeff=0.01)
    assert (weights(unclipped) - weights(theirs)).abs().max() > 100 * SAME_STEPS


def test_statistics_of_all_micro_batches_reach_the_optimizer(folder, monkeypatch):
    engine = make_engine(folder, OURS, overshoot="brake")
    handed, original = [], fca.FusedClipAdamW.observe

    def observe(optimizer, stats):
        handed.append((optimizer, stats.to_dict()))
        original(optimizer, stats)

    monkeypatch.setattr(fca.FusedClipAdamW, "observe", observe)
    train(engine, [0], micro_batch_size_per_gpu=2)
    train(engine, [1], micro_batch_size_per_gpu=8)
    assert [optimizer for optimizer, _ in handed] == [engine.optimizer] * 2, "once a step"
    in_four, in_one = make_engine(folder, OURS), make_engine(folder, OURS)
    handed.clear()
    train(in_four, [0], micro_batch_size_per_gpu=2)
    train(in_one, [0], micro_batch_size_per_gpu=8)
    parts, whole = handed[0][1], handed[1][1]
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4), name  # float32 sums of <= 64 terms, in another order
    assert whole["tokens"] == mini_batch(0)["response_mask"].sum() and whole["suppressed_mass"] > 0


def test_brake_acts_on_statistics(folder):
    braked, plain, unseen = (make_engine(folder, OURS, **({"overshoot": "brake"} if k != 1 else {})) for k in range(3))
    train(braked, range(3))
    train(plain, range(3))
    train(unseen, range(3), "vanilla")  # a loss that tells nothing
    assert (weights(braked) - weights(plain)).abs().max() > 100 * SAME_STEPS
    torch.testing.assert_close(weights(unseen), weights(plain), rtol=0, atol=SAME_STEPS)


def test_skipped_steps_and_other_optimizers_take_nothing(folder, monkeypatch):
    engine = make_engine(folder, OURS)
    critic = fca.FusedClipAdamW([torch.nn.Parameter(torch.ones(2))])
    critic.param_groups[0]["params"][0].grad = torch.ones(2)
    config = actor_config(optim=engine.optimizer_config)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(mini_batch(0), partial(ppo_loss, config=config))
        tokens = float(handover._seen[0].tokens)
        critic.zero_grad(set_to_none=False)
        critic.step()
        assert float(handover._seen[0].tokens) == tokens > 0, "the critic's optimizer must leave them"
        before = weights(engine)
        next(engine.module.parameters()).grad.mul_(float("inf"))
        assert not torch.isfinite(torch.tensor(engine.optimizer_step())), "verl skips this step"
        torch.testing.assert_close(weights(engine), before, rtol=0, atol=0)
    handed = []
    monkeypatch.setattr(fca.FusedClipAdamW, "observe", lambda optimizer, stats: handed.append(stats.to_dict()))
    train(engine, [1])
    assert [each["tokens"] for each in handed] == [mini_batch(1)["response_mask"].sum()], "of the new batch alone"
    assert not handover._seen


def test_evaluation_is_not_observed(folder):
    engine = make_engine(folder, OURS)
    with engine.eval_mode():
        engine.infer_batch(mini_batch(0), partial(ppo_loss, config=actor_config(optim=engine.optimizer_config)))
    assert not handover._seen


def test_resumed_run_is_the_same_bit_for_bit(folder, tmp_path):
    """Through verl's checkpoint manager, with a clip that remembers norms and running bias corrections of the brake."""
    clip = fca.ZClip(warmup=3, z_threshold=0.1, mode="mean", max_norm=None)
    rules = {"grad_clip": clip, "overshoot": fca.MomentumBrake(1.0), "clip_grad": float("inf")}
    whole, first, second, forgetful = (make_engine(folder, OURS, **rules) for _ in range(4))
    train(whole, range(8))
    train(first, range(4))
    first.save_checkpoint(str(tmp_path), global_step=4)
    for engine in (second, forgetful):
        train(engine, [9])  # what it has been through must be gone
        engine.load_checkpoint(str(tmp_path), del_local_after_load=False)
    forgetful.optimizer._memory.clear()
    train(second, range(4, 8))
    train(forgetful, range(4, 8))
    assert torch.equal(weights(second), weights(whole))
    assert not torch.equal(weights(forgetful), weights(whole)), "nothing depends on what the clip remembers"


# ---------------------------------------------------------------- on two ranks


def on_a_rank(folder, loss_mode, **override):
    """Four steps, this rank's half of every batch; (weights, share suppressed on this rank)."""
    rank, count = dist.get_rank(), dist.get_world_size()
    engine = make_engine(folder, OURS, clip_grad=float("inf"), **override)
    rows = slice(8 // count * rank, 8 // count * (rank + 1))
    outputs = train(engine, range(4), loss_mode, rows, micro_batch_size_per_gpu=2)
    return weights(engine), outputs[0]["metrics"]["actor/suppressed_mass"].aggregate()


def test_two_ranks_clip_and_brake_as_one(folder):
    override = {"grad_clip": 0.05, "overshoot": fca.MomentumBrake(1.0)}
    alone, _ = on_a_rank(folder, "fused_ppo", **override)
    (first, suppressed), (second, suppressed_too) = worlds(2).run(on_a_rank, folder, "fused_ppo", **override)
    assert abs(suppressed - suppressed_too) > 0.02, "the ranks see alike: the case tests nothing"
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=0, atol=SAME_STEPS)


def flattened(**options):
    """An optimizer of a slice as FSDP1 shows it: a plain tensor with a mark. FSDP1 itself does not run on a CPU."""
    p = torch.nn.Parameter(torch.ones(4))
    p._fsdp_flattened = True
    return p, plugin.FusedClipAdamW([p], lr=0.1, weight_decay=0.0, **options)


def refusal_of_flattened(**options):
    try:
        flattened(**options)
    except ValueError as error:
        return str(error)
    return None


def braked_slice():
    """Two steps; only rank 0 has seen anything clipped."""
    p, optimizer = flattened(overshoot=fca.MomentumBrake(1.0))
    batch = make_batch(torch.float32)
    for gradient in (1.0, -0.1):
        p.grad = torch.full_like(p, gradient)
        if dist.get_rank() == 0:
            evaluate("fused_ppo", batch, actor_config())
        optimizer.step()
    return p.detach()


def test_slices_of_fsdp1():
    for options in ({"grad_clip": 1.0}, {"overshoot": "align-tensor"}, {"skip_nonfinite": True}):
        assert all("FSDP1" in text and "FSDP2" in text for text in worlds(2).run(refusal_of_flattened, **options))
    accepted = {"grad_clip": fca.SpikeClip(), "overshoot": ("align", fca.UpdateClamp(1.0))}
    assert worlds(2).run(refusal_of_flattened, **accepted) == [None, None]
    first, second = worlds(2).run(braked_slice)
    assert torch.equal(first, second), "statistics are of both ranks"
    assert refusal_of_flattened(grad_clip=1.0) is None, "one rank has all of it"


# ---------------------------------------------------------------- learning


def test_example_learns():
    """verl's registry, advantages and build_optimizer: 40 rollouts of 4 steps; chance is 1/8."""
    (run,) = verl_policy_update.main(["--losses", "fused_ppo", "--rollouts", "40", "--overshoot", "brake"])
    assert run["first"] < 0.3 and run["reward"] > 0.6
