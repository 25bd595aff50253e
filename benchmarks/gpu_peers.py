"""The candidates on a GPU: ours by backend, torch's and the other packages' by peers.py, losses.

A builder of a step is that of peers.py: parameters whose `.grad` is set and a `Work` -> a callable that does one step.
A builder of a loss: a batch -> a callable that gives (loss, statistics), to be differentiated.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks import peers
from benchmarks.peers import (
    LIGER,
    PACKAGES,
    Params,
    Peer,
    Step,
    Work,
    clip_then,
    from_package,
    ours,
    share_states,
    torch_foreach,
    torch_fused,
    torch_grad_scale,
)
from benchmarks.test_objective import CLIP_HIGH, CLIP_LOW, COMPILED, EAGER, FLOOR_BYTES_PER_TOKEN, ppo_in_torch

CUDA, TRITON = "ours, cuda", "ours, triton"
FUSED, TRICK, FOREACH = "torch fused", "torch fused, grad_scale", "torch foreach"
MASTERS = "torch fused, float32 copies"


def torch_fused_masters(params: Params, work: Work) -> Step:
    """What bfloat16 parameters with float32 moments take with torch: gradients copied to float32, AdamW(fused) on
    float32 copies of the parameters, those copied back. The copies keep what bfloat16 drops, for 8 bytes an element.
    """
    masters: Params = []
    steps: list[Step] = []

    def make() -> None:  # from the parameters of the first step, which may be filled after this builder ran
        masters.extend(torch.nn.Parameter(p.detach().float()) for p in params)
        for p in masters:
            p.grad = torch.empty_like(p)
        steps.append(share_states(torch.optim.AdamW(masters, **work.adamw, fused=True), masters, work).step)

    @torch.no_grad()
    def step() -> None:
        if not steps:
            make()
        torch._foreach_copy_([p.grad for p in masters], [p.grad for p in params])
        steps[0]()
        torch._foreach_copy_(list(params), masters)

    return clip_then(step, params, work)


PEERS = {
    CUDA: Peer(functools.partial(ours, backend="cuda"), "update", "norm, update"),
    TRITON: Peer(functools.partial(ours, backend="triton"), "update", "norm, update"),
    FUSED: Peer(torch_fused, "update", "norm, scale, update", states="param"),
    TRICK: Peer(torch_grad_scale, None, "norm, update writing g", only_with_clip=True, states="param"),
    FOREACH: Peer(torch_foreach, states="param"),  # an array pass for each arithmetic operation
    MASTERS: Peer(torch_fused_masters, states="float32"),
    # Moments of 8 bits are other work; test_step.py has a case of it.
    **{
        name: from_package(package, "cuda")
        for name, package in PACKAGES.items()
        if package.cuda and not package.other_work
    },
}
OURS = {CUDA: "cuda", TRITON: "triton"}

# Reads plus writes of the gradient beyond the update's one read.
EXTRA_GRAD_PASSES = {"update": 0, "norm, update": 1, "norm, update writing g": 2, "norm, scale, update": 3}


def moved_bytes(
    passes: str, elements: int, param: torch.dtype, grad: torch.dtype, state: torch.dtype, moments: int = 2
) -> int:
    """Bytes of a step: p read and written, every moment read and written, g read and what `passes` adds.

    float32: 28 an element for "update", 32 for "norm, update", 36 for "norm, update writing g", 40 for
    "norm, scale, update", as `harness.bytes_per_element`; 8 more with amsgrad's third moment.
    """
    grads = 1 + EXTRA_GRAD_PASSES[passes]
    return elements * (2 * param.itemsize + grads * grad.itemsize + 2 * moments * state.itemsize)


@functools.cache
def unavailable_reason(name: str, device: str, of_loss: bool = False) -> str | None:
    """Why a candidate cannot run on a device, or None. Short: sentences of other packages quote machine paths."""
    if (backend := OURS.get(name)) is not None:
        from fused_clip_adam import backends

        try:
            backends.check_name(backend)
            (backends.choose_objective if of_loss else backends.choose_step)(backend, device)
        except Exception as error:
            return str(error)
        return None
    if name != LIGER and (of_loss or PEERS[name].package is None):
        return None
    if device != "cuda":
        return peers.GPU_ONLY
    if name != LIGER:
        return peers.unavailable_reason(name, device)
    try:
        importlib.import_module(LIGER_MODULE)
    except Exception as error:
        return f"not importable ({type(error).__name__})"
    return None


def fits(name: str, dtype: torch.dtype, state_dtype: torch.dtype | None, max_norm: float | None) -> bool:
    """Whether a candidate does the work of a case at all."""
    if name == MASTERS:
        return dtype != torch.float32 and state_dtype == torch.float32
    return peers.fits(PEERS[name], dtype, state_dtype, max_norm)


# ---------------------------------------------------------------- our rules


def rules() -> dict[str, dict]:
    """Every rule by name: options of FusedClipAdamW; "plain" is what the others are compared with."""
    import fused_clip_adam as fca

    return {
        "plain": {},
        "align": {"overshoot": fca.AlignedMomentum()},
        "align element": {"overshoot": fca.AlignedMomentum(block="element")},
        "cautious": {"overshoot": fca.Cautious()},
        "grams": {"overshoot": fca.Grams()},
        "atan2": {"overshoot": fca.UpdateClamp(2.0, mode="atan2")},  # a first step is AdamW's: atan2(1, 1) = pi/4
        "brake": {"overshoot": fca.MomentumBrake()},
        "lagged clip": {"grad_clip": fca.GlobalNorm(1.0, lag=True)},
        "SPAM": fca.presets.spam(10**6, 0),  # a first step that is AdamW's, to be compared with it
        # Bounds that nothing reaches: the same work, and a first step that can be compared.
        "clip": {"grad_clip": 1e9},
        "per tensor": {"grad_clip": fca.PerTensorNorm(1e9)},
        "ZClip": {"grad_clip": fca.ZClip(max_norm=None)},
        "StableAdamW": {"grad_clip": fca.UpdateRMS()},
        "align tensor": {"overshoot": fca.AlignedMomentum("tensor")},
        "amsgrad": {"amsgrad": True},
    }


def build_rule(params: Params, work: Work, backend: str, options: dict) -> Step:
    """A step under a rule. The brake is told, each time, what an objective clipped: without, it does nothing."""
    import fused_clip_adam as fca

    if not options.get("amsgrad"):
        work = replace(work, states=[moments[:2] for moments in work.states])
    optimizer = fca.FusedClipAdamW(params, backend=backend, **{**work.adamw, **options})
    share_states(optimizer, params, work)
    if not isinstance(options.get("overshoot"), fca.MomentumBrake):
        return optimizer.step
    device = params[0].device
    logp = torch.linspace(-2.0, -0.5, 64, device=device).reshape(4, 16)
    stats = fca.clip_stats(logp, logp.flip(1), torch.ones(4, device=device), backend="reference")

    def step() -> None:
        optimizer.observe(stats)
        optimizer.step()

    return step


# ---------------------------------------------------------------- losses

LIGER_MODULE = "liger_kernel.transformers.grpo_loss"
ENTROPY_COEF = 0.01
CHUNKS = (64, 1024)  # rows that eager torch takes at a time: 39 MB of float32, which an L2 holds, or few launches

Batch = dict[str, torch.Tensor]
Forward = Callable[[], tuple[torch.Tensor, object]]


def gspo_in_torch(logp, old_logp, advantages, mask) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`ppo_in_torch` at each sequence's ratio, a number a row; KL estimates are the tokens' own."""
    weight = mask.to(logp.dtype)
    log_ratio = logp - old_logp
    of_sequence = (log_ratio * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    loss, stats = ppo_in_torch(of_sequence, torch.zeros_like(of_sequence), advantages[:, :1], mask)
    with torch.no_grad():
        stats["kl_k1"] = -(log_ratio * weight).sum()
        stats["kl_k2"] = 0.5 * (log_ratio.square() * weight).sum()
        stats["kl_k3"] = ((log_ratio.exp() - 1 - log_ratio) * weight).sum()
    return loss, stats


def logits_in_torch(logits, tokens, old_logp, advantages, mask, entropy_coef: float):
    """Log-softmax, the token's, the entropy, then `ppo_in_torch`: what a trainer writes and torch.compile fuses.

    `nll_loss` and not `gather`: its backward is a comparison of indices, that of `gather` adds into zeros.
    """
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logp = -torch.nn.functional.nll_loss(log_p.flatten(0, 1), tokens.flatten(), reduction="none").view_as(old_logp)
    entropy = -(log_p.exp() * log_p).sum(-1) if entropy_coef else None
    return _with_bonus(logp, entropy, old_logp, advantages, mask, entropy_coef)


def logits_in_chunks(logits, tokens, old_logp, advantages, mask, entropy_coef: float, rows: int):
    """The same without a compiler, at eager torch's best: `rows` at a time, the gradient over the logits."""
    logp, entropy = _LogpInChunks.apply(logits, tokens, rows, bool(entropy_coef))
    return _with_bonus(logp, entropy, old_logp, advantages, mask, entropy_coef)


def _with_bonus(logp, entropy, old_logp, advantages, mask, entropy_coef: float):
    loss, stats = ppo_in_torch(logp, old_logp, advantages.unsqueeze(1), mask)
    if entropy_coef:
        loss = loss - entropy_coef * (entropy * mask).sum() / stats["tokens"]
    return loss, stats


class _LogpInChunks(torch.autograd.Function):
    """(log-probability of the token, entropy) of every row, with float32 copies of a few rows at a time."""

    @staticmethod
    def forward(ctx, logits, tokens, rows: int, with_entropy: bool):
        logp, entropy = (torch.zeros(tokens.numel(), device=logits.device) for _ in range(2))
        parts = (x.split(rows) for x in (logits.flatten(0, 1), tokens.view(-1, 1), logp, entropy))
        for x, y, logp_part, entropy_part in zip(*parts, strict=True):
            log_p = torch.log_softmax(x, -1, dtype=torch.float32)
            logp_part.copy_(log_p.gather(1, y).squeeze(1))
            if with_entropy:
                entropy_part.copy_(log_p.exp().mul_(log_p).sum(-1).neg_())
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.rows, ctx.with_entropy = rows, with_entropy
        return logp.view_as(tokens), entropy.view_as(tokens)

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        logits, tokens, entropy = ctx.saved_tensors
        grad = logits.detach()
        numbers = (tokens, grad_logp, grad_entropy, entropy)
        parts = (x.split(ctx.rows) for x in (grad.flatten(0, 1), *(x.reshape(-1, 1) for x in numbers)))
        for x, y, g, h, H in zip(*parts, strict=True):
            if ctx.with_entropy:  # -p (g + h (log p + H))
                log_p = torch.log_softmax(x, -1, dtype=torch.float32)
                d = log_p.exp()
                d.mul_(log_p.add_(H).mul_(h).add_(g)).neg_()
            else:
                d = torch.softmax(x, -1, dtype=torch.float32).mul_(-g)
            x.copy_(d.scatter_add_(1, y, g))
        return grad, None, None, None


def build_liger(batch: Batch) -> Forward:
    """Liger's Triton GRPO loss, its gradient over the logits. Statistics: the share of clipped tokens, not compared.

    It takes [B, T + 1, V] and leaves the last position of a sequence out, which the batch masks for everyone.
    """
    triton_grpo_loss = importlib.import_module(LIGER_MODULE).triton_grpo_loss
    tokens, old_logp, mask = (batch[name][:, :-1].contiguous() for name in ("tokens", "old_logp", "mask"))
    mask = None if bool(mask.all()) else mask.float()  # its best: without, it reads none

    def forward() -> tuple[torch.Tensor, object]:
        loss, _ = triton_grpo_loss(
            batch["logits"],
            old_logp,
            None,
            tokens,
            batch["advantages"],
            completion_mask=mask,
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP_LOW,
            eps_high=CLIP_HIGH,
            inplace=True,
            loss_type="bnpo",  # token-mean
            reduce=True,
        )
        return loss, {}

    return forward


@dataclass(frozen=True)
class LossPeer:
    """A builder, and the bytes that it cannot avoid to move for an element; None where no closed count is claimed."""

    build: Callable[[Batch], Forward]
    bytes_each: int | None = None


def loss_peers(kind: str, entropy_coef: float = 0.0, itemsize: int = 4, rows: int = CHUNKS[-1]) -> dict[str, LossPeer]:
    """The candidates of a loss.

    Args:
        kind: "ppo" or "gspo" from log-probabilities, "logits": PPO from logits.
        itemsize: of a logit; it is read, read again and overwritten.
        rows: that eager torch takes at a time from logits, one of `CHUNKS`.
    """
    import fused_clip_adam as fca

    def of(function: Callable, **options) -> Callable[[Batch], Forward]:
        return lambda batch: functools.partial(function, **batch, **options)

    clip = {"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH}
    options = {"objective": (fca.GSPO if kind == "gspo" else fca.PPO)(**clip)}
    if kind == "logits":
        ours_of, moved = fca.policy_loss_from_logits, 3 * itemsize
        options |= {"entropy_coef": entropy_coef, "inplace_backward": True}
        in_torch = functools.partial(logits_in_torch, entropy_coef=entropy_coef)
        eager = functools.partial(logits_in_chunks, entropy_coef=entropy_coef, rows=rows)
    else:
        ours_of, moved = fca.policy_loss, FLOOR_BYTES_PER_TOKEN
        in_torch = eager = {"ppo": ppo_in_torch, "gspo": gspo_in_torch}[kind]
    found = {name: LossPeer(of(ours_of, **options, backend=backend), moved) for name, backend in OURS.items()}
    found[EAGER] = LossPeer(of(eager))
    found[COMPILED] = LossPeer(of(torch.compile(in_torch, dynamic=False)))
    if kind == "logits" and not entropy_coef:  # Liger has no bonus
        found[LIGER] = LossPeer(build_liger, moved)
    return found


def exact_loss(kind: str, batch: Batch, entropy_coef: float = 0.0) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """(loss, statistics, gradient) in float64, by autograd of the plain form."""
    plain = {"ppo": ppo_in_torch, "gspo": gspo_in_torch, "logits": logits_in_torch}[kind]
    batch = {name: x.detach().double() if x.is_floating_point() else x for name, x in batch.items()}
    leaf = batch["logits" if kind == "logits" else "logp"].requires_grad_()
    loss, stats = plain(**batch, **({"entropy_coef": entropy_coef} if kind == "logits" else {}))
    return loss.detach(), stats, torch.autograd.grad(loss, leaf)[0]
