"""Activations on disk: what is written is what the hooks saw, and a run from disk is a run."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae import cli, shards
from fastsae.checkpoint import checkpoints
from fastsae.collect import harvest
from fastsae.config import ModelConfig
from fastsae.errors import ConfigError, DataError, RunError
from fastsae.harvest import DiskFeeder
from fastsae.revisit import evaluate_run
from fastsae.ring import RingBuffer
from fastsae.shards import Shards
from fastsae.source import load_source
from tests.worlds import HOOK

HOOKS = ["blocks.0.hook_resid_post", HOOK]


@pytest.fixture
def small_shards(monkeypatch):
    """Some 300 rows in each."""
    monkeypatch.setattr(sys.modules["fastsae.collect"], "SHARD_BYTES", 300 * 2 * 16 * 4)


@pytest.fixture
def folder(config, tmp_path, small_shards):
    """2000 rows of two hook points."""
    harvest(config(n_tokens=2000, model={"hook": HOOKS}), tmp_path / "acts")
    return tmp_path / "acts"


def everything(folder):
    store = Shards(folder)
    names = [*store.widths, "tokens", "contexts", "positions"]
    parts = [store.read(piece, names) for piece in store.pieces(128)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def test_rows_are_what_the_hooks_see(folder, config):
    """Put together again by context and position, and run through the model once more."""
    rows, store = everything(folder), Shards(folder)
    assert store.n_rows == 2000 and len(store.shards) > 5 and store.widths == dict.fromkeys(HOOKS, 16)
    n = int(rows["contexts"].max()) + 1
    tokens = torch.zeros(n, 16, dtype=torch.int64)
    at = rows["contexts"].long(), rows["positions"].long()
    tokens[at] = rows["tokens"].long()
    assert (rows["positions"] > 0).all(), "the BOS does not count"
    source = load_source(ModelConfig(name=config().model.name, hook=tuple(HOOKS)), torch.device("cpu"))
    seen = {}
    hooks = [(h.resolved, lambda a, name=h.name: seen.__setitem__(name, a)) for h in source.hooks]
    source.forward(tokens, hooks, stop=True)
    for name in HOOKS:
        torch.testing.assert_close(rows[name], seen[name][at], rtol=1e-4, atol=1e-5)


def test_a_shard_ends_behind_a_forward(config, tmp_path, monkeypatch):
    """Whatever its size: nothing that was computed is thrown away, but at the very end."""
    harvest(config(n_tokens=600), tmp_path / "whole")
    monkeypatch.setattr(sys.modules["fastsae.collect"], "SHARD_BYTES", 1)
    told = []
    harvest(config(n_tokens=600), tmp_path / "small", advance=told.append)
    forwards = [n for n in told if n]
    assert [shard.n_rows for shard in Shards(tmp_path / "small").shards] == forwards and len(forwards) > 9
    small, whole = everything(tmp_path / "small"), everything(tmp_path / "whole")
    assert len(small[HOOK]) == 600 and all(torch.equal(small[name], rows) for name, rows in whole.items())


def test_text_of_which_nothing_counts_ends(config, tmp_path):
    """And is not read for ever, epoch by epoch."""
    texts = ["w2 " * 40] * 3 + ["w1 " * 40] * 40
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text.strip()}) + "\n" for text in texts))
    fields = {"dataset": str(file), "exclude": [0, 1], "on_exhausted": "repeat", "n_validation_tokens": 95}
    with pytest.raises(DataError, match="no position of a whole epoch counts"):
        harvest(config(n_tokens=300, data=fields), tmp_path / "acts")


def test_local_names_mean_the_same_from_every_folder(world, config, tmp_path, monkeypatch):
    """What was harvested by a relative path is trained on, resumed and validated from anywhere, and by its name."""
    root = Path(world["text"]).parent
    monkeypatch.chdir(root)
    near = {"model": {"name": "model"}, "data": {"dataset": "text.jsonl"}}
    harvest(config(n_tokens=600, **near), tmp_path / "acts")
    named = {"dataset": "text.jsonl", "activations": str(tmp_path / "acts")}
    result = fastsae.train(config(n_tokens=600, save={"checkpoint_every": 128}, data=named))
    monkeypatch.chdir(tmp_path)
    assert evaluate_run(result.run_dir, fastsae.load_config)[HOOK]["fvu"] < 1
    from tests.test_resume import copy_of, same, weights

    again = fastsae.resume(copy_of(result.run_dir, checkpoints(result.run_dir)[0], tmp_path))
    assert same(weights(again), weights(result))


def test_an_interrupted_harvest_continues(folder, config, tmp_path, small_shards):
    """To the same bytes, in two parts, with a shard that was torn, one that was lost, and one left half written."""
    half = tmp_path / "half"
    harvest(config(n_tokens=900, model={"hook": HOOKS}), half)
    harvest(config(n_tokens=2000, model={"hook": HOOKS}), tmp_path / "other")
    lost, torn = sorted(folder.glob("*.safetensors"))[1:3]
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    lost.unlink()
    torn.write_bytes(before[torn.name][:-7] + b"1234567")
    (folder / "0000099.part").write_bytes(b"half")
    told = []
    done = harvest(config(n_tokens=2000, model={"hook": HOOKS}), folder, advance=told.append)
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before
    assert done.n_rows == sum(told) == 2000
    assert all((tmp_path / "other" / name).read_bytes() == data for name, data in before.items())
    harvest(config(n_tokens=2000, model={"hook": HOOKS}), half)
    assert Shards(half).n_rows == 2000


def test_ctrl_c_leaves_whole_shards(config, tmp_path, small_shards, folder):
    told = []

    def advance(n):
        told.append(n)
        if sum(told) > 1000:
            os.kill(os.getpid(), signal.SIGINT)
            told.append(-(10**6))

    cut = tmp_path / "cut"
    cfg = config(n_tokens=2000, model={"hook": HOOKS})
    done = harvest(cfg, cut, advance=advance)
    assert done.interrupted and 0 < done.n_rows < 2000 and not Shards(cut).manifest["next"] is None
    assert not harvest(cfg, cut).interrupted
    assert all(torch.equal(t, everything(folder)[name]) for name, t in everything(cut).items())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": {"hook": [HOOK]}}, "widths"),
        ({"seed": 5}, "seed = 0, not 5"),
        ({"data": {"exclude": "none"}}, "data"),
        ({"ring": {"dtype": "bfloat16"}}, "dtype = float32, not bfloat16"),
    ],
)
def test_other_activations_go_elsewhere(folder, config, change, words):
    fields = {"n_tokens": 2000, "model": {"hook": HOOKS}, **change}
    with pytest.raises(ConfigError, match=words):
        harvest(config(**fields), folder)


def test_a_full_disk_is_refused_beforehand(config, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage(10**6, 0, 10**5))
    with pytest.raises(ConfigError, match=r"5,000 activations take 371\.09 KiB .* 97\.66 KiB are free"):
        harvest(config(n_tokens=5000), tmp_path / "acts")
    assert not list((tmp_path / "acts").iterdir())
    (tmp_path / "acts" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        harvest(config(n_tokens=10), tmp_path / "acts")


def test_every_row_is_trained_on_once_in_an_order_of_all_shards(folder):
    store = Shards(folder)
    ring = RingBuffer({HOOK: 16}, 600, 50, n_rows=10**6, max_write=64, device=torch.device("cpu"))
    feeder = DiskFeeder(store, [HOOK], ring, size=64, seed=1, repeat=False)
    batches = [batch[HOOK].clone() for batch in ring.batches(feeder.forward)]
    drawn, rows = torch.cat(batches), everything(folder)[HOOK]
    ends = torch.tensor([shard.n_rows for shard in store.shards]).cumsum(0)
    assert Counter(map(bytes, drawn.numpy())) == Counter(map(bytes, rows.numpy()))
    where = torch.cdist(drawn, rows, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    shard_of = torch.bucketize(where, ends, right=True)
    assert all(len(shard_of[i : i + 50].unique()) >= 3 for i in range(0, 1500, 50)), (
        "a batch is of many shards"
    )


def test_a_run_from_disk(folder, config, monkeypatch):
    """No model is loaded; what is saved says what it is of, and can be validated; to the bit the same each time."""
    monkeypatch.setattr(
        sys.modules["fastsae.origin"], "load_source", lambda *a: pytest.fail("the model was loaded")
    )
    fields = {
        "n_tokens": 1900,
        "data": {"activations": str(folder)},
        "model": {"hook": [HOOK]},
    }
    result = fastsae.train(config(**fields))
    again = fastsae.train(config(**fields, name="again"))
    (sae,), (other,) = result.saes.values(), again.saes.values()
    assert torch.equal(sae.W_dec, other.W_dec) and result.n_tokens == 1900
    assert sae.metadata["hook_name"] == HOOK and sae.metadata["model_name"] == config().model.name
    assert result.metrics[HOOK]["fvu"] < 1
    both = fastsae.train(config(**{**fields, "model": {"hook": []}}, name="both"))
    assert list(both.saes) == HOOKS
    figures = evaluate_run(result.run_dir, fastsae.load_config)
    assert figures[HOOK]["fvu"] < 1


def test_it_is_resumed_to_the_bit(folder, config, tmp_path):
    from tests.test_resume import copy_of, same, weights

    fields = {"n_tokens": 5000, "data": {"activations": str(folder), "on_exhausted": "repeat"}}
    whole = fastsae.train(config(**fields, save={"checkpoint_every": 500}))
    saved = checkpoints(whole.run_dir)
    assert len(saved) == 10
    for at in saved[:-1]:
        again = fastsae.resume(copy_of(whole.run_dir, at, tmp_path))
        assert same(weights(again), weights(whole)), at
    cut = copy_of(whole.run_dir, saved[2], tmp_path / "b")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"].pop()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"data\.activations .* other activations"):
        fastsae.resume(cut)


def test_it_ends_where_the_rows_end(folder, config):
    with pytest.warns(UserWarning, match="ended after 2,000"):
        result = fastsae.train(config(n_tokens=5000, data={"activations": str(folder)}))
    assert result.n_tokens == 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_rows_are_read_from_anywhere_and_each_block_is_checked_alone(dtype, size, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", 64)
    acts = torch.randn(300, 5).to(dtype)
    columns = {name: torch.arange(300, dtype=torch.int32) + i for i, name in enumerate(shards.COLUMNS)}
    writer = shards.Writer(tmp_path, {"widths": {"h": 5}, "dtype": str(dtype)[6:], "facts": {}})
    writer.write(0, {"h": acts, **columns}, {}, {})
    store = Shards(tmp_path)
    pieces = store.pieces(size)
    for piece in [*pieces[::-1], *pieces]:  # the second time without a look at the checksums
        read = store.read(piece, ["h", "contexts"])
        assert torch.equal(read["h"], acts[piece.start : piece.stop])
        assert torch.equal(read["contexts"], columns["contexts"][piece.start : piece.stop])
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    row = data.index(bytes(acts[130].view(torch.uint8).tolist()))
    data[row] ^= 1
    path.write_bytes(bytes(data))
    store = Shards(tmp_path)
    assert not store.is_whole(0)
    assert torch.equal(store.read(shards.Piece(0, 0, 128), ["h"])["h"], acts[:128])
    assert torch.equal(store.read(shards.Piece(0, 192, 300), ["h"])["h"], acts[192:])
    with pytest.raises(DataError, match="missing or damaged"):
        store.read(shards.Piece(0, 150, 151), ["h"])


@pytest.mark.parametrize("damage", ["cut", "header length", "header text", "dtype"])
def test_a_file_that_is_damaged_after_its_first_check_is_found(damage, tmp_path):
    acts = torch.randn(300, 5)
    columns = {name: torch.arange(300, dtype=torch.int32) + i for i, name in enumerate(shards.COLUMNS)}
    writer = shards.Writer(tmp_path, {"widths": {"h": 5}, "dtype": "float32", "facts": {}})
    writer.write(0, {"h": acts, **columns}, {}, {})
    store, (path,) = Shards(tmp_path), tmp_path.glob("*.safetensors")
    store.read(shards.Piece(0, 0, 300), ["h"])
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[:-5000],
            "header length": b"\xff" * 8 + data[8:],
            "header text": data.replace(b'"h":{', b'"h":[', 1),
            "dtype": data.replace(b'"F32"', b'"I32"', 1),
        }[damage]
    )
    if damage == "cut":
        with pytest.raises(DataError, match="missing or damaged"):
            store.read(shards.Piece(0, 0, 300), ["h", *shards.COLUMNS])
    fresh = Shards(tmp_path)
    assert not fresh.is_whole(0)
    with pytest.raises(DataError, match="missing or damaged"):
        fresh.read(shards.Piece(0, 0, 10), ["h", *shards.COLUMNS])


def test_ctrl_c_while_shards_are_made_again_is_said(folder, config):
    lost = sorted(folder.glob("*.safetensors"))[1:4]
    for path in lost:
        path.unlink()
    told = []

    def advance(n):
        told.append(n)
        if len(told) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    cfg = config(n_tokens=2000, model={"hook": HOOKS})
    done = harvest(cfg, folder, advance=advance)
    assert done.interrupted and done.n_rows < 2000 and not lost[-1].exists()
    assert not harvest(cfg, folder).interrupted and all(path.exists() for path in lost)


def test_what_is_wrong_with_a_folder(folder, config, tmp_path):
    with pytest.raises(DataError, match="holds no activations"):
        fastsae.train(config(data={"activations": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"has no blocks\.9.*it has blocks\.0"):
        fastsae.train(config(data={"activations": str(folder)}, model={"hook": ["blocks.9.hook_mlp_out"]}))
    for fields in ({"data": {"context_size": 32}}, {"model": {"name": "gpt2"}}):
        fields = {**fields, "data": {"activations": str(folder), **fields.get("data", {})}}
        with pytest.raises(ConfigError, match=r"= (32|gpt2), but .* was made with .*; drop it"):
            fastsae.train(config(**fields))
    (folder / "0000002.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"0000002.*missing or damaged"):
        fastsae.train(config(n_tokens=2000, data={"activations": str(folder)}))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        fastsae.train(config(name="other", data={"activations": str(folder)}))


def test_the_command_line(world, config, tmp_path, monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["fastsae", *map(str, argv)])
        try:
            cli.main()
        except SystemExit as error:
            return error.code, capsys.readouterr()
        return 0, capsys.readouterr()

    data = ["--dataset", world["text"], "--context-size", 16]
    folder = tmp_path / "acts"
    code, out = run(
        "harvest", "--out", folder, "--model", world["model"], "--hook", HOOK, *data, "--n-tokens", 1500,
        "--set", "data.n_validation_tokens=300", "--set", f"data.cache_dir={world['cache']}", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "1,500 activations" in out.out and "ended" not in out.out, out.err
    code, out = run(
        "harvest", "--out", tmp_path / "all", "--model", world["model"], "--hook", HOOK, *data, "--n-tokens", 10**6,
        "--set", "data.n_validation_tokens=300", "--set", f"data.cache_dir={world['cache']}", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "the dataset ended before 1,000,000" in out.out, out.err
    code, out = run(
        "train", "--activations", folder, "--d-sae", 32, "--batch-size", 100,
        "--runs-dir", tmp_path / "runs", "--name", "disk", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, out.err
    assert json.loads(out.out.splitlines()[-1])["n_tokens"] == 1500
    code, out = run("eval", tmp_path / "runs" / "disk", "--json")
    assert code == 0 and json.loads(out.out.splitlines()[-1])["n_validation_tokens"] >= 300
