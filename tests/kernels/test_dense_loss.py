import importlib

import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.dense_loss import dense_codes_grad, dense_codes_grad_ref, dense_loss, dense_loss_ref
from fastsae_kernels.testing import assert_as_accurate
from tests.kernels.forms import BACKENDS, FORMS

SIZES = [(1, 1), (7, 13), (8, 64), (9, 65), (3, 513), (65, 33), (130, 7), (0, 5)]


def randn(*shape: int, dtype=torch.float32, seed: int = 0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("name, dtype", FORMS, ids=str)
@pytest.mark.parametrize("batch, d", SIZES)
def test_dense_loss(batch, d, name, dtype, device):
    inputs = [
        randn(batch, d, dtype=dtype, device=device),
        randn(d, dtype=dtype, seed=1, device=device),
        randn(batch, d, dtype=dtype, seed=2, device=device),
    ]
    with use_backend(name):
        assert_as_accurate(dense_loss, dense_loss_ref, inputs, grads=False)
        g, mse, g_sum = dense_loss(*inputs)
    assert g.dtype == dtype and mse.dtype == g_sum.dtype == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dense_loss_bad_rows_and_out_dtype(name, bad, device):
    decoded, b_dec, target = (
        randn(*shape, seed=i, device=device) for i, shape in enumerate([(9, 5), (5,), (9, 5)])
    )
    with use_backend(name):
        wide, rounded = (
            dense_loss(decoded, b_dec, target),
            dense_loss(decoded, b_dec, target, out_dtype=torch.float16),
        )
        target[8, 4] = bad
        _, mse, _ = dense_loss(decoded, b_dec, target)
    assert torch.equal(rounded[0], wide[0].half()) and torch.equal(rounded[2], wide[2])
    assert not mse[8].isfinite() and mse[:8].isfinite().all()


@pytest.mark.parametrize("with_l1, with_norms", [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("name, dtype", FORMS, ids=str)
@pytest.mark.parametrize("batch, n", SIZES)
def test_dense_codes_grad(batch, n, name, dtype, with_l1, with_norms, device):
    inputs = [
        randn(batch, n, dtype=dtype, device=device),
        randn(batch, n, dtype=dtype, seed=1, device=device).relu(),
        torch.tensor(0.3, device=device) if with_l1 else None,
        randn(n, seed=2, device=device).abs() if with_norms else None,
    ]
    if batch > 2:
        inputs[1][1] = 0  # nothing active
        inputs[1][2] += 1  # everything

    def of(f):
        return lambda g_acts, acts, l1, norms: f(g_acts, acts, l1=l1, norms=norms)

    with use_backend(name):
        assert_as_accurate(of(dense_codes_grad), of(dense_codes_grad_ref), inputs, grads=False)
        found = of(dense_codes_grad)(*inputs)
    assert found.g_pre.dtype == dtype and found.n_fired.dtype == torch.int32
    assert found.l1.dtype == found.acts_sum.dtype == found.g_sum.dtype == torch.float32


def test_long_rows_are_summed_as_exactly():
    """Where a sum in sequence would show."""
    inputs = [randn(256, 8192), randn(256, 8192, seed=1).relu(), randn(8192, seed=2).abs()]
    assert_as_accurate(
        lambda g_acts, acts, norms: dense_codes_grad(g_acts, acts, norms=norms),
        lambda g_acts, acts, norms: dense_codes_grad_ref(g_acts, acts, norms=norms),
        inputs,
        grads=False,
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_acts_stay_visible(name, device):
    acts = randn(5, 9, device=device).relu()
    acts[3, 4] = torch.nan
    with use_backend(name):
        ones = torch.ones_like(acts)
        g_pre, l1_rows, acts_sum, _, n_fired = dense_codes_grad(
            ones, acts, l1=torch.tensor(1.0, device=device)
        )
    assert l1_rows.isnan().tolist() == [row == 3 for row in range(5)]
    assert acts_sum.isnan().tolist() == [latent == 4 for latent in range(9)]
    assert torch.equal(n_fired, (acts != 0).sum(0, dtype=torch.int32)) and g_pre[3, 4] != 0


@pytest.mark.parametrize("name", BACKENDS)
def test_acts_too_small_for_the_gradients_dtype_are_active(name, device):
    acts = torch.tensor([[1e-12, 0.0, 1.0]], device=device)
    with use_backend(name):
        g_pre, *_, n_fired = dense_codes_grad(torch.ones(1, 3, device=device).half(), acts)
    assert (
        g_pre.tolist() == [[1.0, 0.0, 1.0]] and g_pre.dtype == torch.float16 and n_fired.tolist() == [1, 0, 1]
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_inputs_are_left_alone_but_for_the_gradient(name, device):
    g_acts, acts = randn(5, 9, device=device), randn(5, 9, seed=1, device=device).relu()
    before = g_acts.clone(), acts.clone()
    with use_backend(name):
        dense_loss(g_acts, acts[0], acts)
        assert torch.equal(g_acts, before[0])
        assert dense_codes_grad(g_acts, acts, l1=torch.tensor(1.0, device=device))[0] is g_acts
    assert not torch.equal(g_acts, before[0]) and torch.equal(acts, before[1])


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "triton"])
def test_chunks_of_rows(name, monkeypatch):
    """And of columns, whose sums meet again."""
    module = importlib.import_module("fastsae_kernels.dense_loss")
    for size, small in {"CHUNK": 30, "CPP_ROWS": 2, "CPP_COLUMNS": 5}.items():
        monkeypatch.setattr(module, size, small)
    g_acts, acts = randn(7, 13), randn(7, 13, seed=1).relu()
    with use_backend(name):
        assert_as_accurate(dense_codes_grad, dense_codes_grad_ref, [g_acts, acts], grads=False)
        assert_as_accurate(dense_loss, dense_loss_ref, [g_acts, acts[0], acts], grads=False)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_plays_no_part(default, device):
    g_acts, acts = randn(5, 9, device=device), randn(5, 9, seed=1, device=device).relu()
    l1 = torch.tensor(3.0, device=device)
    expected = dense_codes_grad(g_acts.clone(), acts, l1=l1)
    torch.set_default_dtype(default)
    try:
        found = dense_codes_grad(g_acts, acts, l1=l1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_custom_ops():
    acts = randn(5, 9).relu()
    torch.library.opcheck(torch.ops.fastsae.dense_loss, (acts, acts[0], randn(5, 9), torch.bfloat16))
    torch.library.opcheck(torch.ops.fastsae.dense_codes_grad, (randn(5, 9), acts, torch.tensor(1.0), None))


def test_errors():
    x = randn(4, 6)
    with pytest.raises(ValueError, match=r"b_dec is \[5\], but must be \[6\]"):
        dense_loss(x, x[0, :5], x)
    with pytest.raises(ValueError, match=r"target is \[3, 6\], but must be \[4, 6\]"):
        dense_loss(x, x[0], x[:3])
    with pytest.raises(ValueError, match=r"out_dtype is torch.int64"):
        dense_loss(x, x[0], x, out_dtype=torch.int64)
    with pytest.raises(ValueError, match=r"g_acts is \[3, 6\], but must be \[4, 6\]"):
        dense_codes_grad(x[:3], x)
    with pytest.raises(ValueError, match=r"l1 is \[6\], but must be \[\]"):
        dense_codes_grad(x, x, l1=x[0])
    with pytest.raises(ValueError, match=r"norms is \[4\], but must be \[6\]"):
        dense_codes_grad(x, x, norms=torch.ones(4))
    with pytest.raises(ValueError, match=r"acts must be contiguous"):
        dense_codes_grad(x, x.T.contiguous().T)
