"""`theory.bytes_per_element` of every rule against the passes that a real step makes, and the byte table."""

from __future__ import annotations

import pytest
import torch
from cases import RULES, make_stats

import fused_clip_adam as fca
from benchmarks.test_scores import grown
from fused_clip_adam.backends import reference, scalars

P, G, S = 2, 4, 8  # widths that no sum confuses: what is counted are slots
READS = {  # what each reduction reads beside the gradient: `summand` of csrc/update_math.h
    scalars.SQUARES_MAX: (),
    scalars.TAU_SQUARES: (),
    scalars.DOT: ("exp_avg",),
    scalars.AGREE: ("exp_avg",),
    scalars.RMS: ("exp_avg_sq",),
    scalars.METRIC: ("exp_avg_sq",),
    scalars.FADAM_SQUARES: ("exp_avg_sq", "param"),
}
WIDTH = {"param": P, "grad": G, "exp_avg": S, "exp_avg_sq": S}


def plain_step(opt, p) -> None:
    p.grad = torch.randn(3, 5)
    opt.step()


def counted(monkeypatch, options: dict, cls=fca.FusedClipAdamW, step=plain_step, grad=G) -> int:
    """Bytes an element of one step, from the calls that it makes of the backend; `grad`: to read a gradient once."""
    moved: list[int] = []
    width = {**WIDTH, "grad": grad}

    def watch(name, cost):
        real = getattr(reference, name)

        def call(*args, **kwargs):
            moved.append(cost(*args, **kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(reference, name, call)

    def reduced(placed, values, batch, first, kind, coupled, spiked, unit_factors):
        also = {"exp_avg_sq"} if spiked and kind in (scalars.DOT, scalars.AGREE) else set()
        return grad + sum(width[name] for name in {*READS[kind], *also})

    watch("grad_square_sums", lambda placed: grad)
    watch("sample_square_sums", lambda placed: grad)
    watch("unit_sums", lambda placed, batch: grad + P)
    watch("reduce", reduced)
    amsgrad = options.get("amsgrad", False)
    watch("update_", lambda *args: 2 * P + grad + 4 * S + (2 * S if amsgrad else 0))
    p = torch.nn.Parameter(torch.randn(3, 5))
    opt = cls([p], backend="reference", **options)
    opt.observe(make_stats(1))
    step(opt, p)
    return sum(moved)


COMBINED = {
    "spikes and a gate": dict(grad_clip=(1.0, fca.SpikeClip(start=0), fca.UpdateRMS()), overshoot="align-tensor"),
    "everything": dict(
        grad_clip=(fca.StableSpamClip(), fca.SpikeClip(), fca.InducedMetric()),
        overshoot=fca.Cautious(rescale=True),
        reset=fca.Periodic(2, 1),
        amsgrad=True,
    ),
}


@pytest.mark.parametrize("name", [*RULES, *COMBINED])
def test_bytes_are_those_of_the_passes_that_are_made(monkeypatch, name):
    options = {**RULES, **COMBINED}[name]
    asked = {key: options[key] for key in ("amsgrad", "grad_clip", "overshoot", "reset") if key in options}
    assert fca.theory.bytes_per_element(P, G, S, **asked) == counted(monkeypatch, options)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sample_norms", (False, True))
def test_bytes_of_a_step_from_scores(monkeypatch, name, sample_norms):
    B, options = 3, RULES[name]
    asked = {key: options[key] for key in ("amsgrad", "grad_clip", "overshoot", "reset") if key in options}
    expected = fca.theory.bytes_per_element(P, G, S, samples=B, sample_norms=sample_norms, **asked)
    bound = 1.0 if sample_norms else None

    def step(opt, p):
        opt.step_from_scores(
            [torch.randn(B, 3, 5)], torch.zeros(B), torch.zeros(B), torch.ones(B), max_sample_norm=bound
        )

    assert expected == counted(monkeypatch, options, step=step, grad=B * G)


def test_norm_for_the_guard_is_counted(monkeypatch):
    assert fca.theory.bytes_per_element(P, G, S, norm=True) == counted(monkeypatch, dict(skip_nonfinite=True))


def test_fadam_moves_44_bytes(monkeypatch):
    # Its update, and g for its rms, and (p, g, f) for the two sums.
    assert counted(monkeypatch, {}, fca.FusedFAdam) == 2 * P + G + 4 * S + G + (P + G + S)
    assert 2 * 4 + 4 + 4 * 4 + 4 + 3 * 4 == 44


@pytest.mark.parametrize(
    "float32, options",
    (
        (28, {}),
        (28, fca.presets.spam()),
        (28, fca.presets.adam_rel()),
        (28, dict(overshoot="brake")),
        (28, dict(overshoot="align")),
        (28, fca.presets.cautious()),
        (28, dict(overshoot="grams")),
        (28, dict(overshoot=fca.AlignedMomentum("tensor", lag=True))),
        (32, fca.presets.zclip()),
        (32, fca.presets.adagc()),
        (32, fca.presets.componentwise_clip()),
        (36, fca.presets.cautious(parity=True)),
        (36, fca.presets.stable_adamw()),
        (36, fca.presets.stable_spam()),
        (36, fca.presets.agc()),
    ),
)
def test_byte_table(float32, options):
    rules = {key: options[key] for key in ("grad_clip", "overshoot", "reset") if key in options}
    assert fca.theory.bytes_per_element(**rules) == float32


def test_policy_step_has_no_gradient_sized_buffer():
    # The largest resident set of a process of its own: 100 MB of gradient would show. Contracting first has one.
    assert grown("ours", 25_000_000) < 0.1
    assert grown("einsum, then our step", 25_000_000) > 0.9
