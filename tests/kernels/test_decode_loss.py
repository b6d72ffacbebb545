import pytest
import torch
from torch import Tensor

from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import Codes, entries, to_dense
from fastsae_kernels.decode_loss import DecodeLoss, decode_loss, decode_loss_ref
from fastsae_kernels.testing import Tensors, assert_close
from tests.kernels.forms import BACKENDS, FORMS
from tests.kernels.test_decode import SIZES, make_codes, make_weights

WIDE = [([130, 0, 129], 131, 65, 130, None), ([128, 1], 128, 129, 128, None)]  # beside the widest single tile


def make_inputs(counts, d_sae, d, width, n_tail, dtype, device="cpu") -> tuple[Codes, Tensor, Tensor, Tensor]:
    codes = make_codes(counts, d_sae, width, n_tail, dtype, device)
    target = torch.randn(len(counts), d, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    return codes, *make_weights(d_sae, d, dtype, device), target


def cast(a, dtype: torch.dtype):
    if isinstance(a, Codes):
        return a._replace(values=a.values.to(dtype))
    return a.to(dtype) if isinstance(a, Tensor) else a


def at_slots(out: DecodeLoss, codes: Codes) -> Tensors:
    """The reference's tensors with g_values laid out as the codes are."""
    owners, latents, slots = entries(codes)
    g_values = out.g_values.new_zeros(codes.indices.shape)
    g_values.view(-1)[slots] = out.g_values[owners.long(), latents.long()]
    return {**out._asdict(), "g_values": g_values}


def holds(inputs, *, g_dtype: torch.dtype | None = None, **options) -> DecodeLoss:
    """The op's output, having passed the oracle."""
    out = decode_loss(*inputs, out_dtype=g_dtype, return_x_hat=True, **options)
    dtype = inputs[1].dtype
    rival, truth = (
        at_slots(
            decode_loss_ref(*(cast(a, t) for a in inputs), **{k: cast(v, t) for k, v in options.items()}),
            inputs[0],
        )
        for t in (dtype, torch.float64)
    )
    assert_close(out._asdict(), rival, truth)
    return out


@pytest.mark.parametrize("l1", [True, False], ids=["l1", "no l1"])
@pytest.mark.parametrize("name, dtype", FORMS, ids=str)
@pytest.mark.parametrize("counts, d_sae, d, width, n_tail", SIZES + WIDE, ids=str)
def test_decode_loss(counts, d_sae, d, width, n_tail, name, dtype, l1, device):
    inputs = make_inputs(counts, d_sae, d, width, n_tail, dtype, device)
    options = {"l1": torch.tensor(1.5, device=device), "norms": inputs[1].norm(dim=1)} if l1 else {}
    with use_backend(name):
        out = holds(inputs, **options)
    assert {t.dtype for t in out[1:5]} == {torch.float32} and out.finite.dtype == torch.bool
    assert bool(out.finite)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("n_tail", [None, 3])
def test_l1_moves_positive_values_only(name, n_tail, device):
    """Norms and coefficient apart; every seventh value is 0 and has the product alone."""
    inputs = make_inputs([9, 2, 4], 12, 6, 9 if n_tail is None else 4, n_tail, torch.float32, device)
    codes = inputs[0]
    with use_backend(name):
        without, with_l1 = decode_loss(*inputs), holds(inputs, l1=torch.tensor(6.0, device=device))
    more = with_l1.g_values - without.g_values
    assert bool((codes.values == 0).any())
    torch.testing.assert_close(more, (codes.values > 0) * 2.0, rtol=0, atol=1e-5)
    assert torch.equal(with_l1.l1, without.l1)


@pytest.mark.parametrize("name, out_dtype", [form for form in FORMS if form[1] != torch.float32], ids=str)
def test_out_dtype_rounds_g_and_nothing_else(name, out_dtype, device):
    inputs = make_inputs([5, 5, 3], 40, 33, 5, None, torch.float32, device)
    with use_backend(name):
        wide, out = decode_loss(*inputs), decode_loss(*inputs, out_dtype=out_dtype, return_x_hat=True)
    assert out.x_hat.dtype == out_dtype and wide.x_hat is None
    assert torch.equal(out.g, wide.g.to(out_dtype))
    assert torch.equal(out.g_values, wide.g_values) and torch.equal(out.mse, wide.mse)
    torch.testing.assert_close(out.g_sum, out.g.float().sum(0))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("n_tail", [None, 3])
@pytest.mark.parametrize("where", ["values", "target", "W_dec"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_flag_is_down_where_a_loss_is_not_finite(name, n_tail, where, bad, device):
    codes, W_dec, b_dec, target = make_inputs(
        [9, 2, 4], 12, 6, 9 if n_tail is None else 4, n_tail, torch.float32, device
    )
    if where == "values":
        codes.values[0, 1] = bad
    elif where == "target":
        target[0, 3] = bad
    else:
        W_dec[codes.indices[0, 1]] = bad
    with use_backend(name):
        out = decode_loss(codes, W_dec, b_dec, target)
    assert not out.finite and not out.mse[0].isfinite()


@pytest.mark.parametrize("name", BACKENDS)
def test_free_slots(name, device):
    """A NaN in row 0 of W_dec, which free slots name, reaches nothing; their g_values are 0."""
    codes, W_dec, b_dec, target = make_inputs([2, 0, 5], 9, 6, 5, None, torch.float32, device)
    free = torch.arange(5, device=device) >= codes.counts[:, None]
    codes.indices.clamp_(min=1).masked_fill_(free, 0)
    W_dec[0] = torch.nan
    with use_backend(name):
        out = decode_loss(codes, W_dec, b_dec, target, l1=torch.tensor(1.0, device=device))
    assert bool(out.finite) and out.g_values.isfinite().all()
    assert not out.g_values[free].any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("n_tail", [None, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_counts_where_it_is_used(name, n_tail, bad, device):
    """Not in free slots, which name latent 0, nor in the gradients where there is no l1."""
    codes, *rest = make_inputs([9, 2, 4], 12, 6, 9 if n_tail is None else 4, n_tail, torch.float32, device)
    codes.indices.view(-1)[entries(codes).slots] += 1  # in no input is latent 0 active
    rest[0] = torch.cat([rest[0], rest[0][:1]])
    for latent in (0, int(codes.indices[0, 1])):
        norms = torch.ones(13, device=device)
        norms[latent] = bad
        active = to_dense(codes, 13)[:, latent] != 0
        with use_backend(name):
            out = decode_loss(codes, *rest, norms=norms)
            with_l1 = decode_loss(codes, *rest, norms=norms, l1=torch.tensor(1.0, device=device))
        assert torch.equal(out.l1.isfinite(), ~active) and out.g_values.isfinite().all()
        assert torch.equal(~with_l1.g_values.isfinite(), (codes.values > 0) & (codes.indices == latent))
        assert bool(active.any()) == (latent > 0)


def test_fp64(device):
    inputs = make_inputs([2, 9, 0, 4], 11, 5, 4, 2, torch.float64, device)
    out = holds(inputs, l1=torch.tensor(0.5, dtype=torch.float64, device=device))
    assert {t.dtype for t in out[:5]} == {torch.float64}


@pytest.mark.parametrize("n_tail", [None, 2])
def test_custom_op(n_tail, device):
    codes, *rest = make_inputs([2, 9, 0, 4], 11, 5, 4 if n_tail else 9, n_tail, torch.float32, device)
    args = (*codes, *rest, torch.tensor(1.0, device=device), None, torch.float32, True)
    torch.library.opcheck(torch.ops.fastsae.decode_loss, args)


def test_errors():
    codes, W_dec, b_dec, target = make_inputs([2, 3], 9, 6, 3, None, torch.float32)
    with pytest.raises(ValueError, match=r"target is \[1, 6\], but must be \[2, 6\]"):
        decode_loss(codes, W_dec, b_dec, target[:1])
    with pytest.raises(ValueError, match=r"b_dec is \[5\], but must be \[6\]"):
        decode_loss(codes, W_dec, b_dec[:5], target)
    with pytest.raises(ValueError, match=r"norms is \[6\], but must be \[9\]"):
        decode_loss(codes, W_dec, b_dec, target, norms=b_dec)
    with pytest.raises(ValueError, match=r"l1 is \[1\], but must be \[\]"):
        decode_loss(codes, W_dec, b_dec, target, l1=torch.ones(1))
    with pytest.raises(ValueError, match=r"out_dtype is torch.int32, but must be a floating dtype"):
        decode_loss(codes, W_dec, b_dec, target, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"codes.counts is int64"):
        decode_loss(codes._replace(counts=codes.counts.long()), W_dec, b_dec, target)
