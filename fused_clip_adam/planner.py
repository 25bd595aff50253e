"""What one optimizer step will need: bytes on every rank and seconds, before there is a model or a machine.

parameters, ranks, dtypes, rules -> elements of a rank -> memory, passes over it -> seconds at a bandwidth

Memory is exact for what it counts. Seconds are bytes over bandwidth: the bytes of `theory.bytes_per_element`, and the
share of the bandwidth that the kernels have been measured to reach.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import torch

from fused_clip_adam.in_backward import refuse_rules_over_all, step_in_backward
from fused_clip_adam.offload import BUCKET_BYTES
from fused_clip_adam.rules import (
    AlignedMomentum,
    Rule,
    as_grad_clip,
    as_overshoot,
    as_reset,
    grad_clip_rules,
    overshoot_rules,
)
from fused_clip_adam.rules import grad_clip as grad_clips
from fused_clip_adam.rules import overshoot as overshoots
from fused_clip_adam.rules import reset as resets
from fused_clip_adam.rules.rule import count, flag, is_number
from fused_clip_adam.theory import bytes_per_element

SHARDINGS = ("none", "zero1", "fsdp")

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SUFFIXES = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}
_MOST_PARAMS = 10**18
_LONGEST_RULE = 1000
_RULES = {
    "grad_clip": (grad_clips.RULES, as_grad_clip),
    "overshoot": (overshoots.RULES, as_overshoot),
    "reset": (resets.RULES, as_reset),
}


class Device(NamedTuple):
    """The backend that "auto" takes there, and the published peak in GB/s; None: there is none."""

    backend: str
    peak: float | None = None


DEVICES = {
    "a100": Device("cuda", 2039.0),  # the makers' data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, MI300X
    "h100": Device("cuda", 3350.0),
    "h200": Device("cuda", 4800.0),
    "b200": Device("cuda", 8000.0),
    "mi300x": Device("triton", 5300.0),
    "cuda": Device("cuda"),
    "rocm": Device("triton"),
    "cpu": Device("cpu"),
}
"""What `device=` accepts: cards with a published bandwidth, and kinds of device, which need `bandwidth=`."""


class Share(NamedTuple):
    """Of the ceiling's bytes/s, what was reached: by the update, and by what a method does before it."""

    update: float
    before: float


# What follows is measured; tests/test_planner.py holds it against the files in benchmarks/results/ that it is from.
# The ceiling is what a copy (GPU) or a stream (CPU) moved in the same run.

# gpu-nvidia-h200/step-*.json: 4,285 GB/s (median) of the published 4,800.
COPY_OF_PEAK = 0.893

_F32, _BF16, _MIXED = ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("bf16", "bf16", "fp32")

# By dtype of parameter, gradient and moments. gpu-nvidia-h200 and cpu-intel-xeon-2c: step-one-tensor, step-bfloat16 and
# step-bfloat16-float32-states (on the CPU: planner-bfloat16), with a clip and without, from whose difference `before`
# is; on the GPU reads alone were faster than a copy, and 1 is taken.
OURS = {
    "cuda": {_F32: Share(0.94, 1.0), _BF16: Share(0.92, 1.0), _MIXED: Share(0.95, 1.0)},
    "triton": {_F32: Share(0.94, 1.0), _BF16: Share(0.85, 1.0), _MIXED: Share(0.93, 1.0)},
    "cpu": {_F32: Share(0.92, 0.36), _BF16: Share(0.62, 0.51), _MIXED: Share(0.72, 0.33)},
}
# The update with amsgrad: step-rules-cuda (where it goes element by element), step-rules-triton, planner-float32.
OURS_AMSGRAD = {"cuda": {_F32: 0.32}, "triton": {_F32: 0.93}, "cpu": {_F32: 0.92}}
# The update with one gate a block, where that takes longer: planner-bfloat16.
OURS_GATED = {"cuda": {}, "triton": {}, "cpu": {_BF16: 0.31, _MIXED: 0.64}}
# By dtype of a score, parameters and moments fp32: scores-64, scores-64-bfloat16; `before` is max_sample_norm.
OURS_SCORES = {"cuda": {}, "triton": {}, "cpu": {"fp32": Share(0.59, 0.38), "bf16": Share(0.53, 0.26)}}
# torch's AdamW(fused), the candidate "torch fused" of the same files; `before` is clip_grad_norm_.
USUAL = {
    "cuda": {_F32: Share(0.81, 0.81), _BF16: Share(0.64, 0.61)},
    "triton": {},
    "cpu": {_F32: Share(0.86, 0.42), _BF16: Share(0.37, 0.22)},
}


# ---------------------------------------------------------------- what a plan says


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in one place, by what they hold."""

    parameters: int = 0
    gradients: int = 0
    scores: int = 0
    exp_avg: int = 0
    exp_avg_sq: int = 0
    max_exp_avg_sq: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Pass:
    """Bytes that a step moves in one go, and how fast.

    Args:
        name: what it does. where: "device", "host" or "link".
        bytes_per_element: of the elements that the rank steps. bytes: of all of them. Reads plus writes.
        ceiling: GB/s (1e9 bytes a second), None: not known.
        share: of the ceiling, what has been measured to be reached; None: not measured.
        stage: passes of one stage overlap; the next begins when all have ended.
    """

    name: str
    where: str
    bytes_per_element: int
    bytes: int
    ceiling: float | None
    share: float | None
    stage: int

    @property
    def seconds(self) -> float | None:
        """At the ceiling."""
        return None if self.ceiling is None else self.bytes / (self.ceiling * 1e9)

    @property
    def expected_seconds(self) -> float | None:
        """At the measured share of it."""
        return None if self.seconds is None or self.share is None else self.seconds / self.share


@dataclass(frozen=True)
class Method:
    """One way to take a step: what it keeps on a rank, and its passes."""

    name: str
    device: Memory
    host: Memory
    passes: tuple[Pass, ...]

    @property
    def bytes_per_element(self) -> int:
        """Through memory; what crosses a link is in its pass only."""
        return sum(each.bytes_per_element for each in self.passes if each.where != "link")

    @property
    def bytes(self) -> int:
        """Through memory, by a step of the rank."""
        return sum(each.bytes for each in self.passes if each.where != "link")

    @property
    def seconds(self) -> float | None:
        """At the ceiling; None where a pass has no known bandwidth."""
        return self._stages("seconds")

    @property
    def expected_seconds(self) -> float | None:
        """At the shares of it that have been measured; None where one has not been."""
        return self._stages("expected_seconds")

    def _stages(self, name: str) -> float | None:
        """The longest pass of each stage, added up."""
        longest: dict[int, float] = {}
        for each in self.passes:
            if (own := getattr(each, name)) is None:
                return None
            longest[each.stage] = max(own, longest.get(each.stage, 0.0))
        return math.fsum(longest.values())

    def to_dict(self) -> dict[str, Any]:
        times = ("bytes_per_element", "bytes", "seconds", "expected_seconds")
        return {
            "name": self.name,
            **{place: {**dataclasses.asdict(own), "total": own.total} for place, own in self._places().items()},
            "passes": [{**dataclasses.asdict(each), **_read(each, times[2:])} for each in self.passes],
            **_read(self, times),
        }

    def _places(self) -> dict[str, Memory]:
        return {"device": self.device, "host": self.host}


@dataclass(frozen=True)
class Plan:
    """What `plan` found, of one rank.

    Args:
        params: elements of the model. gpus: ranks. shards: ranks that a sharded copy is spread over.
        dtype, grad_dtype, state_dtype: "bf16", "fp16" or "fp32", of parameters, gradients (or scores), moments.
        settings: the optimizer's, as text.
        stepped: elements that a rank's step updates.
        ours, usual: this package's step, and AdamW(fused) with `clip_grad_norm_` where ours clips.
        notes: what the numbers assume and what they leave out.
    """

    params: int
    gpus: int
    shards: int
    sharding: str
    dtype: str
    grad_dtype: str
    state_dtype: str
    settings: str
    stepped: int
    ours: Method
    usual: Method
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, text, lists and dicts only; bytes are ints, what is not known is None."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "ours": self.ours.to_dict(), "usual": self.usual.to_dict(), "notes": list(self.notes)}

    def table(self) -> str:
        """Memory, bytes and seconds of a rank as text, ours beside the usual, and the notes."""
        spread = "all on every rank" if self.sharding == "none" else f"{self.sharding} over {self.shards:,} ranks"
        ranks = f"{self.gpus:,} rank{'s' * (self.gpus > 1)}"
        lines = [
            self.settings,
            f"{self.params:,} parameters, {ranks}, {spread}; "
            f"parameters {self.dtype}, gradients {self.grad_dtype}, moments {self.state_dtype}",
            "",
            f"{'memory of a rank':<32}{'ours':>14}{'usual':>14}",
        ]
        for place, own in self.ours._places().items():
            other = self.usual._places()[place]
            if own.total or other.total:
                lines += _memory_lines(place, own, other)
        header = f"{'B/element':>10}{'bytes':>13}{'GB/s':>8}{'at ceiling':>12}{'reached':>9}{'expected':>12}"
        lines += ["", f"{f'step of {self.stepped:,} elements':<44}{header}"]
        for title, method in (("ours", self.ours), (f"usual, {self.usual.name}", self.usual)):
            lines += [f"  {title}", *[_pass_line(each) for each in method.passes]]
            lines.append(
                f"{'    all':<44}{method.bytes_per_element:>10}{_size(method.bytes):>13}{'':>8}"
                f"{_time(method.seconds):>12}{'':>9}{_time(method.expected_seconds):>12}"
            )
        lines += [f"  usual over ours: {self._ratios()}", "", "What these numbers assume and leave out:"]
        return "\n".join([*lines, *[f"  - {note}" for note in self.notes]])

    def _ratios(self) -> str:
        names = {"bytes": "bytes", "seconds": "at ceiling", "expected_seconds": "expected"}
        pairs = {name: (getattr(self.usual, key), getattr(self.ours, key)) for key, name in names.items()}
        return ", ".join(f"{name} {b / a:.2f}" for name, (b, a) in pairs.items() if a and b)


# ---------------------------------------------------------------- planning


def plan(
    params: float | str,
    *,
    gpus: int = 1,
    sharding: str = "none",
    replicas: int | None = None,
    dtype: str | torch.dtype = "fp32",
    grad_dtype: str | torch.dtype | None = None,
    state_dtype: str | torch.dtype | None = None,
    amsgrad: bool = False,
    grad_clip: Any = None,
    overshoot: Any = None,
    reset: Any = None,
    skip_nonfinite: bool = False,
    in_backward: bool = False,
    bucket_bytes: int | None = None,
    previous_norm: bool = False,
    offload: str | None = None,
    largest_tensor: float | str | None = None,
    scores: int | None = None,
    max_sample_norm: float | None = None,
    device: str | None = None,
    bandwidth: float | None = None,
    host_bandwidth: float | None = None,
    link_bandwidth: float | None = None,
) -> Plan:
    """Memory and seconds of a FusedClipAdamW step on one rank, beside those of `clip_grad_norm_` and AdamW(fused).

    settings -> checks -> elements of a rank -> memory -> passes over it -> seconds at a bandwidth

    Args:
        params: elements of the model, a number or a text such as "70B", "494M", "70e9". Under tensor or pipeline
            parallelism: of the part that one of its ranks has.
        gpus: ranks of data parallelism.
        sharding: "none" (every rank has everything, as in DDP), "zero1" (moments and step are sharded), "fsdp"
            (parameters and gradients too).
        replicas: copies of what is sharded, each spread over gpus / replicas ranks (hybrid sharding); None: 1.
        dtype, grad_dtype, state_dtype: "bf16", "fp16", "fp32" or torch's. None for gradients: the parameter's; None for
            moments: the parameter's, as `FusedClipAdamW(state_dtype=None)`. With `scores`, grad_dtype is a score's.
        amsgrad, grad_clip, overshoot, reset, skip_nonfinite: as FusedClipAdamW.
        in_backward: `step_in_backward`, which frees gradients by buckets. bucket_bytes, previous_norm: as there; None:
            its default.
        offload: as FusedClipAdamW.
        largest_tensor: elements, as `params`; of the embedding, as a rule. With `in_backward` or `offload`, whose
            buckets hold whole tensors; None: none is larger than a bucket.
        scores: samples of `step_from_scores`; None: `step()`. max_sample_norm: as there.
        device: a key of `DEVICES`; None: "cuda".
        bandwidth: GB/s (1e9 bytes a second, reads plus writes) that a copy moves on the device, or a stream on a CPU.
            None: the peak of `device`.
        host_bandwidth, link_bandwidth: GB/s of the host, as a stream moves, and of the link to it, one way; both only
            with `offload`.

    Seconds are None where no bandwidth is known; expected seconds also where no share of it has been measured.

    Raises:
        ValueError, TypeError: an argument out of range or of another kind, or arguments that do not go together.
    """
    total = parse_count("params", params)
    shards = _shards(gpus, sharding, replicas)
    own = _dtype("dtype", dtype, _DTYPES)
    step = _Step(
        dtypes=(
            own,
            own if grad_dtype is None else _dtype("grad_dtype", grad_dtype, _DTYPES if scores else (own, "fp32")),
            own if state_dtype is None else _dtype("state_dtype", state_dtype, ("fp32",)),
        ),
        amsgrad=flag("plan", "amsgrad", amsgrad),
        grad_clip=as_grad_clip(grad_clip),
        overshoot=as_overshoot(overshoot),
        reset=as_reset(reset),
        skip_nonfinite=flag("plan", "skip_nonfinite", skip_nonfinite),
        in_backward=flag("plan", "in_backward", in_backward),
        previous_norm=flag("plan", "previous_norm", previous_norm),
        offload=offload,
        scores=None if scores is None else count("plan", "scores", scores),
        max_sample_norm=None if max_sample_norm is None else _positive("max_sample_norm", max_sample_norm),
    )
    step.check(gpus, sharding, bucket_bytes)
    speeds = _Speeds.of(device, bandwidth, host_bandwidth, link_bandwidth, offload)
    largest = _largest(step, total, shards, largest_tensor)

    shard = -(-total // shards)
    held, stepped = (shard if sharding == "fsdp" else total), (total if sharding == "none" else shard)
    made = min(held, _in_bucket(step, bucket_bytes, shards, largest)) if step.in_backward else held
    return Plan(
        params=total,
        gpus=gpus,
        shards=shards,
        sharding=sharding,
        dtype=step.dtypes[0],
        grad_dtype=step.dtypes[1],
        state_dtype=step.dtypes[2],
        settings=step.text(),
        stepped=stepped,
        ours=_ours(step, speeds, held, stepped, made, largest),
        usual=_usual(step, speeds, held, stepped),
        notes=tuple(_notes(step, speeds, sharding, largest_tensor is not None)),
    )


@dataclass(frozen=True)
class _Step:
    """What is asked for, each argument checked by itself. dtypes: of parameter, gradient (or score) and moments."""

    dtypes: tuple[str, str, str]
    amsgrad: bool
    grad_clip: Any
    overshoot: Any
    reset: Any
    skip_nonfinite: bool
    in_backward: bool
    previous_norm: bool
    offload: str | None
    scores: int | None
    max_sample_norm: float | None

    @property
    def widths(self) -> tuple[int, int, int]:
        p, g, s = (_DTYPES[name].itemsize for name in self.dtypes)
        return p, g, s

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        reset = () if self.reset is None else (self.reset,)
        return (*grad_clip_rules(self.grad_clip), *reset, *overshoot_rules(self.overshoot))

    def text(self) -> str:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        return (
            f"FusedClipAdamW, {', '.join(f'{name}={value!r}' for name, value in own.items() if value) or 'no extras'}"
        )

    def check(self, gpus: int, sharding: str, bucket_bytes: int | None) -> None:
        """Raises:
        ValueError: what does not go together.
        """
        if self.offload not in (None, "cpu"):
            raise ValueError(f'offload must be None or "cpu", got {self.offload!r}')
        if self.max_sample_norm is not None and self.scores is None:
            raise ValueError(f"max_sample_norm={self.max_sample_norm!r} goes with scores only, the number of samples")
        if self.scores is not None:
            others = {"in_backward": self.in_backward, "offload": self.offload, "sharding": sharding != "none"}
            if name := next((name for name, given in others.items() if given), ""):
                raise ValueError(f"scores={self.scores!r} does not go with {name}: no gradient is made; leave one out")
        if not self.in_backward:
            for name, value in {"previous_norm": self.previous_norm or None, "bucket_bytes": bucket_bytes}.items():
                if value is not None:
                    raise ValueError(f"{name}={value!r} goes with in_backward=True only")
            return
        if sharding != "fsdp" and gpus > 1:
            raise ValueError(
                f'in_backward=True goes with sharding="fsdp" or gpus=1: DDP and zero1 reduce gradients after they have '
                f"appeared, got sharding={sharding!r} and gpus={gpus!r}"
            )
        refuse_rules_over_all("in_backward=True", grad_clip_rules(self.grad_clip), self.previous_norm)

    def bytes_per_element(self) -> tuple[int, int]:
        """(what is read before the update, the update)."""
        own = dict(amsgrad=self.amsgrad, samples=self.scores)
        update = bytes_per_element(*self.widths, **own)
        clips = grad_clip_rules(self.grad_clip)
        if self.in_backward:  # whose norm is the step before's reads none
            clips = tuple(rule for rule in clips if not rule.needs_total_only)
        together = bytes_per_element(
            *self.widths,
            **own,
            norm=self.skip_nonfinite,
            sample_norms=self.max_sample_norm is not None,
            grad_clip=clips,
            overshoot=self.overshoot,
            reset=self.reset,
        )
        return together - update, update


class _Speeds(NamedTuple):
    """Ceilings in GB/s, None where not known. `of_ceiling`: a copy's share of it, 1 where the ceiling is a copy's."""

    device: str
    ceiling: float | None
    of_ceiling: float
    host: float | None
    link: float | None

    @property
    def backend(self) -> str:
        return DEVICES[self.device].backend

    @classmethod
    def of(cls, device, bandwidth, host_bandwidth, link_bandwidth, offload) -> _Speeds:
        """Raises:
        ValueError: an unknown device, a bandwidth that is no positive number, or one that nothing needs.
        """
        given = {"bandwidth": bandwidth, "host_bandwidth": host_bandwidth, "link_bandwidth": link_bandwidth}
        for name, value in given.items():
            if value is not None:
                _positive(name, value)
                if name != "bandwidth" and offload is None:
                    raise ValueError(f'{name}={value!r} goes with offload="cpu" only')
        if device is not None and device not in DEVICES:
            raise ValueError(f"device={device!r} is unknown; accepted: {', '.join(DEVICES)}")
        if device == "cpu" and offload is not None:
            raise ValueError('device="cpu" is the host: nothing is left to offload; leave one of the two out')
        peak = None if device is None else DEVICES[device].peak
        if device is not None and peak is None and bandwidth is None:
            raise ValueError(f"device={device!r} has no published bandwidth; give bandwidth= in GB/s")
        if bandwidth is not None or peak is None:
            return cls(device or "cuda", bandwidth, 1.0, host_bandwidth, link_bandwidth)
        return cls(device, peak, COPY_OF_PEAK, host_bandwidth, link_bandwidth)


def _shards(gpus: int, sharding: str, replicas: int | None) -> int:
    count("plan", "gpus", gpus)
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r} is unknown; accepted: {', '.join(SHARDINGS)}")
    if replicas is None:
        return 1 if sharding == "none" else gpus
    count("plan", "replicas", replicas)
    if sharding == "none":
        raise ValueError(f'replicas={replicas!r} goes with sharding="zero1" or "fsdp" only: "none" shards nothing')
    if gpus % replicas:
        raise ValueError(f"replicas={replicas!r} must divide gpus={gpus!r}")
    return gpus // replicas


def _largest(step: _Step, params: int, shards: int, largest_tensor: float | str | None) -> int:
    """Elements that a rank has of the largest tensor; 0 where it is not known."""
    if largest_tensor is None:
        return 0
    if not (step.in_backward or step.offload):
        raise ValueError(f"largest_tensor={largest_tensor!r} goes with in_backward=True or offload only")
    largest = parse_count("largest_tensor", largest_tensor)
    if largest > params:
        raise ValueError(f"largest_tensor={largest_tensor!r} has more elements than params, {params:,}")
    return -(-largest // shards)


def _in_bucket(step: _Step, bucket_bytes: int | None, shards: int, largest: int) -> int:
    """Elements whose gradients a rank has at once under `step_in_backward`, at most.

    A bucket is full when whole tensors, also where ranks have parts of them, reach its size, and then used up.
    """
    size = step_in_backward.__kwdefaults__["bucket_bytes"] if bucket_bytes is None else bucket_bytes
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"bucket_bytes must be an int of at least 0, got {bucket_bytes!r}")
    if size < step.widths[1] and not largest:
        raise ValueError(f"bucket_bytes={bucket_bytes!r} keeps one tensor's gradient: give largest_tensor")
    return size // (step.widths[1] * shards) + largest


def _ours(step: _Step, speeds: _Speeds, held: int, stepped: int, made: int, largest: int) -> Method:
    """`held`: elements whose parameters a rank keeps. `made`: whose gradients it has at once."""
    p, g, s = step.widths
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if step.amsgrad else ())), s * stepped)
    made_of = {"gradients": g * made} if step.scores is None else {"scores": g * step.scores * stepped}
    before, update = step.bytes_per_element()
    share = _share_of_ours(step, "cpu" if step.offload else speeds.backend)
    where, ceiling, of_ceiling = "device", speeds.ceiling, speeds.of_ceiling
    if step.offload:
        where, ceiling, of_ceiling = "host", speeds.host, 1.0

    def moves(name: str, size: int, of_share: float | None, stage: int) -> Pass:
        of_share = None if of_share is None else of_share * of_ceiling
        return Pass(name, where, size, size * stepped, ceiling, of_share, stage)

    def copies(name: str, size: int, stage: int) -> Pass:
        return Pass(name, "link", size, size * stepped, speeds.link, 1.0, stage)

    reads = [moves("reads before the update", before, share and share.before, 0)] if before else []
    passes = [*reads, moves("update", update, share and share.update, len(reads))]
    if not step.offload:
        return Method("FusedClipAdamW", Memory(parameters=p * held, **made_of, **moments), Memory(), tuple(passes))
    if before:
        also = (
            p if any("param" in rule.extra_reads for rule in step.all_rules) else 0
        )  # which come again with the update
        passes.insert(0, copies("gradients, parameters down" if also else "gradients down", g + also, 0))
        passes.insert(2, copies("parameters down", p, 1))
    else:
        passes.insert(0, copies("gradients and parameters down", g + p, 0))
    passes.append(copies("parameters up", p, len(reads)))
    staging = _staging(step, min(made, stepped), largest, keeps_gradients=bool(before))
    return Method(
        "FusedClipAdamW", Memory(parameters=p * held, **made_of), Memory(**moments, staging=staging), tuple(passes)
    )


def _staging(step: _Step, elements: int, largest: int, keeps_gradients: bool) -> int:
    """Bytes of pinned memory for the buckets of an offloaded step, of which one has at least a whole tensor."""
    p, g, _ = step.widths
    bucket = max(BUCKET_BYTES // (p + g), largest)
    if keeps_gradients:
        return g * elements + p * min(elements, 3 * bucket)
    return (p + g) * min(elements, 2 * bucket)


def _usual(step: _Step, speeds: _Speeds, held: int, stepped: int) -> Method:
    p, g, s = step.widths
    memory = dict.fromkeys(("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if step.amsgrad else ())), s * stepped)
    share = None if step.amsgrad else USUAL[speeds.backend].get(step.dtypes)
    passes: list[Pass] = []

    def add(name: str, size: int, of_share: float | None) -> None:
        of_share = None if of_share is None else of_share * speeds.of_ceiling
        passes.append(Pass(name, "device", size, size * stepped, speeds.ceiling, of_share, len(passes)))

    if step.scores is not None:
        memory["scores"] = g * step.scores * stepped
        add("contract scores: read them, write g", g * step.scores + p, None)
        g, share = p, None  # what is contracted becomes `.grad`
    clips = step.grad_clip is not None
    if clips:
        add("clip_grad_norm_: read g; read and write g", 3 * g, share and share.before)
    add("AdamW(fused)", bytes_per_element(p, g, s, amsgrad=step.amsgrad), share and share.update)
    name = "clip_grad_norm_ + AdamW(fused)" if clips else "AdamW(fused)"
    return Method(name, Memory(parameters=p * held, gradients=g * held, **memory), Memory(), tuple(passes))


def _share_of_ours(step: _Step, backend: str) -> Share | None:
    p, g, s = step.dtypes
    if step.scores is not None:
        return OURS_SCORES[backend].get(g) if p == s == "fp32" and not step.amsgrad else None
    share = OURS[backend].get(step.dtypes)
    gated = any(isinstance(rule, AlignedMomentum) and isinstance(rule.block, int) for rule in step.all_rules)
    gate = OURS_GATED[backend].get(step.dtypes) if gated else None
    update = OURS_AMSGRAD[backend].get(step.dtypes) if step.amsgrad else gate
    if share is None or (step.amsgrad and (update is None or gate is not None)):
        return None
    return share if update is None else share._replace(update=update)


def _notes(step: _Step, speeds: _Speeds, sharding: str, knows_largest: bool) -> list[str]:
    p, g, s = step.dtypes
    notes = [
        "memory: width times elements, exactly. Not counted: `step` (at most 8 bytes a tensor), `bias_weights` (16 a "
        "tensor, rules that vary a beta), what rules remember, a GPU's tables (some 200 bytes a tensor and 48 for each "
        "4,096 to 16,384 elements); activations, copies in another dtype, weights of a rollout engine.",
    ]
    if sharding != "none":
        notes.append(
            "sharding: every tensor divides evenly (a shard is rounded up); parameters and gradients that are whole "
            "while a layer runs are not counted."
        )
    if sharding == "zero1":
        notes.append(
            "zero1: every rank keeps all parameters and all gradients, and moments of its shard; norms, too, are of it."
        )
    if step.in_backward:
        largest = (
            "that of the largest tensor" if knows_largest else "that of the largest tensor (largest_tensor=), 0 here"
        )
        notes.append(
            f"in backward: at most one bucket of gradients and {largest}; with accumulation all of them. The usual "
            "needs all gradients at once."
        )
    if step.offload:
        largest = "one tensor" if knows_largest else "one tensor (largest_tensor=), none larger here"
        notes.append(
            f"offload: pinned staging, at most, of two buckets of 32 MiB or {largest}; where gradients are read before "
            "the update of all gradients and three buckets' parameters. Copies and the host's passes overlap: each "
            "stage (before the update, update) takes as long as the longest of them. Memory bandwidth that the copies "
            "take from the host is not counted; ranks of one host share it. Not measured on a GPU. The usual stays on "
            "the device."
        )
    if step.scores is not None:
        notes.append("scores: every sample has a weight; one whose weight is 0 is not read.")
    notes.append(_ceiling_note(speeds, step.offload))
    notes.append(
        "reached: by our plain step and global-norm clip and by torch's, in benchmarks/results (an H200; a CPU of 2 "
        "cores); empty where these dtypes or settings were not measured. On that CPU rules with more arithmetic take "
        "up to 1.3 times as long, and thousands of tensors of 1,024 elements several times. "
        "Launches and host work are not counted."
    )
    usual = "usual: the sum of its passes, for any dtypes: 40 bytes an element in fp32 with the clip, 28 without."
    if s != p or (step.scores is None and g != p):
        usual += (
            f" torch has no such step for {p}, {g}, {s} (parameter, gradient, moments); trainers keep copies in fp32, "
            "which is more of both."
        )
    return [*notes, usual, "Communication (all-reduce, reduce-scatter, all-gather) is not modelled."]


def _ceiling_note(speeds: _Speeds, offload: str | None) -> str:
    if speeds.ceiling is None:
        device = "none given, so that the device's passes have no time (bandwidth=, device=)"
    elif speeds.of_ceiling != 1.0:
        device = (
            f"the published peak of {speeds.device}; a copy reached {COPY_OF_PEAK:.0%} of it on an H200, which is part "
            "of what is reached here, also for other cards"
        )
    else:
        device = "as given, what a copy (GPU) or a stream (CPU) moves"
    missing = [name for name, value in (("host", speeds.host), ("link", speeds.link)) if offload and value is None]
    rest = f"; {' and '.join(missing)}: none given ({', '.join(f'{name}_bandwidth=' for name in missing)})"
    return f"ceiling: {device}{rest if missing else ''}."


# ---------------------------------------------------------------- reading what a user wrote


def parse_count(name: str, value: float | str) -> int:
    """A number of parameters: 70000000000, 70e9, "70B", "0.5b", "494M", "1_000".

    Raises:
        ValueError: no positive whole number up to 1e18. TypeError: neither a number nor a text.
    """
    if not (is_number(value) or isinstance(value, str)):
        raise TypeError(f'{name} must be a number or a text such as "70B", got {value!r}')
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]*)?(?:e\+?[0-9]{1,2})?)([kmbt]?)", str(value).strip().lower())
    if match is not None:
        digits, suffix = match.groups()
        exact = Decimal(re.sub("[_,]", "", digits)).scaleb(_SUFFIXES[suffix])
        if exact == exact.to_integral_value() and 1 <= exact <= _MOST_PARAMS:
            return int(exact)
    raise ValueError(f'{name} must be a whole number from 1 to 1e18, such as 70e9, "70B" or "494M", got {value!r}')


def parse_rules(argument: str, text: str) -> Any:
    """What a user wrote for `grad_clip`, `overshoot` or `reset`, as the optimizer takes it; nothing is evaluated.

    "1.0", "align-tensor", "none", "ZClip()", "AlignedMomentum(block=256)", "align, UpdateClamp(1.0)"

    Raises:
        ValueError: no number, name or rule of that argument, a rule that refuses its values, or two that do not go
            together.
    """
    known, as_rule = _RULES[argument]
    kinds = {rule.__name__: rule for rule in known}

    def value_of(node: ast.expr) -> Any:
        if isinstance(node, ast.Tuple):
            return tuple(value_of(each) for each in node.elts)
        if isinstance(node, ast.Name) and node.id in kinds:
            raise ValueError(f"a rule is written with brackets, {node.id}(...)")
        if isinstance(node, ast.Name):
            return node.id  # a short name without its quotes
        if not isinstance(node, ast.Call):
            return _plain(node)
        name = ast.unparse(node.func)
        if name not in kinds:
            raise ValueError(f"{name!r} is no rule of {argument}; accepted: {', '.join(kinds)}")
        if any(each.arg is None for each in node.keywords):
            raise ValueError(f"{ast.unparse(node)} has an argument without a name")
        return kinds[name](*map(_plain, node.args), **{each.arg: _plain(each.value) for each in node.keywords})

    text = text.strip()
    try:
        if text == "none":
            return None
        if len(text) > _LONGEST_RULE:
            raise ValueError(f"longer than {_LONGEST_RULE} characters")
        # A hyphen in a name would read as a minus.
        value = text if re.fullmatch("[a-z]+(-[a-z]+)+", text) else value_of(ast.parse(text, mode="eval").body)
        return as_rule(value)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(
            f"{argument}={text!r} cannot be read; accepted: a number, a name, or rules as Rule(a=1)"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{argument}={text!r}: {error}") from None


def _plain(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)!r} is neither a number, a text, True, False nor None") from None


def _dtype(argument: str, value: Any, accepted: Any) -> str:
    """The short name of a dtype, given by it, by torch's name or as torch's own."""
    text = str(value).removeprefix("torch.")
    name = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(text, text)
    if name not in accepted:
        raise ValueError(f"{argument} must be one of {', '.join(dict.fromkeys(accepted))} here, got {value!r}")
    return name


def _positive(name: str, value: Any) -> float:
    if not is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


# ---------------------------------------------------------------- text


def _read(own: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(own, name) for name in names}


def _memory_lines(place: str, ours: Memory, usual: Memory) -> list[str]:
    names = [field.name for field in dataclasses.fields(Memory)] + ["total"]
    pairs = {name: (getattr(ours, name), getattr(usual, name)) for name in names}
    return [
        f"  {f'{place} {name}':<30}{_size(own):>14}{_size(other):>14}"
        for name, (own, other) in pairs.items()
        if own or other
    ]


def _pass_line(own: Pass) -> str:
    name = own.name if own.where == "device" else f"{own.name} ({own.where})"
    ceiling = "?" if own.ceiling is None else f"{own.ceiling:,.0f}"
    share = "" if own.share is None else f"{own.share:.0%}"
    return (
        f"    {name:<40}{own.bytes_per_element:>10}{_size(own.bytes):>13}{ceiling:>8}{_time(own.seconds):>12}{share:>9}"
        f"{_time(own.expected_seconds):>12}"
    )


def _size(size: int) -> str:
    if size == 0:
        return "-"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power / 10:
            return f"{size / 2**power:,.2f} {unit}"
    return f"{size} B"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.2f} {unit}"
    return f"{seconds * 1e6:.2f} us"
