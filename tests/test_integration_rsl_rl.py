"""FusedPPO in rsl-rl's own runner, against rsl-rl's PPO: same batch, same gradient, same run."""

import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("rsl_rl", reason="rsl-rl-lib is not installed: make trainers")

from rsl_rl.algorithms import PPO
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict
from trainer_checks import Counted, Deaf, same

import fused_clip_adam as fca
from fused_clip_adam.integrations.rsl_rl import FusedPPO

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import rsl_rl_reach

ARMS, HORIZON = 16, 8
NAME = "fused_clip_adam.integrations.rsl_rl:FusedPPO"
OURS = {"class_name": NAME, "optimizer": "fused_clip_adam:FusedClipAdamW"}
STEPS_PER_ROLLOUT = 3 * 2  # of the optimizer
INFINITY = float("inf")

# Both sides are float32 sums of the same <= 256 terms in a different order; the gradient then passes through the same
# backward. 1e-5 of the largest entry is ~80 float32 ulps: observed differences are below 1e-6, any missing factor
# (a sign, 1/B, a clipped sample, an entropy term) is above 1e-3.
RELATIVE_TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


class Env(rsl_rl_reach.ReachEnv):
    step_dt = 1.0  # RND asks for it

    @property
    def unwrapped(self):
        return self


def make_config(actor=None, critic=None, **algorithm):
    config = rsl_rl_reach.configuration(rsl_rl_reach.parse_options(["--arms", str(ARMS)]))
    config["algorithm"] = {
        "learning_rate": 3e-3,
        "num_learning_epochs": 3,
        "num_mini_batches": 2,
        "clip_param": 0.1,
        "schedule": "adaptive",
        "desired_kl": 0.02,
        "max_grad_norm": 1.0,
        **algorithm,
    }
    config["num_steps_per_env"] = HORIZON
    for name, changes in (("actor", actor), ("critic", critic)):
        config[name] = {**config[name], "hidden_dims": [16, 16], **(changes or {})}
    if "rnd_cfg" in algorithm:
        config["obs_groups"]["rnd_state"] = ["policy"]
    return config


def make_runner(env=None, seed=0, log_dir=None, **options):
    torch.manual_seed(seed)
    return OnPolicyRunner(Env(ARMS, seed) if env is None else env, make_config(**options), log_dir=log_dir)


def trained(rollouts, **options):
    runner = make_runner(**options)
    runner.learn(rollouts)
    return runner


def weights(runner):
    params = [*runner.alg.actor.parameters(), *runner.alg.critic.parameters()]
    return torch.cat([p.detach().flatten() for p in params])


# ---------------------------------------------------------------- configuration and optimizer


@pytest.mark.parametrize(
    "optimizer, kind",
    [
        (None, fca.FusedClipAdam),
        ("fused_clip_adam:FusedClipAdamW", fca.FusedClipAdamW),
        ("fused_clip_adam.FusedFAdam", fca.FusedFAdam),
        (fca.FusedClipAdamW, fca.FusedClipAdamW),
        ("adamw", torch.optim.AdamW),
    ],
)
def test_optimizer_by_name(optimizer, kind):
    given = {} if optimizer is None else {"optimizer": optimizer}
    runner = make_runner(class_name=NAME, optimizer_kwargs={"eps": 1e-6}, **given)
    alg = runner.alg
    assert type(alg) is FusedPPO and type(alg.optimizer) is kind
    (group,) = alg.optimizer.param_groups
    assert group["eps"] == 1e-6 and group["lr"] == 3e-3
    assert [id(p) for p in group["params"]] == [id(p) for p in (*alg.actor.parameters(), *alg.critic.parameters())]


def test_rules_of_the_configuration_reach_the_optimizer():
    rules = {"grad_clip": fca.ZClip(), "overshoot": "align", "reset": fca.OnRollout()}
    runner = make_runner(**OURS, max_grad_norm=INFINITY, optimizer_kwargs=rules)
    (group,) = runner.alg.optimizer.param_groups
    assert group["grad_clip"] == fca.ZClip() and group["reset"] == fca.OnRollout()
    assert group["overshoot"] == fca.AlignedMomentum()


def test_optimizer_trains_like_rsl_rls():
    """The default is the same equation: FusedClipAdam in the place of torch.optim.Adam, under rsl-rl's own clip."""
    theirs = trained(6, class_name="PPO", optimizer="adam")
    ours = trained(6, class_name=NAME)
    assert (weights(ours) - weights(make_runner(class_name=NAME))).abs().max() > 1e-2
    assert ours.alg.learning_rate == theirs.alg.learning_rate != 3e-3, "the adaptive learning rate must act"
    # 36 steps of a learning rate up to 1e-2: 1e-5 is 0.1 % of the movement asserted above, observed differences are
    # below 1e-6.
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-5)


def test_infinite_max_grad_norm_turns_rsl_rls_clip_off():
    def norms(**options):
        runner, seen = make_runner(**OURS, **options), []
        params = [*runner.alg.actor.parameters(), *runner.alg.critic.parameters()]
        hook = lambda *_: seen.append(float(torch.cat([p.grad.flatten() for p in params]).norm()))  # noqa: E731
        runner.alg.optimizer.register_step_pre_hook(hook)
        runner.learn(1)
        return seen

    clipped = norms(max_grad_norm=0.1)
    whole = norms(max_grad_norm=INFINITY, optimizer_kwargs={"grad_clip": 0.1})
    assert max(clipped) < 0.1001 * math.sqrt(2), "actor and critic each"
    assert min(whole) > 0.1 * math.sqrt(2)


def test_a_layer_that_actor_and_critic_share_is_stepped_once():
    runner = make_runner(**OURS)
    actor, critic, storage = runner.alg.actor, runner.alg.critic, runner.alg.storage
    critic.mlp[0] = actor.mlp[0]
    with pytest.warns(UserWarning, match="duplicate parameters"):  # torch's, of the optimizer that is replaced
        alg = FusedPPO(actor, critic, storage, optimizer_kwargs={"overshoot": "brake"})
    (group,) = alg.optimizer.param_groups
    assert len(group["params"]) == len(set(map(id, group["params"])))
    runner.alg = alg
    runner.learn(1)
    assert {float(own["step"]) for own in alg.optimizer.state.values()} == {5 * 4}  # PPO's defaults


# ---------------------------------------------------------------- loss and gradient


def mirrored(env, obs, actions):
    """The batch and its copy with all angles negative, as rsl-rl's symmetry wants it."""
    if obs is not None:
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
        both = torch.cat([obs["policy"], obs["policy"] * signs])
        obs = TensorDict({"policy": both}, batch_size=[len(both)])
    return obs, None if actions is None else torch.cat([actions, -actions])


RNN = {"class_name": "RNNModel", "rnn_type": "gru", "rnn_hidden_dim": 8}
CASES = {
    "plain": {},
    "entropy, plain value loss": dict(entropy_coef=0.05, use_clipped_value_loss=False),
    "normalised by minibatch": dict(normalize_advantage_per_mini_batch=True),
    "recurrent": dict(actor=RNN, critic=RNN),
    "symmetry": dict(
        symmetry_cfg=dict(
            data_augmentation_func=mirrored, use_data_augmentation=True, use_mirror_loss=True, mirror_loss_coeff=0.1
        )
    ),
    "rnd": dict(rnd_cfg=dict(weight=0.1, num_outputs=2, predictor_hidden_dims=[8], target_hidden_dims=[8])),
    "bfloat16": dict(use_mixed_precision=True),
    "clip above 1": dict(clip_param=1.5),
    "compiled": dict(compiled=True),
}


def rolled_out(**options):
    """A runner with a rollout that its policy has since moved away from, so that the clip acts on both sides."""
    options = dict(schedule="fixed", learning_rate=0.0, num_learning_epochs=1, num_mini_batches=1, **options)
    runner = trained(1, **OURS, max_grad_norm=INFINITY, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (*runner.alg.actor.parameters(), *runner.alg.critic.parameters()):
            p += 0.03 * torch.randn_like(p)
    return runner


def updated_once(runner, update):
    """(gradient, losses) of the one step that an update makes with these options. The rollout stays as it is."""
    gradients = []
    params = [*runner.alg.actor.parameters(), *runner.alg.critic.parameters()]
    hook = runner.alg.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in params]))
    )
    torch.manual_seed(2)  # of the shuffle
    losses = update(runner.alg)
    hook.remove()
    (gradient,) = gradients
    return gradient, losses


@pytest.mark.parametrize("case", CASES)
def test_gradient_and_losses_match_rsl_rl(case):
    runner = rolled_out(**{key: value for key, value in CASES[case].items() if key != "compiled"})
    if "compiled" in CASES[case]:
        runner.alg.actor = torch.compile(runner.alg.actor, backend="eager")
    expected, theirs = updated_once(runner, PPO.update)
    actual, ours = updated_once(runner, FusedPPO.update)
    # Under bfloat16 a float32 ulp of the incoming gradient may round to the next bfloat16: 2^-8 of an entry.
    tolerance = 2**-8 if case == "bfloat16" else RELATIVE_TOLERANCE
    assert expected.abs().max() > 0, "the case tests nothing: rsl-rl's own gradient is 0"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    for name, value in theirs.items():
        if name != "rnd":  # has learned in between
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert set(ours) - set(theirs) == {"suppressed_mass", "ess", "nonfinite", "grad_norm"}
    if case == "clip above 1":
        assert ours["suppressed_mass"] == 0
    else:
        assert 0 < ours["suppressed_mass"] < 1, "nothing was clipped: the case tests nothing"
    assert 0 < ours["ess"] < 1 and ours["nonfinite"] == 0
    assert ours["grad_norm"] == pytest.approx(float(actual.norm()), rel=1e-5)


def test_metrics_by_hand():
    runner = rolled_out()
    _, losses = updated_once(runner, FusedPPO.update)
    storage = runner.alg.storage
    with torch.no_grad():
        runner.alg.actor(storage.observations.flatten(0, 1), stochastic_output=True)
        logp = runner.alg.actor.get_output_log_prob(storage.actions.flatten(0, 1))
    ratio = (logp - storage.actions_log_prob.flatten()).exp()
    advantages = storage.advantages.flatten()
    clipped = ((ratio > 1.1) & (advantages > 0)) | ((ratio < 0.9) & (advantages < 0))
    mass = ratio * advantages.abs()
    assert losses["suppressed_mass"] == pytest.approx(float(mass[clipped].sum() / mass.sum()), rel=1e-4)
    assert losses["ess"] == pytest.approx(float(ratio.sum() ** 2 / (ratio**2).sum() / (ARMS * HORIZON)), rel=1e-4)


OBJECTIVES = {
    "CISPO": (fca.CISPO(high=1.05), False),
    "CISPO by dict": ({"class_name": "fused_clip_adam:CISPO", "high": 1.05}, False),
    "GSPO": (fca.GSPO(0.1, 0.1), True),  # one token a sequence: rsl-rl's own
    "AEPO": (fca.AEPO(), False),  # needs entropies
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_objectives(name):
    objective, is_ppo = OBJECTIVES[name]
    runner = rolled_out(objective=objective, entropy_coef=0.01)
    expected, theirs = updated_once(runner, PPO.update)
    actual, ours = updated_once(runner, FusedPPO.update)
    same = (actual - expected).abs().max() <= RELATIVE_TOLERANCE * expected.abs().max()
    assert same == is_ppo
    assert ours["value"] == pytest.approx(theirs["value"], rel=1e-6)
    if name == "CISPO by dict":
        assert runner.alg.objective == fca.CISPO(high=1.05)
    if not is_ppo:
        assert ours["surrogate"] != pytest.approx(theirs["surrogate"], rel=1e-2)


# ---------------------------------------------------------------- whole runs


def test_statistics_are_handed_over():
    runner = trained(3, **{**OURS, "optimizer": Counted})
    told = runner.alg.optimizer.told
    assert told.count("rollout") == 3 and told.count("step") == 3 * STEPS_PER_ROLLOUT
    assert told[0] == "rollout" and told[1]["tokens"] == ARMS * HORIZON / 2 and told[2] == "step"
    assert sum(isinstance(each, dict) for each in told) == 3 * STEPS_PER_ROLLOUT
    assert not runner.alg.optimizer._optimizer_step_pre_hooks and not runner.alg.optimizer._optimizer_step_post_hooks
    assert "get_output_log_prob" not in vars(runner.alg.actor)
    assert not any("generator" in name for name in vars(runner.alg.storage))


def test_statistics_change_a_step_under_the_brake():
    ended = {}
    for optimizer in (fca.FusedClipAdamW, Deaf):
        for overshoot in (None, "brake"):
            options = {**OURS, "optimizer": optimizer, "optimizer_kwargs": {"overshoot": overshoot}}
            ended[optimizer, overshoot] = weights(trained(2, **options, clip_param=0.02))
    plain = ended[fca.FusedClipAdamW, None]
    assert torch.equal(ended[Deaf, None], plain) and torch.equal(ended[Deaf, "brake"], plain)
    assert (ended[fca.FusedClipAdamW, "brake"] - plain).abs().max() > 1e-4


def test_new_rollout_resets():
    runner = trained(3, **OURS, optimizer_kwargs={"reset": fca.OnRollout()})
    assert {float(own["step"]) for own in runner.alg.optimizer.state.values()} == {STEPS_PER_ROLLOUT}


def test_logged_by_the_runner(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = trained(2, **OURS, log_dir=str(tmp_path))
    runner.logger.writer.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("suppressed_mass", "ess", "nonfinite", "grad_norm", "surrogate", "value"):
        assert len(events.Scalars(f"Loss/{name}")) == 2, name
    assert (tmp_path / "model_1.pt").exists()


def two_ranks(rank, folder):
    """A process of two: other arms, the same weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    runner = OnPolicyRunner(
        Env(ARMS, seed=rank),
        make_config(**{**OURS, "optimizer": Counted}, optimizer_kwargs={"overshoot": "brake"}, clip_param=0.02),
    )
    # What the runner sets for several GPUs; it insists on NCCL.
    alg = runner.alg
    alg.is_multi_gpu, alg.gpu_world_size, alg.gpu_global_rank = True, 2, rank
    torch.manual_seed(rank)
    runner.learn(2)
    torch.save((weights(runner), alg.optimizer.told), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_same_steps(tmp_path):
    """The brake acts on the statistics of both: with its own alone each rank would go its own way."""
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    (weights_0, told_0), (weights_1, told_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(weights_0, weights_1)
    assert told_0 == told_1 and told_0[1]["tokens"] == ARMS * HORIZON
    assert max(each["suppressed_mass"] for each in told_0 if isinstance(each, dict)) > 0


# ---------------------------------------------------------------- checkpoints


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Bit for bit. rsl-rl saves neither environments nor generators: those are carried over here."""
    options = dict(
        **OURS,
        max_grad_norm=INFINITY,
        optimizer_kwargs={"grad_clip": fca.ZClip(), "overshoot": "brake"},
        clip_param=0.02,
        actor={"obs_normalization": True},
    )
    whole = trained(5, **options)
    first = trained(2, **options)
    path = str(tmp_path / "model.pt")
    first.save(path)
    generator = torch.get_rng_state()
    resumed = make_runner(env=first.env, seed=7, **options)
    assert not torch.equal(weights(resumed), weights(first))
    resumed.load(path)
    assert same(resumed.alg.optimizer.state_dict(), first.alg.optimizer.state_dict())
    assert "ZClip" in repr(resumed.alg.optimizer.state_dict()), "with what the rule remembers"
    assert resumed.alg.learning_rate == first.alg.learning_rate != 3e-3
    torch.set_rng_state(generator)
    resumed.learn(3)
    assert torch.equal(weights(resumed), weights(whole))
    assert same(resumed.alg.save(), whole.alg.save())


def test_checkpoint_of_rsl_rls_own_ppo_goes_on(tmp_path):
    theirs = trained(2, class_name="PPO", optimizer="adam")
    path = str(tmp_path / "model.pt")
    theirs.save(path)
    generator = torch.get_rng_state()
    ours = make_runner(env=theirs.env, seed=7, class_name=NAME)
    ours.load(path)
    ours.alg.storage = theirs.alg.storage
    for runner in (ours, theirs):
        torch.set_rng_state(generator)
        runner.alg.update()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-5)  # as above
    assert {float(own["step"]) for own in ours.alg.optimizer.state.values()} == {3 * STEPS_PER_ROLLOUT}


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    "options, error, named",
    [
        (dict(objective="cispo"), TypeError, r"objective must be None or an Objective.*'cispo'"),
        (dict(objective=fca.PPOEWMA()), ValueError, "PPOEWMA needs ewma_logp.*accepted: .*entropy"),
        (dict(max_grad_norm=0), ValueError, r"max_grad_norm=0 .*float\('inf'\)"),
        (dict(max_grad_norm=None), TypeError, r"max_grad_norm must be a number, got None"),
        (dict(optimizer_kwargs={"grad_clip": 0.5}), ValueError, r"max_grad_norm=1\.0 .*grad_clip=GlobalNorm"),
        (dict(optimizer="adamax"), ValueError, "adamax"),
        (dict(optimizer="fused_clip_adam:FusedClipAdamX"), AttributeError, "FusedClipAdamX"),
        (dict(optimizer_kwargs={"overshoot": "brakes"}), ValueError, "brakes"),
        (dict(optimizer_kwargs={"clip": 1.0}), TypeError, "clip"),
    ],
)
def test_refusals(options, error, named):
    with pytest.raises(error, match=named):
        make_runner(**{**OURS, **options})


# ---------------------------------------------------------------- learning


def test_reward_rises():
    runner = rsl_rl_reach.make_runner(rsl_rl_reach.parse_options(["--arms", "64"]))
    rewards = []
    for _ in range(40):
        runner.learn(1)
        rewards.append(float(runner.alg.storage.rewards.mean()))
    assert statistics.fmean(rewards[-10:]) > statistics.fmean(rewards[:5]) + 0.2


def test_example_learns(capsys):
    assert rsl_rl_reach.main(["--quick"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed if line.strip() and line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(0, 31, 3))
    assert float(rows[0][1]) > 0.7 and float(rows[-1][1]) < 0.5
    assert all(0 < float(row[5]) < 1 and 0 < float(row[6]) < 1 and float(row[7]) > 0 for row in rows[1:])


def test_example_options(capsys):
    assert rsl_rl_reach.main(["--plain", "--iterations", "2", "--arms", "8"]) == 0
    printed = capsys.readouterr().out
    assert "torch.optim.Adam" in printed and " ess" not in printed.splitlines()[3]
    rules = []
    for name in rsl_rl_reach.OVERSHOOT_RULES:
        runner = rsl_rl_reach.make_runner(rsl_rl_reach.parse_options(["--overshoot", name, "--grad-clip", "0.3"]))
        (group,) = runner.alg.optimizer.param_groups
        rules.append(repr(group.get("overshoot")))
        assert group["grad_clip"] == fca.GlobalNorm(0.3)
    assert len(set(rules)) == len(rules)
    for wrong in (["--iterations", "0"], ["--arms", "3"], ["--plain", "--overshoot", "align"]):
        with pytest.raises(SystemExit):
            rsl_rl_reach.parse_options(wrong)
