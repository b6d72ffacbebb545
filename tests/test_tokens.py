"""Datasets of every kind to packed contexts: what is in them, in which order, and how a position comes back."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastsae.blocks import BLOCK, TextEncoder, lower_priority
from fastsae.config import DataConfig
from fastsae.documents import StreamSource
from fastsae.errors import ConfigError, DataError, FastSAEError
from fastsae.packing import Packer, Packing
from fastsae.tokens import open_tokens

N_WORDS = 4000
END, PAD, FIRST = 0, 1, 2
N_DOCUMENTS = 3 * BLOCK + 77


@pytest.fixture(scope="module")
def tokenizer():
    """Word-level: `w7` is id 9. One token is BOS and EOS at once, as in GPT-2, and long texts make a warning."""
    vocab = {"<|end|>": END, "<pad>": PAD, **{f"w{i}": i + FIRST for i in range(N_WORDS)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<pad>",
        model_max_length=8,
    )


@pytest.fixture
def config(tmp_path):
    def make(dataset, **fields):
        defaults = {"context_size": 8, "n_validation_tokens": 50, "cache_dir": tmp_path / "cache"}
        return DataConfig(dataset=str(dataset), **{**defaults, **fields})

    return make


@pytest.fixture
def calls(monkeypatch):
    """The texts that were tokenised."""
    seen, real = [], TextEncoder._one

    def counted(self, row):
        seen.append(row)
        return real(self, row)

    monkeypatch.setattr(TextEncoder, "_one", counted)
    return seen


def texts(n):
    """`n` documents of 1 to 9 words."""
    return [" ".join(f"w{(i + 7 * j) % N_WORDS}" for j in range(1 + i % 9)) for i in range(n)]


def ids(text):
    return [int(word[1:]) + FIRST for word in text.split()]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_jsonl(path, rows, column="text"):
    return write(path, "".join(json.dumps({"other": i, column: row}) + "\n" for i, row in enumerate(rows)))


def write_json(path, rows):
    return write(path, json.dumps([{"text": row} for row in rows]))


def write_text(path, rows):
    return write(path, "\n".join(rows) + "\n")


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        datasets.Dataset.from_dict({"text": rows}).to_parquet(file)
    return path


def write_saved(path, rows):
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(path)
    return path


def write_saved_dict(path, rows):
    table = datasets.Dataset.from_dict({"text": rows})
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
    return path


def write_folder(path, rows):
    write_parquet(path / "a.parquet", rows[:100])
    write_parquet(path / "b.parquet", rows[100:])
    return path


def drain(stream, n=50):
    """Every context that is left: tokens [n, context_size], real [n, context_size]."""
    batches = []
    while (batch := stream.take(n)) is not None:
        batches.append(batch)
    return torch.cat([b.tokens for b in batches]), torch.cat([b.real for b in batches])


def content(stream):
    tokens, real = drain(stream)
    return tokens[real].tolist()


def counts(values):
    return np.bincount(np.asarray(values, np.int64), minlength=N_WORDS + FIRST)


def test_the_contexts_of_a_written_out_example(tmp_path, config, tokenizer):
    rows = ["w8 w9 w10", "w1 w2 w3 w4 w5 w6", "w7", "", "w11 w12 w13", "w14 w15"]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    cfg = config(path, streaming=True, shuffle_buffer=1, context_size=4, n_validation_tokens=3)
    train, validation = open_tokens(cfg, tokenizer, seed=0)
    assert (validation.tokens - FIRST).tolist() == [[-2, 8, 9, 10]]
    batch = train.take(9)
    assert (batch.tokens - FIRST).tolist() == [
        [-2, 1, 2, 3],
        [-2, 4, 5, 6],
        [-2, 7, -2, 11],
        [-2, 12, 13, -2],
    ]
    inserted = [[True, False, False, False]] * 2 + [[True, False, True, False], [True, False, False, True]]
    assert (~batch.real).tolist() == inserted == (~batch.keep).tolist()
    assert batch.tokens.dtype == torch.int64 and batch.keep.dtype == batch.real.dtype == torch.bool
    assert len(batch) == 4 and batch[1:3].tokens.tolist() == batch.tokens[1:3].tolist()
    assert train.take(1) is None


@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=20), max_size=20),
    st.integers(2, 9),
    st.sampled_from([None, 0]),
)
def test_packing_keeps_every_token_in_order(lists, size, separator):
    packer = Packer(Packing(size, separator, (), False), 1 + sum(map(len, lists)))
    for ids_ in lists:
        offset = 0
        while offset < len(ids_):
            offset = packer.add(np.asarray(ids_, np.int32), offset)
    packed = packer.batch()
    flat = [t for ids_ in lists for t in ids_]
    kept = packed.tokens[packed.real].tolist()
    assert kept == flat[: len(kept)]
    assert len(flat) - len(kept) < size
    assert torch.equal(packed.keep, packed.real)
    if separator is None:
        assert packed.real.all()
        return
    assert (~packed.real[:, 0]).all()
    assert not (packed.tokens[packed.real] == separator).any() and not packed.tokens[~packed.real].any()
    assert (packed.real[:, 1:] | packed.real[:, :-1]).all()  # never two separators in a row
    ends = set(np.cumsum([len(ids_) for ids_ in lists]).tolist())
    read = torch.cumsum(packed.real.flatten(), 0).view_as(packed.tokens)
    assert all(int(n) in ends for n in read[:, 1:][~packed.real[:, 1:]])


@pytest.mark.parametrize(
    ("exclude", "kept_ids"),
    [("bos", "real"), ("special", [5, 6]), ("none", "all"), ((5, END), [PAD, 6]), ((6,), [END, PAD, 5])],
)
def test_what_counts(tmp_path, config, tokenizer, exclude, kept_ids):
    path = write_jsonl(tmp_path / "x.jsonl", ["w3 <|end|> <pad> w4"] * 200)
    tokens = open_tokens(config(path, exclude=exclude, context_size=16), tokenizer, seed=0)
    for batch in (tokens.train.take(5), tokens.validation):
        assert (batch.tokens[batch.real] == END).any()
        expected = {"real": batch.real, "all": torch.ones_like(batch.keep)}.get(str(kept_ids))
        if expected is None:
            expected = torch.isin(batch.tokens, torch.tensor(kept_ids))
        assert torch.equal(batch.keep, expected)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "write_as"),
    [
        ("x.jsonl", write_jsonl),
        ("x.jsonl.gz", write_jsonl),
        ("x.json", write_json),
        ("x.json.gz", write_json),
        ("x.txt", write_text),
        ("x.txt.gz", write_text),
        ("x.parquet", write_parquet),
        ("saved", write_saved),
        ("saved_dict", write_saved_dict),
        ("folder", write_folder),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, config, tokenizer, name, write_as, streaming):
    rows = texts(300)
    path = write_as(tmp_path / name, rows)
    tokens = open_tokens(config(path, streaming=streaming), tokenizer, seed=0)
    held_out = tokens.validation.tokens[tokens.validation.real].tolist()
    flat = [t for row in rows for t in ids(row)]
    assert held_out == flat[: len(held_out)] and int(tokens.validation.keep.sum()) in range(50, 57)
    missing = counts(flat) - counts(held_out) - counts(content(tokens.train))
    assert (
        missing.min() == 0 and missing.sum() < 8 + 9
    )  # the last context, the rest of the last held-out document


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_ids(tmp_path, config, tokenizer, streaming):
    rows = [[END] * (i % 2) + ids(row) for i, row in enumerate(texts(200))]
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, [END], []], column="ids")
    cfg = config(path, tokens_column="ids", streaming=streaming)
    tokens = open_tokens(cfg, tokenizer, seed=0)
    for batch in (tokens.train.take(5), tokens.validation):
        assert ((batch.tokens == END) == ~batch.real).all()
        assert (batch.real[:, 1:] | batch.real[:, :-1]).all()
    bare = open_tokens(cfg, None, seed=0)
    assert bare.validation.real.all() and bare.validation.keep.all()
    assert bare.validation.tokens.flatten().tolist() == [t for row in rows for t in row][: 7 * 8]


def test_without_bos_the_eos_separates(tmp_path, config, tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", texts(100))
    no_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<pad>")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert (open_tokens(config(path), no_bos, seed=0).validation.tokens[:, 0] == PAD).all()
    assert open_tokens(config(path), bare, seed=0).validation.real.all()


def test_a_tokenizer_that_cuts_and_pads_is_neither_obeyed_nor_changed(tmp_path, config, tokenizer, capfd):
    path = write_jsonl(tmp_path / "x.jsonl", [" ".join(["w1"] * 300)] * 5)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    cutting = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>")
    truncation = cutting.backend_tokenizer.truncation
    tokens = open_tokens(config(path), cutting, seed=0)
    assert len(content(tokens.train)) in range(4 * 300 - 8, 4 * 300 + 1)
    assert cutting.backend_tokenizer.truncation == truncation
    open_tokens(config(path, context_size=9), tokenizer, seed=0)
    assert "longer than" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three blocks and a bit, in two files."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = texts(N_DOCUMENTS)
    write_jsonl(folder / "a.jsonl", rows[:900])
    write_jsonl(folder / "b.jsonl", rows[900:])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shuffle_buffer", [1, 100, 2 * BLOCK, 10_000])
def test_an_epoch_has_every_document_once(corpus, config, tokenizer, streaming, shuffle_buffer):
    cfg = config(corpus, streaming=streaming, shuffle_buffer=shuffle_buffer)
    tokens = open_tokens(cfg, tokenizer, seed=3)
    flat = [ids(row) for row in texts(N_DOCUMENTS)]
    n_read = sum(len(d) for d in flat[: tokens.train.state_dict()["of"]["n_held_out_documents"]])
    assert 0 <= n_read - int(tokens.validation.real.sum()) <= 9
    missing = counts([t for d in flat for t in d][n_read:]) - counts(content(tokens.train))
    assert missing.min() == 0 and missing.sum() < 8
    assert tokens.train.epoch == 1 and tokens.train.take(1) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch(corpus, config, tokenizer, streaming):
    cfg = config(corpus, streaming=streaming, shuffle_buffer=BLOCK)
    order = {
        (seed, n): drain(open_tokens(cfg, tokenizer, seed=seed).train, n)[0]
        for seed in (0, 1)
        for n in (1, 90)
    }
    assert torch.equal(order[0, 1], order[0, 90]) and torch.equal(order[1, 1], order[1, 90])
    assert not torch.equal(order[0, 1][:20], order[1, 1][:20])
    repeating = open_tokens(cfg.model_copy(update={"on_exhausted": "repeat"}), tokenizer, seed=0).train
    n = len(order[0, 1])
    first, second = repeating.take(n), repeating.take(n)
    assert torch.equal(first.tokens, order[0, 1])
    assert not torch.equal(first.tokens[:20], second.tokens[:20])
    difference = counts(first.tokens[first.real]) - counts(second.tokens[second.real])
    assert np.abs(difference).sum() < 2 * 8 + 8
    repeating.load_state_dict({**repeating.state_dict(), "position": [1, 0, 0, 0]})
    assert torch.equal(repeating.take(n).tokens, second.tokens)


def test_blocks_are_permuted_by_seed_and_epoch(tmp_path, config, tokenizer):
    path = write_text(tmp_path / "x.txt", [f"w{i}" for i in range(N_DOCUMENTS)])
    cfg = config(path, shuffle_buffer=BLOCK, on_exhausted="repeat")
    first = {}
    for seed in range(8):
        train = open_tokens(cfg, tokenizer, seed=seed).train
        for epoch in range(8 if seed == 0 else 1):
            train.load_state_dict({**train.state_dict(), "position": [epoch, 0, 0, 0]})
            first[seed, epoch] = (int(train.take(1).tokens[0, 1]) - FIRST) // BLOCK
        train.close()
    assert len({first[seed, 0] for seed in range(8)}) > 1 < len({first[0, epoch] for epoch in range(8)})


def test_a_small_dataset_is_permuted_as_a_whole(corpus, config, tokenizer):
    ones = [f"w{i}" for i in range(N_DOCUMENTS)]
    path = write_text(Path(config("x").cache_dir.parent) / "x.txt", ones)
    numbers = np.asarray(content(open_tokens(config(path), tokenizer, seed=0).train)) - FIRST
    early = numbers[: len(numbers) // 2]
    assert len(set(numbers.tolist())) == len(numbers)
    assert abs(early.mean() - N_DOCUMENTS / 2) < N_DOCUMENTS / 20
    assert np.bincount(early // BLOCK).min() > 10


def test_validation_is_the_same_for_all_and_never_trained_on(tmp_path, config, tokenizer):
    rows = [f"w{i} w{i} w{i}" for i in range(2000)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    sets = []
    for seed, fields in [
        (0, {}),
        (1, {"shuffle_buffer": 5}),
        (2, {"streaming": True, "on_exhausted": "repeat"}),
    ]:
        tokens = open_tokens(config(path, n_validation_tokens=1700, **fields), tokenizer, seed=seed)
        trained = torch.unique(tokens.train.take(1000).tokens)
        held_out = torch.unique(tokens.validation.tokens)
        assert int(held_out.max()) - FIRST > BLOCK  # the border lies inside a block
        assert set(trained.tolist()) & set(held_out.tolist()) == {END}
        sets.append(tokens.validation.tokens)
    assert torch.equal(sets[0], sets[1]) and torch.equal(sets[0], sets[2])


def test_a_named_split_for_validation(tmp_path, config, tokenizer, caplog):
    folder = tmp_path / "d"
    write_jsonl(folder / "train.jsonl", texts(100))
    write_jsonl(folder / "test.jsonl", ["w3000 w3001 w3002"] * 30)
    tokens = open_tokens(config(folder, validation_split="test"), tokenizer, seed=0)
    assert (
        50 <= int(tokens.validation.keep.sum()) < 57 and int(tokens.validation.tokens.max()) == 3002 + FIRST
    )
    missing = counts([t for row in texts(100) for t in ids(row)]) - counts(content(tokens.train))
    assert missing.min() == 0 and missing.sum() < 8
    assert not caplog.records
    tokens = open_tokens(config(folder, validation_split="test", n_validation_tokens=999), tokenizer, seed=0)
    assert (
        80 <= int(tokens.validation.keep.sum()) <= 90
        and "fewer than data.n_validation_tokens = 999" in caplog.text
    )


def test_demo(tmp_path, config, tokenizer, monkeypatch):
    made = {"train": ["w1 w2 w3"] * 40, "validation": ["w5 w6 w7"] * 40}
    monkeypatch.setattr(
        "fastsae.demo.corpus.load_corpus", lambda split: datasets.Dataset.from_dict({"text": made[split]})
    )
    tokens = open_tokens(config("demo"), tokenizer, seed=0)
    assert set(torch.unique(tokens.validation.tokens).tolist()) == {END, 7, 8, 9}
    assert set(content(tokens.train)) == {3, 4, 5}


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("shuffle_buffer", [60, BLOCK])
def test_a_position_comes_back(corpus, config, tokenizer, streaming, shuffle_buffer, cache):
    cfg = config(corpus, streaming=streaming, shuffle_buffer=shuffle_buffer, on_exhausted="repeat")
    whole = open_tokens(cfg, tokenizer, seed=5).train
    states, tokens = [], []
    for n in [1, 1, 3, 500, 250, 400, 1, 2, 99, 700]:
        states.append(json.loads(json.dumps(whole.state_dict())))
        tokens.append(whole.take(n).tokens)
    assert whole.epoch == 1
    tokens.append(whole.take(40).tokens)
    whole.close()
    for i, state in list(enumerate(states))[:: 3 if cache == "cold" else 1]:
        if cache == "cold":
            shutil.rmtree(cfg.cache_dir)
        with open_tokens(cfg, tokenizer, seed=5).train as resumed:
            resumed.load_state_dict(state)
            rest = torch.cat(tokens[i:])
            assert torch.equal(resumed.take(30).tokens, rest[:30])
            assert torch.equal(resumed.take(len(rest) - 30).tokens, rest[30:])


def test_a_stream_moves_to_any_position(corpus, config, tokenizer):
    stream = open_tokens(config(corpus), tokenizer, seed=0).train
    start = stream.state_dict()
    first, end = drain(stream)[0], stream.state_dict()
    for _ in range(2):
        stream.load_state_dict(start)
        assert torch.equal(drain(stream)[0], first)
    stream.load_state_dict(end)
    assert stream.take(1) is None
    stream.load_state_dict(start)
    stream.take(3)
    stream.close()
    assert torch.equal(stream.take(4).tokens, first[3:7])


@pytest.mark.parametrize(
    ("seed", "fields", "named"),
    [
        (1, {}, "seed = 0, now it is 1"),
        (0, {"context_size": 9}, "context_size = 8, now it is 9"),
        (0, {"shuffle_buffer": 9}, "shuffle_buffer = 10000, now it is 9"),
        (0, {"n_validation_tokens": 99}, "n_held_out_documents"),
    ],
)
def test_a_position_in_something_else_is_refused(corpus, config, tokenizer, seed, fields, named):
    state = open_tokens(config(corpus), tokenizer, seed=0).train.state_dict()
    with pytest.raises(DataError, match=named):
        open_tokens(config(corpus, **fields), tokenizer, seed=seed).train.load_state_dict(state)


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_is_tokenised_twice(corpus, config, tokenizer, calls, streaming, monkeypatch):
    cfg = config(corpus, streaming=streaming)
    first = drain(open_tokens(cfg, tokenizer, seed=0).train)[0]
    assert len(calls) == N_DOCUMENTS
    if streaming:
        monkeypatch.setattr(StreamSource, "read", None)
    assert torch.equal(drain(open_tokens(cfg, tokenizer, seed=0).train)[0], first)
    drain(open_tokens(cfg.model_copy(update={"context_size": 5}), tokenizer, seed=1).train)
    assert len(calls) == N_DOCUMENTS


def test_the_cache_knows_datasets_and_tokenizers_apart(tmp_path, config, tokenizer, calls):
    path = write_jsonl(tmp_path / "x.jsonl", texts(100))
    open_tokens(config(path), tokenizer, seed=0)
    vocab = {"<|end|>": END, "<pad>": PAD, "w1": 3, "w2": 2}
    other = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    open_tokens(config(path), PreTrainedTokenizerFast(tokenizer_object=other), seed=0)
    assert len(calls) == 200
    write_jsonl(path, texts(101))
    open_tokens(config(path), tokenizer, seed=0)
    assert len(calls) == 301


@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped"])
def test_a_damaged_block_is_made_again(corpus, config, tokenizer, calls, damage, caplog):
    cfg = config(corpus)
    first = drain(open_tokens(cfg, tokenizer, seed=0).train)[0]
    path = sorted(cfg.cache_dir.rglob("*.safetensors"))[1]
    good = path.read_bytes()
    bad = {"cut": good[:-9], "garbage": b"no", "flipped": good[:-30] + bytes([good[-30] ^ 1]) + good[-29:]}[
        damage
    ]
    path.write_bytes(bad)
    calls.clear()
    assert torch.equal(drain(open_tokens(cfg, tokenizer, seed=0).train)[0], first)
    assert len(calls) == BLOCK and "damaged" in caplog.text
    drain(open_tokens(cfg, tokenizer, seed=0).train)
    assert len(calls) == BLOCK


def test_a_resumed_stream_does_not_read_what_lies_before(corpus, config, tokenizer, calls, monkeypatch):
    cfg = config(corpus, streaming=True, shuffle_buffer=1)
    whole = open_tokens(cfg, tokenizer, seed=0).train
    head = whole.take(700)
    state = whole.state_dict()
    rest = drain(whole)[0]
    assert len(head) == 700 and state["position"][:2] == [0, 1]
    for path in sorted(cfg.cache_dir.rglob("*.safetensors"))[2:]:
        path.unlink()
    calls.clear()
    skipped = []
    real = datasets.IterableDataset.skip
    monkeypatch.setattr(datasets.IterableDataset, "skip", lambda self, n: skipped.append(n) or real(self, n))
    resumed = open_tokens(cfg, tokenizer, seed=0).train
    resumed.load_state_dict(state)
    assert torch.equal(drain(resumed)[0], rest)
    assert calls == texts(N_DOCUMENTS)[2 * BLOCK :] and set(skipped) == {0}


def test_a_cache_that_cannot_be_written(tmp_path, config, tokenizer):
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    path = write_saved(tmp_path / "x", texts(100))
    with pytest.raises(DataError, match="cannot write"):
        open_tokens(config(path), tokenizer, seed=0)


def test_an_error_in_the_background_is_raised_by_take(tmp_path, config, tokenizer):
    rows = [[5, 6, 7]] * (4 * BLOCK)
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, [5, -6]], column="ids")
    cfg = config(path, tokens_column="ids", streaming=True, shuffle_buffer=BLOCK)
    train = open_tokens(cfg, tokenizer, seed=0).train
    n = 0
    with pytest.raises(DataError, match=f"the id -6.*documents {4 * BLOCK} to {4 * BLOCK}"):
        while train.take(9):
            n += 9
    assert n > 500
    before = train.state_dict()
    with pytest.raises(DataError, match="the id -6"):
        drain(train)
    assert train.state_dict() == before


def test_close_ends_the_thread(corpus, config, tokenizer):
    def running():
        return [thread for thread in threading.enumerate() if thread.name == "fastsae-tokens"]

    with open_tokens(config(corpus, shuffle_buffer=BLOCK), tokenizer, seed=0).train as train:
        train.take(1)
    assert not running()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts niceness per thread")
def test_only_the_background_gives_way():
    seen = {}

    def run():
        lower_priority()
        seen["background"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen["background"] == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before != 19


def test_the_number_of_threads_decides_nothing(tokenizer):
    encode = TextEncoder(tokenizer)
    assert encode(texts(100), 1) == encode(texts(100), 4) == [ids(row) for row in texts(100)]


ERRORS = {
    "no_file": ({"dataset": "{tmp}/nope.jsonl"}, "nope.jsonl.*no such file or folder"),
    "no_folder": ({"dataset": "./nope"}, "no such file or folder"),
    "unknown_on_the_hub": (
        {"dataset": "nobody/nothing-of-the-kind"},
        "cannot open.*nobody/nothing-of-the-kind",
    ),
    "no_data": ({"dataset": "{tmp}/none"}, "holds no data; known endings.*parquet"),
    "mixed": ({"dataset": "{tmp}/mixed"}, "json and text"),
    "split": ({"split": "tests"}, 'no split "tests"; there are: train'),
    "saved_split": ({"dataset": "{tmp}/saved", "split": "tests"}, 'no split "tests"; there are: train, test'),
    "validation_split": ({"validation_split": "dev"}, 'no split "dev"; there are: train'),
    "same_split": ({"validation_split": "train[:10%]"}, "overlaps data.split"),
    "sum_of_splits": ({"split": "train+test", "validation_split": "test"}, "overlaps data.split"),
    "nested_slices": ({"split": "train[:50%]", "validation_split": "train[:10%]"}, "overlaps data.split"),
    "column": ({"text_column": "body"}, 'no column "body"; there are: other, text'),
    "column_of_numbers": ({"text_column": "other"}, 'column "other" holds int, where strings'),
    "ids_of_text": ({"tokens_column": "text"}, 'column "text" holds str .*lists of token ids'),
    "negative": ({"dataset": "{tmp}/ids.jsonl", "tokens_column": "low"}, "the id -1, outside"),
    "vocabulary": (
        {"dataset": "{tmp}/ids.jsonl", "tokens_column": "high"},
        "the id 4002, outside.* of 4002;",
    ),
    "empty": ({"dataset": "{tmp}/empty"}, "is empty"),
    "blank": ({"dataset": "{tmp}/blank.jsonl"}, "leaves none to train on"),
    "corrupt_json": ({"dataset": "{tmp}/bad.jsonl"}, "JSON parse error"),
    "corrupt_parquet": ({"dataset": "{tmp}/bad.parquet"}, "magic bytes"),
    "all_held_out": (
        {"n_validation_tokens": 10**6},
        "491 positions.* 100 documents.*n_validation_tokens = 1000000.*validation_split",
    ),
    "short_training": ({"n_validation_tokens": 488}, "held out for validation.*context_size = 8"),
    "short": (
        {"dataset": "{tmp}/split", "validation_split": "test"},
        "1 documents with 3 tokens.*context_size = 8",
    ),
    "short_validation": (
        {"dataset": "{tmp}/split", "split": "test", "validation_split": "train"},
        "has 0 positions.* 1 documents, with data.context_size = 8",
    ),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """What the cases above name, most of it with one fault."""
    folder = tmp_path_factory.mktemp("faulty")
    write_jsonl(folder / "good.jsonl", texts(100))
    write_jsonl(folder / "mixed" / "a.jsonl", ["w1"])
    write_text(folder / "mixed" / "b.txt", ["w1"])
    write(folder / "none" / "x.dat", "x")
    write_saved_dict(folder / "saved", texts(10))
    write_saved(folder / "empty", [])
    write_jsonl(folder / "blank.jsonl", [""] * 5)
    write_jsonl(folder / "split" / "train.jsonl", ["w1 w2"])
    write_jsonl(folder / "split" / "test.jsonl", texts(100))
    write(folder / "bad.jsonl", '{"text": "a"}\n{"text": b\n')
    write(folder / "bad.parquet", "nonsense")
    write(folder / "ids.jsonl", '{"low": [5, -1], "high": [5, 4002]}\n')
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_name_the_value(faulty, config, tokenizer, case, streaming):
    fields, message = ERRORS[case]
    fields = {"dataset": "{tmp}/good.jsonl", **fields}
    cfg = config(fields.pop("dataset").format(tmp=faulty), streaming=streaming, **fields)
    with pytest.raises(FastSAEError, match=message) as raised:
        open_tokens(cfg, tokenizer, seed=0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_on_the_hub(tmp_path, config, tokenizer, monkeypatch, caplog, streaming):
    path = write_parquet(tmp_path / "x.parquet", texts(100))
    real, asked = datasets.load_dataset_builder, []

    def load_dataset_builder(name, subset, revision):
        asked.append((name, subset, revision))
        builder = real("parquet", data_files={"test": str(path)}, cache_dir=str(tmp_path / "hub"))
        builder.hash = f"commit of {revision}"
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    cfg = config("user/name", subset="en", split="test", revision="v1", streaming=streaming)
    assert len(content(open_tokens(cfg, tokenizer, seed=0).train)) > 400
    open_tokens(cfg.model_copy(update={"revision": "v2"}), tokenizer, seed=0)
    assert caplog.text.count("downloading all of user/name") == (not streaming), "once"
    assert asked == [("user/name", "en", "v1"), ("user/name", "en", "v2")]
    assert len(list(cfg.cache_dir.iterdir())) == 2
    with pytest.raises(DataError, match='no split "train"; there are: test'):
        open_tokens(cfg.model_copy(update={"split": "train"}), tokenizer, seed=0)


def test_a_tokenizer_without_a_fast_backend(corpus, config, tokenizer):
    class Slow:
        bos_token_id, eos_token_id = END, END
        get_vocab = staticmethod(tokenizer.get_vocab)

        def __call__(self, text, **options):
            return tokenizer(text, **options)

    slow, fast = (open_tokens(config(corpus), t, seed=0).validation.tokens for t in (Slow(), tokenizer))
    assert torch.equal(slow, fast)


def test_what_needs_a_tokenizer(corpus, config):
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        open_tokens(config(corpus), None, seed=0)
    with pytest.raises(ConfigError, match='"special" needs a tokenizer'):
        open_tokens(config(corpus, tokens_column="ids", exclude="special"), None, seed=0)


def test_the_settings_of_datasets_are_left_as_they_were(tmp_path, config, tokenizer, capfd):
    datasets.enable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    open_tokens(config(write_jsonl(tmp_path / "x.jsonl", texts(100))), tokenizer, seed=0)
    assert not datasets.are_progress_bars_disabled() and datasets.logging.get_verbosity() == verbosity
    assert capfd.readouterr().err == ""


def test_importing_loads_neither_datasets_nor_transformers():
    code = "import sys, fastsae.tokens; print([m for m in ('datasets', 'transformers', 'tokenizers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
