"""The command line: `python -m fused_clip_adam plan --help`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from fused_clip_adam import planner
from fused_clip_adam.bandwidth import measure_bandwidth

_PLAN = """Prints what one FusedClipAdamW step needs on one rank: memory, bytes moved, and the time they take, beside
clip_grad_norm_ and torch's fused AdamW. Nothing is built and no GPU is needed."""

_EXAMPLES = """examples:
  a 70B policy on 64 H100s, sharded by FSDP, moments in fp32, gradients clipped to norm 1
    python -m fused_clip_adam plan --params 70B --gpus 64 --sharding fsdp --dtype bf16 --state-dtype fp32 \\
        --grad-clip 1.0 --device h100
  the same in groups of 8 that each hold everything (hybrid sharding)
    python -m fused_clip_adam plan --params 70B --gpus 64 --sharding fsdp --replicas 8 --dtype bf16 --device h100
  rules as the optimizer takes them
    python -m fused_clip_adam plan --params 7b --grad-clip "ZClip(warmup=50)" --overshoot "align, UpdateClamp(1.0)"
  moments and step on the host, over a link of 50 GB/s
    python -m fused_clip_adam plan --params 8B --dtype bf16 --offload cpu --host-bandwidth 200 --link-bandwidth 50
  this machine's own bandwidth
    python -m fused_clip_adam plan --params 0.5B --measure

A bandwidth is in GB/s, 1e9 bytes a second, reads plus writes. The time "at ceiling" is bytes over bandwidth; "expected"
is that over the share of the ceiling that the kernels reached in benchmarks/results. Communication is not modelled."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Args:
        arguments: as typed; None: this process's.

    Raises:
        SystemExit: arguments that are wrong, after a sentence on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_clip_adam", description="Tools of fused_clip_adam.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "plan",
        help="memory per rank and time of a step, before there is a model",
        description=_PLAN,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_plan(command)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    try:
        print(run(**options))
    except (ValueError, TypeError, RuntimeError) as error:
        command.error(str(error))
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)

    model = parser.add_argument_group("model and ranks")
    model.add_argument(
        "--params", required=True, metavar="N", help="parameters: 70e9, 70B, 7b, 494M; of one model-parallel rank"
    )
    model.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of data parallelism (1)")
    model.add_argument(
        "--sharding",
        default="none",
        metavar="HOW",
        help="none: every rank has everything (DDP); zero1: moments and step are sharded; fsdp: parameters and "
        "gradients too (none)",
    )
    model.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="hybrid sharding: copies of what is sharded, each over gpus / replicas ranks (1)",
    )
    model.add_argument("--dtype", default="fp32", metavar="D", help="of parameters: bf16, fp16, fp32 (fp32)")
    model.add_argument("--grad-dtype", metavar="D", help="of gradients: fp32 (as the parameters); of scores: any")
    model.add_argument("--state-dtype", metavar="D", help="of moments: none, as the parameters, or fp32 (none)")

    step = parser.add_argument_group("optimizer, as FusedClipAdamW takes it")
    step.add_argument("--amsgrad", action="store_true", help="a third moment, max_exp_avg_sq")
    step.add_argument(
        "--grad-clip", default="none", metavar="RULE", help='a norm such as 1.0, "ZClip()", "1.0, SpikeClip()" (none)'
    )
    step.add_argument(
        "--overshoot", default="none", metavar="RULE", help='align, brake, ..., "AlignedMomentum(block=256)" (none)'
    )
    step.add_argument("--reset", default="none", metavar="RULE", help='"OnRollout()", "Periodic(every=500)" (none)')
    step.add_argument("--skip-nonfinite", action="store_true", help="needs the norm of the gradients before the update")
    step.add_argument(
        "--in-backward",
        action="store_true",
        help="step_in_backward: gradients are used and freed by buckets while backward() runs",
    )
    step.add_argument("--bucket-bytes", type=int, metavar="N", help="of --in-backward (32 MiB)")
    step.add_argument(
        "--previous-norm", action="store_true", help="of --in-backward: clip by the norm of the step before"
    )
    step.add_argument("--offload", choices=("cpu",), help="moments and step on the host")
    step.add_argument(
        "--largest-tensor",
        metavar="N",
        help="parameters of the largest tensor, the embedding as a rule: buckets of --in-backward and --offload hold "
        "whole tensors",
    )
    step.add_argument("--scores", type=int, metavar="B", help="step_from_scores of B samples, instead of step()")
    step.add_argument(
        "--max-sample-norm", type=float, metavar="X", help="of step_from_scores: one more pass over scores"
    )

    speed = parser.add_argument_group("bandwidth; without any, only memory and bytes are known")
    speed.add_argument(
        "--device", metavar="NAME", help=f"{', '.join(planner.DEVICES)}: its published peak, if it has one (cuda)"
    )
    speed.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="of the device, as a copy on it moves (on a CPU: a stream)"
    )
    speed.add_argument("--host-bandwidth", type=float, metavar="GB/S", help="of the host, with --offload")
    speed.add_argument(
        "--link-bandwidth", type=float, metavar="GB/S", help="between host and device, one way, as reached"
    )
    speed.add_argument(
        "--measure",
        nargs="?",
        const="auto",
        choices=("auto", "cpu", "cuda"),
        help="measure here in a second or two and 1 GiB: the current GPU, or this CPU (auto: the CPU with --offload or "
        "where there is no GPU), which with --offload is the host. Others that use the memory make it slower",
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print the plan as JSON, all numbers in full"
    )


def _plan(measure: str | None, as_json: bool, **options) -> str:
    for argument in ("grad_clip", "overshoot", "reset"):
        options[argument] = planner.parse_rules(argument, options[argument])
    if options["state_dtype"] == "none":
        options["state_dtype"] = None
    if measure is not None:
        known, device, key = _what_to_measure(measure, options)
        planner.plan(**options, **known, **{key: 1.0})  # its errors, before anything takes time
        options.update(known, **{key: measure_bandwidth(device)})
    found = planner.plan(**options)
    return json.dumps(found.to_dict(), indent=1) if as_json else found.table()


def _what_to_measure(measure: str, options: dict[str, Any]) -> tuple[dict[str, str], str, str]:
    """Takes out of `options` what the measurement gives: (device to plan for, device to measure, argument it gives)."""
    offload = options["offload"] is not None
    device = measure
    if measure == "auto":
        device = "cuda" if torch.cuda.is_available() and not offload else "cpu"
    key = "host_bandwidth" if offload and device == "cpu" else "bandwidth"
    gives = (key,) if key == "host_bandwidth" else (key, "device")
    for name in gives:
        if (given := options.pop(name)) is not None:
            raise ValueError(f"--measure {device} gives {name}, and so does --{name.replace('_', '-')} {given}")
    if key == "host_bandwidth":
        return {}, device, key
    return {"device": "rocm" if device == "cuda" and torch.version.hip else device}, device, key


if __name__ == "__main__":
    sys.exit(main())
