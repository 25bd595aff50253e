"""Executable check: when the ratio clip has zeroed the gradient, Adam goes on, as far as the closed form says.

The policy is a table of logits, one row per token of the batch, uniform at first; every advantage is positive. PPO
raises all tokens alike until, after T steps, every ratio is beyond 1 + clip_high. From then on the gradient is exactly
zero and all that moves the policy is momentum. With a the beta1 of a step (that of a brake: beta1 (1 - strength c)),
k steps later an update is

    R_k = A_k (sqrt(v_hat) + eps) / (sqrt(v_hat B_k) + eps)

of the last one, A_k = a^k and B_k = beta2^k up to bias correction (`fca.theory.residual_ratio`). A brake's c is
suppressed_mass / total_mass of the loss's own statistics: 0 up to T, 1 after. `align`, `cautious` and `grams` look at
the gradient, and stop at once: R_k = 0. A few seconds on one CPU core.

Source: arXiv 2601.05002, App. D.2.
"""

import argparse
import sys
from dataclasses import dataclass

import checks
import torch

import fused_clip_adam as fca

EPS = 1e-8
LONGEST_RISE = 10_000  # steps; a policy that has not been clipped by then will not be
STOPPING = ("align", "cautious", "grams")


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="of the batch")
    parser.add_argument("--vocabulary", type=int, default=32, help="logits per token")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    parser.add_argument("--clip-high", type=float, default=0.28, help="ratios above 1 + this have no gradient")
    parser.add_argument("--budget", type=float, default=2.0, help="updates that a third brake may coast")
    parser.add_argument("--steps-after", type=int, default=60, help="steps after the clip")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and the sizes of their advantages")
    parser.add_argument("--output", default="demo_out/coast_after_clip.png", help="the figure")
    options = parser.parse_args(arguments)
    if options.steps_after < 1:
        parser.error(f"--steps-after must be at least 1, got {options.steps_after}")
    return options


@dataclass
class Coast:
    """T: steps with a gradient. v_hat: [tokens] at T. residuals: [steps_after + 1, tokens], update over that of T.
    ratios: of every step, the batch's mean. c: the least share of suppressed mass after T."""

    T: int
    v_hat: torch.Tensor
    residuals: torch.Tensor
    ratios: list
    c: float


def run(rule, options):
    """PPO on one batch until all of it is clipped, and `steps_after` steps more, in float64."""
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.randint(options.vocabulary, (options.tokens, 1), generator=generator)
    advantages = torch.rand(options.tokens, generator=generator, dtype=torch.float64) + 0.5
    logits = torch.zeros(options.tokens, options.vocabulary, dtype=torch.float64, requires_grad=True)
    old_logp = logits.detach().log_softmax(-1).gather(-1, tokens).squeeze(-1)
    objective = fca.PPO(clip_high=options.clip_high)
    opt = fca.FusedClipAdamW(
        [logits], lr=options.lr, betas=tuple(options.betas), eps=EPS, weight_decay=0.0, overshoot=rule
    )

    def of_tokens(table):
        return table.gather(-1, tokens).squeeze(-1)

    T, updates, ratios, shares = 0, [], [], []
    while len(updates) <= options.steps_after:
        logp = of_tokens(logits.log_softmax(-1))
        ratios.append(float((logp.detach() - old_logp).exp().mean()))
        loss, stats = fca.policy_loss(logp, old_logp, advantages, objective=objective)
        opt.zero_grad()
        loss.backward()
        opt.observe(stats)

        clipped = not bool(logits.grad.any())
        if clipped:
            shares.append(float(stats.suppressed_mass / stats.total_mass))
        elif shares or bool((logits.grad == 0).all(-1).any()):
            raise SystemExit("the tokens were not clipped in the same step: try another --lr")
        elif T == LONGEST_RISE:
            raise SystemExit(f"no token was clipped in {T} steps: raise --lr")
        before = logits.detach().clone()
        opt.step()
        update = of_tokens(logits.detach() - before)
        if clipped:
            updates.append(update)
        else:
            T += 1
            updates = [update]
            v_hat = of_tokens(opt.state[logits]["exp_avg_sq"]) / (1 - options.betas[1] ** T)
    return Coast(T, v_hat, torch.stack(updates) / updates[0], ratios, min(shares))


def predict(coast, options, brake=None):
    """R_k by the closed form, like `coast.residuals`."""
    numbers = {} if brake is None else dict(strength=brake.strength, mode=brake.mode, hold_v=brake.hold_v, c=coast.c)
    rows = [
        [
            fca.theory.residual_ratio(k, *options.betas, history=coast.T, eps=EPS, v_hat=v_hat, **numbers)
            for v_hat in coast.v_hat.tolist()
        ]
        for k in range(len(coast.residuals))
    ]
    return torch.tensor(rows, dtype=torch.float64)


def measure(options):
    """{name: (coast, prediction or None)}, and the checks."""
    plain = run(None, options)
    largest = float(plain.v_hat.max())  # eps shortens a coast, and least so where v_hat is largest
    strength = fca.theory.required_strength(options.budget, *options.betas, history=plain.T, eps=EPS, v_hat=largest)
    brakes = {
        "brake 0.5": fca.MomentumBrake(0.5),
        "brake 0.1, damp, hold_v 0.5": fca.MomentumBrake(0.1, mode="damp", hold_v=0.5),
        f"brake {strength:.3f}: {options.budget:g} updates": fca.MomentumBrake(strength),
    }
    runs = {"AdamW": (plain, predict(plain, options))}
    for name, brake in brakes.items():
        print(f"  {name} ...", flush=True)
        coast = run(brake, options)
        runs[name] = (coast, predict(coast, options, brake))
    for name in STOPPING:
        print(f"  {name} ...", flush=True)
        runs[name] = (run(name, options), None)

    verdicts = []
    for name, (coast, prediction) in runs.items():
        if prediction is None:
            verdicts.append(
                checks.Check(f"{name}: largest residual", float(coast.residuals[1:].abs().max()), "<=", 0.0)
            )
        else:
            error = float((coast.residuals - prediction).abs().max())
            verdicts.append(checks.Check(f"{name}: largest difference to R_k", error, "<=", 1e-9))
    *_, name = brakes
    distance = float(runs[name][0].residuals[1:].sum(0).max())
    verdicts.append(checks.Check(f"{name}: coasts", distance, "<=", options.budget * (1 + 1e-9)))
    # Without this, all that is above could hold for a run in which nothing coasts.
    distance = float(plain.residuals[1:].sum(0).min())
    expected = fca.theory.coast_after(options.steps_after, *options.betas, history=plain.T)
    verdicts.append(checks.Check("AdamW: coasts", distance, ">=", 0.999 * expected))
    return runs, verdicts


def draw(runs, options):
    colors = dict(zip(runs, (checks.RED, checks.BLUE, checks.GOLD, checks.TEAL)))
    figure, (left, right) = checks.new_figure(2)
    stopped = "align, cautious, grams"
    for name, (coast, prediction) in runs.items():
        residuals = coast.residuals.mean(1)
        if prediction is not None:
            left.plot(prediction.mean(1), color=colors[name], linewidth=1.5)
        elif name != STOPPING[0]:
            continue  # the three lie on each other
        color, label = colors.get(name, checks.INK), stopped if prediction is None else name
        left.plot(residuals, ".", color=color, markersize=5, label=label)
        ratios = coast.ratios[: coast.T + options.steps_after]
        right.plot(range(len(ratios)), ratios, color=color, linewidth=1.8, label=label)
    left.set(title="Update over the last one before the clip", xlabel="k, steps since the last gradient")
    left.set_ylabel("dots: measured; lines: closed form")
    left.set_ylim(bottom=-0.03)
    left.legend()
    right.axhline(1 + options.clip_high, color=checks.GREY, linewidth=1, linestyle="--")
    bound, place = 1 + options.clip_high, ("axes fraction", "data")
    label = f"1 + clip_high = {bound:g}"
    right.annotate(label, (1, bound), (1, -14), place, "offset points", ha="right", color=checks.GREY)
    right.set(title="Ratio to the policy that sampled", xlabel="step on the same rollouts")
    right.set_ylabel("mean over the batch's tokens")
    checks.save(figure, options.output)


def main(arguments=None):
    options = parse_options(arguments)
    runs, verdicts = measure(options)
    coast = runs["AdamW"][0]
    print(f"\n  All tokens are clipped after {coast.T} steps; the clip's bound is {1 + options.clip_high:g}.")
    for name, (coast, _) in runs.items():
        distance = float(coast.residuals[1:].sum(0).mean())
        print(f"  {name:<32} goes on by {distance:5.2f} updates, to a ratio of {coast.ratios[-1]:.3f}")
    status = checks.verdict(verdicts)
    draw(runs, options)
    return status


if __name__ == "__main__":
    sys.exit(main())
