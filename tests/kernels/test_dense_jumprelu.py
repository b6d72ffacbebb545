import importlib

import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.dense_jumprelu import dense_jumprelu_grad, dense_jumprelu_grad_ref
from fastsae_kernels.testing import assert_as_accurate
from tests.kernels.forms import BACKENDS, FORMS

SIZES = [(1, 1), (7, 13), (8, 64), (9, 65), (3, 513), (65, 33), (130, 7), (0, 5)]


def inputs(batch, n, dtype, device="cpu"):
    """A third of the pre-activations in a band of 1 around thresholds of 0 to 2, some on its edges."""
    gen = torch.Generator().manual_seed(0)
    g, pre = (torch.randn(batch, n, generator=gen) for _ in range(2))
    threshold = torch.randint(0, 5, (n,), generator=gen) / 2
    if batch > 4:
        pre[1], pre[2], pre[3] = threshold, threshold - 0.5, threshold + 0.5
    slope, norms = torch.tensor(-0.7), torch.rand(n, generator=gen) + 0.5
    tensors = [g.to(dtype), pre.to(dtype), threshold, slope, norms]
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("options", ["step", "smooth", "smooth, norms"])
@pytest.mark.parametrize("name, dtype", FORMS, ids=str)
@pytest.mark.parametrize("batch, n", SIZES)
def test_dense_jumprelu_grad(batch, n, name, dtype, options, device):
    g, pre, threshold, slope, norms = inputs(batch, n, dtype, device)
    arguments = [
        g,
        pre,
        threshold,
        slope if "smooth" in options else None,
        norms if "norms" in options else None,
    ]

    def of(f):
        return lambda g, pre, threshold, slope, norms: f(
            g, pre, threshold, bandwidth=1.0, slope=slope, norms=norms, tanh_scale=4.0
        )

    with use_backend(name):
        assert_as_accurate(of(dense_jumprelu_grad), of(dense_jumprelu_grad_ref), arguments, grads=False)
        found = of(dense_jumprelu_grad)(*arguments)
    assert found.g_pre is g and found.g_in_band.dtype == torch.float32
    assert found.n_fired.dtype == found.n_above.dtype == found.n_in_band.dtype == torch.int32
    if batch > 4:
        assert 0 < found.n_in_band.sum() < found.n_above.sum() and found.n_fired.sum() < found.n_above.sum()


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_stays_visible(name, device):
    g, pre, threshold, *_ = inputs(6, 9, torch.float32, device)
    pre[5, 4] = torch.nan
    expected = dense_jumprelu_grad_ref(g, pre, threshold, bandwidth=1.0)
    with use_backend(name):
        found = dense_jumprelu_grad(g, pre, threshold, bandwidth=1.0)
    assert found.acts_sum.isnan().tolist() == [latent == 4 for latent in range(9)]
    for field, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, field), value, equal_nan=True)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "triton"])
def test_chunks_of_rows(name, smooth, monkeypatch):
    """And of columns, whose sums meet again."""
    module = importlib.import_module("fastsae_kernels.dense_jumprelu")
    for size, small in {"CHUNK": 30, "CPP_ROWS": 2, "CPP_COLUMNS": 5}.items():
        monkeypatch.setattr(module, size, small)

    def of(f):
        return lambda g, pre, t, slope, norms: f(
            g, pre, t, bandwidth=1.0, slope=slope if smooth else None, norms=norms, tanh_scale=4.0
        )

    with use_backend(name):
        arguments = inputs(7, 13, torch.float32)
        assert_as_accurate(of(dense_jumprelu_grad), of(dense_jumprelu_grad_ref), arguments, grads=False)


def test_custom_op():
    g, pre, threshold, slope, norms = inputs(5, 9, torch.float32)
    torch.library.opcheck(torch.ops.fastsae.dense_jumprelu_grad, (g, pre, threshold, 1.0, slope, norms, 4.0))


def test_errors():
    g, pre, threshold, _, norms = inputs(4, 6, torch.float32)
    with pytest.raises(ValueError, match=r"g_acts is \[3, 6\], but must be \[4, 6\]"):
        dense_jumprelu_grad(g[:3], pre, threshold, bandwidth=1.0)
    with pytest.raises(ValueError, match=r"threshold is \[5\], but must be \[6\]"):
        dense_jumprelu_grad(g, pre, threshold[:5], bandwidth=1.0)
    with pytest.raises(ValueError, match=r"slope is \[6\], but must be \[\]"):
        dense_jumprelu_grad(g, pre, threshold, bandwidth=1.0, slope=norms)
    with pytest.raises(ValueError, match=r"tanh_scale is 0.0, but with a slope must be above 0"):
        dense_jumprelu_grad(g, pre, threshold, bandwidth=1.0, slope=norms[0])
    with pytest.raises(ValueError, match=r"norms is \[5\], but must be \[6\]"):
        dense_jumprelu_grad(g, pre, threshold, bandwidth=1.0, norms=norms[:5])
