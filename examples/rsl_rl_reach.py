"""A planar arm learns to reach with rsl-rl: its own runner, with the policy loss and the optimizer of this package.

Many arms of two joints move at once, on the CPU, each to a target of its own; actions are joint velocities, the reward
is minus the distance of the hand from the target. `FusedPPO` is named in the configuration, as rsl-rl finds every
algorithm. The adaptive learning rate is rsl-rl's; the optimizer clips the gradients, so rsl-rl's own clip is off.

With --plain: rsl-rl's PPO, its clip and torch's Adam, for comparison. A few seconds on one CPU core.
"""

import argparse
import contextlib
import io
import sys
import time

import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

OVERSHOOT_RULES = ["none", "align", "align-element", "cautious", "brake"]
HORIZON = 16  # steps of each arm per rollout
LINES = 10  # of the table


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=100, help="rollouts and updates (default: 100)")
    parser.add_argument("--arms", type=int, default=256, help="that move at once (default: 256)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate at the start (default: 1e-3)")
    parser.add_argument("--grad-clip", type=float, default=1.0, help="largest norm of a gradient (default: 1)")
    parser.add_argument("--overshoot", choices=OVERSHOOT_RULES, default="none", help="momentum rule; none is Adam")
    parser.add_argument("--plain", action="store_true", help="rsl-rl's PPO and torch's Adam instead")
    parser.add_argument("--seed", type=int, default=0, help="of weights, arms and sampling (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 30 iterations of 64 arms at most")
    options = parser.parse_args(arguments)
    if options.iterations < 1 or options.arms < 4:
        parser.error("--iterations must be at least 1 and --arms at least 4")
    if options.plain and options.overshoot != "none":
        parser.error(f"--overshoot {options.overshoot} does not go with --plain: torch's Adam has no such rule")
    if options.quick:
        options.iterations, options.arms = min(options.iterations, 30), min(options.arms, 64)
    return options


class ReachEnv(VecEnv):
    """Arms with two links of length 0.5 and targets within their reach.

    Observed, [arms, 6]: cos and sin of the joints, the target seen from the hand. An episode lasts 50 steps.
    """

    num_actions = 2
    max_episode_length = 50
    device = "cpu"

    def __init__(self, arms, seed):
        self.num_envs, self.cfg = arms, {"arms": arms, "seed": seed}
        self.generator = torch.Generator().manual_seed(seed)
        self.joints, self.targets = torch.zeros(arms, 2), torch.zeros(arms, 2)
        # Arms end their episodes at different times, so that every rollout sees all of an episode.
        self.episode_length_buf = torch.arange(arms) % self.max_episode_length
        self._place(torch.ones(arms, dtype=torch.bool))

    def _random(self, high):
        return high * torch.rand(self.num_envs, 1, generator=self.generator)

    def _place(self, which):
        """New targets and joints where `which`."""
        radius, angle = 0.2 + self._random(0.7), self._random(2 * torch.pi)
        self.targets = torch.where(which[:, None], radius * torch.cat([angle.cos(), angle.sin()], 1), self.targets)
        joints = torch.cat([self._random(2 * torch.pi), self._random(2 * torch.pi)], 1)
        self.joints = torch.where(which[:, None], joints, self.joints)

    def hands(self):
        angles = self.joints.cumsum(1)
        return 0.5 * torch.stack([angles.cos().sum(1), angles.sin().sum(1)], 1)

    def distances(self):
        return (self.targets - self.hands()).norm(dim=1)

    def get_observations(self):
        seen = torch.cat([self.joints.cos(), self.joints.sin(), self.targets - self.hands()], 1)
        return TensorDict({"policy": seen}, batch_size=[self.num_envs])

    def step(self, actions):
        self.joints = self.joints + 0.2 * actions.clamp(-1, 1)
        self.episode_length_buf = self.episode_length_buf + 1
        rewards = -self.distances()
        done = self.episode_length_buf >= self.max_episode_length
        self.episode_length_buf = torch.where(done, 0, self.episode_length_buf)
        self._place(done)
        return self.get_observations(), rewards, done, {"time_outs": done}


def configuration(options):
    model = {"class_name": "MLPModel", "hidden_dims": [32, 32], "activation": "tanh"}
    fused = {
        "class_name": "fused_clip_adam.integrations.rsl_rl:FusedPPO",
        "optimizer": "fused_clip_adam:FusedClipAdamW",
        "optimizer_kwargs": {
            "weight_decay": 0.0,
            "grad_clip": options.grad_clip,
            "overshoot": None if options.overshoot == "none" else options.overshoot,
        },
        "max_grad_norm": float("inf"),
    }
    plain = {"class_name": "PPO", "optimizer": "adam", "max_grad_norm": options.grad_clip}
    return {
        "algorithm": {
            **(plain if options.plain else fused),
            "learning_rate": options.lr,
            "num_learning_epochs": 5,
            "num_mini_batches": 4,
            "gamma": 0.9,
            "entropy_coef": 0.0,
            "schedule": "adaptive",
            "desired_kl": 0.02,
        },
        "actor": {**model, "distribution_cfg": {"class_name": "GaussianDistribution", "init_std": 0.7}},
        "critic": dict(model),
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "num_steps_per_env": HORIZON,
        "save_interval": 1000,
    }


def make_runner(options):
    torch.manual_seed(options.seed)
    with contextlib.redirect_stdout(io.StringIO()):  # rsl-rl prints its models
        return OnPolicyRunner(ReachEnv(options.arms, options.seed), configuration(options))


@torch.no_grad()
def final_distance(policy, seed, arms=512):
    """Mean distance of the hands from their targets at the end of an episode, without exploration."""
    env = ReachEnv(arms, seed)
    for _ in range(env.max_episode_length):
        env.episode_length_buf.zero_()  # all arms play one episode, from its start
        env.step(policy(env.get_observations()))
    return float(env.distances().mean())


def main(arguments=None):
    options = parse_options(arguments)
    torch.set_num_threads(1)
    runner = make_runner(options)
    updates = []
    # Without a log folder rsl-rl's logger writes nothing; here its numbers go into the table.
    runner.logger.log = lambda **seen: updates.append({**seen["loss_dict"], "lr": seen["learning_rate"]})
    columns = {"surrogate": "surrogate", "value": "value", "lr": "lr"}
    if not options.plain:
        columns.update(suppressed_mass="removed", ess="ess", grad_norm="norm")
    print(f"  {'rsl-rl PPO and torch.optim.Adam' if options.plain else 'FusedPPO and FusedClipAdamW'}")
    print("  removed: share of the advantage mass that the clip removed; norm: of the gradient, before its clip\n")
    print(f"  {'iteration':>9}{'distance':>10}" + "".join(f"{name:>11}" for name in columns.values()))
    first = final_distance(runner.alg.get_policy(), seed=options.seed + 1)
    print(f"  {0:>9}{first:>10.3f}")
    started, done = time.perf_counter(), 0
    for line in range(1, LINES + 1):
        due = options.iterations * line // LINES
        if due == done:
            continue
        runner.learn(due - done)
        done = due
        distance = final_distance(runner.alg.get_policy(), seed=options.seed + 1)
        print(f"  {done:>9}{distance:>10.3f}" + "".join(f"{updates[-1][name]:>11.4f}" for name in columns), flush=True)
    print(f"\n  distance {first:.3f} -> {distance:.3f} in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
