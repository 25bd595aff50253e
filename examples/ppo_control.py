"""PPO on CartPole and Acrobot whose policy learns from per-sample scores: its gradient is never in memory.

For every minibatch `per_sample_scores` makes d log pi(a_b | s_b) / d theta of each sample, and `step_from_scores` clips
the ratios, weighs the scores with d loss / d logp, and takes the AdamW step, in one pass over them. The critic learns
with the same optimizer's ordinary `step()`. Generalised advantages, parallel environments, several epochs per rollout.

Shown at the end: the mean return of 100 new episodes, actions sampled from the trained policy. CartPole counts as
solved at 475 of 500; for Acrobot -100 is the customary bound. Five seeds of both take two minutes on two CPU cores.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fused_clip_adam as fca

OVERSHOOT_RULES = ["none", "align", "align-element", "cautious", "brake"]
HIDDEN, GAMMA, LAMBDA, GRAD_CLIP = 64, 0.99, 0.95, 0.5
EVALUATION_EPISODES = 100


@dataclass(frozen=True)
class Task:
    """What a task is trained with."""

    steps: int  # of the environments, all together
    envs: int
    horizon: int  # steps of each environment per rollout
    epochs: int
    minibatch: int
    lr: float  # decayed linearly to 0
    goal: float
    quick_steps: int


TASKS = {
    "CartPole-v1": Task(150_000, 8, 256, 8, 256, 1e-3, 475.0, 12_288),
    "Acrobot-v1": Task(160_000, 16, 128, 8, 512, 1e-3, -100.0, 24_576),
}


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=[*TASKS, "all"], default="all", help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each task (default: 5)")
    parser.add_argument("--steps", type=int, help="environment steps of a run (default: the task's)")
    parser.add_argument("--overshoot", choices=OVERSHOOT_RULES, default="none", help="momentum rule; none is AdamW")
    parser.add_argument("--clip", type=float, default=0.2, help="ratios stop at 1 - this and 1 + this (default: 0.2)")
    parser.add_argument("--ordinary", action="store_true", help="policy_loss().backward() and step() instead of scores")
    parser.add_argument("--backend", default="auto", help="of the optimizers: cpu, reference or auto (default)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each with one thread")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: a smoke run")
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder for ppo_control.png and .json")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if options.quick:
        options.seeds = 1
    return options


# ---------------------------------------------------------------- one run


def mlp(inputs, outputs, last_gain):
    layers = [nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, last_gain if layer is layers[-1] else 2**0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def log_prob(policy, state, action):
    """Of one sample, or of a batch."""
    return policy(state).log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def make_envs(name, count):
    import gymnasium

    # Reset in the step that ends an episode: every step is one that the policy chose.
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(name, count, vectorization_mode="sync", vector_kwargs=mode)


@dataclass
class Rollout:
    """Tensors [horizon * envs, ...]."""

    states: torch.Tensor
    actions: torch.Tensor
    old_logp: torch.Tensor
    advantages: torch.Tensor
    targets: torch.Tensor  # of the critic


class Run:
    """One seed: environments, networks, optimizers."""

    def __init__(self, name, seed, options, task=None):
        torch.manual_seed(seed)
        self.task, self.options = task or TASKS[name], options
        self.envs = make_envs(name, self.task.envs)
        self.states = self.envs.reset(seed=1000 * seed)[0]
        inputs, actions = self.envs.single_observation_space.shape[0], int(self.envs.single_action_space.n)
        self.policy, self.critic = mlp(inputs, actions, 0.01), mlp(inputs, 1, 1.0)
        overshoot = None if options.overshoot == "none" else options.overshoot
        self.policy_optimizer = self._optimizer(self.policy, overshoot)
        self.critic_optimizer = self._optimizer(self.critic, None)
        self.returns, self.finished = np.zeros(self.task.envs), deque(maxlen=100)
        self.seconds = 0.0  # spent on the policy's scores, or gradient, and steps
        self.minibatches = 0

    def _optimizer(self, module, overshoot):
        return fca.FusedClipAdamW(
            module.parameters(),
            lr=self.task.lr,
            weight_decay=0.0,
            grad_clip=GRAD_CLIP,
            overshoot=overshoot,
            backend=self.options.backend,
        )

    @torch.no_grad()
    def collect(self):
        """Plays the policy for `horizon` steps."""
        rows = []
        for _ in range(self.task.horizon):
            states = torch.from_numpy(self.states).float()
            logp = self.policy(states).log_softmax(-1)
            actions = torch.multinomial(logp.exp(), 1)
            self.states, rewards, ended, cut, info = self.envs.step(actions.squeeze(1).numpy())
            self.returns += rewards
            following = self.states.copy()
            for i in np.flatnonzero(ended | cut):
                following[i] = info["final_obs"][i]  # self.states is the next episode's there
                self.finished.append(self.returns[i])
                self.returns[i] = 0.0
            seen = (states, following, actions.squeeze(1), logp.gather(1, actions).squeeze(1), rewards, ended, cut)
            rows.append([torch.as_tensor(x) for x in seen])
        states, following, actions, old_logp, rewards, ended, cut = (torch.stack(column) for column in zip(*rows))
        values = self.critic(states).squeeze(-1)
        # An episode that was cut, not ended, is worth what the critic says of its last state.
        delta = rewards.float() + GAMMA * self.critic(following.float()).squeeze(-1) * ~ended - values
        advantages, carried = torch.empty_like(delta), torch.zeros(self.task.envs)
        for t in reversed(range(self.task.horizon)):
            carried = delta[t] + GAMMA * LAMBDA * carried * ~(ended[t] | cut[t])
            advantages[t] = carried
        targets = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return Rollout(*(x.flatten(0, 1) for x in (states, actions, old_logp, advantages, targets)))

    def improve(self, rollout):
        """Epochs over a rollout; returns the share of clipped samples."""
        clipped = []
        for _ in range(self.task.epochs):
            for rows in torch.randperm(len(rollout.actions)).split(self.task.minibatch):
                start = time.perf_counter()
                stats = self.step_policy(*(x[rows] for x in vars(rollout).values()))
                self.seconds += time.perf_counter() - start
                self.minibatches += 1
                clipped.append((stats.clipped_low + stats.clipped_high) / stats.tokens)

                self.step_critic(rollout.states[rows], rollout.targets[rows])
        return float(torch.stack(clipped).mean())

    def step_critic(self, states, targets):
        loss = (self.critic(states).squeeze(-1) - targets).square().mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

    def step_policy(self, states, actions, old_logp, advantages, _):
        objective = fca.PPO(self.options.clip, self.options.clip)
        if not self.options.ordinary:
            scores, logp = fca.per_sample_scores(self.policy, log_prob, states, actions, chunk_size=len(actions))
            return self.policy_optimizer.step_from_scores(scores, logp, old_logp, advantages, objective=objective)
        logp = log_prob(self.policy, states, actions)
        loss, stats = fca.policy_loss(logp, old_logp, advantages, objective=objective)
        self.policy_optimizer.zero_grad()
        loss.backward()
        self.policy_optimizer.observe(stats)
        self.policy_optimizer.step()
        return stats

    def set_lr(self, factor):
        for optimizer in (self.policy_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = self.task.lr * factor


@torch.no_grad()
def evaluate(policy, name, seed, episodes=EVALUATION_EPISODES):
    """Returns of one episode each in `episodes` environments, actions sampled as in training."""
    torch.manual_seed(seed)
    envs = make_envs(name, episodes)
    states = envs.reset(seed=seed)[0]
    returns, playing = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while playing.any():
        actions = torch.multinomial(policy(torch.from_numpy(states).float()).softmax(-1), 1).squeeze(1)
        states, rewards, ended, cut, _ = envs.step(actions.numpy())
        returns += rewards * playing
        playing &= ~(ended | cut)
    return returns.tolist()


def train(name, seed, options):
    """One run from its first step to its evaluation; says every fifth of it how far it is. Returns a record."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    run = Run(name, seed, options)
    task = run.task
    steps = options.steps or (task.quick_steps if options.quick else task.steps)
    rollouts = max(1, steps // (task.envs * task.horizon))
    curve, clipped = [], []
    for i in range(rollouts):
        run.set_lr(1 - i / rollouts)
        clipped.append(run.improve(run.collect()))
        mean = statistics.fmean(run.finished) if run.finished else None  # no episode has ended yet
        curve.append(((i + 1) * task.envs * task.horizon, mean))
        if (i + 1) * 5 // rollouts > i * 5 // rollouts:
            now = "no episode yet" if mean is None else f"return {mean:7.1f}"
            print(f"  {name:<12} seed {seed}  {curve[-1][0]:>7,} steps  {now}", flush=True)
    evaluation = evaluate(run.policy, name, seed=10**6 + 1000 * seed)
    return {
        "env": name,
        "seed": seed,
        "curve": curve,
        "evaluation": evaluation,
        "clip_fraction": statistics.fmean(clipped),
        "policy_ms_per_minibatch": 1e3 * run.seconds / run.minibatches,
        "seconds": time.perf_counter() - started,
    }


# ---------------------------------------------------------------- all runs


def train_all(options):
    names = list(TASKS) if options.env == "all" else [options.env]
    calls = [(name, seed, options) for name in names for seed in range(options.seeds)]
    if min(options.jobs, len(calls)) == 1:
        return [train(*call) for call in calls]
    # spawn: a forked process would inherit torch's threads in whatever state they are.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(train, *call) for call in calls]]


def print_table(runs):
    print(f"\n  mean return of {EVALUATION_EPISODES} episodes after training, actions sampled")
    print(f"  {'':<14}{'seed':>6}{'return':>10}{'worst':>8}{'clipped':>10}{'ms/step':>10}{'seconds':>9}")
    for run in runs:
        mean, worst = statistics.fmean(run["evaluation"]), min(run["evaluation"])
        print(
            f"  {run['env']:<14}{run['seed']:>6}{mean:>10.1f}{worst:>8.0f}{run['clip_fraction']:>10.1%}"
            f"{run['policy_ms_per_minibatch']:>10.2f}{run['seconds']:>9.0f}"
        )
    for name in dict.fromkeys(run["env"] for run in runs):
        means = [statistics.fmean(run["evaluation"]) for run in runs if run["env"] == name]
        reached = sum(mean >= TASKS[name].goal for mean in means)
        print(
            f"  {name:<14}{'mean':>6}{statistics.fmean(means):>10.1f}"
            f"   {reached} of {len(means)} at {TASKS[name].goal:g} or better"
        )


def draw(runs, options):
    """Return of the last 100 training episodes over steps: thin = one seed, thick = mean of all."""
    import checks

    names = list(dict.fromkeys(run["env"] for run in runs))
    figure, axes = checks.new_figure(len(names), width=5.6 * len(names))
    for axis, name in zip(np.atleast_1d(axes), names):
        curves = [run["curve"] for run in runs if run["env"] == name]
        steps = np.array([step for step, _ in curves[0]])
        returns = np.array([[np.nan if value is None else value for _, value in curve] for curve in curves])
        for i, own in enumerate(returns if len(curves) > 1 else ()):
            axis.plot(steps, own, color=checks.BLUE, linewidth=0.8, alpha=0.45, label="one seed" if i == 0 else None)
        # Where some seed has no episode yet there is no mean of all.
        label = f"mean of {len(curves)}" if len(curves) > 1 else "one seed"
        axis.plot(steps, returns.mean(0), color=checks.BLUE, linewidth=2.2, label=label)
        axis.axhline(TASKS[name].goal, color=checks.GREY, linewidth=1, linestyle="--", label=f"{TASKS[name].goal:g}")
        axis.set(title=name, xlabel="environment steps", xlim=(0, steps[-1]))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axis.legend(loc="best")
    np.atleast_1d(axes)[0].set_ylabel("return, last 100 training episodes")
    how = "policy_loss().backward() and step()" if options.ordinary else "step_from_scores"
    figure.suptitle(f"PPO, policy trained by {how}, clip {options.clip:g}, overshoot rule: {options.overshoot}\n")
    checks.save(figure, options.output / "ppo_control.png")


def main(arguments=None):
    options = parse_options(arguments)
    started = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = train_all(options)
    seconds = time.perf_counter() - started
    print_table(runs)
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    record = {"options": settings, "seconds": seconds, "runs": runs}
    (options.output / "ppo_control.json").write_text(json.dumps(record) + "\n")
    draw(runs, options)
    print(f"  {seconds:.0f} s in all. Numbers: {options.output / 'ppo_control.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
