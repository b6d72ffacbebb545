"""How the C++ forms are compiled, found again and done without; what they compute, the tests of the ops hold them to."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

import fastsae_kernels as ops
from fastsae_kernels import _cpp
from fastsae_kernels._launch import _backend, backend
from fastsae_kernels.codes import Codes

needs_compiler = pytest.mark.skipif(
    os.environ.get("FASTSAE_CPP") == "0" or not any(shutil.which(name) for name in _cpp.COMPILERS),
    reason="there is no C++ compiler, or it is not wanted",
)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a process that has not asked for the C++ forms yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTSAE_CPP", raising=False)
    monkeypatch.setattr(_cpp, "FLAGS", (*_cpp.FLAGS, "-O0"))  # in a quarter of the time
    caches = _cpp._found, _backend
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


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
    _cpp._found.cache_clear()
    assert _cpp.is_available() and len(ran) == 1, "asked what it defines, and found"
    monkeypatch.setattr(_cpp, "FLAGS", (*_cpp.FLAGS, "-g"))
    _cpp._found.cache_clear()
    assert _cpp.is_available() and len(list((anew / "fastsae" / "cpp").iterdir())) == 2, (
        "other flags, other file"
    )


@needs_compiler
def test_a_folder_that_cannot_be_written_costs_the_cache_alone(anew, monkeypatch):
    (anew / "fastsae").write_text("a file")
    (anew / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(anew / "temporary"))
    assert _cpp.is_available() and not list((anew / "temporary").iterdir()), "nor is anything left"


@needs_compiler
def test_a_folder_that_others_can_write_is_not_used(anew):
    """What lies there may be somebody else's."""
    folder = anew / "fastsae" / "cpp"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert _cpp.is_available() and not list(folder.iterdir())


@needs_compiler
def test_a_cache_that_can_only_be_read_is_used(anew, monkeypatch):
    assert _cpp.is_available()
    _cpp._found.cache_clear()
    monkeypatch.setattr(_cpp, "_build", None)
    assert _cpp.is_available()


def test_without_a_compiler_the_torch_forms_run(anew, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO, "fastsae_kernels"):
        assert not _cpp.is_available()
    assert "there is no C++ compiler" in caplog.text
    assert backend(torch.ones(1)) == "torch" and ops.backend_name("cpu") == "PyTorch ops"
    assert ops.select_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2).indices.tolist() == [[1, 2]]
    with (
        pytest.raises(ValueError, match=r"'cpp', but its forms cannot be had: there is no C\+\+ compiler"),
        ops.use_backend("cpp"),
    ):
        pass


@needs_compiler
def test_the_next_compiler_is_tried(anew, monkeypatch, caplog):
    """Where $CXX does not say which."""
    ran, original = [], _cpp._output

    def without_openmp(*command):
        ran.append(command[0])
        if command[0] == _cpp.COMPILERS[0]:
            raise subprocess.CalledProcessError(1, command, stderr=b"unsupported option -fopenmp")
        return original(*command)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(_cpp, "_output", without_openmp)
    assert _cpp.is_available() == (len({*ran}) > 1), "with a second one only"
    monkeypatch.setenv("CXX", f"{_cpp.COMPILERS[0]} -pipe")
    _cpp._found.cache_clear()
    with caplog.at_level(logging.WARNING, "fastsae_kernels"):
        assert not _cpp.is_available()
    assert "makes none that run: unsupported option -fopenmp" in caplog.text, "said without being asked"


def test_a_compiler_that_cannot_be_understood_is_said(anew, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "g++ '-pipe")
    assert not _cpp.is_available()
    assert "g++ '-pipe makes none that run: No closing quotation" in caplog.text


def test_they_are_for_systems_on_which_they_were_tried(anew, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not _cpp.is_available() and "FASTSAE_CPP=1" in str(_cpp.why_not())


@needs_compiler
def test_a_torn_file_is_made_again(anew, monkeypatch):
    assert _cpp.is_available()
    built = next((anew / "fastsae" / "cpp").glob("*.so"))
    elsewhere = anew / "elsewhere" / "fastsae" / "cpp" / built.name  # what is loaded once is not loaded again
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(b"torn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(anew / "elsewhere"))
    _cpp._found.cache_clear()
    assert _cpp.is_available() and elsewhere.stat().st_size > 1000


def test_they_can_be_turned_off(anew, monkeypatch):
    monkeypatch.setenv("FASTSAE_CPP", "0")
    assert not _cpp.is_available()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype):
    """Of no op: all of them on more rows and columns than a thread takes at a time."""
    gen = torch.Generator().manual_seed(0)
    pre_acts, g_acts = (torch.randn(300, 1100, generator=gen).to(dtype) for _ in range(2))
    W, target = torch.randn(1100, 33, generator=gen), torch.randn(300, 33, generator=gen)
    W_dec, b_dec, threshold = W.to(dtype), torch.zeros(33), torch.rand(1100, generator=gen)
    scalars = torch.tensor([1e-3, 0.1, 0.001, 1.0, 0.0, 0.0])

    def everything() -> list[torch.Tensor]:
        codes, (batchtopk, least) = ops.select_threshold(pre_acts), ops.select_batchtopk(pre_acts, 9)
        out, t = ops.decode_loss(codes, W_dec, b_dec, target), ops.transpose(codes, 1100)
        dense = ops.dense_codes_grad(g_acts.clone(), pre_acts.relu())
        jump = ops.dense_jumprelu_grad(g_acts.clone(), pre_acts, threshold, bandwidth=0.5)
        moved, kept = torch.empty(300, 33, dtype=torch.bfloat16), [W.clone(), *torch.zeros(2, 1100, 33)]
        ops.move_rows(target, torch.randperm(300, generator=torch.Generator().manual_seed(1)), moved)
        ops.update_rows(t, codes.values, out.g, *kept, scalars=scalars, betas=(0.9, 0.999), eps=1e-8)
        norms = ops.grad_norms(t, codes.values, out.g)
        few = [*codes[:3], *ops.select_topk(pre_acts, 7)[:3], *batchtopk[:3], least, *out[:5], *t[:5]]
        many = [*ops.grad_rows(t, codes.values, out.g), *norms, *dense, *jump, moved, *kept]
        paged = ops.select_threshold(pre_acts, width=64, n_tail=None)
        signed = ops.select_topk(pre_acts, 7, positive=False)
        values = paged.values.clone().requires_grad_()
        ops.decode(paged._replace(values=values), W_dec).float().square().sum().backward()
        more = [*paged, *signed[:3], values.grad, *ops.transpose(paged, 1100)[:5]]
        return [
            *few,
            *many,
            *more,
            ops.decode(codes, W_dec),
            *ops.dense_loss(target.to(dtype), b_dec, target),
        ]

    n_threads = torch.get_num_threads()
    try:
        with ops.use_backend("cpp"):
            found = []
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                found.append(everything())
                assert torch.get_num_threads() == n, "which they leave as it is"
    finally:
        torch.set_num_threads(n_threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("index", [2, 7, -1])
def test_an_index_that_is_no_latent_is_refused(index):
    codes = Codes(
        torch.full((1, 1), index, dtype=torch.int32), torch.ones(1, 1), torch.ones(1, dtype=torch.int32)
    )
    W_dec, zeros = torch.ones(2, 3), torch.zeros(1, 3)
    with ops.use_backend("cpp"):
        for run in (
            lambda: ops.transpose(codes, 2),
            lambda: ops.decode(codes, W_dec),
            lambda: ops.decode_loss(codes, W_dec, zeros[0], zeros),
        ):
            with pytest.raises(ValueError, match=f"codes.indices has {index}, but d_sae is 2"):
                run()


@needs_compiler
def test_an_index_is_found_wherever_it_stands():
    """In a later row and on a tail row; what lies in free slots does not count."""
    pre_acts = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    codes = ops.select_threshold(pre_acts, width=8, n_tail=None)
    W_dec = torch.ones(70, 3)
    assert codes.indices.shape[0] > 40
    free = codes._replace(indices=codes.indices.clone())
    free.indices[0, int(codes.counts[0]) :] = 99
    with ops.use_backend("cpp"):
        expected = ops.decode(codes, W_dec)
        assert torch.equal(ops.decode(free, W_dec), expected)
        for place in ((39, 0), (40, 0)):
            bad = codes._replace(indices=codes.indices.clone())
            bad.indices[place] = 70
            for run in (lambda c=bad: ops.transpose(c, 70), lambda c=bad: ops.decode(c, W_dec)):
                with pytest.raises(ValueError, match=r"codes.indices has 70, but d_sae is 70"):
                    run()


@needs_compiler
def test_no_memory_is_an_error_of_python():
    """Not the end of the process: room for one row's latents that cannot be had."""
    with pytest.raises(MemoryError, match="what select_topk works with"):
        x = torch.ones(1)
        _cpp.call("select_topk", False, x, 0, 2**60, 1, True, x, x, x)


@needs_compiler
def test_a_row_that_is_not_there_is_not_moved():
    x = torch.zeros(4, 3)
    for rows, slots in (([0, 4], None), ([-1, 0], None), ([0, 1], [0, 4])):
        places = None if slots is None else torch.tensor(slots)
        with ops.use_backend("cpp"), pytest.raises(IndexError, match="not one of source's 4"):
            ops.move_rows(x, torch.tensor(rows), x.clone(), places)
