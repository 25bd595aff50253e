"""step_from_scores and step_from_gradients on the Triton kernels, through Triton's interpreter, against the CPU's.

Bit for bit where the arithmetic is float32: the same operations on samples and scalars that are the same float32, see
test_triton_interpreter.py. Normal numbers that differ in the last places of float64 are the same float32 but by a
chance of about 1e-7 an element; the seeds are fixed.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from cases import RULES, bitwise_equal, largest_error, results, tolerance

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime import interpreter

import fused_clip_adam as fca
from fused_clip_adam.backends import device_table, native, triton_step
from fused_clip_adam.samples import PlacedSamples

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1: the kernels run on the GPU"),
    pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable()),
]

CHUNK = 2048
"""Elements of a chunk in these tests, so that small tensors have several."""
SHAPES = ((), (0,), (3, 0, 2), (3,), (9, 31), (CHUNK + 1040,))
"""Of the last, every sample starts on 16 bytes in any storage type."""
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
CASES = {
    "plain": {},
    "bounded": dict(max_sample_norm=20.0),
    "noise": dict(max_sample_norm=20.0, noise_multiplier=0.1),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(device_table, "_CHUNK_SMALL", CHUNK)


@pytest.fixture(autouse=True)
def _alignment_is_as_promised(monkeypatch):
    """The interpreter takes no notice of `tl.multiple_of`: here it is checked."""

    def check(handle, name, values):
        assert name != "tt.divisibility" or not (handle.data % values[0]).any()

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check)


def normal(shape, seed: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def permuted(shape, order, seed: int) -> torch.Tensor:
    """A dense tensor of `shape` whose dimensions lie in memory in `order`."""
    return normal([shape[d] for d in order], seed).permute([order.index(d) for d in range(len(shape))])


def weights_of(count: int, step: int) -> torch.Tensor:
    """Of several samples the second has none."""
    weights = normal((count,), 100 + step, F64)
    weights[1:2] = 0.0
    return weights


def hide(stacks: list[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    """NaN in every sample of weight 0."""
    for stack in stacks:
        stack[weights == 0] = math.nan
    return stacks


def train(backend: str, make, call=None, *, cls=fca.FusedClipAdamW, groups=None, steps=2, case="plain", **options):
    """Everything that steps from samples write.

    Args:
        make: () -> parameters, and a function of the step that gives (stacks, weights). groups: per parameter group,
            (number of parameters, options).
        call: (optimizer, stacks, weights, keywords of CASES) takes the step; None: step_from_gradients.
    """
    params, samples = make()
    own = [p.detach().requires_grad_() for p in params]
    left = iter(own)
    described = [{"params": list(itertools.islice(left, n)), **extra} for n, extra in groups or [(len(own), {})]]
    opt = cls(described, **{"lr": 0.01, "weight_decay": 0.1, "backend": backend, **options})
    noise = {"noise_generator": torch.Generator().manual_seed(5)} if case == "noise" else {}
    for step in range(steps):
        stacks, weights = samples(step)
        if call is None:
            opt.step_from_gradients(stacks, weights, **CASES[case], **noise)
        else:
            call(opt, stacks, weights, {**CASES[case], **noise})
    return [*results(opt, own), opt.grad_norm, opt.step_count_skipped]


def assert_same_as_cpu_kernel(make, *, most: float = 0.0, **options) -> None:
    """Bit for bit; or `most`, the largest error over the largest magnitude."""
    got, expected = (train(backend, make, **options) for backend in ("triton", "cpu"))
    if most:
        assert largest_error(got, expected) <= most
    else:
        assert bitwise_equal(got, expected)


def of_shapes(param: torch.dtype, score: torch.dtype, count: int, shapes=SHAPES):
    def make():
        def samples(step):
            weights = weights_of(count, step)
            stacks = [normal((count, *shape), 10 * step + i, score) for i, shape in enumerate(shapes)]
            return hide(stacks, weights), weights

        return [normal(shape, i, param) for i, shape in enumerate(shapes)], samples

    return make


# ---------------------------------------------------------------- storage types, counts, rules, layouts


@pytest.mark.parametrize("count", (0, 1, 3, 8, 33))
@pytest.mark.parametrize(
    "param, score", (*itertools.product((F32, BF16), (F32, BF16, F16)), (F16, BF16), (F64, F64), (F64, F32)), ids=str
)
def test_every_count_and_combination_of_storage_types(param, score, count):
    # float64 shows what float32 does not: 1 - beta^step by its series, and sums in another order.
    most = 1e-13 if param == F64 else 0.0
    assert_same_as_cpu_kernel(of_shapes(param, score, count), most=most, grad_clip=0.5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "rule",
    (
        "adamw",
        "clip lagged",
        "clip per tensor",
        "align",
        "align 7",
        "align 4096",
        "align tensor",
        "cautious",
        "agc",
        "stable spam",
        "guards and gate",
        "amsgrad",
        "L2",
    ),
)
def test_rules(rule, case):
    cls = fca.FusedClipAdam if rule == "L2" else fca.FusedClipAdamW
    options = {"grad_clip": 0.7, "amsgrad": True} if rule == "L2" else RULES[rule]
    shapes = ((), (3, 0, 2), (9, 31), (CHUNK + 1040,))
    assert_same_as_cpu_kernel(of_shapes(F32, F32, 5, shapes), cls=cls, case=case, **options)


@pytest.mark.parametrize("case", ("bounded", "noise"))
@pytest.mark.parametrize("score", (F64, F32))
@pytest.mark.parametrize("rule", ("align 7", "agc"))
def test_float64(rule, score, case):
    assert_same_as_cpu_kernel(of_shapes(F64, score, 6, SHAPES[3:]), most=1e-13, case=case, **RULES[rule])


@pytest.mark.parametrize("state_dtype", (None, F32))
@pytest.mark.parametrize("case", ("bounded", "noise"))
@pytest.mark.parametrize("rule", ("adamw", "align", "clip per tensor"))
def test_narrow_storage(rule, case, state_dtype):
    assert_same_as_cpu_kernel(of_shapes(BF16, BF16, 6), case=case, state_dtype=state_dtype, **RULES[rule])


@pytest.mark.parametrize("case", ("bounded", "noise"))
@pytest.mark.parametrize("rule", ("adamw", "clip", "align 7", "align 4096", "agc"))
def test_strided_tensors(rule, case):
    count = 5

    def make():
        params = [
            # Transposed, samples likewise: one memory order, which noise does not follow.
            permuted((20, 30), (1, 0), 1),
            permuted((46, 50), (1, 0), 2),  # transposed, samples contiguous
            normal((24, 16), 3),  # contiguous, samples transposed
            normal((20, 20), 4)[:, ::2],  # holes
            normal(12, 5),
            normal((12, 32), 6),
        ]

        def samples(step):
            weights = weights_of(count, step)
            stacks = [
                permuted((count, 20, 30), (0, 2, 1), 10 + step),
                normal((count, 46, 50), 20 + step),
                permuted((count, 24, 16), (2, 0, 1), 30 + step),  # samples apart by less than their own extent
                normal((count, 20, 20), 40 + step)[..., ::2],
                normal((12, count), 50 + step).t(),
                normal((2 * count, 12, 33), 60 + step)[::2, :, 1:],  # neither samples nor rows start on 16 bytes
            ]
            hide(stacks, weights)
            stacks[4] = normal(12, 50 + step).expand(count, 12)  # one sample for all
            return stacks, weights

        return params, samples

    assert_same_as_cpu_kernel(make, case=case, **RULES[rule])


@pytest.mark.parametrize("start, apart", ((0, 1), (1, 0), (1, 1), (0, 4)))
def test_misaligned_stacks(start, apart):
    numel, count = CHUNK + 1040, 5

    def make():
        def samples(step):
            weights = weights_of(count, step)
            own = normal(start + count * (numel + apart), 10 + step)[start:].view(count, numel + apart)[:, :numel]
            return hide([own], weights), weights

        return [normal(numel, 1)], samples

    for rule in ("clip", "align 4096"):
        assert_same_as_cpu_kernel(make, case="bounded", **RULES[rule])


@pytest.mark.parametrize("case", CASES)
def test_groups_and_storage_types_in_one_step(case):
    kinds = [(F32, F32), (F32, BF16), (BF16, F32), (BF16, F16), (F16, F16), (F32, F16)] * 2

    def make():
        def shape(i):
            return (i % 5, 1 + i % 3) if i % 4 else (64 + i,)

        def samples(step):
            weights = weights_of(7, step)
            stacks = [normal((7, *shape(i)), 50 * step + i, score) for i, (_, score) in enumerate(kinds)]
            stacks = hide(stacks, weights)
            return [None if i == 2 else stack for i, stack in enumerate(stacks)], weights

        return [normal(shape(i), i, param) for i, (param, _) in enumerate(kinds)], samples

    groups = [
        (5, {"lr": torch.tensor(0.02), "grad_clip": 0.3, "overshoot": "align-element"}),
        (4, {"betas": (0.8, 0.95), "amsgrad": True, "weight_decay": 0.0, "grad_clip": fca.GlobalNorm(0.2, lag=True)}),
        (3, {"maximize": True, "eps": 1e-3, "overshoot": fca.MomentumBrake(0.5, hold_v=0.2)}),
    ]
    assert_same_as_cpu_kernel(make, groups=groups, case=case)


def test_steps_with_and_without_samples_share_an_optimizer():
    outcomes = []
    for backend in ("triton", "cpu"):
        p = normal((CHUNK + 8,), 0).requires_grad_()
        opt = fca.FusedClipAdamW([p], backend=backend, grad_clip=0.5)
        for step in range(4):
            if step % 2:
                opt.step_from_gradients([normal((2 + step, *p.shape), step)])
            else:
                p.grad = normal(p.shape, step)
                opt.step()
        outcomes.append([*results(opt, [p]), opt.grad_norm])
    assert bitwise_equal(*outcomes)


# ---------------------------------------------------------------- step_from_scores


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by_sequence", (False, True))
def test_step_from_scores(by_sequence, case):
    B, T, shapes = 6, 5, ((), (9, 31), (CHUNK + 1040,))
    leading = (B,) if by_sequence else (B, T)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2:], mask[4] = False, False

    def make():
        def samples(step):
            stacks = [normal((*leading, *shape), 10 * step + i) for i, shape in enumerate(shapes)]
            for stack in stacks:
                stack[4] = math.nan  # masked
            logp = normal((B, T), 70 + step) * 0.3 - 1.0
            return stacks, (logp, logp + 0.2 * normal((B, T), 80 + step), normal((B,), 90 + step))

        return [normal(shape, i) for i, shape in enumerate(shapes)], samples

    def call(opt, stacks, inputs, keywords):
        objective = fca.GSPO() if by_sequence else fca.PPO()
        stats = opt.step_from_scores(stacks, *inputs, mask=mask, objective=objective, **keywords)
        assert stats.tokens == mask.sum()

    # The objective's sums are taken in another order: weights that differ in their last place.
    most = tolerance(F32, 2)
    assert_same_as_cpu_kernel(make, call=call, most=most, case=case, grad_clip=0.7, overshoot="brake")


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_where_no_sample_counts(case):
    p = normal((300,), 0).requires_grad_()
    opt = fca.FusedClipAdamW([p], backend="triton", grad_clip=fca.AGC())
    for count in (0, 4):
        before = p.detach().clone()
        opt.step_from_gradients([torch.full((count, 300), math.nan)], torch.zeros(count), **CASES[case])
        assert bitwise_equal([p], [before])
    assert int(opt.step_count_skipped) == 2


# ---------------------------------------------------------------- sums of squares and noise by themselves


@pytest.mark.parametrize("score", (F64, F32, BF16, F16))
def test_sample_square_sums(score):
    param, count = F64 if score == F64 else F32, 5
    shapes = ((), (3, 0), (2 * CHUNK + 1, 3), (CHUNK + 1040,))
    params = [normal(shape, i, param) for i, shape in enumerate(shapes)]
    weights = weights_of(count, 0)
    stacks = hide([normal((count, *shape), 10 + i, score) for i, shape in enumerate(shapes)], weights)
    stacks[2] = stacks[2].transpose(0, 2).contiguous().transpose(0, 2)
    tables = []
    for own in (slice(0, 3), slice(3, 4)):
        states = [[torch.zeros_like(p) for p in params[own]] for _ in range(2)]
        steps = [torch.zeros(()) for _ in params[own]]
        tables.append(triton_step.tensor_table(params[own], stacks[own], *states, [], steps, [], 0, count))
    samples = PlacedSamples(count, weights, None, 0.0)
    placed = triton_step.place(tables, torch.zeros(1, 17, dtype=F64), [1, 1], None, torch.device("cpu"), False, samples)
    got = triton_step.sample_square_sums(placed)
    expected = sum(stack.double().reshape(count, -1).square().sum(1) for stack in stacks).where(weights != 0, 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    assert bitwise_equal([got], [triton_step.sample_square_sums(placed)])


@triton.jit
def normals_kernel(out_ptr, numbers_ptr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    seed, tensor, first = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    lane = tl.arange(0, TILE)
    tl.store(out_ptr + lane, triton_step.standard_normal(seed, tensor, first, lane, TILE, VECTOR))


def philox(key: int, counter: int, stream: int) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    low = 2**32 - 1
    x = [counter & low, counter >> 32, stream & low, stream >> 32]
    k = [key & low, key >> 32 & low]
    for _ in range(10):
        p, q = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [q >> 32 ^ x[1] ^ k[0], q & low, p >> 32 ^ x[3] ^ k[1], p & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return x


def test_philox_is_the_published_one():  # the known answers of Random123
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**64 - 1
    assert philox(ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", (0, 12345, -1, -(2**63), 2**63 - 2))
@pytest.mark.parametrize("tensor, first", ((0, 0), (7, 2**31 - 16), (2**32 + 5, 2**34 + 2), (3, 2**33 - 33)))
def test_noise_is_box_muller_of_philox(seed, tensor, first):
    tile = 64
    expected = torch.empty(tile, dtype=F64)
    for i in range(tile):
        x, y, *_ = philox(seed, (first + i) // 2, tensor)
        angle = math.tau * (y / 2**32)
        wave = math.sin(angle) if (first + i) % 2 else math.cos(angle)
        expected[i] = math.sqrt(-2 * math.log((x + 1) / 2**32)) * wave
    for vector in (0, *((4,) if first % 2 == 0 else ())):
        got = torch.empty(tile, dtype=F64)
        normals_kernel[(1,)](got, torch.tensor([seed, tensor, first]), TILE=tile, VECTOR=vector)
        # An angle of up to 2 pi is itself rounded; the largest normal is sqrt(2 log 2^32) = 6.7.
        torch.testing.assert_close(got, expected, rtol=0, atol=7 * 8.9e-16)
