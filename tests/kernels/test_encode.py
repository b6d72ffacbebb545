"""encode against its reference: values, group maxima, gradients; both backends, both variants."""

import importlib

import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.encode import encode, encode_ref, group_max_ref, group_max_torch
from fastsae_kernels.testing import assert_as_accurate, assert_close, error
from tests.kernels.forms import BACKENDS, CPP, TRITON_DTYPES

SIZES = [(1, 1, 1), (3, 7, 33), (33, 65, 97), (32, 64, 128), (5, 96, 31), (70, 13, 257)]
FORMS = [("torch", dtype, "auto") for dtype in (torch.float32, torch.bfloat16, torch.float16)]
FORMS += [(*own, "auto") for own in CPP]
FORMS += [("triton", dtype, variant) for dtype in TRITON_DTYPES for variant in ("fused", "library")]


def make(batch: int, d_in: int, d_sae: int, dtype: torch.dtype, device: torch.device):
    gen = torch.Generator().manual_seed(0)
    x, W, b_enc, b_dec = (
        torch.randn(shape, generator=gen).to(device)
        for shape in [(batch, d_in), (d_sae, d_in), (d_sae,), (d_in,)]
    )
    return x.to(dtype), W.to(dtype).T, b_enc.to(dtype), b_dec.to(dtype)


@pytest.mark.parametrize("backend, dtype, variant", FORMS, ids=str)
@pytest.mark.parametrize("batch, d_in, d_sae", SIZES)
@pytest.mark.parametrize("relu", [False, True])
def test_encode(batch, d_in, d_sae, backend, dtype, relu, variant, device):
    def op(x, W_enc, b_enc, b_dec):
        return encode(x, W_enc, b_enc, b_dec, relu=relu, variant=variant)[0]

    def ref(x, W_enc, b_enc, b_dec):
        return encode_ref(x, W_enc, b_enc, b_dec, relu)[0]

    inputs = make(batch, d_in, d_sae, dtype, device)
    with use_backend(backend):
        assert_as_accurate(op, ref, inputs)
        pre_acts, group_max = encode(*inputs, relu=relu, variant=variant)
    assert torch.equal(group_max, group_max_ref(pre_acts)), "maxima of the values as they were stored"


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_rows(dtype, name, device, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastsae_kernels.encode"), "CHUNK_ROWS", 8)
    inputs = make(21, 7, 70, dtype, device)
    with use_backend(name):
        assert_as_accurate(lambda *a: encode(*a)[0], lambda *a: encode_ref(*a)[0], inputs)
        pre_acts, group_max = encode(*inputs)
    assert torch.equal(group_max, group_max_ref(pre_acts))
    assert torch.equal(group_max_torch(pre_acts), group_max)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(i,) for i in range(4)] + [(0, 3), (1, 2)], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted, backend, device):
    inputs = make(5, 7, 33, torch.float32, device)
    leaves = [a.clone(memory_format=torch.preserve_format).requires_grad_() for a in inputs]
    some = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(leaves)]
    with use_backend(backend):
        truth = torch.autograd.grad(encode(*leaves, relu=True)[0].square().sum(), leaves)
        found = torch.autograd.grad(encode(*some, relu=True)[0].square().sum(), [some[i] for i in wanted])
    assert all(torch.equal(g, truth[i]) for g, i in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_out_of_half_operands_is_more_accurate(backend, device):
    x, W_enc, b_enc, _ = make(33, 65, 97, torch.float16, device)
    truth = encode_ref(x.double(), W_enc.double(), b_enc.double())[0]
    with use_backend(backend):
        wide, _ = encode(x, W_enc, b_enc, out_dtype=torch.float32)
    assert wide.dtype == torch.float32 and error(wide, truth) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    with use_backend(backend):
        pre_acts, group_max = encode(*make(0, 5, 65, torch.float32, device))
    assert pre_acts.shape == (0, 65) and group_max.shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_values_and_maxima(backend, bad, device):
    x, W_enc, b_enc, b_dec = make(5, 7, 70, torch.float32, device)
    x[2, 3] = bad
    with use_backend(backend):
        pre_acts, group_max = encode(x, W_enc, b_enc, b_dec)
    assert not pre_acts[2].isfinite().any() and pre_acts[[0, 1, 3, 4]].isfinite().all()
    assert torch.equal(group_max.isnan(), group_max_ref(pre_acts).isnan())


def test_one_wrong_latent_is_found(device):
    inputs = make(33, 65, 97, torch.float32, device)
    good, truth = encode_ref(*inputs)[0], encode_ref(*(t.double() for t in inputs))[0]
    wrong = good.clone()
    wrong[3, 5] *= 1.0001
    with pytest.raises(AssertionError, match="pre"):
        assert_close({"pre": wrong}, {"pre": good}, {"pre": truth})


def test_compiles_whole(device):
    inputs = make(33, 65, 97, torch.float32, device)
    compiled = torch.compile(lambda *a: encode(*a), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs)[0], encode(*inputs)[0])


def test_opcheck(device):
    x, W_enc, b_enc, _ = make(3, 7, 33, torch.float32, device)
    x.requires_grad_()
    torch.library.opcheck(torch.ops.fastsae.encode.default, (x, W_enc, b_enc, True, torch.float32, "fused"))


def test_errors_name_what_is_wrong(device):
    x, W_enc, b_enc, b_dec = make(3, 7, 33, torch.float32, device)
    with pytest.raises(ValueError, match=r"x is \[3, 6\], but must be \[any, 7\]"):
        encode(x[:, 1:], W_enc, b_enc)
    with pytest.raises(
        ValueError, match=r"W_enc \[7, 33\] has strides \[33, 1\], .* contiguous \[d_sae, d_in\]"
    ):
        encode(x, W_enc.contiguous(), b_enc)
    with pytest.raises(TypeError, match=r"W_enc is a ndarray, but must be a tensor"):
        encode(x, W_enc.cpu().numpy(), b_enc)
    with pytest.raises(ValueError, match=r"b_enc is \[32\]"):
        encode(x, W_enc, b_enc[1:])
    with pytest.raises(ValueError, match=r"b_dec is int64"):
        encode(x, W_enc, b_enc, b_dec.long())
    with pytest.raises(ValueError, match=r"variant is 'best'"):
        encode(x, W_enc, b_enc, variant="best")
    with pytest.raises(ValueError, match=r"out_dtype"):
        encode(x, W_enc, b_enc, out_dtype=torch.int32)


@pytest.mark.parametrize("variant", ["auto", "fused"])
@pytest.mark.parametrize("d_in", [64, 2048])
def test_a_bias_in_fp32_is_not_rounded(d_in, variant, device):
    """It decides which latents near a threshold are active, whatever the width of the product's operands."""
    x, W_enc, _, _ = make(5, d_in, 40, torch.float16, device)
    b_enc = torch.full((40,), -3.0237, device=device)
    with use_backend("triton"):
        got, _ = encode(x, W_enc, b_enc, variant=variant)
    truth = (x.double() @ W_enc.double() + b_enc.double()).half()
    assert (got - truth).abs().max() <= torch.finfo(torch.float16).eps * truth.abs().max()
    zeros, _ = encode(torch.zeros_like(x), W_enc, b_enc, variant=variant)
    assert torch.equal(zeros, b_enc.half().expand_as(zeros))
