"""What only a GPU shows: its own bf16, TF32, races, waits, graphs, large addresses. `pytest -m gpu tests/kernels`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benches.cases import CASES
from benches.world import Shape, World
from fastsae_kernels.codes import Codes
from fastsae_kernels.decode import decode
from fastsae_kernels.decode_loss import decode_loss
from fastsae_kernels.dense_jumprelu import dense_jumprelu_grad
from fastsae_kernels.dense_loss import dense_codes_grad
from fastsae_kernels.encode import encode, encode_ref
from fastsae_kernels.encode_codes import encode_codes
from fastsae_kernels.select_batchtopk import select_batchtopk
from fastsae_kernels.select_threshold import select_threshold
from fastsae_kernels.select_topk import select_topk, select_topk_ref
from fastsae_kernels.testing import assert_as_accurate, assert_close, error
from fastsae_kernels.transpose import transpose
from fastsae_kernels.update import grad_rows, update_rows
from tests.kernels.every_op import BETAS, EPS, calls, scalars, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parents[2]
# kernels are compiled for each of these: few, that between them have every dtype, aligned rows and odd ones
CHECKED = [
    Shape(256, 768, 24576, 32, torch.bfloat16),
    Shape(131, 769, 8209, 31, torch.bfloat16),
    Shape(131, 769, 8209, 31, torch.float16),
    Shape(256, 768, 24576, 32, torch.float32),
]
REPEATED = [Shape(2048, 768, 24576, 32, torch.bfloat16), Shape(1031, 513, 8209, 31, torch.float32)]
STEP = Shape(1024, 512, 4096, 32, torch.bfloat16)
FAR_BATCH, FAR_LATENTS = 32768, 131072  # 2^32 pre_acts
TF32_EPS = 2.0**-11


@pytest.mark.parametrize("shape", CHECKED, ids=str)
@pytest.mark.parametrize("op", list(CASES))
def test_oracle_over_many_tiles(op, shape, device):
    """Every op, and what the benches time, against fp64."""
    CASES[op](World(shape, device)).check()


@pytest.mark.parametrize("shape", REPEATED, ids=str)
def test_the_same_bits_every_time(shape, device):
    """Outputs and gradients of every op, 20 runs."""
    for name, call in calls(World(shape, device)).items():
        first = [t.clone() for t in tensors(call())]
        for run in range(19):
            again = tensors(call())
            assert len(again) == len(first) > 0
            for i, (a, b) in enumerate(zip(first, again, strict=True)):
                assert torch.equal(a, b), f"{name}, tensor {i}, run {run + 2}"


@pytest.mark.parametrize("variant", ["fused", "library"])
@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_products_obey_torchs_tf32_switch(tf32, variant, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if tf32 else "ieee")
    w = World(Shape(300, 768, 1000, 8, torch.float32), device)
    inputs = (w.x[0], w.W_dec.T, w.shifted)

    def op(*a: Tensor) -> Tensor:
        return encode(*a, variant=variant)[0]

    got, truth = op(*inputs), encode_ref(*(a.double() for a in inputs))[0]
    if tf32:
        assert 1e-5 < error(got, truth) <= 2 * error(encode_ref(*inputs)[0], truth) + 4 * TF32_EPS
    else:
        assert_as_accurate(op, lambda *a: encode_ref(*a)[0], inputs)


class Training:
    """A TopK SAE: its whole step on buffers that stay where they are, as a graph wants them."""

    def __init__(self, w: World) -> None:
        self.shape = w.shape
        self.x, self.b_dec = w.x[0].clone(), w.b_dec * 0.1
        self.scalars, self.mse = scalars(w.device), torch.zeros((), device=w.device)
        self.shadows = [w.W_dec.clone(), w.W_dec.clone()]
        masters = [w.W_dec.float().clone() for _ in range(2)]
        self.dec, self.enc = ([W, torch.zeros_like(W), torch.zeros_like(W)] for W in masters)
        self.bias = [w.zeros.clone() for _ in range(3)]

    def state(self) -> list[Tensor]:
        return [self.mse, *self.shadows, *self.dec, *self.enc, *self.bias]

    def step(self) -> None:
        x, adam = self.x, {"scalars": self.scalars, "betas": BETAS, "eps": EPS}
        W_dec, W_enc = self.shadows
        pre_acts, group_max = encode(x, W_enc.T, self.bias[0], self.b_dec)
        codes = select_topk(pre_acts, self.shape.k, group_max)
        out = decode_loss(codes, W_dec, self.b_dec, x)
        t = transpose(codes, self.shape.n)
        update_rows(t, codes.values, out.g, *self.dec, shadow=W_dec, project=True, renormalise=True, **adam)
        bias = dict(zip(("bias", "bias_m", "bias_v"), self.bias, strict=True))
        update_rows(t, out.g_values, (x - self.b_dec).to(x.dtype), *self.enc, shadow=W_enc, **bias, **adam)
        self.mse.copy_(out.mse.mean())

    def train(self, step, batches: list[Tensor]) -> list[Tensor]:
        """Copies of the state after a step on each batch."""
        for i, x in enumerate(batches):
            self.x.copy_(x)
            self.scalars.copy_(scalars(x.device, i + 1))
            step()
        return [t.clone() for t in self.state()]


def test_a_whole_step_is_one_graph(device):
    """Capture raises at any wait for the device. The replays, with new batches and scalars, are the eager steps bit for bit."""
    w = World(STEP, device)
    batches = [w.randn(STEP.batch, STEP.d) for _ in range(4)]
    graphed, graph = Training(w), torch.cuda.CUDAGraph()
    start = [t.clone() for t in graphed.state()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed.train(graphed.step, batches[:2])  # compiles and loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        graphed.step()
    for tensor, value in zip(graphed.state(), start, strict=True):
        tensor.copy_(value)
    eager = Training(w)
    replayed, expected = graphed.train(graph.replay, batches), eager.train(eager.step, batches)
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(replayed, start, strict=True)), "everything has moved"
    assert all(t.isfinite().all() for t in replayed)


def test_no_op_with_its_sizes_given_waits(device):
    w = World(STEP, device)
    k, x = w.shape.k, w.x[0]
    codes, t, pre, group_max = w.codes[0], w.transposed[0], w.pre[0], w.group_max[0]
    training = Training(w)
    tailed = select_threshold(pre, group_max, width=k, n_tail=None)
    leaves = [x.clone().requires_grad_(), w.W_dec.clone().requires_grad_()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_threshold(pre, group_max, width=k, n_tail=99)
        select_threshold(pre, group_max, width=k, n_tail=99, threshold=w.norms, bandwidth=0.1)
        decode_loss(tailed, w.W_dec, w.b_dec, x)
        grad_rows(transpose(tailed, w.shape.n), tailed.values, x)
        sparse = encode_codes(leaves[0], leaves[1].T, w.zeros, k=k)
        decode(sparse, leaves[1]).float().square().sum().backward()
        select_batchtopk(pre, k, group_max, width=k, n_tail=99)
        decode(codes, w.W_dec, training.b_dec)
        grad_rows(t, codes.values, x)
        dense_codes_grad(pre.clone(), pre.relu())
        dense_jumprelu_grad(pre.clone(), pre, w.norms, bandwidth=0.1)
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def need(n_bytes: float) -> None:
    """Skip where the device has less free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < n_bytes:
        pytest.skip(f"needs {n_bytes / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} are free")


@pytest.fixture
def far(device) -> Tensor:
    """More pre_acts than an int32 can count, 8.6 GB."""
    need(8 * FAR_BATCH * FAR_LATENTS)
    return torch.randn(FAR_BATCH, FAR_LATENTS, dtype=torch.bfloat16, device=device)


ROWS = (0, FAR_BATCH // 2 - 1, FAR_BATCH // 2, FAR_BATCH - 1)


def test_select_topk_beyond_int32(far):
    codes = select_topk(far, 32)
    for row in ROWS:
        acts, selected = select_topk_ref(far[row : row + 1], 32)
        latents = selected[0].nonzero().squeeze(1)
        assert torch.equal(codes.indices[row].long(), latents)
        assert torch.equal(codes.values[row], acts[0, latents])


def test_select_threshold_beyond_int32(far):
    codes = select_threshold(far.sub_(4), width=64)
    for row in ROWS:
        n, latents = int(codes.counts[row]), (far[row] > 0).nonzero().squeeze(1)
        assert torch.equal(codes.indices[row, :n].long(), latents)
        assert torch.equal(codes.values[row, :n], far[row, latents])


def test_select_batchtopk_beyond_int32(far):
    codes, threshold = select_batchtopk(far, 4, width=64)
    assert int(codes.counts.sum()) == 4 * FAR_BATCH
    for row in ROWS:
        acts = torch.zeros_like(far[row])
        n = int(codes.counts[row])
        acts[codes.indices[row, :n].long()] = codes.values[row, :n]
        certain, tied = far[row] > threshold, far[row] == threshold
        assert torch.equal(acts[certain], far[row, certain])
        assert not acts[~(certain | tied)].any()


@pytest.mark.parametrize("variant", ["fused", "library"])
def test_encode_beyond_int32(variant, device):
    need(6 * FAR_BATCH * FAR_LATENTS)
    w = World(Shape(FAR_BATCH, 64, FAR_LATENTS, 1, torch.bfloat16), device)
    pre_acts, group_max = encode(w.x[0], w.W_dec.T, w.zeros, variant=variant)
    for row in ROWS:
        x = w.x[0][row : row + 1]
        rival, truth = (
            encode_ref(x.to(dtype), w.W_dec.to(dtype).T, w.zeros.to(dtype))[0]
            for dtype in (torch.bfloat16, torch.float64)
        )
        assert_close({"pre": pre_acts[row : row + 1]}, {"pre": rival}, {"pre": truth})
        assert torch.equal(group_max[row], pre_acts[row].view(-1, 32).amax(1))


def test_dense_codes_grad_beyond_int32(far):
    need(8 * FAR_BATCH * FAR_LATENTS)
    far.relu_()
    g_pre, l1, *_, n_fired = dense_codes_grad(far.clone(), far)
    for row in ROWS:
        assert torch.equal(g_pre[row], far[row])
        torch.testing.assert_close(l1[row], far[row].float().sum(), rtol=1e-4, atol=0)
    for latents in far.split(1024, dim=1):
        found, n_fired = n_fired.split([latents.shape[1], len(n_fired) - latents.shape[1]])
        assert torch.equal(found, (latents > 0).sum(0, dtype=torch.int32))


def test_dense_jumprelu_grad_beyond_int32(far):
    need(8 * FAR_BATCH * FAR_LATENTS)
    level = torch.ones(far.shape[1], device=far.device)
    found = dense_jumprelu_grad(far.clone(), far, level, bandwidth=0.5)
    for row in ROWS:
        assert torch.equal(found.g_pre[row], far[row] * (far[row] > 1))
    for first in range(0, far.shape[1], 1024):
        part = far[:, first : first + 1024]
        assert torch.equal(found.n_fired[first : first + 1024], (part > 1).sum(0, dtype=torch.int32))


def test_weights_beyond_int32(device):
    """decode and update_rows on the last rows of a weight of more than 2^31 elements."""
    n, d = 2**17 + 64, 2**14
    need(20 * n * d)
    W = torch.zeros(n, d, device=device)
    rows = torch.tensor([0, 2**17 - 1, n - 2, n - 1], device=device)
    W[rows] = torch.randn(4, d, device=device)
    codes = Codes(
        rows.int().expand(3, 4).contiguous(),
        torch.rand(3, 4, device=device) + 0.5,
        torch.full((3,), 4, dtype=torch.int32, device=device),
    )
    half = W.bfloat16()
    truth = codes.values.double() @ half[rows].double()
    x_hat = decode(codes, half)
    assert error(x_hat, truth) <= 4 * torch.finfo(torch.bfloat16).eps
    out = decode_loss(codes, half, torch.zeros(d, device=device), x_hat)
    assert out.finite and error(out.mse, (truth - x_hat.double()).square().sum(1)) < 1e-3
    del half
    m, v, before = torch.zeros_like(W), torch.zeros_like(W), W[rows].clone()
    source = torch.randn(3, d, device=device)
    update_rows(
        transpose(codes, n), codes.values, source, W, m, v, scalars=scalars(device), betas=BETAS, eps=EPS
    )
    g = codes.values.double().T @ source.double()
    assert error(m[rows], g * (1 - BETAS[0])) < 1e-6
    step = float(scalars(device)[0])
    assert error(W[rows] - before, -step * g.sign()) < 1e-2
    assert int((m != 0).any(1).sum()) == 4, "no other row was touched"


def test_no_access_out_of_bounds():
    """compute-sanitizer's memcheck, every allocation by itself, so that one past an end is seen."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sanitizer, "--tool=memcheck", "--error-exitcode=9", sys.executable]
    done = subprocess.run(
        [*command, "-m", "tests.kernels.every_op"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
