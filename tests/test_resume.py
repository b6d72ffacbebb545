"""A run that is stopped and resumed is the run that was not, to the bit."""

import json
import os
import random
import shutil
import signal
import sys

import pytest
import torch

import fastsae
from fastsae.checkpoint import checkpoints
from fastsae.errors import ConfigError, DataError, RunError
from fastsae.folder import _locked
from fastsae.log import Sink
from fastsae.prepare import prepare
from fastsae.resume import config_of, newest
from tests.worlds import HOOK

N_TOKENS = 9000  # 71 steps of 128, the last one short; 12 fills of the ring
SHAPE = {"n_tokens": N_TOKENS, "data": {"on_exhausted": "repeat"}, "log": {"every": 10}}
KINDS = {
    "relu": {"sae": {"activation": "relu"}, "step": {"crossover": 0.5, "ema_decay": 0.9}},
    "topk": {"sae": {"activation": "topk", "k": 3}, "step": {"dead_after": 2000, "crossover": 0.5}},
    "batchtopk": {"sae": {"activation": "batchtopk", "k": 3}, "step": {"precision": "bf16"}},
    "jumprelu": {"sae": {"activation": "jumprelu"}, "step": {"target_l0": 4.0, "crossover": 0.5}},
}


def weights(result, key=HOOK):
    return {name: t.clone() for name, t in result.saes[key].state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def rows(run_dir):
    """Every row of figures, without those that tell the time."""
    read = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "seconds")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in read if row.get("of") != "resume"
    ]


def copy_of(run_dir, at, tmp_path):
    """The run as if it had been killed some time behind that checkpoint."""
    copied = tmp_path / f"killed-{at.name}" / run_dir.name
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "saes")
    for later in checkpoints(copied):
        if later.name > at.name:
            shutil.rmtree(later)
    return copied


class StopAt(Sink):
    """Ctrl-C while that step is under way."""

    def __init__(self, n_tokens):
        self.left = n_tokens

    def advance(self, n_tokens):
        self.left -= n_tokens
        if self.left <= 0:
            self.left = 10**9
            os.kill(os.getpid(), signal.SIGINT)


def interrupt_at(monkeypatch, fill):
    """Ctrl-C in the third forward of that fill."""
    train = sys.modules["fastsae.train"]
    forward, n_done = train.Harvester.forward, []

    def counted(self):
        n_done.append(self.ring.fill_number)
        if n_done.count(fill) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self)

    monkeypatch.setattr(train.Harvester, "forward", counted)
    return lambda: monkeypatch.setattr(train.Harvester, "forward", forward)


@pytest.fixture(scope="module")
def every_step():
    return {"checkpoint_every": 1, "validate_every": 1500, "baselines": False}


@pytest.mark.parametrize("kind", KINDS)
def test_from_twenty_steps_to_the_same_bits(kind, config, tmp_path, every_step):
    """Weights, figures and checkpoints, from steps in the middle of a phase, at its borders, and right before a validation."""
    whole = fastsae.train(config(**SHAPE, **KINDS[kind], save=every_step))
    saved = checkpoints(whole.run_dir)
    n = 20 if kind == "topk" else 4
    before_validation = [c for c in saved if int(c.name) // 1500 > (int(c.name) - 128) // 1500]
    chosen = {*random.Random(0).sample(saved, n - 2), before_validation[0], before_validation[-1]}
    for at in sorted(chosen):
        copied = copy_of(whole.run_dir, at, tmp_path)
        again = fastsae.resume(copied)
        assert same(weights(again), weights(whole)), at
        assert rows(copied) == rows(whole.run_dir), at
        assert [c.name for c in checkpoints(copied)] == [c.name for c in saved]
        assert again.n_tokens == N_TOKENS and not again.interrupted
        shutil.rmtree(copied)


@pytest.mark.parametrize("stop_at", [500, 1300, 4000, 8800])
def test_after_an_interrupt(stop_at, config, tmp_path):
    """Which takes a checkpoint of its own; and twice in a row."""
    whole = fastsae.train(config(**SHAPE, **KINDS["topk"]))
    stopped = fastsae.train(config(**SHAPE, **KINDS["topk"], name="stopped"), sinks=[StopAt(stop_at)])
    assert stopped.interrupted and stopped.n_tokens < N_TOKENS
    if stop_at < 4000:
        stopped = fastsae.resume(stopped.run_dir, sinks=[StopAt(stopped.n_tokens + 300)])
        assert stopped.interrupted
    again = fastsae.resume(stopped.run_dir)
    assert same(weights(again), weights(whole)) and again.n_tokens == N_TOKENS
    steps = [row["step"] for row in rows(stopped.run_dir) if row["kind"] == "train"]
    assert steps == sorted(set(steps)) and set(range(10, 71, 10)) <= set(steps)


@pytest.mark.parametrize("save_ring", [False, True])
def test_an_interrupt_in_the_middle_of_a_fill(save_ring, config, monkeypatch):
    """The fill that had begun is begun again."""
    whole = fastsae.train(config(**SHAPE))
    undo = interrupt_at(monkeypatch, fill=3)
    stopped = fastsae.train(config(**SHAPE, name="stopped", save={"ring": save_ring}))
    undo()
    assert stopped.interrupted
    state = json.loads((checkpoints(stopped.run_dir)[-1] / "run.json").read_text())
    assert state["ring"]["fill_number"] == 2, "the one before"
    assert same(weights(fastsae.resume(stopped.run_dir)), weights(whole))


def test_a_step_is_validated_once(config, monkeypatch):
    """Also where the run was stopped behind its validation, in the fill for the next batch."""
    every = {"validate_every": 128, "baselines": False}
    undo = interrupt_at(monkeypatch, fill=2)
    stopped = fastsae.train(config(**{**SHAPE, "n_tokens": 2500}, save=every))
    undo()
    assert stopped.interrupted and stopped.metrics
    fastsae.resume(stopped.run_dir)
    validated = [row["n_tokens"] for row in rows(stopped.run_dir) if row["kind"] == "validation"]
    assert len(validated) == len(set(validated)) == 20


def test_with_no_step_left_the_figures_are_those_of_the_run(config, tmp_path):
    whole = fastsae.train(config(**SHAPE))
    again = fastsae.resume(copy_of(whole.run_dir, checkpoints(whole.run_dir)[-1], tmp_path))
    assert again.metrics.keys() == whole.metrics.keys()
    for key, figures in whole.metrics.items():
        timed = {"tokens_per_second"}
        assert {k: again.metrics[key][k] for k in figures.keys() - timed} == {
            k: figures[k] for k in figures.keys() - timed
        }


def test_two_processes_do_not_go_on_with_one_run(stopped):
    pytest.importorskip("fcntl", reason="no file locks here")
    before = (stopped / "metrics.jsonl").read_bytes()
    with _locked(stopped), pytest.raises(RunError, match="another process trains in"):
        fastsae.resume(stopped)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    assert fastsae.resume(stopped).n_tokens == N_TOKENS


run = sys.modules["fastsae.train"].run  # fastsae.train is the function


def test_a_run_that_another_process_ended_meanwhile_is_left_alone(stopped):
    """Between the look at its checkpoint and the lock."""
    job = prepare(config_of(stopped), checkpoint=newest(stopped))
    fastsae.resume(stopped)
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="another process went on with"):
        run(job)
    assert (stopped / "metrics.jsonl").read_bytes() == before and (stopped / "saes").is_dir()


@pytest.mark.parametrize("switch", ["kept", "dropped", "added"])
def test_a_saved_ring_spares_the_forwards(switch, config, tmp_path, monkeypatch):
    """To the same bits, from any step; and a resume may save it no longer, or for the first time."""
    save = {"checkpoint_every": 1900, "ring": switch != "added"}
    whole = fastsae.train(config(**SHAPE, save=save))
    train = sys.modules["fastsae.train"]
    for at in checkpoints(whole.run_dir)[:-1]:
        copied = copy_of(whole.run_dir, at, tmp_path)
        assert (at / "ring.safetensors").exists() == save["ring"]
        calls, replay = [], train.Harvester.replay
        monkeypatch.setattr(train.Harvester, "replay", lambda *a, r=replay, c=calls: c.append(1) or r(*a))
        fields = {"save": {"ring": switch != "dropped"}}
        again = fastsae.resume(copied, fields, sinks=[StopAt(int(at.name) + 700)])
        assert len(calls) == (not save["ring"])
        if again.interrupted:
            again = fastsae.resume(copied, fields)
        monkeypatch.setattr(train.Harvester, "replay", replay)
        assert same(weights(again), weights(whole)), at


def test_several_saes_and_hook_points_go_on_together(config, tmp_path):
    hooks = ["blocks.0.hook_resid_post", HOOK]
    fields = {"model": {"hook": hooks}, "saes": [{"d_sae": 32}, {"activation": "topk", "k": 2}]}
    whole = fastsae.train(config(**SHAPE, **fields, save={"checkpoint_every": 3000}))
    at = checkpoints(whole.run_dir)[0]
    again = fastsae.resume(copy_of(whole.run_dir, at, tmp_path))
    assert len(again.saes) == 4
    assert all(same(weights(again, key), weights(whole, key)) for key in again.saes)


@pytest.fixture
def stopped(config):
    result = fastsae.train(config(**SHAPE), sinks=[StopAt(4000)])
    assert result.interrupted
    return result.run_dir


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"step": {"lr": 0.5}}, r"step\.lr = 0.5.*0.001"),
        ({"n_tokens": 20_000}, r"n_tokens = 20000.*9000"),
        ({"data": {"context_size": 32}}, r"data\.context_size = 32.*16"),
        ({"model": {"name": "gpt2"}}, r"model\.name = gpt2"),
        ({"sae": {"d_sae": 64}}, r"sae\.d_sae = 64.*48"),
        ({"seed": 7}, r"seed = 7"),
        ({"name": "other"}, r"name does not go with a resume"),
        ({"runs_dir": "elsewhere"}, r"runs_dir does not go with a resume"),
    ],
)
def test_what_the_run_began_with_cannot_change(stopped, overrides, words):
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=words):
        fastsae.resume(stopped, overrides)
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_what_is_saved_and_logged_may_change(stopped):
    result = fastsae.resume(stopped, {"save": {"checkpoint_every": 2000, "keep": 2}, "log": {"every": 5}})
    assert len(checkpoints(result.run_dir)) == 2 and result.n_tokens == N_TOKENS


def test_other_weights_or_another_dataset_are_refused(stopped, world, tmp_path):
    from pathlib import Path

    text = Path(world["text"])
    old = text.read_bytes()
    try:
        text.write_bytes(old.replace(b"w1 ", b"w2 "))
        with pytest.raises(DataError, match="dataset"):
            fastsae.resume(stopped)
    finally:
        text.write_bytes(old)
    run = checkpoints(stopped)[-1] / "run.json"
    state = json.loads(run.read_text())
    run.write_text(json.dumps({**state, "model": "0" * 32}))
    with pytest.raises(RunError, match=r"model\.name = .* other weights"):
        fastsae.resume(stopped)


def test_another_machine_is_said_once(stopped):
    run = checkpoints(stopped)[-1] / "run.json"
    state = json.loads(run.read_text())
    run.write_text(json.dumps({**state, "machine": {**state["machine"], "threads": 97}}))
    with pytest.warns(UserWarning, match="last bits: threads 97 before, 1 now") as seen:
        fastsae.resume(stopped)
    assert len([w for w in seen if "last bits" in str(w.message)]) == 1


def test_what_there_is_nothing_to_resume_of(config, tmp_path):
    with pytest.raises(RunError, match="is not there"):
        fastsae.resume(tmp_path / "nowhere")
    done = fastsae.train(config(n_tokens=1000))
    with pytest.raises(RunError, match="is finished: 1,000 activations"):
        fastsae.resume(done.run_dir)
    given = fastsae.train(config(n_tokens=1000, name="given"), activations=[torch.randn(1000, 8)])
    shutil.rmtree(given.run_dir / "saes")
    with pytest.raises(RunError, match="given activations"):
        fastsae.resume(given.run_dir)
    for damaged in ("forwards.safetensors", "run.json"):
        (checkpoints(given.run_dir)[-1] / damaged).write_text("{")
        with pytest.raises(RunError, match=r"cannot read the checkpoint"):
            fastsae.resume(given.run_dir)


def test_a_run_on_a_model_object_wants_it_again(config):
    from fastsae.config import ModelConfig
    from fastsae.source import load_source

    cfg = config(**SHAPE)
    model = load_source(ModelConfig(name=cfg.model.name, hook=(HOOK,)), torch.device("cpu")).model
    whole = fastsae.train(cfg, model=model)
    stopped = fastsae.train(config(**SHAPE, name="stopped"), model=model, sinks=[StopAt(3000)])
    with pytest.raises(RunError, match="model object"):
        fastsae.resume(stopped.run_dir)
    assert same(weights(fastsae.resume(stopped.run_dir, model=model)), weights(whole))


def test_figures_that_are_gone_are_not_made_up(stopped, monkeypatch):
    (stopped / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl has 3 bytes"):
        fastsae.resume(stopped)
    monkeypatch.chdir(stopped.parent)
    (stopped / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl"):
        fastsae.resume(stopped.name)


def test_nothing_is_drawn_twice_where_nothing_is_left(config, tmp_path):
    """From the checkpoint behind the last, short batch, with the ring in it: the weights stay, and the run is ended as it was."""
    fields = {**SHAPE, "n_tokens": 5000, "save": {"ring": True}}
    whole = fastsae.train(config(**fields))
    copied = copy_of(whole.run_dir, checkpoints(whole.run_dir)[-1], tmp_path)
    again = fastsae.resume(copied)
    assert again.n_tokens == 5000 and same(weights(again), weights(whole))
    early = {**fields, "n_tokens": 100_000, "data": {"on_exhausted": "stop"}, "name": "early"}
    with pytest.warns(UserWarning, match="ended after"):
        ended = fastsae.train(config(**early))
    with pytest.warns(UserWarning, match="ended after"):
        again = fastsae.resume(ended.run_dir)
    assert again.n_tokens == ended.n_tokens and same(weights(again), weights(ended))


def test_what_a_stopped_run_left_is_not_taken_for_its_end(stopped, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fastsae.train"], "save_final", kill)
    with pytest.raises(KeyboardInterrupt):
        fastsae.resume(stopped)
    assert not (stopped / "saes").exists()
    assert fastsae.load(stopped).metadata is not None, "the newest checkpoint's"


def test_an_average_that_one_entry_does_without(config):
    entries = [{"name": "a"}, {"name": "b", "step": {"ema_decay": False}}]
    fields = {**SHAPE, "step": {"ema_decay": 0.9}, "saes": entries}
    whole = fastsae.train(config(**fields))
    cut = fastsae.train(config(**fields, name="cut"), sinks=[StopAt(3000)])
    again = fastsae.resume(cut.run_dir)
    assert all(same(weights(again, key), weights(whole, key)) for key in whole.saes)


def test_a_file_that_was_edited_is_refused_by_the_field(config, tmp_path):
    """It is the checkpoint's config that a run began with, entries of [[saes]] and all."""
    fields = {"n_tokens": 1280, "saes": [{"d_sae": 24}, {"d_sae": 32}], "save": {"checkpoint_every": 640}}
    whole = fastsae.train(config(**fields))
    cut = copy_of(whole.run_dir, checkpoints(whole.run_dir)[0], tmp_path)
    with pytest.raises(ConfigError, match="goes on with its own SAEs; a run goes on as it began"):
        fastsae.resume(cut, {"step": {"lr": 0.5}})
    file = cut / "config.toml"
    text = file.read_text()
    file.write_text(text.replace("lr = 0.001", "lr = 0.002"))
    assert file.read_text() != text
    with pytest.raises(ConfigError, match=r"lr = 0\.002, but the run began with 0\.001"):
        fastsae.resume(cut)
    file.write_text(text)
    again = fastsae.resume(cut)
    assert all(same(weights(again, key), weights(whole, key)) for key in whole.saes)


def test_a_resume_with_nothing_left_has_the_figures_of_the_run(config):
    whole = fastsae.train(config(n_tokens=1280))
    shutil.rmtree(whole.run_dir / "saes")
    again = fastsae.resume(whole.run_dir)
    assert again.metrics.keys() == whole.metrics.keys()
    assert again.metrics[HOOK].keys() == whole.metrics[HOOK].keys()
