"""The step's kernels against the reference in float64, against NumPy bit for bit, and against torch."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import (
    CLASSES,
    RULES,
    SHAPES,
    assert_rounded_once,
    bitwise_equal,
    largest_error,
    make_grads,
    make_params,
    make_stats,
    results,
    run,
    tolerance,
)

import fused_clip_adam as fca
from fused_clip_adam.backends import native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())


@needs_native
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_kernel_matches_float64_reference(cls, rule, dtype):
    steps = 5
    params = make_params(dtype)
    grads = make_grads(params, steps)
    got = run(CLASSES[cls][0], params, grads, backend="cpu", **RULES[rule])
    wide = [p.double() for p in params]
    expected = run(CLASSES[cls][0], wide, grads, backend="reference", **RULES[rule])
    assert largest_error(results(*got), results(*expected)) <= tolerance(dtype, steps)
    # The norm is summed in float64 by both; it is shown in float32.
    assert float(got[0].grad_norm) == pytest.approx(float(expected[0].grad_norm), rel=1e-6)


@needs_native
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", (None, torch.float32))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_storage_is_rounded_once(dtype, state_dtype, rule):
    # One step from the same stored values: the kernel computes in float32 and rounds once on the way out.
    params = make_params(dtype)
    grads = make_grads(params, 1)
    got = run(fca.FusedClipAdamW, params, grads, backend="cpu", state_dtype=state_dtype, **RULES[rule])
    expected = run(fca.FusedClipAdamW, [p.double() for p in params], grads, backend="reference", **RULES[rule])
    assert_rounded_once(results(*got), results(*expected), dtype)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_round_as_torch_does(dtype):
    # beta1 = 0 stores the gradient itself in exp_avg, lr = 0 leaves the parameter as read and written.
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    every = bits.view(dtype) if dtype.itemsize == 2 else torch.randn(65536, dtype=dtype)
    floats = torch.cat([torch.randn(65536) * scale for scale in (1e-8, 6e-5, 1.0, 7e4)])
    floats = torch.cat([floats, torch.tensor([math.inf, -math.inf, math.nan, 65504, 65519.99, 65520, 2**-24, 2**-25])])
    p = torch.nn.Parameter(torch.zeros(floats.shape, dtype=dtype))
    p.grad_dtype = None
    p.grad = floats.clone() if dtype != torch.float64 else floats.double()
    opt = fca.FusedClipAdamW([p], lr=0.0, betas=(0.0, 0.0), weight_decay=0.0, backend="cpu")
    opt.step()
    assert torch.equal(opt.state[p]["exp_avg"].nan_to_num(3.0), floats.to(dtype).nan_to_num(3.0))

    q = torch.nn.Parameter(every.clone())
    q.grad = torch.zeros_like(q)
    fca.FusedClipAdamW([q], lr=0.0, backend="cpu").step()
    same = q.detach().view(torch.uint8) == every.view(torch.uint8)
    assert bool((same.view(-1, dtype.itemsize).all(1) | every.isnan()).all())


def numpy_adamw(p, grads, lr, beta1, beta2, eps, weight_decay):
    """The update of update_math.h in NumPy float32, operation by operation."""
    f = np.float32
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        W1, W2 = 1 - beta1**t, 1 - beta2**t
        m = f(beta1) * m + f(1 - beta1) * g
        v = f(beta2) * v + f(1 - beta2) * g * g
        u = m * f(1 / W1) / (np.sqrt(v) * f(1 / math.sqrt(W2)) + f(eps))
        p = p * f(1 - lr * weight_decay) - f(lr) * u
    return p, m, v


@needs_native
def test_kernel_equals_numpy_float32_bit_for_bit():
    rng = np.random.default_rng(0)
    start = rng.standard_normal(5003, dtype=np.float32)
    grads = [rng.standard_normal(5003, dtype=np.float32) for _ in range(100)]
    p = torch.nn.Parameter(torch.from_numpy(start.copy()))
    opt = fca.FusedClipAdamW([p], lr=1e-2, weight_decay=0.1, backend="cpu")
    for g in grads:
        p.grad = torch.from_numpy(g)
        opt.step()
    expected = numpy_adamw(start, grads, 1e-2, 0.9, 0.999, 1e-8, 0.1)
    got = (p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"])
    for x, y in zip(got, expected):
        np.testing.assert_array_equal(x.numpy(), y)


@needs_native
@pytest.mark.parametrize("cls", CLASSES)
def test_extras_off_is_torch_within_ulps(cls):
    ours, theirs = CLASSES[cls]
    steps = 100
    params = [torch.randn(4099), torch.randn(37, 41)]
    grads = make_grads(params, steps)
    got = run(ours, params, grads, observe=False, backend="cpu")
    own = [p.clone().requires_grad_() for p in params]
    opt = theirs(own, lr=0.01, weight_decay=0.1, foreach=False)
    for now in grads:
        for p, g in zip(own, now):
            p.grad = g.clone()
        opt.step()
    # lr = 0.01 moves a parameter by at most ~0.01 a step; two orders of the same float32 operations differ by about
    # one ulp of the parameter a step, and such errors add like a random walk: sqrt(100) ulps of a value around 4.
    error = max(float((x - y).detach().abs().max()) for x, y in zip(got[1], own))
    assert error <= 10 * torch.finfo(torch.float32).eps * 4


def subprocess_bytes(tmp_path, name: str, environment: dict[str, str], threads: int) -> bytes:
    """A run of every rule in a process of its own; its results as bytes."""
    target = tmp_path / name
    program = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2])); import test_step; "
        "open(sys.argv[1], 'wb').write(test_step.all_bytes())"
    )
    here = os.path.dirname(__file__)
    root = os.path.dirname(here)
    path = os.pathsep.join([here, root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, str(target), str(threads)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path, **environment}, timeout=300)
    return target.read_bytes()


def all_bytes() -> bytes:
    out = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        params = make_params(dtype)
        grads = make_grads(params, 3)
        for rule in RULES.values():
            opt, own = run(fca.FusedClipAdamW, params, grads, backend="cpu", **rule)
            for x in results(opt, own):
                out.append(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
            out.append(opt.grad_norm.numpy().tobytes())
    return b"".join(out)


@needs_native
def test_same_bytes_for_every_instruction_set_and_thread_count(tmp_path):
    expected = subprocess_bytes(tmp_path, "default", {}, 2)
    assert subprocess_bytes(tmp_path, "one thread", {}, 1) == expected
    assert subprocess_bytes(tmp_path, "avx2", {"FUSED_CLIP_ADAM_CPU_ISA": "avx2"}, 2) == expected
    assert subprocess_bytes(tmp_path, "baseline", {"FUSED_CLIP_ADAM_CPU_ISA": "baseline"}, 2) == expected


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("dtype, bound", ((torch.float64, 1e-12), (torch.float32, 1e-5)))
@pytest.mark.parametrize("betas", ((0.9, 0.999), (0.9, 0.95), (0.95, 0.999)))
def test_residual_coast_follows_the_formula(backend, dtype, bound, betas):
    # T steps of a constant gradient (v_hat = g^2), then k of exactly zero; the parameter stays at 0 before each step,
    # so that the update is read off without cancellation.
    T, g, eps, lr = 7, 0.25, 1e-8, 1.0
    p = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    opt = fca.FusedClipAdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=0.0, backend=backend)
    updates = []
    for step in range(T + 6):
        with torch.no_grad():
            p.zero_()
        p.grad = torch.full_like(p, g if step < T else 0.0)
        opt.step()
        updates.append(-float(p.detach()))
    for k in range(1, 7):
        expected = fca.theory.residual_ratio(k, *betas, history=T, eps=eps, v_hat=g * g)
        assert updates[T + k - 1] / updates[T - 1] == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_renormalising_brake_coasts_by_its_own_beta(backend):
    # Full suppression (c = 1) after a long history: R_k = (a / sqrt(beta2))^k, a = beta1 (1 - strength).
    history = 800  # 0.95^800 = 2e-18: long to float64's precision
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rule = fca.MomentumBrake(strength=0.5)
    opt = fca.FusedClipAdamW([p], lr=1.0, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0, overshoot=rule, backend=backend)
    updates = []
    for step in range(history + 3):
        with torch.no_grad():
            p.zero_()
        p.grad = torch.full_like(p, 1.0 if step < history else 0.0)
        if step >= history:
            opt.observe(make_full_suppression())
        opt.step()
        updates.append(-float(p.detach()))
    for k in (1, 2, 3):
        assert updates[history + k - 1] / updates[history - 1] == pytest.approx((0.45 / math.sqrt(0.95)) ** k, rel=1e-9)


def make_full_suppression() -> fca.ClipStats:
    buffer = torch.zeros(14)
    buffer[4] = buffer[5] = 2.0
    return fca.ClipStats(buffer)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_running_bias_weight_is_one_minus_the_product_of_a(backend):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = fca.FusedClipAdamW([p], overshoot=fca.MomentumBrake(0.8, hold_v=0.5), backend=backend)
    product1 = product2 = 1.0
    for step in range(50):
        stats = make_stats(step)
        c = float(stats.suppressed_mass.double() / stats.total_mass.double())
        product1 *= 0.9 * (1 - 0.8 * c)
        product2 *= 1 - 0.001 * (1 - 0.5 * c)
        p.grad = torch.ones_like(p)
        opt.observe(stats)
        opt.step()
        W = opt.state[p]["bias_weights"]
        assert W.tolist() == pytest.approx([1 - product1, 1 - product2], rel=1e-12)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("rule", ("align", "align-element", "cautious", "grams"))
def test_zero_gradient_moves_nothing(backend, rule):
    p = torch.nn.Parameter(torch.randn(3000))
    opt = fca.FusedClipAdamW([p], weight_decay=0.0, overshoot=rule, backend=backend)
    p.grad = torch.randn_like(p)
    opt.step()
    before, momentum = p.detach().clone(), opt.state[p]["exp_avg"].clone()
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(p.detach(), before)
    assert torch.equal(opt.state[p]["exp_avg"], momentum * 0.9)  # what is stored is plain AdamW's


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_block_gate_is_per_logical_block(backend):
    # Two blocks of 4: in the first momentum and gradient agree, in the second they oppose each other.
    p = torch.nn.Parameter(torch.zeros(2, 4, dtype=torch.float64))
    rule = fca.AlignedMomentum(block=4)
    opt = fca.FusedClipAdamW([p], lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0, overshoot=rule, backend=backend)
    p.grad = torch.ones_like(p)
    opt.step()
    with torch.no_grad():
        p.zero_()
    p.grad = torch.tensor([[1.0] * 4, [-1.0] * 4], dtype=torch.float64)
    opt.step()
    # m = 0.5, v = 0.5; agree: d = 0.75, oppose: d = -0.5; W1 = W2 = 0.75; v' = 0.75; u = d / 0.75.
    assert p.detach()[0].tolist() == pytest.approx([-1.0] * 4)
    assert p.detach()[1].tolist() == pytest.approx([2 / 3] * 4)


@needs_native
def test_block_gate_ignores_memory_order():
    # A transposed parameter has the same logical blocks as its contiguous copy.
    x = torch.randn(64, 48)
    a = torch.nn.Parameter(x.clone())
    b = torch.nn.Parameter(x.t().contiguous().t())
    opts = [fca.FusedClipAdamW([p], overshoot=fca.AlignedMomentum(block=16), backend="cpu") for p in (a, b)]
    for _ in range(4):
        g = torch.randn_like(x)
        for p, opt in zip((a, b), opts):
            p.grad = g.clone() if p is a else g.t().contiguous().t()
            opt.step()
    assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("coupled", (False, True))
@pytest.mark.parametrize("amsgrad", (False, True))
@pytest.mark.parametrize("block", (32, 1000, 1024, 4096, 65536))
def test_gates_of_a_long_tensor(block, amsgrad, coupled):
    # Over several chunks of 65536 elements, where the loop finds the gate of the next block while it updates this one.
    # Blocks of zeros, of products that underflow float32, and of huge ones; the last block is cut short.
    n = 3 * 65536 + 2 * block // 3
    sizes = torch.tensor([1.0, 0.0, 1e-30, 1e25, 1e-3])[torch.arange(n) // block % 5]
    start = torch.randn(n)
    grads = [torch.randn(n) * sizes for _ in range(3)]
    gated = {}
    for backend, layout in (("cpu", "contiguous"), ("cpu", "strided"), ("reference", "contiguous")):
        p = torch.nn.Parameter(start.clone() if layout == "contiguous" else start.repeat_interleave(2)[::2])
        cls = fca.FusedClipAdam if coupled else fca.FusedClipAdamW
        rule = fca.AlignedMomentum(block=block)
        opt = cls([p], lr=1e-2, weight_decay=0.1, amsgrad=amsgrad, overshoot=rule, backend=backend)
        opt.grad_scale = torch.tensor(1e-12)  # the factor enlarges what underflowed
        for g in grads:
            p.grad = g * 1e-12
            opt.step()
        gated[backend, layout] = p.detach()
    assert torch.equal(gated["cpu", "contiguous"], gated["cpu", "strided"])  # which looks at no next block
    wrong = (gated["cpu", "contiguous"] - gated["reference", "contiguous"]).abs()
    assert float(wrong.max()) <= tolerance(torch.float32, 3)  # a wrong gate is off by 1e-3


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_exact_and_never_overflows(dtype):
    shapes = [(100_003,), (1,), (17, 5), (0,)]
    grads = [torch.randn(s, dtype=torch.float64).mul(3).to(dtype) for s in shapes]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g
    opt = fca.FusedClipAdamW(params, grad_clip=1e9, backend="cpu")
    opt.step()
    expected = math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.flatten().tolist()))
    # The sum is float64; what is left is the float32 rounding of `grad_norm`.
    assert float(opt.grad_norm) == pytest.approx(expected, rel=2**-24)
    if dtype == torch.float32:
        params[0].grad.fill_(1e25)  # the squares overflow float32, the norm does not
        opt.step()
        assert float(opt.grad_norm) == pytest.approx(1e25 * math.sqrt(100_003), rel=1e-6)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_clip_equals_clip_grad_norm_then_step(backend):
    params = make_params(torch.float64)
    grads = make_grads(params, 4)
    got = run(fca.FusedClipAdamW, params, grads, observe=False, backend=backend, grad_clip=0.5)
    own = [p.clone().requires_grad_() for p in params]
    opt = torch.optim.AdamW(own, lr=0.01, weight_decay=0.1)
    for now in grads:
        for p, g in zip(own, now):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(own, 0.5)
        opt.step()
        # `.grad` of ours is read, never written
    assert largest_error([p.detach() for p in got[1]], [p.detach() for p in own]) <= 1e-14
    assert float(got[0].grad_norm) == pytest.approx(float(norm), rel=1e-6)
    assert bitwise_equal([p.grad for p in got[1]], grads[-1])


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_lagged_clip_uses_the_previous_norm(backend):
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    rule = fca.GlobalNorm(1.0, lag=True)
    opt = fca.FusedClipAdamW([p], betas=(0.0, 0.0), grad_clip=rule, backend=backend)
    seen = []
    for scale in (10.0, 3.0, 0.1, 5.0):
        p.grad = torch.full_like(p, scale)  # norm = 2 scale
        opt.step()
        seen.append(float(opt.state[p]["exp_avg"][0]))
    expected = [10.0, 3.0 / (20 + 1e-6), 0.1 / (6 + 1e-6), 5.0]
    assert seen == pytest.approx(expected, rel=1e-12)


def test_a_group_without_the_rule_is_counted_but_not_scaled():
    a, b = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [a], "grad_clip": fca.GlobalNorm(1.0)}, {"params": [b]}]
    opt = fca.FusedClipAdamW(groups, betas=(0.0, 0.0))
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 4.0)
    opt.step()
    assert float(opt.grad_norm) == pytest.approx(5.0)
    assert float(opt.state[a]["exp_avg"]) == pytest.approx(3.0 / (5 + 1e-6), rel=1e-12)
    assert float(opt.state[b]["exp_avg"]) == 4.0


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_runs_are_bitwise_repeatable(backend):
    params = make_params(torch.float32)
    grads = make_grads(params, 3)
    options = dict(backend=backend, grad_clip=0.5, overshoot="align")
    first = results(*run(fca.FusedClipAdamW, params, grads, **options))
    assert bitwise_equal(first, results(*run(fca.FusedClipAdamW, params, grads, **options)))


def test_bytes_per_element_are_the_published_floors():
    bytes_ = fca.theory.bytes_per_element
    assert (bytes_(), bytes_(norm=True)) == (28, 32)
    assert (bytes_(2, 2, 2), bytes_(2, 2, 4)) == (14, 22)


def test_many_shapes_are_covered():
    assert {math.prod(s) for s in SHAPES.values()} >= {0, 1, 3, 1023, 1024, 1025}


def test_missing_library_says_what_to_do(tmp_path):
    program = (
        "import warnings, torch, fused_clip_adam as fca\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    fca.FusedClipAdamW([p]).step()\n"
        "assert any('compiler' in str(w.message) and 'reference' in str(w.message) for w in seen), seen\n"
        "try:\n"
        "    fca.FusedClipAdamW([p], backend='cpu')\n"
        "except RuntimeError as error:\n"
        "    assert 'compiler' in str(error)\n"
        "else:\n"
        "    raise SystemExit('backend=cpu did not refuse')\n"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "FUSED_CLIP_ADAM_LIBRARY": str(tmp_path / "_C.abi3.so")}
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=300)


def test_isa_choice_is_reported():
    if native.unavailable():
        pytest.skip(native.unavailable())
    assert native.capability() in ("baseline", "avx2", "avx512")
