"""A training step through the ops, encode to grad_rows, against autograd of the dense loss; and NaN and infinity on that way."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsae_kernels as ops
from fastsae_kernels.testing import assert_close
from tests.kernels.forms import BACKENDS

BATCH, D_IN, D_SAE = 6, 13, 70
KERNELS = Path(__file__).parents[2] / "kernels"
SELECTIONS = {
    "relu": lambda pre, top: ops.select_threshold(pre, top, width=4, n_tail=None),
    "jumprelu": lambda pre, top: ops.select_threshold(
        pre, top, threshold=torch.full_like(pre[0], 0.7), width=4, n_tail=None
    ),
    "topk": lambda pre, top: ops.select_topk(pre, 5, top),
    "batchtopk": lambda pre, top: ops.select_batchtopk(pre, 5, top, width=4, n_tail=None)[0],
}
each_selection = pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def parameters(device):
    gen = torch.Generator().manual_seed(0)
    shapes = {
        "x": (BATCH, D_IN),
        "W_encT": (D_SAE, D_IN),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    return {name: torch.randn(shape, generator=gen).to(device) for name, shape in shapes.items()}


def forward(p, select, l1):
    x = p["x"] - p["b_dec"]
    codes = select(*ops.encode(x, p["W_encT"].T, p["b_enc"]))
    norms = p["W_dec"].norm(dim=1)
    return x, codes, ops.decode_loss(codes, p["W_dec"], p["b_dec"], p["x"], l1=l1, norms=norms)


def step(p, select, l1):
    """The gradients of all parameters, none of them from a [batch, d_sae] tensor, and which latents are active."""
    x, codes, out = forward(p, select, l1)
    assert out.finite
    t = ops.transpose(codes, D_SAE)
    g_W_dec, colsum = ops.grad_rows(t, codes.values, out.g)
    g_values = out.g_values * (codes.values != 0)
    g_W_encT, g_b_enc = ops.grad_rows(t, g_values, x)
    rows = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    grads = {
        "W_dec": g_W_dec + l1 / BATCH * colsum[:, None] * rows,  # of the norms in the L1 term
        "W_encT": g_W_encT,
        "b_enc": g_b_enc,
        "b_dec": out.g_sum - p["W_encT"].T @ g_b_enc,
    }
    return grads, ops.to_dense(codes, D_SAE) != 0


def autograd(p, active, l1, dtype):
    p = {name: t.to(dtype, copy=True).requires_grad_(name != "x") for name, t in p.items()}
    acts = ((p["x"] - p["b_dec"]) @ p["W_encT"].T + p["b_enc"]) * active
    x_hat = acts @ p["W_dec"] + p["b_dec"]
    mse = (x_hat - p["x"]).square().sum(1).mean()
    (mse + l1 * (acts * p["W_dec"].norm(dim=1)).sum(1).mean()).backward()
    return {name: t.grad for name, t in p.items() if name != "x"}


@each_backend
@each_selection
def test_a_step_is_autograds(select, backend, device):
    p, l1 = parameters(device), torch.tensor(0.25, device=device)
    with ops.use_backend(backend):
        grads, active = step(p, select, l1)
    assert active.any()
    assert_close(grads, autograd(p, active, l1, torch.float32), autograd(p, active, l1, torch.float64))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_backend
@each_selection
def test_what_is_not_finite_sets_the_flag(select, backend, bad, device):
    """No index is out of range, and what the other rows hold stays finite where their selection is their own."""
    p, l1 = parameters(device), torch.tensor(0.25, device=device)
    with ops.use_backend(backend):
        p["x"][3, 5] = bad
        _, codes, out = forward(p, select, l1)
        assert not out.finite
        assert codes.indices.min() >= 0 and codes.indices.max() < D_SAE
        t = ops.transpose(codes, D_SAE)
        assert t.starts[-1] == codes.counts.sum() and ops.missing(codes) == 0
    others = torch.arange(BATCH, device=device) != 3
    if select is not SELECTIONS["batchtopk"]:
        assert out.mse[others].isfinite().all() and out.g[others].isfinite().all()


@each_selection
def test_compiles_whole_at_any_batch(select, device):
    """Forward and backward without a break in the graph, with sizes that only the data knows."""

    def loss(x, W_encT, b_enc, W_dec):
        codes = select(*ops.encode(x, W_encT.T, b_enc))
        return ops.decode(codes, W_dec).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    p = parameters(device)
    for batch in (6, 4, 5):
        inputs = [
            p["x"][:batch],
            *(p[name].clone().requires_grad_() for name in ("W_encT", "b_enc", "W_dec")),
        ]
        got = torch.autograd.grad(compiled(*inputs), inputs[1:])
        truth = torch.autograd.grad(loss(*inputs), inputs[1:])
        assert all(torch.allclose(g, t) for g, t in zip(got, truth, strict=True))


@each_backend
@pytest.mark.parametrize("name", ["relu", "batchtopk"])
def test_an_empty_batch_with_room_for_tails(name, backend, device):
    p = parameters(device)
    for n_tail in (0, 3):
        selections = {
            "relu": lambda pre, n=n_tail: ops.select_threshold(pre, width=4, n_tail=n),
            "batchtopk": lambda pre, n=n_tail: ops.select_batchtopk(pre, 5, width=4, n_tail=n)[0],
        }
        with ops.use_backend(backend):
            pre = torch.zeros(0, D_SAE, device=device, requires_grad=True)
            codes = selections[name](pre)
            assert ops.missing(codes) == 0 and ops.to_dense(codes, D_SAE).shape == (0, D_SAE)
            assert ops.decode_loss(codes, p["W_dec"], p["b_dec"], p["x"][:0]).mse.shape == (0,)
            assert not ops.grad_rows(ops.transpose(codes, D_SAE), codes.values, p["x"][:0])[0].any()
            ops.decode(codes, p["W_dec"]).sum().backward()
            assert pre.grad.shape == pre.shape


@each_backend
@pytest.mark.parametrize("name", ["relu", "batchtopk"])
def test_codes_with_room_for_a_tail_that_nothing_needs(name, backend, device):
    p = parameters(device)
    selections = {
        "relu": lambda pre: ops.select_threshold(pre, width=D_SAE, n_tail=None),
        "batchtopk": lambda pre: ops.select_batchtopk(pre, 5, width=D_SAE, n_tail=None)[0],
    }
    with ops.use_backend(backend):
        codes = selections[name](ops.encode(p["x"], p["W_encT"].T, p["b_enc"])[0])
        assert codes.tail_starts.tolist() == [0] * (BATCH + 1)
        assert ops.decode(codes, p["W_dec"]).shape == p["x"].shape
        assert ops.transpose(codes, D_SAE).starts[-1] == codes.counts.sum()


def test_biases_in_fp32_get_sums_in_fp32(device):
    """Beside weights in half precision: a sum over the batch overflows fp16."""
    b_enc, b_dec = (torch.zeros(n, device=device, requires_grad=True) for n in (64, 8))
    x, W = torch.ones(4096, 8, device=device), torch.full((64, 8), 0.01, device=device).half()
    codes = ops.encode_codes(x, W.T, b_enc + 5, b_dec, k=2)
    codes.values.backward(torch.full_like(codes.values, 32.0))
    assert torch.allclose(b_dec.grad, torch.tensor(-2 * 4096 * 32 * 0.01, device=device), rtol=1e-3)
    b_enc.grad = None
    pre, _ = ops.encode(x, W.T, b_enc)
    pre.backward(torch.full_like(pre, 32.0))
    assert torch.equal(b_enc.grad, torch.full_like(b_enc, 4096 * 32.0))


def test_everything_works_without_triton():
    """As where there is no wheel of it (macOS, Windows): the import fails, and plain torch runs."""
    code = """
import sys
sys.modules["triton"] = None
import torch, fastsae_kernels as ops
x, W = torch.randn(5, 8), torch.randn(40, 8)
codes = ops.encode_codes(x, W.T, torch.zeros(40), k=3)
assert ops.decode(codes, W).shape == (5, 8)
assert ops.grad_rows(ops.transpose(codes, 40), codes.values, x)[0].shape == (40, 8)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(KERNELS), "PATH": "/usr/bin:/bin"}
    )
