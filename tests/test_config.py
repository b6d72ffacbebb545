import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsae.cli import merged
from fastsae.config import RunConfig, SAEConfig, StepConfig, resolved_step
from fastsae.configfile import load_config, parse_assignment, to_toml
from fastsae.errors import ConfigError

FILE = """
name = "gpt2-l8"
n_tokens = 300_000_000
[model]
name = "openai-community/gpt2"
hook = ["blocks.8.hook_resid_pre"]
dtype = "bfloat16"
weights = "raw"
[data]
dataset = "Skylion007/openwebtext"
context_size = 128
exclude = "bos"
shuffle_buffer = 10_000
n_validation_tokens = 131_072
[ring]
capacity = 524_288
placement = "auto"
[sae]
d_sae = 24_576
activation = "topk"
[[saes]]
k = 32
[[saes]]
k = 64
[step]
batch_size = 8192
precision = "bf16"
lr = "auto"
grad_clip = 1.0
[save]
checkpoint_every = 30_000_000
validate_every = 30_000_000
[log]
wandb = "sae"
"""


def test_the_documented_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    config = load_config(path)
    assert config.n_tokens == 300_000_000
    variants = config.variants()
    assert [(name, sae.k, sae.d_sae) for name, sae, _, _ in variants] == [
        ("topk-k=32", 32, 24_576),
        ("topk-k=64", 64, 24_576),
    ]
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert load_config(again) == config


def test_flags_go_over_the_file_and_set_over_everything_once(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("n_tokens = 5\n[step]\nlr = 1e-3\nbatch_size = 7\n")
    flags = {"step": {"lr": 0.5, "batch_size": None}}
    config = load_config(path, merged(flags, ["step.eps=1e-6", "data.dataset=some/name"]))
    assert (config.n_tokens, config.step.lr, config.step.batch_size, config.step.eps) == (5, 0.5, 7, 1e-6)
    assert config.data.dataset == "some/name"
    with pytest.raises(ConfigError, match="twice"):
        merged({"step": {"lr": 0.5}}, ["step.lr=1"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a.b=gpt2", {"a": {"b": "gpt2"}}),
        ("a=org/x=y", {"a": "org/x=y"}),
        ("a.b=false", {"a": {"b": False}}),
    ],
)
def test_assignments(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize(
    "data, words",
    [
        ({"step": {"lrr": 1}}, ["step.lrr", '"lr"']),
        ({"stepp": {}}, ["stepp", '"step"']),
        ({"saes": [{"kk": 1}]}, ["saes[0].kk", '"k"']),
        ({"saes": [{"step": {"l1": 1}}]}, ["saes[0].step.l1"]),
        ({"step": {"lr": -1}}, ["step.lr", "-1", "greater than 0"]),
        ({"step": {"lr": 0}}, ["step.lr", "greater than 0"]),
        ({"step": {"lr": math.nan}}, ["step.lr", "nan", "finite"]),
        ({"step": {"lr": math.inf}}, ["step.lr", "inf", "finite"]),
        ({"step": {"l1_coefficient": -0.5}}, ["step.l1_coefficient", "-0.5"]),
        ({"n_tokens": 0}, ["n_tokens", "0", "greater than 0"]),
        ({"sae": {"d_sae": -3}}, ["sae.d_sae", "-3"]),
        ({"data": {"context_size": 1}}, ["data.context_size", "1"]),
        ({"name": "a/b"}, ["name", "a/b", "folder name"]),
        ({"name": ".."}, ["name", "folder name"]),
        ({"saes": [{"k": 1}, {"k": 1}]}, ["folder name", "relu-k=1"]),
        ({"saes": [{"step": {"batch_size": 3}}]}, ["batch_size"]),
        ({"sae": {"activation": "gelu"}}, ["sae.activation", "gelu", "relu", "topk"]),
        ({"model": {"compile": "maybe"}}, ["model.compile = 'maybe'", "'auto'", "boolean"]),
        ({"step": {"betas": [2, 0.5]}}, ["step.betas[0] = 2", "less than 1"]),
    ],
)
def test_bad_values_are_named_in_one_line(data, words):
    with pytest.raises(ConfigError) as error:
        load_config(None, data)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"k": 3}, "k = 3 belongs to topk"),
        ({"activation": "topk", "k": 9}, "k = 9 is more than d_sae = 8"),
        ({"d_out": 5}, "apply_b_dec_to_input"),
        ({"kk": 5}, '"kk"; did you mean "k"'),
    ],
)
def test_sae_config_refuses_by_name(fields, words):
    with pytest.raises(ConfigError, match=words):
        SAEConfig(4, 8, **fields)


def test_auto_follows_the_table():
    topk = resolved_step(StepConfig(), SAEConfig(768, 2**16, activation="topk"), 100_000)
    assert (topk.lr, topk.lr_warmup_steps, topk.k_aux, topk.auxk_coefficient) == (1e-4, 1000, 384, 1 / 32)
    relu = resolved_step(StepConfig(), SAEConfig(768, 2**16), 1000)
    assert (relu.lr, relu.lr_warmup_steps, relu.l1_coefficient, relu.auxk_coefficient) == (
        3e-4,
        50,
        5.0,
        None,
    )
    shape = SAEConfig(768, 24, activation="jumprelu")
    jumprelu = resolved_step(StepConfig(), shape, 1000)
    assert (shape.decoder_norm, jumprelu.lr, jumprelu.betas) == ("free", 7e-5, (0.0, 0.999))
    assert (jumprelu.l0_coefficient, jumprelu.target_l0, jumprelu.bandwidth) == (768.0, 24.0, 0.25)
    assert relu.betas == (0.9, 0.999) and SAEConfig(4, 8).decoder_norm == "unit"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"target_l0": 9.0}, "target_l0 = 9 is more than the 8 latents"),
        ({"first_moment": "bf16"}, "no first moment is kept"),
        ({"l1_coefficient": 1.0}, "l1_coefficient = 1.0 does not belong"),
    ],
)
def test_a_step_of_jumprelu_refuses_by_name(fields, words):
    with pytest.raises(ConfigError, match=words):
        resolved_step(StepConfig(**fields), SAEConfig(4, 8, activation="jumprelu"), 10)


def test_false_turns_off_what_may_be_off():
    step = StepConfig.model_validate({"grad_clip": False, "ema_decay": False})
    assert step.grad_clip is None and step.ema_decay is None


def test_default_k_is_no_more_than_there_are_latents():
    assert SAEConfig(4, 8, activation="topk").k == 8
    assert SAEConfig(4, 800, activation="topk").k == 32


@given(st.floats(1e-6, 1), st.integers(1, 10**9), st.sampled_from([None, 0.5]))
def test_toml_round_trip(lr, n_tokens, clip):
    config = RunConfig(n_tokens=n_tokens, step=StepConfig(lr=lr, grad_clip=clip))
    import tomlkit

    assert RunConfig.model_validate(tomlkit.parse(to_toml(config)).unwrap()) == config


@pytest.mark.parametrize(
    "make", [lambda: RunConfig(n_token=5), lambda: StepConfig(lr=-1), lambda: RunConfig(step={"lr": -1})]
)
def test_the_python_api_says_it_in_one_line_too(make):
    with pytest.raises(ConfigError) as error:
        make()
    assert "\n" not in str(error.value)
    assert "n_tokens" in str(error.value) or "lr = -1" in str(error.value)
