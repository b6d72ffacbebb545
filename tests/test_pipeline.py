"""`fastsae.Pipeline`: the job of sparse_autoencoder's, with the behaviour that its documentation promised."""

import json
import logging
import math
import os
import signal
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastsae
from fastsae.config import ModelConfig
from fastsae.errors import ConfigError, DataError, NonFiniteLossError, RunError, SourceError
from fastsae.source import load_source
from fastsae.sparse_autoencoder import (
    L1AbsoluteLoss,
    L2ReconstructionLoss,
    LitSparseAutoencoder,
    LitSparseAutoencoderConfig,
    MockDataset,
    Pipeline,
    PreTokenizedDataset,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    SparseAutoencoderLoss,
    TextDataset,
)
from fastsae.step import TrainStep
from tests.tiny_models import D_MODEL, D_VOCAB

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
CONTEXT, CONTEXTS = 16, 4
PER_FORWARD = CONTEXT * CONTEXTS
D_SAE = 24


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """A file of token ids, some 12,000 of them."""
    path = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    gen = torch.Generator().manual_seed(0)
    rows = [torch.randint(D_VOCAB, (30,), generator=gen).tolist() for _ in range(400)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(world):
    return load_source(ModelConfig(name=world["model"], hook=tuple(HOOKS)), torch.device("cpu")).model


@pytest.fixture
def made(ids, model, tmp_path):
    def make(hooks=HOOKS, lit=True, dataset=None, l1=0.01, **fields):
        torch.manual_seed(0)
        n = len(hooks)
        if lit:
            config = LitSparseAutoencoderConfig(
                n_input_features=D_MODEL, n_learned_features=D_SAE, n_components=n, component_names=tuple(hooks),
                l1_coefficient=l1,
            )  # fmt: skip
            autoencoder = LitSparseAutoencoder(config)
        else:
            autoencoder = SparseAutoencoder(
                SparseAutoencoderConfig(n_input_features=D_MODEL, n_learned_features=D_SAE, n_components=n)
            )
        arguments = {
            "autoencoder": autoencoder,
            "cache_names": hooks,
            "layer": 1,
            "source_dataset": dataset or PreTokenizedDataset(ids, context_size=CONTEXT, repeat=True),
            "source_model": model,
            "n_input_features": D_MODEL,
            "n_learned_features": D_SAE,
            "run_name": "test",
            "checkpoint_directory": tmp_path,
            "source_data_batch_size": CONTEXTS,
            **fields,
        }
        return Pipeline(**arguments)

    return make


def plain_training(autoencoder, batches, l1):
    """The documented maths in plain torch: one Adam for the run, gradients along the decoder's columns, normalised behind the step."""
    state = autoencoder.old_state_dict()
    W_e, b_e = (nn.Parameter(state[f"encoder.{n}"].clone()) for n in ("weight", "bias"))
    W_d, b = nn.Parameter(state["decoder.weight"].clone()), nn.Parameter(state["tied_bias"].clone())
    adam = torch.optim.Adam([W_e, b_e, W_d, b], lr=1e-3)
    losses = []
    for x in batches:
        acts = (torch.einsum("bcn,cmn->bcm", x - b, W_e) + b_e).relu()
        error = torch.einsum("bcm,cnm->bcn", acts, W_d) + b - x
        each = error.square().mean(-1) + l1 * acts.abs().sum(-1)
        losses.append(each.mean(0).detach())
        adam.zero_grad()
        each.mean().backward()
        with torch.no_grad():
            unit = W_d / W_d.norm(dim=-2, keepdim=True)
            W_d.grad -= unit * (unit * W_d.grad).sum(-2, keepdim=True)
        adam.step()
        with torch.no_grad():
            W_d /= W_d.norm(dim=-2, keepdim=True)
    return torch.stack(losses), {
        "encoder.weight": W_e,
        "encoder.bias": b_e,
        "decoder.weight": W_d,
        "tied_bias": b,
    }


@pytest.mark.parametrize("n_components", [1, 2])
def test_the_loss_curve_is_that_of_the_documented_maths(n_components, made):
    """300 steps from the same weights on the same tokens."""
    hooks = HOOKS[:n_components]
    pipeline, twin = (made(hooks, l1=0.02, log_frequency=1000) for _ in range(2))
    store = twin.generate_activations(300 * PER_FORWARD)
    batches = [torch.stack([b[h] for h in hooks], 1).clone() for b in store.batches(PER_FORWARD)]
    expected, weights = plain_training(pipeline.autoencoder, batches, 0.02)
    found = []
    for _ in pipeline._train(pipeline.generate_activations(300 * PER_FORWARD), PER_FORWARD):
        found.append([step.read()["loss"] / D_MODEL for step in pipeline.steps.values()])
    assert len(found) == len(expected) == 300
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), expected, rtol=1e-5, atol=1e-7)
    assert expected[-1].mean() < 0.7 * expected[0].mean(), "it trains"
    trained = pipeline.autoencoder.old_state_dict()
    for name, w in weights.items():
        torch.testing.assert_close(trained[name], w.detach(), rtol=1e-3, atol=1e-4)
    assert (trained["decoder.weight"].norm(dim=-2) - 1).abs().max() < 1e-6


def test_the_old_demo(tmp_path, wandb):
    """On the embedded model: two hook points, validation, checkpoints, a resample, and a second call on the same object that goes on."""
    run, hooks = wandb(FakeRun()), ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    model = load_source(ModelConfig(name="demo", hook=tuple(hooks)), torch.device("cpu")).model
    torch.manual_seed(0)
    autoencoder = LitSparseAutoencoder(
        LitSparseAutoencoderConfig(
            n_input_features=128,
            n_learned_features=256,
            n_components=2,
            component_names=hooks,
            l1_coefficient=0.01,
            resample_interval=1500,
            resample_dead_neurons_dataset_size=1000,
            resample_loss_dataset_size=800,
            resample_threshold_is_dead_portion_fires=0.01,
        )
    )
    pipeline = Pipeline(
        autoencoder=autoencoder,
        cache_names=hooks,
        layer=2,
        source_dataset=TextDataset("demo", model.tokenizer, context_size=64, pre_download=True),
        source_model=model,
        n_input_features=128,
        n_learned_features=256,
        run_name="test",
        checkpoint_directory=tmp_path,
        log_frequency=10,
        source_data_batch_size=4,
    )
    pipeline.run_pipeline(
        train_batch_size=32,
        max_store_size=700,
        max_activations=2000,
        validation_n_activations=500,
        validate_frequency=500,
        checkpoint_frequency=1000,
    )
    assert pipeline.total_activations_trained_on == 2000 and pipeline.n_components == 2
    assert all(step.resampler.n_resampled == 1 for step in pipeline.steps.values())
    assert {path.name for path in tmp_path.iterdir()} == {"test_1024", "test_2000", "test_final"}
    first = fastsae.load_all(tmp_path / "test_final")
    pipeline.run_pipeline(train_batch_size=32, max_store_size=700, max_activations=1000)
    assert pipeline.total_activations_trained_on == 3000
    second = fastsae.load_all(tmp_path / "test_final")
    assert list(second) == hooks and not torch.equal(first[hooks[0]].W_dec, second[hooks[0]].W_dec)
    scores = [
        row["validation/reconstruction_score/mean"]
        for row in run.rows
        if "validation/reconstruction_score/mean" in row
    ]
    assert len(scores) == 4 and all(score < 1 for score in scores)
    losses = [row["loss/total/mean"] for row in run.rows if "loss/total/mean" in row]
    assert losses[-1] < losses[0]


class FakeRun:
    """Of wandb: what was logged and uploaded."""

    def __init__(self, fails=False):
        self.rows, self.artifacts, self.fails = [], [], fails

    def log(self, row):
        self.rows.append(row)

    def log_artifact(self, artifact):
        if self.fails:
            raise ConnectionError("no network")
        self.artifacts.append(artifact)


@pytest.fixture
def wandb(monkeypatch):
    def use(run):
        class Artifact:
            def __init__(self, name, type):
                self.name, self.type = name, type

            def add_dir(self, folder):
                self.folder = folder

        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run, Artifact=Artifact))
        return run

    return use


RUN = {"train_batch_size": 32, "max_store_size": 640}


def test_76_and_327_activations_are_counted_and_name_every_checkpoint(made, tmp_path):
    pipeline = made()
    pipeline.run_pipeline(**RUN, max_activations=300, checkpoint_frequency=100)
    assert pipeline.total_activations_trained_on == 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test_128", "test_224", "test_300", "test_final"]
    again = made()
    again.load_checkpoint(tmp_path / "test_224")
    assert again.total_activations_trained_on == 224


def test_370_a_second_call_goes_on(made):
    once, twice = made(), made()
    once.run_pipeline(**RUN, max_activations=1280)
    for _ in range(2):
        twice.run_pipeline(**RUN, max_activations=640)
    for a, b in zip(once.autoencoder.components, twice.autoencoder.components, strict=True):
        assert torch.equal(a.W_dec, b.W_dec)


def test_206_training_returns_how_often_each_latent_fired(made):
    pipeline = made()
    store = pipeline.generate_activations(128)
    rows = torch.stack([store[i] for i in range(128)])
    pipeline.autoencoder.requires_grad_(False)
    expected = (pipeline.autoencoder(rows).learned_activations > 0).sum(0)
    fired = pipeline.train_autoencoder(store, 128)
    assert fired.shape == (2, D_SAE) and torch.equal(fired, expected)
    assert len(store) == 0


def test_64_and_376_the_progress_bar_goes_by_batches_and_ends_at_its_total(made, monkeypatch):
    told, pipeline = [], made()
    report = pipeline._stage

    def stage(name):
        told.append(pipeline.progress_bar.n)
        report(name)

    monkeypatch.setattr(pipeline, "_stage", stage)
    pipeline.run_pipeline(**RUN, max_activations=300)
    assert pipeline.progress_bar.n == pipeline.progress_bar.total == 300
    assert set(range(32, 300, 32)) <= set(told)


@pytest.mark.parametrize("n", [1, 100, 640, 1500])
def test_377_trains_on_exactly_max_activations(n, made):
    pipeline = made(HOOKS[:1])
    pipeline.run_pipeline(**RUN, max_activations=n)
    (step,) = pipeline.steps.values()
    assert step.n_tokens == pipeline.total_activations_trained_on == n


def test_365_a_store_that_holds_no_forward_is_refused(made):
    with pytest.raises(ConfigError, match=r"max_store_size = 63 .* 4 x 16 = 64"):
        made().run_pipeline(32, 63, 1000)


def test_158_a_store_size_that_is_no_multiple_is_refused_with_the_nearest(made):
    with pytest.raises(ConfigError, match=r"store_size = 100 .* 4 x 16 = 64; the nearest is 128"):
        made().generate_activations(100)


def test_181_the_end_of_the_dataset_ends_the_run_with_a_checkpoint(made, ids, tmp_path):
    pipeline = made(dataset=PreTokenizedDataset(ids, context_size=CONTEXT))
    with pytest.warns(UserWarning, match="the dataset has ended"):
        pipeline.run_pipeline(**RUN, max_activations=100_000)
    n = pipeline.total_activations_trained_on
    assert 1000 < n < 12_000 and (tmp_path / "test_final").is_dir()
    repeating = made()
    repeating.run_pipeline(128, 6400, max_activations=15_000)
    assert repeating.total_activations_trained_on == 15_000


def test_252_validation_is_on_held_out_tokens_the_same_for_all(made, monkeypatch):
    pipeline = made()
    seen, real = [], sys.modules["fastsae.sparse_autoencoder.pipeline"].evaluate

    def evaluate(source, saes, tokens, **fields):
        seen.append((list(saes), tokens.tokens.clone()))
        return real(source, saes, tokens, **fields)

    monkeypatch.setattr(sys.modules["fastsae.sparse_autoencoder.pipeline"], "evaluate", evaluate)
    before = pipeline._opened(200).train.state_dict()
    pipeline.validate_sae(200)
    assert pipeline._opened(200).train.state_dict() == before, "the training stream stays where it was"
    pipeline.run_pipeline(**RUN, max_activations=1280, validation_n_activations=200, validate_frequency=640)
    assert len(seen) == 3 and all(torch.equal(tokens, seen[0][1]) for _, tokens in seen)
    assert all(names == HOOKS for names, _ in seen)


@pytest.mark.parametrize("n", [1, 15, 17, 200])
def test_231_validates_on_at_least_what_is_asked_for(n, made):
    found = made().validate_sae(n)
    assert all(v.n_tokens == -(-n // CONTEXT) * CONTEXT and v.ce_clean is not None for v in found.values())


def test_268_losses_are_returned_without_wandb(made):
    found = made().validate_sae(200)
    assert list(found) == HOOKS
    for v in found.values():
        assert v.ce_clean > 0 and v.ce_zero > 0 and v.ce_spliced > 0 and v.l0 > 0


def test_285_each_call_is_independent(made):
    pipeline = made()
    first, second = pipeline.validate_sae(200), pipeline.validate_sae(200)
    assert first == second


def test_247_the_live_autoencoder_is_validated_and_left_as_it_was(made):
    pipeline = made()
    before = {name: t.clone() for name, t in pipeline.autoencoder.state_dict().items()}
    pipeline.validate_sae(100)
    assert all(torch.equal(t, before[name]) for name, t in pipeline.autoencoder.state_dict().items())
    assert all(p.grad is None for p in pipeline.autoencoder.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_208_and_220_precision_is_a_choice(precision, made):
    pipeline = made(precision=precision, num_workers_data_loading=3)
    pipeline.run_pipeline(**RUN, max_activations=300)
    assert all(step.cfg.precision == precision for step in pipeline.steps.values())


def test_214_one_optimizer_and_one_counter_for_the_whole_run(made):
    pipeline = made()
    before = [*pipeline.steps.values()]
    pipeline.run_pipeline(**RUN, max_activations=1920)
    assert [*pipeline.steps.values()] == before and all(step.n_done == 60 for step in before)


def test_122_log_frequency_is_honoured_under_the_old_keys(made, wandb):
    run = wandb(FakeRun())
    made(log_frequency=5).run_pipeline(
        **RUN, max_activations=640, validation_n_activations=100, validate_frequency=640
    )
    trained = [row for row in run.rows if "loss/total/mean" in row]
    assert len(trained) == 4, "20 steps"
    for figure in ("loss/l1_learned_activations", "loss/l2_reconstruction", "loss/total", "train/l0_norm"):
        assert {f"{figure}/{name}" for name in (*HOOKS, "mean")} <= trained[0].keys()
    (validated,) = [row for row in run.rows if f"validation/source_model_losses/{HOOKS[0]}" in row]
    assert f"validation/source_model_losses_with_zero_ablation/{HOOKS[1]}" in validated


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"layer": 0}, ConfigError, r"layer = 0, but .* reach layer 1; say layer = 1"),
        ({"n_input_features": 8}, ConfigError, "n_input_features = 8, but the autoencoder's is 16"),
        ({"n_learned_features": 8}, ConfigError, "n_learned_features = 8"),
        ({"cache_names": HOOKS[:1]}, ConfigError, "the autoencoder has 2 components"),
        ({"cache_names": [HOOKS[0], "blocks.7.hook_mlp_out"]}, SourceError, r"no blocks\.7"),
        ({"log_frequency": 0}, ConfigError, "log_frequency = 0"),
        ({"log_frequency": True}, ConfigError, "log_frequency = True"),
        ({"layer": "2"}, ConfigError, "layer = '2'"),
        ({"layer": 1.5}, ConfigError, "layer = 1.5"),
        ({"cache_names": HOOKS[0]}, ConfigError, r"must be a list of hook points: say \['blocks"),
        ({"source_model": None}, ConfigError, "source_model is a NoneType; give a TransformerBridge"),
        ({"source_model": "gpt2"}, ConfigError, "source_model is a str; give a TransformerBridge"),
        ({"source_model": nn.Linear(2, 2)}, SourceError, "model is a Linear; give a TransformerBridge"),
        ({"source_dataset": ["a text"]}, ConfigError, "source_dataset is a list; give a PreTokenizedDataset"),
        ({"autoencoder": nn.Linear(2, 2)}, ConfigError, "autoencoder is a Linear; give a LitSparseAuto"),
        ({"cache_names": 5}, ConfigError, "must be a list of hook points"),
        ({"cache_names": ["blocks.*.hook_resid_post", HOOKS[0]]}, ConfigError, r"without a \*"),
        ({"run_name": ""}, ConfigError, "run_name = ''"),
        ({"run_name": None}, ConfigError, "run_name = None"),
        ({"run_name": "x" * 300}, ConfigError, "at most 100 bytes"),
        ({"seed": -1}, ConfigError, "seed = -1"),
        ({"seed": "a"}, ConfigError, "seed = 'a'"),
        ({"precision": "fp16"}, ConfigError, "^precision = 'fp16': .*'bf16'[^\n]*$"),
        ({"lr": -1.0}, ConfigError, "^lr = -1.0: [^\n]*greater than 0$"),
        ({"betas": (0.9,)}, ConfigError, "^betas[^\n]*$"),
    ],
)
def test_127_arguments_that_do_not_fit_are_found_before_the_first_forward(fields, error, words, made):
    with pytest.raises(error, match=words):
        made(**fields)


@pytest.mark.parametrize(
    "field, value",
    [
        ("train_batch_size", 0),
        ("max_store_size", 2e3),
        ("max_activations", -5),
        ("validate_frequency", 0),
        ("checkpoint_frequency", -1),
    ],
)
def test_127_numbers_that_make_no_sense_are_refused(field, value, made):
    with pytest.raises(ConfigError, match=f"{field} = .*must be an integer of at least 1"):
        made().run_pipeline(**{**RUN, "max_activations": 100, field: value})


def test_127_outputs_that_cannot_be_written_are_found_first(made, tmp_path):
    (tmp_path / "file").write_text("")
    pipeline = made(checkpoint_directory=tmp_path / "file")
    with pytest.raises(RunError, match="cannot write checkpoints into"):
        pipeline.run_pipeline(**RUN, max_activations=100)
    assert pipeline.total_activations_trained_on == 0
    with pytest.raises(ConfigError, match="run_name = 'a/b': must be a plain folder name"):
        made(run_name="a/b")
    folder = made().save_checkpoint()
    with pytest.raises(RunError, match="is of"):
        made(HOOKS[:1]).load_checkpoint(folder)
    config = SparseAutoencoderConfig(n_input_features=D_MODEL, n_learned_features=8, n_components=2)
    other = made(autoencoder=SparseAutoencoder(config), n_learned_features=8)
    with pytest.raises(RunError, match=r"W_enc is \[16, 24\] there and \[16, 8\] here$"):
        other.load_checkpoint(folder)


def test_127_a_layer_that_is_not_given_is_found(made):
    assert made(layer=None).layer == 1 and made(layer=5).layer == 5


def test_173_hooks_of_the_user_stay_and_ours_do_not(made, model, monkeypatch):
    fired, pipeline = [], made()
    model.add_hook(HOOKS[0], lambda acts, hook: fired.append(1))
    point = model.hook_dict[HOOKS[0]]
    try:
        n = len(point.fwd_hooks)
        pipeline.generate_activations(64)
        assert fired and len(point.fwd_hooks) == n
        monkeypatch.setattr(
            "fastsae.ring.move", lambda *_: (_ for _ in ()).throw(RuntimeError("a hook raises"))
        )
        with pytest.raises(RuntimeError, match="a hook raises"):
            pipeline.generate_activations(64)
        assert len(point.fwd_hooks) == n
    finally:
        model.reset_hooks(including_permanent=True)


def test_362_the_models_mode_is_left_as_it_was(made, model):
    model.train()
    try:
        pipeline = made()
        pipeline.run_pipeline(**RUN, max_activations=100, validation_n_activations=50, validate_frequency=50)
        assert model.training
    finally:
        model.eval()


def test_393_frequencies_fire_at_their_multiples(made, monkeypatch):
    pipeline, at = made(), []
    monkeypatch.setattr(pipeline, "validate_sae", lambda n: at.append(pipeline.total_activations_trained_on))
    for n in (700, 1300):
        pipeline.run_pipeline(20, 640, max_activations=n, validate_frequency=300)
    assert at == [300, 600, 900, 1200, 1500, 1800]


def test_334_a_run_that_is_stopped_goes_on_from_its_checkpoint(made, tmp_path, monkeypatch):
    """At the border of a store to the same weights; Ctrl-C in between ends with a checkpoint, and never with half of one."""
    whole, first, again = made(), made(), made()
    for pipeline in (whole, first):
        pipeline.validate_sae(100)  # so much is held out, also from what goes on without a validation
    whole.run_pipeline(**RUN, max_activations=1280)
    first.run_pipeline(**RUN, max_activations=640)
    again.load_checkpoint(tmp_path / "test_final")
    again.run_pipeline(**RUN, max_activations=640)
    assert_equal(whole, again)
    stopped, saved = made(run_name="stopped", log_frequency=7), []
    monkeypatch.setattr(stopped, "_report", interrupting(stopped, {7 * 32}))
    monkeypatch.setattr(stopped, "save_checkpoint", lambda **_: saved.append(1))
    stopped.run_pipeline(**RUN, max_activations=1280)
    assert saved == [1] and stopped.total_activations_trained_on == 7 * 32
    assert not list(tmp_path.glob(".*"))


def interrupting(pipeline, totals):
    """Ctrl-C once at each of these."""

    def report():
        if pipeline.total_activations_trained_on in totals:
            totals.remove(pipeline.total_activations_trained_on)
            os.kill(os.getpid(), signal.SIGINT)

    return report


def assert_equal(one, other):
    assert one.total_activations_trained_on == other.total_activations_trained_on
    for a, b in zip(one.autoencoder.components, other.autoencoder.components, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("stop_at", [32, 320, 608, 640, 672, 1248])
def test_334_in_the_middle_of_a_store_too(stop_at, made, tmp_path):
    whole, again = made(), made()
    whole.run_pipeline(**RUN, max_activations=1280, checkpoint_frequency=stop_at)
    again.load_checkpoint(tmp_path / f"test_{stop_at}")
    again.run_pipeline(**RUN, max_activations=1280 - stop_at)
    assert_equal(whole, again)


def test_334_every_row_once_whatever_the_totals(made, tmp_path, monkeypatch):
    """Also where a call goes on with a store that is larger than its total."""
    rows = []
    monkeypatch.setattr(TrainStep, "__call__", lambda step, x: rows.append(x.clone()))  # in place of training
    made(HOOKS[:1]).run_pipeline(**RUN, max_activations=1280, checkpoint_frequency=320)
    whole = torch.cat(rows)
    rows.clear()
    pieces = made(HOOKS[:1])
    pieces.load_checkpoint(tmp_path / "test_320")
    for n in (100, 33, 827):
        pieces.run_pipeline(**RUN, max_activations=n)
    assert pieces.total_activations_trained_on == 1280
    assert torch.equal(whole[320:], torch.cat(rows))


def test_334_an_error_in_a_forward_loses_no_tokens(made, monkeypatch):
    whole, failed = made(), made()
    whole.run_pipeline(**RUN, max_activations=640)
    forward, n = failed._source.forward, []

    def failing(*args, **kwargs):
        n.append(1)
        if len(n) == 5:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(failed._source, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        failed.run_pipeline(**RUN, max_activations=640)
    failed.run_pipeline(**RUN, max_activations=640)
    assert_equal(whole, failed)


def test_334_another_dataset_is_refused_every_time(made, tmp_path):
    made().run_pipeline(**RUN, max_activations=640)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"input_ids": [i % D_VOCAB] * 40}) + "\n" for i in range(300)))
    pipeline = made(dataset=PreTokenizedDataset(str(other), context_size=CONTEXT, repeat=True))
    pipeline.load_checkpoint(tmp_path / "test_final")
    for _ in range(2):
        with pytest.raises(DataError):
            pipeline.run_pipeline(**RUN, max_activations=640)


def test_a_loss_that_is_not_finite_is_found_at_the_latest_at_the_end(made, model, monkeypatch):
    """Behind the figures of that window, which say what went wrong."""
    pipeline, logged = made(), []
    monkeypatch.setattr("fastsae.sparse_autoencoder.dashboard.log", logged.append)
    handle = lambda acts, hook: acts * torch.nan
    model.add_hook("hook_embed", handle)
    try:
        with pytest.raises(
            NonFiniteLossError, match=r"became NaN or infinite at step 0.*checkpoint: .*test_320"
        ):
            pipeline.run_pipeline(**RUN, max_activations=320)
        with pytest.raises(NonFiniteLossError):
            pipeline.train_autoencoder(pipeline.generate_activations(PER_FORWARD), 32)
    finally:
        model.reset_hooks()
    assert math.isnan(logged[0]["loss/total/mean"])
    assert all(p.isfinite().all() for p in pipeline.autoencoder.parameters())
    pipeline.run_pipeline(**RUN, max_activations=640)  # and then it goes on


def test_334_ctrl_c_between_two_forwards_and_going_on(made, monkeypatch):
    """Nothing is lost, and nothing is trained on twice: while a store is generated, trained on, generated once more, trained on."""
    whole, stopped = made(), made(log_frequency=7)
    whole.run_pipeline(**RUN, max_activations=1280)
    forward, n = stopped._source.forward, []

    def interrupted(*args, **kwargs):
        n.append(1)
        if len(n) in (3, 15):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args, **kwargs)

    monkeypatch.setattr(stopped._source, "forward", interrupted)
    monkeypatch.setattr(stopped, "_report", interrupting(stopped, {224, 672}))
    seen = []
    while stopped.total_activations_trained_on < 1280:
        stopped.run_pipeline(**RUN, max_activations=1280 - stopped.total_activations_trained_on)
        seen.append(stopped.total_activations_trained_on)
    assert seen == [0, 224, 224, 672, 1280]
    assert_equal(whole, stopped)


def test_329_checkpoints_are_local_before_they_are_uploaded(made, wandb):
    run = wandb(FakeRun())
    folder = made().save_checkpoint()
    assert run.artifacts[0].folder == str(folder) and folder.is_dir()
    wandb(FakeRun(fails=True))
    with pytest.warns(UserWarning, match="was saved and not uploaded: "):
        assert made().save_checkpoint(is_final=True).is_dir(), "a failed upload loses nothing"


def test_334_a_checkpoint_that_does_not_fit_changes_nothing(made, tmp_path):
    pipeline = made()
    pipeline.run_pipeline(**RUN, max_activations=320)
    folder = made(run_name="other").save_checkpoint()
    damaged = max(folder.rglob("step.safetensors"))  # the last one that is read
    damaged.write_bytes(damaged.read_bytes()[:-100])
    before = {k: v.clone() for k, v in pipeline.autoencoder.state_dict().items()}
    with pytest.raises(RunError, match=r"cannot go on from .*step.safetensors"):
        pipeline.load_checkpoint(folder)
    assert all(torch.equal(v, before[k]) for k, v in pipeline.autoencoder.state_dict().items())
    assert pipeline.total_activations_trained_on == 320


def test_334_a_checkpoint_of_the_beginning_begins_again(made):
    """On an object that has read on since."""
    whole, again = made(), made()
    again._opened(1024)
    folder = again.save_checkpoint()
    unread = made(run_name="unread").save_checkpoint()
    whole.run_pipeline(**RUN, max_activations=640)
    for start in (folder, unread):
        again.run_pipeline(**RUN, max_activations=64)
        again.load_checkpoint(start)
        again.run_pipeline(**RUN, max_activations=640)
        assert_equal(whole, again)


def test_59_no_docstring_stopes():
    assert "stope" not in sys.modules["fastsae.sparse_autoencoder.pipeline"].__doc__ + str(Pipeline.__doc__)


@pytest.mark.parametrize("n_components", [1, 2])
def test_the_losses_are_those_that_a_step_reports(n_components, made):
    hooks = HOOKS[:n_components]
    pipeline = made(hooks, l1=0.02)
    batch = next(pipeline.generate_activations(PER_FORWARD).batches(PER_FORWARD))
    x = torch.stack([batch[hook] for hook in hooks], 1)
    learned, decoded = pipeline.autoencoder(x)
    loss = SparseAutoencoderLoss(n_components, l1_coefficient=0.02)
    parts = 0.02 * L1AbsoluteLoss(n_components)(x, learned, decoded)
    parts = parts + L2ReconstructionLoss(n_components)(x, learned, decoded)
    each = SparseAutoencoderLoss(n_components, 0.02, keep_batch_dim=True)(x, learned, decoded)
    assert each.shape == (PER_FORWARD, n_components)
    for hook, step in pipeline.steps.items():
        step(batch[hook])
    reported = torch.tensor([step.read()["loss"] / D_MODEL for step in pipeline.steps.values()])
    for found in (loss(x, learned, decoded), parts, each.mean(0)):
        torch.testing.assert_close(found, reported, rtol=1e-5, atol=1e-7)
    with pytest.raises(ConfigError, match="num_components = 3"):
        SparseAutoencoderLoss(3)(x, learned, decoded)
    with pytest.raises(ConfigError, match="above 0"):
        SparseAutoencoderLoss(l1_coefficient=0.0)
    for bad in ((x, learned[:1], decoded), (x, learned, decoded[..., :1]), (x, learned, decoded[:1])):
        with pytest.raises(ConfigError, match="learned and decoded activations are"):
            loss(*bad)


def test_l1_is_converted_and_said_once(made, caplog):
    with caplog.at_level(logging.INFO, "fastsae.sparse_autoencoder.pipeline"):
        pipeline = made(l1=0.01)
    assert pipeline.steps[HOOKS[0]].cfg.l1_coefficient == pytest.approx(0.16)
    assert [r for r in caplog.messages if "l1_coefficient = 0.01" in r and "0.16" in r]


def test_a_store_has_length_rows_and_an_order(made):
    store = made().generate_activations(128)
    assert len(store) == 128 and store[0].shape == (2, D_MODEL)
    before = torch.stack([store[i] for i in range(128)])
    store.shuffle()
    after = torch.stack([store[i] for i in range(128)])
    assert not torch.equal(before, after)
    assert torch.equal(before.flatten(1).sum(1).sort().values, after.flatten(1).sum(1).sort().values)
    with pytest.raises(IndexError):
        store[128]
    torch.testing.assert_close(store[2:5], after[2:5])
    batches = [b[HOOKS[0]].clone() for b in store.batches(50)]
    assert [len(b) for b in batches] == [50, 50, 28] and torch.equal(torch.cat(batches), after[:, 0])


def test_one_component_without_an_axis_and_a_model_in_data_parallel(made, model):
    torch.manual_seed(0)
    autoencoder = SparseAutoencoder(
        SparseAutoencoderConfig(n_input_features=D_MODEL, n_learned_features=D_SAE)
    )
    assert autoencoder(torch.randn(3, D_MODEL)).learned_activations.shape == (3, D_SAE)
    with pytest.warns(UserWarning, match="unwrapped from DataParallel"):
        pipeline = made(HOOKS[:1], autoencoder=autoencoder, source_model=nn.DataParallel(model))
    pipeline.run_pipeline(**RUN, max_activations=100)
    assert pipeline.total_activations_trained_on == 100


@pytest.mark.skipif(
    version("transformer-lens") >= "4",
    reason="TransformerLens 4 has no HookedTransformer; `make peers` installs 3.9",
)
def test_a_hooked_transformer_of_transformer_lens_3(made):
    import transformer_lens as lens

    cfg = lens.HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, n_ctx=CONTEXT, d_head=4, d_vocab=D_VOCAB, act_fn="gelu", seed=0
    )
    pipeline = made(source_model=lens.HookedTransformer(cfg))
    pipeline.run_pipeline(**RUN, max_activations=200, validate_frequency=100)
    assert pipeline.total_activations_trained_on == 200
    assert all(v.ce_clean > 0 for v in pipeline.validate_sae(50).values())


def test_text_and_mock_datasets(made, model, world):
    text = TextDataset(world["text"], model.tokenizer, context_size=CONTEXT, repeat=True)
    made(dataset=text).run_pipeline(**RUN, max_activations=200)
    mock = MockDataset(context_size=CONTEXT, n_ids=D_VOCAB)
    made(dataset=mock).run_pipeline(**RUN, max_activations=200)
    with pytest.raises(ConfigError, match="dataset_files"):
        PreTokenizedDataset("x", dataset_files="a.parquet")


def test_a_checkpoint_takes_the_place_of_another_or_leaves_it(made, monkeypatch, tmp_path):
    pipeline = made()
    folder = pipeline.save_checkpoint(is_final=True)
    before = (folder / "run.json").read_text()
    pipeline.total_activations_trained_on = 5
    real = os.replace

    def interrupted(source, target):
        if str(target) == str(folder) and ".part" in str(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.save_checkpoint(is_final=True)
    assert (folder / "run.json").read_text() == before
    monkeypatch.undo()
    pipeline.save_checkpoint(is_final=True)
    assert (folder / "run.json").read_text() != before
    assert [p.name for p in tmp_path.iterdir()] == ["test_final"]
