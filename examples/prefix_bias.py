"""Executable check: tokens that all samples of a group share get no gradient, unless the samples' weights differ.

G samples of a prompt begin with the same P tokens (a template, a tree's trunk) and go on for n_i of their own, so that
L_i = P + n_i. Their advantages are A_i = (R_i - mean) or that over std. With w_i the weight that the aggregation gives
each token of sample i, a shared token's logits z get, while all ratios are 1,

    dloss/dz = -b (onehot - softmax(z)),   b = sum_i w_i A_i.

A_i sums to 0. Where all w_i are equal ("token-mean", "constant", "sequence-sum") b is 0: a prefix that all have in
common cannot have made the difference. Where they are not, b = G mean(w A) = G cov(w, A):

    "sequence-mean", w_i = 1 / (G L_i):   b = cov(1 / L, A),

the prefix is made likelier because short samples won, or less likely because they lost. "token-mean" of two
micro-batches of the group, each over its own tokens, has w_i = 1 / (2 N_half) and is biased as well; the group's own
count as `normalizer` repairs it. Dividing by std changes all A_i by one factor, and so neither a zero nor the sign.
And a ratio clip is a weight, too: with the prefix' ratio r above 1 + clip_high samples of positive A drop out, and
b = r sum over A_i < 0 of w_i A_i pulls it back.

Left: |b| / sum_i w_i |A_i|, which is 0 without bias and 1 if nothing cancels, measured on the gradient of
`fca.policy_loss`. Right: a policy trained by AdamW where short samples are right. Adam divides the size of a gradient
out (see reward_scale.py): a small steady bias moves the prefix as fast as anything that is learned. A few seconds on
one CPU core.

Source: arXiv 2601.05002; the closed forms: this file.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, replace

import checks
import torch

import fused_clip_adam as fca

CLIP_HIGH = 0.28
SHARED_COUNT, HALVES = "token-mean of halves, one normalizer", "token-mean of each half"
UNIFORM = ("token-mean", "constant", "sequence-sum", SHARED_COUNT)
WEIGHTINGS = (*UNIFORM, "sequence-mean", HALVES)


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=8, help="samples of a prompt; even")
    parser.add_argument("--prefix", type=int, default=4, help="tokens they share")
    parser.add_argument("--vocabulary", type=int, default=16)
    parser.add_argument("--suffix", type=int, default=40, help="mean length of what is their own")
    parser.add_argument("--spreads", type=int, default=10, help="spreads of the lengths")
    parser.add_argument("--draws", type=int, default=20, help="groups for each spread")
    parser.add_argument("--steps", type=int, default=100, help="of the training")
    parser.add_argument("--lr", type=float, default=0.01, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, rewards, tokens and sampling")
    parser.add_argument("--output", default="demo_out/prefix_bias.png", help="the figure")
    options = parser.parse_args(arguments)
    if options.group < 4 or options.group % 2:
        parser.error(f"--group must be even and at least 4, got {options.group}")
    return options


# ---------------------------------------------------------------- one group: its loss, and the closed form


@dataclass
class Group:
    """prefix_logits [P, V], prefix_tokens [P]; own_logp [G, S] of what follows, lengths [G] of it; advantages [G]."""

    prefix_logits: torch.Tensor
    prefix_tokens: torch.Tensor
    own_logp: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor

    def loss(self, weighting, prefix_ratio=1.0):
        """`policy_loss` of all samples, each with the same prefix in front of it.

        prefix_ratio: how much likelier each prefix token is now than when it was sampled.
        """
        G = len(self.own_logp)
        prefix = self.prefix_logits.log_softmax(-1).gather(-1, self.prefix_tokens.unsqueeze(-1)).squeeze(-1)
        logp = torch.cat([prefix.expand(G, -1), self.own_logp], dim=1)
        old_logp = logp.detach().clone()
        old_logp[:, : len(prefix)] -= torch.tensor(prefix_ratio, dtype=old_logp.dtype).log()
        mask = torch.arange(logp.shape[1]) < (len(prefix) + self.lengths).unsqueeze(1)

        def part(rows, **options):
            objective = fca.PPO(clip_high=CLIP_HIGH)
            loss, _ = fca.policy_loss(
                logp[rows], old_logp[rows], self.advantages[rows], mask=mask[rows], objective=objective, **options
            )
            return loss

        halves = slice(0, G // 2), slice(G // 2, G)
        if weighting == HALVES:
            return sum(part(rows, aggregation="token-mean") for rows in halves) / 2
        if weighting == SHARED_COUNT:
            return sum(part(rows, aggregation="token-mean", normalizer=mask.sum()) for rows in halves)
        most = float(logp.numel())
        return part(slice(None), aggregation=weighting, normalizer=most if weighting == "constant" else None)

    def weights(self, weighting):
        """w_i, [G]."""
        G, S = self.own_logp.shape
        total = (len(self.prefix_tokens) + self.lengths).double()
        if weighting in ("token-mean", SHARED_COUNT):
            return (1 / total.sum()).expand(G)
        if weighting == "constant":
            return torch.full((G,), 1 / (G * (len(self.prefix_tokens) + S)), dtype=torch.float64)
        if weighting == "sequence-sum":
            return torch.full((G,), 1 / G, dtype=torch.float64)
        if weighting == "sequence-mean":
            return 1 / (G * total)
        return (1 / (2 * total.reshape(2, -1).sum(1))).repeat_interleave(G // 2)

    def gradient(self, weighting, prefix_ratio=1.0):
        """By autograd through the loss: [P, V], for the prefix' logits that all samples share."""
        (gradient,) = torch.autograd.grad(self.loss(weighting, prefix_ratio), self.prefix_logits)
        return gradient

    def closed_form(self, weighting, prefix_ratio=1.0):
        """The same by the formula: -b (onehot - softmax)."""
        kept = self.advantages if prefix_ratio <= 1 + CLIP_HIGH else self.advantages.clamp(max=0.0)
        b = prefix_ratio * (self.weights(weighting) * kept).sum()
        logits = self.prefix_logits.detach()
        return -b * (torch.nn.functional.one_hot(self.prefix_tokens, logits.shape[1]) - logits.softmax(-1))

    def bias(self, weighting):
        """|b| / sum_i w_i |A_i| read off the gradient."""
        probability = self.prefix_logits.detach().softmax(-1)[0, self.prefix_tokens[0]]
        b = -self.gradient(weighting)[0, self.prefix_tokens[0]] / (1 - probability)
        return float(b.abs() / self.scale(weighting))

    def scale(self, weighting):
        """sum_i w_i |A_i|"""
        return (self.weights(weighting) * self.advantages.abs()).sum()


def make_group(options, spread, short_is_right, generator):
    """A group whose own lengths are uniform in suffix (1 ± spread), and its rewards, real numbers in [0, 1)."""
    G, P, V = options.group, options.prefix, options.vocabulary
    uniform = torch.rand(G, generator=generator, dtype=torch.float64)
    lengths = (options.suffix * (1 + spread * (2 * uniform - 1))).round().clamp(min=1).long()
    rewards = torch.rand(G, generator=generator, dtype=torch.float64)
    if short_is_right:
        rewards = rewards.sort(descending=True).values[lengths.argsort().argsort()]
    own_logp = -torch.rand(G, int(lengths.max()), generator=generator, dtype=torch.float64)
    prefix_logits = torch.randn(P, V, generator=generator, dtype=torch.float64, requires_grad=True)
    prefix_tokens = torch.randint(V, (P,), generator=generator)
    return Group(prefix_logits, prefix_tokens, own_logp, lengths, fca.group_advantages(rewards, G)), rewards


# ---------------------------------------------------------------- what it does to a policy


def train(weighting, options):
    """Log-probability of the prefix at every step of GRPO by AdamW, mean over its tokens, and the mean length.

    The policy is a table, a row of logits per position, uniform at first. Every sample gets the prefix, and samples on
    until token 0 ends it; the reward is 1 for the shorter half of the group.
    """
    generator = torch.Generator().manual_seed(options.seed)
    G, P, V, S = options.group, options.prefix, options.vocabulary, options.suffix
    prefix_logits = torch.zeros(P, V, dtype=torch.float64, requires_grad=True)
    own_logits = torch.zeros(S, V, dtype=torch.float64, requires_grad=True)
    prefix_tokens = torch.randint(V, (P,), generator=generator)
    opt = fca.FusedClipAdamW([prefix_logits, own_logits], lr=options.lr, weight_decay=0.0)
    logps, mean_lengths = [], []
    for _ in range(options.steps):
        log_probabilities = own_logits.log_softmax(-1)
        tokens = torch.multinomial(log_probabilities.detach().exp(), G, replacement=True, generator=generator).T
        ends = tokens == 0
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, S)
        own_logp = log_probabilities.expand(G, -1, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        rewards = (lengths.argsort(stable=True).argsort() < G // 2).double()
        group = Group(prefix_logits, prefix_tokens, own_logp, lengths, fca.group_advantages(rewards, G))
        shared = prefix_logits.detach().log_softmax(-1).gather(-1, prefix_tokens.unsqueeze(-1))
        logps.append(float(shared.mean()))
        mean_lengths.append(float(lengths.double().mean()))
        opt.zero_grad()
        group.loss(weighting).backward()
        opt.step()
    return logps, mean_lengths


# ---------------------------------------------------------------- the check


@dataclass
class Point:
    """A group under a weighting: the spread of its lengths L (standard deviation over mean) and its |b| over
    sum w |A|. errors: of the gradient against the closed form, in the same unit, unclipped and clipped. without_std:
    the bias under advantages R - mean."""

    weighting: str
    short_is_right: bool
    spread: float
    bias: float
    errors: tuple
    without_std: float


def measure_group(group, rewards, weighting, short_is_right):
    total = (len(group.prefix_tokens) + group.lengths).double()
    errors = []
    for ratio in (1.0, 1.2 * (1 + CLIP_HIGH)):
        error = group.gradient(weighting, ratio) - group.closed_form(weighting, ratio)
        errors.append(float(error.abs().max() / group.scale(weighting)))
    unscaled = replace(group, advantages=fca.group_advantages(rewards, len(rewards), scale="none"))
    spread = float(total.std(correction=0) / total.mean())
    return Point(weighting, short_is_right, spread, group.bias(weighting), tuple(errors), unscaled.bias(weighting))


def measure(options):
    """Points, training curves by weighting, and the checks."""
    generator = torch.Generator().manual_seed(options.seed)
    points = []
    for i in range(options.spreads):
        print(f"\r  groups: spread {i + 1} of {options.spreads}", end="", flush=True)
        for draw in range(options.draws):
            short_is_right = draw % 2 == 0
            spread = 0.95 * i / max(1, options.spreads - 1)
            group, rewards = make_group(options, spread, short_is_right, generator)
            points += [measure_group(group, rewards, weighting, short_is_right) for weighting in WEIGHTINGS]
    print()
    curves = {}
    for weighting in WEIGHTINGS:
        print(f"  training with {weighting} ...", flush=True)
        curves[weighting] = train(weighting, options)

    def mean_bias(weighting):
        """Over the groups whose lengths vary, short samples winning."""
        chosen = [p.bias for p in points if p.weighting == weighting and p.short_is_right and p.spread > 0.2]
        return statistics.fmean(chosen) if chosen else float("nan")

    def drift(weighting):
        return curves[weighting][0][-1] - curves[weighting][0][0]

    uniform = [p for p in points if p.weighting in UNIFORM]
    verdicts = [
        checks.Check("gradient against closed form, ratio 1", checks.largest(p.errors[0] for p in points), "<=", 1e-12),
        checks.Check("the same, prefix beyond the clip", checks.largest(p.errors[1] for p in points), "<=", 1e-12),
        checks.Check("uniform weights: bias", checks.largest(p.bias for p in uniform), "<=", 1e-12),
        checks.Check(
            "advantages over std or not: difference",
            checks.largest(abs(p.bias - p.without_std) for p in points),
            "<=",
            1e-12,
        ),
        checks.Check("sequence-mean, short wins: mean bias", mean_bias("sequence-mean"), ">=", 0.1),
        checks.Check(f"{HALVES}: mean bias", mean_bias(HALVES), ">=", 0.02),
        checks.Check("uniform weights: drift of the prefix", max(abs(drift(w)) for w in UNIFORM), "<=", 1e-6),
        checks.Check(
            "sequence-mean, short wins: drift", drift("sequence-mean"), ">=", 0.1 * options.lr * options.steps
        ),
    ]
    return points, curves, verdicts


def draw(points, curves, options):
    figure, (left, right) = checks.new_figure(2, width=11.5)
    series = (
        ("sequence-mean, short samples win", ("sequence-mean",), True, checks.RED, "o"),
        ("sequence-mean, random rewards", ("sequence-mean",), False, checks.RED, "x"),
        (f"{HALVES}, random rewards", (HALVES,), False, checks.GOLD, "+"),
        ("uniform weights", UNIFORM, None, checks.BLUE, "."),
    )
    for label, weightings, short_is_right, color, marker in series:
        chosen = [p for p in points if p.weighting in weightings and short_is_right in (None, p.short_is_right)]
        left.plot([p.spread for p in chosen], [p.bias for p in chosen], marker, color=color, markersize=5, label=label)
    left.set(title="Bias of a shared prefix", xlabel="spread of the lengths, standard deviation / mean")
    left.set_ylabel(r"$|\,\sum\, w_i A_i\,|\;/\;\sum\, w_i |A_i|$")
    left.set_ylim(-0.03, 1.03)
    left.legend(fontsize=9, loc="upper left")
    for label, weighting, color in (
        ("sequence-mean", "sequence-mean", checks.RED),
        (HALVES, HALVES, checks.GOLD),
        ("uniform weights", UNIFORM[0], checks.BLUE),
    ):
        right.plot(curves[weighting][0], color=color, linewidth=1.8, label=label)
    right.set(title="Training where short samples are right", xlabel="step of AdamW")
    right.set_ylabel("log-probability of the prefix, mean per token")
    right.legend(fontsize=9, loc="best")
    checks.save(figure, options.output)


def main(arguments=None):
    options = parse_options(arguments)
    points, curves, verdicts = measure(options)
    print("\n  log-probability of the prefix per token, first and last step; mean length of the samples' own")
    for weighting, (logps, lengths) in curves.items():
        print(f"  {weighting:<38}{logps[0]:8.3f}{logps[-1]:8.3f}{lengths[0]:10.1f}{lengths[-1]:6.1f}")
    status = checks.verdict(verdicts)
    draw(points, curves, options)
    return status


if __name__ == "__main__":
    sys.exit(main())
