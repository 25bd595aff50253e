"""The Triton kernels on CPU tensors, through Triton's interpreter; and host_table.py against the operator it replaces.

Triton reads TRITON_INTERPRET when it is imported; conftest.py sets it where there is no GPU. On a GPU the tests marked
`interpreted` are left out: test_gpu_backends.py runs the kernels themselves there.
"""

from __future__ import annotations

import decimal
import itertools
import math
import os

import pytest
import torch
from cases import (
    CLASSES,
    RULES,
    assert_rounded_once,
    bitwise_equal,
    largest_error,
    make_grads,
    make_params,
    results,
    run,
    tolerance,
)

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

import fused_clip_adam as fca
from fused_clip_adam.backends import (
    device_table,
    host_table,
    native,
    reference,
    reference_step,
    scalars,
    triton_logits,
    triton_objective,
    triton_step,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1: the kernels run on the GPU")
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

CHUNK = 2048
"""Elements of a chunk in these tests: two tiles or more, so that small tensors cross the boundaries of both."""
SHAPES = {
    "0-d": (),
    "empty": (0,),
    "empty 2-d": (3, 0, 2),
    "three": (3,),
    "2^k - 1": (255,),
    "2^k + 1": (257,),
    "matrix": (9, 31),
    "two chunks": (CHUNK + 1024 + 17,),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(device_table, "_CHUNK_SMALL", CHUNK)


def train(backend: str, params, grads, *, cls=fca.FusedClipAdamW, groups=None, between=None, **options):
    """Steps with gradients as they are (dtype, strides); returns everything a step writes.

    Args:
        params: tensors, trained in place as leaves.
        grads: per step, a list of gradients, None for none.
        groups: per parameter group, (number of parameters, options).
        between: called with (optimizer, step) before each step.
    """
    own = [p.detach().requires_grad_() for p in params]
    for p in own:
        p.grad_dtype = None
    left = iter(own)
    described = [{"params": list(itertools.islice(left, n)), **extra} for n, extra in groups or [(len(own), {})]]
    opt = cls(described, **{"lr": 0.01, "weight_decay": 0.1, "backend": backend, **options})
    for step, now in enumerate(grads):
        for p, g in zip(own, now):
            p.grad = g
        if between is not None:
            between(opt, step)
        opt.step()
    return [*results(opt, own), opt.grad_norm, opt.step_count_skipped]


def assert_same_as_cpu_kernel(make, **options) -> None:
    """`make()` -> (params, grads), fresh on every call. Bit for bit."""
    got = train("triton", *make(), **options)
    assert bitwise_equal(got, train("cpu", *make(), **options))


# ---------------------------------------------------------------- against the reference


@interpreted
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "cls, dtype", (("AdamW", torch.float64), ("AdamW", torch.float32), ("Adam", torch.float64)), ids=str
)
def test_kernel_matches_float64_reference(cls, rule, dtype):
    steps = 3
    params = make_params(dtype, shapes=SHAPES)
    grads = make_grads(params, steps)
    got = run(CLASSES[cls][0], params, grads, backend="triton", **RULES[rule])
    wide = [p.double() for p in params]
    expected = run(CLASSES[cls][0], wide, grads, backend="reference", **RULES[rule])
    assert largest_error(results(*got), results(*expected)) <= tolerance(dtype, steps)
    assert float(got[0].grad_norm) == pytest.approx(float(expected[0].grad_norm), rel=1e-6)


@interpreted
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_dtype", (None, torch.float32))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_storage_is_rounded_once(dtype, state_dtype, rule):
    params = make_params(dtype, shapes=SHAPES)
    grads = make_grads(params, 1)
    got = run(fca.FusedClipAdamW, params, grads, backend="triton", state_dtype=state_dtype, **RULES[rule])
    expected = run(fca.FusedClipAdamW, [p.double() for p in params], grads, backend="reference", **RULES[rule])
    assert_rounded_once(results(*got), results(*expected), dtype)


# ---------------------------------------------------------------- against the CPU kernels, bit for bit
#
# float32 arithmetic: the same operations on the same float32 scalars. The scalars come from float64 that differs in the
# last places only (1 - beta^step by its series here, the norm summed in another order), which float32 does not show
# but by a chance of about 1e-7 a scalar; the seeds are fixed. float64 shows it, except where W follows the recurrence.


@interpreted
@needs_native
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_equals_cpu_kernel_bit_for_bit(dtype, rule):
    params = make_params(dtype, seed=5, shapes=SHAPES)
    grads = make_grads(params, 2, seed=6)
    got = run(fca.FusedClipAdam, params, grads, backend="triton", **RULES[rule])
    assert bitwise_equal(results(*got), results(*run(fca.FusedClipAdam, params, grads, backend="cpu", **RULES[rule])))


@interpreted
@needs_native
@pytest.mark.parametrize("rule", ("adamw", "brake", "brake damp"))
def test_float64_equals_cpu_kernel_but_for_the_bias_corrections(rule):
    params = make_params(torch.float64, shapes=SHAPES)
    grads = make_grads(params, 3)
    got, expected = (run(fca.FusedClipAdamW, params, grads, backend=b, **RULES[rule]) for b in ("triton", "cpu"))
    if rule != "adamw":  # W1 and W2 are kept by the recurrence
        assert bitwise_equal(results(*got), results(*expected))
    for p, q in zip(got[1], expected[1]):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert bitwise_equal([got[0].state[p][name]], [expected[0].state[q][name]])


@interpreted
@needs_native
@pytest.mark.parametrize("block", (1, 2, 3, 16, 255, 256, 257, 1024, 2048, 2500, 2**48))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_blocks_of_every_length(dtype, block):
    def make():
        params = make_params(dtype, seed=3, shapes={"one": (1,), "two": (CHUNK + 1029,)})
        return params, make_grads(params, 2, seed=4)

    assert_same_as_cpu_kernel(make, overshoot=fca.AlignedMomentum(block=block))


@interpreted
@needs_native
@pytest.mark.parametrize("states", (None, torch.float32))
@pytest.mark.parametrize("grads", ("own", "float32"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ({"amsgrad": True}, {"overshoot": "align", "grad_clip": 0.5}), ids=("ams", "align"))
def test_every_combination_of_storage_types(dtype, grads, states, options):
    if dtype == torch.float64:
        options = {**options, "overshoot": fca.MomentumBrake()}  # bit for bit needs the recurrence

    def make():
        params = make_params(dtype, shapes={"a": (CHUNK + 1027,), "b": (5, 3)})
        return params, [[g.float() if grads == "float32" else g for g in now] for now in make_grads(params, 2)]

    got, expected = (train(b, *make(), state_dtype=states, **options) for b in ("triton", "cpu"))
    assert dtype == torch.float64 or bitwise_equal(got, expected)
    assert largest_error(got, expected) <= 1e-14  # float64: the clip coefficient's norm is summed in another order


@interpreted
@needs_native
@pytest.mark.parametrize("rule", ("adamw", "clip", "align", "align 7", "align 4096", "amsgrad"))
@pytest.mark.parametrize("moved", range(4))
def test_misaligned_views(moved, rule):
    # One tensor of the row (parameter, gradient, or the states, which follow the parameter) starts off its 16 bytes.
    def make():
        def at(offset, seed):
            own = torch.Generator().manual_seed(seed)
            return torch.randn(offset + CHUNK + 1100, generator=own)[offset:]

        params = [at(moved if moved != 2 else 0, 1), at(0, 2)]
        return params, [[at(1 if moved == 2 else 0, 10 + step), at(moved, 20 + step)] for step in range(2)]

    assert_same_as_cpu_kernel(make, **RULES[rule])


def permuted(shape, order, seed: int) -> torch.Tensor:
    """A dense tensor of `shape` whose dimensions lie in memory in `order`."""
    own = torch.Generator().manual_seed(seed)
    return torch.randn([shape[d] for d in order], generator=own).permute([order.index(d) for d in range(len(shape))])


@interpreted
@needs_native
@pytest.mark.parametrize("rule", ("adamw", "clip", "clip lagged", "align", "align 7", "align 4096", "amsgrad"))
def test_strided_tensors(rule):
    def make():
        own = torch.Generator().manual_seed(0)
        params = [
            permuted((40, 60), (1, 0), 1),  # transposed, gradient likewise: one memory order
            permuted((40, 60), (1, 0), 2),  # transposed, gradient contiguous
            permuted((3, 4, 5, 6), (0, 2, 3, 1), 3),  # channels_last
            torch.randn(50, 60, generator=own)[:, ::2],  # holes
            torch.randn(7, generator=own),  # contiguous, in the same launch
            torch.randn(40, 60, generator=own)[3:33],
        ]
        grads = []
        for step in range(2):
            grads.append(
                [
                    permuted((40, 60), (1, 0), 10 + step),
                    permuted((40, 60), (0, 1), 20 + step),
                    permuted((3, 4, 5, 6), (0, 1, 2, 3), 30 + step),
                    torch.full((), 0.25 + step).expand(50, 30),  # one element for all
                    torch.linspace(-1, 1, 7),
                    permuted((30, 60), (1, 0), 40 + step),
                ]
            )
        return params, grads

    assert_same_as_cpu_kernel(make, **RULES[rule])


@interpreted
@needs_native
def test_groups_dtypes_and_many_tiny_tensors_in_one_step():
    def make():
        kinds = [DTYPES[1 + i % 3] for i in range(42)]
        params = [make_params(kind, seed=i, shapes={"": (i % 7, 1 + i % 2)})[0] for i, kind in enumerate(kinds)]
        return params, make_grads(params, 3)

    groups = [
        (18, {"lr": torch.tensor(0.02), "grad_clip": 0.3, "overshoot": "align-element"}),
        (14, {"betas": (0.8, 0.95), "amsgrad": True, "weight_decay": 0.0, "grad_clip": fca.GlobalNorm(0.2, lag=True)}),
        (10, {"maximize": True, "eps": 1e-3, "overshoot": fca.MomentumBrake(0.5, hold_v=0.2)}),
    ]
    assert_same_as_cpu_kernel(make, groups=groups)


@interpreted
@needs_native
@pytest.mark.parametrize("clip", (None, 0.3), ids=("gathered", "norm first"))
@pytest.mark.parametrize("overflow", (False, True))
def test_grad_scale_and_found_inf(overflow, clip):
    def make():
        params = make_params(torch.float32, shapes=SHAPES)
        return params, make_grads(params, 3)

    def between(opt, step):
        opt.grad_scale = torch.tensor(8.0)
        opt.found_inf = torch.tensor(float(overflow and step == 1))

    assert_same_as_cpu_kernel(make, grad_clip=clip, between=between)


@interpreted
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_skip_nonfinite_changes_nothing(bad):
    params = make_params(torch.float32, shapes=SHAPES)
    grads = make_grads(params, 3)
    grads[1][-1][-1] = bad
    options = dict(skip_nonfinite=True, overshoot="brake")
    got = train("triton", [p.clone() for p in params], grads, **options)
    del grads[1]
    expected = train("triton", [p.clone() for p in params], grads, **options)
    assert int(got[-1]) == 1
    assert bitwise_equal(got[:-1], expected[:-1])


@interpreted
@needs_native
def test_resets_and_missing_gradients():
    def make():
        params = make_params(torch.float32, shapes=SHAPES)
        grads = make_grads(params, 5)
        grads[2] = [None if i % 2 else g for i, g in enumerate(grads[2])]
        return params, grads

    def between(opt, step):
        if step == 2:
            opt.reset_momentum(moments=False)
        if step == 4:
            opt.new_rollout()

    assert_same_as_cpu_kernel(make, reset=fca.OnRollout(), between=between)


@interpreted
def test_runs_are_bitwise_repeatable():
    params = make_params(torch.float32, shapes=SHAPES)
    grads = make_grads(params, 3)
    for options in ({"grad_clip": 0.5, "overshoot": "align"}, {"grad_clip": fca.GlobalNorm(0.5, lag=True)}):
        first, second = (train("triton", [p.clone() for p in params], grads, **options) for _ in range(2))
        assert bitwise_equal(first, second)


# ---------------------------------------------------------------- the prologue and the launches by themselves


def place_one(p: torch.Tensor, grad: torch.Tensor, steps: list[float], group: dict, step_dtype=torch.float32):
    """Tables of len(steps) rows that share everything but their step; and what must stay alive."""
    n = len(steps)
    states = [torch.zeros_like(p) for _ in range(2 * n)]
    params, own_steps = [p.clone() for _ in range(n)], [torch.tensor(float(t), dtype=step_dtype) for t in steps]
    table = triton_step.tensor_table(params, [grad] * n, states[:n], states[n:], [], own_steps, [], 0)
    placed = triton_step.place([table], group_scalars(group), [1], None, torch.device("cpu"), False)
    return placed, (params, states, own_steps, grad)


def group_scalars(*groups: dict) -> torch.Tensor:
    return torch.tensor([[group[name] for name in scalars.GROUP_SCALARS] for group in groups], dtype=torch.float64)


def call_prologue(placed, backend=triton_step, **signals):
    names = ("group_signals", "square_sums", "grad_scale", "found_inf", "observed")
    books = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    return backend.prologue(placed, *(signals.get(name) for name in names), *books, False)


PLAIN = {
    **dict.fromkeys(scalars.GROUP_SCALARS, 0.0),
    **dict(beta1=0.9, beta2=0.999, max_norm=-1.0, sign=1.0, lr=0.01, eps=1e-8, max_update=math.inf),
}
COLUMN = scalars.COLUMN


@interpreted
@pytest.mark.parametrize("step_dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("beta", (0.0, 0.5, 0.9, 0.999, 1 - 1e-9))
def test_bias_corrections_are_exact_at_every_step(beta, step_dtype):
    steps = [0, 1, 2, 9, 10, 99, 692, 693, 5000, 99_999, 10_000_000]
    placed, _held = place_one(
        torch.zeros(1), torch.zeros(1), steps, {**PLAIN, "beta1": beta, "beta2": beta}, step_dtype
    )
    got = call_prologue(placed)
    with decimal.localcontext(prec=60):
        for t, row in zip(steps, got.tolist()):
            W = 1 - decimal.Decimal(beta) ** (t + 1)
            assert row[COLUMN["inv_w1"]] == pytest.approx(float(1 / W), rel=2e-15)
            assert row[COLUMN["inv_sqrt_w2"]] == pytest.approx(float(1 / W.sqrt()), rel=2e-15)


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_learning_rate_is_read_where_it_is(dtype):
    lr = torch.tensor(0.03, dtype=dtype)
    placed, _held = place_one(torch.zeros(4), torch.zeros(4), [0.0], PLAIN)
    view = placed.fresh[placed.rows :]
    view[scalars.GROUP_SCALARS.index("lr_address")] = lr.data_ptr()
    view[scalars.GROUP_SCALARS.index("lr_is_f64")] = int(dtype == torch.float64)
    assert call_prologue(placed)[0, COLUMN["lr"]].item() == lr.double().item()
    lr.fill_(0.5)
    assert call_prologue(placed)[0, COLUMN["lr"]].item() == 0.5


@interpreted
@needs_native
@pytest.mark.parametrize("signals", (None, (1.0, 1.0, 0.5), (2.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ids=str)
@pytest.mark.parametrize("step_dtype", (torch.float32, torch.float64))
def test_prologue_equals_cpu_operator(step_dtype, signals):
    groups = [
        {**PLAIN, "weight_decay": 0.1, "eps_early": 1.0, "max_norm": 0.5},
        {**PLAIN, "weight_decay": 0.1, "decay_after": 1.0, "brake_mode": 1.0, "brake_strength": 0.7, "max_update": 2.0},
        {**PLAIN, "weight_decay": 0.1, "coupled": 1.0, "sign": -1.0, "brake_mode": 2.0, "brake_strength": 0.7},
    ]
    group_signals = None
    if signals is not None:  # of the last two groups; the first is as without
        group_signals = torch.tensor([(0.0, 0.0, 1.0), signals, signals], dtype=torch.float64)
    given = dict(
        group_signals=group_signals,
        square_sums=torch.tensor([3.0, 0.25], dtype=torch.float64),
        grad_scale=torch.tensor(8.0),
        observed=torch.tensor([0.3, 1.2]),
    )
    results = []
    for backend in (triton_step, native):
        tables, written = [], []
        for index in range(len(groups)):
            p, m, v = (torch.zeros(3) for _ in range(3))
            for weighed in (False, True):
                step = torch.tensor(4.0, dtype=step_dtype)
                weights = [torch.tensor([0.3, 0.2], dtype=torch.float64)] if weighed else []
                tables.append(backend.tensor_table([p], [torch.ones(3)], [m], [v], [], [step], weights, index))
                written += [step, *weights]
                p, m, v = (torch.zeros(3) for _ in range(3))
        placed = backend.place(tables, group_scalars(*groups), [1] * len(tables), None, torch.device("cpu"), False)
        results.append((call_prologue(placed, backend, **given)[:, : len(scalars.SCALARS)], written))
    (got, got_written), (expected, expected_written) = results
    assert torch.allclose(got, expected, rtol=4e-15, atol=0)
    exact = [COLUMN[name] for name in ("forget", "keep", "theta", "spike_floor", "tau", "tau_factor", "prox")]
    assert torch.equal(got[:, exact], expected[:, exact])
    assert bitwise_equal(got_written, expected_written)


@interpreted
def test_gathered_sum_leaves_the_counter_at_zero():
    grad = torch.randn(3 * CHUNK + 5)
    placed, _held = place_one(torch.zeros_like(grad), grad, [0.0, 0.0], PLAIN)
    call_prologue(placed, grad_scale=torch.tensor(2.0))
    total = torch.tensor(1.0, dtype=torch.float64)
    triton_step.update_(placed, placed.scalars, 0, 0, False, False, 0, 1, False, None, None, total)
    assert float(total) == pytest.approx(1 + 2 * float(grad.double().square().sum()) / 4, rel=1e-14)
    assert int(placed.finished) == 0


@interpreted
def test_a_failed_launch_names_the_kernel(monkeypatch):
    placed, _held = place_one(torch.zeros(4), torch.zeros(4), [0.0], PLAIN)
    monkeypatch.setattr(triton_step, "_PROLOGUE_ROWS", "many")
    with pytest.raises(RuntimeError, match="prologue_kernel"):
        call_prologue(placed)


# ---------------------------------------------------------------- what rules use: guards, reductions, output rows


def transposed(rows: int, cols: int):
    return torch.empty(cols, rows).t()


STRANGE = {
    "0-d": torch.empty(()),
    "empty": torch.empty(3, 0, 2),
    "one": torch.empty(1, 1),
    "narrow": torch.empty(700, 3),
    "aligned rows": torch.empty(70, 48),
    "rows longer than a tile": torch.empty(2, 1500),
    "vector": torch.empty(CHUNK + 1029),
    "3-d": torch.empty(5, 7, 11),
    "transposed": transposed(37, 40),
    "holes": torch.empty(50, 60)[:, ::2],
}
"""Shapes and strides of parameters."""


class Twins:
    """The same tensors as two backends see them: one batch a dtype, with random moments, gradients and scalars."""

    def __init__(self, like, *dtypes, guards=True, gradients_strided=False, seed=0):
        own = torch.Generator().manual_seed(seed)
        self.tensors = []  # of each batch: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs
        for dtype in dtypes:
            lists = []
            for slot in range(5):
                made = [self._filled(x, dtype, own) for x in like]
                if slot == 1 and gradients_strided:
                    made = [g.t().contiguous().t() if g.dim() == 2 else g for g in made]
                if slot > 2:
                    made = [v.square_() for v in made]
                lists.append(made)
            self.tensors.append(lists)
        self.values = torch.cat([random_scalars(len(like), guards, own) for _ in dtypes])
        self.rows = len(like)

    @staticmethod
    def _filled(like, dtype, own):
        out = torch.empty_strided(like.size(), like.stride(), dtype=dtype)
        return out.copy_(torch.randn(like.size(), generator=own, dtype=torch.float64))

    def place(self, backend, amsgrad=False, block=1):
        """(placed, tensors): copies, in the strides of the originals."""
        copies = [
            [[torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).copy_(x) for x in own] for own in lists]
            for lists in self.tensors
        ]
        tables = []
        for params, grads, exp_avgs, exp_avg_sqs, maxima in copies:
            steps = [torch.zeros(()) for _ in params]
            tables.append(
                backend.tensor_table(params, grads, exp_avgs, exp_avg_sqs, maxima if amsgrad else [], steps, [], 0)
            )
        device = torch.device("cpu")
        placed = backend.place(tables, group_scalars(PLAIN), [block] * len(tables), None, device, False)
        return placed, [x for lists in copies for own in lists for x in own]


def random_scalars(rows: int, guards: bool, own: torch.Generator) -> torch.Tensor:
    """[rows, WIDTH] as rules may leave them, exact in float32; every guard acts in some rows and not in others."""
    uniform = torch.rand(rows, scalars.WIDTH, generator=own, dtype=torch.float64)

    def some(name: str, value: float, otherwise: float) -> torch.Tensor:
        return torch.where(uniform[:, COLUMN[name]] < 0.5, value, otherwise)

    out = {name: torch.zeros(rows, dtype=torch.float64) for name in scalars.SCALARS}
    out |= {name: 0.1 + uniform[:, COLUMN[name]] for name in ("grad_factor", "a", "b", "beta2", "one_minus_beta2")}
    out |= {name: 0.1 + 2 * uniform[:, COLUMN[name]] for name in ("inv_w1", "inv_sqrt_w2", "lr", "decay", "l2")}
    out |= {"unscale": torch.full_like(out["skip"], 0.5), "eps": some("eps", 1e-8, 1e-2)}
    out |= {"max_update": some("max_update", 0.6, math.inf)}
    out |= {"keep": torch.ones(rows), "theta": torch.full((rows,), math.inf), "tau": torch.full((rows,), math.inf)}
    out |= {"tau_factor": torch.ones(rows)}
    if guards:
        out |= {"forget": torch.floor(3 * uniform[:, COLUMN["forget"]]), "keep": some("keep", 1.0, 0.0)}
        out |= {"theta": some("theta", 0.8, math.inf), "spike_floor": some("spike_floor", 0.0, 0.4)}
        out |= {"tau": some("tau", 0.7, math.inf), "tau_factor": some("tau_factor", 0.4, 0.9)}
        out |= {"prox": some("prox", 0.3, 0.0)}
    columns = [out[name].float().double() for name in scalars.SCALARS]
    return torch.stack([*columns, *[torch.zeros(rows).double()] * (scalars.WIDTH - len(columns))], dim=1)


def unit_factors(backend, placed, batch: int) -> torch.Tensor:
    own = torch.Generator().manual_seed(batch)
    return 0.2 + torch.rand(len(backend.unit_sums(placed, batch)), generator=own, dtype=torch.float64)


def update_both(twins: Twins, rule: int, block: int = 1, *, amsgrad=False, coupled=False, guarded=True, units=False):
    """What the two backends write, and their sums: ((tensors, dots, squares), the same of the CPU kernel)."""
    out = []
    for backend in (triton_step, native):
        placed, tensors = twins.place(backend, amsgrad, block if rule == reference_step.ALIGN_BLOCK else 1)
        dots = backend.new_dots(placed, len(twins.values)) if guarded else None
        squares = torch.ones((), dtype=torch.float64)
        for batch in range(len(twins.tensors)):
            factors = unit_factors(backend, placed, batch) if units else None
            options = (batch * twins.rows, coupled, amsgrad, rule, block, guarded, factors, dots, squares)
            backend.update_(placed, twins.values, batch, *options)
        out.append((tensors, None if dots is None else backend.by_tensor(placed, dots), squares))
    return out


def assert_updates_agree(twins: Twins, *arguments, **options) -> None:
    (got, got_dots, got_squares), (expected, dots, squares) = update_both(twins, *arguments, **options)
    assert bitwise_equal(got, expected)
    assert torch.allclose(got_squares, squares, rtol=1e-13, atol=0)
    if dots is not None:  # sums of float64 in another order, of the momentum that the step has not forgotten
        forgotten = twins.values[:, COLUMN["forget"]] == scalars.FORGET_BEFORE
        assert not got_dots[forgotten].any()
        assert torch.allclose(got_dots, dots, rtol=1e-12, atol=1e-12)


ALL_RULES = {
    name: getattr(reference_step, name)
    for name in ("NONE", "ALIGN_BLOCK", "ALIGN_ELEMENT", "CAUTIOUS", "GRAMS", "ATAN2")
}


@interpreted
@needs_native
@pytest.mark.parametrize("amsgrad, coupled", ((False, False), (True, True)), ids=("plain", "amsgrad, L2"))
@pytest.mark.parametrize("rule", ALL_RULES)
def test_guarded_update_equals_cpu_kernel_bit_for_bit(rule, amsgrad, coupled):
    twins = Twins([torch.empty(5, 13)] * 23 + [torch.empty(2, 1100)], torch.float32, torch.bfloat16, torch.float64)
    for units in (False, True):
        assert_updates_agree(twins, ALL_RULES[rule], 7, amsgrad=amsgrad, coupled=coupled, units=units)


@interpreted
@needs_native
def test_momentum_without_a_gradient_is_told_from_none():
    twins = Twins([torch.empty(9, 31)] * 2, torch.float32, guards=False)
    _, grads, exp_avgs, *_ = twins.tensors[0]
    for zero in (*grads, exp_avgs[1]):
        zero.zero_()
    for _, dots, _ in update_both(twins, reference_step.NONE):
        assert dots[0] < 0 and dots[1] == 0


@interpreted
@needs_native
def test_fadam_equals_cpu_kernel_bit_for_bit():
    twins = Twins(STRANGE.values(), *DTYPES, guards=False)
    assert_updates_agree(twins, reference_step.FADAM, guarded=False)


@interpreted
@needs_native
@pytest.mark.parametrize("gradients_strided", (False, True))
@pytest.mark.parametrize("block", (None, 1, 7, 16, 1024, 2500))
def test_output_rows_of_every_layout(block, gradients_strided):
    rule = reference_step.NONE if block is None else reference_step.ALIGN_BLOCK
    twins = Twins(STRANGE.values(), torch.float32, torch.bfloat16, gradients_strided=gradients_strided, seed=2)
    assert_updates_agree(twins, rule, block or 1, units=True)


@interpreted
@needs_native
@pytest.mark.parametrize(
    "kind, coupled, guards, units",
    [
        (kind, coupled, guards, units)
        for kind in range(7)
        for coupled in ((False, True) if scalars.DOT <= kind <= scalars.METRIC else (False,))
        for guards, units in ((False, False), (True, False), (True, True))
        if kind != scalars.SQUARES_MAX or not guards  # it reads raw gradients, and no scalar
    ],
)
def test_reductions_equal_cpu_operator(kind, coupled, guards, units):
    # One element a tensor: sums have one term, and no order. Then sums in another order.
    for like, exact in (([torch.empty(())] * 30, True), (list(STRANGE.values()), False)):
        twins = Twins(like, *DTYPES, guards=guards, seed=3)
        values = None if kind == scalars.SQUARES_MAX else twins.values
        (ours, _held), (theirs, _kept) = twins.place(triton_step), twins.place(native)
        for batch in range(len(DTYPES)):
            factors = unit_factors(triton_step, ours, batch) if units else None
            options = (values, batch, batch * twins.rows, kind, coupled, guards, factors)
            got, expected = triton_step.reduce(ours, *options), native.reduce(theirs, *options)
            assert got.shape == (twins.rows, 2) and got[:, 0].any()
            if exact:
                assert torch.equal(got, expected)
            else:
                assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
                assert kind > 0 or torch.equal(got[:, 1], expected[:, 1])


@interpreted
def test_largest_gradient_passes_over_nan():
    grad = torch.arange(3000.0)
    grad[[5, 2999]] = math.nan
    placed, _held = place_one(torch.zeros_like(grad), grad, [0.0], PLAIN)
    (pair,) = triton_step.reduce(placed, None, 0, 0, scalars.SQUARES_MAX, False, False, None).tolist()
    assert math.isnan(pair[0]) and pair[1] == 2998


@interpreted
@needs_native
@pytest.mark.parametrize("gradients_strided", (False, True))
def test_unit_sums_equal_cpu_operator(gradients_strided):
    like = [*STRANGE.values(), torch.empty(3, 5000), torch.empty(2, 6001), torch.empty(1300, 1)]
    twins = Twins(like, *DTYPES, gradients_strided=gradients_strided)
    (ours, _held), (theirs, _kept) = twins.place(triton_step), twins.place(native)
    for batch in range(len(DTYPES)):
        got, expected = triton_step.unit_sums(ours, batch), native.unit_sums(theirs, batch)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=1e-13, atol=0)


# ---------------------------------------------------------------- past 2^31 and 2^32 elements: addresses, not accesses


@triton.jit
def address_kernel(out_ptr, address, first, stop, block, record_ptr, dims, STRIDED: tl.constexpr, PADDED: tl.constexpr):
    """Where the kernels would look for a tile: addresses, and whether they would."""
    lane, mask = triton_step.tile_mask(first, stop, block, 64, PADDED)
    pointer = triton_step.slot_pointer(address, 1, first, lane, record_ptr, dims, tl.float32, STRIDED, 0)
    own = tl.arange(0, 64)
    tl.store(out_ptr + own, pointer.to(tl.int64))
    tl.store(out_ptr + 64 + own, mask.to(tl.int64))


FIRSTS = (0, 2**31 - 5, 2**31, 2**32 - 64, 2**32 + 3, 2**33 + 7, 2**40)


def addresses_of(first, stop, block=1, record=None, padded=0):
    out = torch.zeros(128, dtype=torch.int64)
    words = torch.tensor(record or [0], dtype=torch.int64)
    dims = torch.tensor([len(record) // 6 if record else 0])
    holder = torch.tensor([2**44, first, stop, block])
    _entry[(1,)](out, holder, words, dims, STRIDED=record is not None, PADDED=padded)
    return out[:64], out[64:].bool()


@triton.jit
def _entry(out_ptr, numbers_ptr, record_ptr, dims_ptr, STRIDED: tl.constexpr, PADDED: tl.constexpr):
    # As in the kernels: int64 from a table, whatever the value.
    address, first = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    stop, block = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    address_kernel(out_ptr, address, first, stop, block, record_ptr, tl.load(dims_ptr), STRIDED, PADDED)


@interpreted
@pytest.mark.parametrize("first", FIRSTS)
def test_addresses_past_32_bits(first):
    lane = torch.arange(64)
    got, mask = addresses_of(first, first + 50)
    assert torch.equal(got, 2**44 + 4 * (first + lane))
    assert torch.equal(mask, lane < 50)
    assert bool(addresses_of(first, 2**45)[1].all())
    got, mask = addresses_of(first, first + 40, block=7, padded=8)
    element = lane // 8 * 7 + lane % 8
    assert torch.equal(got[mask], (2**44 + 4 * (first + element))[mask])
    assert torch.equal(mask, (lane % 8 < 7) & (element < 40))


@interpreted
@pytest.mark.parametrize("first", FIRSTS)
def test_strided_addresses_past_32_bits(first):
    sizes, strides = [2**21, 3, 2**20], [2**22, 2**50, 3]
    record = [*sizes, 0, 0, 0, *strides, *[0] * 9]
    index = first + torch.arange(64)
    offset = index // (3 * 2**20) * strides[0] + index // 2**20 % 3 * strides[1] + index % 2**20 * strides[2]
    got, _ = addresses_of(first, 2**45, record=record)
    assert torch.equal(got, 2**44 + 4 * offset)


def test_chunks_past_32_bits():
    head = torch.zeros(device_table.ROW, dtype=torch.int64)
    head[device_table.NUMEL] = 2**33 + 1
    (launch,), chunks = device_table._make_launches(head, [1], [1])
    begins = chunks.view(-1, 2)[:, 1]
    assert launch.chunks == len(begins) == 2**33 // launch.chunk_size + 1
    assert torch.equal(begins, torch.arange(launch.chunks) * launch.chunk_size)


# ---------------------------------------------------------------- the objectives and the logits


def make_tokens(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """logp, old_logp, advantages, mask, weights, aux, ref_logp, entropy; some of them far out or not finite."""
    own = torch.Generator().manual_seed(seed)
    logp, old, A, w, aux, ref, H = torch.randn(7, rows, cols, generator=own, dtype=torch.float64)
    logp = -logp.abs()
    tokens = [logp, logp - 0.6 * old, A, w.exp(), torch.where(aux < 0, aux, 0.0), logp - 0.5 * ref, H.abs()]
    for k, value in enumerate((30.0, -1e30, 1e30, math.inf, math.nan)):
        for x in tokens[1:3]:
            x.view(-1)[torch.randint(x.numel(), (2,), generator=own)] = value * (-1) ** k
    tokens = [x.to(dtype) for x in tokens]
    return [*tokens[:3], torch.rand(rows, cols, generator=own) < 0.8, *tokens[3:]]


def call_objective(run, tokens, rule: int, scalars, *, kl: int = 3, aggregation: int = 0):
    numbers = [float(x) for x in scalars]
    rest = (None, None, None, len(tokens[0]), rule, numbers, None, aggregation, 0.0, None, 0.1, kl, 0.01, True)
    return run(*tokens, *rest)


SCALARS = {  # of the rules whose tokens do not depend on a sequence; 0, inf, inf, inf stand for no bounds
    "PPO": (0, (0.8, 1.28, 1.9, 2.5)),
    "CISPO": (1, (0.8, 1.28, math.inf, math.inf)),
    "SAPO": (2, (0, math.inf, math.inf, math.inf, 1.0, 1.05)),
    "GPG": (3, (0, math.inf, math.inf, math.inf)),
    "DRO": (4, (0, math.inf, math.inf, math.inf, 0.3)),
    "DPPO-TV": (5, (0.05, 0.08, math.inf, 1.5)),
    "DPPO-KL": (6, (0.02, 0.03, math.inf, 1.5)),
    "GPPO": (7, (0.8, 1.28, 1.9, math.inf, 0.25, 0.75, 1.0, 1.0)),
    "DCPO": (8, (0, math.inf, 1.5, math.inf, 0.2, 0.28, 10.0)),
    "ASPO": (9, (0, math.inf, 3.0, math.inf, 0.2, 0.4)),
    "PPO-EWMA": (10, (-0.2, 0.2, math.inf, 1.5)),
    "KL-Cov": (11, (0, math.inf, math.inf, math.inf, 0.7)),
    "Clip-Cov": (12, (0.8, 1.28, math.inf, math.inf)),
}


@interpreted
@needs_native
@pytest.mark.parametrize("name", SCALARS)
def test_tokens_equal_the_cpu_kernel_bit_for_bit(name):
    rule, scalars = SCALARS[name]
    scalars = [*scalars, 0, 0, 0, 0][:8]
    for dtype in (torch.float32, torch.float64):
        tokens = make_tokens(3, 300, dtype, seed=rule)
        got, expected = (
            call_objective(module.policy_loss, tokens, rule, scalars, kl=1 + rule % 4)
            for module in (triton_objective, native)
        )
        # Both gradients times the scale, which the CPU kernel has applied already; but for the sign of the zeros of
        # masked tokens.
        assert got[1].any() and all(torch.equal(x * got[3], y * expected[3]) for x, y in zip(got[1:3], expected[1:3]))
        # Sums of float64 in another order, each rounded once.
        assert torch.allclose(got[4], expected[4], rtol=2e-7, atol=0)
        assert torch.allclose(got[0], expected[0], rtol=2e-7, atol=1e-12)


@interpreted
def test_programs_that_take_several_tiles(monkeypatch):
    for rows, cols in ((400, 3), (1, 1300)):
        tokens = make_tokens(rows, cols, torch.float32)
        calls = []
        for most in (4096, 2):
            monkeypatch.setattr(triton_objective, "_MOST_PROGRAMS", most)
            calls.append(call_objective(triton_objective.policy_loss, tokens, SCALARS["GPG"][0], [1.0] * 8))
        assert bitwise_equal(calls[0][1:4], calls[1][1:4])
        for x, y in zip(*calls):
            assert torch.allclose(x, y, rtol=1e-6, atol=0)
    lows, highs = [0.5, 0.9], [1.0, 2.0] * 17  # more than one program takes
    few, many = triton_objective.bound_sums(*tokens[:4], lows, highs), reference.bound_sums(*tokens[:4], lows, highs)
    assert torch.allclose(few, many, rtol=1e-6, atol=0)


@interpreted
def test_levels_arrive_exactly():
    for x in (0.6, 0.1, 1 / 3, 1.2 + 16 * 0.05, 2.0, 1e-30, 123456789.123456789):
        high, middle, low = triton_objective._three_floats(x)
        assert (high + middle) + low == x
        assert all(torch.tensor(part, dtype=torch.float32).item() == part for part in (high, middle, low))


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rows_at_every_alignment_give_the_same_bits(dtype):
    V = 75
    own = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, V + 5, generator=own).to(dtype)[..., :V].contiguous()
    tokens, mask = torch.tensor([[3, V - 1]]), None
    g, h = torch.randn(2, 1, 2, generator=own)
    results = []
    for start in (0, 1, 3, 16 // logits.itemsize - 1):
        for shift in (0, 2):  # of the output, relative to the logits
            pad = V + 16 // logits.itemsize - V % (16 // logits.itemsize)  # rows are aligned alike
            space, other = torch.zeros(2, 1, 2, pad + 16, dtype=dtype).unbind()
            x, out = space[..., start : start + V].copy_(logits), other[..., start + shift : start + shift + V]
            logp, entropy, softmax = triton_logits.logits_forward(x, tokens, mask, 0.7, True)
            triton_logits.logits_backward(x, tokens, softmax, entropy, g, h, 0.7, out)
            triton_logits.logits_backward(x, tokens, softmax, entropy, g, h, 0.7, x)
            results.append((logp, entropy, softmax, x.clone(), out.clone()))
            assert not torch.cat((other[..., : start + shift], other[..., start + shift + V :]), -1).any()
    for result in results:
        assert bitwise_equal(result, results[0])
        assert bitwise_equal([result[3]], [result[4]])


@triton.jit
def token_address_kernel(out_ptr, tile_ptr, sizes_ptr, WIDE: tl.constexpr, TILE: tl.constexpr):
    """Where token_kernel would look: the address of a token of one byte, and whether it would."""
    rows, cols, row_stride, col_stride = (
        tl.load(sizes_ptr), tl.load(sizes_ptr + 1), tl.load(sizes_ptr + 2), tl.load(sizes_ptr + 3),
    )  # fmt: skip
    row, col, there = triton_objective.tile_of(tl.load(tile_ptr), rows, cols, WIDE, TILE)
    own = tl.arange(0, TILE)
    tl.store(out_ptr + own, row * row_stride + col * col_stride)
    tl.store(out_ptr + TILE + own, there.to(tl.int64))


@interpreted
@pytest.mark.parametrize("rows, cols", ((2**33, 3), (7, 2**33 + 5), (2**31 + 1, 100)))
def test_tokens_past_32_bits(rows, cols):
    tile, strides = 64, (2**20 + 1, 3)
    wide = cols >= tile
    height = tile // cols if not wide else 1
    tiles = -(-rows // height) if not wide else rows * -(-cols // tile)
    for at in (0, tiles // 2, tiles - 1):
        out = torch.zeros(2 * tile, dtype=torch.int64)
        sizes = torch.tensor([rows, cols, *strides])
        token_address_kernel[(1,)](out, torch.tensor([at]), sizes, WIDE=wide, TILE=tile)
        lane = torch.arange(tile)
        row = at // -(-cols // tile) + 0 * lane if wide else at * height + lane // cols
        col = at % -(-cols // tile) * tile + lane if wide else lane % cols
        there = col < cols if wide else (lane // cols < height) & (row < rows)
        assert torch.equal(out[tile:].bool(), there) and bool(there.any())
        assert torch.equal(out[:tile][there], (row * strides[0] + col * strides[1])[there])


@triton.jit
def logit_address_kernel(out_ptr, numbers_ptr, V_ptr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Where the logits' kernels would look in a row: the addresses of a tile of vectors and of the rest."""
    row, cols = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    offset = triton_logits.row_offset(row, cols, tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3))
    row_ptr = tl.load(numbers_ptr + 4).to(tl.pointer_type(tl.bfloat16)) + offset
    V = tl.load(V_ptr)
    head, vectors = triton_logits.split_row(row_ptr, V, 2, VECTOR)
    first = vectors - 3
    pointer, there = triton_logits.vectors_at(row_ptr, head, vectors, first, 2, VECTOR, TILE)
    index, rest_there = triton_logits.rest_at(V, head, vectors, 0, VECTOR, TILE)
    own = (tl.arange(0, TILE) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    tl.store(out_ptr + own, tl.where(there, pointer.to(tl.int64), 0))
    tl.store(out_ptr + TILE * VECTOR + tl.arange(0, TILE), tl.where(rest_there, (row_ptr + index).to(tl.int64), 0))


@interpreted
@pytest.mark.parametrize("V", (151_936, 2**31 + 9, 2**32 + 3))
def test_logits_past_32_bits(V):
    base, cols, strides = 2**44, 5, (2**37 + 1, 2**34 + 3)
    for row in (0, 4, 70_001):
        out = torch.zeros(4 * 8 + 4 * 8, dtype=torch.int64)
        numbers = torch.tensor([row, cols, *strides, base])
        logit_address_kernel[(1,)](out, numbers, torch.tensor([V]), VECTOR=8, TILE=4)
        begin = base + 2 * (row // cols * strides[0] + row % cols * strides[1])
        head = -(begin // 2) % 8
        vectors = (V - head) // 8
        whole = begin + 2 * (head + 8 * (vectors - 3) + torch.arange(24))
        assert torch.equal(out[:24], whole) and not out[24:32].any()
        rest = [begin + 2 * i for i in (*range(head), *range(head + 8 * vectors, V))]
        assert out[32:36].tolist() == (rest + [0] * 4)[:4]


# ---------------------------------------------------------------- host_table.py against the operator


def table_cases() -> dict[str, dict]:
    """Arguments of tensor_table, some of which it refuses."""

    def lists(*params, grads=None, steps=None, weights=(), maxima=False, states=None):
        params = list(params)
        return dict(
            params=params,
            grads=[torch.ones_like(p) for p in params] if grads is None else grads,
            exp_avgs=[torch.zeros_like(p, dtype=states) for p in params],
            exp_avg_sqs=[torch.zeros_like(p, dtype=states) for p in params],
            max_exp_avg_sqs=[torch.zeros_like(p, dtype=states) for p in params] if maxima else [],
            steps=[torch.zeros(()) for _ in params] if steps is None else steps,
            bias_weights=list(weights),
            group=3,
        )

    def changed(own, **changes):
        return {**own, **changes}

    f = torch.zeros
    both = f(20)
    square = f(6, 6)
    resized = f(2)
    resized.untyped_storage().resize_(0)
    return {
        "one": lists(f(5)),
        "0-d and empty": lists(f(()), f(0), f(3, 0, 2)),
        "every dtype": lists(*(f(3, dtype=d) for d in DTYPES), maxima=True),
        "float32 states and gradients": lists(f(3, dtype=torch.float16), grads=[f(3)], states=torch.float32),
        "float64 steps, weights": lists(f(2), steps=[f(1, 1).double()], weights=[f(2).double()]),
        "transposed": lists(f(4, 5).t(), f(3)),
        "transposed parameter, plain gradient": lists(f(4, 5).t(), grads=[f(5, 4)], maxima=True),
        "channels_last": lists(f(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        "holes": lists(f(4, 6)[:, ::2], f(9)[::3]),
        "size-1 dimensions": lists(f(4, 1, 5).transpose(0, 1), f(1, 1).expand(1, 1)),
        "expanded gradient": lists(f(4, 5), grads=[f(()).expand(4, 5)]),
        "two views side by side": lists(both[:10], both[10:]),
        "interleaved views": lists(both[::2], both[1::2]),
        "gradient is its parameter": lists(both, grads=[both]),
        "shared gradients": lists(f(4), f(4), grads=[both[:4], both[2:6]]),
        # refused
        "lengths": changed(lists(f(3), f(3)), grads=[f(3)]),
        "lengths of maxima": changed(lists(f(3), f(3)), max_exp_avg_sqs=[f(3)]),
        "integer parameter": lists(f(3, dtype=torch.int64), states=torch.float32),
        "shape of gradient": lists(f(3), grads=[f(4)]),
        "shape of state": changed(lists(f(3)), exp_avg_sqs=[f(1, 3)]),
        "dtype of gradient": lists(f(3), grads=[f(3).double()]),
        "dtype of state": lists(f(3), states=torch.float16),
        "states differ": changed(lists(f(3, dtype=torch.bfloat16)), exp_avg_sqs=[f(3)]),
        "expanded parameter": lists(f(()).expand(3)),
        "overlapping parameter": lists(torch.as_strided(f(9), (4, 3), (2, 1))),
        "no memory": lists(f(2), grads=[f(2)], steps=[f(())]) | {"exp_avgs": [resized]},
        "integer step": lists(f(3), steps=[torch.zeros((), dtype=torch.int64)]),
        "bfloat16 step": lists(f(3), steps=[f((), dtype=torch.bfloat16)]),
        "two steps": lists(f(3), steps=[f(2)]),
        "weights": lists(f(3), weights=[f(2)]),
        "strided weights": lists(f(3), weights=[f(4).double()[::2]]),
        "complex weights": lists(f(3), weights=[f(2, dtype=torch.complex64)]),
        "twice": lists(both, both),
        "overlapping views": lists(f(3), both[:10], both[5:15]),
        "gradient of another": lists(both[:10], both[10:], grads=[both[10:], f(10)]),
        "shifted gradient": lists(both[:10], grads=[both[1:11]]),
        "gradient of another type": lists(both[:4], grads=[both.view(torch.float32)[:4]]) | {"exp_avgs": [both[:4]]},
        "strided and overlapping": lists(both[::2], both[::4]),
        "transpose of itself": lists(square, grads=[square.t()]),
        "lazy": lists(f(3), grads=[torch.zeros(3, dtype=torch.complex64).conj().imag]),
        "zero tensor": lists(f(3), grads=[torch._efficientzerotensor(3)]),
    }


def outcome_of(function, arguments) -> tuple[str, str]:
    try:
        table = function(*arguments.values())
    except RuntimeError as error:
        return "refused", str(error).split("\nException raised")[0]
    assert table.dtype == torch.int64 and table.device.type == "cpu"
    return "words", str(table.tolist())


@needs_native
@pytest.mark.parametrize("case", table_cases())
def test_host_table_is_the_operator_word_for_word(case):
    arguments = table_cases()[case]
    expected = outcome_of(native.tensor_table, arguments)
    assert outcome_of(host_table.tensor_table, arguments) == expected
    assert outcome_of(host_table.tensor_table, arguments) == expected  # what was found disjoint is not checked again


def test_host_table_refuses_two_devices():
    tensors = [torch.zeros(3), torch.zeros(3, device="meta")]
    lists = [tensors, [torch.zeros(3)] * 2, [torch.zeros(3)] * 2, [torch.zeros(3)] * 2, [], [torch.zeros(())] * 2, []]
    with pytest.raises(RuntimeError, match=r"params\[1\] is not on the device of params\[0\]"):
        host_table.tensor_table(*lists, 0)


@interpreted
@needs_native
def test_a_step_with_the_host_table(monkeypatch):
    params = make_params(torch.float32, shapes=SHAPES)
    params.append(torch.randn(40, 30).t())
    grads = make_grads(params, 2)
    expected = run(fca.FusedClipAdamW, params, grads, backend="triton")
    monkeypatch.setattr(triton_step, "tensor_table", host_table.tensor_table)
    assert bitwise_equal(results(*run(fca.FusedClipAdamW, params, grads, backend="triton")), results(*expected))
