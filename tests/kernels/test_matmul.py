"""matmul, and oneDNN's products wherever they are made: the same numbers as torch's, whichever of the two this CPU prefers."""

import importlib

import pytest
import torch

from fastsae_kernels import encode_codes, matmul, use_backend
from fastsae_kernels.encode import encode, encode_ref
from fastsae_kernels.testing import assert_as_accurate
from tests.kernels.forms import BACKENDS

module = importlib.import_module("fastsae_kernels.matmul")
has_onednn = torch.backends.mkldnn.is_available() and module._works()
BY = [False, pytest.param(True, marks=pytest.mark.skipif(not has_onednn, reason="torch without oneDNN"))]


@pytest.fixture(params=BY, ids=["torch", "onednn"])
def by_onednn(request, monkeypatch):
    monkeypatch.setattr(module, "_is_faster", lambda: request.param)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 70 * 8)
    monkeypatch.setattr(module, "LEAST_ROWS", 3)
    return request.param


def operands(m, k, n, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=gen).to(dtype) for shape in [(m, k), (k, n), (n,)]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 7, 33), (0, 5, 4), (64, 65, 97), (257, 31, 70)])
def test_as_torch_whatever_the_strides(m, k, n, dtype, by_onednn):
    a, b, bias = operands(m, k, n, dtype)
    for bias_as in (bias.repeat_interleave(2)[::2], bias[:1].expand(n)):
        assert torch.equal(matmul(a, b, bias_as), matmul(a, b, bias_as.contiguous()))
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            assert_as_accurate(matmul, lambda a, b: a @ b, (left, right), grads=False)
            assert_as_accurate(
                lambda a, b, c: matmul(a, b, c), lambda a, b, c: a @ b + c, (left, right, bias)
            )
            assert matmul(left, right).is_contiguous() and matmul(left, right).dtype == dtype


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoders_product(dtype, backend, by_onednn):
    """In blocks that do not divide the batch."""
    x, W_enc, b_enc = operands(31, 13, 70, dtype)
    W_enc = W_enc.T.contiguous().T
    with use_backend(backend):
        assert_as_accurate(lambda *a: encode(*a)[0], lambda *a: encode_ref(*a)[0], (x, W_enc, b_enc))
        codes = encode_codes(x, W_enc, b_enc, k=5)
        expected = encode(x, W_enc, b_enc)[0].topk(5)
    assert torch.equal(codes.values.sort(descending=True).values, expected.values.clamp_min(0))


@pytest.mark.parametrize("packed_from", [1, 1000])
def test_weights_as_they_are_and_packed(packed_from, by_onednn, monkeypatch):
    monkeypatch.setattr(module, "PACKED_FROM", packed_from)
    x, W_enc, b_enc = operands(31, 13, 70)
    W_enc = W_enc.T.contiguous().T
    assert_as_accurate(lambda *a: encode(*a)[0], lambda *a: encode_ref(*a)[0], (x, W_enc, b_enc))


def test_rows_that_overlap(by_onednn):
    a, b = torch.arange(40.0).unfold(0, 8, 1), torch.ones(8, 3)
    assert torch.equal(matmul(a, b), a.contiguous() @ b)
    assert torch.equal(matmul(b.T, a.T), (a.contiguous() @ b).T)


@pytest.mark.parametrize(
    "wrong",
    [
        {"b": torch.ones(4, 2)},
        {"bias": torch.ones(())},
        {"bias": torch.ones(3)},
        {"b": torch.ones(3, 2).double()},
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    fits = {"a": torch.ones(5, 3), "b": torch.ones(3, 2), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        matmul(**{**fits, **wrong})


def test_another_default_dtype_changes_nothing():
    if not has_onednn:
        pytest.skip("torch without oneDNN")
    torch.set_default_dtype(torch.float64)
    try:
        assert module._works()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_cpu_that_nobody_may_read(monkeypatch):
    def refused(*_, **__):
        raise PermissionError

    monkeypatch.setattr(module.Path, "read_text", refused)
    assert isinstance(module._cpu(), str)


def test_not_a_number_gets_through(by_onednn):
    a, b, bias = operands(9, 5, 6)
    a[2, 3], a[4, 0] = float("nan"), float("inf")
    found = matmul(a, b, bias)
    assert found.isfinite().all(1).tolist() == [i not in (2, 4) for i in range(9)]
    assert found[2].isnan().all()


@pytest.mark.parametrize("name", ["_linear_pointwise", "_reorder_linear_weight"])
def test_operators_that_have_changed_are_not_taken(name, monkeypatch):
    """They are private ones of torch."""
    own = getattr(torch.ops.mkldnn, name, None)
    if own is None:
        pytest.skip("torch without oneDNN")
    assert module._works()

    def refuses(*arguments):
        raise TypeError

    for stand_in in (
        refuses,
        lambda *arguments: own(*arguments) + 1 if name == "_linear_pointwise" else refuses(),
    ):
        monkeypatch.setattr(torch.ops.mkldnn, name, stand_in)
        assert not module._works()


@pytest.mark.parametrize("vendor, takes", [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_on_an_amd_cpu_with_avx_512(vendor, takes, monkeypatch):
    monkeypatch.setattr(module, "_cpu", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(module, "_works", lambda: True)
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    for capability in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda now=capability: now)
        assert module._is_faster.__wrapped__() is (takes and capability == "AVX512")
