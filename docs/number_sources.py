"""Where the numbers in the documents come from: tests/test_numbers.py recomputes them and finds those without a source.

A number in prose that looks measured (a decimal, a percentage, a multiple, one with a unit) needs an entry under its
document, in one of these ways; `{}` stands for each value, with the rounding that str.format knows:

    traced("moved {:.2f} TB/s", result("gpu-nvidia-h200/step-one-tensor", "ceiling/gigabytes_per_second", 1e-3))
    traced("takes {:.0%} longer", lambda: ...)                        any function of results or of the package
    stated("less than 0.55 of all gradients", "tests/test_in_backward.py", "< 0.55")       a test or a file fixes it
    quoted("at most 9 updates", "arXiv 2601.05002, App. D.2")         somebody else's number, and whose
    setting("50M float32")                                            chosen, not measured: a size, a limit, a budget

The text is the document's own, line breaks as spaces, long enough to be found nowhere else by accident. Code, links and
what a generator writes need none. `python tests/test_numbers.py` lists what is missing as entries to paste here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import base, gpu, guard, harness, plot, test_logits, test_objective, test_rules, test_scores, test_step
from fused_clip_adam import GlobalNorm, offload
from fused_clip_adam.backends import cuda_objective
from fused_clip_adam.theory import bytes_per_element, total_coast

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
H200 = "gpu-nvidia-h200"
PLAIN_KERNEL = "update_runs_kernel<float, float, float, NONE, false>"


@dataclass(frozen=True)
class Source:
    """An entry: `text` with its placeholders, what fills them, and how it is known."""

    kind: str
    text: str
    values: tuple[Callable[[], Any], ...] = ()
    file: str = ""
    fragment: str = ""
    whose: str = ""

    def expected(self) -> str:
        """The words that have to be in the document."""
        return self.text.format(*(value() for value in self.values)) if self.values else self.text


def traced(text: str, *values: Callable[[], Any]) -> Source:
    return Source("traced", text, values)


def stated(text: str, file: str, fragment: str) -> Source:
    return Source("stated", text, file=file, fragment=fragment)


def quoted(text: str, whose: str) -> Source:
    return Source("quoted", text, whose=whose)


def setting(*texts: str) -> list[Source]:
    return [Source("setting", text) for text in texts]


@functools.cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def at(file: Path, pointer: str) -> Any:
    """The value at "a/b/0" of a JSON file."""
    value = _read(file)
    for step in pointer.split("/"):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def result(name: str, pointer: str, scale: float = 1) -> Callable[[], float]:
    """A number of benchmarks/results/<name>.json, times `scale`. "cpu/<case>": of the newest results of a CPU."""
    folder, case = name.split("/")
    return lambda: (
        at((plot.newest_results()[0] if folder == "cpu" else RESULTS / folder) / f"{case}.json", pointer) * scale
    )


def seconds(name: str, candidate: str, scale: float = 1e3) -> Callable[[], float]:
    """Median time of a candidate, in milliseconds."""
    return result(name, f"candidates/{candidate}/seconds/p50", scale)


def over_ours(name: str, candidate: str) -> Callable[[], float]:
    """A candidate's time over the baseline's, median of paired rounds."""
    return result(name, f"candidates/{candidate}/over_ours/p50")


def value(x: Any) -> Callable[[], Any]:
    """A constant of the code, or what a function of the package gives at import."""
    return lambda: x


def over_bytes(case: str) -> float:
    """Our time on an H200 over what its bytes take at the bandwidth of a copy."""
    ours = at(RESULTS / H200 / f"{case}.json", "candidates/ours, cuda")
    return ours["seconds"]["p50"] / ours["predicted_seconds"]


STEPS_WITH_TARGETS = [
    f"step-{name}{clip}" for name in ("one-tensor", "llama3-8b-shard", "qwen2-0.5b") for clip in ("", "-clip")
]
FLOAT16 = {"param": 2, "grad": 2, "state": 2}
MIXED = {"param": 2, "grad": 2, "state": 4}
LOGITS = 8192 * 151936
COPY = result(f"{H200}/step-one-tensor-clip", "ceiling/gigabytes_per_second", 1e9)
MULTIPROCESSORS = result(f"{H200}/step-one-tensor-clip", "machine/multiprocessors")
LANES = 128  # that issue an instruction each clock, of a multiprocessor since sm_90


def clock() -> float:
    """Most clocks a second of the H200."""
    return float(at(RESULTS / H200 / "step-one-tensor-clip.json", "machine/sm_clock_max").split()[0]) * 1e6


def instructions(bytes_: float) -> Callable[[], float]:
    """Instructions that an H200 issues while its memory moves so many bytes."""
    return lambda: int(MULTIPROCESSORS() * LANES * clock() * bytes_ / COPY())


def step_row(name: str, case: str, code: str = "", **step: Any) -> Source:
    """A line of the table of expected and measured steps."""
    bytes_ = bytes_per_element(**step)
    predicted = result(f"{H200}/{case}", "candidates/ours, cuda/predicted_seconds", 1e3)
    taken = seconds(f"{H200}/{case}", "ours, cuda")
    text = f"| {name} | {{}} | {{}} | {code}{' ' if code else ''}| {{:.1f}} ms | {{:.1f}} ms |"
    return traced(text, value(bytes_), instructions(bytes_), predicted, taken)


def byte_rows(*widths: dict) -> list[Source]:
    """The lines of the tables of bytes an element: ours, and the peers' with their further passes over g."""
    ours = [bytes_per_element(**width) for width in widths]
    normed = [bytes_per_element(grad_clip=1.0, **width) for width in widths]
    grad = [width.get("grad", 4) for width in widths]
    rows = {
        "update": ours,
        "norm, update (ours with clip)": normed,
        "norm, update writing g (`grad_scale`)": [b + g for b, g in zip(normed, grad)],
        "norm, scale, update (`clip_grad_norm_`, then a step)": [b + 2 * g for b, g in zip(normed, grad)],
    }
    return [traced(f"| {name} |" + " {} |" * len(widths), *map(value, numbers)) for name, numbers in rows.items()]


def average_return(env: str) -> Callable[[], float]:
    """Mean return of the evaluations of docs/figures/ppo_control.json, over seeds."""

    def mean() -> float:
        runs = [run for run in at(ROOT / "docs" / "figures" / "ppo_control.json", "runs") if run["env"] == env]
        return sum(sum(run["evaluation"]) / len(run["evaluation"]) for run in runs) / len(runs)

    return mean


def clip_targets(text: str, case: str) -> Source:
    return traced(text, *map(value, test_step.CASES[case].targets.values()))


README = [
    traced(
        "a fused AdamW move {} bytes per float32 parameter, this package {}, and {} with a lagged norm",
        value(bytes_per_element(grad_clip=1.0) + 2 * 4),
        value(bytes_per_element(grad_clip=1.0)),
        value(bytes_per_element(grad_clip=GlobalNorm(1.0, lag=True))),
    ),
    stated("memory moves 16 bytes a thread", "tests/test_cuda_compile.py", "LDG.E.128"),
    stated("start on a 16-byte boundary", "tests/test_cuda_compile.py", "LDG.E.128"),
    traced("about {:.0f} on average", average_return("Acrobot-v1")),
    traced("With the default betas that adds up to {} more updates", lambda: {9: "nine"}[round(total_coast())]),
]

BENCHMARKS = [
    traced("the median is within {:.0%} of it", value(base.LEAST_CHANGE)),
    traced("against ours by more than {:.0%} with spreads", value(guard.LEAST_CHANGE)),
    # On a CPU.
    clip_targets(
        "at least {} times as fast as `clip_grad_norm_` + AdamW(fused) and {} times as fast as the `grad_scale` trick",
        "step-one-tensor-clip",
    ),
    clip_targets("{:.0f} times on many small tensors", "step-2000-tensors-clip"),
    traced("{:.0%} of the stream on 50M", value(test_step.STREAM_TARGET)),
    traced(
        "at least {:.0f} times as fast as eager torch and {} times as fast as torch.compile",
        *map(value, test_objective.LEAST_OVER.values()),
    ),
    traced(
        "from logits at least {:.0f} times as fast as eager torch, and a peak of at most {} times the",
        value(test_logits.LEAST_OVER_EAGER),
        value(test_logits.MOST_MEMORY),
    ),
    traced("SPAM and brake within {:.0%} of the plain step", value(1 - test_rules.WITHIN)),
    traced("within {:.0%} of the global-norm clip", value(1 - test_rules.WITHIN)),
    traced(
        "scores {} times as fast as einsum and our step, and {:.0%} of the stream by B s + 28 bytes an element",
        value(test_scores.FASTER),
        value(test_scores.OF_STREAM),
    ),
    traced(
        "this step reads {:.0%} of its bytes",
        value((bytes_per_element(samples=64) - 3 * 4) / bytes_per_element(samples=64)),
    ),
    traced("cannot take {} times as long", value(test_scores.FASTER)),
    traced("used more than {:.0%} of the cores", value(harness.QUIET)),
    *byte_rows({}, FLOAT16),
    # On a GPU.
    *setting("| 1e9 float32 elements", "| 1e9 elements, parameters, gradients and moments bfloat16"),
    *setting("| 1e9 elements, parameters and gradients bfloat16, moments float32", "1e9 elements with a set for each"),
    *setting("would not fit 80 GB", "over 100% is possible", "within a few times 0.05"),
    traced("The targets: {:.0%} of the copy's bandwidth on `step-one-tensor`", value(gpu.CEILING_TARGET)),
    traced(
        "with clip {} times as fast as `clip_grad_norm_` + AdamW(fused) and {} times as fast as the `grad_scale` trick",
        *map(value, gpu.CLIP_TARGETS.values()),
    ),
    traced(
        "from logits {:.0%} of the copy's bandwidth, which is {} times the floor of {} bytes a logit",
        value(gpu.LOGITS_TARGET),
        value(1 / gpu.LOGITS_TARGET),
        value(3 * 2),
    ),
    traced("(at most {:.0f} GiB)", result(f"{H200}/step-one-tensor-clip", "ceiling/bytes", 2**-30)),
    traced(
        "and takes {} bytes an element more",
        value(2 * 4),  # a float32 gradient written and read, where a bfloat16 one is read anyway
    ),
    *setting("has less than 10 s"),
    traced("read, read again, write: {} bytes a logit in bfloat16", value(3 * 2)),
    traced("{} bytes a token; that is {:.0f} MB", value(13), value(13 * 256 * 4096 / 1e6)),
    *byte_rows({}, FLOAT16, MIXED),
    traced("An H200 copies {:.2f} TB/s", lambda: COPY() / 1e12),
    traced(
        "{} multiprocessors of {} lanes issue {:.1f}e12 instructions a second at {:.2f} GHz",
        MULTIPROCESSORS,
        value(LANES),
        lambda: MULTIPROCESSORS() * LANES * clock() / 1e12,
        lambda: clock() / 1e9,
    ),
    *setting("| 1e9 elements at 100% of copy |"),
    stated("fewer than 80", "tests/test_cuda_compile.py", "assert (last - first) / 4 < 80"),
    stated("fewer than 8, with an entropy 10", "tests/test_cuda_compile.py", '(("false", 8, 17), ("true", 10, 20))'),
    stated("fewer than 17, with a bonus 20", "tests/test_cuda_compile.py", '(("false", 8, 17), ("true", 10, 20))'),
    step_row("float32, no clip", "step-one-tensor", "fewer than 80"),
    step_row("float32, clip", "step-one-tensor-clip", grad_clip=1.0),
    step_row("bfloat16 p, g, m, v, no clip", "step-bfloat16", **FLOAT16),
    step_row("bfloat16 p, g, float32 m, v, no clip", "step-bfloat16-float32-states", **MIXED),
    traced("| bfloat16 logits, forward | {} | {} |", value(2), instructions(2)),
    traced("| bfloat16 logits, backward in place | {} | {} |", value(4), instructions(4)),
    traced(
        "with {} registers each",
        lambda: at(ROOT / "tests" / "registers_cuda.json", f"kernels/sm_90/{PLAIN_KERNEL}/registers"),
    ),
    stated("five blocks of 256 threads", "tests/test_cuda_compile.py", 'blocks = 5 if architecture == "sm_90"'),
    traced("have {} bytes of a thread in flight", value(4 * 16)),
    traced("{:.0f} KB of a multiprocessor", value(5 * 256 * 4 * 16 / 1e3)),
    traced("700 ns of latency need {:.0f} KB", lambda: COPY() / MULTIPROCESSORS() * 700e-9 / 1e3),
    traced(
        "takes {:.0f} to {:.0f}% longer than its bytes at 100% of copy",
        lambda: 100 * (min(map(over_bytes, STEPS_WITH_TARGETS)) - 1),
        lambda: 100 * (max(map(over_bytes, STEPS_WITH_TARGETS)) - 1),
    ),
    traced(
        "{:.2f} ms at 100% of copy were allowed and {:.2f} ms are taken, by Liger's loss {:.0%} more",
        result(f"{H200}/objective-logits", "candidates/ours, cuda/predicted_seconds", 1e3),
        seconds(f"{H200}/objective-logits", "ours, cuda"),
        lambda: over_ours(f"{H200}/objective-logits", "Liger")() - 1,
    ),
    traced(
        "{} statistics in float64 decide: {:.0f} us and {:.0f} us (PPO, GSPO), where the bytes would take {:.0f} us",
        value(cuda_objective._SUMS),
        seconds(f"{H200}/objective-ppo", "ours, cuda", 1e6),
        seconds(f"{H200}/objective-gspo", "ours, cuda", 1e6),
        result(f"{H200}/objective-gspo", "candidates/ours, cuda/predicted_seconds", 1e6),
    ),
    traced(
        "torch.compile takes {:.0%} less than GSPO's three kernels and {:.0%} more than PPO's two",
        lambda: 1 - over_ours(f"{H200}/objective-gspo", "torch.compile")(),
        lambda: over_ours(f"{H200}/objective-ppo", "torch.compile")() - 1,
    ),
    traced(
        "{:.1f} times the plain step, where its bytes would be {:.1f} times",
        over_ours(f"{H200}/step-rules-cuda", "amsgrad"),
        value(bytes_per_element(amsgrad=True) / bytes_per_element()),
    ),
    traced(
        "takes {:.0f} to {:.0f}% less time on one large tensor",
        lambda: 100 * (1 - over_ours(f"{H200}/step-one-tensor", "optimi")()),
        lambda: 100 * (1 - over_ours(f"{H200}/step-bfloat16", "optimi")()),
    ),
]

CLIPPED = bytes_per_element(grad_clip=1.0)  # of float32

PAGES = {
    "docs/performance.md": [
        traced("and read it again: {} bytes in float32", value(CLIPPED + 2 * 4)),
        traced("writes g back scaled: {}. A clip here scales g in a register: {}", value(CLIPPED + 4), value(CLIPPED)),
        traced("gathered inside of the update: {}.", value(bytes_per_element(grad_clip=GlobalNorm(1.0, lag=True)))),
    ],
    "docs/numerics.md": [
        stated("of an objective, in float64 | 1e-12 relative", "tests/test_objectives.py", "EXACT = dict(rtol=1e-12"),
        stated(
            "1e-12 relative in float64, 1e-5 in float32",
            "tests/test_theory.py",
            "BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}",
        ),
    ],
    "docs/howto/many_ranks.md": setting("one collective of 8 bytes, or of 8 bytes a tensor"),
    "docs/howto/less_memory.md": [
        traced("in buckets of {:.0f} MiB", value(offload.BUCKET_BYTES / 2**20)),
        traced("{} bytes an element down and {} up in", value(4 + 4), value(4)),
    ],
    "docs/howto/transformers.md": [
        stated("Written against Transformers 5.24", "pyproject.toml", "transformers>=5.24"),
        quoted("whose default of 1.0", "transformers.TrainingArguments.max_grad_norm"),
    ],
    "docs/howto/trl.md": [stated("Written against TRL 1.16", "pyproject.toml", "trl==1.16")],
    "docs/howto/lightning.md": [stated("Written against Lightning 2.6", "pyproject.toml", "lightning>=2.6")],
    "docs/howto/rsl_rl.md": [stated("Written against rsl-rl 5.5", "pyproject.toml", "rsl-rl-lib==5.5")],
    "docs/howto/torchrl.md": [stated("Written against torchrl 0.14", "pyproject.toml", "torchrl==0.14")],
    "docs/howto/stable_baselines3.md": [
        stated("Written against Stable-Baselines3 2.9", "pyproject.toml", "stable-baselines3>=2.9")
    ],
    "docs/examples.md": [
        stated("`make demo` | two minutes |", "examples/grpo_demo.py", "About two minutes on one CPU core."),
        stated("in memory | two minutes on two cores |", "examples/ppo_control.py", "two minutes on two CPU cores."),
        stated("Lightning | ten seconds |", "examples/lightning_policy.py", "About ten seconds on one CPU core."),
    ],
    "docs/howto/openrlhf.md": setting("OpenRLHF 0.11 has no hook"),
}

SOURCES: dict[str, list[Source]] = {"README.md": README, "benchmarks/README.md": BENCHMARKS, **PAGES}
