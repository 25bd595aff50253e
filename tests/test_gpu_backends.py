"""The GPU kernels of the step against the reference, the CPU kernel and themselves, wherever they can run.

On a GPU: backend="cuda" and "triton" on the device. Without one: the CUDA sources under tests/cuda_on_cpu, and Triton's
interpreter, both on CPU tensors (conftest.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    CLASSES,
    RULES,
    SHAPES,
    assert_rounded_once,
    bitwise_equal,
    gpu_targets,
    largest_error,
    make_grads,
    make_params,
    make_stats,
    results,
    run,
    tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_clip_adam as fca
from fused_clip_adam.backends import device_table

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


TARGETS = list(gpu_targets().items())
if not TARGETS:
    pytest.skip("no GPU backend can run here: no GPU, no C++ compiler, no Triton", allow_module_level=True)
on_targets = pytest.mark.parametrize("backend, device", TARGETS)
# Triton's interpreter is slow: test_triton_interpreter.py asks the same of it on smaller tensors.
INTERPRETED = ("triton", "cpu")
on_fast_targets = pytest.mark.parametrize("backend, device", [t for t in TARGETS if t != INTERPRETED])
EMULATED = TARGETS[0][1] == "cpu"


def reference(cls, params, grads, **options):
    return run(cls, [p.double() for p in params], grads, backend="reference", **options)


# ---------------------------------------------------------------- equations


@on_fast_targets
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_matches_float64_reference(backend, device, cls, rule, dtype):
    steps = 4
    params = make_params(dtype)
    grads = make_grads(params, steps)
    got = run(CLASSES[cls][0], params, grads, backend=backend, device=device, **RULES[rule])
    expected = reference(CLASSES[cls][0], params, grads, **RULES[rule])
    assert largest_error(results(*got), results(*expected)) <= tolerance(dtype, steps)
    assert float(got[0].grad_norm) == pytest.approx(float(expected[0].grad_norm), rel=1e-6)


@on_fast_targets
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_is_the_cpu_kernel_to_the_last_bit_or_nearly(backend, device, rule, dtype):
    params = make_params(dtype)
    grads = make_grads(params, 3)
    got = results(*run(fca.FusedClipAdamW, params, grads, backend=backend, device=device, **RULES[rule]))
    expected = results(*run(fca.FusedClipAdamW, params, grads, backend="cpu", **RULES[rule]))
    if (backend, device) == ("cuda", "cpu"):
        assert bitwise_equal(got, expected)
    # 1 - beta^step comes from another pow, and the sums of the norm are taken in another order: float64 scalars differ
    # in their last bits, and once rounded now and then by one unit of float32, so that a stored value may round the
    # other way.
    for x, y in zip(got, expected, strict=True):
        error = (x.double() - y.double()).abs()
        bound = 2 * torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
        assert bool((error <= bound * y.double().abs() + 2**-24 * (x.dtype == torch.float16)).all())


@on_fast_targets
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", (None, torch.float32))
@pytest.mark.parametrize("grad_dtype", (None, torch.float32))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_narrow_storage_is_rounded_once(backend, device, dtype, grad_dtype, state_dtype, rule):
    params = make_params(dtype)
    grads = make_grads(params, 1)[0]

    def one_step(params, **options):
        own = [p.clone().requires_grad_() for p in params]
        for p, g in zip(own, grads):
            p.grad_dtype = None
            p.grad = g.to(p.device, grad_dtype or (p.dtype if p.dtype == dtype else torch.float64))
        opt = fca.FusedClipAdamW(own, lr=0.01, weight_decay=0.1, **options, **RULES[rule])
        opt.observe(make_stats(0, own[0].device))
        opt.step()
        return results(opt, own)

    got = one_step([p.to(device) for p in params], backend=backend, state_dtype=state_dtype)
    expected = one_step([p.double() for p in params], backend="reference")
    assert_rounded_once(got, expected, dtype)


# ---------------------------------------------------------------- layouts


def view_of(x: torch.Tensor, layout: str, shift: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(x laid out as asked, the whole memory it lies in: NaN outside of x)."""
    nan = float("nan")
    if layout == "shifted" or x.ndim < 2:
        memory = torch.full((x.numel() + 16 + shift,), nan, dtype=x.dtype, device=device)
        view = memory[shift : shift + x.numel()].view(x.shape)
    elif layout == "transposed":
        memory = torch.full((x.numel() + 16 + shift,), nan, dtype=x.dtype, device=device)
        view = memory[shift : shift + x.numel()].view(x.shape[::-1]).t()
    else:
        rows, columns = x.shape
        memory = torch.full((rows * 2, columns + 3 + shift), nan, dtype=x.dtype, device=device)
        view = memory[::2, shift : shift + columns]
    view.copy_(x)
    return view, memory


LAYOUTS = ("shifted", "transposed", "strided")


@on_fast_targets
@pytest.mark.parametrize("rule", ("adamw", "clip", "align", "align 7", "align 4096", "cautious", "amsgrad"))
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_any_layout_gives_the_same(backend, device, dtype, param_layout, rule):
    # Every slot at its own distance from a 16-byte boundary, in its own order; what lies around stays NaN.
    generator = torch.Generator().manual_seed(3)
    shapes = [(37, 53), (1031,), (5, 3)]
    values = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    grads = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(3)]
    plain, own = run(fca.FusedClipAdamW, values, grads, backend="cpu", **RULES[rule])
    expected = results(plain, own)

    params, memories = [], []
    for i, x in enumerate(values):
        view, memory = view_of(x, param_layout, i, device)
        params.append(view.requires_grad_())
        memories.append((memory, view, i))
    opt = fca.FusedClipAdamW(params, lr=0.01, weight_decay=0.1, backend=backend, **RULES[rule])
    for step, now in enumerate(grads):
        for i, (p, g) in enumerate(zip(params, now)):
            p.grad = view_of(g, LAYOUTS[(i + step) % 3], (i + step) % 5, device)[0]
        opt.observe(make_stats(step, device))
        opt.step()
    got = results(opt, params)
    for x, y in zip(got, expected, strict=True):
        assert bool(((x.double() - y.double()).abs() <= 2 * torch.finfo(dtype).eps * y.double().abs()).all())
    for memory, view, _ in memories:
        outside = memory.numel() - view.numel()
        assert int(memory.isnan().sum()) == outside, "memory outside of the parameter was written"


@on_fast_targets
@pytest.mark.parametrize("shift", range(9))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_all_slots_shifted_alike_take_the_wide_path_and_agree(backend, device, dtype, shift):
    # The same distance from a 16-byte boundary for all: a scalar head, 16-byte runs, a scalar tail.
    x = torch.randn(3001, dtype=torch.float64).to(dtype)
    g = torch.randn(3001, dtype=torch.float64).to(dtype)
    expected = results(*run(fca.FusedClipAdamW, [x], [[g]], backend="cpu"))
    p = view_of(x, "shifted", shift, device)[0].requires_grad_()
    p.grad = view_of(g, "shifted", shift, device)[0]
    opt = fca.FusedClipAdamW([p], lr=0.01, weight_decay=0.1, backend=backend)
    opt.state[p] = {"step": torch.zeros((), device=device)}
    for name in ("exp_avg", "exp_avg_sq"):
        opt.state[p][name] = view_of(torch.zeros_like(x), "shifted", shift, device)[0]
    opt.observe(make_stats(0, device))
    opt.step()
    for x, y in zip(results(opt, [p]), expected, strict=True):
        assert bool(((x.double() - y.double()).abs() <= 2 * torch.finfo(dtype).eps * y.double().abs()).all())


@on_fast_targets
def test_thousands_of_tiny_tensors(backend, device):
    n = 2000 if device == "cuda" or backend == "cuda" else 200
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(i % 7, generator=generator) for i in range(n)]
    grads = make_grads(params, 2)
    got = run(fca.FusedClipAdamW, params, grads, backend=backend, device=device, grad_clip=0.5)
    expected = reference(fca.FusedClipAdamW, params, grads, grad_clip=0.5)
    # Over all tensors together: one element that cancels has no relative error of its own.
    for slot in range(4):
        x, y = (torch.cat([t.reshape(-1) for t in results(*r)[slot::4]]) for r in (got, expected))
        assert largest_error([x], [y]) <= tolerance(torch.float32, 2)


# ---------------------------------------------------------------- extremes


@on_targets
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ("adamw", "align", "align element", "cautious", "amsgrad"))
def test_extreme_values_as_on_the_cpu(backend, device, dtype, rule):
    info = torch.finfo(dtype)
    # float64: m' / W1 of the largest number overflows or not by the last bit of 1 / W1, which two pows may not share.
    big = info.max / (16 if dtype == torch.float64 else 1)
    special = [0.0, -0.0, 1.0, -1.0, big, -big, info.tiny, info.eps, float("inf"), float("-inf"), float("nan")]
    values = torch.tensor(special, dtype=torch.float64).to(dtype)
    p, g = (x.reshape(-1).contiguous() for x in torch.meshgrid(values, values, indexing="ij"))
    options = dict(observe=False, **RULES[rule])
    got = results(*run(fca.FusedClipAdamW, [p], [[g], [g.flip(0)]], backend=backend, device=device, **options))
    expected = results(*run(fca.FusedClipAdamW, [p], [[g], [g.flip(0)]], backend="cpu", **options))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        finite = y.isfinite()
        assert torch.equal(x[finite].isfinite(), y[finite].isfinite())
        assert torch.equal(x[~finite].nan_to_num(7.0), y[~finite].nan_to_num(7.0))
        error = (x[finite].double() - y[finite].double()).abs()
        # One unit of 0.999^t in float64 is 1e-13 of 1 - 0.999^t; the scalars of the others are rounded after that.
        relative = 1e-12 if dtype == torch.float64 else 2 * info.eps
        assert bool((error <= relative * y[finite].double().abs() + 2 * info.tiny).all())


@on_fast_targets
@settings(max_examples=25 if EMULATED else 100)
@given(data=st.data())
def test_random_problems(backend, device, data):
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32)))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5))
    block = data.draw(st.integers(1, 3000))
    chunk = data.draw(st.sampled_from((256, 4096)))
    options = dict(
        betas=(data.draw(st.floats(0, 0.999)), data.draw(st.floats(0, 0.9999))),
        eps=data.draw(st.sampled_from((1e-8, 1e-3))),
        grad_clip=data.draw(st.sampled_from((None, 1e-3, 1.0, 1e6))),
        overshoot=data.draw(st.sampled_from((None, "align-element", "cautious", fca.AlignedMomentum(block)))),
        maximize=data.draw(st.booleans()),
        amsgrad=data.draw(st.booleans()),
    )
    cls = data.draw(st.sampled_from((fca.FusedClipAdam, fca.FusedClipAdamW)))
    scale = data.draw(st.sampled_from((1e-4, 1.0, 1e4)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    params = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    grads = [[(torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype) for s in shapes]] * 2
    with pytest.MonkeyPatch.context() as patch:  # small tensors cross chunk boundaries too
        patch.setattr(device_table, "_CHUNK_SMALL", chunk)
        got = results(*run(cls, params, grads, backend=backend, device=device, **options))
    expected = results(*run(cls, params, grads, backend="cpu", **options))
    # Kernel against kernel, in the same arithmetic: only the float64 scalars may differ in their last bits. A moment
    # in which a m and b g cancel keeps the absolute error of its terms.
    for x, y in zip(got, expected, strict=True):
        largest = float(y.double().abs().max()) if y.numel() else 0.0
        assert bool(((x.double() - y.double()).abs() <= 16 * torch.finfo(x.dtype).eps * largest).all())


# ---------------------------------------------------------------- signals, skips, groups


@on_targets
@pytest.mark.parametrize("needs_norm", (False, True))
def test_grad_scale_and_found_inf_are_read_on_the_device(backend, device, needs_norm):
    x, g = torch.randn(5000), torch.randn(5000)
    options = dict(grad_clip=0.1) if needs_norm else {}
    plain = fca.FusedClipAdamW([p := x.clone().requires_grad_()], backend="cpu", **options)
    p.grad = g.clone()
    plain.step()
    opt = fca.FusedClipAdamW([q := x.to(device, copy=True).requires_grad_()], backend=backend, **options)
    q.grad = (g * 64).to(device)
    opt.grad_scale, opt.found_inf = torch.tensor(64.0, device=device), torch.tensor(0.0, device=device)
    opt.step()
    assert largest_error([q.detach().cpu()], [p.detach()]) <= tolerance(torch.float32, 1)
    assert float(opt.grad_norm) == pytest.approx(float(g.norm()), rel=1e-6)
    before = [t.clone() for t in results(opt, [q])]
    norm = float(opt.grad_norm)
    opt.found_inf = torch.tensor(1.0, device=device)
    opt.step()
    assert bitwise_equal(before, results(opt, [q])) and int(opt.step_count_skipped) == 1
    assert float(opt.grad_norm) == norm


@on_targets
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_skip_nonfinite_changes_nothing(backend, device, bad):
    params = [torch.randn(5000, device=device).requires_grad_(), torch.randn(3, device=device).requires_grad_()]
    opt = fca.FusedClipAdamW(params, backend=backend, skip_nonfinite=True, overshoot="brake")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = [t.clone() for t in results(opt, params)]
    params[1].grad[2] = bad
    opt.step()
    assert bitwise_equal(before, results(opt, params)) and int(opt.step_count_skipped) == 1
    assert not bool(opt.grad_norm.isfinite())
    params[1].grad[2] = 1.0
    opt.step()
    assert [float(opt.state[p]["step"]) for p in params] == [2.0, 2.0]


@on_targets
def test_groups_dtypes_and_learning_rates_of_one_optimizer(backend, device):
    def build(device, backend):
        generator = torch.Generator().manual_seed(1)
        a, b, c, d = (torch.randn(700, generator=generator).to(device) for _ in range(4))
        params = [a, b.double(), c.bfloat16(), d]
        params = [p.requires_grad_() for p in params]
        lr = torch.tensor(0.03, device=device)
        groups = [
            {"params": params[:2], "lr": lr, "overshoot": "align"},
            {"params": params[2:3], "lr": torch.tensor(0.01, dtype=torch.float64), "grad_clip": None, "amsgrad": True},
            {"params": params[3:], "overshoot": "cautious", "weight_decay": 0.3, "maximize": True},
        ]
        opt = fca.FusedClipAdamW(groups, lr=1e-3, grad_clip=0.7, backend=backend)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            lr.fill_(0.03 / (step + 1))
            opt.step()
        return results(opt, params)

    for x, y in zip(build(device, backend), build("cpu", "cpu"), strict=True):
        assert bool(((x.double() - y.double()).abs() <= 4 * torch.finfo(x.dtype).eps * y.double().abs().max()).all())


@on_targets
def test_lagged_clip_uses_the_previous_norm(backend, device):
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64, device=device))
    opt = fca.FusedClipAdamW([p], betas=(0.0, 0.0), grad_clip=fca.GlobalNorm(1.0, lag=True), backend=backend)
    seen = []
    for scale in (10.0, 3.0, 0.1, 5.0):
        p.grad = torch.full_like(p, scale)
        opt.step()
        seen.append(float(opt.state[p]["exp_avg"][0]))
    assert seen == pytest.approx([10.0, 3.0 / (20 + 1e-6), 0.1 / (6 + 1e-6), 5.0], rel=1e-12)


@on_targets
def test_residual_coast_follows_the_formula(backend, device):
    T, g, betas = 7, 0.25, (0.9, 0.95)
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device))
    opt = fca.FusedClipAdamW([p], lr=1.0, betas=betas, weight_decay=0.0, backend=backend)
    updates = []
    for step in range(T + 4):
        with torch.no_grad():
            p.zero_()
        p.grad = torch.full_like(p, g if step < T else 0.0)
        opt.step()
        updates.append(-float(p.detach()))
    for k in range(1, 5):
        expected = fca.theory.residual_ratio(k, *betas, history=T, eps=1e-8, v_hat=g * g)
        assert updates[T + k - 1] / updates[T - 1] == pytest.approx(expected, rel=1e-12)


@on_targets
def test_runs_are_bitwise_repeatable(backend, device):
    params = make_params(torch.float32)
    grads = make_grads(params, 3)
    for options in (dict(grad_clip=0.5, overshoot="align"), dict(overshoot="align-element")):
        runs = [run(fca.FusedClipAdamW, params, grads, backend=backend, device=device, **options) for _ in range(2)]
        assert bitwise_equal(results(*runs[0]), results(*runs[1]))
        assert torch.equal(runs[0][0]._books.grad_square_sum, runs[1][0]._books.grad_square_sum)


# ---------------------------------------------------------------- what changes between steps


@on_targets
def test_resets_state_dicts_and_torch_checkpoints(backend, device):
    params = make_params(torch.float32)
    grads = make_grads(params, 4)
    own = [p.clone().requires_grad_() for p in params]
    theirs = torch.optim.AdamW(own, lr=0.01, weight_decay=0.1)
    moved = [p.to(device, copy=True).requires_grad_() for p in params]
    ours = fca.FusedClipAdamW(moved, lr=0.01, weight_decay=0.1, backend=backend)

    def both_step(now):
        for p, q, g in zip(own, moved, now):
            p.grad, q.grad = g.clone(), g.to(device)
        theirs.step()
        ours.step()

    both_step(grads[0])
    ours.load_state_dict(theirs.state_dict())  # torch keeps `step` on the host; the kernels want it on the device
    with torch.no_grad():
        for p, q in zip(own, moved):
            q.copy_(p)
    both_step(grads[1])
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch shares what it need not convert
    both_step(grads[2])
    assert largest_error([q.detach().cpu() for q in moved], [p.detach() for p in own]) <= tolerance(torch.float32, 3)
    ours.reset_momentum()
    assert all(float(value.double().abs().sum()) == 0 for q in moved for value in ours.state[q].values())
    theirs = torch.optim.AdamW(own, lr=0.01, weight_decay=0.1)
    both_step(grads[3])
    assert largest_error([q.detach().cpu() for q in moved], [p.detach() for p in own]) <= tolerance(torch.float32, 4)


@on_targets
def test_moved_memory_is_followed(backend, device):
    # What a kept table could hold a stale address of: gradients, parameters, states, groups, a missing gradient.
    def train(device, backend):
        generator = torch.Generator().manual_seed(5)
        params = [torch.randn(300, generator=generator).to(device).requires_grad_() for _ in range(3)]
        extra = torch.randn(77, generator=generator).to(device).requires_grad_()
        opt = fca.FusedClipAdamW(params, lr=0.01, grad_clip=0.5, backend=backend)
        keep = []
        for step in range(7):
            for p in [*params, extra]:
                g = torch.randn(p.shape, generator=generator).to(device)
                keep.append(g)  # so that the next gradient lies elsewhere
                p.grad = g
            if step == 2:
                params[0].data = params[0].data.clone()
            if step == 3:
                own = opt.state[params[1]]
                keep.append(own["exp_avg"])
                own["exp_avg"] = own["exp_avg"].clone()
                own["exp_avg_sq"].data = own["exp_avg_sq"].data.clone()
            if step == 4:
                opt.add_param_group({"params": [extra], "lr": 0.1})
            if step == 5:
                params[2].grad = None
            opt.step()
        return results(opt, [*params, extra])

    assert largest_error(train(device, backend), train("cpu", "cpu")) <= tolerance(torch.float32, 7)


@on_targets
def test_only_what_changed_is_uploaded(backend, device, monkeypatch):
    copies = []
    upload = device_table._upload

    def counting(host, target):
        copies.append(host.numel())
        return upload(host, target)

    monkeypatch.setattr(device_table, "_upload", counting)
    p = torch.randn(100, device=device).requires_grad_()
    p.grad = torch.randn(100, device=device)
    opt = fca.FusedClipAdamW([p], backend=backend)
    opt.step()
    assert len(copies) == 2  # the tables, then the gradients' addresses and the scalars
    opt.step()
    assert len(copies) == 2, "nothing has moved"
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert copies[2:] == [1 + device_table.GROUP_SCALARS]
    old = p.grad
    p.grad = torch.randn(100, device=device)
    opt.step()
    assert copies[3:] == [1 + device_table.GROUP_SCALARS] and old is not p.grad
    p.data = p.data.clone()
    opt.step()
    assert len(copies) == 6


@on_targets
def test_capture_needs_capturable_tables_and_keeps_them(backend, device, monkeypatch):
    # The logic of CUDA-graph capture, played on the host: what a capture may touch, and what it must leave alone.
    p = torch.randn(100, device=device).requires_grad_()
    p.grad = torch.randn(100, device=device)
    opt = fca.FusedClipAdamW([p], backend=backend, capturable=True)
    with monkeypatch.context() as patch:
        patch.setattr(device_table, "_is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="take one"):
            opt.step()
        assert float(p.grad.sum()) == float(p.grad.sum()) and not opt.state[p]
    opt.step()
    placed = opt._kept[p.device]
    placed._spares.append(torch.empty_like(placed.fresh, device="cpu"))
    uploads = []
    monkeypatch.setattr(device_table, "_upload", lambda host, target: uploads.append(1) or target.copy_(host))
    with monkeypatch.context() as patch:
        patch.setattr(device_table, "_is_capturing", lambda device: True)
        opt.step()
        assert device_table._read_by_graphs[-1][0] is placed and not uploads
        while placed._spares:
            opt.step()
        with pytest.raises(RuntimeError, match="captures"):
            opt.step()
    opt.step()
    assert uploads, "after a capture the device's copy may be a graph's: it is always written again"


@on_targets
@pytest.mark.parametrize(
    "options", (dict(grad_clip=0.5), dict(grad_clip=fca.GlobalNorm(0.5, lag=True)), dict(skip_nonfinite=True), {})
)
def test_several_devices_share_one_norm(backend, device, options, monkeypatch):
    # Two devices played on one: every second batch is said to be on another, so that norms, signals and skips have to
    # travel. The parameters lie where they always did.
    from fused_clip_adam import optimizer

    def train(split: bool):
        torch.manual_seed(0)
        params = [torch.randn(300).to(dtype).to(device).requires_grad_() for dtype in (torch.float32, torch.float64)]
        opt = fca.FusedClipAdamW(params, lr=0.01, backend=backend, **options)
        collect = optimizer.collect

        def split_collect(*given, **how):
            batches = collect(*given, **how)
            batches[1].device = torch.device(device, 0) if device == "cpu" else torch.device("cuda")
            assert batches[0].device != batches[1].device
            return batches

        norms = []
        with monkeypatch.context() as patch:
            if split:
                patch.setattr(optimizer, "collect", split_collect)
            for step in range(5):
                for p in params:
                    p.grad = torch.randn(300, dtype=torch.float64).to(p)
                if step == 2:
                    params[1].grad[7] = float("inf") if "skip_nonfinite" in options else 3.0
                opt.found_inf = torch.tensor(float(step == 3), device=device)
                opt.step()
                norms.append(float(opt.grad_norm))
        return results(opt, params), norms, int(opt.step_count_skipped)

    one, two = train(False), train(True)
    assert one[2] == two[2] == 1 + ("skip_nonfinite" in options)
    assert one[1] == pytest.approx(two[1], rel=1e-12)
    assert largest_error(two[0], one[0]) <= tolerance(torch.float64, 5) * 4


# ---------------------------------------------------------------- refusals


@on_targets
def test_refusals_leave_everything_as_it_was(backend, device):
    def check(match, prepare, kind=(RuntimeError, TypeError, ValueError)):
        params = [torch.randn(50, device=device).requires_grad_(), torch.randn(4, 5, device=device).requires_grad_()]
        opt = fca.FusedClipAdamW(params, backend=backend, grad_clip=1.0)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        prepare(opt, params)
        before = [t.clone() for t in results(opt, params)]
        with pytest.raises(kind, match=match):
            opt.step()
        assert bitwise_equal(before, results(opt, params))

    def states(name, value):
        return lambda opt, params: opt.state[params[1]].update({name: value})

    check("shape", states("exp_avg", torch.zeros(3, device=device)))
    check("share memory", states("exp_avg", torch.zeros(1, device=device).expand(4, 5)))
    check(r"int64|float", states("exp_avg_sq", torch.zeros(4, 5, dtype=torch.int64, device=device)))
    check("share memory", lambda opt, params: states("exp_avg", opt.state[params[1]]["exp_avg_sq"])(opt, params))
    check("sparse", lambda opt, params: setattr(params[1], "grad", torch.zeros(4, 5, device=device).to_sparse()))
    check("lr", lambda opt, params: opt.param_groups[0].update(lr=-1.0))
    check("betas", lambda opt, params: opt.param_groups[0].update(betas=(0.9, 1.5)))


def test_a_backend_refuses_tensors_of_another_device():
    backend, device = TARGETS[0]
    other = "meta" if device == "cpu" else "cpu"
    p = torch.nn.Parameter(torch.ones(3, device=other))
    p.grad = torch.ones_like(p)
    with pytest.raises((RuntimeError, ValueError), match=r"meta|cpu"):
        fca.FusedClipAdamW([p], backend=backend).step()


def test_every_shape_is_covered():
    assert len(SHAPES) == 10 and len(RULES) == 35
