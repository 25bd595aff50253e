"""Losses from logits against autograd of log_softmax in float64; their edges, memory, and in-place backward."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from cases import gpu_targets, test_id
from objective_cases import (
    AGGREGATIONS,
    ESTIMATORS,
    OBJECTIVES,
    make_logits_batch,
    on_device_of,
    plain_loss,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_clip_adam as fca
from fused_clip_adam.backends import native

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())


def with_marks(backend, *more):
    return pytest.param(backend, *more, marks=needs_native if backend == "cpu" else ())


TARGETS = gpu_targets()
EMULATED = tuple(b for b in TARGETS if TARGETS[b] == "cpu")
INTERPRETED = tuple(b for b in EMULATED if b == "triton")  # takes milliseconds a row: a selection of the tests
BACKENDS = ("cpu", "reference", *(b for b in TARGETS if b not in INTERPRETED))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXACT = dict(rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[with_marks(b) for b in BACKENDS])
def backend(request):
    return request.param


on_every_backend = pytest.mark.parametrize("backend", [with_marks(b) for b in (*BACKENDS, *INTERPRETED)])


def on_every_backend_in(*dtypes):
    """Every dtype; bfloat16 alone where Triton is interpreted."""
    pairs = [(b, dtype) for b in BACKENDS for dtype in dtypes] + [(b, torch.bfloat16) for b in INTERPRETED]
    return pytest.mark.parametrize("backend, dtype", [with_marks(*pair) for pair in pairs], ids=test_id)


def few(items, backend):
    """All items, but the second alone where Triton is interpreted."""
    return items[1:2] if backend in INTERPRETED else items


def same_bits(x, y):
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (x, y)))


def evaluate(batch, backend, inplace=False, leaf=True, **options):
    """loss, d loss / d logits, stats; the batch's logits are left alone."""
    moved, options = on_device_of(backend, dict(batch), options)
    logits = moved["logits"].detach().clone().requires_grad_()
    moved["logits"] = logits if leaf else logits * 1
    loss, stats = fca.policy_loss_from_logits(**moved, backend=backend, inplace_backward=inplace, **options)
    loss.backward()
    return loss.detach().cpu(), logits.grad.cpu(), fca.ClipStats(stats.buffer.cpu())


def plain_softmax(logits, tokens, mask, temperature=1.0):
    """(logp, entropy, log_softmax) in float64; masked rows are uniform."""
    z = torch.where(mask.unsqueeze(-1), logits.double(), 0.0) / temperature
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, torch.where(mask, tokens, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    return logp, entropy, log_p


def plain(batch, temperature=1.0, entropy_coef=0.0, **options):
    """Loss and gradient in float64 by autograd; and the size of the terms the gradient of each logit adds up."""
    logits, tokens, mask = batch["logits"].clone().double().requires_grad_(), batch["tokens"], batch["mask"]
    logp, entropy, log_p = plain_softmax(logits, tokens, mask, temperature)
    rest = {n: x if n == "mask" else x.double() for n, x in batch.items() if n not in ("logits", "tokens")}
    loss = plain_loss(
        batch={**rest, "logp": logp}, entropy=entropy if entropy_coef else None, entropy_coef=entropy_coef, **options
    )
    g, h = torch.autograd.grad(loss, (logp, entropy), retain_graph=True, allow_unused=True)
    (grad,) = torch.autograd.grad(loss, logits)
    g, h = (torch.zeros_like(logp) if x is None else x.abs().unsqueeze(-1) for x in (g, h))
    g, h = (x if x.dim() == 3 else x.unsqueeze(-1) for x in (g, h))
    log_p, p = log_p.detach(), log_p.detach().exp()
    one = torch.zeros_like(p).scatter_(-1, torch.where(mask, tokens, 0).unsqueeze(-1), 1.0)
    far = 1 + log_p.abs().masked_fill(p == 0, 0.0) + entropy.detach().unsqueeze(-1)
    return loss.detach(), grad, (g * (one + p) + h * p * far) / temperature


def assert_close_to_plain(batch, backend, inplace=False, **options):
    """Every logit's gradient is right to the rounding of its own terms, so that small probabilities are seen too.

    Of float32 (or float64): z and z - m - log S are rounded, which is absolute in the exponent of p: up to
    max |z| + log V times eps, and the ratio has as much. 4 of each, and 16 for exp, the sums and the products. Then one
    rounding to the logits' type.
    """
    dtype = batch["logits"].dtype
    eps, out = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype)
    loss, grad, stats = evaluate(batch, backend, inplace, **options)
    expected, wanted, terms = plain(batch, **options)
    logits, mask = batch["logits"], batch["mask"]
    reach = (
        torch.where(logits.isfinite() & mask.unsqueeze(-1), logits.double(), 0.0).abs().amax() if mask.any() else 0.0
    )
    parts = 16 + 4 * (reach / options.get("temperature", 1.0) + math.log(logits.shape[-1]))
    assert grad.dtype == dtype and grad.shape == logits.shape
    error = (grad.double() - wanted).abs()
    allowed = parts * eps * terms + out.eps * wanted.abs() + out.tiny * out.eps
    assert (error <= allowed).all(), (error / allowed.clamp(min=1e-300)).max()
    assert not grad[~mask].any() and stats.nonfinite == 0 and stats.tokens == mask.sum()
    assert abs(loss - expected) <= parts * eps * (1 + expected.abs())
    return loss, grad, stats


# ------------------------------------------------------------------------------------------ the equations

OPTIONS = [  # what the loss adds up, at one or another temperature
    dict(objective=OBJECTIVES["dual"]),
    dict(objective=OBJECTIVES["dual"], temperature=0.7, kl_coef=0.1, entropy_coef=0.05),
    dict(objective=OBJECTIVES["gspo"], temperature=1.6, entropy_coef=-0.3, aggregation="sequence-mean"),
]


@on_every_backend_in(*DTYPES)
@pytest.mark.parametrize("vocabulary", (1, 2, 3, 31, 257, 4099))
def test_matches_autograd_of_log_softmax(vocabulary, dtype, backend):
    if backend in EMULATED and vocabulary == 4099 and dtype in (torch.float64, torch.float16):
        pytest.skip("slow there, and nothing that the other dtypes do not show")
    rows, cols = (3, 5) if vocabulary < 4099 and backend not in INTERPRETED else (2, 3)
    for options in OPTIONS if backend not in EMULATED or vocabulary in (3, 257) else OPTIONS[1:2]:
        assert_close_to_plain(make_logits_batch(rows, cols, vocabulary, dtype), backend, **options)


@needs_native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vocabulary", (50257, 151936, 262144))
def test_large_vocabularies(vocabulary, dtype):
    batch = make_logits_batch(1, 3, vocabulary, dtype, seed=vocabulary)
    assert batch["mask"].any()
    for inplace in (False, True):
        assert_close_to_plain(
            batch, "cpu", inplace, objective=fca.PPO(), temperature=0.9, entropy_coef=0.05, kl_coef=0.1
        )


@pytest.mark.parametrize("name", ("vespo", "gmpo", "aspo", "aepo", "cispo both", "kl-cov", "bapo", "dppo-kl"))
def test_other_objectives(name, backend):
    """ASPO and AEPO read the entropy of the logits themselves, detached."""
    batch, options = make_logits_batch(4, 6, 17), dict(temperature=0.8, entropy_coef=0.02, kl_coef=0.1)
    options["objective"] = OBJECTIVES[name]
    given = dict(batch)
    if name in ("aspo", "aepo"):
        given["entropy"] = plain_softmax(batch["logits"], batch["tokens"], batch["mask"], 0.8)[1]
    logits = batch["logits"].clone().requires_grad_()
    logp, bonus, _ = plain_softmax(logits, batch["tokens"], batch["mask"], 0.8)
    rest = {n: x for n, x in given.items() if n not in ("logits", "tokens")}
    expected = plain_loss(
        batch={**rest, "logp": logp}, entropy=bonus, entropy_coef=0.02, objective=OBJECTIVES[name], kl_coef=0.1
    )
    (wanted,) = torch.autograd.grad(expected, logits)
    for case in (batch, given):
        loss, grad, _ = evaluate(case, backend, **options)
        torch.testing.assert_close(loss, expected.detach(), **EXACT)
        torch.testing.assert_close(grad, wanted.nan_to_num(0.0), **EXACT)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_and_estimators(aggregation, backend):
    for i, estimator in enumerate(ESTIMATORS):
        options = dict(aggregation=aggregation, kl_coef=0.2, kl_estimator=estimator, entropy_coef=0.1)
        options["normalizer"] = (0.4, None, 7.0, None)[i] if aggregation != "constant" else 3.0
        assert_close_to_plain(make_logits_batch(3, 4, 7, seed=i), backend, objective=fca.PPO(), **options)


@on_every_backend_in(*DTYPES)
def test_logp_from_logits(dtype, backend):
    batch = make_logits_batch(3, 5, 33, dtype)
    mask = batch["mask"]
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    wide = batch["logits"].detach().clone().double().requires_grad_()
    expected = plain_softmax(wide, batch["tokens"], mask, 0.7)[:2]
    eps, out = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype)
    for use in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        logits, tokens, moved, u = on_device_of(backend, batch["logits"], batch["tokens"], mask, weights)
        logits = logits.clone().requires_grad_()
        got = fca.logp_from_logits(logits, tokens, mask=moved, temperature=0.7, backend=backend)
        for x, y in zip(got, expected):
            assert x.dtype == torch.promote_types(dtype, torch.float32) and x.shape == (3, 5)
            assert not x.cpu()[~mask].any()
            # z up to 3 * 4 / 0.7, log V = 3.5: 64 roundings of what is below 24.
            assert ((x.cpu() - y).abs()[mask] <= 64 * eps * 24 / 16).all()
        # A result that is not used has no gradient, and then is not even a part of the sum.
        total = sum((a * (x * y).sum() for a, x, y in zip(use, got, u) if a))
        wanted = torch.autograd.grad(
            sum((a * (x * y)[mask].sum() for a, x, y in zip(use, expected, weights))), wide, retain_graph=True
        )[0]
        total.backward()
        error = (logits.grad.cpu().double() - wanted).abs()
        assert (error <= 256 * eps + out.eps * wanted.abs() + out.tiny * out.eps).all()
        assert not logits.grad.cpu()[~mask].any()


def test_equals_policy_loss_on_logp_from_logits(backend):
    batch, options = make_logits_batch(3, 5, 12, torch.float32), dict(kl_coef=0.1, objective=OBJECTIVES["dual"])
    loss, grad, stats = evaluate(batch, backend, **options)
    moved = on_device_of(backend, dict(batch))
    logits = moved.pop("logits").clone().requires_grad_()
    logp, _ = fca.logp_from_logits(logits, moved.pop("tokens"), mask=moved["mask"], backend=backend)
    again, again_stats = fca.policy_loss(
        logp, moved.pop("old_logp"), moved.pop("advantages"), **moved, **options, backend=backend
    )
    again.backward()
    assert same_bits(loss, again.detach().cpu()) and same_bits(grad, logits.grad.cpu())
    assert same_bits(stats.buffer, again_stats.buffer.cpu())


def test_without_old_logp_the_ratio_is_one(backend):
    batch = make_logits_batch(3, 5, 12)
    loss, grad, stats = evaluate({**batch, "old_logp": None}, backend, objective=fca.PPO(0.0, 0.0))
    logp = plain_softmax(batch["logits"], batch["tokens"], batch["mask"])[0]
    expected, wanted, _ = evaluate({**batch, "old_logp": logp}, "reference")
    torch.testing.assert_close(grad, wanted, **EXACT)
    assert stats.ratio_min == stats.ratio_max == 1 and stats.kl_k2 == 0
    torch.testing.assert_close(loss, expected, **EXACT)


@pytest.mark.parametrize("temperature", (0.7, 1.0))
@pytest.mark.parametrize("entropy_coef", (0.0, 0.4))
def test_gradcheck(temperature, entropy_coef, backend):
    batch = make_logits_batch(2, 3, 5, seed=4)
    batch["logits"] = batch["logits"].nan_to_num(0.3)  # gradcheck moves every element
    batch = on_device_of(backend, batch)
    options = dict(temperature=temperature, entropy_coef=entropy_coef, kl_coef=0.2, backend=backend)

    def loss(logits):
        return fca.policy_loss_from_logits(**{**batch, "logits": logits}, **options)[0]

    assert torch.autograd.gradcheck(loss, batch["logits"].requires_grad_())


# ------------------------------------------------------------------------------------------ what is not a number


@on_every_backend
def test_logits_of_minus_infinity_have_no_probability(backend):
    """A vocabulary of 40 of which every row forbids a third, but not its token."""
    batch = make_logits_batch(3, 5, 40)
    banned = torch.rand(3, 5, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    banned.scatter_(-1, batch["tokens"].clamp(min=0).unsqueeze(-1), False)
    batch["logits"] = torch.where(banned & batch["mask"].unsqueeze(-1), -math.inf, batch["logits"])
    for options in few(OPTIONS, backend):
        _, grad, _ = assert_close_to_plain(batch, backend, **options)
        assert not grad[banned].any()
    # Nothing but the token is left.
    only = torch.full_like(batch["logits"], -math.inf)
    only.scatter_(-1, batch["tokens"].clamp(min=0).unsqueeze(-1), 2.0)
    _, grad, stats = evaluate({**batch, "logits": only}, backend, entropy_coef=0.3)
    assert not grad.any() and stats.nonfinite == 0


@on_every_backend_in(torch.float64, torch.float32, torch.bfloat16, torch.float16)
def test_broken_rows_count_as_masked(dtype, backend):
    """NaN, +inf, nothing but -inf, a forbidden token: no softmax or no log-ratio, so no part in anything."""
    inf, nan = math.inf, math.nan
    batch = make_logits_batch(4, 6, 9, dtype)
    batch["mask"] = torch.ones(4, 6, dtype=torch.bool)
    fill = make_logits_batch(1, 1, 9 * 24, torch.float32)["logits"].view(4, 6, 9)
    batch.update(logits=fill.to(dtype), tokens=batch["tokens"].clamp(min=0))
    batch.update({n: x.nan_to_num(-0.7) for n, x in batch.items() if x.dim() == 2 and x.is_floating_point()})
    bad = torch.zeros(4, 6, dtype=torch.bool)
    for i, (at, value) in enumerate(((0, nan), (8, nan), (3, inf), (None, -inf), (None, nan), (None, inf))):
        bad[1, i] = bad[3, 5] = True
        batch["logits"][1, i, slice(None) if at is None else at] = value
    batch["logits"][3, 5, batch["tokens"][3, 5]] = -inf
    for options in few(OPTIONS, backend):
        loss, grad, stats = evaluate(batch, backend, **options)
        expected, wanted, counted = evaluate({**batch, "mask": ~bad}, backend, **options)
        assert stats.nonfinite == bad.sum() == 7 and counted.nonfinite == 0
        assert not grad[bad].any() and grad.isfinite().all()
        assert same_bits(loss, expected) and torch.equal(grad, wanted)
        assert torch.equal(stats.buffer[:-1], counted.buffer[:-1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_huge_logits_stay_finite(dtype, backend):
    most = torch.finfo(dtype).max
    rows = [[most, -most, 0.0], [most, most, most], [-most, -most, -most], [0.0, -most, 1e-30], [most, most / 2, 1.0]]
    logits = torch.tensor(rows, dtype=torch.float64).to(dtype).repeat_interleave(3, 0).unsqueeze(0)
    tokens = torch.arange(3).repeat(5).unsqueeze(0)
    batch = dict(logits=logits, tokens=tokens, old_logp=torch.full((1, 15), -1.0), advantages=torch.ones(1, 15))
    for temperature in (0.5, 1.0, 100.0):
        for A in (1.0, -1.0):
            case = {**batch, "advantages": torch.full((1, 15), A)}
            loss, grad, stats = evaluate(case, backend, temperature=temperature, entropy_coef=0.1)
            assert loss.isfinite() and grad.isfinite().all() and stats.buffer.isfinite().all()
            assert stats.tokens + stats.nonfinite == 15 and stats.tokens > 0


@on_every_backend
def test_tokens_outside_of_the_vocabulary(backend):
    batch = make_logits_batch(3, 5, 11)
    assert (batch["tokens"][~batch["mask"]] == -100).all()
    expected = evaluate(batch, backend, entropy_coef=0.1)
    for ignored in few((-1, 11, 2**40, -(2**63)), backend):
        tokens = batch["tokens"].masked_fill(~batch["mask"], ignored)
        for x, y in zip(evaluate({**batch, "tokens": tokens}, backend, entropy_coef=0.1)[:2], expected):
            assert same_bits(x, y)
    row, col = batch["mask"].nonzero()[3].tolist()
    for wrong in few((-1, 11, -100, 2**40), backend):
        batch["tokens"][row, col] = wrong
        case = on_device_of(backend, dict(batch))
        if case["logits"].device.type == "cpu":
            with pytest.raises(ValueError, match=rf"tokens\[{row}, {col}\].*{wrong}"):
                fca.policy_loss_from_logits(**case, backend=backend)
            with pytest.raises(ValueError, match="tokens"):
                fca.logp_from_logits(case["logits"], case["tokens"], mask=case["mask"], backend=backend)
        else:  # nothing is read back: the token has no log-probability
            _, grad, stats = evaluate(batch, backend)
            assert stats.nonfinite == 1 and not grad[row, col].any() and grad.isfinite().all()


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_no_row_left(shape, backend):
    empty = torch.empty(shape)
    batch = dict(logits=torch.empty(*shape, 7), tokens=empty.long(), old_logp=empty, advantages=empty)
    loss, grad, stats = evaluate(batch, backend, entropy_coef=0.1)
    assert loss == 0 and grad.shape == (*shape, 7) and stats.tokens == 0
    masked = make_logits_batch(2, 3, 5)
    masked["mask"] = torch.zeros(2, 3, dtype=torch.bool)
    masked["logits"] = torch.full((2, 3, 5), math.nan)
    for inplace in (False, True):
        loss, grad, stats = evaluate(masked, backend, inplace, entropy_coef=0.1)
        assert loss == 0 and not grad.any() and stats.tokens == stats.nonfinite == 0


# ------------------------------------------------------------------------------------------ layouts


class NewBuffers(TorchDispatchMode):
    """Counts the tensors of at least `bytes` that operators make."""

    def __init__(self, bytes):
        super().__init__()
        self.bytes, self.found = bytes, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in given and storage.nbytes() >= self.bytes:
                self.found.append((str(function), list(x.shape)))
        return out


# The reference is plain operations and makes buffers; Triton's interpreter copies what a kernel gets.
FUSED = tuple(b for b in BACKENDS if b != "reference")


def sliced(batch, extra=1):
    """The batch with its logits as a slice logits[:, :-extra] of a larger tensor, the rest of which is NaN."""
    whole = torch.nn.functional.pad(batch["logits"], (0, 0, 0, extra), value=math.nan)
    return {**batch, "logits": whole[:, :-extra]}, whole


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("backend", [with_marks(b) for b in FUSED])
def test_only_the_gradient_is_allocated(inplace, backend):
    """Nothing as large as the logits comes to life but their gradient, and in place not even that."""
    batch = on_device_of(backend, make_logits_batch(3, 5, 256, torch.float32))
    for view in (batch, sliced(batch)[0]):
        logits = view["logits"].clone() if view is batch else view["logits"]
        logits = logits.detach().requires_grad_()
        size = 3 * 5 * 256 * 4
        options = dict(temperature=0.7, entropy_coef=0.1, kl_coef=0.1, inplace_backward=inplace, backend=backend)
        with NewBuffers(size) as forward:
            loss, _ = fca.policy_loss_from_logits(**{**view, "logits": logits}, **options)
        assert forward.found == []
        with NewBuffers(size) as backward:
            (grad,) = torch.autograd.grad(loss, logits)
        assert len(backward.found) == (0 if inplace else 1), backward.found
        assert (grad.data_ptr() == logits.data_ptr()) == inplace


MEMORY = """
import re, torch, fused_clip_adam as fca
# Not ru_maxrss: a child inherits its parent's.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read()).group(1))
def run(rows, dtype, inplace):
    logits = torch.empty(1, rows, 151936, dtype=dtype).fill_(0.5).requires_grad_()
    tokens, zero = torch.arange(rows).view(1, rows), torch.zeros(1, rows)
    before = peak()
    loss, _ = fca.policy_loss_from_logits(
        logits, tokens, zero - 12, zero + 1, entropy_coef=0.1, inplace_backward=inplace, backend="cpu")
    loss.backward()
    return (peak() - before) / (logits.numel() * logits.element_size())
for dtype in (torch.float32, torch.bfloat16):
    run(2, dtype, True), run(2, dtype, False)  # what is allocated once
# The largest last: the peak never falls.
print(run(96, torch.bfloat16, True), run(192, torch.float32, True), run(256, torch.float32, False))
"""


@needs_native
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory():
    """The logits, and for the out-of-place backward their gradient; [rows] beside them is nothing."""
    paths = [str(pathlib.Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=env, capture_output=True, text=True, check=True)
    narrow, inplace, out_of_place = map(float, done.stdout.split())
    assert narrow < 0.05 and inplace < 0.05 and out_of_place < 1.05, done.stdout
    assert out_of_place > 0.5  # the measurement sees a buffer of that size


@on_every_backend_in(torch.float64, torch.bfloat16)
def test_layouts_give_the_same_bits(dtype, backend):
    for vocabulary in few((1, 13, 260), backend):
        batch = make_logits_batch(3, 5, vocabulary, dtype)
        expected = evaluate(batch, backend, entropy_coef=0.1)
        moved, _ = sliced(batch, 2)
        apart = {
            **batch,
            "logits": torch.nn.functional.pad(batch["logits"], (1, 2))[..., 1:-2],
            "tokens": batch["tokens"].T.contiguous().T,
            "mask": batch["mask"].repeat_interleave(2, 1)[:, ::2],
            "old_logp": batch["old_logp"].T.contiguous().T,
        }
        transposed = {**batch, "logits": batch["logits"].transpose(0, 1).contiguous().transpose(0, 1)}
        for case in few((moved, apart, transposed, {**batch, "tokens": batch["tokens"].int()}), backend):
            for inplace in (False, True):
                case_on, logits = on_device_of(backend, dict(case), case["logits"])
                logits = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=logits.device).copy_(
                    logits
                )
                leaf = logits.requires_grad_()
                options = dict(entropy_coef=0.1, inplace_backward=inplace, backend=backend)
                loss, _ = fca.policy_loss_from_logits(**{**case_on, "logits": leaf}, **options)
                loss.backward()
                assert same_bits(loss.detach().cpu(), expected[0]) and torch.equal(leaf.grad.cpu(), expected[1])


@on_every_backend
def test_a_slice_in_place_leaves_the_rest_alone(backend):
    batch = make_logits_batch(3, 5, 13, torch.float32)
    wanted = evaluate(batch, backend)[1]
    moved, whole = sliced(on_device_of(backend, batch))
    leaf = moved["logits"].detach().requires_grad_()
    fca.policy_loss_from_logits(**{**moved, "logits": leaf}, inplace_backward=True, backend=backend)[0].backward()
    assert torch.equal(whole[:, :-1].cpu(), wanted) and whole[:, -1].isnan().all()


@on_every_backend
def test_packed_equals_padded(backend):
    batch = make_logits_batch(4, 6, 19)
    mask = batch["mask"]
    order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(0))
    packed = {n: x[mask][order] for n, x in batch.items() if n != "mask"}
    packed["sequence_ids"] = torch.arange(4).unsqueeze(1).expand(4, 6)[mask][order]
    for options in few(
        (*OPTIONS, dict(objective=OBJECTIVES["aspo"], aggregation="sequence-sum", entropy_coef=0.1)), backend
    ):
        loss, grad, stats = evaluate(batch, backend, **options)
        for inplace in (False, True):
            got = evaluate(packed, backend, inplace, num_sequences=4, **options)
            torch.testing.assert_close(got[0], loss, **EXACT)
            torch.testing.assert_close(got[1], grad[mask][order], **EXACT)
            torch.testing.assert_close(got[2].buffer, stats.buffer, rtol=2.4e-7, atol=0)


def test_more_rows_than_a_grid_dimension(backend):
    """65,536 rows and more: a GPU's grid has no more in its second and third dimension."""
    rows = 65_543
    logits = torch.randn(1, rows, 3)
    tokens, A = torch.randint(3, (1, rows)), torch.randn(1, rows)
    old_logp = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - 0.05
    batch = dict(
        logits=logits, tokens=tokens, old_logp=old_logp, advantages=A, mask=torch.ones(1, rows, dtype=torch.bool)
    )
    assert_close_to_plain(batch, backend, objective=fca.PPO(), normalizer=1.0, entropy_coef=0.1)


@on_every_backend
@pytest.mark.parametrize("inplace", (False, True))
def test_rows_beyond_two_billion_elements(inplace, backend):
    """Rows a gigaelement apart in memory that is only reserved: 32-bit offsets would wrap."""
    apart, vocabulary = 2**30 + 8, 37
    try:
        memory = torch.empty(
            2 * apart + vocabulary, dtype=torch.bfloat16, device=on_device_of(backend, torch.ones(1)).device
        )
    except RuntimeError:
        pytest.skip("this machine does not reserve 4 GiB")
    batch = make_logits_batch(1, 3, vocabulary, torch.bfloat16)
    batch["mask"] = torch.ones(1, 3, dtype=torch.bool)
    batch = {n: x.nan_to_num(0.4) if x.is_floating_point() else x.clamp(min=0) for n, x in batch.items()}
    batch["logits"] += torch.arange(vocabulary)
    loss, wanted, _ = evaluate(batch, backend, entropy_coef=0.1)
    far = memory.as_strided((1, 3, vocabulary), (3 * apart, apart, 1)).copy_(batch["logits"]).requires_grad_()
    options = dict(entropy_coef=0.1, inplace_backward=inplace, backend=backend)
    got, _ = fca.policy_loss_from_logits(**{**on_device_of(backend, batch), "logits": far}, **options)
    (grad,) = torch.autograd.grad(got, far)
    assert same_bits(got.detach().cpu(), loss) and torch.equal(grad.cpu(), wanted)


# ------------------------------------------------------------------------------------------ in place


@on_every_backend_in(torch.float32, torch.bfloat16, torch.float16)
def test_in_place_gradient_lies_over_the_logits(dtype, backend):
    batch = make_logits_batch(3, 5, 29, dtype)
    for options in few(OPTIONS, backend):
        loss, wanted, stats = evaluate(batch, backend, **options)
        for leaf in (True, False):
            got = evaluate(batch, backend, inplace=True, leaf=leaf, **options)
            assert same_bits(got[0], loss) and torch.equal(got[1], wanted) and same_bits(got[2].buffer, stats.buffer)
    case = on_device_of(backend, dict(batch))
    logits = case["logits"].clone().requires_grad_()
    loss, _ = fca.policy_loss_from_logits(**{**case, "logits": logits}, inplace_backward=True, backend=backend)
    assert same_bits(logits.detach(), case["logits"]), "the forward pass wrote to the logits"
    before = logits._version
    (3.0 * loss).backward()
    assert torch.equal(logits.detach(), logits.grad) and logits._version > before
    out = torch.finfo(dtype)  # the factor comes before the rounding, or after it
    close = dict(rtol=2 * out.eps, atol=4 * out.tiny * out.eps)
    torch.testing.assert_close(logits.grad.cpu(), 3 * evaluate(batch, backend)[1], **close)


def test_without_a_gradient_in_place_writes_nothing(backend):
    batch = on_device_of(backend, make_logits_batch(3, 5, 29, torch.float32))
    before = batch["logits"].clone()
    options = dict(inplace_backward=True, backend=backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss, _ = fca.policy_loss_from_logits(**batch, **options)
            logp, _ = fca.logp_from_logits(batch["logits"], batch["tokens"], mask=batch["mask"], **options)
        assert not loss.requires_grad and not logp.requires_grad
    leaf = batch["logits"].requires_grad_()
    fca.policy_loss_from_logits(**{**batch, "logits": leaf}, **options)
    assert same_bits(batch["logits"].detach(), before)


def test_a_second_backward_raises(backend):
    batch = on_device_of(backend, make_logits_batch(3, 5, 29))
    logits = batch["logits"].requires_grad_()
    for inplace in (False, True):
        loss, _ = fca.policy_loss_from_logits(**batch, inplace_backward=inplace, backend=backend)
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        if not inplace:
            assert same_bits(first, torch.autograd.grad(loss, logits, retain_graph=True)[0])
            continue
        kept = first.clone()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, logits, retain_graph=True)
        assert same_bits(first, kept)


def test_double_backward_raises(backend):
    batch = on_device_of(backend, make_logits_batch(2, 3, 7))
    logits = batch["logits"].requires_grad_()
    factor = torch.tensor(2.0, requires_grad=True, device=logits.device)
    loss, _ = fca.policy_loss_from_logits(**batch, backend=backend)
    (grad,) = torch.autograd.grad(factor * loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|does not require grad"):
        grad.sum().backward()


class Head(torch.nn.Module):
    """A language-model head: hidden states -> logits of the next token."""

    def __init__(self, device):
        super().__init__()
        self.inner, self.out = torch.nn.Linear(6, 8), torch.nn.Linear(8, 23)
        self.double().to(device)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x)))


def test_inside_a_language_model_head(backend):
    """The weights' gradients are those of the plain loss, in place or not; logits sliced for the next token."""
    batch = on_device_of(backend, make_logits_batch(3, 5, 23))
    del batch["logits"]
    x = on_device_of(backend, torch.randn(3, 6, 6, dtype=torch.float64))
    head = Head(x.device)

    def gradients(run):
        head.zero_grad()
        run(head(x)[:, :-1]).backward()
        return [p.grad.clone() for p in head.parameters()]

    def plain(logits):
        logp, entropy, _ = plain_softmax(logits, batch["tokens"], batch["mask"], 0.8)
        inputs = {n: y for n, y in batch.items() if n != "tokens"}
        return plain_loss(fca.PPO(), {**inputs, "logp": logp}, kl_coef=0.1, entropy=entropy, entropy_coef=0.2)

    def fused(logits, inplace):
        options = dict(temperature=0.8, kl_coef=0.1, entropy_coef=0.2, inplace_backward=inplace, backend=backend)
        return fca.policy_loss_from_logits(logits, **batch, **options)[0]

    wanted = gradients(plain)
    for inplace in (False, True):
        for x_, y in zip(gradients(lambda z, i=inplace: fused(z, i)), wanted):
            torch.testing.assert_close(x_, y, **EXACT)


def test_in_place_is_refused_or_right_where_the_logits_are_still_needed(backend):
    """Another node that saved the logits: its gradient is right if it runs first, else autograd says so."""
    batch = on_device_of(backend, make_logits_batch(3, 5, 23))
    batch["logits"] = batch["logits"].nan_to_num(0.3)
    weights = batch["logits"].clone().requires_grad_()
    wanted = evaluate(batch, backend)[1].to(weights.device) + 0.2 * weights.detach()
    for first in (True, False):
        logits = weights * 1.0
        penalty = 0.1 * logits.square().sum() if first else None
        loss, _ = fca.policy_loss_from_logits(**{**batch, "logits": logits}, inplace_backward=True, backend=backend)
        penalty = 0.1 * logits.square().sum() if penalty is None else penalty
        try:
            (grad,) = torch.autograd.grad(loss + penalty, weights)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(grad, wanted, **EXACT)
    # Two losses over the same logits.
    logits = weights * 1.0
    both = sum(
        fca.policy_loss_from_logits(**{**batch, "logits": logits}, inplace_backward=True, backend=backend)[0]
        for _ in range(2)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()


# ------------------------------------------------------------------------------------------ the same bits


@on_every_backend
def test_runs_give_the_same_bits(backend):
    batch = make_logits_batch(3, 5, 700, torch.float32)
    for options in few(OPTIONS, backend):
        for x, y in zip(*(evaluate(batch, backend, **options)[:2] for _ in range(2))):
            assert same_bits(x, y)


@needs_native
@pytest.mark.parametrize("shape", ((2, 3, 70001), (1, 3000, 33), (1, 1, 200003)))
def test_threads_give_the_same_bits(shape):
    """Instruction sets: test_objectives.py, whose digest has logits in it."""
    batch = make_logits_batch(*shape, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = evaluate(batch, "cpu", entropy_coef=0.1)
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            for x, y in zip(evaluate(batch, "cpu", entropy_coef=0.1)[:2], expected):
                assert same_bits(x, y)
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_unchanged(backend):
    batch = on_device_of(backend, make_logits_batch(3, 5, 40, torch.float32))
    before = {n: (x.clone(), x._version) for n, x in batch.items()}
    logits = batch["logits"].detach().requires_grad_()
    fca.policy_loss_from_logits(**{**batch, "logits": logits}, entropy_coef=0.1, backend=backend)[0].backward()
    for n, (copied, version) in before.items():
        assert same_bits(batch[n], copied) and batch[n]._version == version


# ------------------------------------------------------------------------------------------ errors

L, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
X = torch.zeros(2, 3)
ERRORS = [  # what differs from a good call, the exception, what its message names
    (dict(logits=[1.0]), TypeError, "logits"),
    (dict(logits=L.int()), TypeError, "logits"),
    (dict(logits=L.to(torch.complex64)), TypeError, "logits"),
    (dict(logits=L.to_sparse()), TypeError, "logits"),
    (dict(logits=L.to("meta")), ValueError, "logits"),
    (dict(logits=L[0, 0]), ValueError, "logits"),
    (dict(logits=L.unsqueeze(0)), ValueError, "logits"),
    (dict(logits=L[..., :0]), ValueError, "logits"),
    (dict(logits=L[..., ::2]), ValueError, "logits.*stride"),
    (dict(logits=L[:1].expand(2, 3, 5), inplace_backward=True), ValueError, "inplace_backward.*logits"),
    (dict(tokens=None), TypeError, "tokens"),
    (dict(tokens=X), TypeError, "tokens"),
    (dict(tokens=Y[:1]), ValueError, "tokens"),
    (dict(tokens=Y.to("meta")), ValueError, "tokens"),
    (dict(tokens=Y + 5), ValueError, "tokens.*5"),
    (dict(tokens=Y - 1), ValueError, "tokens.*-1"),
    (dict(mask=X[:1]), ValueError, "mask"),
    (dict(mask=True), (TypeError, ValueError), "mask"),
    (dict(temperature=0.0), ValueError, "temperature"),
    (dict(temperature=-1.0), ValueError, "temperature"),
    (dict(temperature=math.nan), ValueError, "temperature"),
    (dict(temperature=math.inf), ValueError, "temperature"),
    (dict(temperature="1"), TypeError, "temperature"),
    (dict(inplace_backward=1), TypeError, "inplace_backward"),
    (dict(backend="gpu"), ValueError, "backend"),
]
LOSS_ERRORS = [
    (dict(old_logp=X[:1]), ValueError, "old_logp"),
    (dict(old_logp=1.0), TypeError, "old_logp"),
    (dict(advantages=torch.zeros(3)), ValueError, "advantages"),
    (dict(entropy_coef=math.nan), ValueError, "entropy_coef"),
    (dict(entropy_coef=math.inf), ValueError, "entropy_coef"),
    (dict(entropy_coef="0"), TypeError, "entropy_coef"),
    (dict(objective="ppo"), TypeError, "objective"),
    (dict(aggregation="mean"), ValueError, "aggregation"),
    (dict(kl_coef=0.1), ValueError, "ref_logp"),
    (dict(ewma_logp=X), ValueError, "ewma_logp"),
    (dict(colour=1), TypeError, "colour"),
]


@pytest.mark.parametrize("change, error, match", ERRORS + LOSS_ERRORS, ids=test_id)
def test_wrong_arguments(change, error, match):
    with pytest.raises(error, match=match):
        fca.policy_loss_from_logits(**{**dict(logits=L, tokens=Y, old_logp=X, advantages=X), **change})


@pytest.mark.parametrize("change, error, match", ERRORS, ids=test_id)
def test_wrong_arguments_of_logp_from_logits(change, error, match):
    with pytest.raises(error, match=match):
        fca.logp_from_logits(**{**dict(logits=L, tokens=Y), **change})
