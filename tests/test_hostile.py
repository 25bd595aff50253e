"""Wrong, odd and hostile tensors: each is refused with nothing changed, or updated element for element."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import fused_clip_adam as fca
from fused_clip_adam import rules
from fused_clip_adam.backends import native

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

CLASSES = (fca.FusedClipAdamW, fca.FusedClipAdam)
NARROW = (torch.bfloat16, torch.float16)

# ---------------------------------------------------------------- refused, and nothing has been changed

NAN, INF = float("nan"), float("inf")

CONSTRUCTOR = {
    "negative lr": (dict(lr=-1.0), ValueError),
    "NaN lr": (dict(lr=NAN), ValueError),
    "negative eps": (dict(eps=-1e-8), ValueError),
    "NaN eps": (dict(eps=NAN), ValueError),
    "beta1 = 1": (dict(betas=(1.0, 0.9)), ValueError),
    "negative beta2": (dict(betas=(0.9, -0.1)), ValueError),
    "NaN beta": (dict(betas=(NAN, 0.9)), ValueError),
    "negative decay": (dict(weight_decay=-0.1), ValueError),
    "NaN decay": (dict(weight_decay=NAN), ValueError),
    "unknown overshoot": (dict(overshoot="coast"), ValueError),
    "a number for overshoot": (dict(overshoot=0.5), TypeError),
    "the base of the overshoot rules": (dict(overshoot=rules.Overshoot()), TypeError),
    "two rules of a direction": (dict(overshoot=("align", "cautious")), ValueError),
    "a number among overshoot rules": (dict(overshoot=("align", 0.5)), TypeError),
    "clip at zero": (dict(grad_clip=0.0), ValueError),
    "negative clip": (dict(grad_clip=-1.0), ValueError),
    "NaN clip": (dict(grad_clip=NAN), ValueError),
    "True for a clip": (dict(grad_clip=True), TypeError),
    "the base of the clip rules": (dict(grad_clip=rules.GradClip()), TypeError),
    "a name for reset": (dict(reset="often"), TypeError),
    "the base of the reset rules": (dict(reset=rules.Reset()), TypeError),
    "unknown backend": (dict(backend="tpu"), ValueError),
    "state in bfloat16": (dict(state_dtype=torch.bfloat16), ValueError),
    "a number for skip_nonfinite": (dict(skip_nonfinite=1), TypeError),
    "foreach and fused": (dict(foreach=True, fused=True), RuntimeError),
    "a rule beside differentiable": (dict(differentiable=True, grad_clip=1.0), ValueError),
}


@pytest.mark.parametrize("case", CONSTRUCTOR)
@pytest.mark.parametrize("cls", CLASSES)
def test_constructor_refuses(cls, case):
    kwargs, error = CONSTRUCTOR[case]
    with pytest.raises(error) as caught:
        cls([Parameter(torch.ones(3))], **kwargs)
    assert len(str(caught.value)) > 10


@pytest.mark.parametrize(
    "make, error",
    (
        (lambda: fca.AlignedMomentum(block=0), ValueError),
        (lambda: fca.AlignedMomentum(block=2**63), ValueError),  # must not reach int64 arithmetic
        (lambda: fca.AlignedMomentum(block=1.5), ValueError),
        (lambda: fca.AlignedMomentum(block="row"), ValueError),
        (lambda: fca.PerTensorNorm(0.0), ValueError),
        (lambda: fca.PerTensorNorm(NAN), ValueError),
        (lambda: fca.AutoClip(101.0), ValueError),
        (lambda: fca.AutoClip(history=0), ValueError),
        (lambda: fca.ZClip(alpha=1.0), ValueError),
        (lambda: fca.ZClip(z_threshold=-1.0), ValueError),
        (lambda: fca.ZClip(max_norm=0.0), ValueError),
        (lambda: fca.ZClip(warmup=2.5), ValueError),
        (lambda: fca.ZClip(mode="z"), ValueError),
        (lambda: fca.AdaGC(beta=-0.1), ValueError),
        (lambda: fca.AdaGC(start=0), ValueError),
        (lambda: fca.AdaGC(ratio=INF), ValueError),
        (lambda: fca.UpdateClamp(0.0), ValueError),
        (lambda: fca.UpdateClamp(INF), ValueError),
        (lambda: fca.UpdateClamp(NAN), ValueError),
        (lambda: fca.UpdateClamp(True), ValueError),
        (lambda: fca.UpdateClamp(mode="soft"), ValueError),
        (lambda: fca.MomentumBrake(strength=1.1), ValueError),
        (lambda: fca.MomentumBrake(hold_v=1.0), ValueError),  # W2 = 0 after a fully clipped first step
        (lambda: fca.MomentumBrake(mode="hard"), ValueError),
        (lambda: fca.OnRollout(moments=False, counters=False), ValueError),
        (lambda: fca.GlobalNorm(INF - INF), ValueError),
        (lambda: fca.FusedClipAdamW([]), ValueError),
        (
            lambda: fca.FusedClipAdamW([{"params": {Parameter(torch.ones(1))}}]),
            TypeError,
        ),  # a set has no order
        (lambda: fca.FusedClipAdamW([Parameter(torch.ones(2, dtype=torch.complex64))]), TypeError),
        (lambda: fca.FusedClipAdamW([torch.ones(2, requires_grad=True) * 1]), ValueError),  # not a leaf
    ),
)
def test_rules_and_parameters_refuse(make, error):
    with pytest.raises(error):
        make()


def raw(tensor: Tensor) -> bytes:
    """Every byte of the tensor's storage, also of what the view does not show."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or torch._is_zerotensor(tensor):
        return repr(tensor).encode()
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()


def snapshot(opt) -> list:
    """All that a step may write, and the keys of all dicts."""
    books = opt._books
    out = [(k, raw(getattr(books, k))) for k in ("grad_square_sum", "steps_skipped")]
    out.append(None if books.observed is None else raw(books.observed))
    for group in opt.param_groups:
        out.append([(k, repr(v)) for k, v in group.items() if k != "params"])
        for p in group["params"]:
            out.append((raw(p.detach()), None if p.grad is None else raw(p.grad), p._version))
            own = opt.state.get(p)
            out.append(own if own is None else [(k, raw(v) if isinstance(v, Tensor) else v) for k, v in own.items()])
    return [*out, len(opt.state)]


FLOAT8 = torch.float8_e4m3fn


def ones(*shape, dtype=torch.float32) -> Parameter:
    return Parameter(torch.ones(*shape, dtype=dtype), requires_grad=dtype.is_floating_point)


def give_grad(p: Tensor, grad: Tensor) -> Tensor:
    """Assigns a gradient torch would otherwise refuse."""
    p.grad_dtype = None
    p.grad = grad
    return p


def reshaped_under_its_gradient() -> list[Tensor]:
    p = give_grad(ones(4), torch.ones(4))
    p.data = torch.ones(3)
    return [p]


def on_meta() -> list[Tensor]:
    p = Parameter(torch.ones(3, device="meta"))
    return [give_grad(p, torch.ones(3, device="meta"))]


def sharing(first, second) -> list[Tensor]:
    base = torch.arange(12.0)
    params = [view(base).requires_grad_() for view in (first, second)]
    return [give_grad(p, torch.ones_like(p)) for p in params]


def expanded() -> list[Tensor]:
    p = torch.ones(1).expand(4).requires_grad_()
    return [give_grad(p, torch.ones(4))]


def negated() -> list[Tensor]:
    p = torch._neg_view(torch.ones(4)).requires_grad_()
    return [give_grad(p, torch.ones(4))]


PARAMETERS = {
    "a gradient of another shape": reshaped_under_its_gradient,
    "int64": lambda: [give_grad(ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))],
    "bool": lambda: [give_grad(ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool))],
    "float8": lambda: [give_grad(Parameter(torch.ones(3).to(FLOAT8)), torch.ones(3).to(FLOAT8))],
    "float64 gradient": lambda: [give_grad(ones(3), torch.ones(3, dtype=torch.float64))],
    "bfloat16 gradient": lambda: [give_grad(ones(3), torch.ones(3, dtype=torch.bfloat16))],
    "float16 gradient of bfloat16": lambda: [
        give_grad(ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16))
    ],
    "sparse gradient": lambda: [give_grad(ones(3), torch.ones(3).to_sparse())],
    "complex gradient": lambda: [give_grad(ones(3), torch.ones(3, dtype=torch.complex64))],
    "meta": on_meta,
    "identical views": lambda: sharing(lambda x: x[:], lambda x: x[:]),
    "overlapping views": lambda: sharing(lambda x: x[:7], lambda x: x[6:]),
    "a strided view across another": lambda: sharing(lambda x: x[::3], lambda x: x[2:7]),
    "expanded parameter": expanded,
    "negative bit": negated,
}


@pytest.mark.parametrize("options", ({}, dict(grad_clip=1.0, overshoot="brake", amsgrad=True)), ids=("plain", "extras"))
@pytest.mark.parametrize("case", PARAMETERS)
def test_step_refuses_a_parameter_and_changes_nothing(case, options):
    good, late = give_grad(ones(5), torch.ones(5)), ones(2)
    opt = fca.FusedClipAdamW([good], **options)
    opt.step()  # one healthy step, so that there is a state to damage
    opt.add_param_group({"params": PARAMETERS[case]()})
    opt.add_param_group({"params": [give_grad(late, torch.ones(2))]})
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        opt.step()
    assert snapshot(opt) == before
    assert len(str(caught.value)) > 20


SETTINGS = {
    "lr": (-1.0, NAN),
    "eps": (-1.0, NAN),
    "weight_decay": (-1.0, NAN),
    "betas": ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN)),
    "overshoot": ("coast", 1.0, rules.Overshoot()),
    "grad_clip": (-1.0, NAN, "much", rules.GradClip()),
    "reset": ("often", rules.Reset()),
    "differentiable": (True,),
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in SETTINGS.items() for value in values])
def test_step_refuses_a_setting_and_changes_nothing(key, value):
    first, second = ones(5), ones(3)
    opt = fca.FusedClipAdamW([{"params": [first]}, {"params": [second]}], overshoot="align", grad_clip=1.0)
    first.grad, second.grad = torch.ones(5), torch.ones(3)
    opt.step()
    opt.param_groups[1][key] = value
    before = snapshot(opt)
    with pytest.raises((ValueError, TypeError)):
        opt.step()
    assert snapshot(opt) == before


STATES = {
    "shape": ("exp_avg", torch.zeros(4)),
    "dtype": ("exp_avg_sq", torch.zeros(3, dtype=torch.float64)),
    "narrow dtype": ("exp_avg", torch.zeros(3, dtype=torch.bfloat16)),
    "expanded": ("exp_avg", torch.zeros(1).expand(3)),
    "integer step": ("step", torch.tensor(1)),
    "long step": ("step", torch.zeros(2)),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("bad_first", (True, False))
def test_step_refuses_a_state_and_changes_nothing(case, bad_first):
    params = [ones(3), ones(3)]
    opt = fca.FusedClipAdamW([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones(3)
    opt.step()
    name, value = STATES[case]
    opt.state[params[not bad_first]][name] = value
    opt.param_groups[0]["amsgrad"] = True  # would add a state to the first parameter
    opt.param_groups[1]["overshoot"] = fca.MomentumBrake()
    before = snapshot(opt)
    with pytest.raises((RuntimeError, ValueError)):
        opt.step()
    assert snapshot(opt) == before


@pytest.mark.parametrize(
    "scale, found", ((torch.ones(2), torch.zeros(1)), (torch.ones(1), torch.zeros(1, dtype=torch.int)))
)
def test_a_scaler_of_the_wrong_kind_changes_nothing(scale, found):
    p = ones(3)
    p.grad = torch.ones(3)
    opt = fca.FusedClipAdamW([p], overshoot="brake", grad_clip=1.0)
    opt.grad_scale, opt.found_inf = scale, found
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="must"):
        opt.step()
    assert snapshot(opt) == before


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="reads an ELF file by readelf")
def test_library_shares_the_cpp_runtime_with_torch():
    """A runtime of its own, as some compilers link it statically, throws what nobody catches: a refusal ends Python."""
    path = pathlib.Path(fca.__file__).with_name("_C.abi3.so")
    if not path.exists():
        pytest.skip("another library is under test")
    text = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
    assert {"libstdc++.so.6", "libgcc_s.so.1"} <= set(needed), needed


# ---------------------------------------------------------------- odd layouts: right in every element

RULES = {
    "none": {},
    "align 1024": dict(overshoot="align"),
    "align 7": dict(overshoot=fca.AlignedMomentum(block=7)),
    "align element": dict(overshoot="align-element"),
    "cautious": dict(overshoot="cautious"),
    "grams and clamp": dict(overshoot=("grams", fca.UpdateClamp(0.5))),
    "atan2": dict(overshoot=fca.UpdateClamp(1.0, mode="atan2")),
    "brake": dict(overshoot=fca.MomentumBrake(0.5, hold_v=0.5)),
    "damp": dict(overshoot=fca.MomentumBrake(0.5, mode="damp")),
    "clip": dict(grad_clip=0.5),
    "maximize": dict(maximize=True),
}
SHAPES = (
    (),
    (0,),
    (1,),
    (5,),
    (1030,),
    (3, 4),
    (1, 7),
    (33, 40),
    (2, 0, 3),
    (2, 3, 4),
    (4, 1, 5),
    (2, 3, 2, 3),
)
POISON = 0xA5


def place(values: Tensor, order: list[int], gaps: list[int], offset: int) -> tuple[Tensor, Tensor]:
    """Copies `values` into a poisoned buffer: dimensions in `order` from the innermost, `gaps` between.

    A gap of -1 expands the dimension (stride 0).
    """
    strides, reach = [0] * values.dim(), 1 + max(gaps[0], 0)
    for d, gap in zip(order, gaps[1:]):
        if gap < 0:
            continue
        strides[d] = reach
        reach = reach * max(values.shape[d], 1) + gap
    buffer = torch.full(((offset + reach + 16) * values.element_size(),), POISON, dtype=torch.uint8).view(values.dtype)
    view = buffer.as_strided(values.shape, strides, offset)
    for d in range(values.dim()):
        if strides[d] == 0:
            values = values[(slice(None),) * d + (slice(0, 1),)]
    buffer.as_strided(values.shape, strides, offset).copy_(values)
    return view, buffer


def outside(view: Tensor, buffer: Tensor) -> bytes:
    """The bytes of a buffer that do not belong to a view of it."""
    mask = torch.ones(buffer.shape, dtype=torch.bool)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return buffer[mask].view(torch.uint8).numpy().tobytes()


@st.composite
def layouts(draw, shape, may_expand: bool = False):
    order = draw(st.permutations(range(len(shape))))
    low = -1 if may_expand else 0
    gaps = [draw(st.integers(0, 2))] + [draw(st.integers(low, 3)) for _ in shape]
    return order, gaps, draw(st.integers(0, 9))  # the offset misaligns vectors


@st.composite
def cases(draw):
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from((torch.float64, torch.float32, *NARROW)))
    return dict(
        cls=draw(st.sampled_from(CLASSES)),
        shape=shape,
        dtype=dtype,
        grad_dtype=draw(st.sampled_from((dtype, torch.float32))),
        state_dtype=draw(st.sampled_from((None, torch.float32))),
        rule=draw(st.sampled_from(tuple(RULES))),
        amsgrad=draw(st.booleans()),
        weight_decay=draw(st.sampled_from((0.0, 0.125))),
        layouts=[draw(layouts(shape, may_expand=i == 1)) for i in range(5)],
        seed=draw(st.integers(0, 99)),
    )


def lattice(shape, generator, dtype, positive=False) -> Tensor:
    """Multiples of 1/16 up to 2: exact in every dtype, so that no comparison of signs hangs on a rounding."""
    x = torch.randint(1 if positive else -32, 33, shape, generator=generator) / 16
    return x.to(torch.float64).to(dtype)


def run_case(case, backend, wide: bool):
    """One step from given states; returns the tensors written, their placements and the optimizer."""
    generator = torch.Generator().manual_seed(case["seed"])
    state_dtype = case["state_dtype"] or case["dtype"]
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    dtypes = (case["dtype"], case["grad_dtype"], state_dtype, state_dtype, state_dtype)
    placed, buffers = {}, {}
    for name, dtype, (order, gaps, offset) in zip(names, dtypes, case["layouts"]):
        values = lattice(case["shape"], generator, dtype, positive=name.endswith("sq"))
        placed[name], buffers[name] = place(values, order, gaps, offset)
        if wide:
            placed[name] = placed[name].double().contiguous()
    p = placed["param"].requires_grad_()
    give_grad(p, placed["grad"])
    opt = case["cls"](
        [p],
        lr=0.0625,
        betas=(0.875, 0.75),  # powers of two: a m + b g is exact on the lattice
        weight_decay=case["weight_decay"],
        amsgrad=case["amsgrad"],
        state_dtype=None if wide else case["state_dtype"],
        backend=backend,
        **RULES[case["rule"]],
    )
    state = {"step": torch.tensor(3.0), "exp_avg": placed["exp_avg"], "exp_avg_sq": placed["exp_avg_sq"]}
    if case["amsgrad"]:
        state["max_exp_avg_sq"] = placed["max_exp_avg_sq"]
    opt.state[p] = state
    stats = torch.zeros(14)
    stats[4], stats[5] = 1.0, 2.0
    opt.observe(fca.ClipStats(stats))
    guards = {name: outside(placed[name].detach(), buffers[name]) for name in names} if not wide else {}
    untouched = placed["grad"].clone()
    opt.step()
    assert torch.equal(placed["grad"], untouched)
    for name, guard in guards.items():
        assert outside(placed[name].detach(), buffers[name]) == guard, f"memory around {name} was written"
    return {"param": p.detach(), **{k: v for k, v in opt.state[p].items()}}


def one_rounding(dtype: torch.dtype, expected: Tensor) -> Tensor:
    """Half an ulp of the storage type, plus the arithmetic: at most 8 roundings of operands up to 8."""
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    # A float64 parameter with float32 states rounds the states alone; they are float32 here and get its eps.
    floor = 2**-25 if dtype == torch.float16 else 0.0  # half of the smallest subnormal
    return expected.abs() * torch.finfo(dtype).eps / 2 + 8 * 8 * arithmetic + floor


EXAMPLE = dict(
    cls=fca.FusedClipAdamW,
    grad_dtype=torch.float32,
    state_dtype=None,
    amsgrad=True,
    weight_decay=0.125,
    seed=0,
)
PLAIN = ([1, 0], [0, 0, 0], 0)
TRANSPOSED, GAPPED = ([0, 1], [0, 0, 0], 1), ([1, 0], [1, 0, 3], 3)


@settings(max_examples=400)
@given(cases())
@example({**EXAMPLE, "shape": (300, 300), "dtype": torch.float32, "rule": "align 7",
          "layouts": [TRANSPOSED, GAPPED, TRANSPOSED, GAPPED, TRANSPOSED]})  # fmt: skip
@example({**EXAMPLE, "shape": (300, 300), "dtype": torch.bfloat16, "rule": "brake",
          "layouts": [TRANSPOSED] * 5})  # dense, all alike: memory order  # fmt: skip
@example({**EXAMPLE, "shape": (1, 70000), "dtype": torch.float32, "rule": "align 1024",
          "layouts": [PLAIN, ([1, 0], [0, -1, -1], 0), PLAIN, PLAIN, PLAIN]})  # fmt: skip
def test_every_layout_dtype_and_rule_is_one_rounding_from_float64(case):
    got = run_case(case, "cpu", wide=False)
    expected = run_case(case, "reference", wide=True)
    assert list(got) == list(expected)
    for name, value in got.items():
        if name in ("step", "bias_weights"):
            assert torch.equal(value, expected[name])
        else:
            error = (value.double() - expected[name]).abs()
            assert bool((error <= one_rounding(value.dtype, expected[name])).all()), (name, case, error.max())


# ---------------------------------------------------------------- parameters that lie in each other

CUTS = {
    "every second": [slice(0, None, 2), slice(1, None, 2)],
    "every third": [slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)],
    "halves": [slice(0, 600), slice(600, None)],
}


def train_pieces(cls, cut, base: Tensor, **options) -> Tensor:
    base = base.clone()
    params = [base[piece].requires_grad_() for piece in CUTS[cut]]
    opt = cls(params, lr=0.1, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return base.detach()


@pytest.mark.parametrize("cut", CUTS)
def test_disjoint_pieces_of_one_storage(cut):
    base = torch.randn(1201)
    ours, theirs = (train_pieces(cls, cut, base) for cls in (fca.FusedClipAdamW, torch.optim.AdamW))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # ~10 float32 roundings of values up to 4


def test_a_new_layout_at_the_old_addresses_is_checked_again():
    base = torch.arange(16.0)
    a, b = (base.as_strided((2, 2), (1, 4), start).requires_grad_() for start in (0, 2))
    a.grad, b.grad = torch.ones(2, 2), torch.ones(2, 2)
    opt = fca.FusedClipAdamW([a, b])
    opt.step()  # {0, 1, 4, 5} and {2, 3, 6, 7} are disjoint
    b.data = base.as_strided((2, 2), (2, 3), 2)  # {2, 4, 5, 7}: the same first and last address
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="share memory"):
        opt.step()
    assert snapshot(opt) == before


def lazy_negative(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


GRADIENTS = {
    "the parameter itself": lambda p, q, base: (p.detach(), q.detach()),
    "the next parameter": lambda p, q, base: (q.detach(), p.detach()),
    "shifted by one": lambda p, q, base: (base[1 : 1 + p.numel()], torch.ones_like(q)),
    "one tensor for both": lambda p, q, base: (base[-p.numel() :], base[-p.numel() :]),
    "negative bit": lambda p, q, base: (lazy_negative(torch.ones_like(p)), torch.ones_like(q)),
    "imaginary part of a conjugate": lambda p, q, base: ((1j * torch.ones(p.shape)).conj().imag,) * 2,
    "zero tensor": lambda p, q, base: (torch._efficientzerotensor(p.shape), torch.ones_like(q)),
    "copy on write": lambda p, q, base: (torch._lazy_clone(base[-p.numel() :]), torch.ones_like(q)),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_gradient_in_odd_memory_is_right_or_refused(case):
    n = 100_000  # two chunks a tensor: an order of threads would show
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3 * n, generator=generator)
    bases = []
    for cls in (torch.optim.AdamW, fca.FusedClipAdamW):
        base = start.clone()
        p, q = base[:n].requires_grad_(), base[n : 2 * n].requires_grad_()
        opt = cls([p, q], lr=0.1, foreach=False)
        p.grad, q.grad = GRADIENTS[case](p, q, base)
        bases.append(base)
        if cls is fca.FusedClipAdamW:
            before = snapshot(opt)
            try:
                opt.step()
            except (RuntimeError, TypeError):
                assert snapshot(opt) == before
                return
        else:
            opt.step()
    torch.testing.assert_close(bases[1], bases[0], rtol=1e-6, atol=1e-6)  # ~10 roundings of values up to 5


def test_a_copy_on_write_parameter_does_not_write_through():
    base = torch.ones(100)
    p = torch._lazy_clone(base).requires_grad_()
    p.grad = torch.ones(100)
    fca.FusedClipAdamW([p]).step()
    assert torch.equal(base, torch.ones(100))
    assert not torch.equal(p.detach(), base)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_block_longer_than_the_tensor_is_the_tensor(backend):
    params = [Parameter(torch.ones(5)) for _ in range(2)]
    for p, block in zip(params, (5, 2**48)):
        p.grad = torch.tensor([1.0, -2.0, 3.0, 0.0, 1.0])
        opt = fca.FusedClipAdamW([p], overshoot=fca.AlignedMomentum(block=block), backend=backend)
        opt.step()
    assert torch.equal(*params)


# ---------------------------------------------------------------- same bytes on every machine


def all_bytes() -> bytes:
    """A step of strided, narrow and wide tensors under every rule."""
    out = []
    for rule in RULES:
        mixed, alike = [TRANSPOSED, GAPPED, PLAIN, GAPPED, PLAIN], [TRANSPOSED] * 5
        for dtype, where in ((torch.float32, mixed), (torch.bfloat16, alike)):
            case = {**EXAMPLE, "shape": (400, 300), "dtype": dtype, "rule": rule, "layouts": where}
            for x in run_case(case, "cpu", wide=False).values():
                out.append(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(out)


def bytes_of_a_process(tmp_path, threads: int, isa: str | None) -> bytes:
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **({"FUSED_CLIP_ADAM_CPU_ISA": isa} if isa else {})}
    program = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2])); import test_hostile; "
        "open(sys.argv[1], 'wb').write(test_hostile.all_bytes())"
    )
    target = tmp_path / "bytes"
    subprocess.run([sys.executable, "-c", program, str(target), str(threads)], check=True, env=environment, timeout=300)
    return target.read_bytes()


def test_strided_and_narrow_tensors_give_the_same_bytes_everywhere(tmp_path):
    expected = bytes_of_a_process(tmp_path, 2, None)
    for threads, isa in ((1, "avx2"), (2, "baseline")):
        assert bytes_of_a_process(tmp_path, threads, isa) == expected, (threads, isa)


def test_wrapper_subclasses_are_refused():
    # DTensor and its like hold their memory elsewhere; torch's own two-tensor wrapper stands for them.
    from torch.testing._internal.two_tensor import TwoTensor

    p = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    p.grad = TwoTensor(torch.ones(3), torch.ones(3))
    opt = fca.FusedClipAdamW([p])
    with pytest.raises(TypeError, match="TwoTensor"):
        opt.step()
    assert len(opt.state) == 0
