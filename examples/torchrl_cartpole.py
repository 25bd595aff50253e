"""PPO on CartPole with torchrl: its environments, collector and GAE, with FusedClipPPOLoss and FusedClipAdamW.

Against a torchrl program with ClipPPOLoss and Adam three lines differ: the loss, the optimizer, and
`optimizer.observe(loss_module.stats)`. `clip_grad_norm_` is gone: the optimizer clips as it steps.

Three runs of 60,000 steps take a minute on one CPU core; all three reach 500 of 500.
"""

import argparse
import os
import statistics
import sys
import time
import warnings

os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")

import gymnasium
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper, RewardSum, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives.value import GAE
from tqdm import tqdm

import fused_clip_adam as fca
from fused_clip_adam.integrations.torchrl import FusedClipPPOLoss

OBJECTIVES = {"ppo": None, "sapo": fca.SAPO(), "cispo": fca.CISPO()}  # None: PPO with the bounds of clip_epsilon
ENVS, HORIZON, EPOCHS, MINIBATCH = 16, 128, 6, 256
GAMMA, LAMBDA, LR, GRAD_CLIP = 0.99, 0.95, 1e-3, 0.5


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60_000, help="environment steps of a run (default: 60000)")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (default: 3)")
    parser.add_argument("--objective", choices=OBJECTIVES, default="ppo", help="policy objective (default: ppo)")
    parser.add_argument("--overshoot", choices=["none", "align", "cautious", "brake"], default="none")
    parser.add_argument("--quick", action="store_true", help="one run of 16384 steps: a smoke run of a few seconds")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < ENVS * HORIZON:
        parser.error(f"--seeds must be at least 1 and --steps at least {ENVS * HORIZON}")
    if options.quick:
        options.seeds, options.steps = 1, 16_384
    return options


def make_env(seed):
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("CartPole-v1", ENVS, vectorization_mode="sync", vector_kwargs=mode)
    with warnings.catch_warnings():  # torchrl finds the info dict's entries by a rollout, and says so
        warnings.simplefilter("ignore")
        env = TransformedEnv(GymWrapper(envs, categorical_action_encoding=True), RewardSum())
    env.set_seed(seed)
    return env


def make_networks():
    def mlp(outputs):
        return MLP(in_features=4, out_features=outputs, num_cells=[64, 64], activation_class=nn.Tanh)

    actor = ProbabilisticActor(
        TensorDictModule(mlp(2), ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, ValueOperator(mlp(1), in_keys=["observation"])


def train(seed, options):
    """One run; returns what the table shows of it."""
    torch.manual_seed(seed)
    actor, critic = make_networks()
    advantage = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=critic)
    objective = OBJECTIVES[options.objective]
    loss_module = FusedClipPPOLoss(actor, critic, objective=objective, entropy_coeff=0.01, normalize_advantage=True)
    optimizer = fca.FusedClipAdamW(
        loss_module.parameters(),
        lr=LR,
        weight_decay=0.0,
        grad_clip=GRAD_CLIP,
        overshoot=None if options.overshoot == "none" else options.overshoot,
    )
    rollouts = options.steps // (ENVS * HORIZON)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=rollouts)
    collector = Collector(
        make_env(seed),
        actor,
        frames_per_batch=ENVS * HORIZON,
        total_frames=rollouts * ENVS * HORIZON,
        auto_register_policy_transforms=False,  # the policy keeps nothing between steps
    )
    returns, clipped, norms = [], [], []
    started = time.perf_counter()
    with tqdm(total=rollouts * ENVS * HORIZON, desc=f"seed {seed}", ncols=80, unit=" steps") as progress:
        for batch in collector:
            with torch.no_grad():
                advantage(batch)
            data = batch.reshape(-1)
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(data)).split(MINIBATCH):
                    losses = loss_module(data[rows])
                    optimizer.zero_grad()
                    (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
                    optimizer.observe(loss_module.stats)
                    optimizer.step()
                    clipped.append(losses["clip_fraction"])
                    norms.append(optimizer.grad_norm)
            schedule.step()
            ended = batch["next", "episode_reward"][batch["next", "done"]].tolist()
            returns.append(ended)
            if ended:
                progress.set_postfix_str(f"return {statistics.fmean(ended):.0f}", refresh=False)
            progress.update(len(data))
    collector.shutdown()
    return {
        "seed": seed,
        "start": statistics.fmean(returns[0]),
        "end": evaluate(actor, seed=1000 + seed),
        "clip_fraction": float(torch.stack(clipped).mean()),
        "grad_norm": float(torch.stack(norms).mean()),
        "seconds": time.perf_counter() - started,
    }


@torch.no_grad()
def evaluate(actor, seed):
    """Mean return of one new episode in each environment, actions sampled as in training."""
    played = make_env(seed).rollout(500, actor, break_when_any_done=False)["next"]
    before_end = played["done"].long().cumsum(1) - played["done"].long() == 0
    return float((played["reward"] * before_end).sum(1).mean())


def print_table(runs, options):
    print(f"\n  objective {options.objective}, overshoot rule {options.overshoot}: mean return of episodes")
    print(f"  {'seed':>6}{'at the start':>14}{'trained':>9}{'clipped':>10}{'grad norm':>11}{'seconds':>9}")
    for run in runs:
        print(
            f"  {run['seed']:>6}{run['start']:>14.1f}{run['end']:>9.1f}{run['clip_fraction']:>10.1%}"
            f"{run['grad_norm']:>11.3f}{run['seconds']:>9.1f}"
        )


def main(arguments=None):
    options = parse_options(arguments)
    torch.set_num_threads(1)
    print_table([train(seed, options) for seed in range(options.seeds)], options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
