"""TRL's GRPOTrainer on a small Qwen2 that learns to reverse digits, with the optimizer and the loss of this package.

Nothing is downloaded: the model is random, the tokenizer is built here, the reward is checked by a program. A short
supervised warm start imitates a teacher that slips on 4 digits in 10; GRPO with the verified reward takes the policy
past its teacher. About two minutes on one CPU core.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from copy import deepcopy
from pathlib import Path

OVERSHOOT_RULES = ["none", "align", "align-element", "cautious", "brake"]
ITERATIONS = 4  # optimizer passes over each rollout: with 1 every ratio is 1 and no clip ever acts
BATCH, BATCHES_PER_ROLLOUT, GROUP = 64, 4, 8  # completions per step, steps per pass, completions per prompt
GRAD_CLIP = 1.0


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=480, help="GRPO optimizer steps")
    parser.add_argument("--warm-steps", type=int, default=180, help="supervised steps before GRPO")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and sampling")
    parser.add_argument("--overshoot", choices=OVERSHOOT_RULES, default="none", help="momentum rule; none is AdamW")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate, decayed linearly to 0")
    parser.add_argument("--clip-low", type=float, default=0.2, help="ratios below 1 - this stop pushing down")
    parser.add_argument("--clip-high", type=float, default=0.2, help="ratios above 1 + this stop pushing up")
    parser.add_argument("--backend", default="cpu", help="of the optimizer: cpu, reference or auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; a second hardly helps so small a model")
    parser.add_argument("--quick", action="store_true", help="a smoke run of about 30 s: few steps, little learning")
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder for grpo_demo.png and .json")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.warm_steps = min(options.steps, 48), min(options.warm_steps, 60)
    return options


def make_optimizer(parameters, options):
    import fused_clip_adam as fca

    return fca.FusedClipAdamW(
        parameters,
        lr=options.lr,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        grad_clip=GRAD_CLIP,
        overshoot=None if options.overshoot == "none" else options.overshoot,
        backend=options.backend,
    )


def make_trainer(model, tokenizer, options):
    import grpo_task
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig

    from fused_clip_adam.integrations.trl import FusedGRPOTrainer

    steps_per_rollout = BATCHES_PER_ROLLOUT * ITERATIONS
    prompts = -(-options.steps // steps_per_rollout) * BATCH * BATCHES_PER_ROLLOUT // GROUP  # every prompt used once
    config = GRPOConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        steps_per_generation=BATCHES_PER_ROLLOUT,
        num_iterations=ITERATIONS,
        num_generations=GROUP,
        max_completion_length=grpo_task.COMPLETION_LENGTH,
        reward_weights=[1.0, 0.0],
        loss_type="dapo",
        epsilon=options.clip_low,
        epsilon_high=options.clip_high,
        lr_scheduler_type="linear",
        max_grad_norm=0,  # the optimizer clips
        seed=options.seed,
        use_cpu=True,
        bf16=False,  # TRL's default is True, also on a CPU
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = FusedGRPOTrainer(
        model=model,
        reward_funcs=[grpo_task.reward, grpo_task.exact],
        args=config,
        train_dataset=Dataset.from_list(grpo_task.make_rows(prompts, seed=options.seed + 2)),
        processing_class=tokenizer,
        optimizers=(make_optimizer(model.parameters(), options), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def watch_training(trainer, progress):
    """Drives the progress bar; returns a list that ends up holding the last step's gradients, for the timing."""
    from transformers import TrainerCallback

    gradients = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "reward" in logs:
                progress.set_postfix_str(f"reward {logs['reward']:.2f}", refresh=False)

        def on_step_end(self, args, state, control, **kwargs):
            progress.update()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == args.max_steps:
                gradients.extend(p.grad.clone() for p in model.parameters())

    trainer.add_callback(Watch())
    return gradients


def time_optimizers(parameters, gradients, options, rounds):
    """Median milliseconds of one clip-and-step on copies of the demo's parameters, the contenders taking turns."""
    import torch

    def with_gradients():
        copies = [deepcopy(p.detach()).requires_grad_() for p in parameters]
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient.clone()
        return copies

    def torch_adamw(**keywords):
        copies = with_gradients()
        optimizer = torch.optim.AdamW(copies, lr=options.lr, weight_decay=0.0, **keywords)

        def step():
            torch.nn.utils.clip_grad_norm_(copies, GRAD_CLIP)
            optimizer.step()

        return step

    contenders = {
        "FusedClipAdamW, clip inside": make_optimizer(with_gradients(), options).step,
        "clip_grad_norm_ + AdamW": torch_adamw(),
        "clip_grad_norm_ + AdamW(fused=True)": torch_adamw(fused=True),
    }
    milliseconds = {name: [] for name in contenders}
    for round_index in range(rounds + 10):  # the first 10 warm caches and allocate state
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            if round_index >= 10:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in milliseconds.items()}


def column(log, name):
    """(steps, values) of one metric; TRL logs a reward only on steps that made new rollouts."""
    return zip(*[(row["step"], row[name]) for row in log if name in row], strict=True)


def start_and_end(log, name):
    """Mean over the first and the last tenth of the run."""
    _, values = column(log, name)
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])


def print_table(log, held_out, milliseconds, options):
    def line(name, before, after, digits=3):
        print(f"  {name:<42}{before:>10.{digits}f}{after:>10.{digits}f}")

    print(f"\n  {'mean of the first and the last tenth':<42}{'start':>10}{'end':>10}")
    line("reward of rollouts (share of digits right)", *start_and_end(log, "reward"))
    line("rollouts entirely right", *start_and_end(log, "rewards/exact/mean"))
    line("held-out prompts entirely right, greedy", *held_out)
    line("clip fraction, low", *start_and_end(log, "clip_ratio/low_mean"), 4)
    line("clip fraction, high", *start_and_end(log, "clip_ratio/high_mean"), 4)
    line("overshoot past the clip bound, per token", *start_and_end(log, "policy/overshoot"), 4)
    line("KL (k3) from the rollout policy, per token", *start_and_end(log, "policy/kl_k3"), 4)
    line("gradient norm before clipping", *start_and_end(log, "grad_norm"))

    ours = next(iter(milliseconds.values()))
    print(f"\n  {'optimizer, median ms per step':<42}{'ms':>10}{'ratio':>10}")
    for name, value in milliseconds.items():
        print(f"  {name:<42}{value:>10.3f}{value / ours:>9.2f}x")
    print("\n  The default is plain AdamW; the overshoot corrections are optional.", end=" ")
    print(f"This run: --overshoot {options.overshoot}.")


def draw(log, options, path):
    """Reward, clip fractions, overshoot and KL over steps: thin = every step, thick = mean per rollout."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, blue, red, teal, gold = "#22303c", "#2f6db5", "#c8553d", "#1d8a7a", "#b8860b"
    plt.rcParams.update(
        {
            "font.size": 10,
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.edgecolor": "#9aa5b1",
            "xtick.color": ink,
            "ytick.color": ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6eaee",
            "axes.axisbelow": True,
        }
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.2), sharex=True, layout="constrained")
    panels = [
        ("Reward of rollouts", [("reward", "digits right", blue), ("rewards/exact/mean", "all right", teal)]),
        ("Clipped tokens", [("clip_ratio/low_mean", "low", red), ("clip_ratio/high_mean", "high", blue)]),
        ("Overshoot past the clip bound, nats per token", [("policy/overshoot", None, gold)]),
        ("KL (k3) from the rollout policy, nats per token", [("policy/kl_k3", None, teal)]),
    ]
    steps_per_rollout = BATCHES_PER_ROLLOUT * ITERATIONS
    for axis, (title, curves) in zip(axes.flat, panels, strict=True):
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        for name, label, color in curves:
            steps, values = column(log, name)
            # By whole rollouts: within one, the ratios start at 1 and drift away, a sawtooth that hides the trend.
            per_rollout = max(1, steps_per_rollout * len(steps) // len(log))
            chunks = [slice(i, i + per_rollout) for i in range(0, len(steps), per_rollout)]
            means = [[statistics.fmean(series[chunk]) for chunk in chunks] for series in (steps, values)]
            axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
            axis.plot(*means, color=color, linewidth=2, label=label)
        axis.set_ylim(bottom=0, top=1.02 if name.startswith("reward") else None)
        axis.margins(x=0.01)
        if curves[0][1]:
            axis.legend(frameon=False, loc="best")
    axes[0, 1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    figure.suptitle(
        f"GRPO on TRL with FusedClipAdamW: lr {options.lr:g}, "
        f"clip [{1 - options.clip_low:g}, {1 + options.clip_high:g}], "
        f"{ITERATIONS} passes per rollout, overshoot rule: {options.overshoot}\n",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def main():
    options = parse_options()
    started = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    print("loading torch, transformers and TRL ...", flush=True)

    # Here and not at the top: --help answers at once.
    import grpo_task
    import torch
    from tqdm import tqdm
    from transformers import logging, set_seed

    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = grpo_task.make_tokenizer()
    model = grpo_task.make_model(tokenizer)
    trainer = make_trainer(model, tokenizer, options)  # first of all: a bad option fails here, not after the warm start

    with tqdm(total=options.warm_steps, desc="warm start", ncols=80) as progress:
        for loss in grpo_task.warm_start(model, tokenizer, options.warm_steps, seed=options.seed + 1):
            progress.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            progress.update()
    _, exact_before = grpo_task.evaluate(model, tokenizer, seed=options.seed + 3)

    with tqdm(total=options.steps, desc="GRPO      ", ncols=80) as progress:
        gradients = watch_training(trainer, progress)
        trainer.train()
    _, exact_after = grpo_task.evaluate(model, tokenizer, seed=options.seed + 3)
    milliseconds = time_optimizers(list(model.parameters()), gradients, options, rounds=30 if options.quick else 300)

    log = [row for row in trainer.state.log_history if "loss" in row]
    seconds = time.perf_counter() - started
    print_table(log, (exact_before, exact_after), milliseconds, options)
    record = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "held_out_exact": {"start": exact_before, "end": exact_after},
        "optimizer_milliseconds": milliseconds,
        "seconds": seconds,
        "log": log,
    }
    (options.output / "grpo_demo.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(log, options, options.output / "grpo_demo.png")
    print(f"  {seconds:.0f} s in all. Wrote grpo_demo.png and grpo_demo.json to {options.output}/")


if __name__ == "__main__":
    main()
