"""What only the CPU build of the CUDA sources can show: races, launches, failing launches, offsets past 2^32."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import subprocess
import sys

import pytest
import torch
from cases import RULES, bitwise_equal, make_grads, make_params, make_stats, results, run

import fused_clip_adam as fca
from fused_clip_adam.backends import cuda, cuda_objective, device_table, native
from fused_clip_adam.backends import reference_objective as rules

pytestmark = pytest.mark.skipif(cuda.devices() != ("cpu",), reason="backend='cuda' is not the emulated library here")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    out = ctypes.CDLL(os.environ["FUSED_CLIP_ADAM_CUDA_LIBRARY"])
    out.cuda_on_cpu_launch_count.restype = ctypes.c_ulonglong
    return out


@pytest.mark.parametrize("rule", ("clip", "adamw", "align", "align 7", "align 4096", "align element", "brake"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_no_order_of_threads_and_blocks_changes_a_bit(monkeypatch, dtype, rule):
    # Threads of a block run one at a time between barriers, in the order asked for: where a barrier is missing, or one
    # block leans on another, the orders disagree. Shared memory starts out as NaN, or huge in "reverse".
    monkeypatch.setattr(device_table, "_CHUNK_SMALL", 4096)
    shapes = {"tiles": (9001,), "matrix": (33, 65), "one": (1,)}
    params = make_params(dtype, shapes=shapes)
    grads = make_grads(params, 3)

    def go(order: str) -> list[torch.Tensor]:
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        opt, own = run(fca.FusedClipAdamW, params, grads, backend="cuda", **RULES[rule])
        return [*results(opt, own), opt._books.grad_square_sum.clone()]

    forward = go("forward")
    assert bitwise_equal(forward, go("reverse"))
    assert bitwise_equal(forward, go("shuffle"))


@pytest.mark.parametrize("n", (1, 500))
@pytest.mark.parametrize("grad_clip, launches", ((None, 2), (1.0, 3)))
def test_launches_do_not_grow_with_the_number_of_tensors(library, n, grad_clip, launches):
    params = [torch.randn(50).requires_grad_() for _ in range(n)]
    for p in params:
        p.grad = torch.randn(50)
    opt = fca.FusedClipAdamW(params, backend="cuda", grad_clip=grad_clip)
    opt.step()
    before = library.cuda_on_cpu_launch_count()
    opt.step()
    assert library.cuda_on_cpu_launch_count() - before == launches


def test_launches_of_several_groups_and_dtypes(library):
    # One prologue for all; norm and update once a batch (a group's tensors of one dtype): never more than three each.
    groups = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        params = [torch.randn(50).to(dtype).requires_grad_() for _ in range(7)]
        for p in params:
            p.grad = torch.randn_like(p)
        groups.append({"params": params})
    opt = fca.FusedClipAdamW(groups, backend="cuda", grad_clip=1.0)
    opt.step()
    before = library.cuda_on_cpu_launch_count()
    opt.step()
    assert library.cuda_on_cpu_launch_count() - before == 3 + 1 + 3


@pytest.mark.parametrize("skipped, kernel", ((0, "norm_kernel"), (1, "prologue_kernel"), (2, "update_kernel")))
def test_a_failing_launch_names_its_kernel(library, monkeypatch, skipped, kernel):
    p = torch.randn(50).requires_grad_()
    p.grad = torch.randn(50)
    opt = fca.FusedClipAdamW([p], backend="cuda", grad_clip=1.0)
    opt.step()
    name = ("grad_square_sums", "prologue", "update_")[skipped]
    original = getattr(cuda, name)

    def failing(*arguments):
        library.cuda_on_cpu_fail_next_launch(9)  # cudaErrorInvalidConfiguration
        return original(*arguments)

    before = [t.clone() for t in results(opt, [p])]
    with monkeypatch.context() as patch:
        patch.setattr(cuda, name, failing)
        with pytest.raises(RuntimeError, match=rf"launch of fused_clip_adam's kernel {kernel}: cudaErrorInvalidConfig"):
            opt.step()
    if kernel != "update_kernel":
        assert bitwise_equal(before, results(opt, [p]))
    opt.step()  # the error is not sticky, and is not reported twice


def huge(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """Address space without memory: only what is touched becomes real."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.parametrize("overshoot", (None, "align"))
@pytest.mark.parametrize("transposed", (False, True))
def test_offsets_past_2_to_the_32(transposed, overshoot):
    # The last two chunks of a tensor of 2^32 + 4,102 elements, against a small tensor of the same values.
    # In bfloat16, which keeps the reserved addresses at 8 GiB a tensor.
    n, dtype = 2**32 + 4102, torch.bfloat16
    tensors = [huge(dtype, n) for _ in range(4)]
    if transposed:  # all but the gradient: no memory order is common to all, so each is read by its strides
        tensors = [x.view(n // 2, 2) if i == 1 else x.view(2, n // 2).t() for i, x in enumerate(tensors)]
    step, small_step = torch.zeros(()), torch.zeros(())  # held: the tables keep addresses
    table = native.tensor_table([tensors[0]], [tensors[1]], [tensors[2]], [tensors[3]], [], [step], [], 0)
    rule = fca.AlignedMomentum() if overshoot else None
    block = rule.block if rule else 1
    reference = fca.FusedClipAdamW([torch.zeros(1)], overshoot=overshoot)
    part = dataclasses.make_dataclass("Part", ["on_device", "device"])(True, torch.device("cpu"))
    scalars = reference._group_scalars(part)
    placed = device_table.place([table], scalars, [block], None, torch.device("cpu"), False)
    (launch,) = placed.launches
    assert launch.chunks * launch.chunk_size >= n > (launch.chunks - 1) * launch.chunk_size
    placed.launches = [dataclasses.replace(launch, first_chunk=launch.chunks - 2, chunks=2)]
    first = (launch.chunks - 2) * launch.chunk_size

    values = [torch.randn(n - first).to(dtype) for _ in range(3)] + [torch.rand(n - first).to(dtype)]
    for x, value in zip(tensors, values):
        if transposed:  # the tail in row-major order; `x[i]` is a row of two
            x[first // 2 :].copy_(value.view(-1, 2))
        else:
            x[first:] = value
    small = [value.clone() for value in values]
    small_table = native.tensor_table([small[0]], [small[1]], [small[2]], [small[3]], [], [small_step], [], 0)
    small_placed = device_table.place([small_table], scalars, [block], None, torch.device("cpu"), False)

    out = []
    for work in (placed, small_placed):
        sums = cuda.grad_square_sums(work)
        total, skipped = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        values_of = cuda.prologue(work, None, sums, None, None, None, total, skipped, False)
        code = rule.kernel_code if rule else 0
        cuda.update_(work, values_of, 0, 0, False, False, code, block, False, None, None, None)
        out.append(total)
    assert float(out[0]) == pytest.approx(float(out[1]), rel=1e-14) and float(out[0]) > 0
    for x, value in zip(tensors, small):
        tail = x[first // 2 :].reshape(-1) if transposed else x[first:]
        assert torch.equal(tail.view(torch.int16), value.view(torch.int16))
    assert not torch.equal(small[0], values[0])


def test_waiting_for_every_kernel_is_a_debugging_aid(tmp_path):
    program = (
        "import torch, fused_clip_adam as fca\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "opt = fca.FusedClipAdamW([p], backend='cuda'); opt.step()\n"
        "assert float(p[0]) < 1\n"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "FUSED_CLIP_ADAM_SYNC": "1", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=300)


def test_statistics_reach_the_brake_on_the_device():
    p = torch.randn(100).requires_grad_()
    p.grad = torch.randn(100)
    opt = fca.FusedClipAdamW([p], backend="cuda", overshoot=fca.MomentumBrake(0.5))
    opt.observe(make_stats(1))
    opt.observe(make_stats(2))
    opt.step()
    own = opt.state[p]["bias_weights"]
    c = (0.37 + 0.74) / 2
    assert own.tolist() == pytest.approx([1 - 0.9 * (1 - 0.5 * c), 0.001], rel=1e-6)


# ---------------------------------------------------------------- the objective


def objective(rule: int, rows: int, cols: int, dtype: torch.dtype, *, packed: bool = False, **other) -> tuple:
    """Arguments of `policy_loss` that use every kind of input; `other` replaces some of them by name."""
    x = torch.randn(6, rows, cols).to(dtype)
    ids = torch.randint(0, 7, (cols,)) if packed else None
    order = torch.argsort(ids, stable=True) if packed else None
    arguments = dict(
        logp=x[0] - 2,
        old_logp=x[0] - 2 + 0.3 * x[1],
        advantages=x[2, :, :1].expand(rows, cols),
        mask=torch.rand(rows, cols) < 0.8,
        weights=1 + 0.1 * x[3],
        aux=0.1 * x[4],
        ref_logp=x[0] - 2 + 0.2 * x[5],
        entropy=x[3].abs(),
        sequence_ids=ids,
        sequence_order=order,
        sequence_offsets=torch.searchsorted(ids[order], torch.arange(8)) if packed else None,
        num_sequences=7 if packed else rows,
        rule=rule,
        scalars=[0.8, 1.2, 3.0, 100.0, 0.5, 0.4, 0.3, 0.2],
        bounds=None,
        aggregation=rules.SEQUENCE_MEAN,
        normalizer=0.0,
        normalizer_tensor=None,
        kl_coef=0.1,
        kl_estimator=rules.K3,
        entropy_coef=0.01,
        want_grad=True,
    )
    return tuple((arguments | other).values())


ORDERS = ("forward", "reverse", "shuffle")


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("rule", (rules.PPO, rules.VESPO, rules.GSPO, rules.GMPO))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_no_order_changes_a_bit_of_the_objective(monkeypatch, dtype, rule, packed):
    arguments = objective(rule, *((1, 1500) if packed else (5, 301)), dtype, packed=packed)
    seen = []
    for order in ORDERS:
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        seen.append(cuda_objective.policy_loss(*arguments))
    assert bitwise_equal(seen[0], seen[1]) and bitwise_equal(seen[0], seen[2])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vocabulary", (5, 257, 5003))
def test_no_order_changes_a_bit_from_logits_or_of_the_bounds(monkeypatch, dtype, vocabulary):
    logits, tokens = torch.randn(2, 3, vocabulary).to(dtype), torch.randint(0, vocabulary, (2, 3))
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    g, h = torch.randn(2, 2, 3, dtype=arithmetic)
    logp = torch.randn(2, 7, 90)
    seen = []
    for order in ORDERS:
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        forward = cuda_objective.logits_forward(logits, tokens, None, 0.7, True)
        out = logits.clone()
        cuda_objective.logits_backward(out, tokens, *forward[:0:-1], g, h, 0.7, out)
        sums = cuda_objective.bound_sums(logp[0], logp[1], logp[0] * logp[1], None, [0.6, 0.7], [1.2] * 40)
        seen.append([*forward, out, sums])
    assert bitwise_equal(seen[0], seen[1]) and bitwise_equal(seen[0], seen[2])


def test_launches_of_the_objective(library):
    def launches(call, *arguments) -> int:
        before = library.cuda_on_cpu_launch_count()
        call(*arguments)
        return library.cuda_on_cpu_launch_count() - before

    policy_loss, token_mean = cuda_objective.policy_loss, {"aggregation": rules.TOKEN_MEAN}
    assert launches(policy_loss, *objective(rules.PPO, 3, 2000, torch.float32, **token_mean)) == 2
    assert launches(policy_loss, *objective(rules.PPO, 3, 2000, torch.float32)) == 3
    assert launches(policy_loss, *objective(rules.GSPO, 1, 6000, torch.float32, packed=True)) == 3
    x = torch.randn(4, 50)
    assert launches(cuda_objective.bound_sums, x, x, x, None, [0.6] * 5, [1.2] * 17) == 2
    logits, tokens = torch.randn(4, 50, 9), torch.zeros(4, 50, dtype=torch.int64)
    _, entropy, softmax = cuda_objective.logits_forward(logits, tokens, None, 1.0, True)
    assert launches(cuda_objective.logits_forward, logits, tokens, None, 1.0, True) == 1
    assert launches(cuda_objective.logits_backward, logits, tokens, softmax, entropy, x, None, 1.0, logits) == 1


def test_a_failing_launch_of_the_objective_names_its_kernel(library):
    logits, tokens = torch.randn(4, 5, 9), torch.zeros(4, 5, dtype=torch.int64)
    logp, entropy, softmax = cuda_objective.logits_forward(logits, tokens, None, 1.0, True)
    first = {
        "sequence_kernel": lambda: cuda_objective.policy_loss(*objective(rules.GSPO, 3, 20, torch.float32)),
        "token_kernel": lambda: cuda_objective.policy_loss(
            *objective(rules.PPO, 3, 20, torch.float32, aggregation=rules.TOKEN_MEAN)
        ),
        "finish_kernel": lambda: cuda_objective.policy_loss(
            *objective(rules.PPO, 0, 20, torch.float32, aggregation=rules.TOKEN_MEAN)
        ),
        "bound_sums_kernel": lambda: cuda_objective.bound_sums(logp, logp, logp, None, [0.6], [1.2]),
        "logits_forward_kernel": lambda: cuda_objective.logits_forward(logits, tokens, None, 1.0, True),
        "logits_backward_kernel": lambda: cuda_objective.logits_backward(
            logits, tokens, softmax, entropy, logp, None, 1.0, logits
        ),
    }
    for kernel, call in first.items():
        library.cuda_on_cpu_fail_next_launch(9)  # cudaErrorInvalidConfiguration
        with pytest.raises(RuntimeError, match=rf"launch of fused_clip_adam's kernel {kernel}: cudaErrorInvalidConfig"):
            call()
        call()  # the error is not sticky, and is not reported twice


def test_logits_past_2_to_the_32(library):
    # Two rows 2^32 + 8 elements apart, in place and into rows at another distance from a 16-byte boundary.
    apart, vocabulary = 2**32 + 8, 1003
    memory, other = huge(torch.bfloat16, apart + 2048), huge(torch.bfloat16, apart + 2048)
    logits = memory.as_strided((2, 1, vocabulary), (apart, vocabulary, 1), 8)
    out = other.as_strided((2, 1, vocabulary), (apart + 1, vocabulary, 1), 3)
    small = torch.randn(2, 1, vocabulary).bfloat16()
    logits.copy_(small)
    tokens = torch.tensor([[3], [1002]])
    seen = []
    for x in (logits, small):
        logp, entropy, softmax = cuda_objective.logits_forward(x, tokens, None, 1.0, True)
        g, h = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [0.0]])
        cuda_objective.logits_backward(x, tokens, softmax, entropy, g, h, 1.0, out if x is logits else small.clone())
        cuda_objective.logits_backward(x, tokens, softmax, entropy, g, h, 1.0, x)
        seen.append([logp, entropy, softmax, x.clone()])
    assert bitwise_equal(*seen)  # although the second of the small rows is not on a 16-byte boundary
    assert torch.equal(out, logits) and float(out[1, 0, 1002]) < -1.9
    assert int((memory[8 + vocabulary : 4096] != 0).sum()) == 0 and int((other[:3] != 0).sum()) == 0


def test_more_rows_than_other_dimensions_of_a_grid_take():
    n, tokens = 70_001, torch.randint(0, 3, (70_001, 1))
    mask = torch.arange(n).unsqueeze(1) > 65_500
    logits = torch.randn(n, 1, 3)
    logp, entropy, softmax = cuda_objective.logits_forward(logits, tokens, mask, 1.0, True)
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logp, expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * mask)
    g = torch.randn(n, 1) * mask
    cuda_objective.logits_backward(logits, tokens, softmax, entropy, g, None, 1.0, logits)
    one_hot = torch.nn.functional.one_hot(tokens, 3)
    torch.testing.assert_close(logits, g.unsqueeze(-1) * (one_hot - expected.exp()), rtol=1e-5, atol=1e-6)


def test_tokens_past_2_to_the_32():
    # logp and advantages whose rows lie 2^32 + 3 elements apart.
    rows, cols, apart = 2, 700, 2**32 + 3
    arguments = list(objective(rules.GSPO, rows, cols, torch.bfloat16))
    far = list(arguments)
    for i in (0, 2):
        far[i] = huge(torch.bfloat16, apart + cols).as_strided((rows, cols), (apart, 1))
        far[i].copy_(arguments[i])
    assert bitwise_equal(cuda_objective.policy_loss(*far), cuda_objective.policy_loss(*arguments))


def test_a_sequence_id_out_of_range_leaves_its_token_out():
    # The device cannot raise: such a token counts as not readable, and nothing is read out of bounds.
    arguments = list(objective(rules.PPO, 1, 300, torch.float32, packed=True, mask=None))
    ids = arguments[8]
    wrong = torch.arange(300) % 50 == 7
    arguments[8] = torch.where(wrong, torch.tensor([2**62, -1]).repeat(150), ids)
    loss, grad, grad_entropy, _, stats = cuda_objective.policy_loss(*arguments)
    assert int(stats[13]) == int(wrong.sum()) and int(stats[0]) == 300 - int(wrong.sum())
    assert torch.isfinite(loss) and bool((grad[0, wrong] == 0).all()) and bool((grad_entropy[0, wrong] == 0).all())
