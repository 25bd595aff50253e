"""per_sample_scores against a loop of autograd.grad, and MicroBatchGradients against accumulating in `.grad`."""

import warnings

import pytest
import torch
from torch import nn

import fused_clip_adam as fca
from fused_clip_adam import per_sample

B = 7


class Tied(nn.Module):
    """A tiny language model: one matrix embeds tokens and reads out logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.readout = nn.Linear(4, 5, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens):
        return self.readout(self.norm(self.embedding(tokens).cumsum(-2).tanh()))


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("shift", torch.linspace(-1, 1, 4))

    def forward(self, x):
        return self.layer(x) * self.shift.exp()


def chosen(logits, action):
    return logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def of_action(policy, state, action):
    return chosen(policy(state), action)


def of_tokens(policy, tokens):
    """[T]: every token after the first."""
    return chosen(policy(tokens[:-1]), tokens[1:])


def of_sequence(policy, tokens):
    return of_tokens(policy, tokens).sum()


def of_dict(policy, batch, weight):
    return chosen(policy(batch["state"]), batch["more"][0]) * weight


def of_image(policy, image, action):
    return chosen(policy(image.unsqueeze(0)).squeeze(0), action)


def actions(high):
    return torch.randint(high, (B,))


MODULES = {
    "mlp": lambda: (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), of_action, (states(), actions(4))),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
        of_image,
        (torch.randn(B, 2, 4, 4, dtype=torch.float64), actions(4)),
    ),
    "batch norm": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).eval(),
        of_image,
        (torch.randn(B, 2, 4, 4, dtype=torch.float64), actions(4)),
    ),
    "tied": lambda: (Tied(), of_sequence, (torch.randint(5, (B, 6)),)),
    "buffer and dict": lambda: (
        WithBuffer(),
        of_dict,
        ({"state": states(), "more": [actions(4)]}, torch.rand(B, dtype=torch.float64)),
    ),
}


def states():
    return torch.randn(B, 3, dtype=torch.float64)


def made(name):
    module, log_prob, inputs = MODULES[name]()
    return module.double(), log_prob, inputs


def loop(module, log_prob, inputs, params):
    """[(gradients, log-probability) of each sample], by autograd alone."""
    rows = []
    for b in range(B):
        sample = torch.utils._pytree.tree_map(lambda x, b=b: x[b], inputs)
        logp = log_prob(module, *sample)
        rows.append((torch.autograd.grad(logp.sum(), params), logp.detach()))
    return [torch.stack(own) for own in zip(*[g for g, _ in rows])], torch.stack([logp for _, logp in rows])


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("name", MODULES)
def test_scores_are_those_of_a_loop(name):
    module, log_prob, inputs = made(name)
    params = list(module.parameters())
    before = [p.detach().clone() for p in params]
    expected, expected_logp = loop(module, log_prob, inputs, params)
    for options in ({}, {"chunk_size": 1}, {"chunk_size": 3}, {"chunk_size": 100}, {"memory": 1}, {"memory": 4000}):
        scores, logp = fca.per_sample_scores(module, log_prob, *inputs, **options)
        assert list(scores) == params  # every parameter once, tied ones too
        torch.testing.assert_close(list(scores.values()), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(logp, expected_logp, rtol=1e-12, atol=1e-13)
        assert logp.shape == (B,) and not logp.requires_grad
        assert all(own.is_contiguous() and not own.requires_grad for own in scores.values())
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(params, before))


def test_a_sequence_gives_its_tokens_and_one_score():
    module, _, inputs = made("tied")
    scores, logp = fca.per_sample_scores(module, of_tokens, *inputs, chunk_size=3)
    expected, expected_logp = loop(module, of_tokens, inputs, list(module.parameters()))
    torch.testing.assert_close(list(scores.values()), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logp, expected_logp, rtol=1e-12, atol=1e-13)
    assert logp.shape == (B, 5)


@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("own", (torch.float32, torch.bfloat16))
def test_dtypes(own, stored):
    module, log_prob, (state, action) = made("mlp")
    module, state = module.to(own), state.to(own)
    plain, logp = fca.per_sample_scores(module, log_prob, state, action)
    assert logp.dtype == own and all(score.dtype == own for score in plain.values())
    scores, _ = fca.per_sample_scores(module, log_prob, state, action, dtype=stored)
    for p, score in scores.items():
        assert torch.equal(score, plain[p].to(stored)) and score.dtype == stored


def test_frozen_and_chosen_parameters():
    module, log_prob, inputs = made("mlp")
    weight, bias, last_weight, last_bias = module.parameters()
    everything, _ = fca.per_sample_scores(module, log_prob, *inputs)
    weight.requires_grad_(False)
    scores, logp = fca.per_sample_scores(module, log_prob, *inputs)
    assert list(scores) == [bias, last_weight, last_bias] and not logp.requires_grad
    chosen, _ = fca.per_sample_scores(module, log_prob, *inputs, params=iter([last_bias, weight, last_bias]))
    assert list(chosen) == [last_bias, weight]  # weight, frozen, was asked for
    for p, score in {**scores, **chosen}.items():
        torch.testing.assert_close(score, everything[p], rtol=1e-12, atol=1e-13)

    # By parameter, they fit an optimizer of all parameters, in groups of another order.
    opt = fca.FusedClipAdamW([{"params": [last_bias, weight]}, {"params": [last_weight, bias]}])
    before = [p.detach().clone() for p in module.parameters()]
    opt.step_from_scores(scores, logp, logp, torch.ones(B, dtype=torch.float64))
    assert [torch.equal(p, old) for p, old in zip(module.parameters(), before)] == [True, False, False, False]


def test_a_parameter_that_is_not_used():
    module = nn.ModuleDict({"policy": nn.Linear(3, 4), "value": nn.Linear(3, 1)})
    log_prob = lambda module, state, action: of_action(module["policy"], state, action)  # noqa: E731
    inputs = torch.randn(B, 3), actions(4)
    scores, _ = fca.per_sample_scores(module, log_prob, *inputs, chunk_size=2)
    assert not any(scores[p].any() for p in module["value"].parameters())
    scores, _ = fca.per_sample_scores(module, log_prob, *inputs, params=module["policy"].parameters())
    assert list(scores) == list(module["policy"].parameters())


def test_equals_policy_loss_backward_and_step():
    objective, advantages = fca.PPO(0.05, 0.05), torch.randn(B, dtype=torch.float64)
    ours, log_prob, inputs = made("mlp")
    theirs = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    theirs.load_state_dict(ours.state_dict())
    opts = [fca.FusedClipAdamW(module.parameters(), lr=0.02, grad_clip=0.1) for module in (ours, theirs)]
    with torch.no_grad():
        old_logp = chosen(ours(inputs[0]), inputs[1]) + 0.05 * torch.randn(B, dtype=torch.float64)
    for _ in range(4):
        scores, logp = fca.per_sample_scores(ours, log_prob, *inputs)
        seen = opts[0].step_from_scores(scores, logp, old_logp, advantages, objective=objective).to_dict()
        loss, stats = fca.policy_loss(chosen(theirs(inputs[0]), inputs[1]), old_logp, advantages, objective=objective)
        opts[1].zero_grad()
        loss.backward()
        opts[1].step()
    assert seen["clipped_low"] + seen["clipped_high"] > 0, "the example does not clip"
    assert stats.to_dict() == pytest.approx(seen, rel=1e-9, nan_ok=True)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- memory


def count_calls(log_prob):
    def counted(*arguments):
        counted.calls += 1  # under vmap, once a chunk
        return log_prob(*arguments)

    counted.calls = 0
    return counted


@pytest.mark.parametrize("name", ("mlp", "tied"))
def test_memory_decides_about_chunks(name):
    module, log_prob, inputs = made(name)
    inputs = torch.utils._pytree.tree_map(lambda x: torch.cat([x] * 20), inputs)  # 140 samples
    row = sum(p.numel() * p.element_size() for p in module.parameters())

    def measure(**options):
        """(chunks, most bytes at one time)"""
        log = count_calls(log_prob)
        with per_sample._PeakBytes() as peak:
            fca.per_sample_scores(module, log, *inputs, **options)
        return log.calls, peak.peak

    assert measure(chunk_size=1)[0] == 140
    assert measure(chunk_size=10)[0] == 14
    assert measure(memory=row)[0] == 140  # room for the scores of one sample: nothing to measure
    assert measure()[0] == 2  # two samples are measured, then all fit in one chunk
    result = 140 * (row + 2 * 8)  # a log-probability is there twice, in its chunk and with all others
    for budget in (20 * row, 50 * row, 100 * row):
        chunks, most = measure(memory=budget)
        assert budget / 2 < most - result <= budget, "as much as fits, and no more"
        assert chunks > 138 * row // budget
    assert measure(chunk_size=140)[1] < measure(memory=10**9)[1] + 1000  # the same; the result counts once


def test_measuring_sees_what_torch_allocates():
    """The peak inside against the profiler's record of every allocation."""
    module, log_prob, inputs = made("tied")
    with torch.profiler.profile(profile_memory=True) as profile, per_sample._PeakBytes() as peak:
        fca.per_sample_scores(module, log_prob, *inputs, chunk_size=B)
    totals = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live, most = 0, 0
    for nbytes in totals:
        live += nbytes
        most = max(most, live)
    assert 0.8 * most <= peak.peak <= most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    module = nn.Sequential(nn.Linear(3, 256), nn.Tanh(), nn.Dropout(0.5), nn.Linear(256, 256), nn.Linear(256, 4))
    state, action = torch.randn(400, 3), torch.randint(4, (400,))
    expected, expected_logp = fca.per_sample_scores(module.eval(), of_action, state, action)
    expected = list(expected.values())
    module, state, action = module.cuda(), state.cuda(), action.cuda()
    fca.per_sample_scores(module, of_action, state, action, chunk_size=100)  # cuBLAS keeps a workspace from here on
    for budget in (2**24, 2**28):  # many chunks, and one
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scores, logp = fca.per_sample_scores(module, of_action, state, action, memory=budget)
        result = sum(score.nbytes for score in scores.values())
        assert torch.cuda.max_memory_allocated() - before < result + budget + 2**20
        torch.testing.assert_close([x.cpu() for x in scores.values()], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logp.cpu(), expected_logp, rtol=1e-3, atol=1e-4)
    module.train()
    same = []
    for chunk_size in (400, 90):
        torch.manual_seed(1)
        scores, _ = fca.per_sample_scores(module, of_action, state, action, randomness="same", chunk_size=chunk_size)
        same.append((list(scores.values()), torch.rand((), device="cuda")))
    torch.testing.assert_close(same[0], same[1], rtol=1e-3, atol=1e-4)
    with fca.MicroBatchGradients(module.parameters(), 2) as micro:
        for b in range(2):
            micro.select(b)
            nn.functional.cross_entropy(module(state), action).backward()
        assert all(stack.is_cuda and stack[0].any() and stack[1].any() for stack in micro.gradients.values())


# ---------------------------------------------------------------- randomness


def test_dropout():
    module = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    state, action = torch.randn(1, 3).expand(B, 3), torch.zeros(B, dtype=torch.long)  # seven times the same sample
    with pytest.raises(RuntimeError, match="randomness"):
        fca.per_sample_scores(module, of_action, state, action)
    _, logp = fca.per_sample_scores(module, of_action, state, action, randomness="different")
    assert len(logp.unique()) == B
    for chunk_size in (B, 2, None):
        torch.manual_seed(1)
        scores, logp = fca.per_sample_scores(
            module, of_action, state, action, randomness="same", chunk_size=chunk_size, memory=5000
        )
        torch.testing.assert_close(logp, logp[:1].expand(B))
        if chunk_size == B:
            whole, after = scores, torch.rand(())
        else:
            torch.testing.assert_close(list(scores.values()), list(whole.values()))
            assert torch.rand(()) == after  # the generator moved on by one draw
    module.eval()
    _, logp = fca.per_sample_scores(module, of_action, state, action)
    torch.testing.assert_close(logp, chosen(module(state), action).detach())


# ---------------------------------------------------------------- errors


def test_no_samples():
    module, log_prob, _ = made("mlp")
    scores, logp = fca.per_sample_scores(
        module, log_prob, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), dtype=torch.float32
    )
    assert logp.shape == (0,) and [list(own.shape) for own in scores.values()] == [[0, 8, 3], [0, 8], [0, 4, 8], [0, 4]]
    opt = fca.FusedClipAdamW(module.parameters())
    before = [p.detach().clone() for p in module.parameters()]
    assert opt.step_from_scores(scores, logp, logp, logp).to_dict()["tokens"] == 0
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before))


def test_errors_of_scores():
    module, log_prob, (state, action) = made("mlp")
    call = fca.per_sample_scores
    frozen = nn.Linear(3, 4).requires_grad_(False)
    cases = [
        (TypeError, "module must be", lambda: call(module.forward, log_prob, state, action)),
        (ValueError, "no parameter", lambda: call(nn.Tanh(), log_prob, state, action)),
        (ValueError, "no parameter", lambda: call(frozen, log_prob, state, action)),
        (ValueError, "params is empty", lambda: call(module, log_prob, state, action, params=[])),
        (
            ValueError,
            r"params\[0\].*not a parameter",
            lambda: call(module, log_prob, state, params=frozen.parameters()),
        ),
        (TypeError, "params must be", lambda: call(module, log_prob, state, action, params=frozen.weight)),
        (TypeError, r"params\[0\]", lambda: call(module, log_prob, state, action, params=["0.weight"])),
        (ValueError, "at least one input", lambda: call(module, log_prob)),
        (ValueError, r"inputs\[1\] is \[6\]", lambda: call(module, log_prob, state, action[:6])),
        (ValueError, r"inputs\[1\]\['a'\] is \[6\]", lambda: call(module, log_prob, state, {"a": action[:6]})),
        (ValueError, r"inputs\[1\] is \[\]", lambda: call(module, log_prob, state, action[0])),
        (TypeError, r"inputs\[1\] is a NoneType", lambda: call(module, log_prob, state, None)),
        (TypeError, "dtype must be", lambda: call(module, log_prob, state, action, dtype=torch.int32)),
        (TypeError, "memory must be", lambda: call(module, log_prob, state, action, memory=1e9)),
        (ValueError, "memory must be", lambda: call(module, log_prob, state, action, memory=0)),
        (ValueError, "chunk_size must be", lambda: call(module, log_prob, state, action, chunk_size=0)),
        (ValueError, r"0-d.*got \[2, 4\]", lambda: call(module, lambda m, s, a: m(s).expand(2, 4), state, action)),
        (TypeError, "must return a tensor, got float", lambda: call(module, lambda m, s, a: 0.0, state, action)),
        (ValueError, "randomness", lambda: call(module, log_prob, state, action, randomness="some")),
    ]
    for error, message, run in cases:
        with pytest.raises(error, match=message):
            run()


def test_batch_norm_over_a_batch_is_refused():
    module, log_prob, inputs = made("batch norm")
    with pytest.raises(ValueError, match="module has 1, a BatchNorm2d"):
        fca.per_sample_scores(module.train(), log_prob, *inputs)
    module[1] = nn.BatchNorm2d(3, track_running_stats=False).double()
    with pytest.raises(ValueError, match="module has 1, a BatchNorm2d"):
        fca.per_sample_scores(module.eval(), log_prob, *inputs)


# ---------------------------------------------------------------- micro-batches


def micro_batches(count=4):
    return [(torch.randn(5, 3, dtype=torch.float64), torch.randint(4, (5,))) for _ in range(count)]


def loss_of(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def twins():
    ours, theirs = made("mlp")[0], made("mlp")[0]
    theirs.load_state_dict(ours.state_dict())
    opts = [fca.FusedClipAdamW(module.parameters(), lr=0.01, grad_clip=0.5) for module in (ours, theirs)]
    return ours, theirs, *opts


@pytest.mark.parametrize("dropped", ((), (2,), (0, 3)))
def test_micro_batches_equal_accumulation(dropped):
    ours, theirs, opt, plain = twins()
    kept = 4 - len(dropped)
    weights = torch.tensor([0.0 if b in dropped else 1 / kept for b in range(4)], dtype=torch.float64)
    with fca.MicroBatchGradients(ours.parameters(), 4) as micro:
        for _ in range(3):
            batches = micro_batches()
            for b, batch in enumerate(batches):
                micro.select(b)
                for half in (slice(0, 2), slice(2, 5)):  # two calls of backward add up in one row
                    (loss_of(ours, (batch[0][half], batch[1][half])) * len(batch[1][half]) / 5).backward()
                if b not in dropped:
                    (loss_of(theirs, batch) / kept).backward()
                else:
                    next(ours.parameters()).grad.fill_(torch.nan)  # not read
            opt.step_from_gradients(micro.gradients, weights if dropped else None)
            opt.zero_grad()  # a habit that does no harm here
            plain.step()
            plain.zero_grad()
            torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-11, atol=1e-13)
    assert all(p.grad is None for p in ours.parameters())


def test_backward_writes_into_the_stack():
    module, batches = made("mlp")[0], micro_batches(2)
    frozen, *others = module.parameters()
    frozen.requires_grad_(False)
    others[0].grad = before = torch.ones_like(others[0])
    micro = fca.MicroBatchGradients(module.parameters(), 2)
    assert list(micro.gradients) == others
    for b in (1, 0, 1):
        micro.select(b)
        assert all(p.grad.data_ptr() == micro.gradients[p][b].data_ptr() for p in others)
        assert not any(p.grad.any() for p in others)
        loss_of(module, batches[b]).backward()
    for b in (0, 1):
        expected = torch.autograd.grad(loss_of(module, batches[b]), others)
        assert all(torch.equal(micro.gradients[p][b], g) for p, g in zip(others, expected))
    micro.release()
    assert others[0].grad is before and bool((before == 1).all()) and others[1].grad is None


@pytest.mark.parametrize("own, stored", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_stacks_of_another_dtype(own, stored):
    module = made("mlp")[0].to(own)
    batches = [(x.to(own), y) for x, y in micro_batches(2)]
    params = list(module.parameters())
    with fca.MicroBatchGradients(params, 2, dtype=stored) as micro:
        for b, batch in enumerate(batches):
            micro.select(b)
            for _ in range(2):
                loss_of(module, batch).backward()
        for b, batch in enumerate(batches):
            for p, g in zip(params, torch.autograd.grad(loss_of(module, batch), params)):
                row = micro.gradients[p][b]
                assert row.dtype == stored and torch.equal(row, g.to(stored) + g.to(stored))
        before = params[0].detach().clone()
        fca.FusedClipAdamW(params, lr=0.1).step_from_gradients(micro.gradients)
    assert not torch.equal(params[0], before)
    assert all(p.grad_dtype == own and p.grad is None for p in params)
    loss_of(module, batches[0]).backward()
    assert params[0].grad.dtype == own


def test_a_replaced_gradient_is_noticed():
    module, (batch,) = made("mlp")[0], micro_batches(1)
    micro = fca.MicroBatchGradients(module.parameters(), 2)
    micro.select(0)
    module.zero_grad()
    loss_of(module, batch).backward()
    with pytest.raises(RuntimeError, match=r"replaced after select\(0\)"):
        micro.select(1)
    with pytest.raises(RuntimeError, match="replaced"):
        micro.gradients  # noqa: B018
    micro.release()
    micro.select(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the cycle that create_graph makes; release() breaks it
        loss_of(module, batch).backward(create_graph=True)
    with pytest.raises(RuntimeError, match=r"replaced after select\(1\)"):
        micro.gradients  # noqa: B018
    micro.release()


def test_errors_of_micro_batches():
    module = made("mlp")[0]
    p = next(module.parameters())
    make = fca.MicroBatchGradients
    cases = [
        (ValueError, "count must be at least 1, got 0", lambda: make([p], 0)),
        (TypeError, "count must be an int", lambda: make([p], 2.0)),
        (TypeError, "dtype must be", lambda: make([p], 2, dtype=torch.int64)),
        (TypeError, "params must be", lambda: make(p, 2)),
        (TypeError, r"params\[0\]", lambda: make(["weight"], 2)),
        (ValueError, "requires grad", lambda: make([], 2)),
        (ValueError, "requires grad", lambda: make([torch.zeros(2)], 2)),
        (ValueError, "leaves", lambda: make([p * 2], 2)),
        (IndexError, "0 to 1, got 2", lambda: make([p], 2).select(2)),
        (IndexError, "0 to 1, got -1", lambda: make([p], 2).select(-1)),
    ]
    for error, message, run in cases:
        with pytest.raises(error, match=message):
            run()
    assert p.grad is None
