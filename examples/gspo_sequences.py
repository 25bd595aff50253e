"""GSPO on whole sequences: one row of scores for each completion of a small Qwen2 that learns to reverse digits.

GSPO clips the ratio of a sequence, so that all tokens of a completion weigh alike and one score is enough for it:
S_b = d sum_t logp_bt / d theta, the tokens after <eos> left out. `per_sample_scores` makes the rows of a minibatch with
vmap over the model, and `step_from_scores(..., objective=fca.GSPO())` reads those that are not clipped: a clipped
completion, or one of a group whose rewards are all equal, costs no memory traffic in the step.

The task is the demo's (grpo_task.py): nothing is downloaded, a program checks the answers, and a warm start imitates a
teacher that slips on 4 digits in 10. Several epochs over each rollout, so that the ratios move. About a minute on
one CPU core.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

OVERSHOOT_RULES = ["none", "align", "align-element", "cautious", "brake"]
DTYPES = ["float32", "bfloat16", "float16"]
PROMPTS, GROUP, MINIBATCH, EPOCHS = 32, 8, 64, 4  # prompts per rollout, completions of each; completions per step
STEPS_PER_ROLLOUT = EPOCHS * PROMPTS * GROUP // MINIBATCH
GRAD_CLIP = 1.0


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=30, help=f"of {STEPS_PER_ROLLOUT} steps each (default: 30)")
    parser.add_argument("--warm-steps", type=int, default=180, help="supervised steps before (default: 180)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and sampling (default: 0)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate, decayed linearly to 0 (default: 3e-4)")
    parser.add_argument(
        "--clip",
        type=float,
        nargs=2,
        default=(3e-4, 4e-4),
        metavar=("LOW", "HIGH"),
        help="distances of GSPO's bounds from 1 (default: the paper's, 3e-4 and 4e-4)",
    )
    parser.add_argument("--overshoot", choices=OVERSHOOT_RULES, default="none", help="momentum rule; none is AdamW")
    parser.add_argument("--score-dtype", choices=DTYPES, default="float32", help="of the stored scores")
    parser.add_argument("--backend", default="auto", help="of the optimizer: cpu, reference or auto (default)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more hardly help so small a model")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few steps, little learning")
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder for gspo_sequences.png and .json")
    options = parser.parse_args(arguments)
    if min(options.rollouts, options.warm_steps, options.threads) < 1:
        parser.error("--rollouts, --warm-steps and --threads must be at least 1")
    if options.quick:
        options.rollouts, options.warm_steps = min(options.rollouts, 4), min(options.warm_steps, 150)
    return options


def log_probs(model, tokens, mask):
    """[..., T] of the completion's tokens, 0 where masked. tokens: [..., prompt and completion]; mask: [..., T]."""
    import torch

    # A sample under vmap has no batch dimension, the model wants one.
    logits = model(input_ids=tokens.view(-1, tokens.shape[-1]), use_cache=False).logits
    logits = logits.view(*tokens.shape, -1)[..., -mask.shape[-1] - 1 : -1, :]
    chosen = tokens[..., -mask.shape[-1] :].unsqueeze(-1)
    return torch.where(mask, logits.log_softmax(-1).gather(-1, chosen).squeeze(-1), 0.0)


def roll_out(model, tokenizer, rows):
    """GROUP completions of each prompt: {tokens [n, L], mask [n, T], old_logp [n, T], advantages [n]}, mean rewards."""
    import grpo_task
    import torch

    import fused_clip_adam as fca

    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", return_token_type_ids=False)
    prompts = {name: x.repeat_interleave(GROUP, 0) for name, x in prompts.items()}
    answers = [row["answer"] for row in rows for _ in range(GROUP)]
    with torch.no_grad():
        tokens = model.generate(**prompts, max_new_tokens=grpo_task.COMPLETION_LENGTH, do_sample=True, top_k=0)
        completions = tokens[:, prompts["input_ids"].shape[1] :]
        is_eos = completions == tokenizer.eos_token_id
        mask = is_eos.cumsum(1) - is_eos.long() == 0  # up to and with the first <eos>
        old_logp = log_probs(model, tokens, mask)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = grpo_task.reward(texts, answers)
    advantages = fca.group_advantages(torch.tensor(rewards), GROUP)
    seen = {"reward": statistics.fmean(rewards), "exact": statistics.fmean(grpo_task.exact(texts, answers))}
    return {"tokens": tokens, "mask": mask, "old_logp": old_logp, "advantages": advantages}, seen


def improve(model, optimizer, rollout, options):
    """EPOCHS over a rollout; returns a record of each step."""
    import torch

    import fused_clip_adam as fca

    records = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(rollout["tokens"])).split(MINIBATCH):
            tokens, mask, old_logp, advantages = (x[rows] for x in rollout.values())
            start = time.perf_counter()
            scores, logp = fca.per_sample_scores(
                model, log_probs, tokens, mask, dtype=getattr(torch, options.score_dtype)
            )
            middle = time.perf_counter()
            stats = optimizer.step_from_scores(
                scores, logp, old_logp, advantages, mask=mask, objective=fca.GSPO(*options.clip)
            )
            end = time.perf_counter()
            stats = stats.to_dict()
            records.append(
                {
                    "clipped": (stats["clipped_low"] + stats["clipped_high"]) / stats["tokens"],
                    "kl": stats["kl_k3"] / stats["tokens"],
                    "grad_norm": float(optimizer.grad_norm),
                    "ms_scores": 1e3 * (middle - start),
                    "ms_step": 1e3 * (end - middle),
                }
            )
    return records


def train(options):
    """Warm start and GSPO. Returns (a record of each rollout, of each step, held-out share exact before and after)."""
    import grpo_task
    from tqdm import tqdm

    import fused_clip_adam as fca

    tokenizer = grpo_task.make_tokenizer()
    model = grpo_task.make_model(tokenizer)
    model.set_attn_implementation("eager")  # torch has no vmap rule of the fused kernel for CPUs: one sample at a time
    with tqdm(total=options.warm_steps, desc="warm start", ncols=80) as progress:
        for loss in grpo_task.warm_start(model, tokenizer, options.warm_steps, seed=options.seed + 1):
            progress.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            progress.update()
    model.eval()
    before = grpo_task.evaluate(model, tokenizer, seed=options.seed + 3)

    optimizer = fca.FusedClipAdamW(
        model.parameters(),
        lr=options.lr,
        weight_decay=0.0,
        grad_clip=GRAD_CLIP,
        overshoot=None if options.overshoot == "none" else options.overshoot,
        backend=options.backend,
    )
    prompts = grpo_task.make_rows(options.rollouts * PROMPTS, seed=options.seed + 2)
    rollouts, steps = [], []
    with tqdm(total=options.rollouts, desc="GSPO      ", ncols=80) as progress:
        for i in range(options.rollouts):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * (1 - i / options.rollouts)
            rollout, seen = roll_out(model, tokenizer, prompts[i * PROMPTS : (i + 1) * PROMPTS])
            rollouts.append(seen)
            steps += improve(model, optimizer, rollout, options)
            progress.set_postfix_str(f"reward {seen['reward']:.2f}", refresh=False)
            progress.update()
    after = grpo_task.evaluate(model, tokenizer, seed=options.seed + 3)
    return rollouts, steps, (before, after)


def print_table(rollouts, steps, held_out, options):
    tenth = max(1, len(rollouts) // 10)

    def ends(records, name, count):
        values = [record[name] for record in records]
        return statistics.fmean(values[:count]), statistics.fmean(values[-count:])

    def line(name, before, after, digits=3):
        print(f"  {name:<46}{before:>10.{digits}f}{after:>10.{digits}f}")

    print(f"\n  {'mean of the first and the last tenth':<46}{'start':>10}{'end':>10}")
    line("reward of rollouts (share of digits right)", *ends(rollouts, "reward", tenth))
    line("rollouts entirely right", *ends(rollouts, "exact", tenth))
    line("held-out prompts entirely right, greedy", held_out[0][1], held_out[1][1])
    line("tokens of clipped completions", *ends(steps, "clipped", tenth * STEPS_PER_ROLLOUT))
    line("KL (k3) from the rollout policy, per token", *ends(steps, "kl", tenth * STEPS_PER_ROLLOUT), 4)
    scores, step = (statistics.median(record[name] for record in steps) for name in ("ms_scores", "ms_step"))
    print(f"\n  per step of {MINIBATCH} completions, median: scores {scores:.0f} ms, step_from_scores {step:.0f} ms")
    print(f"  This run: clip {options.clip[0]:g} and {options.clip[1]:g}, --overshoot {options.overshoot}.")


def draw(rollouts, steps, options):
    """Reward and share of clipped tokens over steps: thin = every step, thick = mean of a rollout."""
    import checks
    import torch

    figure, (left, right) = checks.new_figure(2)
    ends = [(i + 1) * STEPS_PER_ROLLOUT for i in range(len(rollouts))]
    starts = [0, *ends[:-1]]  # a rollout is made before its steps
    for name, label, color in (("reward", "digits right", checks.BLUE), ("exact", "all right", checks.TEAL)):
        left.plot(starts, [record[name] for record in rollouts], color=color, linewidth=2, label=label)
    left.set(title="Reward of rollouts", xlabel="optimizer step", ylim=(0, 1.02))
    left.legend()
    clipped = torch.tensor([record["clipped"] for record in steps])
    right.plot(clipped, color=checks.RED, linewidth=0.7, alpha=0.35)
    means = clipped.view(-1, STEPS_PER_ROLLOUT).mean(1)
    right.plot([end - STEPS_PER_ROLLOUT / 2 for end in ends], means, color=checks.RED, linewidth=2)
    right.set(title="Tokens of clipped completions, which are not read", xlabel="optimizer step", ylim=(0, 1.02))
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axis in (left, right):
        axis.set_xlim(0, len(steps))
    figure.suptitle(
        f"GSPO by rows of sequences: lr {options.lr:g}, clip [{1 - options.clip[0]:g}, {1 + options.clip[1]:g}], "
        f"{EPOCHS} epochs per rollout, overshoot rule: {options.overshoot}\n"
    )
    checks.save(figure, options.output / "gspo_sequences.png")


def main(arguments=None):
    options = parse_options(arguments)
    started = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    print("loading torch and transformers ...", flush=True)

    # Here and not at the top: --help answers at once.
    import torch
    from transformers import logging, set_seed

    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    rollouts, steps, held_out = train(options)
    print_table(rollouts, steps, held_out, options)
    seconds = time.perf_counter() - started
    record = {
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "held_out": {"start": held_out[0], "end": held_out[1]},
        "seconds": seconds,
        "rollouts": rollouts,
        "steps": steps,
    }
    (options.output / "gspo_sequences.json").write_text(json.dumps(record) + "\n")
    draw(rollouts, steps, options)
    print(f"  {seconds:.0f} s in all. Numbers: {options.output / 'gspo_sequences.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
