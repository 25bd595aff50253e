"""What only a GPU can show: no host sync, CUDA graphs, torch.compile, GradScaler, streams, tensors past 2^31."""

from __future__ import annotations

import pytest
import torch
from cases import bitwise_equal, largest_error, make_stats, results, tolerance

import fused_clip_adam as fca
from fused_clip_adam import backends

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
    kernels = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]
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


def test_grad_scaler(backend):
    def train(build):
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

    ours, our_scale = train(lambda params: fca.FusedClipAdamW(params, backend=backend))
    theirs, scale = train(lambda params: torch.optim.AdamW(params, fused=True))
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
