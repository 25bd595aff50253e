"""Executable check: AdamW hardly notices the scale of the reward; a large eps, a fixed max_norm and SGD do.

Scale every reward, and so every advantage and gradient, by s > 0. Adam's update m / (sqrt(v) + eps) has s in m and in
sqrt(v), so that

    AdamW(eps) on rewards times s  =  AdamW(eps / s) on the rewards
    clipped at max_norm            =  clipped at max_norm / s, with eps / s
    SGD(lr)                        =  SGD(s lr)

in exact arithmetic, but for the 1e-6 that clipping adds to a norm. An update without an eps
(`UpdateClamp(mode="atan2")`) is then blind to s, bit for bit where s is a power of 2. With eps > 0 it changes by about
(eps / s) / sqrt(v), with a max_norm as soon as s decides whether it acts.

The run: SAPO, several steps per rollout, on a small policy network, with advantages R - mean(R) of groups (dividing by
std would hide s). What would send two runs apart however alike their updates is kept out: the rollouts are sampled
once, by the run at s = 1, and every s is trained on them; SAPO's clip is smooth, where under PPO's hard one a token on
the edge is clipped in one run and not in the other; and rewards are means of real numbers, since with simple fractions
some gradients are exactly 0 for one s and 1e-20 for another, which an update without eps makes a full step.

The change is the largest distance of a run's parameters to those at s = 1, over how far those have moved from the
start, over all steps. The right panel samples for every s anew. About half a minute on one CPU core.

Source: arXiv 2601.05002; the equivalences: this file.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import checks
import torch
from torch import nn

import fused_clip_adam as fca

PROMPTS, GROUP, LENGTH, VOCABULARY, HIDDEN = 10, 8, 4, 10, 32
STEPS_PER_ROLLOUT = 4
SMALL_EPS, DEFAULT_EPS = 1e-12, 1e-8  # the second is torch's
SHOWN = (f"AdamW, eps {SMALL_EPS:g}", "SGD")  # in the panel of learning curves
EQUAL = 1e-9  # what is left is rounding
PLUS = 1e-6  # what clipping adds to a norm


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=60, help=f"each used for {STEPS_PER_ROLLOUT} optimizer steps")
    parser.add_argument("--decades", type=int, default=3, help="s goes from 10^-this to 10^this")
    parser.add_argument("--lr", type=float, default=1e-2, help="of AdamW")
    parser.add_argument("--sgd-lr", type=float, default=30.0, help="of SGD")
    parser.add_argument("--large-eps", type=float, default=1e-3, help="the eps that is too large")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sampling")
    parser.add_argument("--output", default="demo_out/reward_scale.png", help="the figure")
    return parser.parse_args(arguments)


@dataclass
class Run:
    """parameters: [steps + 1, all], the start's first. rollouts: (tokens, old_logp, rewards) of each. right: the share
    of right digits in each. norms: of every step's gradients."""

    parameters: torch.Tensor
    rollouts: list
    right: list
    norms: list

    def change(self, other):
        """The largest distance to another run, over how far this one has moved."""
        moved = (self.parameters - self.parameters[0]).norm(dim=1)[1:]
        return float(((self.parameters - other.parameters).norm(dim=1)[1:] / moved).max())


class Task:
    """Write four digits that a prompt's digit determines. The policy sees prompt and position. A right digit scores 1,
    each other one its own number below 1/2; the reward is the mean over the digits."""

    def __init__(self, options):
        self.options = options
        prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)
        positions = torch.arange(LENGTH)
        self.answers = (prompts.unsqueeze(1) + 3 * positions) % VOCABULARY
        one_hot = nn.functional.one_hot
        prompt = one_hot(prompts, PROMPTS).unsqueeze(1).expand(-1, LENGTH, -1)
        position = one_hot(positions, LENGTH).expand(len(prompts), -1, -1)
        self.inputs = torch.cat([prompt, position], dim=-1).double()
        generator = torch.Generator().manual_seed(options.seed)
        scores = torch.rand(PROMPTS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64) / 2
        self.scores = scores[prompts].scatter_(-1, self.answers.unsqueeze(-1), 1.0)

    def sample(self, policy):
        """One rollout: tokens [B, T, 1], old_logp [B, T], rewards [B]."""
        noise = -torch.rand(*self.answers.shape, VOCABULARY, dtype=torch.float64).log().neg().log()
        with torch.no_grad():
            log_probabilities = policy(self.inputs).log_softmax(-1)
            tokens = (log_probabilities + noise).argmax(-1, keepdim=True)  # Gumbel noise: a sample of the policy
            rewards = self.scores.gather(-1, tokens).squeeze(-1).mean(1)
            return tokens, log_probabilities.gather(-1, tokens).squeeze(-1), rewards

    def train(self, make_optimizer, scale=1.0, rollouts=None):
        """A run in float64 with rewards times `scale`, on given rollouts or on its own policy's.

        make_optimizer: parameters -> optimizer.
        """
        torch.manual_seed(self.options.seed)
        policy = nn.Sequential(nn.Linear(PROMPTS + LENGTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, VOCABULARY)).double()
        weights = list(policy.parameters())
        opt = make_optimizer(weights)
        run = Run([], [], [], [])

        def record():
            run.parameters.append(torch.cat([p.detach().flatten() for p in weights]))

        record()
        for i in range(self.options.rollouts):
            tokens, old_logp, rewards = self.sample(policy) if rollouts is None else rollouts[i]
            run.rollouts.append((tokens, old_logp, rewards))
            run.right.append(float((tokens.squeeze(-1) == self.answers).double().mean()))
            advantages = fca.group_advantages(scale * rewards, GROUP, scale="none")
            for _ in range(STEPS_PER_ROLLOUT):
                logp = policy(self.inputs).log_softmax(-1).gather(-1, tokens).squeeze(-1)
                loss, _ = fca.policy_loss(logp, old_logp, advantages, objective=fca.SAPO())
                opt.zero_grad()
                loss.backward()
                run.norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in weights)))
                opt.step()
                record()
        run.parameters = torch.stack(run.parameters)
        return run


@dataclass(frozen=True)
class Setting:
    """An optimizer by its numbers, and the one that should do at s = 1 what this one does at s."""

    lr: float
    eps: float | None = None  # None: SGD
    max_norm: float | None = None
    atan2: bool = False

    def __call__(self, parameters):
        if self.eps is None:
            return torch.optim.SGD(parameters, lr=self.lr)
        overshoot = fca.UpdateClamp(mode="atan2") if self.atan2 else None
        return fca.FusedClipAdamW(
            parameters, lr=self.lr, eps=self.eps, grad_clip=self.max_norm, overshoot=overshoot, weight_decay=0.0
        )

    def at_scale_one(self, scale):
        if self.eps is None:
            return Setting(self.lr * scale)
        return Setting(self.lr, self.eps / scale, None if self.max_norm is None else self.max_norm / scale, self.atan2)


def measure(options):
    """Results by name of a setting, and the checks."""
    task = Task(options)
    scales = [10.0**i for i in range(-options.decades, options.decades + 1)]
    norms = sorted(task.train(Setting(options.lr, SMALL_EPS)).norms)
    max_norm = norms[len(norms) // 2]  # at s = 1 every second step is clipped
    settings = {
        "AdamW, no eps (atan2)": Setting(options.lr, SMALL_EPS, atan2=True),
        f"AdamW, eps {SMALL_EPS:g}": Setting(options.lr, SMALL_EPS),
        f"AdamW, eps {DEFAULT_EPS:g}": Setting(options.lr, DEFAULT_EPS),
        f"AdamW, eps {options.large_eps:g}": Setting(options.lr, options.large_eps),
        f"AdamW, no eps, max_norm {max_norm:.2g}": Setting(options.lr, SMALL_EPS, max_norm, atan2=True),
        "SGD": Setting(options.sgd_lr),
    }
    results = {}
    for name, setting in settings.items():
        print(f"  {name} ...", flush=True)
        base = task.train(setting)
        changes = {s: base.change(task.train(setting, s, base.rollouts)) for s in scales}
        own = {s: base if s == 1.0 else task.train(setting, s) for s in (scales[0], 1.0, scales[-1])}
        # SGD diverges at a large s, and a run that diverges amplifies its rounding.
        ends = (scales[0], scales[-1]) if setting.eps else (scales[0],)
        equal = checks.largest(
            task.train(setting, s, base.rollouts).change(task.train(setting.at_scale_one(s), 1.0, base.rollouts))
            for s in ends
        )
        results[name] = (own, changes, equal)
    atan2, small_eps, default_eps, large_eps, clipped, sgd = settings
    power = 2.0 ** (3 * options.decades)
    bits = [task.train(settings[atan2], s).parameters for s in (1 / power, 1.0, power)]

    def worst(name, least=0.0):
        return checks.largest(change for s, change in results[name][1].items() if s >= least)

    differing = sum(int((parameters != bits[1]).sum()) for parameters in bits)
    verdicts = [
        checks.Check(f"{atan2}, s = 2^±{3 * options.decades}: numbers that differ", differing, "<=", 0),
        checks.Check(f"{atan2}: change", worst(atan2), "<=", 1e-9),
        checks.Check(f"{small_eps}: change", worst(small_eps), "<=", 0.02),
        checks.Check(f"{default_eps}: change, s >= 1", worst(default_eps, 1.0), "<=", 0.02),
        checks.Check(f"{large_eps}: change", worst(large_eps), ">=", 0.3),
        checks.Check(f"{clipped}: change", worst(clipped), ">=", 0.02),
        checks.Check(f"{sgd}: change", worst(sgd), ">=", 0.9),
    ]
    for name, (_, _, equal) in results.items():
        bound = 10 * PLUS / norms[0] if name == clipped else EQUAL
        verdicts.append(checks.Check(f"{name}: difference to its equal at s = 1", equal, "<=", bound))
    return results, verdicts


def draw(results, options):
    colors = (checks.INK, checks.TEAL, checks.BLUE, checks.GOLD, checks.GREY, checks.RED)
    figure, (left, right) = checks.new_figure(2, width=11.5)
    for (name, (_, changes, _)), color in zip(results.items(), colors):
        seen = [math.nan if s == 1.0 else change for s, change in changes.items()]  # a run does not differ from itself
        left.loglog(list(changes), seen, "o-", color=color, markersize=4, label=name)
    left.set(title="Change of the run, against s = 1", xlabel="s, the scale of the rewards")
    left.set_ylabel("distance of parameters / distance moved")
    left.legend(fontsize=9, loc="center", bbox_to_anchor=(0.5, 0.27))
    for name, color in zip(results, colors):
        if name in SHOWN:
            for (s, run), style in zip(results[name][0].items(), (":", "-", "--")):
                right.plot(run.right, style, color=color, linewidth=1.6, label=f"{name}, s = {s:g}")
    right.set(title="Learning, every run on its own rollouts", xlabel="rollout", ylim=(0, 1.02))
    right.set_ylabel("share of digits right")
    right.legend(fontsize=9, loc="upper left")
    checks.save(figure, options.output)


def main(arguments=None):
    options = parse_options(arguments)
    results, verdicts = measure(options)
    status = checks.verdict(verdicts)
    draw(results, options)
    return status


if __name__ == "__main__":
    sys.exit(main())
