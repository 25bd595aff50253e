"""A transformers Trainer with FusedClipAdamW: a small Qwen2 learns to reverse digits from written-out answers.

The same run with the Trainer's own AdamW and clip, with this optimizer in its place, and with rules that AdamW has not.
With every extra off the curves are AdamW's; which rule learns faster on so small a task says nothing about a large one.
Nothing is downloaded. About a minute on one CPU core.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

LR, CLIP, BATCH = 2e-3, 1.0, 64
VARIANTS = ["adamw", "fused", "zclip", "align", "cautious"]


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run (default: 400)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="60 steps of adamw, fused and zclip: a smoke run")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.accumulation < 1 or BATCH % options.accumulation:
        parser.error(f"--steps must be at least 1, and --accumulation divide {BATCH}")
    if options.quick:
        options.steps, options.variants = 60, ["adamw", "fused", "zclip"]
    return options


def optimizer_of(variant):
    """(class, keywords) for `optimizer_cls_and_kwargs`; None leaves the Trainer its own AdamW."""
    import fused_clip_adam as fca

    if variant == "adamw":
        return None
    options = {
        "fused": {"grad_clip": CLIP},
        "zclip": {"grad_clip": fca.ZClip(max_norm=CLIP)},
        "align": {"grad_clip": CLIP, "overshoot": "align"},
        "cautious": {"grad_clip": CLIP, "overshoot": "cautious"},
    }[variant]
    return fca.FusedClipAdamW, {"lr": LR, **options}


def make_dataset(tokenizer, seed, count=4096):
    """Rows of a prompt and its answer; the loss is the answer's alone."""
    import grpo_task

    rows = grpo_task.make_rows(count, seed)
    tokens = tokenizer([f"{row['prompt']} {row['answer']} {grpo_task.EOS}" for row in rows])["input_ids"]
    prompt = grpo_task.DIGITS + 1
    return [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids in tokens]


def train(variant, options, folder):
    """One run; returns what the table shows of it, and the loss at each step."""
    import grpo_task
    import torch
    from tqdm import tqdm
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    from fused_clip_adam.integrations.transformers import FusedTrainer

    torch.manual_seed(options.seed)
    tokenizer = grpo_task.make_tokenizer()
    model = grpo_task.make_model(tokenizer, hidden_size=64)
    chosen = optimizer_of(variant)
    trainer = FusedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH // options.accumulation,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=LR,
            weight_decay=0.01,
            max_grad_norm=CLIP if chosen is None else 0,  # the optimizer clips
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            seed=options.seed,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=make_dataset(tokenizer, options.seed + 1),
        optimizer_cls_and_kwargs=chosen,
    )
    trainer.remove_callback(PrinterCallback)

    with tqdm(total=options.steps, desc=f"{variant:<9}", ncols=80) as progress:

        class Watch(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if "loss" in logs:
                    progress.set_postfix_str(f"loss {logs['loss']:.2f}", refresh=False)

            def on_step_end(self, args, state, control, **kwargs):
                progress.update()

        trainer.add_callback(Watch())
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    log = [row for row in trainer.state.log_history if "loss" in row]
    tenth = max(1, len(log) // 10)
    _, exact = grpo_task.evaluate(model, tokenizer, seed=options.seed + 2)
    return {
        "variant": variant,
        "start": log[0]["loss"],
        "end": statistics.fmean(row["loss"] for row in log[-tenth:]),
        "exact": exact,
        "norms": [row["grad_norm"] for row in log],
        "seconds": seconds,
    }


def print_table(runs):
    print(f"\n  {'':<12}{'first loss':>12}{'last tenth':>12}{'exact':>9}{'grad norm':>11}{'seconds':>9}")
    for run in runs:
        norm = statistics.fmean(run["norms"])
        print(
            f"  {run['variant']:<12}{run['start']:>12.3f}{run['end']:>12.3f}{run['exact']:>9.1%}{norm:>11.3f}"
            f"{run['seconds']:>9.1f}"
        )
    print("\n  exact: held-out prompts answered entirely right, greedy; seconds: of the whole run, model included.")


def main(arguments=None):
    options = parse_options(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("loading torch and transformers ...", flush=True)

    # Here and not at the top: --help answers at once.
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(variant, options, folder) for variant in options.variants]
    print_table(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
