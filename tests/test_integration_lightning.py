"""The optimizer in Lightning's own Trainer: same weights as AdamW, its norm logged, exact resumption, statistics."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed: make trainers")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler
from trainer_checks import records_of_two

import fused_clip_adam as fca
from fused_clip_adam.integrations.lightning import FusedClipCallback, observe

# Adam divides by sqrt(v), so that rounding of near-zero gradients moves a weight by a visible part of lr. 1 % of what
# the steps have moved weights by; a wrong clip or a lost step is above 20 %.
WEIGHTS_MAY_DIFFER = 0.01
# Clips what is above its moving mean, more or less every second step.
ZCLIP = fca.ZClip(alpha=0.5, warmup=2, z_threshold=0.1, max_norm=None, mode="mean")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on worker processes of the data loader, loggers, and the like
        yield
    torch.set_num_threads(before)


class Policy(lightning.LightningModule):
    """Ratio-clipped updates on recorded samples, automatic or by hand."""

    feeds = True

    def __init__(self, optimizer, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        self.make_optimizer, self.automatic_optimization = optimizer, not manual
        self.norms = []

    def loss(self, batch):
        observation, action, drift, advantage = batch
        logp = self.net(observation).log_softmax(-1).gather(-1, action).squeeze(-1)
        return fca.policy_loss(logp, logp.detach() - drift, advantage)

    def training_step(self, batch, batch_idx):
        loss, stats = self.loss(batch)
        if self.feeds and hasattr(self.optimizers().optimizer, "observe"):
            observe(self.optimizers(), stats)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def train_dataloader(self):
        return DataLoader(recordings(), batch_size=8)


def recordings():
    generator = torch.Generator().manual_seed(1)
    observation = torch.randn(64, 6, generator=generator)
    action = torch.randint(4, (64, 1), generator=generator)
    drift, advantage = 0.4 * torch.randn(64, generator=generator), torch.randn(64, generator=generator)
    return list(zip(observation, action, drift, advantage))  # eight batches of 8


def ours(**options):
    return lambda params: fca.FusedClipAdamW(params, lr=1e-2, **options)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def fit(folder, policy, ckpt_path=None, **options):
    config = dict(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer = lightning.Trainer(**{**config, **options})
    trainer.fit(policy, ckpt_path=ckpt_path)
    return trainer


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def assert_close_to(policy, reference):
    moved = float((weights(reference) - weights(Policy(adamw))).abs().max())
    assert moved > 0.01
    torch.testing.assert_close(weights(policy), weights(reference), rtol=0, atol=WEIGHTS_MAY_DIFFER * moved)


# ---------------------------------------------------------------- optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_same_weights_as_adamw_with_lightnings_clip(tmp_path, accumulation):
    theirs = Policy(adamw)
    fit(tmp_path, theirs, gradient_clip_val=0.1, accumulate_grad_batches=accumulation)
    mine = Policy(ours(grad_clip=0.1))
    trainer = fit(tmp_path, mine, accumulate_grad_batches=accumulation)
    assert trainer.global_step == 16 // accumulation
    assert_close_to(mine, theirs)
    assert min(mine.norms) > 0.1, "the clip must act"


def test_manual_optimization_is_the_same(tmp_path):
    automatic, manual = Policy(ours(grad_clip=0.1)), Policy(ours(grad_clip=0.1), manual=True)
    for policy in (automatic, manual):
        trainer = fit(tmp_path, policy, callbacks=[FusedClipCallback()])
        assert trainer.global_step == 16 and float(trainer.callback_metrics["grad_norm"]) > 0
    assert torch.equal(weights(automatic), weights(manual))


# ---------------------------------------------------------------- the callback


class Rows(CSVLogger):
    """Keeps what Lightning hands to a logger."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "at": step})


@pytest.mark.parametrize("every", [1, 4])
def test_logs_the_norm(tmp_path, every):
    policy, logger = Policy(ours(grad_clip=0.1)), Rows(tmp_path)
    fit(tmp_path, policy, callbacks=[FusedClipCallback()], logger=logger, log_every_n_steps=every)
    logged = [row["grad_norm"] for row in logger.rows if "grad_norm" in row]
    assert logged == pytest.approx(policy.norms[every - 1 :: every], rel=1e-5) and len(logged) == 16 // every
    assert all(row["step_count_skipped"] == 0 for row in logger.rows if "grad_norm" in row)


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_reads_the_device_only_to_write_a_log(tmp_path):
    def reads(callbacks):
        policy = Policy(ours(grad_clip=0.1))
        policy.on_before_optimizer_step = lambda optimizer: None  # which reads
        with Reads() as mode:
            fit(tmp_path, policy, callbacks=callbacks, logger=Rows(tmp_path), log_every_n_steps=4)
        return mode.count

    assert reads([FusedClipCallback()]) - reads([]) == 2 * 16 // 4, "two numbers, four times"


def test_several_optimizers(tmp_path):
    class Two(Policy):
        def training_step(self, batch, batch_idx):
            loss, stats = self.loss(batch)
            first, _, third = self.optimizers()
            observe(first, stats)
            for optimizer in (first, third):
                optimizer.zero_grad()
            self.manual_backward(loss)
            first.step()
            third.step()

        def configure_optimizers(self):
            parts = [list(self.net[0].parameters()), list(self.net[0].parameters()), list(self.net[2].parameters())]
            kinds = [ours(grad_clip=0.1, overshoot="brake"), adamw, ours()]
            return [kind(part) for kind, part in zip(kinds, parts)]

    policy, logger = Two(None, manual=True), Rows(tmp_path)
    fit(tmp_path, policy, callbacks=[FusedClipCallback()], logger=logger, log_every_n_steps=1)
    assert {name for row in logger.rows for name in row} >= {"grad_norm/0", "grad_norm/2", "step_count_skipped/2"}
    assert all(row["grad_norm/0"] != row["grad_norm/2"] for row in logger.rows if "grad_norm/0" in row)


def test_two_clips_are_refused(tmp_path):
    policy = Policy(ours(grad_clip=(0.1, fca.SpikeClip())))
    with pytest.raises(ValueError, match=r"gradient_clip_val=0.5 .*GlobalNorm.*accepted: gradient_clip_val=0"):
        fit(tmp_path, policy, gradient_clip_val=0.5, callbacks=[FusedClipCallback()])
    assert torch.equal(weights(policy), weights(Policy(adamw))) and not policy.norms


def test_lightnings_clip_goes_with_rules_of_other_parts(tmp_path):
    policy = Policy(ours(grad_clip=fca.SpikeClip()))
    trainer = fit(tmp_path, policy, gradient_clip_val=0.05, callbacks=[FusedClipCallback()])
    assert float(trainer.callback_metrics["grad_norm"]) == pytest.approx(0.05, rel=1e-3)


def test_callback_needs_one_of_our_optimizers(tmp_path):
    with pytest.raises(TypeError, match=r"none of the optimizers \['AdamW'\] is fca's"):
        fit(tmp_path, Policy(adamw), callbacks=[FusedClipCallback()])


# ---------------------------------------------------------------- mixed precision


def half(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))


def test_16_mixed_unscales_and_clips_in_the_step(tmp_path):
    whole, mixed = Policy(ours(grad_clip=0.1)), Policy(ours(grad_clip=0.1))
    loggers = [Rows(tmp_path), Rows(tmp_path)]
    for policy, logger, plugins in ((whole, loggers[0], None), (mixed, loggers[1], [half(2.0**10)])):
        options = dict(callbacks=[FusedClipCallback()], logger=logger, log_every_n_steps=1, max_steps=4)
        fit(tmp_path, policy, plugins=plugins, **options)
    expected, actual = ([row["grad_norm"] for row in logger.rows if "grad_norm" in row] for logger in loggers)
    # float16 forward and backward: 11 bits, over a few layers.
    assert actual == pytest.approx(expected, rel=0.02) and min(actual) > 0.1
    assert mixed.norms[0] == pytest.approx(2.0**10 * whole.norms[0], rel=0.02), "the gradients are scaled until then"
    moved = float((weights(whole) - weights(Policy(adamw))).abs().max())
    # Adam makes much of the sign of tiny gradients, which float16 may turn.
    assert float((weights(whole) - weights(mixed)).norm()) < 0.1 * float(moved * weights(whole).numel() ** 0.5)


def test_16_mixed_skips_an_overflow(tmp_path):
    policy, logger = Policy(ours(grad_clip=0.1, overshoot="brake")), Rows(tmp_path)
    trainer = fit(
        tmp_path,
        policy,
        plugins=[half(2.0**24)],
        callbacks=[FusedClipCallback()],
        logger=logger,
        log_every_n_steps=1,
        max_steps=16,
    )
    skipped = [row["step_count_skipped"] for row in logger.rows if "grad_norm" in row]
    assert skipped[0] == 1 and 1 <= skipped[-1] < 16 and skipped == sorted(skipped)
    assert int(trainer.optimizers[0].step_count_skipped) == skipped[-1]
    taken = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert taken == {16 - int(skipped[-1])}
    assert torch.isfinite(weights(policy)).all() and not torch.equal(weights(policy), weights(Policy(adamw)))


def test_16_mixed_with_lightnings_clip_is_refused_by_lightning(tmp_path):
    with pytest.raises(RuntimeError, match="FusedClipAdamW, does not allow for gradient clipping"):
        fit(tmp_path, Policy(ours()), plugins=[half(2.0**10)], gradient_clip_val=0.5)


# ---------------------------------------------------------------- statistics


def test_statistics_reach_a_rule_that_reads_them(tmp_path, monkeypatch):
    def train(overshoot, feeds=True, **options):
        policy = Policy(ours(overshoot=overshoot))
        policy.feeds = feeds
        fit(tmp_path, policy, **options)
        return policy

    braked, plain, unfed = train("brake"), train(None), train("brake", feeds=False)
    assert_close_to(unfed, plain)
    with pytest.raises(AssertionError):
        assert_close_to(braked, plain)
    seen = []
    own = fca.FusedClipAdamW.observe
    monkeypatch.setattr(fca.FusedClipAdamW, "observe", lambda opt, stats: seen.append(stats) or own(opt, stats))
    train("brake", accumulate_grad_batches=4)
    assert len(seen) == 16, "once per micro-batch"


class Misled(Policy):
    def training_step(self, batch, batch_idx):
        loss, stats = self.loss(batch)
        self.optimizers().observe(stats)
        return loss


def test_the_wrappers_own_observe_arrives_too(tmp_path):
    trained = []
    for kind in (Misled, Policy):
        policy = kind(ours(overshoot="brake"))
        fit(tmp_path, policy, callbacks=[FusedClipCallback()])
        trained.append(weights(policy))
    assert torch.equal(*trained)


def test_observe_refuses_other_things():
    p = torch.nn.Parameter(torch.ones(2))
    stats = fca.clip_stats(torch.zeros(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(TypeError, match=r"optimizer must be what self.optimizers\(\) gives.*got AdamW"):
        observe(torch.optim.AdamW([p]), stats)
    with pytest.raises(TypeError, match="got list"):
        observe([fca.FusedClipAdamW([p])], stats)
    with pytest.raises(TypeError, match="observe expects a ClipStats, got dict"):
        observe(fca.FusedClipAdamW([p]), stats.to_dict())


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("manual", [False, True])
def test_resumes_bit_for_bit(tmp_path, manual):
    def policy():
        return Policy(ours(grad_clip=ZCLIP, overshoot=("brake", "cautious")), manual)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    whole = policy()
    trainer = fit(tmp_path, whole, callbacks=[saver], enable_checkpointing=True, max_epochs=4)
    assert trainer.global_step == 32
    middle = tmp_path / "step=16.ckpt"
    resumed = policy()
    again = fit(tmp_path, resumed, ckpt_path=middle, max_epochs=4)
    assert again.global_step == 32 and len(resumed.norms) == 16
    assert torch.equal(weights(resumed), weights(whole))
    one, other = (t.optimizers[0].state_dict() for t in (again, trainer))
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    extra, expected = (state["param_groups"][0]["fused_clip_adam"] for state in (one, other))
    torch.testing.assert_close(extra, expected, rtol=0, atol=0)

    # The same checkpoint without what the rules remember goes elsewhere: the comparison above can fail.
    saved = torch.load(middle, weights_only=False)
    del saved["optimizer_states"][0]["param_groups"][0]["fused_clip_adam"]
    torch.save(saved, tmp_path / "forgetful.ckpt")
    forgetful = policy()
    fit(tmp_path, forgetful, ckpt_path=tmp_path / "forgetful.ckpt", max_epochs=4)
    assert not torch.equal(weights(forgetful), weights(whole))


def test_a_restored_clip_is_seen(tmp_path):
    """The rules come from the checkpoint: a Trainer's clip beside them is refused although the module has none."""
    saver = ModelCheckpoint(tmp_path, filename="saved")
    fit(tmp_path, Policy(ours(grad_clip=0.1)), callbacks=[saver], enable_checkpointing=True, max_epochs=1)
    options = dict(gradient_clip_val=0.5, callbacks=[FusedClipCallback()])
    with pytest.raises(ValueError, match=r"gradient_clip_val=0.5 .*GlobalNorm"):
        fit(tmp_path, Policy(ours()), ckpt_path=tmp_path / "saved.ckpt", **options)


# ---------------------------------------------------------------- two processes


class Shared(Policy):
    """Each rank has half of the recordings."""

    all_reduces = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.observed = []

    def training_step(self, batch, batch_idx):
        loss, stats = self.loss(batch)
        if self.all_reduces:
            observe(self.optimizers(), stats)
        else:
            self.optimizers().optimizer.observe(stats)
        self.observed.append(stats.to_dict())
        return loss

    def train_dataloader(self):
        data = recordings()
        return DataLoader(data, batch_size=8, sampler=DistributedSampler(data, shuffle=False))


def rank_of_two(folder):
    """What each of the two processes of the test below runs: one training as it is, one that sums nothing up."""
    torch.set_num_threads(1)
    record = {}
    for name in ("summed", "alone"):
        policy = Shared(ours(grad_clip=ZCLIP, overshoot="brake"))
        policy.all_reduces = name == "summed"
        trainer = fit(folder, policy, strategy="ddp", devices=2, use_distributed_sampler=False)
        record[name] = {
            "weights": weights(policy),
            "state": trainer.optimizers[0].state_dict()["state"],
            "observed": policy.observed,
            "world_size": trainer.world_size,
        }
    torch.save(record, folder / f"{trainer.global_rank}.pt")


def test_two_processes_stay_identical(tmp_path):
    first, second = records_of_two(__file__, tmp_path)
    one, other = first["summed"], second["summed"]
    assert one["world_size"] == 2 and [row["tokens"] for row in one["observed"]] == [16.0] * 8
    for name in ("weights", "state", "observed"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=lambda text, of=name: f"{of}: {text}")
    # Where each rank acts on its own statistics the weights part: the comparison above can fail.
    assert [row["tokens"] for row in first["alone"]["observed"]] == [8.0] * 8
    assert not torch.equal(first["alone"]["weights"], second["alone"]["weights"])


# ---------------------------------------------------------------- the example

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def test_policy_of_the_example_learns(capsys):
    import lightning_policy

    options = lightning_policy.parse_options(["--quick"])
    _, result = lightning_policy.train(options, progress=False)
    # One digit in ten is right by chance; seeds 0 to 2 end at 0.73 or more, and answer 0.75 or more without a slip.
    assert result["reward"][0] < 0.2 and result["reward"][1] > 0.5
    assert result["exact"][0] < 0.05 and result["exact"][1] > 0.4
    assert 0.01 < result["clip_fraction"] < 0.5 and result["skipped"] == 0
    assert result["grad_norm"] > lightning_policy.GRAD_CLIP, "the clip must act"
    lightning_policy.print_table(result, options)
    assert f"{result['reward'][1]:.3f}" in capsys.readouterr().out


if __name__ == "__main__":
    rank_of_two(Path(sys.argv[1]))
