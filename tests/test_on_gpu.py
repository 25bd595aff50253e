"""What only a GPU can show: no host sync, CUDA graphs, torch.compile, GradScaler, streams, tensors past 2^31; first of
the step, then of the objectives."""

from __future__ import annotations

import pytest
import torch
from cases import bitwise_equal, largest_error, make_stats, results, tolerance
from objective_cases import OBJECTIVES, ONE_OF_EACH, WHOLE_BATCH, make_batch, make_logits_batch, packed, wanted_by

import fused_clip_adam as fca
from fused_clip_adam import backends, offload

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

BACKENDS = [name for name in ("cuda", "triton") if not backends._unavailable(name)]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(1000, 33), (7,), (65537,), (), (0,)]


def make(backend: str, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    return fca.FusedClipAdamW(params, backend=backend, **options), params


def test_both_native_and_triton_run_here(backend):
    assert BACKENDS == ["cuda", "triton"], [backends._unavailable(name) for name in ("cuda", "triton")]


def test_step_never_waits_for_the_device(backend):
    lr = torch.tensor(1e-3, device="cuda")
    opt, _ = make(backend, lr=lr, grad_clip=1.0, overshoot="brake", skip_nonfinite=True)
    opt.add_param_group({"params": [torch.randn(9, device="cuda").requires_grad_()], "overshoot": "align", "lr": 0.1})
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn_like(p)
            opt.param_groups[1]["lr"] = 0.1 / (step + 1)
            lr.mul_(0.9)
            opt.observe(fca.ClipStats(torch.rand(14, device="cuda")))
            opt.grad_scale = torch.full((), 2.0, device="cuda")
            opt.found_inf = torch.zeros((), device="cuda")
            opt.step()
            opt.grad_norm.add(1)
        opt.reset_momentum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(opt.step_count_skipped) == 0


DEVICE_RULES = {
    "per tensor": dict(grad_clip=fca.PerTensorNorm(0.5)),
    "AutoClip": dict(grad_clip=fca.AutoClip(50.0, history=4)),
    "ZClip": dict(grad_clip=fca.ZClip(warmup=2)),
    "AdaGC": dict(grad_clip=fca.AdaGC(start=2)),
    "AGC": dict(grad_clip=fca.AGC()),
    "SPAM": fca.presets.spam(4, 2, 30.0),
    "Stable-SPAM": fca.presets.stable_spam(4, total_steps=20),
    "StableAdamW": fca.presets.stable_adamw(),
    "induced metric": dict(grad_clip=(1.0, fca.InducedMetric())),
    "align tensor": dict(overshoot="align-tensor"),
    "align tensor lagged": dict(overshoot=fca.AlignedMomentum("tensor", lag=True)),
    "cautious rescaled": dict(overshoot=fca.Cautious(rescale=True)),
    "median": dict(overshoot=fca.MedianMomentum(0.1)),
    "when clipped": dict(reset=fca.WhenClipped(0.5)),
}


@pytest.mark.parametrize("name", DEVICE_RULES)
def test_rules_never_wait_for_the_device_and_replay_in_a_graph(backend, name):
    """Statistics advance on the device: replayed they are, to the bit, what eager steps make of them."""

    def train(captured: bool):
        opt, _ = make(backend, capturable=True, **DEVICE_RULES[name])
        plain = {"grad_clip": None, "overshoot": None, "reset": None}
        opt.add_param_group({"params": [torch.ones(9, device="cuda").requires_grad_()], **plain})
        every = [p for group in opt.param_groups for p in group["params"]]
        graph, generator = torch.cuda.CUDAGraph(), torch.Generator("cuda").manual_seed(1)
        for i in range(10):
            for p in every:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad.copy_(torch.randn(p.shape, device="cuda", generator=generator) * (20.0 if i == 7 else 1.0))
            if captured and i == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    opt.step()
            if captured and i >= 3:
                graph.replay()
                continue
            torch.cuda.set_sync_debug_mode("error" if i else "default")
            try:
                opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        kept = [own["tensors"] for _, own in sorted(opt._memory[0].items())]
        return [*results(opt, every), *(own[key].cpu() for own in kept for key in sorted(own))]

    assert bitwise_equal(train(True), train(False))


POLICY_RULES = {
    "plain": {},
    "align, brake, clip": dict(overshoot=("align", fca.MomentumBrake()), grad_clip=1.0),
    "AGC": DEVICE_RULES["AGC"],
    "Stable-SPAM": DEVICE_RULES["Stable-SPAM"],
}


@pytest.mark.parametrize("bound", (None, 0.1))
@pytest.mark.parametrize("name", POLICY_RULES)
def test_policy_step_never_waits_for_the_device_and_replays_in_a_graph(backend, name, bound):
    """From log-probabilities and scores that lie where they were: replayed to the bit of eager steps."""

    def train(captured: bool):
        opt, params = make(backend, capturable=True, **POLICY_RULES[name])
        B, generator = 6, torch.Generator("cuda").manual_seed(1)
        scores = [torch.empty(B, *p.shape, device="cuda") for p in params]
        logp, old_logp, advantages = (torch.empty(B, device="cuda") for _ in range(3))
        mask = torch.ones(B, device="cuda", dtype=torch.bool)
        graph = torch.cuda.CUDAGraph()
        for i in range(8):
            for own in (*scores, logp, old_logp, advantages):
                own.copy_(torch.randn(own.shape, device="cuda", generator=generator))
            mask.fill_(i != 5)  # a step with no sample left changes nothing
            if captured and i == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    opt.step_from_scores(scores, logp, old_logp, advantages, mask=mask, max_sample_norm=bound)
            if captured and i >= 3:
                graph.replay()
                continue
            torch.cuda.set_sync_debug_mode("error" if i else "default")
            try:
                opt.step_from_scores(scores, logp, old_logp, advantages, mask=mask, max_sample_norm=bound)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert int(opt.step_count_skipped) == 1
        return results(opt, params)

    assert bitwise_equal(train(True), train(False))


def test_noise_needs_no_wait_either(backend):
    def run(seed: int):
        opt, params = make(backend)
        generator = torch.Generator("cuda").manual_seed(seed)
        gradients = [torch.ones(3, *p.shape, device="cuda") for p in params]
        options = dict(max_sample_norm=1.0, noise_multiplier=0.5, noise_generator=generator)
        for i in range(2):
            torch.cuda.set_sync_debug_mode("error" if i else "default")
            try:
                opt.step_from_gradients(gradients, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return results(opt, params)

    assert bitwise_equal(run(1), run(1)) and not bitwise_equal(run(1), run(2))


def test_growing_history_is_not_captured(backend):
    opt, _ = make(backend, capturable=True, grad_clip=fca.AutoClip())
    opt.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"AutoClip\(history"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    torch.cuda.synchronize()


def test_three_launches_a_step(backend):
    from torch.profiler import ProfilerActivity, profile

    params = [torch.randn(50, device="cuda").requires_grad_() for _ in range(300)]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = fca.FusedClipAdamW(params, backend=backend, grad_clip=1.0)
    opt.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        opt.step()
        torch.cuda.synchronize()
    on_device = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # Beside kernels: copies, and the step's own range, which the profiler shows there too.
    kernels = [name for name in on_device if not name.startswith(("Mem", "Optimizer.step"))]
    if not kernels:
        pytest.skip("the profiler sees no kernels on this machine")
    assert len(kernels) == 3, kernels


@pytest.mark.parametrize(
    "options", (dict(grad_clip=1.0, overshoot="align"), dict(overshoot="brake", grad_clip=0.5), {})
)
def test_graph_replay_equals_eager(backend, options):
    def train(captured: bool):
        lr = torch.tensor(1e-2, device="cuda")
        opt, params = make(backend, lr=lr, capturable=True, skip_nonfinite=True, **options)
        grads = [p.grad for p in params]
        buffer = torch.zeros(14, device="cuda")
        stats = fca.ClipStats(buffer)

        def step():
            opt.observe(stats)
            opt.step()

        graph = torch.cuda.CUDAGraph()
        generator = torch.Generator("cuda").manual_seed(1)
        for i in range(9):
            lr.fill_(1e-2 / (i + 1))
            buffer.copy_(make_stats(i).buffer)
            for g in grads:
                g.copy_(torch.randn(g.shape, device="cuda", generator=generator))
            if i == 5:
                grads[0].view(-1)[3] = float("nan")  # skipped, inside the graph too
            if i == 7:
                opt.reset_momentum()
            if captured and i == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    step()
            if captured and i >= 3:
                graph.replay()
            else:
                step()
        return [*results(opt, params), opt.grad_norm.cpu(), opt.step_count_skipped.cpu()]

    assert bitwise_equal(train(True), train(False))


def test_a_whole_training_step_is_captured(backend):
    def train(captured: bool):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).cuda()
        opt = fca.FusedClipAdamW(model.parameters(), backend=backend, capturable=True, grad_clip=1.0)
        x = torch.zeros(16, 32, device="cuda")
        generator = torch.Generator("cuda").manual_seed(1)

        def step():
            opt.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            opt.step()

        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        for i in range(8):
            x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
            if i < 3:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    step()
                torch.cuda.current_stream().wait_stream(side)
                continue
            if captured and i == 3:
                opt.zero_grad(set_to_none=True)
                with torch.cuda.graph(graph):
                    step()
            if captured:
                graph.replay()
            else:
                step()
        return results(opt, list(model.parameters()))

    assert largest_error(train(True), train(False)) <= tolerance(torch.float32, 8)


def test_capture_without_capturable_is_refused(backend):
    opt, _ = make(backend)
    opt.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    torch.cuda.synchronize()


def test_compiled_training_step(backend):
    def train(compiled: bool):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 16).cuda()
        opt = fca.FusedClipAdamW(model.parameters(), backend=backend, grad_clip=1.0)
        x = torch.randn(8, 16, device="cuda")

        def step():
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            run()
        return results(opt, list(model.parameters()))

    assert largest_error(train(True), train(False)) <= tolerance(torch.float32, 3)


def trained_with_a_scaler(build):
    """Six steps, one of which overflows: (parameters, scale)."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16).cuda()
    opt = build(model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
    x = torch.randn(8, 16, device="cuda")
    for step in range(6):
        opt.zero_grad()
        loss = model(x).square().mean() * (float("inf") if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    return [p.detach() for p in model.parameters()], scaler.get_scale()


def test_grad_scaler(backend):
    ours, our_scale = trained_with_a_scaler(lambda params: fca.FusedClipAdamW(params, backend=backend))
    theirs, scale = trained_with_a_scaler(lambda params: torch.optim.AdamW(params, fused=True))
    assert our_scale == scale
    assert largest_error(ours, theirs) <= tolerance(torch.float32, 6)


def test_current_stream_is_used(backend):
    opt, params = make(backend, grad_clip=1.0)
    opt.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    expected, own = make(backend, grad_clip=1.0)
    expected.step()
    with torch.cuda.stream(side):
        for p in params:
            torch.cuda._sleep(1_000_000)
            p.grad.mul_(0.5)
        opt.step()
    torch.cuda.current_stream().wait_stream(side)
    for p in own:
        p.grad.mul_(0.5)
    expected.step()
    assert bitwise_equal(results(opt, params), results(expected, own))


def test_a_tensor_past_2_to_the_31_elements(backend):
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 6 * 2 * n:
        pytest.skip("needs 26 GB of free device memory")
    tail = 10_000
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros_like(p)
    p[-tail:], g[-tail:] = torch.randn(tail, device="cuda"), torch.randn(tail, device="cuda")
    p[:tail], g[:tail] = p[-tail:], g[-tail:]
    small = p[-tail:].clone().requires_grad_()
    small.grad = g[-tail:].clone()
    p.requires_grad_()
    p.grad = g
    opts = [fca.FusedClipAdamW([x], backend=backend, grad_clip=0.5) for x in (p, small)]
    for opt in opts:
        opt.step()
    assert float(opts[0].grad_norm) == pytest.approx(2**0.5 * float(opts[1].grad_norm), rel=1e-6)
    p.grad = small.grad = None
    for x in (p, small):
        x.grad = torch.zeros_like(x)
    opts = [fca.FusedClipAdamW([x], backend=backend) for x in (p, small)]
    p.grad[-tail:] = p.grad[:tail] = small.grad[:] = torch.randn(tail, device="cuda")
    with torch.no_grad():
        p[-tail:] = p[:tail] = small
    for opt in opts:
        opt.step()
    assert torch.equal(p[-tail:], small) and torch.equal(p[:tail], small)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_devices_in_one_optimizer(backend):
    def train(devices):
        torch.manual_seed(0)
        params = [torch.randn(1000).to(device).requires_grad_() for device in devices]
        opt = fca.FusedClipAdamW(params, backend=backend, grad_clip=0.5)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(1000).to(p.device)
            opt.step()
        return results(opt, params)

    assert largest_error(train(["cuda:0", "cuda:1"]), train(["cuda:0", "cuda:0"])) <= tolerance(torch.float32, 3)


# ---------------------------------------------------------------- moments and step on the host

OFFLOADED_RULES = {
    "plain": {},
    "clip": dict(grad_clip=1.0),
    "lagged": dict(grad_clip=fca.GlobalNorm(1.0, lag=True), overshoot=("align", "brake")),
    **{name: DEVICE_RULES[name] for name in ("ZClip", "AGC", "Stable-SPAM", "align tensor", "when clipped")},
}


def take_steps(device: str, dtype=torch.float32, steps: int = 4, shapes=SHAPES, **options):
    """(optimizer, parameters) after steps with the same numbers on any device."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    opt = fca.FusedClipAdamW(params, lr=torch.tensor(0.01, device=device), **options)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        opt.observe(make_stats(step, device))
        opt.grad_scale = torch.full((), 2.0, device=device)
        opt.found_inf = torch.full((), float(step == 2), device=device)
        opt.step()
    return opt, params


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", OFFLOADED_RULES)
def test_offloaded_step_is_the_hosts(backend, monkeypatch, name, dtype):
    """To the bit of the step on the CPU, and to a few roundings of the GPU's; several buckets, used in turn."""
    monkeypatch.setattr(offload, "BUCKET_BYTES", 100_000)
    opt, params = take_steps("cuda", dtype, offload="cpu", **OFFLOADED_RULES[name])
    here = results(*take_steps("cpu", dtype, **OFFLOADED_RULES[name]))
    away = results(opt, params)
    assert bitwise_equal(away, here)
    assert {value.device.type for p in params for value in opt.state[p].values()} == {"cpu"}
    assert opt._offloaded.staging_bytes > 0 and all(own.is_pinned() for own in opt._offloaded._buffers.values())
    if name in ("plain", "clip"):
        on_gpu = [p.detach().cpu() for p in take_steps("cuda", dtype, backend=backend, **OFFLOADED_RULES[name])[1]]
        assert largest_error([p.detach().cpu() for p in params], on_gpu) <= tolerance(dtype, 4)


LARGE = [(4096, 1024)] * 10  # ten buckets of 32 MiB


@pytest.mark.parametrize("clip", (None, 1.0))
def test_offloaded_step_waits_for_gradients_and_the_next_kernels_for_it(backend, clip):
    """Gradients are written late on a stream of their own; what follows there sees the step, with no wait of the host;
    gradients' memory is written again at once.
    """

    def of(offloaded: str | None) -> list:
        torch.manual_seed(0)
        params = [torch.randn(s, device="cuda").requires_grad_() for s in LARGE]
        fresh = [torch.randn(s, device="cuda") for s in LARGE]
        opt = fca.FusedClipAdamW(params, lr=0.1, grad_clip=clip, offload=offloaded)
        seen = []
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                for p in params:
                    p.grad = torch.full_like(p, float("nan"))
                torch.cuda._sleep(50_000_000)
                for p, g in zip(params, fresh):
                    p.grad.copy_(g)
                opt.step()
                seen += [p.detach() + 0 for p in reversed(params)]  # the last to go up first
                for p in params:
                    p.grad = None
                again = [torch.full(s, float("nan"), device="cuda") for s in LARGE]
            del again
        torch.cuda.current_stream().wait_stream(side)
        return [x.cpu() for x in seen]

    away, here = of("cpu"), of(None)
    assert largest_error(away, here) <= tolerance(torch.float32, 2)


def test_offloaded_step_takes_no_memory_of_the_device(backend):
    params = [torch.randn(s, device="cuda").requires_grad_() for s in LARGE]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = fca.FusedClipAdamW(params, grad_clip=1.0, offload="cpu")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20
    assert {own.device.type for p in params for own in opt.state[p].values()} == {"cpu"}


def test_offloaded_step_of_odd_layouts(backend):
    def of(device: str, **options) -> list:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
        params = [draw(6, 5).t(), draw(6, 10)[:, ::2], draw(2, 3, 4, 5).to(memory_format=torch.channels_last)]
        params = [p.requires_grad_() for p in params]
        for p, g in zip(params, (draw(6, 5).t(), draw(6).unsqueeze(1).expand(6, 5), draw(2, 3, 4, 5)), strict=True):
            p.grad = g
        opt = fca.FusedClipAdamW(params, lr=0.1, grad_clip=1.0, overshoot="align", **options)
        for _ in range(3):
            opt.step()
        return results(opt, params)

    assert bitwise_equal(of("cuda", offload="cpu"), of("cpu"))


def test_offloaded_step_with_a_grad_scaler(backend):
    ours, our_scale = trained_with_a_scaler(lambda params: fca.FusedClipAdamW(params, offload="cpu"))
    theirs, scale = trained_with_a_scaler(lambda params: torch.optim.AdamW(params, fused=True))
    assert our_scale == scale
    assert largest_error(ours, theirs) <= tolerance(torch.float32, 6)


def test_offloaded_step_is_not_captured(backend):
    p = torch.ones(9, device="cuda").requires_grad_()
    p.grad = torch.ones_like(p)
    opt = fca.FusedClipAdamW([p], offload="cpu")
    opt.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="offload"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    torch.cuda.synchronize()


# ---------------------------------------------------------------- objectives

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def on_device(batch, dtype=None):
    """The batch on the GPU, floating tensors as `dtype`."""
    return {name: x.to("cuda", dtype if x.is_floating_point() else None) for name, x in batch.items()}


def options_of(name):
    """Everything that a loss can add up; GRPOGuard has no KL."""
    kl_coef = 0.0 if isinstance(OBJECTIVES[name], fca.GRPOGuard) else 0.1
    return dict(objective=OBJECTIVES[name], kl_coef=kl_coef, kl_estimator="k3", aggregation="sequence-mean")


def evaluate(batch, **options):
    """loss, d loss / d logp (or / d logits), statistics; `batch` is left alone."""
    batch = dict(batch)
    name = "logits" if "logits" in batch else "logp"
    batch[name] = leaf = batch[name].detach().clone().requires_grad_()
    loss, stats = (fca.policy_loss_from_logits if name == "logits" else fca.policy_loss)(**batch, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, stats.buffer


def assert_near(actual, expected, dtype, rel, flips=0.0, cancelled=0.0):
    """Loss, gradient and statistics within `rel` and one rounding to `dtype`, but for a share of tokens whose ratio is
    next to a bound and falls on its other side. `cancelled`: what may be left of a difference that is exactly 0."""
    (loss, grad, stats), (wanted_loss, wanted, wanted_stats) = actual, expected
    out = torch.finfo(dtype)
    wanted, error = wanted.double(), (grad.double().cpu() - wanted.double()).abs()
    allowed = (rel + out.eps) * wanted.abs() + 0.01 * rel * wanted.abs().max() + out.tiny * out.eps + cancelled
    assert grad.dtype == dtype and (error > allowed).double().mean() <= flips, (error / allowed).max()
    slack = rel + 20 * flips
    torch.testing.assert_close(loss.double().cpu(), wanted_loss.double(), rtol=slack, atol=slack)
    torch.testing.assert_close(stats.cpu(), wanted_stats, rtol=slack, atol=1e-6 + flips * grad.numel())


def assert_is_the_reference(backend, name, dtype):
    batch = wanted_by(OBJECTIVES[name], make_batch(37, 531, dtype))
    exact = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
    expected = evaluate(exact, backend="reference", **options_of(name))
    actual = evaluate(on_device(batch), backend=backend, **options_of(name))
    # Sums of 20,000 terms in another order; in float32 sums of 400 log-ratios come into an exponent.
    rel, flips = (1e-11, 0.0) if dtype == torch.float64 else (1e-3, 1e-3)
    assert_near(actual, expected, dtype, rel, flips)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_the_reference_in_float64(backend, name):
    # What the whole batch decides jumps: an order of tokens, a bound. And each further type costs Triton seconds.
    jumps = isinstance(OBJECTIVES[name], WHOLE_BATCH)
    assert_is_the_reference(backend, name, torch.float64 if jumps else torch.float32)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_objectives_of_other_types_are_the_reference_in_float64(backend, dtype):
    for name in ("dual and cap", "gspo", "vespo"):
        assert_is_the_reference(backend, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_from_logits_is_the_reference_in_float64(backend, dtype):
    for vocabulary in (1, 31, 5003, 50257):  # odd rows: no two begin at the same distance from 16 bytes
        batch = make_logits_batch(5, 11, vocabulary, dtype)
        exact = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
        options = dict(temperature=0.8, entropy_coef=0.05, kl_coef=0.1, objective=OBJECTIVES["dual"])
        expected = evaluate(exact, backend="reference", **options)
        for inplace in (False, True):
            actual = evaluate(on_device(batch), backend=backend, inplace_backward=inplace, **options)
            # V = 1: g (1 - p) is 0, and p is 1 but for the roundings of two powers of 2.
            arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
            cancelled = 8 * torch.finfo(arithmetic).eps * float(vocabulary == 1)
            assert_near(actual, expected, dtype, 1e-11 if dtype == torch.float64 else 2e-4, cancelled=cancelled)


def test_objectives_give_the_same_bits_every_time(backend):
    tokens = on_device(make_batch(300, 700, torch.float32))
    logits = on_device(make_logits_batch(4, 30, 5003, torch.bfloat16))
    for name in ONE_OF_EACH:
        batch = wanted_by(OBJECTIVES[name], tokens)
        first, second = (evaluate(batch, backend=backend, **options_of(name)) for _ in range(2))
        assert bitwise_equal(first, second), name
    first, second = (evaluate(logits, backend=backend, entropy_coef=0.1) for _ in range(2))
    assert bitwise_equal(first, second)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_objectives_never_wait_for_the_device(backend, name):
    batch = wanted_by(OBJECTIVES[name], on_device(make_batch(6, 40, torch.float32)))
    flat = wanted_by(OBJECTIVES[name], on_device(packed(make_batch(6, 40, torch.float32))))
    tokens = torch.full((), 100.0, device="cuda")
    options = dict(backend=backend, normalizer=tokens, **options_of(name))
    for sync in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(sync)
        try:
            for each in (batch, {**flat, "num_sequences": 6}, flat):
                evaluate(each, **options)
                fca.dloss_dlogp(**each, **options)
                fca.clip_stats(**each, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_from_logits_to_parameters_never_waits_for_the_device(backend):
    """Loss, backward, what was clipped to the optimizer, step."""
    batch = on_device(make_logits_batch(3, 40, 300, torch.bfloat16))
    weight = torch.randn(300, 300, device="cuda", dtype=torch.bfloat16).requires_grad_()
    opt = fca.FusedClipAdamW([weight], backend=backend, overshoot="brake", grad_clip=1.0)
    tokens = batch["mask"].sum().float()
    options = dict(entropy_coef=0.01, inplace_backward=True, normalizer=tokens, backend=backend)
    inputs = batch.pop("logits").nan_to_num(0.0)
    before = weight.detach().clone()
    for sync in ("default", "error"):
        torch.cuda.set_sync_debug_mode(sync)
        try:
            opt.zero_grad()
            loss, stats = fca.policy_loss_from_logits(inputs @ weight, **batch, **options)
            loss.backward()
            opt.observe(stats)
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(stats.nonfinite) == 0 and float(stats.tokens) == float(tokens)
    assert weight.isfinite().all() and not torch.equal(weight, before)


def capture(run):
    """(graph, what `run` returned in it): warmed up on a stream of its own, as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


GRAPHED = ("dual and cap", "gspo", "gmpo", "vespo", "cispo both", "bapo", "dcpo")


@pytest.mark.parametrize("name", GRAPHED)
@pytest.mark.parametrize("layout", ("rows", "packed"))
def test_graph_replay_of_a_loss_reads_its_inputs_anew(backend, layout, name):
    def inputs(seed):
        batch = make_batch(9, 70, torch.float32, seed)
        batch["mask"] = make_batch(9, 70, torch.float32, 0)["mask"]  # packed input keeps its size
        batch = {n: x.nan_to_num(0.3) if x.is_floating_point() else x for n, x in batch.items()}
        batch = on_device(wanted_by(OBJECTIVES[name], packed(batch) if layout == "packed" else batch))
        return batch, torch.tensor(50.0 + seed, device="cuda")

    static, normalizer = inputs(0)
    options = dict(backend=backend, normalizer=normalizer, **options_of(name))
    if layout == "packed":
        options["num_sequences"] = 9
    graph, outputs = capture(lambda: evaluate(static, **options))
    for seed in (1, 2, 3):
        batch, count = inputs(seed)
        normalizer.copy_(count)
        for n, x in static.items():
            x.copy_(batch[n])
        graph.replay()
        assert bitwise_equal(outputs, evaluate(batch, **options)), seed


@pytest.mark.parametrize("inplace", (False, True))
def test_graph_replay_of_a_loss_from_logits_reads_its_inputs_anew(backend, inplace):
    def inputs(seed):
        batch = on_device(make_logits_batch(3, 21, 1003, torch.bfloat16, seed))
        return batch, torch.tensor(20.0 + seed, device="cuda")

    static, normalizer = inputs(0)
    leaf = static["logits"].requires_grad_()
    options = dict(backend=backend, normalizer=normalizer, temperature=0.9, entropy_coef=0.1, kl_coef=0.1)

    def run():
        loss, stats = fca.policy_loss_from_logits(**static, inplace_backward=inplace, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaf), stats.buffer

    graph, outputs = capture(run)
    assert (outputs[1].data_ptr() == leaf.data_ptr()) == inplace
    for seed in (1, 2, 3):
        batch, count = inputs(seed)
        normalizer.copy_(count)
        with torch.no_grad():
            for n, x in static.items():
                x.copy_(batch[n])
        graph.replay()
        assert bitwise_equal(outputs, evaluate(batch, **options)), seed


def test_objectives_use_the_current_stream(backend):
    batch = on_device(make_batch(20, 300, torch.float32))
    logits = on_device(make_logits_batch(3, 20, 1003, torch.float32))
    shifted = {**batch, "logp": batch["logp"] + 0.5}, {**logits, "logits": logits["logits"] * 0.5}
    expected = [evaluate(each, backend=backend) for each in (wanted_by(fca.PPO(), shifted[0]), shifted[1])]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        batch["logp"] += 0.5
        logits["logits"] *= 0.5
        actual = [evaluate(each, backend=backend) for each in (wanted_by(fca.PPO(), batch), logits)]
    torch.cuda.current_stream().wait_stream(side)
    assert all(bitwise_equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_in_place_backward_takes_no_memory(backend):
    batch = on_device(make_logits_batch(2, 128, 50257, torch.bfloat16))
    logits = batch.pop("logits")
    expected = evaluate({**batch, "logits": logits}, backend=backend, entropy_coef=0.1)
    leaf = logits.requires_grad_()
    size = leaf.numel() * leaf.element_size()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = fca.policy_loss_from_logits(leaf, **batch, entropy_coef=0.1, inplace_backward=True, backend=backend)
    loss.backward(retain_graph=True)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * size
    assert leaf.grad.data_ptr() == leaf.data_ptr() and bitwise_equal([leaf.grad], [expected[1]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ("dual and cap", "gspo", "gmpo"))
def test_more_sequences_than_a_grid_has_rows(backend, name):
    """A CUDA grid has 65,535 blocks in y and z."""
    batch = wanted_by(OBJECTIVES[name], on_device(make_batch(70_001, 5, torch.float64)))
    expected = evaluate(batch, backend="reference", **options_of(name))
    assert_near(evaluate(batch, backend=backend, **options_of(name)), [x.cpu() for x in expected], torch.float64, 1e-11)
    turned = {n: x.t().contiguous().t() for n, x in batch.items()}  # and as wide as that
    assert_near(
        evaluate(turned, backend=backend, **options_of(name)), [x.cpu() for x in expected], torch.float64, 1e-11
    )


def test_logits_past_2_to_the_31_elements_and_past_65536_rows(backend):
    """In place, with bonus: every row's gradient sums to 0, which no row that was left out does; some in float64."""
    shape, vocabulary = (2, 35_003), 32_768
    rows = shape[0] * shape[1]
    assert rows * vocabulary > 2**31 and rows > 65_536
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocabulary:
        pytest.skip("needs 7 GB of free device memory")
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(*shape, vocabulary, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    tokens = torch.randint(vocabulary, shape, device="cuda", generator=generator)
    tokens.view(-1)[::7] = vocabulary - 1
    g, h = torch.randn(2, *shape, device="cuda", generator=generator)
    some = torch.tensor([0, 1, 35_002, 35_003, 65_535, 65_536, 65_537, rows - 2, rows - 1], device="cuda")
    kept = logits.view(rows, -1)[some].double().requires_grad_()
    logits.requires_grad_()
    logp, entropy = fca.logp_from_logits(logits, tokens, inplace_backward=True, backend=backend)
    (grad,) = torch.autograd.grad((logp * g).sum() + (entropy * h).sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()

    log_p = kept.log_softmax(-1)
    wanted_logp = log_p.gather(1, tokens.view(-1)[some].unsqueeze(1)).squeeze(1)
    wanted_entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(logp.view(-1)[some].double(), wanted_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.view(-1)[some].double(), wanted_entropy, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(
        (wanted_logp * g.view(-1)[some]).sum() + (wanted_entropy * h.view(-1)[some]).sum(), kept
    )
    torch.testing.assert_close(grad.view(rows, -1)[some].double(), wanted, rtol=2**-8, atol=1e-9)
    for part, scale in zip(grad.view(rows, -1).split(4096), (g.abs() + h.abs()).view(-1).split(4096), strict=True):
        # The token's own element, of the size of g, was rounded to bfloat16; a row of logits sums to about 180.
        assert (part.sum(-1, dtype=torch.float32).abs() <= 0.02 * scale + 1e-3).all()


def test_tokens_past_2_to_the_31(backend):
    """Only expanded inputs fit so many tokens: every tensor read is one row or one column, and nothing is written."""
    rows, cols = 2**16 + 3, 2**15 + 5
    assert rows * cols > 2**31
    logp = torch.linspace(-1.0, -0.5, cols, device="cuda").expand(rows, cols)
    advantages = torch.linspace(-1.0, 1.0, rows, device="cuda").unsqueeze(1).expand(rows, cols)
    old_logp = torch.full((1, 1), -0.9, device="cuda").expand(rows, cols)
    stats = fca.clip_stats(logp, old_logp, advantages, objective=fca.PPO(0.2, 0.28), backend=backend)
    ratio = (logp[0].double() + 0.9).exp()
    high = int((ratio > 1.28).sum()) * (rows // 2)
    assert float(stats.tokens) == pytest.approx(rows * cols, rel=1e-6)
    assert float(stats.clipped_high) == pytest.approx(high, rel=1e-3)
    assert float(stats.ratio_sum) == pytest.approx(rows * float(ratio.sum()), rel=1e-5)
