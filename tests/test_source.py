import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fastsae import bare
from fastsae.config import ModelConfig
from fastsae.errors import SourceError
from fastsae.hook_points import resolve_hooks
from fastsae.source import Source, load_source
from tests.tiny_models import D_MODEL, D_VOCAB, N_CTX, N_HEADS, N_LAYERS, one_thread, save_model  # noqa: F401

CPU = torch.device("cpu")
TOKENS = torch.arange(14).reshape(2, 7)
PRE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {k: save_model(k, root / k) for k in ("gpt2", "neox", "neox_headless", "llama", "bert")}


def load(name: str, *hooks: str, **fields) -> Source:
    return load_source(ModelConfig(name=name, hook=hooks or (PRE,), **fields), CPU)


def count_calls(source: Source) -> list[list[str]]:
    """Grows by one entry per later call of a block or the unembedding."""
    calls: list[str] = []
    for i, block in enumerate(source.model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(f"block {i}"))
    source.model.unembed.register_forward_pre_hook(lambda *_: calls.append("unembed"))
    return calls


def grab(store: dict[str, torch.Tensor], name: str):
    return lambda acts: store.__setitem__(name, acts.clone())


def test_importing_loads_no_transformer_lens():
    code = "import sys, fastsae.source; assert not {'transformer_lens', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_logits_and_activations_are_hugging_faces(folders, kind):
    source = load(folders[kind], "blocks.*.hook_resid_pre", "blocks.2.hook_resid_post")
    seen: dict[str, torch.Tensor] = {}
    logits = source.forward(TOKENS, [(h.resolved, grab(seen, h.name)) for h in source.hooks])
    reference = AutoModelForCausalLM.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        out = reference(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(logits, out.logits, rtol=1e-5, atol=1e-5)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(
            seen[f"blocks.{layer}.hook_resid_pre"], out.hidden_states[layer], rtol=1e-5, atol=1e-5
        )
    assert source.ce_reason is None and source.weights == "raw" and source.d_vocab == D_VOCAB
    assert source.dtype == torch.float32 and source.n_ctx == N_CTX


def test_hook_points_keep_the_users_name_and_know_their_width(folders):
    source = load(
        folders["gpt2"], "blocks.*.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"
    )
    assert [h.name for h in source.hooks[:3]] == [f"blocks.{i}.hook_resid_pre" for i in range(N_LAYERS)]
    assert [h.layer for h in source.hooks] == [0, 1, 2, 0, 1]
    assert [h.width for h in source.hooks] == [D_MODEL] * 4 + [4 * D_MODEL]
    assert all(h.resolved in source.model.hook_dict for h in source.hooks)


def test_pattern_over_ten_layers_is_in_layer_order(tmp_path):
    from transformers import GPT2LMHeadModel

    from tests.tiny_models import gpt2_config

    config = gpt2_config()
    config.n_layer = 11
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert [h.layer for h in load(str(tmp_path), "blocks.*.hook_mlp_out").hooks] == list(range(11))


def test_heads_are_flattened_and_what_a_hook_returns_is_put_back(folders):
    source = load(folders["gpt2"], "blocks.1.attn.hook_z")
    (hook,) = source.hooks
    seen: dict[str, torch.Tensor] = {}
    clean = source.forward(TOKENS, [(hook.resolved, grab(seen, "z"))])
    assert seen["z"].shape == (2, 7, D_MODEL) == (2, 7, hook.width) and D_MODEL % N_HEADS == 0
    torch.testing.assert_close(source.forward(TOKENS, [(hook.resolved, lambda x: x * 1.0)]), clean)
    assert (source.forward(TOKENS, [(hook.resolved, torch.zeros_like)]) - clean).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "neox", "bert"])
@pytest.mark.parametrize(
    ("hooks", "last"),
    [
        (["blocks.0.hook_resid_post"], 0),
        (["blocks.1.hook_resid_pre"], 1),
        (["blocks.1.hook_mlp_out", "blocks.1.hook_resid_pre", "blocks.0.hook_attn_out"], 1),
        (["hook_embed"], -1),
    ],
)
def test_stop_runs_no_later_block_and_every_hook_fires(folders, kind, hooks, last):
    source = load(folders[kind], *hooks)
    full: dict[str, torch.Tensor] = {}
    stopped: dict[str, torch.Tensor] = {}
    source.forward(TOKENS, [(h.resolved, grab(full, h.name)) for h in source.hooks])
    calls = count_calls(source)
    assert (
        source.forward(TOKENS, [(h.resolved, grab(stopped, h.name)) for h in source.hooks], stop=True) is None
    )
    assert calls == [f"block {i}" for i in range(last + 1)]
    assert set(full) == set(stopped) == set(hooks)
    for name, acts in full.items():
        torch.testing.assert_close(stopped[name], acts, rtol=0, atol=0)


def test_a_stopped_forward_keeps_no_patterns_and_no_cache(folders):
    source = load(folders["gpt2"])
    calls = []
    inner = source.model.original_model.transformer
    inner.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    source.forward(TOKENS)
    assert calls[0]["output_attentions"] is False and calls[0]["use_cache"] is False


def test_modes_hooks_and_switches_are_as_before_also_after_an_error(folders):
    source = load(folders["gpt2"], "blocks.1.attn.hook_result", "blocks.0.hook_mlp_in")
    model = source.model
    model.train()
    model.blocks[1].eval()
    modes = [m.training for m in source._modules]
    fired = []
    user_point = model.hook_dict[source.hooks[0].resolved]
    model.set_use_attn_result(True)
    model.add_hook("blocks.1.attn.hook_result", lambda acts, hook: fired.append(acts.shape))
    before = list(user_point.fwd_hooks)

    def fails(acts):
        assert not any(m.training for m in source._modules) and model.cfg.use_hook_mlp_in
        raise KeyError("of the hook")

    for stop in (True, False):
        with pytest.raises(KeyError, match="of the hook"):
            source.forward(TOKENS, [(h.resolved, fails) for h in source.hooks], stop=stop)
    source.forward(TOKENS, [(h.resolved, lambda acts: None) for h in source.hooks], stop=True)
    assert [m.training for m in source._modules] == modes and any(modes) and not all(modes)
    assert user_point.fwd_hooks == before and len(fired) == 1
    assert model.cfg.use_attn_result and not model.cfg.use_hook_mlp_in
    model.set_use_attn_result(False)
    model(TOKENS)
    assert len(fired) == 1, "the user's hook is still there, but its switch is off"


def test_dropout_is_off(folders):
    source = load(folders["gpt2"])
    source.model.train()
    torch.testing.assert_close(source.forward(TOKENS), source.forward(TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (["blocks.1.hook_resid_prex"], r"no blocks.1.hook_resid_prex; nearest: blocks.1.hook_resid_pre"),
        (["blocks.9.hook_resid_pre"], r"nearest: .*hook_resid_pre"),
        (["block.*.hook_resid_pre"], r"nearest: .*blocks.0.hook_resid_pre"),
        ([PRE, PRE], "same place"),
        ([PRE, "blocks.1.hook_in"], "blocks.1.hook_in and blocks.1.hook_resid_pre are the same place"),
        ([PRE, "blocks.*.hook_resid_pre"], "same place"),
        (["blocks.1.attn.hook_pattern"], "hook_pattern does not yield one activation per token"),
        (["blocks.1.attn.hook_attn_scores"], "per token"),
        (["blocks.1.attn.qkv.hook_out"], "qkv.hook_out never fires"),
        (["blocks.0.hook_attn_in", "blocks.0.hook_q_input"], "use_split_qkv_input"),
    ],
)
def test_hook_points_that_cannot_be_used_are_refused_by_name(folders, hooks, message):
    with pytest.raises(SourceError, match=message):
        load(folders["gpt2"], *hooks)


def test_activations_without_a_batch_are_refused(folders):
    with pytest.raises(SourceError, match="hook_cos does not yield one activation per token"):
        load(folders["llama"], "blocks.1.attn.hook_cos")


def test_no_hook_point_is_refused(folders):
    with pytest.raises(SourceError, match="names no hook point"):
        load_source(ModelConfig(name=folders["gpt2"]), CPU)


@pytest.mark.parametrize(
    "name",
    ["blocks.1.hook_attn_in", "blocks.1.hook_q_input", "blocks.1.hook_mlp_in", "blocks.1.attn.hook_result"],
)
def test_switched_hook_points_work_and_change_nothing(folders, name):
    source = load(folders["gpt2"], name)
    seen: dict[str, torch.Tensor] = {}
    clean = source.forward(TOKENS)
    hooked = source.forward(TOKENS, [(source.hooks[0].resolved, grab(seen, name))])
    torch.testing.assert_close(hooked, clean, rtol=1e-4, atol=1e-5)
    assert seen[name].shape == (2, 7, source.hooks[0].width)


def test_switch_that_the_model_refuses_is_named(folders):
    with pytest.raises(
        SourceError, match=r"blocks.1.attn.hook_q_input needs use_split_qkv_input, which fails"
    ):
        load(folders["bert"], "blocks.1.attn.hook_q_input")


def test_encoder_and_missing_head_have_no_cross_entropy(folders):
    assert "not a causal" in (load(folders["bert"]).ce_reason or "")
    assert "lm_head.weight is missing" in (load(folders["neox_headless"]).ce_reason or "")


def test_tied_head_that_is_not_in_the_file_is_no_missing_head(tmp_path):
    from safetensors.torch import load_file

    folder = save_model("gpt2", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load(folder).ce_reason is None


def test_missing_parameters_of_the_body_are_warned_of(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 parameters .*h\.1\.mlp\.c_fc\.weight"):
        load(folder)


def test_processed_weights_move_activations_and_keep_probabilities(folders):
    seen: dict[str, torch.Tensor] = {}
    probabilities = {}
    for weights in ("raw", "processed"):
        source = load(folders["gpt2"], weights=weights)
        logits = source.forward(TOKENS, [(source.hooks[0].resolved, grab(seen, weights))])
        probabilities[weights] = logits.softmax(-1)
        assert source.weights == weights
    assert (seen["raw"] - seen["processed"]).abs().max() > 1e-3
    torch.testing.assert_close(probabilities["raw"], probabilities["processed"], rtol=1e-4, atol=1e-5)


def test_dtype_and_context_limit(folders):
    source = load(folders["gpt2"], dtype="bfloat16")
    assert source.dtype == torch.bfloat16
    source.check_context_size(N_CTX)
    with pytest.raises(SourceError, match=f"context_size = {N_CTX + 1} .* use at most {N_CTX}"):
        source.check_context_size(N_CTX + 1)


def test_tokenizer_is_the_folders_own_or_none(folders, tmp_path):
    source = load(folders["gpt2"])
    assert source.tokenizer("w3 w5")["input_ids"] == [3, 5]
    for kind in ("gpt2", "llama", "bert"):
        folder = Path(save_model(kind, tmp_path / kind))
        for file in folder.glob("tokenizer*"):
            file.unlink()
        assert load(str(folder)).tokenizer is None


def test_a_model_of_the_user_is_taken_as_it_is(folders):
    model = load(folders["gpt2"]).model
    cfg = ModelConfig(name="whatever", hook=PRE)
    assert load_source(cfg, CPU, model).model is model
    with pytest.warns(UserWarning, match="DataParallel"):
        assert load_source(cfg, CPU, nn.DataParallel(model)).model is model
    with pytest.raises(SourceError, match="the model is on cpu and the run on meta"):
        load_source(cfg, torch.device("meta"), model)
    with pytest.raises(SourceError, match="GPT2LMHeadModel; give a TransformerBridge"):
        load_source(cfg, CPU, model.original_model)
    model.enable_compatibility_mode()
    with pytest.warns(UserWarning, match="weights are processed"):
        assert load_source(cfg, CPU, model).weights == "processed"


def test_resolve_hooks_alone(folders):
    model = load(folders["gpt2"]).model
    assert [h.width for h in resolve_hooks(Source(model, None, ""), ["hook_embed", "ln_final.hook_in"])] == [
        D_MODEL
    ] * 2


def test_folders_that_cannot_be_loaded(tmp_path, folders):
    config = Path(folders["gpt2"], "config.json").read_text()
    weights = Path(folders["gpt2"], "model.safetensors").read_bytes()
    cases = {
        "no config.json": {},
        "no weights": {"config.json": config.encode()},
        "foo": {"config.json": config.replace('"gpt2"', '"foo"').encode(), "model.safetensors": weights},
        "header": {
            "config.json": config.encode(),
            "model.safetensors": b"version https://git-lfs.github.com/spec",
        },
    }
    for number, (message, files) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with pytest.raises(SourceError, match=message) as error:
            load(str(folder))
        assert "\n" not in str(error.value)
    with pytest.raises(SourceError, match="no such folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="cannot load the model nobody/nothing"):
        load("nobody/nothing")


SHORT = (
    "blocks.1.hook_resid_pre",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_resid_post",
)


def seen_by(source, tokens):
    seen = {}
    hooks = [(h.resolved, lambda a, name=h.name: seen.__setitem__(name, a.clone())) for h in source.hooks]
    assert source.forward(tokens, hooks, stop=True) is None
    return seen


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "bert"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_short_way_gives_the_same_activations(kind, dtype, tmp_path):
    """Through the bare Hugging Face module, at every hook point, also where weights have changed since."""
    folder = save_model(kind, tmp_path)
    cfg = ModelConfig(name=folder, hook=SHORT if kind != "bert" else SHORT[3:], dtype=dtype)
    source = load_source(cfg, torch.device("cpu"))
    assert source.is_short and not source._is_hooked()
    tokens = torch.randint(D_VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))
    limit = 1e-5 if dtype == "float32" else 0.03
    for _ in range(2):
        short, source._bare, bare = seen_by(source, tokens), None, source._bare
        long, source._bare = seen_by(source, tokens), bare
        assert short.keys() == long.keys() == set(cfg.hook)
        for name, acts in long.items():
            assert short[name].dtype == acts.dtype
            assert (short[name] - acts).abs().max() <= limit * acts.abs().max(), name
        with torch.no_grad():
            for p in source.model.parameters():
                p.mul_(0.9)


def test_the_long_way_is_taken_where_it_has_to_be(tmp_path):
    """Parts that only the bridge has, folded weights, somebody else's hooks: which fire, and change what ours see."""
    folder = save_model("gpt2", tmp_path)

    def load(*hook, **fields):
        return load_source(ModelConfig(name=folder, hook=hook, **fields), torch.device("cpu"))

    assert not load("blocks.1.attn.hook_q").is_short
    assert not load(PRE, weights="processed").is_short
    source, tokens = load(PRE), torch.arange(12)[None]
    plain, fired = seen_by(source, tokens)[PRE], []

    def halve(acts, hook):
        fired.append(hook.name)
        return acts / 2

    with source.model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", halve)]):
        changed = seen_by(source, tokens)[PRE]
    assert fired and not torch.allclose(changed, plain)
    handle = source.model.blocks[0].register_forward_pre_hook(lambda *_: fired.append("torch"))
    seen_by(source, tokens)
    handle.remove()
    assert fired[-1] == "torch"
    source.forward(tokens)  # Hugging Face installs hooks of its own
    ran = []
    source._bare.module.transformer.h[0].register_forward_hook(lambda *_: ran.append(1))
    seen_by(source, tokens)
    source.model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", halve)])
    seen_by(source, tokens)
    assert len(ran) == 2, "the short way again"
    assert torch.equal(seen_by(source, tokens)[PRE], plain)


def test_activations_that_differ_are_not_taken(tmp_path, monkeypatch):
    hooked = bare._hooked
    monkeypatch.setattr(bare, "_hooked", lambda m, take, out: hooked(m, lambda a: take(1.01 * a), out))
    source = load_source(ModelConfig(name=save_model("gpt2", tmp_path), hook=(PRE,)), torch.device("cpu"))
    assert not source.is_short


def test_the_short_way_ends_at_the_deepest_hook_point(tmp_path):
    source = load_source(ModelConfig(name=save_model("gpt2", tmp_path), hook=(PRE,)), torch.device("cpu"))
    ran = []
    for number, block in enumerate(source._bare.module.transformer.h):
        block.register_forward_hook(lambda *_, n=number: ran.append(n))
    seen_by(source, torch.arange(12)[None])
    assert ran[-1] <= 1 and 2 not in ran
