"""The objectives against the code of the libraries they come from, called on the same tensors: loss and gradient.

TRL 1.16 and verl 0.9 compute in float64 if their inputs are; Liger's chunked loss does in its token part. Each library
is optional. verl's losses import with `pip install --no-deps verl==0.9.1` and `pip install ray tensordict==0.10.0
omegaconf hydra-core codetiming accelerate`.
"""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import fused_clip_adam as fca
from fused_clip_adam.backends import native

os.environ.setdefault("HF_HUB_OFFLINE", "1")
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

# Sums of <= 60 float64 terms of size ~1 in another order; a wrong factor, sign or bound is above 1e-3.
EXACT = dict(rtol=1e-10, atol=1e-10)
# verl adds 1e-8 to the length of a sequence, which is at least 3 here.
LENGTH_EPS = dict(rtol=1e-8, atol=1e-8)
# Liger's log-softmax and sums are float32: ~50 terms of size ~1, 50 * 6e-8.
FLOAT32 = dict(rtol=2e-5, atol=3e-6)


@pytest.fixture(params=(pytest.param("cpu", marks=needs_native), "reference"))
def backend(request):
    return request.param


def imported(name, advice):
    try:
        return importlib.import_module(name)
    except Exception as error:  # some fail on their own imports, with other errors than ImportError
        pytest.skip(f"{name} does not import ({type(error).__name__}: {error}); {advice}")


def make(rows=6, cols=10, seed=0, spread=0.6):
    """A float64 [B, T] batch whose ratios meet every bound; lengths 3..T, padded with finite numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(rows, cols, generator=generator, dtype=torch.float64)

    logp = -1.2 + normal(0.4)
    lengths = torch.randint(3, cols + 1, (rows, 1), generator=generator)
    return SimpleNamespace(
        logp=logp.clamp(max=-0.01),
        old_logp=(logp - normal(spread)).clamp(max=-0.01),
        ref_logp=logp - normal(0.5),
        per_sequence=normal()[:, 0],
        per_token=normal(),
        weights=normal(0.3).exp(),
        mask=torch.arange(cols) < lengths,
    )


def value_and_grad(loss_of, x):
    leaf = x.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def ours(batch, advantages, backend, objective, **options):
    options = dict(mask=batch.mask, objective=objective, backend=backend, **options)
    return value_and_grad(lambda x: fca.policy_loss(x, batch.old_logp, advantages, **options)[0], batch.logp)


def test_the_batch_meets_every_bound():
    """Of the objectives below, on both sides of A; by more than the two codes' roundings."""
    batch = make()
    D, p, q = batch.logp - batch.old_logp, batch.logp.exp(), batch.old_logp.exp()
    r, s = D.exp(), ((D * batch.mask).sum(1) / batch.mask.sum(1)).exp()
    A, B = batch.per_token, batch.per_sequence
    for beyond in (
        (r > 1.28) & (A > 0),
        (r < 0.8) & (A < 0),
        (r > 1.8) & (A < 0),  # dual clip, and the cap of 1.7
        (r > 1.1) & (r <= 1.28) & (A < 0),  # the cap below the bound
        (p - q > 0.08) & (A > 0),
        (p - q < -0.05) & (A < 0),
        (D > 0.4) & (A > 0),
        (D < -0.4) & (A < 0),
    ):
        assert (beyond & batch.mask).sum() > 1
    assert ((s > 1.15) & (B > 0)).any() and ((s < 0.9) & (B < 0)).any() and ((s > 0.9) & (s < 1.15)).any()
    for x, bounds in ((r, (0.6, 0.8, 1.1, 1.2, 1.28, 1.5, 1.7, 1.8)), (s, (0.9, 1.15)), (p - q, (0.08, -0.05))):
        assert all(((x - bound).abs() > 1e-6).all() for bound in bounds)


def assert_same(got, wanted, tolerance=EXACT):
    assert wanted[1].any()
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, **tolerance)


# ------------------------------------------------------------------------------------------ TRL

MAX_LENGTH = 16
TRL_DEFAULTS = dict(
    delta=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
    use_bias_correction_kl=False,  # its default, True, multiplies the KL by the ratio
    steps_per_generation=1,
)


def trl_loss(batch, advantages, *, loss_type, level="token", low=0.2, high=0.28, beta=0.0, weights=None, **args):
    """GRPOTrainer._compute_loss itself, of a trainer without a model: the log-probabilities are handed in."""
    pytest.importorskip("trl", reason="pip install trl==1.16.*")
    trainer_class = imported("trl.trainer.grpo_trainer", "pip install trl==1.16.*").GRPOTrainer
    trainer = object.__new__(trainer_class)
    trainer.__dict__.update(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(**{**TRL_DEFAULTS, **args}),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
    )
    empty = torch.zeros(len(batch.mask), 0, dtype=torch.int64)
    inputs = dict(
        prompt_ids=empty,
        prompt_mask=empty,
        completion_ids=torch.zeros_like(batch.mask, dtype=torch.int64),
        completion_mask=batch.mask.long(),
        advantages=advantages,
        old_per_token_logps=batch.old_logp,
        ref_per_token_logps=batch.ref_logp,
        num_items_in_batch=batch.mask.sum(),
        importance_sampling_ratio=weights,
    )

    def loss_of(logp):
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
        return trainer._compute_loss(trainer.model, inputs)

    return value_and_grad(loss_of, batch.logp)


CONSTANT = dict(aggregation="constant", normalizer=6.0 * MAX_LENGTH)
TRL = {  # TRL's arguments; our objective and options
    "grpo": (dict(loss_type="grpo"), fca.PPO(0.2, 0.28), dict(aggregation="sequence-mean")),
    "dapo": (dict(loss_type="dapo"), fca.PPO(0.2, 0.28), {}),
    "bnpo": (dict(loss_type="bnpo"), fca.PPO(0.2, 0.28), {}),
    "dr_grpo": (dict(loss_type="dr_grpo"), fca.PPO(0.2, 0.28), CONSTANT),
    "delta": (dict(loss_type="dapo", delta=1.7), fca.PPO(0.2, 0.28, ratio_cap=1.7), {}),
    "delta < high": (dict(loss_type="dapo", delta=1.1), fca.PPO(0.2, 0.28, ratio_cap=1.1), {}),
    "delta < low": (dict(loss_type="dapo", delta=0.6), fca.PPO(0.2, 0.28, ratio_cap=0.6), {}),
    "gspo": (
        dict(loss_type="grpo", level="sequence", low=0.1, high=0.15),
        fca.GSPO(0.1, 0.15),
        dict(aggregation="sequence-mean"),
    ),
    "gspo token-mean": (dict(loss_type="dapo", level="sequence", low=0.1, high=0.15), fca.GSPO(0.1, 0.15), {}),
    "luspo": (dict(loss_type="luspo", level="sequence", low=0.1, high=0.15), fca.LUSPO(0.1, 0.15), {}),
    "luspo of tokens": (dict(loss_type="luspo"), fca.PPO(0.2, 0.28), dict(aggregation="sequence-sum")),
    "cispo": (dict(loss_type="cispo", high=1.5), fca.CISPO(high=1.5), {}),
    # torch.where of two Python floats is float32 in TRL, so that its 1.05 is 5e-8 off: numbers that float32 holds.
    "sapo": (
        dict(loss_type="sapo", sapo_temperature_neg=1.0625),
        fca.SAPO(1.0, 1.0625),
        dict(aggregation="sequence-mean"),
    ),
    "sapo steep": (
        dict(loss_type="sapo", sapo_temperature_pos=0.5, sapo_temperature_neg=2.5),
        fca.SAPO(0.5, 2.5),
        dict(aggregation="sequence-mean"),
    ),
    "vespo": (dict(loss_type="vespo"), fca.VESPO(), {}),
    "vespo flat": (
        dict(loss_type="vespo", vespo_k_pos=0.5, vespo_lambda_pos=0.375, vespo_k_neg=1.0, vespo_lambda_neg=0.3125),
        fca.VESPO(0.5, 0.375, 1.0, 0.3125),
        {},
    ),
}


@pytest.mark.parametrize("extra", ("bare", "kl", "weights", "per token"))
@pytest.mark.parametrize("name", TRL)
def test_trl(name, extra, backend):
    theirs, objective, options = TRL[name]
    batch = make(spread=0.15 if name.startswith("vespo") else 0.6)  # phi of a sequence's sum: else it is 0
    advantages = batch.per_sequence
    if extra == "kl":
        theirs, options = dict(theirs, beta=0.3), dict(options, ref_logp=batch.ref_logp, kl_coef=0.3)
    if extra == "weights":
        # Where a token is padding TRL's ratio is 1: VESPO sums its logarithm over the whole row.
        weights = torch.where(batch.mask, batch.weights, 1.0)
        theirs, options = dict(theirs, weights=weights), dict(options, weights=weights)
    if extra == "per token":
        if name.startswith("vespo"):
            pytest.skip("TRL's VESPO takes one advantage per sequence")
        advantages = batch.per_token
    assert_same(ours(batch, advantages, backend, objective, **options), trl_loss(batch, advantages, **theirs))


def test_trl_counts_sequences_without_a_token(backend):
    batch = make()
    batch.mask[2] = False
    for name in ("grpo", "gspo", "luspo", "sapo"):
        theirs, objective, options = TRL[name]
        got = ours(batch, batch.per_sequence, backend, objective, **options)
        assert_same(got, trl_loss(batch, batch.per_sequence, **theirs))


@pytest.mark.parametrize("mode", ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask"))
def test_trl_with_the_weights_of_its_mode(mode, backend):
    """rollout_weights and policy_loss together are TRL's loss with vllm_importance_sampling_mode."""
    batch = make()
    rollout = batch.old_logp - 0.2 * batch.per_token
    w, _ = fca.rollout_weights(batch.old_logp, rollout, mask=batch.mask, mode=mode, low=0.7, high=1.4)
    level = (batch.old_logp - rollout) * batch.mask
    ratio = (level.sum(1, keepdim=True) if mode.startswith("sequence") else level).exp()
    inside = (ratio >= 0.7) & (ratio <= 1.4)
    assert not inside.all() and inside.any()
    theirs = ratio.clamp(0.7, 1.4) if mode.endswith("truncate") else ratio * inside
    got = ours(batch, batch.per_sequence, backend, fca.PPO(0.2, 0.28), weights=w)
    assert_same(got, trl_loss(batch, batch.per_sequence, loss_type="dapo", weights=theirs))


# ------------------------------------------------------------------------------------------ Liger

LIGER = {name: TRL[name] for name in TRL if name != "luspo of tokens"}  # its LUSPO of tokens counts the padding
LIGER_NAMES = dict(low="epsilon_low", high="epsilon_high", level="importance_sampling_level")


def liger_options(theirs):
    options = {LIGER_NAMES.get(name, name): value for name, value in theirs.items()}
    return {"epsilon_low": 0.2, "epsilon_high": 0.28, "beta": 0.0, "max_completion_length": MAX_LENGTH, **options}


def liger(name="liger_kernel.chunked_loss.grpo_loss"):
    return imported(name, "pip install liger-kernel==0.8.5")


@pytest.mark.parametrize("extra", ("bare", "kl", "weights"))
@pytest.mark.parametrize("name", LIGER)
def test_liger_token_losses(name, extra, backend):
    """The part of Liger's chunked loss between log-probabilities and loss, in float64."""
    theirs, objective, options = LIGER[name]
    batch = make(spread=0.15 if name.startswith("vespo") else 0.6)
    theirs, tensors = liger_options(theirs), {}
    if extra == "kl":
        theirs, tensors = dict(theirs, beta=0.3), dict(ref_per_token_logps=batch.ref_logp)
        options = dict(options, ref_logp=batch.ref_logp, kl_coef=0.3)
        if name == "luspo":
            pytest.skip("Liger's LUSPO with a KL counts the padding: its KL is [B, T] and is not masked")
    if extra == "weights":
        weights = torch.where(batch.mask, batch.weights, 1.0)
        if name == "luspo":  # the same for weights per token
            weights = weights[:, :1]
        tensors = dict(vllm_is_ratio=weights)
        options = dict(options, weights=weights.expand(batch.mask.shape))
    mask = batch.mask.double()
    function = liger().LigerFusedLinearGRPOFunction.ppo_loss_fn

    def loss_of(logp):
        tensors_ = dict(old_per_token_logps=batch.old_logp, **tensors)
        return function(logp, mask, batch.per_sequence, full_attention_mask=mask, **tensors_, **theirs)[0]

    got = ours(batch, batch.per_sequence, backend, objective, **options)
    assert_same(got, value_and_grad(loss_of, batch.logp))


def logits_batch(batch, hidden=8, vocabulary=23):
    """Hidden states, a head and tokens whose log-probabilities take the place of batch.logp."""
    generator = torch.Generator().manual_seed(1)
    rows, cols = batch.mask.shape
    states = torch.randn(rows, cols, hidden, generator=generator)
    head = torch.randn(vocabulary, hidden, generator=generator) * 0.3
    tokens = torch.randint(vocabulary, (rows, cols), generator=generator)
    logp = (states @ head.T).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return states, head, tokens, (logp + (batch.old_logp - batch.logp)).float()


@pytest.mark.parametrize("name", LIGER)
def test_liger_chunked_loss(name, backend):
    """The whole of LigerFusedLinearGRPOLoss: loss, and gradients of the hidden states and of the head."""
    theirs, objective, options = LIGER[name]
    batch = make(spread=0.15 if name.startswith("vespo") else 0.6)
    states, head, tokens, old_logp = logits_batch(batch)
    advantages = batch.per_sequence.float()
    module = liger().LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=False, **liger_options(theirs))
    leaves = [x.clone().requires_grad_() for x in (states, head)]
    wanted, _ = module(leaves[0], leaves[1], tokens, batch.mask.float(), advantages, old_per_token_logps=old_logp)
    wanted = (wanted.detach(), *torch.autograd.grad(wanted, leaves))

    leaves = [x.clone().requires_grad_() for x in (states, head)]
    logits = leaves[0] @ leaves[1].T
    options = dict(options, mask=batch.mask, objective=objective, backend=backend)
    loss, _ = fca.policy_loss_from_logits(logits, tokens, old_logp, advantages, **options)
    got = (loss.detach(), *torch.autograd.grad(loss, leaves))
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, **FLOAT32)


@pytest.mark.parametrize("name", LIGER)
def test_liger_triton_loss(name):
    """Liger's Triton kernels, on a GPU or interpreted; ours on the device's own backend."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before triton is imported")
    device = "cuda" if on_gpu else "cpu"
    loss_function = liger("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    theirs, objective, options = LIGER[name]
    if name in ("delta < high", "delta < low"):
        pytest.skip("Liger's Triton loss drops the gradient of A < 0, delta < r <= high, which TRL's code keeps")
    if name == "luspo":
        pytest.skip("Liger's Triton LUSPO weighs a sequence by length^2 / T, its chunked loss and TRL by length")
    batch = make(spread=0.15 if name.startswith("vespo") else 0.6)
    states, head, tokens, old_logp = (x.to(device) for x in logits_batch(batch))
    advantages, mask = batch.per_sequence.float().to(device), batch.mask.to(device)
    theirs = liger_options(theirs)
    theirs["eps_low"], theirs["eps_high"] = theirs.pop("epsilon_low"), theirs.pop("epsilon_high")

    logits = states @ head.T
    padded = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1).requires_grad_()  # one position more than tokens
    arguments = (padded, old_logp, None, tokens, advantages, mask.float())
    try:
        loss, _ = loss_function(*arguments, temperature=1.0, inplace=False, reduce=True, **theirs)
        (grad,) = torch.autograd.grad(loss, padded)
    except Exception as error:
        if on_gpu:
            raise
        pytest.skip(f"Liger's kernels do not run interpreted: {type(error).__name__}: {error}"[:300])
    options = dict(options, mask=mask, objective=objective)
    leaf = logits.clone().requires_grad_()
    got, _ = fca.policy_loss_from_logits(leaf, tokens, old_logp, advantages, **options)
    (got_grad,) = torch.autograd.grad(got, leaf)
    torch.testing.assert_close(got.detach(), loss.detach(), **FLOAT32)
    torch.testing.assert_close(got_grad, grad[:, :-1], **FLOAT32)


# ------------------------------------------------------------------------------------------ verl


def verl_loss(batch, advantages, mode, *, aggregation="token-mean", weights=None, policy_loss=None, **options):
    advice = "see the head of this file"
    losses = imported("verl.trainer.ppo.core_algos", advice)
    config = imported("verl.workers.config", advice)
    actor = config.FSDPActorConfig(
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=config.PolicyLossConfig(loss_mode=mode, **(policy_loss or {})),
        **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, **options},
    )
    function = losses.get_policy_loss_fn(mode)
    mask = batch.mask.double()

    def loss_of(logp):
        return function(batch.old_logp, logp, advantages, mask, aggregation, actor, weights)[0]

    return value_and_grad(loss_of, batch.logp)


BOTH = {"token-mean": "token-mean", "sequence-mean": "seq-mean-token-mean", "sequence-sum": "seq-mean-token-sum"}
VERL = {  # verl's loss mode and configuration; our objective
    "vanilla": ("vanilla", dict(clip_ratio_c=1.8), fca.PPO(0.2, 0.28, dual_clip=1.8)),
    "dppo_tv": ("dppo_tv", dict(clip_ratio_low=0.05, clip_ratio_high=0.08), fca.DPPOTV(0.05, 0.08)),
    "dppo_tv capped": ("dppo_tv", dict(clip_ratio_c=1.2), fca.DPPOTV(0.2, 0.28, max_ratio=1.2)),
    "dppo_kl": ("dppo_kl", dict(clip_ratio_low=0.02, clip_ratio_high=0.03), fca.DPPOKL(0.02, 0.03)),
    "gpg": ("gpg", {}, fca.GPG()),
    "dro": ("dro", dict(policy_loss=dict(dro_beta=0.3)), fca.DRO(0.3)),
    "cispo": ("cispo", {}, fca.CISPO(low=0.8, high=1.28)),
    "sapo": ("sapo", dict(tau_pos=0.7, tau_neg=1.5), fca.SAPO(0.7, 1.5)),
    "kl_cov": (
        "kl_cov",
        dict(policy_loss=dict(kl_cov_ratio=0.2, ppo_kl_coef=0.7)),
        fca.KLCov(ratio=0.2, kappa=0.7),
    ),
    "kl_cov of one": (
        "kl_cov",
        dict(policy_loss=dict(kl_cov_ratio=2e-4, ppo_kl_coef=1.0)),
        fca.KLCov(),
    ),
    "clip_cov": (  # a share of 1 leaves nothing to chance: all tokens in the range
        "clip_cov",
        dict(policy_loss=dict(clip_cov_ratio=1.0, clip_cov_lb=0.05, clip_cov_ub=0.4)),
        fca.ClipCov(0.2, 0.28, ratio=1.0, cov_low=0.05, cov_high=0.4),
    ),
}


@pytest.mark.parametrize("aggregation", BOTH)
@pytest.mark.parametrize("advantages", ("per_sequence", "per_token"))
@pytest.mark.parametrize("name", VERL)
def test_verl(name, advantages, aggregation, backend):
    mode, options, objective = VERL[name]
    if mode == "sapo" and aggregation != "sequence-mean":
        pytest.skip('verl\'s SAPO is always "seq-mean-token-mean"')
    batch = make()
    A = getattr(batch, advantages)
    for weights in (None, batch.weights):
        got = ours(batch, A, backend, objective, aggregation=aggregation, weights=weights)
        A_ = A if A.dim() == 2 else A.unsqueeze(1).expand(batch.mask.shape)
        wanted = verl_loss(batch, A_, mode, aggregation=BOTH[aggregation], weights=weights, **options)
        assert_same(got, wanted, LENGTH_EPS if aggregation == "sequence-mean" else EXACT)


@pytest.mark.parametrize("aggregation", BOTH)
def test_verl_gspo(aggregation, backend):
    """verl's gradient is straight-through: ours where a, w and A are constant in a sequence."""
    batch = make()
    weights = batch.weights[:, :1].expand(batch.mask.shape)
    A = batch.per_sequence.unsqueeze(1).expand(batch.mask.shape)
    got = ours(batch, A, backend, fca.GSPO(0.1, 0.15), aggregation=aggregation, weights=weights)
    options = dict(clip_ratio_low=0.1, clip_ratio_high=0.15, weights=weights)
    wanted = verl_loss(batch, A, "gspo", aggregation=BOTH[aggregation], **options)
    assert_same(got, wanted, LENGTH_EPS if aggregation == "sequence-mean" else EXACT)


@pytest.mark.parametrize("advantages", ("per_sequence", "per_token"))
def test_verl_geo_mean(advantages, backend):
    """verl weighs a sequence by its mean advantage and the geometric mean of its weights: constant ones here."""
    batch = make()
    weights = batch.weights[:, :1].expand(batch.mask.shape)
    A = getattr(batch, advantages)
    A_ = A if A.dim() == 2 else A.unsqueeze(1).expand(batch.mask.shape)
    got = ours(batch, A, backend, fca.GMPO(0.4, 0.4), weights=weights)
    assert_same(
        got, verl_loss(batch, A_, "geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4, weights=weights), LENGTH_EPS
    )


def test_verl_clip_cov_drops_as_many(backend):
    """Which tokens is chance; how many is not."""
    batch = make(rows=12, cols=20)
    for ratio in (2e-4, 0.05):
        A = batch.per_token
        options = dict(clip_cov_ratio=ratio, clip_cov_lb=0.05, clip_cov_ub=0.4)
        _, theirs = verl_loss(batch, A, "clip_cov", policy_loss=options)
        _, full = ours(batch, A, backend, fca.PPO(0.2, 0.28))
        _, got = ours(batch, A, backend, fca.ClipCov(0.2, 0.28, ratio=ratio, cov_low=0.05, cov_high=0.4))
        dropped = max(1, int(ratio * batch.mask.sum()))
        assert ((got == 0) & (full != 0)).sum() == ((theirs == 0) & (full != 0)).sum() == dropped


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_verl_rollout_weights(level):
    """A single threshold truncates, two mask; the statistics are those verl reports."""
    helper = imported("verl.trainer.ppo.rollout_corr_helper", "see the head of this file")
    batch = make()
    rollout = batch.old_logp - 0.3 * batch.per_token
    mask, tokens = batch.mask.double(), batch.mask.sum().item()
    for threshold, options in ((1.1, dict(high=1.1)), ("0.6_1.1", dict(low=0.6, high=1.1))):
        mode = f"{level}-{'mask' if 'low' in options else 'truncate'}"
        w, stats = fca.rollout_weights(batch.old_logp, rollout, mask=batch.mask, mode=mode, **options)
        theirs, metrics = helper.compute_rollout_correction_weights(batch.old_logp - rollout, mask, level, threshold)
        torch.testing.assert_close(w, theirs, **EXACT)
        got = stats.to_dict()
        assert 0 < got["clipped_high"] < tokens
        assert got["weight_sum"] / tokens == pytest.approx(metrics["rollout_is_mean"], rel=1e-6)
        ess = got["weight_sum"] ** 2 / got["weight_sq_sum"] / tokens
        assert ess == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=1e-6)
        if level == "token":
            assert got["clipped_high"] / tokens == pytest.approx(metrics["rollout_is_ratio_fraction_high"], rel=1e-6)
    kl, k3 = batch.old_logp - rollout, (batch.old_logp - rollout).exp()
    assert got["kl_k1"] == pytest.approx(-(kl * mask).sum().item(), rel=1e-6)
    assert got["kl_k3"] == pytest.approx(((k3 - 1 - kl) * mask).sum().item(), rel=1e-6)


def test_verl_group_advantages():
    losses = imported("verl.trainer.ppo.core_algos", "see the head of this file")
    generator = torch.Generator().manual_seed(0)
    rewards, ids = torch.randn(24, generator=generator, dtype=torch.float64), torch.arange(24) % 5
    for by_std, scale in ((True, "std"), (False, "none")):
        options = dict(epsilon=1e-6, norm_adv_by_std_in_grpo=by_std)
        one = torch.ones(24, 1, dtype=torch.float64)
        wanted, _ = losses.compute_grpo_outcome_advantage(rewards.clone().unsqueeze(1), one, ids.numpy(), **options)
        got = fca.group_advantages(rewards, ids, scale=scale, eps=1e-6)
        torch.testing.assert_close(got, wanted.squeeze(1), **EXACT)
