"""The embedded model and its corpus."""

import json
import math
import socket
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsae.demo import MODEL_DIR
from fastsae.demo.corpus import load_corpus, split_of
from fastsae.demo.train_model import encode, model_bits, ngram_bits, train, train_tokenizer
from fastsae.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return json.loads((MODEL_DIR / "training_log.json").read_text())


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the interpreter's standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_the_folder_is_small_and_says_nothing_of_where_it_was_made() -> None:
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.json",
    }
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    folders = [str(Path.home()), tempfile.gettempdir() + "/", "/home/", "/Users/"]
    for path in files:
        for word in ("_name_or_path", *folders):
            assert word.encode() not in path.read_bytes(), path.name


def test_transformer_lens_and_transformers_agree_without_a_network(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    reached: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        reached.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    bridge = TransformerBridge.boot_transformers(str(MODEL_DIR), dtype=torch.float32)
    assert not reached
    assert (bridge.cfg.n_layers, bridge.cfg.d_model, bridge.cfg.n_ctx) == (4, 128, 256)

    text = "def main() -> None:\n    return"
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.inference_mode():
        logits, cache = bridge.run_with_cache(tokens)
        expected = model(tokens)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert cache["blocks.2.hook_resid_post"].shape == (1, tokens.shape[1], 128)


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = "\tdef f(x):\r\n        return 'λ → 🐍' \x00  \n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.bos_token_id not in tokenizer(text)["input_ids"]


def test_the_model_predicts_held_out_code_better_than_counts_do(
    model: Any, tokenizer: Any, log: dict[str, Any]
) -> None:
    figures = log["bits_per_byte"]
    assert figures["model"] < 0.95 * figures["bigram"] < figures["bigram"] < figures["unigram"]

    texts = [text[:2000] for text in load_corpus("validation")["text"][:8]]
    n_bytes = sum(len(text.encode()) for text in texts)
    bits = model_bits(model, encode(tokenizer, texts), 128, tokenizer.bos_token_id)
    assert bits / n_bytes < figures["bigram"]


def test_a_training_repeats_bit_for_bit() -> None:
    texts = ["for i in range(10):\n    print(i)\n" * 20, "import os\n" * 30]
    tokenizer = train_tokenizer(texts, 300)
    config = {
        "vocab_size": 300,
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 1,
        "n_positions": 16,
        "tokens_per_step": 64,
        "lr_muon": 0.02,
        "lr_adam": 0.01,
        "lr_warmup_steps": 2,
        "grad_clip_norm": 1.0,
        "autocast": "bfloat16",
        "seed": 1,
    }
    documents = encode(tokenizer, texts)
    first, losses = train(documents, config, tokenizer.bos_token_id, 40)
    second, again = train(documents, config, tokenizer.bos_token_id, 40)
    assert losses == again and losses[-1] < losses[0]
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_ngram_models_give_probabilities_that_sum_to_one() -> None:
    n_vocab, bos = 5, 0
    rng = torch.Generator().manual_seed(0)
    train_set = [torch.randint(1, 4, (n,), generator=rng) for n in (7, 11, 1)]

    def bits(*tokens: int) -> tuple[float, float]:
        return ngram_bits(train_set, [torch.tensor(tokens)], n_vocab, bos)

    for before in ((), (1,), (4,)):
        for kind in (0, 1):
            start = bits(*before)[kind] if before else 0.0
            total = sum(2 ** (start - bits(*before, token)[kind]) for token in range(n_vocab))
            assert math.isclose(total, 1.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("abc.py", "train"),
        ("typing.py", "train"),
        ("json/decoder.py", "train"),
        ("asyncio/events.py", "train"),
        ("argparse.py", "validation"),
        ("contextlib.py", "validation"),
        ("html/parser.py", "validation"),
        ("xml/dom/minidom.py", "validation"),
    ],
)
def test_a_file_is_held_out_by_its_name(name: str, split: str) -> None:
    assert split_of(name) == split


def test_the_splits_are_disjoint_sorted_and_only_library_code() -> None:
    train_set, held_out = load_corpus("train"), load_corpus("validation")
    assert set(train_set.column_names) == {"text", "name"}
    assert not set(train_set["name"]) & set(held_out["name"])
    for split in (train_set, held_out):
        names = list(split["name"])
        assert names == sorted(names)
        assert not any("site-packages" in name or "test" in Path(name).parts for name in names)
        assert {Path(name).parts[0].removesuffix(".py") for name in names} <= sys.stdlib_module_names
        assert all(split["text"])
    assert 0.05 < len(held_out) / (len(train_set) + len(held_out)) < 0.15
    assert list(load_corpus("train")["name"]) == list(train_set["name"])


def test_what_is_not_library_code_is_left_out(stdlib: Path) -> None:
    files = {
        "json/decoder.py": b"import re\r\n",
        "json/tests/test_json.py": b"import json\n",
        "abc.py": b"class ABC: ...\n",
        "ast.py": b"",
        "bisect.py": b"# \xe9\n",
        "sitecustomize.py": b"import os\n",
        "_sysconfigdata__linux.py": b"build_time_vars = {}\n",
        "encodings/ascii.py": b"import codecs\n",
        "site-packages/numpy/__init__.py": b"import os\n",
        "dist-packages/json/__init__.py": b"import os\n",
    }
    for name, content in files.items():
        (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / name).write_bytes(content)
    corpus = load_corpus("train")
    assert list(corpus["name"]) == ["abc.py", "json/decoder.py"]
    assert list(corpus["text"]) == ["class ABC: ...\n", "import re\n"]


@pytest.mark.parametrize("missing", [True, False])
def test_an_interpreter_without_sources_is_told_what_to_do(stdlib: Path, missing: bool) -> None:
    if missing:
        stdlib.rmdir()
    with pytest.raises(DataError, match="--dataset") as error:
        load_corpus("train")
    assert str(stdlib) in str(error.value)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'test'.*train and validation"):
        load_corpus("test")  # type: ignore[arg-type]
