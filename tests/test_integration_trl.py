"""FusedGRPOTrainer against TRL's own GRPOTrainer: same batch, same loss, same gradient, same trained weights."""

import os
import sys

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

import fused_clip_adam as fca  # noqa: E402
from fused_clip_adam.integrations.trl import FusedGRPOTrainer, OvershootCallback, overshoot  # noqa: E402
from fused_clip_adam.monitor import OvershootMonitor  # noqa: E402

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "examples"))
import grpo_task  # noqa: E402

# Both sides are float32 sums of the same <= 200 terms in a different order; the gradient then passes through the same
# backward. 1e-5 of the largest entry is ~80 float32 ulps: observed differences are below 1e-6, any missing factor
# (a sign, 1/B, a clipped token) is above 1e-2.
RELATIVE_TOLERANCE = 1e-5


def make_trainer(tmp_path, cls=FusedGRPOTrainer, optimizer=None, objective=None, **options):
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
        reward_funcs=grpo_task.reward,
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
