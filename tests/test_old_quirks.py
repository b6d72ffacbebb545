"""Where sparse_autoencoder's Pipeline surprised its users, what happens here. One test per quirk.

Others stand where they belong: progress per batch, exact n_tokens, frequencies that do not drift, growing checkpoint
names, the dataset that ends (test_train.py); ring sizes named in one line (test_cli.py, test_ring.py); scoped hooks
(test_source.py); token-weighted means (test_evaluate.py); SAE folders written aside (test_sae.py).
"""

import json
import math
from itertools import pairwise

import pytest
import torch

import fastsae
from fastsae import checkpoint, prepare
from fastsae.checkpoint import checkpoints
from fastsae.log import Sink
from fastsae.source import load_source
from tests.worlds import HOOK


def weights(result):
    return {name: t.clone() for name, t in result.saes[HOOK].state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def validations(run_dir):
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "validation"]


@pytest.fixture
def bridge(world):
    model = fastsae.ModelConfig(name=world["model"], hook=HOOK)
    return load_source(model, torch.device("cpu")).model


def test_validation_takes_no_training_tokens(config):
    without = fastsae.train(config(name="without"))
    often = fastsae.train(config(name="often", save={"validate_every": 500}))
    assert len(validations(often.run_dir)) > 5
    assert equal(weights(without), weights(often))


def test_validation_tokens_are_the_same_each_time_for_every_hook_point_and_seed(config):
    clean = []
    for seed in (0, 1):
        hooks = ["blocks.0.hook_resid_post", HOOK]
        run = config(name=f"seed{seed}", seed=seed, model={"hook": hooks}, save={"validate_every": 2000})
        clean += [row["ce_clean"] for row in validations(fastsae.train(run).run_dir)]
    assert len(clean) == 12 and max(clean) - min(clean) < 1e-9


def test_a_score_does_not_accumulate_over_calls(config):
    """The last validation of a run equals one of the final SAE alone."""
    result = fastsae.train(config(save={"validate_every": 1000}))
    alone = fastsae.train(config(name="alone"))
    for name in ("ce_spliced", "fvu", "l0"):
        assert result.metrics[HOOK][name] == alone.metrics[HOOK][name]


def test_few_validation_tokens_are_one_context_and_no_nan(config):
    figures = fastsae.train(config(data={"n_validation_tokens": 1})).metrics[HOOK]
    assert figures["n_validation_tokens"] >= 1
    assert all(math.isfinite(figures[name]) for name in ("ce_clean", "ce_spliced", "ce_zero", "fvu"))


def test_the_result_is_returned_without_wandb(config):
    result = fastsae.train(config())
    assert {"loss", "mse", "l0", "fvu", "ce_clean"} <= result.metrics[HOOK].keys()


def test_one_optimizer_for_the_whole_run(config):
    """Several fills of the ring: the moments and the step count go on, the learning rate follows one schedule."""
    result = fastsae.train(config(log={"every": 1}))
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert len(rates) == 40
    falls = [b < a for a, b in pairwise(rates)]
    assert falls == sorted(falls), "it rises or stays, then falls; a new optimizer would warm up again"


@pytest.mark.parametrize("every", [3, 7])
def test_log_frequency_is_honoured(config, every):
    result = fastsae.train(config(log={"every": every}))
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == [*range(every, 40, every), 40]


def test_a_users_hooks_and_the_models_mode_are_left_alone(config, bridge):
    seen = []
    bridge.add_hook("blocks.0.hook_resid_pre", lambda acts, hook: seen.append(acts.shape))
    bridge.train()
    fastsae.train(config(), model=bridge)
    assert bridge.training and seen
    n_seen = len(seen)
    bridge(torch.arange(1, 5)[None])
    assert len(seen) == n_seen + 1
    points = {id(point): point for point in bridge.hook_dict.values()}  # some have two names
    assert sum(len(point.fwd_hooks) for point in points.values()) == 1


def test_hooks_are_gone_when_training_raises(config, bridge):
    class Failing(Sink):
        def advance(self, n_tokens):
            raise RuntimeError("from the sink")

    with pytest.raises(RuntimeError, match="from the sink"):
        fastsae.train(config(), model=bridge, sinks=[Failing()])
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_a_checkpoint_that_fails_half_way_leaves_the_last_one(config, monkeypatch):
    real, calls = checkpoint.save_tensors, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:  # a checkpoint saves two files
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "save_tensors", failing)
    with pytest.raises(fastsae.RunError, match="No space left on device"):
        fastsae.train(config(name="full", save={"checkpoint_every": 1000}))
    run_dir = config().runs_dir / "full"
    (only,) = checkpoints(run_dir)
    assert int(only.name) == 1024
    assert fastsae.load(only).cfg.d_sae == 48


def test_everything_is_checked_before_the_first_forward(config, monkeypatch):
    """Widths, hook points and names: no forward on text runs, no folder is made."""
    monkeypatch.setattr(prepare, "open_tokens", lambda *a, **k: pytest.fail("the dataset was opened"))
    with pytest.raises(fastsae.SourceError, match="hook_resid_post"):
        fastsae.train(config(model={"hook": ["blocks.1.hook_resid_pots"]}))
    with pytest.raises(fastsae.ConfigError, match=r"ring\.capacity = 60"):
        fastsae.train(config(ring={"capacity": 60}))
    assert not config().runs_dir.exists()


def test_precision_is_the_users_choice(config):
    """On a CPU tf32 is fp32."""
    weights = {}
    for precision in ("fp32", "tf32", "bf16"):
        result = fastsae.train(config(name=precision, step={"precision": precision}))
        assert 0 < result.metrics[HOOK]["fvu"] < 1
        weights[precision] = result.saes[HOOK].W_dec
    assert all(W.dtype == torch.float32 for W in weights.values())
    assert torch.equal(weights["fp32"], weights["tf32"]) and not torch.equal(weights["fp32"], weights["bf16"])


def test_the_decoder_is_at_norm_1_after_each_step(config):
    result = fastsae.train(config(save={"checkpoint_every": 1000}))
    for folder in [*checkpoints(result.run_dir), result.run_dir]:
        norms = fastsae.load(folder).W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(48), rtol=1e-6, atol=1e-6)


def test_l1_of_zero_is_allowed(config):
    assert fastsae.train(config(step={"l1_coefficient": 0.0})).metrics[HOOK]["l0"] > 1
