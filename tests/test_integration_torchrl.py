"""FusedClipPPOLoss against torchrl's own ClipPPOLoss: same TensorDict, same losses, same gradients; and training."""

import functools
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
pytest.importorskip("torchrl", reason="torchrl is not installed: make trainers")

from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule, composite_lp_aggregate, set_composite_lp_aggregate
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite, LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.data.tensor_specs import Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SoftUpdate
from torchrl.objectives.value import GAE
from torchrl.trainers import ReplayBufferTrainer, Trainer

import fused_clip_adam as fca
from fused_clip_adam.integrations.torchrl import FusedClipPPOLoss

# Both sides are float32 sums of the same <= 64 terms in a different order, from log-ratios that differ by at most an
# ulp of the log-probability; the gradient then passes through the same backward. 1e-5 of the largest entry is about 80
# ulps; a missing factor, mask or clipped sample is above 1e-2.
RELATIVE_TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- networks and batches


def make_actor(kind):
    if kind == "categorical":
        net, keys, distribution, options = MLP(3, 5, num_cells=[8]), ["logits"], torch.distributions.Categorical, {}
    elif kind == "tanh-normal":  # its entropy is sampled
        net = nn.Sequential(MLP(3, 4, num_cells=[8]), NormalParamExtractor())
        keys, distribution, options = ["loc", "scale"], TanhNormal, {}
    else:
        net = MLP(3, 9, num_cells=[8])
        heads = {name: torch.distributions.Categorical for name in ("left", "right")}
        split = TensorDictModule(
            lambda x: (net(x)[..., :4], net(x)[..., 4:]),
            ["observation"],
            [("params", "left", "logits"), ("params", "right", "logits")],
        )
        split.net = net  # so that its parameters are found
        return ProbabilisticActor(
            split,
            in_keys=["params"],
            out_keys=["left", "right"],
            distribution_class=CompositeDistribution,
            distribution_kwargs={"distribution_map": heads},
            return_log_prob=True,
        )
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], keys),
        in_keys=keys,
        distribution_class=distribution,
        distribution_kwargs=options,
        return_log_prob=True,
    )


def make_networks(kind="categorical"):
    torch.manual_seed(0)
    return make_actor(kind), ValueOperator(MLP(3, 1, num_cells=[8]), in_keys=["observation"])


def make_batch(actor, shape=(64,), spread=0.4, seed=1):
    """Recorded samples, their log-probabilities moved by `spread` so that the clip acts on both sides."""
    torch.manual_seed(seed)
    batch = TensorDict({"observation": torch.randn(*shape, 3)}, shape)
    with torch.no_grad():
        batch = actor(batch)
    for key in actor.log_prob_keys:
        batch[key] = batch[key] + spread * torch.randn(shape)
    batch["advantage"] = torch.randn(*shape, 1) + 0.5
    batch["value_target"] = torch.randn(*shape, 1)
    batch["state_value"] = torch.randn(*shape, 1)
    return batch


def outputs_and_gradients(loss_module, batch):
    torch.manual_seed(2)  # entropies may be sampled
    loss_module.zero_grad()
    losses = loss_module(batch.clone())
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    return losses.detach(), {name: p.grad for name, p in loss_module.named_parameters() if p.requires_grad}


def assert_same(ours, theirs, batch):
    (losses, gradients), (expected, expected_gradients) = (outputs_and_gradients(m, batch) for m in (ours, theirs))
    assert set(losses.keys(True, True)) == set(expected.keys(True, True))
    scale = max(float(g.abs().max()) for g in expected_gradients.values())
    assert scale > 0
    for key in expected.keys(True, True):
        # A loss may cancel to near 0: judged on the scale of the gradient if that is larger.
        atol = RELATIVE_TOLERANCE * max(float(expected[key].abs().max()), scale)
        torch.testing.assert_close(losses[key], expected[key], rtol=0, atol=atol, msg=lambda t, key=key: f"{key}: {t}")
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=RELATIVE_TOLERANCE * scale)
    return losses


def both(actor, critic, **options):
    return FusedClipPPOLoss(actor, critic, **options), ClipPPOLoss(actor, critic, **options)


# ---------------------------------------------------------------- loss and gradient


@pytest.mark.parametrize("kind", ["categorical", "tanh-normal"])
@pytest.mark.parametrize("shape", [(64,), (8, 8), (4, 4, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_epsilon": 0.1, "normalize_advantage": True},
        {"clip_epsilon": (0.2, 0.28), "reduction": "sum", "loss_critic_type": "l2"},
        {"clip_epsilon": 0.3, "clip_value": True, "entropy_coeff": 0.1, "critic_coeff": 0.5},
        {"entropy_bonus": False, "max_importance_ratio": 1.1},
    ],
    ids=["defaults", "normalized", "asymmetric-sum", "clipped-value", "capped"],
)
def test_loss_and_gradient_match_torchrl(kind, shape, options):
    actor, critic = make_networks(kind)
    ours, theirs = both(actor, critic, **options)
    losses = assert_same(ours, theirs, make_batch(actor, shape))
    assert 0.1 < float(losses["clip_fraction"]) < 0.9
    stats = ours.stats.to_dict()
    assert stats["tokens"] == 64 and stats["clipped_low"] > 0 and stats["clipped_high"] > 0
    if "max_importance_ratio" not in options:
        assert stats["ratio_max"] == pytest.approx(float(losses["max_ratio"]), rel=1e-5)
        assert stats["ratio_sum"] / 64 == pytest.approx(float(losses["mean_ratio"]), rel=1e-5)
        assert stats["kl_k1"] / 64 == pytest.approx(float(losses["kl_approx"]), rel=1e-4)


def test_decoupled_policy_matches_torchrl():
    """delay_actor: the clip looks at the averaged policy, the loss is weighted by that to the one that sampled."""
    actor, critic = make_networks()
    batch = make_batch(actor)
    ours, theirs = both(actor, critic, delay_actor=True, max_importance_ratio=1.5)
    for module in (ours, theirs):
        SoftUpdate(module, eps=0.9)
        torch.manual_seed(3)
        for p in module.target_actor_network_params.values(True, True):
            p.data += 0.4 * torch.randn_like(p)
    losses = assert_same(ours, theirs, batch)
    assert float(losses["clip_fraction"]) > 0.1 and float(losses["max_ratio"]) == pytest.approx(1.5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("key", [("collector", "mask"), "shifted_valid", "valid"])
def test_masks_match_torchrl(key, reduction):
    actor, critic = make_networks()
    batch = make_batch(actor, (8, 8))
    mask = torch.arange(64).view(8, 8, 1) % 3 > 0
    batch[key] = mask if key != "valid" else mask.squeeze(-1)
    ours, theirs = both(actor, critic, reduction=reduction)
    for module in (ours, theirs):
        module.loss_mask_key = "valid" if key == "valid" else "auto"
    assert_same(ours, theirs, batch)
    assert float(ours.stats.tokens) == 42
    batch[actor.log_prob_keys[0]][~mask.squeeze(-1)] = torch.nan  # padding may hold anything
    losses, gradients = outputs_and_gradients(ours, batch)
    assert losses["loss_objective"].isfinite() and all(g.isfinite().all() for g in gradients.values())
    assert float(ours.stats.nonfinite) == 0


def test_advantage_that_the_loss_makes_itself():
    actor, critic = make_networks()
    batch = make_batch(actor, (8, 8)).exclude("advantage", "value_target", "state_value")
    batch["next", "observation"] = torch.randn(8, 8, 3)
    batch["next", "reward"] = torch.randn(8, 8, 1)
    batch["next", "done"] = batch["next", "terminated"] = torch.zeros(8, 8, 1, dtype=torch.bool)
    assert_same(*both(actor, critic, normalize_advantage=True), batch)


@pytest.mark.parametrize("aggregated", [True, False])
def test_composite_actions_match_torchrl(aggregated):
    before = composite_lp_aggregate()
    set_composite_lp_aggregate(aggregated).set()
    try:
        actor, critic = make_networks("composite")
        ours, theirs = both(actor, critic, clip_epsilon=0.3)
        for module in (ours, theirs):
            module.set_keys(action=["left", "right"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = assert_same(ours, theirs, make_batch(actor, spread=0.3))
        assert float(ours.stats.tokens) == 64 and float(losses["clip_fraction"]) > 0.1
    finally:
        set_composite_lp_aggregate(before).set()


def test_shared_parameters_and_plain_modules():
    actor, critic = make_networks()
    batch = make_batch(actor)
    assert_same(*both(actor, critic, functional=False), batch)


def test_takes_tensors_as_torchrl_does():
    actor, critic = make_networks()
    batch = make_batch(actor)
    batch["next", "reward"] = torch.randn(64, 1)
    batch["next", "done"] = batch["next", "terminated"] = torch.ones(64, 1, dtype=torch.bool)
    batch["next", "observation"] = torch.zeros(64, 3)
    ours, theirs = both(actor, critic)
    keys = ["observation", "action", "action_log_prob", "next_reward", "next_done", "next_terminated"]
    given = {key: batch[tuple(key.split("_", 1)) if key.startswith("next_") else key] for key in keys}
    given["next_observation"] = batch["next", "observation"]
    results = [module(**given) for module in (ours, theirs)]
    assert len(results[0]) == len(results[1]) == len(ours.out_keys)
    for mine, reference in zip(*results):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_bounds_may_be_scheduled():
    actor, critic = make_networks()
    batch = make_batch(actor)
    ours, theirs = both(actor, critic, clip_epsilon=0.2)
    fractions = []
    for epsilon in (0.2, 0.1, 0.4):
        for module in (ours, theirs):
            module.clip_epsilon = epsilon
        assert ours.objective == fca.PPO(*(2 * [float(torch.tensor(epsilon))]))
        fractions.append(float(assert_same(ours, theirs, batch)["clip_fraction"]))
    assert fractions[1] > fractions[0] > fractions[2]
    assert ours.objective is ours.objective, "read anew only where a bound has changed"
    ours.load_state_dict(ours.state_dict() | {"clip_epsilon": torch.tensor(0.3)})
    assert ours.objective.clip_high == pytest.approx(0.3)


# ---------------------------------------------------------------- objectives


def by_hand(actor, batch, objective, shape, **options):
    logp = actor.get_dist(batch).log_prob(batch["action"]).view(shape)
    advantages = batch["advantage"].view(shape)
    if "entropy" in objective.needs:
        options["entropy"] = actor.get_dist(batch).entropy().detach().view(shape)
    return fca.policy_loss(logp, batch["action_log_prob"].view(shape), advantages, objective=objective, **options)


@pytest.mark.parametrize(
    "objective, shape",
    [
        (fca.SAPO(), (64,)),
        (fca.CISPO(), (64,)),
        (fca.DPPOTV(0.02, 0.02), (64,)),  # reads probabilities, not only ratios
        (fca.AEPO(), (8, 8)),  # reads entropies
        (fca.GSPO(0.05, 0.05), (8, 8)),
        (fca.GMPO(), (8, 8)),
        (fca.LUSPO(0.05, 0.05), (8, 8)),
        (fca.PPO(0.2, 0.28, dual_clip=1.5), (4, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, object) and not isinstance(value, tuple) else "",
)
def test_other_objectives(objective, shape):
    actor, critic = make_networks()
    batch = make_batch(actor, shape)
    ours = FusedClipPPOLoss(actor, critic, objective=objective)
    losses, gradients = outputs_and_gradients(ours, batch)
    rows = shape if len(shape) == 2 else (64,)
    expected, stats = by_hand(actor, batch, objective, rows)
    actor.zero_grad()
    entropy_loss = -0.01 * actor.get_dist(batch).entropy().mean()
    (expected + entropy_loss).backward()
    torch.testing.assert_close(losses["loss_objective"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.stats.buffer, stats.buffer, rtol=1e-4, atol=1e-4)
    clipped = float((stats.clipped_low + stats.clipped_high) / stats.tokens)
    assert float(losses["clip_fraction"]) == pytest.approx(clipped)
    mine = [g for name, g in gradients.items() if name.startswith("actor")]
    for gradient, p in zip(mine, actor.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


def test_objective_may_be_replaced():
    actor, critic = make_networks()
    batch = make_batch(actor)
    ours = FusedClipPPOLoss(actor, critic, objective=fca.PPO(0.1, 0.1))
    first = ours(batch)["clip_fraction"]
    ours.objective = fca.PPO(0.4, 0.4)
    assert ours(batch)["clip_fraction"] < first
    with pytest.raises(AttributeError, match=r"clip_epsilon=0.1 is not read beside objective=PPO"):
        ours.clip_epsilon = 0.1
    with pytest.raises(TypeError, match=r"Objective such as PPO\(\), got 0.2"):
        ours.objective = 0.2
    ours.objective = None
    ours.clip_epsilon = 0.3
    assert ours.objective.clip_low == pytest.approx(0.3)


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"reduction": "none"}, ValueError, "reduction='none' is not handled"),
        ({"objective": "ppo"}, TypeError, "objective must be None or an Objective"),
        ({"objective": fca.GRPOGuard(2e-6, 2e-6)}, ValueError, "needs mu.*trainer does not have"),
        ({"objective": fca.PPOEWMA()}, ValueError, "ewma_logp"),
        ({"objective": fca.SAPO(), "clip_epsilon": 0.2}, ValueError, "clip_epsilon=0.2 is not read beside"),
        ({"clip_epsilon": 1.5}, ValueError, "clip_low must be in"),
    ],
)
def test_refuses_what_it_does_not_do(options, error, named):
    actor, critic = make_networks()
    with pytest.raises(error, match=named):
        FusedClipPPOLoss(actor, critic, **options)


def test_clip_epsilon_of_the_value_goes_with_an_objective():
    actor, critic = make_networks()
    batch = make_batch(actor)
    ours = FusedClipPPOLoss(actor, critic, objective=fca.PPO(), clip_epsilon=0.3, clip_value=True)
    theirs = ClipPPOLoss(actor, critic, clip_epsilon=0.3, clip_value=True)
    torch.testing.assert_close(ours(batch)["loss_critic"], theirs(batch)["loss_critic"])


@pytest.mark.parametrize("objective", [fca.GSPO(), fca.GMPO()])
def test_sequences_need_rows(objective):
    actor, critic = make_networks()
    ours = FusedClipPPOLoss(actor, critic, objective=objective)
    with pytest.raises(ValueError, match=r"whole sequences; accepted: a batch \[B, T\].*got \[64\]"):
        ours(make_batch(actor))
    assert ours.stats is None


# ---------------------------------------------------------------- training


class Signal(EnvBase):
    """In each of 32 places a signal is shown, one of four; naming it is worth 1. An episode is eight of them."""

    def __init__(self):
        super().__init__(batch_size=[32])
        self.observation_spec = Composite(
            observation=Unbounded((32, 3)), steps=Unbounded((32, 1), dtype=torch.int64), shape=[32]
        )
        self.action_spec = Categorical(5, shape=(32,))
        self.reward_spec = Unbounded((32, 1))
        self.generator = torch.Generator().manual_seed(0)

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)

    def _show(self):
        self.signal = torch.randint(4, (32,), generator=self.generator)
        return torch.eye(4)[self.signal][:, :3]

    def _reset(self, tensordict=None):
        steps = torch.zeros(32, 1, dtype=torch.int64)
        return TensorDict({"observation": self._show(), "steps": steps}, [32])

    def _step(self, tensordict):
        reward = (tensordict["action"] == self.signal).float().unsqueeze(-1)
        steps = tensordict["steps"] + 1
        done = steps >= 8
        return TensorDict(
            {"observation": self._show(), "steps": steps, "reward": reward, "done": done, "terminated": done}, [32]
        )


# Clips what is above its moving mean, more or less every second step.
ZCLIP = fca.ZClip(alpha=0.5, warmup=2, z_threshold=0.1, max_norm=None, mode="mean")


def make_run(overshoot=None, grad_clip=1.0):
    actor, critic = make_networks()
    loss_module = FusedClipPPOLoss(actor, critic, normalize_advantage=True)
    optimizer = fca.FusedClipAdamW(
        loss_module.parameters(), lr=2e-2, weight_decay=0.0, grad_clip=grad_clip, overshoot=overshoot
    )
    return actor, critic, loss_module, optimizer


def test_torchrls_trainer_trains():
    """The whole of torchrl: environment, collector, replay buffer, GAE and Trainer; statistics by a hook."""
    torch.manual_seed(0)
    actor, critic, loss_module, optimizer = make_run()
    seen = []
    observe = optimizer.observe
    optimizer.observe = lambda stats: seen.append(stats.to_dict()) or observe(stats)
    loss_module.register_forward_hook(lambda module, inputs, losses: optimizer.observe(module.stats))
    collector = Collector(
        Signal(), actor, frames_per_batch=512, total_frames=512 * 12, auto_register_policy_transforms=False
    )
    trainer = Trainer(
        collector=collector,
        total_frames=512 * 12,
        frame_skip=1,
        optim_steps_per_batch=4,
        loss_module=loss_module,
        optimizer=optimizer,
        num_epochs=2,
        progress_bar=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(512), sampler=SamplerWithoutReplacement(), batch_size=128)
    ReplayBufferTrainer(buffer, flatten_tensordicts=True, memmap=False).register(trainer)
    gae = GAE(gamma=0.0, lmbda=0.0, value_network=critic)
    rewards = []

    def before_optimisation(batch):
        rewards.append(float(batch["next", "reward"].mean()))
        with torch.no_grad():
            return gae(batch)

    trainer.register_op("batch_process", before_optimisation)
    trainer.train()
    assert len(rewards) == 12 and len(seen) == 12 * 2 * 4
    # Five actions, of which four are of use: 0.2 at random.
    assert rewards[0] < 0.35 and rewards[-1] > 0.8
    assert max(row["clipped_low"] + row["clipped_high"] for row in seen) > 5, "the clip must act"


def train_on_recordings(loss_module, optimizer, batches, feed=True):
    for batch in batches:
        losses = loss_module(batch)
        optimizer.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
        if feed:
            optimizer.observe(loss_module.stats)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in loss_module.parameters()])


def test_statistics_reach_a_rule_that_reads_them():
    def train(overshoot, feed=True):
        actor, _, loss_module, optimizer = make_run(overshoot)
        batches = [make_batch(actor, seed=i) for i in range(4)]
        return train_on_recordings(loss_module, optimizer, batches, feed)

    braked, plain, unfed = train("brake"), train(None), train("brake", feed=False)
    torch.testing.assert_close(unfed, plain, rtol=0, atol=1e-4)
    assert float((braked - plain).abs().max()) > 1e-3


def test_same_weights_as_torchrl_with_adamw():
    recorder, _ = make_networks()
    batches = [make_batch(recorder, seed=i) for i in range(6)]

    def train(cls, optimizer):
        actor, critic = make_networks()
        module = cls(actor, critic, clip_epsilon=0.1)
        opt = optimizer(module.parameters())
        for batch in batches:
            losses = module(batch)
            opt.zero_grad()
            sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
            if isinstance(opt, fca.FusedClipAdamW):
                opt.observe(module.stats)
            else:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            opt.step()
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    theirs = train(ClipPPOLoss, functools.partial(torch.optim.AdamW, lr=1e-3))
    ours = train(FusedClipPPOLoss, functools.partial(fca.FusedClipAdamW, lr=1e-3, grad_clip=0.1))
    # Six steps of lr=1e-3 move a weight by up to 6e-3. Adam divides by sqrt(v), so that rounding of near-zero gradients
    # moves a weight by a visible part of lr; 2e-5 is 0.3 % of the way.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_resumes_bit_for_bit(tmp_path):
    actor, _, loss_module, optimizer = make_run("brake", ZCLIP)
    batches = [make_batch(actor, (16,), seed=i) for i in range(10)]
    train_on_recordings(loss_module, optimizer, batches[:4])
    loss_module.clip_epsilon = 0.15
    torch.save({"loss": loss_module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    whole = train_on_recordings(loss_module, optimizer, batches[4:])

    def resume(forget):
        _, _, loss_module, optimizer = make_run("brake", ZCLIP)
        saved = torch.load(tmp_path / "run.pt", weights_only=True)
        loss_module.load_state_dict(saved["loss"])
        if forget:
            del saved["optimizer"]["param_groups"][0]["fused_clip_adam"]  # what the rules remember
        optimizer.load_state_dict(saved["optimizer"])
        return train_on_recordings(loss_module, optimizer, batches[4:])

    assert torch.equal(resume(forget=False), whole)
    assert not torch.equal(resume(forget=True), whole), "the comparison above can fail"


# ---------------------------------------------------------------- the example

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def test_cartpole_learns(capsys):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: make trainers")
    import torchrl_cartpole

    options = torchrl_cartpole.parse_options(["--quick"])
    run = torchrl_cartpole.train(0, options)
    # 20 is a random policy's return, 467 what this run ends at; 500 is the most there is.
    assert run["start"] < 40 and run["end"] > 150
    assert 0.005 < run["clip_fraction"] < 0.3
    torchrl_cartpole.print_table([run], options)
    assert f"{run['end']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--objective", "sapo"], ["--objective", "cispo", "--overshoot", "brake"]])
def test_cartpole_takes_other_objectives(arguments):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: make trainers")
    import torchrl_cartpole

    run = torchrl_cartpole.train(0, torchrl_cartpole.parse_options([*arguments, "--steps", "8192"]))
    assert run["end"] > run["start"] + 20
