"""The crossover of a machine: how it is found, kept, and taken into a run."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch

from fastsae import calibrate
from fastsae.cache import cache_folder
from fastsae.prepare import prepare

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Calls of `measure`, which finds 0.07; the cache folder is empty."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda device, precision: calls.append(precision) or 0.07)
    return calls


def test_it_is_measured_once_per_machine(measured, monkeypatch, tmp_path):
    assert [calibrate.crossover(CPU) for _ in range(3)] == [0.07] * 3 and len(measured) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 123)
    calibrate.crossover(CPU)
    assert len(measured) == 2, "other threads, another machine"
    calibrate.crossover(CPU, "bf16")
    assert measured == ["fp32", "fp32", "bf16"], "each precision has its own"
    assert len(json.loads((tmp_path / "fastsae" / "crossover.json").read_text())) == 3


@pytest.mark.parametrize("text", ["", "[1]", '{"a": ', '{"KEY": "0.5"}', '{"KEY": 7.0}', '{"KEY": NaN}'])
def test_a_file_that_is_no_cache_is_made_again(text, measured, tmp_path):
    (tmp_path / "fastsae").mkdir()
    (tmp_path / "fastsae" / "crossover.json").write_text(text.replace("KEY", calibrate._key(CPU, "fp32")))
    assert calibrate.crossover(CPU) == calibrate.crossover(CPU) == 0.07 and len(measured) == 1


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(measured, tmp_path):
    (tmp_path / "fastsae").write_text("a file")
    assert calibrate.crossover(CPU) == calibrate.crossover(CPU) == 0.07 and len(measured) == 2


def test_whoever_has_no_home_has_a_cache_nevertheless(monkeypatch, tmp_path):
    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", expanduser)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_folder() == tmp_path / "fastsae"


@pytest.mark.parametrize("cross, expected", [(0.05, 0.05), (0.001, 0.0), (0.9, 0.25)])
def test_it_lies_where_the_sparse_path_falls_behind(cross, expected, monkeypatch):
    """By times that are powers of the share, which its interpolation takes exactly."""
    monkeypatch.setattr(
        calibrate,
        "_seconds",
        lambda path, _precision, _x, _n, share: 1.0 if path == "dense" else math.sqrt(share / cross),
    )
    assert calibrate.measure(CPU) == pytest.approx(expected, rel=1e-2)


def test_a_run_writes_it_into_its_config_and_obeys_what_is_said(measured, config):
    assert prepare(config()).config.step.crossover == 0.07
    said = prepare(config(name="said", step={"crossover": 0.2, "lr": 1e-3, "batch_size": 128}))
    assert said.config.step.crossover == 0.2 and len(measured) == 1
    prepare(config(name="dense", step={"path": "dense", "lr": 1e-3, "batch_size": 128}))
    assert len(measured) == 1, "nothing to choose"
    fields = {"lr": 1e-3, "batch_size": 128, "precision": "bf16"}
    prepare(config(name="bf16", step=fields))
    assert measured == ["fp32", "bf16"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_it_is_a_share_on_this_machine(precision, monkeypatch):
    monkeypatch.setitem(calibrate.SHAPES, "cpu", (128, 64, 1024))
    assert 0 <= calibrate.measure(CPU, precision) <= 0.25
