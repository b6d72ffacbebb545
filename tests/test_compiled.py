"""The source model's blocks under torch.compile: the same activations, and only where it pays."""

import shutil
from functools import partial

import pytest
import torch

import fastsae
from fastsae import bare, compiled
from fastsae.collect import harvest
from fastsae.config import ModelConfig
from fastsae.configfile import load_config
from fastsae.errors import SourceError
from fastsae.shards import Shards
from fastsae.source import load_source
from tests.test_resume import StopAt, same, weights
from tests.test_source import SHORT, seen_by
from tests.tiny_models import D_VOCAB, save_model

CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile that runs the traced ops as they are, which takes no compiler: the calls of its results."""
    calls = []

    def compile_(forward, **options):
        inner = torch_compile(forward, backend="eager", **options)

        def run(*arguments, **named):
            calls.append(forward.__self__)
            return inner(*arguments, **named)

        return run

    torch_compile = torch.compile
    monkeypatch.setattr(bare.torch, "compile", compile_)
    return calls


def loaded(tmp_path, kind="gpt2", hook=SHORT):
    return load_source(ModelConfig(name=save_model(kind, tmp_path), hook=hook), CPU)


def random_tokens(*shape):
    return torch.randint(D_VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "bert"])
def test_activations_are_the_same(kind, tmp_path, traced):
    """At the ends of blocks and within them, also where weights have changed since; for one shape, another runs as it is."""
    source = loaded(tmp_path, kind, SHORT if kind != "bert" else SHORT[3:])
    assert source.compile((3, 24)) and traced
    for _ in range(2):
        tokens, plain = random_tokens(3, 24), {}
        with source.uncompiled():
            plain = seen_by(source, tokens)
        traced.clear()
        found = seen_by(source, tokens)
        assert traced and found.keys() == plain.keys()
        for name, acts in plain.items():
            assert (found[name] - acts).abs().max() <= 1e-5 * acts.abs().max(), name
        traced.clear()
        seen_by(source, tokens[:2])
        assert not traced
        with torch.no_grad():
            for p in source.model.parameters():
                p.mul_(0.9)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
def test_by_the_real_compiler(tmp_path):
    source = loaded(tmp_path)
    tokens = random_tokens(2, 16)
    plain = seen_by(source, tokens)
    assert source.compile((2, 16))
    found = seen_by(source, tokens)
    assert all((found[name] - acts).abs().max() <= 1e-5 * acts.abs().max() for name, acts in plain.items())
    assert any(not torch.equal(found[name], acts) for name, acts in plain.items()), "it rounds otherwise"


def test_massive_activations_hide_no_difference():
    """Those of a few features, a hundred times as large as all others."""
    a = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    a[..., 3] = 300.0
    rounded = (a.float() * (1 + 0.004 * torch.randn(a.shape))).bfloat16()
    other = torch.randn(a.shape).bfloat16()
    other[..., 3] = 300.0
    assert bare.agree(a, rounded) and not bare.agree(a, other) and not bare.agree(a, a + 300)


def test_what_differs_or_fails_is_not_taken(tmp_path, monkeypatch):
    source = loaded(tmp_path)
    monkeypatch.setattr(bare.torch, "compile", lambda f, **_: lambda *a, **k: 1.01 * f(*a, **k))
    assert not source.compile((2, 16))

    def fails(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(bare.torch, "compile", lambda f, **_: fails)
    assert not source.compile((2, 16))
    assert seen_by(source, random_tokens(2, 16))
    monkeypatch.setattr(bare.torch, "compile", fails)  # as where there is none for this Python
    assert not source.compile((2, 16))
    with pytest.raises(SourceError, match=r"model.compile = true"):
        compiled.compile_where_it_pays(source, True, (2, 16), 1)


@pytest.mark.parametrize(
    "n_forwards, takes, expected",
    [(1000, (1.0, 0.5), True), (1000, (1.0, 0.97), False), (50, (1.0, 0.5), False)],
)
def test_auto_takes_it_where_it_pays(n_forwards, takes, expected, tmp_path, monkeypatch, traced):
    """By a clock that runs as the forwards are said to take."""
    source, now = loaded(tmp_path), [0.0]
    run = source._run_bare

    def timed(which, *arguments):
        now[0] += takes[which is not source._bare]
        return run(which, *arguments)

    monkeypatch.setattr(source, "_run_bare", timed)
    monkeypatch.setattr(compiled.time, "perf_counter", lambda: now[0])
    assert compiled.compile_where_it_pays(source, "auto", (2, 8), n_forwards) is expected
    traced.clear()
    seen_by(source, random_tokens(2, 8))
    assert bool(traced) is expected


def test_a_run_says_what_it_did_and_its_resume_obeys(config, traced, monkeypatch):
    shape = {"n_tokens": 9000, "data": {"on_exhausted": "repeat"}, "model": {"compile": True}}
    whole = fastsae.train(config(name="whole", **shape))
    assert traced and load_config(whole.run_dir / "config.toml").model.compile is True
    short = fastsae.train(config(name="short"))
    assert load_config(short.run_dir / "config.toml").model.compile is False
    cut = fastsae.train(config(name="cut", **shape), sinks=[StopAt(4000)])
    assert cut.interrupted
    traced.clear()
    monkeypatch.setattr(compiled, "_seconds", lambda run: pytest.fail("nothing is timed again"))
    again = fastsae.resume(cut.run_dir)
    assert traced and same(weights(again), weights(whole))
    other = fastsae.train(config(name="other", **shape), sinks=[StopAt(4000)])
    traced.clear()
    assert fastsae.resume(other.run_dir, {"model": {"compile": False}}).n_tokens == 9000 and not traced


def test_activations_on_disk_go_on_as_they_began(config, traced, tmp_path, monkeypatch):
    shape = {"n_tokens": 400, "data": {"on_exhausted": "repeat"}}
    monkeypatch.setattr(compiled, "COSTS_S", 0.0)
    monkeypatch.setattr(compiled, "LEAST_GAIN", -1e9)
    harvest(config(**shape), tmp_path / "acts")
    assert Shards(tmp_path / "acts").manifest["model"]["compile"] is True and traced
    monkeypatch.undo()
    monkeypatch.setattr(bare.torch, "compile", partial(torch.compile, backend="eager"))
    harvest(config(**{**shape, "n_tokens": 800}), tmp_path / "acts")
    assert Shards(tmp_path / "acts").n_rows == 800
