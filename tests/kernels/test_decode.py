import pytest
import torch
from torch import Tensor

from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import Codes, missing, tail_starts
from fastsae_kernels.decode import decode, decode_ref
from fastsae_kernels.testing import assert_as_accurate
from tests.kernels.forms import BACKENDS, FORMS

# counts (their number is the batch), d_sae, d_out, width, n_tail
SIZES = [
    ([1], 1, 1, 1, None),
    ([3, 0, 2], 13, 7, 3, None),
    ([5, 5, 5, 5], 32, 129, 5, None),
    ([0, 33, 20, 1], 97, 257, 33, None),  # a tile of 32 entries and one more
    ([64, 64], 64, 65, 64, None),  # every latent
    ([0, 0, 0], 16, 8, 4, None),
    ([], 16, 8, 4, None),
    ([2, 9, 0, 4, 8, 41], 50, 31, 4, 15),  # tails of 2, 1 and 10 rows, and 2 rows free
    ([90, 1], 90, 17, 36, 2),
    ([3, 9, 12], 20, 19, 4, 2),  # a tail too short: 8 of the last row's latents have no slot
    ([1, 1], 5, 3, 2, 0),
    ([2, 0, 3] * 43, 7, 5, 3, None),  # more than two blocks of 64 inputs
]


def make_codes(
    counts: list[int], d_sae: int, width: int, n_tail: int | None, dtype=torch.float32, device="cpu"
) -> Codes:
    """Random codes with these counts, laid out as codes.py says; every seventh value is 0."""
    gen = torch.Generator().manual_seed(0)
    batch, true = len(counts), torch.tensor(counts, dtype=torch.int32)
    starts = None if n_tail is None else tail_starts(true, width)
    indices = torch.zeros(batch + (n_tail or 0), width, dtype=torch.int32)
    values = torch.zeros(indices.shape)
    for b, count in enumerate(counts):
        latents = torch.randperm(d_sae, generator=gen)[:count].sort().values
        acts = torch.rand(count, generator=gen) + 0.1
        acts[3::7] = 0
        for page in range(-(-count // width)):
            row = b if page == 0 else batch + int(starts[b]) + page - 1
            if row < len(indices):
                here = latents[page * width : (page + 1) * width]
                indices[row, : len(here)] = here
                values[row, : len(here)] = acts[page * width : (page + 1) * width]
    tensors = (indices, values.to(dtype), true, starts)
    return Codes(*(a if a is None else a.to(device) for a in tensors))


def make_weights(d_sae: int, d: int, dtype: torch.dtype, device="cpu") -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    W_dec, b_dec = torch.randn(d_sae, d, generator=gen), torch.randn(d, generator=gen)
    return W_dec.to(device, dtype), b_dec.to(device, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name, dtype", FORMS, ids=str)
@pytest.mark.parametrize("counts, d_sae, d, width, n_tail", SIZES, ids=str)
def test_decode_and_its_gradients(counts, d_sae, d, width, n_tail, name, dtype, bias, device):
    codes = make_codes(counts, d_sae, width, n_tail, dtype, device)
    W_dec, b_dec = make_weights(d_sae, d, dtype, device)

    def of(f):
        def g(indices, values, counts, starts, W_dec, *b_dec):
            return f(Codes(indices, values, counts, starts), W_dec, *b_dec)

        return g

    with use_backend(name):
        assert_as_accurate(of(decode), of(decode_ref), [*codes, W_dec, *([b_dec] if bias else [])])


@pytest.mark.parametrize("name", BACKENDS)
def test_free_slots_have_no_gradient_and_add_nothing(name, device):
    codes = make_codes([2, 0, 5], 9, 5, None, device=device)
    W_dec, b_dec = make_weights(9, 6, torch.float32, device)
    W_dec[0] = torch.nan
    free = torch.arange(5, device=device) >= codes.counts[:, None]
    codes.indices[codes.indices == 0] += 1  # row 0 is named by free slots only
    codes.indices[free] = 0
    values = codes.values.clone().requires_grad_()
    with use_backend(name):
        x_hat = decode(codes._replace(values=values), W_dec, b_dec)
        x_hat.square().sum().backward()
    assert x_hat.isfinite().all() and values.grad.isfinite().all()
    assert torch.equal(x_hat[1], b_dec)
    assert not values.grad[free].any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_row(name, bad, device):
    codes = make_codes([3, 3], 9, 3, None, device=device)
    codes.values[1, 1] = bad
    with use_backend(name):
        x_hat = decode(codes, *make_weights(9, 6, torch.float32, device))
    assert x_hat[0].isfinite().all() and not x_hat[1].isfinite().any()


@pytest.mark.parametrize("name", BACKENDS)
def test_values_may_be_fp32_beside_half_precision_weights(name, device):
    codes = make_codes([4, 2, 9], 20, 4, 2, device=device)
    W_dec, b_dec = make_weights(20, 24, torch.float16, device)
    with use_backend(name):
        x_hat = decode(codes, W_dec, b_dec.float())
    truth = decode_ref(codes._replace(values=codes.values.double()), W_dec.double(), b_dec.double())
    assert x_hat.dtype == torch.float16
    assert (x_hat - truth).abs().max() <= 4 * torch.finfo(torch.float16).eps * truth.abs().max()


def test_the_short_tail_is_one():
    assert int(missing(make_codes([3, 9, 12], 20, 4, 2))) == 8


def test_gradients_in_fp64(device):
    codes = make_codes([2, 9, 0, 4], 11, 4, 2, torch.float64, device)
    W_dec, b_dec = make_weights(11, 5, torch.float64, device)
    leaves = [codes.values.requires_grad_(), W_dec.requires_grad_(), b_dec.requires_grad_()]
    taken = torch.zeros_like(codes.values)
    taken[codes.values != 0] = 1

    def f(values, W_dec, b_dec):
        return decode(codes._replace(values=values * taken), W_dec, b_dec)

    assert torch.autograd.gradcheck(f, leaves)


def test_custom_op(device):
    codes = make_codes([2, 9, 0, 4], 11, 4, 2, device=device)
    W_dec, b_dec = make_weights(11, 5, torch.float32, device)
    args = (codes.indices, codes.values.requires_grad_(), *codes[2:], W_dec.requires_grad_(), b_dec)
    torch.library.opcheck(torch.ops.fastsae.decode, args)


def test_errors():
    codes = make_codes([2, 3], 9, 3, None)
    W_dec, b_dec = make_weights(9, 6, torch.float32)
    with pytest.raises(ValueError, match=r"b_dec is \[5\], but must be \[6\]"):
        decode(codes, W_dec, b_dec[:5])
    with pytest.raises(ValueError, match="W_dec must be contiguous"):
        decode(codes, W_dec.T.contiguous().T)
    with pytest.raises(ValueError, match=r"codes.indices is int64, but must be one of: int32"):
        decode(codes._replace(indices=codes.indices.long()), W_dec)
    with pytest.raises(ValueError, match=r"codes.values is \[2, 2\], but must be \[2, 3\]"):
        decode(codes._replace(values=codes.values[:, :2]), W_dec)
    with pytest.raises(ValueError, match=r"codes.indices has 2 rows, but must have 1"):
        decode(codes._replace(counts=codes.counts[:1]), W_dec)
    with pytest.raises(ValueError, match=r"tail_starts is \[2\], but must be \[3\]"):
        decode(codes._replace(tail_starts=codes.counts), W_dec)
    with pytest.raises(ValueError, match="W_dec has no rows"):
        decode(codes, W_dec[:0])
    with pytest.raises(TypeError, match=r"codes is a builtins.tuple, but must be a fastsae_kernels.Codes"):
        decode(tuple(codes), W_dec)
    with pytest.raises(TypeError, match=r"W_dec is a list, but must be a tensor"):
        decode(codes, W_dec.tolist())
