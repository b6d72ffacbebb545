"""The command line from the outside: one line and exit code 2 for what a user can mend, JSON for programs."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from unittest.mock import Mock

import pytest
import torch

import fastsae
from fastsae import cli
from fastsae.configfile import to_toml
from fastsae.report import ConsoleSink
from tests.tiny_models import gpt2_config, save_model


@pytest.fixture
def run(config, tmp_path, monkeypatch, capfd):
    """run(*arguments, config overrides) -> exit code, standard output, standard error."""

    def call(*arguments, command="train", **overrides):
        overrides = {"name": None, **overrides}
        name = overrides.pop("name")
        file = tmp_path / "config.toml"
        text = to_toml(config(**overrides))
        file.write_text(
            "\n".join(line for line in text.splitlines() if name or not line.startswith('name = "run"'))
        )
        monkeypatch.setattr(sys, "argv", ["fastsae", command, str(file), *map(str, arguments)])
        return outcome(capfd)

    return call


def outcome(capfd):
    capfd.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capfd.readouterr()
    return code, out, err


def error_line(err):
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    return line


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fastsae", "info", "--help"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0 and "memory" in done.stdout.lower(), done.stderr


def test_json_is_the_last_line_and_eval_repeats_it(run, tmp_path, monkeypatch, capfd):
    code, out, err = run("--json", "--name", "mine")
    assert code == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["run_dir"] == str(tmp_path / "runs" / "mine") and figures["n_tokens"] == 5000
    wanted = {
        "tokens_per_second",
        "l0",
        "fvu",
        "dead_fraction",
        "reconstruction_score",
        "ce_clean",
        "ce_spliced",
        "ce_zero",
    }
    assert wanted <= figures.keys()
    assert 0 <= figures["dead_fraction"] <= 1 and figures["ce_zero"] > 1

    monkeypatch.setattr(
        sys, "argv", ["fastsae", "eval", str(tmp_path / "runs" / "mine"), "--json", "--device", "cpu"]
    )
    code, out, err = outcome(capfd)
    again = json.loads(out.splitlines()[-1])
    assert code == 0 and again["fvu"] == pytest.approx(figures["fvu"], rel=1e-5)
    assert again["n_validation_tokens"] == figures["n_validation_tokens"] >= 600
    assert again["ce_spliced"] == pytest.approx(figures["ce_spliced"], rel=1e-5)


def test_several_hook_points_give_maps(run):
    code, out, _ = run("--json", "--hook", "blocks.*.hook_mlp_out", "--n-tokens", "300")
    figures = json.loads(out.splitlines()[-1])
    assert code == 0
    assert list(figures["l0"]) == [f"blocks.{i}.hook_mlp_out" for i in range(3)]


def test_resume(run, tmp_path, monkeypatch, capfd):
    """What is finished says so; a changed field is refused by its name; else it goes on."""

    def again(*flags):
        monkeypatch.setattr(sys, "argv", ["fastsae", "train", "--resume", str(folder), *flags])
        return outcome(capfd)

    folder = tmp_path / "runs" / "mine"
    assert run("--name", "mine", "--n-tokens", "3000", "--set", "save.checkpoint_every=1000")[0] == 0
    code, out, _ = again()
    assert code == 0 and "is finished: 3,000 activations" in out
    shutil.rmtree(folder / "saes")
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    code, _, err = again("--lr", "0.5")
    assert code == 2 and "step.lr = 0.5" in err
    for flags, words in {("--name", "x"): "name does not go", ("--d-sae", "16,32"): "drop the lists"}.items():
        code, _, err = again(*flags)
        assert code == 2 and words in err
    code, out, err = again("--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["n_tokens"] == 3000, err
    assert (folder / "saes").is_dir()


def test_several_values_are_an_sae_each(run, tmp_path):
    """All combinations, from the same forwards, each in a folder of its own."""
    code, out, err = run(
        "--activation", "topk", "--d-sae", "24,48", "--k", "2,3", "--seed", "5,6", "--lr", "1e-3",
        "--n-tokens", "600", "--name", "grid", "--json",
    )  # fmt: skip
    assert code == 0, err
    figures = json.loads(out.splitlines()[-1])
    names = [key.split("/")[1] for key in figures["l0"]]
    assert names == [f"topk-d_sae={d}-k={k}-seed={s}" for d in (24, 48) for k in (2, 3) for s in (5, 6)]
    assert all(figures["l0"][key] == int(key.split("-k=")[1][0]) for key in figures["l0"])
    folders = sorted((tmp_path / "runs" / "grid" / "saes").rglob("cfg.json"))
    assert len(folders) == 8
    first, second = (fastsae.load(folder.parent) for folder in folders[:2])
    assert first.cfg == second.cfg and not torch.equal(first.W_dec, second.W_dec)


def test_one_of_several_seeds_is_a_run_of_that_seed_but_for_its_order(run, tmp_path):
    assert run("--seed", "5,6", "--n-tokens", "600", "--name", "two")[0] == 0
    assert run("--seed", "5", "--n-tokens", "600", "--name", "one")[0] == 0
    two, one = (fastsae.load_all(tmp_path / "runs" / name) for name in ("two", "one"))
    (alone,) = one.values()
    assert torch.equal(next(s for key, s in two.items() if "seed=5" in key).W_dec, alone.W_dec)


def test_fresh_names(run, tmp_path):
    for _ in range(2):
        assert run("--n-tokens", "50")[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_closing_table_names_the_baselines(run):
    code, out, _ = run("--n-tokens", "300")
    assert code == 0
    for word in ("score", "fvu", "mean ablation", "principal components", "random dictionary"):
        assert word in out


def test_the_closing_table_says_what_its_figures_are_of():
    from fastsae.report import closing_table

    assert "not validated" in str(closing_table({"h": {"fvu": 0.5, "l0": 3.0}}).title)
    assert "held-out" in str(closing_table({"h": {"fvu": 0.5, "n_validation_tokens": 100}}).title)


def test_dry_run_checks_prints_and_writes_nothing(run, tmp_path):
    code, out, err = run("--dry-run")
    assert code == 0, err
    assert "l1_coefficient = 5.0" in out and "ring" in out and "total" in out
    assert not (tmp_path / "runs").exists()
    code, out, _ = run("--dry-run", "--json")
    shown = json.loads(out.splitlines()[-1])
    row = 16 * 4
    assert shown["mem_bytes"]["ring"] == (1200 + 4 * 16 - 1 + 128) * row
    assert shown["mem_bytes"]["saes"] == 3 * 4 * (48 * 33 + 16)


def test_info(monkeypatch, capfd, run, tmp_path):
    monkeypatch.setattr(sys, "argv", ["fastsae", "info", "--json"])
    code, out, _ = outcome(capfd)
    assert code == 0
    assert json.loads(out)["torch"] == version("torch")
    code, out, _ = run(command="info")
    assert code == 0 and "predicted memory" in out
    assert run("--name", "there", "--n-tokens", "50")[0] == 0
    monkeypatch.setattr(sys, "argv", ["fastsae", "info", str(tmp_path / "runs" / "there" / "config.toml")])
    assert outcome(capfd)[0] == 0, "the config of a run that exists"


BAD_FLAGS = [
    (["--hook", "blocks.1.hook_resid_pots"], ["blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"]),
    (["--set", "step.lrr=1"], ["step.lrr", '"lr"']),
    (["--k", "3"], ["k = 3", "topk"]),
    (["--d-sae", "24,x"], ["--d-sae 24,x", "integer"]),
    (["--l1", "1,"], ["--l1 1,", "number"]),
    (["--seed", "5,5"], ["seed=5", "folder name"]),
    (["--d-sae", "24,48", "--k", "2,3"], ["k", "topk"]),
    (["--activation", "topk", "--l1", "1"], ["l1_coefficient", "topk"]),
    (["--activation", "topk", "--k", "49"], ["k = 49", "d_sae = 48"]),
    (["--lr", "-1"], ["step.lr", "-1"]),
    (["--lr", "nan"], ["step.lr", "nan"]),
    (["--lr", "inf"], ["step.lr", "inf"]),
    (["--n-tokens", "0"], ["n_tokens", "0"]),
    (["--n-tokens", "1.5"], ["n-tokens", "1.5", "whole"]),
    (["--n-tokens", "inf"], ["n-tokens", "inf", "whole"]),
    (["--n-tokens", "many"], ["n-tokens", "many", "whole"]),
    (["--n-tokens", "1,2"], ["n-tokens", "1,2", "whole"]),
    (["--set", "n_tokens=true"], ["n_tokens", "True"]),
    (["--set", "data.exclude=[-3]"], ["data.exclude", "-3"]),
    (["--wandb", ""], ["log.wandb"]),
    (["--set", "my-key=1"], ["my-key"]),
    (["--set", "data.my-key=1"], ["data.my-key"]),
    (["--name", "n" * 300], ["name", "100 bytes"]),
    (["--d-sae", "100000000000"], ["sae.d_sae", "memory"]),
    (["--wandb", "a/b:c"], ["wandb", "a/b:c"]),
    (["--batch-size", "-4"], ["step.batch_size", "-4"]),
    (["--set", "ring.capacity=100"], ["ring.capacity = 100", "128", "64", "256"]),
    (["--set", "ring.capacity=-5"], ["ring.capacity", "-5"]),
    (["--context-size", "64"], ["data.context_size = 64", "32"]),
    (["--dataset", "nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--set", "data.text_column=body"], ["body", "text"]),
    (["--model", "no/such/folder"], ["no/such/folder"]),
    (["--device", "tpu"], ["tpu"]),
    (["--device", "cuda:9"], ["cuda:9"]),
    (["--precision", "fp8"], ["step.precision", "fp8"]),
    (["--init-from", "nowhere"], ["nowhere"]),
    (["--name", "a/b"], ["a/b"]),
    (["--set", "data.n_validation_tokens=10000000"], ["validation"]),
    (["--set", "sae=5"], ["sae", "5"]),
    (["--set", "step=5"], ["step", "5"]),
    (["--set", "saes=5"], ["saes", "5"]),
]


@pytest.mark.parametrize(
    "flags, words", BAD_FLAGS, ids=lambda v: " ".join(v) if v and v[0][:2] == "--" else ""
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, flags, words):
    code, _, err = run(*flags)
    line = error_line(err)
    assert code == 2 and "Traceback" not in err
    for word in words:
        assert word in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.jsonl", "", ["empty"]),
        ("corrupt.jsonl", '{"text": "w1 w2\n{{{', ["corrupt.jsonl"]),
        ("corrupt.parquet", "PAR1 no parquet", ["corrupt.parquet"]),
        ("short.jsonl", '{"text": "w1"}\n', []),
    ],
)
def test_datasets_that_cannot_be_used(run, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    code, _, err = run("--dataset", tmp_path / name)
    assert code == 2 and "Traceback" not in err
    assert all(word in error_line(err) for word in words)
    assert not (tmp_path / "runs").exists()


def test_a_model_folder_without_weights(run, tmp_path):
    save_model("gpt2", tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    gpt2_config().save_pretrained(tmp_path / "model")
    code, _, err = run("--model", tmp_path / "model")
    assert code == 2 and "weights" in error_line(err) and not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_touched(run, tmp_path):
    assert run("--name", "twice", "--n-tokens", "50")[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / "twice").rglob("*")}
    code, _, err = run("--name", "twice", "--n-tokens", "50")
    assert code == 2 and "exists already" in error_line(err)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / "twice").rglob("*")}


def test_a_runs_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("--runs-dir", tmp_path / "file")
    assert code == 2 and "cannot write" in error_line(err)


def test_version(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["fastsae", "--version"])
    assert outcome(capfd)[:2] == (0, f"{cli.__version__}\n")


def test_unknown_flags_and_files(monkeypatch, capfd, run):
    assert run("--lrr", "1")[0] == 2
    monkeypatch.setattr(sys, "argv", ["fastsae", "train", "none.toml"])
    code, _, err = outcome(capfd)
    assert code == 2 and "none.toml" in error_line(err)
    monkeypatch.setattr(sys, "argv", ["fastsae", "eval", "nowhere"])
    code, _, err = outcome(capfd)
    assert code == 2 and "nowhere" in error_line(err)


@pytest.mark.parametrize(
    "text, flags",
    [
        ("saes = [1]", []),
        ("saes = [1]", ["--k", "2"]),
        ('[[saes]]\nk = 4\nactivation = "topk"', ["--set", "step=5"]),
        ("[[saes]]\nstep = 3", ["--lr", "1"]),
        (None, ["--set", "sae=5"]),
    ],
)
def test_values_of_a_wrong_kind_are_one_line_too(text, flags, tmp_path, monkeypatch, capfd):
    file = tmp_path / "odd.toml"
    file.write_text(text or "")
    monkeypatch.setattr(sys, "argv", ["fastsae", "train", *([] if text is None else [str(file)]), *flags])
    code, _, err = outcome(capfd)
    assert code == 2 and error_line(err) and "Traceback" not in err


def test_the_bar_is_stopped_whatever_happens(run, monkeypatch):
    """Else the terminal has no cursor."""
    closed, original = [], ConsoleSink.close
    monkeypatch.setattr(ConsoleSink, "close", lambda self: closed.append(self) or original(self))
    for error, code in ((fastsae.DataError("x"), 2), (KeyboardInterrupt, 130)):
        monkeypatch.setattr(sys.modules["fastsae.train"], "_ring", Mock(side_effect=error))
        assert run()[0] == code
    assert len({*closed}) == 2


def test_a_flag_that_an_entry_would_hide_is_refused(run, tmp_path):
    entries = [{"k": 4, "activation": "topk"}, {"name": "two", "step": {"lr": 1e-3}}]
    code, _, err = run("--k", "2", saes=entries)
    assert code == 2 and "saes[0]" in error_line(err) and "sae.k" in error_line(err)
    code, _, err = run("--lr", "2", saes=entries)
    assert code == 2 and "saes[1]" in error_line(err) and "step.lr" in error_line(err)
    assert run("--n-tokens", "5e1", "--batch-size", "64", saes=entries)[0] == 0


def test_json_has_null_for_what_is_not_finite(run):
    """Zeros for a layer norm's scale divide by zero: no cross-entropy, and the reason why."""
    code, out, _ = run("--json", "--hook", "blocks.1.ln1.hook_scale", "--n-tokens", "300")
    figures = json.loads(out.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0 and figures["reconstruction_score"] is figures["ce_zero"] is None
    assert "not finite" in figures["ce_reason"]


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    code, _, err = run("--lr", "1e30", "--n-tokens", "300", "--name", "wild")
    assert code == 2 and "NaN or infinite" in error_line(err)
    assert not (tmp_path / "runs" / "wild" / "saes").exists()


def test_eval_wants_a_context_that_fits(run, tmp_path, monkeypatch, capfd):
    assert run("--name", "mine", "--n-tokens", "50")[0] == 0
    arguments = ["fastsae", "eval", str(tmp_path / "runs" / "mine"), "--set"]
    for assignment, code in (("data.context_size=99", 2), ("device=cpu", 0)):
        monkeypatch.setattr(sys, "argv", [*arguments, assignment])
        assert outcome(capfd)[0] == code
