"""PPO on CartPole with Stable-Baselines3: its own trainer, with the policy loss and the optimizer of this package.

`FusedPPO` is SB3's PPO but for the policy's gradient, which comes from `policy_loss`, so that the optimizer sees what
the ratio clip suppressed. Eight environments; 20 epochs over each rollout, which is what makes the clip act; learning
rate and clip range fall linearly to 0. The optimizer clips the gradients, so SB3's own clip is off.

With --plain: SB3's PPO, its clip and torch's AdamW, for comparison. CartPole counts as solved at 475 of 500. About half
a minute on one CPU core.
"""

import argparse
import statistics
import sys
import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule

import fused_clip_adam as fca
from fused_clip_adam.integrations.stable_baselines3 import FusedPPO

OVERSHOOT_RULES = ["none", "align", "align-element", "cautious", "brake"]
ENVS, HORIZON, EPOCHS, MINIBATCH = 8, 32, 20, 256
GAMMA, LAMBDA = 0.98, 0.8
SOLVED = 475.0
LINES = 10  # of progress


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="of all environments together (default: 100,000)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate at the start (default: 1e-3)")
    parser.add_argument("--clip", type=float, default=0.2, help="clip range at the start (default: 0.2)")
    parser.add_argument("--grad-clip", type=float, default=0.5, help="largest norm of a gradient (default: 0.5)")
    parser.add_argument("--overshoot", choices=OVERSHOOT_RULES, default="none", help="momentum rule; none is AdamW")
    parser.add_argument("--plain", action="store_true", help="SB3's PPO and torch's AdamW instead")
    parser.add_argument("--seed", type=int, default=0, help="of weights, environments and sampling (default: 0)")
    parser.add_argument("--episodes", type=int, default=20, help="played at the end (default: 20)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 20,480 steps and 5 episodes at most")
    options = parser.parse_args(arguments)
    if options.steps < ENVS * HORIZON or options.episodes < 1:
        parser.error(f"--steps must be at least {ENVS * HORIZON} and --episodes at least 1")
    if options.plain and options.overshoot != "none":
        parser.error(f"--overshoot {options.overshoot} does not go with --plain: torch's AdamW has no such rule")
    if options.quick:
        options.steps, options.episodes = min(options.steps, 20_480), min(options.episodes, 5)
    return options


def make_model(options):
    optimizer = dict(eps=1e-5, weight_decay=0.0)
    if not options.plain:
        overshoot = None if options.overshoot == "none" else options.overshoot
        optimizer.update(grad_clip=options.grad_clip, overshoot=overshoot)
    return (PPO if options.plain else FusedPPO)(
        "MlpPolicy",
        make_vec_env("CartPole-v1", ENVS, seed=options.seed),
        n_steps=HORIZON,
        batch_size=MINIBATCH,
        n_epochs=EPOCHS,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        ent_coef=0.0,
        learning_rate=LinearSchedule(options.lr, 0.0, 1.0),
        clip_range=LinearSchedule(options.clip, 0.0, 1.0),
        max_grad_norm=options.grad_clip if options.plain else float("inf"),
        policy_kwargs=dict(
            optimizer_class=torch.optim.AdamW if options.plain else fca.FusedClipAdamW, optimizer_kwargs=optimizer
        ),
        seed=options.seed,
        device="cpu",
    )


class Progress(BaseCallback):
    """Keeps what each rollout's training logged, and prints a line now and then."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.rows = steps, []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        logged = self.logger.name_to_value
        if "train/loss" not in logged:  # before the first training, and after the logger was emptied
            return
        reward = statistics.fmean(episode["r"] for episode in self.model.ep_info_buffer)
        self.rows.append({"steps": self.num_timesteps, "return": reward, **logged})
        if self.num_timesteps * LINES // self.steps > (self.num_timesteps - ENVS * HORIZON) * LINES // self.steps:
            print(f"  {self.num_timesteps:>7,} steps  return {reward:6.1f}", flush=True)


def print_table(options, rows, returns, seconds):
    def mean(name):
        return statistics.fmean(row[name] for row in rows)

    mean_return = statistics.fmean(returns)
    print(f"\n  {'PPO and torch.optim.AdamW' if options.plain else 'FusedPPO and FusedClipAdamW'}")
    lines = [
        (f"return of {len(returns)} new episodes", f"{mean_return:.1f}"),
        ("worst of them", f"{min(returns):.0f}"),
        (f"solved ({SOLVED:g} or more)", "yes" if mean_return >= SOLVED else "no"),
        ("samples beyond the clip", f"{mean('train/clip_fraction'):.1%}"),
    ]
    if not options.plain:
        lines += [
            ("advantage mass that the clip removed", f"{mean('policy/suppressed_mass'):.1%}"),
            ("effective sample size of the ratios", f"{mean('policy/ess'):.1%}"),
            ("gradient norm before the clip", f"{mean('train/grad_norm'):.3f}"),
        ]
    lines.append(("seconds of training", f"{seconds:.0f}"))
    for name, value in lines:
        print(f"  {name:<40}{value:>10}")


def main(arguments=None):
    options = parse_options(arguments)
    torch.set_num_threads(1)
    model, progress = make_model(options), Progress(options.steps)
    started = time.perf_counter()
    model.learn(options.steps, callback=progress, log_interval=None)
    seconds = time.perf_counter() - started
    envs = make_vec_env("CartPole-v1", ENVS, seed=10_000 + options.seed)
    returns, _ = evaluate_policy(model, envs, options.episodes, return_episode_rewards=True)
    print_table(options, progress.rows, returns, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
