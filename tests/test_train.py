"""Whole runs on a random model of three layers, and on activations from a known dictionary."""

import json
import os
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import fastsae
from fastsae import memory, ring
from fastsae.checkpoint import checkpoints
from fastsae.collect import harvest
from fastsae.config import OWN_FIELDS
from fastsae.configfile import load_config
from fastsae.evaluate import evaluate
from fastsae.harvest import Harvester
from fastsae.log import JsonlSink, Sink
from fastsae.optimizer import Optimizer
from fastsae.prepare import prepare
from fastsae.revisit import evaluate_run
from fastsae.source import load_source
from fastsae.step import TrainStep
from fastsae.tokens import open_tokens
from tests.devices import Device
from tests.tiny_models import D_MODEL, save_model
from tests.worlds import HOOK


def rows(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def weights(result, key=HOOK):
    return {name: t.detach().clone() for name, t in result.saes[key].state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


train_module = sys.modules["fastsae.train"]  # fastsae.train is the function


class Count(Sink):
    """What the loop said of its progress."""

    def __init__(self):
        self.batches, self.rows = [], []

    def advance(self, n_tokens):
        self.batches.append(n_tokens)

    def row(self, row):
        self.rows.append(row)


def test_a_run_from_start_to_end(config, tmp_path):
    count = Count()
    result = fastsae.train(config(), sinks=[count])
    assert result.n_tokens == 5000 == sum(count.batches) == rows(result.run_dir, "train")[-1]["n_tokens"]
    assert count.batches[:-1] == [128] * 39 and count.batches[-1] == 8, "the last batch is short"
    assert result.run_dir == tmp_path / "runs" / "run"
    sae = fastsae.load(result.run_dir)
    x = 7 * torch.randn(9, D_MODEL)
    torch.testing.assert_close(sae(x), result.saes[HOOK](x))
    figures = result.metrics[HOOK]
    assert 0 < figures["fvu"] < 2 and 600 <= figures["n_validation_tokens"] < 616
    assert figures["ce_zero"] is not None and "dead_fraction_10M" in figures
    assert sae.metadata["hook_name"] == HOOK and sae.metadata["model_weights"] == "raw"
    resolved = load_config(result.run_dir / "config.toml")
    assert (
        resolved.ring.placement == "device"
        and resolved.ring.dtype == "float32"
        and resolved.step.l1_coefficient == 5
    )
    assert [row["step"] for row in rows(result.run_dir, "train")] == [10, 20, 30, 40]


def test_same_seed_same_bits_and_other_seed_others(config):
    a, b, c = (weights(fastsae.train(config(name=n, seed=s))) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert same(a, b)
    assert not same(a, c)


def test_the_resolved_config_repeats_the_run(config):
    first = fastsae.train(config(name="a", sae={"activation": "topk", "k": 4}))
    again = load_config(first.run_dir / "config.toml", {"name": "again"})
    assert same(weights(first), weights(fastsae.train(again)))


def test_hook_points_together_equal_hook_points_apart(config):
    hooks = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]
    together = fastsae.train(config(name="both", model={"hook": hooks}))
    assert list(together.saes) == hooks
    for hook in hooks:
        alone = fastsae.train(config(name=hook, model={"hook": [hook]}))
        assert same(weights(alone, hook), weights(together, hook))
        assert alone.metrics[hook]["fvu"] == pytest.approx(together.metrics[hook]["fvu"], rel=1e-6)
    assert list(fastsae.load_all(together.run_dir)) == hooks
    with pytest.raises(
        fastsae.RunError, match=r"several SAEs: blocks\.1\.hook_resid_post, blocks\.2\.hook_mlp_out"
    ):
        fastsae.load(together.run_dir)


def test_several_saes_per_hook_point(config):
    entries = [{"activation": "topk", "k": 2}, {"activation": "topk", "k": 8, "d_sae": 64, "name": "wide"}]
    result = fastsae.train(config(saes=entries))
    assert list(result.saes) == [f"{HOOK}/topk-k=2", f"{HOOK}/wide"]
    for key, (k, d_sae) in zip(result.saes, [(2, 48), (8, 64)], strict=True):
        sae = fastsae.load(result.run_dir / "saes" / key)
        assert (sae.cfg.k, sae.cfg.d_sae) == (k, d_sae)
        assert result.metrics[key]["l0"] <= k
    alone = fastsae.train(config(name="alone", sae={"activation": "topk", "k": 2}))
    assert same(weights(alone), weights(result, f"{HOOK}/topk-k=2"))


@pytest.mark.parametrize("n_tokens", [1, 50, 128, 1199, 1200, 1201, 2400])
def test_any_number_of_tokens(config, n_tokens):
    """Fewer than a batch, fewer than a fill, exactly a fill, exactly between two."""
    count = Count()
    result = fastsae.train(config(n_tokens=n_tokens), sinks=[count])
    assert result.n_tokens == n_tokens == sum(count.batches)
    assert checkpoints(result.run_dir)[-1].name == f"{n_tokens:012d}"


def test_frequencies_are_multiples_that_do_not_drift(config):
    result = fastsae.train(config(save={"checkpoint_every": 1000, "validate_every": 900}))
    assert [int(p.name) for p in checkpoints(result.run_dir)] == [1024, 2048, 3072, 4096, 5000]
    assert [row["n_tokens"] for row in rows(result.run_dir, "validation")] == [
        1024,
        1920,
        2816,
        3712,
        4608,
        5000,
    ]
    for row in rows(result.run_dir, "validation"):
        assert row["n_tokens"] in [r["n_tokens"] for r in rows(result.run_dir, "train")]


def test_only_the_newest_checkpoints_are_kept(config):
    result = fastsae.train(config(save={"checkpoint_every": 1000, "keep": 2}))
    assert [int(p.name) for p in checkpoints(result.run_dir)] == [4096, 5000]
    assert not [p for p in (result.run_dir / "checkpoints").iterdir() if p.name.startswith(".")]


def test_a_checkpoint_reconstructs_as_its_row_says(config, world):
    """Raw activations in, raw activations out, at a moment when the biases are scaled."""
    run = config(save={"checkpoint_every": 2500, "validate_every": 2500})
    result = fastsae.train(run)
    middle = checkpoints(result.run_dir)[0]
    row = next(r for r in rows(result.run_dir, "validation") if r["n_tokens"] == int(middle.name))
    exact = load_file(middle / "saes" / HOOK / "step.safetensors")
    assert abs(float(exact["sae.scale"]) - 1) > 0.01
    sae = fastsae.load(middle)
    source = load_source(run.model, torch.device("cpu"))
    tokens = open_tokens(run.data, source.tokenizer, seed=0)
    acts = []
    source.forward(tokens.validation.tokens, [(HOOK, acts.append)], stop=True)
    x = acts[0][tokens.validation.keep].double()
    error = (sae(x.float()).double() - x).square().sum(1)
    assert error.mean().item() == pytest.approx(row["mse"], rel=1e-4)
    assert (error.sum() / (x - x.mean(0)).square().sum()).item() == pytest.approx(row["fvu"], rel=1e-4)
    again = evaluate(source, {"x": (HOOK, sae)}, tokens.validation, batch_size=4)["x"]
    assert again.ce_spliced == pytest.approx(row["ce_spliced"], rel=1e-4)


def test_a_dataset_that_ends_early_ends_the_run_cleanly(config):
    with pytest.warns(UserWarning, match="the dataset ended after"):
        result = fastsae.train(config(n_tokens=10**6))
    assert 5000 < result.n_tokens < 20_000 and not result.interrupted
    assert int(checkpoints(result.run_dir)[-1].name) == result.n_tokens
    (warning,) = rows(result.run_dir, "warning")
    assert "the dataset ended" in warning["message"] and "on_exhausted" in warning["message"]
    assert result.metrics[HOOK]["n_validation_tokens"] >= 600


def test_or_another_epoch_begins(config):
    result = fastsae.train(config(n_tokens=40_000, data={"on_exhausted": "repeat"}))
    assert result.n_tokens == 40_000


class Interrupt(Count):
    """Ctrl-C at the third batch."""

    def advance(self, n_tokens):
        super().advance(n_tokens)
        if len(self.batches) == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_ring_in_host_memory_gives_the_same_bits(config):
    """Also by way of pinned memory, whose copies to the host come when they are waited for."""
    device, host = (fastsae.train(config(name=p, ring={"placement": p})) for p in ("device", "host"))
    with patch.object(ring, "lane_for", Device("work").lane):
        pinned = fastsae.train(config(name="pinned", ring={"placement": "host"}))
    assert same(weights(device), weights(host)) and same(weights(device), weights(pinned))


@pytest.mark.parametrize(
    "kind, hook", [("bert", "blocks.1.hook_out"), ("neox_headless", "blocks.1.hook_resid_post")]
)
def test_models_without_a_next_token_train_too(config, tmp_path, kind, hook):
    """Encoders, and decoders whose head is not in the weights: no cross-entropy, and one line why."""
    model = {"name": save_model(kind, tmp_path / kind), "hook": [hook]}
    figures = fastsae.train(config(model=model)).metrics[hook]
    assert figures["ce_clean"] is figures["ce_zero"] is figures["reconstruction_score"] is None
    assert figures["ce_reason"] and "\n" not in figures["ce_reason"]
    assert 0 < figures["fvu"] < 1


@pytest.mark.skipif(
    version("transformer-lens") >= "4",
    reason="TransformerLens 4 has no HookedTransformer; `make peers` installs 3.9",
)
def test_a_hooked_transformer_of_transformer_lens_3_trains(config, world):
    import transformer_lens
    from transformers import AutoTokenizer

    shape = {"n_layers": 3, "d_model": D_MODEL, "n_ctx": 32, "d_head": 8, "n_heads": 2, "d_vocab": 64}
    cfg = transformer_lens.HookedTransformerConfig(**shape, act_fn="gelu", seed=0, device="cpu")
    model = transformer_lens.HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(world["model"]))
    result = fastsae.train(config(model={"weights": "processed"}), model=model)
    assert result.n_tokens == 5000 and 0 < result.metrics[HOOK]["fvu"] < 1
    assert result.saes[HOOK].metadata["model_class_name"] == "HookedTransformer"


def test_ctrl_c_ends_with_a_checkpoint(config):
    handler = signal.getsignal(signal.SIGINT)
    result = fastsae.train(config(), sinks=[Interrupt()])
    assert result.interrupted and result.n_tokens == 3 * 128
    assert int(checkpoints(result.run_dir)[-1].name) == 384
    assert signal.getsignal(signal.SIGINT) is handler
    assert rows(result.run_dir, "train")[-1]["n_tokens"] == 384
    whole = fastsae.train(config(name="whole", save={"checkpoint_every": 384}))
    assert same(
        load_file(checkpoints(result.run_dir)[-1] / "saes" / HOOK / "step.safetensors"),
        load_file(checkpoints(whole.run_dir)[0] / "saes" / HOOK / "step.safetensors"),
    ), "a step was not cut in half"


class InterruptTwice(Count):
    """Two signals inside one step: the second one would cut it in half."""

    def row(self, row):
        assert row.get("of") == "first fill", "nothing is logged after the second signal"


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(config, monkeypatch):
    real, calls = Optimizer.update, []

    def update(self, *args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(Optimizer, "update", update)
    with pytest.raises(KeyboardInterrupt):
        fastsae.train(config(), sinks=[InterruptTwice()])
    assert not checkpoints(config().runs_dir / "run")


def test_ctrl_c_on_a_logging_step_keeps_its_figures(config):
    result = fastsae.train(config(log={"every": 3}), sinks=[Interrupt()])
    (row,) = rows(result.run_dir, "train")
    assert row["step"] == 3 and row["loss"] > 0
    assert result.metrics[HOOK]["loss"] == row["loss"]


def test_nothing_is_left_of_a_run_that_never_began(config, monkeypatch):
    """Ctrl-C in the first fill: the name is free again."""
    real = Harvester.forward

    def forward(self):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Harvester, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        fastsae.train(config())
    assert not config().runs_dir.exists()


def test_data_that_breaks_in_the_middle_leaves_a_checkpoint(config, monkeypatch):
    real, calls = Harvester.forward, []

    def forward(self):
        calls.append(1)
        if len(calls) > 40:
            raise fastsae.DataError("the stream broke")
        return real(self)

    monkeypatch.setattr(Harvester, "forward", forward)
    with pytest.raises(fastsae.DataError, match=r"the stream broke; .* checkpoint .*checkpoints/\d+"):
        fastsae.train(config())
    (folder,) = checkpoints(config().runs_dir / "run")
    assert fastsae.load(folder).cfg.d_sae == 48
    assert load_config(folder / "config.toml").n_tokens == 5000


def test_what_is_wrong_with_the_config_is_said_before_a_model_is_loaded(config, tmp_path, monkeypatch):
    nowhere = {"name": str(tmp_path / "nowhere"), "hook": [HOOK]}
    for section in ({"step": {"target_l0": 3.0, "lr": 1e-3}}, {"sae": {"activation": "topk", "k": 64}}):
        with pytest.raises(fastsae.ConfigError, match=r"target_l0|k = 64"):
            fastsae.train(config(model=nowhere, **section))
    monkeypatch.setattr(sys.modules["fastsae.prepare"], "find_spec", lambda name: None)
    with pytest.raises(fastsae.ConfigError, match="wandb is not installed"):
        prepare(config(model=nowhere, log={"wandb": "project"}))


def test_a_run_that_cannot_begin_takes_no_other_with_it(config, tmp_path, monkeypatch):
    """In a new folder of runs, in which another has begun meanwhile."""
    runs, folder = tmp_path / "new" / "runs", sys.modules["fastsae.folder"]

    def fails(job):
        (runs / "other").mkdir()
        raise fastsae.RunError("no sink")

    monkeypatch.setattr(folder, "_own_sinks", fails)
    with pytest.raises(fastsae.RunError, match="no sink"):
        fastsae.train(config(runs_dir=str(runs)))
    assert [path.name for path in runs.iterdir()] == ["other"]


def test_paths_in_a_run_do_not_go_by_the_working_folder(config, world, monkeypatch):
    root = Path(world["text"]).parent
    monkeypatch.chdir(root)
    job = prepare(config(model={"name": "model"}, data={"cache_dir": "cache", "dataset": "text.jsonl"}))
    job.close()
    made = job.config
    assert made.data.cache_dir == root / "cache"
    assert (made.model.name, made.data.dataset) == (str(root / "model"), str(root / "text.jsonl"))


def test_a_model_of_ones_own_needs_a_text_of_ones_own(config, world, tmp_path):
    """The demo's is not taken because nothing was said, but where it is named."""
    own = {"model": {"name": world["model"], "hook": [HOOK]}, "device": "cpu"}
    for refused in (prepare, lambda cfg: harvest(cfg, tmp_path / "acts")):
        with pytest.raises(fastsae.ConfigError, match=r"data\.dataset is not given"):
            refused(load_config(None, own))
    bridge = load_source(config().model, torch.device("cpu")).model
    with pytest.raises(fastsae.ConfigError, match=r"data\.dataset is not given"):
        prepare(load_config(None, {"model": {"hook": [HOOK]}, "device": "cpu"}), model=bridge)


def test_validation_never_reaches_into_what_was_trained_on(config):
    """Of the run's own dataset no more documents are taken than were held out."""
    result = fastsae.train(config())

    def figures(**data):
        return evaluate_run(result.run_dir, lambda file: load_config(file, {"data": data}))[HOOK]

    assert figures(n_validation_tokens=300)["n_validation_tokens"] < figures()["n_validation_tokens"]
    with pytest.raises(fastsae.ConfigError, match=r"held out \d+ documents, and this would validate on \d+"):
        figures(n_validation_tokens=3000)
    for split in ("train[:100%]", "train[50%:]", "train[10%:]+train[:10%]"):
        with pytest.raises(fastsae.ConfigError, match="may hold what the run was trained on"):
            figures(n_validation_tokens=300, split=split)


def test_a_name_that_is_taken_says_how_to_go_on(config):
    fastsae.train(config(n_tokens=300))
    with pytest.raises(fastsae.RunError, match=r"--resume .*runs/run goes on with it; for a new run choose"):
        fastsae.train(config(n_tokens=300))


@pytest.mark.parametrize("n_tokens", [50, 1200, 5000])
def test_the_ring_takes_the_memory_that_was_predicted(config, n_tokens):
    job = prepare(config(n_tokens=n_tokens, model={"hook": ["blocks.*.hook_mlp_out"]}))
    job.close()
    assert train_module._ring(job).mem_bytes == job.mem_bytes["ring"]
    assert "host" not in job.mem_bytes


def test_beside_a_gpu_a_ring_takes_what_was_predicted_of_both_memories(config):
    """As if the CPU were a device whose copies go another way."""
    job = prepare(
        config(n_tokens=5000, model={"hook": ["blocks.*.hook_mlp_out"]}, ring={"placement": "host"})
    )
    job.close()
    on_device, on_host = memory.ring_bytes(job.config, job.widths, job.ring_dtype, job.max_write, "cuda")
    with patch.object(ring, "lane_for", Device(None).lane):
        made = train_module._ring(job)
    batches = 2 * sum(t.nbytes for t in made._batch.values())
    assert on_device == made._outbound.mem_bytes + batches
    assert on_device + on_host == made.mem_bytes


def test_the_clock_counts_the_first_fill(config, monkeypatch):
    """One fill is the run: its forwards are most of the time."""
    real = Harvester.forward

    def slow(self):
        time.sleep(0.02)
        return real(self)

    monkeypatch.setattr(Harvester, "forward", slow)
    result = fastsae.train(config(n_tokens=1200))
    assert result.tokens_per_second < 1200 / (1200 / 60 * 0.02)


def test_a_model_that_is_given_is_named_in_the_config(config, world):
    bridge = load_source(config().model, torch.device("cpu")).model
    result = fastsae.train(config(model={"name": "demo"}), model=bridge)
    resolved = load_config(result.run_dir / "config.toml")
    assert resolved.model.name == world["model"] == result.saes[HOOK].metadata["model_name"]
    with pytest.raises(fastsae.RunError, match="model object"):
        evaluate_run(result.run_dir, load_config)


def test_final_saes_appear_together_or_not_at_all(config, monkeypatch):
    real, calls = fastsae.SAE.save, []

    def save(self, folder):
        calls.append(folder)
        if len(calls) == 4:  # two for the checkpoint
            raise fastsae.RunError("the disk is full")
        real(self, folder)

    monkeypatch.setattr(fastsae.SAE, "save", save)
    with pytest.raises(fastsae.RunError, match="the disk is full"):
        fastsae.train(config(saes=[{"name": "a"}, {"name": "b"}]))
    run_dir = config().runs_dir / "run"
    assert not (run_dir / "saes").exists()
    assert list(fastsae.load_all(run_dir)) == [f"{HOOK}/a", f"{HOOK}/b"]


def test_ctrl_c_in_a_validation_ends_with_a_checkpoint(config, monkeypatch):
    monkeypatch.setattr(train_module, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    result = fastsae.train(config(save={"validate_every": 1000}))
    assert [int(p.name) for p in checkpoints(result.run_dir)] == [1024]
    assert fastsae.load(result.run_dir).cfg.d_sae == 48


def test_metrics_that_cannot_be_written_end_with_a_checkpoint(config, monkeypatch):
    def full(self, row):
        raise fastsae.RunError("cannot write metrics.jsonl: No space left on device")

    monkeypatch.setattr(JsonlSink, "row", full)
    with pytest.raises(fastsae.RunError, match=r"No space left.*checkpoints/\d+"):
        fastsae.train(config())
    assert checkpoints(config().runs_dir / "run")


def test_fp64_activations_keep_their_type(tmp_path):
    run = load_config(
        None, {"runs_dir": str(tmp_path), "n_tokens": 500, "device": "cpu", "sae": {"d_sae": 16}}
    )
    result = fastsae.train(run, activations=[torch.randn(500, 8, dtype=torch.float64)])
    assert load_config(result.run_dir / "config.toml").ring.dtype == "float64"


def test_relu_and_topk_side_by_side(config):
    entries = [{"name": "topk"}, {"name": "relu", "activation": "relu"}]
    result = fastsae.train(config(sae={"activation": "topk", "k": 4}, saes=entries))
    again = load_config(result.run_dir / "config.toml", {"name": "again"})
    assert same(weights(fastsae.train(again), f"{HOOK}/relu"), weights(result, f"{HOOK}/relu"))


def test_training_can_start_from_an_sae(config):
    first = fastsae.train(config(name="first"))
    second = prepare(config(name="second", init_from=str(first.run_dir)))
    second.close()
    x = torch.randn(5, D_MODEL)
    result = fastsae.train(config(name="third", init_from=str(first.run_dir), n_tokens=1, step={"lr": 1e-30}))
    torch.testing.assert_close(result.saes[HOOK](x), first.saes[HOOK](x), rtol=1e-4, atol=1e-5)
    with pytest.raises(fastsae.ConfigError, match="init_from"):
        fastsae.train(config(name="fourth", init_from=str(first.run_dir), sae={"d_sae": 49}))


def synthetic(n_batches, *, d_in=32, n_features=64, l0=3, seed=0):
    """The unit rows of a dictionary, and batches of sparse positive combinations of them."""
    gen = torch.Generator().manual_seed(seed)
    truth = torch.randn(n_features, d_in, generator=gen)
    truth /= truth.norm(dim=1, keepdim=True)

    def batches():
        for _ in range(n_batches):
            active = torch.rand(1024, n_features, generator=gen) < l0 / n_features
            yield (active * (0.5 + torch.rand(1024, n_features, generator=gen))) @ truth

    return truth, batches()


@pytest.mark.parametrize("activation", OWN_FIELDS)
def test_a_known_dictionary_is_recovered(activation, tmp_path):
    truth, batches = synthetic(401)
    fresh = next(batches)
    extra = {"activation": activation, **({"k": 4} if "topk" in activation else {})}
    own = {"relu": {"l1_coefficient": 1.5}, "jumprelu": {"target_l0": 4.0}}
    step = {"batch_size": 512, "lr": 4e-3, **own.get(activation, {})}
    run = load_config(
        None,
        {
            "runs_dir": str(tmp_path),
            "n_tokens": 400_000,
            "device": "cpu",
            "sae": {"d_sae": 96, **extra},
            "step": step,
            "ring": {"capacity": 6000},
        },
    )
    result = fastsae.train(run, activations=batches)
    W_dec = result.saes["activations"].W_dec.detach()
    cosines = truth @ (W_dec / W_dec.norm(dim=1, keepdim=True)).T
    found = (cosines.max(1).values > 0.9).float().mean().item()
    assert found > 0.9, found
    if activation in ("batchtopk", "jumprelu"):  # on average as many as asked for, one input at a time
        l0 = (fastsae.load(result.run_dir).encode(fresh) > 0).sum(1).double().mean().item()
        assert 3 < l0 < 5, l0


@pytest.mark.parametrize("where", [0, 12], ids=["in the first fill", "later"])
def test_a_non_finite_loss_stops_with_step_and_checkpoint(where, tmp_path):
    chunks = [torch.randn(256, 8) for _ in range(20)]
    chunks[where][3] = float("nan")
    run = load_config(
        None,
        {
            "name": "bad",
            "runs_dir": str(tmp_path),
            "n_tokens": 5000,
            "device": "cpu",
            "sae": {"d_sae": 16},
            "step": {"batch_size": 64},
            "ring": {"capacity": 1200},
            "log": {"every": 5},
        },
    )
    with pytest.raises(
        fastsae.NonFiniteLossError,
        match=r"step \d+, which moved nothing; the run ends, its last checkpoint is .*checkpoints/\d+",
    ):
        fastsae.train(run, activations=chunks)
    (saved,) = checkpoints(tmp_path / "bad")
    assert all(p.isfinite().all() for p in fastsae.load(saved).parameters())


def test_activations_of_which_none_is_finite(tmp_path):
    run = load_config(None, {"runs_dir": str(tmp_path), "n_tokens": 50, "device": "cpu", "sae": {"d_sae": 4}})
    with pytest.raises(fastsae.DataError, match="none of the first activations is finite"):
        fastsae.train(run, activations=[torch.full((50, 8), torch.nan)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("every", [3, 1000], ids=["in the middle", "at the end"])
def test_a_run_goes_on_behind_a_batch_that_is_not_finite(every, config, tmp_path, monkeypatch):
    """From a checkpoint that it left, without that batch, and for every SAE of the run."""
    original, seen = TrainStep.__call__, []

    def poisoned(step, x, *args, **kwargs):
        seen.append(1)
        return original(step, x * torch.nan if len(seen) in (9, 10) else x, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    fields = {"n_tokens": 2560, "saes": [{"d_sae": 48}, {"d_sae": 32}], "log": {"every": every}}
    with pytest.raises(fastsae.NonFiniteLossError, match=r"at step 4.*a resume goes on behind it"):
        fastsae.train(config(**fields))
    folder = tmp_path / "runs" / "run"
    before = rows(folder, "train")
    assert {row["sae"].split("/")[1] for row in before} == {"relu-d_sae=48", "relu-d_sae=32"}, (
        "nothing is lost"
    )
    result = fastsae.resume(folder)
    assert rows(folder, "train")[: len(before)] == before
    assert result.n_tokens == 2560 and len(seen) == 2 * 20
    assert all(0 < figures["fvu"] < 1 for figures in result.metrics.values())


@pytest.mark.parametrize(
    "chunks, words",
    [
        ([], "empty"),
        ([torch.zeros(3)], r"\[n, d_in\]"),
        ([torch.zeros(3, 2), torch.zeros(2, 5)], r"\(2, 5\)"),
    ],
)
def test_activations_that_do_not_fit_are_named(chunks, words, tmp_path):
    run = load_config(None, {"runs_dir": str(tmp_path), "n_tokens": 5, "device": "cpu", "sae": {"d_sae": 4}})
    with pytest.raises(fastsae.DataError, match=words):
        fastsae.train(run, activations=chunks)


def test_activations_may_carry_a_graph(tmp_path):
    chunks = [torch.randn(100, 8, requires_grad=True) * 2 for _ in range(5)]
    run = load_config(
        None, {"runs_dir": str(tmp_path), "n_tokens": 500, "device": "cpu", "sae": {"d_sae": 16}}
    )
    assert fastsae.train(run, activations=chunks).n_tokens == 500


def test_activations_that_run_dry_are_said(tmp_path):
    run = load_config(
        None, {"runs_dir": str(tmp_path), "n_tokens": 900, "device": "cpu", "sae": {"d_sae": 16}}
    )
    with pytest.warns(UserWarning, match="the iterable ended after 500 of n_tokens = 900 activations"):
        assert fastsae.train(run, activations=[torch.randn(100, 8) for _ in range(5)]).n_tokens == 500


def test_wandb_offline(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = fastsae.train(
        config(n_tokens=600, log={"wandb": "project", "every": 2}, save={"checkpoint_every": 128})
    )
    (first,) = Path(result.run_dir).glob("wandb/offline-run-*/*.wandb")
    shutil.rmtree(result.run_dir / "saes")
    shutil.rmtree(checkpoints(result.run_dir)[-1])
    fastsae.resume(result.run_dir)
    files = {path.name for path in Path(result.run_dir).glob("wandb/offline-run-*/*.wandb")}
    assert files == {first.name}, "one run, of one id"


def test_what_is_saved_and_validated_is_the_running_mean(config):
    """In checkpoints beside the exact weights, at the end in place of them."""
    result = fastsae.train(config(step={"ema_decay": 0.9, "batch_size": 128, "lr": 1e-2}))
    saved, found = fastsae.load(result.run_dir), result.saes[HOOK]
    torch.testing.assert_close(saved.W_dec, found.W_dec, rtol=0, atol=0)
    folder = checkpoints(result.run_dir)[-1]
    state = load_file(next(folder.rglob("step.safetensors")))
    torch.testing.assert_close(fastsae.load(folder).W_dec.detach(), found.W_dec.detach(), rtol=0, atol=0)
    assert not torch.equal(state["sae.W_dec"], found.W_dec)
    torch.testing.assert_close(state["ema.b_dec"], found.b_dec.detach(), rtol=0, atol=0)
