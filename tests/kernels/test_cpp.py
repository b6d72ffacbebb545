"""How the C++ forms are compiled, found again and done without; what they compute, the tests of the ops hold them to."""

import logging
import shutil
import subprocess
import sys

import pytest
import torch

import fastsae_kernels as ops
from fastsae_kernels import _cpp
from fastsae_kernels._launch import backend
from fastsae_kernels.codes import Codes

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="there is no C++ compiler"
)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a process that has not asked for the C++ forms yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTSAE_CPP", raising=False)
    monkeypatch.setattr(_cpp, "FLAGS", (*_cpp.FLAGS, "-O0"))  # in a quarter of the time
    _cpp._library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    _cpp._library.cache_clear()


@needs_compiler
def test_they_are_there_where_a_compiler_is():
    assert _cpp.is_available() and backend(torch.ones(1)) == "cpp"
    assert ops.backend_name("cpu") == f"C++ {_cpp.identity()}"
    kinds = [torch.float64, torch.float16, torch.int64]
    assert {backend(torch.ones(1, dtype=kind)) for kind in kinds} == {"torch"}, "dtypes that they do not take"


@needs_compiler
def test_they_are_compiled_once(anew, monkeypatch):
    assert _cpp.is_available()
    made = list((anew / "fastsae" / "cpp").iterdir())
    assert [path.suffix for path in made] == [".so"], "and nothing is left lying about"
    ran = []
    original = _cpp._output
    monkeypatch.setattr(_cpp, "_output", lambda *command: ran.append(command) or original(*command))
    _cpp._library.cache_clear()
    assert _cpp.is_available() and len(ran) == 1, "asked what it defines, and found"
    monkeypatch.setattr(_cpp, "FLAGS", (*_cpp.FLAGS, "-g"))
    _cpp._library.cache_clear()
    assert _cpp.is_available() and len(list((anew / "fastsae" / "cpp").iterdir())) == 2, (
        "other flags, other file"
    )


@needs_compiler
def test_a_folder_that_cannot_be_written_costs_the_cache_alone(anew):
    (anew / "fastsae").write_text("a file")
    assert _cpp.is_available()


def test_without_a_compiler_the_torch_forms_run(anew, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, "fastsae_kernels"):
        assert not _cpp.is_available()
    assert "there is no C++ compiler" in caplog.text
    with (
        pytest.raises(ValueError, match="'cpp', but its forms cannot be compiled here"),
        ops.use_backend("cpp"),
    ):
        pass


def test_a_compiler_that_fails_is_a_warning(anew, monkeypatch, caplog):
    def fails(*command):
        raise subprocess.CalledProcessError(1, command, stderr=b"cannot find -lgomp")

    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(_cpp, "_output", fails)
    assert not _cpp.is_available()
    assert "cannot find -lgomp" in caplog.text


def test_they_can_be_turned_off(anew, monkeypatch):
    monkeypatch.setenv("FASTSAE_CPP", "0")
    assert not _cpp.is_available()


@needs_compiler
def test_the_bits_do_not_depend_on_the_number_of_threads():
    gen = torch.Generator().manual_seed(0)
    pre_acts, g_acts = (torch.randn(300, 260, generator=gen) for _ in range(2))
    W_dec, target = torch.randn(260, 33, generator=gen), torch.randn(300, 33, generator=gen)

    def everything() -> list[torch.Tensor]:
        codes = ops.select_threshold(pre_acts)
        out = ops.decode_loss(codes, W_dec, torch.zeros(33), target)
        t = ops.transpose(codes, 260)
        dense = ops.dense_codes_grad(g_acts.clone(), pre_acts.relu())
        topk = ops.select_topk(pre_acts, 7)
        return [*codes[:3], *topk[:3], *out[:5], *t[:5], *ops.grad_rows(t, codes.values, out.g), *dense]

    n_threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(everything())
    finally:
        torch.set_num_threads(n_threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_an_index_that_is_no_latent_is_refused():
    counts = torch.ones(1, dtype=torch.int32)
    for index in (2, 7, -1):
        codes = Codes(torch.full((1, 1), index, dtype=torch.int32), torch.ones(1, 1), counts)
        with ops.use_backend("cpp"), pytest.raises(ValueError, match=r"goes up to \d+, but d_sae is 2"):
            ops.transpose(codes, 2)
