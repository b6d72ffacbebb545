"""encode_codes against dense autograd with the same latents selected: values and every gradient."""

import importlib

import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import missing, to_dense
from fastsae_kernels.decode import decode
from fastsae_kernels.encode import encode
from fastsae_kernels.encode_codes import encode_codes, encode_codes_ref
from fastsae_kernels.testing import assert_as_accurate, error, run
from tests.kernels.forms import BACKENDS, FORMS

MODULE = importlib.import_module("fastsae_kernels.encode_codes")
SIZES = [(1, 1, 1), (7, 5, 33), (10, 9, 97)]


def make(batch, d_in, d_sae, dtype, device):
    gen = torch.Generator().manual_seed(0)
    shapes = [(batch, d_in), (d_sae, d_in), (d_sae,), (d_in,)]
    x, W, b_enc, b_dec = (torch.randn(s, generator=gen).to(device, dtype) for s in shapes)
    return x, W.T, b_enc, b_dec


def options(kind, d_sae, device):
    if kind == "topk":
        return {"k": min(5, d_sae)}
    if kind == "relu":
        return {"width": 3}  # most rows have a tail
    if kind == "ragged relu":
        return {"width": None}
    return {"width": 3, "threshold": torch.linspace(-0.5, 1.5, d_sae, device=device)}


@pytest.mark.parametrize("kind", ["relu", "ragged relu", "jumprelu", "topk"])
@pytest.mark.parametrize("backend, dtype", FORMS, ids=str)
@pytest.mark.parametrize("batch, d_in, d_sae", SIZES)
def test_values_and_gradients(batch, d_in, d_sae, backend, dtype, kind, device, monkeypatch):
    monkeypatch.setattr(MODULE, "LEAST_ROWS", 8)  # several chunks
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    inputs, how = make(batch, d_in, d_sae, dtype, device), options(kind, d_sae, device)
    with use_backend(backend):
        codes = encode_codes(*inputs, **how)
        selected = (
            to_dense(codes, d_sae) != 0
        )  # an integer output: taken from the op, as its own pre_acts are
        assert (codes.counts == selected.sum(1)).all()
        assert_as_accurate(
            lambda *a: to_dense(encode_codes(*a, **how), d_sae),
            lambda *a: encode_codes_ref(*a, selected),
            inputs,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_without_a_tail_what_exceeds_the_width_is_left_out_and_counted(kind, backend, device, monkeypatch):
    monkeypatch.setattr(MODULE, "LEAST_ROWS", 8)
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    inputs, how = make(19, 9, 97, torch.float32, device), options(kind, 97, device)
    with use_backend(backend):
        whole, cut = encode_codes(*inputs, **how), encode_codes(*inputs, **how, n_tail=0)
    assert cut.tail_starts is None and cut.indices.shape == (19, 3) and cut.counts.max() > 3
    assert torch.equal(cut.counts, whole.counts)
    assert torch.equal(cut.indices, whole.indices[:19]) and torch.equal(cut.values, whole.values[:19])
    assert missing(cut) == (cut.counts - 3).clamp(min=0).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, None])
def test_the_band_gets_slots_of_value_0_and_no_gradient(width, backend, device):
    x, W_enc, b_enc, b_dec = make(17, 9, 97, torch.float32, device)
    threshold = torch.linspace(0.5, 1.5, 97, device=device)
    leaf = b_enc.clone().requires_grad_()
    with use_backend(backend):
        codes = encode_codes(x, W_enc, leaf, b_dec, threshold=threshold, bandwidth=2.0, width=width)
        codes.values.sum().backward()
        pre_acts, _ = encode(x - b_dec, W_enc, b_enc)
    assert torch.equal(codes.counts, (pre_acts > threshold - 1).sum(1).int())
    active = pre_acts > threshold
    torch.testing.assert_close(to_dense(codes, 97), pre_acts * active)
    assert (codes.counts > active.sum(1)).all()
    torch.testing.assert_close(leaf.grad, active.sum(0).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(i,) for i in range(4)] + [(0, 3), (1, 2)], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted, backend, device):
    leaves = [
        a.clone(memory_format=torch.preserve_format).requires_grad_()
        for a in make(7, 5, 33, torch.float32, device)
    ]
    some = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(leaves)]
    with use_backend(backend):
        truth = torch.autograd.grad(encode_codes(*leaves, k=4).values.square().sum(), leaves)
        found = torch.autograd.grad(encode_codes(*some, k=4).values.square().sum(), [some[i] for i in wanted])
    assert all(torch.equal(g, truth[i]) for g, i in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_of_0_passes_no_gradient_and_a_negative_one_does(backend, device):
    """As select_threshold's: thresholds below 0 make latents active at 0 and below."""
    x, W_enc = torch.eye(3, device=device), torch.zeros(40, 3, device=device).T
    b_enc = torch.tensor([-0.5, 0.0, 0.5, -2.0] + [-9.0] * 36, device=device).requires_grad_()
    with use_backend(backend):
        codes = encode_codes(x, W_enc, b_enc, threshold=torch.full((40,), -1.0, device=device), width=3)
        codes.values.sum().backward()
    assert codes.indices[:, :3].tolist() == [[0, 1, 2]] * 3
    assert b_enc.grad.tolist() == [3.0, 0.0, 3.0] + [0.0] * 37


@pytest.mark.parametrize("backend, half", [form for form in FORMS if form[1] != torch.float32], ids=str)
def test_dtypes_beside_one_another(backend, half, device):
    """x in fp32, W_enc in half precision, biases in fp32: each gradient in its own dtype, as accurate as its operands."""
    x, W_enc, b_enc, b_dec = make(9, 7, 40, torch.float32, device)
    W_enc = W_enc.to(half)
    leaves = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for a in (x, W_enc, b_enc, b_dec)
    ]
    with use_backend(backend):
        codes = encode_codes(*leaves, k=5)
        dense = to_dense(codes, 40)
        got = torch.autograd.grad(codes.values.float().square().sum(), leaves)
    exact = [a.detach().double().requires_grad_() for a in (x, W_enc, b_enc, b_dec)]
    acts = encode_codes_ref(*exact, dense != 0)
    truth = torch.autograd.grad(acts, exact, 2 * dense.double())
    for g, t, leaf in zip(got, truth, leaves, strict=True):
        assert g.dtype == leaf.dtype and error(g, t) <= 8 * torch.finfo(half).eps


def test_fp64_is_fp64(device):
    inputs = make(33, 17, 97, torch.float64, device)
    selected = to_dense(encode_codes(*inputs, k=5), 97) != 0
    got = run(lambda *a: to_dense(encode_codes(*a, k=5), 97), inputs)
    truth = run(lambda *a: encode_codes_ref(*a, selected), inputs)
    assert all(error(got[name], t) < 1e-14 for name, t in truth.items()) and got.keys() == truth.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_sae_by_autograd(backend, device):
    """decode(encode_codes(x)) against the dense form, through both ops and their backward passes."""
    x, W_enc, b_enc, b_dec = make(9, 7, 40, torch.float32, device)
    W_dec = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)).to(device)

    def op(x, W_enc, b_enc, b_dec, W_dec):
        return decode(encode_codes(x, W_enc, b_enc, b_dec, k=6), W_dec, b_dec)

    selected = to_dense(encode_codes(x, W_enc, b_enc, b_dec, k=6), 40) != 0

    def ref(x, W_enc, b_enc, b_dec, W_dec):
        return encode_codes_ref(x, W_enc, b_enc, b_dec, selected) @ W_dec + b_dec

    with use_backend(backend):
        assert_as_accurate(op, ref, (x, W_enc, b_enc, b_dec, W_dec))


@pytest.mark.parametrize("kind", ["relu", "ragged relu", "topk"])
def test_empty_batch(kind, device):
    codes = encode_codes(*make(0, 5, 33, torch.float32, device), **options(kind, 33, device))
    assert codes.counts.shape == (0,) and len(codes.indices) == 0


def test_compiles_whole(device):
    inputs = make(7, 5, 33, torch.float32, device)
    compiled = torch.compile(lambda *a: encode_codes(*a, k=4), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs).values, encode_codes(*inputs, k=4).values)


def test_errors_name_what_is_wrong(device):
    x, W_enc, b_enc, b_dec = make(7, 5, 33, torch.float32, device)
    with pytest.raises(ValueError, match=r"k is 34, .* d_sae, 33"):
        encode_codes(x, W_enc, b_enc, b_dec, k=34)
    with pytest.raises(ValueError, match=r"k is 3 and threshold is given"):
        encode_codes(x, W_enc, b_enc, b_dec, k=3, threshold=b_enc)
    with pytest.raises(ValueError, match=r"x is \[7, 4\], but must be \[any, 5\]"):
        encode_codes(x[:, 1:], W_enc, b_enc)
