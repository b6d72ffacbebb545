"""What all ops share: no autocast within, first derivatives only, one graph under torch.compile, a backend by stack."""

import threading

import pytest
import torch

import fastsae_kernels as ops
from fastsae_kernels._launch import backend
from tests.kernels.forms import BACKENDS

each_backend = pytest.mark.parametrize("name", BACKENDS)
D_IN, D_SAE = 13, 70


def parameters(device):
    gen = torch.Generator().manual_seed(0)
    shapes = [(5, D_IN), (D_SAE, D_IN), (D_SAE,), (D_SAE, D_IN), (D_IN,)]
    return [torch.randn(shape, generator=gen).to(device) for shape in shapes]


def everything(x, W_encT, b_enc, W_dec, b_dec):
    """Outputs and gradients of every op, in a list."""
    l1 = torch.tensor(0.5, device=x.device)
    pre_acts, group_max = ops.encode(x, W_encT.T, b_enc, b_dec)
    acts = pre_acts.relu()
    codes = ops.encode_codes(x, W_encT.T, b_enc, b_dec, k=5)
    cut, level = ops.select_batchtopk(pre_acts, 5)
    x_hat = ops.decode(codes, W_dec, b_dec)
    grads = torch.autograd.grad(
        (x_hat - x).square().sum() + pre_acts.sum() + cut.values.sum(), [W_encT, b_enc, W_dec, b_dec]
    )
    out = ops.decode_loss(codes, W_dec, b_dec, x, l1=l1)
    t = ops.transpose(codes, D_SAE)
    state = [torch.zeros_like(W_dec) for _ in range(3)]
    scalars = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.0], device=x.device)
    ops.update_rows(t, codes.values.detach(), out.g, *state, scalars=scalars, betas=(0.9, 0.999), eps=1e-8)
    found = [pre_acts, group_max, *codes[:3], *cut[:3], level, x_hat, *grads, *out[:6], *state]
    found += [*ops.grad_rows(t, codes.values, out.g), *ops.dense_loss(x_hat.detach(), b_dec, x)]
    found += ops.dense_jumprelu_grad(pre_acts.detach().clone(), pre_acts, b_enc.abs(), bandwidth=0.5)
    return [*found, *ops.dense_codes_grad(pre_acts.detach().clone(), acts, l1=l1)]


@each_backend
def test_autocast_changes_nothing(name, device):
    """fp32 in, fp32 within, fp32 out: a caller who wants half precision passes it."""

    def leaves():
        return [p.clone().requires_grad_(i > 0) for i, p in enumerate(parameters(device))]

    with ops.use_backend(name):
        truth = everything(*leaves())
        with torch.autocast(device.type, torch.bfloat16):
            found = everything(*leaves())
    for got, exact in zip(found, truth, strict=True):
        assert got.dtype == exact.dtype and torch.equal(got, exact)


@pytest.mark.parametrize("op", ["encode", "select", "encode_codes", "decode"])
def test_a_second_derivative_raises(op, device):
    x, W_encT, b_enc, W_dec, b_dec = parameters(device)
    pre = ops.encode(x, W_encT.T, b_enc)[0]
    codes = ops.select_topk(pre, 5)
    calls = {
        "encode": lambda w: ops.encode(x, w.T, b_enc)[0],
        "select": lambda w: ops.select_topk(x @ w.T, 5).values,
        "encode_codes": lambda w: ops.encode_codes(x, w.T, b_enc, k=5).values,
        "decode": lambda w: ops.decode(codes, w, b_dec),
    }
    leaf = W_dec.clone().requires_grad_()
    (first,) = torch.autograd.grad(calls[op](leaf).square().sum(), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(calls[op](leaf).square().sum(), leaf)
    assert torch.equal(first, plain)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.square().sum(), leaf)


@pytest.mark.parametrize("name", ["select_threshold", "select_topk", "select_batchtopk"])
def test_a_selection_without_maxima_compiles_whole(name, device):
    """Its graph has ops of ours and nothing that a compiler would have to see through."""
    pre = torch.randn(6, D_SAE, device=device)
    calls = {
        "select_threshold": lambda p: ops.select_threshold(p, width=D_SAE).values,
        "select_topk": lambda p: ops.select_topk(p, 5).values,
        "select_batchtopk": lambda p: ops.select_batchtopk(p, 5, width=D_SAE)[0].values,
    }
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with ops.use_backend("triton"):
        compiled = torch.compile(calls[name], fullgraph=True, backend=keep)
        assert torch.equal(compiled(pre), calls[name](pre))
    called = [str(node.target) for node in graphs[0].graph.nodes if "fastsae" in str(node.target)]
    assert called == [f"fastsae.{name}.default"]


def test_backends_end_in_any_order(device):
    x = torch.ones(1, device=device)
    before = backend(x)
    inside, leave = threading.Event(), threading.Event()

    def other():
        with ops.use_backend("triton"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with ops.use_backend("torch"):
        leave.set()
        thread.join()
        assert backend(x) == "torch"
    assert backend(x) == before
    with pytest.raises(ValueError, match="backend is 'cuda'"), ops.use_backend("cuda"):
        pass
