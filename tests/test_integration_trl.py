"""FusedGRPOTrainer against TRL's own GRPOTrainer: same batch, same loss, same gradient, same trained weights."""

import os
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402
from trainer_checks import records_of_two  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

import fused_clip_adam as fca  # noqa: E402
from fused_clip_adam.integrations.trl import (  # noqa: E402
    FusedGRPOTrainer,
    OvershootCallback,
    clip_aware_optimizer,
    overshoot,
)
from fused_clip_adam.monitor import OvershootMonitor  # noqa: E402

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "examples"))
import grpo_task  # noqa: E402

# Both sides are float32 sums of the same <= 200 terms in a different order; the gradient then passes through the same
# backward. 1e-5 of the largest entry is ~80 float32 ulps: observed differences are below 1e-6, any missing factor
# (a sign, 1/B, a clipped token) is above 1e-2.
RELATIVE_TOLERANCE = 1e-5


def make_trainer(tmp_path, cls=FusedGRPOTrainer, optimizer=None, objective=None, reward=grpo_task.reward, **options):
    config = dict(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        num_generations=4,
        max_completion_length=grpo_task.COMPLETION_LENGTH,
        max_steps=8,  # two rollouts of four optimizer steps each
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        seed=3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        output_dir=str(tmp_path),
    )
    config.update(options)
    tokenizer = grpo_task.make_tokenizer()
    torch.manual_seed(0)
    model = grpo_task.make_model(tokenizer, hidden_size=16, layers=1)
    return cls(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**config),
        train_dataset=Dataset.from_list(grpo_task.make_rows(64, seed=0)),
        processing_class=tokenizer,
        optimizers=(optimizer(model.parameters()) if optimizer else None, None),
        **({"objective": objective} if objective else {}),
    )


def make_inputs(trainer, spread=0.5):
    """A batch as TRL's generation leaves it, with log-ratios of standard deviation `spread` so that all clips act."""
    generator = torch.Generator().manual_seed(1)
    batch, prompt, completion = 8, grpo_task.DIGITS + 1, grpo_task.COMPLETION_LENGTH
    lengths = torch.tensor([completion, 7, 1, completion, 4, 9, 2, 5])
    inputs = {
        "prompt_ids": torch.randint(3, 13, (batch, prompt), generator=generator),
        "prompt_mask": torch.ones(batch, prompt, dtype=torch.long),
        "completion_ids": torch.randint(3, 13, (batch, completion), generator=generator),
        "completion_mask": (torch.arange(completion) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.9, 0.0, 0.8, -0.2, 0.3]),
        "num_items_in_batch": torch.tensor(170.0),
    }
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion,
        )
    inputs["old_per_token_logps"] = logp + spread * torch.randn(logp.shape, generator=generator)
    inputs["ref_per_token_logps"] = logp + spread * torch.randn(logp.shape, generator=generator)
    return inputs


def loss_and_gradients(trainer, compute_loss, inputs):
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as train() sets it
    trainer.model.train()
    trainer.model.zero_grad()
    loss = compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def assert_same_as_trl(trainer, inputs):
    expected = loss_and_gradients(trainer, lambda *a: GRPOTrainer._compute_loss(trainer, *a), inputs)
    theirs = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    actual = loss_and_gradients(trainer, trainer._compute_loss, inputs)
    ours = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for mine, reference in zip(actual, expected, strict=True):
        assert reference.abs().max() > 0, "the case tests nothing: TRL's own value is 0"
        # The loss itself may cancel to near 0, so it is judged on the scale of the gradient if that is larger.
        scale = max(reference.abs().max(), expected[1].abs().max())
        torch.testing.assert_close(mine, reference, rtol=0, atol=float(RELATIVE_TOLERANCE * scale))
    return ours, theirs


# TRL weighs its KL by the ratio unless `use_bias_correction_kl=False`.
@pytest.mark.parametrize("beta, bias_correction", [(0.0, True), (0.5, True), (0.5, False)])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_loss_and_gradient_match_trl(tmp_path, loss_type, delta, beta, bias_correction):
    trainer = make_trainer(
        tmp_path, loss_type=loss_type, delta=delta, epsilon_high=0.28, use_bias_correction_kl=bias_correction
    )
    trainer.beta = beta  # set here: TRL would go looking for a reference model on a hub
    ours, theirs = assert_same_as_trl(trainer, make_inputs(trainer))
    shared = ["entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    for name in shared + (["kl"] if beta else []):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert ours["clip_ratio/low_mean"] > 0 and ours["clip_ratio/high_mean"] > 0 and ours["policy/overshoot"] > 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_masks_match_trl(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type)
    inputs = make_inputs(trainer)
    inputs["completion_mask"][1] = 0  # as mask_truncated_completions leaves it
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][0, 2:5] = 0
    assert_same_as_trl(trainer, inputs)


@pytest.mark.parametrize("ratio_shape", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_detached_factors_match_trl(tmp_path, loss_type, ratio_shape):
    trainer = make_trainer(tmp_path, loss_type=loss_type, top_entropy_quantile=0.7, off_policy_mask_threshold=0.05)
    trainer.beta = 0.04
    trainer.use_vllm = True  # only its correction factor is used
    inputs = make_inputs(trainer)
    columns = inputs["completion_ids"].size(1) if ratio_shape == "token" else 1
    inputs["importance_sampling_ratio"] = torch.linspace(0.3, 1.8, 8 * columns).view(8, columns)
    assert_same_as_trl(trainer, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_sequence_level_matches_trl(tmp_path, beta):
    trainer = make_trainer(
        tmp_path, loss_type="grpo", importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.06
    )
    trainer.beta = beta
    assert isinstance(trainer.objective, fca.GSPO)
    assert_same_as_trl(trainer, make_inputs(trainer))


OTHER_LOSSES = {
    "cispo": (dict(epsilon_high=1.3), fca.CISPO(high=1.3)),
    "sapo": (dict(sapo_temperature_pos=1.5, sapo_temperature_neg=2.0), fca.SAPO(1.5, 2.0)),
    "vespo": (dict(vespo_k_pos=1.0, vespo_lambda_neg=1.5), fca.VESPO(1.0, 3.0, 3.0, 1.5)),
    "luspo": (dict(importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.06), fca.GSPO(0.05, 0.06)),
}


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("loss_type", OTHER_LOSSES)
def test_other_losses_match_trl(tmp_path, loss_type, beta):
    options, objective = OTHER_LOSSES[loss_type]
    trainer = make_trainer(tmp_path, loss_type=loss_type, **options)
    trainer.beta = beta
    assert trainer.objective == objective
    inputs = make_inputs(trainer, spread=0.5 if loss_type != "vespo" else 0.2)
    assert_same_as_trl(trainer, inputs)
    if loss_type == "vespo":  # TRL's correction for the rollout engine enters the weight
        trainer.use_vllm = True
        inputs["importance_sampling_ratio"] = torch.linspace(0.8, 1.2, inputs["completion_ids"].numel()).view(8, -1)
        inputs["importance_sampling_ratio"][inputs["completion_mask"] == 0] = 1.0
        assert_same_as_trl(trainer, inputs)


def test_objective_that_needs_entropy_trains(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="dapo", objective=fca.AEPO(), optimizer=fca.FusedClipAdamW, max_steps=4)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_on_policy_batch_without_old_logp(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="dapo")
    inputs = make_inputs(trainer)
    del inputs["old_per_token_logps"]
    ours, _ = assert_same_as_trl(trainer, inputs)
    assert ours["policy/overshoot"] == 0 and ours["policy/ess"] == pytest.approx(1)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(loss_type="sapo", importance_sampling_level="sequence"), "sequence.*sapo"),
        (dict(loss_type="vespo", off_policy_mask_threshold=0.1), "off_policy_mask_threshold with VESPO"),
        (dict(entropy_coef=0.01), "entropy_coef=0.01"),
        (dict(use_adaptive_entropy=True), "use_adaptive_entropy"),
        (dict(importance_sampling_level="sequence", loss_type="grpo", delta=2.0), "delta.*2.0"),
    ],
)
def test_refuses_what_it_does_not_implement(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, **options)


def test_overshoot_by_hand():
    log_ratio = torch.tensor([[0.5, 0.1, -0.5, 9.0], [0.5, -0.1, -0.5, 9.0], [0.5, 0.1, -0.5, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    advantages = torch.tensor([2.0, -2.0, 0.0])
    high, low = torch.tensor([1.2, 0.8]).log()
    expected = torch.zeros(3, 4)
    expected[0, 0], expected[1, 2] = 0.5 - high, low + 0.5
    old_logp = torch.full((3, 4), -1.0)
    actual = overshoot(old_logp + log_ratio, old_logp, advantages, mask, fca.PPO(clip_low=0.2, clip_high=0.2))
    torch.testing.assert_close(actual, expected)


def test_overshoot_of_gmpo_takes_its_bounds_in_log_space():
    log_ratio = torch.tensor([[0.9, -0.9, 0.3]])
    old_logp, mask = torch.full((1, 3), -1.0), torch.ones(1, 3)
    objective = fca.GMPO(clip_low=0.5, clip_high=0.4)
    up = overshoot(old_logp + log_ratio, old_logp, torch.ones(1), mask, objective)
    down = overshoot(old_logp + log_ratio, old_logp, -torch.ones(1), mask, objective)
    torch.testing.assert_close(up, torch.tensor([[0.5, 0.0, 0.0]]))
    torch.testing.assert_close(down, torch.tensor([[0.0, 0.4, 0.0]]))


def test_trained_weights_match_trl_with_adamw(tmp_path):
    """Two rollouts end to end: our loss, clip and AdamW in one against TRL's loss, clip_grad_norm_ and AdamW."""
    torch_adamw = dict(lr=1e-3, weight_decay=0.0)
    theirs = make_trainer(
        tmp_path, GRPOTrainer, lambda ps: torch.optim.AdamW(ps, **torch_adamw), max_grad_norm=0.05, loss_type="dapo"
    )
    theirs.train()
    observed = []

    class Counted(fca.FusedClipAdamW):
        def observe(self, stats):
            observed.append(stats.to_dict()["tokens"])
            super().observe(stats)

    ours = make_trainer(
        tmp_path, optimizer=lambda ps: Counted(ps, **torch_adamw, grad_clip=0.05), max_grad_norm=0, loss_type="dapo"
    )
    ours.train()
    assert len(observed) == 8 * 2, "one call per micro-batch, through accelerate's wrapper"
    for mine, reference in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        # Adam divides by sqrt(v): rounding of near-zero gradients can move a weight by a visible part of lr. 8 steps
        # of lr=1e-3 move a weight by up to 8e-3; 2e-5 is 0.25 % of that.
        torch.testing.assert_close(mine, reference, rtol=0, atol=2e-5)
    for mine, reference in zip(ours.state.log_history[:8], theirs.state.log_history[:8], strict=True):
        assert mine.get("reward") == reference.get("reward"), "same seed, same rollouts"
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
        assert mine["grad_norm"] > 0.05, "the clip must act"


@pytest.mark.parametrize("objective", [None, fca.SAPO()])
def test_overshoot_callback(tmp_path, objective):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(
        tmp_path,
        optimizer=lambda ps: fca.FusedClipAdamW(ps, lr=0.03),  # so hot that the third step is past the clip
        loss_type="dapo",
        objective=objective,
        max_steps=3,
        gradient_accumulation_steps=1,  # TRL's metrics are means over micro-batches, the monitor's over tokens
    )
    callback = OvershootCallback(block=16)
    trainer.add_callback(callback)
    trainer.train()
    rows = callback.monitor.rows()
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[0]["kept_blocks"] is None
    assert 0 < rows[2]["kept_mass"] < 1 and all(row["tokens"] > 0 for row in rows)
    assert "lm_head.weight" in rows[2]["tensors"], "the model's own names"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log, row in zip(logs, rows, strict=True):
        assert log["overshoot/kl_k3"] == pytest.approx(row["kl_k3"]) and log["overshoot/tokens"] == row["tokens"]
        if objective is None:  # the metric is a mean over all tokens, the excess over those beyond
            beyond = (row["excess_mean"] or 0.0) * row["beyond_fraction"]
            assert row["excess_source"] == "log_probs_and_advantages"
            assert beyond == pytest.approx(log["policy/overshoot"], rel=1e-5, abs=1e-9)
            assert row["beyond_fraction"] == pytest.approx(row["clip_fraction_low"] + row["clip_fraction_high"])
        else:
            assert row["excess_source"] is None and "overshoot/excess_max" not in log
    if objective is None:
        assert rows[2]["excess_max"] > 0, "nothing was beyond the clip: the case tests nothing"
    assert (tmp_path / "overshoot.txt").read_text() == callback.monitor.table() + "\n"
    assert (tmp_path / "overshoot.png").stat().st_size > 20_000
    trainer.optimizer.step()
    assert len(callback.monitor.rows()) == 3, "closed"


def test_overshoot_callback_takes_a_monitor_and_torch_adamw(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(tmp_path, optimizer=torch.optim.AdamW, loss_type="dapo", max_steps=2)
    with OvershootMonitor(trainer.optimizer, fca.PPO(), every=4) as monitor:
        trainer.add_callback(OvershootCallback(monitor))
        trainer.train()
        assert "no step recorded" in (tmp_path / "overshoot.txt").read_text()
        assert not (tmp_path / "overshoot.png").exists()
        for _ in range(2):
            trainer.optimizer.step()
        assert monitor.latest()["step"] == 4 and monitor.latest()["tokens"] > 0


def test_overshoot_callback_refusals(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(TypeError, match="OvershootMonitor, got str"):
        OvershootCallback("monitor")
    p = torch.nn.Parameter(torch.ones(1))
    with OvershootMonitor(fca.FusedClipAdamW([p])) as monitor, pytest.raises(TypeError, match=r"'every'.*no effect"):
        OvershootCallback(monitor, every=2)
    trainer = make_trainer(tmp_path, GRPOTrainer, loss_type="dapo", max_steps=1)
    trainer.add_callback(OvershootCallback())
    with pytest.raises(RuntimeError, match="FusedGRPOTrainer"):
        trainer.train()


# ---------------------------------------------------------------- the optimizer alone, in TRL's own trainer


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_plain_grpo_trainer_takes_the_optimizer(tmp_path, way):
    """TRL's own loss, and the optimizer's clip in the place of `clip_grad_norm_`; 8 steps as against AdamW's."""
    adamw = dict(lr=1e-3, weight_decay=0.0)
    options = dict(loss_type="dapo", weight_decay=0.0)
    theirs = make_trainer(tmp_path, GRPOTrainer, max_grad_norm=0.05, **options)
    theirs.train()
    ours = make_trainer(
        tmp_path,
        GRPOTrainer,
        (lambda ps: fca.FusedClipAdamW(ps, **adamw, grad_clip=0.05)) if way == "optimizers" else None,
        max_grad_norm=0,
        **options,
    )
    if way == "optimizer_cls_and_kwargs":  # GRPOTrainer's constructor does not take it, the Trainer below reads it
        ours.optimizer_cls_and_kwargs = (fca.FusedClipAdamW, {"lr": 1e-3, "grad_clip": 0.05})
    ours.train()
    optimizer = clip_aware_optimizer(ours.optimizer)
    assert isinstance(optimizer, fca.FusedClipAdamW)
    assert len(optimizer.param_groups) == (1 if way == "optimizers" else 2), "the decay groups"
    for mine, reference in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=2e-5)  # as above
    norms = [row["grad_norm"] for row in ours.state.log_history if "loss" in row]
    assert len(norms) == 8 and min(norms) > 0.05, "the clip must act"


def test_two_clips_are_refused(tmp_path):
    trainer = make_trainer(
        tmp_path, optimizer=lambda ps: fca.FusedClipAdamW(ps, grad_clip=0.5), loss_type="dapo", max_grad_norm=1.0
    )
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 .*GlobalNorm"):
        trainer.train()


# ---------------------------------------------------------------- training


def share_of_sevens(completions, **_):
    return [completion.split().count("7") / grpo_task.COMPLETION_LENGTH for completion in completions]


def test_reward_rises(tmp_path):
    trainer = make_trainer(
        tmp_path,
        optimizer=lambda ps: fca.FusedClipAdamW(ps, lr=1e-2, weight_decay=0.0, grad_clip=1.0, overshoot="align"),
        loss_type="dapo",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        num_generations=8,
        max_grad_norm=0,
        max_steps=40,
        reward=share_of_sevens,
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    rewards = [row["reward"] for row in logs if "reward" in row]
    # Ten rollouts of 32 completions. A policy that does not learn stays at 1 / 13; seeds 0 to 2 end at 0.4 to 0.7.
    assert len(rewards) == 10 and statistics.fmean(rewards[:3]) < 0.15
    assert statistics.fmean(rewards[-3:]) > 0.3
    assert max(row["clip_ratio/region_mean"] for row in logs) > 0.01, "the clip must act"


# ---------------------------------------------------------------- statistics and checkpoints

# Clips what is above its moving mean, more or less every second step.
ZCLIP = fca.ZClip(alpha=0.5, warmup=3, z_threshold=0.1, max_norm=None, mode="mean")


def remembering(params):
    return fca.FusedClipAdamW(params, lr=1e-2, grad_clip=ZCLIP, overshoot=("brake", "cautious"))


def test_statistics_reach_a_rule_that_reads_them(tmp_path, monkeypatch):
    def train(overshoot):
        trainer = make_trainer(
            tmp_path, optimizer=lambda ps: fca.FusedClipAdamW(ps, lr=1e-2, overshoot=overshoot), loss_type="dapo"
        )
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    braked, plain = train("brake"), train(None)
    monkeypatch.setattr(fca.FusedClipAdamW, "observe", lambda *_: None)
    unfed = train("brake")
    # A brake that has seen nothing is AdamW with its moments weighed by the same numbers in another way.
    torch.testing.assert_close(unfed, plain, rtol=0, atol=1e-4)
    assert float((braked - plain).abs().max()) > 1e-2


def resumable(folder):
    return make_trainer(
        folder,
        optimizer=remembering,
        loss_type="dapo",
        max_grad_norm=0,
        max_steps=12,
        save_strategy="steps",
        save_steps=4,  # a rollout: TRL keeps none in a checkpoint
    )


def test_resumes_bit_for_bit(tmp_path):
    whole = resumable(tmp_path)
    whole.train()
    resumed = resumable(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    one, other = (clip_aware_optimizer(trainer.optimizer).state_dict() for trainer in (resumed, whole))
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    one, other = (state["param_groups"][0]["fused_clip_adam"] for state in (one, other))
    torch.testing.assert_close(one, other, rtol=0, atol=0)

    # The same checkpoint without the rule's memory goes elsewhere: the comparison above can fail.
    forgetful = tmp_path / "forgetful"
    shutil.copytree(tmp_path / "checkpoint-4", forgetful)
    state = torch.load(forgetful / "optimizer.pt", weights_only=True)
    del state["param_groups"][0]["fused_clip_adam"]
    torch.save(state, forgetful / "optimizer.pt")
    resumed = resumable(tmp_path)
    resumed.train(resume_from_checkpoint=str(forgetful))
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert not all(torch.equal(p, q) for p, q in pairs)


# ---------------------------------------------------------------- two processes


def rank_of_two(folder):
    """What each of the two processes of the test below runs: one training as it is, one that sums nothing up."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    all_reduce = fca.ClipStats.all_reduce
    record = {}
    for name in ("summed", "alone"):
        own, observed = [], []

        def reduced(stats, group=None, own=own, name=name):
            own.append(stats.to_dict())
            return stats if name == "alone" else all_reduce(stats, group)

        class Watched(fca.FusedClipAdamW):
            def observe(self, stats, observed=observed):
                observed.append(stats.to_dict())
                super().observe(stats)

        fca.ClipStats.all_reduce = reduced
        trainer = make_trainer(
            folder / f"{name}-{rank}",
            optimizer=lambda ps, cls=Watched: cls(ps, lr=1e-2, grad_clip=ZCLIP, overshoot="brake"),
            loss_type="dapo",
            max_grad_norm=0,
            ddp_backend="gloo",
        )
        trainer.train()
        optimizer = clip_aware_optimizer(trainer.optimizer)
        record[name] = {
            "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
            "state": optimizer.state_dict()["state"],
            "memory": optimizer.state_dict()["param_groups"][0]["fused_clip_adam"],
            "own": own,
            "observed": observed,
            "world_size": trainer.accelerator.num_processes,
            "norms": [row["grad_norm"] for row in trainer.state.log_history if "loss" in row],
        }
    torch.save(record, folder / f"{rank}.pt")


def test_two_processes_stay_identical(tmp_path):
    first, second = records_of_two(__file__, tmp_path)
    one, other = first["summed"], second["summed"]
    assert one["world_size"] == 2 and len(one["observed"]) == 8 * 2, "once per micro-batch"
    for name in ("weights", "state", "memory", "observed", "norms"):
        torch.testing.assert_close(
            one[name], other[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    for mine, theirs, total in zip(one["own"], other["own"], one["observed"], strict=True):
        for name in ("tokens", "suppressed_mass", "total_mass", "clipped_low", "clipped_high"):
            assert total[name] == pytest.approx(mine[name] + theirs[name], rel=1e-6), name
    assert any(mine["suppressed_mass"] != theirs["suppressed_mass"] for mine, theirs in zip(one["own"], other["own"]))
    # Where each rank acts on its own statistics the weights part: the comparison above can fail.
    assert not torch.equal(first["alone"]["weights"], second["alone"]["weights"])


if __name__ == "__main__":
    rank_of_two(Path(sys.argv[1]))
